"""Everything a record says, for people: what a number is, what differs from its recipe, and where it was shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_bench.leaderboards.record import Record, Score, files_path, samples_path, settings_text
from ssl_bench.leaderboards.report.places import Places, anchor, grouped, page
from ssl_bench.leaderboards.report.words import number, score_text, with_unit
from ssl_bench.leaderboards.strict_json import canonical, plain
from ssl_bench.leaderboards.table import run_label

SECTIONS = 2_000  # of all pages together, where no number asks for more
_JSON_CHARACTERS = 60_000  # of one field
_FILES = 50


@dataclass(frozen=True)
class ScoreLine:
    """One score."""

    metric: str
    value: str
    full: str  # the value in full precision
    spread: str
    kind: str  # of spread
    full_spread: str
    n: int
    is_main: bool


@dataclass(frozen=True)
class Section:
    """One record."""

    id: str
    record: Record
    title: str
    path: str
    scores: tuple[ScoreLine, ...]
    spread: str  # what all of their ± are; empty if they are several things
    facts: tuple[tuple[str, str], ...]
    deviations: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    back: tuple[tuple[str, str], ...]  # address, what is shown there
    document: str


@dataclass(frozen=True)
class Page:
    """All records of one checkpoint on one dataset."""

    name: str
    model: str
    dataset: str
    weights: str
    sections: tuple[Section, ...]


def pages(places: Places) -> list[Page]:
    """A page for every (model, weights, dataset) of which a number is shown; all of them, if they are not too many."""
    results = places.results
    if len(results) <= SECTIONS:
        places.shown.update(dict.fromkeys(results.paths))
    shown = [record for record in places.in_order() if places.path(record) in places.shown]
    found = []
    for name, records in grouped(shown, places).items():
        sections = tuple(_section(record, places.path(record), places) for record in records)
        first = sections[0].record
        found.append(Page(name, first.model, first.dataset, first.weights_sha256[:12], sections))
    return found


def _section(record: Record, path: Path, places: Places) -> Section:
    folder = files_path(path)
    files = [samples_path(path)] if samples_path(path).exists() else []
    files += sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    names = [places.relative(file) for file in files[:_FILES]]
    if len(files) > _FILES:
        names.append(f"and {len(files) - _FILES} more in {places.relative(folder)}/")
    scores = tuple(_score(record, name, score) for name, score in record.scores.items())
    kinds = {score.kind for score in scores if score.kind}
    return Section(
        id=anchor(path),
        record=record,
        title=run_label(record).removesuffix(f" · {record.dataset}"),
        path=places.relative(path),
        scores=scores,
        spread=kinds.pop() if len(kinds) == 1 else "",
        facts=tuple(_facts(record)),
        deviations=tuple(_deviations(record)),
        environment=tuple((name, _text(value)) for name, value in record.environment.items()),
        files=tuple(names),
        back=tuple(places.numbers[path].items()),
        document=_document(record),
    )


def _score(record: Record, name: str, score: Score) -> ScoreLine:
    known = (
        (score.stderr, "standard error"),
        (score.std, f"standard deviation, ddof={score.ddof}"),
        (score.interval95, "half the 95 % interval"),
    )
    uncertainty, kind = next(((value, kind) for value, kind in known if value is not None), (None, ""))
    value, spread = score_text(score)
    return ScoreLine(
        metric=with_unit(name),
        value=value,
        full=repr(score.value),
        spread=spread.partition(" (")[0],
        kind=kind,
        full_spread="" if uncertainty is None else repr(uncertainty),
        n=score.n,
        is_main=name == record.main_metric,
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    """What decides the number, and what it took."""
    checkpoint = record.checkpoint
    matched = "" if checkpoint.matched_percent is None else f", {number(checkpoint.matched_percent)} % matched"
    samples = record.n_samples
    counts = ", ".join(f"{samples.evaluated.get(split, 0):,} of {n:,} {split}" for split, n in samples.original.items())
    skipped = ", ".join(f"{n:,} {split}" for split, n in record.skipped_broken.items() if n)
    key = (
        f"{record.checkpoint_key} ({'asked for' if record.checkpoint_key_given else 'as the method evaluates itself'})"
    )
    facts = {
        "Weights, sha256": record.weights_sha256,
        "Architecture": record.arch,
        "Checkpoint": f"{checkpoint.spec} (format {checkpoint.format}{matched})",
        "Network of the file": key if record.checkpoint_key else "",
        "Notes on opening": "; ".join(checkpoint.notes),
        "Data, sha256": ", ".join(f"{split} {sha}" for split, sha in record.dataset_manifest_sha256.items()),
        "Samples used": counts,
        "Broken samples skipped": skipped,
        "Selected on": record.selected_on,
        "Seed": str(record.seed),
        "Arithmetic": f"{record.dtype} on {record.device}",
        "Code": record.code_version,
        "Started": record.started,
        "Seconds": ", ".join(f"{phase} {number(seconds)}" for phase, seconds in record.seconds.items()),
        "Peak memory": f"{record.peak_memory_bytes / 2**20:,.0f} MiB",
    }
    return [(name, text) for name, text in facts.items() if text]


def _deviations(record: Record) -> list[tuple[str, str]]:
    """What sets the run apart from the plain run of its recipe."""
    found = [(name, _text(value)) for name, value in sorted(record.overrides.items())]
    for name, value in record.run.deviations.as_json().items():
        if name != "overrides":
            found.append((name, settings_text(value) if isinstance(value, Mapping) else _text(value)))
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value)


def _document(record: Record) -> str:
    """Every field, as in the file. Of a field as long as a book, that it is so."""
    fields = plain(record)
    for name, value in fields.items():
        length = len(json.dumps(value))
        if length > _JSON_CHARACTERS:
            fields[name] = f"left out here: {length:,} characters, in the record's file"
    return json.dumps(fields, indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class Line:
    """A record in the list of all."""

    record: Record
    href: str
    settings: str
    value: str
    metric: str


def listing(places: Places) -> tuple[list[Line], str]:
    """The records that have a section, and what is left out."""
    lines = []
    for record in places.in_order():
        path = places.path(record)
        if path in places.shown:
            settings = ", ".join(f"{name}={text}" for name, text in _deviations(record))
            href = f"{page(path, places.results.root)}#{anchor(path)}"
            lines.append(Line(record, href, settings, score_text(record.main_score)[0], with_unit(record.main_metric)))
    more = len(places.results) - len(lines)
    return lines[:SECTIONS], f"{more + max(0, len(lines) - SECTIONS):,}" if more or len(lines) > SECTIONS else ""


def problems(places: Places, most: int = 200) -> tuple[list[tuple[str, str]], int]:
    """Files that are no records, each with what is wrong with it, and how many more there are."""
    root = str(places.results.root)
    found: Sequence[tuple[Path, str]] = sorted(places.results.problems.items())
    said = [(places.relative(path), text.replace(f"{root}/", "")) for path, text in found[:most]]
    return said, max(0, len(found) - most)
