"""MOCA (Gidaris et al., 2023): how its Tables 1 to 13 and Figure 3c are measured. Tables 14 to 17 are our recipes.

Every line of MOCA's own can be reproduced, and needs its own pre-training: 100 epochs in the ablations, 200 or 400 in
the comparisons. Public weights are those of moca/v1.0; the paper evaluates those of moca/v0.9. Lines of other methods
need their authors' weights, MAE's excepted, which pretrain/mae.py trains too.

What cannot be had as it was:

    1, 2b, 2c, 3, 7, 12   minutes and GB are of 8 A100 GPUs and a batch of 2048; DINO and iBOT are not pre-trained here
    5, 6, 12              other methods' numbers are taken to be copied from their papers; where we have that method's
                          recipe it is the one that is run, else MOCA's, and the note says so
    8                     the paper's solver is cyanure, and its penalties for other methods are not published
    9, fig3c              no code was released: the grid of learning rates is ours, the parts of Cityscapes are drawn
    3, 10, 11, 12         mask ratios of two rounds, depth of a decoder and its block l for ViT-L/16 are not given;
                          pretrain/moca.py says what is assumed

Figure 1 is only plotted. Gains and speedups that the text names follow from the tables and are no rows of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ssl_bench.leaderboards.tables import Column, Measure, Pretraining, Table

Rows = tuple[tuple[Mapping[str, str], Measure | str], ...]

# What is measured ----------------------------------------------------------------------------------------------------

_KNN = Measure(
    "knn/moca-paper", "imagenet", "top1", note="no temperature is given: .07; the released script: knn/moca-code"
)
_LINEAR = Measure("linear/moca-paper", "imagenet", "top1", note="Table 16; the released script: linear/moca-avg")
_FINETUNE = Measure("finetune/moca", "imagenet", "top1", note="Table 17")

_NODE = "8 A100 GPUs; a batch of 2048 in half precision (--dtype fp16) is an assumption where the row is not MOCA's"
_MINUTES = Measure("efficiency/moca", "", "epoch_minutes", of="pretraining", note=_NODE)
_MEMORY = Measure(
    "efficiency/moca",
    "",
    "peak_memory_gib",
    of="pretraining",
    note=f"of one GPU; the paper's GB are assumed to be GiB, and ours are what tensors take; {_NODE}",
)


def _hours(epochs: int) -> Measure:
    return replace(_MINUTES, scale=epochs / 60, note=f"{epochs} epochs of a measured one; {_NODE}")


def _copied(measure: Measure, recipes: Mapping[str, str]) -> Rows:
    """By method, its own recipe for a number that is copied from its paper; where we have none, the table's."""
    own, none = "copied from the method's own paper (assumption)", "whose recipe is not among ours: this is MOCA's"
    return tuple(
        (
            {"method": method},
            replace(measure, recipe=recipe or measure.recipe, note=own if recipe else f"{own}, {none}"),
        )
        for method, recipe in recipes.items()
    )


def _not_trained(*methods: str) -> Rows:
    return tuple(
        ({"method": method}, f"{method} is not pre-trained here, so what it costs cannot be measured")
        for method in methods
    )


_KNN_COLUMN = Column("k-NN", {"metric": "knn_top1"}, _KNN)
_LINEAR_COLUMN = Column("Linear", {"metric": "linear_top1"}, _LINEAR)
_FINETUNE_COLUMN = Column("Fine-tuning", {"metric": "finetune_top1"}, _FINETUNE)
_MINUTES_COLUMN = Column("Minutes an epoch", {"metric": "epoch_minutes"}, _MINUTES)
_MEMORY_COLUMN = Column("Memory, GB", {"metric": "memory"}, _MEMORY)
_COSTS = (_MINUTES_COLUMN, _MEMORY_COLUMN)

# What trains the rows ------------------------------------------------------------------------------------------------

_MOCA = Pretraining({"method": "MOCA"}, "moca/paper")
_MAE_800 = Pretraining({"method": "MAE", "epochs": "800"}, "mae/800ep")
_MAE = Pretraining({"method": "MAE"}, "mae/paper")


def _trained(recipe: str, note: str = "", **setting: str) -> Pretraining:
    return Pretraining(setting, f"moca/{recipe}", note=note)


def _fully_decoded(recipe: str, **setting: str) -> Pretraining:
    return Pretraining({**setting, "partial_decoding": "no"}, f"moca/{recipe}", settings={"decoded_ratio": "none"})


# Tables 1 to 4: ablations --------------------------------------------------------------------------------------------

_TABLE_1 = Table(
    "What decoding a part of the masked patches saves, by the decoder's depth",
    _COSTS,
    (
        _trained("ablation", decoder_depth="2", partial_decoding="yes"),
        _trained("table2-depth4", decoder_depth="4", partial_decoding="yes"),
        _trained("table2-depth8", decoder_depth="8", partial_decoding="yes"),
        _trained("table3-full-decoding", decoder_depth="2", partial_decoding="no"),
        _fully_decoded("table2-depth4", decoder_depth="4"),
        _fully_decoded("table2-depth8", decoder_depth="8"),
    ),
)

_TABLE_2A = Table(
    "The image objective alone, and with the local one, without and with the condenser",
    (_KNN_COLUMN,),
    (
        _trained("table2-lambda1", objectives="L_IMG"),
        _trained("table2-default", condenser="no"),
        _trained("ablation", condenser="yes"),
    ),
)

_TABLE_2B = Table(
    "Depth of the decoder",
    (_KNN_COLUMN, *_COSTS),
    (
        _trained("table2-depth1", decoder_depth="1"),
        _trained("ablation", decoder_depth="2"),
        _trained("table2-depth4", decoder_depth="4"),
        _trained("table2-depth8", decoder_depth="8"),
    ),
)

_TABLE_2C = Table(
    "Share of patches that are masked",
    (_KNN_COLUMN, *_COSTS),
    (
        _trained("table2-mask55", mask_ratio="55%"),
        _trained("ablation", mask_ratio="65%"),
        _trained("table2-mask75", mask_ratio="75%"),
        _trained("table2-mask80", mask_ratio="80%"),
    ),
)

_ON_CLS = replace(_KNN, settings={"vector": "cls"}, note="assumption: k-NN reads the token that was trained, [CLS]")
_TABLE_2D = Table(
    "Class token or average patch as what stands for the image",
    (replace(_KNN_COLUMN, rows=(({"global_token": "cls"}, _ON_CLS),)),),
    (_trained("table2-cls", global_token="cls"), _trained("ablation", global_token="avg")),
)

_TABLE_2E = Table(
    "Weight lambda of the image objective",
    (_KNN_COLUMN,),
    (
        _trained("table2-lambda1", image_weight="1.0"),
        _trained("table2-lambda0.75", image_weight="0.75"),
        _trained("ablation", image_weight="0.5"),
        _trained("table2-lambda0.25", image_weight="0.25"),
        _trained("table2-lambda0", image_weight="0.0"),
    ),
)

_TABLE_2F = Table(
    "Block whose patches the condenser reads",
    (_KNN_COLUMN,),
    (
        _trained("table2-block6", intermediate_block="6"),
        _trained("ablation", intermediate_block="8"),
        _trained("table2-block9", intermediate_block="9"),
        _trained("table2-block10", intermediate_block="10"),
    ),
)

_TABLE_3 = Table(
    "Partial decoding and a second round of masking",
    (_KNN_COLUMN, *_COSTS),
    (
        _trained("table3-full-decoding", partial_decoding="no"),
        _trained("ablation", masks="1"),
        _trained("table3-two-rounds", masks="2", note="assumption: 65 % masked in both rounds"),
    ),
    note="An epoch of two rounds takes 10.35 min here and 11.23 min in Table 7.",
)

_TABLE_4 = Table(
    "What is predicted of hidden patches, at 200 epochs",
    (_KNN_COLUMN, _LINEAR_COLUMN, _FINETUNE_COLUMN),
    (
        _trained("table4-image", objectives="L_IMG"),
        _trained("table4-default", targets="assignments", condenser="no"),
        _trained("table4-assignments", targets="assignments", condenser="yes"),
        _trained("table4-pixels", targets="pixels"),
        _trained("table4-embeddings", targets="embeddings"),
    ),
)

# Tables 5 to 9, Figure 3c: comparisons -------------------------------------------------------------------------------

_HIDING = {"CAE": "", "BEiT": "", "SimMIM": "", "CAN": ""}
_TABLE_5 = Table(
    "Beside methods that hide and predict",
    (
        replace(_LINEAR_COLUMN, rows=_copied(_LINEAR, {"MAE": "linear/mae", **_HIDING})),
        replace(_FINETUNE_COLUMN, rows=_copied(_FINETUNE, {"MAE": "finetune/mae", "CIM": "", **_HIDING})),
    ),
    (_MOCA, _MAE_800, _MAE),
    note="Two lines of CAN are printed with the same 800 epochs.",
)

_TABLE_6 = Table(
    "Beside methods with a teacher, and contrastive ones",
    (
        replace(_KNN_COLUMN, rows=_copied(_KNN, {"DINO": "knn/dino", "iBOT": "knn/ibot"})),
        replace(
            _LINEAR_COLUMN,
            rows=_copied(_LINEAR, {"MoCo-v3": "linear/mocov3", "DINO": "linear/dino-base", "iBOT": "linear/ibot"}),
        ),
        replace(
            _FINETUNE_COLUMN, rows=_copied(_FINETUNE, {"MoCo-v3": "", "DINO": "", "iBOT": "finetune/ibot", "MSN": ""})
        ),
    ),
    (_MOCA,),
    note="Section 4 calls the base learning rate of 1.5e-4 the peak: with a batch of 2048 that is 1.2e-3.",
)

_TABLE_7 = Table(
    "Time of pre-training",
    (
        replace(_MINUTES_COLUMN, rows=_not_trained("DINO", "iBOT")),
        Column(
            "Hours",
            {"metric": "pretrain_hours"},
            _hours(200),
            (({"method": "MAE"}, _hours(1600)), *_not_trained("DINO", "iBOT")),
        ),
    ),
    (_MOCA, _MAE),
    note="An epoch of MOCA takes 11.23 min here and 10.35 min, with two rounds too, in Table 3.",
)

_LOWSHOT_AMOUNTS = {"1": "top1_1shot", "2": "top1_2shot", "5": "top1_5shot", "13": "top1_1percent"}


def _lowshot(images: str, rows: Rows = ()) -> Column:
    return Column(
        "1 % (13 images)" if images == "13" else f"{images} image{'s' if images != '1' else ''} a class",
        {"metric": "lowshot_top1", "images_per_class": images},
        Measure("lowshot/moca", "imagenet", _LOWSHOT_AMOUNTS[images], note="the penalty is the released script's"),
        rows,
    )


def _by_msn(images: str) -> Rows:
    measure = Measure(
        "lowshot/msn",
        "imagenet",
        _LOWSHOT_AMOUNTS[images],
        note="copied from MSN's paper (assumption), whose penalty for each network is not published; it may have "
        "fine-tuned a part of MAE's network instead (not verified)",
    )
    return tuple(({"method": method}, measure) for method in ("MAE", "DINO", "iBOT", "MSN"))


_TABLE_8 = Table(
    "Few labeled images of each class; mean and standard deviation over three splits",
    tuple(_lowshot(images, _by_msn(images)) for images in _LOWSHOT_AMOUNTS),
    (_MOCA, _MAE),
)


def _segmented(setup: str, images: str, recipe: str, note: str = "") -> Column:
    said = "the grid of learning rates is ours"
    return Column(
        f"{setup}, {images} images",
        {"metric": "miou", "setup": setup, "train_images": images},
        Measure(f"semseg/{recipe}", "cityscapes", "miou", note=f"{said}; {note}" if note else said),
    )


_DRAWN = "three parts are drawn if no lists are given (--set lists=DIR)"
_LINEAR_2975 = _segmented("linear", "2975", "segmenter-linear")
_LINEAR_372 = _segmented("linear", "372", "segmenter-linear-372", f"372 or 374 images; {_DRAWN}")
_LINEAR_100 = _segmented("linear", "100", "segmenter-linear-100", _DRAWN)
_MASK_2975 = _segmented("finetuning", "2975", "segmenter-mask")
_MASK_372 = _segmented("finetuning", "372", "segmenter-mask-372", f"372 or 374 images; {_DRAWN}")
_MASK_100 = _segmented("finetuning", "100", "segmenter-mask-100", _DRAWN)

_TABLE_9 = Table(
    "Segmentation of Cityscapes with Segmenter; mIoU",
    (_LINEAR_2975, _LINEAR_100, _MASK_2975),
    (_MOCA, _MAE),
    note="The numbers stand in Figure 3c again.",
)

_FIGURE_3C = Table(
    "Segmentation of Cityscapes from few images; mIoU",
    (_LINEAR_2975, _LINEAR_372, _LINEAR_100, _MASK_2975, _MASK_372, _MASK_100),
    (_MOCA, _MAE),
    note="An eighth of Cityscapes is 372 images or 374, and Segmenter is called Segformer in the caption.",
)

# Tables 10 to 13: appendix -------------------------------------------------------------------------------------------

_TABLE_10 = Table(
    "Without the image objective",
    (_KNN_COLUMN, _LINEAR_COLUMN),
    (
        _trained("table10-a", decoders="default", targets="assignments"),
        _trained("table10-b", decoders="condenser", targets="assignments"),
        _trained("table10-c", decoders="default+condenser", targets="assignments"),
        _trained("table10-d", decoders="default", targets="pixels"),
        _trained("table10-e", decoders="condenser", targets="pixels"),
        _trained("table10-f", decoders="default+condenser", targets="pixels"),
    ),
    note="The depth of these decoders is not said: 2, as in Table 2.",
)

_LARGE = Pretraining({"method": "MOCA", "arch": "ViT-L/16"}, "moca/vit-l", note="its block l is the released code's")
_TABLE_11 = Table(
    "Longer pre-training, and a larger network",
    (_KNN_COLUMN, _LINEAR_COLUMN, _FINETUNE_COLUMN, *(_lowshot(images) for images in ("1", "2", "5"))),
    (_LARGE, _trained("400ep", epochs="400"), _MOCA),
    note="Tables 16 and 17 are assumed for ViT-L/16 too.",
)

_TABLE_12 = Table(
    "ViT-L/16 beside other methods",
    (
        Column(
            "Hours",
            {"metric": "pretrain_hours"},
            _hours(200),
            (({"method": "MAE"}, _hours(1600)), *_not_trained("iBOT")),
        ),
        replace(_KNN_COLUMN, rows=_copied(_KNN, {"iBOT": "knn/ibot"})),
        replace(_LINEAR_COLUMN, rows=_copied(_LINEAR, {"MAE": "linear/mae-large", "iBOT": "linear/ibot"})),
        replace(
            _FINETUNE_COLUMN, rows=_copied(_FINETUNE, {"MAE": "finetune/mae-vit-l", "iBOT": "finetune/ibot-vit-l"})
        ),
    ),
    (_LARGE, Pretraining({"method": "MAE"}, "mae/vit-l")),
    note="Tables 16 and 17 are assumed for ViT-L/16 too.",
)


def _detected(name: str, metric: str) -> Column:
    measure = Measure("detection/cascade-moca", "coco", metric, note="what A.5 leaves open is iBOT's")
    return Column(
        name,
        {"metric": metric},
        measure,
        _copied(measure, {"DINO": "detection/cascade-ibot", "iBOT": "detection/cascade-ibot"}),
    )


_TABLE_13 = Table(
    "Detection and instance segmentation on COCO with Cascade Mask R-CNN; AP",
    (_detected("AP box", "box_ap"), _detected("AP mask", "mask_ap")),
    (replace(_MOCA, note="epochs are not said; assumption: 200, as in section 4.3"),),
)

TABLES: dict[str, Table] = {
    "1": _TABLE_1,
    "2a": _TABLE_2A,
    "2b": _TABLE_2B,
    "2c": _TABLE_2C,
    "2d": _TABLE_2D,
    "2e": _TABLE_2E,
    "2f": _TABLE_2F,
    "3": _TABLE_3,
    "4": _TABLE_4,
    "5": _TABLE_5,
    "6": _TABLE_6,
    "7": _TABLE_7,
    "8": _TABLE_8,
    "9": _TABLE_9,
    "fig3c": _FIGURE_3C,
    "10": _TABLE_10,
    "11": _TABLE_11,
    "12": _TABLE_12,
    "13": _TABLE_13,
}
