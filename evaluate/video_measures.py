"""How well masks follow objects through a video: region similarity J and boundary accuracy F, as DAVIS defines them.

    j, f = measure_frame(truth, found, objects)      for every object, of label maps (H, W) with 0 for the background
    summary(j_of_frames)                             mean, recall, decay

J is the intersection over the union (Jaccard index); 1 where neither mask has the object. F is the harmonic mean of
precision and recall of the boundary pixels, where one is met if the other boundary passes within .008 of the frame's
diagonal, rounded up. (Perazzi et al. 2016, section 4; davisvideochallenge/davis2017-evaluation metrics.py, utils.py.)

There every object and frame is dilated by a disk on its own. Here an object is a bit: one pass of shifts over the part
of the frame that has objects dilates eight of them, and the numbers stay the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint8]  # (H, W): 0 background, k the k-th object; also (H, W) of eight objects' bits
Floats = npt.NDArray[np.float64]

TOLERANCE = 0.008  # of the diagonal
_AT_ONCE = 8  # objects, as many as a byte has bits


@dataclass(frozen=True)
class Summary:
    """Of one measure of one object over its frames."""

    mean: float
    recall: float  # the share of frames above .5
    decay: float  # mean of the first quarter less that of the last


def summary(values: Floats) -> Summary:
    """Quarters as in davis2017-evaluation's db_statistics: they share their border frames.

    Its borders are 8-bit integers, which wrap around in a video of more than 256 frames; these do not.
    """
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return Summary(float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean()))


def measure_frame(truth: Labels, found: Labels, objects: int) -> tuple[Floats, Floats]:
    """J and F of the objects 1 to `objects`; labels above are background."""
    assert truth.shape == found.shape
    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    truth, found = _where_objects_are(truth, found)
    j, f = np.ones(objects), np.ones(objects)
    for start in range(0, objects, _AT_ONCE):
        some = slice(start, min(start + _AT_ONCE, objects))
        one, other = _bits(truth, start), _bits(found, start)
        shared, either = (_counts(both, some.stop - start) for both in (one & other, one | other))
        j[some] = np.where(either == 0, 1.0, shared / np.maximum(either, 1))
        f[some] = _boundary_accuracy(one, other, radius, some.stop - start)
    return j, f


def _where_objects_are(truth: Labels, found: Labels) -> tuple[Labels, Labels]:
    """Both cut to the smallest window with all objects, and one pixel around it where the frame has one."""
    covered = (truth | found) > 0
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    if not len(rows):
        return truth[:0, :0], found[:0, :0]
    window = tuple(slice(max(int(inside[0]) - 1, 0), int(inside[-1]) + 2) for inside in (rows, columns))
    return truth[window], found[window]


def _bits(labels: Labels, start: int) -> Labels:
    """The first bit for label start + 1, and so on; none for others, whose shift is too large for a byte."""
    bits: Labels = np.left_shift(np.uint8(1), labels - np.uint8(start + 1))
    return bits


def _counts(bits: Labels, objects: int) -> npt.NDArray[np.int64]:
    """How many pixels have each of the bits."""
    return np.array([np.count_nonzero(bits & np.uint8(1 << k)) for k in range(objects)], np.int64)


def boundaries(bits: Labels) -> Labels:
    """Pixels that differ from their right, lower, or lower right neighbor: the boundary, half a pixel to the origin.

    In the last row and column a pixel is its own missing neighbor.
    """
    padded = np.pad(bits, ((0, 1), (0, 1)), mode="edge") if bits.size else np.zeros((1, 1), np.uint8)
    right, lower, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    result: Labels = (bits ^ right) | (bits ^ lower) | (bits ^ diagonal)
    return result


def dilated(bits: Labels, radius: int) -> Labels:
    """By a disk, x^2 + y^2 <= radius^2: rows, widened as far as the disk is wide there, and shifted to where it is."""
    result, wide, reach = bits.copy(), bits.copy(), 0
    for away in range(radius, -1, -1):
        while reach < (needed := math.isqrt(radius**2 - away**2)):
            step = min(needed - reach, 2 * reach + 1)  # further, a gap would remain
            narrow, reach = wide.copy(), reach + step
            wide[:, step:] |= narrow[:, :-step]
            wide[:, :-step] |= narrow[:, step:]
        result[away:] |= wide[: max(len(wide) - away, 0)]
        result[: max(len(wide) - away, 0)] |= wide[away:]
    return result


def _boundary_accuracy(truth: Labels, found: Labels, radius: int, objects: int) -> Floats:
    """F of up to eight objects. Where there is no boundary, none of it is missed (recall) or wrong (precision)."""
    of_truth, of_found = boundaries(truth), boundaries(found)
    wanted, given = _counts(of_truth, objects), _counts(of_found, objects)
    met, right = of_truth & dilated(of_found, radius), of_found & dilated(of_truth, radius)
    recall = np.where(wanted == 0, 1.0, _counts(met, objects) / np.maximum(wanted, 1))
    precision = np.where(given == 0, 1.0, _counts(right, objects) / np.maximum(given, 1))
    total = precision + recall
    return np.where(total == 0, 0.0, 2 * precision * recall / np.where(total == 0, 1.0, total))
