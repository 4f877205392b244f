"""The paper's table with our measured rows beside it, and how far apart they are: `ssl-bench leaderboard moca:8`.

Where a run stands, standing.py decides. A measured column is one protocol, recipe, version, set of deviations, dataset
and metric, as in table.py; runs that differ in the seed alone are averaged. If several checkpoints are of one line of
the paper, each gets a line of its own below it.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssl_bench.leaderboards import tables
from ssl_bench.leaderboards.complete import other_data
from ssl_bench.leaderboards.origins import contradictions, said_of
from ssl_bench.leaderboards.published import Cell
from ssl_bench.leaderboards.record import Record, Score, settings_text
from ssl_bench.leaderboards.standing import (
    Key,
    Owner,
    Placed,
    alike,
    crowded,
    lines_of,
    other_settings,
    place,
    protocols_of,
)
from ssl_bench.leaderboards.store import Results
from ssl_bench.leaderboards.strict_json import canonical
from ssl_bench.leaderboards.table import Cell as Shown
from ssl_bench.leaderboards.table import column_deviations, distinct, run_label, spread_notes
from ssl_bench.leaderboards.tables import Column, Row, Table

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Comparison:
    """A published number and one that was measured here."""

    table: str  # moca:8
    row: str  # the published line's label
    column: str  # the paper's column
    cell: Cell
    record: Record
    metric: str  # which of the record's scores
    measured: float  # in the printed unit, as is the uncertainty: stderr, std or interval95, whichever the score has
    uncertainty: float | None
    differs: tuple[str, ...]  # "dataset: toy, not imagenet", ...; empty: the same settings, as far as is known
    comparable: bool = True  # whether it is the same data; of costs, whether it is the same work

    @property
    def difference(self) -> float:
        """Ours less theirs. It means nothing where the two are not comparable."""
        return self.measured - self.cell.value


def comparisons(table: str, results: Results) -> list[Comparison]:
    """Every score that stands in a cell of the table, in the table's order."""
    return _compared(table, place(table, results)[0], results)


def _compared(table: str, scores: Sequence[Placed], results: Results) -> list[Comparison]:
    newest = _newest(results)
    found = [
        Comparison(
            table=table,
            row=score.row.label,
            column=score.column.name,
            cell=score.row.cells[score.column.name],
            record=score.record,
            metric=score.measure.metric,
            measured=score.value,
            uncertainty=score.uncertainty,
            differs=_differs(score, newest),
            comparable=_is_comparable(score),
        )
        for score in scores
        if score.only_column and score.column.name in score.row.cells
    ]
    lines = [row.label for row in lines_of(table)]
    columns = [column.name for column in tables.find(table).columns]
    places = {(row, column): place for place, (row, column) in enumerate(itertools.product(lines, columns))}
    return sorted(
        found, key=lambda each: (places[each.row, each.column], _run_text(each.record), each.record.weights_sha256)
    )


def paper_table(table: str, results: Results) -> pandas.DataFrame:
    """The paper's lines and columns; beside each column what was measured, below the lines other models.

    `attrs["cells"]` and `attrs["notes"]` are as in table.py; `attrs["measured"]` has the paper's column of each of
    ours, `attrs["weights"]` the sha256 of the weights behind each number.
    """
    import pandas

    layout, lines = tables.find(table), lines_of(table)
    scores, remarks = place(table, results)
    labels = _line_labels(scores, [row.label for row in lines])
    index = _line_order(lines, labels)
    headings = _headings(scores)
    cells: dict[str, dict[str, Shown]] = {}
    measured: dict[str, str] = {}
    weights: dict[str, dict[str, str]] = {}
    for column in layout.columns:
        cells[column.name] = _printed(column, lines)
        here: dict[str, dict[str, list[Placed]]] = defaultdict(lambda: defaultdict(list))
        for score in scores:
            if score.column is column:
                here[headings[score.key]][labels[score.row.label, score.owner]].append(score)
        for heading in sorted(here, key=lambda name: (_distance(here[name]), name)):
            cells[heading] = {line: _summary(found) for line, found in here[heading].items()}
            measured[heading] = column.name
            weights[heading] = {line: found[0].record.weights_sha256 for line, found in here[heading].items()}
    values = {name: {line: cell["value"] for line, cell in by_line.items()} for name, by_line in cells.items()}
    frame = pandas.DataFrame(values, index=pandas.Index(index, name=table), columns=list(values), dtype="float64")
    ours = [cell for heading in measured for cell in cells[heading].values()]
    notes = [*_about(layout, lines), *spread_notes(ours), *_about_runs(table, results, scores), *remarks]
    frame.attrs = {"cells": cells, "measured": measured, "weights": weights, "notes": notes}
    return frame


def differences(table: str, results: Results) -> pandas.DataFrame:
    """A line a comparison: published, measured, the difference, and what else is not the same.

    Numbers of different data, and costs of different work, have no difference: they are shown, and `differs` says why.
    """
    import pandas

    scores, _ = place(table, results)
    found = _compared(table, scores, results)
    index = pandas.RangeIndex(1, len(found) + 1, name=table)
    columns = {
        "row": [each.row for each in found],
        "column": [each.column for each in found],
        "published": [each.cell.value for each in found],
        "measured": [each.measured for each in found],
        "difference": [each.difference if each.comparable else None for each in found],
        "run": [_run_text(each.record) for each in found],
        "differs": ["; ".join(each.differs) or "nothing that is known" for each in found],
    }
    numbers = dict.fromkeys(("published", "measured", "difference"), "float64")
    frame = pandas.DataFrame(columns, index=index).astype(numbers)
    ours = [_shown(each.record.scores[each.metric], each.measured, each.uncertainty) for each in found]
    frame.attrs["cells"] = {
        "published": {i: _published(each.cell, _decimals([each.cell])) for i, each in enumerate(found, 1)},
        "measured": dict(enumerate(ours, 1)),
    }
    apart = any(not each.comparable for each in found)
    frame.attrs["notes"] = [
        *spread_notes(ours),
        *(["No difference is given between numbers of different data, or costs of other work."] if apart else []),
        *_about_runs(table, results, scores),
        *([] if found else [f"No run stands on a line of {table}: see `ssl-bench leaderboard {table}`."]),
    ]
    return frame


# What differs --------------------------------------------------------------------------------------------------------


def _differs(score: Placed, newest: Mapping[str, int]) -> tuple[str, ...]:
    """Between the run and the paper's number beside it, the data first."""
    record, cell = score.record, score.row.cells[score.column.name]
    measure, said = score.measure, []
    if measure.dataset:
        said += other_data(record, measure.dataset)
    else:
        said.append(f"machine: {record.dataset.removeprefix('noise on ')}, not the paper's")
        said += _other_processes(record)
    if isinstance(how := score.column.measure_of(cell), str):
        said.append(f"how: {how}")
    said += contradictions(score.told, said_of(cell))
    recipe = f"{record.protocol}/{record.recipe}"
    if recipe != measure.recipe:
        said.append(f"recipe: {recipe}, not {measure.recipe}")
        # The paper's own recipe selects as the paper does.
        said += ["selected on: test, as the paper may not"] if record.selected_on == "test" else []
    said += other_settings(record, measure)
    said += [f"version: {record.version}, older than {newest[record.protocol]}"] * (
        record.version < newest[record.protocol]
    )
    said += [f"network: {record.checkpoint_key}, as asked for"] * record.checkpoint_key_given
    said += [f"opened with: {settings_text(record.arch_overrides)}"] * bool(record.arch_overrides)
    lists = {
        name: value for name, value in record.subset.items() if name.endswith(("train_list", "val_list", "class_list"))
    }
    said += [f"images: {settings_text(lists)}"] * bool(lists)
    broken = sum(record.skipped_broken.values())
    said += [f"images: {broken} broken ones left out"] * bool(broken)
    said += [f"dtype: {record.dtype}, not fp32"] * (record.dtype != "fp32")
    return tuple(said)


def _is_comparable(score: Placed) -> bool:
    """Whether a difference means something. What another machine takes does not, unless it does the paper's work."""
    record, measure = score.record, score.measure
    if measure.dataset:
        return not other_data(record, measure.dataset)
    by_the_recipe = f"{record.protocol}/{record.recipe}" == measure.recipe and not other_settings(record, measure)
    return by_the_recipe and record.device.startswith("cuda") and not _other_processes(record)


def _other_processes(record: Record) -> list[str]:
    ours, theirs = record.details.get("processes"), record.resolved_recipe.get("processes")
    return [] if theirs in (None, ours) else [f"processes: {ours}, not {theirs}"]


def _newest(results: Results) -> dict[str, int]:
    newest: dict[str, int] = {}
    for record in results:
        newest[record.protocol] = max(record.version, newest.get(record.protocol, 0))
    return newest


# What is shown -------------------------------------------------------------------------------------------------------


def _line_labels(scores: Sequence[Placed], taken: Sequence[str]) -> dict[tuple[str, Owner], str]:
    """By the paper's line, "" for models that stand alone, and the owner: labels that no other line has."""
    several = crowded(scores)
    labels = {(score.row.label, score.owner): score.row.label for score in scores}
    for (line, owner), record in {(score.row.label, score.owner): score.record for score in scores}.items():
        if line in several:
            labels[line, owner] = f"{line} · {record.weights_sha256[:8]}"
        elif not line:
            labels[line, owner] = f"{owner[0]} (measured)" if owner[0] in taken else owner[0]
    own = {key: label for key, label in labels.items() if not key[0] or key[0] in several}
    tails: list[Callable[[tuple[str, Owner]], str]] = [
        lambda key: key[1][1][:12],
        lambda key: key[1][2] or "default key",
        lambda key: key[1][0],
        lambda key: key[1][1],
    ]
    return labels | distinct(own, tails)


def _line_order(lines: Sequence[Row], labels: Mapping[tuple[str, Owner], str]) -> list[str]:
    """The paper's lines, below each its checkpoints if it has several, and below all the models that stand alone."""
    below: dict[str, set[str]] = defaultdict(set)
    for (line, _), label in labels.items():
        if label != line:
            below[line].add(label)
    return [label for row in lines for label in (row.label, *sorted(below[row.label]))] + sorted(below[""])


def _headings(scores: Sequence[Placed]) -> dict[Key, str]:
    """By key: the paper's column if there is but one, then the run; where that is not enough, what tells them apart."""
    first: dict[Key, Placed] = {}
    for score in scores:
        first.setdefault(score.key, score)
    return distinct(
        {
            key: (f"{score.column.name}: " if score.only_column else "") + run_label(score.record)
            for key, score in first.items()
        },
        [
            lambda key: first[key].measure.metric,
            lambda key: f"manifest {_short(canonical(first[key].record.dataset_manifest_sha256))}",
            lambda key: _short(repr(key)),
        ],
    )


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _distance(found: Mapping[str, Sequence[Placed]]) -> tuple[int, ...]:
    """Of a measured column from the paper's: the nearest stand first."""
    score = next(iter(found.values()))[0]
    deviates = bool(column_deviations(score.record).as_json())
    return *(not each for each in alike(score.record, score.measure)), deviates, score.record.version


def _printed(column: Column, lines: Sequence[Row]) -> dict[str, Shown]:
    cells = {row.label: row.cells[column.name] for row in lines if column.name in row.cells}
    digits = _decimals(cells.values())
    return {label: _published(cell, digits) for label, cell in cells.items()}


def _published(cell: Cell, digits: int) -> Shown:
    unknown = dict.fromkeys(("stderr", "ddof", "interval95", "n", "seeds"))
    return {"value": cell.value, "std": cell.std, "digits": digits, **unknown}


def _decimals(cells: Iterable[Cell]) -> int:
    """As many as one of them was printed with; trailing zeros are not known any more."""
    numbers = [number for cell in cells for number in (cell.value, cell.std) if number is not None]
    return max((len(f"{number:.12g}".partition(".")[2]) for number in numbers), default=0)


def _shown(score: Score, value: float, uncertainty: float | None) -> Shown:
    return {
        "value": value,
        "stderr": None if score.stderr is None else uncertainty,
        "std": None if score.std is None else uncertainty,
        "ddof": score.ddof,
        "interval95": None if score.interval95 is None else uncertainty,
        "n": score.n,
        "seeds": 1,
    }


def _summary(scores: Sequence[Placed]) -> Shown:
    """One run with its own uncertainty, or the mean over seeds with their standard deviation, as in table.py."""
    if len(scores) == 1:
        return _shown(scores[0].of_record, scores[0].value, scores[0].uncertainty)
    assert len({score.record.seed for score in scores}) == len(scores), "two runs in one cell that differ in no seed"
    values = [score.value for score in scores]
    several = Score(value=0.0, n=len(values), std=0.0, ddof=1)
    return {**_shown(several, statistics.fmean(values), statistics.stdev(values)), "seeds": len(values)}


def _run_text(record: Record) -> str:
    seed = f" · seed {record.seed}" if record.seed else ""
    return f"{record.model} · {run_label(record)}{seed}"


def _about(layout: Table, lines: Sequence[Row]) -> list[str]:
    """What the paper's numbers need said."""
    notes = [layout.title + ".", *([layout.note] if layout.note else [])]
    notes += [
        f"{column.name}: not measured here: {column.measure}."
        for column in layout.columns
        if isinstance(column.measure, str)
    ]
    lower = [name for name in dict.fromkeys(name for row in lines for name in row.cells) if _is_lower(name, lines)]
    notes += [f"Lower is better: {'; '.join(lower)}."] if lower else []
    return [*notes, *_remarked(lines)]


def _is_lower(column: str, lines: Sequence[Row]) -> bool:
    cell = next(row.cells[column] for row in lines if column in row.cells)
    return cell.unit in ("seconds", "minutes", "hours", "GB") or cell.metric.startswith(("overlap", "inter_mean"))


def _remarked(lines: Sequence[Row]) -> list[str]:
    """The notes of the cells, each once, with where it applies."""
    remarked: dict[str, list[tuple[Row, str]]] = defaultdict(list)
    for row in lines:
        for name, cell in row.cells.items():
            if cell.note:
                remarked[cell.note].append((row, name))
    notes = []
    for note, where in remarked.items():
        columns = dict.fromkeys(name for _, name in where)
        whole = all(
            sum(name == column for _, name in where) == sum(column in row.cells for row in lines) for column in columns
        )
        if whole:
            named = (
                "every number"
                if len(columns) == len({name for row in lines for name in row.cells})
                else "; ".join(columns)
            )
        else:
            labels = {row.label: [name for other, name in where if other is row] for row, _ in where}
            of = {row.label: len(row.cells) for row in lines}
            named = "; ".join(
                label if len(names) == of[label] else f"{label} · {' · '.join(names)}"
                for label, names in labels.items()
            )
        notes.append(f"On {named}: {note}.")
    return notes


def _about_runs(table: str, results: Results, scores: Sequence[Placed]) -> list[str]:
    """What the measured numbers need said."""
    notes = []
    if scores:
        notes.append("A column that names a protocol was measured here, on the data that it names.")
    else:
        notes.append(f"Nothing of it was measured yet: ssl-bench reproduce {table} --dry-run")
    on_test = {f"{each.record.protocol}/{each.record.recipe}" for each in scores if each.record.selected_on == "test"}
    if on_test:
        notes.append(f"Selected on the test set, in whole or in part, by its recipe: {', '.join(sorted(on_test))}.")
    protocols = protocols_of(tables.find(table))
    if limited := sum(record.limited and record.protocol in protocols for record in results):
        notes.append(f"Left out: {limited} limited run{'s' if limited > 1 else ''} (--limit).")
    return notes
