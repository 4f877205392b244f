"""Linear probing: one linear layer on frozen features, trained by gradient descent.

    ssl-bench run --ckpt x.pth --protocol linear                 the first row below, iBOT's
    ssl-bench run --ckpt x.pth --protocol linear/mae --set epochs=30
    torchrun --nproc-per-node=8 -m ssl_bench.cli run --ckpt x.pth --protocol linear/moca

Papers differ in everything but the frozen network: optimizer, augmentation, what the head reads, a normalization before
it, and what is reported. Where a paper sweeps learning rates, all heads of the sweep are trained side by side on the
same features: the network, which costs nearly all of the time, runs once. Every head starts from the same weights, so
head k of a sweep is what a run with its learning rate alone would give.

The reported number is the recipe's own: its best head at its best epoch on val where the authors' script keeps the best
(`selected_on` test), or the last epoch. The other one stands beside it: `top1_best`, `top1_last`. A head whose loss is
no longer finite is dropped and named in the record.

Learning rates are those of a batch of 256 and grow with it. Departures: batch statistics are those of the whole batch
over all processes (MAE's are each GPU's), with eps 1e-6 in every row (ExtreMA's has torch's 1e-5); incomplete last
batches are left out (as MAE's script does, not DINO's); crops are torchvision's in every row (the probes of MAE and
SdAE try a box once, where torchvision tries ten times).
Recipes named `cached` train without augmentation on cached features; that is quick, and not what any paper reports.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import Forward
from ssl_bench.evaluate.readings import Interpolation, Reading
from ssl_bench.evaluate.subject import IntArray, Scores, Subject, accuracy
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.augment import View
from ssl_bench.evaluate.training.loader import Views, epoch_order, steps_per_epoch
from ssl_bench.evaluate.training.schedules import Progress, warmup_cosine
from ssl_bench.evaluate.vectors import Vectors
from ssl_bench.protocols.heads import Heads
from ssl_bench.protocols.optimizers import StackedSgd
from ssl_bench.protocols.training import (
    Batches,
    Course,
    History,
    Labeled,
    about_replaced,
    check_batch,
    identity,
    image_batches,
    train,
)

VERSION = 1
DATA, DISTRIBUTED = "images", True

Vector = Literal["cls", "patch_mean", "cls+patch_mean"]


@dataclass(frozen=True)
class Recipe:
    """How one paper does it. With several learning rates, the best of their heads is reported."""

    vector: Vector  # the class tokens of the last blocks, the average patch token of the last one, or both joined
    blocks: int  # how many last blocks give their class token
    norm: bool  # the network's final norm, after every one of those blocks
    head: Literal["plain", "batch_norm", "layer_norm"]  # what stands before the linear layer
    optimizer: Literal["sgd", "nesterov", "lars"]
    base_lr: tuple[float, ...]  # for a batch of 256
    batch: int
    epochs: int
    warmup_epochs: int
    schedule: Literal["step", "epoch"]  # how often the cosine moves
    scale: tuple[float, ...] | None  # RandomResizedCrop's share of the area; None: no augmentation, cached features
    crops: Interpolation  # of the training crops
    resize_px: int  # of val, and of train without augmentation
    crop_px: int
    interpolation: Interpolation
    reported: Literal["best", "last"]  # of the epochs; of several heads, always the best
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("blocks", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if min(self.base_lr) <= 0:
            raise UserError(f"base_lr={self.base_lr}: expected positive numbers.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(f"warmup_epochs={self.warmup_epochs}: expected 0 to less than epochs={self.epochs}.")
        if self.scale is not None and not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1):
            raise UserError(f"scale={self.scale}: expected two shares of the area, for example 0.08,1, or none.")
        if self.head == "layer_norm" and len(self.base_lr) > 1:
            raise UserError("head=layer_norm learns a norm of its own; expected one base_lr, not several.")
        if self.vector == "patch_mean" and self.blocks > 1:
            raise UserError(f"blocks={self.blocks}: the average patch token is the last block's; expected blocks=1.")

    @property
    def selected_on(self) -> Literal["none", "test"]:
        """Whether the images that score also chose the epoch or the head."""
        return "test" if self.reported == "best" or len(self.base_lr) > 1 else "none"


_PIECE = 512  # images that a worker makes at a time

# Words of the table.
_CLS: Final = "cls"
_AVG: Final = "patch_mean"
_BOTH: Final = "cls+patch_mean"
_PLAIN: Final = "plain"
_BN: Final = "batch_norm"
_LN: Final = "layer_norm"
_SGD: Final = "sgd"
_NESTEROV: Final = "nesterov"
_LARS: Final = "lars"
_EPOCH: Final = "epoch"
_STEP: Final = "step"
_LIN: Final = "bilinear"
_CUB: Final = "bicubic"
_BEST: Final = "best"
_LAST: Final = "last"
_45 = tuple(digit * 10.0**power for power in range(-4, 1) for digit in range(1, 10))
_FIVE = (0.03, 0.1, 0.3, 1.0, 3.0)
_AREA = (0.08, 1.0)  # torchvision's default
_SOME = (0.4, 1.0)

# fmt: off
RECIPES: dict[str, Recipe] = {
    # First line: vector, last blocks, final norm, head, optimizer, base_lr, batch, epochs, warm-up, schedule.
    # Second: area of the training crops and how they are resized; resize, crop and how for val; the reported epoch.
    # iBOT: 45 learning rates, of which the best on val counts. ViT-B, L: the last block, joined with the average patch.
    "ibot":           Recipe(_BOTH, 1, True,  _PLAIN, _SGD,      _45,      1024,  100, 0,  _EPOCH,
                             _AREA, _LIN, 256, 224, _CUB, _BEST,
                             source="bytedance/ibot eval_linear_multi.py, run.sh (n_last_blocks 1, avgpool 2)",
                             published="ImageNet: iBOT ViT-B/16 79.6 (MOCA Table 6), ViT-L/16 81.0 (MOCA Table 12)"),
    "ibot-small":     Recipe(_CLS,  4, True,  _PLAIN, _SGD,      _45,      1024,  100, 0,  _EPOCH,
                             _AREA, _LIN, 256, 224, _CUB, _BEST,
                             source="bytedance/ibot run.sh (ViT-S: n_last_blocks 4, avgpool 0)",
                             published="not in the five papers"),
    "dino":           Recipe(_CLS,  4, True,  _PLAIN, _SGD,      (0.001,), 1024,  100, 0,  _EPOCH,
                             _AREA, _LIN, 256, 224, _CUB, _BEST,
                             source="facebookresearch/dino eval_linear.py (ViT-S: the 4 last blocks)",
                             published="ImageNet: DINO ViT-S/16 77.0 (ExtreMA Table 7)"),
    "dino-base":      Recipe(_BOTH, 1, True,  _PLAIN, _SGD,      (0.001,), 1024,  100, 0,  _EPOCH,
                             _AREA, _LIN, 256, 224, _CUB, _BEST,
                             source="facebookresearch/dino eval_linear.py (ViT-B: 1 block and the average patch)",
                             published="ImageNet: DINO ViT-B/16 78.2 (MOCA Table 6)"),
    # MOCA's script is iBOT's. [CLS] + [AVG] is the README's headline, [AVG] the paper's number.
    "moca":           Recipe(_BOTH, 1, True,  _PLAIN, _SGD,      _45,      1024,  100, 0,  _EPOCH,
                             _AREA, _LIN, 256, 224, _CUB, _BEST,
                             source="valeoai/MOCA eval_linear.py, README (avgpool_patchtokens 2)",
                             published="ImageNet: MOCA v1.0 ViT-B/16 79.5 (README)"),
    "moca-avg":       Recipe(_AVG,  1, True,  _PLAIN, _SGD,      _45,      1024,  100, 0,  _EPOCH,
                             _AREA, _LIN, 256, 224, _CUB, _BEST,
                             source="valeoai/MOCA eval_linear.py (avgpool_patchtokens 1)",
                             published="ImageNet: MOCA ViT-B/16 78.7 (Table 6), 400 ep. 79.3, ViT-L 80.3 (Table 11)"),
    "moca-paper":     Recipe(_AVG,  1, True,  _PLAIN, _SGD,      (0.04,),  1024,  100, 0,  _EPOCH,
                             _AREA, _LIN, 256, 224, _CUB, _LAST,
                             source="MOCA Table 16",
                             published="ImageNet: MOCA ViT-B/16 78.7 (Table 6)"),
    "mae":            Recipe(_CLS,  1, True,  _BN,    _LARS,     (0.1,),   16384, 90,  10, _STEP,
                             _AREA, _CUB, 256, 224, _CUB, _BEST,
                             source="facebookresearch/mae main_linprobe.py (which keeps the best epoch)",
                             published="ImageNet: MAE ViT-B/16 67.8 (SdAE Table 2), 68.0 (TEC Table 3)"),
    "mae-large":      Recipe(_CLS,  1, True,  _BN,    _LARS,     (0.1,),   16384, 50,  10, _STEP,
                             _AREA, _CUB, 256, 224, _CUB, _BEST,
                             source="facebookresearch/mae main_linprobe.py (ViT-L and H: 50 epochs)",
                             published="ImageNet: MAE ViT-L/16 75.1 (MOCA Table 12)"),
    # Table 16 follows MAE and no code was released: MAE's batch norm is assumed, and the last epoch.
    "tec":            Recipe(_CLS,  1, True,  _BN,    _LARS,     (0.1,),   16384, 90,  10, _STEP,
                             _AREA, _CUB, 256, 224, _CUB, _LAST,
                             source="TEC Table 16",
                             published="ImageNet: TEC on MAE ViT-B/16 69.8 (Table 3)"),
    "sdae":           Recipe(_CLS,  1, True,  _BN,    _LARS,     (0.1,),   4096,  90,  10, _STEP,
                             _AREA, _CUB, 256, 224, _CUB, _BEST,
                             source="AbrahamYabo/SdAE main_linprobe.py (MAE's, 512 images on each of 8 GPUs)",
                             published="ImageNet: SdAE ViT-B/16 64.9, 100 epochs 60.3 (Table 2)"),
    # ExtreMA: the final norm is removed. Paper and README differ in the optimizer.
    "extrema-readme": Recipe(_CLS,  1, False, _BN,    _SGD,      (0.1,),   4096,  90,  10, _STEP,
                             _AREA, _LIN, 256, 224, _LIN, _BEST,
                             source="microsoft/ExtreMA main_lincls.py, README",
                             published="ImageNet: ExtreMA ViT-B/16 73.3 with colors, 67.1 without (README)"),
    "extrema-paper":  Recipe(_CLS,  1, False, _BN,    _LARS,     (0.1,),   4096,  90,  10, _STEP,
                             _AREA, _LIN, 256, 224, _LIN, _LAST,
                             source="ExtreMA Table 14",
                             published="ImageNet: ExtreMA ViT-B/16 73.3, ViT-S/16 69.4, 22k 74.5 and 65.7 (Table 7)"),
    # MSN: no final norm; a learned norm and unit length before the layer; lr 6.4 for 8192 images. 1 block: assumption.
    "msn":            Recipe(_CLS,  1, False, _LN,    _NESTEROV, (0.2,),   8192,  100, 0,  _STEP,
                             _AREA, _LIN, 256, 224, _LIN, _BEST,
                             source="facebookresearch/msn linear_eval.py (keeps the best epoch)",
                             published="ImageNet: MSN ViT-S/16 76.9, ViT-B/16 76.8 (ExtreMA Table 7)"),
    "mocov3":         Recipe(_CLS,  1, True,  _PLAIN, _SGD,      (3.0,),   1024,  90,  0,  _EPOCH,
                             _AREA, _LIN, 256, 224, _LIN, _BEST,
                             source="facebookresearch/moco-v3 main_lincls.py",
                             published="ImageNet: MoCo-v3 ViT-B/16 76.7 (MOCA Table 6)"),
    # Ours: iBOT's sweep without augmentation. Not comparable with any paper's number.
    "cached":         Recipe(_BOTH, 1, True,  _PLAIN, _SGD,      _45,      256,   100, 0,  _STEP,
                             None,  _CUB, 256, 224, _CUB, _LAST,
                             source="ours: no augmentation, cached features",
                             published="none: no paper trains its probe without augmentation"),
    "toy":            Recipe(_BOTH, 1, True,  _BN,    _SGD,      _FIVE,    128,   8,   1,  _STEP,
                             _SOME, _LIN, 256, 224, _CUB, _LAST,
                             source="ours: seconds on the toy world",
                             published="none"),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """What the head reads: class tokens of the last blocks, first block first, then the average patch token."""
    view = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
    read = []
    if recipe.vector != "patch_mean":
        read += [Reading("cls", view, layer=-block, norm=recipe.norm) for block in range(recipe.blocks, 0, -1)]
    if recipe.vector != "cls":
        read.append(Reading("patch_mean", view, layer=-1, norm=recipe.norm))
    return {"val": read} | ({"train": read} if recipe.scale is None else {})


def check(subject: Subject, recipe: Recipe) -> None:
    """The same classes in both splits, a full batch, images of a size that can be cropped."""
    subject.require_shared_classes()
    check_batch(len(subject.split("train")), recipe.batch)
    if recipe.scale is not None and subject.checkpoint.format == "pixels":
        raise UserError("pixels: have no input size to crop to; use a recipe without augmentation: linear/cached.")


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Train the heads; the accuracy of the one that the recipe reports."""
    read = readings(subject, recipe)
    anchor = subject.features("val", read["val"][0])
    labels = subject.labels("val", anchor)
    learner = Probe(subject, recipe)
    course = Course(
        title=f"linear probe of {subject.checkpoint.name}",
        identity=identity(subject, subject.split("train"), recipe, f"linear@v{VERSION}"),
        images=learner.images,
        batch=recipe.batch,
        epochs=recipe.epochs,
        seed=subject.seed,
        evaluate_epochs=1,
    )
    history = train(course, learner, learner.batches, labels)
    return _scores(recipe, learner, history, labels)


def _scores(recipe: Recipe, learner: Probe, history: History, labels: IntArray) -> Scores:
    assert history.best is not None
    assert history.last is not None
    alive = np.flatnonzero(learner.finite.cpu().numpy())
    curve = np.array(history.accuracies)[:, alive]  # (epochs, heads that lived)
    best, last = (
        predictions[alive[values.argmax()]]
        for predictions, values in ((history.best, curve.max(axis=0)), (history.last, curve[-1]))
    )
    scores = {"top1_best": accuracy(best == labels), "top1_last": accuracy(last == labels)}
    heads = [
        {
            "base_lr": recipe.base_lr[number],
            "best": float(values.max()),
            "best_epoch": history.epochs[int(values.argmax())],
            "last": float(values[-1]),
        }
        for number, values in zip(alive, curve.T, strict=True)
    ]
    dropped = [lr for number, lr in enumerate(recipe.base_lr) if number not in alive]
    warnings = [f"the loss at base_lr={lr:g} was no longer finite; that head was dropped" for lr in dropped]
    if recipe.scale is None:
        warnings.append("trained without augmentation on cached features: not comparable with published numbers")
    replaced = len(distributed.union(learner.broken))
    warnings += about_replaced(replaced)
    return Scores(
        {"top1": scores[f"top1_{recipe.reported}"], **scores},
        main="top1",
        predictions=best if recipe.reported == "best" else last,
        warnings=tuple(warnings),
        details={
            "features": "cached, no augmentation" if recipe.scale is None else "augmented",
            "heads": heads,
            "dropped": dropped,
            "epochs": history.epochs,
            "best_head_by_epoch": curve.max(axis=1).tolist(),
        },
        evaluated={} if learner.train else {"train": learner.images - replaced},
        skipped={} if learner.train else {"train": replaced},
    )


class Probe:
    """All heads of the sweep, their optimizer, and the frozen network that they read."""

    def __init__(self, subject: Subject, recipe: Recipe) -> None:
        self.subject, self.recipe = subject, recipe
        self.device = torch.device(subject.effort.device)
        read = readings(subject, recipe)
        self.val = Vectors([subject.features("val", reading).blocks() for reading in read["val"]])
        self.train: Vectors | None = None
        self.images = len(subject.split("train"))
        if "train" in read:
            found = [subject.features("train", reading) for reading in read["train"]]
            self.train, self.images = Vectors([features.blocks() for features in found]), len(found[0])
            self.labels = torch.from_numpy(subject.labels("train", found[0]))
        else:
            self.forward = Forward(subject.checkpoint.backbone, read["val"], subject.effort)
        classes, heads = len(subject.split("train").classes), len(recipe.base_lr)
        self.heads = Heads(heads, self.val.dim, classes, recipe.head, seed=subject.seed).to(self.device)
        peak = torch.tensor(recipe.base_lr, device=self.device) * (recipe.batch / 256)
        self.optimizer = StackedSgd(
            self.heads.parameters(),
            lr=peak,
            weight_decay=torch.zeros_like(peak),
            nesterov=recipe.optimizer == "nesterov",
            trust=0.001 if recipe.optimizer == "lars" else None,
        )
        self.finite = torch.ones(heads, dtype=torch.bool, device=self.device)
        self.readable = torch.tensor(True, device=self.device)  # whether all features were numbers
        self.broken: dict[int, str] = {}

    @property
    def batches(self) -> Batches:
        """Augmented images, or rows of the cached features."""
        recipe = self.recipe
        if recipe.scale is None:
            return self._cached_batches
        architecture = self.subject.checkpoint.architecture
        view = self.subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
        assert view.crop_px is not None
        crop = View((recipe.scale[0], recipe.scale[1]), recipe.crops)
        labels = self.subject.split("train").labels
        return image_batches(
            self.subject,
            Labeled(crop, view.crop_px, architecture.patch_px, labels),
            recipe.batch,
            piece=_PIECE,  # of batches up to 16,384 images, only the features are kept
            read=self._features,
            broken=self.broken,
        )

    def _cached_batches(self, start: int, stop: int) -> Generator[Views, None, None]:
        assert self.train is not None
        batch, steps = self.recipe.batch, steps_per_epoch(self.images, self.recipe.batch)
        share = slice(distributed.rank(), None, distributed.world_size())
        for step in range(start, stop):
            epoch, place = divmod(step, steps)
            if step == start or place == 0:
                order = epoch_order(self.images, seed=self.subject.seed, epoch=epoch)
            rows = order[place * batch : (place + 1) * batch][share]
            yield Views((self.train.raw(rows).to(self.device),), (self.labels[rows].to(self.device),))

    def step(self, views: Views, now: Progress) -> None:
        """Every head takes a step on the same features."""
        recipe = self.recipe
        epoch = now.epoch if recipe.schedule == "step" else float(now.step // now.steps_per_epoch)
        self.optimizer.set_scale(
            warmup_cosine(1.0, 0.0, epoch=epoch, warmup_epochs=recipe.warmup_epochs, total_epochs=recipe.epochs)
        )
        x = views.images[0]
        self.readable &= x.isfinite().all()
        losses = self.heads.losses(x, views.draws[0])  # (K,)
        # The heads do not touch each other, so the sum gives each its own gradient.
        for parameter, gradient in zip(
            self.heads.parameters(), torch.autograd.grad(losses.sum(), list(self.heads.parameters())), strict=True
        ):
            parameter.grad = distributed.mean_of_all(gradient)
        self.finite &= distributed.mean_of_all(losses.detach()).isfinite()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _features(self, images: Tensor) -> Tensor:
        part = self.subject.effort.batch_size or self.forward.batch_size
        parts = [torch.cat(self.forward.vectors(some), dim=1) for some in torch.split(images, part)]
        return torch.cat(parts)

    @torch.no_grad()
    def predict(self) -> IntArray:
        """By the cached features of val, which are not augmented. Heads without a finite loss predict nothing: -1."""
        if not distributed.mean_of_all(self.readable.float()) == 1:
            raise UserError(
                f"features of augmented images are not finite with --dtype {self.subject.effort.dtype}. With fp16 try "
                "bf16 or fp32; are there NaN in the weights?"
            )
        if not self.finite.any():
            raise UserError(
                f"the loss of every head is not finite (base_lr={', '.join(f'{lr:g}' for lr in self.recipe.base_lr)}). "
                "Try smaller learning rates: --set base_lr=..."
            )
        self.heads.eval()
        found = []
        for start in range(0, len(self.val), 4096):
            x = self.val.raw(np.arange(start, min(start + 4096, len(self.val)))).to(self.device)
            found.append(self.heads(x).argmax(dim=2))
        self.heads.train()
        predictions = torch.cat(found, dim=1)
        predictions[~self.finite] = -1
        array: IntArray = predictions.cpu().numpy()
        return array

    def state_dict(self) -> dict[str, Any]:
        """Heads, momentum, and which heads are still alive."""
        return {
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "finite": self.finite,
            "readable": self.readable,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to that point."""
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.finite, self.readable = state["finite"].to(self.device), state["readable"].to(self.device)
