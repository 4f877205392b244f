"""Retrieval of landmarks by frozen class tokens: revisited Oxford and Paris.

    ssl-bench run --ckpt x.pth --protocol retrieval --dataset roxford5k        as MMC, Table 9
    ssl-bench run --ckpt x.pth --protocol retrieval/ibot --dataset rparis6k    512 px and three scales
    ssl-bench run --ckpt x.pth --protocol retrieval --dataset toy-roxford      built in

Every image is one vector. The database is ranked by cosine for each query, equal similarities in the order of the
database. Three questions are asked of one ranking (Radenovic et al. 2018, section 3.3):

    setting   must be found    counts neither way
    easy      easy             hard, junk
    medium    easy, hard       junk
    hard      hard             easy, junk

What counts neither way is taken out of the ranking. The average precision is then the area under the precision-recall
curve by the trapezoidal rule, as that benchmark has it: with the j-th relevant image (from 0) at rank r (from 0),

    AP = 1/n sum_j (p0 + p1) / 2,    p0 = j / r (1 at r = 0),    p1 = (j + 1) / (r + 1)

which is not the average precision of scikit-learn, 1/n sum_j p1; that one is given beside it. A query with nothing to
find in a setting does not count there.

The view is that of the scripts of DINO and iBOT: the whole image, shrunk until its longer side fits, never enlarged;
what remains at the right and lower border beyond whole patches is not seen. With `multiscale`, the vector is the mean
over the image, and the image shrunk to 1/sqrt(2) and 1/2. The benchmark wants queries cut to their boxes
(query = box); both scripts take the whole query image (query = image), which shows the network more.

Images of many sizes do not fit the cache of features, so vectors are computed anew in each run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import FloatArray, Forward
from ssl_bench.evaluate.landmarks import Landmarks, Truth
from ssl_bench.evaluate.loading import load
from ssl_bench.evaluate.readings import Reading, Token, View, why_not
from ssl_bench.evaluate.subject import IntArray, Score, Scores, Subject
from ssl_bench.progress import bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from ssl_bench.evaluate.splits import Split

VERSION = 1
DATA, DISTRIBUTED = "landmarks", False

# What must be found; what else shows the landmark counts neither way.
SETTINGS = {"medium": ("easy", "hard"), "hard": ("hard",), "easy": ("easy",)}
PRECISION_AT = (1, 5, 10)
SCALES = (1.0, 2**-0.5, 0.5)


@dataclass(frozen=True)
class Recipe:
    """How one source does it."""

    longer_side_px: int  # of real images; built-in ones are brought to the network's own size
    multiscale: bool
    query: Literal["image", "box"]
    token: Token
    norm: bool  # the network's final norm
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.longer_side_px < 1:
            raise UserError(f"longer_side_px={self.longer_side_px}: expected a size in pixels, such as 224 or 512.")

    @property
    def selected_on(self) -> Literal["none"]:
        """There is nothing to select."""
        return "none"


# fmt: off
RECIPES: dict[str, Recipe] = {
    #               longer side multiscale query  token  norm
    # The paper says only that the class token is taken. Assumptions: the benchmark's rule, which cuts out the query's
    # box, and the size of DINO's script. That script and iBOT's show the whole query image.
    "mmc":  Recipe(224,         False,     "box",   "cls", True, source="MMC, appendix, Image Retrieval, Table 9",
                   published="ViT-B/16, medium / hard: ROxford 26.1 / 8.9, RParis 53.4 / 28.6 (MMC Table 9)"),
    "dino": Recipe(224,         False,     "image", "cls", True,
                   source="facebookresearch/dino eval_image_retrieval.py (its defaults)",
                   published="ViT-B/16, medium / hard: ROxford 32.8 / 10.7, RParis 60.4 / 34.2 (MMC Table 9)"),
    "ibot": Recipe(512,         True,      "image", "cls", True,
                   source="bytedance/ibot run.sh (--imsize 512 --multiscale 1), evaluation/eval_image_retrieval.py",
                   published="ViT-B/16, medium / hard: ROxford 34.2 / 13.4, RParis 61.9 / 35.2 (MMC Table 9)"),
    # A toy image shows several objects, and the box alone says which is meant.
    "toy":  Recipe(48,          False,     "box",   "cls", True, source="ssl-bench", published="none"),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """Nothing of the cache, which holds images of one size."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """A vector of one length for images of any size, and something to find."""
    architecture, spec = subject.checkpoint.architecture, subject.checkpoint.spec
    if subject.checkpoint.format == "pixels" and recipe.token == "cls":
        raise UserError(
            f"{spec}: the pixels of images of different sizes are vectors of different lengths, which have no cosine. "
            "Give a network, or take the mean patch: --set token=patch_mean."
        )
    if reason := why_not(_reading(subject, recipe), architecture):
        remedy = "--set norm=false" if "final norm" in reason else "--set token=patch_mean"
        raise UserError(f"{spec}: retrieval cannot be run so: {reason}. Try {remedy}.")
    if recipe.longer_side_px < architecture.patch_px:
        raise UserError(
            f"longer_side_px={recipe.longer_side_px}: expected at least one patch, {architecture.patch_px} px."
        )
    if subject.effort.skip_broken:
        raise UserError(
            "--skip-broken: a ranking without some images of the database is another benchmark. Expected all to be "
            "readable; fetch the broken ones again."
        )
    dataset = _landmarks(subject)
    if not any(len(truth.easy) + len(truth.hard) for truth in dataset.truths):
        raise UserError(f"{dataset.name}: no query has an easy or hard image to find; give another list.")


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Mean average precision and precision at 1, 5, 10 in the three settings."""
    dataset = _landmarks(subject)
    queries = vectors(subject, dataset.queries if recipe.query == "box" else dataset.whole_queries, recipe)
    database = vectors(subject, dataset.database, recipe)
    orders = [ranking(query, database) for query in queries]
    metrics: dict[str, Score] = {}
    precisions: dict[str, list[float | None]] = {}
    for setting in SETTINGS:
        ranks = [ranks_found(order, truth, setting) for order, truth in zip(orders, dataset.truths, strict=True)]
        counted = [found for found in ranks if len(found)]
        precisions[setting] = [round(100 * average_precision(found), 4) if len(found) else None for found in ranks]
        if counted:  # a small dataset, or a few queries of one, may lack a setting
            metrics[f"mAP_{setting}"] = _mean(average_precision(found) for found in counted)
            for k in PRECISION_AT:
                metrics[f"mP@{k}_{setting}"] = _mean(precision_at(found, k) for found in counted)
            metrics[f"mAP_{setting}_noninterpolated"] = _mean(noninterpolated(found) for found in counted)
    details = {
        "queries": list(dataset.queries.sample_ids),
        "average_precision": precisions,
        "nothing_to_find": {setting: values.count(None) for setting, values in precisions.items()},
        "vectors": f"{queries.shape[1]} numbers each, computed in this run (the cache holds images of one size)",
        "dataset_notes": list(dataset.notes),
    }
    evaluated = {name: len(split) for name, split in dataset.splits.items()}
    return Scores(metrics, main="mAP_medium", details=details, evaluated=evaluated)


def _mean(shares: Iterable[float]) -> Score:
    """In percent, with the standard error over queries (ddof 1)."""
    values = 100 * np.array(list(shares))
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(float(values.mean()), len(values), stderr=error)


# Ranks ---------------------------------------------------------------------------------------------------------------


def ranking(query: FloatArray, database: FloatArray) -> IntArray:
    """Positions in the database, the most similar first; equal similarities in the order of the database."""
    # Row by row rather than by a matrix product, in which equal rows may differ in the last bit.
    similarity = (database.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    return np.argsort(-similarity, kind="stable")


def ranks_found(order: IntArray, truth: Truth, setting: str) -> IntArray:
    """The ranks, from 0, of what must be found, once all that counts neither way has left the ranking."""
    wanted = np.concatenate([getattr(truth, name) for name in SETTINGS[setting]])
    ignored = np.concatenate([each for name, each in truth._asdict().items() if name not in SETTINGS[setting]])
    return np.flatnonzero(np.isin(order[~np.isin(order, ignored)], wanted))


def average_precision(ranks: IntArray) -> float:
    """The area under the precision-recall curve by the trapezoidal rule: see the top of this file."""
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    return float(((before + (j + 1) / (ranks + 1)) / 2).mean())


def noninterpolated(ranks: IntArray) -> float:
    """The mean precision at every relevant image, as scikit-learn has it."""
    return float((np.arange(1, len(ranks) + 1) / (ranks + 1)).mean())


def precision_at(ranks: IntArray, k: int) -> float:
    """The share of relevant images among the first k; of no more than it takes to find all of them."""
    considered = min(k, int(ranks.max()) + 1)
    return int((ranks < considered).sum()) / considered


# Vectors -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A view of the whole image: shrunk until its longer side fits. Built-in images are enlarged too."""

    longer_side_px: int | None  # None leaves it as it is
    enlarge: bool
    least_px: int  # of the shorter side, so that a very flat image still has a row of patches at every scale

    def pixels(self, image: Image) -> npt.NDArray[np.uint8]:
        """The view as uint8 (3, H, W)."""
        from PIL.Image import Resampling

        if self.longer_side_px is not None:
            side = self.longer_side_px
            if self.enlarge and max(image.size) < side:
                ratio = side / max(image.size)
                image = image.resize((round(image.width * ratio), round(image.height * ratio)), Resampling.LANCZOS)
            image = image.copy()  # which thumbnail changes
            image.thumbnail((side, side), Resampling.LANCZOS)
        if min(image.size) < self.least_px:
            size = max(image.width, self.least_px), max(image.height, self.least_px)
            image = image.resize(size, Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _view(subject: Subject, recipe: Recipe) -> Whole:
    built_in, patch = subject.dataset.built_in, subject.checkpoint.architecture.patch_px
    own = subject.checkpoint.architecture.image_px or None
    least_px = math.ceil(patch / SCALES[-1]) if recipe.multiscale else patch
    return Whole(own if built_in else recipe.longer_side_px, enlarge=built_in, least_px=least_px)


def _reading(subject: Subject, recipe: Recipe) -> Reading:
    """Of the size of the view, by which `Forward` chooses its batches; it is given images of other sizes too."""
    side = _view(subject, recipe).longer_side_px
    return Reading(recipe.token, View(side, side), norm=recipe.norm)


def vectors(subject: Subject, split: Split, recipe: Recipe) -> FloatArray:
    """One vector of unit length for every image. (n, D)"""
    forward = Forward(subject.backbone, [_reading(subject, recipe)], subject.effort)
    rows: list[Tensor] = []
    with bar(f"vectors of {subject.checkpoint.name} on {split.name}", len(split)) as advance:
        for batch in _batches(_images(subject, split, recipe), subject.effort.batch_size or forward.batch_size):
            images = batch.to(forward.mean.device).float().div_(255).sub_(forward.mean).div_(forward.std)
            rows.append(_vectors(images, forward, SCALES if recipe.multiscale else SCALES[:1]).cpu())
            advance(len(batch))
    found = torch.cat(rows)
    if not found.isfinite().all():
        first = int((~found.isfinite().all(dim=1)).nonzero()[0])
        raise UserError(
            f"the vector of {split.sample_ids[first]} by {subject.checkpoint.name} is not finite. Are there NaN in the "
            "weights? With fp16 try bf16 or fp32."
        )
    return F.normalize(found, dim=1).numpy()


def _images(subject: Subject, split: Split, recipe: Recipe) -> Iterator[Tensor]:
    """One image after the other, (3, H, W) uint8, of many sizes; read by worker processes as features are."""
    plan = [[index] for index in range(len(split))]
    view, effort = _view(subject, recipe), replace(subject.effort, skip_broken=True)
    # Any object with `pixels` serves as a view.
    for index, (pixels, _) in enumerate(load(split, view, plan, effort)):  # type: ignore[arg-type]
        if pixels is None:
            split.image(index)  # says what is wrong, without the advice to skip it
            raise UserError(f"{split.sample_ids[index]} could not be read at first, and now it can. Try again.")
        yield pixels[0]


def _batches(images: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Neighbors of one size together, (B, 3, H, W) each."""
    for _, same in itertools.groupby(images, key=lambda image: image.shape):
        while batch := list(itertools.islice(same, size)):
            yield torch.stack(batch)


def _vectors(images: Tensor, forward: Forward, scales: Sequence[float]) -> Tensor:
    """The mean over scales of what the network says; not of unit vectors, as both scripts do. (B, D)"""
    patch, found = forward.backbone.architecture.patch_px, []
    for scale in scales:
        scaled = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        height, width = (side // patch * patch for side in scaled.shape[-2:])
        found += forward.vectors(scaled[..., :height, :width])
    return torch.stack(found).mean(dim=0)


def _landmarks(subject: Subject) -> Landmarks:
    assert isinstance(subject.dataset, Landmarks)
    return subject.dataset
