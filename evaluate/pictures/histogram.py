"""How similar patches of one object are to each other, and to everything else in the image (MMC, Fig. 1c).

Objects are the values of a mask: 0 is what belongs to none, 255 is left out. A patch belongs to the value that covers
most of it. Pairs of patches with the same value above 0 are intra-object, pairs of which at least one lies on an object
and whose values differ are inter-object. Protocol `similarity` measures the same over a data set, with the same code
(evaluate/patch_pairs.py), if it is told background=other; by default it leaves the background out, which in an image of
one object would leave nothing to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.patch_areas import patch_areas
from ssl_bench.evaluate.patch_pairs import BINS, NO_CATEGORY, NO_PAIR, Pairs, count_pairs, densities, overlap
from ssl_bench.evaluate.pictures.plot import plotted
from ssl_bench.evaluate.pictures.sheet import PALETTE, Cell, Row, sheet, shown, tinted
from ssl_bench.evaluate.pictures.views import TOKENS, Seen, notes
from ssl_bench.evaluate.subject import IntArray

Mask = npt.NDArray[np.uint8]  # (height, width)

BACKGROUND, VOID = 0, 255
_NOTE = (
    f"Overlap: the area under both densities, histograms of {BINS} bins from -1 to 1. Patches of the background differ "
    "from all objects, and two of them are no pair: as protocol similarity with --set background=other. "
)


def read_mask(path: Path, image: Image.Image) -> Mask:
    """A palette or gray image of the same size, one number a pixel, with at least two kinds of pixels."""
    try:
        with Image.open(path) as opened:
            mode, mask = opened.mode, np.asarray(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImage(str(path), str(error)) from error
    if mode not in {"P", "L", "1"}:
        raise UserError(
            f"--mask {path} is a {mode} image; expected one number a pixel: a palette or an 8-bit gray image."
        )
    if mask.shape != (image.height, image.width):
        raise UserError(
            f"--mask {path} has {mask.shape[1]} x {mask.shape[0]} px and its image {image.width} x {image.height}; "
            "expected the same size."
        )
    values = np.setdiff1d(np.unique(mask), VOID)
    if len(values) < 2 or (values == BACKGROUND).all():
        raise UserError(
            f"--mask {path} holds the values {', '.join(map(str, values)) or 'none'}; expected an object (above 0) and "
            "something else: other objects or background (0). 255 is left out."
        )
    return mask.astype(np.uint8)


def objects_of_patches(mask: Mask, grid: tuple[int, int]) -> IntArray:
    """The value that covers most of each patch; the lowest of several. (rows, columns)"""
    values = np.unique(mask)
    found: IntArray = values[patch_areas(mask, values.tolist(), grid).argmax(axis=0)].astype(np.int64).reshape(grid)
    return found


def pairs(seen: Seen, mask: Mask) -> Pairs:
    """The cosines of all intra-object pairs, and of all inter-object pairs, every pair once, as histograms."""
    objects = objects_of_patches(mask, seen.grid).ravel()
    category = np.select([objects == VOID, objects == BACKGROUND], [NO_PAIR, NO_CATEGORY], objects)
    tokens = F.normalize(seen.patches, dim=-1).flatten(0, 1)
    return count_pairs(tokens, category, background="other", bins=BINS)


def draw(seen: Sequence[Seen], mask: Mask) -> Image.Image:
    """The image with its objects, and the two distributions for every network."""
    image = shown(seen[0].image)
    fine = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    for number, value in enumerate(np.setdiff1d(np.unique(mask), [BACKGROUND, VOID])):
        image = tinted(image, fine == value, PALETTE[number % len(PALETTE)])
    cells = [Cell(image, "objects")]
    for each in seen:
        found = pairs(each, mask)
        inter, intra = found.counts.sum(axis=1).tolist()
        if not intra or not inter:
            raise UserError(
                f"the mask leaves {intra:,} intra-object and {inter:,} inter-object pairs of patches of "
                f"{each.architecture.patch_px} px, and both are needed: look more closely (--size), or take larger "
                "objects."
            )
        edges, (between, within) = densities(found.counts)
        filled = slice(
            max(0, int(np.flatnonzero(between + within)[0]) - 1), None
        )  # most networks have no negative ones
        middle = ((edges[1:] + edges[:-1]) / 2)[filled]
        lines = {
            f"intra-object, mean {found.sums[1] / intra:.3f}": (middle, within[filled]),
            f"inter-object, mean {found.sums[0] / inter:.3f}": (middle, between[filled]),
        }
        picture = plotted(lines, x="cosine similarity of two patches", y="density", filled=True)
        cells.append(Cell(picture, f"{each.name}: overlap {overlap(found.counts):.3f}, {intra:,} + {inter:,} pairs"))
    return sheet("Similarity within objects and between them", [Row(cells)], note=_NOTE + notes(seen, of=TOKENS))
