"""MMC's heads, and batch normalization over all processes on any device."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_bench.evaluate.training.distributed import mean_of_all, world_size


def contrast_head(dim: int, *, width: int, out_dim: int, by_batch: bool) -> nn.Sequential:
    """(n, D) -> (n, C): linear, norm, ReLU, linear, norm, GELU, linear, norm without parameters (SiT's class head).

    The norm is `GlobalBatchNorm`, which makes biases before it idle, or LayerNorm, and then there is none at the end.
    """
    norm = GlobalBatchNorm if by_batch else nn.LayerNorm
    layers: list[nn.Module] = [
        nn.Linear(dim, width, bias=not by_batch),
        norm(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=not by_batch),
        norm(width),
        nn.GELU(),
        nn.Linear(width, out_dim, bias=not by_batch),
    ]
    return _initialized([*layers, GlobalBatchNorm(out_dim, affine=False)] if by_batch else layers)


def pixel_mlp(dim: int, patch_px: int, *, width: int) -> nn.Sequential:
    """Patch tokens (n, H, W, D) -> images (n, 3, S, S): three layers, the last one to the pixels of a patch."""
    layers = [nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3 * patch_px**2)]
    return _initialized([*layers, ToImage()])


def pixel_convolution(dim: int, patch_px: int) -> nn.Sequential:
    """The same by SiT's head: three layers of the tokens' width, and a transposed convolution from patch to pixels."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(dim, dim), nn.GELU())]
    return _initialized([*layers, ChannelsFirst(), nn.ConvTranspose2d(dim, 3, patch_px, patch_px)])


def _initialized(layers: list[nn.Module]) -> nn.Sequential:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class ToImage(nn.Module):
    """(n, H, W, p * p * 3), a patch row by row with its channels last as MAE orders it -> (n, 3, H * p, W * p)."""

    def forward(self, patches: Tensor) -> Tensor:
        """Patches to images."""
        n, rows, columns, numbers = patches.shape
        side = math.isqrt(numbers // 3)
        pixels = patches.reshape(n, rows, columns, side, side, 3).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(n, 3, rows * side, columns * side)


class ChannelsFirst(nn.Module):
    """(n, H, W, D) -> (n, D, H, W)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """As a convolution wants it."""
        return tokens.permute(0, 3, 1, 2)


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch normalization of (n, C) by the statistics of all processes, on any device (torch's needs GPUs)."""

    def forward(self, x: Tensor) -> Tensor:
        """In eval mode by the running statistics."""
        running_mean, running_variance, momentum = self.running_mean, self.running_var, self.momentum
        assert running_mean is not None
        assert running_variance is not None
        assert momentum is not None
        if world_size() == 1 or not self.training:
            return F.batch_norm(
                x, running_mean, running_variance, self.weight, self.bias, self.training, momentum, self.eps
            )
        centered = x.float()
        mean = _mean_of_all(centered.mean(0))
        centered = centered - mean
        variance = _mean_of_all(centered.square().mean(0))
        with torch.no_grad():
            n = len(x) * world_size()
            running_mean.lerp_(mean, momentum)
            running_variance.lerp_(variance * (n / (n - 1)), momentum)
        y = centered * (variance + self.eps).rsqrt()
        return (y * self.weight + self.bias if self.affine else y).to(x.dtype)


def _mean_of_all(x: Tensor) -> Tensor:
    """The mean over processes, with its gradient; every process has the same number of rows."""
    mean: Tensor = _MeanOfAll.apply(x)
    return mean


class _MeanOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return mean_of_all(x.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return mean_of_all(grad_outputs[0].clone())
