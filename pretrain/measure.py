"""What a recipe costs: seconds a step, peak memory, floating-point operations, extrapolated to an epoch.

No images are read: the steps run on noise, which costs what images cost. So these are the figures of the network, and
a loader that is too slow shows as the difference to the log's images_per_second. Under torchrun the processes step
together, as they would in training.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
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
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.augment import augmentation_named, view_px
from ssl_bench.evaluate.training.loader import Views, sample_generator
from ssl_bench.evaluate.training.signals import StopFlag
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.loop import Job, Run, Settings
from ssl_bench.pretrain.method import Training
from ssl_bench.progress import bar

IMAGENET_IMAGES = 1_281_167
UNCOUNTED_STEPS = 2  # the first steps allocate, choose kernels, and count operations


@dataclass(frozen=True)
class Cost:
    """Of one training step, and what follows from it."""

    step_seconds: tuple[float, ...]
    batch: int  # images a step, of all processes together
    peak_memory_bytes: int  # of the process that needs most
    memory_of: str  # what that is the memory of, in words
    flops_per_step: int  # of one process; multiplications and additions counted apart, as GPU makers do

    @property
    def seconds_per_step(self) -> float:
        """The median: a step that something else disturbed does not count."""
        return statistics.median(self.step_seconds)

    @property
    def images_per_second(self) -> float:
        """Of all processes together."""
        return self.batch / self.seconds_per_step

    def epoch_seconds(self, images: int = IMAGENET_IMAGES) -> float:
        """Extrapolated from steps: no epoch was run."""
        return images / self.images_per_second


def measure(
    method: str, recipe: Training, settings: Settings, *, steps: int = 10, base: Checkpoint | None = None
) -> Cost:
    """`steps` steps after two uncounted ones. The recipe's batch is that of all processes together."""
    memory = _Memory(settings.device)
    run, views = prepare(method, recipe, settings, base=base)
    seconds = []
    with bar(f"measuring {method}", UNCOUNTED_STEPS + steps) as advance:
        with FlopCounterMode(display=False) as counter:
            step(run, views)
        for _ in range(UNCOUNTED_STEPS - 1):
            step(run, views)
        advance(UNCOUNTED_STEPS)
        memory.forget_peak()
        for _ in range(steps):
            _synchronize(run.device)
            start = time.perf_counter()
            step(run, views)
            _synchronize(run.device)
            seconds.append(time.perf_counter() - start)
            advance(1)
    peaks = distributed.gathered_from_all(torch.tensor([memory.peak_bytes()], device=distributed.device()))
    return Cost(tuple(seconds), recipe.batch, int(peaks.max()), memory.what, counter.get_total_flops())


class _Memory:
    """What is needed at the worst moment, beyond what is held now: weights, optimizer and activations of a run to come.

    On CUDA that is what tensors take. Elsewhere it is the process's resident memory, where Linux can be told to forget
    a peak; the libraries' buffers count, and so does what the heap keeps of freed tensors.
    """

    def __init__(self, device: str) -> None:
        self.device, self.before = device, 0
        gc.collect()  # of a run measured before
        if device.startswith("cuda"):
            self.what = "tensors on the device"
            self.before = torch.cuda.memory_allocated(device)
        elif _forget_peak():
            self.what = "the process, beyond what it held before the network was built"
            self.before = _status_bytes("VmRSS")
        else:
            self.what = "the whole process since it started, whatever it did before"

    def forget_peak(self) -> None:
        """Of what is done only once."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.before:
            _forget_peak()

    def peak_bytes(self) -> int:
        """Since the peak was forgotten."""
        if self.device.startswith("cuda") or not self.before:
            return peak_memory_bytes(self.device) - self.before
        return _status_bytes("VmHWM") - self.before


def _forget_peak() -> bool:
    """Give free memory back to the system, and start a new peak; False where that cannot be done (not Linux)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def prepare(method: str, recipe: Training, settings: Settings, *, base: Checkpoint | None = None) -> tuple[Run, Views]:
    """A run that was never begun, which writes nothing, and this process's part of a batch of noise for it."""
    job = Job(
        name=method,
        module=METHODS[method],  # type: ignore[arg-type]  # a module, seen as what it offers
        recipe=recipe,
        split=_empty_split(recipe.batch * 1000),
        origin={},
        base=base,
    )
    settings = dataclasses.replace(settings, log_steps=10**9, checkpoint_minutes=1e9)
    run = Run(job, settings)
    return run, _noise(job, run.plan.piece, run.device)


def step(run: Run, views: Views) -> None:
    """One whole step of the loop: forward, backward, optimizer, teachers."""
    run.advance([views], StopFlag())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _noise(job: Job, count: int, device: torch.device) -> Views:
    """For so many images, the same at every step."""
    recipe, architecture = job.recipe, named(job.recipe.arch)
    sides = [
        view_px(view, image_px=architecture.image_px, patch_px=architecture.patch_px)
        for view in augmentation_named(recipe.augmentation)
    ]
    images = tuple(torch.randn(count, 3, side, side, device=device) for side in sides)
    drawn = [job.module.draw(recipe, architecture, sample_generator(0, 0, index)) for index in range(count)]
    draws: tuple[Tensor, ...] = tuple(torch.from_numpy(np.stack(part)).to(device) for part in zip(*drawn, strict=True))
    return Views(images, draws)


class _Nothing:
    """A source without images."""


def _empty_split(count: int) -> Split:
    """A split of which nobody asks for an image."""
    ids = Names("" for _ in range(count))
    return Split("train", ("noise",), np.zeros(count, dtype=np.int64), ids, _Nothing())  # type: ignore[arg-type]


NOWHERE = Path("nowhere")  # a folder that is never written
