"""What the tokens of a few visible patches know of the whole image (ExtreMA, appendix C; Figs. 2, 7 and 8).

A deep image prior (Ulyanov et al. 2018): a small convolutional network r draws an image x0 from fixed noise, and learns
to draw one whose tokens are those of the masked image,

    min E( f(M x), M f(x0) ),  x0 = r(z0)                                                                   (Eq. 1)

E is L2 over the visible patch tokens. f is the network to be understood and stays as it is: on the masked image it sees
the visible patches only, on x0 all of them. 3000 steps of Adam with a learning rate of .001.

Assumptions, since there is no code: tokens of the last block after the final norm, a mean over tokens and channels, the
network's own image size, and the architecture of r, a smaller relative of the one in the deep image prior's paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor, nn

from ssl_bench.evaluate.backbone import Backbone
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.hardware import choose_attention
from ssl_bench.evaluate.pictures.masked import kept_count, without
from ssl_bench.evaluate.pictures.sheet import Cell, Row, sheet, shown
from ssl_bench.evaluate.pictures.views import fitted, normalized, picture, pixels

STEPS, LEARNING_RATE = 3000, 1e-3
MASK_RATIOS = (0.5, 0.75, 0.9)  # the paper has several and does not name them
_NOISE, _WIDTH, _SKIP = 32, 64, 4  # channels: of z0, of a level, of what goes around it


@dataclass(frozen=True, eq=False)
class Inversion:
    """What was visible and what was drawn, as RGB in [0, 1] (1, 3, height, width), and the energy of every step."""

    mask_ratio: float
    visible: Tensor
    drawn: Tensor
    energy: tuple[float, ...]


class Hourglass(nn.Module):
    """r: noise (1, 32, H, W) -> RGB in [0, 1] (1, 3, H, W).

    Five times smaller by half, then larger again. What is drawn coarsely must be filled in finely by few, local
    weights: that is the prior, since these learn smooth surfaces and edges long before noise. Narrow skips carry
    places, not pictures.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        levels = max(0, min(5, int(math.log2(min(size))) - 1))  # the smallest level has 2 pixels a side, or more
        widths = [_NOISE, *[_WIDTH] * levels]
        self.down = nn.ModuleList(
            nn.Sequential(*_layer(widths[level], _WIDTH, stride=2), *_layer(_WIDTH, _WIDTH)) for level in range(levels)
        )
        self.skip = nn.ModuleList(nn.Sequential(*_layer(widths[level], _SKIP, side=1)) for level in range(levels))
        self.up = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(_WIDTH + _SKIP), *_layer(_WIDTH + _SKIP, _WIDTH)) for _ in range(levels)
        )
        self.color = nn.Conv2d(widths[-1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Down with a note of every level, and up again."""
        noted = []
        for down, skip in zip(self.down, self.skip, strict=True):
            noted.append(skip(x))
            x = down(x)
        for up, note in zip(self.up, reversed(noted), strict=True):
            x = F.interpolate(x, size=note.shape[-2:], mode="bilinear")  # to that size: sides need not be even
            x = up(torch.cat([x, note], dim=1))
        drawn: Tensor = self.color(x).sigmoid()
        return drawn


def _layer(channels: int, out: int, *, stride: int = 1, side: int = 3) -> list[nn.Module]:
    """Reflection at the border, since zeros would draw a frame."""
    convolution = nn.Conv2d(
        channels, out, side, stride, padding=side // 2, padding_mode="reflect" if side > 1 else "zeros"
    )
    return [convolution, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]


def why_not(checkpoint: Checkpoint) -> str | None:
    """Why there is nothing to invert, in words; None if there is."""
    if checkpoint.format == "pixels":
        return "pixels are not features: there is nothing to invert"
    return None


def invert(
    backbone: Backbone,
    images: Tensor,
    visible: Tensor,
    *,
    steps: int,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, list[float]]:
    """The image in [0, 1] that r learned to draw for normalized `images` (1, 3, H, W), and the energy of every step.

    `visible` (1, n) are the indices of the patches that are seen.
    """
    architecture, device = backbone.architecture, images.device
    size = (images.shape[-2], images.shape[-1])
    backbone.requires_grad_(False)
    with torch.no_grad():
        wanted = backbone(images, keep=visible).tokens[0].patches  # f(M x): (1, n, D)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, noise = Hourglass(size), 0.1 * torch.rand(1, _NOISE, *size)
    generator, noise = generator.to(device), noise.to(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=LEARNING_RATE)
    where = visible[..., None].expand_as(wanted)
    energy = []
    for _ in range(steps):
        tokens = backbone(normalized(generator(noise), architecture)).tokens[0].patches.flatten(1, 2)
        loss = F.mse_loss(tokens.gather(1, where), wanted)  # E(f(M x), M f(x0))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        energy.append(float(loss.detach()))
        advance(1)
    with torch.no_grad():
        return generator(noise), energy


def inversions(
    checkpoint: Checkpoint,
    image: Image.Image,
    mask_ratios: Sequence[float],
    *,
    steps: int,
    seed: int,
    device: str,
    advance: Callable[[int], None],
) -> list[Inversion]:
    """One for every mask ratio. What a larger ratio leaves visible, a smaller one does, too."""
    architecture, backbone = checkpoint.architecture, checkpoint.backbone.to(device)
    assert isinstance(backbone, Backbone)
    size = fitted(image.size, architecture, architecture.image_px)
    original = pixels(image.resize(size, Image.Resampling.BICUBIC))
    count = size[0] * size[1] // architecture.patch_px**2
    choose_attention(backbone.modules(), device=device, tokens=count)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    found = []
    for ratio in mask_ratios:
        visible = order[None, : kept_count(count, ratio)]
        images = normalized(original, architecture).to(device)
        drawn, energy = invert(backbone, images, visible.to(device), steps=steps, seed=seed, advance=advance)
        seen = without(original, visible, architecture.patch_px)
        found.append(Inversion(ratio, seen, drawn.cpu(), tuple(energy)))
    return found


def draw(image: Image.Image, found: Sequence[tuple[str, Sequence[Inversion]]]) -> Image.Image:
    """Two rows a network (which is named): what it sees, and what its tokens say of the whole."""
    rows, steps = [], 0
    for name, each in found:
        cells = [Cell(shown(picture(one.visible)), f"{one.mask_ratio:.0%} hidden") for one in each]
        rows.append(Row([Cell(shown(image), "original"), *cells], name))
        cells = [Cell(shown(picture(one.drawn)), f"energy {one.energy[0]:.3g} → {one.energy[-1]:.3g}") for one in each]
        rows.append(Row([Cell(None), *cells]))
        steps = len(each[0].energy)
    return sheet(
        "Inversion of masked features",
        rows,
        note=f"Below: the image that a deep image prior found in {steps:,} steps for the tokens of the visible patches "
        "(ExtreMA, appendix C).",
    )
