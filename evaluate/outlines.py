"""Outlines of objects in COCO's form: polygons, or run lengths of the mask column by column; packed, and checked.

pycocotools trusts what it reads: run lengths that do not fill their image send it into an endless loop, coordinates far
outside write over foreign memory. So what it must not see is found here first.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_bench.evaluate.splits import Integers

Floats = npt.NDArray[np.float64]
Outline = list[list[float]] | dict[str, Any]  # polygons x, y, x, y, ..., or run lengths {"counts": ..., "size": [h, w]}

_FARTHEST = 10  # sides of the image that a corner may lie outside; a little is common


@dataclass(frozen=True, eq=False)
class Outlines:
    """Segmentations as in the file, packed; an object without one has the empty list."""

    numbers: Floats  # all coordinates of all polygons
    ends: Integers  # (polygons,) in numbers
    bounds: Integers  # (n + 1,): which polygons are whose
    runs: Mapping[int, dict[str, Any]]  # run lengths, by their position

    @classmethod
    def packed(cls, outlines: Iterable[Sequence[Sequence[float]] | dict[str, Any]]) -> Outlines:
        """Join them."""
        numbers, ends, bounds, runs = array("d"), array("q"), array("q", [0]), {}
        for position, outline in enumerate(outlines):
            if isinstance(outline, dict):
                runs[position] = outline
            else:
                for polygon in outline:
                    numbers.extend(polygon)
                    ends.append(len(numbers))
            bounds.append(len(ends))
        return cls(np.array(numbers), np.array(ends, np.int64), np.array(bounds, np.int64), runs)

    def __getitem__(self, position: int) -> Outline:
        """One outline, in COCO's own form."""
        if position in self.runs:
            return self.runs[position]
        polygons = range(self.bounds[position], self.bounds[position + 1])
        return [self.numbers[self.ends[k - 1] if k else 0 : self.ends[k]].tolist() for k in polygons]


def packed_outlines(record: dict[str, Any]) -> dict[str, Any]:
    """Called by the parser for every object of the file: the numbers of an outline become 8 bytes each, at once."""
    outline = record.get("segmentation")
    if isinstance(outline, list):
        with contextlib.suppress(TypeError):  # what is no list of lists of numbers is refused later, with its id
            record["segmentation"] = [array("d", polygon) for polygon in outline]
    return record


def is_outline(value: Any) -> bool:
    """Polygons were packed while parsing; an object may have a box alone."""
    if isinstance(value, dict):
        return isinstance(value.get("counts"), (list, str)) and isinstance(value.get("size"), list)
    return value is None or (isinstance(value, list) and all(isinstance(polygon, array) for polygon in value))


def unfit(outlines: Outlines, size_px: Integers) -> Iterator[tuple[int, str]]:
    """Places of objects whose outline no program can read, and why. `size_px` (n, 2) are width and height of images."""
    starts = np.concatenate([[0], outlines.ends[:-1]]) if len(outlines.ends) else outlines.ends
    lengths = outlines.ends - starts
    owner = np.repeat(np.arange(len(outlines.bounds) - 1), np.diff(outlines.bounds))  # of each polygon
    for polygon in np.flatnonzero(lengths % 2):
        yield int(owner[polygon]), f"a polygon of {lengths[polygon]} numbers; expected x, y, x, y, ..."
    farthest = np.repeat(_FARTHEST * size_px.max(axis=1)[owner], lengths) if len(owner) else np.empty(0)
    outside = ~(np.abs(outlines.numbers) <= farthest)  # nan is outside too
    if outside.any():
        number = int(np.flatnonzero(outside)[0])
        place = int(np.searchsorted(outlines.ends, number, side="right"))
        yield int(owner[place]), f"the coordinate {outlines.numbers[number]:g}; expected pixels of the image"
    for row, runs in outlines.runs.items():
        width, height = size_px[row].tolist()
        if runs["size"] != [height, width]:
            yield row, f"run lengths of size {runs['size']}, and its image is {[height, width]} (height, width)"
            continue
        counts = run_counts(runs["counts"])
        if counts is None or min(counts, default=0) < 0 or sum(counts) != width * height:
            yield row, f"run lengths that do not fill its image of {width} x {height} px"


def run_counts(counts: list[Any] | str) -> list[int] | None:
    """The lengths of the runs; compressed ones are differences of numbers in base 32. None: no such thing."""
    if not isinstance(counts, str):
        return counts if all(type(count) is int for count in counts) else None
    found: list[int] = []
    value = digit = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or digit > 12:
            return None
        value |= (bits & 31) << 5 * digit
        digit += 1
        if not bits & 32:
            value -= (bits >> 4 & 1) << 5 * digit  # the sign
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = digit = 0
    return None if digit else found
