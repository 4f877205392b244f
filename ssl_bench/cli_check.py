"""The command `check`: the gate, and what it tells people (a table, Markdown) and machines (JSON, JUnit)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer

from ssl_bench.cli_stores import Json, print_json
from ssl_bench.errors import UserError

if TYPE_CHECKING:
    import pandas

    from ssl_bench.leaderboards.gate import Report, Verdict
    from ssl_bench.leaderboards.store import Results

_LISTED = 10  # new records: a results folder may hold thousands
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML 1.0 cannot hold


def check(
    baseline: Annotated[
        Path, typer.Option("--baseline", "-b", help="A JSON file in git; leaderboards/baselines/toy.json is one.")
    ],
    update: Annotated[
        bool,
        typer.Option("--update", help="Take the records' numbers into the baseline; see `git diff` before commit."),
    ] = False,
    add: Annotated[
        list[str] | None,
        typer.Option(help="With --update: also records without an entry, by name or pattern: moca/toy/knn/dino, '*'."),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML, as CI systems read it.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help='Also append a summary in Markdown: --markdown "$GITHUB_STEP_SUMMARY".')
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold the records against a baseline; exits with 1 if a number dropped, is missing or was measured otherwise.

    A drop fails when it is significant (one-sided 5 % over all entries together) and larger than the entry's tolerance.
    The newest record of a name counts. The records are those under SSL_BENCH_RESULTS.
    """
    from ssl_bench.files import expanded, write_report
    from ssl_bench.leaderboards import gate
    from ssl_bench.leaderboards.baseline import read_baseline
    from ssl_bench.leaderboards.store import load_results

    path = expanded(baseline)
    junit, markdown = (None if each is None else expanded(each) for each in (junit, markdown))
    if update and (junit or markdown):
        raise UserError("--junit and --markdown tell of a check; give them without --update.")
    if add and not update:
        raise UserError("--add: expected with --update, which is what changes the baseline.")
    _require_different({"--baseline": path, "--junit": junit, "--markdown": markdown})
    results = load_results()
    known = None if update and not path.exists() else read_baseline(path)
    for problem in results.problems.values():  # which name the file
        sys.stderr.write(f"ssl-bench: left out: {problem}\n")
    if update:
        _require_complete(results)
        _update(path, results, add or (), as_json=as_json)
        return
    assert known is not None
    if not len(results):
        sys.stderr.write(f"ssl-bench: {results.root}: there are no records; SSL_BENCH_RESULTS names their folder\n")
    report = gate.check(known, results)
    if junit:
        write_report(junit, junit_xml(report))
    if markdown:
        write_report(markdown, summary(report), append=True)
    if as_json:
        print_json(
            {
                "check": [_row(verdict) for verdict in report.verdicts],
                "new": [str(file) for _, file in report.new],
                "failed": len(report.failed),
            }
        )
    else:
        _print(report, known.about)
    if report.failed:
        raise typer.Exit(1)


def _require_different(paths: dict[str, Path | None]) -> None:
    """A report must not overwrite the baseline, nor another report."""
    places: dict[str, str] = {}
    for option, path in paths.items():
        if path is not None and (first := places.setdefault(os.path.realpath(path), option)) != option:
            raise UserError(f"{path}: named by {first} and by {option}; expected a file for each.")


def _require_complete(results: Results) -> None:
    if all(record.limited for record in results):
        what = f"all {len(results)} records come from runs with --limit" if len(results) else "there are no records"
        broken = f" {len(results.problems)} files could not be read: " if results.problems else ""
        raise UserError(
            f"{results.root}: {what}, and a baseline needs records of whole runs. Make them (`ssl-bench run ...`, "
            f"`ssl-bench demo`) or let SSL_BENCH_RESULTS name their folder.{broken}"
            + next(iter(results.problems.values()), "")
        )


def _update(path: Path, results: Results, add: Sequence[str], *, as_json: bool) -> None:
    """Write it, and show what has changed."""
    import dataclasses

    from ssl_bench.leaderboards import gate
    from ssl_bench.leaderboards.baseline import SCHEMA_VERSION, Baseline, read_baseline, write_baseline
    from ssl_bench.progress import say

    old = read_baseline(path) if path.exists() else Baseline(SCHEMA_VERSION, [], [])
    new, changes = gate.updated(old, results, add=add)
    if new != old:
        write_baseline(new, path)
    if as_json:
        print_json({"changes": [dataclasses.asdict(change) for change in changes]})
    else:
        left_out = [change for change in changes if change.kind == "left out"]
        for change in [change for change in changes if change.kind != "left out"] + left_out[:_LISTED]:
            values = " -> ".join(_number(value) for value in (change.before, change.now) if value is not None)
            sys.stdout.write(f"{change.kind:8} {change.name}: {values} ({change.what})\n")
        if len(left_out) > _LISTED:
            sys.stdout.write(f"left out {len(left_out) - _LISTED} more records without an entry (--json lists all)\n")
    limited = sum(record.limited for record in results)
    if limited:
        say(f"left out: {limited} runs with --limit, which never enter a baseline")
    if new == old:
        say(f"{path} stays as it is")
        return
    say(f"written: {path}, {len(new.entries)} entries. Look at what git says has changed before it is committed.")


def _row(verdict: Verdict) -> dict[str, Any]:
    entry, record = verdict.entry, verdict.record
    return {
        "name": entry.name,
        "state": verdict.state,
        "baseline": entry.score.value,
        "value": verdict.value,
        "change": verdict.change,  # positive: better
        "tolerance": entry.tolerance,
        "test": verdict.test,
        "p": verdict.p,
        "why": verdict.why,
        "command": entry.command,
        "record": None if verdict.path is None else str(verdict.path),
        "weights": None if record is None else record.weights_sha256,
    }


def _frame(report: Report) -> pandas.DataFrame:
    """A row an entry, those that fail first; texts, for the number of digits is the entry's own."""
    import pandas

    names = [verdict.entry.name for verdict in report.verdicts]
    rows = [
        {
            "state": verdict.state,
            "baseline": _number(verdict.entry.score.value),
            "now": _number(verdict.value),
            "better by": _number(verdict.change, "+"),
            "tolerance": _number(verdict.entry.tolerance),
            "p": "-" if verdict.p is None else f"{verdict.p:.2g}",
        }
        for verdict in report.verdicts
    ]
    return pandas.DataFrame(rows, index=pandas.Index(names, name="entry"))


def _number(value: float | None, sign: str = "") -> str:
    """Percents with two decimals, small numbers with three digits."""
    if value is None:
        return "-"
    value += 0.0  # -0.0 becomes 0.0
    return f"{value:{sign}.2f}" if 1 <= abs(value) < 1e6 or value == 0 else f"{value:{sign}.3g}"


def _headline(report: Report) -> str:
    counts: dict[str, int] = {}
    for verdict in report.verdicts:
        counts[verdict.state] = counts.get(verdict.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{'failed' if report.failed else 'passed'}: {states}"


def _remarks(report: Report) -> list[str]:
    """Why entries fail, or what else a reader must know of them; then what is new, what was left out."""
    from ssl_bench.leaderboards.sides import run_name

    lines = [
        f"{verdict.state}: {verdict.entry.name}: {verdict.why}"
        for verdict in report.verdicts
        if verdict.state != "passed" or "the newest was taken" in verdict.why
    ]
    lines += [
        f"new, without an entry (--update --add NAME adds it): {' '.join(run_name(record).split())}"
        for record, _ in report.new[:_LISTED]
    ]
    if len(report.new) > _LISTED:
        lines.append(f"and {len(report.new) - _LISTED} more records without an entry (--json lists them all)")
    if report.limited:
        lines.append(f"left out: {report.limited} runs with --limit")
    lines.append("p: of such a change by accident, one-sided, corrected over all entries; -: nothing to test")
    return lines


def _print(report: Report, about: list[str]) -> None:
    from ssl_bench import showing
    from ssl_bench.leaderboards.table import render

    showing.show(render(_frame(report), "table"))
    if report.failed:
        sys.stdout.writelines(f"{line}\n" for line in about)
    # Not by rich, which would break the commands in these lines.
    sys.stdout.writelines(f"{line}\n" for line in [*_remarks(report), _headline(report)])


def summary(report: Report) -> str:
    """In Markdown."""
    from ssl_bench.leaderboards.table import render

    frame = _frame(report)
    frame.attrs["notes"] = _remarks(report)
    return f"## ssl-bench check {_headline(report)}\n\n{render(frame, 'md')}"


def junit_xml(report: Report) -> str:
    """A test case an entry, in the form that Jenkins, GitLab and GitHub's reporters read."""
    counts = {"tests": len(report.verdicts), "failures": len(report.failed), "errors": 0, "skipped": 0}
    attributes = {"name": "ssl-bench check", **{name: str(count) for name, count in counts.items()}}
    suites = ElementTree.Element("testsuites", attributes)
    suite = ElementTree.SubElement(suites, "testsuite", attributes)
    for verdict in report.verdicts:
        seconds = 0.0 if verdict.record is None else sum(verdict.record.seconds.values())
        place = {"classname": _xml(verdict.entry.dataset), "name": _xml(verdict.entry.name), "time": f"{seconds:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", place)
        change = f"{_number(verdict.entry.score.value)} -> {_number(verdict.value)}"
        told = _xml(f"{verdict.state}: {change} (tolerance {verdict.entry.tolerance:g}). {verdict.why}")
        if verdict.fails:
            failure = ElementTree.SubElement(case, "failure", {"message": told, "type": verdict.state})
            failure.text = _xml(f"{told}\n{verdict.entry.command}")
        else:
            ElementTree.SubElement(case, "system-out").text = told
    ElementTree.indent(suites)
    return "<?xml version='1.0' encoding='UTF-8'?>\n" + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    return _NO_XML.sub("�", text)
