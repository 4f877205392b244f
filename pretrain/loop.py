"""The training loop, the same for every method: read from top to bottom.

A step: views of a batch -> the method's losses -> gradient -> AdamW -> teachers move. Everything that a step depends on
is a function of (seed, step) or is in training.pt, so a resumed run is the uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.backbone import Backbone
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.hardware import choose_attention
from ssl_bench.evaluate.splits import Split
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.augment import augmentation_named
from ssl_bench.evaluate.training.loader import Batch, Plan, Views, batches, prepared, steps_per_epoch
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.evaluate.training.seeds import mixed
from ssl_bench.evaluate.training.signals import StopFlag, stop_signals
from ssl_bench.pretrain.log import Log
from ssl_bench.pretrain.method import MethodModule, Sampling, Training
from ssl_bench.pretrain.optimization import clip_gradients, make_optimizer, set_schedules
from ssl_bench.pretrain.run_folder import RunFolder, flat
from ssl_bench.progress import bar, say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Monitor = Callable[[Backbone], dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """How to run. Of these seed and dtype change what is learned.

    Accumulation and the number of processes change last digits, and which paths stochastic depth drops.
    """

    out: Path
    device: str = "cpu"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    resume: bool = False
    accumulate: int = 1  # parts of a batch, one after the other
    workers: int | None = None
    compile: bool = False
    log_steps: int = 50
    checkpoint_minutes: float = 30.0
    keep_epochs: int | None = None  # keep a checkpoint of every so many epochs
    monitor_epochs: int | None = None
    tensorboard: bool = False
    skip_broken: bool = False


@dataclass(frozen=True)
class Job:
    """What to train on what."""

    name: str
    module: MethodModule
    recipe: Training
    split: Split
    origin: Mapping[str, object]
    base: Checkpoint | None = None
    monitor: Monitor | None = None


def train(job: Job, settings: Settings) -> Path:
    """Train to the end of the recipe, or go on from where the folder's run stopped. Returns the checkpoint's path."""
    run = Run(job, settings)
    run.begin()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        advance: Callable[[int], None] = lambda count: None  # noqa: E731
        if distributed.rank() == 0:
            advance = stack.enter_context(bar(f"pre-training {job.name}", run.total_steps))
        advance(run.step)
        data = batches(job.split, run.plan, start_step=run.step, stop_step=run.total_steps)
        stack.callback(data.close)
        for _ in range(run.step, run.total_steps):
            stopped = run.advance(run.next_parts(data), stop)
            advance(1)
            if stopped:
                run.save()
                raise SystemExit(_farewell(run.now))
        run.finish()
    return settings.out / "checkpoint.pt"


class Run:
    """One training: the network, its optimizer, and how far it is."""

    def __init__(self, job: Job, settings: Settings) -> None:
        """Check all that can be checked, and build. Nothing is written yet."""
        self.job, self.settings, self.recipe = job, settings, job.recipe
        self.architecture = named(self.recipe.arch)
        _check(settings)
        self.steps_per_epoch = steps_per_epoch(len(job.split), self.recipe.batch)
        self.total_steps = self.steps_per_epoch * self.recipe.epochs
        self.plan = self._plan()
        self.folder = RunFolder(settings.out)
        self.device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        method = job.module.make(self.recipe, self.architecture, job.base)
        if method.compares_images and settings.accumulate > 1:
            raise UserError(
                f"--accumulate {settings.accumulate}: {job.name} compares the images of a batch with each other, so "
                "parts of a batch would learn something else. Use more processes (torchrun), or a smaller batch "
                "(--set batch=...)."
            )
        self.method = method.to(self.device).train()
        self._choose_attention()
        self.trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.method, self.recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == "fp16")
        self.model: nn.Module = self.method
        if settings.compile:
            for module in self.method.modules():
                if isinstance(module, Block):
                    module.compile()
        if distributed.world_size() > 1:
            self.model = distributed.replicated(self.method)
        self.step = 0
        self.saved_at = time.monotonic()
        self.log = Log(self.folder, self.recipe, device=settings.device, tensorboard=settings.tensorboard)

    def _choose_attention(self) -> None:
        tokens = self.architecture.grid**2
        choose_attention(self.method.modules(), device=self.settings.device, tokens=tokens)

    def _plan(self) -> Plan:
        settings, recipe = self.settings, self.recipe
        return Plan(
            sample=Sampling(
                augmentation_named(recipe.augmentation),
                self.architecture.image_px,
                self.architecture.patch_px,
                functools.partial(self.job.module.draw, recipe, self.architecture),
            ),
            batch=recipe.batch,
            accumulate=settings.accumulate,
            seed=settings.seed,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=settings.workers,
            skip_broken=settings.skip_broken,
        )

    @property
    def now(self) -> Progress:
        """How far it is."""
        return Progress(self.step, self.steps_per_epoch, self.recipe.epochs)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed. The number of processes need not: data do not depend on it."""
        return {
            "method": self.job.name,
            **flat(dataclasses.asdict(self.recipe)),
            "data": self.job.split.manifest_sha256,
            "seed": self.settings.seed,
            "dtype": self.settings.dtype,
            "base": None if self.job.base is None else self.job.base.weights_sha256,
        }

    def begin(self) -> None:
        """Open the folder; restore the state of an interrupted run."""
        distributed.on_first(lambda: self.folder.begin(resume=self.settings.resume))
        if not self.settings.resume:
            return
        state = self.folder.read(self.identity)
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.log.sums = dict(state["sums"])
        self.log.start(self.step)
        distributed.on_first(lambda: self.folder.cut_log(self.step))
        if distributed.rank() == 0:
            say(f"going on from step {self.step} of {self.total_steps} (epoch {self.now.epoch:.1f})")

    def next_parts(self, data: Iterator[Batch]) -> list[Views]:
        """The parts of the next batch. An image that cannot be read ends the run, but loses nothing of it."""
        try:
            batches_of_parts = list(itertools.islice(data, self.settings.accumulate))
        except UserError:
            if self.step and distributed.world_size() == 1:
                self.save()
            raise
        return [prepared(*batch, device=self.device, architecture=self.architecture) for batch in batches_of_parts]

    def advance(self, parts: Iterable[Views], stop: StopFlag) -> bool:
        """One step on the parts of a batch. Returns whether a signal asked to stop."""
        # The method's own randomness (stochastic depth) depends on the step alone, not on what ran before.
        torch.manual_seed(mixed(self.settings.seed, self.step, distributed.rank()))
        lr, weight_decay = set_schedules(self.optimizer, self.recipe, self.now)
        after = dataclasses.replace(self.now, step=self.step + 1)
        logging = after.step % self.settings.log_steps == 0 or after.step == self.total_steps
        saving = self._is_time_to_save(after)
        self.method.watching = logging
        terms = self.gradients(parts)
        stopped, saving = self._agree(terms, stop, saving)
        norm = self.update(check=logging or saving or stopped)
        self.method.after_step(after)
        self.step = after.step
        if logging:
            self.log.line(self.now, self.method, {"lr": lr, "weight_decay": weight_decay, "grad_norm": float(norm)})
        if stopped:
            return True
        if saving and self.step < self.total_steps:
            self.save()
        if self._is_time_to_monitor(after):
            self._monitor()
        return False

    def gradients(self, parts: Iterable[Views]) -> dict[str, Tensor]:
        """Forward and backward over the parts of a batch; returns the terms, averaged over the parts."""
        dtype = DTYPES[self.settings.dtype]
        terms: dict[str, Tensor] = {}
        count = self.plan.accumulate
        for number, views in enumerate(parts):
            # Gradients are averaged over processes once, in the last part.
            waits = isinstance(self.model, DistributedDataParallel) and number < count - 1
            with self.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                    losses: dict[str, Tensor] = self.model(views)
                total = torch.stack(list(losses.values())).sum() / count
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                terms[name] = terms.get(name, 0.0) + value.detach().float() / count
        return terms

    def update(self, *, check: bool) -> Tensor:
        """Clip, step, forget the gradient; returns its norm. A gradient that is not finite stops the run if checked."""
        norm = torch.tensor(math.nan)
        if check or self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            norm = clip_gradients(self.trained, self.recipe)
        # fp16 gradients may overflow: the scaler leaves such steps out, and lowers its scale.
        if check and not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise self._not_finite("the gradient's norm", float(norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if check and self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3:
            raise self._not_finite("the fp16 gradient does not fit any scale; its norm", float(norm))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _agree(self, terms: Mapping[str, Tensor], stop: StopFlag, saving: bool) -> tuple[bool, bool]:
        """One exchange a step: terms averaged over processes; was any told to stop, is it time to save for any?"""
        flags = [torch.tensor(float(flag), device=self.device) for flag in (stop.signal is not None, saving)]
        *values, stopped, save = distributed.mean_of_all(torch.stack([*terms.values(), *flags])).tolist()
        for name, value in zip(terms, values, strict=True):
            if not math.isfinite(value):
                raise self._not_finite(f"the term {name}", value)
        self.log.add(dict(zip(terms, values, strict=True)))
        return stopped > 0, save > 0

    def _not_finite(self, what: str, value: float) -> UserError:
        last = "The last checkpoint stays as it is" if self.folder.training.exists() else "Nothing was saved yet"
        return UserError(
            f"{what} is {value} at step {self.step + 1} (epoch {self.now.epoch:.2f}). {last}. Try a smaller learning "
            "rate (--set base_lr=...), a longer warm-up, gradient clipping (--set clip=1), or --dtype fp32."
        )

    def _is_time_to_save(self, after: Progress) -> bool:
        keep = self.settings.keep_epochs
        return (
            time.monotonic() - self.saved_at > 60 * self.settings.checkpoint_minutes
            or (keep is not None and after.epoch_ended and round(after.epoch) % keep == 0)
            or self._is_time_to_monitor(after)  # first, so that whatever happens there loses nothing
            or after.step == self.total_steps
        )

    def _is_time_to_monitor(self, after: Progress) -> bool:
        every = self.settings.monitor_epochs
        return every is not None and after.epoch_ended and (round(after.epoch) % every == 0 or after.share == 1)

    def save(self) -> None:
        """Write checkpoint and state; the other processes wait."""
        keep = self.settings.keep_epochs
        kept = keep is not None and self.now.epoch_ended and round(self.now.epoch) % keep == 0
        name = f"checkpoint-epoch{round(self.now.epoch):04d}.pt" if kept else None
        origin = {**self.job.origin, "epochs_done": round(self.now.epoch, 4), "steps_done": self.step}
        state = {
            "identity": self.identity,
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.log.sums,
        }
        distributed.on_first(lambda: self.folder.write(state, self.method, origin, name))
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        """The last checkpoint."""
        self.save()
        if distributed.rank() == 0:
            say(f"{self.settings.out / 'checkpoint.pt'}: {self.recipe.epochs} epochs, {self.total_steps} steps")

    def _monitor(self) -> None:
        """The k-NN accuracy at the chosen epochs, for the log."""

        def score() -> None:
            assert self.job.monitor is not None
            network = next(iter(self.method.saved().networks.values()))
            with torch.no_grad():
                scores = self.job.monitor(network)
            self.log.write(self.now, scores)
            say(f"epoch {self.now.epoch:g}: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))

        distributed.on_first(score)
        self.method.train()
        self._choose_attention()  # evaluation may have chosen for other image sizes


def _check(settings: Settings) -> None:
    if settings.dtype not in DTYPES:
        raise UserError(f"--dtype {settings.dtype}: expected fp32, bf16 or fp16.")
    if settings.dtype == "fp16" and not settings.device.startswith("cuda"):
        raise UserError("--dtype fp16 needs a CUDA device; use bf16 or fp32 here.")
    for name in ("accumulate", "log_steps", "keep_epochs", "monitor_epochs"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1.")
    for name in ("seed", "workers", "checkpoint_minutes"):
        value = getattr(settings, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 0 or more.")
    if settings.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise UserError(
                "--tensorboard: the package tensorboard is not installed (pip install tensorboard)."
            ) from None


def _farewell(now: Progress) -> int:
    """Ctrl-C ends as SIGTERM does: there is more to do, and nothing went wrong."""
    if distributed.rank() == 0:
        say(f"stopped after step {now.step} (epoch {now.epoch:.2f}) and saved; the same command with --resume goes on")
    return 128 + signal.SIGTERM
