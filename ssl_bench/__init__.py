"""ssl-bench: measure self-supervised vision transformers the way their papers do, and pre-train them.

    import ssl_bench
    checkpoint = ssl_bench.open_checkpoint("x.pth")
    records = ssl_bench.run("x.pth", "knn", dataset="digits")
    path = ssl_bench.train("moca", "toy", "runs/moca", settings={"epochs": 4})
    ssl_bench.load_results().to_dataframe()
    ssl_bench.published("moca", 8)
    ssl_bench.leaderboard("moca:8")

What is listed here is imported when it is used, so that `import ssl_bench` costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

    from ssl_bench.errors import UserError as UserError
    from ssl_bench.evaluate.checkpoints import open_checkpoint as open_checkpoint
    from ssl_bench.evaluate.datasets import open_dataset as open_dataset
    from ssl_bench.leaderboards.paired import compare as compare
    from ssl_bench.leaderboards.published import published as published
    from ssl_bench.leaderboards.record import Record
    from ssl_bench.leaderboards.store import Results
    from ssl_bench.leaderboards.store import load_results as load_results

__version__ = "0.1.0.dev0"
__all__ = [
    "UserError",
    "compare",
    "leaderboard",
    "load_results",
    "open_checkpoint",
    "open_dataset",
    "published",
    "run",
    "train",
]

_HOME = {
    "UserError": "ssl_bench.errors",
    "open_checkpoint": "ssl_bench.evaluate.checkpoints",
    "open_dataset": "ssl_bench.evaluate.datasets",
    "compare": "ssl_bench.leaderboards.paired",
    "load_results": "ssl_bench.leaderboards.store",
    "published": "ssl_bench.leaderboards.published",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ssl_bench' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def run(ckpt: str | Path, protocol: str | Sequence[str] = "knn", **options: Any) -> list[Record]:
    """Score a checkpoint by one or several protocols, and return the records (see running.Options for the options)."""
    from ssl_bench import running
    from ssl_bench.leaderboards.standing import as_typed

    _require_known(options, running.Options, "run")
    for name, value in options.items():
        if name in ("settings", "arch"):  # as they would be typed: {"neighbors": (5, 10)} is {"neighbors": "5,10"}
            options[name] = {key: as_typed(entry) for key, entry in value.items()}
        elif name == "results" or name.endswith("_list"):
            options[name] = None if value is None else Path(value)
    return running.run(ckpt, protocol, running.Options(**options))


def train(method: str, data: str | Path, out: str | Path, **options: Any) -> Path:
    """Pre-train, and return the path that `run` opens (see pretraining.Options for the options)."""
    from ssl_bench import pretraining
    from ssl_bench.leaderboards.standing import as_typed

    _require_known(options, pretraining.Options, "train")
    options["settings"] = {key: as_typed(entry) for key, entry in options.get("settings", {}).items()}
    return pretraining.train(method, data, out, pretraining.Options(**options))


def leaderboard(
    of: str | Results | None = None, results: Results | None = None, *, diff: bool = False
) -> pandas.DataFrame:
    """All records (`leaderboard()`, or some: `leaderboard(results)`), or a paper's table with ours beside its numbers.

    `leaderboard("moca:8", diff=True)` has a row a number that was measured. What to read beneath is in
    `frame.attrs["notes"]`, and `ssl_bench.leaderboards.table.render` prints it all.
    """
    from ssl_bench.errors import UserError
    from ssl_bench.leaderboards import beside, store, table

    if isinstance(of, str):
        of = of.lower()
        shown = store.load_results() if results is None else results
        return beside.differences(of, shown) if diff else beside.paper_table(of, shown)
    if diff or results is not None:
        raise UserError('leaderboard: expected a paper\'s table first, as in leaderboard("moca:8", diff=True).')
    return table.leaderboard(store.load_results() if of is None else of)


def _require_known(options: dict[str, Any], fields_of: type, what: str) -> None:
    import dataclasses

    from ssl_bench.errors import unknown

    known = [field.name for field in dataclasses.fields(fields_of)]
    for name in options:
        if name not in known:
            raise unknown(f"option of {what}", name, known)
