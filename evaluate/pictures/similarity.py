"""Which patches look to the network like the one that was clicked (MMC, Figs. 1 and 2).

The cosine of the patch token under a point with the tokens of all patches, and what a threshold makes of it: MMC's
segmentation from one prompt. Colors go from 0 to 1 in every picture, so that pictures can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

from ssl_bench.evaluate.pictures.sheet import (
    VERMILION,
    Cell,
    Row,
    color_bar,
    heat,
    marked,
    sheet,
    shown,
    tinted,
    upsampled,
)
from ssl_bench.evaluate.pictures.views import TOKENS, Point, Seen, notes, share_of

# Table 1 has .1 to .4 for its networks; others put all patches closer together.
THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
_PINK = (255, 60, 160)


def similarity(patches: Tensor, row: int, column: int) -> Tensor:
    """Cosine of one patch token with all of them. (H, W, D) -> (H, W)"""
    unit = F.normalize(patches.double(), dim=-1)
    return unit @ unit[row, column]


def draw(seen: Sequence[Seen], thresholds: Sequence[float] = THRESHOLDS) -> Image.Image:
    """A row for every network and point: the point, the cosines, and a mask for every threshold."""
    rows = []
    for each in seen:
        for point in each.points:
            at = f"{each.name}, point {point[0]}, {point[1]}"
            rows.append(Row(_cells(each, point, thresholds), at))
    return sheet(
        "Similarity of patches to the marked one",
        rows,
        legends=[color_bar("≤ 0", "1", "cosine similarity with the patch under the point")],
        note=f"Pink: similarity above the threshold, after smooth upsampling. {notes(seen, of=TOKENS)}",
    )


def _cells(seen: Seen, point: Point, thresholds: Sequence[float]) -> list[Cell]:
    values = similarity(seen.patches, *seen.patch_of(point)).numpy()
    image = shown(seen.image)
    place = [(*share_of(point, seen.image.size), VERMILION)]
    fine = upsampled(values, image.size)
    masks = [
        Cell(marked(tinted(image, fine > threshold, _PINK), place), f"above {threshold:g}") for threshold in thresholds
    ]
    return [
        Cell(marked(image, place), "image"),
        Cell(
            marked(heat(values, seen.image, low=0, high=1), place), f"cosine, {values.min():.2f} to {values.max():.2f}"
        ),
        *masks,
    ]
