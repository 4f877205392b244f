"""How long a run will take here: from records of runs like it, else from a forward pass that is timed now.

No promise: each estimate says what it is taken from, and where there is nothing to take it from, it is unknown.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ssl_bench.errors import UserError
from ssl_bench.leaderboards.record import Record
from ssl_bench.leaderboards.standing import as_typed

_BACKWARD = 3  # forward and backward together cost about three forward passes
_TIMED_SECONDS = 1.0


@dataclass(frozen=True)
class Work:
    """One run, as far as it decides how long it takes."""

    recipe: str  # protocol/recipe
    settings: Mapping[str, str]
    dataset: str
    arch: str
    device: str
    dtype: str


def seconds_of(work: Work, records: Iterable[Record]) -> tuple[float | None, str]:
    """How long, and what that is taken from."""
    images = images_of(work.dataset)
    like = [record for record in records if _is_like(record, work)]
    for record in sorted(like, key=lambda each: sum(each.n_samples.evaluated.values()), reverse=True):
        read = {split: count for split, count in record.n_samples.evaluated.items() if count}
        took, there = sum(record.seconds.values()), sum(read.values())
        if record.dataset == work.dataset and not record.limited:
            return took, "as long as it took here before"
        if there and all(split in images for split in read):
            wanted = sum(images[split] for split in read)
            return took * wanted / there, f"{wanted:,} images; {there:,} took {took:.0f} s here"
    if not (passes := _forward_passes(work, images)):
        return None, "unknown"
    if not (speed := images_per_second(work.arch, work.device, work.dtype)):
        return None, "unknown"
    return passes / speed, f"at least: {passes:,.0f} forward passes, {speed:.3g} a second as timed now"


def images_of(dataset: str) -> dict[str, int]:
    """Classes, and images a split, of a complete dataset; empty where its name does not say."""
    from ssl_bench.evaluate.datasets import DATASETS
    from ssl_bench.evaluate.masks import KNOWN

    if dataset in DATASETS:
        return DATASETS[dataset].expected.counts()
    return dict(zip(("classes", "train", "val"), KNOWN[dataset].complete, strict=True)) if dataset in KNOWN else {}


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


def _forward_passes(work: Work, images: Mapping[str, int]) -> float:
    """Images that go through the network, for the protocols in which that is most of the work; 0 for others."""
    from ssl_bench.efficiency import choose
    from ssl_bench.evaluate.recipes import with_settings

    if not images:
        return 0
    protocol, _, original = choose(work.recipe)
    recipe: Any = with_settings(original, work.settings)
    train, val, passes = images["train"], images["val"], 0.0
    if protocol == "knn":
        passes = train * recipe.bank_percent / 100 + val
    elif protocol == "lowshot":
        labeled = {f"{n}shot": n * images["classes"] for n in (1, 2, 5)} | {
            "1percent": train // 100,
            "10percent": train // 10,
        }
        passes = sum(labeled[amount] * recipe.splits for amount in recipe.amounts) + val
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
