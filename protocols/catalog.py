"""Every protocol by name. To add one, write its file and add its line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ssl_bench.errors import unknown
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.subject import Scores, Subject
from ssl_bench.protocols import adapters, fewshot, finetune, knn, linear, locality, lowshot, retrieval, stability


class ProtocolModule(Protocol):
    """What a file of this folder offers. Its `Recipe` is a frozen dataclass with selected_on, source and published."""

    VERSION: int  # bumped whenever a number can change
    DATA: str  # the kind of dataset that it reads, of evaluate/datasets.py's KINDS
    DISTRIBUTED: bool  # under torchrun: whether the processes run it together, or only the first does

    @property
    def RECIPES(self) -> Mapping[str, Any]:  # noqa: N802  (a constant of the module)
        """Published settings by name; the first is what a bare protocol name runs."""

    def readings(self, subject: Subject, recipe: Any) -> Mapping[str, list[Reading]]:
        """What it will read of the network on each split, so that protocols of one run share a forward pass."""

    def check(self, subject: Subject, recipe: Any) -> None:
        """Raise a UserError for what can be known to fail before any image is read."""

    def run(self, subject: Subject, recipe: Any) -> Scores:
        """The scores."""


PROTOCOLS: dict[str, ProtocolModule] = {
    "knn": knn,
    "linear": linear,
    "lowshot": lowshot,
    "finetune": finetune,
    "adapters": adapters,
    "fewshot": fewshot,
    "retrieval": retrieval,
    "stability": stability,
    "locality": locality,
}


def choose(
    name: str, *, built_in: bool = False, protocols: Mapping[str, ProtocolModule] = PROTOCOLS
) -> tuple[str, str, Any]:
    """`knn` or `knn/dino` -> protocol, recipe name, recipe. A bare name is the first row; on built-in data, `toy`."""
    protocol, _, recipe = name.strip().partition("/")
    if protocol not in protocols:
        raise unknown("protocol", protocol, protocols)
    recipes = protocols[protocol].RECIPES
    if not recipe:
        recipe = "toy" if built_in and "toy" in recipes else next(iter(recipes))
    if recipe not in recipes:
        raise unknown(f"recipe of {protocol}", recipe, recipes)
    return protocol, recipe, recipes[recipe]
