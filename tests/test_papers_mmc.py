"""MMC's tables: sums of columns taken from the paper's text, what is trained and measured, and what is doubtful."""

from __future__ import annotations

from collections import Counter

import pytest
from paper_tables import of_table

from ssl_bench.leaderboards.published import cells
from ssl_bench.leaderboards.tables import Measure, find, rows
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.protocols.catalog import PROTOCOLS

CELLS = cells("mmc")
SSL_METHODS = ["SiT", "DINO", "iBOT", "MC-SSL", "MAE", "MSN", "MMC"]


def of(table, **wanted):
    """Numbers of a table, by whatever tells them apart, in the paper's order."""
    return of_table("mmc", table, **wanted)


def only(table, **wanted):
    (cell,) = of(table, **wanted)
    return cell.value


def test_counts_and_methods():
    counts = {"1": 47, "2": 33, "3": 26, "4": 21, "5": 18, "6": 36, "8": 36, "9": 32, "10": 10, "11": 14}
    assert Counter(cell.table for cell in CELLS) == counts
    methods = {table: list(dict.fromkeys(cell.method for cell in of(table))) for table in counts}
    assert methods == {
        "1": ["Random", *SSL_METHODS],
        "2": ["Supervised", "MAE", "MSN", "DINO", "iBOT", "MMC", "MC-SSL"],
        "3": ["Random", "MoCo-v3", "SiT", "DINO", "iBOT", "MAE", "MC-SSL", "MSN", "MMC"],
        "4": ["MMC"],
        "5": ["DINO", "iBOT", "SiT", "MAE", "MC-SSL", "MMC"],
        "6": ["MMC"],
        "8": ["SiT", "DINO", "iBOT", "MAE", "MC-SSL", "MMC"],
        "9": ["IRT_O", "IRT_R", "DToP", "iBOT", "DINO", "MC-SSL", "SiT", "MMC"],
        "10": ["MAE", "DINO", "iBOT", "MSN", "MMC"],
        "11": ["MAE", "DINO", "iBOT", "MSN", "SiT", "MC-SSL", "MMC"],
    }
    lines = {table: len(rows("mmc", table)) for table in counts}
    expected = {"1": 8, "2": 11, "3": 9, "4": 7, "5": 6, "6": 12, "8": 6, "9": 8, "10": 5, "11": 7}
    assert lines == expected


# Every column of every table, added up from the paper's text: how many numbers, and their sum.
# fmt: off
SUMS = [
    ("1", {"threshold": "0.1"}, 8, 244.3), ("1", {"threshold": "0.2"}, 8, 259.5), ("1", {"threshold": "0.3"}, 8, 251.1),
    ("1", {"threshold": "0.4"}, 8, 226.8), ("1", {"threshold": "optimal"}, 8, 261.4),
    ("1", {"head": "linear"}, 7, 275.6),
    *(("2", {"metric": metric, "arch": arch, "pretrain_data": data}, n, total) for arch, data, n, totals in (
        ("ViT-S/16", "imagenet-100", 6, (308.0, 299.0, 317.1)), ("ViT-B/16", "imagenet", 5, (295.3, 286.8, 303.8)),
      ) for metric, total in zip(("j_and_f_mean", "j_mean", "f_mean"), totals, strict=True)),
    ("3", {"dataset": "ade20k"}, 9, 259.3), ("3", {"dataset": "cityscapes"}, 8, 411.2),
    ("3", {"dataset": "voc-aug"}, 9, 577.6),
    ("4", {"metric": "knn_top1", "token": "cls"}, 7, 391.30),
    ("4", {"metric": "knn_top1", "token": "patch"}, 7, 359.32),
    ("4", {"metric": "finetune_top1", "token": "cls+patch"}, 7, 626.78),
    ("5", {"metric": "overlap"}, 6, 3.74), ("5", {"metric": "intra_mean"}, 6, 2.13),
    ("5", {"metric": "inter_mean"}, 6, 1.53),
    *(("6", {"token": token, "dataset": dataset}, 4, total) for token, totals in (
        ("cls", (288.6, 230.8, 332.0)), ("patch", (302.5, 252.9, 334.7)), ("cls+patch", (297.7, 245.6, 334.2)),
      ) for dataset, total in zip(("pets", "flowers102", "cifar10"), totals, strict=True)),
    *(("8", {"metric": metric, "dataset": dataset}, 6, total) for metric, totals in (
        ("fewshot_top1", (380.2, 237.1, 424.1)), ("fewshot_f1", (334.7, 233.6, 379.9)),
      ) for dataset, total in zip(("mini-imagenet", "cifar10", "pets"), totals, strict=True)),
    *(("9", {"dataset": dataset, "metric": metric}, 8, total) for dataset, totals in (
        ("roxford5k", (268.9, 111.1)), ("rparis6k", (477.7, 278.9)),
      ) for metric, total in zip(("map_medium", "map_hard"), totals, strict=True)),
    ("10", {"metric": "variance_cls"}, 5, 1.41), ("10", {"metric": "variance_patch"}, 5, 3.18),
    ("11", {"token": "patch"}, 7, 518.30), ("11", {"token": "cls"}, 7, 586.56),
]
# Every line of the tables whose lines are methods: two exchanged numbers of a column change two of these.
LINES = {
    "1": [81.9, 204.5, 207.4, 221.5, 211.0, 157.9, 201.2, 233.3],
    "2": [111.4, 133.0, 146.8, 173.0, 179.0, 180.9, 186.9, 181.2, 142.3, 184.3, 191.2],
    "3": [20.5, 93.5, 164.7, 165.2, 171.0, 126.9, 168.8, 160.2, 177.3],
    "4": [121.82, 229.52, 168.58, 240.82, 156.68, 214.46, 245.52],
    "5": [0.98, 0.80, 1.59, 1.22, 1.40, 1.41],
    "6": [220.9, 216.9, 209.1, 204.5, 226.8, 224.7, 220.5, 218.1, 225.3, 222.4, 216.4, 213.4],
    "8": [374.9, 374.9, 375.7, 180.7, 325.7, 357.7],
    "9": [102.4, 151.8, 251.3, 144.7, 138.1, 121.3, 110.0, 117.0],
    "10": [0.67, 1.43, 1.08, 0.90, 0.51],
    "11": [82.30, 167.10, 167.34, 171.76, 164.02, 172.36, 179.98],
}
# fmt: on


@pytest.mark.parametrize(("table", "wanted", "count", "total"), SUMS)
def test_columns_add_up_to_the_papers(table, wanted, count, total):
    column = of(table, **wanted)
    assert (len(column), sum(cell.value for cell in column)) == (count, pytest.approx(total))


def test_the_sums_are_of_all_columns():
    assert sum(count for _, _, count, _ in SUMS) == len(CELLS)


@pytest.mark.parametrize("table", LINES)
def test_lines_add_up_to_the_papers(table):
    found = [sum(cell.value for cell in row.cells.values()) for row in rows("mmc", table)]
    assert found == pytest.approx(LINES[table])


def test_what_must_hold_within_a_table():
    for method in ["Random", *SSL_METHODS]:
        swept = [only("1", method=method, threshold=t) for t in ("0.1", "0.2", "0.3", "0.4")]
        assert only("1", method=method, threshold="optimal") == max(swept)
    for row in rows("mmc", "2"):
        both, j, f = (row.cells[name].value for name in ("J&F", "J", "F"))
        assert abs(both - (j + f) / 2) < 0.1 + 1e-9  # all three are rounded
    best = {(cell.dataset, cell.metric): max(each.value for each in of("3", dataset=cell.dataset)) for cell in of("3")}
    assert best == {("ade20k", "miou"): 37.0, ("cityscapes", "miou"): 62.6, ("voc-aug", "miou"): 77.7}  # as the text
    assert min(cell.value for cell in of("5", metric="overlap")) == only("5", metric="overlap", method="MMC") == 0.55
    assert only("1", method="MMC", threshold="0.3") == 38.4
    full = {"rec_weight": "1", "cls_weight": "1", "pat_weight": "1", "token": "cls"}
    assert only("4", **full) - only("4", **full | {"cls_weight": "0"}) == pytest.approx(44)  # "44% decline"


def test_units():
    assert {cell.table for cell in CELLS if cell.unit == "fraction"} == {"5", "10"}
    assert {cell.unit for cell in CELLS} == {"percent", "fraction"}
    assert all(cell.std is None and cell.multicrop == "" for cell in CELLS)


def test_what_the_paper_says_of_networks():
    assert {(c.arch, c.pretrain_data) for c in of("1") + of("3")} == {("ViT-B/16", ""), ("ViT-B/16", "imagenet")}
    assert {c.method for c in of("1") + of("3") if not c.pretrain_data} == {"Random"}
    assert {(c.arch, c.pretrain_data, c.epochs) for c in of("4")} == {("ViT-S/16", "imagenet-100", 200)}
    assert {(c.arch, c.pretrain_data, c.epochs) for t in ("5", "6", "8", "10", "11") for c in of(t)} == {("", "", None)}
    epochs = {(c.table, c.arch): c.epochs for t in ("1", "2", "3", "9") for c in of(t, method="MMC")}
    expected = {("1", "ViT-B/16"): 400, ("2", "ViT-S/16"): 500, ("2", "ViT-B/16"): 400, ("3", "ViT-B/16"): 400}
    assert epochs == expected | {("9", "ViT-B/16"): 400}
    assert {c.epochs for c in CELLS if c.method != "MMC"} == {None}


# What is doubtful. ---------------------------------------------------------------------------------------------------


def test_table_8_against_its_text():
    doubtful = [cell for cell in of("8") if cell.note]
    assert {(c.method, c.dataset, c.metric) for c in doubtful} == {
        (method, dataset, metric)
        for method in ("MMC", "iBOT")
        for dataset in ("cifar10", "pets")
        for metric in ("fewshot_top1", "fewshot_f1")
    }
    for cell in doubtful:
        mmc, ibot = (only("8", method=each, dataset=cell.dataset, metric=cell.metric) for each in ("MMC", "iBOT"))
        assert (mmc > ibot) == (cell.dataset == "cifar10")  # and the text says the reverse
        assert f"MMC {mmc}, iBOT {ibot}" in cell.note
        said = "behind iBOT on CIFAR10" if cell.dataset == "cifar10" else "ahead of iBOT on Pets"
        assert said in cell.note
    assert "reverse" in find("mmc:8").note


def test_the_other_known_conflicts():
    assert all("finetuning" in cell.note for cell in of("1", head="linear"))
    for threshold in ("0.4", "optimal"):
        assert all("thresholds from 0 to 0.3" in cell.note for cell in of("1", threshold=threshold))
    assert all("RAND" in cell.note for cell in of("1", method="Random"))
    assert all("seven" in cell.note and "six" in cell.note for cell in of("2", method="MMC", arch="ViT-S/16"))
    assert all("w/o" in cell.note for cell in of("2", method="MMC"))
    beaten = of("6", dataset="pets", neighbors="20")
    assert len(beaten) == 3
    for cell in beaten:  # the text: k = 10 is best
        ten = only("6", dataset="pets", neighbors="10", token=cell.setting["token"])
        assert cell.value > ten
        assert f"k = 10, where this head has {ten}" in cell.note
    (sit,) = of("9", method="SiT", dataset="rparis6k", metric="map_hard")
    assert sit.value < only("9", method="IRT_O", dataset="rparis6k", metric="map_hard") == 26.3
    assert "26.3" in sit.note
    assert all(cell.note for cell in of("5") + of("11", method="MMC"))


# How it is measured and trained. -------------------------------------------------------------------------------------


def test_measures_are_those_of_the_papers_own_protocols():
    found = {
        table: [(m.recipe, m.dataset, m.metric) for m in (c.measure for c in find(f"mmc:{table}").columns)]
        for table in ("1", "2", "3", "4", "5", "8", "9", "10", "11")
    }
    frozen = "semseg/linear-mmc"
    assert found == {
        "1": [
            *(("zeroshot/mmc", "coco", f"miou_{t}") for t in ("t0.1", "t0.2", "t0.3", "t0.4", "opt")),
            (frozen, "coco", "miou"),
        ],
        "2": [("davis/dino", "davis-2017", metric) for metric in ("jf_mean", "j_mean", "f_mean")],
        "3": [(frozen, dataset, "miou") for dataset in ("ade20k", "cityscapes", "voc-aug")],
        "4": [
            *((f"knn/mmc-{token}", "imagenet-100", "top1") for token in ("cls", "patch")),
            ("finetune/mmc", "imagenet-100", "top1"),
        ],
        "5": [
            ("similarity/mmc", "coco", metric) for metric in ("overlap_area", "intra_mean_cosine", "inter_mean_cosine")
        ],
        "8": [
            ("fewshot/mmc", dataset, metric)
            for metric in ("accuracy", "f1")
            for dataset in ("mini-imagenet", "cifar10", "pets")
        ],
        "9": [
            ("retrieval/mmc", dataset, f"mAP_{split}")
            for dataset in ("roxford5k", "rparis6k")
            for split in ("medium", "hard")
        ],
        "10": [("stability/mmc-all", "imagenet", f"{token}_variance") for token in ("cls", "patch")],
        "11": [(f"knn/mmc-{token}", "imagenet-100", "top1") for token in ("patch", "cls")],
    }
    assert all(not m.settings and m.scale == 1 for t in found for m in (c.measure for c in find(f"mmc:{t}").columns))


def test_table_6_is_measured_by_head_and_k():
    recipes = {"cls": ("cls",), "patch": ("patch_mean",), "cls+patch": ("cls+patch_mean",)}
    for row in rows("mmc", "6"):
        for column in find("mmc:6").columns:
            cell = row.cells[column.name]
            measure = column.measure_of(cell)
            assert isinstance(measure, Measure)
            protocol, _, recipe = measure.recipe.partition("/")
            assert PROTOCOLS[protocol].RECIPES[recipe].vector == recipes[cell.setting["token"]]
            assert (measure.metric, measure.dataset) == (f"top1_k{cell.setting['neighbors']}", cell.dataset)


def test_only_dtop_cannot_be_measured():
    unmeasured = {
        (row.first.method, table)
        for table in dict.fromkeys(cell.table for cell in CELLS)
        for row in rows("mmc", table)
        for column in find(f"mmc:{table}").columns
        if column.name in row.cells and isinstance(column.measure_of(row.cells[column.name]), str)
    }
    assert unmeasured == {("DToP", "9")}


def test_what_trains_the_rows():
    trained = {}
    for table in dict.fromkeys(cell.table for cell in CELLS):
        for row in rows("mmc", table):
            found = [each for each in find(f"mmc:{table}").pretraining if row.first.agrees(dict(each.rows))]
            if found:
                trained.setdefault((row.first.method, row.first.arch, found[0].recipe, found[0].data), []).append(table)
    ablations = {key: tables for key, tables in trained.items() if "ablation" in key[2]}
    others = {key: tables for key, tables in trained.items() if "ablation" not in key[2]}
    assert {key: list(dict.fromkeys(tables)) for key, tables in others.items()} == {
        ("MMC", "ViT-B/16", "mmc/vit-b", "imagenet"): ["1", "2", "3", "9"],
        ("MMC", "ViT-S/16", "mmc/vit-s", "imagenet-100"): ["2"],
        ("MMC", "", "mmc/vit-b", "imagenet"): ["5", "6", "8", "10", "11"],
        ("MAE", "ViT-B/16", "mae/paper", "imagenet"): ["1", "2", "3"],
        ("MAE", "ViT-S/16", "mae/800ep", "imagenet-100"): ["2"],
        ("MAE", "", "mae/paper", "imagenet"): ["5", "8", "10", "11"],
    }
    assert len(ablations) == 7
    assert {(key[0], key[1], key[3]) for key in ablations} == {("MMC", "ViT-S/16", "imagenet-100")}


def test_rows_of_table_4_are_trained_with_their_terms_and_have_their_recipes_numbers():
    for row in rows("mmc", "4"):
        (found,) = [each for each in find("mmc:4").pretraining if row.first.agrees(dict(each.rows))]
        recipe = METHODS["mmc"].RECIPES[found.recipe.removeprefix("mmc/")]
        for name in ("rec_weight", "cls_weight", "pat_weight"):
            assert getattr(recipe, name) == float(row.first.setting[name])
        assert all(f"{cell.value:.2f}" in recipe.published for cell in row.cells.values())
