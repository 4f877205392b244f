"""mmengine's Runner, driven from a program: no console output, no files of its own, nothing global left changed.

    network = build({"type": "mmseg.EncoderDecoder", ...}, scope="mmseg", seed=0)
    history = train(network, course, data, optimizer, effort)
    outcome = validate(network, data, effort)

What Runner does by default and this one does not: it picks the device by itself, names all it makes after the second
in which it is started (two in one second share their state), writes configs, logs and checkpoints with absolute paths,
reseeds and reconfigures the process, asks compilers for their versions, and, when a checkpoint does not load safely,
loads it unsafely. Learning rates are a function of the step and samples one of their place (loading.py), so a state
file of weights and optimizer is all that an interrupted training needs: in one process on a CPU it goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from mmengine import ConfigDict
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import DTYPES
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.loader import Plan, steps_per_epoch
from ssl_bench.evaluate.training.seeds import mixed, seeded
from ssl_bench.evaluate.training.signals import StopFlag, stop_signals
from ssl_bench.progress import Advance, bar
from ssl_bench.protocols.openmm.loading import Packed, Samples, checked, training_batches
from ssl_bench.protocols.openmm.quiet import QuietRunner, quiet
from ssl_bench.protocols.openmm.validation import Validation, share_buffers
from ssl_bench.protocols.state_file import SAVE_SECONDS, StateFile, farewell
from ssl_bench.protocols.training import memory_explained

Outcome = dict[str, Any]  # what a metric says of all val images, in plain values; the number that counts is "main"


class Metric(Protocol):
    """From outputs to scores."""

    def read(self, sample: Mapping[str, Any]) -> Any:
        """What to keep of one image's output (an mm data sample as a dict), in the process that evaluated it."""

    def scores(self, results: list[Any]) -> Outcome:
        """Of all val images, in the order of the dataset."""


@dataclass(frozen=True)
class Course:
    """How much to train, and what makes it this training and no other."""

    title: str  # for the progress bar
    identity: Mapping[str, Any]  # plain values; a state file belongs to one identity
    steps: int
    batch: int  # over all processes
    seed: int
    evaluate_every: int | None = None  # steps; None: at the end only
    clip_norm: float | None = None


@dataclass(frozen=True)
class Data:
    """What to train on, what to score, and how."""

    train: Samples
    val: Samples
    metric: Metric


@dataclass
class History:
    """What val said on the way; the last entry is the end."""

    steps: list[int] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)  # val images that were skipped
    replaced: list[int] = field(default_factory=list)  # training images that another one stood in for
    finished: bool = False

    @property
    def best(self) -> int:
        """The place of the best main number; the earlier of equal ones."""
        return max(range(len(self.steps)), key=lambda place: (self.outcomes[place]["main"], -place))


def build(config: Mapping[str, Any], *, scope: str, seed: int) -> nn.Module:
    """A network of mmseg's or mmdet's, its new parts drawn with the seed. A config names classes or `scope.name`s."""
    with quiet(), seeded(seed, _BUILDING), DefaultScope.overwrite_default_scope(scope):
        network: nn.Module = MODELS.build(ConfigDict(config))
        network.init_weights()  # type: ignore[operator]  # of mm's BaseModel
    return network


_BUILDING = 7  # tells this stream of the seed from those of the steps and of the samples


def train(
    network: nn.Module,
    course: Course,
    data: Data,
    *,
    optimizer: torch.optim.Optimizer,
    lr_factor: Callable[[int], float],
    effort: Effort,
) -> History:
    """Train to the end, or go on from where the same training stopped; val is scored at the end, or on the way too.

    `lr_factor(step)` multiplies the learning rate with which each of the optimizer's groups was made.
    """
    steps_per_epoch(len(data.train), course.batch)  # refuses a batch that cannot be filled
    plan = plan_of(course, effort)
    state, history = _state(course, plan), History()
    with _runner(network, effort) as runner:
        wrapper = _wrapper(optimizer, course, effort)

        def put_back(content: Mapping[str, Any]) -> None:
            history.__dict__.update(content["history"])
            if not history.finished:
                network.load_state_dict(content["network"])
                wrapper.load_state_dict(content["optimizer"])

        first = state.restore(put_back)
        if history.finished:
            return history
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(stop_signals())
            advance = stack.enter_context(_bar(course.title, course.steps))
            advance(first)
            batches = training_batches(data.train, plan, range(first, course.steps))
            runner.optim_wrapper = wrapper
            loop = _TrainLoop(runner, batches, plan.accumulate, course=course, lr_factor=lr_factor)
            loop.go_on_with(first, history)
            runner._train_loop = loop
            runner._val_loop = Validation(runner, data, effort, broken=history.broken)
            runner.register_hook(_Watch(state, history, stop, advance))
            with memory_explained():
                runner.train()
    history.replaced = sorted(distributed.union(history.replaced))
    history.finished = True
    state.save({"history": dataclasses.asdict(history)}, course.steps)
    return history


def forget(course: Course, effort: Effort) -> None:
    """Remove what is kept of a training, also of a finished one: a search goes on after those that it has done."""
    _state(course, plan_of(course, effort)).remove()


def _state(course: Course, plan: Plan) -> StateFile:
    """BatchNorm and means over labeled pixels are of the parts, so with other parts it is another training."""
    return StateFile({**dataclasses.asdict(course), "parts": plan.accumulate})


def validate(network: nn.Module, data: Data, effort: Effort) -> History:
    """Score the val images without training."""
    history = History()
    with _runner(network, effort) as runner, _bar("scoring val", len(data.val)) as advance:
        runner._val_loop = Validation(runner, data, effort, broken=history.broken, advance=advance)
        outcome = runner.val()["outcome"]
    history.steps.append(0)
    history.outcomes.append(outcome)
    return history


def config_json(config: Mapping[str, Any]) -> bytes:
    """A resolved config as a file that mmengine reads: classes by their full names."""

    def plain(value: Any) -> Any:
        if isinstance(value, type) or inspect.isfunction(value):
            return f"{value.__module__}.{value.__qualname__}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        raise TypeError(f"a config holds plain values and classes, not {type(value).__name__}")

    return (json.dumps(config, indent=2, default=plain) + "\n").encode()


def plan_of(course: Course, effort: Effort) -> Plan:
    """`--batch-size` bounds how many images are computed at a time; gradients are summed over the parts."""
    world = distributed.world_size()
    if course.batch % world:
        raise UserError(
            f"a batch of {course.batch} images cannot be shared equally by {world} processes; choose a multiple of "
            "their number: --set batch=..., or start another number of processes."
        )
    share = course.batch // world
    parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= (effort.batch_size or share))
    return Plan(
        sample=_no_views,
        batch=course.batch,
        accumulate=parts,
        seed=course.seed,
        rank=distributed.rank(),
        world=world,
        workers=effort.workers,
        skip_broken=effort.skip_broken,
    )


def _no_views(*args: Any) -> Any:
    raise AssertionError("samples are made by mm's pipelines")


def _wrapper(optimizer: torch.optim.Optimizer, course: Course, effort: Effort) -> OptimWrapper:
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    clip = None if course.clip_norm is None else {"max_norm": course.clip_norm}
    options = {"optimizer": optimizer, "clip_grad": clip, "accumulative_counts": plan_of(course, effort).accumulate}
    if effort.dtype != "fp16":
        return OptimWrapper(**options)
    if not effort.device.startswith("cuda"):
        raise UserError(f"--dtype fp16 trains on CUDA only (device {effort.device}); use bf16 or fp32.")
    return AmpOptimWrapper(dtype="float16", **options)  # scales the loss


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Advance]:
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(bar(title, total)) if distributed.rank() == 0 else lambda count: None


@contextlib.contextmanager
def _runner(network: nn.Module, effort: Effort) -> Iterator[QuietRunner]:
    if distributed.world_size() == 1 or not effort.device.startswith("cuda"):
        revert_sync_batchnorm(network)  # in place, with the same parameters: torch's synchronizes GPUs only
    with quiet():
        autocast = torch.autocast(torch.device(effort.device).type, DTYPES[effort.dtype], effort.dtype != "fp32")
        network.forward = autocast(network.forward)
        runner = QuietRunner(network, effort.device)
        try:
            yield runner
        finally:
            del network.forward  # the class's own shows again


class _TrainLoop(IterBasedTrainLoop):
    """Steps of several parts, each with the learning rate and the random numbers of its step."""

    def __init__(
        self, runner: Runner, batches: Any, parts: int, *, course: Course, lr_factor: Callable[[int], float]
    ) -> None:
        super().__init__(runner, batches, course.steps, val_interval=course.evaluate_every or course.steps)
        self.parts, self.course, self.lr_factor = parts, course, lr_factor

    def go_on_with(self, step: int, history: History) -> None:
        """The first to be done, and what was found until then."""
        self._iter, self.history = step, history

    def run(self) -> nn.Module:
        """From the first step to the last."""
        wrapper, network = self.runner.optim_wrapper, self.runner.model
        wrapper.initialize_count_status(network, self._iter * self.parts, self.max_iters * self.parts)
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self._score_if_due()  # an interruption may have come between step and scoring
        with contextlib.closing(checked(self.dataloader, self.history.replaced)) as batches:
            for step in range(self._iter, self.max_iters):
                torch.manual_seed(mixed(self.course.seed, step, distributed.rank()))
                for group in wrapper.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * self.lr_factor(step)
                network.train()
                losses = [float(network.train_step(_agreed(batches), wrapper)["loss"]) for _ in range(self.parts)]
                loss = float(distributed.mean_of_all(torch.tensor(losses, device=distributed.device())).mean())
                if not math.isfinite(loss):
                    raise Diverged(_DIVERGED.format(step=step, loss=loss))
                self._iter = step + 1
                self.runner.call_hook("after_train_iter", batch_idx=step)
                self._score_if_due()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        trained: nn.Module = network
        return trained

    @property
    def is_due(self) -> bool:
        """Whether val is to be scored after this step, and was not."""
        due = self._iter % self.val_interval == 0 or self._iter == self.max_iters
        return self._iter > 0 and due and self._iter not in self.history.steps

    def _score_if_due(self) -> None:
        if self.is_due:
            self.runner.val_loop.run()


def _agreed(batches: Iterator[Packed]) -> Packed:
    """The next batch, or what is wrong with that of any process."""
    batch, error = {}, None
    try:
        batch = next(batches)
    except UserError as wrong:
        error = wrong
    distributed.refuse_together(error)
    return batch


class Diverged(UserError):  # noqa: N818  (the name says it)
    """The loss is not finite any more."""


_DIVERGED = (
    "the loss is {loss} at step {step}: the training diverged. Expected a finite one; set a smaller learning rate or a "
    "longer warm-up, or take --dtype fp32."
)


class _Watch(Hook):
    """The progress bar, the history, and saving when it is time or when the user wants to stop."""

    priority = "LOWEST"

    def __init__(self, state: StateFile, history: History, stop: StopFlag, advance: Advance) -> None:
        self.state, self.history, self.stop, self.advance = state, history, stop, advance

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Keep it."""
        assert metrics is not None
        self.history.steps.append(runner.iter)
        self.history.outcomes.append(metrics["outcome"])

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Called before the validation of the step, if there is one: it may take long, and more so than saving."""
        self.advance(1)
        stopped, saving = self.state.agreed(self.stop, seconds=60.0 if runner.train_loop.is_due else SAVE_SECONDS)
        if stopped or saving:
            self._save(runner)
        if stopped:
            raise SystemExit(farewell(f"step {runner.iter:,} of {runner.max_iters:,}"))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Several processes stop after the validation, since they have different shares of it."""
        if self.stop.signal is not None and distributed.world_size() == 1:
            self._save(runner)
            raise SystemExit(farewell(f"step {runner.iter:,} of {runner.max_iters:,}, while val was scored"))

    def _save(self, runner: Runner) -> None:
        share_buffers(runner.model)  # those of the first process are kept
        network = runner.model.module if hasattr(runner.model, "module") else runner.model
        content = {"network": network.state_dict(), "optimizer": runner.optim_wrapper.state_dict()}
        self.state.save({**content, "history": dataclasses.asdict(self.history)}, runner.iter)
