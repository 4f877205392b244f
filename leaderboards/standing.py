"""Where in a paper's table a run's scores stand: on which line, in which column.

Decided score by score:

1. Its line is one whose method (or whole label, or pre-training recipe) is the model's name, else the method that the
   checkpoint's format says, unless what is known of it (architecture, epochs, data) contradicts the line. A name is
   the user's word: it holds against what is known, and a remark says so.
2. Among these lines and their columns, the score stands where the paper's number is measured by the same protocol and
   called the same; of several such places, where dataset, recipe and settings are most alike.
3. If several lines are left, it is not guessed: the model gets a line of its own, as does a model of which no line is.

What any record says of a checkpoint holds for all its records, so that they stand on one line.

Limited runs stand nowhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssl_bench.leaderboards import tables
from ssl_bench.leaderboards.complete import other_data
from ssl_bench.leaderboards.origins import Origin, contradictions, origins, said_of
from ssl_bench.leaderboards.record import Record, Score
from ssl_bench.leaderboards.store import Results
from ssl_bench.leaderboards.strict_json import canonical
from ssl_bench.leaderboards.table import column_deviations
from ssl_bench.leaderboards.tables import Column, Measure, Row, Table

# Which line ----------------------------------------------------------------------------------------------------------


def lines_of(table: str) -> list[Row]:
    """The published lines of `moca:8`."""
    paper, _, number = table.partition(":")
    return tables.rows(paper, number)


def methods_of(row: Row) -> set[str]:
    """Mostly one."""
    return {cell.method for cell in row.cells.values()}


def _candidates(
    record: Record, origin: Origin, layout: Table, lines: Sequence[Row]
) -> tuple[list[Row], tuple[str, ...]]:
    """The lines that the record may stand on; if what is known forbids the lines that are meant, why."""
    told, made = origin.told(record.arch), origin.made
    named = lines_named(layout, lines, record.model)
    if not named and made.get("method"):
        recipe = f"{made['method']}/{made.get('recipe')}" if not made.get("overrides") else ""
        meant = lines_named(layout, lines, recipe) or lines_named(layout, lines, str(made["method"]))
    else:
        meant = named or [row for row in lines if origin.method in methods_of(row)]
    fitting = [row for row in meant if any(not contradictions(told, said_of(cell)) for cell in row.cells.values())]
    if fitting or not meant:
        return fitting, ()
    if named:
        return named, ()
    return [], (meant[0].first.method, *contradictions(told, said_of(meant[0].first)))


def lines_named(layout: Table, lines: Sequence[Row], name: str) -> list[Row]:
    """The lines that a model of this name means: by the whole label, else the method, else what trains it."""

    def trained_by(row: Row) -> set[str]:
        found = [each for cell in row.cells.values() if (each := layout.pretraining_of(cell))]
        recipes = {each.recipe for each in found if not each.settings}
        folders = {each.folder.removeprefix("runs/") for each in found}  # which their checkpoints are called after
        return folders | recipes | {recipe.replace("/", "-") for recipe in recipes}

    for names_of in (lambda row: {row.label}, methods_of, trained_by):
        found = [row for row in lines if name.casefold() in {each.casefold() for each in names_of(row)}]
        if found:
            return found
    return []


# Which column --------------------------------------------------------------------------------------------------------


ALONE = Row("", {})
Key = tuple[str, bool, str, str]
Owner = tuple[str, str, str]


@dataclass(frozen=True)
class Placed:
    """One score of a record, and where in the table it stands."""

    record: Record
    row: Row  # ALONE: a line of its own
    column: Column
    measure: Measure
    only_column: bool  # no other column is measured so
    run: str  # equal for runs that may share a column
    told: Mapping[str, str]  # what is known of the checkpoint

    @property
    def of_record(self) -> Score:
        """As it was recorded."""
        return self.record.scores[self.measure.metric]

    @property
    def value(self) -> float:
        """In the printed unit."""
        return self.of_record.value * self.measure.scale

    @property
    def uncertainty(self) -> float | None:
        """In the printed unit."""
        score = self.of_record
        spread = next((each for each in (score.stderr, score.std, score.interval95) if each is not None), None)
        return None if spread is None else spread * abs(self.measure.scale)

    @property
    def owner(self) -> Owner:
        """Whose score it is: the rows of table.py."""
        record = self.record
        return record.model, record.weights_sha256, str(record.checkpoint_key) if record.checkpoint_key_given else ""

    @property
    def key(self) -> Key:
        """Equal for scores that may stand in one measured column."""
        return self.column.name, self.only_column, self.measure.metric, self.run


def place(table: str, results: Results) -> tuple[list[Placed], list[str]]:
    """Every score that belongs into the table, and what a reader must know of where it stands."""
    layout, lines = tables.find(table), lines_of(table)
    protocols, known = protocols_of(layout), origins(results)
    candidates: dict[Hashable, tuple[list[Row], tuple[str, ...]]] = {}
    runs: dict[str, str] = {}
    places: dict[Hashable, tuple[list[_Place], list[str]]] = {}  # thousands of records may stand alike
    scores: list[Placed] = []
    remarks = Remarks()
    for record in results:
        if record.limited or record.protocol not in protocols:
            continue
        origin = known[record.model, record.weights_sha256]
        who = (record.model, record.weights_sha256, record.arch)
        if who not in candidates:
            candidates[who] = _candidates(record, origin, layout, lines)
        meant, against = candidates[who]
        told = origin.told(record.arch)
        run = [record.protocol, record.recipe, record.version, record.dataset, record.dataset_manifest_sha256]
        text = repr((run, column_deviations(record)))
        if text not in runs:
            runs[text] = canonical([*run, column_deviations(record)])
        labels = tuple(row.label for row in meant)
        same = (labels, repr(told), text, tuple(record.scores), repr((record.resolved_recipe, record.n_samples)))
        if same not in places:
            places[same] = _places(record, told, meant, layout)
        found, ambiguous = places[same]
        here = [Placed(record, *spot, only, runs[text], told) for spot, only in found]
        remarks.about(record.model, here, against, ambiguous)
        scores += here
    return scores, remarks.texts()


class Remarks:
    """What a reader must know of where models stand: each reason once, however many they are."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], dict[str, str]] = {}  # reason and fields -> model -> in detail

    def about(self, model: str, here: Sequence[Placed], against: tuple[str, ...], ambiguous: Iterable[str]) -> None:
        """Of one record, after it was placed."""
        for row in {score.row.label: score.row for score in here if score.row.label}.values():
            why = contradictions(here[0].told, said_of(row.first))
            if all(contradictions(here[0].told, said_of(cell)) for cell in row.cells.values()):
                self._add(model, f"by name on the line {row.label}", why)
        if against and here:
            self._add(model, f"though of {against[0]}, standing alone", against[1:])
        for lines in ambiguous:
            self._add(model, f"standing alone, may be of the lines {lines}; say which by --name", [])

    def _add(self, model: str, reason: str, why: Sequence[str]) -> None:
        fields = ", ".join(each.partition(":")[0] for each in why)
        self._said.setdefault((reason, fields), {}).setdefault(model, ", ".join(why))

    def texts(self) -> list[str]:
        """A sentence a reason, with a few names."""
        texts = []
        for (reason, fields), models in self._said.items():
            names = list(models)
            few = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
            detail = models[names[0]] if len(names) == 1 else f"other {fields}"
            texts.append(f"{few}, {reason}" + (f": {detail}." if fields else "."))
        return texts


def protocols_of(layout: Table) -> set[str]:
    """Whose runs may stand in the table."""
    return {measure.recipe.partition("/")[0] for column in layout.columns for measure in _measures(column)}


def _measures(column: Column) -> list[Measure]:
    return [each for each in (column.measure, *(other for _, other in column.rows)) if isinstance(each, Measure)]


_Spot = tuple[Row, Column, Measure]
_Place = tuple[_Spot, bool]  # and whether no other column is measured so


def _places(
    record: Record, told: Mapping[str, str], candidates: Sequence[Row], layout: Table
) -> tuple[list[_Place], list[str]]:
    """Where each score of the record stands: on a candidate line if there is one such place, else on its own.

    With it, the lines among which nothing decides.
    """
    on_lines = _best(record, _spots_on(told, candidates, layout))
    alone = _best(record, _spots_alone(told, layout))
    places, ambiguous = [], []
    for metric in dict.fromkeys((*on_lines, *alone)):
        spots = on_lines.get(metric, [])
        labels = list(dict.fromkeys(row.label for row, _, _ in spots))
        if len(labels) > 1:
            shown = ", ".join(map(repr, labels[:3])) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
            ambiguous.append(shown)
        if len(labels) != 1:
            spots = alone.get(metric, [])
        by_scale: dict[float, list[_Spot]] = defaultdict(list)  # minutes an epoch are hours of all epochs, too
        for spot in spots:
            by_scale[spot[2].scale].append(spot)
        for same in by_scale.values():  # of columns that nothing tells apart, beside the last
            places.append((same[-1], len(same) == 1))
    return places, ambiguous


def _spots_on(told: Mapping[str, str], lines: Sequence[Row], layout: Table) -> Iterator[_Spot]:
    """The places of some lines."""
    for row in lines:
        never_fits = all(contradictions(told, said_of(cell)) for cell in row.cells.values())
        for column in layout.columns:
            cell = row.cells.get(column.name)
            if cell and contradictions(told, said_of(cell)) and not never_fits:
                continue  # the columns of this line are of several networks, and this one is another's
            measure = column.measure_of(cell or row.first)
            if isinstance(measure, str):  # the paper's way is not ours; the column's may be
                measure = next(iter(_measures(column)), measure)
            if isinstance(measure, Measure):
                yield row, column, measure


def _spots_alone(told: Mapping[str, str], layout: Table) -> Iterator[_Spot]:
    """The columns. One whose unit depends on the line (hours of so many epochs) holds no model without a line."""
    for column in layout.columns:
        scales: dict[str, set[float]] = defaultdict(set)
        for measure in _measures(column):
            scales[measure.metric].add(measure.scale)
        for measure in _measures(column):
            if len(scales[measure.metric]) == 1 and not contradictions(told, column.cells):
                yield ALONE, column, measure


def _best(record: Record, spots: Iterable[_Spot]) -> dict[str, list[_Spot]]:
    """By metric, the places where the paper measures most alike; of each column one."""
    by_metric: dict[str, list[tuple[tuple[bool, ...], _Spot]]] = defaultdict(list)
    for row, column, measure in spots:
        if measure.recipe.partition("/")[0] == record.protocol and measure.metric in record.scores:
            likeness: tuple[bool, ...] = (*alike(record, measure), column.name in row.cells)
            by_metric[measure.metric].append((likeness, (row, column, measure)))
    best = {}
    for metric, found in by_metric.items():
        most = max(likeness for likeness, _ in found)
        kept: dict[tuple[str, str], _Spot] = {}
        for likeness, spot in found:
            if likeness == most:
                kept.setdefault((spot[0].label, spot[1].name), spot)
        best[metric] = list(kept.values())
    return best


def alike(record: Record, measure: Measure) -> tuple[bool, bool, bool]:
    """Whether the run is on the data of the paper's number, by its recipe, with its settings: in order of weight."""
    return (
        not measure.dataset or not other_data(record, measure.dataset),
        measure.recipe == f"{record.protocol}/{record.recipe}",
        not other_settings(record, measure),
    )


def crowded(scores: Iterable[Placed]) -> set[str]:
    """The lines on which several checkpoints stand, or one number in two places. A teacher and its student are one."""
    owners: dict[tuple[str, Key], set[Owner]] = defaultdict(set)
    weights: dict[str, dict[str | None, set[str]]] = defaultdict(lambda: defaultdict(set))  # line -> key -> weights
    specs: dict[str, set[str]] = defaultdict(set)
    for score in scores:
        line, record = score.row.label, score.record
        owners[line, score.key].add(score.owner)
        weights[line][record.checkpoint_key].add(record.weights_sha256)
        specs[line].add(record.checkpoint.spec)
    disputed = {line for (line, _), of in owners.items() if len(of) > 1}
    several = {
        line
        for line, by_key in weights.items()
        if len(set().union(*by_key.values())) > 1
        and (len(specs[line]) > 1 or any(len(of) > 1 for of in by_key.values()))
    }
    return (disputed | several) - {""}


def other_settings(record: Record, measure: Measure) -> list[str]:
    """Where the run's settings are not those of the paper's number."""
    said = []
    for name in sorted({*measure.settings, *record.overrides}):
        ours = as_typed(record.resolved_recipe.get(name))
        if name not in measure.settings:
            said.append(f"{name}: {ours}, not the recipe's own")
        elif ours != (theirs := as_typed(measure.settings[name])):
            said.append(f"{name}: {ours}, not {theirs}")
    return said


def as_typed(value: Any) -> str:
    """As `--set` takes it, so that (5, 10), [5, 10] and "5,10" are the same, and 5.0 is 5."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_typed, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
