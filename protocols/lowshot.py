"""Logistic regression on frozen features of few labeled images: 1, 2 or 5 a class, 1 % or 10 %.

    ssl-bench run --ckpt x.pth --protocol lowshot              the first row below, MSN's
    ssl-bench run --ckpt x.pth --protocol lowshot/moca --set amounts=1percent --set solver=cyanure

Labeled are splits of the training images. MSN's and SimCLR's lists are read as they are where they are found:
imagenet_subsets{1,2,3}/{1,2,5}imgs_class.txt (of MSN's, the third of 5 is misnamed 3imgs_class.txt; both names will
do), and imagenet_subsets1/1percent.txt or {1,10}percent.txt. They are looked for in the dataset's folder and in
SSL_BENCH_DATA; `--set lists=FOLDER` names another one, `--set lists=draw` draws nevertheless.

What has no list is drawn: of one shuffling a split every class gives its first images, so that 1 shot is part of 2
shots. Different splits may share images. Of 1 % of a class the nearest whole number is taken, and at least one image.

Each vector is centered by its own mean (MSN, MOCA) and brought to unit length. Then (MSN, logistic_eval.py)

    minimize over W    1/n sum_i CE(W x_i, y_i) + penalty/2 ||W||^2

with no intercept. `lambdas` are the penalty (iBOT), or are divided by the number of images n (MSN, MOCA). With several,
the best on the test images is reported, as iBOT does, and each beside it.

Of the training images only those of the splits are read.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import Features, FloatArray, extract
from ssl_bench.evaluate.readings import Interpolation, Reading, Token
from ssl_bench.evaluate.splits import Split, shown
from ssl_bench.evaluate.subject import IntArray, Score, Scores, Subject, accuracy, over_splits
from ssl_bench.evaluate.subsets import listed_images
from ssl_bench.files import data_folder
from ssl_bench.progress import bar
from ssl_bench.protocols.logistic import SOLVERS, Solution

VERSION = 1
DATA, DISTRIBUTED = "images", False

Amount = Literal["1shot", "2shot", "5shot", "1percent", "10percent"]
_DRAW = "draw"


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


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """One vector an image, of all val images; of the training images `run` reads those of the splits alone."""
    return {"val": [_reading(subject, recipe)]}


def _reading(subject: Subject, recipe: Recipe) -> Reading:
    view = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
    return Reading(recipe.vector, view, layer=-1, norm=recipe.norm)


def check(subject: Subject, recipe: Recipe) -> None:
    """The same classes in train and val, and of each of them enough images in every split."""
    subject.require_shared_classes()
    splits_of(subject, recipe)


@dataclass(frozen=True, eq=False)
class Labeled:
    """The labeled images of one split."""

    rows: IntArray  # in the training split, rising
    origin: str  # the list's name, or how they were drawn


def splits_of(subject: Subject, recipe: Recipe) -> Mapping[Amount, Sequence[Labeled]]:
    """The splits of every amount: as listed, else drawn."""
    return _splits(subject.split("train"), recipe, subject.dataset.root, data_folder(), subject.seed)


@functools.lru_cache(maxsize=4)  # ImageNet's 1.28 million names are compared with eleven lists: once, not twice a run
def _splits(
    train: Split, recipe: Recipe, root: Path | None, data: Path, seed: int
) -> dict[Amount, tuple[Labeled, ...]]:
    places = _places(recipe, root, data)
    found: dict[Amount, tuple[Labeled, ...]] = {}
    for amount in recipe.amounts:
        lists = _lists(train, amount, recipe, places)
        found[amount] = tuple(_listed(train, amount, path) for path in lists) or tuple(
            _drawn(train, amount, seed, number) for number in range(recipe.splits)
        )
    return found


# --- lists -----------------------------------------------------------------------------------------------------------


def _places(recipe: Recipe, root: Path | None, data: Path) -> list[Path]:
    """Where lists may lie."""
    if recipe.lists is None:
        return [root, data] if root else []
    if recipe.lists == _DRAW:
        return []
    folder = Path(recipe.lists).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"lists={recipe.lists}: there is no such folder. Expected one with {_names('1shot', 1)[0]} and so on, "
            f"or --set lists={_DRAW}, which draws the images by the seed."
        )
    return [folder]


def _names(amount: Amount, split: int) -> list[str]:
    """What the list of an amount may be called, the best name first."""
    number = amount.removesuffix("shot").removesuffix("percent")
    if amount.endswith("percent"):
        return [f"{folder}{number}percent.txt" for folder in ("imagenet_subsets1/", "imagenet_subsets/", "")]
    names = [f"imagenet_subsets{split}/{number}imgs_class.txt"]
    return [*names, "imagenet_subsets3/3imgs_class.txt"] if (amount, split) == ("5shot", 3) else names


def _lists(train: Split, amount: Amount, recipe: Recipe, places: Sequence[Path]) -> list[Path]:
    """The lists of an amount, all of one place. None where a place holds none, or those of another dataset."""
    wanted = range(1, 2 if amount.endswith("percent") else recipe.splits + 1)
    for place in places:
        names = [_names(amount, split) for split in wanted]
        paths = [next((place / name for name in each if (place / name).is_file()), None) for each in names]
        lists = [path for path in paths if path is not None]
        if not lists or (recipe.lists is None and not _concerns(train, lists[0])):
            continue
        if absent := [each[0] for each, path in zip(names, paths, strict=True) if path is None]:
            raise UserError(
                f"{place} has lists for {len(lists)} of {len(wanted)} splits of {amount}; {shown(absent)} is missing. "
                f"Complete them, or choose --set splits={len(lists)} or --set lists={_DRAW}."
            )
        return lists
    if recipe.lists not in (None, _DRAW):
        expected = " or ".join(_names(amount, 1))
        raise UserError(
            f"lists={recipe.lists} has no list of {amount}. Expected {expected}; or leave {amount} out of "
            f"--set amounts, or choose --set lists={_DRAW}."
        )
    return []


def _concerns(train: Split, path: Path) -> bool:
    """Whether a list that lies about names any image of this dataset."""

    def stem(line: str) -> str:
        return line.strip().rpartition("/")[2].partition(".")[0]

    listed = {stem(line) for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()}
    return any(stem(sample) in listed for sample in train.sample_ids)


def _listed(train: Split, amount: Amount, path: Path) -> Labeled:
    """The images of one list."""
    try:
        part = listed_images(train, path)
    except UserError as error:
        raise UserError(f"{error} To draw the images by the seed instead: --set lists={_DRAW}") from None
    chosen = set(part.sample_ids)
    rows = np.array([row for row, sample in enumerate(train.sample_ids) if sample in chosen], dtype=np.int64)
    _require(train, rows, amount, f"the list {path}")
    return Labeled(rows, f"list {path.parent.name}/{path.name}")


# --- drawing ---------------------------------------------------------------------------------------------------------


def _drawn(train: Split, amount: Amount, seed: int, number: int) -> Labeled:
    """The first images of every class in a shuffling of all that depends on the seed and the split's number."""
    shuffled = np.random.RandomState([seed, number]).permutation(len(train))  # RandomState: its streams never change
    labels = train.labels[shuffled]
    by_class = np.argsort(labels, kind="stable")
    place = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])  # how-manieth of its class
    rows = np.sort(shuffled[by_class[place < _share(train, amount)[labels[by_class]]]])
    _require(train, rows, amount, f"train ({len(train):,} images)")
    return Labeled(rows, f"drawn: shuffling {number} of seed {seed}, the first of every class")


def _share(train: Split, amount: Amount) -> IntArray:
    """How many images of each class. (classes,)"""
    if amount.endswith("shot"):
        return np.full(len(train.classes), int(amount.removesuffix("shot")), dtype=np.int64)
    counts = np.bincount(train.labels, minlength=len(train.classes))
    percent = int(amount.removesuffix("percent"))
    return np.maximum(1, np.round(counts * percent / 100)).astype(np.int64)


def _require(train: Split, rows: IntArray, amount: Amount, origin: str) -> None:
    """Every class of train is there, with as many images as shots."""
    least = int(amount.removesuffix("shot")) if amount.endswith("shot") else 1
    counts = np.bincount(train.labels[rows], minlength=len(train.classes))
    if short := [f"{train.classes[c]} ({counts[c]})" for c in np.unique(train.labels) if counts[c] < least]:
        raise UserError(
            f"{amount}: {origin} has fewer than {least} images of {len(short):,} classes: {shown(short)}. Expected as "
            "many of every class; complete them, leave the amount out of --set amounts, or raise --limit."
        )


# --- scores ----------------------------------------------------------------------------------------------------------


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
    rows = np.unique(np.concatenate([each.rows for labeled in splits.values() for each in labeled]))
    found = extract(subject.checkpoint, train.subset(rows), [reading], subject.effort)[reading]
    rows, vectors = np.delete(rows, list(found.broken)), prepared(found.array(), recipe.centering)
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
                _require(train, rows[kept], amount, "what could be read")
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
        details={"amounts": amounts, "train_images_read": len(rows), "train_features": found.key},
    )


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
