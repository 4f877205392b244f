"""Few images to train a dense protocol on: lists of a folder, or random subsets that everybody draws alike.

A list has one image a line, with or without folders and suffix; what follows the first blank (often the name of the
mask) is not read. For n images, split number k (from 1) is the first of these in the folder that is there:

    {n}_{k}.txt    {n}/split_{k - 1}/labeled.txt    1_30/split_{k - 1}/labeled.txt, where 2,975 // 30 is about n

The last is the form of ST++ and others for Cityscapes, whose 1/8 are 372 images and 1/30 are 100.

Without lists the subsets are those of French et al. 2020 (arXiv:1906.01916), whom MOCA cites: the first n of
RandomState(seed).permutation(images in the order of their names), seeds 12345, 23456, 34567, ... of their script. So
100 images are part of the 372 of the same number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.splits import Split, shown
from ssl_bench.evaluate.subject import IntArray
from ssl_bench.files import expanded

_SEEDS = (12345, 23456, 34567, 45678, 56789)
MOST_SPLITS = len(_SEEDS)
_FRACTIONS = {100: "1_30", 372: "1_8", 744: "1_4"}  # of Cityscapes
# What datasets append to the name of an image, and lists sometimes leave out.
_ENDINGS = ("_leftImg8bit",)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of a split."""

    rows: IntArray  # rising
    origin: str


def subsets(train: Split, images: int, *, splits: int, lists: str | None) -> tuple[Subset, ...]:
    """`splits` of them, of so many images each."""
    if images > len(train):
        raise UserError(
            f"train_images={images}: the training split has {len(train):,} images. Choose fewer: --set "
            "train_images=..., or none for all of them."
        )
    if lists is None:
        return tuple(_drawn(train, images, _SEEDS[number]) for number in range(splits))
    folder = expanded(lists)
    paths = [_list(folder, images, number) for number in range(splits)]
    return tuple(_listed(train, images, path, folder) for path in paths)


def lists_used(found: Sequence[Subset]) -> dict[str, str]:
    """Which images lists named, for the identity of a run: a list may change."""
    content = hashlib.sha256(b"".join(subset.rows.tobytes() + b"|" for subset in found))
    return {"train_images": f"listed {content.hexdigest()[:8]}"}


def _drawn(train: Split, images: int, seed: int) -> Subset:
    by_name = sorted(range(len(train)), key=lambda row: train.sample_ids[row])
    chosen = np.random.RandomState(seed).permutation(len(train))[:images]
    return Subset(np.sort(np.array(by_name, np.int64)[chosen]), f"drawn by French et al.'s seed {seed}")


def _list(folder: Path, images: int, number: int) -> Path:
    if not folder.is_dir():
        raise UserError(f"lists={folder}: there is no such folder. Expected one with {images}_1.txt and so on.")
    under = f"split_{number}/labeled.txt"
    names = [f"{images}_{number + 1}.txt", f"{images}/{under}"]
    if images in _FRACTIONS:
        names.append(f"{_FRACTIONS[images]}/{under}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"lists={folder} has no list of {images} images for split {number + 1}. Expected {' or '.join(names)}; or "
        "leave lists out, and the images are drawn."
    )


def _listed(train: Split, images: int, path: Path, folder: Path) -> Subset:
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    names = {_stem(line.split()[0]): line.split()[0] for line in lines if line.strip()}
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, sample in enumerate(train.sample_ids):
        if (stem := _stem(sample)) in rows:
            rows[stem].append(row)
    if absent := [names[stem] for stem, found in rows.items() if not found]:
        raise UserError(
            f"{len(absent):,} of the {len(names):,} images in {path} are not in the training split: {shown(absent)}. "
            f"Expected names such as {train.sample_ids[0]}."
        )
    if several := [names[stem] for stem, found in rows.items() if len(found) > 1]:
        raise UserError(f"{len(several):,} names in {path} fit more than one image: {shown(several)}.")
    if len(rows) != images:
        raise UserError(
            f"{path} names {len(rows):,} images, and train_images={images} is wanted. Expected as many; complete the "
            f"list, or --set train_images={len(rows)}."
        )
    chosen = np.sort(np.array([found[0] for found in rows.values()], np.int64))
    return Subset(chosen, f"list {path.relative_to(folder)}")


def _stem(name: str) -> str:
    """The name without folders, suffix and what the dataset appends."""
    stem = name.rpartition("/")[2]
    stem = stem.rpartition(".")[0] if "." in stem else stem
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    return stem
