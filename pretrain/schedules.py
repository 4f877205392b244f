"""Schedules as pure functions of progress."""

from __future__ import annotations

import math


def cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1), and `end` after that."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


def warmup_cosine(peak: float, end: float, *, epoch: float, warmup_epochs: float, total_epochs: float) -> float:
    """Linear from 0 to `peak` in the warm-up, then half a cosine to `end` at `total_epochs`. MAE, MoCo-v3, MOCA, ..."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return cosine(peak, end, (epoch - warmup_epochs) / (total_epochs - warmup_epochs))
