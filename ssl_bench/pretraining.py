"""`ssl-bench pretrain`: choose method, recipe and data, and hand them to the loop, with what it may not import."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import UserError
from ssl_bench.files import expanded
from ssl_bench.progress import say

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Backbone
    from ssl_bench.evaluate.datasets import Dataset, Split
    from ssl_bench.evaluate.features import FloatArray, Forward
    from ssl_bench.evaluate.subject import IntArray
    from ssl_bench.pretrain.loop import Job, Monitor, Settings
    from ssl_bench.pretrain.method import Training


@dataclass(frozen=True)
class Options:
    """Everything that `train` takes beside the method, the data and the folder."""

    recipe: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)  # --set
    arch: str | None = None
    base: str | None = None
    base_key: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    resume: bool = False
    accumulate: int = 1
    workers: int | None = None
    compile: bool = False
    log_steps: int = 50
    checkpoint_minutes: float = 30.0
    keep_epochs: int | None = None
    monitor_epochs: int | None = None
    tensorboard: bool = False
    skip_broken: bool = False


def train(method: str, data: str | Path, out: str | Path, options: Options | None = None) -> Path:
    """Pre-train by `method` on the training images of `data`; returns the path that `run` opens.

    Under torchrun every process calls this, and they train together.
    """
    options = options or Options()
    from ssl_bench.evaluate.training.distributed import together
    from ssl_bench.machine import device_named

    with together(device_named(options.device)) as device:
        from ssl_bench.pretrain import loop

        job, settings = prepare(method, data, out, options, device=device)
        return loop.train(job, settings)


def prepare(
    method: str, data: str | Path, out: str | Path, options: Options, *, device: str = "cpu"
) -> tuple[Job, Settings]:
    """Everything checked that can be checked before the network is built."""
    from ssl_bench.evaluate.datasets import open_images
    from ssl_bench.evaluate.recipes import with_settings
    from ssl_bench.evaluate.training import distributed
    from ssl_bench.pretrain.catalog import choose
    from ssl_bench.pretrain.loop import Job, Settings

    dataset = open_images(str(data))
    module, recipe_name, row = choose(method, options.recipe, built_in=dataset.built_in)
    changes = dict(options.settings) | ({"arch": options.arch} if options.arch else {})
    recipe = with_settings(row, changes)
    assert dataset.train is not None
    if options.base is not None and not getattr(module, "NEEDS_BASE", False):
        raise UserError(f"--base {options.base}: {method} starts from scratch; only tec learns from a checkpoint.")
    settings = Settings(
        out=expanded(out),
        device=device,
        dtype=_dtype(options.dtype, device),  # type: ignore[arg-type]  # checked by the loop
        **{name: getattr(options, name) for name in _SAME},
    )
    job = Job(
        name=method,
        module=module,  # type: ignore[arg-type]  # a module, seen as what it offers
        recipe=recipe,
        split=dataset.train,
        origin=_origin(method, recipe_name, recipe, dataset, options),
        base=_open_base(options),
        monitor=_monitor(dataset, options, device) if options.monitor_epochs is not None else None,
    )
    if distributed.rank() == 0:
        say(
            f"{method}/{recipe_name}: {recipe.arch}, {len(dataset.train):,} images of {dataset.name}, "
            f"{recipe.epochs} epochs of batches of {recipe.batch}, {settings.dtype} on {device}"
        )
        for note in dataset.notes:
            say(note)
    return job, settings


_SAME = (
    "seed",
    "resume",
    "accumulate",
    "workers",
    "compile",
    "log_steps",
    "checkpoint_minutes",
    "keep_epochs",
    "monitor_epochs",
    "tensorboard",
    "skip_broken",
)


def _dtype(name: str, device: str) -> str:
    """bf16 where the hardware has it: no method here loses by it, and it is two to five times as fast."""
    if name != "auto":
        return name
    import torch

    from ssl_bench.evaluate.hardware import cpu_has_bf16

    has_bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.startswith("cuda")
        else device == "cpu" and cpu_has_bf16()
    )
    return "bf16" if has_bf16 else "fp32"


def _open_base(options: Options) -> Any:
    from ssl_bench.evaluate.checkpoints import open_checkpoint

    if options.base is None:
        if options.base_key is not None:
            raise UserError("--base-key chooses a network of the --base checkpoint, and none was given.")
        return None
    return open_checkpoint(options.base, key=options.base_key)


def _origin(method: str, recipe_name: str, recipe: Training, dataset: Dataset, options: Options) -> dict[str, object]:
    """What the checkpoint says of itself, in plain values."""
    from ssl_bench.leaderboards.strict_json import plain
    from ssl_bench.machine import code_version, environment

    assert dataset.train is not None
    origin: dict[str, object] = {
        "method": method,
        "recipe": recipe_name,
        "resolved_recipe": plain(dataclasses.asdict(recipe)),
        "overrides": dict(options.settings) | ({"arch": options.arch} if options.arch else {}),
        "data": dataset.name,
        "data_manifest_sha256": dataset.train.manifest_sha256,
        "images": len(dataset.train),
        "seed": options.seed,
        "base": options.base,
        "environment": environment(),
        "code_version": code_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return origin


def _monitor(dataset: Dataset, options: Options, device: str) -> Monitor:
    """k-NN on the validation images as the row `knn/extrema` has it (k=200, a bank of 10 %), on both vectors."""
    from ssl_bench.evaluate.features import Forward
    from ssl_bench.evaluate.loading import Effort
    from ssl_bench.evaluate.readings import Reading, View
    from ssl_bench.evaluate.vectors import Vectors
    from ssl_bench.protocols import knn

    train_split, val_split = dataset.train, dataset.val
    if train_split is None or val_split is None or train_split.classes != val_split.classes:
        raise UserError(
            f"--monitor-epochs: k-NN needs labeled train and val images of the same classes, which {dataset.name} does "
            "not have. Leave the option out, or give a dataset with both."
        )
    recipe = knn.RECIPES["extrema"]
    rows = knn.bank_rows(train_split.labels, recipe.bank_percent, options.seed)
    neighbors = min(recipe.neighbors[0], len(rows))

    def monitor(network: Backbone) -> dict[str, float]:
        own = network.architecture.image_px
        view = View(own, own) if dataset.built_in else View(recipe.resize_px, recipe.crop_px, recipe.interpolation)
        readings = [Reading("patch_mean", view), *([Reading("cls", view)] if network.architecture.has_cls else [])]
        forward = Forward(network.eval(), readings, Effort(device, "fp32", None, options.workers, options.skip_broken))
        bank, labels = _embedded(forward, train_split.subset(rows))
        queries, truth = _embedded(forward, val_split)
        scores = {}
        for reading, left, right in zip(readings, queries, bank, strict=True):
            similarity, index = knn.nearest(Vectors([left]), Vectors([right]), neighbors, device=device)
            votes = knn.vote(similarity, labels[index], recipe.temperature[0], len(train_split.classes))
            scores[f"knn_{reading.token}"] = 100 * float((votes == truth).mean())
        return scores

    return monitor


def _embedded(forward: Forward, split: Split) -> tuple[list[list[FloatArray]], IntArray]:
    """The blocks of every reading, and the labels of their rows. Not cached: this network lives for one epoch."""
    import numpy as np

    from ssl_bench.evaluate.loading import load

    batch = forward.batch_size
    broken: list[int] = []
    rows: list[list[FloatArray]] = []
    plan = [list(range(at, min(at + batch, len(split)))) for at in range(0, len(split), batch)]
    for indices, (pixels, places) in zip(
        plan, load(split, forward.readings[0].view, plan, forward.effort), strict=True
    ):
        broken += [indices[place] for place in places]
        if pixels is not None:
            rows.append(forward(pixels))
    return [list(blocks) for blocks in zip(*rows, strict=True)], np.delete(split.labels, broken)
