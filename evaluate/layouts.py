"""Class folders: `root/{train,val}/<class>/**/image`, ImageNet's flat `val` with a list of its labels, and
`root/<class>/`.

Scanning costs one `stat` a file and no more: ImageNet's 1.28 million files take about ten seconds on a local disk.
A sample is named "class/file" in every one of these layouts, so that a flat `val`, the same files sorted into
folders, and the same classes chosen out of a larger dataset all have the same manifest.
"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import is_image_name
from ssl_bench.evaluate.flat_labels import read_flat_labels
from ssl_bench.evaluate.splits import (
    Dataset,
    ImageFiles,
    Integers,
    Names,
    Split,
    require_same_classes,
    require_several_classes,
    shown,
)

VAL_FOLDERS = ("val", "validation", "valid", "test")  # the first that exists
_SLOW_SECONDS_A_FILE = 1e-4  # a local disk needs 5e-6, a network drive without cached attributes 1e-3
_THREADS_WHEN_SLOW = 16


@dataclass(frozen=True)
class Listing:
    """The image files of one folder and of everything below it."""

    names: Names  # sorted, relative to the folder, with /
    sizes: Integers
    modified_ns: Integers
    ignored: Counter[str]  # suffixes of the files that are no images


def train_folder(root: Path) -> Path | None:
    """root/train, if it is there."""
    return root / "train" if (root / "train").is_dir() else None


def val_folder(root: Path) -> Path | None:
    """The first of root/val, validation, valid, test that is there."""
    return next((root / name for name in VAL_FOLDERS if (root / name).is_dir()), None)


def has_split_folders(root: Path) -> bool:
    """Whether there is a train or a val folder."""
    return train_folder(root) is not None or val_folder(root) is not None


def has_class_folders(root: Path) -> bool:
    """Whether two folders directly below hold images: a training set alone, or ImageNet-22k."""
    with_images = 0
    for name in visible_folders(root):
        with os.scandir(root / name) as entries:
            with_images += any(is_image_name(entry.name) and entry.is_file() for entry in entries)
        if with_images == 2:
            return True
    return False


def open_split_folders(root: Path, name: str) -> Dataset:
    """Open root/train and root/val; either may be missing, and val may be flat."""
    notes: list[str] = []
    train_at, val_at = train_folder(root), val_folder(root)
    train = open_class_folders(train_at, "train", notes) if train_at else None
    layout, val = "class folders", None
    if val_at and not visible_folders(val_at) and (flat := list_images(val_at, deep=False)).names:
        layout = "class folders, flat val with a list of labels" if train else "flat val with a list of labels"
        val = _open_flat_val(root, val_at, flat, train.classes if train else None, notes)
    elif val_at:
        val = open_class_folders(val_at, "val", notes)
    if train and val:
        require_same_classes(train.classes, val.classes, root=root)
    for split in (train, val):
        if split:
            require_several_classes(split, root=root)
    return Dataset(name, root, False, train, val, layout=layout, notes=tuple(notes))


def open_train_only(root: Path, name: str) -> Dataset:
    """Open root/<class>/ as training data."""
    notes: list[str] = []
    train = open_class_folders(root, "train", notes)
    require_several_classes(train, root=root)
    return Dataset(name, root, False, train, None, layout="class folders, train only", notes=tuple(notes))


def open_unlabeled(folder: Path) -> Split | None:
    """All images in and below a folder, as one class; None if there are none."""
    listing = list_images(folder)
    if not len(listing.names):
        return None
    labels = np.zeros(len(listing.names), dtype=np.int64)
    files = ImageFiles(str(folder), listing.names, listing.sizes, listing.modified_ns)
    return Split("train", ("unlabeled",), labels, listing.names, files)


def open_class_folders(folder: Path, split: str, notes: list[str]) -> Split:
    """One split from one folder of class folders; a class is a folder with at least one image in it or below."""
    names = visible_folders(folder)
    listings = dict(zip(names, _list_all([folder / name for name in names]), strict=True))
    full = {name: listing for name, listing in listings.items() if len(listing.names)}
    if not full:
        raise UserError(
            f"no images in {folder}: it holds {len(names):,} folders and none of them an image file. "
            f"Expected {folder.name}/<class>/<image>.jpg (or png, webp, ...)."
        )
    _note_ignored(folder, listings, notes)
    counts = [len(listing.names) for listing in full.values()]
    ids = Names.joined([Names(f"{name}/{file}" for file in listing.names) for name, listing in full.items()])
    sizes = np.concatenate([listing.sizes for listing in full.values()])
    modified_ns = np.concatenate([listing.modified_ns for listing in full.values()])
    labels = np.repeat(np.arange(len(full), dtype=np.int64), counts)
    return Split(split, tuple(full), labels, ids, ImageFiles(str(folder), ids, sizes, modified_ns))


def list_images(folder: Path, *, deep: bool = True) -> Listing:
    """All images in `folder`, and below it unless told otherwise; links to folders are followed."""
    found: list[tuple[str, int, int]] = []
    ignored: Counter[str] = Counter()
    dangling: list[str] = []
    for prefix, entry in _walk(folder, deep=deep):
        if not is_image_name(entry.name):
            ignored[os.path.splitext(entry.name)[1].lower()] += 1
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            dangling.append(entry.path)
            continue
        if stat.S_ISREG(status.st_mode):
            found.append((prefix + entry.name, status.st_size, status.st_mtime_ns))
    if dangling:
        raise UserError(
            f"{len(dangling):,} links in {folder} lead nowhere: {shown(dangling)}. Expected links to existing images; "
            "mend or remove them (samples must not vanish in silence)."
        )
    found.sort()
    sizes, modified_ns = (np.array([row[column] for row in found], dtype=np.int64) for column in (1, 2))
    return Listing(Names(row[0] for row in found), sizes, modified_ns, ignored)


def _walk(folder: Path, *, deep: bool) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every visible entry that is not a folder, with its folder's path relative to `folder`."""
    waiting = [(str(folder), "", frozenset({os.path.realpath(folder)}))]
    while waiting:
        place, prefix, parents = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir():
                    yield prefix, entry
                elif deep:
                    real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                    if real not in parents:  # a link to a folder above would never end
                        waiting.append((entry.path, f"{prefix}{entry.name}/", parents | {real}))


def _list_all(folders: list[Path]) -> list[Listing]:
    """List every folder: one after the other from a local disk, where threads only wait for each other (measured:
    twice as slow), and in threads from a network drive, where each `stat` is a round trip."""
    listings: list[Listing] = []
    for folder in folders:
        start = time.perf_counter()
        listings.append(list_images(folder))
        if time.perf_counter() - start > _SLOW_SECONDS_A_FILE * (len(listings[-1].names) + 100):
            break
    with ThreadPoolExecutor(_THREADS_WHEN_SLOW) as pool:
        return listings + list(pool.map(list_images, folders[len(listings) :]))


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted as strings: the order of labels that ImageFolder gives too."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _note_ignored(folder: Path, listings: dict[str, Listing], notes: list[str]) -> None:
    """Write down what a user may believe to be read and is not."""
    if empty := [name for name, listing in listings.items() if not len(listing.names)]:
        notes.append(f"{len(empty):,} folders in {folder} hold no images and are no classes: {shown(empty)}")
    if loose := len(list_images(folder, deep=False).names):
        notes.append(f"{loose:,} images lie directly in {folder}, outside any class folder, and are ignored")
    if ignored := sum((listing.ignored for listing in listings.values()), Counter()):
        kinds = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in ignored.most_common(3))
        notes.append(f"{ignored.total():,} files in {folder} are not read as images ({kinds})")


def _open_flat_val(root: Path, folder: Path, flat: Listing, classes: tuple[str, ...] | None, notes: list[str]) -> Split:
    """A val folder without class folders: the labels come from a list beside it."""
    files = list(flat.names)
    found = read_flat_labels(root, folder, files, classes)
    notes.extend(found.notes)
    order = sorted(range(len(files)), key=lambda i: (found.classes[i], files[i]))
    known = tuple(sorted(set(found.classes)))
    position = {name: label for label, name in enumerate(known)}
    labels = np.array([position[found.classes[i]] for i in order], dtype=np.int64)
    ids = Names(f"{found.classes[i]}/{files[i]}" for i in order)
    paths = Names(files[i] for i in order)
    source = ImageFiles(str(folder), paths, flat.sizes[order], flat.modified_ns[order])
    return Split("val", known, labels, ids, source)
