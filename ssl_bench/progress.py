"""One progress bar for everything that takes long: on stderr, gone when done, silent where nobody looks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
Report = Callable[[int, int], None]  # done so far, of how many


@contextlib.contextmanager
def bar(description: str, total: int) -> Iterator[Advance]:
    """`with bar("reading", 100) as advance: ... advance(1)`. Shows speed and remaining time."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def follow(description: str) -> Iterator[Report]:
    """`with follow("drawing") as report: work(progress=report)`, where work calls report(done, total).

    The bar opens with the first report: only then is the total known, and what `work` does before may show a bar of
    its own, of which the terminal takes one at a time.
    """
    advance: Advance | None = None
    shown = 0
    with contextlib.ExitStack() as stack:

        def report(done: int, total: int) -> None:
            nonlocal advance, shown
            if advance is None:
                advance = stack.enter_context(bar(description, total))
            advance(done - shown)
            shown = done

        yield report


def say(text: str) -> None:
    """One line to stderr: what a person wants to know and a program does not."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
