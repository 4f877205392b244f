"""What a recipe costs: seconds a step, peak memory, floating-point operations, extrapolated to an epoch.

No images are read: the steps run on noise, which costs what images cost. So these are the figures of the network, and
a loader that is too slow shows as the difference to the log's images_per_second.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.hardware import peak_memory_bytes
from ssl_bench.evaluate.splits import Names, Split
from ssl_bench.evaluate.training.augment import augmentation_named, view_px
from ssl_bench.evaluate.training.loader import Views, sample_generator
from ssl_bench.evaluate.training.signals import StopFlag
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.loop import Job, Run, Settings
from ssl_bench.pretrain.method import Training

IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True)
class Cost:
    """Of one training step, and what follows from it."""

    seconds_per_step: float  # median
    batch: int
    peak_memory_bytes: int  # of the whole process so far on a CPU, of tensors on CUDA
    flops_per_step: int  # multiplications and additions counted apart, as GPU makers do

    @property
    def images_per_second(self) -> float:
        """Of this one process."""
        return self.batch / self.seconds_per_step

    def epoch_seconds(self, images: int = IMAGENET_IMAGES) -> float:
        """Extrapolated from steps: no epoch was run."""
        return images / self.images_per_second


def measure(
    method: str, recipe: Training, settings: Settings, *, steps: int = 10, base: Checkpoint | None = None
) -> Cost:
    """Median over `steps` steps after two uncounted ones. The recipe's batch is what one process computes at a time."""
    run, views = prepare(method, recipe, settings, base=base)
    with FlopCounterMode(display=False) as counter:
        step(run, views)
    step(run, views)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    seconds = []
    for _ in range(steps):
        _synchronize(run.device)
        start = time.perf_counter()
        step(run, views)
        _synchronize(run.device)
        seconds.append(time.perf_counter() - start)
    return Cost(statistics.median(seconds), recipe.batch, peak_memory_bytes(settings.device), counter.get_total_flops())


def prepare(method: str, recipe: Training, settings: Settings, *, base: Checkpoint | None = None) -> tuple[Run, Views]:
    """A run that was never begun, which writes nothing, and a batch of noise for it."""
    job = Job(
        name=method,
        module=METHODS[method],  # type: ignore[arg-type]  # a module, seen as what it offers
        recipe=recipe,
        split=_empty_split(recipe.batch * 1000),
        origin={},
        base=base,
    )
    settings = dataclasses.replace(settings, log_steps=10**9, checkpoint_minutes=1e9)
    return Run(job, settings), _noise(job, torch.device(settings.device))


def step(run: Run, views: Views) -> None:
    """One whole step of the loop: forward, backward, optimizer, teachers."""
    run.advance([views], StopFlag())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _noise(job: Job, device: torch.device) -> Views:
    recipe, architecture = job.recipe, named(job.recipe.arch)
    sides = [
        view_px(view, image_px=architecture.image_px, patch_px=architecture.patch_px)
        for view in augmentation_named(recipe.augmentation)
    ]
    images = tuple(torch.randn(recipe.batch, 3, side, side, device=device) for side in sides)
    drawn = [job.module.draw(recipe, architecture, sample_generator(0, 0, index)) for index in range(recipe.batch)]
    draws: tuple[Tensor, ...] = tuple(torch.from_numpy(np.stack(part)).to(device) for part in zip(*drawn, strict=True))
    return Views(images, draws)


class _Nothing:
    """A source without images."""


def _empty_split(count: int) -> Split:
    """A split of which nobody asks for an image."""
    ids = Names("" for _ in range(count))
    return Split("train", ("noise",), np.zeros(count, dtype=np.int64), ids, _Nothing())  # type: ignore[arg-type]


NOWHERE = Path("nowhere")  # a folder that is never written
