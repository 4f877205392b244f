"""Images with objects and their exact masks: one view over COCO's instances and over datasets with class masks.

    open_objects("toy-coco"), open_objects("coco")       every annotated object is an object
    open_objects("voc"), open_objects("toy-ade20k")      every class in an image is one object: its region

COCO's objects are filled and laid over each other by evaluate/mask_sources.py, smaller ones over larger ones, so that a
pixel belongs to one object at most. Crowd regions, boxes without an outline and void pixels belong to nobody: they are
ignored. In class masks the first class is no object if it is called background, or other (ImageNet-S): it is what no
object covers. All other classes are objects, those of ADE20K and Cityscapes that are called stuff too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_bench.evaluate.coco import COCO, AnnotatedFiles, Annotations, Coco, open_coco
from ssl_bench.evaluate.mask_sources import IGNORE, CocoMasks, Mask, MaskFiles
from ssl_bench.evaluate.masks import MASKS, Masks, open_masks
from ssl_bench.evaluate.splits import Split
from ssl_bench.files import expanded

__all__ = ["IGNORE", "OBJECTS", "ObjectImage", "ObjectMasks", "open_objects"]

OBJECTS: dict[str, str] = COCO | {name: what for name, what in MASKS.items() if name not in COCO}

_NO_OBJECT = ("background", "other")


@dataclass(frozen=True, eq=False)
class ObjectImage:
    """One image and its objects."""

    image: Image.Image  # RGB
    numbers: Mask  # (H, W): 0 is no object, 1 + k the k-th object, or IGNORE
    ids: tuple[int, ...]  # of the objects: COCO's annotation, or the class
    categories: tuple[int, ...]  # of the objects: index into the dataset's categories
    crowds: int = 0  # annotated, and no objects: ignored
    without_outline: int = 0  # boxes alone: ignored too


@dataclass(frozen=True, eq=False)
class ObjectMasks:
    """A dataset of images with objects, as opened."""

    name: str
    root: Path
    built_in: bool
    splits: Mapping[str, Split]  # train, val, or one of them
    categories: tuple[str, ...]
    opened: Coco | Masks
    notes: tuple[str, ...] = ()

    @property
    def has_instances(self) -> bool:
        """Whether two objects of one category are two objects, and not one region."""
        return isinstance(self.opened, Coco)

    def objects(self, split: str, index: int) -> ObjectImage:
        """Read one image and its objects. An object that others cover altogether is there, without a pixel."""
        source = self.splits[split].source
        assert isinstance(source, (MaskFiles, CocoMasks))
        index = range(len(self.splits[split]))[index]
        image = source.image(index)
        mask = source.mask(index, image.size)
        if isinstance(self.opened, Coco):
            annotations = self.opened.annotations[split]
            every = np.array(annotations.rows(index), np.int64)
            rows, crowds = every[_is_object(annotations)[every]], int(annotations.crowd[every].sum())
            ids, categories = annotations.id[rows].tolist(), annotations.category[rows].tolist()
            boxes_alone = len(every) - len(rows) - crowds
            return ObjectImage(image, mask, tuple(ids), tuple(categories), crowds, boxes_alone)
        skipped = len(self.opened.classes) - len(self.categories)
        present = np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE])
        objects = present[present >= skipped]
        table = np.zeros(IGNORE + 1, np.uint16)
        table[objects], table[IGNORE] = 1 + np.arange(len(objects)), IGNORE
        return ObjectImage(image, table[mask], tuple(objects.tolist()), tuple((objects - skipped).tolist()))

    def limited(self, limit: int) -> ObjectMasks:
        """A part of so many images a split, as the dataset itself chooses them."""
        return _seen(self.opened.limited(limit))


def open_objects(spec: str) -> ObjectMasks:
    """Open a dataset of images with objects by name or path; a name wins, `./name` is a path."""
    is_coco = spec in COCO or (spec not in MASKS and any(expanded(spec).glob("annotations/instances_*.json")))
    return _seen(open_coco(spec) if is_coco else open_masks(spec))


def _seen(opened: Coco | Masks) -> ObjectMasks:
    if isinstance(opened, Coco):
        splits, categories = {name: _numbered(opened, name) for name in opened.splits}, opened.categories
    else:
        splits, categories = dict(opened.splits), opened.classes[opened.classes[0] in _NO_OBJECT :]
    return ObjectMasks(opened.name, opened.root, opened.built_in, splits, categories, opened, opened.notes)


def _numbered(coco: Coco, name: str) -> Split:
    """The split with masks that say the place of an object in its image where CocoMasks would say its category."""
    split, annotations = coco.splits[name], coco.annotations[name]
    assert isinstance(split.source, AnnotatedFiles)
    before = np.concatenate([[0], np.cumsum(_is_object(annotations))])
    first = np.searchsorted(annotations.image, annotations.image)  # of the image's annotations
    numbered = replace(annotations, category=before[:-1] - before[first])
    return replace(split, source=CocoMasks(split.source, numbered, str(coco.files[name])))


def _is_object(annotations: Annotations) -> np.ndarray:
    """No crowd, and with an outline. (n,)"""
    outlines = annotations.outlines
    has_outline = np.diff(outlines.bounds) > 0
    has_outline[list(outlines.runs)] = True
    return ~annotations.crowd & has_outline
