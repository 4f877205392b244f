"""ExtreMA: how the numbers of its Tables 1-12 are measured (13 and 14 are recipes: protocols/finetune.py, linear.py).

Tables 1 to 6 and 12 are ablations: each of their rows is a pre-training of its own, 300 epochs on ImageNet-1k (600 for
some of Table 12) or 30 on ImageNet-22k, by a row of pretrain/extrema.py. Weights are public for four models: 80 % x 5
without and with colors, 90 % x 8 with colors, and ImageNet-22k.

In Tables 2, 4, 7 and 12 the paper has several networks in a line, beside each other; here each has a line of its own,
since a line is one checkpoint.

What cannot be measured, or only by assumption:

    7 to 11   which numbers of other methods are copied, and from where, is not said; 5.2 and 5.3 say five masks of 80 %
              and colors of "our strongest model" only, and nothing of Table 11
    8, 12     times are of eight V100, and those of other methods estimates; of these methods we train only MAE
    10        no code; a projector that MAE, BEiT and an untrained network do not have, nor MoCo-v3 and MSN in this form
    11        12 epochs of Mask R-CNN are all that is said; the rest is CAE's code, as the README has it

Figures 4 and 5 (k-NN while training) are only plotted, by the recipe knn/extrema; so are 3 and 6, by locality/extrema.
"""

from __future__ import annotations

from dataclasses import replace

from ssl_bench.leaderboards.tables import Column, Measure, Pretraining, Table

_EPOCHS_30 = "30 epochs of ImageNet-22k; fine-tuned and probed on ImageNet-1k"
_WARMUP = "assumption: 4 epochs of warm-up, the same share as of 300"
_COPIED = "Which numbers of other methods are copied, and from where, is not said."

_FINE_TUNED = Measure(
    "finetune/extrema", "imagenet", "top1", note="the README has other values: finetune/extrema-readme"
)
_PROBED = Measure("linear/extrema-paper", "imagenet", "top1", note="the README has SGD for LARS: linear/extrema-readme")
_ABLATED = (
    Column("ft.", {"metric": "finetune_top1"}, _FINE_TUNED),
    Column("lin.", {"metric": "linear_top1"}, _PROBED),
)


# Tables 1 to 3: how much is masked, how many times -------------------------------------------------------------------


def _masked(name: str, epochs: int) -> dict[str, str]:
    """`75x2`: 75 % hidden, two masks."""
    ratio, masks = name.split("x")
    return {"mask_ratio": f"{int(ratio) / 100:g}", "num_masks": masks, "epochs": str(epochs)}


def _masks(name: str, epochs: int = 300) -> Pretraining:
    return Pretraining(_masked(name, epochs), f"extrema/{name}" + ("" if epochs == 300 else f"-{epochs}ep"))


def _masks_22k(name: str) -> Pretraining:
    return Pretraining(_masked(name, 30), f"extrema/in22k-{name}", data="imagenet-22k", note=_WARMUP)


_TABLE_1 = Table(
    "How much is masked, by one mask",
    _ABLATED,
    tuple(_masks(name) for name in ("50x1", "70x1", "80x1", "85x1", "90x1", "95x1")),
)

_TABLE_2 = Table(
    "How many masks, at three ratios, on ImageNet-1k",
    _ABLATED,
    tuple(
        _masks(name)
        for name in (
            "75x1", "75x2", "75x4",
            "80x1", "80x2", "80x4", "80x5",
            "90x1", "90x2", "90x4", "90x8", "90x10",
        )
    ),
)  # fmt: skip

_FINE_TUNED_22K = Measure("finetune/extrema-22k", "imagenet", "top1", note=_FINE_TUNED.note)
_TABLE_3 = Table(
    "How many masks of 90 %, on ImageNet-22k",
    (Column("ft.", {"metric": "finetune_top1"}, _FINE_TUNED_22K), _ABLATED[1]),
    tuple(_masks_22k(name) for name in ("90x1", "90x2", "90x4", "90x8", "90x10")),
    note=f"{_EPOCHS_30}. 5.1 says that it is consistently better than ImageNet-1k; linear with one mask it is not.",
)


# Tables 4 to 6, from 80 % and two masks ------------------------------------------------------------------------------


def _augmented(augment: str, augs: int, recipe: str) -> Pretraining:
    return Pretraining({"augment": augment, "augs": str(augs)}, f"extrema/{recipe}")


_TABLE_4 = Table(
    "Augmentations: one of student and teacher together, or two; 80 % x 2",
    _ABLATED,
    (
        _augmented("none",                1, "none"),
        _augmented("color",               1, "color-1"),
        _augmented("color",               2, "color-2"),
        _augmented("rand size crop",      1, "80x2"),
        _augmented("rand size crop",      2, "crop-2"),
        _augmented("crop + color",        1, "crop-color-1"),
        _augmented("crop + color",        2, "crop-color-2"),
        _augmented("shared crop + color", 2, "shared-crop"),
    ),
    note="5.1 says that the last line is the best overall, of ft. and lin.; in lin. crop + color has 73.3, and in ft. "
    "color with two augmentations has 83.3, too.",
)  # fmt: skip

_TABLE_5 = Table(
    "How many blocks of class attention; 80 % x 2",
    _ABLATED,
    (
        Pretraining({"class_attention_blocks": "1"}, "extrema/blocks-1"),
        Pretraining({"class_attention_blocks": "2"}, "extrema/80x2"),
        Pretraining({"class_attention_blocks": "3"}, "extrema/blocks-3"),
    ),
)

_TABLE_6 = Table(
    "The loss; 80 % x 2",
    _ABLATED,
    (
        Pretraining({"loss": "byol"}, "extrema/80x2"),
        Pretraining({"loss": "infonce"}, "extrema/infonce", note="MoCo-v3's, temperature .2; the code's does not run"),
    ),
)


# Tables 7 to 11: beside other methods --------------------------------------------------------------------------------

_22K = {"method": "ExtreMA", "pretrain_data": "imagenet-22k"}
_SMALL = {"arch": "ViT-S/16"}
_MAE = Pretraining({"method": "MAE", "epochs": "1600"}, "mae/paper")
_STRONGEST = "assumption: five masks of 80 % and colors, as 5.2 says of the strongest model"
_MAIN = (
    Pretraining({**_22K, **_SMALL}, "extrema/in22k-vit-s", data="imagenet-22k", note=f"{_STRONGEST}. {_WARMUP}"),
    Pretraining(_22K, "extrema/in22k", data="imagenet-22k", note=f"{_STRONGEST}. {_WARMUP}"),
    Pretraining({"method": "ExtreMA", **_SMALL}, "extrema/vit-s", note=_STRONGEST),
    Pretraining({"method": "ExtreMA"}, "extrema/paper"),
    _MAE,
)


def _top1(recipe: str, note: str) -> Measure:
    return Measure(recipe, "imagenet", "top1", note=note)


_OWN_PROBE = "assumption: its own recipe; appendix E says Table 14's: linear/extrema-paper"
_ASSUMED = "assumption: evaluated as ExtreMA was"
_AVERAGED = Measure(
    "linear/extrema-paper",
    "imagenet",
    "top1",
    {"vector": "patch_mean"},
    note="5.2: tokens are averaged; appendix E: as ExtreMA",
)
_TABLE_7 = Table(
    "ImageNet-1k, fine-tuned and probed",
    (
        Column(
            "ft.",
            {"metric": "finetune_top1"},
            _top1("finetune/extrema", _ASSUMED),
            (
                ({**_22K, **_SMALL}, _top1("finetune/extrema-22k-vit-s", _FINE_TUNED.note)),
                (_22K, _FINE_TUNED_22K),
                ({"method": "ExtreMA", **_SMALL}, _top1("finetune/extrema-vit-s", _FINE_TUNED.note)),
                ({"method": "ExtreMA"}, _FINE_TUNED),
                (
                    {"method": "MAE"},
                    _top1("finetune/mae", "assumption: its own recipe, since 83.6 is MAE's own number"),
                ),
                (_SMALL, _top1("finetune/extrema-vit-s", _ASSUMED)),
            ),
        ),
        Column(
            "lin.",
            {"metric": "linear_top1"},
            _PROBED,
            (
                ({"method": "MoCo-v3"}, _top1("linear/mocov3", _OWN_PROBE)),
                ({"method": "DINO", **_SMALL}, _top1("linear/dino", _OWN_PROBE)),
                ({"method": "DINO"}, _top1("linear/dino-base", _OWN_PROBE)),
                ({"method": "MSN"}, _top1("linear/msn", _OWN_PROBE)),
                (
                    {"method": "MAE"},
                    _top1(
                        "linear/mae",
                        f"{_OWN_PROBE}. The class token against 5.2, which says that tokens are averaged: 67.8 is what "
                        "MAE's repository reports of its class token",
                    ),
                ),
                ({"method": "BEiT"}, _AVERAGED),
                ({"method": "data2vec"}, _AVERAGED),
            ),
        ),
    ),
    _MAIN,
    note=f"The paper has ViT-S and ViT-B side by side. {_COPIED} Appendix E says that one way of linear probing, Table "
    "14's, is that of all entries; MoCo-v3, DINO, MSN and MAE are probed here by their own recipes nevertheless, which "
    "is an assumption. DINO ViT-B/16, fine-tuned, is 83.6 here, 82.8 in MOCA and TEC, 83.3 in SdAE. (22k): "
    f"{_EPOCHS_30}.",
)


def _hours(epochs: int, note: str = "of eight V100; extrapolated from steps on noise") -> Measure:
    """The paper times a whole pre-training, we an epoch."""
    return Measure("efficiency/extrema", "", "epoch_minutes", scale=epochs / 60, of="pretraining", note=note)


def _untrained(method: str) -> tuple[dict[str, str], str]:
    return {"method": method}, f"time is measured of pre-trainings that we can run, and we do not train {method}"


_TABLE_8 = Table(
    "How long a pre-training of ViT-B takes on eight V100",
    (
        Column(
            "time",
            {"metric": "pretrain_hours"},
            _hours(300),
            (
                ({"method": "MAE"}, _hours(1600, "the paper's is an estimate; batch of ExtreMA's, 256 on a GPU")),
                *(_untrained(method) for method in ("DINO", "MSN", "BEiT", "data2vec")),
            ),
        ),
    ),
    (*(_masks(name) for name in ("80x1", "80x2", "80x5")), _MAE),
    note="Times of other methods are the authors' estimates. The introduction says about two days, 5.2 says 29 to 60 "
    "hours. Colors, which the paper's best model has, are no part of the time of the network.",
)


def _segmented(recipe: str, note: str = "") -> Measure:
    return Measure(recipe, "ade20k", "miou", note=note)


_AS_MAE = _segmented("semseg/upernet-mae", "assumption: MAE's way, as TEC Table 6 has the same number")
_TABLE_9 = Table(
    "Semantic segmentation of ADE20K by UPerNet, mIoU",
    (
        Column(
            "mIoU",
            {"metric": "miou"},
            _segmented("semseg/upernet-extrema", _ASSUMED),
            (
                ({"method": "ExtreMA"}, _segmented("semseg/upernet-extrema", "on CAE's code, by the README")),
                ({"method": "DINO"}, _segmented("semseg/upernet-cae", "assumption: CAE's way, as in SdAE Table 3")),
                ({"method": "BEiT"}, _AS_MAE),
                ({"method": "MAE"}, _AS_MAE),
            ),
        ),
    ),
    _MAIN,
    note=f"{_COPIED} SdAE Table 3 has BEiT 46.5 and MoCo-v3 47.2 after as many epochs.",
)


def _labeled(share: str, recipe: str) -> Column:
    def measure(note: str, *, projector: bool = True) -> Measure:
        return Measure(recipe, "imagenet", "top1", {} if projector else {"projector": False}, note=note)

    none = measure("no projector: the head stands on the class token (assumption)", projector=False)
    batch_norm = measure(
        "its projector's BatchNorm is not taken over: the head stands on the class token (assumption)", projector=False
    )
    rows = (
        ({"method": "Scratch"}, none),
        ({"method": "BEiT"}, none),
        ({"method": "MAE"}, none),
        ({"method": "MoCo-v3"}, batch_norm),
        ({"method": "MSN"}, batch_norm),
        ({"method": "DINO"}, measure("needs the full checkpoint, with its projector")),
    )
    return Column(share, {"labels": share}, measure("what is not said is iBOT's"), rows)


_TABLE_10 = Table(
    "Fine-tuned with few labels of ImageNet-1k",
    (_labeled("1%", "finetune/extrema-semi-1"), _labeled("10%", "finetune/extrema-semi-10")),
    _MAIN,
    note=f"Scratch is a network that was never trained: --ckpt Scratch=random:vit_base_patch16_224. {_COPIED} 5.3 says "
    "12 % above MAE and 30 % above BEiT, the table 14.6 and 31.4.",
)


def _detected(name: str, metric: str) -> Column:
    own = Measure("detection/maskrcnn-extrema", "coco", metric, note="on CAE's code, by the README")
    shared = Measure("detection/maskrcnn-sdae", "coco", metric, note="assumption: CAE's way; the same in SdAE Table 4")
    return Column(
        name,
        {"metric": metric},
        replace(own, note=_ASSUMED),
        (
            ({"method": "ExtreMA"}, own),
            *(({"method": method}, shared) for method in ("DINO", "MoCo-v3", "BEiT", "MAE")),
        ),
    )


_TABLE_11 = Table(
    "Objects of COCO by Mask R-CNN, 12 epochs: boxes and masks",
    (
        _detected("box AP",    "box_ap"),
        _detected("box AP50",  "box_ap50"),
        _detected("box AP75",  "box_ap75"),
        _detected("mask AP",   "mask_ap"),
        _detected("mask AP50", "mask_ap50"),
        _detected("mask AP75", "mask_ap75"),
    ),
    (Pretraining({"method": "MAE", "epochs": "300"}, "mae/300ep"), *_MAIN),
    note="DINO, MoCo-v3, BEiT and MAE have the numbers of SdAE Table 4. How ExtreMA is masked and augmented is not "
    "said; assumption: five masks of 80 % and colors, as in Tables 7, 9 and 10.",
)  # fmt: skip


# Table 12: two masks, or twice the epochs ----------------------------------------------------------------------------

_TABLE_12 = Table(
    "Two masks against twice the epochs",
    (*_ABLATED, Column("time", {"metric": "pretrain_hours"}, _hours(300), (({"epochs": "600"}, _hours(600)),))),
    (
        *(_masks(name) for name in ("75x1", "75x2", "80x1", "80x2", "90x1", "90x2")),
        *(_masks(name, 600) for name in ("75x1", "80x1", "90x1")),
    ),
    note="Times are of eight V100; 58 hours for 600 epochs of 90 % are not twice the 28 of 300.",
)

TABLES: dict[str, Table] = {
    "1": _TABLE_1,
    "2": _TABLE_2,
    "3": _TABLE_3,
    "4": _TABLE_4,
    "5": _TABLE_5,
    "6": _TABLE_6,
    "7": _TABLE_7,
    "8": _TABLE_8,
    "9": _TABLE_9,
    "10": _TABLE_10,
    "11": _TABLE_11,
    "12": _TABLE_12,
}
