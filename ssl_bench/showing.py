"""What people see on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ssl_bench.leaderboards.record import Record, find_path, settings_text


def show(renderable: Any) -> None:
    """Print on stdout."""
    Console().print(renderable)


def records(found: Sequence[Record]) -> None:
    """A table a record, the published result below it, and what a reader should be warned of."""
    for record in found:
        settings = f" [{settings_text(record.overrides)}]" if record.overrides else ""
        limited = f" (--limit {record.limit})" if record.limited else ""
        protocol = f"{record.protocol}/{record.recipe}@v{record.version}{settings}"
        title = f"{record.model} · {record.dataset}{limited} · {protocol}"
        show(f"[bold]{escape(title)}[/bold]")
        table = Table("metric", "value", "n")
        for metric, score in record.scores.items():
            digits = ".2f" if abs(score.value) >= 1 or score.value == 0 else ".3g"
            value = f"{score.value:{digits}}"
            for spread, kind in ((score.stderr, ""), (score.std, " (std)"), (score.interval95, " (95 %)")):
                value += "" if spread is None else f" ± {spread:{digits}}{kind}"
            table.add_row(escape(metric), value, str(score.n), style="bold" if metric == record.main_metric else "dim")
        show(table)
        for line in _remarks(record):
            show(line)
        Console(stderr=True).print(f"[dim]record: {escape(str(find_path(record.run)))}[/dim]", soft_wrap=True)


def _remarks(record: Record) -> list[str]:
    remarks = []
    if published := record.resolved_recipe.get("published"):
        remarks.append(f"[dim]published: {escape(str(published))}[/dim]")
    if record.selected_on != "none":
        remarks.append(f"[yellow]something in this recipe was selected on the {record.selected_on} set[/yellow]")
    if any(record.skipped_broken.values()):
        remarks.append(f"[yellow]broken images left out: {escape(_text(record.skipped_broken))}[/yellow]")
    return remarks + [f"[yellow]{escape(warning)}[/yellow]" for warning in record.warnings]


def rows(entries: Sequence[Mapping[str, Any]], empty: str) -> None:
    """A table of dictionaries with the same keys."""
    if not entries:
        show(f"[dim]{escape(empty)}[/dim]")
        return
    table = Table(*(Column(name, overflow="fold") for name in entries[0]), header_style="bold")
    for entry in entries:
        table.add_row(*(escape(_text(value)) for value in entry.values()))
    show(table)


def fields(entry: Mapping[str, Any]) -> None:
    """Name and value, line by line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in entry.items():
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(_text(value)))
    show(table)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "\n".join(_text(item) for item in value) or "none"
    return str(value)
