"""What the tests of the papers' tables share: reading the tables, and checking that they hang together."""

from __future__ import annotations

import itertools

from ssl_bench import efficiency
from ssl_bench.evaluate.datasets import KINDS
from ssl_bench.evaluate.recipes import with_settings
from ssl_bench.leaderboards import tables
from ssl_bench.leaderboards.published import Cell, cells
from ssl_bench.leaderboards.tables import Measure, Pretraining, Row
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.measure import Cost
from ssl_bench.protocols.catalog import choose
from ssl_bench.protocols.openmm.coco_ap import _STATS
from ssl_bench.protocols.openmm.coco_ap import KINDS as COCO_KINDS

# What a published metric is measured by: a protocol, and one of its scores.
SCORES = {
    "knn_top1": ("knn", "top1"),
    "linear_top1": ("linear", "top1"),
    "finetune_top1": ("finetune", "top1"),
    "semisupervised_top1": ("finetune", "top1"),
    "adapters_top1": ("adapters", "top1"),
    "miou": ("semseg", "miou"),
    **{name: ("detection", name) for name in ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")},
    "epoch_seconds": ("efficiency", "epoch_minutes"),
    "epoch_minutes": ("efficiency", "epoch_minutes"),
    "pretrain_hours": ("efficiency", "epoch_minutes"),
    "memory": ("efficiency", "peak_memory_gib"),
}
ARCHITECTURES = {
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
}


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
    """With its settings."""
    method, _, name = pretraining.recipe.partition("/")
    return with_settings(
        METHODS[method].RECIPES[name], {key: str(value) for key, value in pretraining.settings.items()}
    )


def emitted(protocol: str, recipe) -> set[str]:
    """The scores that a record of this protocol holds."""
    if protocol == "efficiency":
        cost = Cost((1.0, 1.0), batch=8, peak_memory_bytes=2**30, memory_of="tensors", flops_per_step=10**9)
        return set(efficiency.scores(cost, recipe, 1).metrics)
    if protocol == "lowshot":
        return {f"top1_{amount}" for amount in recipe.amounts}
    if protocol == "detection":
        return {f"{kind}_{stat}" for kind in COCO_KINDS.values() for stat in _STATS}
    return {"miou", "macc", "aacc"} if protocol == "semseg" else {"top1"}


# Checking -------------------------------------------------------------------------------------------------------------


def check_every_line_counts(paper: str, table: str) -> None:
    """Every number stands in one place, and every column holds some."""
    layout, rows = tables.find(f"{paper}:{table}"), tables.rows(paper, table)
    assert sum(len(row.cells) for row in rows) == len(of_table(paper, table))
    assert len({row.label for row in rows}) == len(rows)
    assert {name for row in rows for name in row.cells} == {column.name for column in layout.columns}


def check_every_way_is_used(paper: str) -> None:
    """No way to measure or to train some rows is shadowed by another, or of rows that no table has."""
    ways, used = {}, set()
    for name, where, table in tables.names():
        if where != paper:
            continue
        layout, rows = tables.find(name), tables.rows(paper, table)
        ways |= {id(each): (table, each) for each in layout.pretraining}
        used |= {id(trained(paper, table, row)) for row in rows}
        for column in layout.columns:
            ways |= {id(way): (table, column.name, way) for way in column.rows}
            for row in rows:
                if cell := row.cells.get(column.name):
                    used.add(next((id(way) for way in column.rows if cell.agrees(dict(way[0]))), None))
    assert not [ways[each] for each in ways if each not in used]


def check_measures(paper: str, table: str) -> None:
    """Recipes, datasets, scores and settings are there, and are those of the published metric."""
    for column in tables.find(f"{paper}:{table}").columns:
        held = [row for row in tables.rows(paper, table) if column.name in row.cells]
        assert len({row.cells[column.name].metric for row in held}) == 1
        for row in held:
            cell, measure = row.cells[column.name], column.measure_of(row.cells[column.name])
            if isinstance(measure, str):
                assert len(measure) > 20
                continue
            protocol, name, recipe = choose(measure.recipe, protocols=efficiency.protocols())
            assert f"{protocol}/{name}" == measure.recipe
            assert not name.endswith("toy")
            with_settings(recipe, {key: str(value) for key, value in measure.settings.items()})
            assert measure.metric in emitted(protocol, recipe)
            assert (protocol, measure.metric) == SCORES.get(cell.metric, (protocol, measure.metric))
            if protocol == "efficiency":
                assert (measure.of, measure.dataset) == ("pretraining", "")
                assert trained(paper, table, row) is not None, row.label
            else:
                assert (measure.of, measure.scale, measure.dataset) == ("checkpoint", 1.0, cell.dataset)
                known = KINDS[efficiency.protocols()[protocol].DATA].names
                assert measure.dataset in known


def check_trainings(paper: str, table: str, methods: set[str]) -> None:
    """Rows of these methods are trained, by recipes of their epochs and architecture."""
    for row in tables.rows(paper, table):
        pretraining, cell = trained(paper, table, row), row.first
        assert (pretraining is not None) == (cell.method in methods), row.label
        if pretraining is None:
            continue
        assert pretraining.recipe.partition("/")[0] == cell.method.lower()
        assert bool(pretraining.base) == (cell.method == "TEC")
        assert pretraining.data == cell.pretrain_data
        recipe = trained_recipe(pretraining)
        assert cell.epochs in (None, recipe.epochs), row.label
        assert recipe.arch == ARCHITECTURES[cell.arch], row.label


def check_settings(recipe, settings: dict[str, str], unread: set[str]) -> None:
    """What the paper varies in a row is what the recipe has."""
    given = {name: value.replace("+", ",") for name, value in settings.items() if name not in unread}
    assert with_settings(recipe, given) == recipe, given
