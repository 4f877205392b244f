"""Turn a JSON document into a dataclass, believing nothing: every field there, none too many, each of its own type.

A number that is read wrong is worse than one that is missing, so nothing is converted or filled in silently. The only
freedom: a field with a default may be left out, and is left out on writing when it holds that default.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ssl_bench.errors import UserError, unknown

Document = TypeVar("Document")

_KINDS: dict[type, str] = {str: "a string", int: "a whole number", float: "a finite number", bool: "true or false"}


def plain(value: Any) -> Any:  # noqa: PLR0911 - one return a kind of value
    """The same value in JSON's own types: tuples become lists, numpy's numbers Python's, paths strings."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.default is dataclasses.MISSING or getattr(value, field.name) != field.default
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__name__ in {"bool", "bool_"}:  # numpy's bool is no number and no bool
        return bool(value)
    raise UserError(f"expected something that JSON can hold, found {reprlib.repr(value)} ({type(value).__name__}).")


def canonical(value: Any) -> str:
    """One spelling for equal values, whatever the order of their keys: what hashes are taken of."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def loads(text: str, where: str) -> Any:
    """Parse `text`; NaN and Infinity, which are no JSON, are refused."""

    def refuse(constant: str) -> None:
        raise UserError(f"{where}: {constant} is not a number that a record may hold.")

    try:
        return json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON document ({error}).") from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def parse(kind: type[Document], value: Any, where: str) -> Document:
    """`value` as the dataclass `kind`, or a UserError that begins with `where` and names the field."""
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            raise UserError(f"{where}: {unknown('field', str(name), fields)}")
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: the field {name!r} is missing.")
    hints = _hints(kind)  # type: ignore[arg-type]
    filled = {name: _parse(hints[name], item, f"{where}: {name}") for name, item in value.items()}
    try:
        return kind(**filled)
    except UserError as error:  # from __post_init__, which knows the field but not the file
        raise UserError(f"{where}: {error}") from error


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _finite(value, where)
    if origin in (types.UnionType, typing.Union):  # only `X | None` is used
        kind = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _parse(kind, value, where)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            raise _wrong(where, "one of " + ", ".join(json.dumps(known) for known in arguments), value)
        return value
    if origin is list:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        return [_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)  # type: ignore[arg-type]
    return _scalar(hint, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    """JSON does not tell 58 from 58.0, so a whole number will do for a float; True will not do for 1."""
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    raise _wrong(where, _KINDS[kind], value)


def _finite(value: Any, where: str) -> Any:
    """Free-form JSON, such as a recipe, still holds no infinity (`1e999` would be read as one)."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(where, "a finite number", value)
    if isinstance(value, dict):
        return {key: _finite(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{where}[{index}]") for index, item in enumerate(value)]
    return value


def _wrong(where: str, expected: str, value: Any) -> UserError:
    return UserError(f"{where}: expected {expected}, found {reprlib.repr(value)}.")
