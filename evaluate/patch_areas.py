"""How much of each patch of an image shows what: areas counted exactly, whatever the sizes of image and grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Areas = npt.NDArray[np.float64]  # whole numbers


def patch_areas(mask: npt.NDArray[np.integer[Any]], values: Sequence[int], grid: tuple[int, int]) -> Areas:
    """How much of each cell of a grid of (rows, columns) has each value. (H, W) -> (values, rows * columns)

    The mask is not resized: each cell is held against its own rectangle of it, in fractions of pixels. In units in
    which every cell has the area height x width of the mask in pixels, so that areas are whole numbers.
    """
    down, across = (_shares(parts, side) for parts, side in zip(grid, mask.shape, strict=True))
    areas = np.zeros((len(values), grid[0] * grid[1]))
    for area, value in zip(areas, values, strict=True):
        inside = mask == value
        rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
        if len(rows):  # most objects are small: only the rectangle around one is counted
            y, x = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            area[:] = (down[:, y] @ inside[y, x] @ across[:, x].T).ravel()
    return areas


def _shares(parts: int, side_px: int) -> Areas:
    """How much of each pixel lies in each of the equal parts of a side, as a multiple of 1 / parts. (parts, side)"""
    part, pixel = np.arange(parts)[:, None], np.arange(side_px)
    shared = np.minimum((part + 1) * side_px, (pixel + 1) * parts) - np.maximum(part * side_px, pixel * parts)
    shares: Areas = np.maximum(shared, 0).astype(np.float64)
    return shares
