"""Parameter-efficient fine-tuning with TEC's adapters: the trunk is frozen, what its pre-training added is trained.

    ssl-bench pretrain tec --base mae.pth --data /data/imagenet/train --out runs/tec
    ssl-bench run --ckpt runs/tec --protocol adapters/linear,adapters/input,adapters/encoder

Gao et al., Towards Sustainable Self-supervised Learning (TEC), Tables 3 and 8. Three rows, each training more:

    linear    the head alone
    input     and the input adapter: the class token and the MLP that it passes before the first block (Table 16)
    encoder   and the encoder adapter, which merges the features of all blocks into Z_e (Table 15)

TEC's code for this was never released. Assumptions: `linear` and `input` are MAE's probe, so the head reads the class
token after the final norm, behind a batch norm without gains (eps 1e-6), and is drawn with std .01. `encoder` is the
fine-tuning recipe with another network: the head reads the mean of the patch tokens of Z_e behind a fresh LayerNorm.
Drop path then acts on the frozen blocks; layer-wise decay has no layers to act on, since adapters are above them all.

Batch statistics are those of the whole batch over all processes. `linear` and `input` compute features in parts, their
head and its gradient on the whole batch at once, and send that gradient back through the frozen trunk part by part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.checkpoints import Checkpoint, weights_sha256
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.subject import IntArray, Scores, Subject
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.evaluate.training.seeds import seeded
from ssl_bench.protocols.network_training import (
    NetworkLearner,
    Shared,
    Training,
    check_training,
    network_of,
    plain_groups,
    trained_scores,
)
from ssl_bench.protocols.optimizers import StackedSgd
from ssl_bench.protocols.training import check_batch

VERSION = 1
DATA, DISTRIBUTED = "images", True

Mode = Literal["linear", "input", "encoder"]
_NEEDS: dict[Mode, tuple[str, ...]] = {
    "linear": (),
    "input": ("input_adapter",),
    "encoder": ("input_adapter", "encoder_adapter"),
}
_PROBE_STD, _TUNED_STD = 0.01, 2e-5  # MAE's probe and MAE's fine-tuning


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """What is trained beside the head. linear and input: LARS (betas[0] is its momentum); encoder: AdamW."""

    mode: Mode

    def __post_init__(self) -> None:
        """Refuse what the mode would ignore."""
        super().__post_init__()
        used = [name for name in ("erasing", "mixup", "cutmix", "smoothing", "drop_path") if getattr(self, name)]
        if self.mode != "encoder" and used:
            raise UserError(f"{used[0]}={getattr(self, used[0])}: mode={self.mode} is a plain probe; expected 0.")


# Table 16. Its augmentation is RandomResizedCrop; MAE's script flips too, which is assumed, as is bicubic.
_PROBE = Recipe(
    epochs=90, batch=16384, lr=0.1, scale_lr=True, min_lr=0.0, warmup_epochs=10.0, weight_decay=0.0,
    betas=(0.9, 0.999), drop_path=0.0, augmentation="crop", least_area=0.08, erasing=0.0, mixup=0.0, cutmix=0.0,
    smoothing=0.0, every_epoch=False, resize_px=256, crop_px=224, interpolation="bicubic", mode="linear",
    source="TEC Table 16", published="ImageNet: TEC on MAE ViT-B/16, 800 epochs, 69.8 (Table 8); MAE 68.0",
)  # fmt: skip
# Table 15, ViT-B on MAE. Erasing is that of TEC's fine-tuning script.
_TUNED = replace(
    _PROBE, mode="encoder", epochs=100, batch=1024, lr=1e-3, min_lr=1e-6, warmup_epochs=20.0, weight_decay=0.05,
    drop_path=0.1, augmentation="randaug", erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
    source="TEC Table 15", published="ImageNet: TEC on MAE ViT-B/16, 800 epochs, 79.9 (Table 8)",
)  # fmt: skip
_TOY = replace(_PROBE, batch=128, epochs=3, warmup_epochs=1.0, least_area=0.3, source="ours: seconds on the toy world",
               published="none")  # fmt: skip

# fmt: off
RECIPES: dict[str, Recipe] = {
    "linear":     _PROBE,
    "input":      replace(_PROBE, mode="input", published="ImageNet: TEC on MAE ViT-B/16, 800 epochs, 72.6 (Table 8)"),
    "encoder":    _TUNED,
    # Ours. LARS multiplies its step by .001 times the length of the weights: hence the large learning rate.
    "toy":        replace(_TOY, mode="encoder", lr=4e-3),
    "toy-input":  replace(_TOY, mode="input", lr=32.0),
    "toy-linear": replace(_TOY, lr=32.0),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """None: it reads images itself."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """The adapters, and what every training needs."""
    check_training(subject, recipe)
    if recipe.mode != "encoder" and subject.effort.dtype == "fp16":
        raise UserError(f"--dtype fp16: the gradients of mode={recipe.mode} are too small for it; use bf16 or fp32.")
    checkpoint, architecture = subject.checkpoint, subject.checkpoint.architecture
    if missing := [name for name in _NEEDS[recipe.mode] if name not in checkpoint.extras]:
        raise UserError(
            f"{checkpoint.spec} holds no {missing[0]} (beyond the backbone it holds: "
            f"{', '.join(checkpoint.extras) or 'nothing'}), which mode={recipe.mode} trains. Needed is a training "
            "checkpoint of TEC, as `ssl-bench pretrain tec` writes it with adapters=both. The released TEC weights are "
            "converted: their class token is merged for good, and the adapters are gone."
        )
    plain = architecture.cls and architecture.final_norm and not architecture.beit and not architecture.pre_norm
    if not plain or architecture.class_attention_blocks:
        raise UserError(
            f"{checkpoint.spec} is {architecture.name}: expected a plain ViT with a class token in all blocks and a "
            "final norm, such as TEC trains."
        )
    check_batch(len(subject.split("train")), recipe.batch)


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Train what the mode names; the accuracy of the last epoch."""
    known = Shared(subject, recipe)
    with seeded(subject.seed):
        adapted = Adapted(subject.checkpoint, recipe, known.classes)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    if recipe.mode == "encoder":
        learner: Probe | NetworkLearner = NetworkLearner(known, adapted, plain_groups(trained, recipe))
    else:
        learner = Probe(known, adapted)
    extra = {name: weights_sha256(subject.checkpoint.extras[name]) for name in _NEEDS[recipe.mode]}
    scores = trained_scores(known, learner, protocol=f"adapters@v{VERSION}", data=subject, extra=extra)
    count = sum(parameter.numel() for parameter in trained.values())
    return replace(scores, details={**scores.details, "mode": recipe.mode, "trained_parameters": count})


class Adapted(nn.Module):
    """A frozen trunk, the adapters of the mode, and a head."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, classes: int) -> None:
        super().__init__()
        architecture, mode = checkpoint.architecture, recipe.mode
        self.mode = mode
        self.trunk = network_of(checkpoint, architecture, recipe.drop_path).requires_grad_(False)
        if mode != "linear":
            from ssl_bench.evaluate.adapters import InputAdapter

            self.input_adapter = InputAdapter.from_state(checkpoint.extras["input_adapter"])
        if mode == "encoder":
            from ssl_bench.evaluate.adapters import EncoderAdapter

            self.encoder_adapter = EncoderAdapter.from_state(checkpoint.extras["encoder_adapter"])
            self.norm: nn.Module = nn.LayerNorm(architecture.dim, eps=architecture.eps)
        else:
            self.norm = nn.BatchNorm1d(architecture.dim, affine=False, eps=1e-6)
        self.head = nn.Linear(architecture.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=_TUNED_STD if mode == "encoder" else _PROBE_STD)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """What the head reads. (B, D)"""
        token = None if self.mode == "linear" else self.input_adapter()
        from ssl_bench.evaluate.adapters import block_outputs

        blocks = block_outputs(self.trunk, images, class_token=token)  # the last one after the final norm
        if self.mode != "encoder":
            return blocks[-1][:, 0]
        adapted: Tensor = self.encoder_adapter(blocks)
        return adapted[:, 1:].mean(1)

    def classified(self, features: Tensor) -> Tensor:
        """Logits. (B, classes)"""
        logits: Tensor = self.head(self.norm(features))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits. (B, classes)"""
        return self.classified(self.features(images))


class Probe:
    """The modes with LARS and batch norm. (Table 16)"""

    def __init__(self, known: Shared, adapted: Adapted) -> None:
        self.known, self.recipe = known, known.recipe
        known.placed(adapted)
        self.adapted = adapted
        self.trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        self.optimizer = StackedSgd(
            self.trained,
            lr=torch.ones(1, device=known.device),
            weight_decay=torch.tensor([self.recipe.weight_decay], device=known.device),
            momentum=self.recipe.betas[0],
            trust=0.001,
            stacked=False,
        )

    def step(self, views: Views, now: Progress) -> None:
        """The head learns from the whole batch; the gradient at the features goes on to the adapter, part by part."""
        adapted, (images,), labels = self.adapted, views.images, views.draws[0]
        adapted.train()
        parts = self.known.parts(len(images))
        with torch.no_grad():
            mine = torch.cat([self._features(images[part]) for part in parts])
        whole = distributed.gathered_from_all(mine).requires_grad_(adapted.mode != "linear")
        loss = F.cross_entropy(adapted.classified(whole), distributed.gathered_from_all(labels))
        if not math.isfinite(value := float(loss.detach())):
            raise self.known.not_finite(value, now)
        torch.autograd.backward(loss)  # the whole head's gradient, the same in every process
        if whole.grad is not None:
            gradient = whole.grad[distributed.rank() * len(mine) :][: len(mine)]
            for part in parts:
                torch.autograd.backward(self._features(images[part]), gradient[part])
            for parameter in adapted.input_adapter.parameters():
                assert parameter.grad is not None
                distributed.sum_of_all(parameter.grad)
        self.optimizer.set_scale(self.recipe.lr_at(now))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _features(self, images: Tensor) -> Tensor:
        with self.known.autocast():
            return self.adapted.features(images).float()

    def predict(self) -> IntArray:
        """By the running statistics of the batch norm."""
        self.adapted.eval()
        return self.known.predicted(self.adapted)

    def state_dict(self) -> dict[str, Any]:
        """Everything, the frozen trunk too: it is simplest."""
        return {"adapted": self.adapted.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to that point."""
        self.adapted.load_state_dict(state["adapted"])
        self.optimizer.load_state_dict(state["optimizer"])
