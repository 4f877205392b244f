"""How alike are patches of one category, and how alike those of different ones? Two distributions and their overlap.

    ssl-bench run --ckpt x.pth --dataset coco --protocol similarity          the first row below, MMC's
    ssl-bench run --ckpt x.pth --protocol similarity                         toy-coco, built in

MMC, Fig. 5 and Table 5: cosines of patch pairs "belonging to the same category" (intra) and "belonging to different
categories" (inter), their means, and the overlap of their distributions,

    overlap_area = integral of min(p_intra, p_inter)      0 are separable, 1 are the same; lower is better

where p are densities: histograms of `bins` equal bins on [-1, 1]. Means are of the cosines, not of the bins. None of
these is in percent: the table has them as they are.

What the paper leaves open, and VERSION counts:

    pairs       every pair of different tokens within one image, once; all pairs of all images count alike
    category    the one that covers most of the token, by all of its objects together
    background  out: it is no category, so no pair holds it (an image of one category has no inter pairs then). in: it
                is one category more. other: it differs from every object, but two tokens of it are no pair
    ignored     tokens that crowds or void cover most of are in no pair

Tokens are those of zeroshot (patch_views.py). The standard errors of the means are over images.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.patch_pairs import (
    BINS,
    KINDS,
    NO_CATEGORY,
    NO_PAIR,
    Background,
    Numbers,
    count_pairs,
    densities,
    overlap,
)
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.subject import IntArray, Score, Scores, Subject
from ssl_bench.protocols.patch_views import SPLIT, PatchRecipe, Read, TokenImage, check_tokens, token_images

VERSION = 1
DATA, DISTRIBUTED, KEEPS_SIZES = "objects", False, True

_MOST_BINS = 10_000


@dataclass(frozen=True)
class Recipe(PatchRecipe):
    """How one paper does it."""

    background: Background
    bins: int
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if not 2 <= self.bins <= _MOST_BINS:
            raise UserError(f"bins={self.bins}: expected 2 to {_MOST_BINS:,}; MMC's are not known, ours are {BINS}.")

    @property
    def selected_on(self) -> Literal["none"]:
        """Nothing is chosen by its result."""
        return "none"


# The paper names neither dataset nor network of Table 5, nor the bins. Assumptions: those of its zero-shot segmentation
# (COCO, ViT-B/16, 480 px), the final norm, bicubic, and bins of .01.
# fmt: off
RECIPES: dict[str, Recipe] = {
    #             size interpolation layer norm  background bins
    "mmc": Recipe(480, "bicubic",    -1,   True, "out",     BINS,
                  source="MMC, Similarity Distribution; Fig. 5, Table 5",
                  published="overlap / intra / inter: DINO .66 / .2 / .12, iBOT .56 / .19 / .05, SiT .63 / .5 / .46, "
                            "MAE .76 / .29 / .17, MC-SSL .58 / .47 / .35, MMC .55 / .48 / .38"),
    # 30 x 30 tokens too, of 8 px, as in zeroshot.
    "toy": Recipe(240, "bicubic",    -1,   True, "out",     BINS,
                  source="ours: the first row, for patches of 8 px", published="none"),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """Nothing of the cache, which holds one vector an image."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """Tokens, and objects."""
    check_tokens(subject, recipe, "similarity")


def categories_of(image: TokenImage, background: Background) -> IntArray:
    """The category of every token, NO_CATEGORY for the background where it is one, or NO_PAIR. (N,)"""
    beside = NO_PAIR if background == "out" else NO_CATEGORY
    return np.array([*image.categories, beside, NO_PAIR], np.int64)[image.label]


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Count the pairs of every image, and compare the distributions."""
    read, counts = Read(), np.zeros((2, recipe.bins), np.int64)
    sums, pairs = [], []
    for image in token_images(subject, recipe, read):
        category = categories_of(image, recipe.background)
        found = count_pairs(image.features, category, background=recipe.background, bins=recipe.bins)
        counts += found.counts
        sums.append(found.sums)
        pairs.append(found.counts.sum(axis=1))
    total = counts.sum(axis=1)
    for name, number in zip(KINDS, total, strict=True):
        if not number:
            what = "two categories" if name == "inter" else "two tokens of one category"
            raise UserError(
                f"{subject.dataset.name}: there are no {name} pairs: no image of {read.images:,} has {what} at "
                f"image_px={recipe.image_px}, background={recipe.background}. Give more images, or --set "
                "background=other, by which the background differs from all objects."
            )
    means = {
        f"{name}_mean_cosine": ratio(np.array(sums)[:, row], np.array(pairs)[:, row]) for row, name in enumerate(KINDS)
    }
    area = overlap(counts)
    tokens = f"patches of {subject.checkpoint.architecture.patch_px} px in {recipe.image_px} px"
    title = f"{subject.checkpoint.name} on {subject.dataset.name}: overlap {area:.3f}\n{tokens}"
    details = {
        "bin_edges": [-1.0, 1.0],
        "counts": {name: counts[row].tolist() for row, name in enumerate(KINDS)},
        "pairs": {name: int(total[row]) for row, name in enumerate(KINDS)},
        "tokens": tokens,
        **dataclasses.asdict(read),
    }
    return Scores(
        {"overlap_area": Score(area, int(np.any(pairs, axis=1).sum())), **means},  # images with any pair
        "overlap_area",
        details=details,
        lower_is_better=True,
        files={"similarity.png": plot(counts, [means[f"{name}_mean_cosine"].value for name in KINDS], title)},
        evaluated={SPLIT: read.images},
        skipped={SPLIT: read.broken},
    )


def ratio(sums: Numbers, counts: IntArray) -> Score:
    """The mean over all pairs of all images, with its standard error over images (the delta method)."""
    there = counts > 0
    sums, counts = sums[there], counts[there]
    value, n = float(sums.sum() / counts.sum()), len(counts)
    error = (
        math.sqrt(float(((sums - value * counts) ** 2).sum()) * n / (n - 1)) / float(counts.sum()) if n > 1 else None
    )
    return Score(value, n, stderr=error)


def plot(counts: IntArray, means: Sequence[float], title: str) -> bytes:
    """A PNG of both densities, as MMC's Fig. 5."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = counts.shape[1]
    edges, both = densities(counts)
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, density, mean, color in zip(KINDS, both, means, ("tab:blue", "tab:orange"), strict=True):
        axes.stairs(density, edges, fill=True, alpha=0.45, color=color, label=f"{name}, mean {mean:.3f}")
        axes.axvline(mean, color=color, linestyle="--", linewidth=1)
    occupied = np.flatnonzero(counts.sum(axis=0))
    axes.set_xlim(edges[max(occupied[0] - 2, 0)], edges[min(occupied[-1] + 3, bins)])
    axes.set(xlabel="cosine of two patches of an image", ylabel="density", title=title)
    axes.legend(loc="upper left")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
