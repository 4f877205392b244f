"""Features as rows that can be taken in any order, out of memory-mapped shards, several readings joined."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_bench.evaluate.features import FloatArray
from ssl_bench.evaluate.subject import IntArray


class Vectors:
    """Rows of unit length, out of one or several memory-mapped parts that are joined (class token and patch mean)."""

    def __init__(self, parts: Sequence[Iterable[FloatArray]], rows: IntArray | None = None) -> None:
        self.blocks = [[torch.from_numpy(part) for part in block] for block in zip(*parts, strict=True)]
        self.ends = np.cumsum([len(block[0]) for block in self.blocks])
        self.rows = np.arange(self.ends[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        """The length of a joined vector."""
        return sum(part.shape[1] for part in self.blocks[0])

    def raw(self, positions: IntArray) -> Tensor:
        """The rows at `positions`, in that order, as they are. (n, D) float32"""
        wanted = self.rows[positions]
        if len(self.blocks) == 1:
            return _joined(self.blocks[0], torch.from_numpy(wanted))
        which = np.searchsorted(self.ends, wanted, side="right")
        result = torch.empty(len(wanted), self.dim)
        for number in np.unique(which):
            inside = np.flatnonzero(which == number)
            local = torch.from_numpy(wanted[inside] - (self.ends[number] - len(self.blocks[number][0])))
            result.index_copy_(0, torch.from_numpy(inside), _joined(self.blocks[number], local))
        return result

    @functools.cached_property
    def lengths(self) -> Tensor:
        """The Euclidean length of every row, in float64; a row of zeros stays zeros. (n,)"""
        blocks = (np.arange(start, min(start + 2048, len(self))) for start in range(0, len(self), 2048))
        return torch.cat([self.raw(rows).double().norm(dim=1) for rows in blocks]).clamp_(min=1e-30)

    def unit(self, positions: IntArray, dtype: torch.dtype) -> Tensor:
        """The rows at `positions`, normalized. (n, D)"""
        return self.raw(positions).to(dtype).div_(self.lengths[torch.from_numpy(positions)].to(dtype)[:, None])


def _joined(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    chosen = [part.index_select(0, rows) for part in parts]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)
