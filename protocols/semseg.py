"""Semantic segmentation: a head on the network, trained on images with masks, by mmseg.

    ssl-bench run --ckpt x.pth --dataset ade20k --protocol semseg                       the first row below, MMC's
    ssl-bench run --ckpt x.pth --dataset cityscapes --protocol semseg/segmenter-linear-100 --set lists=/data/splits
    torchrun --nproc-per-node=8 -m ssl_bench.cli run --ckpt x.pth --dataset ade20k --protocol semseg/upernet-mae

mIoU on val, at the size in which images and masks are stored, in one scale. What is trained is the head alone on a
frozen network (linear rows), or the network with it: UPerNet on four blocks' maps, Segmenter with one layer of mask
transformer, or one convolution on the tokens (ImageNet-S).

Departures, all rows: the loss is averaged over labeled pixels (mmseg's configs divide by all, Segmenter's code does
not); images whose sides are no multiple of the patch are padded; positions are brought to another grid as the
checkpoint's own project does it, at any size (Segmenter: once, bilinear; ImageNet-S: DINO's way). MAE's and CAE's
configs add relative positions to the network and scales to its blocks, which are fresh; these rows add nothing.

With --batch-size, each part of a batch has its own mean over labeled pixels and its own BatchNorm, so the record holds
their number. BatchNorm is synchronized between processes on GPUs only (a record of CPUs warns of it).

ImageNet-S's official script scores images of more than 1000 x 1000 px at 1000 x 1000, and a class that is neither
labeled nor predicted counts 0 there. Here every image is scored as it is stored, and such a class is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from ssl_bench.errors import UserError
from ssl_bench.evaluate.masks import Masks
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.subject import Scores, Subject
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.schedules import warmup_cosine
from ssl_bench.protocols.image_splits import MOST_SPLITS, Subset, lists_used, subsets
from ssl_bench.protocols.openmm import packages
from ssl_bench.protocols.training import check_batch, computed_apart

if TYPE_CHECKING:
    from torch import Tensor

    from ssl_bench.evaluate.checkpoints import Checkpoint

VERSION = 1
DATA, DISTRIBUTED, KEEPS_SIZES = "masks", True, True

Head = Literal["linear", "batchnorm+linear", "layernorm+linear", "fc_norm+linear", "upernet", "mask"]
_MAPS: Mapping[Head, int] = {"upernet": 4, "mask": 1}  # how many a head takes, where it is not free to take any
_WARMUP_RATIO = 1e-6
_MOST_LR = 1000.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one paper does it."""

    head: Head  # fc_norm: a LayerNorm that is the file's own, of its fine-tuning
    frozen: bool  # the network
    layers: tuple[int, ...]  # blocks that are read, from 0, of a network of 12; others are read at the same shares
    norm: bool  # their tokens pass through the final norm
    optimizer: Literal["adamw", "sgd"]  # betas .9, .999; Nesterov's momentum .9
    lrs: tuple[float, ...]  # several: the best on val is taken, with several splits on the first one
    weight_decay: float
    layer_decay: float
    drop_path: float
    power: float | None  # of the polynomial in which the learning rate falls; None: half a cosine
    min_lr: float
    iterations: int | None  # of these two, one is given
    epochs: int | None
    warmup: int  # the same unit
    best_every: int | None  # val is scored after so many (the same unit), and the best is reported; None: the end
    batch: int  # over all processes
    # scale: by .5 to 2, crop, flip, colors. resized-crop: RandomResizedCrop and flip; +colors: SimCLR's.
    augmentation: Literal["scale", "resized-crop", "resized-crop+colors"]
    crop_px: int
    resize_px: int | None  # the short side of val images; None: as mmseg's configs of the dataset
    stride_px: int | None  # of the windows, of crop_px, over a val image; None: no windows, the image in one piece
    train_images: int | None  # a part of the training images; None: all
    splits: int  # how many such parts
    lists: str | None  # their folder (image_splits.py)
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if (self.iterations is None) == (self.epochs is None):
            raise UserError(
                f"iterations={self.iterations}, epochs={self.epochs}: expected one of them, and none for the other, "
                "for example --set iterations=1000 --set epochs=none."
            )
        for name in (
            "iterations",
            "epochs",
            "best_every",
            "batch",
            "crop_px",
            "resize_px",
            "stride_px",
            "train_images",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}: expected at least 1.")
        if not 0 <= self.warmup < self.length:
            raise UserError(
                f"warmup={self.warmup} of {self.length} {self.unit}: expected from 0 to fewer than the whole training "
                "has. A shorter training needs a shorter warm-up too: --set warmup=..."
            )
        if not all(0 < lr <= _MOST_LR for lr in self.lrs) or not 0 <= self.min_lr <= min(self.lrs):
            raise UserError(
                f"lrs={self.lrs}, min_lr={self.min_lr:g}: expected learning rates above 0, at most {_MOST_LR:g}, and "
                "a smaller min_lr."
            )
        if len(set(self.lrs)) < len(self.lrs):
            raise UserError(f"lrs={self.lrs}: expected different learning rates.")
        if self.weight_decay < 0 or (self.power is not None and self.power <= 0):
            raise UserError(
                f"weight_decay={self.weight_decay}, power={self.power}: expected none below 0, power above."
            )
        if not (0 < self.layer_decay <= 1 and 0 <= self.drop_path < 1):
            raise UserError(
                f"layer_decay={self.layer_decay}, drop_path={self.drop_path}: expected shares, of which layer_decay is "
                "above 0 and at most 1 (no decay), and drop_path from 0 (off) to below 1."
            )
        self._check_head()
        if self.stride_px is not None and self.stride_px > self.crop_px:
            raise UserError(
                f"stride_px={self.stride_px}: windows of {self.crop_px} px would leave pixels between them; choose at "
                "most crop_px."
            )
        if not 1 <= self.splits <= (1 if self.train_images is None else MOST_SPLITS):
            raise UserError(
                f"splits={self.splits}: expected 1, or with train_images=... up to {MOST_SPLITS} different parts."
            )
        if self.lists is not None and self.train_images is None:
            raise UserError(f"lists={self.lists}: lists are of parts; how many images? --set train_images=...")

    def _check_head(self) -> None:
        wanted = _MAPS.get(self.head, len(self.layers))
        if len(self.layers) != wanted or any(not 0 <= layer < 12 for layer in self.layers):
            raise UserError(
                f"layers={self.layers}: expected {wanted} of the blocks 0 to 11 for head={self.head} (the blocks of a "
                "network of 12; another depth is read at the same shares)."
            )
        if self.frozen and (self.head == "upernet" or self.layer_decay != 1):
            raise UserError("frozen=true: UPerNet and layer_decay are for networks that are trained.")

    @property
    def length(self) -> int:
        """Of the training, in its unit."""
        return self.epochs or self.iterations or 0

    @property
    def unit(self) -> Literal["epochs", "iterations"]:
        """What length, warmup and best_every count."""
        return "iterations" if self.epochs is None else "epochs"

    @property
    def selected_on(self) -> Literal["none", "val"]:
        """The papers that search learning rates report the best on val."""
        return "val" if len(self.lrs) > 1 or self.best_every is not None else "none"

    def per_unit(self, images: int) -> int:
        """Steps. The incomplete last batch of an epoch is a step, as in the official loaders (here it is filled)."""
        return 1 if self.epochs is None else math.ceil(images / self.batch)

    def lr_factor(self, lr: float, images: int) -> Callable[[int], float]:
        """What the learning rate is multiplied with at each step.

        The polynomial is mmcv 1's, over all steps: (1 - t / T)^power, to min_lr; in the warm-up it is multiplied with
        what rises from 1e-6 to 1. (mmengine's configs let it begin after the warm-up.) The cosine is MAE's.
        """
        total, warmup = (length * self.per_unit(images) for length in (self.length, self.warmup))

        def factor(step: int) -> float:
            if self.power is None:
                return warmup_cosine(lr, self.min_lr, epoch=step, warmup_epochs=warmup, total_epochs=total) / lr
            value = self.min_lr + (lr - self.min_lr) * math.pow(1 - step / total, self.power)
            return value / lr * (1 if step >= warmup else 1 - (1 - step / warmup) * (1 - _WARMUP_RATIO))

        return factor


# mmseg's of the time (VICRegL, iBOT, MAE, CAE): AdamW, poly of power 1, 1500 iterations of linear warm-up.
_MMSEG = Recipe(
    head="linear", frozen=True, layers=(3, 5, 7, 11), norm=True, optimizer="adamw", lrs=(1e-4,), weight_decay=0.05,
    layer_decay=1.0, drop_path=0.0, power=1.0, min_lr=0.0, iterations=160_000, epochs=None, warmup=1500,
    best_every=None, batch=16, augmentation="scale", crop_px=512, resize_px=None, stride_px=341, train_images=None,
    splits=1, lists=None, source="", published="",
)  # fmt: skip


def _row(base: Recipe, source: str, published: str, **changes: Any) -> Recipe:
    return replace(base, source=source, published=published, **changes)


# MMC: "as VICRegL", whose LinearHead is BatchNorm and a 1 x 1 convolution. That the tokens are normed: assumption.
_MMC = replace(_MMSEG, head="batchnorm+linear", layers=(5, 7, 9, 11), iterations=40_000)
_UPERNET = replace(_MMSEG, head="upernet", frozen=False, norm=False, layer_decay=0.65, drop_path=0.1)
# Rows that a paper gives no drop path for (SdAE, ExtreMA) have that of CAE's config, on which they build.
# Segmenter's config for Cityscapes; its lr .01 is searched around, by a grid that MOCA does not name (assumption).
# Its script scores val every 4 epochs, and MOCA reports the best.
_SEGMENTER = replace(
    _MMSEG, layers=(11,), optimizer="sgd", lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), weight_decay=0.0, power=0.9, min_lr=1e-5,
    iterations=None, epochs=216, warmup=0, best_every=4, batch=8, crop_px=768, stride_px=512,
)  # fmt: skip
_MASK = replace(_SEGMENTER, head="mask", frozen=False, drop_path=0.1)
_FEW_372: Final = {"train_images": 372, "splits": 3}
_FEW_100: Final = {"train_images": 100, "splits": 3}
_CITYSCAPES: Final = "Cityscapes: MOCA ViT-B/16"
# Table 17 names "RandomResizedCrop"; the official script (LUSSeg/ImageNetSegModel), whose numbers of MAE Table 9 has,
# distorts colors too. The learning rate is for a batch of 256, which is the batch. Val: Resize(256), then no crop.
_IMAGENET_S = replace(
    _MMSEG, head="layernorm+linear", frozen=False, layers=(11,), norm=False, lrs=(5e-4,), layer_decay=0.6,
    drop_path=0.1, power=None, min_lr=1e-6, iterations=None, epochs=100, warmup=5, batch=256,
    augmentation="resized-crop+colors", crop_px=224, resize_px=256, stride_px=None,
)  # fmt: skip
_S: Final = "ImageNet-S-919"
_TOY: Final = {"crop_px": 64, "stride_px": 64, "warmup": 0, "best_every": None}

# fmt: off
RECIPES: dict[str, Recipe] = {
    "linear-mmc":           _row(_MMC, "MMC supplement, Segmentation; facebookresearch/VICRegL segmentation",
                                 "MMC ViT-B/16: ADE20K 37.0, Cityscapes 62.6, VOC aug 77.7 (Table 3), COCO 46.4 "
                                 "(Table 1); random 2.1, 13.7, 4.7"),
    "linear-ibot":          _row(_MMSEG, "bytedance/ibot evaluation/README.md, configs/linear/vit_base_512_ade20k_160k",
                                 "not in the five papers", lrs=(8e-4,)),

    "upernet-ibot":         _row(_UPERNET, "bytedance/ibot evaluation/README.md, configs/upernet/vit_base_512_ade20k",
                                 "ADE20K: iBOT ViT-B/16 50.0 (TEC Table 6)", norm=True, lrs=(8e-5,)),
    "upernet-mae":          _row(_UPERNET, "implus/mae_segmentation configs/mae/upernet_mae_base_12_512_slide_160k",
                                 "ADE20K: MAE ViT-B/16 48.1 (TEC Table 6), 48.15 (the repository)"),
    "upernet-tec":          _row(_UPERNET, "TEC B.2; open-mmlab/mmsegmentation configs/mae",
                                 "ADE20K: TEC on MAE ViT-B/16 49.9, on iBOT 51.0 (Table 6)"),
    "upernet-cae":          _row(_UPERNET, "SdAE A.1, as CAE; lxtGH/CAE upernet_cae_base_12_512_slide_160k_pt_4e-4",
                                 "ADE20K: CAE ViT-B/16 47.7 (SdAE Table 3), 800 epochs 48.8 (SdAE Table 7)",
                                 lrs=(4e-4,)),
    "upernet-sdae":         _row(_UPERNET, "SdAE A.1, as CAE",
                                 "ADE20K: SdAE ViT-B/16 48.6 (Table 3), 800 epochs 49.0 (Table 7)", lrs=(4e-4,)),
    "upernet-extrema":      _row(_UPERNET, "ExtreMA 5.3; its README: CAE's code, without the class token",
                                 "ADE20K: ExtreMA ViT-B/16 47.9, 22k 48.4 (Table 9)",
                                 iterations=80_000, layer_decay=0.85),

    "segmenter-linear":     _row(_SEGMENTER, "MOCA Table 9, B; rstrudel/segmenter", f"{_CITYSCAPES} 60.1"),
    "segmenter-linear-372": _row(_SEGMENTER, "MOCA Figure 3c, B; rstrudel/segmenter", f"{_CITYSCAPES} 55.2",
                                 epochs=100, **_FEW_372),
    "segmenter-linear-100": _row(_SEGMENTER, "MOCA Table 9, B; rstrudel/segmenter", f"{_CITYSCAPES} 49.9",
                                 epochs=100, **_FEW_100),
    "segmenter-mask":       _row(_MASK, "MOCA Table 9, B; rstrudel/segmenter", f"{_CITYSCAPES} 78.2"),
    "segmenter-mask-372":   _row(_MASK, "MOCA Figure 3c, B; rstrudel/segmenter", f"{_CITYSCAPES} 71.1", **_FEW_372),
    "segmenter-mask-100":   _row(_MASK, "MOCA Figure 3c, B; rstrudel/segmenter", f"{_CITYSCAPES} 51.5", **_FEW_100),

    "imagenet-s":           _row(_IMAGENET_S, "TEC Table 17 (SSL); LUSSeg/ImageNetSegModel",
                                 f"{_S}: TEC on MAE ViT-B/16 42.9, MAE 38.3 (TEC Table 9)"),
    # The file is one that was fine-tuned on ImageNet.
    "imagenet-s-ft":        _row(_IMAGENET_S, "TEC Table 17 (SSL+FT); LUSSeg/ImageNetSegModel",
                                 f"{_S}: TEC on MAE ViT-B/16, fine-tuned, 62.0, MAE 61.0 (TEC Table 9)",
                                 head="fc_norm+linear", lrs=(1e-4,), layer_decay=0.45),

    # Bare `semseg` on built-in data is the first of these.
    "linear-toy":           _row(_MMC, "ours: seconds on the toy world", "none", layers=(2, 5, 8, 11),
                                 iterations=300, lrs=(0.01,), **_TOY),
    "upernet-toy":          _row(_UPERNET, "ours: seconds on the toy world", "none",
                                 iterations=100, batch=8, lrs=(1e-3,), drop_path=0.0,
                                 **_TOY | {"crop_px": 48, "stride_px": 48}),
    # AdamW: with SGD a fresh mask transformer has learned nothing in seconds.
    "segmenter-toy":        _row(_MASK, "ours: seconds on the toy world", "none", train_images=100, splits=2,
                                 optimizer="adamw", iterations=80, epochs=None, lrs=(1e-3, 3e-3), **_TOY),
    "imagenet-s-toy":       _row(_IMAGENET_S, "ours: seconds on the toy world", "none", augmentation="resized-crop",
                                 iterations=150, epochs=None, batch=32, lrs=(1e-3,), resize_px=None, **_TOY),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """None: it reads images itself."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """What can be known to fail before any image is read."""
    packages.installed()
    checkpoint, architecture = subject.checkpoint, subject.checkpoint.architecture
    train, classes = subject.split("train"), _masks(subject).classes
    subject.split("val")
    if checkpoint.format == "pixels":
        raise UserError("pixels: has no network to put a head on; give a checkpoint, or random:vit_base_patch16_224.")
    if recipe.crop_px % architecture.patch_px:
        raise UserError(
            f"crop_px={recipe.crop_px} does not divide into patches of {architecture.patch_px} px; choose a multiple: "
            "--set crop_px=..."
        )
    if recipe.norm and not architecture.final_norm:
        raise UserError(
            f"{checkpoint.spec} holds no final norm, through which norm=true passes the tokens; with --set norm=false "
            "they are read as they are."
        )
    shapes = {name: tuple(value.shape) for name, value in fc_norm_of(checkpoint).items()}
    if recipe.head == "fc_norm+linear" and shapes != dict.fromkeys(("weight", "bias"), (architecture.dim,)):
        raise UserError(
            f"{checkpoint.spec} holds {f'an fc_norm of {shapes}' if shapes else 'no fc_norm'}. Expected a network "
            f"that was fine-tuned as MAE's are, with fc_norm.weight and fc_norm.bias of {architecture.dim} numbers; "
            "for others there are semseg/imagenet-s and --set head=layernorm+linear."
        )
    if len(classes) < 2:
        raise UserError(f"{subject.dataset.name} has one class, {classes[0]}; expected several to tell apart.")
    if subject.effort.dtype == "fp16" and not subject.effort.device.startswith("cuda"):
        raise UserError(f"--dtype fp16 trains on CUDA only (device {subject.effort.device}); use bf16 or fp32.")
    for part in _parts(subject, recipe):
        check_batch(len(train) if part is None else len(part.rows), recipe.batch)
    share = min(recipe.batch // distributed.world_size(), subject.effort.batch_size or recipe.batch)
    if recipe.head == "upernet" and share < 2:
        raise UserError(
            "UPerNet's BatchNorm on 1 x 1 maps needs two images at a time in each process, and would have one. "
            "Expected --set batch=... of two or more for each process, and --batch-size of two or more."
        )


def data_used(subject: Subject, recipe: Recipe) -> dict[str, str]:
    """What else makes it another run: lists that were read, and parts of a batch that do not know of each other."""
    apart = computed_apart(recipe.batch, subject.effort)
    if recipe.lists is None:
        return apart
    return apart | lists_used([part for part in _parts(subject, recipe) if part is not None])


def fc_norm_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The norm between pooling and classifier of a network that was fine-tuned; empty if it has none."""
    found = checkpoint.extras.get("classifier", {})
    return {key.removeprefix("fc_norm."): value for key, value in found.items() if key.startswith("fc_norm.")}


def _masks(subject: Subject) -> Masks:
    assert isinstance(subject.dataset, Masks)
    return subject.dataset


def _parts(subject: Subject, recipe: Recipe) -> tuple[Subset | None, ...]:
    """The training images of each split; None: all."""
    if recipe.train_images is None:
        return (None,)
    return subsets(subject.split("train"), recipe.train_images, splits=recipe.splits, lists=recipe.lists)


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Search the learning rate on the first split, train on the others with the best, and report val."""
    packages.require()
    from ssl_bench.protocols.openmm.segmentation_search import search

    return search(subject, recipe, _parts(subject, recipe), f"semseg@v{VERSION}")
