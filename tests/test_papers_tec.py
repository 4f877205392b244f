"""TEC's tables: every number is the paper's, and every recipe named is the one that measures or trains it."""

from __future__ import annotations

from collections import Counter

import pytest
from paper_tables import (
    check_settings,
    keyed,
    measured,
    of_table,
    one,
    sums,
    trained,
    trained_recipe,
)

from ssl_bench.leaderboards import tables
from ssl_bench.leaderboards.papers.tec import TABLES
from ssl_bench.leaderboards.published import cells

# The numbers ----------------------------------------------------------------------------------------------------------

# Counted and added from the lines of the paper's text by a tool that knows nothing of the file; Table 11, which is two
# rows of tables side by side there, by hand.
SUMS = {
    "1": {"mIoU": (9, 443.8)},
    "2": {"Top-1": (9, 763.9), "Gain": (5, 4.6)},
    "3": {"Linear": (2, 137.8), "+ input adapter": (1, 72.6), "+ encoder adapter": (1, 79.9)},
    "4": {"Top-1": (5, 419.4), "Gain": (3, 3.5)},
    "5": {"Top-1": (31, 2610.6), "Gain": (7, 5.2)},
    "6": {"mIoU": (9, 443.8)},
    "7": {"AP box": (4, 212.3), "AP mask": (4, 183.4)},
    "8": {"Linear": (2, 137.8), "+ input adapter": (1, 72.6), "+ encoder adapter": (1, 79.9)},
    "9": {"mIoU": (4, 204.2)},
    "10": {"Top-1": (3, 254.4)},
    "11a": {"Top-1": (4, 335.6)},
    "11b": {"Top-1": (4, 336.7)},
    "11c": {"Top-1": (3, 253.3)},
    "11d": {"Top-1": (5, 419.4), "Gain": (3, 3.5)},
    "11e": {"Top-1": (5, 422.4)},
    "12": {"Top-1": (10, 844.2)},
}


def test_how_many_numbers_there_are():
    assert len(cells("tec")) == 135
    assert list(Counter(cell.table for cell in cells("tec"))) == list(TABLES) == list(SUMS)
    of_eleven = [SUMS[table]["Top-1"] for table in SUMS if table.startswith("11")]
    assert (sum(count for count, _ in of_eleven), round(sum(total for _, total in of_eleven), 1)) == (21, 1767.4)


@pytest.mark.parametrize("table", TABLES)
def test_columns_add_up_as_in_the_paper(table):
    assert sums("tec", table) == SUMS[table]


# fmt: off
TABLE_5 = {
    "DINO": "300 82.8", "MoCo-v3": "300 83.2", "MixMIM": "300 83.2", "MFM": "300 83.1", "BEiT": "800 83.2",
    "SplitMask": "300 83.6", "ConMIM": "800 83.7", "SimMIM": "800 83.8", "SIM": "1600 83.8", "CAE": "1600 83.9",
    "MaskFeat": "1600 84.0", "LoMaR": "1600 84.1", "BootMAE": "800 84.2", "data2vec": "800 84.2", "Mugs": "1600 84.3",
    "MVP": "300 84.4", "PeCo": "800 84.5", "CMAE": "1600 84.7", "Ge2-AE": "800 84.8", "FD-CLIP": "300 84.9",
    "FD-MAE": "300 83.8", "SemMAE": "800 84.5",
}
TABLE_6 = {
    "BEiT": "800 47.1", "PeCo": "800 48.5", "Ge2-AE": "800 48.9", "CAE": "1600 50.2", "CMAE": "1600 50.1",
    "MAE": "1600 48.1", "iBOT": "1600 50.0",
}
# fmt: on


def test_lines_as_they_are_printed():
    for table, metric, lines in (("5", "finetune_top1", TABLE_5), ("6", "miou", TABLE_6)):
        for method, line in lines.items():
            epochs, value = line.split()
            assert one("tec", table, metric, method=method, epochs=epochs).value == float(value), method
        assert {cell.method for cell in of_table("tec", table)} - set(lines) <= {"MAE", "iBOT", "TEC"}
    on = {
        (cell.arch, cell.setting["base"], cell.epochs): (
            cell.value,
            one("tec", "5", "finetune_top1_gain", **wanted).value,
        )
        for cell in of_table("tec", "5")
        if cell.agrees({"method": "TEC", "metric": "finetune_top1"})
        for wanted in [{"arch": cell.arch, "base": cell.setting["base"], "epochs": str(cell.epochs)}]
    }
    assert on == {
        ("ViT-B/16", "MAE", 300): (84.7, 1.1),
        ("ViT-B/16", "MAE", 800): (84.8, 1.2),
        ("ViT-B/16", "iBOT", 300): (84.8, 0.7),
        ("ViT-B/16", "iBOT", 800): (85.1, 1.0),
        ("ViT-L/16", "MAE", 300): (86.5, 0.6),
    }
    assert one("tec", "5", "finetune_top1", pretrain_data="imagenet-22k").value == 84.4
    boxes = {
        (cell.method, cell.setting["implementation"]): cell.value
        for cell in of_table("tec", "7")
        if cell.metric == "box_ap"
    }
    assert boxes == {("iBOT", "iBOT"): 51.2, ("TEC", "iBOT"): 52.7, ("MAE", "ViTDet"): 54.0, ("TEC", "ViTDet"): 54.4}
    nine = {(cell.method, cell.field("finetuned_epochs")): cell.value for cell in of_table("tec", "9")}
    assert nine == {("MAE", ""): 38.3, ("TEC", ""): 42.9, ("MAE", "100"): 61.0, ("TEC", "100"): 62.0}


def test_guidance_of_table_5():
    found: dict[str, set[str]] = {}
    for cell in of_table("tec", "5"):
        found.setdefault(cell.field("guidance"), set()).add(cell.method)
    assert found == {
        "": {"DINO", "MoCo-v3", "SplitMask", "Mugs", "TEC"},
        "RGB": {"MixMIM", "SimMIM", "LoMaR", "CMAE", "MAE"},
        "Frequency": {"MFM"},
        "DALLE": {"BEiT", "CAE"},
        "Momentum": {"ConMIM", "SIM", "data2vec", "iBOT"},
        "HOG": {"MaskFeat"},
        "RGB+Momentum": {"BootMAE"},
        "CLIP": {"MVP", "FD-CLIP"},
        "Perceptual codebook": {"PeCo"},
        "RGB+Frequency": {"Ge2-AE"},
        "MAE": {"FD-MAE"},
        "iBOT": {"SemMAE"},
    }
    daggers = {cell.method for cell in of_table("tec", "5") if cell.field("extra_data") == "implicit"}
    assert daggers == {"BEiT", "CAE", "MVP", "FD-CLIP"}


def test_what_is_printed_twice_is_equal():
    for first, second, count in (("1", "6", 9), ("3", "8", 4), ("4", "11d", 8)):
        assert len(keyed("tec", first)) == count
        assert keyed("tec", first) == keyed("tec", second)
    part, whole = keyed("tec", "2"), keyed("tec", "5")
    assert (len(part), len(whole)) == (14, 38)
    assert {key: whole[key] for key in part} == part


def test_gains_are_above_the_base():
    gains = [cell for cell in cells("tec") if cell.metric == "finetune_top1_gain"]
    assert len(gains) == 3 + 5 + 7 + 3
    for cell in gains:
        own = {**cell.setting, "method": cell.method, "arch": cell.arch, "epochs": str(cell.epochs)}
        base = cell.field("base") or cell.field("guidance")
        wanted = {"method": base, "arch": cell.arch, "pretrain_data": "imagenet"}
        if base.endswith("ep"):
            wanted |= {"method": "MAE", "epochs": base.removeprefix("MAE").removesuffix("ep")}
        above = (
            one("tec", cell.table, "finetune_top1", **own).value
            - one("tec", cell.table, "finetune_top1", **wanted).value
        )
        assert above == pytest.approx(cell.value), cell
        assert cell.unit == "points"


def test_ablations_agree_with_each_other_and_with_the_comparison():
    def top1(table, **wanted):
        return one("tec", table, "finetune_top1", **wanted).value

    for base in ("MAE", "iBOT"):
        assert {top1(table, method=base, epochs="1600", arch="ViT-B/16") for table in ("5", "12")} == {
            {"MAE": 83.6, "iBOT": 84.1}[base]
        }
        full = top1("12", base=base, attention="selected", adapters="both")
        assert full == top1("5", base=base, epochs="300", arch="ViT-B/16")
    plain = top1("12", base="MAE", attention="none", adapters="none")
    assert plain == top1("11a", normalization="patch") == top1("11b", adapters="none")
    assert top1("12", base="MAE", attention="none", adapters="both") == top1("11b", adapters="both")
    assert top1("12", base="iBOT", attention="none", adapters="none") == top1("11e", attention="none")
    assert top1("12", base="iBOT", attention="selected", adapters="none") == top1("11e", attention="selected")
    assert top1("11c", load_base="no") == top1("5", base="iBOT", epochs="300")
    assert top1("10", base="iBOT") == top1("5", base="iBOT", epochs="800")


@pytest.mark.parametrize(
    ("table", "metric", "wanted", "words"),
    [
        ("5", "finetune_top1", {"method": "DINO"}, ("82.8", "83.3", "83.6")),
        ("5", "finetune_top1", {"method": "MoCo-v3"}, ("83.2", "83.0")),
        ("5", "finetune_top1", {"method": "iBOT", "epochs": "1600"}, ("84.1", "84.0")),
        ("5", "finetune_top1", {"method": "SemMAE"}, ("one column",)),
        ("11a", "finetune_top1", {"normalization": "patch"}, ("variance",)),
        ("3", "linear_top1", {"method": "TEC"}, ("Table 8",)),
        ("9", "miou", {"method": "MAE", "finetuned_epochs": ""}, ("919",)),
    ],
)
def test_known_conflicts_stand_in_a_note(table, metric, wanted, words):
    note = one("tec", table, metric, **wanted).note
    assert all(word in note for word in words), note


# How they are measured, and what trains them --------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_trained_by_what_they_vary_on_their_base(table):
    finetuned_adapters = {"adapters"} if table in ("3", "8") else set()
    words = {"base", "guidance", "implementation", "finetuned_epochs", *finetuned_adapters}
    for row in tables.rows("tec", table):
        pretraining, setting = trained("tec", table, row), row.first.setting
        if pretraining is None or row.first.method != "TEC":
            continue
        recipe = trained_recipe(pretraining)
        check_settings(recipe, setting, words)
        base, _, epochs = pretraining.base.partition(", ")
        named = {"MAE300ep": "MAE", "MAE1600ep": "MAE", "TEC_iBOT": "TEC on iBOT"}.get(setting["base"], setting["base"])
        assert base == named + (" ViT-L" if row.first.arch == "ViT-L/16" else ""), row.label
        assert epochs == {"MAE300ep": "300 epochs", "TEC_iBOT": "800 epochs"}.get(setting["base"], "1600 epochs")
        # k and tau of Table 14.
        large = row.first.arch == "ViT-L/16"
        assert (recipe.temperature, recipe.top_k) == (
            (1.0, 9) if "iBOT" in base else (1.4, 15) if large else (1.8, 15)
        ), row.label
        quoted = [cell for cell in row.cells.values() if cell.metric not in ("finetune_top1_gain",)]
        if row.first.dataset in ("imagenet", "ade20k") and setting["base"] != "MAE1600ep":
            assert all(f"{cell.value:.1f}" in recipe.published for cell in quoted), (row.label, recipe.published)


def test_who_is_measured_by_which_recipe():
    def recipe(table, label, column="Top-1"):
        return measured("tec", table, label, column).recipe

    assert recipe("2", "TEC, ViT-L/16, imagenet, 300 epochs, base=MAE") == "finetune/tec-vit-l"
    assert recipe("2", "TEC, ViT-B/16, imagenet, 300 epochs, base=iBOT") == "finetune/tec-ibot"
    assert recipe("2", "TEC, ViT-B/16, imagenet, 800 epochs, base=MAE") == "finetune/tec-mae"
    assert recipe("2", "MAE, ViT-L/16, imagenet, 1600 epochs, guidance=RGB") == "finetune/mae-vit-l"
    assert recipe("2", "MAE, ViT-B/16, imagenet, 1600 epochs, guidance=RGB") == "finetune/mae"
    assert recipe("4", "TEC, 100 epochs, base=MAE300ep") == "finetune/tec-mae"
    assert recipe("10", "TEC, 800 epochs, base=TEC_iBOT") == "finetune/tec-ibot"
    assert "not among ours" in measured("tec", "5", "Mugs, ViT-B/16, imagenet, 1600 epochs", "Top-1").note
    assert isinstance(measured("tec", "4", "TEC, 100 epochs, base=MAE300ep", "Gain"), str)
    assert recipe("1", "CAE, 1600 epochs", "mIoU") == "semseg/upernet-cae"
    assert recipe("6", "MAE, 1600 epochs", "mIoU") == "semseg/upernet-mae"
    assert recipe("6", "TEC, 800 epochs, base=MAE", "mIoU") == "semseg/upernet-tec"
    assert recipe("6", "iBOT, 1600 epochs", "mIoU") == "semseg/upernet-ibot"
    assert recipe("8", "TEC, 800 epochs", "Linear") == "linear/tec"
    assert recipe("8", "MAE, 1600 epochs", "Linear") == "linear/mae"
    assert recipe("8", "TEC, 800 epochs", "+ input adapter") == "adapters/input"
    assert recipe("8", "TEC, 800 epochs", "+ encoder adapter") == "adapters/encoder"
    assert recipe("7", "TEC, implementation=ViTDet, base=MAE", "AP box") == "detection/cascade-tec-vitdet"
    assert recipe("7", "MAE, implementation=ViTDet", "AP box") == "detection/cascade-tec-vitdet"
    assert recipe("7", "TEC, implementation=iBOT, base=iBOT", "AP mask") == "detection/cascade-tec-ibot"
    assert measured("tec", "7", "MAE, implementation=ViTDet", "AP mask").metric == "mask_ap"
    assert recipe("9", "MAE, 1600 epochs", "mIoU") == "semseg/imagenet-s"
    assert recipe("9", "TEC, 800 epochs, finetuned_epochs=100", "mIoU") == "semseg/imagenet-s-ft"


def test_the_commands_name_the_base():
    (row,) = (row for row in tables.rows("tec", "4") if row.label == "TEC, 100 epochs, base=MAE300ep")
    command = trained("tec", "4", row).command()
    assert command.startswith("ssl-bench pretrain tec --data imagenet --recipe mae300-b-100ep --base SPEC")
    assert command.endswith("--out runs/tec-mae300-b-100ep-mae-300-epochs")
