"""Datasets whose labels stand in annotation files, in their official layouts.

    Flowers-102        jpg/image_00001.jpg ...                         imagelabels.mat, setid.mat
    Oxford-IIIT Pets   images/Abyssinian_1.jpg ...                     annotations/{trainval,test}.txt
    Stanford Cars      cars_train/00001.jpg ..., cars_test/...         devkit/*.mat, cars_test_annos_withlabels.mat
    mini-ImageNet      images/n0153282900000005.jpg ...                {train,val,test}.csv

Splits, as transfer papers use them: Flowers-102 trains on the official train and validation images together (2,040)
and tests on the official test images (6,149); Pets trains on trainval (3,680) and tests on test (3,669).
mini-ImageNet's train, val and test hold different classes by design: train.csv becomes `train` (64 classes),
test.csv becomes `val` (20 classes), val.csv is not read, and `disjoint_classes` is set.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.splits import Dataset, ImageFiles, Names, Split, shown


def is_flowers102(root: Path) -> bool:
    """Recognized by its two lists."""
    return (root / "setid.mat").is_file() or (root / "imagelabels.mat").is_file()


def open_flowers102(root: Path, name: str) -> Dataset:
    """The authors published no class names: classes are the numbers 001 to 102, padded so that they sort."""
    numbers = np.atleast_1d(_mat(root / "imagelabels.mat")["labels"])
    sets = _mat(root / "setid.mat")
    classes = tuple(f"{number:03d}" for number in range(1, int(numbers.max()) + 1))
    parts = {"train": np.hstack([sets["trnid"], sets["valid"]]), "val": np.atleast_1d(sets["tstid"])}
    splits = {}
    for split, members in parts.items():
        ids = np.sort(members.astype(np.int64))
        if ids.min() < 1 or ids.max() > len(numbers):
            raise UserError(
                f"{root / 'setid.mat'} names image {ids.max()}, and imagelabels.mat has {len(numbers):,} labels. "
                "Expected the two files of the same download page."
            )
        rows = [(f"image_{i:05d}.jpg", int(numbers[i - 1]) - 1) for i in ids]
        splits[split] = _split(split, root / "jpg", classes, rows)
    return Dataset(name, root, False, splits["train"], splits["val"], layout="Flowers-102 (jpg, setid.mat)")


def is_pets(root: Path) -> bool:
    """Recognized by its lists."""
    return (root / "annotations" / "trainval.txt").is_file() or (root / "annotations" / "list.txt").is_file()


def open_pets(root: Path, name: str) -> Dataset:
    """Lines are `Abyssinian_100 1 1 1`: image, class from 1, species, breed; the class's name stands in the image's."""
    rows = {split: _pets_rows(root / "annotations" / file) for split, file in _PETS_LISTS.items()}
    names = {number: file.rpartition("_")[0] for split in rows.values() for file, number in split}
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(
            f"the classes in {root / 'annotations'} are {sorted(names)}. Expected 1, 2, 3, ...: none missing."
        )
    classes = tuple(names[number] for number in sorted(names))
    splits = {
        split: _split(split, root / "images", classes, [(f"{file}.jpg", number - 1) for file, number in pairs])
        for split, pairs in rows.items()
    }
    return Dataset(name, root, False, splits["train"], splits["val"], layout="Oxford-IIIT Pets (images, annotations)")


_PETS_LISTS = {"train": "trainval.txt", "val": "test.txt"}


def _pets_rows(path: Path) -> list[tuple[str, int]]:
    """(image without suffix, class from 1), sorted by image."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        columns = line.split()
        if not columns or line.startswith("#"):
            continue
        if len(columns) < 2 or not columns[1].isdigit():
            raise UserError(f'{path}, line {number}: {line!r}. Expected "IMAGE CLASS SPECIES BREED".')
        rows.append((columns[0], int(columns[1])))
    return sorted(rows)


def is_cars(root: Path) -> bool:
    """Recognized by its image folders beside the development kit."""
    return (root / "cars_train").is_dir() or (root / "devkit" / "cars_train_annos.mat").is_file()


def open_cars(root: Path, name: str) -> Dataset:
    """Boxes are not used: transfer papers classify the whole image."""
    devkit = root / "devkit"
    with_labels = "cars_test_annos_withlabels.mat"
    test = root / with_labels if (root / with_labels).is_file() else devkit / with_labels
    if not test.is_file() and (devkit / "cars_test_annos.mat").is_file():
        raise UserError(
            f"{test} is missing; the cars_test_annos.mat that is there has no classes. Expected {with_labels}, a file "
            "of its own on the download page."
        )
    classes = tuple(map(str, np.atleast_1d(_mat(devkit / "cars_meta.mat")["class_names"])))
    splits = {}
    for split, folder, path in (("train", "cars_train", devkit / "cars_train_annos.mat"), ("val", "cars_test", test)):
        rows = np.atleast_1d(_mat(path)["annotations"])
        pairs = sorted((f"{folder}/{row['fname']}", int(row["class"]) - 1) for row in rows)
        splits[split] = _split(split, root, classes, pairs)
    return Dataset(name, root, False, splits["train"], splits["val"], layout="Stanford Cars (cars_train, devkit)")


def is_mini_imagenet(root: Path) -> bool:
    """Recognized by its image folder and its lists."""
    return (root / "images").is_dir() and (root / "train.csv").is_file()


def open_mini_imagenet(root: Path, name: str) -> Dataset:
    """Lists have the columns filename and label (a synset)."""
    splits = {}
    for split, file in (("train", "train.csv"), ("val", "test.csv")):
        path = root / file
        rows = csv.DictReader(_text(path).splitlines())
        if not {"filename", "label"} <= set(rows.fieldnames or ()):
            raise UserError(f"{path} has the columns {rows.fieldnames}. Expected filename,label in the first line.")
        pairs = sorted((row["label"], row["filename"]) for row in rows)
        classes = tuple(dict.fromkeys(label for label, _ in pairs))
        position = {label: index for index, label in enumerate(classes)}
        images = [(image, position[label]) for label, image in pairs]
        splits[split] = _split(split, root / "images", classes, images, with_class=True)
    return Dataset(
        *(name, root, False, splits["train"], splits["val"]),
        layout="mini-ImageNet (images, csv lists)",
        disjoint_classes=True,
    )


OPENERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, str], Dataset]]] = {
    "Flowers-102": (is_flowers102, open_flowers102),
    "Oxford-IIIT Pets": (is_pets, open_pets),
    "Stanford Cars": (is_cars, open_cars),
    "mini-ImageNet": (is_mini_imagenet, open_mini_imagenet),
}


def _split(
    split: str, folder: Path, classes: tuple[str, ...], rows: list[tuple[str, int]], *, with_class: bool = False
) -> Split:
    """A split of listed files, each of which must be there; `with_class` puts the class into the sample's name."""
    if not rows:
        raise UserError(f"the list of {split} for {folder} names no image. Expected the official, complete list.")
    if outside := [f"{file} has {label + 1}" for file, label in rows if not 0 <= label < len(classes)]:
        raise UserError(f"class out of range for {shown(outside)} in {folder}. Expected 1 to {len(classes)}.")
    files = [file for file, _ in rows]
    sizes, modified_ns = np.zeros((2, len(files)), dtype=np.int64)
    missing = []
    for index, file in enumerate(files):
        try:
            status = os.stat(folder / file)
        except OSError:
            missing.append(file)
            continue
        sizes[index], modified_ns[index] = status.st_size, status.st_mtime_ns
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(files):,} images listed for {split} are not in {folder}: {shown(missing)}. "
            "Expected all of them; unpack the images again."
        )
    paths = Names(files)
    ids = Names(f"{classes[label]}/{file}" for file, label in rows) if with_class else paths
    source = ImageFiles(str(folder), paths, sizes, modified_ns)
    return Split(split, classes, np.array([label for _, label in rows], dtype=np.int64), ids, source)


def _text(path: Path) -> str:
    """A list's text."""
    if not path.is_file():
        raise UserError(f"{path} is missing. Expected it beside the images; it is part of the official archive.")
    return path.read_text(encoding="utf-8")


def _mat(path: Path) -> Any:
    """A MATLAB file, as scipy reads it; scipy takes a while to import, and only these datasets need it."""
    if not path.is_file():
        raise UserError(f"{path} is missing. Expected it where the official archive puts it.")
    from scipy.io import loadmat

    try:
        return loadmat(path, squeeze_me=True)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise UserError(f"{path} is not a MATLAB file: {error}. Fetch it again.") from error
