"""Block-wise corruption of images after GMML (Atito, Awais and Kittler 2022), which SiT, MC-SSL and MMC use.

Rectangles at random places, of random sides up to a share of the image's, are laid on the image until they cover a
target area. They may overlap, and the last one may overshoot. The target is U(min(.5, a), a) of the image, where a is
the area asked for. The pixels under them are replaced by noise, N(0, 1) in the normalized image, or by what another
image of the batch shows at the same place ("alien").

What is drawn for a sample is a map of its pixels (kept, noise, alien) and a place in a fixed table of normal numbers
from which its noise is read: to draw 150,000 normals a view in a worker would cost more than to decode the image. The
table is the same in all runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ssl_bench.errors import UserError

KEPT, NOISE, ALIEN = 0, 1, 2
TABLE = 2**22  # normal numbers


def check_blocks(image_px: int, *, block: float, align: int) -> None:
    """Refuse blocks that cannot be laid on an image of this size."""
    if align < 1 or image_px % align:
        raise UserError(f"align={align}: expected a divisor of the image's side of {image_px} px; 1 aligns nothing.")
    if int(block * image_px) < align:
        raise UserError(
            f"block={block:g} of {image_px} px is {int(block * image_px)} px, less than the smallest block, "
            f"align={align}: choose larger blocks or a smaller align."
        )
    if 3 * image_px**2 > TABLE // 2:
        raise UserError(f"image_px={image_px}: the table of noise holds too few numbers for images of that size.")


def covered_by_blocks(
    rng: np.random.Generator, side: int, area: float, *, block: float, align: int
) -> npt.NDArray[np.uint8]:
    """(side, side): 1 under rectangles that cover at least U(min(.5, area), area) of the pixels, else 0.

    Corners lie on a grid of `align` px; heights and widths are drawn from align ... block * side, cut at the border
    and rounded to that grid.
    """
    covered = np.zeros((side, side), np.uint8)
    target = rng.uniform(min(0.5, area), area) * side * side
    missing, laid = target, 0  # pixels, at the last count; pixels laid since, with overlaps
    while True:
        corners = rng.integers(0, side - align, (2, 32), endpoint=True) // align * align
        drawn = rng.integers(align, int(block * side), (2, 32), endpoint=True)
        extents = np.rint(np.minimum(drawn, side - corners) / align).astype(np.int64) * align
        for top, left, height, width in np.concatenate([corners, extents]).T.tolist():
            covered[top : top + height, left : left + width] = 1
            laid += height * width
            if laid >= missing:  # before that they could not do even without overlaps: counting is most of the work
                missing, laid = target - np.count_nonzero(covered), 0
                if missing <= 0:
                    return covered


def draw_corruption(
    rng: np.random.Generator,
    side: int,
    *,
    noise_area: float,
    alien_area: float,
    alien_share: float,
    block: float,
    align: int,
) -> tuple[npt.NDArray[np.uint8], int]:
    """One view: the map of its pixels, NOISE or in `alien_share` of views ALIEN, and its place in the table."""
    alien = rng.random() < alien_share
    covered = covered_by_blocks(rng, side, alien_area if alien else noise_area, block=block, align=align)
    noise_at = int(rng.integers(0, TABLE - 3 * side * side, endpoint=True))
    return (covered * np.uint8(ALIEN) if alien else covered), noise_at


class Corruption(nn.Module):
    """Carries out what was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        table = torch.randn(TABLE, generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", table, persistent=False)

    def forward(self, clean: Tensor, maps: Tensor, noise_at: Tensor) -> Tensor:
        """V views of B images (V, B, 3, S, S), each with its map (V, B, S, S) and its place in the table (V, B)."""
        noise = self.table.unfold(0, clean[0, 0].numel(), 1)[noise_at].view_as(clean)
        aliens = clean[:, neighbors(clean.shape[1], clean.device)]
        maps = maps.unsqueeze(2)
        return torch.where(maps == NOISE, noise, torch.where(maps == ALIEN, aliens, clean))


def neighbors(batch: int, device: Any = None) -> Tensor:
    """The image that each takes pixels from: 1 0 3 2 5 4 ...; the last of an odd batch takes the one before it.

    The order of a batch is random, so a neighbor is a random image. Pairs lie in one process if each has an even batch.
    """
    index = torch.arange(batch, device=device)
    return torch.where(index ^ 1 < batch, index ^ 1, (index - 1).clamp(min=0))
