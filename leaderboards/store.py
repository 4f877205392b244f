"""All records under a folder, as one object: `load_results().to_dataframe()`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import UserError
from ssl_bench.files import results_folder
from ssl_bench.leaderboards.record import (
    Record,
    Score,
    find_path,
    possible_paths,
    read_record,
    samples_path,
    settings_text,
)

if TYPE_CHECKING:
    import pandas

# Depth and name as record.py gives them. Files that are being written begin with a dot and end in .part.
_PATTERN = "*/*/*/*-*@v*.json"
_NUMBERS = ("value", "stderr", "std", "interval95")


@dataclass(frozen=True)
class Results:
    """The records under `root`, each with its path, and what is wrong with the files that are none."""

    root: Path
    records: tuple[Record, ...] = ()
    paths: tuple[Path, ...] = ()  # paths[i] is where records[i] was read
    problems: dict[Path, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        """The records, in the order of their paths."""
        return iter(self.records)

    def filter(self, *, protocol: str | None = None, dataset: str | None = None, model: str | None = None) -> Results:
        """The records that agree with every name given. Problems stay: what could not be read might have agreed."""
        wanted = {"protocol": protocol, "dataset": dataset, "model": model}
        kept = [
            (record, path)
            for record, path in zip(self.records, self.paths, strict=True)
            if all(name is None or getattr(record, key) == name for key, name in wanted.items())
        ]
        return Results(self.root, tuple(r for r, _ in kept), tuple(path for _, path in kept), self.problems)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a (record, metric). No row is without the origin of its number: see `path` for the rest."""
        import pandas  # most commands on records do without

        rows = [
            _row(record, metric, score, path)
            for record, path in zip(self.records, self.paths, strict=True)
            for metric, score in record.scores.items()
        ]
        frame = pandas.DataFrame(rows, columns=_COLUMNS)
        frame = frame.astype(dict.fromkeys(_NUMBERS, "float64"))
        frame["started"] = pandas.to_datetime(frame["started"], utc=True, format="ISO8601")
        return frame


_COLUMNS = [
    "model",
    "weights",
    "arch",
    "checkpoint_key",
    "dataset",
    "protocol",
    "recipe",
    "version",
    "metric",
    "value",
    "stderr",
    "std",
    "interval95",
    "n",
    "is_main",
    "limited",
    "selected_on",
    "overrides",
    "seed",
    "dtype",
    "device",
    "code_version",
    "started",
    "path",
]


def _row(record: Record, metric: str, score: Score, path: Path) -> dict[str, Any]:
    own = {
        "weights": record.weights_sha256[:12],
        "metric": metric,
        "value": score.value,
        "stderr": score.stderr,
        "std": score.std,
        "interval95": score.interval95,
        "n": score.n,
        "is_main": metric == record.main_metric,
        "overrides": settings_text(record.overrides),
        "path": str(path),
    }
    return {name: own[name] if name in own else getattr(record, name) for name in _COLUMNS}


def load_results(root: Path | str | None = None) -> Results:
    """Every record under `root` (default: SSL_BENCH_RESULTS, else ./results).

    One bad file does not hide the others: it is named in `problems`, as is a record that does not lie where its
    content belongs (copied, renamed or edited by hand), for it could be counted twice or under a wrong name.
    """
    root = results_folder() if root is None else Path(root)
    records, paths, problems = [], [], {}
    seen: dict[str, Path] = {}
    for path in sorted(root.glob(_PATTERN)):
        try:
            record = read_record(path)
            _check_place(record, path, root)
            first = seen.setdefault(record.run.key(), path)
            if first != path:
                raise UserError(f"{path}: the same run as {first}; remove one of the two.")
        except UserError as error:
            problems[path] = str(error)
        else:
            records.append(record)
            paths.append(path)
    return Results(root, tuple(records), tuple(paths), problems)


def _check_place(record: Record, path: Path, root: Path) -> None:
    places = possible_paths(record.run, root)
    if str(path).casefold() not in {str(place).casefold() for place in places}:  # some file systems ignore case
        raise UserError(f"{path}: holds the record of another run, which belongs at {places[0]}.")


def load_samples(record: Record | Path | str, root: Path | str | None = None) -> pandas.DataFrame:
    """The per-sample outcomes of a record, or of the record file at a path: `sample_id, label, prediction, correct`."""
    if isinstance(record, Record):
        found = find_path(record.run, results_folder() if root is None else Path(root))
        if found is None:
            raise UserError(f"no record of {record.model} on {record.protocol}-{record.recipe}, {record.dataset}.")
    else:
        found = Path(record)
        read_record(found)  # samples without a valid record are not to be trusted
    path = samples_path(found)
    if not path.exists():
        raise UserError(
            f"{found} has no per-sample outcomes ({path.name} is missing); its protocol does not count any."
        )
    import pandas

    return pandas.read_parquet(path)
