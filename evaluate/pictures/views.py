"""One image as one network sees it: a single forward pass, from which all pictures of its tokens are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.backbone import Backbone, Tokens
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.hardware import choose_attention

Point = tuple[int, int]  # x, y in pixels of the original image

# For `notes`.
TOKENS, CLASS_ATTENTION = "Tokens of {block}{norm}.", "Attention in {class_block}."
PATCH_ATTENTION, BOTH_ATTENTIONS = "Attention in {block}.", "Attention in {block}, of the class token in {class_block}."
_MMC_PX = 480  # MMC looks at 480 px with networks for 224
# Pairs of patches grow with the square: these are 1 GiB of attention in 16 heads, and seconds for the rest.
_MOST_WITH_ATTENTION, _MOST_PATCHES = 64**2, 128**2
_TOY_PX = 160  # networks for less than this see twice their own size, which is about the same enlargement


@dataclass(frozen=True)
class Look:
    """What the pictures need of the pass."""

    points: tuple[Point, ...]
    layer: int = -1  # whose tokens and attention; 0 is the first block
    size_px: int | None = None  # of the longer side; None: by the network
    blocks: bool = False  # also the raw tokens of every block
    attention: bool = False  # also attention, of the class token and of the points


@dataclass(frozen=True, eq=False)
class Seen:
    """What the pass gave, on the CPU in float32."""

    name: str
    architecture: Architecture
    image: Image.Image  # the original
    patches: Tensor  # (H, W, D) tokens of the chosen block after the final norm
    points: tuple[Point, ...]
    block: str  # in words
    norm: str  # what the tokens passed after it, in words
    blocks: tuple[Tokens, ...] = ()  # of every block, without norm; of one image each
    class_attention: Tensor | None = None  # (heads, H, W) of the class token to the patches
    point_attention: Tensor | None = None  # (points, heads, H, W)
    class_block: str = ""  # in words, where the class token attends in another block than the patches

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patches.shape[0], self.patches.shape[1]

    def patch_of(self, point: Point) -> tuple[int, int]:
        """Row and column of the patch that shows a pixel of the original image."""
        return patch_of(point, self.image.size, self.grid)

    @property
    def size(self) -> str:
        """What was looked at, for the foot of a sheet."""
        rows, columns = self.grid
        patch = self.architecture.patch_px
        return (
            f"The image of {self.image.width} x {self.image.height} px was looked at as "
            f"{columns * patch} x {rows * patch} px, {columns} x {rows} patches."
        )


def notes(seen: Sequence[Seen], *, of: str) -> str:
    """What was looked at, for the foot of a sheet; once where it is the same for all networks.

    `of` has places for a block, for its norm and for the block of the class token: "Tokens of {block}{norm}."
    """
    words = [{"block": each.block, "norm": each.norm, "class_block": each.class_block or each.block} for each in seen]
    said = [f"{of.format(**each)} {one.size}" for each, one in zip(words, seen, strict=True)]
    if len(set(said)) == 1:
        return said[0]
    return " ".join(f"{each.name}: {text}" for each, text in zip(seen, said, strict=True))


def patch_of(point: Point, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch that shows a pixel of an image of that width and height."""
    return point[1] * grid[0] // size[1], point[0] * grid[1] // size[0]


def share_of(point: Point, size: tuple[int, int]) -> tuple[float, float]:
    """The middle of a pixel, as shares of width and height."""
    return (point[0] + 0.5) / size[0], (point[1] + 0.5) / size[1]


def fitted(
    size: tuple[int, int], architecture: Architecture, size_px: int | None = None, *, attention: bool = False
) -> tuple[int, int]:
    """Width and height for the network: the longer side about `size_px`, both whole patches, at least one."""
    own, patch = architecture.image_px, architecture.patch_px
    longest = size_px or (2 * own if 0 < own < _TOY_PX else _MMC_PX)
    if longest < patch:
        raise UserError(f"--size {longest}: expected at least one patch of {patch} px ({architecture.name}).")
    scale = longest / max(size)
    columns, rows = (max(1, round(scale * side / patch)) for side in size)
    most = _MOST_WITH_ATTENTION if attention else _MOST_PATCHES
    if columns * rows > most:
        largest = max(patch, math.floor(longest * math.sqrt(most / (columns * rows)) / patch) * patch)
        raise UserError(
            f"--size {longest}: {architecture.name} would see {columns:,} x {rows:,} patches of {patch} px; "
            f"{most:,} at most can be drawn{' with attention' if attention else ''}. Try --size {largest}"
            f"{', or other kinds (--kind)' if attention else ''}."
        )
    return columns * patch, rows * patch


def to_network(image: Image.Image, size: tuple[int, int], architecture: Architecture) -> Tensor:
    """The image at that width and height, normalized. (1, 3, height, width)"""
    return normalized(pixels(image.resize(size, Image.Resampling.BICUBIC)), architecture)


def squared(image: Image.Image, side: int) -> Image.Image:
    """The center of the image as a square, for what a network does only at its own size."""
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))


def pixels(image: Image.Image) -> Tensor:
    """RGB in [0, 1]. (1, 3, height, width)"""
    return torch.from_numpy(np.array(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255)


def picture(values: Tensor) -> Image.Image:
    """The inverse of `pixels`, (1, 3, height, width), cut to what a screen can show."""
    rounded = (255 * values[0].detach().clamp(0, 1)).round().byte()
    return Image.fromarray(rounded.permute(1, 2, 0).cpu().numpy())


def normalized(values: Tensor, architecture: Architecture) -> Tensor:
    """(x - mean) / std of the network."""
    mean, std = (
        torch.tensor(each, device=values.device).view(3, 1, 1) for each in (architecture.mean, architecture.std)
    )
    return (values - mean) / std


def denormalized(values: Tensor, architecture: Architecture) -> Tensor:
    """The inverse."""
    mean, std = (
        torch.tensor(each, device=values.device).view(3, 1, 1) for each in (architecture.mean, architecture.std)
    )
    return values * std + mean


def why_no_attention(checkpoint: Checkpoint, *, of_class: bool) -> str | None:
    """Why a network has no attention to be drawn, in words; None if it has."""
    architecture = checkpoint.architecture
    if checkpoint.format == "pixels":
        return "the image itself has no attention"
    if of_class and not architecture.has_cls:
        return "it has no class token whose attention could be drawn; the attention of patches is --kind queries"
    return None


@torch.no_grad()
def look(checkpoint: Checkpoint, image: Image.Image, request: Look, *, name: str, device: str) -> Seen:
    """The one pass."""
    architecture, backbone = checkpoint.architecture, checkpoint.backbone.to(device)
    depth = architecture.depth
    if not -depth <= request.layer < depth:
        raise UserError(f"--layer {request.layer}: {name} has {depth} blocks, 0 to {depth - 1} (or -1 from the end).")
    layer = request.layer % depth
    size = fitted(image.size, architecture, request.size_px, attention=request.attention)
    images = to_network(image, size, architecture).to(device)
    patches = images[0, 0].numel() // architecture.patch_px**2
    choose_attention(backbone.modules(), device=device, tokens=patches)
    layers = list(range(depth)) if request.blocks else [layer]
    looked_at = _attention_of(architecture, layer) if request.attention else []
    if isinstance(backbone, Backbone):
        output = backbone(images, layers=layers, norm=False, attention=looked_at)
    else:
        output = backbone(images, layers=layers, norm=False)
    chosen = backbone.normalized(output.tokens[layer if request.blocks else 0]).patches[0].float().cpu()
    if not chosen.isfinite().all():
        raise UserError(f"tokens of {name} are not finite. Are there NaN in the weights?")
    grid = (chosen.shape[0], chosen.shape[1])
    class_attention, point_attention = None, None
    if looked_at:
        rows = [patch_of(point, image.size, grid) for point in request.points]
        trunk, prefix = output.attention[0][0], int(architecture.cls) + architecture.registers
        indices = [prefix + row * grid[1] + column for row, column in rows]
        point_attention = _to_patches(trunk[:, indices, prefix:], grid).transpose(0, 1)
        if architecture.class_attention_blocks:
            class_attention = _to_patches(output.attention[1][0, :, 0, 1:], grid)
        elif architecture.cls:
            class_attention = _to_patches(trunk[:, 0, prefix:], grid)
    return Seen(
        name=name,
        architecture=architecture,
        image=image,
        patches=chosen,
        points=request.points,
        block="the image itself" if checkpoint.format == "pixels" else f"block {layer + 1} of {depth}",
        norm=", after the final norm" if architecture.final_norm and checkpoint.format != "pixels" else "",
        blocks=tuple(_on_cpu(tokens) for tokens in output.tokens) if request.blocks else (),
        class_attention=class_attention,
        point_attention=point_attention,
        class_block=_class_block(architecture),
    )


def _attention_of(architecture: Architecture, layer: int) -> list[int]:
    """The block whose attention is drawn, and the last of those in which a class token reads the finished patches."""
    return [layer, -1] if architecture.class_attention_blocks else [layer]


def _class_block(architecture: Architecture) -> str:
    """In words, of networks whose class token is not among the patches."""
    count = architecture.class_attention_blocks
    return f"class-attention block {count} of {count}, after the last block" if count else ""


def _to_patches(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(..., H * W) -> (..., H, W)"""
    return maps.reshape(*maps.shape[:-1], *grid).float().cpu()


def _on_cpu(tokens: Tokens) -> Tokens:
    return Tokens(None if tokens.cls is None else tokens.cls.float().cpu(), tokens.patches.float().cpu())
