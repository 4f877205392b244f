"""The commands on tables: `leaderboard`, ours and the papers', and `reproduce`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssl_bench.cli_stores import Json, print_json
from ssl_bench.errors import UserError, unknown

if TYPE_CHECKING:
    import pandas

    from ssl_bench.leaderboards.store import Results
    from ssl_bench.reproducing import Need

Output = Annotated[str, typer.Option("--format", help="table, csv, md, latex or html")]


def leaderboard(
    table: Annotated[
        str | None, typer.Argument(help="A paper's table (ssl-bench ls tables), such as moca:8. Default: all records.")
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="A line a number that was measured: the difference, and what else differs.")
    ] = False,
    output: Output = "table",
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Only this dataset.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", "-p", help="Only this protocol.")] = None,
    as_json: Json = False,
) -> None:
    """All records as a table, a row a model, a column a protocol; or a paper's table with ours beside its numbers.

    Never mixes recipes, versions, settings or data in a column.
    """
    from ssl_bench import listing
    from ssl_bench.leaderboards import beside, tables
    from ssl_bench.leaderboards.store import load_results
    from ssl_bench.leaderboards.table import FORMATS
    from ssl_bench.leaderboards.table import leaderboard as build

    if output not in FORMATS:
        raise unknown("format", output, FORMATS)
    if table is not None:
        table = table.lower()
        tables.find(table)
    elif diff:
        raise UserError(
            "--diff: expected a paper's table to compare with, as in `ssl-bench leaderboard moca:8 --diff`."
        )
    results = load_results()
    for problem in results.problems.values():  # which name the file
        sys.stderr.write(f"ssl-bench: left out: {problem}\n")
    results = listing.fitting(results, dataset=dataset, protocol=protocol)
    if as_json:
        print_json(_document(table, results, diff=diff))
    elif table is None:
        _print(build(results), output)
    elif diff:
        found = beside.differences(table, results)
        _print(_narrow(found) if output == "table" else found, output)
    else:
        _print(beside.paper_table(table, results), output)


def reproduce(
    table: Annotated[str, typer.Argument(help="A paper's table (ssl-bench ls tables), such as moca:8.")],
    ckpt: Annotated[
        list[str] | None,
        typer.Option(
            "--ckpt",
            help="NAME=SPEC: the checkpoint of a line, by its method or whole label (MOCA=x.pth, "
            "DINO=timm:vit_base_patch16_224.dino); repeatable. SPEC is as in `run`.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be run, and what is missing.")
    ] = False,
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", "-d", help="NAME=PATH: where a dataset of the table lies, or another; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast in the forward pass).")] = "fp32",
    batch_size: Annotated[int | None, typer.Option(help="Images a forward pass.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode images.")] = None,
    output: Output = "table",
    as_json: Json = False,
) -> None:
    """Run what a paper's table needs and is not there yet, and print the table with our numbers beside the paper's.

    What cannot be run here says why. Failures do not stop the other runs; the exit code is then 2.
    """
    from ssl_bench import reproducing
    from ssl_bench.evaluate.recipes import settings_from_text
    from ssl_bench.leaderboards import beside, tables
    from ssl_bench.leaderboards.store import load_results
    from ssl_bench.leaderboards.table import FORMATS

    if output not in FORMATS:
        raise unknown("format", output, FORMATS)
    if dtype not in ("fp32", "bf16", "fp16"):
        raise unknown("--dtype", dtype, ("fp32", "bf16", "fp16"))
    table = table.lower()
    title = tables.find(table).title
    datasets = settings_from_text(dataset or [], "--dataset imagenet=/data/imagenet")
    options = reproducing.Options(datasets, device, dtype, batch_size=batch_size, workers=workers)
    needs = reproducing.plan(table, ckpt or [], options, dry_run=dry_run)
    speaks = int(os.environ.get("RANK", "0")) == 0  # of several processes the first
    document = {"table": table, "title": title, "plan": [_plain(need) for need in needs]}
    if speaks and not as_json and (dry_run or output == "table"):
        _show_plan(table, title, needs)
    if dry_run:
        if as_json:
            print_json(document)
        return
    failures = reproducing.run(needs, options)
    if speaks and as_json:
        failed = [{"run": name, "error": error} for name, error in failures.items()]
        print_json({**document, "failed": failed, **_document(table, load_results(), diff=False)})
    elif speaks:
        _print(beside.paper_table(table, load_results()), output)
    if failures:
        raise UserError(f"{len(failures)} failed: " + "; ".join(f"{name}: {error}" for name, error in failures.items()))
    if not any(need.state in (reproducing.TO_RUN, reproducing.DONE) for need in needs):
        raise UserError(f"nothing of {table} could be run here: see `ssl-bench reproduce {table} --dry-run`.")


def _document(table: str | None, results: Results, *, diff: bool) -> dict[str, Any]:
    """What `--json` prints."""
    from ssl_bench.leaderboards import beside, tables
    from ssl_bench.leaderboards.table import leaderboard as build

    if table is not None and diff:
        found = [_comparison(each) for each in beside.comparisons(table, results)]
        return {"table": table, "differences": found, "notes": beside.differences(table, results).attrs["notes"]}
    frame = build(results) if table is None else beside.paper_table(table, results)
    cells, line = frame.attrs["cells"], "model" if table is None else "row"
    weights = {} if table is None else frame.attrs["weights"]

    def cell_of(column: str, label: str) -> dict[str, Any] | None:
        cell = cells[column].get(label)
        sha256 = weights.get(column, {}).get(label)
        return {**cell, "weights_sha256": sha256} if cell and sha256 else cell

    rows = [{line: label, **{column: cell_of(column, label) for column in cells}} for label in frame.index]
    head = (
        {}
        if table is None
        else {"table": table, "title": tables.find(table).title, "measured": frame.attrs["measured"]}
    )
    return {**head, "leaderboard": rows, "notes": frame.attrs["notes"]}


def _narrow(differences: pandas.DataFrame) -> pandas.DataFrame:
    """For a terminal: short columns, and what differs below, each once."""
    short = {"published": "paper", "measured": "ours", "difference": "diff"}
    frame = differences[["row", "column", *short]].rename(columns=short)
    said: dict[str, list[str]] = {}
    for number, run, differs in zip(differences.index, differences["run"], differences["differs"], strict=True):
        said.setdefault(f"{run}: {differs}.", []).append(str(number))
    lines = [f"{', '.join(numbers)}: {text}" for text, numbers in said.items()]
    frame.attrs["cells"] = {short[name]: cells for name, cells in differences.attrs["cells"].items()}
    frame.attrs["notes"] = [*lines, *differences.attrs["notes"]]
    return frame


def _comparison(each: Any) -> dict[str, Any]:
    record = each.record
    return {
        "row": each.row,
        "column": each.column,
        "published": each.cell.value,
        "published_std": each.cell.std,
        "measured": each.measured,
        "uncertainty": each.uncertainty,
        "difference": each.difference if each.comparable else None,
        "model": record.model,
        "run": f"{record.protocol}/{record.recipe}",
        "version": record.version,
        "dataset": record.dataset,
        "metric": each.metric,
        "seed": record.seed,
        "weights_sha256": record.weights_sha256,
        "differs": list(each.differs),
    }


def _plain(need: Need) -> dict[str, Any]:
    import dataclasses

    from ssl_bench.leaderboards.strict_json import plain

    fields: dict[str, Any] = plain({field.name: getattr(need, field.name) for field in dataclasses.fields(need)})
    return fields


def _print(frame: pandas.DataFrame, output: str) -> None:
    from ssl_bench.leaderboards.table import render

    rendered = render(frame, output)
    if isinstance(rendered, str):
        sys.stdout.write(rendered.rstrip("\n") + "\n")
    else:
        from ssl_bench import showing

        showing.show(rendered)


def _show_plan(table: str, title: str, needs: Sequence[Need]) -> None:
    """A line a run and a table's line; below, what is missing, where times are from, and what the paper leaves open."""
    from rich.markup import escape

    from ssl_bench import showing

    showing.show(f"[bold]{escape(table)}[/bold] {escape(title)}")
    rows = [
        {
            "line": need.row,
            "numbers": _columns(need),
            "run": _run(need),
            "checkpoint": need.spec or "-",
            "state": need.state,
            "time": _time(need),
        }
        for need in needs
    ]
    told = [name for name in rows[0] if any(row[name] != "-" for row in rows)]  # a terminal is narrow
    showing.rows([{name: row[name] for name in told} for row in rows], "no numbers")
    for heading, lines in _remarks(needs).items():
        if lines:
            showing.show(f"[bold]{heading}[/bold]")
            for line in lines:
                showing.show(f"  {escape(line)}")


def _run(need: Need) -> str:
    from ssl_bench.leaderboards.record import settings_text

    settings = f" [{settings_text(need.settings)}]" if need.settings else ""
    return f"{need.recipe}{settings}" + (f" on {need.dataset}" if need.dataset else "") or "-"


def _remarks(needs: Sequence[Need]) -> dict[str, list[str]]:
    """Each thing once: what is missing, what times are taken from, what the paper leaves open."""
    from ssl_bench.reproducing import TO_RUN

    missing = dict.fromkeys(why for need in needs for why in need.why)
    times = {
        f"{need.recipe} on {need.dataset}: {_time(need)} ({need.estimate})": None
        for need in needs
        if need.seconds is not None
    }
    runs = {(*need.run, need.recipe): need for need in needs if need.state == TO_RUN}
    known = sum(need.seconds or 0.0 for need in runs.values())
    at_least = "> " if any(_time(need).startswith(">") for need in runs.values()) else ""
    unknown_ones = sum(need.seconds is None for need in runs.values())
    total = f"{len(runs)} to run: {at_least}{_duration(known)}" + (
        f", and {unknown_ones} of unknown length" if unknown_ones else ""
    )
    notes = {f"{need.recipe} ({_columns(need)}): {need.note}": None for need in needs if need.note}
    return {"Missing": list(missing), "Time": [*times, *([total] if runs else [])], "Left open": list(notes)}


def _columns(need: Need) -> str:
    count = len(need.columns)
    return ", ".join(need.columns) if count < 3 else f"{need.columns[0]}, ... ({count})"


def _time(need: Need) -> str:
    if need.seconds is None:
        return need.estimate or "-"
    return ("> " if need.estimate.startswith("at least") else "") + _duration(need.seconds)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
