"""One training of semseg.py: a segmentor on some of the images, with a learning rate, scored on val."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssl_bench.evaluate.masks import Masks
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols.image_splits import Subset
from ssl_bench.protocols.openmm.mean_iou import MeanIoU
from ssl_bench.protocols.openmm.network import parameter_groups
from ssl_bench.protocols.openmm.runner import Course, Data, build, train
from ssl_bench.protocols.openmm.scenes import Scenes, scoring, training
from ssl_bench.protocols.openmm.segmentors import segmentor
from ssl_bench.protocols.training import identity

if TYPE_CHECKING:
    from ssl_bench.protocols.semseg import Recipe


class Segmentation:
    """All that is the same for every learning rate."""

    def __init__(self, subject: Subject, recipe: Recipe, part: Subset | None, protocol: str) -> None:
        """`part` of the training images, or all; `protocol` is its name and version."""
        assert isinstance(subject.dataset, Masks)
        masks = subject.dataset
        self.subject, self.recipe, self.part, self.protocol = subject, recipe, part, protocol
        self.masks = masks if part is None else masks.subset("train", part.rows)
        self.images = len(self.masks.splits["train"])
        self.steps = recipe.length * recipe.per_unit(self.images)
        self.skipped = 0  # val images that could not be read

    @property
    def told(self) -> dict[str, object]:
        """For the record."""
        return {"images": self.images, "origin": "all" if self.part is None else self.part.origin, "steps": self.steps}

    def run(self, lr: float) -> dict[str, Any]:
        """What the metric says of val, at the end or at its best, with the "step" of that."""
        recipe, network = self.recipe, self.network()
        groups = parameter_groups(network, lr=lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr)
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
        history = train(
            network,
            self.course(lr),
            self.data(),
            optimizer=optimizer,
            lr_factor=recipe.lr_factor(lr, self.images),
            effort=self.subject.effort,
        )
        self.skipped = len(history.broken)
        place = len(history.steps) - 1 if recipe.best_every is None else history.best
        return history.outcomes[place] | {"step": history.steps[place]}

    def course(self, lr: float) -> Course:
        """How long, and what makes it this training and no other."""
        recipe, subject, every = self.recipe, self.subject, self.recipe.best_every
        searched = f", lr {lr:g}" if len(recipe.lrs) > 1 else ""
        return Course(
            title=f"semseg of {subject.checkpoint.name}{searched}",
            identity=identity(subject, self.masks.splits["train"], recipe, self.protocol) | {"lr": lr},
            steps=self.steps,
            batch=recipe.batch,
            seed=subject.seed,
            evaluate_every=None if every is None else every * recipe.per_unit(self.images),
        )

    def data(self) -> Data:
        """Both splits behind their transforms, and the metric."""
        recipe, masks = self.recipe, self.masks
        return Data(
            Scenes(masks, "train", training(recipe, masks.scale_px)),
            Scenes(masks, "val", scoring(recipe, masks.scale_px)),
            MeanIoU(len(masks.classes)),
        )

    def network(self) -> nn.Module:
        """With the checkpoint's weights; the head is drawn anew, alike for every learning rate and split."""
        checkpoint = self.subject.checkpoint
        network: Any = build(self.model(), scope="mmseg", seed=self.subject.seed)
        network.backbone.load(checkpoint)
        if self.recipe.head == "fc_norm+linear":  # of a file that was fine-tuned
            found = checkpoint.extras.get("classifier", {})
            norm = {key.removeprefix("fc_norm."): value for key, value in found.items() if key.startswith("fc_norm.")}
            network.decode_head.norm.load_state_dict(norm, strict=bool(norm))
        built: nn.Module = network
        return built

    def model(self) -> dict[str, Any]:
        """Its config."""
        return segmentor(self.recipe, self.subject.checkpoint.architecture, len(self.masks.classes))

    def config(self, lr: float) -> dict[str, Any]:
        """Everything, for the record."""
        recipe, scale = self.recipe, self.masks.scale_px
        warmup = recipe.warmup * recipe.per_unit(self.images)
        return {
            "model": self.model(),
            "train_pipeline": training(recipe, scale),
            "val_pipeline": scoring(recipe, scale),
            "optimizer": {"type": recipe.optimizer, "lr": lr, "weight_decay": recipe.weight_decay},
            "layer_decay": recipe.layer_decay,
            "schedule": {"steps": self.steps, "power": recipe.power, "min_lr": recipe.min_lr, "warmup_steps": warmup},
            "batch": recipe.batch,
            "classes": self.masks.classes,
        }
