"""What an opened dataset is: samples with labels and names, an identity, and images on demand.

A `Split` is cheap to open, to pickle and to fork: names are kept in one block of bytes (a million Python strings
would be copied page by page into every DataLoader worker, because counting references writes to them), images are
read when asked for.

Two hashes tell splits apart. `manifest_sha256` is portable: the same data on another machine, or the same classes in
another layout, gives the same value; records carry it. `freshness` is local: it changes when a file behind the split
changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import decode_image

Integers = npt.NDArray[np.int64]
_SHOWN = 5  # how many names an error lists before it only counts


class Names(Sequence[str]):
    """An immutable list of strings in one block of bytes: about 30 bytes a file name instead of 90."""

    def __init__(self, names: Iterable[str]) -> None:
        """Encode and join."""
        # surrogateescape: a file name that is not UTF-8 must find its file again.
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._block = b"".join(encoded)
        self._bounds = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(name) for name in encoded], out=self._bounds[1:])

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        """One list after the other."""
        whole = cls(())
        whole._block = b"".join(part._block for part in parts)
        ends, before = [whole._bounds], 0
        for part in parts:
            ends.append(part._bounds[1:] + before)
            before += len(part._block)
        whole._bounds = np.concatenate(ends)
        return whole

    def __len__(self) -> int:
        """How many names."""
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        """One name, or some of them."""
        if isinstance(index, slice):
            return Names(self[i] for i in range(*index.indices(len(self))))
        position = range(len(self))[index]
        return self._block[self._bounds[position] : self._bounds[position + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """All names, in order."""
        start = 0
        for end in self._bounds[1:].tolist():
            yield self._block[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same strings."""
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


class Source(Protocol):
    """Where a split's images come from: files, records of a binary batch, members of tar shards, an array."""

    def image(self, index: int) -> Image.Image:
        """The image of one sample, as RGB."""

    def take(self, indices: Integers) -> Source:
        """The source of these samples only."""

    def contents(self) -> Iterable[str]:
        """For each sample, what the manifest says of its content: size in bytes, or a hash."""

    def freshness(self) -> str:
        """A hash that changes when the files behind these samples change."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A source of one image file a sample, under one folder."""

    root: str
    paths: Names  # relative to root
    sizes: Integers  # (n,) bytes
    modified_ns: Integers  # (n,)

    def image(self, index: int) -> Image.Image:
        """Read and decode one file."""
        path = os.path.join(self.root, self.paths[index])
        return decode_image(path, shown_as=path)

    def take(self, indices: Integers) -> ImageFiles:
        """The source of these samples only."""
        paths = Names(self.paths[int(i)] for i in indices)
        return ImageFiles(self.root, paths, self.sizes[indices], self.modified_ns[indices])

    def contents(self) -> Iterable[str]:
        """Sizes in bytes: read with the names, where a hash of every file would read the whole dataset."""
        return map(str, self.sizes.tolist())

    def freshness(self) -> str:
        """Place, sizes and modification times."""
        digest = hashlib.sha256(os.path.realpath(self.root).encode("utf-8", "surrogateescape"))
        digest.update(self.sizes.tobytes())
        digest.update(self.modified_ns.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageArray:
    """A source of images held in memory, for built-in data of a few hundred kilobytes."""

    pixels: npt.NDArray[np.uint8]  # (n, H, W), gray

    def image(self, index: int) -> Image.Image:
        """One image."""
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def take(self, indices: Integers) -> ImageArray:
        """The source of these samples only."""
        return ImageArray(self.pixels[indices])

    def contents(self) -> Iterable[str]:
        """A hash of each image's pixels."""
        return (hashlib.sha256(image.tobytes()).hexdigest() for image in self.pixels)

    def freshness(self) -> str:
        """The pixels themselves: what is in memory cannot be edited in place."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Split:
    """Labeled samples in a fixed order. `image(i)` reads; everything else is known without reading an image."""

    name: str  # "train", "val"; other kinds of datasets have others, such as "queries"
    classes: tuple[str, ...]
    labels: Integers  # (n,), indices into classes
    sample_ids: Sequence[str]  # unique; the same on every machine
    source: Source

    def __post_init__(self) -> None:
        """Hold what every layout must deliver."""
        assert self.labels.dtype == np.int64
        assert len(self.labels) == len(self.sample_ids)

    def __len__(self) -> int:
        """How many samples."""
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The decoded image, always RGB; raises BrokenImage."""
        return self.source.image(range(len(self))[index])

    def subset(self, indices: Sequence[int] | npt.NDArray[np.generic]) -> Split:
        """The split of these samples, in the given order, with the same classes and with an identity of its own."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            assert len(chosen) == len(self)
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64)
        assert len(np.unique(chosen)) == len(chosen), "a sample may stand in a split once"
        assert not len(chosen) or (chosen.min() >= 0 and chosen.max() < len(self)), "no such sample"
        ids = Names(self.sample_ids[int(i)] for i in chosen)
        return replace(self, labels=self.labels[chosen], sample_ids=ids, source=self.source.take(chosen))

    @functools.cached_property
    def manifest_sha256(self) -> str:
        """sha256 over the lines "sample_id, class name, size in bytes" (or a hash of the pixels), separated by tabs."""
        digest = hashlib.sha256()
        for sample, label, content in zip(self.sample_ids, self.labels.tolist(), self.source.contents(), strict=True):
            digest.update(f"{sample}\t{self.classes[label]}\t{content}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @functools.cached_property
    def freshness(self) -> str:
        """A local hash that changes when a file behind the split is edited, replaced or moved."""
        return self.source.freshness()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset as opened; a split that it does not have is None."""

    name: str
    root: Path | None
    built_in: bool
    train: Split | None
    val: Split | None
    layout: str = ""  # in words
    disjoint_classes: bool = False  # few-shot data: val holds other classes than train, by design
    notes: tuple[str, ...] = ()  # what was ignored while opening; `ssl-bench data check` prints it

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        return {split.name: split for split in (self.train, self.val) if split is not None}

    def limited(self, limit: int) -> Dataset:
        """The first images of every class in turn, so that a limited run still sees all classes it can."""

        def shorten(split: Split | None) -> Split | None:
            if split is None or len(split) <= limit:
                return split
            order = np.argsort(split.labels, kind="stable")
            sorted_labels = split.labels[order]
            place = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels)  # how-manieth of its class
            chosen = order[np.argsort(place, kind="stable")][:limit]
            return split.subset(np.sort(chosen))

        return replace(self, train=shorten(self.train), val=shorten(self.val))


BUILT_IN = (
    *("toy", "digits", "toy-coco", "toy-roxford", "toy-davis"),
    *("toy-ade20k", "toy-cityscapes", "toy-voc", "toy-imagenet-s"),
)


def name_of(folder: Path) -> str:
    """What a dataset that was given by its path is called; never as a built-in one, which comes at another size."""
    name = folder.resolve().name
    return f"{name}-folder" if name in BUILT_IN else name


class AnyDataset(Protocol):
    """What every kind of dataset has: labeled images (Dataset), landmarks, images with boxes, ..."""

    @property
    def name(self) -> str:
        """For records and tables."""

    @property
    def root(self) -> Path | None:
        """Its folder."""

    @property
    def built_in(self) -> bool:
        """Made by ourselves: brought to the network's own image size."""

    @property
    def splits(self) -> Mapping[str, Split]:
        """What there is to read, by name."""

    def limited(self, limit: int) -> AnyDataset:
        """A part of so many images a split, for a quick try."""


def shown(names: Iterable[str]) -> str:
    """The first few names, and how many more there are: for error messages."""
    listed = list(names)
    rest = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + rest


def require_same_classes(train: Sequence[str], val: Sequence[str], *, root: Path) -> None:
    """A head trained on other classes than it is tested on gives a number that means nothing."""
    missing, extra = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if not missing and not extra:
        return
    parts = []
    if missing:
        parts.append(f"val has no images of {len(missing):,} classes of train ({shown(missing)})")
    if extra:
        parts.append(f"val has {len(extra):,} classes that train has not ({shown(extra)})")
    raise UserError(
        f"the classes of train and val differ in {root}: {'; '.join(parts)}. Expected the same classes, each with at "
        "least one image, in both; complete the smaller one, or choose the common classes with a class list."
    )


def require_several_classes(split: Split, *, root: Path) -> None:
    """One class cannot be told apart from anything."""
    if len(split.classes) < 2:
        raise UserError(
            f"only one class in {root}: {shown(split.classes)}. Expected at least two class folders in {split.name}; "
            "if the images lie one folder deeper, give that folder."
        )
