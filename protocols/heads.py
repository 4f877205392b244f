"""Linear classifiers on vectors: many side by side, that learn from the same batches without touching each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)
from torch import Tensor, nn

from ssl_bench.evaluate.training import distributed


class Heads(nn.Module):
    """K linear layers side by side, behind one normalization of what they all read."""

    mean: Tensor
    variance: Tensor

    def __init__(self, heads: int, dim: int, classes: int, kind: str, *, seed: int) -> None:
        super().__init__()
        self.kind = kind
        # MAE's script cuts the normal off at +-2, which is at 200 deviations: not at all.
        first = torch.empty(classes, dim).normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(first.repeat(heads, 1, 1))  # (K, C, D)
        self.bias = nn.Parameter(torch.zeros(heads, classes))
        if kind == "batch_norm":
            self.register_buffer("mean", torch.zeros(dim))
            self.register_buffer("variance", torch.ones(dim))
        if kind == "layer_norm":
            self.gain, self.shift = nn.Parameter(torch.ones(1, dim)), nn.Parameter(torch.zeros(1, dim))

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of every head on a batch, (K,)."""
        logits = self.side_by_side(x)
        batch, heads, _ = logits.shape
        each = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(heads), reduction="none")
        return each.view(batch, heads).mean(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> logits (K, B, C)."""
        return self.side_by_side(x).transpose(0, 1)

    def side_by_side(self, x: Tensor) -> Tensor:
        """The same as (B, K, C), as they lie in memory."""
        if self.kind == "batch_norm":
            x = self._batch_norm(x)
        if self.kind == "layer_norm":
            x = F.normalize(F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift, dim=-1)
        heads, classes, dim = self.weight.shape
        # One product for all heads: (B, D) x (D, K C).
        logits = F.linear(x, self.weight.view(heads * classes, dim), self.bias.view(-1))
        return logits.view(-1, heads, classes)

    def _batch_norm(self, x: Tensor) -> Tensor:
        """Without affine parameters, eps 1e-6, over the whole batch of all processes; running mean and variance."""
        if self.training:
            mean = distributed.mean_of_all(x.mean(dim=0))
            square = distributed.mean_of_all((x - mean).square().mean(dim=0))
            count = len(x) * distributed.world_size()
            self.mean += 0.1 * (mean - self.mean)
            self.variance += 0.1 * (square * count / max(count - 1, 1) - self.variance)
            return (x - mean) * torch.rsqrt(square + 1e-6)
        return (x - self.mean) * torch.rsqrt(self.variance + 1e-6)
