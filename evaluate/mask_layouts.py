"""The layouts of segmentation datasets: which files are images, which are their masks, and what a mask's values mean.

ADE20K       images/{training,validation}/NAME.jpg, annotations/{training,validation}/NAME.png
             0 is ignored, k is class k - 1; names from objectInfo150.txt if it is there, else the official 150
Cityscapes   leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png, gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png
             the 34 label ids become the 19 classes that are evaluated; the others, and 255 (license plate, -1), are
             ignored. No *_labelTrainIds.png are needed
VOC          JPEGImages/NAME.jpg, SegmentationClass/NAME.png, ImageSets/Segmentation/{train,val}.txt
             21 classes with the background, 255 ignored; names from classes.txt, one a line, if it is there
VOC aug      the same, with train = trainaug.txt. A mask is taken from SegmentationClass where there is one, else from
             SegmentationClassAug (palette or gray)
ImageNet-S   {train-semi,validation}/SYNSET/NAME.JPEG, {train-semi,validation}-segmentation/SYNSET/NAME.png
             RGB masks, R + 256 G: 0 is "other", 1000 is ignored, k is the k-th synset in sorted order. "Other" is a
             class like the others in the official evaluation: it counts in the mean
folders      images/{train,val}/**/NAME.jpg, masks/{train,val}/**/NAME.png (or annotations/), classes.txt, one a line
             k is the k-th class, from 0; 255 is ignored

Images may have any suffix (the toy world writes PNG where the official files are JPEG); a mask is a PNG. One of train
and val may be absent. Nothing is decoded here, and each file costs one `stat`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.layouts import list_images, visible_folders
from ssl_bench.evaluate.mask_sources import Coding, MaskFiles
from ssl_bench.evaluate.splits import ImageFiles, Names, Split, shown

ADE20K_CLASSES = Path(__file__).parent / "class_lists" / "ade20k.txt"
# Label id -> class, in the order of the train ids.
CITYSCAPES_CLASSES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
OTHER = "other"  # ImageNet-S: what belongs to none of the synsets
IMAGENET_S = "ImageNet-S (train-semi, validation)"  # its layout in words

Entry = tuple[str, int, int]  # a file's path, its bytes, and when it was modified

_IGNORED_BYTE = 255
_IMAGENET_S_IGNORED = 1000


class Opened(NamedTuple):
    """What a layout holds."""

    splits: dict[str, Split]  # train, val, or one of them
    classes: tuple[str, ...]
    layout: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """One of the above."""

    expected: str
    recognizes: Callable[[Path], bool]
    open: Callable[[Path], Opened]


class _Files:
    """The images of a folder, or its masks, by the name that image and mask share."""

    def __init__(self, folder: Path, what: str, *, ending: str = "", only_png: bool = False) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}. Expected the {what} there; unpack them too.")
        self.folder, self.listing = folder, list_images(folder)
        self.place: dict[str, int] = {}
        for position, name in enumerate(self.listing.names):
            stem, _, suffix = name.rpartition(".")
            if not stem.endswith(ending) or (only_png and suffix.lower() != "png"):
                continue
            key = stem.removesuffix(ending)
            if key in self.place:
                other = self.listing.names[self.place[key]]
                raise UserError(f"{folder} has both {other} and {name}. Expected one of them; remove the other.")
            self.place[key] = position

    def entry(self, key: str, prefix: str = "") -> Entry:
        """One file."""
        position = self.place[key]
        name = f"{prefix}{self.listing.names[position]}"
        return name, int(self.listing.sizes[position]), int(self.listing.modified_ns[position])

    def take(self, keys: Iterable[str]) -> ImageFiles:
        """These files, in this order."""
        return _image_files(self.folder, [self.entry(key) for key in keys])


def _image_files(folder: Path, entries: Sequence[Entry]) -> ImageFiles:
    sizes, modified_ns = (np.array([entry[column] for entry in entries], np.int64) for column in (1, 2))
    return ImageFiles(str(folder), Names(name for name, _, _ in entries), sizes, modified_ns)


def _split(name: str, images: _Files, masks: _Files, coding: Coding, notes: list[str]) -> Split:
    """Every image with its mask; masks without an image are only noted."""
    if not images.place:
        raise UserError(f"{images.folder} holds no images. Unpack the dataset again.")
    keys = list(images.place)
    if missing := [key for key in keys if key not in masks.place]:
        raise UserError(
            f"{len(missing):,} of {len(keys):,} images in {images.folder} have no mask in {masks.folder}: "
            f"{shown(missing)}. Expected a PNG of the same name for each; complete the masks, or remove the images."
        )
    if alone := [key for key in masks.place if key not in images.place]:
        notes.append(f"{len(alone):,} masks in {masks.folder} have no image: {shown(alone)}")
    return _made(name, images.take(keys), masks.take(keys), coding)


def _made(name: str, images: ImageFiles, masks: ImageFiles, coding: Coding) -> Split:
    """Classes are of pixels; a whole image has none."""
    labels = np.zeros(len(images.paths), np.int64)
    return Split(name, ("unlabeled",), labels, images.paths, MaskFiles(images, masks, coding))


def _splits(root: Path, folders: dict[str, str], open_one: Callable[[str, str], Split]) -> dict[str, Split]:
    """Those of train and val whose image folder (with {} for the official name of the split) is there."""
    where, found = folders["images"], {}
    for split in ("train", "val"):
        if (root / where.format(folders[split])).is_dir():
            found[split] = open_one(split, folders[split])
    if not found:
        places = " nor ".join(str(root / where.format(folders[split])) for split in ("train", "val"))
        raise UserError(f"{root} has neither {places}. {_advice()}")
    return found


def open_ade20k(root: Path) -> Opened:
    """ADE20K, as in ADEChallengeData2016."""
    classes, notes = _ade20k_classes(root), list[str]()
    expected = f"0 (ignored) and 1 to {len(classes)}"
    coding = Coding.of({1 + label: label for label in range(len(classes))}, [0], expected)

    def open_one(split: str, folder: str) -> Split:
        images = _Files(root / "images" / folder, "images")
        return _split(split, images, _Files(root / "annotations" / folder, "masks", only_png=True), coding, notes)

    folders = {"images": "images/{}", "train": "training", "val": "validation"}
    return Opened(_splits(root, folders, open_one), classes, "ADE20K (images, annotations)", tuple(notes))


def _ade20k_classes(root: Path) -> tuple[str, ...]:
    """The first of each class's names."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return _lines(ADE20K_CLASSES)
    rows = [line.split("\t") for line in _lines(path)[1:]]
    if [row[0].strip() for row in rows] != [str(1 + k) for k in range(len(rows))] or not 1 <= len(rows) <= 255:
        raise UserError(
            f"{path} does not count its classes from 1 on. Expected a line of titles, then a line a class, Idx first "
            "and Name last, separated by tabs; fetch it again, or remove it."
        )
    return _distinct(path, tuple(re.split("[,;]", row[-1])[0].strip() for row in rows))


def open_cityscapes(root: Path) -> Opened:
    """Cityscapes, fine annotations, with the official label ids."""
    notes: list[str] = []
    ignored = [value for value in range(34) if value not in CITYSCAPES_CLASSES]
    classes = {value: label for label, value in enumerate(CITYSCAPES_CLASSES)}
    coding = Coding.of(classes, [*ignored, _IGNORED_BYTE], "Cityscapes' label ids, 0 to 33, or 255")

    def open_one(split: str, folder: str) -> Split:
        images = _Files(root / "leftImg8bit" / folder, "images", ending="_leftImg8bit")
        masks = _Files(root / "gtFine" / folder, "masks", ending="_gtFine_labelIds", only_png=True)
        return _split(split, images, masks, coding, notes)

    folders = {"images": "leftImg8bit/{}", "train": "train", "val": "val"}
    splits = _splits(root, folders, open_one)
    return Opened(splits, tuple(CITYSCAPES_CLASSES.values()), "Cityscapes (leftImg8bit, gtFine)", tuple(notes))


def open_voc(root: Path) -> Opened:
    """PASCAL VOC 2012, augmented if its list and masks are there."""
    return _open_voc(root, aug=(_voc_lists(root) / "trainaug.txt").is_file())


def open_voc_plain(root: Path) -> Opened:
    """Its own 1,464 training images alone."""
    return _open_voc(root, aug=False)


def open_voc_aug(root: Path) -> Opened:
    """Augmented, or refused."""
    path = _voc_lists(root) / "trainaug.txt"
    if not path.is_file():
        raise UserError(
            f"{path} is missing, and voc-aug is trained on the images that it lists. Expected it and "
            "SegmentationClassAug/, as they are passed on with the augmented PASCAL VOC; or give voc."
        )
    return _open_voc(root, aug=True)


def _voc_lists(root: Path) -> Path:
    return root / "ImageSets" / "Segmentation"


def _open_voc(root: Path, *, aug: bool) -> Opened:
    classes = _named(root / "classes.txt") if (root / "classes.txt").is_file() else VOC_CLASSES
    coding = _byte_coding(len(classes))
    images, splits, folders = _Files(root / "JPEGImages", "images"), {}, ["SegmentationClass"]
    folders += ["SegmentationClassAug"] if aug and (root / "SegmentationClassAug").is_dir() else []
    masks = {folder: _Files(root / folder, "masks", only_png=True) for folder in folders}
    for split, file in (("train", "trainaug" if aug else "train"), ("val", "val")):
        path = _voc_lists(root) / f"{file}.txt"
        if not path.is_file():
            continue
        # A line is a name, or, in lists for DeepLab, the paths of image and mask.
        names = [PurePosixPath(line.split()[0]).stem for line in _lines(path)]
        if not names or len(set(names)) < len(names):
            raise UserError(f"{path} lists {'an image twice' if names else 'nothing'}. Fetch it again.")
        for what, there in (("images", [images]), ("masks", list(masks.values()))):
            if missing := [name for name in names if not any(name in files.place for files in there)]:
                raise UserError(
                    f"{len(missing):,} of {len(names):,} {what} that {path} lists are not in "
                    f"{' or '.join(str(files.folder) for files in there)}: {shown(missing)}. Complete the folder."
                )
        where = [next(folder for folder in folders if name in masks[folder].place) for name in names]
        entries = [masks[folder].entry(name, f"{folder}/") for folder, name in zip(where, names, strict=True)]
        splits[split] = _made(split, images.take(names), _image_files(root, entries), coding)
    if not splits:
        raise UserError(f"{_voc_lists(root)} has neither train.txt nor val.txt. {_advice()}")
    return Opened(splits, classes, f"PASCAL VOC{' aug (trainaug.txt)' if aug else ''}", ())


def open_imagenet_s(root: Path) -> Opened:
    """ImageNet-S of any number of classes, the semi-supervised part of training (ten images a class) and validation."""
    notes: list[str] = []
    names = {split: f for split, f in (("train", "train-semi"), ("val", "validation")) if (root / f).is_dir()}
    synsets = {split: visible_folders(root / folder) for split, folder in names.items()}
    first = next(iter(synsets.values()), [])
    if any(others != first for others in synsets.values()):
        differing = shown(sorted(set(synsets["train"]) ^ set(synsets["val"])))
        raise UserError(
            f"train-semi and validation in {root} have different synsets: {differing}. Expected the same; a class's "
            "number is its position among them, so a missing folder would rename all that follow."
        )
    if not first:
        raise UserError(f"{root} has no folders of images by synset. {_advice()}")
    complete = re.fullmatch(r"imagenet-?s-?(50|300|919)", root.resolve().name, re.IGNORECASE)
    if complete and len(first) != int(complete[1]):
        raise UserError(
            f"{root} has {len(first):,} synsets. Expected {complete[1]}, as its name says: a class's number is its "
            "position among all of them. Complete the folders; rename the folder if it is another dataset."
        )
    classes = _distinct(root, (OTHER, *first))
    if len(classes) > _IMAGENET_S_IGNORED:
        raise UserError(f"{root} has {len(first):,} synsets. Expected less than 1,000: the value 1000 means ignored.")
    expected = f"0 (other), 1 to {len(first)}, or 1000 (ignored)"
    coding = Coding.of({k: k for k in range(len(classes))}, [_IMAGENET_S_IGNORED], expected, is_rgb=True)

    def open_one(split: str, folder: str) -> Split:
        masks = _Files(root / f"{folder}-segmentation", "masks", only_png=True)
        return _split(split, _Files(root / folder, "images"), masks, coding, notes)

    splits = _splits(root, {"images": "{}", "train": "train-semi", "val": "validation"}, open_one)
    return Opened(splits, classes, IMAGENET_S, tuple(notes))


def open_folders(root: Path) -> Opened:
    """Anybody's images and masks."""
    notes: list[str] = []
    if not (root / "classes.txt").is_file():
        raise UserError(f"{root / 'classes.txt'} is missing. Expected the names of the classes, one a line.")
    classes = _named(root / "classes.txt")
    coding = _byte_coding(len(classes))
    masks_at = next((name for name in ("masks", "annotations") if (root / name).is_dir()), "masks")

    def open_one(split: str, folder: str) -> Split:
        masks = _Files(root / masks_at / folder, "masks", only_png=True)
        return _split(split, _Files(root / "images" / folder, "images"), masks, coding, notes)

    splits = _splits(root, {"images": "images/{}", "train": "train", "val": "val"}, open_one)
    return Opened(splits, classes, f"images and masks (images, {masks_at}, classes.txt)", tuple(notes))


def _byte_coding(classes: int) -> Coding:
    if not 2 <= classes <= _IGNORED_BYTE:
        raise UserError(f"classes.txt names {classes:,} classes. Expected 2 to 255: masks have 8 bits, 255 is ignored.")
    return Coding.of({k: k for k in range(classes)}, [_IGNORED_BYTE], f"0 to {classes - 1}, or 255 (ignored)")


def _named(path: Path) -> tuple[str, ...]:
    """Classes, one a line."""
    return _distinct(path, _lines(path))


def _distinct(path: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Scores are kept by the name of the class."""
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise UserError(f"{path} names several classes alike: {shown(twice)}. Expected a name of its own for each.")
    return classes


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}. Fetch or write it again.") from error


def _has(*folders: str) -> Callable[[Path], bool]:
    return lambda root: any((root / folder).is_dir() for folder in folders)


# By looking, the most particular first.
LAYOUTS: dict[str, Layout] = {
    "cityscapes": Layout("leftImg8bit/{train,val} and gtFine/{train,val}", _has("leftImg8bit", "gtFine"),
                         open_cityscapes),
    "voc": Layout("JPEGImages, SegmentationClass and ImageSets/Segmentation/{train,val}.txt",
                  _has("ImageSets/Segmentation", "SegmentationClass"), open_voc),
    "imagenet-s": Layout("{train-semi,validation} and {train-semi,validation}-segmentation",
                         _has("train-semi", "train-semi-segmentation", "validation-segmentation"), open_imagenet_s),
    "ade20k": Layout("images/{training,validation} and annotations/{training,validation}",
                     _has("images/training", "images/validation", "annotations/training", "annotations/validation"),
                     open_ade20k),
    "folders": Layout("images/{train,val}, masks/{train,val} and classes.txt",
                      _has("images/train", "images/val", "masks/train", "masks/val"), open_folders),
}  # fmt: skip


def _advice() -> str:
    return f"Expected one of: {'; '.join(f'{name}: {layout.expected}' for name, layout in LAYOUTS.items())}."
