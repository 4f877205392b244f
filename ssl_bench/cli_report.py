"""`ssl-bench report`: the results as a folder of HTML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A new folder, or an older report, which the new one replaces.")
    ],
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            help="A run folder of `ssl-bench pretrain`, or a folder of such folders, for learning curves; repeatable. "
            "The runs of checkpoints that were scored are found without it."
        ),
    ] = None,
) -> None:
    """Write all results as static HTML: leaderboards, the papers' tables, curves, pictures, all runs.

    Open index.html in a browser: no server is needed, and nothing is loaded from outside. Prints its path.
    """
    from ssl_bench.files import expanded
    from ssl_bench.leaderboards.report.build import build
    from ssl_bench.leaderboards.report.words import plural
    from ssl_bench.leaderboards.store import load_results
    from ssl_bench.progress import say

    results = load_results()
    if results.problems:
        say(f"ssl-bench: {plural(len(results.problems), 'file')} could not be read as records; records.html lists them")
    index = build(results, expanded(out), [expanded(folder) for folder in runs or []])
    sys.stdout.write(f"{index}\n")
