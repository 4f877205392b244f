"""Stopping on request: SIGTERM and Ctrl-C let the current step finish."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopFlag:
    """Set by a signal, read after every step."""

    signal: int | None = None
    at: float = 0.0


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """SIGTERM and Ctrl-C let the step finish; a second Ctrl-C stops at once."""
    flag = StopFlag()

    def note(number: int, frame: FrameType | None) -> None:
        # A scheduler may signal twice (itself and torchrun), and a terminal's Ctrl-C may come twice at once.
        if flag.signal is not None and number == signal.SIGINT and time.monotonic() - flag.at > 2:
            raise KeyboardInterrupt
        if flag.signal is None:
            flag.signal, flag.at = number, time.monotonic()

    before = {}
    with contextlib.suppress(ValueError):  # signals reach the main thread only
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
