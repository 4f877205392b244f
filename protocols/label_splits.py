"""Few labeled images out of many: the published lists where they are found, else a seeded, class-balanced drawing.

MSN's lists are imagenet_subsets{1,2,3}/{1,2,5}imgs_class.txt (the third of 5 is misnamed 3imgs_class.txt; both names
will do) and imagenet_subsets1/1percent.txt, SimCLR's {1,10}percent.txt. They are read as they are, and looked for in
the dataset's folder and in SSL_BENCH_DATA, unless a folder is named.

What has no list is drawn: of one shuffling a split every class gives its first images, so that 1 shot is part of 2
shots. Different splits may share images. Of 1 % of a class the nearest whole number is taken, and at least one image.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.splits import Split, shown
from ssl_bench.evaluate.subject import IntArray
from ssl_bench.evaluate.subsets import listed_images
from ssl_bench.files import data_folder, expanded

Amount = Literal["1shot", "2shot", "5shot", "1percent", "10percent"]
DRAW = "draw"  # in the place of a folder of lists


@dataclass(frozen=True, eq=False)
class Labeled:
    """The labeled images of one split."""

    rows: IntArray  # in the training split, rising
    origin: str  # the list's name, or how they were drawn


@functools.lru_cache(maxsize=16)  # ImageNet's 1.28 million names are compared with eleven lists: once, not twice a run
def labeled_splits(
    train: Split, amount: Amount, *, splits: int, lists: str | None, root: Path | None, seed: int
) -> tuple[Labeled, ...]:
    """`splits` of them, or the one that a list of percents is. `lists` is a folder, None (look around) or DRAW."""
    paths = _lists(train, amount, splits, lists, root)
    return tuple(_listed(train, amount, path) for path in paths) or tuple(
        _drawn(train, amount, seed, number) for number in range(splits)
    )


def lists_used(found: Mapping[Amount, Sequence[Labeled]]) -> dict[str, str]:
    """Which images the published lists named, for the identity of a run: a list may be found, changed or gone."""
    return {
        amount: "listed " + hashlib.sha256(b"".join(each.rows.tobytes() for each in labeled)).hexdigest()[:8]
        for amount, labeled in found.items()
        if not labeled[0].origin.startswith(_DRAWN)
    }


_DRAWN = "drawn"


def _places(lists: str | None, root: Path | None) -> list[Path]:
    """Where lists may lie."""
    if lists is None:
        return [root, data_folder()] if root else []
    if lists == DRAW:
        return []
    folder = expanded(lists)
    if not folder.is_dir():
        raise UserError(
            f"lists={lists}: there is no such folder. Expected one with {_names('1shot', 1)[0]} and so on, "
            f"or --set lists={DRAW}, which draws the images by the seed."
        )
    return [folder]


def _names(amount: Amount, split: int) -> list[str]:
    """What the list of an amount may be called, the best name first."""
    number = amount.removesuffix("shot").removesuffix("percent")
    if amount.endswith("percent"):
        return [f"{folder}{number}percent.txt" for folder in ("imagenet_subsets1/", "imagenet_subsets/", "")]
    names = [f"imagenet_subsets{split}/{number}imgs_class.txt"]
    return [*names, "imagenet_subsets3/3imgs_class.txt"] if (amount, split) == ("5shot", 3) else names


def _lists(train: Split, amount: Amount, splits: int, lists: str | None, root: Path | None) -> list[Path]:
    """The lists of an amount, all of one place. None where a place holds none, or those of another dataset."""
    wanted = range(1, 2 if amount.endswith("percent") else splits + 1)
    for place in _places(lists, root):
        names = [_names(amount, split) for split in wanted]
        paths = [next((place / name for name in each if (place / name).is_file()), None) for each in names]
        there = [path for path in paths if path is not None]
        if not there or (lists is None and not _concerns(train, there[0])):
            continue
        if absent := [each[0] for each, path in zip(names, paths, strict=True) if path is None]:
            raise UserError(
                f"{place} has lists for {len(there)} of {len(wanted)} splits of {amount}; {shown(absent)} is missing. "
                f"Complete them, or choose --set splits={len(there)} or --set lists={DRAW}."
            )
        return there
    if lists not in (None, DRAW):
        expected = " or ".join(_names(amount, 1))
        raise UserError(
            f"lists={lists} has no list of {amount}. Expected {expected}; or leave {amount} out of "
            f"--set amounts, or choose --set lists={DRAW}."
        )
    return []


def _concerns(train: Split, path: Path) -> bool:
    """Whether a list that lies about names any image of this dataset."""

    def stem(line: str) -> str:
        return line.strip().rpartition("/")[2].partition(".")[0]

    listed = {stem(line) for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()}
    return any(stem(sample) in listed for sample in train.sample_ids)


def _listed(train: Split, amount: Amount, path: Path) -> Labeled:
    """The images of one list."""
    try:
        part = listed_images(train, path, of_its_classes=True)
    except UserError as error:
        raise UserError(f"{error} To draw the images by the seed instead: --set lists={DRAW}") from None
    chosen = set(part.sample_ids)
    rows = np.array([row for row, sample in enumerate(train.sample_ids) if sample in chosen], dtype=np.int64)
    require_enough(train, rows, amount, f"the list {path}")
    return Labeled(rows, f"list {path.parent.name}/{path.name}")


def _drawn(train: Split, amount: Amount, seed: int, number: int) -> Labeled:
    """The first images of every class in a shuffling of all that depends on the seed and the split's number."""
    shuffled = np.random.RandomState([seed, number]).permutation(len(train))  # RandomState: its streams never change
    labels = train.labels[shuffled]
    by_class = np.argsort(labels, kind="stable")
    place = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])  # how-manieth of its class
    rows = np.sort(shuffled[by_class[place < _share(train, amount)[labels[by_class]]]])
    require_enough(train, rows, amount, f"train ({len(train):,} images)")
    return Labeled(rows, f"{_DRAWN}: shuffling {number} of seed {seed}, the first of every class")


def _share(train: Split, amount: Amount) -> IntArray:
    """How many images of each class. (classes,)"""
    if amount.endswith("shot"):
        return np.full(len(train.classes), int(amount.removesuffix("shot")), dtype=np.int64)
    counts = np.bincount(train.labels, minlength=len(train.classes))
    percent = int(amount.removesuffix("percent"))
    return np.maximum(1, np.round(counts * percent / 100)).astype(np.int64)


def require_enough(train: Split, rows: IntArray, amount: Amount, origin: str) -> None:
    """Every class of train is there, with as many images as shots."""
    least = int(amount.removesuffix("shot")) if amount.endswith("shot") else 1
    counts = np.bincount(train.labels[rows], minlength=len(train.classes))
    if short := [f"{train.classes[c]} ({counts[c]})" for c in np.unique(train.labels) if counts[c] < least]:
        raise UserError(
            f"{amount}: {origin} has fewer than {least} images of {len(short):,} classes: {shown(short)}. Expected as "
            "many of every class; complete them, or take another amount (--limit and lists leave images out)."
        )
