"""The contract between a method and the training loop.

A method is one file: a frozen `Recipe` (a `Training` and the method's own settings), the table `RECIPES` of published
rows, and a `Method` that turns views of images into named losses. The loop (loop.py) does everything else, the same for
all of them.

Whatever is random about a sample (its crop, its colors, its masks) is drawn from a generator seeded by (seed, epoch,
sample). So the data that a step sees depend neither on the number of processes or workers nor on what ran before, and
a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture, State
from ssl_bench.evaluate.backbone import Backbone
from ssl_bench.evaluate.training.augment import Pixels, View, draw_views
from ssl_bench.evaluate.training.loader import Draws, Views
from ssl_bench.evaluate.training.schedules import Progress


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every recipe says: the network, the optimizer, the schedules, the data augmentation."""

    arch: str  # a name that evaluate/architecture.py reads: vit_base_patch16_224, vit_96x4x3_patch8_48
    epochs: int
    batch: int  # images a step, over all processes and accumulated parts
    base_lr: float  # for a batch of 256; the peak is base_lr * batch / 256
    min_lr: float  # as it is, not scaled
    warmup_epochs: float  # linear, from 0
    horizon: float  # the cosine reaches min_lr at horizon * epochs
    betas: tuple[float, ...]
    weight_decay: float
    weight_decay_end: float  # cosine from the one to the other; the same: constant
    clip: float | None  # largest L2 norm of the gradient
    clip_each: bool  # ... of every tensor by itself (DINO's family), not of all together
    drop_path: float
    augmentation: str  # a row of augment.py
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing. Recipes call this before their own checks."""
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.base_lr <= 0 or self.horizon < 1 or self.min_lr < 0:
            raise UserError(
                f"base_lr={self.base_lr}, min_lr={self.min_lr}, horizon={self.horizon}: expected base_lr above 0, "
                "min_lr at least 0, horizon at least 1."
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"warmup_epochs={self.warmup_epochs:g} of epochs={self.epochs}: expected fewer warm-up epochs than "
                "epochs. A shorter run needs a shorter warm-up too: --set warmup_epochs=..."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas={self.betas}: expected two numbers in [0, 1), for example 0.9,0.95.")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"clip={self.clip}: expected a positive number, or none.")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path={self.drop_path}: expected a share in [0, 1).")


@dataclass(frozen=True)
class Sampling:
    """What is drawn of an image, in a worker: the views, then whatever else the method draws."""

    augmentation: tuple[View, ...]
    image_px: int
    patch_px: int
    draw: Callable[[np.random.Generator], Draws]

    def __call__(self, image: Image.Image, index: int, rng: np.random.Generator) -> tuple[tuple[Pixels, ...], Draws]:
        """Of one image; its label and place in the split do not matter."""
        views = draw_views(image, self.augmentation, image_px=self.image_px, patch_px=self.patch_px, rng=rng)
        return views, self.draw(rng)


@dataclass(frozen=True)
class Saved:
    """What goes into the file that `ssl-bench run` opens."""

    networks: Mapping[str, Backbone]  # by role (teacher, student, model); the first is the one to evaluate
    by_protocol: Mapping[str, str] = field(default_factory=dict)  # protocols that take another role
    extras: Mapping[str, State] = field(default_factory=dict)  # projector, adapters, decoder, ...


class Method(nn.Module):
    """Base of the six methods. `forward` is called under autocast, possibly several times a step (accumulation)."""

    # Parameters whose name starts so get no weight decay, beside all of one dimension.
    undecayed: tuple[str, ...] = ()
    # Parameters whose name starts so have a constant learning rate of their own.
    constant_lr: Mapping[str, float] = {}
    # Whether losses compare images of the batch with each other, so that accumulation would change what is learned.
    compares_images: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.watching = False  # the loop sets it on steps that are logged
        self.vitals: dict[str, Tensor] = {}  # scalars for the log, written by `forward` while watching
        self.embedding: Tensor | None = None  # (B, D) one vector an image, detached, written while watching
        self.momentum: float | None = None  # with which the teacher last moved, for the log

    def forward(self, views: Views) -> dict[str, Tensor]:
        """The terms of the loss, weighted: what is minimized is their sum. Scalars, means over the images."""
        raise NotImplementedError

    def after_step(self, now: Progress) -> None:
        """After the optimizer's step: move teachers, fill queues."""

    def saved(self) -> Saved:
        """What to keep for evaluation."""
        raise NotImplementedError


class MethodModule(Protocol):
    """What a method's file offers."""

    RECIPES: Mapping[str, Any]
    __doc__: str | None

    @staticmethod
    def draw(recipe: Any, architecture: Architecture, rng: np.random.Generator) -> Draws:
        """What is random about one sample beside its crops, in a worker: permutations of patches, masks."""

    @staticmethod
    def make(recipe: Any, architecture: Architecture, base: Any) -> Method:
        """The method, initialized from torch's global generator. `base` is a Checkpoint for methods that need one."""
