"""Time things fairly on a machine that others use too: alternate the candidates, report medians and their ratio."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call, when the threads of the one before have stopped spinning."""
    time.sleep(1)
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternate(actions: dict[str, Callable[[], object]], repeats: int = 3) -> dict[str, float]:
    """Median seconds of each action, measured in turn (A B A B ...), after one uncounted call of each."""
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(seconds(action))
    return {name: statistics.median(values) for name, values in times.items()}


def python(*arguments: str) -> Callable[[], object]:
    """A whole process of this interpreter."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def report(title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """What was measured, the figure, and the goal."""
    print(f"\n{title}")
    for what, figure, goal in rows:
        print(f"  {what:<72} {figure:>12}   {goal}")
