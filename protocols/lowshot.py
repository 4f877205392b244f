"""Logistic regression on frozen features of few labeled images: 1, 2 or 5 a class, 1 % or 10 %.

    ssl-bench run --ckpt x.pth --protocol lowshot              the first row below, MSN's
    ssl-bench run --ckpt x.pth --protocol lowshot/moca --set amounts=1percent --set solver=cyanure

Labeled are splits of the training images: MSN's and SimCLR's lists where they are found, else drawn by the seed
(label_splits.py). `--set lists=FOLDER` names a place for lists, `--set lists=draw` draws nevertheless.

Each vector is centered by its own mean (MSN, MOCA) and brought to unit length. Then (MSN, logistic_eval.py)

    minimize over W    1/n sum_i CE(W x_i, y_i) + penalty/2 ||W||^2

with no intercept. `lambdas` are the penalty (iBOT), or are divided by the number of images n (MSN, MOCA). With several,
the best on the test images is reported, as iBOT does, and each beside it.

Of many training images only those of the splits are read; few are read all, in one pass with other protocols.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import Features, FloatArray, extract
from ssl_bench.evaluate.readings import Interpolation, Reading, Token
from ssl_bench.evaluate.splits import Split
from ssl_bench.evaluate.subject import IntArray, Score, Scores, Subject, accuracy, over_splits
from ssl_bench.evaluate.vectors import Vectors
from ssl_bench.progress import bar
from ssl_bench.protocols.label_splits import Amount, Labeled, labeled_splits, lists_used, require_enough
from ssl_bench.protocols.logistic import SOLVERS, Solution

VERSION = 1
DATA, DISTRIBUTED = "images", False


@dataclass(frozen=True)
class Recipe:
    """How one paper does it. The first amount is the main one."""

    amounts: tuple[Amount, ...]
    splits: int  # an amount; of 1 % and 10 % there is one list, so one split where lists are read
    vector: Token
    norm: bool  # the network's final norm
    centering: bool  # each vector by its own mean over dimensions
    lambdas: tuple[float, ...]
    divided_by_n: bool  # whether the penalty is lambda / n, n the number of images
    solver: Literal["lbfgs", "cyanure"]
    resize_px: int
    crop_px: int
    interpolation: Interpolation
    lists: str | None  # a folder; None: with the dataset or in SSL_BENCH_DATA, else drawn; "draw": drawn
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.splits < 1:
            raise UserError(f"splits={self.splits}: expected at least 1; for example --set splits=3")
        for name, values in (("amounts", self.amounts), ("lambdas", self.lambdas)):
            if len(set(values)) < len(values):
                raise UserError(f"{name}={','.join(map(str, values))}: expected each once.")
        if min(self.lambdas) < 0:
            raise UserError(f"lambdas={min(self.lambdas):g}: expected a positive number, for example --set lambdas=0.1")
        if self.solver == "cyanure" and min(self.lambdas) == 0:
            raise UserError("lambdas=0: cyanure cannot tell whether a minimum exists; take --set solver=lbfgs.")

    @property
    def selected_on(self) -> Literal["none", "test"]:
        """What lambda was chosen on."""
        return "test" if len(self.lambdas) > 1 else "none"


_SHOTS: tuple[Amount, ...] = ("1shot", "2shot", "5shot", "1percent")
_PERCENT: tuple[Amount, ...] = ("1percent", "10percent")

# The three scripts call cyanure (MOCA's released one scikit-learn, but its paper names cyanure). The minimum is one and
# the same, and `lbfgs` comes closer to it.
# fmt: off
RECIPES: dict[str, Recipe] = {
    #              amounts   splits vector        norm  center lambdas           / n    solver   resize crop
    # The lambda of each network is not published. .075 is the author's for ViT-S and 1 % (facebookresearch/msn#11);
    # assumption: the same for 1, 2 and 5 images.
    "msn":  Recipe(_SHOTS,   3,     "cls",        False, True,  (0.075,),         True,  "lbfgs", 256, 224, "bilinear",
                   lists=None, source="facebookresearch/msn logistic_eval.py; lambda: its issue 11",
                   published="ImageNet: MSN ViT-B/16 49.8 / 58.9 / 65.5 / 69.4 (MOCA Table 8), ViT-S/16 1 % 67.2"),
    "moca": Recipe(_SHOTS,   3,     "patch_mean", False, True,  (0.1,),           True,  "lbfgs", 256, 224, "bilinear",
                   lists=None, source="valeoai/MOCA eval_lowshot_logistic.py",
                   published="ImageNet: MOCA ViT-B/16 55.4 / 63.9 / 69.9 / 72.4 (Table 8)"),
    # The script reads whatever folder it is given and prints a result a lambda. Assumption: SimCLR's 1 % and 10 %,
    # which the project's fine-tuning reads. One split; .1 comes first, since it is "usually working the best".
    "ibot": Recipe(_PERCENT, 1,     "cls",        True,  False, (0.1, 0.01, 1.0), False, "lbfgs", 256, 224, "bicubic",
                   lists=None, source="bytedance/ibot evaluation/eval_logistic_regression.py",
                   published="none in the five papers; MSN's way, MOCA Table 8 has iBOT ViT-B/16 1 % 69.7"),
}
# fmt: on


_FEW = 50_000  # training images: so many are read whole


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """One vector an image. Of many training images `run` reads those of the splits alone."""
    read = [_reading(subject, recipe)]
    return {"train": read, "val": read} if len(subject.split("train")) <= _FEW else {"val": read}


def _reading(subject: Subject, recipe: Recipe) -> Reading:
    view = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
    return Reading(recipe.vector, view, layer=-1, norm=recipe.norm)


def check(subject: Subject, recipe: Recipe) -> None:
    """The same classes in train and val, and of each of them enough images in every split."""
    subject.require_shared_classes()
    splits_of(subject, recipe)


def splits_of(subject: Subject, recipe: Recipe) -> dict[Amount, tuple[Labeled, ...]]:
    """The splits of every amount: as listed, else drawn."""
    return {
        amount: labeled_splits(
            subject.split("train"),
            amount,
            splits=recipe.splits,
            lists=recipe.lists,
            root=subject.dataset.root,
            seed=subject.seed,
        )
        for amount in recipe.amounts
    }


# --- scores ----------------------------------------------------------------------------------------------------------


def data_used(subject: Subject, recipe: Recipe) -> dict[str, str]:
    """Which lists were found: part of the run's identity."""
    return lists_used(splits_of(subject, recipe))


@dataclass(frozen=True, eq=False)
class _Fit:
    """One classifier on the test images."""

    given: float  # lambda
    penalty: float
    solution: Solution
    predicted: IntArray

    def facts(self, correct: Score) -> dict[str, object]:
        """For the record."""
        return {
            "lambda": self.given,
            "penalty": self.penalty,
            "top1": correct.value,
            "solver": self.solution.solver,
            "iterations": self.solution.iterations,
            "objective": self.solution.objective,
            "optimality_gap": self.solution.gap,
        }


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Accuracy of every amount: mean and standard deviation over its splits."""
    splits, train = splits_of(subject, recipe), subject.split("train")
    reading = _reading(subject, recipe)
    wanted = np.unique(np.concatenate([each.rows for labeled in splits.values() for each in labeled]))
    rows, raw, key = _train_vectors(subject, reading, wanted)
    vectors = prepared(raw, recipe.centering)
    test = subject.features("val", reading)
    labels = subject.labels("val", test)

    metrics: dict[str, Score] = {}
    amounts: dict[str, object] = {}
    fits: list[_Fit] = []
    with bar(f"logistic regression on {subject.checkpoint.name}", sum(map(len, splits.values()))) as advance:
        for amount, labeled in splits.items():
            fitted: list[list[_Fit]] = []
            for each in labeled:
                kept = np.flatnonzero(np.isin(rows, each.rows))  # broken images have been left out
                require_enough(train, rows[kept], amount, "what could be read")
                fitted.append(_fits(vectors[kept], train.labels[rows[kept]], test, recipe, subject.effort.device))
                advance(1)
            scores = [[accuracy(fit.predicted == labels) for fit in of_split] for of_split in fitted]
            by_lambda = [_over(of_lambda) for of_lambda in zip(*scores, strict=True)]
            best = max(range(len(by_lambda)), key=lambda index: by_lambda[index].value)  # of equals the first
            metrics[f"top1_{amount}"] = by_lambda[best]
            if len(recipe.lambdas) > 1:
                named = zip(recipe.lambdas, by_lambda, strict=True)
                metrics |= {f"top1_{amount}_lambda{given:g}": score for given, score in named}
            facts = [
                _about(train, rows, each) | {"fits": [f.facts(s) for f, s in zip(of_split, values, strict=True)]}
                for each, of_split, values in zip(labeled, fitted, scores, strict=True)
            ]
            amounts[amount] = {"chosen_lambda": recipe.lambdas[best], "splits": facts}
            fits += [fit for of_split in fitted for fit in of_split]
            predicted = fitted[0][best].predicted
    alone = len(splits) == 1 and len(next(iter(splits.values()))) == 1
    return Scores(
        metrics,
        main=f"top1_{recipe.amounts[0]}",
        predictions=predicted if alone else None,
        warnings=_warnings(subject, recipe, splits, fits),
        details={"amounts": amounts, "train_images_read": len(rows), "train_features": key},
        evaluated={"train": len(rows)},
        skipped={"train": len(wanted) - len(rows)},
    )


def _train_vectors(subject: Subject, reading: Reading, wanted: IntArray) -> tuple[IntArray, FloatArray, str]:
    """Those of the wanted images that can be read, their vectors, and the key of the features."""
    train = subject.split("train")
    if len(train) > _FEW:
        found = extract(subject.checkpoint, train.subset(wanted), [reading], subject.effort)[reading]
        return np.delete(wanted, list(found.broken)), found.array(), found.key
    found = subject.features("train", reading)
    readable = np.delete(np.arange(len(train)), list(found.broken))
    rows = np.intersect1d(wanted, readable)
    return rows, Vectors([found.blocks()]).raw(np.searchsorted(readable, rows)).numpy(), found.key


def prepared(vectors: FloatArray, centering: bool) -> FloatArray:
    """Each row less its own mean over dimensions, then of unit length; a row of zeros stays zeros. (n, D)"""
    rows = vectors.astype(np.float64)
    if centering:
        rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return rows.astype(np.float32)


def _fits(vectors: FloatArray, labels: IntArray, test: Features, recipe: Recipe, device: str) -> list[_Fit]:
    """A classifier a lambda, and what it makes of the test images."""
    seen, targets = np.unique(labels, return_inverse=True)
    found = []
    for given in recipe.lambdas:
        penalty = given / len(labels) if recipe.divided_by_n else given
        solution = SOLVERS[recipe.solver](vectors, targets, classes=len(seen), penalty=penalty, device=device)
        answers = [
            (torch.from_numpy(prepared(block, recipe.centering)).double() @ solution.weight.T).argmax(dim=1)
            for block in test.blocks()
        ]
        found.append(_Fit(given, penalty, solution, seen[torch.cat(answers).numpy()]))
    return found


def _over(scores: Sequence[Score]) -> Score:
    """Over splits; a single one has the standard error of its images."""
    return over_splits([score.value for score in scores]) if len(scores) > 1 else scores[0]


def _about(train: Split, rows: IntArray, labeled: Labeled) -> dict[str, object]:
    """What a split was, for the record."""
    kept = np.intersect1d(rows, labeled.rows)
    counts = np.bincount(train.labels[kept])
    ids = "\n".join(train.sample_ids[int(row)] for row in kept)
    return {
        "origin": labeled.origin,
        "images": len(kept),
        "images_of_a_class": [int(counts[counts > 0].min()), int(counts.max())],
        "sample_ids_sha256": hashlib.sha256(ids.encode("utf-8", "surrogateescape")).hexdigest(),
    }


def _warnings(
    subject: Subject, recipe: Recipe, splits: Mapping[Amount, Sequence[Labeled]], fits: Sequence[_Fit]
) -> tuple[str, ...]:
    """What a reader of the number should know."""
    found = []
    drawn = [amount for amount, labeled in splits.items() if labeled[0].origin.startswith("drawn")]
    if drawn and recipe.lists is None and not subject.dataset.built_in:
        found.append(f"no published lists of {', '.join(drawn)} were found; the images were drawn by the seed")
    worst = max((fit.solution.gap or 0.0) / (fit.solution.objective or 1.0) for fit in fits)
    if worst > 1e-2:
        found.append(f"{recipe.solver} stopped while the objective may be {100 * worst:.1f} % above its minimum")
    return tuple(found)
