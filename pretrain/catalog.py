"""The methods. To add one, write its file and add its line here."""

from __future__ import annotations

from types import ModuleType

from ssl_bench.errors import unknown
from ssl_bench.pretrain import extrema, mae, mmc, moca, sdae, tec
from ssl_bench.pretrain.method import Training

METHODS: dict[str, ModuleType] = {
    "mae": mae,
    "moca": moca,
    "mmc": mmc,
    "tec": tec,
    "extrema": extrema,
    "sdae": sdae,
}


def choose(method: str, recipe: str | None, *, built_in: bool) -> tuple[ModuleType, str, Training]:
    """A method's module and one of its recipes: the named one, else `toy` on built-in data, else the paper's."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    module = METHODS[method]
    recipes: dict[str, Training] = module.RECIPES
    name = recipe or ("toy" if built_in else next(iter(recipes)))
    if name not in recipes:
        raise unknown(f"recipe of {method}", name, recipes)
    return module, name, recipes[name]
