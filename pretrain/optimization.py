"""AdamW as the papers set it: groups without weight decay, schedules, clipping."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ssl_bench.evaluate.training.schedules import Progress, cosine, warmup_cosine
from ssl_bench.pretrain.method import Method, Training


def make_optimizer(method: Method, recipe: Training) -> AdamW:
    """AdamW over what is trained. Biases, norms and whatever else has one dimension are not decayed."""
    groups: dict[tuple[bool, float | None], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        constant_lr = next((lr for prefix, lr in method.constant_lr.items() if name.startswith(prefix)), None)
        decayed = parameter.ndim > 1 and not name.startswith(method.undecayed)
        groups.setdefault((decayed, constant_lr), []).append(parameter)
    settings = [
        {"params": parameters, "decayed": decayed, "constant_lr": constant_lr}
        for (decayed, constant_lr), parameters in groups.items()
    ]
    assert len(recipe.betas) == 2
    # lr and weight decay are set before every step.
    return AdamW(settings, lr=0.0, betas=(recipe.betas[0], recipe.betas[1]), weight_decay=0.0, fused=True)


def lr_at(recipe: Training, epoch: float) -> float:
    """The learning rate after so many epochs: base_lr * batch / 256 at its peak."""
    return warmup_cosine(
        recipe.base_lr * recipe.batch / 256,
        recipe.min_lr,
        epoch=epoch,
        warmup_epochs=recipe.warmup_epochs,
        total_epochs=recipe.horizon * recipe.epochs,
    )


def weight_decay_at(recipe: Training, share: float) -> float:
    """The weight decay at a share of the whole run."""
    return cosine(recipe.weight_decay, recipe.weight_decay_end, share)


def set_schedules(optimizer: AdamW, recipe: Training, now: Progress) -> tuple[float, float]:
    """Before a step: learning rate and weight decay of every group. Returns those of the ordinary ones."""
    lr, weight_decay = lr_at(recipe, now.epoch), weight_decay_at(recipe, now.share)
    for group in optimizer.param_groups:
        constant = group["constant_lr"] is not None
        group["lr"] = group["constant_lr"] if constant else lr
        # Parts with a constant rate of their own keep the first weight decay too (MOCA's generators).
        own = recipe.weight_decay if constant else weight_decay
        group["weight_decay"] = own if group["decayed"] else 0.0
    return lr, weight_decay


def clip_gradients(parameters: list[nn.Parameter], recipe: Training) -> Tensor:
    """Clip as the recipe says; returns the L2 norm of the whole gradient before that."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    if recipe.clip is None:
        return total
    if recipe.clip_each:
        scales = [(recipe.clip / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, scales)
    else:
        torch._foreach_mul_(gradients, (recipe.clip / (total + 1e-6)).clamp(max=1.0))
    return total
