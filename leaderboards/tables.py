"""The papers' tables: which published numbers stand where, and which run gives a checkpoint a number there.

A table is described in papers/{paper}.py, its numbers are in published/{paper}.csv. `ssl-bench ls tables` lists them,
`ssl-bench leaderboard moca:8` prints one, `ssl-bench reproduce moca:8` runs what it needs.
"""

from __future__ import annotations

import functools
import importlib
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssl_bench.errors import UserError, unknown
from ssl_bench.leaderboards.published import PAPERS, Cell, cells
from ssl_bench.leaderboards.record import path_name, settings_text


@dataclass(frozen=True)
class Measure:
    """A run that gives a checkpoint a number, and which of its scores that is."""

    recipe: str  # protocol/recipe
    dataset: str  # by its name in `ssl-bench ls datasets`; "" where the protocol reads none (efficiency)
    metric: str  # a key of the record's scores
    settings: Mapping[str, Any] = field(default_factory=dict)  # --set, where no recipe says it
    scale: float = 1.0  # printed unit = scale x recorded unit
    of: Literal["checkpoint", "pretraining"] = "checkpoint"  # efficiency measures how a row is pre-trained
    note: str = ""  # what the paper leaves open or does otherwise


@dataclass(frozen=True)
class Column:
    """A column of numbers: which cells stand in it, and how each of them is measured, or why it cannot be."""

    name: str
    cells: Mapping[str, str]  # column of the file or key of the setting -> value
    measure: Measure | str
    rows: tuple[tuple[Mapping[str, str], Measure | str], ...] = ()  # rows measured otherwise; the first that agrees

    def measure_of(self, cell: Cell) -> Measure | str:
        """How a checkpoint gets the number that stands where `cell` does; a text says why it cannot."""
        return next((other for wanted, other in self.rows if cell.agrees(dict(wanted))), self.measure)


@dataclass(frozen=True)
class Pretraining:
    """What trains the checkpoints of some rows, where one of our methods does."""

    rows: Mapping[str, str]
    recipe: str  # method/recipe: moca/table2-depth1
    data: str = "imagenet"
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""  # TEC: the checkpoint that it learns from, in words: "MAE, 1600 epochs"
    note: str = ""

    @property
    def folder(self) -> str:
        """Where its checkpoint is put. What differs between two rows is part of the name, so that they get two."""
        base = [self.base.lower()] if self.base else []
        data = [self.data] if self.data != "imagenet" else []
        return f"runs/{'-'.join(path_name(each) for each in (*self.recipe.split('/'), *base, *self._texts(), *data))}"

    def command(self, *, data: str = "", base: str = "SPEC") -> str:
        """As a user types it, with data that have another name here, and the checkpoint of the base."""
        method, _, recipe = self.recipe.partition("/")
        return " ".join(
            ["ssl-bench pretrain", method, f"--data {shlex.quote(data or self.data)}", f"--recipe {recipe}"]
            + ([f"--base {base}"] if self.base else [])
            + [f"--set {shlex.quote(setting)}" for setting in self._texts()]
            + [f"--out {self.folder}"]
        )

    def _texts(self) -> list[str]:
        return [settings_text({name: value}) for name, value in self.settings.items()]


@dataclass(frozen=True)
class Table:
    """One table of a paper."""

    title: str  # in our words
    columns: tuple[Column, ...]
    pretraining: tuple[Pretraining, ...] = ()  # the first that agrees with a row trains it
    note: str = ""  # why it cannot be reproduced as it stands, what it contradicts

    def pretraining_of(self, cell: Cell) -> Pretraining | None:
        """What trains the checkpoint that `cell` is a number of, where one of our methods does."""
        return next((each for each in self.pretraining if cell.agrees(dict(each.rows))), None)


@dataclass(frozen=True)
class Row:
    """The cells that share a line of the table."""

    label: str
    cells: Mapping[str, Cell]  # a column's name -> cell

    @property
    def first(self) -> Cell:
        """Any of them: what tells rows apart is the same in all."""
        return next(iter(self.cells.values()))


_ROW_FIELDS = ("method", "arch", "pretrain_data", "epochs", "multicrop")


def rows(paper: str, table: str) -> list[Row]:
    """The published lines of a table, in the paper's order, each under a label that no other has."""
    layout = find(f"{paper}:{table}")
    own = [cell for cell in cells(paper) if cell.table == table]
    of_columns = {name for column in layout.columns for name in column.cells}
    of_lines = [name for name in _ROW_FIELDS if name not in of_columns]
    of_lines += [key for key in dict.fromkeys(key for cell in own for key in cell.setting) if key not in of_columns]
    lines: dict[tuple[str, ...], dict[str, Cell]] = {}
    for cell in own:
        columns = [column.name for column in layout.columns if cell.agrees(dict(column.cells))]
        assert len(columns) == 1, f"{paper}:{table}: {cell} stands in {len(columns)} columns"
        line = lines.setdefault(tuple(cell.field(name) for name in of_lines), {})
        assert columns[0] not in line, f"{paper}:{table}: {cell} stands where another does"
        line[columns[0]] = cell
    labels = _labels(of_lines, list(lines))
    return [Row(labels[key], line) for key, line in lines.items()]


def _labels(names: Sequence[str], lines: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The method, and what has several values in the table; beyond that, what tells equal labels apart."""
    varying = [place for place in range(len(names)) if len({line[place] for line in lines} - {""}) > 1]
    labels = {line: _label(names, line, varying) for line in lines}
    sharing: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for line, label in labels.items():
        sharing[label].append(line)
    for alike in sharing.values():
        differing = {place for place in range(len(names)) if len({line[place] for line in alike}) > 1}
        labels |= {line: _label(names, line, sorted({*varying, *differing})) for line in alike}
    assert len(set(labels.values())) == len(labels), f"lines that share a label: {sorted(labels.values())}"
    return labels


def _label(names: Sequence[str], line: tuple[str, ...], told: Sequence[int]) -> str:
    parts = [value for name, value in zip(names, line, strict=True) if name == "method"]
    for place in told:
        name, value = names[place], line[place]
        if name == "method" or not value:
            continue
        if name == "epochs":
            parts.append(f"{value} epochs")
        elif name == "multicrop":
            parts += ["multi-crop"] if value == "yes" else []
        else:
            parts.append(value if name in _ROW_FIELDS else f"{name}={value}")
    return ", ".join(parts)


@functools.cache
def of_paper(paper: str) -> Mapping[str, Table]:
    """The tables of a paper by their numbers, in its order."""
    described: Mapping[str, Table] = importlib.import_module(f"ssl_bench.leaderboards.papers.{paper}").TABLES
    return described


@functools.cache
def tables() -> dict[str, Table]:
    """Every table by its name, `moca:8`, in the papers' order."""
    return {f"{paper}:{number}": table for paper in PAPERS for number, table in of_paper(paper).items()}


def find(name: str) -> Table:
    """The table of that name."""
    paper, colon, number = name.partition(":")
    if paper not in PAPERS:
        raise unknown("table", name, tables())
    if not colon:
        raise UserError(f"table {name!r}: expected PAPER:TABLE, one of {name}:{{{','.join(of_paper(paper))}}}.")
    if number not in of_paper(paper):
        raise unknown("table", name, [f"{paper}:{known}" for known in of_paper(paper)])
    return of_paper(paper)[number]


def names() -> Iterator[tuple[str, str, str]]:
    """(name, paper, number) of every table."""
    for name in tables():
        paper, _, number = name.partition(":")
        yield name, paper, number
