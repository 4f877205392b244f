"""The log of a run: JSON lines, a line for people, TensorBoard if asked for. Only process 0 writes."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from ssl_bench.evaluate.hardware import peak_memory_bytes
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.pretrain.method import Method, Training
from ssl_bench.pretrain.run_folder import RunFolder
from ssl_bench.pretrain.vitals import collapse_alarm, spread_and_rank
from ssl_bench.progress import say


class Log:
    """Gathers the terms of the loss between two lines, and times the steps."""

    def __init__(self, folder: RunFolder, recipe: Training, *, device: str, tensorboard: bool) -> None:
        self.folder, self.recipe, self.device, self.tensorboard = folder, recipe, device, tensorboard
        self.sums: dict[str, float] = {}  # since the last line; part of what is saved
        self.start(0)

    def start(self, step: int) -> None:
        """Time the steps from here on."""
        self.clock, self.clock_step = time.monotonic(), step

    def add(self, terms: Mapping[str, float]) -> None:
        """The terms of one step."""
        for name, value in {**terms, "steps": 1}.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def line(self, now: Progress, method: Method, more: Mapping[str, float]) -> None:
        """Means of the terms since the last line, speed, memory, and how the method is."""
        seconds, steps = time.monotonic() - self.clock, now.step - self.clock_step
        count = self.sums.pop("steps")
        terms = {name: value / count for name, value in self.sums.items()}
        self.sums = {}
        self.start(now.step)
        if distributed.rank() != 0:
            return
        line: dict[str, Any] = {
            "loss": sum(terms.values()),
            **terms,
            **more,
            "images_per_second": round(steps * self.recipe.batch / seconds, 1),
            "memory_bytes": peak_memory_bytes(self.device),
            **_vitals(method),
        }
        alarm = collapse_alarm(line["spread"], line["rank"], line["embeddings"]) if "spread" in line else None
        if alarm and now.epoch >= self.recipe.warmup_epochs:
            line["alarm"] = alarm
            say(f"epoch {now.epoch:.4g}: {alarm}")
        self.write(now, line)
        if not sys.stderr.isatty():
            shown = " ".join(f"{name} {value:.4f}" for name, value in terms.items())
            say(f"epoch {now.epoch:.4g} loss {line['loss']:.4f} ({shown}) {line['images_per_second']:g} images/s")

    def write(self, now: Progress, line: Mapping[str, Any]) -> None:
        """One line, to every place where lines go."""
        # JSON knows no NaN; what a diverging vital would say, the check of the loss says better.
        finite = {name: value for name, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
        self.folder.append({"step": now.step, "epoch": round(now.epoch, 4), **finite})
        if self.tensorboard:
            for name, value in finite.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, now.step)
            self._writer.flush()

    @functools.cached_property
    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote of steps that are made again is forgotten.
        return SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self.clock_step)


def _vitals(method: Method) -> dict[str, float]:
    vitals = {name: float(value.detach()) for name, value in method.vitals.items()}
    if method.momentum is not None:
        vitals["momentum"] = method.momentum
    if method.embedding is not None and method.embedding.isfinite().all():
        vitals["spread"], vitals["rank"] = spread_and_rank(method.embedding)
        vitals["embeddings"] = len(method.embedding)
    return vitals
