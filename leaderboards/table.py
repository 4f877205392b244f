"""Leaderboards: one row a model, one column a way of measuring, and nothing in a column that was measured otherwise.

A column is a protocol, recipe and version, on a dataset of one content, under one set of deviations, in one metric:
`knn/dino@v1 [neighbors=5] · toy · top1`. Limited runs never enter. Runs that differ in nothing but the seed are
averaged; the spread is then their standard deviation with ddof=1. What the reader must know to read the numbers right
(what stands behind a ±, which columns were selected on test, what was left out) is in `frame.attrs["notes"]`.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from ssl_bench.errors import UserError, unknown
from ssl_bench.leaderboards.record import Deviations, Record, Score, settings_text
from ssl_bench.leaderboards.store import Results, collector_at_rest
from ssl_bench.leaderboards.strict_json import canonical

if TYPE_CHECKING:
    import pandas
    import rich.table

FORMATS = ("table", "csv", "md", "latex", "html")
NOTHING = "-"  # a cell without a number

Key = TypeVar("Key", bound=Hashable)
Cell = dict[str, float | int | None]  # value, stderr, std, ddof, interval95, n, seeds; digits of published ones


def leaderboard(results: Results) -> pandas.DataFrame:
    """Main metrics, models by columns, best of the first column on top.

    `attrs["cells"][column][row]` holds the fields of a `Cell`, `attrs["notes"]` what to print beneath. Both are plain
    lists and dictionaries, so that the frame can still be pickled, concatenated and saved.
    """
    complete = [record for record in results if not record.limited]
    if not complete:
        raise UserError(_why_empty(results))
    with collector_at_rest():
        return _pivot(complete, len(results) - len(complete))


def _pivot(complete: Sequence[Record], limited: int) -> pandas.DataFrame:
    import pandas

    cells = records_by_cell(complete)
    summaries = {
        column: {row: _summary(records) for row, records in by_row.items()} for column, by_row in cells.items()
    }
    values = {column: {row: cell["value"] for row, cell in by_row.items()} for column, by_row in summaries.items()}
    rows = sorted({row for by_row in cells.values() for row in by_row})
    frame = pandas.DataFrame(values, index=pandas.Index(rows, name="model"), dtype="float64")
    first = frame.columns[0]
    lower = any(record.lower_is_better for records in cells[first].values() for record in records)
    frame = frame.sort_values(first, ascending=lower, kind="stable", na_position="last")
    frame.attrs["cells"] = summaries
    frame.attrs["notes"] = _notes(summaries, complete, limited)
    return frame


def records_by_cell(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """By the labels of column and row: one record a cell, or several that differ in the seed. Columns in order."""
    rows = _row_labels(records)
    keys = _column_keys(records)
    columns = _column_labels(dict(zip(keys, records, strict=True)))
    cells: dict[str, dict[str, list[Record]]] = {column: defaultdict(list) for column in columns.values()}
    for key, record in zip(keys, records, strict=True):
        cells[columns[key]][rows[_row_key(record)]].append(record)
    return cells


def _why_empty(results: Results) -> str:
    broken = f" {len(results.problems)} files could not be read, for instance: " if results.problems else ""
    broken += next(iter(results.problems.values()), "")
    if len(results):
        return (
            f"every record under {results.root} comes from a run with --limit, which never enters a leaderboard; "
            f"run `ssl-bench run ...` without it.{broken}"
        )
    return f"no records under {results.root}; run `ssl-bench run --ckpt ... --protocol ...` first.{broken}"


# What belongs into one row, into one column. -----------------------------------------------------------------------


def _row_key(record: Record) -> tuple[str, str, str | None]:
    # A file may hold a teacher and a student: if the user asked for one of them, it gets a row of its own.
    return record.model, record.weights_sha256, record.checkpoint_key if record.checkpoint_key_given else None


def _row_labels(records: Sequence[Record]) -> dict[tuple[str, str, str | None], str]:
    """The model's name; where two rows would share it, the weights, and then the checkpoint key."""
    return distinct(
        {_row_key(record): record.model for record in records},
        [lambda key: key[1][:12], lambda key: key[2] or "default key", lambda key: key[1]],
    )


def column_deviations(record: Record) -> Deviations:
    """What a column has in common. Seeds share one, and the checkpoint key tells rows apart."""
    return Deviations(
        overrides=record.overrides,
        dtype=record.dtype,
        arch=record.arch_overrides,
        subset=record.subset,
        skip_broken=record.skip_broken,
    )


def _column_keys(records: Sequence[Record]) -> list[str]:
    """The column of each record. Thousands share one, so its key is spelled out once."""
    known: dict[Hashable, str] = {}
    keys = []
    for record in records:
        free = record.overrides or record.arch_overrides or record.subset
        alike = (
            *(record.protocol, record.recipe, record.version, record.dataset, record.main_metric, record.dtype),
            *(record.skip_broken, *record.dataset_manifest_sha256.items()),
            repr((record.overrides, record.arch_overrides, record.subset)) if free else "",
        )
        key = known.get(alike)
        keys.append(known.setdefault(alike, _column_key(record)) if key is None else key)
    return keys


def _column_key(record: Record) -> str:
    deviations = column_deviations(record).as_json()
    return canonical(
        [
            record.protocol,
            record.recipe,
            f"{record.version:09d}",  # so that keys sort as numbers do
            record.dataset,
            record.main_metric,
            canonical(deviations) if deviations else "",  # so that the plain run comes first
            record.dataset_manifest_sha256,
        ]
    )


def run_label(record: Record) -> str:
    """`knn/dino@v1 [neighbors=5] · toy`."""
    deviations = column_deviations(record)
    parts = [settings_text(deviations.overrides)] if deviations.overrides else []
    parts += [settings_text(deviations.arch)] if deviations.arch else []
    parts += [settings_text(deviations.subset)] if deviations.subset else []
    parts += [deviations.dtype] if deviations.dtype != Deviations().dtype else []
    parts += ["broken images skipped"] if deviations.skip_broken else []
    settings = f" [{', '.join(parts)}]" if parts else ""
    return f"{record.protocol}/{record.recipe}@v{record.version}{settings} · {record.dataset}"


def _column_labels(example: Mapping[str, Record]) -> dict[str, str]:
    """Where two columns would share a name, it is mostly one dataset name with two contents: its manifest decides."""
    return distinct(
        {key: f"{run_label(example[key])} · {example[key].main_metric}" for key in sorted(example)},
        [
            lambda key: f"manifest {_short(example[key].dataset_manifest_sha256)}",
            lambda key: f"settings {_short(example[key].overrides)}",  # "a=1, b=2" may be one string or two settings
            lambda key: f"column {_short(key)}",
        ],
    )


def _short(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:8]


def distinct(labels: dict[Key, str], tails: Sequence[Callable[[Key], str]]) -> dict[Key, str]:
    """Lengthen labels that several keys share, by the first tails that differ among these keys."""
    for tail in tails:
        sharing = defaultdict(list)
        for key, label in labels.items():
            sharing[label].append(key)
        for keys in sharing.values():
            if len({tail(key) for key in keys}) > 1:
                labels = labels | {key: f"{labels[key]} · {tail(key)}" for key in keys}
    assert len(set(labels.values())) == len(labels), "the last tail is unique"
    return labels


def _summary(records: Sequence[Record]) -> Cell:
    """One run with its own uncertainty, or the mean over seeds with their standard deviation."""
    if len(records) == 1:
        return cell_of(records[0].main_score)
    assert len({record.seed for record in records}) == len(records), "two runs in one cell that differ in no seed"
    values = [record.main_score.value for record in records]
    mean = math.fsum(values) / len(values)  # statistics.stdev counts in fractions, which takes a hundred times longer
    return {
        "value": mean,
        "stderr": None,
        "std": math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)),
        "ddof": 1,
        "interval95": None,
        "n": len(values),
        "seeds": len(values),
    }


def cell_of(score: Score) -> Cell:
    """One run's own."""
    return {
        **{name: getattr(score, name) for name in ("value", "stderr", "std", "ddof", "interval95", "n")},
        "seeds": 1,
    }


def spread_notes(cells: Sequence[Cell]) -> list[str]:
    """What stands behind the ± of these cells."""
    notes = []
    if any(cell["stderr"] is not None for cell in cells):
        notes.append("±: standard error over samples, where nothing else is said.")
    if any(cell["std"] is not None and cell["seeds"] == 1 for cell in cells):
        notes.append("(n, ddof): standard deviation over n splits or repetitions.")
    if any(cell["interval95"] is not None for cell in cells):
        notes.append("(95 %): half the 95 % confidence interval of a mean over episodes.")
    if any(cell["seeds"] != 1 for cell in cells):
        notes.append("(seeds): mean and standard deviation over seeds, ddof=1.")
    return notes


def _notes(summaries: dict[str, dict[str, Cell]], records: Sequence[Record], limited: int) -> list[str]:
    notes = spread_notes([cell for by_row in summaries.values() for cell in by_row.values()])
    on_test = sorted({f"{r.protocol}/{r.recipe}@v{r.version}" for r in records if r.selected_on == "test"})
    if on_test:
        notes.append(f"Selected on the test set, in whole or in part, by its recipe: {', '.join(on_test)}.")
    low = sorted({r.main_metric for r in records if r.lower_is_better})
    if low:
        notes.append(f"Lower is better: {', '.join(low)}.")
    if limited:
        notes.append(f"Left out: {limited} limited run{'s' if limited > 1 else ''} (--limit).")
    return notes


# Rendering: of a leaderboard, or of any other frame of numbers and words. -------------------------------------------


@overload
def render(frame: pandas.DataFrame, format: Literal["table"]) -> rich.table.Table: ...
@overload
def render(frame: pandas.DataFrame, format: Literal["csv", "md", "latex", "html"]) -> str: ...
@overload
def render(frame: pandas.DataFrame, format: str) -> rich.table.Table | str: ...
def render(frame: pandas.DataFrame, format: str) -> rich.table.Table | str:
    """`frame` in one of FORMATS: text, or for `table` something that a rich console prints.

    csv holds plain numbers in full precision, the spread in columns of its own; the others one decimal, as papers do.
    """
    if format == "csv":
        return _csv(frame)
    writers: dict[str, Callable[..., rich.table.Table | str]] = {
        "table": _rich,
        "md": _markdown,
        "latex": _latex,
        "html": _html,
    }
    if format not in writers:
        raise unknown("format", format, FORMATS)
    header = [str(frame.index.name or ""), *map(str, frame.columns)]
    columns = [
        [_text(value, cell) for value, cell in zip(values, cells, strict=True)] for _, values, cells in _columns(frame)
    ]
    rows = [list(row) for row in zip(map(str, frame.index), *columns, strict=True)]
    return writers[format](header, rows, list(frame.attrs.get("notes", ())))


def _columns(frame: pandas.DataFrame) -> Iterator[tuple[Any, pandas.Series[Any], list[Cell]]]:
    """Each column with what is known about its values besides themselves."""
    import pandas

    known = frame.attrs.get("cells", {})
    for column, values in pandas.DataFrame(frame).items():  # without attrs, of which every column would get a copy
        about = known.get(column, {})
        yield column, values, [_cell(about.get(row, {}), value) for row, value in values.items()]


def _cell(cell: Cell, value: Any) -> Cell:
    """Nothing if the frame was changed since, for it would be wrong."""
    return cell if cell.get("value") == value else {}


def _text(value: Any, cell: Cell) -> str:
    if not isinstance(value, float):
        import pandas

        return NOTHING if pandas.isna(value) else str(value)  # None and pandas.NA, in columns of words
    return " ± ".join(filter(None, text_of(value, cell)))


def text_of(value: float, cell: Cell) -> tuple[str, str]:
    """A number and what stands behind its ±, as `render` writes them: `("54.5", "3.5 (2 seeds)")`."""
    if math.isnan(value):
        return NOTHING, ""
    stderr, std, interval95 = (cell.get(name) for name in ("stderr", "std", "interval95"))
    # Percent, with one decimal as papers give it; more where the spread would be gone, and without one three digits of
    # what is below 1 (an overlap of .611, a variance of .0192).
    spread = next((abs(x) for x in (stderr, std, interval95) if x), 0.0)
    more = 0 if spread else 2
    needed = [1, *(-math.floor(math.log10(x)) + y for x, y in ((spread, 0), (abs(value), more)) if 0 < x < 1)]
    digits = f".{max(needed)}f"
    if (printed := cell.get("digits")) is not None:  # a published number, as it was published
        return f"{value:.{printed}f}", "" if std is None else f"{std:.{printed}f}"
    if stderr is not None:
        return f"{value:{digits}}", f"{stderr:{digits}}"
    if interval95 is not None:
        return f"{value:{digits}}", f"{interval95:{digits}} (95 %)"
    if std is None:
        return f"{value:{digits}}", ""
    over = f"{cell['seeds']} seeds" if cell["seeds"] != 1 else f"n={cell['n']}, ddof={cell['ddof']}"
    return f"{value:{digits}}", f"{std:{digits}} ({over})"


def _csv(frame: pandas.DataFrame) -> str:
    import pandas

    wide = {}
    for column, values, cells in _columns(frame):
        wide[str(column)] = values
        for name in ("stderr", "std", "ddof", "interval95", "n", "seeds"):
            numbers = [cell.get(name) for cell in cells]
            if any(number is not None for number in numbers):
                kind = "Float64" if name in ("stderr", "std", "interval95") else "Int64"
                wide[f"{column} {name}"] = pandas.Series(numbers, index=frame.index, dtype=kind)
    text: str = pandas.DataFrame(wide, index=frame.index).to_csv(lineterminator="\n")
    return text


def _rich(header: list[str], rows: list[list[str]], notes: list[str]) -> rich.table.Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=Text("\n".join(notes)) if notes else None, caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="right" if index else "left", overflow="fold")  # Text: [x] is no markup
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _markdown(header: list[str], rows: list[list[str]], notes: list[str]) -> str:
    def escaped(text: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|~&])", r"\\\1", " ".join(text.split()))

    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = [
        "| " + " | ".join(cell if index == 1 else escaped(cell) for cell in line) + " |"
        for index, line in enumerate(lines)
    ]
    return "\n".join(table) + "\n" + "".join(f"\n{escaped(note)}\n" for note in notes)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def _latex(header: list[str], rows: list[list[str]], notes: list[str]) -> str:
    def line(cells: list[str]) -> str:
        escaped = ("".join(_LATEX.get(character, character) for character in " ".join(cell.split())) for cell in cells)
        text = " & ".join(escaped) + r" \\"
        return "{}" + text if text[0] in "[*" else text  # else the \\ of the line above would take it for its argument

    body = [r"\toprule", line(header), r"\midrule", *map(line, rows), r"\bottomrule"]
    comments = ["% needs \\usepackage{booktabs}", *(f"% {' '.join(note.split())}" for note in notes)]
    return "\n".join([*comments, rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", *body, r"\end{tabular}"]) + "\n"


def _html(header: list[str], rows: list[list[str]], notes: list[str]) -> str:
    def line(name: str, cells: list[str], tag: str) -> str:
        values = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr><th>{html.escape(name)}</th>{values}</tr>"

    caption = "<br>".join(map(html.escape, notes))
    parts = [
        "<table>",
        *([f"<caption>{caption}</caption>"] if notes else []),
        f"<thead>{line(header[0], header[1:], 'th')}</thead>",
        "<tbody>",
        *(line(row[0], row[1:], "td") for row in rows),
        "</tbody>",
        "</table>",
    ]
    return "\n".join(parts) + "\n"
