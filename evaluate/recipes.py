"""Recipes are frozen dataclasses; `--set key=value` changes a field, typed by its annotation and checked."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ssl_bench.errors import UserError, unknown

R = TypeVar("R")


def with_settings(recipe: R, settings: Mapping[str, str]) -> R:
    """`recipe` with some fields changed, each given as text: `{"neighbors": "5,10", "norm": "false"}`.

    The dataclass's own __post_init__ checks that the values fit together.
    """
    hints = typing.get_type_hints(type(recipe))
    fields = [field.name for field in dataclasses.fields(recipe) if field.name not in _ORIGIN]  # type: ignore[arg-type]
    changes = {}
    for name, text in settings.items():
        if name not in fields:
            raise unknown(f"field of {type(recipe).__module__.rpartition('.')[2]}'s recipe", name, fields)
        changes[name] = parse(name, text, hints[name])
    return dataclasses.replace(recipe, **changes)  # type: ignore[type-var]


# Where a row comes from is not a setting.
_ORIGIN = ("source", "published", "note")


def settings_from_text(pairs: list[str], example: str) -> dict[str, str]:
    """`["k=v", ...]` of the command line; `example` is for the error."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"expected key=value, got {pair!r}; for example {example}")
        settings[name.strip()] = value.strip()
    return settings


def parse(name: str, text: str, annotation: Any) -> Any:
    """The value that `text` means under a type annotation: bool, int, float, str, Literal, X | None, tuple[X, ...]."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return parse(name, text, inner)
    if origin is tuple:
        parts = [part for part in text.strip("()[]").split(",") if part.strip()]
        if not parts:
            raise UserError(f"{name}={text}: expected one value or several, separated by commas.")
        return tuple(parse(name, part.strip(), arguments[0]) for part in parts)
    if origin is typing.Literal:
        if text not in map(str, arguments):
            raise UserError(f"{name}={text}: expected one of {', '.join(map(str, arguments))}.")
        return next(argument for argument in arguments if str(argument) == text)
    if annotation is bool:
        if text.lower() not in _BOOLEANS:
            raise UserError(f"{name}={text}: expected true or false.")
        return _BOOLEANS[text.lower()]
    kind = {int: "a whole number", float: "a finite number"}.get(annotation, str(annotation))
    try:
        value = annotation(text)
    except ValueError:
        raise UserError(f"{name}={text}: expected {kind}.") from None
    if isinstance(value, float) and not math.isfinite(value):  # float() reads nan and inf, which no setting can mean
        raise UserError(f"{name}={text}: expected {kind}.")
    return value


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
