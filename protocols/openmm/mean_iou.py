"""Mean intersection over union: per image three counts a class, added up over val.

IoU of a class is |predicted and labeled| / |predicted or labeled|, in pixels of the whole split; its accuracy is
|predicted and labeled| / |labeled|. mIoU and mAcc are means over classes, aAcc is the share of right pixels. Pixels
without a label count nowhere, and a class that is neither labeled nor predicted in any image is left out of the mean,
all as in mmseg's IoUMetric (which rounds to two decimals, and this does not).

How far mIoU depends on the val images that happened to be taken is their bootstrap standard error: images are drawn
with replacement, and mIoU is computed anew from their counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.masks import IGNORE

Counts = npt.NDArray[np.int64]  # (..., 3, classes): pixels predicted and labeled so, predicted so, labeled so

_RESAMPLES = 400
_AT_A_TIME = 50


@dataclass(frozen=True)
class MeanIoU:
    """What the runner asks a metric (runner.py)."""

    classes: int

    def read(self, sample: Mapping[str, Any]) -> Counts:
        """The counts of one image."""
        return counts(sample["pred_sem_seg"]["data"], sample["gt_sem_seg"]["data"], self.classes)

    def scores(self, results: Sequence[Counts]) -> dict[str, Any]:
        """mIoU ("main") with its standard error, mAcc and aAcc in percent, and IoU and accuracy of every class."""
        per_image = np.stack(results)
        ious, accuracies = by_class(per_image.sum(axis=0))
        hits, _, labeled = per_image.sum(axis=(0, 2)).tolist()
        if not labeled:
            raise UserError("no pixel of val has a label, so nothing can be scored. Expected masks that name classes.")
        return {
            "main": _mean(ious),
            "stderr": bootstrap_error(per_image),
            "macc": _mean(accuracies),
            "aacc": 100 * hits / labeled,
            "iou": _plain(ious),
            "accuracy": _plain(accuracies),
        }


def counts(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> Counts:
    """Of one image; `labels` holds classes or IGNORE. (3, classes)"""
    known = labels != IGNORE
    predicted, labels = predicted[known].long(), labels[known].long().to(predicted.device)
    hit = predicted[predicted == labels]
    numbers = torch.cat([hit, predicted + classes, labels + 2 * classes])
    found: Counts = torch.bincount(numbers, minlength=3 * classes).cpu().numpy()
    assert len(found) == 3 * classes, "a label outside the classes"
    return found.reshape(3, classes)


def by_class(total: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """IoU and accuracy in percent, nan where a class does not occur. (..., 3, classes) -> two of (..., classes)"""
    hit, predicted, labeled = np.moveaxis(np.asarray(total, np.float64), -2, 0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that is wanted
        return 100 * hit / (predicted + labeled - hit), 100 * hit / labeled


def bootstrap_error(per_image: Counts) -> float | None:
    """The standard deviation of mIoU over drawings of as many images, with replacement. (n, 3, classes)"""
    n = len(per_image)
    if n < 2:
        return None
    flat = per_image.reshape(n, -1).astype(np.float64)  # exact: no count comes near 2**53
    rng = np.random.default_rng(0)
    means: list[float] = []
    for _ in range(_RESAMPLES // _AT_A_TIME):
        times = rng.multinomial(n, np.full(n, 1 / n), size=_AT_A_TIME).astype(np.float64)  # how often each is drawn
        totals = (times @ flat).reshape(_AT_A_TIME, *per_image.shape[1:])
        means += [_mean(ious) for ious in by_class(totals)[0]]
    return float(np.nanstd(means, ddof=1))  # nan: none of the few images with labels was drawn


def _mean(values: npt.NDArray[np.float64]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan


def _plain(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
