"""The papers' tables with our numbers below theirs, the scatter of both, and the charts of what the papers printed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ssl_bench.leaderboards.beside import Comparison, comparisons
from ssl_bench.leaderboards.published import PAPERS, Cell, cells
from ssl_bench.leaderboards.record import Record
from ssl_bench.leaderboards.report import ablations
from ssl_bench.leaderboards.report.charts import Chart, Point, Series
from ssl_bench.leaderboards.report.places import Places
from ssl_bench.leaderboards.report.words import deviating, in_order, plural
from ssl_bench.leaderboards.standing import Placed, place
from ssl_bench.leaderboards.store import Results
from ssl_bench.leaderboards.table import run_label
from ssl_bench.leaderboards.tables import Row, Table, rows, tables

COMPARED = 1_000  # runs: each is held against every line of 64 tables
SCATTERED = 1_000  # points
MODELS = 12  # lines of ours below one of theirs, and below all
STACKED = 3  # numbers of one model in one cell
CHARTS, REMARKS = 24, 24  # of one table
_HIGHLIGHTS = {"moca:8": "images per class", "moca:fig3c": "train images"}  # MOCA's Figures 1a and 3


@dataclass(frozen=True)
class Printed:
    """A number of the paper."""

    text: str
    note: int | None
    best: bool


@dataclass(frozen=True)
class Measured:
    """Our number for it."""

    text: str
    spread: str
    difference: str  # empty between numbers of different data
    href: str
    id: str
    about: str  # the letter of what differs, or of what was run; empty: the same settings


@dataclass(frozen=True)
class Entry:
    """Our numbers in one cell."""

    numbers: tuple[Measured, ...] = ()
    left_out: int = 0
    more: str = ""  # where the first of those is


Ours = tuple[str, tuple[Entry, ...]]  # a model, and its numbers in the table's columns


@dataclass(frozen=True)
class Line:
    """A line of the paper, and ours below it: one a model."""

    label: str
    printed: tuple[Printed | None, ...]
    measured: tuple[Ours, ...]
    left_out: int


@dataclass(frozen=True)
class View:
    """One table of a paper."""

    name: str
    id: str
    table: Table
    columns: tuple[tuple[str, str], ...]  # name, unit where the name does not say it
    lines: tuple[Line, ...]
    others: Line  # models that stand on no line of the paper
    notes: tuple[str, ...]
    about: tuple[tuple[str, str], ...]  # letter, what differs or was run
    remarks: tuple[str, ...]
    charts: tuple[Chart, ...]
    left_out: str


@dataclass(frozen=True)
class Paper:
    """One page."""

    name: str
    title: str
    page: str
    views: tuple[View, ...]
    prose: tuple[Cell, ...]  # numbers that stand in no table
    prose_charts: tuple[Chart, ...]
    printed: int
    measured: int


@dataclass(frozen=True)
class Found:
    """All that the pages of papers show."""

    papers: tuple[Paper, ...]
    scatter: Chart | None
    scatter_left_out: int
    comparable: int
    compared: int
    highlights: tuple[Chart, ...]
    not_compared: int  # older runs, where there are too many


def papers(places: Places) -> Found:
    """Compare every table with the results."""
    newest = _newest(places.results)
    compared = {name: comparisons(name, newest) for name in tables()}
    pages = tuple(_paper(key, compared, newest, places) for key in PAPERS)
    percent = [each for found in compared.values() for each in found if each.cell.unit == "percent"]
    percent.sort(key=lambda each: bool(each.differs))  # what may be compared comes first, if not all can be drawn
    highlights = [chart for key in PAPERS for chart in ablations.against_hours(name_of(key), cells(key))]
    charts = {view.name: view.charts for paper in pages for view in paper.views}
    for name, setting in _HIGHLIGHTS.items():
        highlights += [chart for chart in charts[name] if chart.x_label == setting]
    return Found(
        papers=pages,
        scatter=_scatter(percent[:SCATTERED], places),
        scatter_left_out=max(0, len(percent) - SCATTERED),
        comparable=sum(not each.differs for each in percent),
        compared=len(percent),
        highlights=tuple(highlights),
        not_compared=len(places.results) - len(newest),
    )


def _newest(results: Results) -> Results:
    """As many of the last runs as can be compared in seconds, in their old order."""
    if len(results) <= COMPARED:
        return results
    order = sorted(range(len(results)), key=lambda index: (results.records[index].started, results.paths[index]))
    return results.take(sorted(order[-COMPARED:]))


def name_of(key: str) -> str:
    """MOCA, ExtreMA, ..."""
    return PAPERS[key].partition(":")[0]


def _scatter(compared: Sequence[Comparison], places: Places) -> Chart | None:
    points: dict[str, list[Point]] = defaultdict(list)
    for each in compared:
        href = places.show(each.record, at="papers.html#scatter", as_what="measured against published")
        label = f"{each.row}, {each.column} ({each.table}): {each.record.model}"
        key = each.table.partition(":")[0]
        points[key].append(Point(each.cell.value, each.measured, label, href, not each.differs))
    if not points:
        return None
    series = tuple(Series(name_of(key), tuple(points[key]), "points") for key in PAPERS if key in points)
    return Chart("Measured against published", "published, %", "measured, %", series, identity=True)


def _paper(key: str, compared: Mapping[str, Sequence[Comparison]], newest: Results, places: Places) -> Paper:
    page = f"paper-{key}.html"
    mine = [name for name in tables() if name.partition(":")[0] == key]
    views = tuple(_View(name, page, places).view(compared[name], *place(name, newest)) for name in mine)
    prose = [cell for cell in cells(key) if cell.table.startswith("text:")]
    charts = [
        chart
        for section in dict.fromkeys(cell.table for cell in prose)
        for chart in ablations.of_table(f"{key}:{section}", [cell for cell in prose if cell.table == section], {})
    ]
    title = PAPERS[key].partition(":")[2].strip()
    measured = sum(len(compared[name]) for name in mine)
    return Paper(name_of(key), title, page, views, tuple(prose), tuple(charts), len(cells(key)), measured)


@dataclass
class _View:
    """Gathers what stands in one table."""

    name: str
    page: str
    places: Places
    letters: dict[str, str] = field(default_factory=dict)  # what differs -> its letter
    points: dict[int, list[tuple[str, Point]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        """The paper's side of it."""
        paper, _, self.number = self.name.partition(":")
        self.table, self.rows = tables()[self.name], rows(paper, self.number)
        self.names = [column.name for column in self.table.columns]
        self.digits = {name: _digits(row.cells[name] for row in self.rows if name in row.cells) for name in self.names}

    def view(self, compared: Sequence[Comparison], placed: Sequence[Placed], remarks: Sequence[str]) -> View:
        """The table as it is shown."""
        notes = list(dict.fromkeys(cell.note for row in self.rows for cell in row.cells.values() if cell.note))
        best = {name: _best(name, self.rows) for name in self.names}
        ours: dict[str, list[_Score]] = defaultdict(list)
        for each in compared:
            ours[each.row].append(_Score.compared(each))
        lines = []
        for number, row in enumerate(self.rows, 1):
            printed = tuple(_printed(row.cells.get(name), self.digits[name], notes, best[name]) for name in self.names)
            lines.append(Line(row.label, printed, *self._models(number, ours[row.label])))
        others = Line("", (), *self._models(0, [_Score.alone(each) for each in placed if not each.row.label]))
        charts = ablations.of_table(self.name, [cell for row in self.rows for cell in row.cells.values()], self.points)
        return View(
            name=self.name,
            id=f"table-{self.number}",
            table=self.table,
            columns=tuple((name, _unit(name, self.rows)) for name in self.names),
            lines=tuple(lines),
            others=others,
            notes=tuple(notes),
            about=tuple((letter, text) for text, letter in self.letters.items()),
            remarks=tuple(remarks[:REMARKS]),
            charts=tuple(charts[:CHARTS]),
            left_out=f"{plural(len(charts) - CHARTS, 'more chart')} of settings" if len(charts) > CHARTS else "",
        )

    def _models(self, line: int, scores: Sequence[_Score]) -> tuple[tuple[Ours, ...], int]:
        """A line a model, and how many more there are."""
        labels = _labels(score.record for score in scores)
        by_model: dict[str, dict[str, list[_Score]]] = defaultdict(lambda: defaultdict(list))
        for score in scores:
            by_model[labels[_owner(score.record)]][score.column].append(score)
        shown: list[Ours] = []
        for model in sorted(by_model)[:MODELS]:
            at = f"table-{self.number}-{line}-{len(shown) + 1}"
            entries = [self._entry(model, by_model[model][name], f"{at}-{k}") for k, name in enumerate(self.names, 1)]
            shown.append((model, tuple(entries)))
        return tuple(shown), max(0, len(by_model) - MODELS)

    def _entry(self, model: str, scores: Sequence[_Score], at: str) -> Entry:
        """The numbers that are measured most alike come first."""
        numbers = []
        ordered = sorted(scores, key=lambda score: (score.away, in_order(score.record)))
        for count, score in enumerate(ordered[:STACKED], 1):
            id_ = f"{at}-{count}"
            href = self.places.show(score.record, at=f"{self.page}#{id_}", as_what=f"{self.name}, {score.column}")
            if score.cell is not None and not score.about:  # else it is no point of the paper's axes
                self.points[id(score.cell)].append((model, Point(0.0, score.value, "", href)))
            digits = max(1, self.digits[score.column])
            spread = "" if score.uncertainty is None else f"± {score.uncertainty:.{digits}f}"
            difference = "" if score.difference is None else f"{score.difference:+.{digits}f}"
            letter = self.letters.setdefault(score.about, _letter(len(self.letters))) if score.about else ""
            numbers.append(Measured(f"{score.value:.{digits}f}", spread, difference, href, id_, letter))
        left = ordered[STACKED:]
        what = f"{self.name}, {plural(len(left), 'more number')} of {scores[0].column}" if left else ""
        more = self.places.show(left[0].record, at=f"{self.page}#{at}-1", as_what=what) if left else ""
        return Entry(tuple(numbers), len(left), more)


@dataclass(frozen=True)
class _Score:
    """One of our numbers, on a line of the paper or alone."""

    column: str
    record: Record
    value: float
    uncertainty: float | None
    difference: float | None  # None between numbers of different data
    about: str
    away: int  # in how many settings
    cell: Cell | None

    @classmethod
    def compared(cls, each: Comparison) -> _Score:
        difference = each.difference if each.comparable else None
        about, away = "; ".join(each.differs), len(each.differs)
        return cls(each.column, each.record, each.measured, each.uncertainty, difference, about, away, each.cell)

    @classmethod
    def alone(cls, each: Placed) -> _Score:
        about = run_label(each.record)
        return cls(
            each.column.name, each.record, each.value, each.uncertainty, None, about, deviating(each.record), None
        )


def _owner(record: Record) -> tuple[str, str, str, int]:
    key = str(record.checkpoint_key) if record.checkpoint_key_given else ""
    return record.model, record.weights_sha256, key, record.seed


def _labels(records: Iterable[Record]) -> dict[tuple[str, str, str, int], str]:
    """Two weights of one name are two models, and every seed a line of its own."""
    owners = sorted({_owner(record) for record in records})
    weights: dict[str, set[str]] = defaultdict(set)
    for model, sha, _, _ in owners:
        weights[model].add(sha)
    labels = {}
    for model, sha, key, seed in owners:
        parts = [model, sha[:12] if len(weights[model]) > 1 else "", key, f"seed {seed}" if seed else ""]
        labels[model, sha, key, seed] = " · ".join(filter(None, parts))
    return labels


def _letter(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def _digits(column: Iterable[Cell]) -> int:
    """As many decimals as one of the column was printed with."""
    return max((len(f"{cell.value:.12g}".partition(".")[2]) for cell in column), default=0)


def _printed(cell: Cell | None, digits: int, notes: Sequence[str], best: float | None) -> Printed | None:
    if cell is None:
        return None
    spread = f" ± {cell.std:g}" if cell.std is not None else ""
    note = notes.index(cell.note) + 1 if cell.note else None
    return Printed(f"{cell.value:.{digits}f}{spread}", note, cell.value == best)


_LOWER_UNITS = ("seconds", "minutes", "hours", "GB")
_LOWER_METRICS = ("inter_mean", "overlap")
_NEITHER = ("variance",)  # not better where more or less


def _best(column: str, lines: Sequence[Row]) -> float | None:
    """The best printed number of a column of one metric; times and memory are better where they are less."""
    found = [line.cells[column] for line in lines if column in line.cells]
    metrics = {(cell.metric, cell.dataset, cell.unit) for cell in found}
    if len(found) < 2 or len(metrics) != 1:
        return None
    ((metric, _, unit),) = metrics
    if metric.startswith(_NEITHER):
        return None
    values = [cell.value for cell in found]
    return min(values) if unit in _LOWER_UNITS or metric.startswith(_LOWER_METRICS) else max(values)


def _unit(column: str, lines: Sequence[Row]) -> str:
    units = dict.fromkeys(line.cells[column].unit for line in lines if column in line.cells)
    return ", ".join({"percent": "%"}.get(unit, unit) for unit in units if unit.lower() not in column.lower())
