"""Is a dataset of any kind laid out right, complete and readable? The work behind `ssl-bench data check`.

A bad dataset is what this is for, so nothing here raises for one: what is wrong becomes a sentence that says what to
do.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import Coco
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.landmarks import Landmarks
from ssl_bench.evaluate.mask_layouts import IMAGENET_S
from ssl_bench.evaluate.masks import IGNORE, Masks
from ssl_bench.evaluate.splits import AnyDataset, Dataset, Integers, Split, shown
from ssl_bench.evaluate.videos import Videos

_BATCH = 128  # images a task: small enough for a moving progress bar, few enough tasks for a million images
_SAMPLE = 64  # images opened in each split when not all are
_LISTED = 20  # broken images that get a line of their own among the problems
_IMBALANCE = 100
_WITHOUT_EXTENT = {"coco": 2}  # objects in the complete training set whose box has no height


@dataclass(frozen=True)
class Expected:
    """What the complete dataset has; a split that it does not have is 0."""

    classes: int
    train: int
    val: int

    def counts(self) -> dict[str, int]:
        """As `examine` wants them."""
        return {"classes": self.classes, "train": self.train, "val": self.val}


@dataclass
class CheckReport:
    """What was found. `problems` is empty for a dataset that can be used as it is."""

    spec: str
    kind: str = "images"
    layout: str | None = None  # in words; None when it could not be opened
    root: str | None = None
    counts: dict[str, int] = field(default_factory=dict)  # images by split
    classes: int = 0
    classes_seen: int | None = None  # of masks: those with at least one pixel in what was opened
    smallest_class: tuple[str, int] | None = None  # in train if there is one, with its number of images
    largest_class: tuple[str, int] | None = None
    smallest_image_px: tuple[int, int] | None = None  # width, height
    largest_image_px: tuple[int, int] | None = None
    images_opened: int = 0
    broken: list[str] = field(default_factory=list)  # all of them, as "file: reason"
    unfit: list[str] = field(default_factory=list)  # readable, but what is in it does not fit: of masks
    manifests: dict[str, str] = field(default_factory=dict)  # sha256 by split
    remarks: list[str] = field(default_factory=list)  # known flaws of the complete dataset
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be done."""
        return not self.problems


def examine(
    spec: str,
    open_it: Callable[[], AnyDataset],
    *,
    kind: str = "images",
    complete: Mapping[str, int] | None,
    decode: bool,
    progress: Callable[[int, int], None] | None,
) -> CheckReport:
    """Open the dataset, count, and open all of its images (or a sample of them), with their masks.

    `complete` has the number of classes and of each split's images.
    """
    report = CheckReport(spec, kind)
    try:
        dataset = open_it()
        report.root = str(dataset.root) if dataset.root else None
        _describe(report, dataset)
        for name, split in dataset.splits.items():
            report.counts[name] = len(split)
            report.manifests[name] = split.manifest_sha256
    except UserError as error:
        report.problems.append(str(error))
        return report
    if complete:
        _compare(report, dataset, complete)
    _images(report, dataset, decode=decode, progress=progress)
    return report


def _describe(report: CheckReport, dataset: AnyDataset) -> None:
    """Layout, classes, and what was noted while opening."""
    notes: tuple[str, ...] = ()
    if isinstance(dataset, Dataset):
        report.layout, notes = dataset.layout, dataset.notes
        _classes(report, dataset.splits)
    elif isinstance(dataset, Videos):
        report.layout, notes = dataset.layout, dataset.notes
    elif isinstance(dataset, Masks):
        report.layout, notes, report.classes = dataset.layout, dataset.notes, len(dataset.classes)
    elif isinstance(dataset, Coco):
        report.layout, notes, report.classes = "COCO's instances", dataset.notes, len(dataset.categories)
        known = _WITHOUT_EXTENT.get(dataset.name)
        if known and sum(map(len, dataset.without_extent.values())) == known:
            report.remarks, notes = list(notes), ()
    elif isinstance(dataset, Landmarks):
        report.layout, notes = "queries and database (gnd_NAME.pkl, jpg)", dataset.notes
    report.problems.extend(f"{note}. Check that this is meant" for note in notes)


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


def _compare(report: CheckReport, dataset: AnyDataset, complete: Mapping[str, int]) -> None:
    """Compare with the complete dataset of that name."""
    found = {"classes": report.classes, **report.counts}
    for what, count in complete.items():
        if found.get(what, 0) != count:
            named = what if what == "classes" else f"{what} images"
            report.problems.append(
                f"{found.get(what, 0):,} {named}, and the complete {dataset.name} has {count:,}. Scores would not be "
                f"comparable; complete {dataset.root}, or give it as a path if it is another dataset"
            )


@dataclass
class _Seen:
    """What a batch of images showed."""

    opened: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    pixels: Integers = field(default_factory=lambda: np.zeros(IGNORE, np.int64))  # of each class
    masks: int = 0
    without_folder: int = 0  # masks of ImageNet-S that lack the class of their folder

    def add(self, other: _Seen) -> None:
        """Together."""
        self.opened, self.masks = self.opened + other.opened, self.masks + other.masks
        self.sizes |= other.sizes
        self.broken, self.unfit = self.broken + other.broken, self.unfit + other.unfit
        self.pixels = self.pixels + other.pixels
        self.without_folder += other.without_folder


Task = tuple[AnyDataset, Split, list[int]]


def _images(
    report: CheckReport, dataset: AnyDataset, *, decode: bool, progress: Callable[[int, int], None] | None
) -> None:
    """Open images in threads (Pillow decodes without holding Python's lock) and write down sizes and failures."""
    tasks: list[Task] = []
    for split in dataset.splits.values():
        step = 1 if decode else max(1, len(split) // _SAMPLE)
        chosen = list(range(0, len(split), step))
        tasks += [(dataset, split, chosen[start : start + _BATCH]) for start in range(0, len(chosen), _BATCH)]
    total = sum(len(indices) for _, _, indices in tasks)
    seen = _Seen()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        # Pillow's remarks on odd metadata; what cannot be read is an error, not a warning
        warnings.simplefilter("ignore")
        for batch in pool.map(_open_batch, tasks):
            seen.add(batch)
            if progress:
                progress(seen.opened, total)
    report.images_opened, report.broken, report.unfit = seen.opened, seen.broken, seen.unfit
    if seen.sizes:
        report.smallest_image_px = min(seen.sizes, key=lambda size: size[0] * size[1])
        report.largest_image_px = max(seen.sizes, key=lambda size: size[0] * size[1])
    report.problems += [f"broken image {line}. Fetch it again or remove it" for line in report.broken[:_LISTED]]
    if len(report.broken) > _LISTED:
        report.problems.append(f"{len(report.broken) - _LISTED:,} more broken images. Unpack the dataset again")
    report.problems += report.unfit[:_LISTED]
    if len(report.unfit) > _LISTED:
        report.problems.append(f"{len(report.unfit) - _LISTED:,} more images and masks that do not fit")
    if isinstance(dataset, Masks):
        _masks(report, seen)


def _masks(report: CheckReport, seen: _Seen) -> None:
    """Classes that were seen; and whether ImageNet-S's numbers follow the order of its folders."""
    report.classes_seen = int(np.count_nonzero(seen.pixels))
    if 2 * seen.without_folder > seen.masks:
        report.problems.append(
            f"{seen.without_folder:,} of {seen.masks:,} masks lack the class of the folder in which they lie. A "
            "class's number is the position of its folder among all, in sorted order: folders are missing or too many"
        )


def _open_batch(task: Task) -> _Seen:
    """What these images showed."""
    dataset, split, indices = task
    seen = _Seen(opened=len(indices))
    for index in indices:
        try:
            if isinstance(dataset, Masks):
                _open_pair(seen, dataset, split, index)
            else:
                seen.sizes.add(split.image(index).size)
        except BrokenImage as error:
            seen.broken.append(f"{error.file}: {error.reason}")
        except UserError as error:
            seen.unfit.append(str(error).rstrip("."))
    return seen


def _open_pair(seen: _Seen, dataset: Masks, split: Split, index: int) -> None:
    image, mask = dataset.pair(split.name, index)
    seen.sizes.add(image.size)
    pixels = np.bincount(mask.ravel(), minlength=IGNORE)[:IGNORE]
    seen.pixels += pixels
    seen.masks += 1
    if dataset.layout == IMAGENET_S:
        label = dataset.classes.index(split.sample_ids[index].partition("/")[0])
        seen.without_folder += int(pixels[label] == 0)
