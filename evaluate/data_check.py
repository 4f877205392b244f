"""Is a dataset laid out right, complete and readable? The work behind `ssl-bench data check`.

A bad dataset is what this is for, so nothing here raises for one: what is wrong becomes a sentence that says what to
do.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.splits import Dataset, Split, shown

_BATCH = 128  # images a task: small enough for a moving progress bar, few enough tasks for a million images
_SAMPLE = 64  # images opened in each split when not all are
_LISTED = 20  # broken images that get a line of their own among the problems
_IMBALANCE = 100


@dataclass(frozen=True)
class Expected:
    """What the complete dataset has; a split that it does not have is 0."""

    classes: int
    train: int
    val: int


@dataclass
class CheckReport:
    """What was found. `problems` is empty for a dataset that can be used as it is."""

    spec: str
    layout: str | None = None  # in words; None when it could not be opened
    root: str | None = None
    counts: dict[str, int] = field(default_factory=dict)  # images by split
    classes: int = 0
    smallest_class: tuple[str, int] | None = None  # in train if there is one, with its number of images
    largest_class: tuple[str, int] | None = None
    smallest_image_px: tuple[int, int] | None = None  # width, height
    largest_image_px: tuple[int, int] | None = None
    images_opened: int = 0
    broken: list[str] = field(default_factory=list)  # all of them, as "file: reason"
    manifests: dict[str, str] = field(default_factory=dict)  # sha256 by split
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be done."""
        return not self.problems


def examine(
    spec: str,
    open_it: Callable[[], Dataset],
    *,
    expected: Expected | None,
    decode: bool,
    progress: Callable[[int, int], None] | None,
) -> CheckReport:
    """Open the dataset, count, and open all of its images (or a sample of them)."""
    report = CheckReport(spec)
    try:
        dataset = open_it()
    except UserError as error:
        report.problems.append(str(error))
        return report
    report.layout, report.root = dataset.layout, str(dataset.root) if dataset.root else None
    report.problems.extend(f"{note}. Check that this is meant" for note in dataset.notes)
    splits = dataset.splits
    for name, split in splits.items():
        report.counts[name] = len(split)
        report.manifests[name] = split.manifest_sha256
    _classes(report, splits)
    if expected:
        _compare(report, dataset, expected)
    _images(report, splits, decode=decode, progress=progress)
    return report


def _classes(report: CheckReport, splits: dict[str, Split]) -> None:
    """How many classes, how large, and the classes without an image."""
    first = next(iter(splits.values()))
    report.classes = len(first.classes)
    sizes = np.bincount(first.labels, minlength=len(first.classes))
    smallest, largest = int(sizes.argmin()), int(sizes.argmax())
    report.smallest_class = (first.classes[smallest], int(sizes[smallest]))
    report.largest_class = (first.classes[largest], int(sizes[largest]))
    for name, split in splits.items():
        counts = np.bincount(split.labels, minlength=len(split.classes))
        if empty := [split.classes[i] for i in np.flatnonzero(counts == 0)]:
            report.problems.append(
                f"{len(empty):,} classes have no image in {name} ({shown(empty)}). Complete them, or choose the other "
                "classes with a class list"
            )
    if sizes[smallest] and sizes[largest] > _IMBALANCE * sizes[smallest]:
        report.problems.append(
            f"class {first.classes[smallest]} has {sizes[smallest]:,} images in {first.name} and "
            f"{first.classes[largest]} has {sizes[largest]:,}. Check that the small one was unpacked completely"
        )


def _compare(report: CheckReport, dataset: Dataset, expected: Expected) -> None:
    """Compare with the complete dataset of that name."""
    pairs = [("classes", report.classes, expected.classes)]
    pairs += [(f"{name} images", report.counts.get(name, 0), getattr(expected, name)) for name in ("train", "val")]
    for what, given, complete in pairs:
        if given != complete:
            report.problems.append(
                f"{given:,} {what}, and the complete {dataset.name} has {complete:,}. Scores would not be comparable; "
                f"complete {dataset.root}, or give it as a path if it is another dataset"
            )


def _images(
    report: CheckReport, splits: dict[str, Split], *, decode: bool, progress: Callable[[int, int], None] | None
) -> None:
    """Open images in threads (Pillow decodes without holding Python's lock) and write down sizes and failures."""
    tasks: list[tuple[Split, list[int]]] = []
    for split in splits.values():
        step = 1 if decode else max(1, len(split) // _SAMPLE)
        chosen = list(range(0, len(split), step))
        tasks += [(split, chosen[start : start + _BATCH]) for start in range(0, len(chosen), _BATCH)]
    total = sum(len(indices) for _, indices in tasks)
    sizes: set[tuple[int, int]] = set()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's remarks on odd metadata; what cannot be read is an error, not a warning
        for task_sizes, broken, opened in pool.map(_open_batch, tasks):
            sizes |= task_sizes
            report.broken += broken
            report.images_opened += opened
            if progress:
                progress(report.images_opened, total)
    if sizes:
        report.smallest_image_px = min(sizes, key=lambda size: size[0] * size[1])
        report.largest_image_px = max(sizes, key=lambda size: size[0] * size[1])
    report.problems += [f"broken image {line}. Fetch it again or remove it" for line in report.broken[:_LISTED]]
    if len(report.broken) > _LISTED:
        report.problems.append(f"{len(report.broken) - _LISTED:,} more broken images. Unpack the dataset again")


def _open_batch(task: tuple[Split, list[int]]) -> tuple[set[tuple[int, int]], list[str], int]:
    """Sizes seen, failures, and how many images were tried."""
    split, indices = task
    sizes, broken = set(), []
    for index in indices:
        try:
            sizes.add(split.image(index).size)
        except BrokenImage as error:
            broken.append(f"{error.file}: {error.reason}")
    return sizes, broken, len(indices)
