"""Turn a JSON document into a Struct or dataclass, believing nothing: every field there, none too many, of its type.

A number that is read wrong is worse than one that is missing, so nothing is converted or filled in silently. The only
freedom: a field with a default may be left out, and is left out on writing when it holds that default.

`read_quickly` does in microseconds, by msgspec, what `loads` and `parse` do with a valid document. It has no opinion
on any other: that is for these two to refuse, with a message, or to accept.
"""

from __future__ import annotations

import contextlib
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
from pathlib import Path
from typing import Any, Literal, Never, TypeVar

import msgspec
from msgspec import NODEFAULT

from ssl_bench.errors import UserError, unknown

Document = TypeVar("Document")
StrictDocument = TypeVar("StrictDocument", bound="Strict")

_KINDS: dict[type, str] = {str: "a string", int: "a whole number", float: "a finite number", bool: "true or false"}


class Strict(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What `read_quickly` can read; otherwise like a frozen dataclass."""


def plain(value: Any) -> Any:
    """The same value in JSON's own types: tuples become lists, numpy's numbers Python's, paths strings."""
    try:
        return _plain(value)
    except RecursionError as error:
        raise UserError("expected something that JSON can hold, found too many levels in one another.") from error


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one return a kind of value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Strict) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        fields = {name: (getattr(value, name), default) for name, default in _defaults(type(value)).items()}
        return {
            name: _plain(item) for name, (item, default) in fields.items() if default is NODEFAULT or item != default
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
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


def content_of(path: Path | str) -> bytes:
    """Path.read_bytes in half the time, which adds up over a hundred thousand files."""
    descriptor = os.open(path, _FLAGS)
    try:
        content = os.read(descriptor, _CHUNK)
        while len(content) >= _CHUNK and (more := os.read(descriptor, _CHUNK)):
            content += more
        return content
    finally:
        os.close(descriptor)


_CHUNK = 1 << 16
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)


def loads(text: str, where: str) -> Any:
    """Parse `text`; NaN and Infinity, which are no JSON, are refused, and so is a key that stands twice."""

    def refuse(constant: str) -> Never:
        raise UserError(f"{where}: {constant} is not a number that a record may hold.")

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):  # 1e999
            refuse(digits)
        return number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: {twice!r} stands twice in one object; which of the two holds?")
        return found

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise UserError(f"{where}: not a JSON document ({error}).") from error


_encode = msgspec.json.Encoder().encode


@functools.cache
def _decoder(kind: type[StrictDocument]) -> msgspec.json.Decoder[StrictDocument]:
    return msgspec.json.Decoder(kind)


def read_quickly(kind: type[StrictDocument], content: bytes) -> StrictDocument | None:
    """What `loads` and `parse` make of `content`, or None where they should have a look at it themselves.

    msgspec checks the types and __post_init__ the rest, but of equal keys all but the last are dropped without a word.
    So what was read is written again: with as many colons as before, no key was dropped. (Each key has one, and strings
    keep theirs unless one is spelled \\u003a.)
    """
    try:
        document = _decoder(kind).decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    whole = _encode(document).count(b":") == content.count(b":")
    return document if whole and not (b"\\" in content and b"\\u" in content) else None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@functools.cache
def _defaults(kind: Any) -> dict[str, Any]:
    """The fields in their order, each with its default, or NODEFAULT if it must be there."""
    if issubclass(kind, Strict):
        return {field.name: field.default for field in msgspec.structs.fields(kind)}
    fields = dataclasses.fields(kind)
    return {field.name: NODEFAULT if field.default is dataclasses.MISSING else field.default for field in fields}


def parse(kind: type[Document], value: Any, where: str) -> Document:
    """`value` as the dataclass `kind`, or a UserError that begins with `where` and names the field."""
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    defaults = _defaults(kind)  # type: ignore[arg-type]
    for name in value:
        if name not in defaults:
            raise UserError(f"{where}: {unknown('field', str(name), defaults)}")
    for name, default in defaults.items():
        if name not in value and default is NODEFAULT:
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
        return value
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
    if dataclasses.is_dataclass(hint) or issubclass(hint, Strict):
        return parse(hint, value, where)
    return _scalar(hint, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    """JSON does not tell 58 from 58.0, so a whole number will do for a float; True will not do for 1."""
    if kind is float and type(value) in (int, float):
        with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
            if math.isfinite(value):
                return float(value)
    elif type(value) is kind:
        return value
    raise _wrong(where, _KINDS[kind], value)


def _wrong(where: str, expected: str, value: Any) -> UserError:
    return UserError(f"{where}: expected {expected}, found {reprlib.repr(value)}.")
