"""Images with masks on their way into mmseg: read by us, transformed by mmseg's classes, packed as mmseg wants them.

Training as in all configs that the papers used: scaled by .5 to 2 around the dataset's scale, cropped so that no class
fills more than three quarters, mirrored, colors distorted. Or as ImageNet-S's official code does: RandomResizedCrop.
Val images are scaled and their masks are not: predictions are brought back to the size of the mask and scored there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mmcv.transforms import RandomResize
from mmseg.datasets.transforms import PackSegInputs, PhotoMetricDistortion, RandomCrop, RandomFlip, Resize
from PIL import Image, ImageFilter
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, resize, resized_crop

from ssl_bench.evaluate.masks import IGNORE, Masks
from ssl_bench.protocols.openmm.quiet import quiet

if TYPE_CHECKING:
    from ssl_bench.protocols.semseg import Recipe

Config = dict[str, Any]
Results = dict[str, Any]  # what mm's transforms hand on: img (BGR, uint8), gt_seg_map, ...

_META = ("index", "ori_shape", "img_shape", "pad_shape", "scale_factor", "flip", "flip_direction")


class Scenes:
    """One split behind its transforms (loading.Samples)."""

    def __init__(self, masks: Masks, split: str, steps: Sequence[Config]) -> None:
        """`steps` are configs: a class under "type", and its arguments."""
        self.masks, self.split = masks, split
        self.metainfo: Mapping[str, Any] = {"classes": masks.classes}
        with quiet():  # mmcv's RandomResize looks its parts up in a registry, which makes a logger that prints
            self.steps = [_made(step) for step in steps]

    def __len__(self) -> int:
        """How many images."""
        return len(self.masks.splits[self.split])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Called in a worker."""
        image, mask = self.masks.pair(self.split, index)
        pixels, size = np.ascontiguousarray(np.asarray(image)[:, :, ::-1]), (image.height, image.width)
        results: Results = {"img": pixels, "index": index, "ori_shape": size, "img_shape": size, "mask": mask}
        for step in self.steps:
            results = step(results)
        packed: dict[str, Any] = results
        return packed


def training(recipe: Recipe, scale_px: tuple[int, int]) -> list[Config]:
    """What happens to an image of train."""
    if recipe.augmentation == "scale":
        steps: list[Config] = [
            {
                "type": RandomResize,
                "scale": scale_px,
                "ratio_range": (0.5, 2.0),
                "resize_type": Scaled,
            },
            {"type": RandomCrop, "crop_size": (recipe.crop_px,) * 2, "cat_max_ratio": 0.75, "ignore_index": IGNORE},
            {"type": RandomFlip, "prob": 0.5},
            {"type": PhotoMetricDistortion},
        ]
    else:
        colors = recipe.augmentation == "resized-crop+colors"
        steps = [{"type": ResizedCrop, "side": recipe.crop_px, "colors": colors}]
    return [{"type": WithMask}, *steps, {"type": Packed, "meta_keys": _META}]


def scoring(recipe: Recipe, scale_px: tuple[int, int]) -> list[Config]:
    """What happens to an image of val."""
    scaled: Config = {"type": Scaled, "scale": scale_px}
    if recipe.resize_px is not None:
        scaled = {"type": ShortSide, "side": recipe.resize_px}
    return [scaled, {"type": WithMask}, {"type": Packed, "meta_keys": _META}]


def _made(step: Config) -> Any:
    return step["type"](**{name: value for name, value in step.items() if name != "type"})


class WithMask:
    """Transforms after this one change the mask too."""

    def __call__(self, results: Results) -> Results:
        """mmseg's names for it."""
        mask = results.pop("mask")
        return {**results, "gt_seg_map": mask, "seg_fields": ["gt_seg_map"]}


class Scaled(Resize):
    """As large as fits into the scale, at the ratio of the image; thin images keep a pixel, where mmseg's fails."""

    def _resize_img(self, results: Results) -> None:
        sides = results["img"].shape[1::-1]
        factor = min(side / own for side, own in zip(sorted(results["scale"]), sorted(sides), strict=True))
        results["scale"] = tuple(max(1, int(side * factor + 0.5)) for side in sides)
        super()._resize_img(results)


class Packed(PackSegInputs):
    """mmseg's, of copies: a mirrored column of one pixel counts as contiguous, and torch refuses its stride."""

    def transform(self, results: Results) -> Results:
        """To tensors."""
        copies = {name: results[name].copy() for name in ("img", "gt_seg_map")}
        packed: Results = super().transform({**results, **copies})
        return packed


@dataclass(frozen=True)
class ShortSide:
    """torchvision's Resize on PIL images, as in ImageNet-S's official code: antialiased, which mmcv's is not."""

    side: int

    def __call__(self, results: Results) -> Results:
        """The image only."""
        return {**results, **_image(resize(_pil(results["img"]), [self.side], InterpolationMode.BILINEAR))}


@dataclass(frozen=True)
class ResizedCrop:
    """RandomResizedCrop of 14 to 100 % of the area, flip and, with `colors`, SimCLR's colors and blur.

    As in LUSSeg/ImageNetSegModel util/datasets.py. torch's generator is drawn from too; the loader seeds all three.
    """

    side: int
    colors: bool

    def __call__(self, results: Results) -> Results:
        """Image and mask at the same place."""
        image, mask = _pil(results["img"]), Image.fromarray(results["gt_seg_map"])
        box = RandomResizedCrop.get_params(image, [0.14, 1.0], [3 / 4, 4 / 3])
        image = resized_crop(image, *box, [self.side] * 2, InterpolationMode.BILINEAR)
        mask = resized_crop(mask, *box, [self.side] * 2, InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, mask = hflip(image), hflip(mask)
        if self.colors:
            image = _colored(image)
        return {**results, **_image(image), "gt_seg_map": np.asarray(mask)}


def _colored(image: Image.Image) -> Image.Image:
    if random.random() < 0.8:
        image = ColorJitter(0.8, 0.8, 0.8, 0.2)(image)
    if random.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return image


def _pil(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[:, :, ::-1])


def _image(image: Image.Image) -> Mapping[str, Any]:
    return {"img": np.ascontiguousarray(np.asarray(image)[:, :, ::-1]), "img_shape": (image.height, image.width)}
