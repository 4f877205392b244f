"""The gate for accuracy numbers: the records of a results folder against a baseline that lies in git.

    ssl-bench check --baseline leaderboards/baselines/toy.json [--update [--add NAME]]

An entry of the baseline is one metric of one way of measuring one model: model, dataset with its manifest, protocol,
recipe, version, deviations. Weights are no part of that: what is gated is that the model, trained and scored again by
the code as it is now, is no worse. Of several records that fit an entry (two weights of one name) the newest counts,
and the output says so. Limited runs are never looked at.

An entry fails when the metric dropped by more than its `tolerance` and significantly so. Each half is blind where the
other sees:

- Significance says that a drop is no accident of which images were drawn. Where both sides keep which samples were
  right, the test is paired (McNemar's, exact); else Welch's t-test by the recorded standard errors, or standard
  deviations over splits. Scores without an uncertainty (box AP, mIoU) have no test: the tolerance alone decides.
- The tolerance says how much a metric may move without anybody having done wrong: a retrained network differs from the
  last one by rounding alone (other thread counts, another CPU), and images know nothing of that. Whoever writes a
  baseline measures it and edits the tolerance in the file; `--update` keeps what was edited.

Tests are one-sided at 5 %, corrected by Holm's procedure over the entries that have a test: the chance of even one
false alarm among them stays below 5 %, however long the baseline and however its entries depend on one another (those
of one network on one dataset depend on one another a lot, which rules out corrections that assume independence). The
price is that among many entries a drop must be a little larger to be seen.

What cannot be compared fails too, for a gate that lets it pass gates nothing: an entry is `missing` if no record is of
its model, dataset and protocol, `incomparable` if those that are were measured otherwise, or if the samples that the
entry counts are not those that the record kept. Records without an entry are listed as new, and fail nothing.

`--update` takes new numbers into the entries they fit, and into those of which the recipe's version or content or the
images alone have changed. Everything else that an entry says stays until somebody edits it or deletes the entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ssl_bench.errors import UserError, unknown
from ssl_bench.leaderboards.baseline import (
    DEFAULT_TOLERANCE,
    Baseline,
    Entry,
    Samples,
    entry_of,
    measured,
    recipe_sha256,
    right_samples,
    run_key,
    typed,
    unpacked,
)
from ssl_bench.leaderboards.record import Record, samples_path
from ssl_bench.leaderboards.sides import run_name
from ssl_bench.leaderboards.store import Results

ALPHA = 0.05

State = Literal["passed", "improved", "within noise", "dropped", "missing", "incomparable"]
FAILING: tuple[State, ...] = ("dropped", "missing", "incomparable")

# The check. ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What became of one entry. `change` is positive where the metric is better than in the baseline."""

    entry: Entry
    state: State
    why: str
    record: Record | None = None  # of an incomparable entry: the nearest that there is
    path: Path | None = None
    change: float | None = None
    p: float | None = None  # of a change in this direction by accident, corrected; None where nothing was tested
    test: str = "none"
    replaceable: bool = False  # whether --update may put the record in the place of the incomparable entry

    @property
    def fails(self) -> bool:
        """Whether it makes the check fail."""
        return self.state in FAILING

    @property
    def value(self) -> float | None:
        """The metric now, where it can be compared."""
        return None if self.change is None or self.record is None else self.record.scores[self.entry.metric].value


@dataclass(frozen=True)
class Report:
    """The outcome of a check."""

    verdicts: list[Verdict]
    new: list[tuple[Record, Path]]  # records without an entry
    limited: int  # records that were left out

    @property
    def failed(self) -> list[Verdict]:
        """What makes the check fail."""
        return [verdict for verdict in self.verdicts if verdict.fails]


def check(baseline: Baseline, results: Results) -> Report:
    """Hold the records against every entry."""
    complete = [pair for pair in zip(results.records, results.paths, strict=True) if not pair[0].limited]
    fitting: dict[str, list[tuple[Record, Path]]] = defaultdict(list)
    for record, path in sorted(complete, key=_age, reverse=True):
        fitting[run_key(record)].append((record, path))
    known = {run_key(entry) for entry in baseline.entries}
    new = [pairs[0] for key, pairs in fitting.items() if key not in known]
    tested: list[tuple[Entry, list[tuple[Record, Path]], _Test]] = []
    verdicts: list[Verdict] = []
    for entry in baseline.entries:
        pairs = fitting.get(run_key(entry), [])
        if not pairs:
            verdicts.append(_unmatched(entry, new))
        elif different := _other_content(entry, pairs[0][0]):
            verdicts.append(_incomparable(entry, different, pairs[0]))
        else:
            try:
                tested.append((entry, pairs, _test(entry, *pairs[0])))
            except UserError as error:
                verdicts.append(Verdict(entry, "incomparable", str(error), *pairs[0]))
    drops, rises = (corrected([test.one_sided(side) for *_, test in tested]) for side in (-1, 1))
    for (entry, pairs, test), drop, rise in zip(tested, drops, rises, strict=True):
        verdicts.append(_verdict(entry, pairs, test, drop if test.change < 0 else rise))
    order = {entry.key: place for place, entry in enumerate(baseline.entries)}
    verdicts.sort(key=lambda verdict: (not verdict.fails, order[verdict.entry.key]))
    held = {verdict.path for verdict in verdicts if verdict.replaceable}  # which would replace an entry, not be added
    unheld = sorted((pair for pair in new if pair[1] not in held), key=lambda pair: pair[1])
    return Report(verdicts, unheld, len(results) - len(complete))


def _age(pair: tuple[Record, Path]) -> tuple[datetime, Path]:
    return datetime.fromisoformat(pair[0].started), pair[1]


def _unmatched(entry: Entry, new: Iterable[tuple[Record, Path]]) -> Verdict:
    """Missing, or incomparable with the nearest of the records that no entry asks for."""
    same = (entry.model, entry.dataset, entry.protocol)
    others = [pair for pair in new if (pair[0].model, pair[0].dataset, pair[0].protocol) == same]
    if not others:
        return Verdict(entry, "missing", f"no such record; run: {entry.command}")
    found = [(_differences(entry, record), (record, path)) for record, path in others]
    differences, nearest = min(found, key=lambda each: (not each[0].keys() <= _REPLACED, len(each[0])))
    return _incomparable(entry, differences, nearest)


_REPLACED = {"version", "manifest", "content"}


def _incomparable(entry: Entry, differences: Mapping[str, str], nearest: tuple[Record, Path]) -> Verdict:
    replaceable = differences.keys() <= _REPLACED
    what = (
        "`--update` takes the new number into the baseline"
        if replaceable
        else "edit or delete the entry; `--update --add NAME` adds a new one"
    )
    why = f"{'; '.join(differences.values())}. If that is meant, {what}"
    return Verdict(entry, "incomparable", why, *nearest, replaceable=replaceable)


def _differences(entry: Entry, record: Record) -> dict[str, str]:
    """What the baseline has, and what the record has instead; by the name of what differs."""
    before, now = measured(entry), measured(record)
    differing = {}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name):
            continue
        if name == "manifest":
            splits = [
                split for split in {**before[name], **now[name]} if before[name].get(split) != now[name].get(split)
            ]
            differing[name] = f"the images of {', '.join(sorted(splits))} are others (manifest)"
        else:
            was, became = (typed(side[name]) if name in side else "none" for side in (before, now))
            differing[name] = f"{name}: {was} in the baseline, {became} now"
    return differing


def _other_content(entry: Entry, record: Record) -> dict[str, str]:
    """The same of a record that seems to fit."""
    if entry.metric not in record.scores:
        return {"metric": f"metric: {entry.metric} in the baseline, now there are only {', '.join(record.scores)}"}
    if entry.metric == record.main_metric and entry.lower_is_better != record.lower_is_better:
        was, became = typed(entry.lower_is_better), typed(record.lower_is_better)
        return {"lower_is_better": f"lower_is_better: {was} in the baseline, {became} now"}
    if entry.recipe_sha256 not in (None, recipe_sha256(record)):
        return {"content": "the recipe of this name and version holds other values than in the baseline"}
    return {}


@dataclass(frozen=True)
class _Test:
    """`p` is two-sided and before correction; None where there is no test."""

    change: float  # positive: better
    name: str = "none"
    p: float | None = None
    detail: str = "no standard error is known, or one of 0: the tolerance alone decides"

    def one_sided(self, side: int) -> float | None:
        """For a change to this side: -1 worse, 1 better."""
        return None if self.p is None else self.p / 2 if self.change * side > 0 else 1 - self.p / 2


def _test(entry: Entry, record: Record, path: Path) -> _Test:
    # Imported here: a missing record is told without numpy.
    from ssl_bench.leaderboards.paired import mcnemar, welch

    before, now = entry.score, record.scores[entry.metric]
    change = (now.value - before.value) * (-1 if entry.lower_is_better else 1)
    if entry.samples is not None:
        pairs = list(zip(unpacked(entry.samples), _right_now(entry.samples, entry.metric, record, path), strict=True))
        lost, won = pairs.count((True, False)), pairs.count((False, True))
        detail = f"{lost} samples that were right are wrong now, {won} the other way round"
        return _Test(change, "McNemar", mcnemar(lost, won), detail)
    try:
        test = welch(now, before)  # also where the entry's samples were removed by hand
    except UserError:  # no standard error, or none that says anything
        return _Test(change)
    half = (test.interval95[1] - test.interval95[0]) / 2
    return _Test(change, "Welch", test.p, f"the 95 % interval of the difference is ±{half:.3g}")


def _right_now(before: Samples, metric: str, record: Record, path: Path) -> list[bool]:
    """Which of the same samples are right in the record. Without them a weaker test would pass what this one fails."""
    kept = samples_path(path)
    if not kept.exists():
        raise UserError(f"{kept} is missing, so it cannot be told which samples are right now; score again.")
    right = right_samples(record, path, metric)
    if right is None:
        raise UserError(f"{kept}: the accuracy of what was kept is not the record's {metric}; score again.")
    if (before.ids_sha256, before.n) != (right[0], len(right[1])):
        raise UserError(f"{kept}: of other samples than the baseline counts, though the images are the same.")
    return right[1]


def _verdict(entry: Entry, pairs: Sequence[tuple[Record, Path]], test: _Test, p: float | None) -> Verdict:
    """`p` is one-sided, for a change to the side that is seen, and corrected."""
    record, path = pairs[0]
    state: State = "passed"
    if abs(test.change) > entry.tolerance:
        significant = p is None or p < ALPHA
        state = "within noise" if not significant else "dropped" if test.change < 0 else "improved"
    parts = [test.detail]
    if len(pairs) > 1:
        parts.append(f"{len(pairs)} records fit; the newest was taken, of weights {record.weights_sha256[:12]}")
    if record.weights_sha256[:12] == entry.weights:
        parts.append("the weights are those of the baseline")
    return Verdict(entry, state, "; ".join(parts), record, path, test.change, p, test.name)


def corrected(values: Sequence[float | None]) -> list[float | None]:
    """By Holm's procedure, over the tests that there are."""
    from ssl_bench.leaderboards.agreement import holm

    tested = iter(holm([p for p in values if p is not None]))
    return [None if p is None else next(tested) for p in values]


# The update. ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What `--update` does to one entry."""

    kind: Literal["changed", "replaced", "added", "kept", "left out"]
    name: str
    before: float | None
    now: float | None
    what: str


def updated(baseline: Baseline, results: Results, *, add: Sequence[str] = ()) -> tuple[Baseline, list[Change]]:
    """The baseline as the records have it. Tolerances stay; an entry without a record stays as it is, and is named.

    `add`: names or patterns of records that become new entries; all of them where there are no entries yet.
    """
    report = check(baseline, results)
    entries: dict[str, Entry] = {}
    changes: list[Change] = []
    for verdict in report.verdicts:
        old, record, path = verdict.entry, verdict.record, verdict.path
        comparable = verdict.change is not None
        if record is None or path is None or not (comparable or verdict.replaceable):
            what = f"{verdict.why}. Or delete it from the file" if record is None else verdict.why
            changes.append(Change("kept", old.name, old.score.value, None, what))
            entries[old.key] = old
            continue
        new = replace(entry_of(record, path, old.metric), tolerance=old.tolerance)
        new = replace(new, ckpt=old.ckpt or new.ckpt)  # somebody may have said where it comes from
        if new.metric != record.main_metric:  # of which alone a record says what is better
            new = replace(new, lower_is_better=old.lower_is_better)
        if new.key in entries:
            changes.append(Change("kept", old.name, old.score.value, None, "two entries cannot become the same one"))
            entries[old.key] = old
            continue
        if replace(new, made=old.made, code_version=old.code_version, weights=old.weights) == old:
            entries[old.key] = old  # not even its date changes: git shows what is another number
            continue
        what = f"{verdict.state}, tolerance {old.tolerance:g}" if comparable else verdict.why.partition(". If")[0]
        kind: Literal["changed", "replaced"] = "changed" if comparable else "replaced"
        changes.append(Change(kind, new.name, old.score.value, new.score.value, what))
        entries[new.key] = new
    wanted = add or (() if baseline.entries else ("*",))
    unmatched = [pattern for pattern in add if not any(_named(record, [pattern]) for record, _ in report.new)]
    if unmatched:
        raise unknown("--add: record without an entry", unmatched[0], {run_name(record) for record, _ in report.new})
    for record, path in report.new:
        if not _named(record, wanted):
            value = record.main_score.value
            changes.append(Change("left out", run_name(record), None, value, "it has no entry; --add takes it in"))
            continue
        new = entry_of(record, path, record.main_metric)
        if new.key not in entries:
            what = f"tolerance {new.tolerance:g}: a guess, {DEFAULT_TOLERANCE:.0%} of the value; edit it in the file"
            changes.append(Change("added", new.name, None, new.score.value, what))
            entries[new.key] = new
    return replace(baseline, entries=list(entries.values())), changes


def _named(record: Record, patterns: Sequence[str]) -> bool:
    return any(run_name(record) == pattern or fnmatchcase(run_name(record), pattern) for pattern in patterns)
