"""A masked image rebuilt from the output of each of the last blocks (MMC, Fig. 9).

The tokens of a block skip the blocks above it and go, through the final norm, into the head that was trained on the
last one. Below them is what each block changes: the mean absolute difference to the reconstruction from the block
before.

Two kinds of checkpoints can do that. MMC's hold a head on patch tokens (extra `reconstruction`): it sees noise in place
of the covered pixels. MAE's hold a decoder (extra `decoder` whose last layer is `predict`; or `decoder_pred` in the
official files that include it): it sees some of the patches. Everything happens at the network's own image size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor, nn

from ssl_bench.evaluate.architecture import State
from ssl_bench.evaluate.backbone import Backbone, Tokens
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.pictures.masked import kept_count, without
from ssl_bench.evaluate.pictures.sheet import Cell, Row, color_bar, colored, sheet, shown, upsampled
from ssl_bench.evaluate.pictures.views import denormalized, normalized, picture, pixels, squared
from ssl_bench.evaluate.training.blockwise import draw_corruption

LAST_BLOCKS = 6
_OFFICIAL_HEADS = 16  # of MAE's decoder, in all sizes


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Images (1, 3, S, S), normalized as the network wants them."""

    original: Tensor
    given: Tensor  # with noise or gray where the network sees nothing
    blocks: tuple[int, ...]  # counted from 0
    rebuilt: tuple[Tensor, ...]  # from each of these blocks
    how: str


def why_not(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint cannot rebuild pixels, in words; None if it can."""
    if "reconstruction" in checkpoint.extras or _mae_decoder(checkpoint) is not None:
        return None
    method = checkpoint.origin.get("method", checkpoint.format)
    return (
        f"it ({method}) has no head that gives pixels. Beyond the backbone it holds: "
        f"{', '.join(checkpoint.extras) or 'nothing'}. Those of `ssl-bench pretrain mmc` have a head for it, those of "
        "`ssl-bench pretrain mae` a decoder, and so have MAE's official files with a decoder (mae_visualize_vit_*)"
    )


@torch.no_grad()
def reconstruct(checkpoint: Checkpoint, image: Image.Image, *, seed: int, device: str) -> Reconstruction:
    """Mask the image's center square, and rebuild it from every one of the last blocks."""
    architecture, backbone = checkpoint.architecture, checkpoint.backbone.to(device)
    assert isinstance(backbone, Backbone)
    blocks = tuple(range(max(0, architecture.depth - LAST_BLOCKS), architecture.depth))
    clean = normalized(pixels(squared(image, architecture.image_px)), architecture)
    recipe = checkpoint.origin.get("resolved_recipe", {})
    assert isinstance(recipe, Mapping)
    if "reconstruction" in checkpoint.extras:
        given = _with_noise(clean, recipe, seed)
        tokens = backbone(given.to(device), layers=blocks).tokens
        head = checkpoint.extras["reconstruction"]
        rebuilt = tuple(pixel_head(head, each.patches.cpu()) for each in tokens)
        return Reconstruction(clean, given, blocks, rebuilt, "MMC's pixel head; noise covers blocks of the image.")
    decoder = _mae_decoder(checkpoint)
    assert decoder is not None
    order = torch.from_numpy(np.random.default_rng(seed).permutation(architecture.grid**2))[None]
    visible, masked = order.tensor_split([kept_count(architecture.grid**2, _number(recipe, "mask_ratio", 0.75))], dim=1)
    tokens = backbone(clean.to(device), layers=blocks, keep=visible.to(device)).tokens
    heads = int(_number(recipe, "decoder_heads", _OFFICIAL_HEADS))
    scaled = bool(recipe.get("normalize_pixels", False))
    patch = architecture.patch_px
    rebuilt = tuple(
        _put_back(clean, masked, decoded(decoder, each, visible, masked, heads=heads), patch_px=patch, scaled=scaled)
        for each in (Tokens(None if t.cls is None else t.cls.cpu(), t.patches.cpu()) for t in tokens)
    )
    how = "MAE's decoder; gray patches are hidden, and the others drawn as they are."
    if scaled:
        how += " It predicts normalized pixels: each hidden patch has its true mean and standard deviation."
    gray = normalized(torch.full((1, 3, 1, 1), 0.5), architecture)
    return Reconstruction(clean, without(clean, visible, patch, gray=gray), blocks, rebuilt, how)


def _with_noise(clean: Tensor, recipe: Mapping[str, Any], seed: int) -> Tensor:
    """MMC's masked view: noise under blocks, as it was trained; never another image's pixels."""
    covered, _ = draw_corruption(
        np.random.default_rng(seed),
        clean.shape[-1],
        noise_area=_number(recipe, "noise_area", 0.75),
        alien_area=_number(recipe, "alien_area", 0.3),
        alien_share=0.0,
        block=_number(recipe, "block", 0.3),
        align=int(_number(recipe, "align", 1)),
    )
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.from_numpy(covered.astype(bool)), noise, clean)


def _number(recipe: Mapping[str, Any], name: str, otherwise: float) -> float:
    """A setting of the training; the paper's where a file does not tell."""
    return float(recipe.get(name, otherwise))


def pixel_head(state: State, patches: Tensor) -> Tensor:
    """MMC's head on patch tokens, (n, H, W, D) -> (n, 3, S, S): an MLP of three layers, or SiT's with a convolution.

    Numbers of layers are their places in the head as it was saved, with activations between them.
    """
    x = patches
    for layer in (0, 2):
        x = F.gelu(F.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"]))
    x = F.linear(x, state["4.weight"], state["4.bias"])
    if "7.weight" in state:  # layer 6 only reorders the axes
        weight = state["7.weight"]
        return F.conv_transpose2d(F.gelu(x).permute(0, 3, 1, 2), weight, state["7.bias"], stride=weight.shape[-1])
    return unpatchified(x.flatten(1, 2), x.shape[1])


def unpatchified(patches: Tensor, rows: int) -> Tensor:
    """(n, H * W, p * p * 3), a patch row by row with its channels last as MAE orders it -> (n, 3, H * p, W * p)."""
    side = math.isqrt(patches.shape[-1] // 3)
    pixels_ = patches.reshape(len(patches), rows, -1, side, side, 3).permute(0, 5, 1, 3, 2, 4)
    return pixels_.reshape(len(patches), 3, rows * side, -1)


def patchified(images: Tensor, patch_px: int) -> Tensor:
    """The inverse."""
    n, _, height, width = images.shape
    split = images.reshape(n, 3, height // patch_px, patch_px, width // patch_px, patch_px)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, 3 * patch_px**2)


def _mae_decoder(checkpoint: Checkpoint) -> State | None:
    """The decoder of an MAE under our names; None for other checkpoints, whose decoders may predict something else."""
    state = checkpoint.extras.get("decoder", {})
    if checkpoint.origin.get("method") == "mae" and "predict.weight" in state:
        return state
    if checkpoint.format != "mae" or "decoder_pred.weight" not in state:
        return None
    renamed = {}
    for key, value in state.items():
        theirs = next((name for name in _OFFICIAL if key.startswith(name)), key)
        renamed[_OFFICIAL.get(theirs, theirs) + key.removeprefix(theirs)] = value
    return renamed


# What the official MAE calls the parts of its decoder -> what ours does.
_OFFICIAL = {
    "mask_token": "tokens.mask_token",
    "decoder_embed": "tokens.project",
    "decoder_pos_embed": "pos_embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "predict",
}


def decoded(state: State, tokens: Tokens, visible: Tensor, masked: Tensor, *, heads: int) -> Tensor:
    """MAE's decoder: the pixels of the hidden patches (1, m, 3 p^2) from the tokens of the visible ones."""
    from timm.models.vision_transformer import Block

    dim = state["predict.weight"].shape[1]
    count = visible.shape[1] + masked.shape[1]
    positions = state.get("pos_embed", _sincos(dim, math.isqrt(count)))[0]
    weight, bias = state["tokens.project.weight"], state["tokens.project.bias"]
    seen = F.linear(tokens.patches, weight, bias) + positions[1 + visible]
    x = torch.cat([seen, state["tokens.mask_token"] + positions[1 + masked]], dim=1)
    if tokens.cls is not None:
        x = torch.cat([F.linear(tokens.cls, weight, bias)[:, None] + positions[:1], x], dim=1)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))).eval()
    blocks.load_state_dict({k.removeprefix("blocks."): v for k, v in state.items() if k.startswith("blocks.")})
    x = F.layer_norm(blocks(x), (dim,), state["norm.weight"], state["norm.bias"], eps=1e-6)
    return F.linear(x[:, -masked.shape[1] :], state["predict.weight"], state["predict.bias"])


def _sincos(dim: int, grid: int) -> Tensor:
    """MAE's fixed positions, (1, 1 + grid * grid, dim): zeros, then [sin | cos] of the column and of the row."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = along.repeat(grid, 1), along.repeat_interleave(grid, 0)
    return F.pad(torch.cat([columns, rows], dim=1), (0, 0, 1, 0)).float()[None]


def _put_back(clean: Tensor, masked: Tensor, predicted: Tensor, *, patch_px: int, scaled: bool) -> Tensor:
    """The image with its hidden patches as predicted."""
    patches = patchified(clean, patch_px)
    where = masked[..., None].expand(-1, -1, patches.shape[-1])
    if scaled:
        true = patches.gather(1, where)
        variance, mean = torch.var_mean(true, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    return unpatchified(patches.scatter(1, where, predicted), clean.shape[-2] // patch_px)


def draw(found: Sequence[tuple[Checkpoint, str, Reconstruction]]) -> Image.Image:
    """Two rows a network (which is named): reconstructions, and what each block changed."""
    rows, texts = [], []
    for checkpoint, name, each in found:
        architecture = checkpoint.architecture

        def cell(values: Tensor, label: str, architecture: Any = architecture) -> Cell:
            return Cell(shown(picture(denormalized(values, architecture))), label)

        first = [cell(each.original, "original")]
        first += [
            cell(image, f"from block {block + 1}") for block, image in zip(each.blocks, each.rebuilt, strict=True)
        ]
        changes = [
            (one - other).abs().mean((0, 1)).numpy() for other, one in zip(each.rebuilt, each.rebuilt[1:], strict=False)
        ]
        highest = max((float(change.max()) for change in changes), default=1.0)
        size = shown(picture(each.original)).size
        second = [cell(each.given, "what the network sees"), Cell(None)]
        for block, change in zip(each.blocks[1:], changes, strict=True):
            map_ = colored(upsampled(change, size), low=0, high=highest)
            second.append(Cell(map_, f"change by block {block + 1}, at most {change.max():.2g}"))
        rows += [Row(first, name), Row(second)]
        texts.append(f"{name}: {each.how}")
    legend = color_bar("0", "the largest of the row", "mean absolute change of the normalized pixels")
    note = f"Tokens of a block, after the final norm, go straight into the head. {' '.join(texts)}"
    return sheet("Reconstruction, block by block", rows, legends=[legend], note=note)
