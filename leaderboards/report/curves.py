"""Learning curves: loss and k-NN accuracy against epoch, several runs in one chart (ExtreMA's Figures 4 and 5).

Losses are drawn together only where they are sums of the same terms: the loss of one method says nothing about the
loss of another. k-NN accuracy is the monitor's (`ssl-bench pretrain --monitor-epochs 1`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_bench.errors import UserError
from ssl_bench.leaderboards.report.charts import COLORS, Chart, Point, Series
from ssl_bench.leaderboards.report.words import finite, plural
from ssl_bench.leaderboards.store import Results

LOG = "log.jsonl"
CHARTS = 24  # on one page
_POINTS = 400  # of a curve: more than the pixels it is drawn on would show
_MONITORS = {"knn_cls": "k-NN, class token", "knn_patch_mean": "k-NN, mean of patches"}


@dataclass(frozen=True)
class TrainingLog:
    """One run's log, as far as it can be read."""

    name: str
    lines: tuple[dict[str, Any], ...]
    damaged: int  # lines

    @property
    def terms(self) -> tuple[str, ...]:
        """What the loss is a sum of: the names that stand between it and the learning rate."""
        for line in self.lines:
            names = list(line)
            if "loss" in names and "lr" in names:
                return tuple(names[names.index("loss") + 1 : names.index("lr")])
        return ()

    @property
    def origin(self) -> str:
        """Which file it is, and how far it goes."""
        steps = [step for line in self.lines if (step := finite(line.get("step"))) is not None]
        return f"{self.name}/{LOG}" + (f" ({plural(int(max(steps)), 'step')})" if steps else "")

    def curve(self, name: str) -> tuple[Point, ...]:
        """One number against epoch; of a long run every so many lines, and the last."""
        places = [(finite(line.get("epoch")), finite(line.get(name))) for line in self.lines]
        points = [Point(x, y) for x, y in places if x is not None and y is not None]
        every = math.ceil(len(points) / _POINTS) if points else 1
        kept = points[::every]
        return tuple(kept if not points or kept[-1] == points[-1] else [*kept, points[-1]])


def read_logs(folders: Sequence[Path], results: Results) -> list[TrainingLog]:
    """The logs of run folders, of folders of run folders, and of the runs whose checkpoints were scored."""
    found: dict[Path, str] = {}
    for folder in folders:
        logs = sorted([folder / LOG, *folder.glob(f"*/{LOG}")])
        logs = [log for log in logs if log.is_file()]
        if not logs:
            raise UserError(
                f"--runs {folder}: expected the folder of a run (with {LOG}) or a folder of such folders, found "
                f"{'neither' if folder.exists() else 'nothing'}. `ssl-bench pretrain ... --out DIR` writes one."
            )
        for log in logs:
            found.setdefault(log.resolve(), log.parent.resolve().name)
    for record in results:
        beside = log_of(record.checkpoint.spec)
        if beside is not None:
            found.setdefault(beside, record.model)
    names = _distinct(found)
    return [_read(path, names[path]) for path in sorted(found, key=lambda path: (names[path], str(path)))]


def log_of(spec: str) -> Path | None:
    """The log beside a checkpoint that `ssl-bench pretrain` wrote."""
    place = Path(os.path.expanduser(spec))  # of "~nobody", pathlib makes an error
    with contextlib.suppress(OSError, ValueError):
        log = (place if place.is_dir() else place.parent) / LOG
        if place.exists() and log.is_file():
            return log.resolve()
    return None


def _distinct(names: dict[Path, str]) -> dict[Path, str]:
    """Where two runs share a name, the folder above tells them apart, and then a number."""
    counts: dict[str, int] = defaultdict(int)
    for name in names.values():
        counts[name] += 1
    longer = {path: name if counts[name] == 1 else f"{path.parent.parent.name}/{name}" for path, name in names.items()}
    seen: dict[str, int] = defaultdict(int)
    for path in sorted(longer, key=str):
        seen[longer[path]] += 1
        if seen[longer[path]] > 1:
            longer[path] += f" ({seen[longer[path]]})"
    return longer


def _read(path: Path, name: str) -> TrainingLog:
    """A log that is being written ends in half a line; it is counted, not refused."""
    lines, damaged = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            damaged += 1
    return TrainingLog(name, tuple(lines), damaged)


def charts(logs: Sequence[TrainingLog]) -> tuple[list[Chart], list[str]]:
    """k-NN first, for it can be compared; then the losses, a chart for each sum of terms. And what is left out."""
    drawn: list[Chart] = []
    for name, what in _MONITORS.items():
        drawn += _in_parts(f"{what}, while training", f"{what}, %", logs, name)
    by_terms: dict[tuple[str, ...], list[TrainingLog]] = defaultdict(list)
    for log in logs:
        by_terms[log.terms].append(log)
    for terms, together in sorted(by_terms.items()):
        title = f"Loss: {' + '.join(terms)}" if terms else "Loss"
        drawn += _in_parts(title, "loss", together, "loss")
    more = len(drawn) - CHARTS
    remarks = [f"{plural(more, 'more chart')}; name fewer folders with --runs"] if more > 0 else []
    remarks += [f"{plural(log.damaged, 'unreadable line')} of the log of {log.name}" for log in logs if log.damaged]
    remarks += [f"{log.name}: no line of its log has an epoch and a loss" for log in logs if not log.curve("loss")]
    return drawn[:CHARTS], remarks


def has_accuracy(logs: Sequence[TrainingLog]) -> bool:
    """Whether any of them was monitored."""
    return any(log.curve(name) for log in logs for name in _MONITORS)


def _in_parts(title: str, y_label: str, logs: Iterable[TrainingLog], name: str) -> Iterable[Chart]:
    """More runs than colors make several charts."""
    drawn = [(log, Series(log.name, points)) for log in logs if (points := log.curve(name))]
    parts = [drawn[at : at + COLORS] for at in range(0, len(drawn), COLORS)]
    for place, part in enumerate(parts, 1):
        suffix = f" ({place} of {len(parts)})" if len(parts) > 1 else ""
        caption = f"From {', '.join(log.origin for log, _ in part)}."
        yield Chart(title + suffix, "epoch", y_label, tuple(series for _, series in part), caption)
