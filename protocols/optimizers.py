"""SGD and LARS for probes: of one head, or of many stacked heads that each have a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class StackedSgd(torch.optim.Optimizer):
    """SGD with momentum over parameters (K, ...): head k learns at lr[k] and is decayed by weight_decay[k].

    With `stacked` false the parameters are those of one network, as they are, and K is 1.

    As torch.optim.SGD does it: g <- g + decay * p; m <- momentum * m + g; p <- p - lr * m, with Nesterov's step
    p <- p - lr * (g + momentum * m). With `trust`, LARS (You et al. 2017) as MAE's script has it: before the momentum
    the gradient of a head's matrix is multiplied by trust * |p| / |g|; vectors (biases) are neither scaled nor decayed.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: Tensor,  # (K,)
        weight_decay: Tensor,  # (K,)
        momentum: float = 0.9,
        nesterov: bool = False,
        trust: float | None = None,
        stacked: bool = True,
    ) -> None:
        settings = {"momentum": momentum, "nesterov": nesterov, "trust": trust, "scale": 1.0}
        super().__init__(parameters, settings)
        self.lr, self.weight_decay, self.stacked = lr, weight_decay, stacked
        self.decays = bool((weight_decay != 0).any())

    def set_scale(self, scale: float) -> None:
        """The schedule: every learning rate times this."""
        for group in self.param_groups:
            group["scale"] = scale

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # none of ours needs a closure
        """One step on the gradients."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        heads, gradient, buffer = (
            x if self.stacked else x[None] for x in (parameter.data, parameter.grad, state["momentum"])
        )
        matrix, shape = heads.ndim > 2, (-1, *(1,) * (heads.ndim - 1))
        if self.decays and (matrix or group["trust"] is None):
            gradient = torch.addcmul(gradient, heads, self.weight_decay.view(shape))
        if matrix and group["trust"] is not None:
            norms = [x.flatten(1).norm(dim=1) for x in (heads, gradient)]
            ratio = group["trust"] * norms[0] / norms[1]
            usable = (norms[0] > 0) & (norms[1] > 0)
            gradient = gradient * torch.where(usable, ratio, torch.ones_like(ratio)).view(shape)
        buffer.mul_(group["momentum"]).add_(gradient)
        direction = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
        heads.addcmul_(direction, self.lr.view(shape), value=-group["scale"])
