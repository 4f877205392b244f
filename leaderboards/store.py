"""All records under a folder, as one object: `load_results().to_dataframe()`."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import UserError
from ssl_bench.files import results_folder
from ssl_bench.leaderboards.attachments import SAMPLE_COLUMNS
from ssl_bench.leaderboards.record import (
    Record,
    Run,
    find_path,
    ordinary_place,
    possible_paths,
    read_record,
    samples_path,
    settings_text,
)

if TYPE_CHECKING:
    import pandas

# Depth and name as record.py gives them. Files that are being written begin with a dot and end in .part.
_DEPTH = 3  # folders
_NAME = re.compile(r".*-.*@v.*\.json", re.DOTALL)
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
        return self.take(
            index
            for index, record in enumerate(self.records)
            if all(name is None or getattr(record, key) == name for key, name in wanted.items())
        )

    def take(self, indices: Iterable[int]) -> Results:
        """The records of these places, with their paths, and all problems."""
        kept = list(indices)
        records, paths = self.records, self.paths
        return Results(self.root, tuple(records[i] for i in kept), tuple(paths[i] for i in kept), self.problems)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a (record, metric). No row is without the origin of its number: see `path` for the rest."""
        import pandas  # most commands on records do without

        columns: dict[str, list[Any]] = {name: [getattr(record, name) for record in self] for name in _OF_THE_RECORD}
        columns["weights"] = [record.weights_sha256[:12] for record in self]
        columns["overrides"] = [settings_text(record.overrides) for record in self]
        columns["path"] = [str(path) for path in self.paths]
        records = pandas.DataFrame(columns)
        records["started"] = pandas.to_datetime(records["started"], utc=True, format="ISO8601")

        scores = [score for record in self for score in record.scores.values()]
        columns = {name: [getattr(score, name) for score in scores] for name in (*_NUMBERS, "n")}
        columns["metric"] = [metric for record in self for metric in record.scores]
        columns["is_main"] = [metric == record.main_metric for record in self for metric in record.scores]
        rows = [row for row, record in enumerate(self) for _ in record.scores]
        frame = pandas.DataFrame(columns).astype(dict.fromkeys(_NUMBERS, "float64"))
        return frame.join(records.take(rows).reset_index(drop=True))[_COLUMNS]


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


_OF_THE_RECORD = [name for name in _COLUMNS if name in Record.__struct_fields__ and name != "overrides"]


def load_results(root: Path | str | None = None) -> Results:
    """Every record under `root` (default: SSL_BENCH_RESULTS, else ./results).

    One bad file does not hide the others: it is named in `problems`, as is a record that does not lie where its
    content belongs (copied, renamed or edited by hand), for it could be counted twice or under a wrong name.
    """
    root = results_folder() if root is None else Path(root)
    records: list[Record] = []
    paths: list[Path] = []
    problems: dict[Path, str] = {}
    seen: dict[str, int] = {}  # the first record of each ordinary place: equal runs have the same one
    within = str(root / "_")[:-1]  # so that strings become the same as paths, in less time
    with collector_at_rest():
        for place in _places(root, problems):
            path = Path(within + place)
            try:
                record = read_record(within + place)
                ordinary = ordinary_place(record)
                if place != ordinary:
                    _check_place(record.run, path, root)
                if (first := seen.setdefault(ordinary, len(records))) < len(records):
                    _refuse_twice(record, path, records[first:], paths[first:])
            except UserError as error:
                problems[path] = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
            else:
                records.append(record)
                paths.append(path)
    return Results(root, tuple(records), tuple(paths), problems)


def _refuse_twice(record: Record, path: Path, others: Sequence[Record], paths: Sequence[Path]) -> None:
    for other, place in zip(others, paths, strict=True):
        if record.run.key() == other.run.key():
            raise UserError(f"{path}: the same run as {place}; remove one of the two.")


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """No garbage collection: it would go through all records again and again, and they hold no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.unfreeze()  # together: what is new counts as old, without a look at each
            gc.enable()


def _places(root: Path, problems: dict[Path, str]) -> Iterator[str]:
    """What lies where a record may lie and is named like one, in the order of paths; a folder is joined by "/"."""
    folders = [""]
    for _ in range(_DEPTH):
        folders = [f"{folder}{name}/" for folder in folders for name in _names(root, folder, problems)]
    for folder in folders:
        for name in _names(root, folder, problems):
            if _NAME.fullmatch(name):
                yield folder + name


def _names(root: Path, folder: str, problems: dict[Path, str]) -> list[str]:
    """What is in a folder: nothing if it is none, and a problem if it cannot be read."""
    try:
        return sorted(os.listdir(os.path.join(root, folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        problems[root / folder] = f"{root / folder}: cannot be read ({error.strerror})."
        return []


def _check_place(run: Run, path: Path, root: Path) -> None:
    places = possible_paths(run, root)
    if str(path).casefold() not in {str(place).casefold() for place in places}:  # some file systems ignore case
        raise UserError(f"{path}: holds the record of another run, which belongs at {places[0]}.")


def load_samples(record: Record | Path | str, root: Path | str | None = None) -> pandas.DataFrame:
    """The per-sample outcomes of a record, or of the record file at a path: `sample_id, label, prediction, correct`.

    Whole or not at all: an id that stands twice, or an outcome that is missing, would be counted as something.
    """
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
    import pyarrow

    try:
        frame = pandas.read_parquet(path)
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        raise _damaged(path, f"cannot be read ({str(error).partition(chr(10))[0]})") from error
    kinds = {name: frame[name].dtype.kind for name in SAMPLE_COLUMNS if name in frame}
    if kinds != _KINDS or len(frame.columns) != len(kinds):
        raise _damaged(path, f"expected the columns {', '.join(_KINDS)}, without gaps, found {dict(frame.dtypes)}")
    ids = frame["sample_id"]
    if not len(ids) or not all(isinstance(name, str) for name in ids) or ids.duplicated().any():
        raise _damaged(path, f"expected one row or more, each with an id of its own, found {len(ids)} rows")
    return frame


_KINDS = {"sample_id": "O", "label": "i", "prediction": "i", "correct": "b"}  # of numpy, which has no gaps but in "O"


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}. The file is damaged; do the run again with --overwrite always.")
