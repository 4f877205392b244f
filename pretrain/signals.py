"""Stopping on request: SIGTERM and Ctrl-C let the current step finish."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopFlag:
    """Set by a signal, read after every step."""

    signal: int | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """SIGTERM and Ctrl-C let the step finish; a second Ctrl-C stops at once."""
    flag = StopFlag()

    def note(number: int, frame: FrameType | None) -> None:
        if flag.signal is not None:
            raise KeyboardInterrupt
        flag.signal = number

    before = {}
    with contextlib.suppress(ValueError):  # signals reach the main thread only
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
