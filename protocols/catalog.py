"""Every protocol by name. To add one, write its file and add its line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ssl_bench.errors import unknown
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.subject import Scores, Subject
from ssl_bench.protocols import (
    adapters,
    davis,
    detection,
    fewshot,
    finetune,
    knn,
    linear,
    locality,
    lowshot,
    retrieval,
    semseg,
    similarity,
    stability,
    zeroshot,
)


class ProtocolModule(Protocol):
    """What a file of this folder offers. Its `Recipe` is a frozen dataclass with selected_on, source and published."""

    VERSION: int  # bumped whenever a number can change
    DATA: str  # the kind of dataset that it reads, of evaluate/datasets.py's KINDS
    DISTRIBUTED: bool  # under torchrun: whether the processes run it together, or only the first does

    @property
    def RECIPES(self) -> Mapping[str, Any]:  # noqa: N802  (a constant of the module)
        """Published settings by name; the first is what a bare protocol name runs."""

    # Optional: KEEPS_SIZES = True where built-in images are read at their stored size, so that sizes can be set;
    # data_used(subject, recipe) where a protocol has its own lists of images.

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
    "semseg": semseg,
    "detection": detection,
    "zeroshot": zeroshot,
    "similarity": similarity,
    "davis": davis,
}


def choose(
    name: str, *, built_in: bool = False, protocols: Mapping[str, ProtocolModule] = PROTOCOLS
) -> tuple[str, str, Any]:
    """`knn/dino` -> protocol, recipe name, recipe. A bare name is its first row, on built-in data its first toy row."""
    protocol, _, recipe = name.strip().partition("/")
    if protocol not in protocols:
        raise unknown("protocol", protocol, protocols)
    recipes = protocols[protocol].RECIPES
    if not recipe:
        toys = [row for row in recipes if built_in and row.split("-")[-1] == "toy"]
        recipe = next(iter([*toys, *recipes]))
    if recipe not in recipes:
        raise unknown(f"recipe of {protocol}", recipe, recipes)
    return protocol, recipe, recipes[recipe]
