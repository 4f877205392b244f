"""The baseline of `ssl-bench check`: a JSON file in git, one entry a number that must not drop. See gate.py.

    {"schema_version": 1, "about": ["for people"], "entries": [{"model": ..., "score": {...}, "tolerance": ...}]}

Where samples are counted, an entry also holds which of them were right, a bit each, so that a later run is compared
with it sample by sample. `tolerance` and `about` are there to be edited by hand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssl_bench.errors import UserError, unknown
from ssl_bench.files import atomic_file
from ssl_bench.leaderboards.record import Deviations, Record, Score, samples_path, settings_text
from ssl_bench.leaderboards.store import load_samples
from ssl_bench.leaderboards.strict_json import canonical, loads, parse, plain

SCHEMA_VERSION = 1
# Of the value (of 1 if it is 0), for new entries: a guess, until somebody measures how far the metric wanders.
DEFAULT_TOLERANCE = 0.02

_PORTABLE = re.compile(r"(timm|hf|random|pixels|recipe):")  # specs that mean the same on every machine
_ROUNDING = 1e-6  # percents that are the same number

# The file. -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Which samples were right: a bit each, in the order of their sorted ids, the first in a byte's lowest bit."""

    n: int
    ids_sha256: str
    correct: str  # base64

    def __post_init__(self) -> None:
        """As many bits as samples."""
        try:
            size = len(base64.b64decode(self.correct, validate=True))
        except ValueError as error:
            raise UserError(f"correct: not base64 ({error}).") from error
        if self.n < 1 or size != math.ceil(self.n / 8):
            raise UserError(f"correct: expected a bit for each of n={self.n} samples, found {size} bytes.")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One number that must not drop."""

    model: str
    dataset: str
    dataset_manifest_sha256: dict[str, str]
    protocol: str
    recipe: str
    version: int
    deviations: dict[str, Any]  # from the plain run of the recipe; see record.py
    metric: str
    lower_is_better: bool
    score: Score
    tolerance: float  # in the metric's own unit
    made: str  # when its record was started
    code_version: str
    weights: str  # the first 12 digits of their sha256, so that it can be told whether they changed
    ckpt: str | None = None  # the checkpoint's spec, unless it is a path of one machine
    recipe_sha256: str | None = None  # the first 12 digits, of the values in the recipe; None: nobody knows
    samples: Samples | None = None

    def __post_init__(self) -> None:
        """Whatever the types cannot say."""
        if self.tolerance < 0:
            raise UserError(f"tolerance: expected 0 or more, found {self.tolerance:g}.")
        _check_deviations(self.deviations)
        if self.samples and abs(_percent(unpacked(self.samples)) - self.score.value) > _ROUNDING:
            raise UserError(
                f"samples: of them {_percent(unpacked(self.samples)):g} % are right, but score.value is "
                f"{self.score.value:g}. Who edits a value by hand removes the samples."
            )

    @property
    def key(self) -> str:
        """Equal for entries of the same number, and for no others."""
        return canonical([run_key(self), self.metric])

    @property
    def name(self) -> str:
        """For people: in one line, and of characters that can be written."""
        settings = f" [{settings_text(self.deviations)}]" if self.deviations else ""
        way = f"{self.protocol}/{self.recipe}@v{self.version}{settings}"
        name = f"{self.model} · {self.dataset} · {way} · {self.metric}"
        return " ".join(name.encode("utf-8", "backslashreplace").decode().split())

    @property
    def command(self) -> str:
        """What makes the record that this entry asks for."""
        words = ["ssl-bench", "run", "--ckpt", self.ckpt or "CHECKPOINT", "--name", self.model]
        words += ["--protocol", f"{self.protocol}/{self.recipe}", "--dataset", self.dataset]
        for name, value in self.deviations.items():
            flag = "--" + {"overrides": "set"}.get(name, name).replace("_", "-")
            if name == "subset":
                words += [word for given in value for word in (f"--{given.replace('_', '-')}", "FILE")]
            elif isinstance(value, Mapping):
                words += [word for key, item in value.items() for word in (flag, f"{key}={typed(item)}")]
            else:
                words += [flag] if value is True else [flag, str(value)]
        return shlex.join(words)


_DEVIATIONS = {
    "overrides": dict,
    "limit": int,
    "seed": int,
    "dtype": str,
    "checkpoint_key": str,
    "arch": dict,
    "subset": dict,
    "skip_broken": bool,
}


def _check_deviations(given: Mapping[str, Any]) -> None:
    """They decide which records fit, so a slip of the pen must not pass for something else."""
    for name, value in given.items():
        if name not in _DEVIATIONS:
            raise unknown("field of deviations", name, _DEVIATIONS)
        if type(value) is not _DEVIATIONS[name]:
            raise UserError(f"deviations: {name}: expected {_DEVIATIONS[name].__name__}, found {value!r}.")
    if "limit" in given:
        raise UserError("deviations: a run with --limit is no baseline; measure on all samples.")
    if Deviations(**given).as_json() != given:
        raise UserError(f"deviations: expected only what deviates from the plain run, found {settings_text(given)}.")


@dataclass(frozen=True)
class Baseline:
    """The whole file. `about` is for people: what makes the records, where the tolerances come from."""

    schema_version: int
    about: list[str]
    entries: list[Entry]

    def __post_init__(self) -> None:
        """No number twice."""
        seen: set[str] = set()
        for entry in self.entries:
            if entry.key in seen:
                raise UserError(f"entries: two of {entry.name}; remove one.")
            seen.add(entry.key)


def typed(value: Any) -> str:
    """A setting as it is given on the command line."""
    if isinstance(value, list):
        return ",".join(map(typed, value))
    return value if isinstance(value, str) else json.dumps(value)


def measured(of: Entry | Record) -> dict[str, Any]:
    """How: whatever must be equal, beside model, dataset and protocol, for two scores to be comparable."""
    deviations = of.deviations if isinstance(of, Entry) else of.run.deviations.as_json()
    return {"manifest": of.dataset_manifest_sha256, "recipe": of.recipe, "version": of.version, **deviations}


def run_key(of: Entry | Record) -> str:
    """Equal for an entry and the records that fit it, whatever their weights."""
    return canonical([of.model, of.dataset, of.protocol, measured(of)])


def read_baseline(path: Path) -> Baseline:
    """The baseline at `path`; a UserError that says what is wrong with it."""
    try:
        document = loads(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file. `--update` makes it from the records there are.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(document, dict) or "entries" not in document:
        raise UserError(f"{path}: expected a baseline of `ssl-bench check`, found JSON without 'entries'.")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version: expected {SCHEMA_VERSION}, found {document.get('schema_version')!r}. A newer "
            "ssl-bench may have written it; else make it anew with `--update`, in a file that is not there yet."
        )
    baseline = parse(Baseline, document, str(path))
    if not baseline.entries:
        raise UserError(f"{path}: entries: there are none, and a gate without entries would let everything pass.")
    return baseline


def write_baseline(baseline: Baseline, path: Path) -> None:
    """One line a field and entries in order, so that git shows what changed."""
    ordered = replace(baseline, entries=sorted(baseline.entries, key=lambda entry: (entry.name, entry.key)))
    text = json.dumps(plain(ordered), indent=1, ensure_ascii=False) + "\n"
    with atomic_file(Path(os.path.realpath(path))) as temporary:  # a link keeps pointing where it does
        temporary.write_text(text, "utf-8", "backslashreplace")  # half a surrogate pair: JSON has the same escape


# Which samples were right. -------------------------------------------------------------------------------------------


def right_samples(record: Record, path: Path, metric: str) -> tuple[str, list[bool]] | None:
    """A hash of the sorted sample ids, and which samples were right; None if the metric is not their accuracy."""
    if metric != record.main_metric or record.lower_is_better or not samples_path(path).exists():
        return None
    frame = load_samples(path).sort_values("sample_id")
    correct = [bool(outcome) for outcome in frame["correct"]]
    if abs(_percent(correct) - record.scores[metric].value) > _ROUNDING:
        return None
    return hashlib.sha256(canonical(list(frame["sample_id"])).encode()).hexdigest(), correct


def _percent(correct: Sequence[bool]) -> float:
    return 100 * sum(correct) / len(correct)


def _packed(ids_sha256: str, correct: Sequence[bool]) -> Samples:
    import numpy as np

    content = np.packbits(np.asarray(correct, bool), bitorder="little").tobytes()
    return Samples(len(correct), ids_sha256, base64.b64encode(content).decode())


def unpacked(samples: Samples) -> list[bool]:
    """Which samples were right, in the order of their sorted ids."""
    import numpy as np

    content = np.frombuffer(base64.b64decode(samples.correct), np.uint8)
    outcomes: list[bool] = np.unpackbits(content, count=samples.n, bitorder="little").astype(bool).tolist()
    return outcomes


def recipe_sha256(record: Record) -> str:
    """Of what the recipe holds, so that it is noticed when another recipe goes by its name and version."""
    not_its_own = {"source", "published", *record.overrides}  # settings are compared as deviations
    values = {name: value for name, value in record.resolved_recipe.items() if name not in not_its_own}
    return hashlib.sha256(canonical(values).encode()).hexdigest()[:12]


def entry_of(record: Record, path: Path, metric: str) -> Entry:
    """The record's number as a new entry."""
    score, right = record.scores[metric], right_samples(record, path, metric)
    return Entry(
        model=record.model,
        dataset=record.dataset,
        dataset_manifest_sha256=record.dataset_manifest_sha256,
        protocol=record.protocol,
        recipe=record.recipe,
        version=record.version,
        deviations=record.run.deviations.as_json(),
        metric=metric,
        lower_is_better=record.lower_is_better,
        score=score,
        tolerance=float(f"{DEFAULT_TOLERANCE * (abs(score.value) or 1.0):.2g}"),
        made=record.started,
        code_version=record.code_version,
        weights=record.weights_sha256[:12],
        ckpt=record.checkpoint.spec if _PORTABLE.match(record.checkpoint.spec) else None,
        recipe_sha256=recipe_sha256(record),
        samples=None if right is None else _packed(*right),
    )
