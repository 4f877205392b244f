"""Samples on their way into an mmengine Runner: which ones, in which order, with which randomness.

An endless stream of training samples: every epoch is another permutation of the images, cut into whole batches, and
what the transforms draw depends on (seed, epoch, image) alone. So neither the number of workers or processes nor an
interruption changes the data. (mm's transforms draw from NumPy's and Python's global generators, which are seeded anew
for every sample and put back after it.)
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import torch
from mmengine.dataset import pseudo_collate

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.loading import WORTH_WORKERS, Effort, refused
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.loader import (
    Key,
    Plan,
    automatic_workers,
    micro_batches,
    obey_the_parent_only,
    signals_held,
    worker_context,
)
from ssl_bench.evaluate.training.seeds import seeded
from ssl_bench.protocols.openmm import packages

# A worker that is spawned comes here first: it, too, imports mmseg and mmdet in silence, after the operators.
packages.require()

Packed = dict[str, Any]  # inputs, data_samples

_AHEAD = 4  # val samples that are read while the network computes, where no worker processes do
_MOST_BROKEN = 100  # in a row: no accident


class Samples(Protocol):
    """What a protocol gives: a dataset behind its pipeline. It goes to worker processes, so it must be picklable."""

    metainfo: Mapping[str, Any]  # of mm: classes

    def __len__(self) -> int:
        """How many images."""

    def __getitem__(self, index: int) -> Packed:
        """One of them, transformed and packed."""


@dataclass(frozen=True)
class _Good:
    """A sample or a batch of them, and which images they were to be but cannot be read."""

    packed: Packed
    replaced: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Bad:
    """In a sample's place: what is wrong, since workers garble exceptions. `broken`: one that may be skipped."""

    said: str
    broken: int | None = None


class _Guarded(torch.utils.data.Dataset[Any]):
    """Samples by (epoch, index) or, for val, by index."""

    def __init__(self, samples: Samples, seed: int, skip_broken: bool) -> None:
        self.samples, self.seed, self.skip_broken = samples, seed, skip_broken
        self.metainfo = dict(samples.metainfo)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key | int) -> _Good | _Bad:
        try:
            if isinstance(key, int):
                return _Good(self.samples[key])
            with seeded(self.seed, *key):
                return self._readable(key[1])
        except BrokenImage as error:
            if self.skip_broken and isinstance(key, int):
                return _Bad(str(error), key)
            return _Bad(str(refused(str(error))))
        except UserError as error:
            return _Bad(str(error))

    def _readable(self, index: int) -> _Good:
        """With `skip_broken`, the next one that can be read takes the place of a broken one."""
        broken: dict[int, BrokenImage] = {}
        for place in range(index, index + min(_MOST_BROKEN, len(self.samples))):
            try:
                return _Good(self.samples[place % len(self.samples)], tuple(broken))
            except BrokenImage as error:
                if not self.skip_broken:
                    raise
                broken[place % len(self.samples)] = error
        last = list(broken.values())[-1]
        raise UserError(f"{len(broken)} images in a row cannot be read, the last of them: {last}") from last


def training_batches(samples: Samples, plan: Plan, steps: range) -> torch.utils.data.DataLoader[Any]:
    """The pieces of this process for these steps, `plan.accumulate` a step."""
    images = len(steps) * plan.batch // plan.world
    return _loader(
        _Guarded(samples, plan.seed, plan.skip_broken), _Keys(len(samples), plan, steps), images, plan.workers
    )


def val_batches(samples: Samples, effort: Effort) -> torch.utils.data.DataLoader[Any]:
    """One image at a time (they may differ in size), every process its own share, none twice."""
    mine = [[index] for index in range(distributed.rank(), len(samples), distributed.world_size())]
    return _loader(_Guarded(samples, 0, effort.skip_broken), mine, len(mine), effort.workers, ahead=True)


@dataclass(frozen=True)
class _Keys:
    """The samples of each batch, drawn when they are asked for: a list of them all would be hundreds of megabytes."""

    images: int
    plan: Plan
    steps: range

    def __iter__(self) -> Iterator[list[Key]]:
        return micro_batches(self.images, self.plan, start_step=self.steps.start, stop_step=self.steps.stop)

    def __len__(self) -> int:
        return len(self.steps) * self.plan.accumulate


def _loader(
    dataset: _Guarded, plan: Iterable[list[Any]], images: int, workers: int | None, *, ahead: bool = False
) -> torch.utils.data.DataLoader[Any]:
    if workers is None:
        workers = automatic_workers(distributed.world_size()) if images >= WORTH_WORKERS else 0
    # Transforms that draw from global generators can be read ahead by another process, not by a thread of this one.
    kind = _ReadAhead if ahead and not workers else torch.utils.data.DataLoader
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than processors are the user's choice
        return kind(
            dataset,
            batch_sampler=plan,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_begin_worker,
            multiprocessing_context=worker_context() if workers else None,
            generator=torch.Generator(),  # else a seed for the workers would be drawn from the global generator
        )


def _collate(items: Sequence[_Good | _Bad]) -> _Good | _Bad:
    """mm's own form, a list of every entry; or the first thing that is wrong."""
    good = [item for item in items if isinstance(item, _Good)]
    bad = next((item for item in items if isinstance(item, _Bad)), None)
    replaced = tuple(index for item in good for index in item.replaced)
    return bad or _Good(pseudo_collate([item.packed for item in good]), replaced)


def _begin_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    warnings.simplefilter("ignore")
    obey_the_parent_only(worker)


def checked(loader: torch.utils.data.DataLoader[Any], broken: list[int]) -> Generator[Packed, None, None]:
    """The batches, or the error that one of them is. `broken` takes the images that are skipped or replaced."""
    with signals_held():
        iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, _Good):
                broken += set(batch.replaced) - set(broken)
                yield batch.packed
            elif batch.broken is None:
                raise UserError(batch.said)
            else:
                broken.append(batch.broken)
    finally:
        del iterator  # ends the workers now


class _ReadAhead(torch.utils.data.DataLoader[Any]):
    """A loader without workers whose batches are read by a thread, a few ahead of those that are used."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        with ThreadPoolExecutor(1) as pool:
            waiting = deque(pool.submit(next, batches, None) for _ in range(_AHEAD))
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, batches, None))
                yield batch
