"""The batches of a training run, drawn by worker processes while the network computes.

Nothing here has a state. Step s of epoch e sees the images `epoch_order(n, seed, e)[s * batch : (s + 1) * batch]`, and
a sample's views and masks come from a generator seeded by (seed, epoch, index). So the data of a step depend neither on
the number of workers or processes nor on where the run began, and resuming is asking for later steps.

A batch is cut into `accumulate` parts in order, each part into `world` equal pieces in order; process r computes the
r-th piece of every part.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.loading import refused
from ssl_bench.evaluate.splits import Split, shown
from ssl_bench.evaluate.training.augment import Pixels
from ssl_bench.progress import say

Key = tuple[int, int]  # epoch, index in the split
Draws = tuple[npt.NDArray[Any], ...]  # whatever is random about a sample beside its views
Sampler = Callable[[Image.Image, int, np.random.Generator], tuple[tuple[Pixels, ...], Draws]]
Batch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # views uint8 (B, 3, S, S), draws (B, ...)


@dataclass(frozen=True)
class Views:
    """What a step sees of its images, on the device."""

    images: tuple[Tensor, ...]  # one (B, 3, S, S) a view of the augmentation, normalized
    draws: tuple[Tensor, ...]  # what else was drawn, stacked: (B, ...)


@dataclass(frozen=True)
class Plan:
    """What to draw of every image, and who computes which part of a batch."""

    sample: Sampler  # of an image and its index in the split; called in a worker
    batch: int  # over all processes and parts
    accumulate: int
    seed: int
    rank: int
    world: int
    workers: int | None = None  # None: chosen by the processors
    skip_broken: bool = False

    def __post_init__(self) -> None:
        """Refuse a batch that cannot be cut."""
        if self.batch % (self.accumulate * self.world):
            processes = f"{self.world} processes" if self.world > 1 else "1 process"
            raise UserError(
                f"a batch of {self.batch} images cannot be cut into {self.accumulate} equal parts for {processes}; "
                f"choose a multiple of {self.accumulate * self.world} (--set batch=...), or another --accumulate or "
                "number of processes."
            )

    @property
    def piece(self) -> int:
        """Images that one process computes at a time."""
        return self.batch // (self.accumulate * self.world)


def steps_per_epoch(images: int, batch: int) -> int:
    """Whole batches in an epoch; what is left over is dropped, and is another part of the data in every epoch."""
    if images < batch:
        raise UserError(
            f"the training set has {images:,} images, which do not fill one batch of {batch}; choose a smaller one: "
            f"--set batch={_power_of_two(images)}."
        )
    return images // batch


def _power_of_two(limit: int) -> int:
    return 1 << max(limit, 1).bit_length() - 1


# Streams of one seed. NumPy's seeding fills missing words with zeros, so (seed, epoch) and (seed, epoch, 0) are the
# same seed: the last word keeps the order of an epoch apart from its first sample.
_SAMPLES, _ORDER = 0, 1


def epoch_order(n: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """In which order an epoch sees the images: a permutation of range(n)."""
    return np.random.default_rng((seed, epoch, 0, _ORDER)).permutation(n)


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """All that is random about one sample: first its views, then the method's draws. (10 microseconds to make.)"""
    return np.random.default_rng((seed, epoch, index, _SAMPLES))


def micro_batches(n: int, plan: Plan, *, start_step: int, stop_step: int) -> Iterator[list[Key]]:
    """The samples of this process, piece by piece, from one step to before another."""
    steps = steps_per_epoch(n, plan.batch)
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(start_step, stop_step):
        if step // steps != epoch:
            epoch = step // steps
            order = epoch_order(n, seed=plan.seed, epoch=epoch)
        first = step % steps * plan.batch
        for part in range(plan.accumulate):
            start = first + (part * plan.world + plan.rank) * plan.piece
            yield [(epoch, index) for index in order[start : start + plan.piece].tolist()]


@dataclass(frozen=True)
class _Sample:
    views: tuple[Pixels, ...]
    draws: Draws
    broken: dict[int, str]  # images that were to be seen here and cannot be read: index, file


# A split is kept in memory, decoded, if it is no larger than this: by every worker, so a few gigabytes in all at most.
_MEMORY_BYTES = 256 * 2**20
_BYTES_A_PIXEL = 4  # of Pillow's RGB

# So many unreadable images in a row are no accident: a drive is gone, or the files are not what they seem.
_MOST_BROKEN = 100


class Samples(torch.utils.data.Dataset[Any]):
    """Samples by (epoch, index). What is wrong comes as a text, since workers garble exceptions."""

    def __init__(self, split: Split, plan: Plan) -> None:
        """Small splits stay in memory from the second epoch on."""
        self.split, self.plan = split, plan
        self._kept: dict[int, Image.Image] = {}
        self._bytes, self._is_small = 0, True

    def __getitem__(self, key: Key) -> _Sample | str:
        epoch, index = key
        broken: dict[int, str] = {}
        rng = sample_generator(self.plan.seed, epoch, index)
        try:
            taken, image = self._readable(index, broken)
            views, draws = self.plan.sample(image, taken, rng)
            return _Sample(views, draws, broken)
        except UserError as error:
            return str(error)

    def _readable(self, index: int, broken: dict[int, str]) -> tuple[int, Image.Image]:
        """The image and its index; with `skip_broken`, those of the next one that can be read. Notes what is broken.

        The next one: a replacement that depends on the data alone, the same in every epoch and process.
        """
        for place in range(index, index + min(_MOST_BROKEN, len(self.split))):
            try:
                return place % len(self.split), self._image(place % len(self.split))
            except BrokenImage as error:
                if not self.plan.skip_broken:
                    raise refused(str(error)) from error
                broken[place % len(self.split)] = error.file
        raise UserError(
            f"{len(broken)} images in a row cannot be read: {shown(broken.values())}. Expected a few broken ones at "
            "most; see `ssl-bench data check`."
        )

    def _image(self, index: int) -> Image.Image:
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        image = self.split.image(index)
        if self._is_small:
            self._kept[index] = image
            self._bytes += image.width * image.height * _BYTES_A_PIXEL
            # The rest of the split is taken to be like what was seen of it.
            if self._bytes / len(self._kept) * len(self.split) > _MEMORY_BYTES:
                self._is_small = False
                self._kept.clear()
        return image


def batches(
    split: Split, plan: Plan, *, start_step: int, stop_step: int, broken: dict[int, str] | None = None
) -> Generator[Batch, None, None]:
    """The micro-batches of this process in order, `accumulate` a step. Closing the generator ends the workers.

    `broken` is filled with the images that were replaced, and their files.
    """
    steps_per_epoch(len(split), plan.batch)  # refuses here, not at the first batch
    keys = micro_batches(len(split), plan, start_step=start_step, stop_step=stop_step)
    return _batches(split, plan, keys, {} if broken is None else broken)


def _batches(
    split: Split, plan: Plan, keys: Iterator[list[Key]], broken: dict[int, str]
) -> Generator[Batch, None, None]:
    workers = automatic_workers(plan.world) if plan.workers is None else plan.workers
    with warnings.catch_warnings(), signals_held():
        # More workers than processors are the user's choice. And Python 3.12 warns of forking a process with threads,
        # since a child may wait for a lock that a thread held: these decode and crop, in one thread, and take no lock
        # of the parent's.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        loader = torch.utils.data.DataLoader(
            Samples(split, plan),
            batch_sampler=keys,  # all remaining steps: the workers run on from epoch to epoch
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]  # the network is there by now
            worker_init_fn=obey_the_parent_only,
            multiprocessing_context=worker_context() if workers else None,
            generator=torch.Generator(),  # else a seed for the workers would be drawn from the global generator
        )
        iterator = iter(loader)
    try:
        for found in iterator:
            if isinstance(found, str):
                raise UserError(found)
            images, draws, missing = found
            if missing and not broken:
                say(f"cannot decode {next(iter(missing.values()))}; the next image of the split is taken instead")
            broken |= missing
            yield images, draws
    finally:
        del iterator  # ends the workers now
        if len(broken) > 1:
            say(f"{len(broken)} broken images were replaced by the next one of the split: {shown(broken.values())}")


_STOPPING = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Stopping signals wait; processes and threads that are started here never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_the_parent_only(worker: int) -> None:
    """Begin a worker: Ctrl-C and a scheduler's SIGTERM go to all processes, but the parent has a step to end.

    So the worker ends when the parent says so, by its queue or by SIGTERM; if the parent was killed, it notices.
    """
    del worker
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_wait_for_the_parent, daemon=True).start()
    else:  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _wait_for_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _collate(items: Sequence[_Sample | str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[int, str]] | str:
    """Stacked in the worker, so that it goes to the parent through shared memory; or the first thing that is wrong."""
    samples: list[_Sample] = []
    broken: dict[int, str] = {}
    for item in items:
        if isinstance(item, str):
            return item
        samples.append(item)
        broken |= item.broken
    images = tuple(torch.from_numpy(np.stack(view)) for view in zip(*(s.views for s in samples), strict=True))
    draws = tuple(torch.from_numpy(np.stack(draw)) for draw in zip(*(s.draws for s in samples), strict=True))
    return images, draws, broken


_MOST_WORKERS = 16


def automatic_workers(world: int) -> int:
    """One a processor, but one that is left to the training process: at least 1, at most 16."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # torchrun says how many processes share this machine
    return max(1, min(_MOST_WORKERS, processors // here - 1))


def worker_context() -> Any:
    """Forked where it can be: a spawned worker would load torch anew, and run the user's script from its top."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


@functools.cache
def _normalization(architecture: Architecture, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (architecture.mean, architecture.std))
    return mean, std


def prepared(
    images: tuple[Tensor, ...], draws: tuple[Tensor, ...], *, device: torch.device, architecture: Architecture
) -> Views:
    """A micro-batch on the device, its pixels normalized as the network expects them."""
    mean, std = _normalization(architecture, device)
    return Views(
        tuple(pixels.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std) for pixels in images),
        tuple(draw.to(device, non_blocking=True) for draw in draws),
    )
