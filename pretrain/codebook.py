"""MOCA's online codebook: a queue of teacher tokens, soft assignments to it, and prototypes generated from it.

Sections 3.1 and 3.5 and appendix C.1 of the paper. Words are unit vectors throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_bench.errors import UserError
from ssl_bench.evaluate.training.distributed import from_first, mean_of_all

SPREAD_MOMENTUM = 0.99  # section 3.5
FIRST_SPREAD = 0.5  # official code
GENERATOR_EPS = 1e-5  # of the L2 norms; official code


class Codebook(nn.Module):
    """K teacher tokens of past steps, first in, first out; at each step the oldest make room for the new ones.

    A step sees the codebook and the temperature as the last step left them: `forward` and `take` only put aside what
    `commit` writes. So a step may come in several parts, and all processes hold the same words.
    """

    def __init__(self, size: int, new: int, dim: int, *, sharpness: float) -> None:
        super().__init__()
        self.new, self.sharpness = new, sharpness
        self.words: Tensor
        self.oldest: Tensor
        self.spread: Tensor
        self.register_buffer("words", F.normalize(torch.randn(size, dim).clamp(min=0), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self.register_buffer("spread", torch.tensor(FIRST_SPREAD))
        self._spreads: list[Tensor] = []
        self._taken: Tensor | None = None

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Soft assignments of the tokens of two views: (2B, N, D) -> (2B, N, K), float32.

        softmax(sharpness * cosine / mu_MSD), with mu_MSD (`spread`) the running mean of max minus mean cosine. The
        paper prints the temperature as 1 / (10 mu_MSD); the code, like OBoW, has mu_MSD / 10, which is what adapts to
        the spread of the similarities.
        """
        tokens = F.normalize(tokens.float(), dim=-1)
        with torch.autocast(tokens.device.type, enabled=False):
            # One float32 matrix, changed in place: it is the largest thing of a step.
            scores = tokens @ self.words.T
        highest = scores.amax(-1, keepdim=True)
        spread = highest.squeeze(-1) - scores.mean(-1)  # (2B, N)
        self._spreads.append(spread.reshape(2, -1).mean(1))
        scores.sub_(highest).mul_(self.sharpness / self.spread).exp_()
        return scores.div_(scores.sum(-1, keepdim=True))

    @torch.no_grad()
    def take(self, tokens: Tensor, drawn: Tensor) -> None:
        """Put aside the step's new words: one token of each of its first images, all of one view.

        `tokens` (2B, N, D) are view after view; `drawn` (B, 2) gives each image's view and patch. The first image's
        view counts for all, since the official code feeds one view a step. Later parts of the step are not looked at.
        """
        if len(drawn) < self.new:
            raise UserError(
                f"new_words={self.new}, but a process sees only {len(drawn)} images at once, and each word comes from "
                "another image. Use a larger batch, fewer accumulated parts or processes, or --set new_words=..."
            )
        if self._taken is None:
            images = drawn[0, 0] * len(drawn) + torch.arange(self.new, device=drawn.device)
            self._taken = F.normalize(tokens[images, drawn[: self.new, 1]].float(), dim=-1)

    @torch.no_grad()
    def commit(self) -> None:
        """After the step: move mu_MSD, once for each view (so twice a step, as the code does), and replace words.

        The words of a step come from process 0. (The official code, too: DDP overwrites the other processes' queues.)
        """
        assert self._taken is not None
        for spread in mean_of_all(torch.stack(self._spreads).mean(0)):
            self.spread.lerp_(spread, 1 - SPREAD_MOMENTUM)
        places = self.oldest + torch.arange(self.new, device=self.words.device)  # K is a multiple of K_new: no wrap
        self.words.index_copy_(0, places, from_first(self._taken))
        self.oldest.add_(self.new).remainder_(len(self.words))
        self._spreads, self._taken = [], None


class Generator(nn.Module):
    """Codebook (K, D) -> prototypes (K, dim): L2 norm, linear, batch norm, ReLU, linear, L2 norm (appendix C.1).

    `residual` adds the official code's skip, which the paper does not have: the identity, or a linear layer where the
    widths differ. The batch norm sees the K words, which are the same on all processes, so it never needs a running
    mean; before it and beside another bias, a bias would be idle.
    """

    def __init__(self, dim: int, out_dim: int, *, residual: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 2 * dim, bias=False),
            nn.BatchNorm1d(2 * dim, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(2 * dim, out_dim),
        )
        self.skip: nn.Module | None = None
        if residual:
            self.skip = nn.Identity() if dim == out_dim else nn.Linear(dim, out_dim, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Unit vectors, float32."""
        words = F.normalize(words, dim=-1, eps=GENERATOR_EPS)
        prototypes = self.layers(words)
        if self.skip is not None:
            prototypes = prototypes + self.skip(words)
        return F.normalize(prototypes.float(), dim=-1, eps=GENERATOR_EPS)


class _SoftCrossEntropy(torch.autograd.Function):
    """With K = 4096 words for every token, plain autograd keeps three float32 matrices for the backward pass.

    The gradient, softmax(logits) - target, is known in the forward pass: keep it alone, in the precision of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_q = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        parts = zip(log_q.chunk(8), target.chunk(8), strict=True)  # so that the products never exist all at once
        loss = -torch.stack([(one * other).sum() for one, other in parts]).sum() / len(log_q)
        ctx.save_for_backward(log_q.exp_().sub_(target).to(logits.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (gradient / len(difference)), None


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of -sum_k target log softmax(logits), both (n, K); `target` is float32 and gets no gradient."""
    loss: Tensor = _SoftCrossEntropy.apply(logits, target)
    return loss
