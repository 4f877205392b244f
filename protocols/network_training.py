"""Training networks on labels: what finetune.py and adapters.py share.

`Training` is what every such recipe says. `NetworkLearner` takes a step of AdamW on a whole batch, computed in parts of
`--batch-size` images, so that memory is bounded; what is random about an image depends on its place in the whole batch,
so neither the parts nor the number of processes change a step by more than rounding.

None of the recipes clips gradients or averages weights, so neither is here. Warm-up starts at a learning rate of 0 (in
BEiT's and iBOT's scripts at 1e-6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.features import DTYPES
from ssl_bench.evaluate.hardware import choose_attention
from ssl_bench.evaluate.loading import load
from ssl_bench.evaluate.readings import Interpolation, Reading
from ssl_bench.evaluate.subject import IntArray, Scores, Subject, accuracy
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.evaluate.training.schedules import Progress, warmup_cosine
from ssl_bench.evaluate.training.supervised import (
    Augmentation,
    Mixing,
    Supervised,
    draw_drop_path,
    erase,
    with_own_drop_path,
)
from ssl_bench.protocols.training import Course, Learner, about_replaced, identity, image_batches, train

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Backbone

# Images that are computed at a time unless --batch-size says otherwise.
PART = 128


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every recipe says: optimizer, schedule, augmentation, and the view of val images."""

    epochs: int
    batch: int  # over all processes and parts
    lr: float  # the peak
    scale_lr: bool  # lr and min_lr as in MAE's script: lr is for a batch of 256 and grows with it, min_lr is as it is
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    betas: tuple[float, ...]
    drop_path: float
    augmentation: Augmentation  # after crop and flip: nothing, RandAugment (9, .5), ThreeAugment
    least_area: float  # of the random crop
    erasing: float  # probability
    mixup: float
    cutmix: float
    smoothing: float
    every_epoch: bool  # val is scored after every epoch, and the best of them stands beside the last
    resize_px: int  # of val; training crops have the same size
    crop_px: int
    interpolation: Interpolation
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing. Recipes call this before their own checks."""
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.lr <= 0 or not 0 <= self.min_lr <= self.peak_lr:
            raise UserError(
                f"lr={self.lr:g}, min_lr={self.min_lr:g}: expected lr above 0, and min_lr from 0 to the peak, which is "
                f"{self.peak_lr:g} for batch={self.batch}."
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"warmup_epochs={self.warmup_epochs:g} of epochs={self.epochs}: expected fewer warm-up epochs than "
                "epochs. A shorter training needs a shorter warm-up too: --set warmup_epochs=..."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas={self.betas}: expected two numbers in [0, 1), for example 0.9,0.999.")
        for name in ("drop_path", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected a share in [0, 1).")
        for name in ("weight_decay", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: expected 0 (off) or more.")
        if not 0 <= self.erasing <= 1:
            raise UserError(f"erasing={self.erasing}: expected a probability in [0, 1].")
        if not 0 < self.least_area <= 1:
            raise UserError(f"least_area={self.least_area}: expected a share of the image above 0, at most 1.")

    @property
    def selected_on(self) -> Literal["none"]:
        """The last epoch is reported."""
        return "none"

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr * self.batch / 256 if self.scale_lr else self.lr

    def lr_at(self, now: Progress) -> float:
        """Linear warm-up from 0, then half a cosine, moved at every step."""
        return warmup_cosine(
            self.peak_lr, self.min_lr, epoch=now.epoch, warmup_epochs=self.warmup_epochs, total_epochs=self.epochs
        )


def check_training(subject: Subject, recipe: Training) -> None:
    """What can be known to fail before any image is read."""
    subject.require_shared_classes()
    checkpoint, world = subject.checkpoint, distributed.world_size()
    if checkpoint.format == "pixels":
        raise UserError("pixels: has no weights to train; give a checkpoint, or random:vit_base_patch16_224.")
    patch = checkpoint.architecture.patch_px
    if side_px(subject, recipe) % patch:
        raise UserError(
            f"crop_px={recipe.crop_px} does not divide into patches of {patch} px; choose a multiple: --set crop_px=..."
        )
    if (recipe.mixup or recipe.cutmix) and recipe.batch % (2 * world):
        raise UserError(
            f"batch={recipe.batch}: mixup and cutmix mix pairs of images, so the batch must divide by {2 * world}; "
            "choose another --set batch=..., or turn them off: --set mixup=0 --set cutmix=0."
        )
    if subject.effort.dtype == "fp16" and not subject.effort.device.startswith("cuda"):
        raise UserError(f"--dtype fp16 trains on CUDA only (device {subject.effort.device}); use bf16 or fp32.")


def side_px(subject: Subject, recipe: Training) -> int:
    """Of the images that the network sees."""
    side = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation).crop_px
    assert side is not None
    return side


def network_of(checkpoint: Checkpoint, architecture: Architecture, drop_path: float) -> Backbone:
    """A copy of the checkpoint's network to be trained, of its architecture or one with less."""
    from ssl_bench.evaluate.backbone import build, load_canonical

    network = build(architecture, drop_path=drop_path)
    misfits = checkpoint.match.unexpected
    load_canonical(network, {name: value for name, value in checkpoint.state.items() if name not in misfits})
    return network


class Shared:
    """What every learner needs beside its network: who computes which part of a batch, where, in what arithmetic."""

    def __init__(self, subject: Subject, recipe: Training) -> None:
        self.subject, self.recipe = subject, recipe
        self.device = torch.device(subject.effort.device)
        self.dtype = DTYPES[subject.effort.dtype]
        self.part = subject.effort.batch_size or PART
        self.classes = len(subject.split("train").classes)
        self.view = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
        # Read once with the frozen network: what is broken is known before hours of training, not after.
        found = subject.features("val", Reading("patch_mean", self.view, norm=False))
        broken = set(found.broken)
        self.readable = [index for index in range(len(subject.split("val"))) if index not in broken]
        self.labels = subject.labels("val", found)
        subject.checkpoint.backbone.cpu()  # the frozen copy is done with; a trained one takes its place

    def placed(self, network: nn.Module) -> nn.Module:
        """The network on the device, with the attention that is quick there."""
        tokens = (side_px(self.subject, self.recipe) // self.subject.checkpoint.architecture.patch_px) ** 2
        choose_attention(network.modules(), device=self.subject.effort.device, tokens=tokens)
        return network.to(self.device)

    def autocast(self) -> torch.autocast:
        """The arithmetic of forward passes."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def parts(self, count: int) -> list[slice]:
        """A batch of this process, cut."""
        return [slice(start, min(start + self.part, count)) for start in range(0, count, self.part)]

    @torch.no_grad()
    def predicted(self, logits: Callable[[Tensor], Tensor]) -> IntArray:
        """The class of every readable val image, each process computing its share; the same everywhere. (1, n)"""
        rank, world = distributed.rank(), distributed.world_size()
        share = -(-len(self.readable) // world)
        mine = self.readable[rank * share : (rank + 1) * share]
        plan = [mine[part] for part in self.parts(len(mine))]
        architecture = self.subject.checkpoint.architecture
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (architecture.mean, architecture.std))
        found = torch.full((share,), -1, dtype=torch.int64, device=distributed.device())
        start = 0
        for pixels, _ in load(self.subject.split("val"), self.view, plan, self.subject.effort):
            assert pixels is not None  # broken ones are not in the plan
            images = pixels.to(self.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
            with self.autocast():
                found[start : start + len(images)] = logits(images).argmax(dim=1).to(found.device)
            start += len(images)
        everything: IntArray = distributed.gathered_from_all(found).cpu().numpy()
        return everything[everything >= 0][None]

    def not_finite(self, loss: float, now: Progress) -> UserError:
        """The error for a loss that is no number."""
        return UserError(
            f"the loss is {loss} at step {now.step + 1} (epoch {now.epoch:.2f}). Try a smaller learning rate (--set "
            f"lr={self.recipe.lr / 4:g}), a longer warm-up (--set warmup_epochs=...), or --dtype fp32. If the same "
            "training was interrupted before, what was saved then stays, and the same command goes on from there."
        )


class NetworkLearner:
    """A classifier (images -> logits), trained with AdamW."""

    def __init__(self, known: Shared, model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
        """`groups` are the parameters that are trained; a group's lr is the schedule's times its "scale"."""
        recipe = known.recipe
        self.known, self.drop_paths = known, with_own_drop_path(model)
        self.model = known.placed(model)
        assert len(recipe.betas) == 2
        betas = recipe.betas[0], recipe.betas[1]
        self.optimizer = torch.optim.AdamW(list(groups), lr=0.0, betas=betas, fused=True)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.mixing = Mixing(recipe.mixup, recipe.cutmix, recipe.smoothing, known.classes)
        self.scaler = torch.amp.GradScaler(known.device.type, enabled=known.dtype == torch.float16)

    def step(self, views: Views, now: Progress) -> None:
        """Erase and mix, then forward and backward part by part; the whole batch's mean gradient moves the weights."""
        known, recipe, seed = self.known, self.known.recipe, self.known.subject.seed
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(now) * group["scale"]
        labels, boxes, seeds = views.draws
        images, count = views.images[0], len(labels)
        erase(images, boxes, seeds)
        first = distributed.rank() * count
        images, targets = self.mixing(images, labels, seed=seed, step=now.step, first=first)
        uniform = draw_drop_path(len(self.drop_paths), recipe.batch, seed=seed, step=now.step)
        uniform = uniform[:, first : first + count].to(known.device)
        self.model.train()
        total = torch.zeros((), device=known.device)
        for part in known.parts(count):
            for module, numbers in zip(self.drop_paths, uniform[:, part], strict=True):
                module.uniform = numbers
            with known.autocast():
                logits = self.model(images[part])
            loss = -(targets[part] * logits.float().log_softmax(dim=1)).sum() / count
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self._average([parameter.grad for parameter in self.trained if parameter.grad is not None])
        mean_loss = float(distributed.mean_of_all(total))
        lost = self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3  # no scale fits the fp16 gradients
        if lost or not math.isfinite(mean_loss):
            raise known.not_finite(math.nan if lost else mean_loss, now)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _average(self, gradients: list[Tensor]) -> None:
        """Over processes, in one exchange."""
        if distributed.world_size() > 1:
            mean = distributed.mean_of_all(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = torch.split(mean, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def predict(self) -> IntArray:
        """By the network as it is."""
        self.model.eval()
        return self.known.predicted(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer and the fp16 scale."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to that point."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def plain_groups(named: Mapping[str, nn.Parameter], recipe: Training) -> list[dict[str, Any]]:
    """All parameters at the schedule's learning rate; vectors, biases and class tokens are not decayed."""
    decayed = [parameter for name, parameter in named.items() if is_decayed(name, parameter)]
    others = [parameter for name, parameter in named.items() if not is_decayed(name, parameter)]
    return [
        {"params": decayed, "scale": 1.0, "weight_decay": recipe.weight_decay},
        {"params": others, "scale": 1.0, "weight_decay": 0.0},
    ]


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Weight decay as MAE has it: not for one dimension (norms, biases, gains), nor position and special tokens."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in ("pos_embed", "cls_token", "reg_token")


def trained_scores(known: Shared, learner: Learner, *, protocol: str, data: Subject, extra: object = None) -> Scores:
    """Train, and score the last epoch; the best one beside it where every epoch was scored.

    `protocol` is its name and version; `data` is the subject whose train split is learned from, and `extra` whatever
    else makes this training another one.
    """
    subject, recipe = known.subject, known.recipe
    split = data.split("train")
    course = Course(
        title=f"{protocol.partition('@')[0]} of {subject.checkpoint.name}",
        identity=identity(subject, split, recipe, protocol) | {"extra": extra},
        images=len(split),
        batch=recipe.batch,
        epochs=recipe.epochs,
        seed=subject.seed,
        evaluate_epochs=1 if recipe.every_epoch else None,
    )
    image_px, mean = side_px(subject, recipe), subject.checkpoint.architecture.mean
    sample = Supervised(recipe.augmentation, recipe.least_area, recipe.erasing, image_px, mean, split.labels)
    broken: dict[int, str] = {}
    # One process takes its batch in pieces, so that several workers make it; of several, each takes a run of the batch.
    piece = PART if distributed.world_size() == 1 else None
    history = train(
        course, learner, image_batches(data, sample, recipe.batch, piece=piece, broken=broken), known.labels
    )
    assert history.last is not None
    assert history.best is not None
    replaced = len(distributed.union(broken))
    metrics = {"top1": accuracy(history.last[0] == known.labels)}
    details: dict[str, object] = {"train_images": len(split), "image_px": image_px, "peak_lr": recipe.peak_lr}
    if recipe.every_epoch:
        metrics["top1_best_epoch"] = accuracy(history.best[0] == known.labels)
        details |= {"epochs": history.epochs, "top1_by_epoch": [values[0] for values in history.accuracies]}
    said = about_replaced(replaced)
    return Scores(
        metrics,
        main="top1",
        predictions=history.last[0],
        warnings=said,
        details=details,
        evaluated={"train": len(split) - replaced, "val": len(known.readable)},
        skipped={"train": replaced, "val": len(subject.split("val")) - len(known.readable)},
    )
