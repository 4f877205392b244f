"""What the five papers printed, as data: `published("moca", 8)`.

One file a paper, {paper}.csv beside this one, one row a number. A number stands there as it was printed, in the unit
that it was printed in; `note` says where a cell is doubtful. How one is reproduced stands in leaderboards/papers/.

    paper          moca, mmc, tec, extrema, sdae
    table          as the paper numbers it: 8, 2a, 11d, fig3c; text:4.3 for numbers in a section's prose only
    method         as the literature spells it (DINO, MoCo-v3, ...); Random was never trained, Scratch only with labels
                   on the task itself, Supervised with labels in place of pre-training
    arch           ViT-B/16, ...
    pretrain_data  the dataset's name in `ssl-bench ls datasets`, or in lower case as printed (sfm)
    epochs         of pre-training
    multicrop      yes or no, where the paper says
    setting        whatever else tells two cells apart: key=value;key=value
    dataset        on which the number was measured
    metric, value, std, unit
    note           why the cell is doubtful, in words

An empty field: the paper does not say.
"""

from __future__ import annotations

import csv
import functools
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_bench.errors import UserError, unknown

if TYPE_CHECKING:
    import pandas

PAPERS = {
    "moca": "MOCA: self-supervised representation learning by predicting masked online codebook assignments",
    "mmc": "MMC: masked momentum contrastive learning for zero-shot semantic understanding",
    "tec": "TEC: towards sustainable self-supervised learning",
    "extrema": "ExtreMA: extreme masking for learning instance and distributed visual representations",
    "sdae": "SdAE: self-distillated masked autoencoder",
}
UNITS = ("percent", "points", "fraction", "images", "seconds", "minutes", "hours", "GB", "times")
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """One printed number and all that the paper says of it."""

    paper: str
    table: str
    method: str
    arch: str
    pretrain_data: str
    epochs: int | None
    multicrop: str
    setting: dict[str, str]
    dataset: str
    metric: str
    value: float
    std: float | None
    unit: str
    note: str

    def field(self, name: str) -> str:
        """A column of the file, or a key of the setting, as text; empty where the paper does not say."""
        if name in COLUMNS and name != "setting":
            value = getattr(self, name)
            return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        return self.setting.get(name, "")

    def agrees(self, wanted: dict[str, str]) -> bool:
        """Whether every column or setting named has the value given."""
        return all(self.field(name) == value for name, value in wanted.items())


COLUMNS = tuple(field.name for field in fields(Cell))


@functools.cache
def cells(paper: str) -> tuple[Cell, ...]:
    """Every number of a paper, in the order of its tables."""
    if paper not in PAPERS:
        raise unknown("paper", paper, PAPERS)
    return read_cells(_FOLDER / f"{paper}.csv", paper)


def read_cells(path: Path, paper: str) -> tuple[Cell, ...]:
    """The numbers in a file, which must be those of `paper`; an error names the file and the line."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if tuple(header) != COLUMNS:
                raise UserError(f"{path}, line 1: expected the columns {','.join(COLUMNS)}, found {','.join(header)}.")
            return tuple(_cell(row, paper, f"{path}, line {reader.line_num}") for row in reader)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: expected comma-separated values, {error}.") from error


def _cell(row: list[str], paper: str, where: str) -> Cell:
    if len(row) != len(COLUMNS):
        raise UserError(f"{where}: expected {len(COLUMNS)} fields, found {len(row)}.")
    text = dict(zip(COLUMNS, row, strict=True))
    if text["paper"] != paper:
        raise UserError(f"{where}, paper: expected {paper}, found {text['paper']!r}.")
    for name in ("table", "method", "metric", "value"):
        if not text[name]:
            raise UserError(f"{where}, {name}: expected something, found nothing.")
    for name, known in (("unit", UNITS), ("multicrop", ("yes", "no", ""))):
        if text[name] not in known:
            raise UserError(f"{where}, {name}: expected one of {', '.join(filter(None, known))}, found {text[name]!r}.")
    return Cell(
        **{name: text[name] for name in COLUMNS if name not in ("epochs", "setting", "value", "std")},
        epochs=int(_number(text["epochs"], r"\d+", f"{where}, epochs")) if text["epochs"] else None,
        setting=_setting(text["setting"], where),
        value=_number(text["value"], r"-?\d+(\.\d+)?", f"{where}, value"),
        std=_number(text["std"], r"\d+(\.\d+)?", f"{where}, std") if text["std"] else None,
    )


def _setting(text: str, where: str) -> dict[str, str]:
    setting: dict[str, str] = {}
    for pair in text.split(";") if text else ():
        key, equals, value = pair.partition("=")
        plain = equals and value and "=" not in value and re.fullmatch(r"[a-z][a-z0-9_]*", key)
        if not plain or key in COLUMNS or key in setting:
            raise UserError(f"{where}, setting: expected key=value;key=value, each key once, found {text!r}.")
        setting[key] = value
    return setting


def _number(text: str, form: str, where: str) -> float:
    # float() also reads nan, 1_000, 1e3 and .5: no number is printed so.
    if not re.fullmatch(form, text, re.ASCII):
        raise UserError(f"{where}: expected a plain number such as 300, 37.1 or 0.5, found {text!r}.")
    return float(text)


def published(paper: str, table: str | int | None = None) -> pandas.DataFrame:
    """The numbers of a paper, or of one of its tables, in the columns of the file: `published("moca", 8)`."""
    import pandas

    chosen = [cell for cell in cells(paper) if table is None or cell.table == str(table)]
    if table is not None and not chosen:
        raise unknown(f"table of {paper}", str(table), dict.fromkeys(cell.table for cell in cells(paper)))
    rows = [
        [getattr(cell, name) if name != "setting" else _settings_text(cell.setting) for name in COLUMNS]
        for cell in chosen
    ]
    frame = pandas.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype({"epochs": "Int64", "value": "float64", "std": "float64"})


def _settings_text(setting: dict[str, str]) -> str:
    return ";".join(f"{key}={value}" for key, value in setting.items())
