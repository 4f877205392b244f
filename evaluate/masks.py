"""Open any dataset of images with a mask each, for semantic segmentation, where it lies, in its own layout.

    open_masks("ade20k"), open_masks("voc-aug")     names: looked for under SSL_BENCH_DATA
    open_masks("/data/mine")                        a path: the layout is recognized by looking
    open_masks("coco")                              COCO's objects, made into one mask an image
    open_masks("toy-cityscapes")                    the toy world in that layout, made on first use

The layouts are in mask_layouts.py, the pixels in mask_sources.py. A mask holds classes from 0 on, or IGNORE, whatever
the files say. The manifest of a split holds a hash of every mask: with a changed mask it is another dataset.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import AnnotatedFiles, open_coco
from ssl_bench.evaluate.mask_layouts import (
    LAYOUTS,
    Opened,
    open_ade20k,
    open_cityscapes,
    open_imagenet_s,
    open_voc_aug,
    open_voc_plain,
)
from ssl_bench.evaluate.mask_sources import IGNORE, CocoMasks, Mask, MaskFiles
from ssl_bench.evaluate.splits import Split, name_of
from ssl_bench.files import atomic_folder, cache_folder, data_folder, expanded
from ssl_bench.progress import follow

__all__ = ["IGNORE", "MASKS", "Masks", "looks_like_masks", "open_masks"]

_SCALE_PX = (2048, 512)
BACKGROUND = "background"  # COCO: what no object covers


@dataclass(frozen=True, eq=False)
class Masks:
    """A dataset of images with masks, as opened. Its splits' only class is "unlabeled": classes are of pixels."""

    name: str
    root: Path
    built_in: bool
    splits: Mapping[str, Split]  # train, val, or one of them
    classes: tuple[str, ...]
    scale_px: tuple[int, int]  # longer and shorter side that images are resized to; the toy world's are as stored
    layout: str = ""  # in words
    notes: tuple[str, ...] = ()

    def pair(self, split: str, index: int) -> tuple[Image.Image, Mask]:
        """An image, RGB, and its mask (H, W): classes, or IGNORE."""
        source = self.splits[split].source
        assert isinstance(source, (MaskFiles, CocoMasks))
        image = self.splits[split].image(index)
        return image, source.mask(range(len(self.splits[split]))[index], image.size)

    def subset(self, split: str, indices: Sequence[int] | npt.NDArray[np.generic]) -> Masks:
        """The same with a part of one split."""
        return replace(self, splits={**self.splits, split: self.splits[split].subset(indices)})

    def limited(self, limit: int) -> Masks:
        """So many images of every split, evenly spaced: the first ones may all be of one city, or of one class."""
        splits = {}
        for name, split in self.splits.items():
            count = min(limit, len(split))
            splits[name] = split.subset(np.arange(count) * len(split) // max(count, 1))
        return replace(self, splits=splits)


@dataclass(frozen=True)
class Known:
    """A dataset that can be given by name."""

    what: str
    complete: tuple[int, int, int]  # classes, images of train and of val
    open: Callable[[Path], Opened]
    folders: tuple[str, ...]  # under SSL_BENCH_DATA, beside the dataset's name itself
    page: str  # that offers it for download
    scale_px: tuple[int, int] = _SCALE_PX  # as mmseg's configs have it


def _imagenet_s(classes: int, train: int, val: int) -> Known:
    return Known(
        f"ImageNet-S of {classes} classes: {train:,} + {val:,} images of the semi-supervised protocol",
        complete=(classes + 1, train, val),
        open=open_imagenet_s,
        folders=(f"ImageNetS{classes}", f"imagenet-s/ImageNetS{classes}", f"ImageNet-S/ImageNetS{classes}"),
        page="LUSSeg/ImageNet-S",
    )


_VOC_FOLDERS = ("voc", "VOC2012", "VOCdevkit/VOC2012", "voc/VOC2012", "voc/VOCdevkit/VOC2012")
# fmt: off
KNOWN: dict[str, Known] = {
    "ade20k": Known("ADE20K: 20,210 + 2,000 images, 150 classes", (150, 20_210, 2_000), open_ade20k,
                    ("ADEChallengeData2016", "ade20k/ADEChallengeData2016"), "MIT Scene Parsing Benchmark"),
    "cityscapes": Known("Cityscapes, fine annotations: 2,975 + 500 images, 19 classes", (19, 2_975, 500),
                        open_cityscapes, (), "The Cityscapes Dataset", (2048, 1024)),
    "voc": Known("PASCAL VOC 2012: 1,464 + 1,449 images, 21 classes with the background", (21, 1_464, 1_449),
                 open_voc_plain, _VOC_FOLDERS, "The PASCAL Visual Object Classes Challenge 2012"),
    "voc-aug": Known("PASCAL VOC 2012, augmented: 10,582 + 1,449 images", (21, 10_582, 1_449),
                     open_voc_aug, _VOC_FOLDERS, "The PASCAL Visual Object Classes Challenge 2012"),
    "imagenet-s-919": _imagenet_s(919, 9_190, 12_419),
    "imagenet-s-300": _imagenet_s(300, 3_000, 4_097),
    "imagenet-s-50": _imagenet_s(50, 500, 752),
}
_TOY: dict[str, tuple[str, Callable[[Path], Opened]]] = {  # complete: 400 + 100 images
    "toy-ade20k": ("the toy world in ADE20K's layout: its 10 classes and the background", open_ade20k),
    "toy-cityscapes": ("the toy world in Cityscapes' layout: 11 of the 19 classes are there", open_cityscapes),
    "toy-voc": ("the toy world in PASCAL VOC's layout, augmented", open_voc_aug),
    "toy-imagenet-s": ("the toy world in ImageNet-S's layout: one object an image", open_imagenet_s),
}
# fmt: on
MASKS: dict[str, str] = {
    **{name: f"{what}, 400 + 100 images" for name, (what, _) in _TOY.items()},
    **{name: known.what for name, known in KNOWN.items()},
    "toy-coco": "toy-coco, its objects made into masks: 400 + 200 images, 11 classes with the background",
    "coco": "COCO 2017, its objects made into masks: 81 classes with the background",
}


def open_masks(spec: str) -> Masks:
    """Open a dataset of images with masks by name or path; a name wins, `./name` is a path."""
    try:
        if spec in _TOY:
            return _open_toy(spec)
        if known := KNOWN.get(spec):
            return _open_name(spec, known)
        root = expanded(spec)
        if spec in MASKS or _is_coco(root):
            return _of_coco(spec)
        return _open_path(spec, root)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or spec}: {error.strerror or error}.") from error


def looks_like_masks(root: Path) -> bool:
    """Whether a folder has one of the layouts with masks, perhaps not completely."""
    return any(layout.recognizes(root) for layout in LAYOUTS.values())


def known_places(name: str) -> list[Path]:
    """Where a dataset of masks is looked for."""
    return [data_folder() / folder for folder in dict.fromkeys((name, *KNOWN[name].folders))]


def _open_name(name: str, known: Known) -> Masks:
    places = known_places(name)
    # An empty or half-unpacked folder of that name must not hide the dataset that lies one folder deeper.
    for place in sorted(filter(Path.is_dir, places), key=looks_like_masks, reverse=True):
        return _named(known.open(place), name, place, scale_px=known.scale_px)
    raise UserError(
        f"dataset {name!r} ({known.what}) is not in {data_folder()}. Expected {places[0]}"
        f"{f' or {places[1]}' if len(places) > 1 else ''}; see the page {known.page!r}. Set SSL_BENCH_DATA to the "
        "folder that holds it, or give its path instead of its name."
    )


def _open_path(spec: str, root: Path) -> Masks:
    if not root.is_dir():
        found = f"{root} is a file" if root.exists() else f"there is no folder {root}"
        raise UserError(f"{spec} is no dataset of images with masks: {found}. {_expected()}")
    for name, layout in LAYOUTS.items():
        if layout.recognizes(root):
            scale_px = KNOWN["cityscapes"].scale_px if name == "cityscapes" else _SCALE_PX
            return _named(layout.open(root), name_of(root), root, scale_px=scale_px)
    nearby = [*root.resolve().parents[:2], *(child for child in sorted(root.glob("*")) + sorted(root.glob("*/*")))]
    hint = next((f" It looks as if {place} were meant: give that." for place in nearby if looks_like_masks(place)), "")
    raise UserError(f"{root} holds no images with masks in a known layout.{hint} {_expected()}")


def _expected() -> str:
    layouts = "; ".join(layout.expected for layout in LAYOUTS.values())
    return f"Expected one of {', '.join(MASKS)}, or a folder with {layouts}; or with COCO's annotations."


def _named(opened: Opened, name: str, root: Path, *, scale_px: tuple[int, int], built_in: bool = False) -> Masks:
    splits, classes, layout, notes = opened
    return Masks(name, root, built_in, splits, classes, scale_px, layout, notes)


def _open_toy(name: str) -> Masks:
    from ssl_bench.evaluate import toy_masks, toyworld

    versions = f"v{toyworld.WORLD_VERSION}.{toy_masks.TOY_MASKS_VERSION}"
    folder = cache_folder() / "datasets" / f"{name}-{versions}-seed0"
    write, (height, width) = toy_masks.WRITERS[name], toy_masks.SIZES_PX[name]
    if not folder.is_dir():
        with atomic_folder(folder) as temporary, follow(f"making {name}") as report:
            write(temporary, progress=report)
    scale_px = (max(height, width), min(height, width))
    return _named(_TOY[name][1](folder), name, folder, scale_px=scale_px, built_in=True)


def _is_coco(root: Path) -> bool:
    return (root / "annotations").is_dir() and any((root / "annotations").glob("instances_*.json"))


def _of_coco(spec: str) -> Masks:
    """Every image of COCO's with a mask made of its objects."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            f"{spec} becomes masks with the package pycocotools, which is not installed. It comes with mmdetection: "
            "pip install 'ssl-bench[openmm]'."
        )
    coco = open_coco(spec)
    splits = {}
    for name, split in coco.splits.items():
        assert isinstance(split.source, AnnotatedFiles)
        source = CocoMasks(split.source, coco.annotations[name], str(coco.files[name]))
        splits[name] = replace(split, source=source)
    longer, shorter = _SCALE_PX
    if coco.built_in:
        from ssl_bench.evaluate.toy_coco import SIZE_PX

        longer = shorter = SIZE_PX
    classes = (BACKGROUND, *coco.categories)
    layout = "COCO's instances as masks"
    return Masks(coco.name, coco.root, coco.built_in, splits, classes, (longer, shorter), layout, coco.notes)
