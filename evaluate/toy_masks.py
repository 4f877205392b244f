"""The toy world in the layouts of datasets with masks, each with the values that the real files have.

    write_ade20k(folder)        400 + 100 scenes of one to four objects, 96 x 128 px
    write_cityscapes(folder)    the same of 96 x 192 px, in two cities
    write_voc(folder)           the same as ADE20K's; one training image of four has its mask in SegmentationClassAug
    write_imagenet_s(folder)    one object an image, 96 x 96 px, in folders by its class

What no object covers, clutter and occluder with it, is a class of its own: the background (in ImageNet-S, "other").
In every layout something is ignored, as in the real datasets. Where a background pixel touches an object, both mix in
it: there the masks say 0 (ADE20K), 255 (VOC) or 1000 (ImageNet-S). In Cityscapes the lowest rows are label id 1, ego
vehicle. All else is exact. Its classes are official ones, which stand for the toy world's (CITYSCAPES_IDS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssl_bench.evaluate.toy_coco import grown, labels_of
from ssl_bench.evaluate.toy_files import png_bytes
from ssl_bench.evaluate.toyworld import CLASSES, Bytes, Scene, at_least, check, scene
from ssl_bench.progress import Report

TOY_MASKS_VERSION = 1  # raised with every change of a byte
TRAIN, VAL = 400, 100
SIZES_PX = {  # height, width
    "toy-ade20k": (96, 128),
    "toy-cityscapes": (96, 192),
    "toy-voc": (96, 128),
    "toy-imagenet-s": (96, 96),
}
# Label id of the background (road), and of each of CLASSES. From both ends of the table, with gaps.
CITYSCAPES_IDS = (7, 8, 12, 17, 20, 22, 24, 26, 28, 32, 33)
EGO_VEHICLE_ID, EGO_VEHICLE_PX = 1, 6  # rows
_CITIES = ("aurich", "bremerhaven")
_IMAGENET_S_IGNORED = 1000


def write_ade20k(
    folder: Path, *, train: int = TRAIN, val: int = VAL, seed: int = 0, progress: Report | None = None
) -> None:
    """images/, annotations/ and objectInfo150.txt, which names eleven classes here."""
    counts = {"train": train, "val": val}
    names = {"train": "training", "val": "validation"}
    for split, index, picture in _scenes("toy-ade20k", counts, seed, progress):
        name = f"{names[split]}/ADE_{split}_{1 + index:08d}.png"
        mask = np.where(_mixed(picture), 0, 1 + picture.semantic).astype(np.uint8)
        _write(folder / "images" / name, picture.image)
        _write(folder / "annotations" / name, mask)
    rows = [f"{1 + k}\t0.0909\t{train}\t{val}\t{name}" for k, name in enumerate(("background", *CLASSES))]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]), encoding="utf-8")


def write_cityscapes(
    folder: Path, *, train: int = TRAIN, val: int = VAL, seed: int = 0, progress: Report | None = None
) -> None:
    """leftImg8bit/ and gtFine/, of which only the label ids are written."""
    ids = np.array(CITYSCAPES_IDS, np.uint8)
    for split, index, picture in _scenes("toy-cityscapes", {"train": train, "val": val}, seed, progress):
        city = _CITIES[index % len(_CITIES)]
        name = f"{split}/{city}/{city}_{index:06d}_000019"
        mask = ids[picture.semantic]
        mask[-EGO_VEHICLE_PX:] = EGO_VEHICLE_ID
        _write(folder / "leftImg8bit" / f"{name}_leftImg8bit.png", picture.image)
        _write(folder / "gtFine" / f"{name}_gtFine_labelIds.png", mask)


def write_voc(
    folder: Path, *, train: int = TRAIN, val: int = VAL, seed: int = 0, progress: Report | None = None
) -> None:
    """JPEGImages/, SegmentationClass/ (palette), SegmentationClassAug/ (gray), ImageSets/ and classes.txt."""
    lists: dict[str, list[str]] = {"train": [], "trainaug": [], "val": []}
    for split, index, picture in _scenes("toy-voc", {"train": train, "val": val}, seed, progress):
        name = f"{2007 if split == 'train' else 2008}_{1 + index:06d}"
        is_augmented = split == "train" and index % 4 == 3
        mask = np.where(_mixed(picture), 255, picture.semantic).astype(np.uint8)
        _write(folder / "JPEGImages" / f"{name}.png", picture.image)
        if is_augmented:
            _write(folder / "SegmentationClassAug" / f"{name}.png", mask)
        else:
            _write(folder / "SegmentationClass" / f"{name}.png", mask, palette=voc_palette())
            lists[split].append(name)
        if split == "train":
            lists["trainaug"].append(name)
    place = folder / "ImageSets" / "Segmentation"
    place.mkdir(parents=True)
    for file, names in lists.items():
        (place / f"{file}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(("background", *CLASSES, "")), encoding="utf-8")


def write_imagenet_s(
    folder: Path, *, train: int = TRAIN, val: int = VAL, seed: int = 0, progress: Report | None = None
) -> None:
    """{train-semi,validation}/CLASS/ and {train-semi,validation}-segmentation/CLASS/; 0 is "other"."""
    at_least(len(CLASSES), train=train, val=val)  # an empty folder would be lost, and every later number with it
    names = {"train": "train-semi", "val": "validation"}
    for split, index, picture in _scenes("toy-imagenet-s", {"train": train, "val": val}, seed, progress):
        values = np.where(_mixed(picture), _IMAGENET_S_IGNORED, picture.semantic.astype(np.uint16))
        mask = np.stack([values % 256, values // 256, np.zeros_like(values)], axis=-1).astype(np.uint8)
        label = CLASSES[picture.instances[0].label]
        name = f"{label}/{label}_{index:05d}.png"
        _write(folder / names[split] / name, picture.image)
        _write(folder / f"{names[split]}-segmentation" / name, mask)


Writer = Callable[..., None]
WRITERS: dict[str, Writer] = {
    "toy-ade20k": write_ade20k,
    "toy-cityscapes": write_cityscapes,
    "toy-voc": write_voc,
    "toy-imagenet-s": write_imagenet_s,
}


def voc_palette() -> Bytes:
    """(256, 3): VOC's colors. The bits of an index, three at a time, are the highest bits of red, green and blue."""
    index, colors = np.arange(256), np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = (index >> (3 * place + channel)) & 1
            colors[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colors


def _scenes(name: str, counts: dict[str, int], seed: int, progress: Report | None) -> Iterator[tuple[str, int, Scene]]:
    """Split, index, scene; ImageNet-S has one object in each, the others one to four."""
    height, width = SIZES_PX[name]
    at_least(1, **counts)
    check(seed=seed, index=0, height_px=height, width_px=width, labels=(0,))
    done = 0
    for split, count in counts.items():
        for index in range(count):
            labels = None if name == "toy-imagenet-s" else labels_of(seed, split, index)
            yield (
                split,
                index,
                scene(seed=seed, split=split, index=index, height_px=height, width_px=width, labels=labels),
            )
            done += 1
            if progress is not None:
                progress(done, sum(counts.values()))


def _mixed(picture: Scene) -> npt.NDArray[np.bool_]:
    """(H, W): background that shares an edge with an object."""
    covered = picture.semantic > 0
    return grown(covered) & ~covered


def _write(path: Path, pixels: Bytes, *, palette: Bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(pixels, palette=palette))
