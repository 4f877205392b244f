"""The network under test as a backbone of mmseg and mmdet, and its parameters sorted by layer.

`Network` is our Backbone: images in, maps of the patch tokens after chosen blocks out. `WindowedNetwork` is ViTDet's
form of it (Li et al. 2022, arXiv:2203.16527): most blocks attend within windows, and every block has decomposed
relative positions that start at zero. `parameter_groups` is layer-wise decay of the learning rate as in BEiT, MAE and
ViTDet.

Nothing here has a parameter that no output depends on, since DistributedDataParallel refuses those: blocks after the
last layer that is read, a final norm that is not applied and ExtreMA's class attention are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from mmengine.model import BaseModule
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer_sam import Block, window_partition, window_unpartition
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture, PositionResize, State
from ssl_bench.evaluate.backbone import build, load_canonical
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.hardware import choose_attention

# Recipes name layers of a network of this depth, ViT-B's.
RECIPE_DEPTH = 12

_BLOCK = re.compile(r"backbone\.trunk\.vit\.blocks\.(\d+)\.")
_INPUT = re.compile(r"backbone\.trunk\.vit\.(patch_embed|norm_pre)\.|backbone\.trunk\.vit\.(pos_embed|\w+_token)$")
# Tables and tokens that are not decayed, nor is anything of one dimension. cls_emb: the class tokens of Segmenter.
_NEVER_DECAYED = {
    *("pos_embed", "cls_token", "reg_token", "cls_emb"),
    *("rel_pos_h", "rel_pos_w", "relative_position_bias_table"),
}


class Network(BaseModule):
    """(B, 3, H, W), normalized, both sides multiples of the patch -> a map (B, D, h, w) for each of `layers`.

    The maps are those of `Backbone.forward`, at any size. A class token takes part in the attention, and only patches
    come out. `frozen` keeps the network in eval mode and out of the gradient, also in a model that is trained.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        layers: Sequence[int],
        norm: bool,
        frozen: bool = False,
        drop_path: float = 0.0,
        position_resize: PositionResize | None = None,
    ) -> None:
        """`layers` counts blocks of this network from 0; `norm` passes each map through the final norm.

        `drop_path` is that of the last block. `position_resize` is how position embeddings are brought to another
        grid; None: as the checkpoint's own project does it.
        """
        super().__init__()
        if norm and not architecture.final_norm:
            raise UserError(
                f"the network {architecture.name} has no final norm, through which norm=true passes the tokens; "
                "with --set norm=false they are read as they are."
            )
        for layer in layers:
            if not 0 <= layer < architecture.depth:
                raise UserError(
                    f"layers={tuple(layers)}: layer {layer} does not exist; the network has {architecture.depth} "
                    f"blocks, 0 to {architecture.depth - 1}."
                )
        self.architecture, self.layers, self.norm, self.frozen = architecture, tuple(layers), norm, frozen
        self.dim, self.depth, self.patch_px = architecture.dim, architecture.depth, architecture.patch_px
        needed = replace(
            architecture,
            final_norm=norm,
            class_attention_blocks=0,
            position_resize=position_resize or architecture.position_resize,
        )
        # Built whole, then cut: how much is dropped grows with the depth of the whole network.
        self.trunk = build(needed, drop_path=drop_path)
        self.trunk.vit.blocks = self.trunk.vit.blocks[: max(layers) + 1]
        self.trunk.architecture = replace(needed, depth=len(self.trunk.vit.blocks))
        if frozen:
            self.requires_grad_(False)

    def load(self, checkpoint: Checkpoint) -> None:
        """Copy the checkpoint's weights in."""
        assert checkpoint.architecture == self.architecture
        load_canonical(self.trunk, _weights(checkpoint))

    def train(self, mode: bool = True) -> Network:
        """A frozen network stays in eval mode."""
        return cast(Network, super().train(mode and not self.frozen))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps, contiguous."""
        choose_attention(self.trunk.modules(), device=images.device.type, tokens=_patches(images, self.patch_px))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.trunk(images, layers=self.layers, norm=self.norm)
            return tuple(_as_map(tokens.patches) for tokens in output.tokens)


class WindowedNetwork(BaseModule):
    """ViTDet's backbone with the checkpoint's weights: (B, 3, H, W) -> one map (B, D, h, w), of the last block.

    As in detectron2: windows of 14 patches, padded with zeros where the grid does not divide; four blocks attend
    globally; decomposed relative positions in all blocks (MViTv2, Li et al. 2022, eq. 4), zero at first; the
    checkpoint's absolute positions, resized by plain bicubic interpolation; neither class token nor final norm. The
    parts are timm's, whose own network differs twice: it resizes positions with antialiasing, and drops the branch of
    single windows (drop path), not of images.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        image_px: int,
        window: int = 14,
        global_layers: Sequence[int] = (2, 5, 8, 11),
        drop_path: float = 0.0,
    ) -> None:
        """`image_px`, a side of the training images, sizes the relative positions of global blocks (1024 in ViTDet).

        `window` counts patches a side. `global_layers` are of 12 blocks (see `layers_of`). Other image sizes have the
        tables interpolated.
        """
        super().__init__()
        _check_plain(architecture)
        self.architecture = architecture
        self.dim, self.depth, self.patch_px = architecture.dim, architecture.depth, architecture.patch_px
        self.trunk = build(
            replace(
                architecture,
                cls=False,
                position_of_prefix=False,
                class_attention_blocks=0,
                final_norm=False,
                position_resize="bicubic",
            )
        )
        side, chosen = image_px // architecture.patch_px, layers_of(tuple(global_layers), architecture.depth)
        gated: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if architecture.swiglu else {}
        self.trunk.vit.blocks = nn.Sequential(
            *(
                Block(
                    architecture.dim,
                    architecture.heads,
                    mlp_ratio=(architecture.mlp_dim + 0.5) / architecture.dim,  # timm truncates
                    qkv_bias=architecture.qkv_bias,
                    qk_norm=architecture.qk_norm,
                    init_values=1e-5 if architecture.layer_scale else None,
                    drop_path=rate,
                    norm_layer=partial(nn.LayerNorm, eps=architecture.eps),
                    use_rel_pos=True,
                    window_size=0 if number in chosen else window,
                    input_size=(side, side),
                    **gated,
                )
                for number, rate in enumerate(torch.linspace(0, drop_path, architecture.depth).tolist())
            )
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Copy the checkpoint's weights in, without class token and its position."""
        assert checkpoint.architecture == self.architecture
        state = _weights(checkpoint)
        if self.architecture.cls and self.architecture.position_of_prefix and "pos_embed" in state:
            state["pos_embed"] = state["pos_embed"][:, 1:]
        load_canonical(self.trunk, state)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """The map, contiguous."""
        x, grid = self.trunk.embed(images)
        x = x.reshape(len(x), *grid, self.dim)
        for block in self.trunk.vit.blocks:
            tokens = block.window_size**2 or grid[0] * grid[1]
            choose_attention([block.attn], device=images.device.type, tokens=tokens)
            x = _windowed_block(block, x)
        return (_as_map(x),)


def layers_of(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Blocks of a network of 12, counted from 0, -> those at the same share of another depth.

    >>> layers_of((3, 5, 7, 11), 24)
    (7, 11, 15, 23)
    """
    return tuple(max(round((layer + 1) * depth / RECIPE_DEPTH) - 1, 0) for layer in layers)


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for torch.optim of a model whose `backbone` is one of the networks above; what is frozen is left out.

    With L blocks, patch projection, positions and tokens are layer 0, block i (from 0) is layer i + 1, and the final
    norm and all outside the network are layer L + 1. Layer n learns at lr * layer_decay^(L + 1 - n).

    Weight decay spares vectors, tokens and tables of positions. Departures: BEiT's constructor, which iBOT copied,
    means to spare positions and class token too, but compares their names without prefix, so that both are decayed;
    ViTDet's spares norms and absolute positions, but neither biases nor relative positions.
    """
    depth: int = model.backbone.depth  # type: ignore[union-attr, assignment]
    top, groups = depth + 1, dict[tuple[int, bool], list[nn.Parameter]]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name.rpartition(".")[2] not in _NEVER_DECAYED
            groups.setdefault((_layer(name, top), decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * layer_decay ** (top - layer),
            "weight_decay": weight_decay if decayed else 0.0,
            "name": f"{_layer_name(layer, top)}, {'' if decayed else 'not '}decayed",
        }
        for (layer, decayed), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def _layer(name: str, top: int) -> int:
    if match := _BLOCK.match(name):
        return int(match[1]) + 1
    if _INPUT.match(name):
        return 0
    # A part of the network that nobody has thought of must not learn like a head.
    assert not name.startswith("backbone.") or name.startswith("backbone.trunk.vit.norm."), name
    return top


def _layer_name(layer: int, top: int) -> str:
    return "input" if layer == 0 else "top" if layer == top else f"block {layer - 1}"


def _weights(checkpoint: Checkpoint) -> State:
    """What of the checkpoint fits its architecture; refused when that is too little."""
    checkpoint.require_match()
    return {name: value for name, value in checkpoint.state.items() if name not in checkpoint.match.unexpected}


def _patches(images: Tensor, patch_px: int) -> int:
    return (images.shape[-2] // patch_px) * (images.shape[-1] // patch_px)


def _as_map(x: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, D, h, w), contiguous: mmcv's compiled operators read memory as if all tensors were."""
    return x.permute(0, 3, 1, 2).contiguous()


def _check_plain(architecture: Architecture) -> None:
    """Refuse what a network of windows cannot be made of."""
    has = "BEiT's relative positions" if architecture.beit else "register tokens" if architecture.registers else None
    if has:
        raise UserError(
            f"the network {architecture.name} has {has}, for which ViTDet's windows have no place: expected a plain "
            "vision transformer. Recipes without windows take this one: `ssl-bench ls recipes`."
        )


def _windowed_block(block: Any, x: Tensor) -> Tensor:
    """timm's block, but drop path acts on images, where timm would drop each window by itself. (B, h, w, D)"""
    size, grid = block.window_size, x.shape[1:3]
    y = block.norm1(x)
    if size:
        windows, padded = window_partition(y, size)
        y = window_unpartition(block.attn(windows), size, grid, padded)
    else:
        y = block.attn(y)
    x = x + block.drop_path1(block.ls1(y))
    mixed: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return mixed
