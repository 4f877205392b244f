"""Schedules as pure functions of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` steps are done."""

    step: int
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> float:
        """Epochs done, with their fraction."""
        return self.step / self.steps_per_epoch

    @property
    def share(self) -> float:
        """Of the whole run, in [0, 1]."""
        return self.epoch / self.epochs

    @property
    def epoch_ended(self) -> bool:
        """Whether the last step closed an epoch."""
        return self.step % self.steps_per_epoch == 0


def cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1), and `end` after that."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


def warmup_cosine(peak: float, end: float, *, epoch: float, warmup_epochs: float, total_epochs: float) -> float:
    """Linear from 0 to `peak` in the warm-up, then half a cosine to `end` at `total_epochs`. MAE, MoCo-v3, MOCA, ..."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return cosine(peak, end, (epoch - warmup_epochs) / (total_epochs - warmup_epochs))
