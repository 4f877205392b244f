"""Images with boxes and masks on their way into mmdet: what a sample holds, and the transforms of training and val."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mmcv.transforms import RandomChoice, RandomChoiceResize, RandomResize
from mmdet.datasets.transforms import (
    FilterAnnotations,
    LoadAnnotations,
    PackDetInputs,
    RandomCrop,
    RandomFlip,
    Resize,
)
from mmengine.dataset import Compose

from ssl_bench.evaluate.coco import Annotations
from ssl_bench.evaluate.splits import Integers, Split
from ssl_bench.protocols.openmm.quiet import quiet

if TYPE_CHECKING:
    from ssl_bench.protocols.detection import Recipe

Transforms = list[dict[str, Any]]

_PACK = {
    "type": PackDetInputs,
    "meta_keys": ("index", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction"),
}


@dataclass(frozen=True, eq=False)
class Learned:
    """What is learned from: the usable objects, each with its mask. A crowd comes along, marked as to be ignored."""

    annotations: Annotations
    usable: npt.NDArray[np.bool_]  # (n,) of all objects

    def of(self, image: int) -> list[dict[str, Any]]:
        """The instances of one image, as mmdet's datasets give them."""
        found = self.annotations
        return [
            {
                "bbox": [*found.box[row, :2], *(found.box[row, :2] + found.box[row, 2:])],
                "bbox_label": int(found.category[row]),
                "ignore_flag": int(found.crowd[row]),
                "mask": found.outlines[row],
            }
            for row in found.rows(image)
            if self.usable[row] or found.crowd[row]
        ]


class Objects:
    """Images of a split behind a pipeline; without objects for val, which is scored against its file."""

    def __init__(
        self,
        split: Split,
        transforms: Transforms,
        classes: Sequence[str],
        *,
        images: Integers,
        learned: Learned | None = None,
    ) -> None:
        """`images` are places in the split."""
        self.split, self.images, self.learned = split, images, learned
        self.metainfo: Mapping[str, Any] = {"classes": tuple(classes)}
        with quiet():  # the first thing that mm's registries build makes a logger for standard output
            self.pipeline = Compose(transforms)

    def __len__(self) -> int:
        """How many images."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One of them, transformed and packed."""
        place = int(self.images[index])
        image = np.asarray(self.split.image(place))
        size = image.shape[:2]
        packed: dict[str, Any] = self.pipeline(
            {
                "img": np.ascontiguousarray(image[..., ::-1]),  # mm's images are blue, green, red
                "img_shape": size,
                "ori_shape": size,
                "index": index,
                "instances": [] if self.learned is None else self.learned.of(place),
            }
        )
        return packed


def training_transforms(recipe: Recipe) -> Transforms:
    """Flip, then sizes. The sides of mm's scales are in any order: the image gets as large as both allow."""
    start = [{"type": LoadAnnotations, "with_bbox": True, "with_mask": True}, {"type": RandomFlip, "prob": 0.5}]
    return [*start, *_sizes(recipe), _PACK]


def _sizes(recipe: Recipe) -> Transforms:
    if recipe.augmentation == "jitter":  # large-scale jitter: ViTDet's loader, coco_loader_lsj.py
        square = (recipe.longer_px, recipe.longer_px)
        return [
            {"type": RandomResize, "scale": square, "ratio_range": (0.1, 2.0), "keep_ratio": True, **_RESIZE},
            {"type": RandomCrop, "crop_size": square, "recompute_bbox": True, "allow_negative_crop": True},
            {"type": FilterAnnotations, "min_gt_bbox_wh": (1e-2, 1e-2), "keep_empty": False},
        ]
    chosen = _one_of(recipe.shorter_px, recipe.longer_px)
    if recipe.augmentation == "multi-scale":
        return [chosen]
    # DETR's, as in iBOT's and CAE's configs: the image as a whole, or a part of it that then gets as large.
    crop = {"type": RandomCrop, "crop_type": "absolute_range", "crop_size": (384, 600), "allow_negative_crop": True}
    part = [_one_of((400, 500, 600), recipe.longer_px), crop, chosen]
    return [{"type": RandomChoice, "transforms": [[chosen], part]}]


_RESIZE = {"resize_type": Resize}  # mmdet's, which resizes boxes and masks too


def _one_of(shorter_px: Sequence[int], longer_px: int) -> dict[str, Any]:
    scales = [(side, longer_px) for side in shorter_px]
    return {"type": RandomChoiceResize, "scales": scales, "keep_ratio": True, **_RESIZE}


def val_transforms(recipe: Recipe) -> Transforms:
    """One size: the largest of training."""
    scale = (recipe.longer_px, max(recipe.shorter_px))
    return [{"type": Resize, "scale": scale, "keep_ratio": True}, _PACK]
