"""MOCA's tables: every number is the paper's, and every recipe named is the one that measures or trains it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

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
from ssl_bench.leaderboards.papers.moca import TABLES
from ssl_bench.leaderboards.published import cells
from ssl_bench.leaderboards.tables import Measure
from ssl_bench.protocols.catalog import choose

# The numbers ----------------------------------------------------------------------------------------------------------

# Counted and added from the columns of the paper's text by a tool that knows nothing of the file.
SUMS = {
    "1": {"Minutes an epoch": (6, 57.66), "Memory, GB": (6, 202.3)},
    "2a": {"k-NN": (3, 206.4)},
    "2b": {"k-NN": (4, 284.9), "Minutes an epoch": (4, 34.08), "Memory, GB": (4, 103.3)},
    "2c": {"k-NN": (4, 282.6), "Minutes an epoch": (4, 31.87), "Memory, GB": (4, 85.5)},
    "2d": {"k-NN": (2, 132.0)},
    "2e": {"k-NN": (5, 293.4)},
    "2f": {"k-NN": (4, 285.6)},
    "3": {"k-NN": (3, 217.8), "Minutes an epoch": (3, 27.5), "Memory, GB": (3, 92.9)},
    "4": {"k-NN": (5, 363.3), "Linear": (5, 382.8), "Fine-tuning": (5, 415.8)},
    "5": {"Linear": (9, 596.8), "Fine-tuning": (10, 835.1)},
    "6": {"k-NN": (5, 370.5), "Linear": (6, 462.0), "Fine-tuning": (5, 416.8)},
    "7": {"Minutes an epoch": (6, 97.89), "Hours": (6, 721.0)},
    "8": {
        "1 image a class": (5, 201.3),
        "2 images a class": (5, 255.9),
        "5 images a class": (5, 302.0),
        "1 % (13 images)": (5, 329.8),
    },
    "9": {"linear, 2975 images": (4, 215.5), "linear, 100 images": (4, 176.7), "finetuning, 2975 images": (4, 309.4)},
    "fig3c": {
        "linear, 2975 images": (4, 215.5),
        "linear, 372 images": (4, 199.8),
        "linear, 100 images": (4, 176.7),
        "finetuning, 2975 images": (4, 309.4),
        "finetuning, 372 images": (4, 266.2),
        "finetuning, 100 images": (4, 189.2),
    },
    "10": {"k-NN": (6, 144.1), "Linear": (6, 272.9)},
    "11": {
        "k-NN": (3, 233.2),
        "Linear": (3, 238.3),
        "Fine-tuning": (3, 252.2),
        "1 image a class": (3, 167.2),
        "2 images a class": (3, 193.7),
        "5 images a class": (3, 210.5),
    },
    "12": {"Hours": (3, 596.0), "k-NN": (2, 156.4), "Linear": (3, 236.4), "Fine-tuning": (3, 255.6)},
    "13": {"AP box": (3, 151.8), "AP mask": (3, 131.2)},
}


def test_how_many_numbers_there_are():
    assert len(cells("moca")) == 224
    assert list(Counter(cell.table for cell in cells("moca"))) == list(TABLES) == list(SUMS)


@pytest.mark.parametrize("table", TABLES)
def test_columns_add_up_as_in_the_paper(table):
    assert sums("moca", table) == SUMS[table]


def test_rows_of_the_comparisons_as_they_are_printed():
    printed = {
        "5": {
            "CIM, 300 epochs": "- 83.1",
            "CAE, 800 epochs": "68.6 83.8",
            "CAE, 1600 epochs": "70.4 83.9",
            "BEiT, 800 epochs": "37.6 83.2",
            "SimMIM, 800 epochs": "56.7 83.8",
            "MAE, 800 epochs": "68.0 83.1",
            "MAE, 1600 epochs": "68.0 83.6",
            "MOCA, 200 epochs": "78.7 83.6",
        },
        "6": {
            "MoCo-v3, 300 epochs": "- 76.7 83.0",
            "DINO, 400 epochs": "68.9 72.8 -",
            "iBOT, 400 epochs": "71.2 76.0 -",
            "DINO, 400 epochs, multi-crop": "76.1 78.2 82.8",
            "iBOT, 400 epochs, multi-crop": "77.1 79.6 84.0",
            "MSN, 600 epochs, multi-crop": "- - 83.4",
            "MOCA, 200 epochs": "77.2 78.7 83.6",
        },
        "7": {
            "MAE, 1600 epochs": "5.35 142",
            "DINO, 400 epochs": "16.42 109",
            "iBOT, 400 epochs": "17.40 116",
            "DINO, 400 epochs, multi-crop": "23.16 154",
            "iBOT, 400 epochs, multi-crop": "24.33 162",
            "MOCA, 200 epochs": "11.23 38",
        },
        "8": {
            "MAE, 1600 epochs": "8.2 25.0 40.5 51.1",
            "DINO, 400 epochs, multi-crop": "41.8 51.9 61.4 67.2",
            "iBOT, 400 epochs, multi-crop": "46.1 56.2 64.7 69.7",
            "MSN, 600 epochs, multi-crop": "49.8 58.9 65.5 69.4",
            "MOCA, 200 epochs": "55.4 63.9 69.9 72.4",
        },
        "9": {
            "MAE": "40.6 33.2 77.7",
            "DINO, multi-crop": "55.5 45.8 75.7",
            "iBOT, multi-crop": "59.3 47.8 77.8",
            "MOCA": "60.1 49.9 78.2",
        },
        "13": {"DINO, multi-crop": "50.1 43.4", "iBOT, multi-crop": "51.2 44.2", "MOCA": "50.5 43.6"},
    }
    for table, lines in printed.items():
        rows = {row.label: row for row in tables.rows("moca", table)}
        assert set(lines) == {label for label in rows if not label.startswith("CAN")}
        for label, text in lines.items():
            names = [column.name for column in TABLES[table].columns]
            values = {name: float(value) for name, value in zip(names, text.split(), strict=True) if value != "-"}
            assert {name: cell.value for name, cell in rows[label].cells.items()} == values, (table, label)


def test_spreads_of_table_8():
    spreads = {(cell.method, cell.setting["images_per_class"]): cell.std for cell in of_table("moca", "8")}
    printed = {
        "MAE": "0.3 0.3 0.2",
        "DINO": "0.3 0.6 0.2",
        "iBOT": "0.3 0.7 0.3",
        "MSN": "0.2 0.4 0.3",
        "MOCA": "0.4 0.2 0.1",
    }
    for method, text in printed.items():
        assert [spreads[method, images] for images in ("1", "2", "5")] == [float(value) for value in text.split()]
        assert spreads[method, "13"] is None
    assert all(cell.std is None for cell in cells("moca") if cell.table != "8")


def test_what_is_printed_twice_is_equal():
    nine, figure = keyed("moca", "9"), keyed("moca", "fig3c")
    assert len(nine) == 12
    assert {key: figure[key] for key in nine} == nine
    assert len(figure) == 24

    # The comparisons' MOCA, in Tables 6, 8, 5 and 11; ViT-L/16, in Tables 11 and 12.
    for metric in ("knn_top1", "linear_top1", "finetune_top1"):
        base, large = (one("moca", "11", metric, arch=arch, epochs="200").value for arch in ("ViT-B/16", "ViT-L/16"))
        assert base == one("moca", "6", metric, method="MOCA").value
        assert large == one("moca", "12", metric, method="MOCA").value
        assert metric == "knn_top1" or base == one("moca", "5", metric, method="MOCA").value
    for images in ("1", "2", "5"):
        wanted = {"epochs": "200", "images_per_class": images}
        ours = one("moca", "8", "lowshot_top1", method="MOCA", images_per_class=images)
        assert one("moca", "11", "lowshot_top1", arch="ViT-B/16", **wanted).value == ours.value

    # The default of the ablations, in every one of them; with another decoder, in Tables 1, 2b and 3.
    defaults = {
        "2a": {"condenser": "yes"},
        "2b": {"decoder_depth": "2"},
        "2c": {"mask_ratio": "65%"},
        "2d": {"global_token": "avg"},
        "2e": {"image_weight": "0.5"},
        "2f": {"intermediate_block": "8"},
        "3": {"partial_decoding": "yes", "masks": "1"},
    }
    assert {one("moca", table, "knn_top1", **wanted).value for table, wanted in defaults.items()} == {71.8}
    for metric in ("epoch_minutes", "memory"):
        for depth in ("2", "4", "8"):
            partial = one("moca", "1", metric, decoder_depth=depth, partial_decoding="yes")
            assert partial.value == one("moca", "2b", metric, decoder_depth=depth).value
        full = one("moca", "1", metric, decoder_depth="2", partial_decoding="no")
        assert full.value == one("moca", "3", metric, partial_decoding="no").value
    only_local = one("moca", "10", "knn_top1", decoders="condenser", targets="assignments")
    assert one("moca", "2e", "knn_top1", image_weight="0.0").value == only_local.value
    only_image = one("moca", "2e", "knn_top1", image_weight="1.0")
    assert one("moca", "2a", "knn_top1", objectives="L_IMG").value == only_image.value


def test_settings_that_the_paper_says():
    assert {
        cell.epochs for table in ("2a", "2b", "2c", "2d", "2e", "2f", "3", "10") for cell in of_table("moca", table)
    } == {100}
    assert {cell.epochs for cell in of_table("moca", "4")} == {200}
    assert {cell.pretrain_data for cell in cells("moca")} == {"imagenet"}
    assert {cell.arch for cell in cells("moca") if cell.table != "11"} == {"ViT-B/16", "ViT-L/16"}
    assert {cell.table for cell in cells("moca") if cell.arch == "ViT-L/16"} == {"11", "12"}
    # A dagger is several crops; only tables that have daggers say so.
    crops = {table: {(cell.method, cell.multicrop) for cell in of_table("moca", table)} for table in TABLES}
    assert {table for table, found in crops.items() if {crop for _, crop in found} != {""}} == {
        "6", "7", "8", "9", "fig3c", "12", "13"
    }  # fmt: skip
    assert crops["12"] == {("MAE", "no"), ("iBOT", "yes"), ("MOCA", "no")}
    assert crops["9"] == {("MAE", "no"), ("DINO", "yes"), ("iBOT", "yes"), ("MOCA", "no")}


@pytest.mark.parametrize(
    ("table", "metric", "wanted", "words"),
    [
        ("3", "epoch_minutes", {"masks": "2"}, ("10.35", "11.23")),
        ("7", "epoch_minutes", {"method": "MOCA"}, ("10.35", "11.23")),
        ("7", "pretrain_hours", {"method": "MOCA"}, ("37.4",)),
        ("6", "finetune_top1", {"method": "DINO"}, ("82.8", "83.3", "83.6")),
        ("6", "finetune_top1", {"method": "MOCA"}, ("1.5e-4", "1.2e-3", "peak")),
        ("6", "knn_top1", {"method": "MOCA"}, ("1.5e-4", "1.2e-3", "peak")),
        ("5", "linear_top1", {"method": "CAN", "line": "second"}, ("800",)),
        ("5", "finetune_top1", {"method": "MAE", "epochs": "800"}, ("83.1", "83.4")),
        ("12", "linear_top1", {"method": "MAE"}, ("75.1", "75.8")),
        ("2b", "epoch_minutes", {"decoder_depth": "8"}, ("9.30",)),
    ],
)
def test_known_conflicts_stand_in_a_note(table, metric, wanted, words):
    note = one("moca", table, metric, **wanted).note
    assert all(word in note for word in words), note


def test_the_figure_notes_its_conflicts_in_every_cell():
    for cell in of_table("moca", "fig3c"):
        assert "Segformer" in cell.note
        assert ("374" in cell.note) == (cell.setting["train_images"] == "372")


# How they are measured, and what trains them --------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["1", "2a", "2b", "2c", "2d", "2e", "2f", "3", "4", "10"])
def test_ablations_are_trained_by_what_they_vary(table):
    words = {"objectives", "condenser", "partial_decoding", "masks", "mask_ratio"}
    recipes = set()
    for row in tables.rows("moca", table):
        pretraining, setting = trained("moca", table, row), row.first.setting
        recipe = trained_recipe(pretraining)
        recipes.add(replace(recipe, source="", published=""))
        check_settings(recipe, setting, words)
        if "objectives" in setting:
            assert (setting["objectives"] == "L_IMG") == (recipe.image_weight == 1.0), row.label
            assert setting["objectives"] == "L_IMG" or recipe.image_weight == 0.5
        if "condenser" in setting:
            assert (setting["condenser"] == "yes") == ("condenser" in recipe.decoders), row.label
        if "partial_decoding" in setting:
            assert (setting["partial_decoding"] == "no") == (recipe.decoded_ratio is None), row.label
        if "masks" in setting:
            assert len(recipe.mask_ratios) == int(setting["masks"]), row.label
        if "mask_ratio" in setting:
            assert [f"{100 * ratio:.0f}%" for ratio in recipe.mask_ratios] == [setting["mask_ratio"]]
    assert len(recipes) == len(tables.rows("moca", table)), "two rows are trained alike"


def test_the_recipes_quote_the_rows_that_they_train():
    quoted = Counter()
    for table in TABLES:
        for row in tables.rows("moca", table):
            pretraining = trained("moca", table, row)
            if pretraining is None or row.first.method != "MOCA":
                continue
            for cell in row.cells.values():
                if cell.metric in ("knn_top1", "linear_top1", "finetune_top1"):
                    assert f"{cell.value:.1f}" in trained_recipe(pretraining).published, (table, row.label, cell)
                    quoted[table] += 1
    assert quoted.total() == 3 + 4 + 4 + 2 + 5 + 4 + 3 + 15 + 2 + 3 + 12 + 9 + 3


def test_who_is_measured_by_which_recipe():
    assert measured("moca", "6", "MOCA, 200 epochs", "k-NN").recipe == "knn/moca-paper"
    assert measured("moca", "6", "DINO, 400 epochs, multi-crop", "k-NN").recipe == "knn/dino"
    assert measured("moca", "6", "iBOT, 400 epochs", "k-NN").recipe == "knn/ibot"
    assert measured("moca", "6", "MOCA, 200 epochs", "Linear").recipe == "linear/moca-paper"
    assert measured("moca", "6", "MoCo-v3, 300 epochs", "Linear").recipe == "linear/mocov3"
    assert measured("moca", "6", "iBOT, 400 epochs, multi-crop", "Fine-tuning").recipe == "finetune/ibot"
    assert measured("moca", "5", "MAE, 1600 epochs", "Linear").recipe == "linear/mae"
    assert measured("moca", "5", "MAE, 1600 epochs", "Fine-tuning").recipe == "finetune/mae"
    assert "not among ours" in measured("moca", "5", "BEiT, 800 epochs", "Linear").note
    assert measured("moca", "8", "MOCA, 200 epochs", "1 % (13 images)").recipe == "lowshot/moca"
    assert measured("moca", "8", "MSN, 600 epochs, multi-crop", "5 images a class").recipe == "lowshot/msn"
    assert measured("moca", "8", "MSN, 600 epochs, multi-crop", "5 images a class").metric == "top1_5shot"
    assert measured("moca", "8", "MOCA, 200 epochs", "1 % (13 images)").metric == "top1_1percent"
    assert measured("moca", "12", "MAE, 1600 epochs", "Fine-tuning").recipe == "finetune/mae-vit-l"
    assert measured("moca", "13", "DINO, multi-crop", "AP mask").recipe == "detection/cascade-ibot"
    assert measured("moca", "13", "MOCA", "AP mask").metric == "mask_ap"
    assert "not pre-trained here" in measured("moca", "7", "DINO, 400 epochs", "Hours")
    assert measured("moca", "2d", "MOCA, global_token=cls", "k-NN").settings == {"vector": "cls"}
    assert measured("moca", "2d", "MOCA, global_token=avg", "k-NN").settings == {}


def test_segmentation_is_trained_on_as_many_images_as_the_column_says():
    for column in TABLES["fig3c"].columns:
        recipe = choose(column.measure.recipe)[2]
        assert str(recipe.train_images or 2975) == column.cells["train_images"]
        assert recipe.head == {"linear": "linear", "finetuning": "mask"}[column.cells["setup"]]
        assert recipe.frozen == (column.cells["setup"] == "linear")


def test_hours_are_epochs_of_the_minutes_beside_them():
    for row in tables.rows("moca", "7"):
        minutes, hours = row.cells["Minutes an epoch"], row.cells["Hours"]
        measure = measured("moca", "7", row.label, "Hours")
        scale = measure.scale if isinstance(measure, Measure) else minutes.epochs / 60
        assert scale == minutes.epochs / 60
        assert minutes.value * scale == pytest.approx(hours.value, abs=0.75), row.label
    for row in tables.rows("moca", "12"):
        measure = measured("moca", "12", row.label, "Hours")
        assert isinstance(measure, str) == (row.first.method == "iBOT")
        assert isinstance(measure, str) or measure.scale == row.first.epochs / 60
