"""Training images with labels, as fine-tuning sees them: crops, RandAugment or ThreeAugment, erasing, mixing.

The official codes all take these from timm or from DeiT III. Here every random number of an image comes from its own
generator, and every random number of a batch from (seed, step), by an image's place in the whole batch. So a step is
the same whatever the number of workers and processes, and however a batch is cut to fit into memory.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from ssl_bench.evaluate.splits import Integers
from ssl_bench.evaluate.training.augment import Pixels, View, draw_views
from ssl_bench.evaluate.training.loader import Draws
from ssl_bench.evaluate.training.seeds import mixed, seeded

Augmentation = Literal["crop", "randaug", "three"]

# RandAugment (9, 0.5): magnitude 9 with noise of std .5, operations that grow with it. What every script of MAE's and
# BEiT's families writes.
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True, eq=False)
class Supervised:
    """One random view of an image, its label, and what will be erased: a box, and the seed of its noise."""

    augmentation: Augmentation
    least_area: float  # of the random crop
    erasing: float  # probability
    image_px: int
    mean: tuple[float, float, float]  # of the network's input: RandAugment fills with it
    labels: Integers

    def __call__(self, image: Image.Image, index: int, rng: np.random.Generator) -> tuple[tuple[Pixels, ...], Draws]:
        """Called in a worker."""
        crop = View((self.least_area, 1.0), "bicubic")
        (pixels,) = draw_views(image, (crop,), image_px=self.image_px, patch_px=1, rng=rng)
        if self.augmentation != "crop":
            cropped = Image.fromarray(pixels.transpose(1, 2, 0))
            if self.augmentation == "randaug":
                changed = rand_augmented(cropped, self.mean, rng)
            else:
                changed = three_augmented(cropped, rng)
            pixels = np.ascontiguousarray(np.asarray(changed).transpose(2, 0, 1))
        box = draw_box(self.erasing, self.image_px, rng)
        seed = np.asarray(rng.integers(2**62))
        return (pixels,), (self.labels[index : index + 1].reshape(()), np.asarray(box, np.int64), seed)


def rand_augmented(image: Image.Image, mean: tuple[float, ...], rng: np.random.Generator) -> Image.Image:
    """timm's RandAugment, which draws from the global generators: from seeded ones here."""
    with seeded(int(rng.integers(2**62))):
        changed: Image.Image = _rand_augment(mean)(image)
    return changed


@functools.cache
def _rand_augment(mean: tuple[float, ...]) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    # timm's own conventions (its transforms_factory). Its translate_const plays no part: these operations shift by a
    # share of the image.
    settings = {
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(RAND_AUGMENT, settings)
    for operation in transform.ops:
        if operation.name == "PosterizeIncreasing":
            operation.aug_fn = _posterized
    return transform


def _posterized(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The highest bits of every value. timm asks for none of them at its highest level, which new Pillow refuses."""
    mask = 0xFF << (8 - min(bits, 8)) & 0xFF
    return image.point([value & mask for value in range(256)] * 3)


_JITTER = 0.4
_BLUR_RADIUS = (0.1, 2.0)


def three_augmented(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """DeiT III's ThreeAugment: gray, solarized or blurred, with equal chance; then ColorJitter(.4, .4, .4)."""
    which = int(rng.integers(3))
    if which == 0:
        image = image.convert("L").convert("RGB")
    elif which == 1:
        image = ImageOps.solarize(image)
    else:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*_BLUR_RADIUS)))
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in rng.permutation(len(enhancers)).tolist():
        image = enhancers[number](image).enhance(rng.uniform(1 - _JITTER, 1 + _JITTER))
    return image


Box = tuple[int, int, int, int]  # top, left, height, width
_NO_BOX: Box = (0, 0, 0, 0)
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_TRIES = 10


def draw_box(probability: float, side: int, rng: np.random.Generator) -> Box:
    """Random erasing's box with timm's defaults; nothing with one minus the probability, or if ten tries do not fit."""
    if rng.random() >= probability:
        return _NO_BOX
    for _ in range(_TRIES):
        area = rng.uniform(*_ERASED_AREA) * side * side
        aspect = math.exp(rng.uniform(*_ERASED_ASPECT))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if high < side and wide < side:
            return int(rng.integers(side - high + 1)), int(rng.integers(side - wide + 1)), high, wide
    return _NO_BOX


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> None:
    """Fill each image's box with normal noise (mode "pixel"), in place. Images are normalized, (B, 3, S, S)."""
    generator = torch.Generator(images.device)
    for image, (top, left, high, wide), seed in zip(images, boxes.tolist(), seeds.tolist(), strict=True):
        if high:
            generator.manual_seed(seed)
            noise = torch.randn(3, high, wide, generator=generator, device=images.device)
            image[:, top : top + high, left : left + wide] = noise


# So many images of a batch share one draw of mixup or cutmix. In the official scripts it is what a GPU computes at a
# time, 32 to 128 images; here it does not depend on the machine.
MIXED_TOGETHER = 128
_MIXING = 1  # keeps this stream apart from others of the same step


@dataclass(frozen=True)
class Mixing:
    """timm's Mixup: in half of the cases mixup, else cutmix; partners share their draw, labels are smoothed.

    Partners are neighbors in the batch, where timm pairs the first with the last: the batch is in random order anyway,
    and so every process finds the partners of its images among its own.
    """

    mixup: float
    cutmix: float
    smoothing: float
    classes: int

    @property
    def pairs(self) -> bool:
        """Whether images are mixed at all; then each process needs an even number of them."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor, *, seed: int, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Mixed images, and targets (B, classes) that sum to 1. `first`: the first image's place in the whole batch."""
        from timm.data.mixup import Mixup, mixup_target

        if not self.pairs:
            return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
        assert len(images) % 2 == first % 2 == 0
        mix = Mixup(self.mixup, self.cutmix, label_smoothing=self.smoothing, num_classes=self.classes)
        images, start = images.clone(), 0
        targets = torch.empty(len(images), self.classes, device=images.device)
        while start < len(images):
            group = (first + start) // MIXED_TOGETHER
            stop = min(len(images), (group + 1) * MIXED_TOGETHER - first)
            # timm's partners are the first and the last, the second and the last but one, ...
            order = torch.cat([torch.arange(start, stop, 2), torch.arange(start + 1, stop, 2).flip(0)])
            order = order.to(images.device)
            with seeded(seed, step, group, _MIXING):
                images[order], targets[order] = mix(images[order], labels[order])
            start = stop
        return images, targets


_DROPPING = 2


class DropPath(torch.nn.Module):
    """timm's DropPath, with its random numbers given from outside: by an image's place in the whole batch."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.uniform: Tensor | None = None  # (B,)

    def forward(self, x: Tensor) -> Tensor:
        """Drop the branch for a share of the images, and scale it up for the others."""
        if not self.training:
            return x
        assert self.uniform is not None
        kept = (self.uniform >= self.share).to(x.dtype) / (1 - self.share)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def with_own_drop_path(network: torch.nn.Module) -> list[DropPath]:
    """Put our DropPath in the place of timm's; returns them in the network's order."""
    from timm.layers import DropPath as TimmDropPath

    placed = []
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TimmDropPath):
                own = DropPath(child.drop_prob)
                setattr(module, name, own)
                placed.append(own)
    return placed


def draw_drop_path(count: int, batch: int, *, seed: int, step: int) -> Tensor:
    """For `count` branches and the images of the whole batch, uniform numbers. (count, batch)"""
    generator = torch.Generator().manual_seed(mixed(seed, step, 0, _DROPPING))
    return torch.rand(count, batch, generator=generator)
