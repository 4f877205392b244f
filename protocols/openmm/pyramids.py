"""Necks that make several scales of a plain transformer's maps, which all have the stride of its patch.

`UpDown` takes four blocks' maps (BEiT, and after it iBOT, CAE and MAE's users); in mmdet an FPN follows it, in a
`Chain`. `SimplePyramid` is ViTDet's: every scale comes from the last map (Li et al. 2022, arXiv:2203.16527, 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F  # noqa: N812
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

NormName = Literal["BN", "SyncBN", "LN"]
Maps = Sequence[Tensor]  # (B, C, h, w) each


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w), eps as in ViTDet.

    In mmcv's configs eps must be said, else mmcv gives 1e-5: norm_cfg=dict(type=LayerNorm2d, eps=1e-6). The result is
    contiguous: mmcv's compiled RoIAlign reads memory as if all maps were, and is silently wrong where they are not.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


_NORMS: dict[NormName, type[nn.Module]] = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "LN": LayerNorm2d}


class UpDown(BaseModule):
    """Four maps of one stride -> strides of 1/4, 1/2, 1 and 2 times that; the first map becomes the finest."""

    def __init__(self, dim: int, norm: NormName = "BN") -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_doubled(dim, dim), _NORMS[norm](dim), nn.GELU(), _doubled(dim, dim)),
                _doubled(dim, dim),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),  # a map may be one patch high
            ]
        )

    def forward(self, maps: Maps) -> tuple[Tensor, ...]:
        """One map for each."""
        return tuple(scale(x) for scale, x in zip(self.scales, maps, strict=True))


class SimplePyramid(BaseModule):
    """The last map -> strides of 1/4, 1/2, 1, 2 and 4 times its own, each of `out_channels`.

    Up by one or two deconvolutions (which halve the channels) or down by max-pooling, then a convolution of 1 x 1 and
    one of 3 x 3, each followed by LayerNorm, without biases. The fifth is every second pixel of the fourth.
    """

    def __init__(self, dim: int, out_channels: int = 256) -> None:
        super().__init__()
        half, quarter = dim // 2, dim // 4
        twice = nn.Sequential(_doubled(dim, half), LayerNorm2d(half), nn.GELU(), _doubled(half, quarter))
        scaled = [(twice, quarter), (_doubled(dim, half), half), (nn.Identity(), dim), (nn.MaxPool2d(2), dim)]
        self.scales = nn.ModuleList(
            nn.Sequential(
                change,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for change, channels in scaled
        )

    def forward(self, maps: Maps) -> tuple[Tensor, ...]:
        """Five maps, of the last one alone."""
        made = [scale(maps[-1]) for scale in self.scales]
        return (*made, F.max_pool2d(made[-1], kernel_size=1, stride=2))


class Chain(BaseModule):
    """One neck after another, each a module or its configuration."""

    def __init__(self, necks: Sequence[nn.Module | Mapping[str, Any]]) -> None:
        super().__init__()
        self.necks = nn.ModuleList(neck if isinstance(neck, nn.Module) else MODELS.build(neck) for neck in necks)

    def forward(self, maps: Maps) -> Maps:
        """What the last one gives."""
        for neck in self.necks:
            maps = neck(maps)
        return maps


def _doubled(dim: int, out: int) -> nn.ConvTranspose2d:
    """Twice the size, without overlap."""
    return nn.ConvTranspose2d(dim, out, kernel_size=2, stride=2)
