"""End-to-end fine-tuning: every weight of the network is trained further, with labels.

    ssl-bench run --ckpt x.pth --protocol finetune                       the first row below, MAE's
    torchrun --nproc-per-node=8 -m ssl_bench.cli run --ckpt x.pth --protocol finetune/moca --dtype bf16
    ssl-bench run --ckpt x.pth --protocol finetune/extrema-semi-1        1 % of the labels

All of these are AdamW with a learning rate that falls from the head to the patch projection (layer-wise decay, Clark et
al. 2020, as BEiT and MAE have it), RandAugment, mixup, cutmix, erasing and stochastic depth. Rows differ in the rest.
Where a paper and its README differ, both are rows.

The accuracy of the last epoch is reported. The official scripts score val after every epoch and print the best of them;
rows of theirs have it beside it, as `top1_best_epoch`.

The head is drawn from a normal of std 2e-5: MAE's directly, BEiT's and iBOT's as .02 * .001. Departures: mixup pairs
neighbors of the batch in groups of 128 (training/supervised.py); incomplete last batches are left out, as everywhere.
TEC's script gives the class token a learning rate that is not decayed (its layer is -1), which is not followed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.checkpoints import Checkpoint, weights_sha256
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.splits import Dataset, Split
from ssl_bench.evaluate.subject import Scores, Subject
from ssl_bench.evaluate.training.seeds import seeded
from ssl_bench.protocols.label_splits import Labeled, labeled_splits, lists_used
from ssl_bench.protocols.network_training import (
    NetworkLearner,
    Shared,
    Training,
    check_training,
    is_decayed,
    network_of,
    trained_scores,
)
from ssl_bench.protocols.training import check_batch

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Backbone

VERSION = 1
DATA, DISTRIBUTED = "images", True

HEAD_STD = 2e-5


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """How one paper does it."""

    # What the head reads. avg: the mean of the patch tokens, then a fresh LayerNorm (fc_norm) in place of the final
    # norm; a class token that only reads the finished patches (ExtreMA) is left out. cls: the class token after the
    # final norm. cls+avg: both after the final norm, joined.
    pooling: Literal["avg", "cls", "cls+avg"]
    layer_decay: float
    positions: Literal["trained", "fixed"]
    projector: bool  # the head stands on the first layer of the checkpoint's projector
    labels: Literal["all", "1percent", "10percent"]  # of the training images
    lists: str | None  # the folder of SimCLR's lists; None: looked for, else drawn; "draw": drawn

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay={self.layer_decay}: expected more than 0, at most 1 (no decay).")
        if self.projector and self.pooling == "cls+avg":
            raise UserError("projector=true: a projector reads one vector; choose pooling=cls or pooling=avg.")


# facebookresearch/mae FINETUNE.md, ViT-B. What the other rows do not change, they share.
_MAE = Recipe(
    epochs=100, batch=1024, lr=5e-4, scale_lr=True, min_lr=1e-6, warmup_epochs=5.0, weight_decay=0.05,
    betas=(0.9, 0.999), drop_path=0.1, augmentation="randaug", least_area=0.08, erasing=0.25, mixup=0.8, cutmix=1.0,
    smoothing=0.1, every_epoch=True, resize_px=256, crop_px=224, interpolation="bicubic", pooling="avg",
    layer_decay=0.65, positions="trained", projector=False, labels="all", lists=None,
    source="facebookresearch/mae FINETUNE.md", published="ImageNet: MAE ViT-B/16 83.6 (MOCA Table 5)",
)  # fmt: skip


def _row(base: Recipe, source: str, published: str, **changes: Any) -> Recipe:
    return replace(base, source=source, published=published, **changes)


# Table 15 has 20 epochs of warm-up and no erasing: that is the script's. The official script keeps positions fixed.
_TEC = replace(_MAE, lr=1e-3, warmup_epochs=20.0, layer_decay=0.55, positions="fixed")
# The README names one base learning rate for ViT-B, 5e-4: assumed for all of its ViT-B commands.
_TEC_README = replace(_TEC, lr=5e-4)
_TEC_TEXT: Final = "sail-sg/TEC README"
_ON_MAE, _ON_IBOT = "ImageNet: TEC on MAE ViT-B/16", "ImageNet: TEC on iBOT ViT-B/16"
# Table 13 says nothing of erasing and min_lr: the script's. Positions are trained in the script.
_EXTREMA = replace(_MAE, lr=1e-3, layer_decay=0.75)
_22K = {"lr": 5e-4, "layer_decay": 0.65}
# BEiT's script: the learning rate is taken as it is. The README says that it was swept; this is the script's.
_IBOT = replace(_MAE, lr=4e-3, scale_lr=False, warmup_epochs=20.0, pooling="cls")
_IBOT_TEXT: Final = "bytedance/ibot evaluation/README.md, run_class_finetuning.py"
# Table 7's batch of 64 is a GPU's (assumption; so is the 48 of its pre-training), on 4 and 2 GPUs. The learning rate is
# for 256 images, as in the author's later code. Not stated, and assumed: mixup, cutmix and smoothing of MAE; drop path
# .1; erasing of MAE with RandAugment and none with ThreeAugment (DeiT III); IN-100 counts as "Others"; pooling is that
# of Table 4's caption, for transfer too.
_MMC = replace(_MAE, pooling="cls+avg", batch=256)
# Paper: AdamW, lr 5e-6, 1000 epochs, batch 1024, "as BEiT"; iBOT's script: lr as it is, no layer decay is named. Weight
# decay, warm-up and mixing are iBOT's. Assumptions: drop path .1; erasing and min_lr of BEiT's script; the projector's
# first layer is Linear, LayerNorm and GELU (all before its second Linear), on the student's class token.
_SEMI = replace(
    _MAE, epochs=1000, lr=5e-6, scale_lr=False, pooling="cls", layer_decay=1.0, projector=True, every_epoch=False
)

# fmt: off
RECIPES: dict[str, Recipe] = {
    "mae":                _MAE,
    "mae-vit-l":          _row(_MAE, "facebookresearch/mae FINETUNE.md", "ImageNet: MAE ViT-L/16 85.9 (SdAE Table 6)",
                               epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.2),
    # Table 17 names no erasing: the script's. Paper and README agree.
    "moca":               _row(_MAE, "MOCA Table 17; valeoai/MOCA eval_finetune.py",
                               "ImageNet: MOCA ViT-B/16 83.6 (Table 6), 400 epochs 83.7, ViT-L/16 84.9 (Table 11)",
                               lr=1e-3, drop_path=0.2),

    "mmc":                _row(_MMC, "MMC Table 7, Others", "IN-100: MMC ViT-S/16 91.02 (Table 4); others plotted only",
                               batch=128, epochs=200, augmentation="three", erasing=0.0, every_epoch=False),
    "mmc-in1k":           _row(_MMC, "MMC Table 7, IN1K", "none", every_epoch=False),

    "tec-mae":            _row(_TEC, "TEC Table 15 (MAE-B)", f"{_ON_MAE} 84.7, 800 epochs 84.8 (Table 5)"),
    "tec-ibot":           _row(_TEC, "TEC Table 15 (iBOT-B)", f"{_ON_IBOT} 84.8, 800 epochs 85.1 (Table 5)",
                               layer_decay=0.65),
    # Table 15 and the README agree.
    "tec-vit-l":          _row(_TEC, f"TEC Table 15 (MAE-L); {_TEC_TEXT}",
                               "ImageNet: TEC on MAE ViT-L/16 86.5 (Table 5)",
                               epochs=50, warmup_epochs=5.0, min_lr=1e-5, layer_decay=0.65),
    "tec-mae-readme":     _row(_TEC_README, f"{_TEC_TEXT} (300 epochs)", f"{_ON_MAE} 84.7 (Table 5)",
                               layer_decay=0.65),
    "tec-mae-800-readme": _row(_TEC_README, f"{_TEC_TEXT} (800 epochs)", f"{_ON_MAE} 84.8 (Table 5)"),
    "tec-mae300-readme":  _row(_TEC_README, f"{_TEC_TEXT} (base of 300 epochs, 100 epochs)",
                               "ImageNet: TEC on MAE-300 ViT-B/16 83.9 (Table 4)",
                               warmup_epochs=5.0, layer_decay=0.65),
    "tec-ibot-readme":    _row(_TEC_README, f"{_TEC_TEXT} (300 epochs)", f"{_ON_IBOT} 84.8 (Table 5)",
                               warmup_epochs=5.0, layer_decay=0.5),
    "tec-ibot-800-readme": _row(_TEC_README, f"{_TEC_TEXT} (800 epochs)", f"{_ON_IBOT} 85.1 (Table 5)"),

    # The paper names no erasing: the script's.
    "sdae":               _row(_MAE, "SdAE A.1",
                               "ImageNet: SdAE ViT-B/16 84.1, 100 epochs 83.5, from scratch 81.8 (Table 2)",
                               batch=2048, warmup_epochs=10.0),
    "sdae-readme":        _row(_MAE, "AbrahamYabo/SdAE README", "ImageNet: SdAE ViT-B/16 84.1 (Table 2)"),
    "sdae-vit-l":         _row(_MAE, "SdAE A.1", "ImageNet: SdAE ViT-L/16 85.7 (Table 6)",
                               batch=2048, epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.2),

    "extrema":            _row(_EXTREMA, "ExtreMA Table 13", "ImageNet: ExtreMA ViT-B/16 83.7 (Table 7)"),
    "extrema-vit-s":      _row(_EXTREMA, "ExtreMA Table 13", "ImageNet: ExtreMA ViT-S/16 81.8 (Table 7)", epochs=200),
    "extrema-22k":        _row(_EXTREMA, "ExtreMA Table 13 and its text",
                               "ImageNet: ExtreMA (22k) ViT-B/16 83.9 (Table 7)", **_22K),
    "extrema-22k-vit-s":  _row(_EXTREMA, "ExtreMA Table 13 and its text",
                               "ImageNet: ExtreMA (22k) ViT-S/16 81.5 (Table 7)", **_22K, epochs=200),
    "extrema-readme":     _row(_EXTREMA, "microsoft/ExtreMA README",
                               "ImageNet: ExtreMA ViT-B/16 83.7, without color 82.9, 90x8 83.5, 22k 83.9 (README)",
                               **_22K, drop_path=0.2),
    "extrema-semi-1":     _row(_SEMI, "ExtreMA 5.3; bytedance/ibot evaluation/semi_supervised",
                               "ImageNet, 1 % of the labels: ExtreMA ViT-B/16 67.3, from scratch 9.0 (Table 10)",
                               labels="1percent"),
    "extrema-semi-10":    _row(_SEMI, "ExtreMA 5.3; bytedance/ibot evaluation/semi_supervised",
                               "ImageNet, 10 % of the labels: ExtreMA ViT-B/16 76.1, from scratch 44.8 (Table 10)",
                               labels="10percent"),

    "ibot-vit-s":         _row(_IBOT, _IBOT_TEXT, "not in the five papers",
                               epochs=200, layer_decay=0.75),
    "ibot":               _row(_IBOT, _IBOT_TEXT, "ImageNet: iBOT ViT-B/16 84.0 (MOCA Table 6), 84.1 (TEC Table 5)",
                               drop_path=0.2),
    "ibot-vit-l":         _row(_IBOT, _IBOT_TEXT, "ImageNet: iBOT ViT-L/16 84.8 (MOCA Table 12)",
                               epochs=50, warmup_epochs=5.0, layer_decay=0.75, drop_path=0.4),

    "toy":                _row(_MAE, "ours: seconds on the toy world", "none",
                               epochs=3, batch=64, lr=1e-2, layer_decay=0.75, warmup_epochs=1.0, augmentation="crop",
                               least_area=0.3, erasing=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0, every_epoch=False),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """None: it reads images itself."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """What the recipe needs of the network and of the data."""
    check_training(subject, recipe)
    checkpoint, architecture = subject.checkpoint, subject.checkpoint.architecture
    if recipe.pooling != "avg" and not architecture.has_cls:
        raise UserError(f"{checkpoint.spec} has no class token, which pooling={recipe.pooling} reads; try pooling=avg.")
    if recipe.pooling != "avg" and not architecture.final_norm:
        raise UserError(
            f"{checkpoint.spec} holds no final norm, through which pooling={recipe.pooling} reads the tokens; "
            "with --set pooling=avg a fresh one takes its place."
        )
    if recipe.projector:
        first_layer(checkpoint.require_extra("projector"), architecture.dim)
    check_batch(len(labeled_part(subject, recipe)[0]), recipe.batch)


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Train; the accuracy of the last epoch."""
    known = Shared(subject, recipe)
    checkpoint = subject.checkpoint
    part, described = labeled_part(subject, recipe)
    assert isinstance(subject.dataset, Dataset)
    data = replace(subject, dataset=replace(subject.dataset, train=part), _features={})
    layers, extra = None, None
    if recipe.projector:
        state = checkpoint.require_extra("projector")
        layers, extra = first_layer(state, checkpoint.architecture.dim), weights_sha256(state)
    with seeded(subject.seed):  # what is fresh is drawn alike in every process and after an interruption
        model = Classifier(trunk(checkpoint, recipe), recipe.pooling, known.classes, layers)
    learner = NetworkLearner(known, model, layer_groups(model, recipe))
    scores = trained_scores(known, learner, protocol=f"finetune@v{VERSION}", data=data, extra=extra)
    return replace(scores, details={**scores.details, "labels": described})


def trunk(checkpoint: Checkpoint, recipe: Recipe) -> Backbone:
    """The checkpoint's network, a copy to be trained, without what the pooling leaves unused."""
    architecture: Architecture = checkpoint.architecture
    if recipe.pooling == "avg":
        architecture = replace(architecture, final_norm=False, class_attention_blocks=0)
    network = network_of(checkpoint, architecture, recipe.drop_path)
    if recipe.positions == "fixed" and network.vit.pos_embed is not None:
        network.vit.pos_embed.requires_grad_(False)
    return network


class Classifier(nn.Module):
    """A network, what is read of it, and a linear head."""

    def __init__(self, backbone: Backbone, pooling: str, classes: int, layers: nn.Module | None = None) -> None:
        """`layers` stand before the head: the first of a projector."""
        super().__init__()
        architecture = backbone.architecture
        dim = architecture.dim * (2 if pooling == "cls+avg" else 1)
        self.backbone, self.pooling = backbone, pooling
        self.fc_norm = nn.LayerNorm(dim, eps=architecture.eps) if pooling == "avg" else nn.Identity()
        self.layers = layers or nn.Identity()
        self.head = nn.Linear(dim if layers is None else width_of(layers), classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits. (B, classes)"""
        (tokens,) = self.backbone(images, norm=False).tokens
        norm = self.backbone.vit.norm
        vectors = []
        if self.pooling != "avg":
            assert tokens.cls is not None
            vectors.append(norm(tokens.cls))
        if self.pooling != "cls":  # with avg alone, the trunk was built without a final norm
            vectors.append(norm(tokens.patches).flatten(1, 2).mean(1))
        logits: Tensor = self.head(self.layers(self.fc_norm(torch.cat(vectors, dim=1))))
        return logits


def layer_groups(model: Classifier, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups of parameters by layer and weight decay; layer n of L learns at lr * decay^(L - n)."""
    top = layer_of("head.weight", model.backbone.architecture)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = layer_of(name, model.backbone.architecture), is_decayed(name, parameter)
        settings = {
            "params": [],
            "scale": recipe.layer_decay ** (top - layer),
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        groups.setdefault((layer, decayed), settings)["params"].append(parameter)
    return list(groups.values())


def layer_of(name: str, architecture: Architecture) -> int:
    """0: what makes tokens of pixels; 1 to depth: blocks; then blocks of class attention; last: everything above.

    The class token of class attention belongs to the first block that it enters (assumption: no paper trains these).
    """
    if match := re.match(r"backbone\.vit\.blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    if re.match(r"backbone\.vit\.(patch_embed|cls_token|reg_token|pos_embed|norm_pre)", name):
        return 0
    if match := re.match(r"backbone\.class_attention\.(?:cls_token|blocks\.(\d+)\.)", name):
        return architecture.depth + 1 + int(match[1] or 0)
    return architecture.depth + architecture.class_attention_blocks + 1


def first_layer(state: Mapping[str, Tensor], dim: int) -> nn.Sequential:
    """The first Linear of a projector with what follows it: LayerNorm if the file has one, and GELU.

    So in ExtreMA (Linear, LayerNorm, GELU), DINO and iBOT (Linear, GELU).
    """
    names = [name for name, value in state.items() if re.search(r"(^|\.)0\.weight$", name) and value.ndim == 2]
    prefix = names[0].removesuffix("0.weight") if names else ""
    norms = {name.removeprefix(f"{prefix}1.") for name in state if name.startswith(f"{prefix}1.")}
    if len(names) != 1 or state[names[0]].shape[1] != dim or norms not in (set(), {"weight", "bias"}):
        found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in list(state.items())[:4])
        raise UserError(
            f"the projector's first layer is not recognized: expected a Linear of {dim} inputs under 0.weight, then at "
            f"most a LayerNorm under 1.*; found {found}. Without it: --set projector=false."
        )
    weight = state[names[0]]
    linear = nn.Linear(dim, len(weight), bias=f"{prefix}0.bias" in state)
    norm = nn.LayerNorm(len(weight)) if norms else nn.Identity()
    layers = nn.Sequential(linear, norm, nn.GELU())
    kept = {
        name.removeprefix(prefix): value for name, value in state.items() if re.match(r"[01]\.", name[len(prefix) :])
    }
    layers.load_state_dict(kept)
    return layers


def width_of(layers: nn.Module) -> int:
    """What comes out of a projector's first layer."""
    return next(module.out_features for module in layers.modules() if isinstance(module, nn.Linear))


def labeled_part(subject: Subject, recipe: Recipe) -> tuple[Split, str]:
    """The training images whose labels are used, and how they were chosen."""
    split = subject.split("train")
    if recipe.labels == "all":
        return split, "all"
    part = _labeled(subject, recipe, recipe.labels)
    return split.subset(part.rows), part.origin


def _labeled(subject: Subject, recipe: Recipe, amount: Literal["1percent", "10percent"]) -> Labeled:
    root, seed = subject.dataset.root, subject.seed
    (part,) = labeled_splits(subject.split("train"), amount, splits=1, lists=recipe.lists, root=root, seed=seed)
    return part


def data_used(subject: Subject, recipe: Recipe) -> dict[str, str]:
    """Which list was found: part of the run's identity."""
    return {} if recipe.labels == "all" else lists_used({recipe.labels: (_labeled(subject, recipe, recipe.labels),)})
