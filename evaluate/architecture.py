"""The shape of a vision transformer, read off its weights.

A checkpoint's state dict tells nearly everything: width, depth, patch, tokens, what kind of position. What it cannot
tell (the number of heads, the epsilon of LayerNorm, the normalization of the input) comes from the table of formats
(formats.py) or from the user (`--arch heads=6`). This module needs no timm, so that a run whose features are cached
starts quickly.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from ssl_bench.errors import UserError, unknown

State = dict[str, Tensor]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# Widths of the models that people train, and their heads: of 64 channels each, but in huge and giant models.
_HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
_SIZE_OF_SHAPE = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1408, 40): "giant",
    (1536, 40): "giant",
}

# How position embeddings are brought to another grid: torch's bicubic by size; the same with antialiasing (timm,
# DINOv2 with registers); or DINO's by scale factor (grid + 0.1) / old grid, which shifts the samples a little.
PositionResize = Literal["bicubic", "antialias", "dino"]


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the network, and to know what its numbers mean."""

    dim: int
    depth: int
    heads: int
    patch_px: int
    image_px: int
    mlp_dim: int
    beit: bool = False  # relative position bias in every block, no fused qkv bias
    cls: bool = True  # a class token that goes through all blocks
    registers: int = 0
    class_attention_blocks: int = 0  # ExtreMA and CaiT: the class token reads the finished patches
    position: bool = True  # absolute position embeddings
    position_of_prefix: bool = True  # ... with a slot for the class token
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    swiglu: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    eps: float = 1e-6
    position_resize: PositionResize = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def name(self) -> str:
        """`vit_base_patch16_224` where the shape has a name, else `vit_96x4x3_patch8_48` (width x depth x heads)."""
        size = _SIZE_OF_SHAPE.get((self.dim, self.depth))
        if size is None or self.heads != _HEADS_OF_WIDTH[self.dim]:
            size = f"{self.dim}x{self.depth}x{self.heads}"
        kind = "beit" if self.beit else "vit"
        registers = f"_reg{self.registers}" if self.registers else ""
        class_attention = f"_ca{self.class_attention_blocks}" if self.class_attention_blocks else ""
        return f"{kind}_{size}_patch{self.patch_px}{registers}{class_attention}_{self.image_px}"

    @property
    def has_cls(self) -> bool:
        """Whether the network ends with a class token, wherever that entered."""
        return self.cls or self.class_attention_blocks > 0

    @property
    def grid(self) -> int:
        """Patches a side, at the native image size."""
        return self.image_px // self.patch_px


# What a user may say of a network that its weights do not tell, with an example of each.
_EXAMPLES = {
    "heads": "12",
    "eps": "1e-6",
    "mean": "0.5,0.5,0.5",
    "std": "0.5,0.5,0.5",
    "image_px": "224",
    "position_resize": "bicubic, antialias or dino",
}
_SIZE_NAME = re.compile(r"vit_([a-z]+)_patch(\d+)_(\d+)")
_SHORT_NAME = re.compile(r"vit_(\d+)x(\d+)x(\d+)_patch(\d+)_(\d+)")


def parse_name(name: str) -> Architecture | None:
    """`vit_96x4x3_patch8_48` -> a plain ViT of width 96, depth 4, 3 heads, patch 8, for 48 px images; else None."""
    match = _SHORT_NAME.fullmatch(name)
    if match is None:
        return None
    dim, depth, heads, patch_px, image_px = (int(group) for group in match.groups())
    if min(dim, depth, heads, patch_px) < 1 or dim % heads or image_px < patch_px or image_px % patch_px:
        raise UserError(
            f"architecture {name!r} cannot be built: the width must be divisible by the heads, "
            "and the image by the patch."
        )
    return Architecture(dim=dim, depth=depth, heads=heads, patch_px=patch_px, image_px=image_px, mlp_dim=4 * dim)


def named(name: str) -> Architecture:
    """The plain ViT of a name that `Architecture.name` gives: vit_base_patch16_224, vit_96x4x3_patch8_48."""
    match = _SIZE_NAME.fullmatch(name)
    shape = {size: shape for shape, size in _SIZE_OF_SHAPE.items()}.get(match[1]) if match else None
    if match and shape:
        dim, depth = shape
        name = f"vit_{dim}x{depth}x{_HEADS_OF_WIDTH[dim]}_patch{match[2]}_{match[3]}"
    architecture = parse_name(name)
    if architecture is None:
        raise UserError(
            f"architecture {name!r}: expected a name like vit_base_patch16_224 (tiny, small, base, large, huge) or "
            "vit_96x4x3_patch8_48 (width x depth x heads, patch, image)."
        )
    return architecture


def infer(state: Mapping[str, Tensor], known: Mapping[str, object]) -> Architecture:
    """The architecture of a state dict in timm's names. `known` fills what the weights do not tell."""
    projection = state.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        raise UserError("no patch_embed.proj.weight of four dimensions: this is not a vision transformer.")
    dim, channels, height, width = projection.shape
    if channels != 3 or height != width:
        raise UserError(
            f"the patch projection reads {channels} x {height} x {width}; 3 channels and square patches are supported."
        )
    block_numbers = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)}
    if not block_numbers:
        raise UserError("the file holds a patch projection but no transformer block (blocks.0...).")
    first = f"blocks.{min(block_numbers)}."
    table = _relative_table(state)
    gate, mlp_in, registers = (
        _shape(state, key) for key in (f"{first}mlp.fc1.weight", f"{first}mlp.fc2.weight", "reg_token")
    )
    class_attention_blocks = {key.split(".")[2] for key in state if key.startswith("class_attention.blocks.")}
    architecture = Architecture(
        dim=dim,
        depth=max(block_numbers) + 1,
        heads=_heads(table, dim, known),
        patch_px=height,
        image_px=0,
        mlp_dim=gate[0] if gate else 4 * dim,
        beit=table is not None,
        cls="cls_token" in state and not class_attention_blocks,
        registers=registers[1] if registers else 0,
        class_attention_blocks=len(class_attention_blocks),
        position="pos_embed" in state,
        qkv_bias=first + "attn.qkv.bias" in state or first + "attn.q_bias" in state,
        qk_norm=first + "attn.q_norm.weight" in state,
        layer_scale=first + "ls1.gamma" in state or first + "gamma_1" in state,
        swiglu=bool(gate and mlp_in and gate[0] == 2 * mlp_in[1]),
        pre_norm="norm_pre.weight" in state,
        final_norm="norm.weight" in state,
    )
    grid, position_of_prefix = _grid(state, table, architecture, known)
    architecture = replace(architecture, image_px=grid * height, position_of_prefix=position_of_prefix)
    return overrule(architecture, known)


def overrule(architecture: Architecture, known: Mapping[str, object]) -> Architecture:
    """The architecture with fields that somebody knows better, as long as the weights do not speak against them."""
    heads, image_px = known.get("heads", architecture.heads), known.get("image_px", architecture.image_px)
    if architecture.beit and heads != architecture.heads:
        raise UserError(f"heads={heads} was given, but the relative position table has {architecture.heads} heads.")
    if not isinstance(heads, int) or heads < 1 or architecture.dim % heads:
        raise UserError(f"heads={heads} was given; expected a divisor of the width {architecture.dim}.")
    if image_px != architecture.image_px:
        raise UserError(
            f"image_px={image_px} was given, but the weights are those of a network for {architecture.image_px} px. "
            "Images of other sizes need no --arch: position embeddings are interpolated."
        )
    return replace(architecture, **known)  # type: ignore[arg-type]


def from_plain(fields: Mapping[str, object]) -> Architecture:
    """The inverse of dataclasses.asdict, also after a trip through JSON, where tuples become lists."""
    known = {field.name for field in dataclasses.fields(Architecture)}
    if strange := sorted(set(fields) - known):
        raise UserError(f"this version of ssl-bench does not know the architecture field {strange[0]!r}.")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Architecture(**plain)  # type: ignore[arg-type]


def read_overrides(arch: Mapping[str, str]) -> dict[str, object]:
    """`--arch heads=6` and its like, typed."""
    known: dict[str, object] = {}
    for name, text in arch.items():
        if name not in _EXAMPLES:
            raise unknown("--arch field", name, _EXAMPLES)
        try:
            known[name] = _typed(name, text)
        except ValueError:
            raise UserError(f"--arch {name}={text}: expected a value such as {_EXAMPLES[name]}.") from None
    return known


def _typed(name: str, text: str) -> object:
    if name in ("heads", "image_px"):
        return int(text)
    if name == "eps":
        return float(text)
    if name == "position_resize":
        if text not in get_args(PositionResize):
            raise ValueError
        return text
    red, green, blue = (float(part) for part in text.split(","))
    return red, green, blue


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def _relative_table(state: Mapping[str, Tensor]) -> Tensor | None:
    return next((value for key, value in state.items() if key.endswith("relative_position_bias_table")), None)


def _heads(table: Tensor | None, dim: int, known: Mapping[str, object]) -> int:
    if table is not None:
        return int(table.shape[1])
    heads = known.get("heads")
    if heads is None:
        heads = _HEADS_OF_WIDTH.get(dim, dim // 64 if dim % 64 == 0 else None)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise UserError(
            f"the number of attention heads is not in the file and cannot be guessed for width {dim}"
            f"{f' (given: {heads})' if heads is not None else ''}. Say it: --arch heads=N, with N a divisor of {dim}."
        )
    return heads


def _grid(
    state: Mapping[str, Tensor], table: Tensor | None, architecture: Architecture, known: Mapping[str, object]
) -> tuple[int, bool]:
    """Patches a side, and whether the position embeddings hold a slot for the class token."""
    if architecture.position:
        tokens = state["pos_embed"].shape[-2]
        prefix = int(architecture.cls) + architecture.registers
        for extra in (prefix, 0):  # with slots for the prefix tokens, or without (ExtreMA, registers)
            side = math.isqrt(max(tokens - extra, 0))
            if side and side * side == tokens - extra:
                return side, extra > 0
        raise UserError(f"{tokens} position embeddings are no square grid, with or without {prefix} prefix tokens.")
    if table is not None:
        side = (math.isqrt(max(table.shape[0] - 3, 0)) + 1) // 2  # (2g - 1)^2 offsets, and 3 for the class token
        if (2 * side - 1) ** 2 + 3 == table.shape[0]:
            return side, False
        raise UserError(f"a relative position table of {table.shape[0]} rows belongs to no square window.")
    image_px = known.get("image_px")
    if not isinstance(image_px, int):
        raise UserError(
            "the file has no position embeddings, so its image size is unknown. Say it: --arch image_px=224."
        )
    return image_px // architecture.patch_px, False
