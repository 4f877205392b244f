"""What stands behind a split of images with masks: files of masks whose values mean classes, or COCO's objects.

Every mask that leaves here is (H, W) of uint16: a class from 0 on, or IGNORE. A mask is read when it is asked for.
Neither image nor mask is turned by its EXIF orientation (evaluate/decoding.py): masks are drawn over the stored pixels.

To make one mask of COCO's objects is ours, as MMC (Table 1, "Lin.") states neither classes nor masks: background and
80 categories; smaller objects lie over larger ones; what lies in a crowd region, or in the box of an object without an
outline, is ignored unless another object covers it. Outlines are filled by pycocotools.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import AnnotatedFiles, Annotations
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.outlines import Outline
from ssl_bench.evaluate.splits import ImageFiles, Integers, Source, shown

Mask = npt.NDArray[np.uint16]

IGNORE = 65535
COCO_MASKS_VERSION = 1  # raised when one pixel of a mask made of COCO's objects changes

_OUTSIDE = 65534  # in a table: a value that means nothing
_TURNED = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112
_INDEX_MODES = {"1", "L", "P"}
_THREADS = 8  # that hash masks: on a network drive each file is a round trip


class MaskSource(Source, Protocol):
    """Images and their masks."""

    def mask(self, index: int, size_px: tuple[int, int]) -> Mask:
        """The mask of one image of that width and height."""


@dataclass(frozen=True, eq=False)
class Coding:
    """What the values in a mask's file mean."""

    table: Mask  # by value
    expected: str  # the values, in words
    is_rgb: bool = False  # ImageNet-S: the value is R + 256 G, as 919 classes do not fit into 8 bits

    @classmethod
    def of(cls, classes: dict[int, int], ignored: Iterable[int], expected: str, *, is_rgb: bool = False) -> Coding:
        """Stored value -> class."""
        table = np.full(65536 if is_rgb else 256, _OUTSIDE, np.uint16)
        table[list(ignored)] = IGNORE
        for value, label in classes.items():
            table[value] = label
        return cls(table, expected, is_rgb)

    def read(self, file: str) -> Mask:
        """Decode one mask."""
        values = self._values(file)
        mask: Mask = self.table[values]
        outside = mask == _OUTSIDE
        if outside.any():
            found, counts = np.unique(values[outside], return_counts=True)
            listed = shown(f"{value} ({count:,} px)" for value, count in zip(found, counts, strict=True))
            raise UserError(
                f"{file} holds values that are no class: {listed}. Expected {self.expected}. Are the masks of this "
                "layout, and the list of classes complete?"
            )
        return mask

    def _values(self, file: str) -> npt.NDArray[np.integer[Any]]:
        """As stored, (H, W)."""
        try:
            with Image.open(file, formats=("PNG",)) as image:
                mode, stored = image.mode, str(image.tile[0][3]) if image.tile else ""
                pixels = np.asarray(image)
        except FileNotFoundError as error:
            raise UserError(f"the mask {file} has gone. Put it back, or open the dataset again.") from error
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            reason = "it is no PNG file" if isinstance(error, UnidentifiedImageError) else str(error)
            raise BrokenImage(file, reason) from error
        if self.is_rgb and mode == "RGB":
            value = pixels[..., 0].astype(np.uint16) + 256 * pixels[..., 1].astype(np.uint16)
            return np.where(pixels[..., 2] > 0, 65535, value)  # blue means nothing, and no class is 65535
        fits = not self.is_rgb and mode in _INDEX_MODES
        # Pillow stretches gray of 2 and 4 bits to 0..255, and so invents values; a palette's indices stay as they are.
        if not fits or (mode == "L" and stored.startswith("L;")):
            wanted = "an RGB mask, R + 256 G" if self.is_rgb else "an index mask, 8-bit gray or palette"
            raise UserError(
                f"{file} is {_in_words(mode, stored)}. Expected {wanted}: {self.expected}. "
                "Save the class numbers themselves, not their colors or a picture of them."
            )
        return pixels.astype(np.uint8)


def _in_words(mode: str, stored: str) -> str:
    kinds = {"RGB": "a color picture", "RGBA": "a color picture with alpha", "LA": "gray with alpha"}
    kinds |= {"P": "a palette picture", "L": f"gray of {stored.partition(';')[2] or 8} bits", "1": "gray of 1 bit"}
    return kinds.get(mode, "gray of 16 bits" if mode.startswith("I") else f"a picture of mode {mode}")


@dataclass(frozen=True, eq=False)
class MaskFiles:
    """Image files with a mask file each. A hash of every mask is part of a split's identity."""

    files: ImageFiles
    masks: ImageFiles
    coding: Coding

    def image(self, index: int) -> Image.Image:
        """Read and decode one image."""
        return self.files.image(index)

    def mask(self, index: int, size_px: tuple[int, int]) -> Mask:
        """Read, decode and translate one mask."""
        mask = self.coding.read(self._path(index))
        if mask.shape[::-1] != size_px:
            raise UserError(self._differs(index, size_px, mask.shape[::-1]))
        return mask

    def _differs(self, index: int, size_px: tuple[int, int], mask_px: tuple[int, ...]) -> str:
        file, advice = os.path.join(self.files.root, self.files.paths[index]), "Take both from one source."
        with Image.open(file) as image:
            if image.getexif().get(_ORIENTATION) in _TURNED and mask_px == size_px[::-1]:
                advice = "The image has an EXIF orientation, which is not applied here: turn its pixels, or the mask."
        return (
            f"{self._path(index)} has {mask_px[0]} x {mask_px[1]} px, and its image {file} {size_px[0]} x "
            f"{size_px[1]} px. Expected the same size. {advice}"
        )

    def _path(self, index: int) -> str:
        return os.path.join(self.masks.root, self.masks.paths[index])

    def take(self, indices: Integers) -> MaskFiles:
        """The source of these samples only."""
        return MaskFiles(self.files.take(indices), self.masks.take(indices), self.coding)

    def contents(self) -> Iterator[str]:
        """Size of the image in bytes, hash of the mask's file, and hash of what its values mean."""
        meaning = hashlib.sha256(self.coding.table.tobytes()).hexdigest()[:16]
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = pool.map(self._hash, range(len(self.masks.paths)))
            for size, said in zip(self.files.contents(), hashes, strict=True):
                yield f"{size} mask {said} {meaning}"

    def _hash(self, index: int) -> str:
        try:
            with open(self._path(index), "rb") as file:
                return hashlib.sha256(file.read()).hexdigest()[:16]
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}.") from error

    def freshness(self) -> str:
        """That of images and masks."""
        return hashlib.sha256(f"{self.files.freshness()} {self.masks.freshness()}".encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class CocoMasks:
    """Image files, and masks that are made of the objects annotated in them. Class 0 is the background."""

    files: AnnotatedFiles
    annotations: Annotations
    file: str  # of the annotations, for errors

    def image(self, index: int) -> Image.Image:
        """Read, decode and measure one image."""
        return self.files.image(index)

    def mask(self, index: int, size_px: tuple[int, int]) -> Mask:
        """Paint the objects, from large to small."""
        width, height = size_px
        mask, rows, objects = np.zeros((height, width), np.uint16), self.annotations.rows(index), self.annotations
        ignored = [row for row in rows if objects.crowd[row] or not objects.outlines[row]]
        known = sorted(set(rows) - set(ignored), key=lambda row: (-objects.area[row], objects.id[row]))
        for row in ignored:
            if outline := objects.outlines[row]:
                mask[self._filled(outline, row, size_px)] = IGNORE
            else:
                left, top, wide, high = objects.box[row].tolist()
                mask[int(top) : int(np.ceil(top + high)), int(left) : int(np.ceil(left + wide))] = IGNORE
        for row in known:
            mask[self._filled(objects.outlines[row], row, size_px)] = 1 + objects.category[row]
        return mask

    def _filled(self, outline: Outline, row: int, size_px: tuple[int, int]) -> npt.NDArray[np.bool_]:
        from pycocotools import mask as tools

        width, height = size_px
        try:
            if isinstance(outline, dict):
                if list(outline["size"]) != [height, width]:
                    raise ValueError(f"run lengths of {outline['size']} pixels in an image of {[height, width]}")
                packed = tools.frPyObjects(outline, height, width) if isinstance(outline["counts"], list) else outline
            else:
                # Two points are no area, and pycocotools would take their four numbers for a box.
                polygons = [polygon for polygon in outline if len(polygon) >= 6]
                packed = tools.merge(tools.frPyObjects(polygons, height, width)) if polygons else None
            if packed is None:
                return np.zeros((height, width), np.bool_)
            with warnings.catch_warnings():  # pycocotools is older than NumPy 2's rules for copies
                warnings.simplefilter("ignore", DeprecationWarning)
                return np.asarray(tools.decode(packed)).astype(np.bool_)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise UserError(
                f"{self.file}: the outline of annotation {self.annotations.id[row]} cannot be filled: {error}. "
                "Expected polygons or run lengths as in COCO's instances files; fetch or make the file again."
            ) from error

    def take(self, indices: Integers) -> CocoMasks:
        """The source of these images only."""
        return CocoMasks(self.files.take(indices), self.annotations.take(indices), self.file)

    def contents(self) -> Iterable[str]:
        """What the annotated files say, and how a mask is made of it."""
        return (f"{content} masks v{COCO_MASKS_VERSION}" for content in self.files.contents())

    def freshness(self) -> str:
        """That of the files, and of the annotations."""
        said = "".join(self.files.hashes)
        return hashlib.sha256(f"{self.files.freshness()} {said}".encode()).hexdigest()
