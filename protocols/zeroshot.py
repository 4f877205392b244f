"""Zero-shot segmentation from a prompt: one patch of an object, and every patch that is similar to it.

    ssl-bench run --ckpt x.pth --dataset coco --protocol zeroshot                          the first row below, MMC's
    ssl-bench run --ckpt x.pth --dataset coco --protocol zeroshot --set target=instance --set resolution=pixel
    ssl-bench run --ckpt x.pth --protocol zeroshot                                         toy-coco, built in

MMC, Fig. 1-2 and Table 1: the image at 480 x 480, its patch tokens after the last block, the cosine of the prompt's
token with every token; the segment is where it is above a threshold T. mIoU is reported for T = .1 to .4, and for the
best T of 0, .1, ..., .9, chosen on the very images it is reported on (selected_on=test).

How prompts are drawn, what is the target and what is averaged, the paper does not say. Ours, which VERSION counts:

    prompt      one for each object: of its tokens one, drawn by a seed from image and object alone. An object without
                a token, smaller than a patch, gets none, and is counted
    target      class: all objects of the prompt's category in the image; an object's tokens are those of its category
                of which it covers more than the others do. instance: the object itself, and the tokens that it covers
                most of all (by class and by instance in patch_views.py)
    resolution  token: a token belongs to what covers most of it. pixel: the mask as annotated; each patch of the
                segment is its rectangle of the image (nearest upsampling), and areas are exact
    ignored     crowds and void are neither target nor background: tokens that they cover most of (token), their area
                (pixel). Other rules of what belongs to whom: evaluate/object_masks.py, patch_views.py
    IoU         of target and segment; the prompt's own token is in both (but a token of zeros, whose cosine is 0 with
                itself too, is in no segment of T >= 0)
    T           similarity > T in float32, T rounded to float32: what lies exactly on a threshold is outside

    miou_t0.1   mean over categories of the mean over their prompts, as "mIoU" is meant elsewhere; miou_opt its best
    iou_t0.1    mean over all prompts; iou_opt its best
    miou_everything     as if the whole image were the segment: what a network gets for which all tokens are alike
    miou_prompt_alone   as if the prompt's own token were: what one gets for which no two are

Standard errors are over prompts, category by category, as if they were independent; those of one image are not quite.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ssl_bench.errors import UserError
from ssl_bench.evaluate.object_masks import ObjectMasks
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.subject import IntArray, Score, Scores, Subject
from ssl_bench.protocols.patch_views import SPLIT, PatchRecipe, Read, TokenImage, check_tokens, token_images

VERSION = 1
DATA, DISTRIBUTED, KEEPS_SIZES = "objects", False, True

Numbers = npt.NDArray[np.float64]
_DARK = (40, 40, 40)


@dataclass(frozen=True)
class Recipe(PatchRecipe):
    """How one paper does it."""

    target: Literal["class", "instance"]
    resolution: Literal["token", "pixel"]
    thresholds: tuple[float, ...]  # rising
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if not all(-1 <= each < 1 for each in self.thresholds):
            raise UserError(f"thresholds={self.thresholds}: expected cosines from -1 to below 1, such as 0.1,0.2,0.3.")
        if (np.diff(np.asarray(self.thresholds, np.float32)) <= 0).any():
            raise UserError(f"thresholds={self.thresholds}: expected each to be larger than the one before.")
        if len({f"{each:g}" for each in self.thresholds}) < len(self.thresholds):
            raise UserError(
                f"thresholds={self.thresholds}: two have one name in six digits (miou_t0.1); expected larger steps."
            )

    @property
    def by_class(self) -> bool:
        """Whether two sheep in a token are more sheep."""
        return self.target == "class"

    @property
    def selected_on(self) -> Literal["none", "test"]:
        """The optimum is the best on the images that are reported."""
        return "test" if len(self.thresholds) > 1 else "none"


_OVERLAYS = 8  # pictures beside the record; they change no number
_SWEEP = tuple(k / 10 for k in range(10))

# The paper fixes the size in pixels; 30 x 30 tokens follow from its patch of 16 px. So other patches give other grids
# (60 x 60 of 8 px), as in its protocol on DAVIS. Assumptions: bicubic, the final norm, target and resolution.
# fmt: off
RECIPES: dict[str, Recipe] = {
    #             size interpolation layer norm  target   resolution thresholds
    "mmc": Recipe(480, "bicubic",    -1,   True, "class", "token",   _SWEEP,
                  source="MMC, Zero-shot Segmentation from Prompts; Table 1",
                  published="COCO, ViT-B/16, T = .1 / .2 / .3 / .4 / best: RAND (a random network) 16.8 / 16.6 / 16.2 "
                            "/ 15.5 / 16.8, SiT 32.9 / 35.3 / 34.7 / 31.6 / 35.3, DINO 33.3 / 35.1 / 33.0 / 28.2 / "
                            "35.1, iBOT 33.5 / 36.2 / 36.2 / 34.1 / 36.2, MC-SSL 31.9 / 34.2 / 35.0 / 35.1 / 35.1, "
                            "MAE 28.6 / 30.1 / 26.0 / 18.5 / 30.1, MSN 32.7 / 34.4 / 31.6 / 25.9 / 34.4, "
                            "MMC 34.6 / 37.6 / 38.4 / 37.9 / 38.4"),
    # 30 x 30 tokens too, of 8 px: fewer would hold a whole stripe of the toy world's patterns, or only half of one.
    "toy": Recipe(240, "bicubic",    -1,   True, "class", "token",   _SWEEP,
                  source="ours: the first row, for patches of 8 px", published="none"),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """Nothing of the cache, which holds one vector an image."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """Tokens, and objects to be prompted."""
    check_tokens(subject, recipe, "zeroshot")
    dataset = subject.dataset
    assert isinstance(dataset, ObjectMasks)
    if recipe.target == "instance" and not dataset.has_instances:
        raise UserError(
            f"target=instance: the masks of {dataset.name} tell classes, not instances. Leave --set target=class, or "
            "give a dataset in COCO's layout."
        )


@dataclass(frozen=True, eq=False)
class Prompts:
    """Those of one image, p of them."""

    tokens: IntArray  # (p,)
    categories: IntArray  # (p,)
    target: Numbers  # (p, N): how much of each token belongs to the target
    counted: Numbers  # (N,): how much of each token is not ignored
    whole: float  # the area of a token

    @property
    def iou_alone(self) -> Numbers:
        """As if the prompts were the segments. (p,)"""
        shared = self.target[np.arange(len(self.tokens)), self.tokens]
        iou: Numbers = shared / (self.counted[self.tokens] + self.target.sum(axis=1) - shared)
        return iou


def prompts_of(image: TokenImage, recipe: Recipe, seed: int) -> Prompts:
    """One for every object that has a token."""
    drawn = [image.drawn(place, seed) for place in range(len(image.ids))]
    places = np.array([place for place, token in enumerate(drawn) if token is not None], np.int64)
    tokens = np.array([token for token in drawn if token is not None], np.int64)
    if recipe.resolution == "token":
        shares = (image.label == np.arange(len(image.areas))[:, None]).astype(np.float64)
    else:
        shares = image.areas
    categories = np.array(image.categories, np.int64)
    same = categories[places][:, None] == categories if recipe.target == "class" else np.eye(len(drawn))[places]
    target, counted = same.astype(np.float64) @ shares[: len(drawn)], shares[:-1].sum(axis=0)
    return Prompts(tokens, categories[places], target, counted, float(shares[:, 0].sum()))


def sweep(
    similarity: npt.NDArray[np.float32], target: Numbers, counted: Numbers, thresholds: Sequence[float]
) -> tuple[Numbers, Numbers]:
    """Intersection and union of {similarity > T} and target for all K thresholds at once. (p, N) -> (p, K) twice.

    Every similarity is compared with each threshold, in one byte a token, and goes once into the histogram of its
    prompt, by how many thresholds lie below it, with the area of its token as the weight; what is above a threshold is
    then a cumulative sum. Areas are whole numbers: all is exact.
    """
    bins = len(thresholds) + 1
    below = np.zeros(similarity.shape, np.min_scalar_type(bins))
    for threshold in np.asarray(thresholds, np.float32):  # quicker than a search, whose branches nobody can guess
        below += similarity > threshold
    place = (below + bins * np.arange(len(similarity))[:, None]).ravel()

    def above(areas: Numbers) -> Numbers:
        histogram = np.bincount(place, areas.ravel(), bins * len(similarity)).reshape(-1, bins)
        return histogram[:, :0:-1].cumsum(axis=1)[:, ::-1]

    intersection = above(target)
    return intersection, above(np.broadcast_to(counted, target.shape)) + target.sum(axis=1)[:, None] - intersection


@dataclass(frozen=True, eq=False)
class Found:
    """All prompts."""

    category: IntArray  # (n,)
    iou: Numbers  # (n, K)
    everything: Numbers  # (n,) if the whole image were the segment
    prompt_alone: Numbers  # (n,) if the prompt's token were


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Prompt every object, sweep the thresholds, and draw some."""
    read, gallery = Read(), _Gallery(len(subject.split(SPLIT)), _OVERLAYS)
    thresholds = (-math.inf, *recipe.thresholds)
    categories, iou, alone = [np.zeros(0, np.int64)], [np.zeros((0, len(thresholds)))], [np.zeros(0)]
    for image in token_images(subject, recipe, read):
        prompts = prompts_of(image, recipe, subject.seed)
        similarity = (image.features[prompts.tokens] @ image.features.T).cpu().numpy()
        shared, union = sweep(similarity, prompts.target, prompts.counted, thresholds)
        categories.append(prompts.categories)
        iou.append(shared / union)
        alone.append(prompts.iou_alone)
        if len(prompts.tokens):
            gallery.offer(image, prompts, similarity, iou[-1][:, 1:])
    everything, *columns = np.concatenate(iou).T
    found = Found(np.concatenate(categories), np.stack(columns, axis=1), everything, np.concatenate(alone))
    if not len(found.iou):
        raise UserError(
            f"{subject.dataset.name}: no object in {read.images:,} images can be prompted: of {read.objects:,} objects "
            f"none covers most of a patch at image_px={recipe.image_px}. A larger image_px has smaller patches."
        )
    return _scores(subject, recipe, found, read, gallery)


def _scores(subject: Subject, recipe: Recipe, found: Found, read: Read, gallery: _Gallery) -> Scores:
    dataset = subject.dataset
    assert isinstance(dataset, ObjectMasks)
    means = {
        "miou": [class_mean(column, found.category) for column in found.iou.T],
        "iou": [_mean(column) for column in found.iou.T],
    }
    best = {name: int(np.argmax([score.value for score in scores])) for name, scores in means.items()}
    metrics: dict[str, Score] = {}
    for name, scores in means.items():
        metrics[f"{name}_opt"] = scores[best[name]]
        metrics |= {f"{name}_t{t:g}": score for t, score in zip(recipe.thresholds, scores, strict=True)}
    metrics["miou_everything"] = class_mean(found.everything, found.category)
    metrics["miou_prompt_alone"] = class_mean(found.prompt_alone, found.category)
    details = {
        "thresholds": list(recipe.thresholds),
        "best_threshold": {name: recipe.thresholds[place] for name, place in best.items()},
        "tokens": f"patches of {subject.checkpoint.architecture.patch_px} px in {recipe.image_px} px",
        "prompts": len(found.iou),
        **dataclasses.asdict(read),
        "categories_without_prompt": len(dataset.categories) - len(np.unique(found.category)),
        "categories": _by_category(dataset.categories, found),
    }
    about = (
        f"{subject.checkpoint.name} on {dataset.name}, {details['tokens']}. The threshold is the one with the best "
        f"mIoU over all {read.images:,} images, not over this one. Dark patches are ignored. Target: "
        f"{'the object' if recipe.target == 'instance' else 'all objects of its category'}."
    )
    files = gallery.files(dataset.categories, recipe.thresholds[best["miou"]], best["miou"], about)
    evaluated, skipped = {SPLIT: read.images}, {SPLIT: read.broken}
    return Scores(metrics, "miou_opt", details=details, files=files, evaluated=evaluated, skipped=skipped)


def _by_category(names: Sequence[str], found: Found) -> dict[str, object]:
    """How many prompts, and their mean IoU at each threshold."""
    told: dict[str, object] = {}
    for label in np.unique(found.category).tolist():
        iou = 100 * found.iou[found.category == label]
        told[names[label]] = {"prompts": len(iou), "iou": [round(float(value), 4) for value in iou.mean(axis=0)]}
    return told


def _mean(values: Numbers) -> Score:
    """In percent, with the standard error over prompts (ddof 1)."""
    error = 100 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(100 * float(values.mean()), len(values), stderr=error)


def class_mean(values: Numbers, category: IntArray) -> Score:
    """The mean over categories of their means, in percent, with its standard error over prompts.

    The variance of a category with one prompt is taken to be that within all others together.
    """
    _, place, count = np.unique(category, return_inverse=True, return_counts=True)
    means = np.bincount(place, values) / count
    squares, freedom = np.bincount(place, (values - means[place]) ** 2), count - 1
    error = None
    if freedom.any():
        within = np.where(freedom > 0, squares / np.maximum(freedom, 1), squares.sum() / freedom.sum())
        error = 100 * math.sqrt(float((within / count).sum())) / len(count)
    return Score(100 * float(means.mean()), len(values), stderr=error)


@dataclass(frozen=True, eq=False)
class _Shown:
    """A prompt to be drawn."""

    image: TokenImage
    token: int
    category: int
    target: npt.NDArray[np.bool_]  # (N,): the patches at least half of which are
    ignored: npt.NDArray[np.bool_]  # (N,)
    similarity: npt.NDArray[np.float32]  # (N,)
    iou: Numbers  # (K,)

    def picture(self, title: str, threshold: float, iou: float, about: str) -> bytes:
        """The prompt, its target, similarities, and the segment at the best threshold."""
        from PIL import Image

        from ssl_bench.evaluate.pictures import sheet

        grid = math.isqrt(len(self.target))
        row, column = divmod(self.token, grid)
        place = [((column + 0.5) / grid, (row + 0.5) / grid, sheet.VERMILION)]
        image = Image.fromarray(self.image.pixels.transpose(1, 2, 0))
        seen = sheet.shown(image)

        def masked(where: npt.NDArray[np.bool_], color: sheet.Color) -> Image.Image:
            """Patch by patch, as it was scored, and over gray, so that no color of the image is mistaken for it."""
            under = seen.convert("L").convert("RGB")
            for patches, tint in ((where & ~self.ignored, color), (self.ignored, _DARK)):
                cells = Image.fromarray(patches.reshape(grid, grid)).resize(seen.size, Image.Resampling.NEAREST)
                under = sheet.tinted(under, np.asarray(cells), tint)
            return under

        heat = sheet.heat(self.similarity.reshape(grid, grid), image, low=0, high=1)
        pictures = {
            "prompt": seen,
            "target": masked(self.target, sheet.SKY),
            "cosine with the prompt": heat,
            f"above {threshold:g}: IoU {100 * iou:.1f}": masked(self.similarity > np.float32(threshold), sheet.ORANGE),
        }
        cells = [sheet.Cell(sheet.marked(picture, place), label) for label, picture in pictures.items()]
        legend = sheet.color_bar("≤ 0", "1", "cosine")
        return sheet.png(sheet.sheet(title, [sheet.Row(cells)], legends=[legend], note=about))


class _Gallery:
    """What is drawn: the first object of images evenly spaced over the split; of the next, if one has none."""

    def __init__(self, images: int, wanted: int) -> None:
        self.due = [k * images // wanted for k in range(min(wanted, images))]
        self.kept: list[_Shown] = []

    def offer(self, image: TokenImage, prompts: Prompts, similarity: npt.NDArray[np.float32], iou: Numbers) -> None:
        """Keep the first prompt of this image if one is due."""
        if len(self.kept) < len(self.due) and image.place >= self.due[len(self.kept)]:
            token, category = int(prompts.tokens[0]), int(prompts.categories[0])
            target, ignored = 2 * prompts.target[0] >= prompts.whole, 2 * prompts.counted < prompts.whole
            self.kept.append(_Shown(image, token, category, target, ignored, similarity[0], iou[0]))

    def files(self, categories: Sequence[str], threshold: float, best: int, about: str) -> dict[str, bytes]:
        """By file name; `best` is the place of the threshold."""
        names = [re.sub("[^a-z0-9]+", "-", categories[shown.category].lower()).strip("-") for shown in self.kept]
        return {
            f"overlays/{number:02d}-{name}.png": shown.picture(
                f"{categories[shown.category]} in {shown.image.sample_id}", threshold, float(shown.iou[best]), about
            )
            for number, (name, shown) in enumerate(zip(names, self.kept, strict=True))
        }
