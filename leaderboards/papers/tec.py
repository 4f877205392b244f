"""TEC (Gao et al., 2022): how its Tables 1 to 12 are measured. Tables 13 to 17 are our recipes.

TEC learns from a finished model, its base, so every line of its own needs two pre-trainings. Bases are MAE of 1600
epochs (in Tables 4 and 11d also of 300, which MAE's authors have not released and pretrain/mae.py trains), and iBOT of
1600 epochs (its authors' weights: it is not trained here).

What cannot be had as it was:

    1, 2, 5, 6     other methods' numbers are taken to be copied from their papers; where we have that method's recipe
                   it is the one that is run, else TEC's (1, 6) or MAE's (2, 5), and the note says so
    2, 4, 5, 11d   gains are differences of two rows, and no run measures one
    3, 8           no code was released; the adapters are in the checkpoints that `ssl-bench pretrain tec` writes, and
                   not in the released ones, whose final norm is missing too
    7              epochs are not said
    9              which ImageNet-S is not said; the networks of SSL+FT are fine-tuned first, and `run` keeps no network
    10             top-k and temperature of the second round are not said

Figures are pictures, and Figure 5 is only plotted. Gains that the text names follow from the tables.
"""

from __future__ import annotations

from collections.abc import Mapping

from ssl_bench.leaderboards.tables import Column, Measure, Pretraining, Table

Rows = tuple[tuple[Mapping[str, str], Measure | str], ...]

_OWN = "copied from the method's own paper (assumption)"
_NOT_OURS = f"{_OWN}, whose recipe is not among ours: this is MAE's"

# Fine-tuning on ImageNet: Tables 2, 4, 5 and 10 to 12 ----------------------------------------------------------------


def _finetuned(recipe: str, note: str) -> Measure:
    return Measure(f"finetune/{recipe}", "imagenet", "top1", note=note)


# The first that agrees. A base that is not named below is one of MAE's.
_FINETUNING: Rows = (
    ({"method": "TEC", "arch": "ViT-L/16"}, _finetuned("tec-vit-l", "Table 15")),
    ({"method": "TEC", "base": "iBOT"}, _finetuned("tec-ibot", "Table 15; released commands: tec-ibot-readme")),
    ({"method": "TEC", "base": "TEC_iBOT"}, _finetuned("tec-ibot", "Table 15; assumption: as on iBOT")),
    ({"method": "TEC"}, _finetuned("tec-mae", "Table 15; released commands: tec-mae-readme")),
    ({"method": "MAE", "arch": "ViT-L/16"}, _finetuned("mae-vit-l", _OWN)),
    ({"method": "MAE"}, _finetuned("mae", _OWN)),
    ({"method": "iBOT"}, _finetuned("ibot", _OWN)),
)
_FINETUNE = Column("Top-1", {"metric": "finetune_top1"}, _finetuned("mae", _NOT_OURS), _FINETUNING)
_GAIN = Column(
    "Gain",
    {"metric": "finetune_top1_gain"},
    "no run measures it: it is what a row's accuracy is above that of its base, a row of the same column",
)

# What trains the rows ------------------------------------------------------------------------------------------------

_MAE_BASE, _IBOT_BASE = "MAE, 1600 epochs", "iBOT, 1600 epochs"
_ON_MAE, _ON_IBOT = {"method": "TEC", "base": "MAE"}, {"method": "TEC", "base": "iBOT"}

_MAE = Pretraining({"method": "MAE"}, "mae/paper")
_MAE_300 = Pretraining({"method": "MAE", "epochs": "300"}, "mae/300ep")
_MAE_800_EPOCHS = Pretraining({**_ON_MAE, "epochs": "800"}, "tec/mae-b-800ep", base=_MAE_BASE)
_IBOT_800_EPOCHS = Pretraining({**_ON_IBOT, "epochs": "800"}, "tec/ibot-b-800ep", base=_IBOT_BASE)


def _trained(recipe: str, base: str, /, **wanted: str) -> Pretraining:
    """A row of an ablation, by what the table varies in it."""
    return Pretraining({"method": "TEC", **wanted}, f"tec/{recipe}", base=base)


_COMPARED = (
    Pretraining({**_ON_MAE, "arch": "ViT-L/16"}, "tec/mae-l", base="MAE ViT-L, 1600 epochs"),
    _MAE_800_EPOCHS,
    _IBOT_800_EPOCHS,
    Pretraining(_ON_MAE, "tec/mae-b", base=_MAE_BASE),
    Pretraining(_ON_IBOT, "tec/ibot-b", base=_IBOT_BASE),
    Pretraining({"method": "MAE", "arch": "ViT-L/16"}, "mae/vit-l"),
    _MAE,
)
_ACCELERATED = (
    Pretraining({"base": "MAE300ep", "epochs": "100"}, "tec/mae300-b-100ep", base="MAE, 300 epochs"),
    Pretraining({"base": "MAE300ep"}, "tec/mae300-b", base="MAE, 300 epochs"),
    Pretraining({"base": "MAE1600ep"}, "tec/mae-b", base=_MAE_BASE),
    _MAE_300,
    _MAE,
)

# Tables 1 and 6 ------------------------------------------------------------------------------------------------------


def _upernet(recipe: str, note: str) -> Measure:
    return Measure(f"semseg/{recipe}", "ade20k", "miou", note=note)


_ADE20K = Table(
    "Segmentation of ADE20K with UPerNet; mIoU",
    (
        Column(
            "mIoU",
            {"metric": "miou"},
            _upernet("upernet-tec", f"{_OWN}, whose recipe is not among ours: this is TEC's"),
            (
                ({"method": "TEC"}, _upernet("upernet-tec", "as MAE in mmsegmentation")),
                ({"method": "MAE"}, _upernet("upernet-mae", _OWN)),
                ({"method": "iBOT"}, _upernet("upernet-ibot", _OWN)),
                ({"method": "CAE"}, _upernet("upernet-cae", f"{_OWN}; its learning rate for 1600 epochs is 1e-4")),
            ),
        ),
    ),
    (_MAE_800_EPOCHS, _IBOT_800_EPOCHS, _MAE),
    note="Tables 1 and 6 are the same.",
)

# Tables 2 and 5 ------------------------------------------------------------------------------------------------------

_TABLE_2 = Table(
    "Fine-tuning on ImageNet, beside the bases", (_FINETUNE, _GAIN), _COMPARED, note="These numbers stand in Table 5."
)
_TABLE_5 = Table(
    "Fine-tuning on ImageNet, beside many methods",
    (_FINETUNE, _GAIN),
    _COMPARED,
    note="A dagger is extra_data=implicit: guidance by a model that was trained on other data.",
)

# Tables 3 and 8 ------------------------------------------------------------------------------------------------------


def _adapted(name: str, adapters: str, recipe: str) -> Column:
    return Column(
        name,
        {"metric": "adapters_top1", "adapters": adapters},
        Measure(f"adapters/{recipe}", "imagenet", "top1", note="what the paper leaves open: protocols/adapters.py"),
    )


_ADAPTERS = Table(
    "The head alone, and with the adapters of pre-training, on a frozen network",
    (
        Column(
            "Linear",
            {"metric": "linear_top1"},
            Measure("linear/tec", "imagenet", "top1", note="Table 16"),
            (({"method": "MAE"}, Measure("linear/mae", "imagenet", "top1", note=_OWN)),),
        ),
        _adapted("+ input adapter", "input", "input"),
        _adapted("+ encoder adapter", "both", "encoder"),
    ),
    (_MAE_800_EPOCHS, _MAE),
    note="Tables 3 and 8 are the same.",
)

# Tables 4 and 11d ----------------------------------------------------------------------------------------------------

_ACCELERATION = Table(
    "From a base of 300 epochs", (_FINETUNE, _GAIN), _ACCELERATED, note="Tables 4 and 11d are the same."
)

# Tables 7, 9 and 10 --------------------------------------------------------------------------------------------------


def _detected(name: str, metric: str) -> Column:
    def of(recipe: str, note: str) -> Measure:
        return Measure(f"detection/{recipe}", "coco", metric, note=note)

    return Column(
        name,
        {"metric": metric},
        of("cascade-tec-ibot", "iBOT's implementation"),
        (
            ({"implementation": "ViTDet"}, of("cascade-tec-vitdet", "ViTDet's implementation")),
            ({"method": "iBOT"}, of("cascade-ibot", _OWN)),
        ),
    )


_LONG = "assumption: 800 epochs, as in Table 6"
_TABLE_7 = Table(
    "Detection and instance segmentation on COCO with Cascade Mask R-CNN; AP",
    (_detected("AP box", "box_ap"), _detected("AP mask", "mask_ap")),
    (
        Pretraining(_ON_MAE, "tec/mae-b-800ep", base=_MAE_BASE, note=_LONG),
        Pretraining(_ON_IBOT, "tec/ibot-b-800ep", base=_IBOT_BASE, note=_LONG),
        _MAE,
    ),
)

_FINETUNED_FIRST = "of a network that was fine-tuned on ImageNet before (finetune/tec-mae, finetune/mae)"
_TABLE_9 = Table(
    "Segmentation of ImageNet-S, after pre-training and after fine-tuning; mIoU",
    (
        Column(
            "mIoU",
            {"metric": "miou"},
            Measure("semseg/imagenet-s", "imagenet-s-919", "miou", note="919 classes are assumed"),
            (
                (
                    {"finetuned_epochs": "100"},
                    Measure(
                        "semseg/imagenet-s-ft",
                        "imagenet-s-919",
                        "miou",
                        note=f"{_FINETUNED_FIRST}; 919 classes are assumed",
                    ),
                ),
            ),
        ),
    ),
    (_MAE_800_EPOCHS, _MAE),
    note="A checkpoint of SSL+FT comes from the official fine-tuning scripts: `ssl-bench run` keeps no network.",
)

_TABLE_10 = Table(
    "TEC on TEC",
    (_FINETUNE,),
    (
        Pretraining(
            {"method": "TEC", "base": "TEC_iBOT"},
            "tec/tec-b-800ep",
            base="TEC on iBOT, 800 epochs",
            note="top-k and temperature of iBOT are assumed",
        ),
        _IBOT_800_EPOCHS,
    ),
)

# Tables 11 and 12 ----------------------------------------------------------------------------------------------------

_TABLE_11A = Table(
    "How features of the base are normalized (no adapters, no attention)",
    (_FINETUNE,),
    (
        *(_trained(f"11a-{each}", _MAE_BASE, normalization=each) for each in ("none", "channel", "patch")),
        _MAE,
    ),
    note="Equation 3 divides by what the text calls the variance; it is the standard deviation.",
)

_TABLE_11B = Table(
    "Adapters (no attention)",
    (_FINETUNE,),
    (
        _trained("11a-patch", _MAE_BASE, adapters="none"),
        *(_trained(f"11b-{each}", _MAE_BASE, adapters=each) for each in ("input", "both")),
        _MAE,
    ),
)

_TABLE_11C = Table(
    "Starting from the base's weights or from random ones",
    (_FINETUNE,),
    (_trained("11c-load", _IBOT_BASE, load_base="yes"), _trained("ibot-b", _IBOT_BASE, load_base="no")),
)

_TABLE_11E = Table(
    "Which attention of the base is predicted (no adapters)",
    (_FINETUNE,),
    tuple(_trained(f"11e-{each}", _IBOT_BASE, attention=each) for each in ("none", "cls", "all", "selected")),
)


def _parts(recipe: str, base: str, attention: str, adapters: str) -> Pretraining:
    name = _MAE_BASE if base == "MAE" else _IBOT_BASE
    return _trained(recipe, name, base=base, attention=attention, adapters=adapters)


_TABLE_12 = Table(
    "The parts of TEC, one by one",
    (_FINETUNE,),
    (
        _parts("11a-patch", "MAE", "none", "none"),
        _parts("12-mae-attention", "MAE", "selected", "none"),
        _parts("11b-both", "MAE", "none", "both"),
        _parts("mae-b", "MAE", "selected", "both"),
        _parts("11e-none", "iBOT", "none", "none"),
        _parts("11e-selected", "iBOT", "selected", "none"),
        _parts("12-ibot-adapters", "iBOT", "none", "both"),
        _parts("ibot-b", "iBOT", "selected", "both"),
        _MAE,
    ),
)

TABLES: dict[str, Table] = {
    "1": _ADE20K,
    "2": _TABLE_2,
    "3": _ADAPTERS,
    "4": _ACCELERATION,
    "5": _TABLE_5,
    "6": _ADE20K,
    "7": _TABLE_7,
    "8": _ADAPTERS,
    "9": _TABLE_9,
    "10": _TABLE_10,
    "11a": _TABLE_11A,
    "11b": _TABLE_11B,
    "11c": _TABLE_11C,
    "11d": _ACCELERATION,
    "11e": _TABLE_11E,
    "12": _TABLE_12,
}
