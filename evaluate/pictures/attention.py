"""Where the class token looks, head by head, and where patches look.

`draw` is TEC's Fig. 2 and SdAE's Fig. 7: every head's map, all heads as colors in one picture, and their mean.
`draw_queries` is ExtreMA's Figs. 1 and 9: maps of chosen patches, and that of the class token, averaged over heads.
All are probabilities of the softmax, of which the share that goes to the class token and to registers is not drawn.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from ssl_bench.evaluate.pictures.sheet import (
    PALETTE,
    Cell,
    Color,
    Row,
    bordered,
    color_bar,
    heat,
    marked,
    sheet,
    shown,
    swatches,
    upsampled,
)
from ssl_bench.evaluate.pictures.views import BOTH_ATTENTIONS, CLASS_ATTENTION, PATCH_ATTENTION, Seen, notes, share_of

_HEADS_A_ROW = 6


def head_colors(count: int) -> list[Color]:
    """As many colors of the same brightness, neighbors far apart: hues in steps of the golden ratio."""
    hues = ((number * 0.618034) % 1 for number in range(count))
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.72, 1.0)) for hue in hues]  # type: ignore[misc]


def overlay(maps: Tensor, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """All heads in one picture (height, width, 3): at every place the color of the head that attends most to it.

    Every head counts relative to its own largest value, which is also the brightness: black means no attention.
    """
    relative = np.stack([upsampled(each, size) / max(each.max(), 1e-12) for each in maps.numpy()])  # (heads, h, w)
    colors = np.array(head_colors(len(relative)), np.float32)[relative.argmax(0)]
    result: npt.NDArray[np.uint8] = (colors * relative.max(0)[..., None]).round().astype(np.uint8)
    return result


def draw(seen: Sequence[Seen]) -> Image.Image:
    """For every network the image, the heads in color, their mean, and each head by itself."""
    rows: list[Row] = []
    for each in seen:
        maps = each.class_attention
        assert maps is not None
        image = shown(each.image)
        first = [
            Cell(image, "image"),
            Cell(Image.fromarray(overlay(maps, image.size)), "all heads, each in its color"),
            Cell(_map(maps.mean(0), each), f"mean of heads, 0 to {float(maps.mean(0).max()):.2g}"),
        ]
        rows.append(Row(first, f"{each.name}: attention of the class token"))
        colors = head_colors(len(maps))
        heads = [
            Cell(bordered(_map(head, each), colors[number]), f"head {number + 1}, 0 to {float(head.max()):.2g}")
            for number, head in enumerate(maps)
        ]
        rows += [Row(heads[at : at + _HEADS_A_ROW]) for at in range(0, len(heads), _HEADS_A_ROW)]
    legend = color_bar("0", "the map's largest", "share of the attention that a patch gets")
    return sheet(
        "Self-attention of the class token",
        rows,
        legends=[legend],
        note=f"Frames have the color that a head has in the picture of all heads; there, black is no attention. "
        f"{notes(seen, of=CLASS_ATTENTION)}",
    )


def draw_queries(seen: Sequence[Seen]) -> Image.Image:
    """For every network the image with its queries, the class token's map if there is one, and the queries' maps."""
    rows = []
    for each in seen:
        assert each.point_attention is not None
        colors = list(itertools.islice(itertools.cycle(PALETTE), len(each.points)))
        places = [(*share_of(p, each.image.size), color) for p, color in zip(each.points, colors, strict=True)]
        cells = [Cell(marked(shown(each.image), places), "queries")]
        if each.class_attention is not None:
            mean = each.class_attention.mean(0)
            cells.append(Cell(_map(mean, each), f"class token, 0 to {float(mean.max()):.2g}"))
        for point, color, maps in zip(each.points, colors, each.point_attention, strict=True):
            mean, place = maps.mean(0), [(*share_of(point, each.image.size), color)]
            picture = bordered(marked(_map(mean, each), place), color)
            cells.append(Cell(picture, f"patch at {point[0]}, {point[1]}, 0 to {float(mean.max()):.2g}"))
        rows.append(Row(cells, each.name))
    return sheet(
        "Self-attention of patches, mean of all heads",
        rows,
        legends=[
            swatches(
                (color, f"query {point[0]}, {point[1]}") for point, color in zip(seen[0].points, colors, strict=True)
            ),
            color_bar("0", "the map's largest", "share of the attention that a patch gets"),
        ],
        note=notes(seen, of=BOTH_ATTENTIONS if any(each.class_block for each in seen) else PATCH_ATTENTION),
    )


def _map(values: Tensor, seen: Seen) -> Image.Image:
    return heat(values.numpy(), seen.image, low=0, high=float(values.max()))
