"""Training on labels, the same for every protocol that trains: linear probes, fine-tuning, adapters.

A protocol gives a `Learner`, which takes a step on a batch and predicts the val images, and the batches. This loop does
the rest: progress, scores of val on the way, stopping and going on. All that a step depends on is a function of
(seed, step) or in the state file (state_file.py), so a training that was interrupted and goes on is the uninterrupted
one, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.splits import Split
from ssl_bench.evaluate.subject import IntArray, Subject
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.augment import Pixels, View, draw_views
from ssl_bench.evaluate.training.loader import Draws, Plan, Sampler, Views, batches, prepared, steps_per_epoch
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.evaluate.training.seeds import mixed
from ssl_bench.evaluate.training.signals import stop_signals
from ssl_bench.progress import bar
from ssl_bench.protocols.state_file import StateFile, farewell

# The batches from one step to before another; a batch is the normalized images on the device, and as first draw the
# labels (B,).
Batches = Callable[[int, int], Generator[Views, None, None]]


class Learner(Protocol):
    """What is trained. One learner may train several variants at once (heads of a sweep)."""

    def step(self, views: Views, now: Progress) -> None:
        """One step of the optimizer; under torchrun on this process's share of the batch."""

    def predict(self) -> IntArray:
        """The predicted class of every val image by every variant, the same in every process. (variants, n)"""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to that point."""


@dataclass(frozen=True)
class Course:
    """How much to train, and what makes it this training and no other."""

    title: str  # for the progress bar
    identity: Mapping[str, Any]  # plain values; a state file belongs to one identity
    images: int
    batch: int  # over all processes
    epochs: int
    seed: int
    evaluate_epochs: int | None = None  # score val after every so many epochs; None: at the end only


@dataclass
class History:
    """The val accuracies on the way, in percent, and the predictions that matter."""

    epochs: list[int] = field(default_factory=list)
    accuracies: list[list[float]] = field(default_factory=list)  # at each of those, by variant
    best: IntArray | None = None  # (variants, n), each at its best epoch; the earlier of equal ones
    last: IntArray | None = None  # (variants, n)

    def add(self, epoch: int, predictions: IntArray, labels: IntArray) -> None:
        """What was predicted after an epoch."""
        accuracies = 100 * (predictions == labels).mean(axis=1)
        if self.best is None:
            self.best = predictions.copy()
        else:
            better = accuracies > np.max(self.accuracies, axis=0)
            self.best[better] = predictions[better]
        self.last = predictions
        self.epochs.append(epoch)
        self.accuracies.append(accuracies.tolist())


def identity(subject: Subject, split: Split, recipe: Any, protocol: str) -> dict[str, Any]:
    """What makes a training of this network on these labeled images by this recipe another one."""
    return {
        "protocol": protocol,  # with its version
        "recipe": {name: value for name, value in dataclasses.asdict(recipe).items() if name not in _ORIGIN},
        "weights": subject.checkpoint.weights_sha256,
        "architecture": dataclasses.asdict(subject.checkpoint.architecture),
        "data": [(each.manifest_sha256, each.freshness) for each in (split, subject.split("val"))],
        "dtype": subject.effort.dtype,
        "world": distributed.world_size(),
    }


_ORIGIN = ("source", "published")  # where a recipe comes from changes no number


def check_batch(images: int, batch: int) -> None:
    """A whole batch, that all processes can share equally."""
    steps_per_epoch(images, batch)
    if batch % distributed.world_size():
        raise UserError(
            f"a batch of {batch} images cannot be shared equally by {distributed.world_size()} processes; choose a "
            "multiple of their number: --set batch=..., or start another number of processes."
        )


def computed_apart(batch: int, effort: Effort) -> dict[str, str]:
    """Whether a batch is computed in parts that do not know of each other, for protocols where that changes numbers.

    (By `--batch-size`, or by processes on CPUs, between which BatchNorm is not synchronized.)
    """
    world = distributed.world_size()
    share = batch // world
    parts = next((n for n in range(1, share + 1) if share % n == 0 and share // n <= (effort.batch_size or share)), 1)
    apart = parts if effort.device.startswith("cuda") else parts * world
    return {} if apart == 1 else {"batch_parts": str(apart)}


def about_replaced(count: int) -> tuple[str, ...]:
    """What a record warns of when training images could not be read."""
    return (f"{count} broken training images were replaced, each by the next one of the split",) if count else ()


def train(course: Course, learner: Learner, data: Batches, labels: IntArray) -> History:
    """Train to the end, or go on from where the same training stopped. `labels` are those of the val images."""
    per_epoch = steps_per_epoch(course.images, course.batch)
    total = per_epoch * course.epochs
    state, history = StateFile(dataclasses.asdict(course)), History()

    def put_back(content: Mapping[str, Any]) -> None:
        nonlocal history
        kept = content["history"]
        history = History(kept["epochs"], kept["accuracies"], *(_array(kept[name]) for name in ("best", "last")))
        learner.load_state_dict(content["learner"])

    first = state.restore(put_back)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        advance: Callable[[int], None] = lambda count: None  # noqa: E731
        if distributed.rank() == 0:
            advance = stack.enter_context(bar(course.title, total))
        advance(first)
        steps = data(first, total)
        stack.callback(steps.close)
        for step in range(first, total):
            # The learner's own randomness (drop path) depends on the step alone, not on what ran before.
            torch.manual_seed(mixed(course.seed, step, distributed.rank()))
            views = next(steps)
            with memory_explained():
                learner.step(views, Progress(step, per_epoch, course.epochs))
            now = Progress(step + 1, per_epoch, course.epochs)
            if _is_time_to_evaluate(course, now):
                history.add(round(now.epoch), learner.predict(), labels)
            advance(1)
            stopped, saving = state.agreed(stop)
            if stopped or (saving and step + 1 < total):
                state.save({"learner": learner.state_dict(), "history": _kept(history)}, step + 1)
            if stopped:
                raise SystemExit(farewell(f"epoch {now.epoch:.2f} of {now.epochs}"))
    state.remove()
    return history


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """When the GPU's memory is full, say what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full: {str(error).splitlines()[0]} Compute a batch in smaller parts (--batch-size), "
            "or take --dtype bf16."
        ) from error


def _is_time_to_evaluate(course: Course, now: Progress) -> bool:
    every = course.evaluate_epochs
    return now.epoch_ended and (now.share == 1 or (every is not None and round(now.epoch) % every == 0))


def _kept(history: History) -> dict[str, Any]:
    """In plain values and tensors, for the state file."""
    best, last = (None if each is None else torch.from_numpy(each) for each in (history.best, history.last))
    return {"epochs": history.epochs, "accuracies": history.accuracies, "best": best, "last": last}


def _array(tensor: torch.Tensor | None) -> IntArray | None:
    return None if tensor is None else tensor.numpy()


@dataclass(frozen=True)
class Labeled:
    """One random view of an image, and its label."""

    view: View
    image_px: int
    patch_px: int
    labels: IntArray

    def __call__(self, image: Image.Image, index: int, rng: np.random.Generator) -> tuple[tuple[Pixels, ...], Draws]:
        """Called in a worker."""
        views = draw_views(image, (self.view,), image_px=self.image_px, patch_px=self.patch_px, rng=rng)
        return views, (self.labels[index : index + 1].reshape(()),)


def image_batches(
    subject: Subject,
    sample: Sampler,
    batch: int,
    *,
    piece: int | None = None,
    read: Callable[[Tensor], Tensor] = lambda images: images,
    broken: dict[int, str] | None = None,
) -> Batches:
    """Batches of the training images, each drawn by `sample`, normalized for the network.

    With `piece`, workers make no more than so many images at a time; the images of a process are then no consecutive
    part of the batch if there are several. `read` is what is kept of each piece of images. `broken` is filled with the
    images that were replaced because they cannot be read.
    """
    split, effort, world = subject.split("train"), subject.effort, distributed.world_size()
    share = batch // world
    parts = next(n for n in range(1, share + 1) if share % n == 0 and (piece is None or share // n <= piece))
    plan = Plan(
        sample=sample,
        batch=batch,
        accumulate=parts,
        seed=subject.seed,
        rank=distributed.rank(),
        world=world,
        workers=effort.workers,
        skip_broken=effort.skip_broken,
    )

    def draw(start: int, stop: int) -> Generator[Views, None, None]:
        data = batches(split, plan, start_step=start, stop_step=stop, broken=broken)
        device, architecture = torch.device(effort.device), subject.checkpoint.architecture
        with contextlib.closing(data):
            for _ in range(start, stop):
                pieces = []
                for _ in range(plan.accumulate):
                    views = prepared(*next(data), device=device, architecture=architecture)
                    pieces.append(Views((read(views.images[0]),), views.draws))
                yield Views(
                    (torch.cat([views.images[0] for views in pieces]),),
                    tuple(torch.cat(draws) for draws in zip(*(views.draws for views in pieces), strict=True)),
                )

    return draw
