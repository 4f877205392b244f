"""How alike two patches of an image are, of one category and of different ones: histograms, and what they share.

MMC, Fig. 1c, Fig. 5 and Table 5. Protocol `similarity` counts a data set so, and `ssl-bench show --kind histogram` one
image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ssl_bench.evaluate.subject import IntArray

Background = Literal["out", "in", "other"]
Numbers = npt.NDArray[np.float64]

BINS = 200  # from -1 to 1, of .01 each; the paper does not say
KINDS = ("inter", "intra")  # in the order of the rows of `Pairs`
NO_CATEGORY, NO_PAIR = -1, -2  # the background; a token that is in no pair
_ROWS = 512  # of an image's matrix of similarities at a time


@dataclass(frozen=True, eq=False)
class Pairs:
    """What is counted of one image, or of several: a row for inter and one for intra."""

    counts: IntArray  # (2, bins)
    sums: Numbers  # (2,) of the cosines


def count_pairs(features: Tensor, category: IntArray, *, background: Background, bins: int) -> Pairs:
    """Every pair of tokens of unit length above the diagonal, some rows of the matrix at a time. (N, D), (N,)

    background=other: tokens of NO_CATEGORY differ from all objects, and two of them are no pair.
    """
    kept = np.flatnonzero(category != NO_PAIR)
    unit, label = features[kept], category[kept]
    counts, sums = np.zeros(2 * bins, np.int64), np.zeros(2)
    for start in range(0, len(label), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(label)))
        similarity = (unit[rows] @ unit[start:].T).cpu().numpy()
        is_pair = np.arange(start, len(label)) > rows[:, None]
        same = label[rows][:, None] == label[start:]
        if background == "other":
            is_pair &= ~(same & (label[rows] == NO_CATEGORY)[:, None])
        value, kind = similarity[is_pair].astype(np.float64), same[is_pair].astype(np.int64)
        # Rounding may carry the cosine of equal tokens past 1.
        place = np.clip(np.floor((value + 1) * (bins / 2)).astype(np.int64), 0, bins - 1)
        counts += np.bincount(place + bins * kind, minlength=2 * bins)
        sums += np.bincount(kind, value, minlength=2)
    return Pairs(counts.reshape(2, bins), sums)


def overlap(counts: IntArray) -> float:
    """The integral of the smaller one of two densities. (2, bins)"""
    return float((counts / counts.sum(axis=1, keepdims=True)).min(axis=0).sum())


def densities(counts: IntArray) -> tuple[Numbers, Numbers]:
    """Edges of the bins, and histograms with an area of 1 each. (2, bins) -> (bins + 1,), (2, bins)"""
    bins = counts.shape[1]
    return np.linspace(-1, 1, bins + 1), counts / counts.sum(axis=1, keepdims=True) * (bins / 2)
