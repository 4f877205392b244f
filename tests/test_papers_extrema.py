"""ExtreMA's tables: every number is the paper's, and every recipe named is the one that measures it."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

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
from ssl_bench.leaderboards.papers.extrema import TABLES
from ssl_bench.leaderboards.published import cells
from ssl_bench.leaderboards.tables import Measure
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.protocols.catalog import choose

# The numbers ----------------------------------------------------------------------------------------------------------


def test_how_many_numbers_each_table_has():
    assert Counter(cell.table for cell in cells("extrema")) == {
        "1": 12, "2": 24, "3": 10, "4": 16, "5": 6, "6": 4, "7": 26, "8": 8, "9": 7, "10": 14, "11": 48, "12": 27,
        "text:5.2": 4,
    }  # fmt: skip


def test_columns_add_up_as_in_the_paper():
    # Counted and added from the columns of the paper's text by a tool that knows nothing of the file.
    assert {(table, name): found for table in TABLES for name, found in sums("extrema", table).items()} == {
        ("1", "ft."): (6, 492.9), ("1", "lin."): (6, 345.2),
        ("2", "ft."): (12, 992.1), ("2", "lin."): (12, 778.7),  # 248.0 + 330.7 + 413.4, 199.7 + 270.7 + 308.3
        ("3", "ft."): (5, 414.6), ("3", "lin."): (5, 338.4),
        ("4", "ft."): (8, 661.9), ("4", "lin."): (8, 530.5),
        ("5", "ft."): (3, 247.8), ("5", "lin."): (3, 203.5),
        ("6", "ft."): (2, 165.4), ("6", "lin."): (2, 135.6),
        ("7", "ft."): (13, 1076.9), ("7", "lin."): (13, 907.3),
        ("8", "time"): (8, 2265.0),
        ("9", "mIoU"): (7, 333.1),
        ("10", "1%"): (7, 353.4), ("10", "10%"): (7, 491.2),
        ("11", "box AP"): (8, 370.0), ("11", "box AP50"): (8, 541.7), ("11", "box AP75"): (8, 403.5),
        ("11", "mask AP"): (8, 328.3), ("11", "mask AP50"): (8, 515.5), ("11", "mask AP75"): (8, 352.4),
        ("12", "ft."): (9, 742.6), ("12", "lin."): (9, 594.0), ("12", "time"): (9, 369.0),
    }  # fmt: skip


def test_lines_add_up_as_in_the_paper():
    # The same, from left to right. The lines of the ablations are held against the recipes below.
    assert lines("extrema", "7") == [
        ("MoCo-v3", 300, 314.0), ("DINO", 400, 320.5), ("MSN", 600, 318.7), ("BEiT", 800, 120.8),
        ("MAE", 1600, 151.4), ("data2vec", 800, 145.0), ("ExtreMA", 300, 308.2), ("ExtreMA", 30, 305.6),
    ]  # fmt: skip
    assert lines("extrema", "8") == [
        ("DINO", 400, 300.0), ("MSN", 600, 700.0), ("BEiT", 800, 240.0), ("MAE", 1600, 650.0), ("data2vec", 800, 250.0),
        ("ExtreMA", 300, 29.0), ("ExtreMA", 300, 36.0), ("ExtreMA", 300, 60.0),
    ]  # fmt: skip
    assert lines("extrema", "9") == [
        ("DINO", 400, 47.2), ("MSN", 600, 47.1), ("MoCo-v3", 300, 47.3), ("BEiT", 800, 47.1), ("MAE", 1600, 48.1),
        ("ExtreMA", 300, 47.9), ("ExtreMA", 30, 48.4),
    ]  # fmt: skip
    assert lines("extrema", "10") == [
        ("Scratch", None, 53.8), ("BEiT", 800, 105.6), ("DINO", 400, 140.6), ("MoCo-v3", 300, 133.0),
        ("MSN", 600, 143.4), ("MAE", 1600, 124.8), ("ExtreMA", 300, 143.4),
    ]  # fmt: skip
    assert lines("extrema", "11") == [
        ("DINO", 400, 317.6), ("MSN", 600, 312.1), ("MoCo-v3", 300, 309.6), ("BEiT", 800, 289.9), ("MAE", 300, 309.1),
        ("MAE", 1600, 325.5), ("ExtreMA", 300, 321.0), ("ExtreMA", 30, 326.6),
    ]  # fmt: skip


def pair(table: str, **wanted: str) -> tuple[float, float]:
    return tuple(one("extrema", table, metric, **wanted).value for metric in ("finetune_top1", "linear_top1"))


def test_what_is_printed_twice_is_equal():
    for ratio in ("0.8", "0.9"):
        assert pair("1", mask_ratio=ratio) == pair("2", mask_ratio=ratio, num_masks="1")
    for ratio in ("0.75", "0.8", "0.9"):
        for masks in ("1", "2"):
            same = {"mask_ratio": ratio, "num_masks": masks, "epochs": "300"}
            assert pair("2", **same) == pair("12", **same)
    assert (
        pair("2", mask_ratio="0.8", num_masks="2")
        == pair("4", augment="rand size crop", augs="1")
        == pair("5", class_attention_blocks="2")
        == pair("6", loss="byol")
    )
    for masks in ("1", "2"):
        same = {"mask_ratio": "0.8", "num_masks": masks, "epochs": "300"}
        assert (
            one("extrema", "8", "pretrain_hours", **same).value == one("extrema", "12", "pretrain_hours", **same).value
        )


def test_detection_of_other_methods_is_printed_in_sdae_too():
    others = [cell for cell in of_table("extrema", "11") if cell.method not in ("ExtreMA", "MSN")]
    assert len(others) == 5 * 6
    for cell in others:
        assert one("sdae", "4", cell.metric, method=cell.method, epochs=str(cell.epochs)).value == cell.value
        assert "SdAE Table 4" in cell.note


def test_prose_has_numbers_that_no_table_has():
    prose = [
        (cell.metric, cell.pretrain_data, cell.field("bound"), cell.value, cell.unit)
        for cell in cells("extrema")
        if ":" in cell.table
    ]
    assert prose == [
        ("finetune_top1_variance", "", "", 0.1, "points"),
        ("linear_top1_variance", "", "", 0.1, "points"),
        ("pretrain_speedup", "imagenet", "lower", 5, "times"),
        ("pretrain_speedup", "imagenet", "upper", 10, "times"),
    ]


def test_fields_of_the_file():
    for cell in cells("extrema"):
        assert cell.paper == "extrema"
        assert cell.std is None
        assert cell.multicrop == ""  # the paper marks no crops
        hours = cell.metric == "pretrain_hours"
        if ":" not in cell.table:
            assert cell.unit == ("hours" if hours else "percent")
            assert cell.arch in (("ViT-S/16", "ViT-B/16") if cell.table == "7" else ("ViT-B/16",))
            assert (cell.epochs is None) == (cell.method == "Scratch")
            assert cell.pretrain_data == (
                "" if cell.method == "Scratch" else "imagenet-22k" if cell.epochs == 30 else "imagenet"
            )
            assert cell.dataset == {"9": "ade20k", "11": "coco"}.get(cell.table, "imagenet")
        assert hours or 0 < cell.value < 100


def test_how_extrema_is_masked_where_the_paper_says():
    found = {
        (cell.table, cell.field("mask_ratio"), cell.field("num_masks"), cell.field("augment"))
        for cell in cells("extrema")
        if cell.method == "ExtreMA" and cell.table in ("5", "6", "7", "9", "10", "11")
    }
    strongest = ("0.8", "5", "color")
    assert found == {
        ("5", "0.8", "2", ""), ("6", "0.8", "2", ""),  # 5.1
        ("7", *strongest), ("9", *strongest), ("10", *strongest),  # 5.2, 5.3
        ("11", "", "", ""),  # not said
    }  # fmt: skip
    fourth = of_table("extrema", "4")
    assert {(cell.setting["mask_ratio"], cell.setting["num_masks"]) for cell in fourth} == {("0.8", "2")}
    assert all("num_masks" not in cell.setting for cell in cells("extrema") if cell.method != "ExtreMA")


def test_where_the_masks_of_the_strongest_model_are_assumed():
    for table in ("7", "9", "10"):
        for cell in of_table("extrema", table, method="ExtreMA"):
            strongest = (cell.arch, cell.pretrain_data) == ("ViT-B/16", "imagenet")
            assert ("assumption" in cell.note) == (not strongest), cell
            assert ("5.2" if table == "7" else "5.3") in cell.note


@pytest.mark.parametrize(
    ("table", "wanted", "words"),
    [
        ("7", {"method": "DINO", "arch": "ViT-B/16", "metric": "finetune_top1"}, ("82.8", "83.3", "83.6")),
        ("7", {"method": "MAE", "metric": "linear_top1"}, ("67.8", "68.0", "class token", "averaged")),
        ("3", {"num_masks": "1", "metric": "linear_top1"}, ("61.6",)),
        ("4", {"augment": "shared crop + color", "metric": "finetune_top1"}, ("best overall", "83.3")),
        ("4", {"augment": "shared crop + color", "metric": "linear_top1"}, ("best overall", "73.3", "83.3")),
        ("5", {"class_attention_blocks": "2", "metric": "linear_top1"}, ("2.6",)),
        ("8", {"num_masks": "5"}, ("29 to 60", "two days")),
        ("9", {"method": "MoCo-v3"}, ("47.2",)),
        ("9", {"method": "BEiT"}, ("46.5",)),
        ("10", {"method": "MAE", "labels": "1%"}, ("12", "14.6")),
        ("10", {"method": "BEiT", "labels": "1%"}, ("30", "31.4")),
        ("11", {"method": "DINO", "metric": "box_ap"}, ("twice",)),
        ("12", {"mask_ratio": "0.9", "epochs": "600", "metric": "pretrain_hours"}, ("56",)),
    ],
)
def test_known_conflicts_are_noted(table, wanted, words):
    (found,) = (cell for cell in cells("extrema") if cell.table == table and cell.agrees(wanted))
    for word in words:
        assert word in found.note


def test_what_the_text_extraction_merged_is_noted():
    merged = [cell for cell in cells("extrema") if cell.table in ("1", "2", "3")]
    assert all("merged side by side" in cell.note for cell in merged)


# How they are measured ------------------------------------------------------------------------------------------------


def test_all_tables_with_results_are_mapped():
    assert list(TABLES) == [str(number) for number in range(1, 13)]
    assert {cell.table for cell in cells("extrema")} - set(TABLES) == {"text:5.2"}
    with pytest.raises(UserError, match="extrema:13"):  # hyper-parameters
        tables.find("extrema:13")


@pytest.mark.parametrize("table", ["1", "2", "3", "4", "5", "6", "12"])
def test_ablations_are_trained_by_the_recipe_that_says_so(table):
    names = []
    for row in tables.rows("extrema", table):
        pretraining = trained("extrema", table, row)
        assert pretraining is not None
        names.append(pretraining.recipe)
        recipe = METHODS["extrema"].RECIPES[pretraining.recipe.removeprefix("extrema/")]
        finetune, linear = row.cells["ft."].value, row.cells["lin."].value
        assert recipe.published == f"ImageNet: finetune {finetune}, linear {linear}"
        assert recipe.epochs == row.first.epochs
        assert pretraining.data == row.first.pretrain_data
        for key in {field.name for field in fields(recipe)} & set(row.first.setting):
            assert str(getattr(recipe, key)) == row.first.setting[key]
    assert len(set(names)) == len(names) == len(TABLES[table].pretraining)


def test_augmentations_are_those_of_the_line():
    # One for both networks, or two; in "shared", what is cropped is shared and the colors are two.
    expected = {
        ("none", "1"): "extrema-none", ("color", "1"): "extrema-color-1", ("color", "2"): "extrema-color-2",
        ("rand size crop", "1"): "extrema-crop-1", ("rand size crop", "2"): "extrema-crop-2",
        ("crop + color", "1"): "extrema-crop-color-1", ("crop + color", "2"): "extrema-crop-color-2",
        ("shared crop + color", "2"): "extrema",
    }  # fmt: skip
    found = {}
    for row in tables.rows("extrema", "4"):
        pretraining = trained("extrema", "4", row)
        assert pretraining is not None
        recipe = METHODS["extrema"].RECIPES[pretraining.recipe.removeprefix("extrema/")]
        found[row.first.setting["augment"], row.first.setting["augs"]] = recipe.augmentation
    assert found == expected


@pytest.mark.parametrize("table", ["7", "8", "9", "10", "11"])
def test_who_is_trained_beside_other_methods(table):
    wanted = {
        ("ExtreMA", "ViT-B/16", "imagenet"): "extrema/paper",
        ("ExtreMA", "ViT-S/16", "imagenet"): "extrema/vit-s",
        ("ExtreMA", "ViT-B/16", "imagenet-22k"): "extrema/in22k",
        ("ExtreMA", "ViT-S/16", "imagenet-22k"): "extrema/in22k-vit-s",
    }
    for row in tables.rows("extrema", table):
        first, pretraining = row.first, trained("extrema", table, row)
        if first.method == "MAE":
            assert pretraining is not None
            assert pretraining.recipe == {300: "mae/300ep", 1600: "mae/paper"}[first.epochs]
        elif first.method != "ExtreMA":
            assert pretraining is None
        else:
            assert pretraining is not None
            named = f"extrema/80x{first.field('num_masks')}" if table == "8" else ""
            expected = named or wanted[first.method, first.arch, first.pretrain_data]
            assert (pretraining.recipe, pretraining.data) == (expected, first.pretrain_data)
            recipe = trained_recipe(pretraining)
            assert (recipe.mask_ratio, str(recipe.num_masks)) == (0.8, first.field("num_masks") or "5")
            assert recipe.augmentation == ("extrema-crop-1" if table == "8" else "extrema")
            if table != "8":
                assert ("assumption" in pretraining.note) == (expected != "extrema/paper")


@pytest.mark.parametrize(
    ("table", "label", "column", "recipe"),
    [
        ("1", "ExtreMA, mask_ratio=0.5", "ft.", "finetune/extrema"),
        ("1", "ExtreMA, mask_ratio=0.5", "lin.", "linear/extrema-paper"),
        ("3", "ExtreMA, num_masks=8", "ft.", "finetune/extrema-22k"),
        ("3", "ExtreMA, num_masks=8", "lin.", "linear/extrema-paper"),
        ("7", "ExtreMA, ViT-S/16, imagenet, 300 epochs", "ft.", "finetune/extrema-vit-s"),
        ("7", "ExtreMA, ViT-B/16, imagenet, 300 epochs", "ft.", "finetune/extrema"),
        ("7", "ExtreMA, ViT-S/16, imagenet-22k, 30 epochs", "ft.", "finetune/extrema-22k-vit-s"),
        ("7", "ExtreMA, ViT-B/16, imagenet-22k, 30 epochs", "ft.", "finetune/extrema-22k"),
        ("7", "ExtreMA, ViT-S/16, imagenet-22k, 30 epochs", "lin.", "linear/extrema-paper"),
        ("7", "DINO, ViT-S/16, imagenet, 400 epochs", "ft.", "finetune/extrema-vit-s"),
        ("7", "DINO, ViT-B/16, imagenet, 400 epochs", "ft.", "finetune/extrema"),
        ("7", "DINO, ViT-S/16, imagenet, 400 epochs", "lin.", "linear/dino"),
        ("7", "DINO, ViT-B/16, imagenet, 400 epochs", "lin.", "linear/dino-base"),
        ("7", "MSN, ViT-S/16, imagenet, 600 epochs", "lin.", "linear/msn"),
        ("7", "MoCo-v3, ViT-B/16, imagenet, 300 epochs", "lin.", "linear/mocov3"),
        ("7", "MAE, ViT-B/16, imagenet, 1600 epochs", "ft.", "finetune/mae"),
        ("7", "MAE, ViT-B/16, imagenet, 1600 epochs", "lin.", "linear/mae"),
        ("9", "ExtreMA, imagenet-22k, 30 epochs", "mIoU", "semseg/upernet-extrema"),
        ("9", "MSN, imagenet, 600 epochs", "mIoU", "semseg/upernet-extrema"),
        ("9", "MAE, imagenet, 1600 epochs", "mIoU", "semseg/upernet-mae"),
        ("9", "DINO, imagenet, 400 epochs", "mIoU", "semseg/upernet-cae"),
        ("10", "ExtreMA, 300 epochs", "1%", "finetune/extrema-semi-1"),
        ("10", "ExtreMA, 300 epochs", "10%", "finetune/extrema-semi-10"),
        ("11", "MSN, imagenet, 600 epochs", "mask AP75", "detection/maskrcnn-extrema"),
        ("11", "MAE, imagenet, 300 epochs", "mask AP75", "detection/maskrcnn-sdae"),
    ],
)
def test_which_recipe_measures_a_number(table, label, column, recipe):
    measure = measured("extrema", table, label, column)
    assert isinstance(measure, Measure)
    assert measure.recipe == recipe


def test_probes_are_not_the_one_that_appendix_e_says():
    for method, label in (
        ("MoCo-v3", "MoCo-v3, ViT-B/16, imagenet, 300 epochs"),
        ("DINO", "DINO, ViT-S/16, imagenet, 400 epochs"),
        ("MSN", "MSN, ViT-B/16, imagenet, 600 epochs"),
        ("MAE", "MAE, ViT-B/16, imagenet, 1600 epochs"),
    ):
        measure = measured("extrema", "7", label, "lin.")
        assert isinstance(measure, Measure)
        assert measure.recipe != "linear/extrema-paper"
        assert not measure.settings  # MAE, too: of the class token
        assert "assumption" in measure.note
        assert "appendix E" in measure.note
        assert ("5.2" in measure.note) == (method == "MAE")
        assert method in TABLES["7"].note
    assert "Appendix E" in TABLES["7"].note


def test_detection_is_as_the_readme_says_only_for_extrema():
    for row in tables.rows("extrema", "11"):
        measure = measured("extrema", "11", row.label, "box AP")
        assert isinstance(measure, Measure)
        assert ("README" in measure.note) == (row.first.method == "ExtreMA"), row.label
        assert ("assumption" in measure.note) == (row.first.method != "ExtreMA"), row.label


def test_few_labels_need_a_projector_that_not_all_have():
    for row in tables.rows("extrema", "10"):
        for column, labels in (("1%", "1percent"), ("10%", "10percent")):
            measure = measured("extrema", "10", row.label, column)
            assert isinstance(measure, Measure)
            has = row.first.method in ("ExtreMA", "DINO")
            assert dict(measure.settings) == ({} if has else {"projector": False})
            assert choose(measure.recipe)[2].labels == labels


def test_masked_modeling_is_probed_on_averaged_tokens():
    for method in ("BEiT", "data2vec"):
        measure = measured("extrema", "7", f"{method}, ViT-B/16, imagenet, 800 epochs", "lin.")
        assert isinstance(measure, Measure)
        assert dict(measure.settings) == {"vector": "patch_mean"}


@pytest.mark.parametrize("table", ["8", "12"])
def test_hours_are_of_all_epochs_and_only_of_what_we_train(table):
    for row in tables.rows("extrema", table):
        measure = measured("extrema", table, row.label, "time")
        if row.first.method in ("ExtreMA", "MAE"):
            assert isinstance(measure, Measure)
            assert row.first.epochs is not None
            # A pre-training of so many epochs of two minutes each.
            assert 2 * measure.scale == pytest.approx(row.first.epochs * 2 / 60)
        else:
            assert isinstance(measure, str)
            assert row.first.method in measure


def test_hours_of_the_ablation_with_more_epochs():
    times = {
        (cell.setting["mask_ratio"], cell.setting["num_masks"], cell.epochs): cell.value
        for cell in cells("extrema")
        if cell.table == "12" and cell.unit == "hours"
    }
    assert times == {
        ("0.75", "1", 300): 30, ("0.8", "1", 300): 29, ("0.9", "1", 300): 28,
        ("0.75", "2", 300): 40, ("0.8", "2", 300): 36, ("0.9", "2", 300): 30,
        ("0.75", "1", 600): 60, ("0.8", "1", 600): 58, ("0.9", "1", 600): 58,
    }  # fmt: skip
