"""What a protocol is given (a Subject) and what it gives back (Scores)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ssl_bench.errors import UserError
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.features import Features, extract
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.readings import Interpolation, Reading, View
from ssl_bench.evaluate.splits import shown

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Backbone, Pixels
    from ssl_bench.evaluate.splits import AnyDataset, Split

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """One number in percent unless its name says otherwise, with at most one kind of uncertainty."""

    value: float
    n: int
    stderr: float | None = None  # of a mean over n samples
    std: float | None = None  # over n splits or seeds, ddof 1
    interval95: float | None = None  # half the 95 % interval of a mean over n episodes


@dataclass(frozen=True, eq=False)
class Scores:
    """What a protocol found."""

    metrics: Mapping[str, Score]
    main: str
    predictions: IntArray | None = None  # where samples are counted: the predicted class of every val image
    warnings: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)  # for the record: plain values that JSON can hold
    lower_is_better: bool = False  # the main metric
    files: Mapping[str, bytes] = field(default_factory=dict)  # by name: written beside the record
    # Of protocols that read images themselves: how many images of each split were evaluated, and how many skipped.
    evaluated: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)


def accuracy(correct: npt.NDArray[np.bool_]) -> Score:
    """Percent correct, with the binomial standard error."""
    p = float(correct.mean())
    return Score(100 * p, len(correct), stderr=100 * math.sqrt(p * (1 - p) / len(correct)))


def over_splits(values: Sequence[float]) -> Score:
    """Mean over splits or seeds, with their standard deviation (ddof 1); one split has none."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Score(float(np.mean(values)), len(values), std=std)


def over_episodes(values: Sequence[float] | npt.NDArray[np.float64]) -> Score:
    """Mean over episodes, with half its 95 % interval: 1.96 standard errors (ddof 1), as few-shot papers give it."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(float(np.mean(values)), len(values), interval95=None if error is None else 1.96 * error)


@dataclass(eq=False)
class Subject:
    """One network on one dataset: what every protocol reads from. Nothing is computed before it is asked for."""

    checkpoint: Checkpoint
    dataset: AnyDataset
    effort: Effort
    seed: int = 0
    _features: dict[tuple[str, Reading], Features] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone | Pixels:
        """The network, on the device, in eval mode. Brought there anew: fine-tuning moves it out of its way."""
        return self.checkpoint.backbone.to(self.effort.device)

    def split(self, name: str) -> Split:
        """`train`, `val` or another one by name, or an error that says what the dataset has."""
        if name not in self.dataset.splits:
            there = ", ".join(self.dataset.splits) or "none"
            raise UserError(
                f"dataset {self.dataset.name} has no {name} split, which this protocol needs (it has {there})."
            )
        return self.dataset.splits[name]

    def require_shared_classes(self) -> None:
        """For protocols that classify val images by the classes of train: several classes, the same in both splits."""
        train, val = self.split("train"), self.split("val")
        if train.classes != val.classes:
            raise UserError(
                f"dataset {self.dataset.name} has other classes in val than in train (it is made for few-shot "
                "episodes), so val images cannot be classified by training images. Choose one whose splits share them."
            )
        seen = np.unique(train.labels)
        if len(seen) < 2:
            raise UserError(
                f"the training images of {self.dataset.name} are all of one class, and one class cannot be told from "
                "others. Expected at least two (--limit and lists leave some out)."
            )
        if unseen := [val.classes[label] for label in np.setdiff1d(val.labels, seen)]:
            raise UserError(
                f"{len(unseen):,} classes of val have no training image in {self.dataset.name}: {shown(unseen)}. "
                "Complete the training images or their list, or keep the common classes with --class-list."
            )

    def view(self, resize_px: int, crop_px: int, interpolation: Interpolation) -> View:
        """The recipe's view; built-in images are brought to the network's own size (pixels: to none) instead.

        Then all by the same interpolation, so that all protocols share one pass.
        """
        if not self.dataset.built_in:
            return View(resize_px, crop_px, interpolation)
        own = self.checkpoint.architecture.image_px or None
        return View(own, own, "bicubic")

    def prepare(self, split: str, readings: list[Reading]) -> None:
        """Extract several readings by as few passes as possible; `features` then finds them."""
        wanted = [reading for reading in dict.fromkeys(readings) if (split, reading) not in self._features]
        if wanted:
            for reading, features in extract(self.checkpoint, self.split(split), wanted, self.effort).items():
                self._features[split, reading] = features

    def features(self, split: str, reading: Reading) -> Features:
        """One vector for every readable image of the split."""
        self.prepare(split, [reading])
        return self._features[split, reading]

    def labels(self, split: str, features: Features) -> IntArray:
        """The classes of the rows of `features`."""
        labels: IntArray = np.delete(self.split(split).labels, list(features.broken))
        return labels

    def broken(self, split: str) -> tuple[int, ...]:
        """The images of the split that could not be read (and were skipped), by their index."""
        return next((features.broken for (name, _), features in self._features.items() if name == split), ())

    def used(self, readings: Mapping[str, Sequence[Reading]]) -> list[tuple[str, Reading, Features]]:
        """Those of the extracted features that a protocol read, for its record."""
        return [
            (split, reading, found)
            for (split, reading), found in self._features.items()
            if reading in readings.get(split, ())
        ]
