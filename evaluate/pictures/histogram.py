"""How similar patches of one object are to each other, and to everything else in the image (MMC, Fig. 1c).

Objects are the values of a mask: 0 is what belongs to none, 255 is left out. A patch belongs to the value that most of
its pixels have. Pairs of patches with the same value above 0 are intra-object, pairs of which at least one lies on an
object and whose values differ are inter-object. (Protocol `similarity` measures this over a data set.)
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
from ssl_bench.evaluate.pictures.plot import plotted
from ssl_bench.evaluate.pictures.sheet import PALETTE, Cell, Row, sheet, shown, tinted
from ssl_bench.evaluate.pictures.views import TOKENS, Seen, notes

Mask = npt.NDArray[np.uint8]  # (height, width)
Densities = npt.NDArray[np.float64]

BACKGROUND, VOID = 0, 255
_BINS = 50  # from -1 to 1


def read_mask(path: Path, image: Image.Image) -> Mask:
    """A palette or gray image of the same size, one number a pixel, with at least two kinds of pixels."""
    try:
        with Image.open(path) as opened:
            mode, mask = opened.mode, np.asarray(opened)
    except (OSError, ValueError, SyntaxError) as error:
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


def objects_of_patches(mask: Mask, grid: tuple[int, int], patch_px: int) -> npt.NDArray[np.int64]:
    """The value that most pixels of each patch have; the lowest of several. (rows, columns)"""
    rows, columns = grid
    size = (columns * patch_px, rows * patch_px)
    fine = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    patches = fine.reshape(rows, patch_px, columns, patch_px).transpose(0, 2, 1, 3).reshape(rows, columns, -1)
    values = np.unique(mask)
    counts = np.stack([(patches == value).sum(-1) for value in values], axis=-1)
    found: npt.NDArray[np.int64] = values[counts.argmax(-1)].astype(np.int64)
    return found


def pairs(seen: Seen, mask: Mask) -> tuple[Densities, Densities]:
    """The cosines of all intra-object pairs, and of all inter-object pairs, every pair once."""
    objects = objects_of_patches(mask, seen.grid, seen.architecture.patch_px).ravel()
    kept = objects != VOID
    tokens = F.normalize(seen.patches.double(), dim=-1).flatten(0, 1).numpy()[kept]
    objects = objects[kept]
    one, other = np.triu_indices(len(objects), k=1)
    cosine = (tokens @ tokens.T)[one, other]
    same = objects[one] == objects[other]
    on_object = (objects[one] != BACKGROUND) | (objects[other] != BACKGROUND)
    return cosine[same & on_object], cosine[~same]


def densities(intra: Densities, inter: Densities) -> tuple[Densities, Densities, Densities, float]:
    """Edges of bins in [-1, 1], both normalized histograms, and the area that they share."""
    edges = np.linspace(-1, 1, _BINS + 1)
    one, other = (np.histogram(np.clip(each, -1, 1), edges, density=True)[0] for each in (intra, inter))
    return edges, one, other, float(np.minimum(one, other).sum() * (edges[1] - edges[0]))


def draw(seen: Sequence[Seen], mask: Mask) -> Image.Image:
    """The image with its objects, and the two distributions for every network."""
    image = shown(seen[0].image)
    fine = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    for number, value in enumerate(np.setdiff1d(np.unique(mask), [BACKGROUND, VOID])):
        image = tinted(image, fine == value, PALETTE[number % len(PALETTE)])
    cells = [Cell(image, "objects")]
    for each in seen:
        intra, inter = pairs(each, mask)
        if not len(intra) or not len(inter):
            raise UserError(
                f"the mask leaves {len(intra):,} intra-object and {len(inter):,} inter-object pairs of patches of "
                f"{each.architecture.patch_px} px, and both are needed: look more closely (--size), or take larger "
                "objects."
            )
        edges, one, other, shared = densities(intra, inter)
        filled = slice(max(0, int(np.flatnonzero(one + other)[0]) - 1), None)  # most networks have no negative ones
        middle = ((edges[1:] + edges[:-1]) / 2)[filled]
        lines = {
            f"intra-object, mean {intra.mean():.3f}": (middle, one[filled]),
            f"inter-object, mean {inter.mean():.3f}": (middle, other[filled]),
        }
        picture = plotted(lines, x="cosine similarity of two patches", y="density", filled=True)
        cells.append(Cell(picture, f"{each.name}: overlap {shared:.3f}, {len(intra):,} + {len(inter):,} pairs"))
    return sheet("Similarity within objects and between them", [Row(cells)], note=notes(seen, of=TOKENS))
