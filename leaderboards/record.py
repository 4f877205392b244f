"""A score and everything it depends on: one JSON file a (checkpoint, dataset, protocol, recipe).

    {results}/{model}/{weights_sha12}/{dataset}/{protocol}-{recipe}@v{version}.json              the plain run
    {results}/{model}/{weights_sha12}/{dataset}/{protocol}-{recipe}@v{version}+{sha8}.json       any other run
    ... .samples.parquet beside it, where samples are counted

Two different runs never share a file, and no run is taken for another:

1. The plain run is the recipe as it stands: no overrides, all samples, seed 0, fp32, the checkpoint key that the
   method itself uses, broken images refused. Every deviation goes into `sha8`, the first 8 digits of the sha256 of
   the canonical JSON (sorted keys) of the deviations alone. The order in which they were given does not matter.
2. A path holds names, and names lie: a dataset of the same name may have other content, and "a/b" and "a b" give the
   same folder. So a file is taken for a run only if the whole `Run` inside it is the same, dataset manifests and full
   sha256 of the weights included; and a run whose file is taken by another run goes to `+{sha8}` of its whole `Run`.

A run that failed leaves no record: `done` is the only status, and the same command again does what is missing.
Nothing here imports torch, pandas or (before samples are written) pyarrow: finding that all is done must be quick.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from ssl_bench.errors import UserError
from ssl_bench.files import atomic_file, results_folder
from ssl_bench.leaderboards.attachments import replace_folder, write_samples
from ssl_bench.leaderboards.strict_json import Strict, canonical, content_of, loads, parse, plain, read_quickly

SCHEMA_VERSION = 1  # there is no older one yet; `_read_carefully` would be the place to bring one up to date


class Score(Strict, frozen=True):
    """One metric, in percent unless its name says otherwise.

    Its uncertainty is the standard error over `n` samples, the standard deviation over `n` splits or repetitions
    (meaningless without its `ddof`), or half the 95 % confidence interval of a mean over `n` episodes.
    """

    value: float
    n: int
    stderr: float | None = None
    std: float | None = None
    ddof: Literal[0, 1] | None = None
    interval95: float | None = None

    def __post_init__(self) -> None:
        """Refuse an uncertainty that cannot be read in one way only."""
        if self.n < 1:
            raise UserError(f"n: expected at least 1, found {self.n}.")
        spreads = (self.stderr, self.std, self.interval95)
        if spreads.count(None) < 2:
            given = [name for name in _SPREADS if getattr(self, name) is not None]
            raise UserError(f"{', '.join(given)}: expected one of them, found {len(given)}.")
        if (self.std is None) != (self.ddof is None):
            raise UserError(f"ddof: expected with std and only with it, found std={self.std}, ddof={self.ddof}.")
        spread = next(filter(None, spreads), 0.0)
        if spread < 0:
            raise UserError(f"{_SPREADS[spreads.index(spread)]}: expected at least 0, found {spread}.")


_SPREADS = ("stderr", "std", "interval95")


class SampleCounts(Strict, frozen=True):
    """Samples a split: as the dataset has them, and as the protocol used them."""

    original: dict[str, int]
    evaluated: dict[str, int]

    def __post_init__(self) -> None:
        """More samples than there are means that some were counted twice (a padded sampler does that)."""
        for split, count in self.evaluated.items():
            if not 0 <= count <= self.original.get(split, -1):
                raise UserError(
                    f"evaluated.{split}: expected 0 to {self.original.get(split)} (the original count), found {count}."
                )


class OpenedCheckpoint(Strict, frozen=True):
    """How the checkpoint was opened; `matched_percent` is None where nothing had to match (`random:`, `pixels:`)."""

    spec: str
    format: str
    matched_percent: float | None
    notes: list[str]


class FeaturesUsed(Strict, frozen=True):
    """One set of features that went into the scores, under its key in the cache."""

    key: str
    split: str
    reading: str
    source: Literal["cache", "extracted"]


@dataclass(frozen=True)
class Deviations:
    """What sets a run apart from the plain run of the same recipe. `checkpoint_key` only if the user gave one."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    dtype: str = "fp32"
    checkpoint_key: str | None = None
    arch: Mapping[str, str] = field(default_factory=dict)
    subset: Mapping[str, str] = field(default_factory=dict)
    skip_broken: bool = False

    def as_json(self) -> dict[str, Any]:
        """Only what deviates: empty for the plain run, and unchanged when a new kind of deviation is added."""
        return {
            name: value for name, value in plain(self).items() if name not in ("overrides", "arch", "subset") or value
        }


_NO_DEVIATIONS = Deviations()


@dataclass(frozen=True)
class Run:
    """All that makes two runs the same run. Known before anything is computed."""

    model: str
    weights_sha256: str
    dataset: str
    dataset_manifest_sha256: Mapping[str, str]
    protocol: str
    recipe: str
    version: int
    deviations: Deviations = Deviations()

    def key(self) -> str:
        """Equal for the same run, and for no other."""
        return canonical({**plain(self), "deviations": self.deviations.as_json()})


class Record(Strict, frozen=True, kw_only=True):
    """The fields of the file, in the file's order."""

    schema_version: int
    status: Literal["done"]
    model: str
    weights_sha256: str
    arch: str
    checkpoint: OpenedCheckpoint
    checkpoint_key: str | None
    checkpoint_key_given: bool  # by the user, rather than chosen as the method evaluates itself
    arch_overrides: dict[str, str]  # what the user said of the network that its file does not
    protocol: str
    recipe: str
    version: int
    overrides: dict[str, Any]
    resolved_recipe: dict[str, Any]
    dataset: str
    subset: dict[str, str]  # lists that reduced the data: option -> name and hash
    dataset_manifest_sha256: dict[str, str]  # a split
    n_samples: SampleCounts
    skipped_broken: dict[str, int]  # a split
    skip_broken: bool  # whether the user allowed it
    limited: bool
    limit: int | None
    seed: int
    selected_on: Literal["none", "train", "val", "test"]
    scores: dict[str, Score]
    main_metric: str
    lower_is_better: bool  # the main metric
    device: str
    dtype: str
    environment: dict[str, Any]
    code_version: str
    started: str  # ISO 8601, UTC
    seconds: dict[str, float]  # a phase
    peak_memory_bytes: int
    features: list[FeaturesUsed]
    warnings: list[str]
    details: dict[str, Any]  # what the protocol says beside its scores: chosen settings, curves, splits, gaps

    def __post_init__(self) -> None:
        """Whatever the types cannot say."""
        _check_names(self)
        if self.schema_version != SCHEMA_VERSION:
            raise UserError(f"schema_version: expected {SCHEMA_VERSION}, found {self.schema_version}.")
        if self.main_metric not in self.scores:
            raise UserError(f"main_metric: expected one of {sorted(self.scores)}, found {self.main_metric!r}.")
        if self.limited != (self.limit is not None):
            raise UserError(f"limited: expected true with a limit only, found {self.limited} with limit={self.limit}.")
        if self.checkpoint_key_given and self.checkpoint_key is None:
            raise UserError("checkpoint_key: expected a name, since checkpoint_key_given is true; found null.")
        try:
            offset = datetime.fromisoformat(self.started).utcoffset()
        except ValueError:
            offset = None
        if offset != _UTC:
            raise UserError(
                f"started: expected an ISO 8601 time in UTC (2026-01-31T12:00:00+00:00), found {self.started}."
            )

    @property
    def run(self) -> Run:
        """The identity of this record's run."""
        return Run(
            model=self.model,
            weights_sha256=self.weights_sha256,
            dataset=self.dataset,
            dataset_manifest_sha256=self.dataset_manifest_sha256,
            protocol=self.protocol,
            recipe=self.recipe,
            version=self.version,
            deviations=self.deviations,
        )

    @property
    def deviations(self) -> Deviations:
        """What sets this record's run apart from the plain one."""
        return Deviations(
            overrides=self.overrides,
            limit=self.limit,
            seed=self.seed,
            dtype=self.dtype,
            checkpoint_key=self.checkpoint_key if self.checkpoint_key_given else None,
            arch=self.arch_overrides,
            subset=self.subset,
            skip_broken=self.skip_broken,
        )

    @property
    def is_plain(self) -> bool:
        """Whether `deviations` holds none, in a tenth of the time."""
        free = self.overrides or self.arch_overrides or self.subset
        return not (free or self.limited or self.seed or self.checkpoint_key_given or self.skip_broken) and (
            self.dtype == _NO_DEVIATIONS.dtype
        )

    @property
    def main_score(self) -> Score:
        """The score that leaderboards show."""
        return self.scores[self.main_metric]


_UTC = timedelta(0)
_PROTOCOL = re.compile(r"[a-z][a-z0-9_]*")
_RECIPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _check_names(record: Record) -> None:
    """Names and hashes that paths are made of, or that a reader looks things up by."""
    for name in ("model", "arch", "dataset", "device", "dtype", "code_version"):
        text = getattr(record, name)
        if not text or text.isspace():
            raise UserError(f"{name}: expected a name, found an empty string.")
    if not _PROTOCOL.fullmatch(record.protocol):
        raise UserError(f"protocol: expected a bare file name such as 'knn', found {record.protocol!r}.")
    if not _RECIPE.fullmatch(record.recipe):
        raise UserError(f"recipe: expected a bare name such as 'dino', found {record.recipe!r}.")
    if record.version < 1:
        raise UserError(f"version: expected 1 or more, found {record.version}.")
    if record.limit is not None and record.limit < 1:
        raise UserError(f"limit: expected 1 or more, found {record.limit}.")
    if not record.dataset_manifest_sha256:
        raise UserError("dataset_manifest_sha256: expected a sha256 for each split that was used, found none.")
    if not _SHA256.fullmatch(record.weights_sha256):
        raise UserError(f"weights_sha256: expected 64 hexadecimal digits, found {record.weights_sha256!r}.")
    for split, sha in record.dataset_manifest_sha256.items():
        if not _SHA256.fullmatch(sha):
            raise UserError(f"dataset_manifest_sha256.{split}: expected 64 hexadecimal digits, found {sha!r}.")


def settings_text(settings: Mapping[str, Any]) -> str:
    """Overrides as people type them: "neighbors=5, pooling=cls"."""
    return ", ".join(
        f"{name}={value if isinstance(value, str) else canonical(value)}" for name, value in sorted(settings.items())
    )


@functools.cache  # of models and datasets, which are few
def path_name(name: str) -> str:
    """`name` as one component of a path on any file system: "hf:org/vit b" becomes "hf-org-vit-b"."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
    return safe[:100] or _sha8(name)


def record_path(run: Run, results: Path | None = None) -> Path:
    """Where the record of `run` lies, unless another run has taken the place (then see `find_path`)."""
    return (results or results_folder()) / _place(run, _suffix(run.deviations))


def possible_paths(run: Run, results: Path | None = None) -> tuple[Path, Path]:
    """The ordinary place, and the one for a run that finds it taken."""
    return record_path(run, results), (results or results_folder()) / _place(run, f"+{_sha8(run.key())}")


def ordinary_place(record: Record) -> str:
    """`record_path` of its run, below the results folder, with "/" on every system."""
    if record.is_plain:
        return _place(record, "")
    what = repr(record.deviations)  # of which few differ, and their hash takes ten times as long
    if what not in _suffixes:
        _suffixes[what] = _suffix(record.deviations)
    return _place(record, _suffixes[what])


_suffixes: dict[str, str] = {}


def _suffix(deviations: Deviations) -> str:
    what = deviations.as_json()
    return f"+{_sha8(canonical(what))}" if what else ""


def _place(run: Run | Record, suffix: str) -> str:
    folder = _folder(run.model, run.weights_sha256, run.dataset)
    return f"{folder}/{run.protocol}-{run.recipe}@v{run.version}{suffix}.json"


@functools.lru_cache(maxsize=64)  # records of one folder are read one after the other
def _folder(model: str, weights_sha256: str, dataset: str) -> str:
    return f"{path_name(model)}/{weights_sha256[:12]}/{path_name(dataset)}"


def _sha8(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def samples_path(path: Path) -> Path:
    """The per-sample file that belongs to the record at `path`."""
    return path.with_name(path.name.removesuffix(".json") + ".samples.parquet")


def files_path(path: Path) -> Path:
    """The folder of other files that belong to the record at `path`."""
    return path.with_name(path.name.removesuffix(".json") + ".files")


def find_path(run: Run, results: Path | None = None) -> Path | None:
    """Where the record of exactly this run lies, or None. A file that cannot be read is no record of anything."""
    for path in possible_paths(run, results):
        with contextlib.suppress(UserError):
            if read_record(path).run.key() == run.key():
                return path
    return None


def find_record(run: Run, results: Path | None = None) -> Record | None:
    """The stored record of exactly this run, or None: then the run is missing."""
    path = find_path(run, results)
    return None if path is None else read_record(path)


def read_record(path: Path | str) -> Record:
    """The record at `path`; a UserError that names the file and the field if anything about it is wrong."""
    try:
        content = content_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    record = read_quickly(Record, content)
    return _read_carefully(content, str(path)) if record is None else record


def _read_carefully(content: bytes, where: str) -> Record:
    try:
        document = loads(content.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not a JSON document ({error}).") from error
    if isinstance(document, dict):
        _check_schema(document, where)
    return parse(Record, document, where)


def _check_schema(document: dict[str, Any], where: str) -> None:
    """Before the fields, which may well be others in another schema."""
    if "schema_version" not in document:
        raise UserError(f"{where}: the field 'schema_version' is missing: not a record, or not a whole one.")
    schema = document["schema_version"]
    if type(schema) is int and schema > SCHEMA_VERSION:
        raise UserError(
            f"{where}: schema_version: written by a newer ssl-bench (schema {schema}; this one knows "
            f"{SCHEMA_VERSION}). Update ssl-bench to read it."
        )
    if type(schema) is int and schema < SCHEMA_VERSION:
        raise UserError(
            f"{where}: schema_version: expected {SCHEMA_VERSION}, found {schema}, which no ssl-bench ever wrote. "
            "Do the run again."
        )


def write_record(
    record: Record,
    results: Path | None = None,
    *,
    samples: Mapping[str, Sequence[Any]] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the record, its `samples` (SAMPLE_COLUMNS) if it has them, and other `files` by name in a folder.

    The path of the JSON file is returned.

    The record appears last, and an old one of the same run goes before its samples do: whatever interrupts this, a
    record on disk has its own samples and files beside it, or there is no record and the run counts as missing.
    """
    record = parse(Record, plain(record), "record")
    path = find_path(record.run, results)
    if path is None:
        ordinary, other = possible_paths(record.run, results)
        path = other if ordinary.exists() else ordinary  # what we cannot read, we do not overwrite either
    beside = samples_path(path)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        if samples is not None:
            with atomic_file(beside) as temporary_samples:
                write_samples(samples, temporary_samples)
                path.unlink(missing_ok=True)
        elif beside.exists():
            path.unlink(missing_ok=True)
            beside.unlink()
        if files_path(path).exists():
            path.unlink(missing_ok=True)
        replace_folder(files_path(path), files or {})
    return path
