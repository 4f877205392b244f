"""SdAE's tables: every number is the paper's, and every recipe named is the one that measures it."""

from __future__ import annotations

from collections import Counter

import pytest
from paper_tables import (
    lines,
    measured,
    of_table,
    one,
    sums,
    trained,
    trained_recipe,
)

from ssl_bench.errors import UserError
from ssl_bench.leaderboards import tables
from ssl_bench.leaderboards.papers.sdae import TABLES
from ssl_bench.leaderboards.published import cells
from ssl_bench.leaderboards.tables import Measure
from ssl_bench.pretrain.catalog import METHODS

# The numbers ----------------------------------------------------------------------------------------------------------


def test_how_many_numbers_each_table_has():
    assert Counter(cell.table for cell in cells("sdae")) == {
        "1": 14, "2": 19, "3": 9, "4": 54, "5": 4, "6": 8, "7": 36, "text:4.3": 3, "text:A.3": 2, "text:A.4": 4,
    }  # fmt: skip


def test_columns_add_up_as_in_the_paper():
    # Counted and added from the columns of the paper's text by a tool that knows nothing of the file.
    assert {(table, name): found for table in TABLES for name, found in sums("sdae", table).items()} == {
        ("1", "seconds"): (5, 3460.0), ("1", "increase"): (4, 127.9), ("1", "memory"): (5, 78.74),
        ("2", "fine-tuned"): (10, 830.8), ("2", "linear"): (9, 576.4),
        ("3", "mIoU"): (9, 423.6),
        ("4", "box AP"): (9, 411.5), ("4", "box AP50"): (9, 602.6), ("4", "box AP75"): (9, 449.0),
        ("4", "mask AP"): (9, 365.7), ("4", "mask AP50"): (9, 573.6), ("4", "mask AP75"): (9, 392.6),
        ("5", "accuracy"): (4, 335.3),
        ("6", "accuracy"): (8, 678.5),
        ("7", "hours"): (6, 887.1), ("7", "memory"): (6, 97.15),
        ("7", "fine-tuned"): (8, 668.7), ("7", "box AP"): (8, 383.9), ("7", "mIoU"): (8, 382.2),
    }  # fmt: skip


def test_lines_add_up_as_in_the_paper():
    # The same, from left to right. Table 5 is held against the recipes below.
    assert [total for _, _, total in lines("sdae", "1")] == [565.93, 892.14, 815.11, 643.34, 750.12]
    assert lines("sdae", "2") == [
        ("Scratch", 300, 81.8), ("MoCo-v3", 300, 159.4), ("DINO", 400, 160.6), ("BEiT", 300, 132.4),
        ("MAE", 100, 136.9), ("MAE", 300, 144.4), ("MAE", 1600, 151.4), ("CAE", 300, 147.5),
        ("SdAE", 100, 143.8), ("SdAE", 300, 149.0),
    ]  # fmt: skip
    assert lines("sdae", "3") == [
        ("DeiT", 300, 47.0), ("MoCo-v3", 300, 47.2), ("DINO", 400, 47.2), ("BEiT", 300, 45.5), ("BEiT", 800, 46.5),
        ("MAE", 300, 45.8), ("MAE", 1600, 48.1), ("CAE", 300, 47.7), ("SdAE", 300, 48.6),
    ]  # fmt: skip
    assert lines("sdae", "4") == [
        ("DeiT", 300, 318.2), ("MoCo-v3", 300, 309.6), ("DINO", 400, 317.6), ("BEiT", 300, 275.2), ("BEiT", 800, 289.9),
        ("MAE", 300, 309.1), ("MAE", 1600, 325.5), ("CAE", 300, 322.7), ("SdAE", 300, 327.2),
    ]  # fmt: skip
    assert lines("sdae", "6") == [
        ("Scratch", 300, 82.6), ("MoCo-v3", 300, 84.1), ("BEiT", 1600, 85.2), ("iBOT", 250, 85.0), ("MAE", 400, 84.3),
        ("MAE", 1600, 85.9), ("MaskFeat", 1600, 85.7), ("SdAE", 300, 85.7),
    ]  # fmt: skip
    assert lines("sdae", "7") == [
        ("MAE", 300, 234.03), ("CAE", 300, 179.0), ("SdAE", 300, 258.42), ("SimMIM", 800, 386.12), ("MAE", 800, 333.53),
        ("CAE", 800, 181.6), ("MAE", 1600, 473.53), ("SdAE", 800, 372.82),
    ]  # fmt: skip


def test_table_7_repeats_the_others():
    for method, epochs in (("MAE", "300"), ("CAE", "300"), ("SdAE", "300"), ("MAE", "1600")):
        line = {"method": method, "epochs": epochs}
        for table, metric in (("2", "finetune_top1"), ("4", "box_ap"), ("3", "miou")):
            assert one("sdae", "7", metric, **line).value == one("sdae", table, metric, **line).value
            assert "as Table 7" in one("sdae", table, metric, **line).note
    for method, operation in (("MAE", "baseline"), ("SdAE", "multi-fold masking")):
        for cell in cells("sdae"):
            if (cell.table, cell.method, cell.metric) == ("7", method, "memory"):
                assert cell.value == one("sdae", "1", "memory", method=method, operation=operation).value


def test_increases_are_over_the_baseline():
    baseline = one("sdae", "1", "epoch_seconds", operation="baseline").value
    increases = [cell for cell in cells("sdae") if cell.metric == "epoch_seconds_gain"]
    assert len(increases) == 4
    for cell in increases:
        seconds = one("sdae", "1", "epoch_seconds", operation=cell.setting["operation"]).value
        assert 100 * (seconds / baseline - 1) == pytest.approx(cell.value, abs=0.05)


def test_crops_and_multi_crop():
    for cell in cells("sdae"):
        crops = cell.field("crops")
        assert cell.multicrop == {"": "", "1": "no", "2": "yes", "12": "yes"}[crops]
        if cell.table in ("2", "3", "6"):
            assert (crops == "") == (cell.method in ("Scratch", "DeiT"))
    assert {cell.method for cell in cells("sdae") if cell.multicrop == "yes"} == {"MoCo-v3", "DINO"}


def test_multi_crop_without_local_crops_is_noted():
    two = [cell for cell in cells("sdae") if cell.field("crops") == "2"]
    assert {cell.table for cell in two} == {"2", "3", "6"}
    assert one("moca", "6", "linear_top1", method="MoCo-v3").multicrop == "no"
    for cell in two:
        assert "global" in cell.note
        assert "MOCA Table 6" in cell.note
    for cell in cells("sdae"):
        unsaid = cell.table == "3" and cell.multicrop == "yes"
        assert ("Table 2's caption" in cell.note) == unsaid, cell


def test_the_architecture_of_table_1_is_noted_in_every_line():
    assert all("the architecture is Table 7's" in cell.note for cell in of_table("sdae", "1"))


def test_fields_of_the_file():
    datasets = {"box_ap": "coco", "miou": "ade20k", "box_ap_drop": "coco"}
    units = {"pretrain_hours": "hours", "epoch_seconds": "seconds", "memory": "GB"}
    drops = ("finetune_top1_gain", "finetune_top1_drop", "box_ap_drop")
    for cell in cells("sdae"):
        assert cell.paper == "sdae"
        assert cell.std is None
        assert cell.arch == ("ViT-L/16" if cell.table == "6" else "" if cell.method == "iBOT" else "ViT-B/16")
        assert cell.pretrain_data == ("" if cell.method == "Scratch" else "imagenet")
        assert cell.dataset == ("coco" if cell.table == "4" else datasets.get(cell.metric, "imagenet"))
        assert cell.unit == ("points" if cell.metric in drops else units.get(cell.metric, "percent"))
        assert (cell.field("supervised") == "yes") == (cell.method == "DeiT")
        assert (cell.epochs is None) == (cell.table in ("1", "text:A.3", "text:A.4"))
        if cell.unit == "percent":
            assert 0 < cell.value < 100


def test_prose_has_numbers_that_no_table_has():
    found = {
        (cell.table, *cell.setting.values(), cell.metric): cell.value for cell in cells("sdae") if ":" in cell.table
    }
    assert found == {
        ("text:4.3", "36", "finetune_top1"): 82.81,
        ("text:4.3", "196", "finetune_top1"): 83.04,
        ("text:4.3", "196", "finetune_top1_gain"): 0.23,
        ("text:A.3", "no", "knn_top1"): 9.5,
        ("text:A.3", "no", "linear_top1"): 29.8,
        ("text:A.4", "2", "finetune_top1"): 82.76,
        ("text:A.4", "2", "box_ap"): 45.2,
        ("text:A.4", "2", "finetune_top1_drop"): 0.07,
        ("text:A.4", "2", "box_ap_drop"): 0.5,
    }
    assert found["text:4.3", "196", "finetune_top1"] - found["text:4.3", "36", "finetune_top1"] == pytest.approx(0.23)


@pytest.mark.parametrize(
    ("table", "wanted", "words"),
    [
        ("2", {"method": "DINO", "metric": "finetune_top1"}, ("82.8", "83.3", "83.6")),
        ("2", {"method": "DINO", "metric": "linear_top1"}, ("78.2",)),
        ("2", {"method": "SdAE", "epochs": "300", "metric": "finetune_top1"}, ("MSE", "cosine")),
        ("2", {"method": "SdAE", "epochs": "300", "metric": "linear_top1"}, ("76.2", "MAE, BEiT, CAE")),
        ("2", {"method": "SdAE", "epochs": "100", "metric": "finetune_top1"}, ("82.83",)),
        ("3", {"method": "CAE"}, ("1.9", "0.9")),
        ("3", {"method": "SdAE"}, ("1.9", "0.9")),
        ("3", {"method": "BEiT", "epochs": "800"}, ("47.1",)),
        ("5", {"multi_fold": "yes"}, ("84.1", "83.5", "100", "300")),
        ("5", {"only_masked": "yes"}, ("84.1", "83.5", "100", "300")),
        ("6", {"method": "iBOT"}, ("10 local crops", "84.8")),
        ("7", {"method": "MAE", "epochs": "300", "metric": "pretrain_hours"}, ("45.9",)),
        ("7", {"method": "SdAE", "epochs": "300", "metric": "pretrain_hours"}, ("58.8",)),
        ("text:4.3", {"teacher_patches": "36", "metric": "finetune_top1"}, ("79", "158", "147", "no folds")),
        ("text:4.3", {"teacher_patches": "196", "metric": "finetune_top1"}, ("79", "158", "147", "no folds", "84.0")),
        ("5", {"full_image": "yes", "teacher_normalize": "yes"}, ("84.1", "83.5", "83.04")),
        ("text:A.3", {"metric": "knn_top1"}, ("not said",)),
        ("text:A.3", {"metric": "linear_top1"}, ("not said",)),
        ("text:A.4", {"metric": "finetune_top1"}, ("82.83",)),
    ],
)
def test_known_conflicts_are_noted(table, wanted, words):
    (found,) = (cell for cell in cells("sdae") if cell.table == table and cell.agrees(wanted))
    for word in words:
        assert word in found.note


# How they are measured ------------------------------------------------------------------------------------------------


def test_all_tables_are_mapped():
    assert list(TABLES) == [str(number) for number in range(1, 8)]
    assert {cell.table for cell in cells("sdae")} - set(TABLES) == {"text:4.3", "text:A.3", "text:A.4"}
    with pytest.raises(UserError, match="sdae:8"):
        tables.find("sdae:8")


def test_what_is_trained_as_the_text_says_and_what_as_the_code():
    by_the_code = {"sdae/100ep", "sdae/crop-49"}
    for table in TABLES:
        for pretraining in TABLES[table].pretraining:
            if not pretraining.recipe.startswith("sdae/"):
                continue
            recipe = trained_recipe(pretraining)
            found = (recipe.teacher_start, recipe.weight_decay, recipe.drop_path, recipe.momentum, recipe.momentum_end)
            text, code = ("copied", 0.05, 0.25, 0.96, 0.99), ("independent", 0.04, 0.15, 0.9, 0.95)
            assert found == (code if pretraining.recipe in by_the_code else text), pretraining.recipe
            assert ("the code" in pretraining.note) == (pretraining.recipe in {*by_the_code, "sdae/800ep"})
            assert recipe.warmup_epochs == 0.2 * recipe.epochs
    for name in ("crop-36", "crop-49", "crop-196", "decoder-2"):  # as the docstring says
        assert METHODS["sdae"].RECIPES[name].weight_decay == 0.04


def test_every_line_of_a_trained_method_is_trained():
    named = {
        ("1", "baseline"): "mae/300ep",
        ("1", "full image input"): "sdae/full-image",
        ("1", "only masked patches input"): "sdae/only-masked",
        ("1", "teacher crop input"): "sdae/crop-49",
        ("1", "multi-fold masking"): "sdae/paper",
    }
    by_epochs = {
        ("SdAE", "ViT-B/16"): {100: "sdae/100ep", 300: "sdae/paper", 800: "sdae/800ep"},
        ("SdAE", "ViT-L/16"): {300: "sdae/vit-l"},
        ("MAE", "ViT-B/16"): {100: "mae/300ep", 300: "mae/300ep", 800: "mae/800ep", 1600: "mae/paper"},
        ("MAE", "ViT-L/16"): {400: "mae/vit-l", 1600: "mae/vit-l"},
    }
    for table in ("1", "2", "3", "4", "6", "7"):
        for row in tables.rows("sdae", table):
            first, pretraining = row.first, trained("sdae", table, row)
            if first.method not in ("SdAE", "MAE"):
                assert pretraining is None, row.label
                continue
            assert pretraining is not None, row.label
            expected = named.get((table, first.field("operation")))
            assert pretraining.recipe == (expected or by_epochs[first.method, first.arch][first.epochs or 0])


def test_parts_are_trained_by_the_recipe_that_has_them():
    for row in tables.rows("sdae", "5"):
        pretraining = trained("sdae", "5", row)
        assert pretraining is not None
        recipe, setting = METHODS["sdae"].RECIPES[pretraining.recipe.removeprefix("sdae/")], row.first.setting
        assert recipe.published.startswith(f"fine-tuning {row.first.value}")
        assert (recipe.teacher_input == "image") == (setting["full_image"] == "yes")
        assert (recipe.folds == 3) == (setting["multi_fold"] == "yes")
        one_fold = recipe.teacher_input == "folds" and recipe.folds == 1 and recipe.fold_patches is None
        assert one_fold == (setting["only_masked"] == "yes")
        assert recipe.normalize_teacher == (setting["teacher_normalize"] == "yes")


@pytest.mark.parametrize(
    ("table", "label", "column", "recipe", "settings"),
    [
        ("2", "SdAE, 300 epochs, crops=1", "fine-tuned", "finetune/sdae", {}),
        ("2", "SdAE, 100 epochs, crops=1", "linear", "linear/sdae", {}),
        ("2", "Scratch, 300 epochs", "fine-tuned", "finetune/sdae", {"epochs": 300}),
        ("2", "MAE, 1600 epochs, crops=1", "fine-tuned", "finetune/mae", {}),
        ("2", "MAE, 100 epochs, crops=1", "linear", "linear/mae", {}),
        ("2", "CAE, 300 epochs, crops=1", "linear", "linear/sdae", {}),
        ("2", "DINO, 400 epochs, multi-crop, crops=12", "fine-tuned", "finetune/sdae", {}),
        ("2", "DINO, 400 epochs, multi-crop, crops=12", "linear", "linear/dino-base", {}),
        ("2", "MoCo-v3, 300 epochs, multi-crop, crops=2", "linear", "linear/mocov3", {}),
        ("3", "CAE, 300 epochs, supervised=no, crops=1", "mIoU", "semseg/upernet-sdae", {}),
        ("4", "DeiT, 300 epochs, supervised=yes", "mask AP75", "detection/maskrcnn-sdae", {}),
        ("6", "SdAE, 300 epochs, crops=1", "accuracy", "finetune/sdae-vit-l", {}),
        ("6", "Scratch, 300 epochs", "accuracy", "finetune/sdae-vit-l", {"epochs": 300}),
        ("6", "MAE, 400 epochs, crops=1", "accuracy", "finetune/mae-vit-l", {}),
        ("6", "iBOT, 250 epochs, crops=1", "accuracy", "finetune/ibot-vit-l", {}),
        ("7", "SimMIM, 800 epochs", "fine-tuned", "finetune/sdae", {}),
        ("7", "MAE, 800 epochs", "fine-tuned", "finetune/mae", {}),
        ("7", "SdAE, 800 epochs", "mIoU", "semseg/upernet-sdae", {}),
        ("7", "SdAE, 800 epochs", "box AP", "detection/maskrcnn-sdae", {}),
    ],
)
def test_which_recipe_measures_a_number(table, label, column, recipe, settings):
    measure = measured("sdae", table, label, column)
    assert isinstance(measure, Measure)
    assert (measure.recipe, dict(measure.settings)) == (recipe, settings)


def test_costs_are_in_the_papers_unit_and_only_of_what_we_train():
    for row in tables.rows("sdae", "1"):
        seconds, memory = (measured("sdae", "1", row.label, column) for column in ("seconds", "memory"))
        assert isinstance(seconds, Measure)
        assert isinstance(memory, Measure)
        assert (seconds.scale, memory.scale) == (60, 1)  # recorded in minutes, and in GiB
    for row in tables.rows("sdae", "7"):
        for column in ("hours", "memory"):
            if column not in row.cells:
                assert row.first.method == "CAE"
                continue
            measure = measured("sdae", "7", row.label, column)
            if row.first.method == "SimMIM":
                assert isinstance(measure, str)
                assert "SimMIM" in measure
                continue
            assert isinstance(measure, Measure)
            # A pre-training of so many epochs of two minutes each.
            assert row.first.epochs is not None
            assert 2 * measure.scale == pytest.approx(row.first.epochs * 2 / 60 if column == "hours" else 2)


def test_no_run_has_the_increase():
    assert isinstance(measured("sdae", "1", "SdAE, operation=full image input", "increase"), str)
