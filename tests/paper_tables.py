"""What the tests of the papers' tables share: reading them. What holds for all tables, test_tables.py checks."""

from __future__ import annotations

import itertools

from ssl_bench.evaluate.recipes import with_settings
from ssl_bench.leaderboards import tables
from ssl_bench.leaderboards.published import Cell, cells
from ssl_bench.leaderboards.standing import as_typed
from ssl_bench.leaderboards.tables import Measure, Pretraining, Row
from ssl_bench.pretrain.catalog import METHODS

# Reading --------------------------------------------------------------------------------------------------------------


def of_table(paper: str, table: str, **wanted: str) -> list[Cell]:
    """The numbers of a table, by whatever tells them apart, in the paper's order."""
    return [cell for cell in cells(paper) if cell.table == table and cell.agrees(wanted)]


def one(paper: str, table: str, metric: str, **wanted: str) -> Cell:
    """The only number of a table that agrees."""
    (found,) = of_table(paper, table, metric=metric, **wanted)
    return found


def sums(paper: str, table: str) -> dict[str, tuple[int, float]]:
    """Column -> how many numbers it has, and what they come to."""
    found = {}
    for column in tables.find(f"{paper}:{table}").columns:
        values = [row.cells[column.name].value for row in tables.rows(paper, table) if column.name in row.cells]
        found[column.name] = (len(values), round(sum(values), 2))
    return found


def lines(paper: str, table: str) -> list[tuple[str, int | None, float]]:
    """(method, epochs, what its numbers come to) of every line as it is printed, several networks in one or not."""
    marks = ("method", "epochs", "operation", "num_masks")
    printed = itertools.groupby(of_table(paper, table), key=lambda cell: [cell.field(mark) for mark in marks])
    found = [list(line) for _, line in printed]
    return [(line[0].method, line[0].epochs, round(sum(cell.value for cell in line), 2)) for line in found]


def keyed(paper: str, table: str) -> dict[tuple[object, ...], tuple[object, ...]]:
    """All that a cell is of -> what is printed in it."""
    return {
        (
            c.method,
            c.arch,
            c.pretrain_data,
            c.epochs,
            c.multicrop,
            tuple(sorted(c.setting.items())),
            c.dataset,
            c.metric,
        ): (
            c.value,
            c.std,
            c.unit,
        )
        for c in of_table(paper, table)
    }


def measured(paper: str, table: str, label: str, column: str) -> Measure | str:
    """How the cell in this row and column is measured."""
    (row,) = (row for row in tables.rows(paper, table) if row.label == label)
    (layout,) = (each for each in tables.find(f"{paper}:{table}").columns if each.name == column)
    return layout.measure_of(row.cells[column])


def trained(paper: str, table: str, row: Row) -> Pretraining | None:
    """What trains the row: all its cells must say the same."""
    found = [tables.find(f"{paper}:{table}").pretraining_of(cell) for cell in row.cells.values()]
    assert all(each is found[0] for each in found), row.label
    return found[0]


def trained_recipe(pretraining: Pretraining):
    """With its settings, as --set would."""
    method, _, name = pretraining.recipe.partition("/")
    return with_settings(
        METHODS[method].RECIPES[name], {key: as_typed(value) for key, value in pretraining.settings.items()}
    )


def check_settings(recipe, settings: dict[str, str], unread: set[str]) -> None:
    """What the paper varies in a row is what the recipe has."""
    given = {name: value.replace("+", ",") for name, value in settings.items() if name not in unread}
    assert with_settings(recipe, given) == recipe, given
