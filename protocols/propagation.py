"""Carry soft masks from frame to frame by the similarity of tokens, as DINO's eval_video_segmentation.py does.

A token of the new frame looks at the tokens of the first frame and of the last few ones that are no further away than
a radius, in rows and in columns. Its k most similar ones (cosine), over all those frames together, pass their masks on,
with weights exp(cosine / temperature) that add up to 1. Whatever is as similar as the k-th counts as well, so that no
order decides between equally similar tokens; and what lies outside of the grid is never chosen. As in the script,
equal means equal in the last bit: a matrix product may round the same two tokens otherwise at another place of a tile,
and then some of what is tied counts, and some does not.

The script computes all N x N similarities and then multiplies most of them with 0. Here a tile of the new frame meets
one row of the other frames at a time, and of that row only what some token of the tile can see: fast matrix products,
and a few megabytes whatever the size of the frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)
from PIL import Image
from torch import Tensor

T = TypeVar("T")

# Rows and columns of a tile. On a CPU its similarities should stay in the cache; a GPU wants few and large products.
_TILE = {"cpu": (20, 8), "cuda": (64, 16)}


@dataclass(frozen=True)
class Rule:
    """Who passes masks on to whom."""

    frames: int  # the last ones, beside the first one
    radius: int  # in tokens
    topk: int
    temperature: float


class Context:
    """What a new frame looks at: the first frame and the last ones, side by side at every place."""

    def __init__(self, tokens: Tensor, mask: Tensor, frames: int) -> None:
        """Of the first frame: tokens of unit length (H, W, D), soft mask (H, W, C); and how many others will fit."""
        self.tokens = tokens.new_zeros(*tokens.shape[:2], 1 + frames, tokens.shape[2])  # (H, W, n, D)
        self.masks = mask.new_zeros(*mask.shape[:2], 1 + frames, mask.shape[2])  # (H, W, n, C)
        self.seen = 0
        self.add(tokens, mask)

    def add(self, tokens: Tensor, mask: Tensor) -> None:
        """A frame takes the place of the oldest one but the first."""
        others = self.tokens.shape[2] - 1
        if self.seen == 0 or others:
            place = 1 + (self.seen - 1) % others if self.seen else 0
            self.tokens[:, :, place], self.masks[:, :, place] = tokens, mask
        self.seen += 1


def propagated(tokens: Iterable[Tensor], first: Tensor, rule: Rule) -> Iterator[Tensor]:
    """Soft masks of all frames but the first, (H, W, C) each, from their tokens (H, W, D) and the first one's mask."""
    iterator = iter(tokens)
    context = Context(F.normalize(next(iterator), dim=2), first, rule.frames)
    for each in iterator:
        target = F.normalize(each, dim=2)
        mask = passed_on(target, context, rule)
        context.add(target, mask)
        yield mask


def passed_on(target: Tensor, context: Context, rule: Rule) -> Tensor:
    """The soft mask of one frame from its tokens, of unit length. (H, W, D) -> (H, W, C)"""
    height, width, _ = target.shape
    rows, columns = _TILE["cpu" if target.device.type == "cpu" else "cuda"]
    result = target.new_empty(height, width, context.masks.shape[3])
    corners = list(itertools.product(range(0, height, rows), range(0, width, columns)))
    tiles = [(slice(top, min(top + rows, height)), slice(left, min(left + columns, width))) for top, left in corners]

    def compute(tile: tuple[slice, slice]) -> Tensor:
        return _tile_masks(target[tile], context, rule, top=tile[0].start, left=tile[1].start)

    for tile, masks in zip(tiles, _all_at_once(compute, tiles, target.device.type), strict=True):
        result[tile] = masks
    return result


def _all_at_once(compute: Callable[[T], Tensor], tiles: Sequence[T], device: str) -> list[Tensor]:
    """On a CPU the tiles are shared out among threads, where each operation alone is too small to be cut in pieces:
    threads that wait for each other after every one of them lose more than they gain, most of all on a busy machine.
    """
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1 or len(tiles) == 1:
        return [compute(tile) for tile in tiles]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(compute, tiles))
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _tile_masks(target: Tensor, context: Context, rule: Rule, *, top: int, left: int) -> Tensor:
    """The masks of a tile that begins at `top`, `left`. (h, w, D) -> (h, w, C)"""
    height, width, _ = target.shape
    window = (
        slice(max(top - rule.radius, 0), min(top + height + rule.radius, len(context.tokens))),
        slice(max(left - rule.radius, 0), min(left + width + rule.radius, context.tokens.shape[1])),
    )
    columns = torch.arange(window[1].start, window[1].stop, device=target.device)
    own = torch.arange(left, left + width, device=target.device)
    places = torch.arange(context.tokens.shape[2], device=target.device)
    hidden = ((columns - own[:, None]).abs() > rule.radius)[..., None] | (places >= context.seen)  # (w, W, n)
    similarity = _similarities(target, context.tokens[window], hidden.flatten(1), rule.radius, top - window[0].start)
    best, index = _largest(similarity, rule.topk + 1)  # one more, to see what is tied
    kept = min(rule.topk, best.shape[1])
    similarity = similarity.flatten(1)
    masks = context.masks[window].reshape(similarity.shape[1], -1)
    result = torch.einsum("qk,qkc->qc", _weights(best[:, :kept], best[:, :1], rule), masks[index[:, :kept]])
    tied = (best[:, kept - 1] == best[:, -1]) & (best.shape[1] > kept)
    if tied.any():
        chosen = similarity[tied]
        chosen.masked_fill_(chosen < best[tied, kept - 1 : kept], -torch.inf)
        result[tied] = _weights(chosen, best[tied, :1], rule) @ masks
    return result.view(height, width, -1)


def _similarities(target: Tensor, tokens: Tensor, hidden: Tensor, radius: int, down: int) -> Tensor:
    """Of every token of a tile with those of the window around it, -inf where it does not look. (h w, H, W n)

    The tile begins `down` rows into the window. `hidden` (w, W n) is what a token does not see of any row.
    """
    height, width, dim = target.shape
    queries = target.reshape(height * width, dim)
    result = target.new_full((height * width, len(tokens), hidden.shape[1]), -torch.inf)
    for row, keys in enumerate(tokens):
        some = slice(max(row - radius - down, 0) * width, min(row + radius - down + 1, height) * width)
        torch.mm(queries[some], keys.reshape(-1, dim).T, out=result[some, row])
    result.view(height, width, len(tokens), -1).masked_fill_(hidden[:, None], -torch.inf)
    return result


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of every (H, W) by their size, and their places in it flattened. (q, H, W) -> 2 x (q, count)

    The `count` largest lie in the `count` columns with the largest maximum: an element of another column has one in
    each of those that is as large. (One pass for the maxima is quick; to search all elements is not.)
    """
    height, width = values.shape[1:]
    columns = values.amax(dim=1).topk(min(count, width), dim=1)[1]  # (q, c)
    inside = values.gather(2, columns[:, None].expand(-1, height, -1)).flatten(1)
    best, place = inside.topk(min(count, inside.shape[1]), dim=1)
    row, column = place // columns.shape[1], place % columns.shape[1]
    return best, row * width + columns.gather(1, column)


def _weights(similarity: Tensor, largest: Tensor, rule: Rule) -> Tensor:
    """exp(cosine / temperature) over their sum; the largest is taken off first, so that nothing overflows."""
    weights = ((similarity - largest) / rule.temperature).exp()
    return weights / weights.sum(dim=1, keepdim=True)


# From labels to soft masks and back ----------------------------------------------------------------------------------


def soft_mask(labels: npt.NDArray[np.uint8], objects: int, grid: tuple[int, int]) -> Tensor:
    """Labels (H, W) at the place of every token, one-hot. (h, w, 1 + objects)"""
    small = Image.fromarray(labels).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    return F.one_hot(torch.from_numpy(np.array(small, dtype=np.int64)), 1 + objects).float()


def hard_mask(soft: Tensor, patch_px: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Labels of a frame of width, height `size`: enlarged by the patch (bilinear), every class brought to 0 ... 1, the
    largest taken (the first of several), and the result resized (nearest).

    A class that is everywhere the same, but not 0, becomes 0 / 0 in the script, and NaN takes the whole frame. Here it
    is 1 everywhere, and leaves to the classes before it the places where they are largest.
    """
    height, width = (patch_px * side for side in soft.shape[:2])
    large = F.interpolate(soft.permute(2, 0, 1)[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    scaled = torch.where(high > low, (large - low) / (high - low).clamp_min(1e-30), (high > 0).float())
    best, labels = scaled[0], torch.zeros_like(scaled[0], dtype=torch.uint8)
    for number, each in enumerate(scaled[1:], start=1):  # argmax(dim=0) takes ten times as long on a CPU
        labels = labels.masked_fill(each > best, number)
        best = torch.maximum(best, each)
    return np.array(Image.fromarray(labels.cpu().numpy()).resize(size, Image.Resampling.NEAREST))
