"""One training of semseg.py: a segmentor on some of the images, with a learning rate, scored on val."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ssl_bench.evaluate.masks import Masks
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols.image_splits import Subset
from ssl_bench.protocols.openmm.mean_iou import MeanIoU
from ssl_bench.protocols.openmm.network import parameter_groups
from ssl_bench.protocols.openmm.runner import Course, Data, build, forget, plan_of, train
from ssl_bench.protocols.openmm.scenes import Scenes, scoring, training
from ssl_bench.protocols.openmm.segmentors import segmentor
from ssl_bench.protocols.semseg import Recipe, fc_norm_of
from ssl_bench.protocols.training import identity

_BETAS, _MOMENTUM = (0.9, 0.999), 0.9


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
        self.replaced: set[int] = set()  # training images that could not, as they are counted in the whole split

    @property
    def told(self) -> dict[str, object]:
        """For the record."""
        return {"images": self.images, "origin": "all" if self.part is None else self.part.origin, "steps": self.steps}

    @property
    def images_used(self) -> dict[str, object]:
        """For the config."""
        names = None if self.part is None else [str(name) for name in self.masks.splits["train"].sample_ids]
        return {"train": names or self.images, "val": len(self.masks.splits["val"])}

    @property
    def parts(self) -> int:
        """In how many a process computes a batch; BatchNorm and the mean over labeled pixels are of each."""
        return plan_of(self.course(self.recipe.lrs[0]), self.subject.effort).accumulate

    def run(self, lr: float) -> dict[str, Any]:
        """What the metric says of val, at the end or at its best, with the "step" of that."""
        recipe, network = self.recipe, self.network()
        groups = parameter_groups(network, lr=lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr, betas=_BETAS)
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr, momentum=_MOMENTUM, nesterov=True)
        history = train(
            network,
            self.course(lr),
            self.data(),
            optimizer=optimizer,
            lr_factor=recipe.lr_factor(lr, self.images),
            effort=self.subject.effort,
        )
        self.skipped = len(history.broken)
        self.replaced |= {index if self.part is None else int(self.part.rows[index]) for index in history.replaced}
        place = len(history.steps) - 1 if recipe.best_every is None else history.best
        return history.outcomes[place] | {"step": history.steps[place]}

    def forget(self, lr: float) -> None:
        """What is kept of the training."""
        forget(self.course(lr), self.subject.effort)

    def course(self, lr: float) -> Course:
        """How long, and what makes it this training and no other."""
        recipe, subject = self.recipe, self.subject
        searched = f", lr {lr:g}" if len(recipe.lrs) > 1 else ""
        return Course(
            title=f"semseg of {subject.checkpoint.name}{searched}",
            identity=identity(subject, self.masks.splits["train"], recipe, self.protocol)
            | {"lr": lr, "scale_px": list(self.masks.scale_px)},
            steps=self.steps,
            batch=recipe.batch,
            seed=subject.seed,
            evaluate_every=self.best_every,
        )

    @property
    def best_every(self) -> int | None:
        """The same in steps."""
        every = self.recipe.best_every
        return None if every is None else every * self.recipe.per_unit(self.images)

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
        if self.recipe.head == "fc_norm+linear":
            network.decode_head.norm.load_state_dict(fc_norm_of(checkpoint))
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
            "optimizer": {
                "type": recipe.optimizer,
                "lr": lr,
                "weight_decay": recipe.weight_decay,
                **({"momentum": _MOMENTUM, "nesterov": True} if recipe.optimizer == "sgd" else {"betas": _BETAS}),
            },
            "layer_decay": recipe.layer_decay,
            "schedule": {"steps": self.steps, "power": recipe.power, "min_lr": recipe.min_lr, "warmup_steps": warmup},
            "best_every_steps": self.best_every,
            "batch": recipe.batch,
            "parts": self.parts,
            "seed": self.subject.seed,
            "dtype": self.subject.effort.dtype,
            "scale_px": scale,
            "classes": self.masks.classes,
        }
