"""What the blocks of a network have to do with its output (TEC, Fig. 5 and appendix C).

Left: how similar the patch tokens of every block are to those of the last one, by linear CKA over the patches of the
image (Kornblith et al. 2019). TEC found by it that the last two blocks are alike. Right, for networks with TEC's
encoder adapters: how much each contributes to their sum Z_e. The paper does not say how that is measured; here it is
the length of a group's vector Z'_n as a share of the lengths of all groups, in the mean over the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ssl_bench.evaluate.adapters import EncoderAdapter
from ssl_bench.evaluate.backbone import Backbone, Tokens
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.pictures.plot import Lines, plotted
from ssl_bench.evaluate.pictures.sheet import Cell, Row, sheet, shown
from ssl_bench.evaluate.pictures.views import Seen, notes

Shares = npt.NDArray[np.float64]


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two descriptions of the same n things, (n, D) and (n, E): in [0, 1].

    |Y'X|^2 / (|X'X| |Y'Y|) of centered columns; by the n x n products, which are the same and smaller where n is.
    """
    x, y = ((z.double() - z.double().mean(0)) for z in (x, y))
    if len(x) < x.shape[1]:
        gram_x, gram_y = x @ x.T, y @ y.T
        shared = (gram_x * gram_y).sum()
    else:
        gram_x, gram_y = x.T @ x, y.T @ y
        shared = (y.T @ x).square().sum()
    return float(shared / (gram_x.norm() * gram_y.norm()).clamp_min(1e-30))


def similarity_to_last(blocks: Sequence[Tokens]) -> list[float]:
    """CKA of the patches of every block with those of the last one, raw as the blocks give them."""
    last = blocks[-1].patches.flatten(0, -2)
    return [cka(tokens.patches.flatten(0, -2), last) for tokens in blocks]


@torch.no_grad()
def adapter_shares(checkpoint: Checkpoint, blocks: Sequence[Tokens]) -> Shares:
    """What each encoder adapter contributes to Z_e, in shares that add up to 1."""
    adapter = EncoderAdapter.from_state(checkpoint.require_extra("encoder_adapter"))
    backbone = checkpoint.backbone
    assert isinstance(backbone, Backbone)
    # As adapters.block_outputs gives them: raw, but for the last, which passes the final norm.
    norm = backbone.vit.norm
    joined = [torch.cat([tokens.cls[:, None], tokens.patches.flatten(1, 2)], dim=1) for tokens in blocks]  # type: ignore[index]
    device = next(norm.parameters()).device
    joined[-1] = norm(joined[-1].to(device)).cpu()
    lengths = torch.stack([part.norm(dim=-1) for part in adapter.parts(joined)]).double()  # (groups, 1, 1 + N)
    shares: Shares = (lengths / lengths.sum(0)).mean((1, 2)).numpy()
    return shares


def draw(seen: Sequence[Seen], shares: Mapping[str, Shares]) -> Image.Image:
    """The image and the plots; `shares` by the name of the network, for those that have adapters."""
    lines: Lines = {
        each.name: (np.arange(1, len(each.blocks) + 1), np.array(similarity_to_last(each.blocks))) for each in seen
    }
    cells = [
        Cell(shown(seen[0].image), "image"),
        Cell(plotted(lines, x="block", y="CKA with the last block"), "similarity of every block to the last one"),
    ]
    if shares:
        parts: Lines = {name: (np.arange(1, len(values) + 1), 100 * values) for name, values in shares.items()}
        picture = plotted(parts, x="encoder adapter, from the first blocks to the last", y="share of Z_e in percent")
        cells.append(Cell(picture, "contribution of every encoder adapter"))
    note = notes(seen, of="Linear CKA over the patches of this image, without the final norm.")
    if shares:
        note += " Contribution of an adapter: the length of its Z'_n over the lengths of all, mean over the tokens."
    return sheet("Blocks and the output", [Row(cells)], note=note)
