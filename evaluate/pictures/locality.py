"""Which box of an image looks to a network like a given crop (ExtreMA, Figs. 3 and 6).

Boxes of several scales are laid on the image. They and the query are cut out, resized to the network's input, and
compared by the cosine of their vectors: class tokens, or the mean of the patches for networks without one, or for
`pixels:` the pixels themselves. The boxes
come from outside (protocols/locality.py draws them, and measures retrieval over a data set).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image, ImageDraw

from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.pictures.sheet import CELL_PX, VERMILION, Cell, Row, bordered, sheet, shown
from ssl_bench.evaluate.pictures.views import normalized, pixels

Box = tuple[int, int, int, int]  # left, top, right, bottom
_NEAREST = 4  # crops that are shown
_PIXELS_PX = 48  # `pixels:` has no size of its own


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Cosines of the boxes with the query, by one network."""

    name: str
    vector: str
    cosine: npt.NDArray[np.float64]


@torch.no_grad()
def retrieve(
    checkpoint: Checkpoint,
    image: Image.Image,
    query: Image.Image,
    boxes: Sequence[Box],
    *,
    name: str,
    device: str,
) -> Retrieval:
    """Compare every box of the image with the query, which is a crop already."""
    architecture, backbone = checkpoint.architecture, checkpoint.backbone.to(device)
    side = architecture.image_px or _PIXELS_PX
    # Cut, then resized: no pixel from outside of a box may tell where it lies.
    crops = [query, *(image.crop(box) for box in boxes)]
    batch = torch.cat([pixels(crop.resize((side, side), Image.Resampling.BICUBIC)) for crop in crops])
    tokens = backbone(normalized(batch, architecture).to(device)).tokens[0]
    by_class = tokens.cls is not None
    vectors = F.normalize((tokens.cls if by_class else tokens.patch_mean).double(), dim=-1).cpu()
    what = "class token" if by_class else "mean of patches"
    if checkpoint.format == "pixels":
        what = f"all pixels of the crop at {side} x {side}"
    return Retrieval(name, what, (vectors[1:] @ vectors[0]).numpy())


def draw(image: Image.Image, query: Image.Image, boxes: Sequence[Box], found: Sequence[Retrieval]) -> Image.Image:
    """A row for every network: the query, the image with all boxes and the nearest one, and the nearest crops."""
    rows = []
    for each in found:
        order = np.argsort(-each.cosine, kind="stable")[:_NEAREST].tolist()
        crops = [shown(image.crop(boxes[place])) for place in order]
        crops[0] = bordered(crops[0], VERMILION)
        cells = [
            Cell(crop, f"{'nearest' if rank == 0 else f'{rank + 1}.'}, cosine {each.cosine[place]:.3f}")
            for rank, (crop, place) in enumerate(zip(crops, order, strict=True))
        ]
        overview = Cell(_with_boxes(image, boxes, order[0]), f"{len(boxes)} boxes, the nearest in color")
        rows.append(Row([Cell(shown(query), "query"), overview, *cells], f"{each.name}: {each.vector}"))
    return sheet(
        "Retrieval of a crop by its content, place and scale",
        rows,
        note="Crops are resized to the network's input and compared by cosine. Boxes are drawn at random: 5 scales, 5 "
        "places each (ExtreMA, Fig. 3).",
    )


def _with_boxes(image: Image.Image, boxes: Sequence[Box], best: int) -> Image.Image:
    picture = shown(image)
    across, down = picture.width / image.width, picture.height / image.height
    draw = ImageDraw.Draw(picture)

    def place(box: Box) -> tuple[float, float, float, float]:
        left, top = box[0] * across, box[1] * down
        return left, top, max(left, box[2] * across - 1), max(top, box[3] * down - 1)

    for box in boxes:
        draw.rectangle(place(box), outline=(255, 255, 255), width=1)
    draw.rectangle(place(boxes[best]), outline=VERMILION, width=max(3, CELL_PX // 80))
    return picture
