"""The runs that a comparison is of: by name, or by the path of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssl_bench.errors import UserError, unknown
from ssl_bench.files import expanded
from ssl_bench.leaderboards.record import Record, read_record, settings_text
from ssl_bench.leaderboards.store import Results


@dataclass(frozen=True)
class Side:
    """A record, or records that differ in nothing but the seed."""

    name: str
    records: tuple[Record, ...]
    paths: tuple[Path, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the records, in their order."""
        return tuple(record.seed for record in self.records)

    def only(self, seeds: Sequence[int]) -> Side:
        """The records of these seeds, in this order."""
        places = [self.seeds.index(seed) for seed in seeds]
        return Side(self.name, tuple(self.records[i] for i in places), tuple(self.paths[i] for i in places))


def find(run: str | Path, results: Results) -> Side:
    """The records that `run` means: a record file's path, or a name as `ssl-bench ls results` prints it.

    A name means the plain runs (the recipe as it stands, all images) of one network, with all their seeds. Where there
    is none, the only runs of that name; where there are several kinds, one has to be named by its path.
    """
    if is_path(run):
        path = expanded(run)
        record = read_record(path)
        return Side(run_name(record), (record,), (path,))
    pairs = list(zip(results.records, results.paths, strict=True))
    named = [(record, path) for record, path in pairs if run_name(record) == str(run)]
    if not named:
        raise _no_such(str(run), results)
    groups: dict[str, list[tuple[Record, Path]]] = {}
    for record, path in named:
        groups.setdefault(_but_seed(record), []).append((record, path))
    chosen = [group for group in groups.values() if not _deviations(group[0][0])] or list(groups.values())
    if len(chosen) > 1 or len({record.seed for record, _ in chosen[0]}) < len(chosen[0]):
        listed = "".join(f"\n  {path}{_remark(record)}" for record, path in named)
        raise UserError(
            f"run {str(run)!r} may be any of {len(named)} records. Give the path of the one you mean:{listed}"
        )
    ordered = sorted(chosen[0], key=lambda pair: pair[0].seed)
    return Side(str(run), tuple(record for record, _ in ordered), tuple(path for _, path in ordered))


def _no_such(run: str, results: Results) -> UserError:
    """What could not be read may be the run that is looked for."""
    broken = "".join(f"\nleft out: {problem}" for problem in results.problems.values())
    if not len(results):
        return UserError(f"run {run!r}: no records under {results.root}; run `ssl-bench run ...` first.{broken}")
    known = {run_name(record) for record in results}
    return UserError(f"{unknown('run (a file, or model/dataset/protocol/recipe)', run, known)}{broken}")


def is_path(run: str | Path) -> bool:
    """Whether `run` names a file, and not the runs of a name."""
    return isinstance(run, Path) or run.endswith(".json")


def run_name(record: Record) -> str:
    """As `ssl-bench ls results` prints it."""
    return f"{record.model}/{record.dataset}/{record.protocol}/{record.recipe}"


def _deviations(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.run.deviations.as_json().items() if name != "seed"}


def _remark(record: Record) -> str:
    deviations = {name: value for name, value in _deviations(record).items() if name != "overrides"}
    said = settings_text(record.overrides | deviations | {"seed": record.seed})
    return f"  (version {record.version}, weights {record.weights_sha256[:12]}, {said})"


def _but_seed(record: Record) -> str:
    random = record.checkpoint.format == "random"  # whose weights the seed decides
    weights = "" if random else record.weights_sha256
    return replace(record.run, weights_sha256=weights, deviations=replace(record.run.deviations, seed=0)).key()
