"""Leaderboards for the page: the frame of leaderboards/table.py, one a dataset, each number with its origin."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssl_bench.leaderboards import table
from ssl_bench.leaderboards.record import Record
from ssl_bench.leaderboards.report.places import Places
from ssl_bench.leaderboards.report.words import in_order, plural, unit
from ssl_bench.leaderboards.store import Results

if TYPE_CHECKING:
    import pandas

# A page that holds more than this takes a browser seconds to lay out; the csv beside it holds everything.
ROWS, COLUMNS, BOARDS = 100, 30, 40


@dataclass(frozen=True)
class Number:
    """One measured number as it is shown."""

    value: float
    text: str  # 58.2
    spread: str  # ± 1.5 (3 seeds)
    href: str
    best: bool
    id: str
    more: tuple[str, ...] = ()  # addresses of the other seeds


@dataclass(frozen=True)
class Head:
    """A column: what was measured how."""

    label: str  # in full, as the command line prints it
    name: str  # knn/dino
    small: str  # v1 · top1, %
    spread: str  # what is behind the ± of all its numbers: n=3, ddof=1
    settings: str
    lower: bool


@dataclass(frozen=True)
class Board:
    """One dataset's leaderboard."""

    dataset: str
    id: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[str, tuple[Number | None, ...]], ...]
    notes: tuple[str, ...]
    left_out: str
    csv: str  # its file
    csv_text: str


def boards(places: Places) -> tuple[list[Board], list[str]]:
    """A leaderboard a dataset, the one with most records first, and what is left out of the page."""
    by_dataset: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(places.results.records):
        if not record.limited:
            by_dataset[record.dataset].append(index)
    order = sorted(by_dataset, key=lambda name: (-len(by_dataset[name]), name))
    ids = _ids(order)
    found = [_board(name, ids[name], places.results.take(by_dataset[name]), places) for name in order[:BOARDS]]
    limited = sum(record.limited for record in places.results)
    remarks = [f"{plural(limited, 'run')} with --limit, in no leaderboard"] if limited else []
    if order[BOARDS:]:
        remarks.append(f"{plural(len(order) - BOARDS, 'more leaderboard')}: {', '.join(order[BOARDS:][:20])}")
    return found, remarks


def _ids(names: Sequence[str]) -> dict[str, str]:
    """A short name for addresses and files, its own for each."""
    ids: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"
        tried = plain
        while tried in ids.values():
            tried += "-again"
        ids[name] = tried
    return ids


def _board(dataset: str, id_: str, results: Results, places: Places) -> Board:
    frame = table.leaderboard(results)
    frame.attrs["cells"] = _NotCopied(frame.attrs["cells"])
    csv = table.render(frame, "csv")
    origins = table.records_by_cell(results.records)
    shown = _arranged(frame, origins)
    heads = []
    numbers: list[list[Number | None]] = [[] for _ in range(len(shown))]
    for place, column in enumerate(shown.columns, 1):
        first = _first(origins[column])
        cells = frame.attrs["cells"][column]
        texts = {row: table.text_of(cells[row]["value"], cells[row]) for row in shown.index if row in cells}
        spread = _shared([spread for _, spread in texts.values()])
        heads.append(_head(column, first, spread))
        best = _best([cell["value"] for cell in cells.values()], lower=first.lower_is_better)
        for line, row in enumerate(shown.index):
            if row not in origins[column]:
                numbers[line].append(None)
                continue
            here = f"n-{id_}-{line + 1}-{place}"
            links = _links(origins[column][row], f"index.html#{here}", f"{row}: {column}", places)
            value, (text, behind) = cells[row]["value"], texts[row]
            behind = behind.removesuffix(f" ({spread})")
            shown_spread = f"± {behind}" if behind else ""
            numbers[line].append(Number(value, text, shown_spread, links[0], value == best, here, tuple(links[1:])))
    return Board(
        dataset=dataset,
        id=f"data-{id_}",
        heads=tuple(heads),
        rows=tuple((str(row), tuple(line)) for row, line in zip(shown.index, numbers, strict=True)),
        notes=tuple(frame.attrs["notes"]),
        left_out=_left_out(frame),
        csv=f"leaderboards/{id_}.csv",
        csv_text=csv,
    )


class _NotCopied(dict[str, Any]):
    """pandas makes a deep copy of attrs whenever a column is touched: minutes, of 100,000 cells."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _NotCopied:
        return self


def _first(by_row: Mapping[str, Sequence[Record]]) -> Record:
    """Any record of a column: they are all measured alike."""
    return next(iter(by_row.values()))[0]


def _arranged(frame: pandas.DataFrame, origins: Mapping[str, Mapping[str, Sequence[Record]]]) -> pandas.DataFrame:
    """What a page shows: the columns that most models have first, and the best of the first of them on top."""
    bare = frame.copy(deep=False)
    bare.attrs = {}  # which pandas would copy at every step
    order = sorted(bare.columns, key=lambda column: (-len(origins[column]), in_order(_first(origins[column])), column))
    lower = _first(origins[order[0]]).lower_is_better
    bare = bare[order].sort_values(order[0], ascending=lower, kind="stable", na_position="last")
    bare = bare.iloc[:ROWS, :COLUMNS]
    return bare


def _shared(spreads: Sequence[str]) -> str:
    """What stands in brackets behind every ± of a column, to be said once: (n=3, ddof=1)."""
    brackets = {spread.partition(" (")[2].removesuffix(")") for spread in spreads if spread}
    return brackets.pop() if len(brackets) == 1 else ""


_SEEDS = 20  # links in one cell


def _links(records: Sequence[Record], at: str, as_what: str, places: Places) -> list[str]:
    return [places.show(record, at=at, as_what=as_what) for record in sorted(records, key=lambda r: r.seed)[:_SEEDS]]


def _head(label: str, record: Record, spread: str) -> Head:
    """The label in lines, without the dataset that stands above the table."""
    name, run = f"{record.protocol}/{record.recipe}", table.run_label(record)
    settings = run.removeprefix(f"{name}@v{record.version}").removesuffix(f" · {record.dataset}").strip()
    small = ", ".join(filter(None, [f"v{record.version}{label.removeprefix(run)}", unit(record.main_metric)]))
    return Head(label, name, small, spread, settings.removeprefix("[").removesuffix("]"), record.lower_is_better)


def _best(values: Sequence[float], *, lower: bool) -> float | None:
    """The best of a column; nothing where there is no other to be better than."""
    if len(values) < 2:
        return None
    return min(values) if lower else max(values)


def _left_out(frame: pandas.DataFrame) -> str:
    rows, columns = frame.shape
    parts = [plural(rows - ROWS, "more model")] if rows > ROWS else []
    parts += [plural(columns - COLUMNS, "more column")] if columns > COLUMNS else []
    return " and ".join(parts)
