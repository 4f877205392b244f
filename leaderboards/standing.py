"""Where in a paper's table a run's scores stand: on which line, in which column.

Decided score by score:

1. Its line is one whose method (or whole label, or pre-training recipe) is the model's name, else the method that the
   checkpoint's format says, unless what is known of it (architecture, epochs, data) contradicts the line. A name is
   the user's word: it holds against what is known, and a remark says so.
2. Among these lines and their columns, the score stands where the paper's number is measured by the same protocol and
   called the same; of several such places, where dataset, recipe and settings are most alike.
3. If several lines are left, it is not guessed: the model gets a line of its own, as does a model of which no line is.

Limited runs stand nowhere.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssl_bench.leaderboards import tables
from ssl_bench.leaderboards.published import Cell
from ssl_bench.leaderboards.record import Record, Score
from ssl_bench.leaderboards.store import Results
from ssl_bench.leaderboards.strict_json import canonical
from ssl_bench.leaderboards.table import column_deviations
from ssl_bench.leaderboards.tables import Column, Measure, Row, Table

# Which line ----------------------------------------------------------------------------------------------------------

# What a file's format says of its method. Not here: "mae", since MOCA's extracted teachers have that form too.
_METHOD_OF_FORMAT = {
    "moca": "MOCA",
    "tec-training": "TEC",
    "tec-release": "TEC",
    "extrema": "ExtreMA",
    "sdae": "SdAE",
    "hf-vit-mae": "MAE",
    "dino": "DINO",
    "ibot": "iBOT",
    "ibot-backbone": "iBOT",
    "msn": "MSN",
    "moco-v3": "MoCo-v3",
    "beit": "BEiT",
    "hf-beit": "BEiT",
    "data2vec": "data2vec",
    "sit": "SiT",
    "mc-ssl": "MC-SSL",
    "cae": "CAE",
    "simmim": "SimMIM",
    "random": "Random",
}


def lines_of(table: str) -> list[Row]:
    """The published lines of `moca:8`."""
    paper, _, number = table.partition(":")
    return tables.rows(paper, number)


def methods_of(row: Row) -> set[str]:
    """Mostly one."""
    return {cell.method for cell in row.cells.values()}


def said_of(cell: Cell) -> dict[str, str]:
    """What the paper says of the network, where it says it."""
    return {name: cell.field(name) for name in _IDENTITY}


def told_of(record: Record) -> dict[str, str]:
    """What is known of the checkpoint: its shape, and what our own checkpoints say of their pre-training."""
    made = record.details.get("pretraining") or {}
    epochs = made.get("epochs_done", (made.get("resolved_recipe") or {}).get("epochs"))  # fewer, if it was stopped
    said = "" if epochs is None else f"{epochs:g}"
    return {"arch": paper_arch(record.arch), "epochs": said, "pretrain_data": str(made.get("data", ""))}


def _candidates(record: Record, layout: Table, lines: Sequence[Row]) -> tuple[list[Row], str]:
    """The lines that the record may stand on, and what a reader must know about that."""
    told = told_of(record)
    named = lines_named(layout, lines, record.model)
    made = record.details.get("pretraining") or {}
    if not named and made.get("method"):
        recipe = f"{made['method']}/{made.get('recipe')}" if not made.get("overrides") else ""
        meant = lines_named(layout, lines, recipe) or lines_named(layout, lines, str(made["method"]))
    else:
        meant = named or [row for row in lines if _METHOD_OF_FORMAT.get(record.checkpoint.format) in methods_of(row)]
    fitting = [row for row in meant if any(not contradictions(told, said_of(cell)) for cell in row.cells.values())]
    if fitting or not meant:
        return fitting, ""
    why = ", ".join(contradictions(told, said_of(meant[0].first)))
    if named:
        return named, f"{record.model}, by its name on the line {meant[0].label}: {why}."
    return [], f"{record.model}, though of {meant[0].first.method}, stands alone: {why}."


def lines_named(layout: Table, lines: Sequence[Row], name: str) -> list[Row]:
    """The lines that a model of this name means: by the whole label, else the method, else what trains it."""

    def trained_by(row: Row) -> set[str]:
        found = [each for cell in row.cells.values() if (each := layout.pretraining_of(cell))]
        recipes = {each.recipe for each in found if not each.settings}
        folders = {each.command().rpartition("/")[2] for each in found}  # which their checkpoints are called after
        return folders | recipes | {recipe.replace("/", "-") for recipe in recipes}

    for names_of in (lambda row: {row.label}, methods_of, trained_by):
        found = [row for row in lines if name.casefold() in {each.casefold() for each in names_of(row)}]
        if found:
            return found
    return []


def contradictions(told: Mapping[str, str], said: Mapping[str, str]) -> list[str]:
    """Where what is known of a checkpoint is not what the paper says: "epochs: 4, not 200"."""
    return [
        f"{words}: {told[name]}, not {said[name]}"
        for name, words in _IDENTITY.items()
        if told.get(name)
        and said.get(name)
        and told[name] != said[name]
        and not told[name].startswith(f"{said[name]}/")
    ]  # ViT-B/16 is a ViT-B


_IDENTITY = {"arch": "architecture", "epochs": "epochs", "pretrain_data": "pre-trained on"}
_SIZES = {"tiny": "T", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}


def paper_arch(arch: str) -> str:
    """As papers write it, where they do: vit_base_patch16_224 -> ViT-B/16."""
    match = re.match(r"(?:vit|beit)_([a-z]+)_patch(\d+)_", arch)
    return f"ViT-{_SIZES[match[1]]}/{match[2]}" if match and match[1] in _SIZES else arch


def our_arch(arch: str) -> str:
    """The other way round, for images of 224 px; empty for what has no such name."""
    match = re.fullmatch(r"ViT-([A-Za-z])/(\d+)", arch)
    size = next((size for size, letter in _SIZES.items() if match and letter == match[1]), "")
    return f"vit_{size}_patch{match[2]}_224" if match and size else ""


# Which column --------------------------------------------------------------------------------------------------------


ALONE = Row("", {})
Key = tuple[str, bool, str, str]


@dataclass(frozen=True)
class Placed:
    """One score of a record, and where in the table it stands."""

    record: Record
    row: Row  # ALONE: a line of its own
    column: Column
    measure: Measure
    only_column: bool  # no other column is measured so
    run: str  # equal for runs that may share a column

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
    def owner(self) -> tuple[str, str, str]:
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
    protocols = protocols_of(layout)
    candidates: dict[Hashable, tuple[list[Row], str]] = {}
    runs: dict[str, str] = {}
    places: dict[Hashable, tuple[list[_Place], list[str]]] = {}  # thousands of records may stand alike
    scores: list[Placed] = []
    remarks: dict[str, None] = {}
    for record in results:
        if record.limited or record.protocol not in protocols:
            continue
        who = (record.model, record.weights_sha256, record.arch)
        if who not in candidates:
            candidates[who] = _candidates(record, layout, lines)
        meant, remark = candidates[who]
        run = [record.protocol, record.recipe, record.version, record.dataset, record.dataset_manifest_sha256]
        text = repr((run, column_deviations(record)))
        if text not in runs:
            runs[text] = canonical([*run, column_deviations(record)])
        labels = tuple(row.label for row in meant)
        alike = (labels, repr(told_of(record)), text, tuple(record.scores), repr(record.resolved_recipe))
        if alike not in places:
            places[alike] = _places(record, meant, layout)
        found, ambiguous = places[alike]
        scores += [Placed(record, *spot, only, runs[text]) for spot, only in found]
        said = [f"{record.model} stands alone: it may be of the lines {of}; say which by --name." for of in ambiguous]
        remarks |= dict.fromkeys(filter(None, [remark if found else "", *said]))
    return scores, list(remarks)


def protocols_of(layout: Table) -> set[str]:
    """Whose runs may stand in the table."""
    return {measure.recipe.partition("/")[0] for column in layout.columns for measure in _measures(column)}


def _measures(column: Column) -> list[Measure]:
    return [each for each in (column.measure, *(other for _, other in column.rows)) if isinstance(each, Measure)]


_Spot = tuple[Row, Column, Measure]
_Place = tuple[_Spot, bool]  # and whether no other column is measured so


def _places(record: Record, candidates: Sequence[Row], layout: Table) -> tuple[list[_Place], list[str]]:
    """Where each score of the record stands: on a candidate line if there is one such place, else on its own.

    With it, the lines among which nothing decides.
    """
    on_lines = _best(record, _spots_on(record, candidates, layout))
    alone = _best(record, _spots_alone(record, layout))
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


def _spots_on(record: Record, lines: Sequence[Row], layout: Table) -> Iterator[_Spot]:
    """The places of some lines."""
    told = told_of(record)
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


def _spots_alone(record: Record, layout: Table) -> Iterator[_Spot]:
    """The columns. One whose unit depends on the line (hours of so many epochs) holds no model without a line."""
    told = told_of(record)
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
        measure.dataset in ("", record.dataset),
        measure.recipe == f"{record.protocol}/{record.recipe}",
        not other_settings(record, measure),
    )


def without_disputes(scores: list[Placed], remarks: list[str]) -> list[Placed]:
    """Two checkpoints in one cell: each gets a line of its own, since their mean would be nobody's."""
    owners: dict[tuple[str, Key], set[tuple[str, str, str]]] = defaultdict(set)
    for score in scores:
        owners[score.row.label, score.key].add(score.owner)
    disputed = dict.fromkeys(label for (label, _), of in owners.items() if label and len(of) > 1)
    remarks += [f"Several checkpoints claim the line {label!r}: each stands alone." for label in disputed]
    return [replace(score, row=ALONE) if score.row.label in disputed else score for score in scores]


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
    """As `--set` takes it, so that (5, 10), [5, 10] and "5,10" are the same."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_typed, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
