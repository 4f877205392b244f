"""N-way K-shot episodes on frozen features: nearest neighbor, and "same class or not" by a threshold.

    ssl-bench run --ckpt x.pth --dataset mini-imagenet --protocol fewshot      5-way 1-shot, the first row below, MMC's
    ssl-bench run --ckpt x.pth --protocol fewshot --set ways=10,shots=5

An episode draws N classes of the val split and of each K support images and Q queries. Nothing is trained, so classes
need not have been seen: in mini-ImageNet, val holds the 20 classes of Ravi and Larochelle's test.csv. Two questions are
asked about the cosines of queries and support images (MMC, Additional Result, Classification; Table 8):

- `accuracy`: a query gets the class of its most similar support image, of all N * K. Mean over episodes.
- `f1`: every pair of a query and a support image is one yes-or-no question; "same class" is said if the cosine is
  above T, which needs no closed set of classes. Hits and errors are counted over the pairs of all episodes, once for
  every T (`f1_t0.5` is that of T = .5), and F1 = 2 TP / (2 TP + FP + FN).

The paper shows "the highest f1 score for each experiment": `f1` is the best over T, on the test episodes themselves.
So `selected_on` says test. That is about `f1` alone; nothing is selected for `accuracy`, which is the main metric.
Saying "same" to every pair gives F1 = 2 / (N + 1), 33.3 for 5 ways. (MAE's 33.8 in Table 8 is little more, which
speaks for pooled pairs.)

Intervals are 1.96 standard errors over episodes. F1 is a ratio of two sums over episodes, A = sum a = sum 2 TP and
B = sum b, b = 2 TP + FP + FN; by linearization its variance is E / (E - 1) * sum (a - F1 b)^2 / B^2. The choice of T
is not part of it.

Cosines are taken in float64 and rounded to 12 digits, so that equal images tie on every machine; ties go to the class
that was drawn first. Episodes depend on the seed and the labels alone: all networks get the same ones, and those of
more shots have the same classes and queries.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import FloatArray
from ssl_bench.evaluate.readings import Interpolation, Reading, Token
from ssl_bench.evaluate.splits import shown
from ssl_bench.evaluate.subject import IntArray, Score, Scores, Subject, over_episodes

VERSION = 1
DATA, DISTRIBUTED = "images", False

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """How episodes are drawn, and what is compared."""

    ways: int
    shots: int
    queries: int  # of every class
    episodes: int
    thresholds: tuple[float, ...]  # `f1` is the best of them
    vector: Token
    norm: bool  # the network's final norm
    resize_px: int
    crop_px: int
    interpolation: Interpolation
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1), ("episodes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: expected at least {least}.")
        rising = all(low < high for low, high in itertools.pairwise(self.thresholds))
        if not rising or not -1 <= self.thresholds[0] <= self.thresholds[-1] < 1:
            given = ",".join(f"{threshold:g}" for threshold in self.thresholds)
            raise UserError(f"thresholds={given}: expected rising cosines, at least -1 and below 1.")

    @property
    def selected_on(self) -> Literal["none", "test"]:
        """The threshold of `f1` is chosen on the episodes that it is reported for; `accuracy` has no choice."""
        return "test" if len(self.thresholds) > 1 else "none"

    @property
    def images(self) -> int:
        """What an episode takes of a class."""
        return self.shots + self.queries


_TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_TABLE_8 = (
    "MMC, accuracy: mini-ImageNet 73.3, CIFAR-10 47.4, Pets 69.7; F1: 62.3, 42.9, 62.1 (Table 8; the text has Pets and "
    "CIFAR-10 the other way round)"
)

# The paper says: 5-way 1-shot, class token, nearest neighbor, thresholds, 84 px brought to 224 px. Assumptions, in all
# rows: 600 episodes of 15 queries a class, as few-shot papers have them; the last block with its final norm; bicubic;
# the short side to 224 and the center 224 x 224, which for the square images of 84 px is just "84x84 to 224x224" (they
# are taken as they lie on disk: lists in front of larger images give other numbers).
# fmt: off
RECIPES: dict[str, Recipe] = {
    #                           ways shots queries episodes thresholds vector        norm  resize crop interpolation
    "mmc":               Recipe(5,   1,    15,     600,     _TENTHS,   "cls",        True, 224,   224, "bicubic",
                                source="MMC, Additional Result, Table 8",
                                published=_TABLE_8),
    # Ours: the other setting of the few-shot field; of 5 support images the nearest counts, not their mean.
    "5-shot":            Recipe(5,   5,    15,     600,     _TENTHS,   "cls",        True, 224,   224, "bicubic",
                                source="ours, after MMC",
                                published=""),
    # Ours: for networks without a class token, and for those whose patches know more (MMC, Table 11).
    "patch-mean":        Recipe(5,   1,    15,     600,     _TENTHS,   "patch_mean", True, 224,   224, "bicubic",
                                source="ours, after MMC",
                                published=""),
    "patch-mean-5-shot": Recipe(5,   5,    15,     600,     _TENTHS,   "patch_mean", True, 224,   224, "bicubic",
                                source="ours, after MMC",
                                published=""),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """One vector of every val image; train is not read."""
    view = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
    return {"val": [Reading(recipe.vector, view, layer=-1, norm=recipe.norm)]}


def check(subject: Subject, recipe: Recipe) -> None:
    """Enough classes, and enough images in each of them."""
    val = subject.split("val")
    _check_images(val.labels, val.classes, recipe)


def _check_images(labels: IntArray, classes: tuple[str, ...], recipe: Recipe) -> None:
    if len(classes) < recipe.ways:
        fitting = f"choose fewer, --set ways={len(classes)}" if len(classes) > 1 else "choose data of several classes"
        raise UserError(f"ways={recipe.ways} is more than the {len(classes)} classes of val; {fitting}.")
    counts = np.bincount(labels, minlength=len(classes))
    few = [f"{classes[c]} ({counts[c]})" for c in np.flatnonzero(counts < recipe.images)]
    if few:
        fewest = int(counts.min())
        fitting = f"--set queries={fewest - recipe.shots}" if fewest > recipe.shots else "fewer shots and queries"
        raise UserError(
            f"an episode takes {recipe.images} images of a class ({recipe.shots} shots, {recipe.queries} queries), and "
            f"{len(few)} of the {len(classes)} classes of val have fewer: {shown(few)}. Choose {fitting}, or data with "
            "more images (--limit and lists leave some out)."
        )


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Accuracy over episodes, and F1 of every threshold over the pairs of all episodes."""
    ((reading,),) = readings(subject, recipe).values()
    features = subject.features("val", reading)
    labels, classes = subject.labels("val", features), subject.split("val").classes
    _check_images(labels, classes, recipe)  # again, since broken images may have been left out
    episodes = draw_episodes(labels, recipe, subject.seed)
    correct, hits, errors = answered(features.array(), episodes, recipe)
    percent = 100 * correct / (recipe.ways * recipe.queries)
    by_threshold = {t: pooled_f1(hits[:, i], errors[:, i]) for i, t in enumerate(recipe.thresholds)}
    best = max(by_threshold, key=lambda threshold: by_threshold[threshold].value)
    metrics = {"accuracy": over_episodes(percent), "f1": by_threshold[best]}
    metrics |= {f"f1_t{threshold:g}": score for threshold, score in by_threshold.items()}
    details = {
        "ways": recipe.ways,
        "shots": recipe.shots,
        "queries": recipe.queries,
        "episodes": recipe.episodes,
        "seed": subject.seed,
        "classes": len(classes),
        "best_threshold": best,
        "accuracy_of_chance": 100 / recipe.ways,
        "f1_of_always_same": 200 / (recipe.ways + 1),
        "correct_queries": correct.tolist(),  # of every episode: other networks meet the same ones
    }
    warnings = (
        _near_chance(metrics["accuracy"], recipe) if subject.checkpoint.format not in ("random", "pixels") else ()
    )
    return Scores(metrics, main="accuracy", warnings=warnings, details=details)


def _near_chance(score: Score, recipe: Recipe) -> tuple[str, ...]:
    """Many a "bad" checkpoint was one whose weights did not load."""
    chance = 100 / recipe.ways
    if score.value - (score.interval95 or 0.0) > chance:
        return ()
    return (f"few-shot is at chance ({chance:.1f} %); does `ssl-bench inspect` show the network that you mean?",)


def draw_episodes(labels: IntArray, recipe: Recipe, seed: int) -> IntArray:
    """Rows of the images of every episode, class by class: first the queries, then the shots. (E, N, Q + K)

    Whole permutations are drawn, so that episodes of more shots have the same classes and queries, and more supports.
    """
    rng = np.random.RandomState(seed)  # RandomState: its streams never change
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    return np.array(
        [
            [rng.permutation(members[c])[: recipe.images] for c in rng.permutation(len(members))[: recipe.ways]]
            for _ in range(recipe.episodes)
        ]
    )


def answered(vectors: FloatArray, episodes: IntArray, recipe: Recipe) -> tuple[IntArray, IntArray, IntArray]:
    """Of every episode: queries that got their class (E,), and for every threshold TP and FP + FN over pairs (E, T)."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    thresholds = np.array(recipe.thresholds)
    own = np.repeat(np.arange(recipe.ways), recipe.queries)  # class of a query, within the episode (N * Q,)
    same = np.repeat(own[:, None] == np.arange(recipe.ways), recipe.shots, axis=1)  # (N * Q, N * K)
    correct = np.empty(len(episodes), np.int64)
    hits, errors = (np.empty((len(episodes), len(thresholds)), np.int64) for _ in range(2))
    for number, episode in enumerate(episodes):
        queries, supports = episode[:, : recipe.queries].ravel(), episode[:, recipe.queries :].ravel()
        cosines = _cosines(vectors, lengths, queries, supports)
        nearest = cosines.argmax(axis=1) // recipe.shots  # argmax: the first of equals
        correct[number] = np.count_nonzero(nearest == own)
        # Counting the pairs above T: sorted once, then looked up.
        of_same, of_others = np.sort(cosines[same]), np.sort(cosines[~same])
        hits[number] = len(of_same) - np.searchsorted(of_same, thresholds, side="right")
        false_alarms = len(of_others) - np.searchsorted(of_others, thresholds, side="right")
        errors[number] = false_alarms + len(of_same) - hits[number]
    return correct, hits, errors


def _cosines(vectors: FloatArray, lengths: Doubles, queries: IntArray, supports: IntArray) -> Doubles:
    """Cosines of queries and supports; 0 with a vector of zeros. (queries, supports)"""
    products = vectors[queries].astype(np.float64) @ vectors[supports].astype(np.float64).T
    scale = lengths[queries][:, None] * lengths[supports]
    cosines: Doubles = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return cosines.round(12)


def pooled_f1(hits: IntArray, errors: IntArray) -> Score:
    """F1 in percent of all episodes' pairs together, with the interval of a ratio of sums (see above)."""
    above, below = 2.0 * hits, 2.0 * hits + errors  # a and b
    f1, n = above.sum() / below.sum(), len(hits)
    if n == 1:
        return Score(100 * float(f1), n)
    error = math.sqrt(n / (n - 1) * float(((above - f1 * below) ** 2).sum())) / float(below.sum())
    return Score(100 * float(f1), n, interval95=100 * 1.96 * error)
