"""Locality: does the crop of one object find the box of another one of its category, in place and in scale?

    ssl-bench run --ckpt x.pth --protocol locality --dataset coco
    ssl-bench run --ckpt x.pth --protocol locality/patch_mean --dataset toy-coco

ExtreMA, section 4 and Fig. 3: 25 boxes of 5 scales at 5 random places each are cut out of a test image. An object of
the same category, cut out of another image, is the query. All crops are resized to the network's input, and the box
with the most similar vector (cosine) is retrieved. Appendix D compares methods so, by their class tokens.

The paper shows pictures and gives no number. Ours:

    iou          of the retrieved box with the annotated box of that category (the best of several), mean over targets
    iou_random   the same for a box drawn at random: the mean over the 25
    iou_oracle   ... for the best of the 25
    normalized   (iou - iou_random) / (iou_oracle - iou_random): 0 is chance, 100 as good as these boxes allow
    top1         how often the best of the 25 is retrieved, beside top1_random

Ours too: what the paper leaves open, which RECIPES names, and what is a target. Every pair of a val image and a
category in it is one; a seeded choice of `pairs` of them is taken, each with boxes and a query of its own, which do not
depend on the others. Crowds and small objects are no queries. No target is an image with nothing but small objects of
the category, or with a crowd of it, which leaves unclear which box is right, or the only image of its category.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import Annotations, Coco
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.features import Forward
from ssl_bench.evaluate.loading import refused
from ssl_bench.evaluate.readings import Interpolation, Reading, Token, View, why_not
from ssl_bench.evaluate.splits import Split
from ssl_bench.evaluate.subject import IntArray, Score, Scores, Subject
from ssl_bench.evaluate.training.loader import automatic_workers
from ssl_bench.progress import bar

VERSION = 1
DATA, DISTRIBUTED = "boxes", False

Boxes = npt.NDArray[np.float64]  # (n, 4): left, top, right, bottom


@dataclass(frozen=True)
class Recipe:
    """Which boxes, which vector, and how many targets."""

    vector: Token
    norm: bool  # the network's final norm
    scales: tuple[float, ...]  # the side of a square box, as a share of the image's shorter side
    places: int  # boxes of each scale
    pairs: int  # targets
    min_area_px: float  # smaller boxes are no objects to be found or to search by
    crop_px: int  # every crop is resized to this square; on built-in data, to the network's own size
    interpolation: Interpolation
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise UserError(f"scales={self.scales}: expected shares of the shorter side, more than 0 and at most 1.")
        for name in ("places", "pairs", "crop_px"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.min_area_px < 0:
            raise UserError(f"min_area_px={self.min_area_px}: expected an area in pixels, 0 or more.")

    @property
    def selected_on(self) -> Literal["none"]:
        """Nothing is chosen by its result."""
        return "none"


# The paper gives 25 boxes of 5 scales at 5 places, crops of 224 px and the class token. Assumptions: square boxes,
# these scales, the final norm, bicubic, 1000 targets, and COCO's "small" (32^2 px) as what is too small.
_SCALES = (0.2, 0.35, 0.5, 0.65, 0.8)

# fmt: off
RECIPES: dict[str, Recipe] = {
    #                    vector        norm  scales   places pairs min_area crop interpolation
    "extrema":    Recipe("cls",        True, _SCALES, 5,     1000, 1024.0,  224, "bicubic",
                         source="ExtreMA, section 4, Fig. 3 and appendix D",
                         published="pictures only: Fig. 3, and Fig. 6 beside MAE, DINO and MoCo-v3"),
    # For networks without a trained class token.
    "patch_mean": Recipe("patch_mean", True, _SCALES, 5,     1000, 1024.0,  224, "bicubic",
                         source="ours: the first row with the average patch token", published="none"),
    # An object of the toy world covers 200 px and more.
    "toy":        Recipe("cls",        True, _SCALES, 5,     300,  64.0,    48,  "bicubic",
                         source="ours: the first row, for the toy world's images of 96 px", published="none"),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """No features of whole images: crops are different for every target."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """A network that has the vector and takes the crops, and at least one target."""
    architecture, reading = subject.checkpoint.architecture, _reading(subject, recipe)
    if reason := why_not(reading, architecture):
        raise UserError(
            f"{subject.checkpoint.spec}: locality cannot be run so: {reason}. Take the average patch token, "
            "locality/patch_mean, or leave the norm out: --set norm=false."
        )
    size, patch = reading.view.crop_px, architecture.patch_px
    if size is None or size % patch:
        raise UserError(f"crop_px={size} does not divide into patches of {patch} px; choose a multiple of {patch}.")
    choose_targets(subject, recipe)


def _reading(subject: Subject, recipe: Recipe) -> Reading:
    """The vector of a crop. The view's size is that of all crops, for `pixels:` as well."""
    own = subject.view(recipe.crop_px, recipe.crop_px, recipe.interpolation).crop_px
    size = own or recipe.crop_px
    return Reading(recipe.vector, View(size, size, recipe.interpolation), layer=-1, norm=recipe.norm)


@dataclass(frozen=True, eq=False)
class Target:
    """What is to be found in which image, by which crop of another one, among which boxes."""

    image: int  # of the val split
    category: int
    objects: Boxes  # (m, 4) annotated boxes of that category
    gallery: IntArray  # (25, 4) left, top, right, bottom
    query_image: int
    query: IntArray  # (4,) the annotated box, widened to whole pixels


@dataclass(frozen=True)
class Skipped:
    """What is no target, and why."""

    crowds: int  # regions of many objects
    small: int  # objects below min_area_px
    targets_with_a_crowd: int  # pairs of image and category
    targets_of_one_image: int  # no other image shows that category


def choose_targets(subject: Subject, recipe: Recipe) -> tuple[list[Target], int, Skipped]:
    """A seeded choice of targets, out of how many there are, and what was left out."""
    split, dataset = subject.split("val"), subject.dataset
    assert isinstance(dataset, Coco)
    annotations, kinds = dataset.annotations["val"], len(dataset.categories)
    small = annotations.box[:, 2] * annotations.box[:, 3] < recipe.min_area_px
    usable = ~annotations.crowd & ~small
    number = annotations.image * kinds + annotations.category  # of the pair of image and category
    pairs = np.unique(number[usable])
    unclear = np.isin(pairs, number[annotations.crowd])
    alone = ~unclear & (np.bincount(pairs % kinds, minlength=kinds)[pairs % kinds] == 1)
    counted = (annotations.crowd, small & ~annotations.crowd, unclear, alone)
    skipped = Skipped(*(int(each.sum()) for each in counted))
    possible = pairs[~unclear & ~alone]
    if not len(possible):
        raise UserError(
            f"{dataset.name} has no object to be found by another one: of {len(annotations):,} objects in "
            f"{len(split):,} val images, {skipped.crowds:,} are crowds and {skipped.small:,} smaller than "
            f"{recipe.min_area_px:g} px, and no category is left that two images show. Give more images, or lower "
            "--set min_area_px."
        )
    chosen = np.random.RandomState(subject.seed).permutation(possible)[: recipe.pairs]
    rows_of = [np.flatnonzero(usable & (annotations.category == category)) for category in range(kinds)]
    targets = [
        _target(annotations, rows_of[category], image, category, recipe=recipe, seed=subject.seed)
        for image, category in (divmod(int(pair), kinds) for pair in chosen)
    ]
    return targets, len(possible), skipped


def _target(
    annotations: Annotations, rows: IntArray, image: int, category: int, *, recipe: Recipe, seed: int
) -> Target:
    """Draw boxes and query; `rows` are the usable objects of the category."""
    rng = np.random.default_rng((seed, image, category))
    here = annotations.image[rows] == image
    width, height = annotations.size_px[image].tolist()
    gallery = draw_gallery(rng, width, height, scales=recipe.scales, places=recipe.places)
    query = int(rng.choice(rows[~here]))
    query_image = int(annotations.image[query])
    first, last = np.split(_corners(annotations.box[[query]])[0], 2)
    widened = np.concatenate([np.floor(first), np.ceil(last)]).astype(np.int64)
    objects = _corners(annotations.box[rows[here]])
    return Target(image, category, objects, gallery, query_image, widened)


def _corners(box: Boxes) -> Boxes:
    """left, top, width, height -> left, top, right, bottom"""
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def draw_gallery(
    rng: np.random.Generator, width: int, height: int, *, scales: Sequence[float], places: int
) -> IntArray:
    """Square boxes within the image. (scales * places, 4)

    In random order: whichever of equally similar boxes comes first, it is then a random one.
    """
    boxes = []
    for scale in scales:
        side = max(1, round(scale * min(width, height)))
        left, top = (rng.integers(0, room - side + 1, places) for room in (width, height))
        boxes.append(np.stack([left, top, left + side, top + side], axis=1))
    return rng.permutation(np.concatenate(boxes))


def overlap(boxes: npt.NDArray[Any], objects: Boxes) -> Boxes:
    """Intersection over union of every box with every object. (n, 4), (m, 4) -> (n, m)"""
    first, last = np.maximum(boxes[:, None, :2], objects[:, :2]), np.minimum(boxes[:, None, 2:], objects[:, 2:])
    shared = np.clip(last - first, 0, None).prod(axis=2)
    areas = [np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (boxes, objects)]
    result: Boxes = shared / (areas[0][:, None] + areas[1] - shared)
    return result


@dataclass(frozen=True, eq=False)
class Retrieval:
    """One target and what was found: all that a picture of it needs."""

    target: Target
    similarity: Boxes  # (25,) cosines of the boxes with the query
    iou: Boxes  # (25,) of the boxes with the nearest object

    @property
    def retrieved(self) -> int:
        """The most similar box; the first of several."""
        return int(self.similarity.argmax())


_WORTH_WORKERS = 256  # targets; fewer are read sooner than processes are started


def retrieve(subject: Subject, recipe: Recipe, targets: Sequence[Target]) -> Iterator[Retrieval]:
    """Every target in turn, but those with a broken image (--skip-broken).

    A target's crops are a batch of their own, so that no similarity depends on the batch size but by its rounding.
    """
    reading = _reading(subject, recipe)
    forward = Forward(subject.backbone, [reading], subject.effort)
    batch = subject.effort.batch_size or forward.batch_size
    crops = _Crops(subject.split("val"), targets, reading.view)
    automatic = automatic_workers(1) if len(targets) > _WORTH_WORKERS else 0
    workers = automatic if subject.effort.workers is None else subject.effort.workers
    loader = torch.utils.data.DataLoader(crops, batch_size=None, num_workers=workers)
    with bar(f"locality of {subject.checkpoint.name}", len(targets)) as advance:
        for target, pixels in zip(targets, loader, strict=True):
            advance(1)
            if isinstance(pixels, str):
                if not subject.effort.skip_broken:
                    raise refused(pixels)
                continue
            vectors = np.concatenate([forward(part)[0] for part in torch.split(pixels, batch)]).astype(np.float64)
            if not np.isfinite(vectors).all():
                raise UserError(
                    f"feature vectors of {subject.checkpoint.name} are not finite. Are there NaN in the weights? With "
                    "fp16 try bf16 or fp32."
                )
            unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
            yield Retrieval(target, unit[1:] @ unit[0], overlap(target.gallery, target.objects).max(axis=1))


class _Crops(torch.utils.data.Dataset[Any]):
    """For every target the query and the boxes, as uint8 (26, 3, S, S); a string if an image is broken."""

    def __init__(self, split: Split, targets: Sequence[Target], view: View) -> None:
        self.split, self.targets = split, targets
        assert view.crop_px is not None
        self.size = (view.crop_px, view.crop_px)
        self.filter = Image.Resampling[view.interpolation.upper()]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        target = self.targets[index]
        try:
            query, image = self.split.image(target.query_image), self.split.image(target.image)
        except BrokenImage as error:
            return str(error)
        cut = itertools.chain([(query, target.query)], ((image, box) for box in target.gallery))
        # Cut, then resized: no pixel from outside of a box may tell where it lies.
        crops = [whole.crop(tuple(box.tolist())).resize(self.size, self.filter) for whole, box in cut]
        return torch.from_numpy(np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops]))


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Retrieve for every target, and compare with chance and with the best of the boxes."""
    targets, possible, skipped = choose_targets(subject, recipe)
    found = list(retrieve(subject, recipe, targets))
    if not found:
        raise UserError(f"not one of {len(targets)} targets has images that can be read; look at the image files.")
    iou = np.array([each.iou for each in found])  # (targets, 25)
    got = np.array([each.iou[each.retrieved] for each in found])
    chance, best = iou.mean(axis=1), iou.max(axis=1)
    is_best = (iou == best[:, None]) & (best[:, None] > 0)
    hit = np.array([row[each.retrieved] for row, each in zip(is_best, found, strict=True)])
    metrics = {
        "iou": _mean(got),
        "iou_random": _mean(chance),
        "iou_oracle": _mean(best),
        "top1": _mean(hit.astype(np.float64)),
        "top1_random": _mean(is_best.mean(axis=1)),
    }
    if best.mean() > chance.mean():  # else no choice of boxes could be better than another
        metrics["normalized"] = ratio(got - chance, best - chance)
    details = {
        "scales": list(recipe.scales),
        "places": recipe.places,
        "possible_targets": possible,
        "broken_targets": len(targets) - len(found),
        "skipped": dataclasses.asdict(skipped),
        "boxes_retrieved_by_scale": _by_scale(subject, recipe, found),
        "iou_of_targets": [round(float(value), 6) for value in got],  # the same targets for every network
    }
    images = {target.image for target in targets} | {target.query_image for target in targets}
    return Scores(metrics, main="iou", details=details, evaluated={"val": len(images)})


def _by_scale(subject: Subject, recipe: Recipe, found: Sequence[Retrieval]) -> list[int]:
    """How often a box of each scale was retrieved."""
    dataset = subject.dataset
    assert isinstance(dataset, Coco)
    counts = [0] * len(recipe.scales)
    for each in found:
        left, _, right, _ = each.target.gallery[each.retrieved].tolist()
        share = (right - left) / min(dataset.annotations["val"].size_px[each.target.image].tolist())
        counts[int(np.abs(np.array(recipe.scales) - share).argmin())] += 1
    return counts


def _mean(values: Boxes) -> Score:
    """In percent, with the standard error of the mean."""
    n = len(values)
    error = 100 * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Score(100 * float(values.mean()), n, stderr=error)


def ratio(above: Boxes, below: Boxes) -> Score:
    """The ratio of two means over the same targets, in percent, with its standard error by the delta method.

    Not the mean of ratios: where all boxes are about as good, or as bad, a target's own ratio is noise.
    """
    value = float(above.mean() / below.mean())
    error = _mean((above - value * below) / below.mean()).stderr
    return Score(100 * value, len(above), stderr=error)
