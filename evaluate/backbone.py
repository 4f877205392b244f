"""One contract over every vision transformer that we measure or train: images in, tokens out.

A `Backbone` wraps a timm `VisionTransformer` or `Beit`, never a transformer of our own. One forward pass gives the
tokens of any set of blocks, with or without the final norm, and the attention of any block, at any image size;
`keep=` forwards only some patches, and the others cost nothing. ExtreMA's class attention (timm's CaiT blocks on top of
a trunk that has no class token) belongs to it too.

`Pixels` answers the same calls with the image itself: the baseline to beat.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)
from timm.layers import Attention, SwiGLUPacked
from timm.layers.pos_embed_rel import gen_relative_position_index
from timm.models.beit import Beit
from timm.models.cait import LayerScaleBlockClassAttn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import HALF, Architecture, State


@dataclass(frozen=True)
class Tokens:
    """What one block gives. Register tokens belong to neither."""

    cls: Tensor | None  # (B, D); None where the network has no class token (at that depth)
    patches: Tensor  # (B, H, W, D); (B, n, D) in a forward with `keep`

    @property
    def patch_mean(self) -> Tensor:
        """The average patch token, MOCA's [AVG]. (B, D)"""
        return self.patches.flatten(1, -2).mean(1)


@dataclass(frozen=True)
class Output:
    """Tokens of the layers that were asked for, and attention of the layers that were asked for, in that order."""

    tokens: tuple[Tokens, ...]
    attention: tuple[Tensor, ...] = ()  # (B, heads, N, N); class-attention blocks: (B, heads, 1, N)


class ClassAttention(nn.Module):
    """A class token that reads the finished patches (CaiT, ExtreMA): it alone is changed, the patches stay."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, architecture.dim))
        nn.init.normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(
            LayerScaleBlockClassAttn(
                architecture.dim,
                architecture.heads,
                qkv_bias=architecture.qkv_bias,
                norm_layer=_layer_norm(architecture.eps),
                init_values=0.1,
            )
            for _ in range(architecture.class_attention_blocks)
        )

    def forward(self, patches: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, N, D) -> the class token (B, 1, D), and what entered each block, for its attention."""
        cls, entered = self.cls_token.expand(len(patches), -1, -1), []
        for block in self.blocks:
            entered.append(torch.cat([cls, patches], dim=1))
            cls = block(patches, cls)
        return cls, entered


class Backbone(nn.Module):
    """A vision transformer of timm's, seen as a function from normalized images (B, 3, H, W) to tokens."""

    def __init__(
        self, vit: VisionTransformer | Beit, architecture: Architecture, class_attention: ClassAttention | None = None
    ) -> None:
        super().__init__()
        self.vit = vit
        self.class_attention = class_attention
        self.architecture = architecture

    def forward(
        self,
        images: Tensor,
        *,
        layers: Sequence[int] = (-1,),
        norm: bool = True,
        attention: Sequence[int] = (),
        logits: bool = False,
        keep: Tensor | None = None,
    ) -> Output:
        """Tokens after the blocks `layers` (0 is the first, -1 the last) and attention inside the blocks `attention`.

        `norm` passes every returned layer through the network's final norm, as DINO's and iBOT's scripts do.
        `attention` counts class-attention blocks after the others; `logits` gives it before the softmax, scaled, with
        the relative position bias where there is one. `keep` (B, n) holds indices of patches in row-major order.
        """
        depth = self.architecture.depth
        wanted = [_resolve(layer, depth, "layer") for layer in layers]
        looked_at = [
            _resolve(layer, depth + self.architecture.class_attention_blocks, "attention") for layer in attention
        ]
        last = max([*wanted, *looked_at], default=depth - 1)
        x, grid = self.embed(images, keep)
        index = self._relative_index(grid, keep)
        outputs: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        for number, block in enumerate(self.vit.blocks):
            bias = self._relative_bias(block, index, grid)
            if number in looked_at:
                maps[number] = self._attention(block, x, bias, logits)
            x = block(x) if bias is None else _beit_block(block, x, bias)
            if number in wanted:
                outputs[number] = x
            if number == last:
                break
        cls = None
        if self.class_attention is not None and last >= depth - 1:
            cls, entered = self.class_attention(x)
            for number, (block, u) in enumerate(zip(self.class_attention.blocks, entered, strict=True), start=depth):
                if number in looked_at:
                    maps[number] = _class_attention_map(block, u, logits)
        tokens = (
            self._tokens(outputs[n], cls if n == depth - 1 else None, norm, grid if keep is None else None)
            for n in wanted
        )
        return Output(tuple(tokens), tuple(maps[number] for number in looked_at))

    def embed(self, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """What enters the first block (B, prefix + patches, D), and the grid of patches."""
        patch = self.architecture.patch_px
        height, width = images.shape[-2:]
        if height % patch or width % patch:
            raise UserError(
                f"images of {height} x {width} px do not divide into patches of {patch} px; "
                f"choose a multiple of {patch}, for example {max(round(height / patch), 1) * patch} x "
                f"{max(round(width / patch), 1) * patch}."
            )
        vit, grid = self.vit, (height // patch, width // patch)
        # patch_embed.proj rather than patch_embed: the latter insists on the native size.
        x = vit.patch_embed.norm(vit.patch_embed.proj(images).flatten(2).transpose(1, 2))
        on_prefix, on_patches = self._positions(grid)
        if on_patches is not None:
            x = x + on_patches
        if keep is not None:
            x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        prefix = [token for token in (vit.cls_token, getattr(vit, "reg_token", None)) if token is not None]
        if prefix:
            first = torch.cat(prefix, dim=1)
            x = torch.cat([(first if on_prefix is None else first + on_prefix).expand(len(x), -1, -1), x], dim=1)
        return getattr(vit, "norm_pre", nn.Identity())(vit.pos_drop(x)), grid

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Position embeddings of the prefix tokens and of the patches, for a grid of any size."""
        position, native = self.vit.pos_embed, self.architecture.grid
        if position is None:
            return None, None
        slots = self.n_prefix if self.architecture.position_of_prefix else 0
        on_prefix, on_patches = (position[:, :slots] if slots else None), position[:, slots:]
        if grid != (native, native):
            square = on_patches.reshape(1, native, native, -1).permute(0, 3, 1, 2).float()
            how = self.architecture.position_resize
            if how == "dino":
                scale = [(side + 0.1) / native for side in grid]
                square = F.interpolate(square, scale_factor=scale, mode="bicubic")
            else:
                square = F.interpolate(square, size=grid, mode="bicubic", antialias=how == "antialias")
            assert square.shape[-2:] == grid
            on_patches = square.flatten(2).transpose(1, 2).to(position.dtype)
        return on_prefix, on_patches

    @property
    def n_prefix(self) -> int:
        """Tokens before the patches, in the trunk: class token and registers."""
        return int(self.architecture.cls) + self.architecture.registers

    def _tokens(self, x: Tensor, cls: Tensor | None, norm: bool, grid: tuple[int, int] | None) -> Tokens:
        patches = x[:, self.n_prefix :]
        if cls is None and self.architecture.cls:
            cls = x[:, :1]
        tokens = Tokens(None if cls is None else cls[:, 0], patches if grid is None else _unflatten(patches, 1, grid))
        return self.normalized(tokens) if norm else tokens

    def normalized(self, tokens: Tokens) -> Tokens:
        """Tokens of any layer passed through the final norm; the same tokens where the network has none."""
        return Tokens(None if tokens.cls is None else self.vit.norm(tokens.cls), self.vit.norm(tokens.patches))

    def _relative_index(self, grid: tuple[int, int], keep: Tensor | None) -> Tensor | None:
        """For every pair of tokens, its row in BEiT's tables: (N, N), or (B, N, N) with `keep`; None for a ViT."""
        if not isinstance(self.vit, Beit):
            return None
        index: Tensor = gen_relative_position_index(grid, class_token=True, device=self.vit.cls_token.device)
        if keep is None:
            return index
        kept = F.pad(keep + 1, (1, 0))  # the class token stays, at index 0
        return index[kept[:, :, None], kept[:, None, :]]

    def _relative_bias(self, block: Any, index: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
        """What BEiT adds to the attention logits of a block: (1 or B, heads, N, N). Made when needed: it is large."""
        if index is None:
            return None
        table, native = block.attn.relative_position_bias_table, (self.architecture.grid, self.architecture.grid)
        bias: Tensor = (table if grid == native else _resized_table(table, native, grid))[index]
        return bias.movedim(-1, -3).reshape(-1, table.shape[1], *index.shape[-2:])

    def _attention(self, block: Any, x: Tensor, bias: Tensor | None, logits: bool) -> Tensor:
        attention = block.attn
        if bias is None and not isinstance(attention, Attention):
            raise UserError(
                f"attention maps are defined for timm's Attention; these blocks hold {type(attention).__name__}."
            )
        x = block.norm1(x)
        query, key, _ = _vit_qkv(attention, x) if bias is None else _beit_qkv(attention, x)
        scores: Tensor = (query * attention.scale) @ key.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        return scores if logits else scores.softmax(-1)


class Pixels(nn.Module):
    """No network: cls is the flattened normalized image, patches are the patches' pixels."""

    def __init__(self, patch_px: int = 8) -> None:
        super().__init__()
        self.architecture = Architecture(
            dim=3 * patch_px**2, depth=1, heads=1, patch_px=patch_px, image_px=0, mlp_dim=0, mean=HALF, std=HALF
        )

    def forward(self, images: Tensor, *, layers: Sequence[int] = (-1,), norm: bool = True) -> Output:
        """The same answer for every layer, with or without norm."""
        patch = self.architecture.patch_px
        height, width = (side // patch for side in images.shape[-2:])  # what a convolution would see
        whole = images[..., : height * patch, : width * patch]
        patches = whole.reshape(len(images), 3, height, patch, width, patch).permute(0, 2, 4, 1, 3, 5)
        return Output(tuple(Tokens(images.flatten(1), patches.flatten(3)) for _ in layers))

    def normalized(self, tokens: Tokens) -> Tokens:
        """Pixels have no final norm."""
        return tokens


def build(architecture: Architecture, *, drop_path: float = 0.0) -> Backbone:
    """A network of this shape, with timm's initialization. `drop_path` grows linearly from 0 to that of the last block.

    Class-attention blocks have none, as in ExtreMA.
    """
    shared = {
        "img_size": architecture.image_px,
        "patch_size": architecture.patch_px,
        "embed_dim": architecture.dim,
        "depth": architecture.depth,
        "num_heads": architecture.heads,
        # timm takes the ratio and truncates; the half keeps it from truncating below.
        "mlp_ratio": (architecture.mlp_dim + 0.5) / architecture.dim,
        "qkv_bias": architecture.qkv_bias,
        "norm_layer": _layer_norm(architecture.eps),
        "init_values": 1e-5 if architecture.layer_scale else None,
        "drop_path_rate": drop_path,
        "num_classes": 0,
        "global_pool": "",
    }
    if architecture.beit:
        vit: VisionTransformer | Beit = Beit(
            **shared, use_abs_pos_emb=architecture.position, use_rel_pos_bias=True, use_fc_norm=False
        )
        vit.norm = vit.norm if architecture.final_norm else nn.Identity()
    else:
        gated = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if architecture.swiglu else {}
        vit = VisionTransformer(
            **shared,
            **gated,
            class_token=architecture.cls,
            reg_tokens=architecture.registers,
            no_embed_class=not architecture.position_of_prefix,
            pos_embed="learn" if architecture.position else "none",
            qk_norm=architecture.qk_norm,
            pre_norm=architecture.pre_norm,
            final_norm=architecture.final_norm,
            fc_norm=False,
        )
    return Backbone(vit, architecture, ClassAttention(architecture) if architecture.class_attention_blocks else None)


def canonical_state(backbone: Backbone) -> State:
    """The weights under the names that checkpoints.py uses: timm's, and class_attention.* beside them."""
    return {key.removeprefix("vit."): value for key, value in backbone.state_dict().items()}


def load_canonical(backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    """Put canonical weights into the network; the caller has checked names and shapes."""
    backbone.load_state_dict(
        {key if key.startswith("class_attention.") else f"vit.{key}": value for key, value in state.items()},
        strict=False,
    )


def _layer_norm(eps: float) -> type[nn.LayerNorm]:
    class LayerNorm(nn.LayerNorm):
        def __init__(self, dim: int, **kwargs: object) -> None:
            super().__init__(dim, eps=eps, **kwargs)  # type: ignore[arg-type]

    return LayerNorm


def _unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """torch's method has no types."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _resolve(layer: int, count: int, what: str) -> int:
    if not -count <= layer < count:
        raise UserError(
            f"{what} {layer} does not exist: the network has {count} of them, 0 to {count - 1} (or -1 from the end)."
        )
    return layer % count


def _vit_qkv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _unflatten(attention.qkv(x), 2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query), attention.k_norm(key), value


def _beit_qkv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bias = None if attention.q_bias is None else torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    joined = F.linear(x, attention.qkv.weight, bias)
    query, key, value = _unflatten(joined, 2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def _beit_block(block: Any, x: Tensor, bias: Tensor) -> Tensor:
    """timm's Beit block with the bias from outside: its own knows one image size and no masked forwards."""
    attention = block.attn
    query, key, value = _beit_qkv(attention, block.norm1(x))
    dropout = attention.attn_drop.p if block.training else 0.0
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout)
    y = attention.proj_drop(attention.proj(y.transpose(1, 2).flatten(2)))
    gamma_1, gamma_2 = (1.0, 1.0) if block.gamma_1 is None else (block.gamma_1, block.gamma_2)
    x = x + block.drop_path1(gamma_1 * y)
    x = x + block.drop_path2(gamma_2 * block.mlp(block.norm2(x)))
    return x


def _resized_table(table: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """BEiT's relative biases for another grid, as timm gives them, in a thousandth of the time.

    timm interpolates head by head; both directions are linear maps, the same for all heads.
    """
    of_offsets, of_cls = table[:-3], table[-3:]
    square = of_offsets.T.reshape(-1, 2 * native[0] - 1, 2 * native[1] - 1)
    rows, columns = (_offset_weights(old, new).to(table) for old, new in zip(native, grid, strict=True))
    return torch.cat([(rows @ square @ columns.T).flatten(1).T, of_cls])


@functools.cache
def _offset_weights(old: int, new: int) -> Tensor:
    """(2 new - 1, 2 old - 1): linear interpolation between the old offsets, spread over the new window.

    The old offsets are spaced by 1, q, q^2, ... from the middle, with the q that makes them end where the new ones end.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(old - 1)) > new - 1 else (q, high)
    distances = torch.tensor([q**i for i in range(old - 1)], dtype=torch.float64).cumsum(0)
    places = torch.cat([-distances.flip(0), torch.zeros(1, dtype=torch.float64), distances])
    targets = torch.arange(1.0 - new, new, dtype=torch.float64)
    right = torch.searchsorted(places, targets).clamp(1, len(places) - 1)
    share = ((targets - places[right - 1]) / (places[right] - places[right - 1])).clamp(0, 1)[:, None]
    one = torch.eye(len(places), dtype=torch.float64)
    return (1 - share) * one[right - 1] + share * one[right]


def _class_attention_map(block: Any, u: Tensor, logits: bool) -> Tensor:
    """(B, 1 + N, D) -> (B, heads, 1, 1 + N): where the class token looks."""
    attention, u = block.attn, block.norm1(u)
    query = _unflatten(attention.q(u[:, :1]), 2, (attention.num_heads, -1)).transpose(1, 2)
    key = _unflatten(attention.k(u), 2, (attention.num_heads, -1)).transpose(1, 2)
    scores: Tensor = (query * attention.scale) @ key.transpose(-2, -1)
    return scores if logits else scores.softmax(-1)
