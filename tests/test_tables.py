"""Every table of the papers is mapped to runs that exist: recipe, dataset, metric, settings, pre-training."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from paper_tables import trained, trained_recipe

from ssl_bench import efficiency
from ssl_bench.efficiency import protocols
from ssl_bench.errors import UserError
from ssl_bench.evaluate.datasets import KINDS
from ssl_bench.evaluate.recipes import with_settings
from ssl_bench.leaderboards import tables as module
from ssl_bench.leaderboards.published import COLUMNS, PAPERS, Cell, cells
from ssl_bench.leaderboards.standing import as_typed
from ssl_bench.leaderboards.tables import Column, Measure, Pretraining, Table, find, names, of_paper, rows, tables
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.measure import Cost
from ssl_bench.protocols.openmm.coco_ap import _STATS
from ssl_bench.protocols.openmm.coco_ap import KINDS as COCO_KINDS

OURS = {"MOCA": "moca", "MMC": "mmc", "TEC": "tec", "ExtreMA": "extrema", "SdAE": "sdae", "MAE": "mae"}
ARCHITECTURES = {
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
}


def with_texts(recipe, settings):
    """As --set would."""
    return with_settings(recipe, {key: as_typed(value) for key, value in settings.items()})


def measures(table):
    return [each for column in table.columns for each in (column.measure, *(measure for _, measure in column.rows))]


# Names of scores, as a record has them. ------------------------------------------------------------------------------


def _knn(recipe):
    labels = set()
    for vector in recipe.vector:
        for k in recipe.neighbors:
            for temperature in recipe.temperature:
                label = f"top1_k{k}"
                label += f"_{vector}" if len(recipe.vector) > 1 else ""
                label += f"_t{temperature:g}" if len(recipe.temperature) > 1 else ""
                labels.add(label)
    return {"top1", *labels}


def _trained(recipe):
    return {"top1", "top1_best_epoch"} if recipe.every_epoch else {"top1"}


def _zeroshot(recipe):
    return {f"{name}_{t}" for name in ("miou", "iou") for t in ("opt", *(f"t{t:g}" for t in recipe.thresholds))}


_COST = Cost((1.0, 1.0), batch=8, peak_memory_bytes=2**30, memory_of="tensors", flops_per_step=10**9)
SCORES = {
    "knn": _knn,
    "linear": lambda recipe: {"top1", "top1_best", "top1_last"},
    "lowshot": lambda recipe: {f"top1_{amount}" for amount in recipe.amounts},
    "finetune": _trained,
    "adapters": _trained,
    "fewshot": lambda recipe: {"accuracy", "f1", *(f"f1_t{threshold:g}" for threshold in recipe.thresholds)},
    "retrieval": lambda recipe: {f"{score}_{kind}" for score in ("mAP", "mP@1") for kind in ("easy", "medium", "hard")},
    "stability": lambda recipe: {"cls_variance", "patch_variance", "cls_variance_ratio", "patch_variance_ratio"},
    "locality": lambda recipe: {"iou", "iou_random", "iou_oracle", "top1", "top1_random", "normalized"},
    "semseg": lambda recipe: {"miou", "macc", "aacc"},
    "detection": lambda recipe: {f"{kind}_{stat}" for kind in COCO_KINDS.values() for stat in _STATS},
    "zeroshot": _zeroshot,
    "similarity": lambda recipe: {"overlap_area", "intra_mean_cosine", "inter_mean_cosine"},
    "davis": lambda recipe: {"jf_mean", "j_mean", "f_mean", "j_recall", "f_recall", "j_decay", "f_decay"},
    "efficiency": lambda recipe: set(efficiency.scores(_COST, recipe, 1).metrics),
}

# What a published metric is measured by: a protocol, and one of its scores. Of other metrics, recipes decide.
MEASURED_BY = {
    "linear_top1": ("linear", "top1"),
    "finetune_top1": ("finetune", "top1"),
    "semisupervised_top1": ("finetune", "top1"),
    "adapters_top1": ("adapters", "top1"),
    **{name: ("detection", name) for name in ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")},
    "epoch_seconds": ("efficiency", "epoch_minutes"),
    "epoch_minutes": ("efficiency", "epoch_minutes"),
    "pretrain_hours": ("efficiency", "epoch_minutes"),
    "memory": ("efficiency", "peak_memory_gib"),
}


# Every table. --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", PAPERS)
def test_every_table_with_numbers_is_mapped_and_no_other(paper):
    printed = dict.fromkeys(cell.table for cell in cells(paper) if not cell.table.startswith("text:"))
    assert list(of_paper(paper)) == list(printed)  # in the paper's order
    assert all(table.title for table in of_paper(paper).values())


def test_names_of_all_tables():
    found = list(names())
    assert [name for name, _, _ in found] == list(tables())
    assert all(name == f"{paper}:{number}" for name, paper, number in found)
    assert list(dict.fromkeys(paper for _, paper, _ in found)) == list(PAPERS)
    assert all(find(name) is of_paper(paper)[number] for name, paper, number in found)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_number_stands_in_one_column_of_one_row(paper):
    for number, table in of_paper(paper).items():
        own = [cell for cell in cells(paper) if cell.table == number]
        assert len({column.name for column in table.columns}) == len(table.columns)
        for cell in own:
            assert len([column for column in table.columns if cell.agrees(dict(column.cells))]) == 1, (number, cell)
        found = rows(paper, number)
        assert len({row.label for row in found}) == len(found), number
        by_column = {column.name: column for column in table.columns}
        placed = [(name, cell) for row in found for name, cell in row.cells.items()]
        assert all(cell.agrees(dict(by_column[name].cells)) for name, cell in placed), number
        assert sorted(id(cell) for _, cell in placed) == sorted(id(cell) for cell in own), number
        assert {name for name, _ in placed} == set(by_column), f"{paper}:{number} has a column without numbers"
        for row in found:
            assert row.first in row.cells.values()
            for name in ("method", "arch", "pretrain_data", "epochs", "multicrop"):
                assert len({cell.field(name) for cell in row.cells.values()}) == 1, (number, row.label, name)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_way_to_measure_and_train_is_used(paper):
    """None is shadowed by another, or of rows that no table has, as a misspelled one would be."""
    ways, used = {}, set()
    for number, table in of_paper(paper).items():
        found = rows(paper, number)
        ways |= {id(each): (number, each) for each in table.pretraining}
        used |= {id(trained(paper, number, row)) for row in found}
        for column in table.columns:
            ways |= {id(way): (number, column.name, way) for way in column.rows}
            cells_here = [row.cells[column.name] for row in found if column.name in row.cells]
            assert len({cell.metric for cell in cells_here}) == 1, (number, column.name)
            for cell in cells_here:
                used.add(next((id(way) for way in column.rows if cell.agrees(dict(way[0]))), None))
    assert [ways[each] for each in ways if each not in used] == []


@pytest.mark.parametrize("paper", PAPERS)
def test_every_measure_is_a_run_that_exists(paper):
    known = protocols()
    for number, table in of_paper(paper).items():
        for measure in measures(table):
            if isinstance(measure, str):
                assert len(measure) > 20, f"{paper}:{number}: {measure!r} is no reason"
                continue
            protocol, _, recipe = measure.recipe.partition("/")
            assert protocol in known, (number, measure.recipe)
            assert recipe in known[protocol].RECIPES, (number, measure.recipe)
            assert not recipe.endswith("toy"), (number, measure.recipe)
            changed = with_texts(known[protocol].RECIPES[recipe], measure.settings)
            assert measure.metric in SCORES[protocol](changed), (number, measure)
            assert (measure.of == "pretraining") == (protocol == "efficiency") == (not measure.dataset), measure
            if measure.dataset:
                assert measure.dataset in KINDS[known[protocol].DATA].names, (number, measure)


@pytest.mark.parametrize("paper", PAPERS)
def test_numbers_are_measured_on_their_data_and_in_their_unit(paper):
    for number, table in of_paper(paper).items():
        for row in rows(paper, number):
            for column in table.columns:
                cell = row.cells.get(column.name)
                if cell is None or isinstance(measure := column.measure_of(cell), str):
                    continue
                where = (number, row.label, column.name)
                protocol = measure.recipe.partition("/")[0]
                assert (protocol, measure.metric) == MEASURED_BY.get(cell.metric, (protocol, measure.metric)), where
                assert cell.metric != "knn_top1" or protocol == "knn", where
                assert (
                    cell.metric != "miou"
                    or (protocol, measure.metric) == ("semseg", "miou")
                    or (protocol == "zeroshot" and measure.metric.startswith("miou_"))
                ), where
                if measure.dataset and cell.dataset:
                    assert measure.dataset == cell.dataset, where
                assert cell.metric.rpartition("_")[2] not in ("gain", "drop"), f"{where}: no run measures a difference"
                # Recorded are percent, minutes of an epoch, and GiB, which the papers' scripts print as GB.
                scales = {"percent": 1.0, "fraction": 1.0, "minutes": 1.0, "seconds": 60.0, "GB": 1.0}
                if cell.unit == "hours":
                    scales["hours"] = (cell.epochs or trained_recipe(trained(paper, number, row)).epochs) / 60
                assert measure.scale == pytest.approx(scales[cell.unit]), where
                assert cell.unit != "fraction" or measure.recipe.startswith(("similarity/", "stability/")), where


@pytest.mark.parametrize("paper", PAPERS)
def test_pretraining_is_that_of_its_rows(paper):
    for number, table in of_paper(paper).items():
        for row in rows(paper, number):
            cell, where = row.first, (number, row.label)
            pretraining = trained(paper, number, row)
            costs = [column.measure_of(row.cells[column.name]) for column in table.columns if column.name in row.cells]
            if pretraining is None:
                assert cell.method not in OURS, f"{where}: what trains it?"
                assert not any(isinstance(each, Measure) and each.of == "pretraining" for each in costs), where
                continue
            recipe = trained_recipe(pretraining)
            method = pretraining.recipe.partition("/")[0]
            assert method == OURS[cell.method], where
            assert bool(pretraining.base) == getattr(METHODS[method], "NEEDS_BASE", False), where
            assert pretraining.data in KINDS["images"].names, where
            assert cell.pretrain_data in ("", pretraining.data), where
            assert cell.arch == "" or ARCHITECTURES[cell.arch] == recipe.arch, where
            told = "epochs" in pretraining.note or "epochs" in table.note
            assert cell.epochs in (None, recipe.epochs) or told, where


def test_there_is_no_reason_where_there_is_a_run():
    """Most of what is printed can be measured; what cannot is the exception."""
    numbers = [
        (column, cell)
        for name, paper, number in names()
        for row in rows(paper, number)
        for column in find(name).columns
        for cell in [row.cells.get(column.name)]
        if cell is not None
    ]
    measured = [cell for column, cell in numbers if isinstance(column.measure_of(cell), Measure)]
    assert len(measured) > 0.9 * len(numbers)


# The functions. ------------------------------------------------------------------------------------------------------


def made(method="MOCA", *, value=1.0, **changes):
    cell = Cell("moca", "1", method, "ViT-B/16", "imagenet", None, "", {}, "toy", "top1", value, None, "percent", "")
    setting = {name: text for name, text in changes.items() if name not in COLUMNS}
    return replace(cell, setting=setting, **{name: text for name, text in changes.items() if name in COLUMNS})


@pytest.fixture
def paper_of(monkeypatch):
    """A paper of one table, whose columns are metrics."""

    def of(*own, cells_of=({"metric": "top1"},)):
        columns = tuple(Column(str(number), wanted, "a reason") for number, wanted in enumerate(cells_of))
        monkeypatch.setattr(module, "cells", lambda paper: own)
        monkeypatch.setattr(module, "of_paper", lambda paper: {"1": Table("a table", columns)})
        return rows("moca", "1")

    return of


def labels(found):
    return [row.label for row in found]


def test_rows_are_the_lines_of_the_table(paper_of):
    first, second = made(value=1.0), made(metric="miou", value=2.0)
    third, other = made("DINO", value=3.0), made("DINO", table="2", value=4.0)
    found = paper_of(first, third, other, second, cells_of=({"metric": "top1"}, {"metric": "miou"}))
    assert labels(found) == ["MOCA", "DINO"]
    assert [row.cells for row in found] == [{"0": first, "1": second}, {"0": third}]
    assert found[0].first is first


def test_settings_of_columns_tell_no_rows_apart(paper_of):
    one, two = made(shots="1", depth="3"), made(shots="2", depth="3")
    turned = replace(two, setting={"depth": "3", "shots": "2"})  # another order is the same row
    for again in (two, turned):
        (row,) = paper_of(one, again, cells_of=({"shots": "1"}, {"shots": "2"}))
        assert (row.label, list(row.cells)) == ("MOCA", ["0", "1"])
    (row,) = paper_of(made(epochs=300), made(epochs=800), cells_of=({"epochs": "300"}, {"epochs": "800"}))
    assert (row.label, list(row.cells)) == ("MOCA", ["0", "1"])
    bare = made(metric="miou")
    (row,) = paper_of(one, bare, cells_of=({"shots": "1"}, {"shots": ""}))[:1]
    assert row.cells == {"0": one}  # `depth` is another's


def test_labels_tell_what_differs(paper_of):
    assert labels(paper_of(made(epochs=300), made("DINO", epochs=300), made("BEiT"))) == ["MOCA", "DINO", "BEiT"]
    found = paper_of(made(epochs=300, multicrop="yes"), made("DINO", epochs=800, multicrop="no"), made("BEiT"))
    assert labels(found) == ["MOCA, 300 epochs, multi-crop", "DINO, 800 epochs", "BEiT"]
    found = paper_of(made(arch="ViT-S/16"), made(), made(pretrain_data="imagenet-22k"), made("DINO", depth="3"))
    assert labels(found) == [
        "MOCA, ViT-S/16, imagenet",
        "MOCA, ViT-B/16, imagenet",
        "MOCA, ViT-B/16, imagenet-22k",
        "DINO, ViT-B/16, imagenet",
    ]
    # One of two equal labels has a value, and the other has none: then the value is told.
    assert labels(paper_of(made(), made(tuned="100"), made("DINO", tuned="100"))) == ["MOCA", "MOCA, tuned=100", "DINO"]
    assert labels(paper_of(made(), made(epochs=300))) == ["MOCA", "MOCA, 300 epochs"]
    assert labels(paper_of(made(depth="2"), made(depth="4"))) == ["MOCA, depth=2", "MOCA, depth=4"]


def test_a_number_without_a_place_of_its_own_is_our_mistake(paper_of):
    with pytest.raises(AssertionError, match="stands in 0 columns"):
        paper_of(made(metric="miou"))
    with pytest.raises(AssertionError, match="stands in 2 columns"):
        paper_of(made(), cells_of=({"metric": "top1"}, {"dataset": "toy"}))
    with pytest.raises(AssertionError, match="stands where another does"):
        paper_of(made(value=1.0), made(value=2.0))


def test_the_first_that_agrees_measures_a_row():
    plain, special, other = (Measure(f"knn/{name}", "toy", "top1") for name in "abc")
    column = Column("x", {}, plain, (({"method": "DINO", "epochs": "300"}, special), ({"method": "DINO"}, other)))
    assert column.measure_of(made()) is plain
    assert column.measure_of(made("DINO", epochs=300)) is special
    assert column.measure_of(made("DINO")) is other
    assert replace(column, measure="why not").measure_of(made()) == "why not"


def test_commands_of_pretraining_are_what_a_user_types():
    assert Pretraining({}, "moca/paper").command() == (
        "ssl-bench pretrain moca --data imagenet --recipe paper --out runs/moca-paper"
    )
    settings = {"mask_ratios": (0.65, 0.65), "arch": "vit_small_patch16_224", "norm": True, "ratio": None}
    assert Pretraining({}, "moca/x", data="imagenet-100", settings=settings).command() == (
        "ssl-bench pretrain moca --data imagenet-100 --recipe x --set 'mask_ratios=[0.65,0.65]' "
        "--set arch=vit_small_patch16_224 --set norm=true --set ratio=null "
        "--out runs/moca-x-mask_ratios-0.65-0.65-arch-vit_small_patch16_224-norm-true-ratio-null-imagenet-100"
    )
    bases = [Pretraining({}, "tec/mae", base=f"MAE, {epochs} epochs").command() for epochs in (300, 1600)]
    expected = "ssl-bench pretrain tec --data imagenet --recipe mae --base SPEC"
    assert bases[0] == f"{expected} --out runs/tec-mae-mae-300-epochs"
    given = Pretraining({}, "tec/mae", base="MAE").command(data="/my data", base="runs/mae-paper")
    assert given == (
        "ssl-bench pretrain tec --data '/my data' --recipe mae --base runs/mae-paper --out runs/tec-mae-mae"
    )
    assert bases[0].partition("--out")[2] != bases[1].partition("--out")[2]


@pytest.mark.parametrize("paper", PAPERS)
def test_two_ways_of_pretraining_never_share_a_folder(paper):
    folders = {}
    for table in of_paper(paper).values():
        for each in table.pretraining:
            command, _, folder = each.command().rpartition(" --out ")
            assert folders.setdefault(folder, command) == command


def test_names_that_do_not_exist():
    with pytest.raises(UserError, match="unknown table 'moca:88'; did you mean 'moca:8'"):
        find("moca:88")
    with pytest.raises(UserError, match="unknown table 'mocca:8'; did you mean 'moca:8'"):
        find("mocca:8")
    with pytest.raises(UserError, match=r"table 'mmc': expected PAPER:TABLE, one of mmc:\{1,2,3,4,5,6,8,9,10,11\}"):
        find("mmc")
    with pytest.raises(UserError, match="unknown table"):
        find("")


def test_tables_need_neither_torch_nor_pandas():
    code = (
        "import sys; from ssl_bench.leaderboards import tables\n"
        "for name, paper, number in tables.names(): tables.rows(paper, number)\n"
        "heavy = {'torch', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
