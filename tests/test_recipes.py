"""`--set key=value` means what the annotation says, for every kind of it, or is refused with what was expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Optional

import pytest

from ssl_bench.errors import UserError
from ssl_bench.evaluate.recipes import parse, settings_from_text, with_settings


@dataclass(frozen=True)
class Recipe:
    neighbors: tuple[int, ...] = (10, 20)
    temperature: float = 0.07
    crop_px: int | None = 224
    norm: bool = True
    token: Literal["cls", "mean"] = "cls"
    source: str = "a paper"

    def __post_init__(self) -> None:
        if self.temperature == 0:
            raise UserError("temperature=0: expected another.")


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("5", int, 5),
        ("-1", int, -1),
        ("0.07", float, 0.07),
        ("1e-6", float, 1e-6),
        ("3", float, 3.0),
        ("bicubic", str, "bicubic"),
        ("yes", bool, True),
        ("True", bool, True),
        ("1", bool, True),
        ("no", bool, False),
        ("FALSE", bool, False),
        ("0", bool, False),
        ("mean", Literal["cls", "mean"], "mean"),
        ("2", Literal[1, 2], 2),
        ("none", int | None, None),
        ("Null", Optional[float], None),  # noqa: UP045  (another type than X | None)
        ("7", int | None, 7),
        ("0.5", Optional[float], 0.5),  # noqa: UP045
        ("5", tuple[int, ...], (5,)),
        ("5, 10,20", tuple[int, ...], (5, 10, 20)),
        ("(5, 10)", tuple[int, ...], (5, 10)),
        ("[0.1,1]", tuple[float, ...], (0.1, 1.0)),
        ("none", tuple[int, ...] | None, None),
        ("1,2", tuple[int, ...] | None, (1, 2)),
    ],
)
def test_every_kind_of_annotation(text: str, annotation: Any, value: Any) -> None:
    parsed = parse("field", text, annotation)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("five", int, "a whole number"),
        ("1.5", int, "a whole number"),
        ("", int, "a whole number"),
        ("warm", float, "a finite number"),
        *((text, float, "a finite number") for text in ("nan", "inf", "-inf", "Infinity", "1e999")),
        ("nan", float | None, "a finite number"),
        ("1,nan", tuple[float, ...], "a finite number"),
        ("perhaps", bool, "true or false"),
        ("patch", Literal["cls", "mean"], "one of cls, mean"),
        ("", tuple[int, ...], "one value or several"),
        ("()", tuple[int, ...], "one value or several"),
        ("5,x", tuple[int, ...], "a whole number"),
    ],
)
def test_what_a_field_cannot_mean(text: str, annotation: Any, expected: str) -> None:
    with pytest.raises(UserError, match=rf"^field=.*: expected {expected}"):
        parse("field", text, annotation)


def test_settings_change_the_fields_that_they_name_and_no_other() -> None:
    changed = with_settings(Recipe(), {"neighbors": "5", "norm": "false", "crop_px": "none", "token": "mean"})
    assert changed == Recipe(neighbors=(5,), norm=False, crop_px=None, token="mean")
    assert with_settings(Recipe(), {}) == Recipe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": "5"}, r"unknown field of .*'neighbours'; did you mean 'neighbors'"),
        ({"source": "me"}, "unknown field of .*'source'"),  # where a row comes from is not a setting
        ({"temperature": "inf"}, "temperature=inf: expected a finite number"),
        ({"temperature": "0"}, "temperature=0: expected another"),  # the dataclass checks what it is given
    ],
)
def test_settings_that_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_settings(Recipe(), settings)


def test_pairs_of_the_command_line() -> None:
    assert settings_from_text(["neighbors=5, 10", " norm = false", "a=b=c"], "") == {
        "neighbors": "5, 10",
        "norm": "false",
        "a": "b=c",
    }
    for pair in ("neighbors", "=5", ""):
        with pytest.raises(UserError, match=r"expected key=value, got .*; for example --set neighbors=10"):
            settings_from_text([pair], "--set neighbors=10")
