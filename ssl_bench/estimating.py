"""How long a run will take here: from records of runs like it, else from a forward pass that is timed now.

No promise: each estimate says what it is taken from, and where there is nothing to take it from, it is unknown.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import UserError
from ssl_bench.leaderboards.record import Record
from ssl_bench.leaderboards.standing import as_typed

if TYPE_CHECKING:
    from ssl_bench.evaluate.splits import AnyDataset

_BACKWARD = 3  # forward and backward together cost about three forward passes
_TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class Work:
    """One run, as far as it decides how long it takes."""

    recipe: str  # protocol/recipe
    settings: Mapping[str, str]
    images: Mapping[str, int]  # by split, and how many "classes"
    arch: str
    device: str
    dtype: str


def seconds_of(work: Work, records: Iterable[Record]) -> tuple[float | None, str]:
    """How long, and what that is taken from."""
    wanted = _read(work, work.images)
    like = [record for record in records if _is_like(record, work)]
    for record in sorted(like, key=lambda each: sum(each.n_samples.evaluated.values()), reverse=True):
        read = {split: count for split, count in record.n_samples.evaluated.items() if count}
        opening = record.seconds.get("open", 0.0)
        took, there = sum(record.seconds.values()) - opening, sum(read.values())
        same_images = all(work.images.get(split) == count for split, count in record.n_samples.original.items())
        if same_images and not record.limited:
            return took + opening, "as long as it took here before"
        if there and all(split in wanted for split in read):
            all_images = sum(wanted[split] for split in read)
            seconds = took * all_images / there + opening
            return seconds, f"{all_images:,} images; {there:,} took {took:.0f} s here"
    if not (passes := _forward_passes(work)):
        return None, "unknown"
    if not (speed := images_per_second(work.arch, work.device, work.dtype)):
        return None, "unknown"
    return passes / speed, f"at least: {passes:,.0f} forward passes, {_two_digits(speed)} a second as timed now"


def images_of(dataset: AnyDataset, stands_for: str) -> dict[str, int]:
    """Images a split and classes, of an opened dataset that has them, or as the one has that it stands for."""
    from ssl_bench.evaluate.datasets import complete_counts

    classes = {len(split.classes) for split in dataset.splits.values()} or {0}
    known = complete_counts(stands_for) or {}
    return {**known, "classes": max(classes), **{split.name: len(split) for split in dataset.splits.values()}}


def _read(work: Work, images: Mapping[str, int]) -> Mapping[str, int]:
    """Images of each split that the network sees: few-label protocols read the labeled ones alone."""
    if work.recipe.partition("/")[0] != "lowshot" or not {"classes", "train"} <= set(images):
        return images
    recipe = _recipe(work)
    labeled = {f"{n}shot": n * images["classes"] for n in (1, 2, 5)}
    labeled |= {"1percent": images["train"] // 100, "10percent": images["train"] // 10}
    read = sum(labeled[amount] * recipe.splits for amount in recipe.amounts)
    return {**images, "train": min(read, images["train"])}


def _recipe(work: Work) -> Any:
    from ssl_bench.efficiency import choose
    from ssl_bench.evaluate.recipes import with_settings

    return with_settings(choose(work.recipe)[2], work.settings)


def _two_digits(number: float) -> str:
    return f"{float(f'{number:.2g}'):,g}"


def _is_like(record: Record, work: Work) -> bool:
    """The same work on this machine, and all of it done: features that came from the cache cost nothing."""
    from ssl_bench.machine import environment

    here = environment()
    return (
        f"{record.protocol}/{record.recipe}" == work.recipe
        and record.arch == work.arch
        and record.dtype == work.dtype
        and {name: as_typed(value) for name, value in record.overrides.items()} == work.settings
        and record.device.partition(":")[0] == work.device.partition(":")[0]
        and all(record.environment.get(name) == here[name] for name in ("platform", "cpu", "gpu"))
        and all(used.source == "extracted" for used in record.features)
    )


def _forward_passes(work: Work) -> float:
    """Images that go through the network, for the protocols in which that is most of the work; 0 for others."""
    images = _read(work, work.images)
    if not {"train", "val"} <= set(images):
        return 0
    protocol, recipe = work.recipe.partition("/")[0], _recipe(work)
    train, val, passes = images["train"], images["val"], 0.0
    if protocol == "knn":
        passes = train * recipe.bank_percent / 100 + val
    elif protocol == "lowshot":
        passes = train + val
    elif protocol == "linear":
        passes = (1 if recipe.scale is None else recipe.epochs) * train + val
    elif protocol == "finetune":
        share = {"all": 1.0, "1percent": 0.01, "10percent": 0.1}[recipe.labels]
        passes = _BACKWARD * recipe.epochs * share * train + val
    return passes


@functools.cache
def images_per_second(arch: str, device: str, dtype: str) -> float | None:
    """Through a network of that name, with random weights; None if the name does not say what to build."""
    import torch

    from ssl_bench.evaluate.architecture import named
    from ssl_bench.evaluate.backbone import build
    from ssl_bench.evaluate.features import Forward
    from ssl_bench.evaluate.loading import Effort
    from ssl_bench.evaluate.readings import Reading, View

    try:
        architecture = named(arch)
    except UserError:
        return None
    side = architecture.image_px
    reading = Reading("patch_mean", View(side, side))
    forward = Forward(build(architecture).eval(), [reading], Effort(device, dtype))
    images = torch.zeros(forward.batch_size if device.startswith("cuda") else 2, 3, side, side, dtype=torch.uint8)
    forward(images)  # the first one warms up
    started, done = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < _TIMED_SECONDS:
        forward(images)
        done += len(images)
    return done / took
