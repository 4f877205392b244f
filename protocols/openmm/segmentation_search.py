"""All trainings of semseg.py: the learning rate is searched on the first split, the others take the best; scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_bench.errors import UserError
from ssl_bench.evaluate.masks import Masks
from ssl_bench.evaluate.subject import Score, Scores, Subject, over_splits
from ssl_bench.evaluate.training import distributed
from ssl_bench.protocols.image_splits import Subset
from ssl_bench.protocols.mask_reading import read_before_training
from ssl_bench.protocols.openmm.runner import Diverged, config_json
from ssl_bench.protocols.openmm.segmentation import Segmentation
from ssl_bench.protocols.semseg import Recipe, fc_norm_of
from ssl_bench.protocols.training import about_replaced

Outcome = dict[str, Any]

_WITH_BATCHNORM = ("batchnorm+linear", "upernet")


def search(subject: Subject, recipe: Recipe, parts: Sequence[Subset | None], protocol: str) -> Scores:
    """Val's scores; each of `parts` is a split, None all training images."""
    masks = subject.dataset
    assert isinstance(masks, Masks)
    trainings = [Segmentation(subject, recipe, part, protocol) for part in parts]
    read_before_training(masks, [each.masks for each in trainings], skip_broken=subject.effort.skip_broken)
    tried = _tried(trainings[0], recipe.lrs)
    best = max((lr for lr, outcome in tried.items() if outcome), key=lambda lr: (tried[lr] or {})["main"])
    outcomes = [tried[best] or {}, *(_trained(training, best) for training in trainings[1:])]
    for training in trainings:  # of which each is kept until all are done
        for lr in recipe.lrs:
            training.forget(lr)
    skipped = max(training.skipped for training in trainings)
    val = len(subject.split("val")) - skipped
    return Scores(
        {name: _score(name, outcomes, val) for name in ("miou", "macc", "aacc")},
        main="miou",
        warnings=tuple(_warnings(trainings, tried, best)),
        details={
            "classes": _by_class(masks.classes, outcomes),
            "absent_classes": sum(value is None for value in outcomes[0]["iou"]),
            "lr": best,
            "tried": [{"lr": lr, "miou": outcome and outcome["main"]} for lr, outcome in tried.items()],
            "parts": trainings[0].parts,
            "splits": [
                training.told | {"miou": outcome["main"], "of_step": outcome["step"]}
                for training, outcome in zip(trainings, outcomes, strict=True)
            ],
        },
        files={
            "mm_config.json": config_json(
                trainings[0].config(best) | {"splits": [training.images_used for training in trainings]}
            )
        },
        evaluated={"train": _distinct(trainings), "val": val},
        skipped={"train": 0, "val": skipped},
    )


def _tried(training: Segmentation, lrs: Sequence[float]) -> dict[float, Outcome | None]:
    """None where the training diverged; at least one did not."""
    tried: dict[float, Outcome | None] = {}
    for lr in lrs:
        try:
            tried[lr] = training.run(lr)
        except Diverged as error:
            tried[lr], said = None, str(error)
    if not any(tried.values()):
        raise UserError(f"{said} The learning rates are set as --set lrs={min(lrs) / 10:g}; all that were diverged.")
    return tried


def _trained(training: Segmentation, lr: float) -> Outcome:
    try:
        return training.run(lr)
    except Diverged as error:
        raise UserError(f"{error} With lrs={lr:g}, the best on the first split, another one diverged.") from error


def _warnings(trainings: Sequence[Segmentation], tried: Mapping[float, Outcome | None], best: float) -> list[str]:
    recipe, subject = trainings[0].recipe, trainings[0].subject
    found = [f"the loss at learning rate {lr:g} was no longer finite" for lr, outcome in tried.items() if not outcome]
    if len(tried) > 1 and best in (min(tried), max(tried)):
        found.append(f"the best learning rate, {best:g}, is at the end of those tried: --set lrs=... goes further")
    found += about_replaced(len(set().union(*(training.replaced for training in trainings))))
    if recipe.head == "layernorm+linear" and fc_norm_of(subject.checkpoint):
        found.append("the network was fine-tuned, and its fc_norm is not used: head=fc_norm+linear takes it over")
    together = distributed.world_size() == 1 or subject.effort.device.startswith("cuda")
    if recipe.head in _WITH_BATCHNORM and not together:
        found.append("BatchNorm was not synchronized between the processes: that is done on GPUs only")
    return found


def _score(name: str, outcomes: Sequence[Outcome], n: int) -> Score:
    """Over splits where there are several; else with the error that comes from the choice of val images."""
    values = [outcome["main" if name == "miou" else name] for outcome in outcomes]
    if len(values) > 1:
        return over_splits(values)
    return Score(values[0], n, stderr=outcomes[0]["stderr"] if name == "miou" else None)


def _by_class(classes: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, dict[str, float | None]]:
    """IoU and accuracy of every class, the mean over splits; None where it does not occur."""

    def mean(values: Sequence[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return float(np.mean(there)) if there else None

    return {
        name: {key: mean([outcome[key][place] for outcome in outcomes]) for key in ("iou", "accuracy")}
        for place, name in enumerate(classes)
    }


def _distinct(trainings: Sequence[Segmentation]) -> int:
    """How many images of train were used by any split."""
    rows = [training.part.rows for training in trainings if training.part is not None]
    return len(np.unique(np.concatenate(rows))) if rows else trainings[0].images
