"""What several methods build on: the student, its teacher, and the parts of MAE's decoder.

Initialization and positions follow MAE (He et al. 2022), which MOCA, TEC, ExtreMA and SdAE share: xavier-uniform
linear layers, zero biases, fixed 2-D sin-cos positions that are added before any patch is dropped.
"""

from __future__ import annotations

import copy
import functools

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.backbone import Backbone, build

EPS = 1e-6


def student(architecture: Architecture, *, drop_path: float = 0.0) -> Backbone:
    """A network to train, with MAE's initialization and fixed sin-cos positions."""
    backbone = build(architecture, drop_path=drop_path)
    initialize_as_mae(backbone)
    prefix = backbone.n_prefix if architecture.position_of_prefix else 0
    positions = sincos_positions(architecture.dim, architecture.grid, prefix=prefix)
    backbone.vit.pos_embed = nn.Parameter(positions, requires_grad=False)
    return backbone


def initialize_as_mae(module: nn.Module) -> None:
    """Linear: xavier-uniform and 0. LayerNorm: 1 and 0. Patch projection: as a linear layer. Tokens: N(0, .02)."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and name.endswith("patch_embed.proj")):
            nn.init.xavier_uniform_(part.weight.flatten(1))
            if part.bias is not None and isinstance(part, nn.Linear):  # the projection's bias stays as torch draws it
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


def teacher_of(network: nn.Module) -> nn.Module:
    """A frozen copy without stochastic depth."""
    teacher = copy.deepcopy(network).requires_grad_(False)
    for part in teacher.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
    return teacher


@torch.no_grad()
def move_teacher(teacher: nn.Module, network: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * network, for every parameter. Buffers stay."""
    torch._foreach_lerp_(
        [parameter.data for parameter in teacher.parameters()],
        [parameter.data for parameter in network.parameters()],
        1.0 - momentum,
    )


@functools.cache
def _sincos(dim: int, grid: int) -> Tensor:
    """(grid * grid, dim): the first half of the channels follows the column, the second the row, each [sin | cos]."""
    with torch.device("cpu"):  # remembered: not on whatever device is the default just now
        frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    columns = along[None, :, :].expand(grid, -1, -1)
    rows = along[:, None, :].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def sincos_positions(dim: int, grid: int, *, prefix: int) -> Tensor:
    """(1, prefix + grid * grid, dim), with zeros for the tokens before the patches."""
    if dim % 4:
        raise UserError(f"sin-cos positions need a width divisible by 4, not {dim}.")
    return torch.cat([torch.zeros(prefix, dim), _sincos(dim, grid)]).unsqueeze(0)


class MaskTokens(nn.Module):
    """The way into a decoder: project what the encoder gives, put a mask token where it gave nothing, add positions."""

    def __init__(self, encoder_dim: int, dim: int, grid: int) -> None:
        super().__init__()
        self.project = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(dim, grid, prefix=1), persistent=False)

    def forward(self, prefix: Tensor | None, visible: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """(B, [1 +] n + m, dim): the prefix token (B, D) if there is one, n visible patches, m mask tokens, in order.

        A transformer does not care for the order of tokens, only for their positions, so nothing is put back in place.
        """
        patches = torch.cat(
            [
                self.project(visible) + gathered(self.positions[:, 1:], visible_ids),
                self.mask_token + gathered(self.positions[:, 1:], masked_ids),
            ],
            dim=1,
        )
        if prefix is None:
            return patches
        return torch.cat([self.project(prefix)[:, None] + self.positions[:, :1], patches], dim=1)


def decoder_blocks(dim: int, depth: int, heads: int) -> nn.Sequential:
    """Transformer blocks of timm's, as the encoder's."""
    if dim % heads:
        raise UserError(f"a decoder of width {dim} cannot have {heads} heads: choose a divisor of the width.")
    norm = functools.partial(nn.LayerNorm, eps=EPS)
    return nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))


class Decoder(nn.Module):
    """MAE's decoder: mask tokens, blocks, norm. What it predicts is the method's last layer."""

    def __init__(self, encoder_dim: int, dim: int, depth: int, heads: int, grid: int) -> None:
        super().__init__()
        self.tokens = MaskTokens(encoder_dim, dim, grid)
        self.blocks = decoder_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, prefix: Tensor | None, visible: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """(B, [1 +] n + m, dim), as `MaskTokens` orders them."""
        decoded: Tensor = self.norm(self.blocks(self.tokens(prefix, visible, visible_ids, masked_ids)))
        return decoded


def gathered(x: Tensor, ids: Tensor) -> Tensor:
    """The tokens (B, n, D) with indices `ids` (B, n) of `x` (B or 1, N, D)."""
    return x.expand(len(ids), -1, -1).gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def kept_patches(n_patches: int, mask_ratio: float, *, name: str = "mask_ratio") -> int:
    """int(N (1 - r)), MAE's count of visible patches: 49 of 196 at 75 %, 39 at 80 %. At least one, and not all."""
    kept = int(n_patches * (1 - mask_ratio) + 1e-9)  # 196 * (1 - .75) is 49, whatever the rounding of 1 - r
    if not 1 <= kept < n_patches:
        raise UserError(
            f"{name}={mask_ratio:g} leaves {max(kept, 0)} of {n_patches} patches visible; expected at least one "
            "visible and one masked."
        )
    return kept


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, patch_px * patch_px * 3), row by row, channels last, as MAE orders a patch."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_px, width // patch_px
    split = images.reshape(batch, channels, rows, patch_px, columns, patch_px)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_px * patch_px * channels)


def standardized(patches: Tensor, *, dim: int = -1) -> Tensor:
    """(x - mean) / sqrt(var + 1e-6) with the unbiased variance: MAE's target of normalized pixels (dim -1)."""
    variance, mean = torch.var_mean(patches, dim=dim, keepdim=True)
    return (patches - mean) / (variance + EPS).sqrt()
