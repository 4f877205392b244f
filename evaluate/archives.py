"""Datasets packed into a few large files: CIFAR's binary batches and WebDataset tar shards. Nothing is unpacked.

    cifar-10-batches-bin/   data_batch_{1..5}.bin, test_batch.bin, batches.meta.txt    label, 3072 pixel bytes
    cifar-100-binary/       train.bin, test.bin, fine_label_names.txt                  coarse, fine, 3072 pixel bytes
    root/{train,val}/*.tar  or root/NAME-{train,val}-000000.tar                        see tar_index.py

CIFAR's python version is not read: its batches are pickles, and opening a pickle runs whatever code it carries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import decode_image
from ssl_bench.evaluate.layouts import VAL_FOLDERS, train_folder, val_folder, visible_folders
from ssl_bench.evaluate.splits import Dataset, Integers, Names, Split, require_several_classes, shown
from ssl_bench.evaluate.tar_index import Member, read_member, tar_members

_PIXEL_BYTES = 3 * 32 * 32


@dataclass(frozen=True)
class CifarFormat:
    """One of the two binary versions."""

    folder: str
    train: tuple[str, ...]
    val: str
    class_names: str
    label_bytes: int  # the last of them is the label
    train_records: int  # in each file
    val_records: int


_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_FORMATS = (
    CifarFormat("cifar-10-batches-bin", _BATCHES, "test_batch.bin", "batches.meta.txt", 1, 10_000, 10_000),
    CifarFormat("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2, 50_000, 10_000),
)
_PYTHON_VERSIONS = {"cifar-10-batches-py": "cifar-10-batches-bin", "cifar-100-python": "cifar-100-binary"}


@dataclass(frozen=True, eq=False)
class CifarRecords:
    """A source of fixed-size records in a few binary files."""

    files: tuple[str, ...]
    label_bytes: int
    positions: Integers  # (n, 2): file, record in it
    files_state: bytes  # when opened

    def image(self, index: int) -> Image.Image:
        """One image. Its bytes are read where they lie; a map for each image would take three times as long."""
        file, record = self.positions[index].tolist()
        start = record * (self.label_bytes + _PIXEL_BYTES) + self.label_bytes
        pixels = np.frombuffer(read_member(self.files[file], start, _PIXEL_BYTES), np.uint8).reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    def take(self, indices: Integers) -> CifarRecords:
        """The source of these samples only."""
        return replace(self, positions=self.positions[indices])

    def contents(self) -> Iterator[str]:
        """A hash of each image's pixels: every record has the same size, which would tell nothing."""
        maps = [_records(file, self.label_bytes) for file in self.files]
        for file, record in self.positions.tolist():
            yield hashlib.sha256(maps[file][record, self.label_bytes :]).hexdigest()

    def freshness(self) -> str:
        """Place, size and modification time of the files, and which records of them."""
        return hashlib.sha256(self.files_state + self.positions.tobytes()).hexdigest()


def _records(file: str, label_bytes: int) -> npt.NDArray[np.uint8]:
    """A whole file as (records, bytes), memory-mapped."""
    return np.memmap(file, np.uint8, "r").reshape(-1, label_bytes + _PIXEL_BYTES)


def _state(files: tuple[str, ...]) -> bytes:
    """Place, size and modification time of some files."""
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(file)
        line = f"{os.path.realpath(file)}\t{status.st_size}\t{status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.digest()


def find_cifar(root: Path) -> tuple[CifarFormat, Path] | None:
    """Which binary version lies in `root` or directly below it; the python version is an error."""
    for cifar in CIFAR_FORMATS:
        for place in (root, root / cifar.folder):
            if any((place / file).is_file() for file in (*cifar.train, cifar.val)):
                return cifar, place
    for name, binary in _PYTHON_VERSIONS.items():
        if root.name == name or (root / name).is_dir():
            raise UserError(
                f"{root} holds CIFAR's python version ({name}), whose batches are pickles, and pickles are not opened "
                f"because they can run code. Expected the binary version of the same download page: {binary}."
            )
    return None


def open_cifar(root: Path, name: str) -> Dataset:
    """Open either binary version."""
    found = find_cifar(root)
    assert found is not None
    cifar, place = found
    names_file = place / cifar.class_names
    if not names_file.is_file():
        raise UserError(f"{names_file} is missing. Expected the class names, one a line; they are part of the archive.")
    classes = tuple(names_file.read_text(encoding="utf-8").split())
    train = _cifar_split("train", tuple(place / file for file in cifar.train), cifar, classes)
    val = _cifar_split("val", (place / cifar.val,), cifar, classes)
    return Dataset(name, root, False, train, val, layout=f"CIFAR binary batches ({cifar.folder})")


def _cifar_split(split: str, files: tuple[Path, ...], cifar: CifarFormat, classes: tuple[str, ...]) -> Split:
    """Check the sizes, read the labels."""
    records = cifar.train_records if split == "train" else cifar.val_records
    expected = records * (cifar.label_bytes + _PIXEL_BYTES)
    paths = tuple(map(str, files))
    for file in files:
        given = file.stat().st_size if file.is_file() else None
        if given != expected:
            what = "is missing" if given is None else f"has {given:,} bytes"
            raise UserError(f"{file} {what}. Expected {expected:,} bytes; unpack the archive again.")
    labels = np.concatenate([_records(path, cifar.label_bytes)[:, cifar.label_bytes - 1] for path in paths])
    if labels.max() >= len(classes):
        raise UserError(
            f"label {labels.max()} is out of range in the {split} files of {files[0].parent}. Expected 0 to "
            f"{len(classes) - 1}, the {len(classes)} names in {cifar.class_names}; unpack the archive again."
        )
    positions = np.array([(f, r) for f in range(len(files)) for r in range(records)], dtype=np.int64)
    ids = Names(f"{file.stem}/{record:05d}" for file in files for record in range(records))
    source = CifarRecords(paths, cifar.label_bytes, positions, _state(paths))
    return Split(split, classes, labels.astype(np.int64), ids, source)


@dataclass(frozen=True, eq=False)
class TarMembers:
    """A source of image members in tar shards, read where they lie.

    A shard is opened for each image: a thousand shards held open would exceed the usual limit of open files.
    """

    shards: tuple[str, ...]
    shard_of: Integers  # (n,)
    offsets: Integers  # (n,)
    sizes: Integers  # (n,)
    names: Names  # of the image members, for error messages
    shards_state: bytes  # when opened

    def image(self, index: int) -> Image.Image:
        """Read and decode one member."""
        shard = self.shards[self.shard_of[index]]
        data = read_member(shard, int(self.offsets[index]), int(self.sizes[index]))
        return decode_image(data, shown_as=f"{shard}:{self.names[index]}")

    def take(self, indices: Integers) -> TarMembers:
        """The source of these samples only."""
        names = Names(self.names[int(i)] for i in indices)
        columns = {name: getattr(self, name)[indices] for name in ("shard_of", "offsets", "sizes")}
        return replace(self, names=names, **columns)

    def contents(self) -> Iterator[str]:
        """Sizes in bytes."""
        return map(str, self.sizes.tolist())

    def freshness(self) -> str:
        """Place, size and modification time of the shards, and which members of them."""
        which = self.shard_of.tobytes() + self.offsets.tobytes()
        return hashlib.sha256(self.shards_state + which).hexdigest()


_IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")  # in order of preference, where a sample has several
_SHARD_OF_SPLIT = {
    "train": re.compile(r"(^|[-_.])train([-_.]|$)"),
    "val": re.compile(rf"(^|[-_.])({'|'.join(VAL_FOLDERS)})([-_.]|$)"),
}


def find_shards(root: Path) -> dict[str, tuple[str, ...]]:
    """The tar files of each split: root/{train,val}/*.tar, or root/*.tar with the split in the name.

    The archives that a dataset was unpacked from often lie beside its folders; where there are folders, these count.
    """
    folders = {"train": train_folder(root), "val": val_folder(root)}
    found = {}
    for split, folder in folders.items():
        if folder:
            shards = [] if visible_folders(folder) else list(folder.glob("*.tar"))
        elif any(folders.values()):
            shards = []
        else:
            shards = [path for path in root.glob("*.tar") if _SHARD_OF_SPLIT[split].search(path.stem)]
        if shards:
            found[split] = tuple(sorted(map(str, shards)))
    return found


@dataclass(frozen=True, eq=False)
class ShardSamples:
    """The samples of one shard, in columns: a tuple for each would fill gigabytes for ImageNet-22k."""

    shard: str
    keys: Names
    labels: Integers
    images: Names  # the image members' names
    offsets: Integers
    sizes: Integers


def open_tar_shards(root: Path, name: str) -> Dataset:
    """Open WebDataset shards; class names come from classes.txt or classnames.txt, else they are the numbers."""
    read = {split: [_read_shard(shard) for shard in shards] for split, shards in find_shards(root).items()}
    declared = next((root / file for file in ("classes.txt", "classnames.txt") if (root / file).is_file()), None)
    if declared:
        lines = declared.read_text(encoding="utf-8").splitlines()
        classes = tuple(line.strip() for line in lines if line.strip())
        source = f"{len(classes)} names in {declared}"
    else:
        bounding = "train" if "train" in read else "val"
        classes = tuple(map(str, range(max(int(part.labels.max()) for part in read[bounding]) + 1)))
        source = f"the largest label of {bounding}; there is no classes.txt"
    splits = {}
    for split, parts in read.items():
        outside = [
            f"{key} has {label}"
            for part in parts
            for key, label in zip(part.keys, part.labels.tolist(), strict=True)
            if label >= len(classes)
        ]
        if outside:
            raise UserError(
                f"label out of range in {len(outside):,} samples of {split} in {root}: {shown(outside)}. "
                f"Expected 0 to {len(classes) - 1} ({source})."
            )
        splits[split] = _tar_split(split, classes, parts)
        require_several_classes(splits[split], root=root)
    return Dataset(name, root, False, splits.get("train"), splits.get("val"), layout="tar shards (WebDataset)")


def _read_shard(shard: str) -> ShardSamples:
    """Group a shard's members into samples; each needs an image and a label."""
    grouped: dict[str, dict[str, Member]] = {}
    for member in tar_members(shard):
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, _, kind = base.partition(".")  # WebDataset's rule: the key ends at the first dot of the file's name
        if stem and not stem.startswith("__"):
            grouped.setdefault(folder + slash + stem, {})[kind.lower()] = member
    labels, images = [], []
    for key, members in grouped.items():
        labels.append(_label(members, f"{shard}:{key}"))
        image = next((members[kind] for kind in _IMAGE_KINDS if kind in members), None)
        if image is None:
            raise UserError(
                f"{shard}:{key} has a label and no image. Expected a member {key} with one of the suffixes "
                f"{', '.join(_IMAGE_KINDS)}; write the shard again."
            )
        images.append(image)
    if not images:
        raise UserError(f"{shard} holds no samples. Expected members such as 000000.jpg with 000000.cls.")
    offsets, sizes = np.array([(image.offset, image.size) for image in images], dtype=np.int64).T.copy()
    stem = Path(shard).stem
    keys = Names(f"{stem}/{key}" for key in grouped)
    return ShardSamples(
        shard, keys, np.array(labels, dtype=np.int64), Names(image.name for image in images), offsets, sizes
    )


def _label(members: dict[str, Member], shown_as: str) -> int:
    """The label in a sample's .cls, else in its .json."""
    member = members.get("cls") or members.get("json")
    if member is None:
        raise UserError(
            f"{shown_as} has no label (only {', '.join(sorted(members))}). Expected a .cls member with an integer, or "
            'a .json member with "label".'
        )
    data = read_member(member.shard, member.offset, member.size)
    try:
        value = int(data) if "cls" in members else json.loads(data)["label"]
    except (ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{shown_as} has the label {data[:40]!r}. Expected an integer from 0, as text.")
    return value


def _tar_split(split: str, classes: tuple[str, ...], parts: list[ShardSamples]) -> Split:
    """One shard's samples after the other's."""
    shards = tuple(part.shard for part in parts)
    source = TarMembers(
        shards,
        shard_of=np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts]),
        offsets=np.concatenate([part.offsets for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        names=Names.joined([part.images for part in parts]),
        shards_state=_state(shards),
    )
    labels = np.concatenate([part.labels for part in parts])
    return Split(split, classes, labels, Names.joined([part.keys for part in parts]), source)
