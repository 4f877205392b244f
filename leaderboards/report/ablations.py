"""Charts of a number against a setting: the papers' own ablations, ours, and accuracy against pre-training hours.

One rule draws them all: cells of a table that agree in everything but one numeric setting make a curve (MOCA's
Figures 1a and 3, the sweeps of Table 2; ExtreMA's mask ratios; SdAE's Figures 4 and 6 as far as their numbers are
printed; values that are only plotted stand in no file). Runs that agree in everything but one field of the recipe
make one, too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ssl_bench.leaderboards.published import Cell
from ssl_bench.leaderboards.record import Record
from ssl_bench.leaderboards.report.charts import COLORS, Chart, Point, Series
from ssl_bench.leaderboards.report.places import Places
from ssl_bench.leaderboards.report.words import metric_in_words as words
from ssl_bench.leaderboards.report.words import plural, with_unit
from ssl_bench.leaderboards.strict_json import canonical
from ssl_bench.leaderboards.table import column_deviations

_SAME = ("method", "arch", "pretrain_data", "epochs", "multicrop")
_UNITS = {"percent": "%"}
LOG_FROM = 12.0  # largest to smallest setting


def numeric(value: Any) -> float | None:
    """A setting as a number: 0.75, 75%, or the only entry of a list."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        found = float(str(value).removesuffix("%"))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


Key = tuple[tuple[str, str], ...]


def of_table(name: str, cells: Sequence[Cell], measured: Mapping[int, Sequence[tuple[str, Point]]]) -> list[Chart]:
    """The curves of one table. `measured` are our numbers for a cell, by its id(): (model, point without its x)."""
    least = 2 if ":text:" in name else 3
    keys = dict.fromkeys(["epochs", *(key for cell in cells for key in cell.setting)])
    found = []
    for key in keys:
        panels: dict[tuple[str, ...], dict[Key, dict[float, Cell]]] = defaultdict(lambda: defaultdict(dict))
        for cell in cells:
            x = numeric(cell.field(key))
            if x is not None:
                rest = {other: cell.field(other) for other in (*_SAME, *cell.setting) if other != key}
                panels[cell.metric, cell.dataset, cell.unit][tuple(rest.items())].setdefault(x, cell)
        enough = {
            of: {rest: line for rest, line in lines.items() if len(line) >= least} for of, lines in panels.items()
        }
        metrics = [metric for (metric, _, _), kept in enough.items() if kept]
        for (metric, dataset, unit), kept in enough.items():
            if kept:
                y_label = f"{words(metric)}{f' on {dataset}' if dataset else ''}, {_UNITS.get(unit, unit)}"
                which = f"{words(metric)}{f' on {dataset}' if metrics.count(metric) > 1 else ''}"
                found.append(_panel(f"{name}: {which} against {words(key)}", (words(key), y_label), kept, measured))
    return found


def _panel(
    title: str,
    axes: tuple[str, str],
    lines: Mapping[Key, Mapping[float, Cell]],
    measured: Mapping[int, Sequence[tuple[str, Point]]],
) -> Chart:
    names = _names(list(lines))
    series: list[Series] = []
    for line, name in zip(lines.values(), names, strict=True):
        number = len(series)
        series.append(Series(name, tuple(Point(x, line[x].value) for x in sorted(line))))
        ours: dict[str, list[Point]] = defaultdict(list)
        for x in sorted(line):
            for model, point in measured.get(id(line[x]), ()):
                ours[model].append(Point(x, point.y, point.label, point.href, point.solid))
        series += [
            Series(f"{model}, measured ({name})", tuple(points), beside=number) for model, points in ours.items()
        ]
    return Chart(title, *axes, tuple(series), log_x=_spans(lines.values()))


def _names(lines: Sequence[Key]) -> list[str]:
    """The method, and as much more as tells the lines apart."""
    varying = [name for name, _ in lines[0] if name != "method" and len({dict(rest).get(name) for rest in lines}) > 1]
    several = len({dict(rest)["method"] for rest in lines}) > 1
    names = [dict(rest)["method"] for rest in lines]
    for name in varying:
        if len(set(names)) == len(names):
            break
        more = [(_described(name, dict(rest)[name]) if dict(rest).get(name) else "") for rest in lines]
        names = [", ".join(filter(None, pair)) for pair in zip(names, more, strict=True)]
    return names if several else [name.partition(", ")[2] or name for name in names]


def _described(key: str, value: str) -> str:
    if key == "epochs":
        return f"{value} epochs"
    if key == "multicrop":
        return "multi-crop" if value == "yes" else "one crop"
    return value if key in _SAME else f"{words(key)} {value}"


def _spans(lines: Iterable[Iterable[float]]) -> bool:
    xs = [x for line in lines for x in line]
    return min(xs) > 0 and max(xs) / min(xs) >= LOG_FROM


def against_hours(paper: str, cells: Sequence[Cell]) -> list[Chart]:
    """Accuracy on the pre-training's own data against its hours, where a paper prints both (MOCA's Figure 1b)."""
    hours: dict[Hashable, float] = {}
    for cell in cells:
        if cell.metric == "pretrain_hours":
            hours.setdefault(_trained(cell), cell.value)
    charts = []
    for metric in ("knn_top1", "linear_top1", "finetune_top1"):
        points: dict[str, dict[Hashable, Point]] = defaultdict(dict)
        for cell in cells:
            key = _trained(cell)
            if cell.metric == metric and cell.dataset == "imagenet" and key in hours:
                parts = [f"{cell.method}{' multi-crop' if cell.multicrop == 'yes' else ''}", f"{cell.epochs} epochs"]
                parts += [_described(*item) for item in cell.setting.items()]
                point = Point(hours[key], cell.value, ", ".join(parts))
                points[cell.arch or "network not said"].setdefault(key, point)
        if sum(map(len, points.values())) >= 3:
            series = tuple(
                Series(arch, tuple(sorted(found.values(), key=lambda point: point.x)), "points")
                for arch, found in points.items()
            )
            title = f"{paper}: {words(metric)} against pre-training hours"
            axes = "hours of pre-training", f"{words(metric)} on imagenet, %"
            charts.append(Chart(title, *axes, series, write_labels=True))
    return charts


def _trained(cell: Cell) -> Hashable:
    """What makes one pre-training, of what both tables of a paper say."""
    return cell.method, cell.arch, cell.epochs, cell.multicrop, tuple(cell.setting.items())


CURVES = 24


def of_records(places: Places) -> tuple[list[Chart], list[str]]:
    """The main metric against a field of the recipe that was changed, everything else being equal."""
    changed: dict[tuple[str, str, int], dict[str, None]] = defaultdict(dict)
    complete = [record for record in places.results if not record.limited]
    for record in complete:
        changed[_way(record)].update(dict.fromkeys(record.overrides))
    panels: dict[tuple[str, str], dict[str, dict[float, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in complete:
        for key in sorted(changed[_way(record)]):
            x = numeric(record.resolved_recipe.get(key))
            if x is not None:
                panels[_all_but(record, key), key][_series_of(record)].setdefault(x, record)
    found = []
    for (_, key), lines in sorted(panels.items()):
        kept = {name: line for name, line in sorted(lines.items()) if len(line) >= 3}
        for part in (list(kept)[at : at + COLORS] for at in range(0, len(kept), COLORS)):
            found.append((key, {name: kept[name] for name in part}))
    charts = [_our_panel(key, lines, place, places) for place, (key, lines) in enumerate(found[:CURVES])]
    return charts, [plural(len(found) - CURVES, "more chart") + " of settings"] if len(found) > CURVES else []


def _way(record: Record) -> tuple[str, str, int]:
    return record.protocol, record.recipe, record.version


def _all_but(record: Record, key: str) -> str:
    """Equal for records of one panel."""
    others = {name: value for name, value in record.overrides.items() if name != key}
    deviations = replace(column_deviations(record), overrides=others)
    data = [record.dataset, record.dataset_manifest_sha256, record.main_metric]
    return canonical([*_way(record), *data, deviations.as_json()])


def _series_of(record: Record) -> str:
    key = f", {record.checkpoint_key}" if record.checkpoint_key_given else ""
    seed = f", seed {record.seed}" if record.seed else ""
    return f"{record.model} ({record.weights_sha256[:6]}{key}{seed})"


def _our_panel(key: str, lines: Mapping[str, Mapping[float, Record]], place: int, places: Places) -> Chart:
    first = next(iter(next(iter(lines.values())).values()))
    title = (
        f"{first.protocol}/{first.recipe}@v{first.version} on {first.dataset}: {first.main_metric} against {words(key)}"
    )
    at = f"curves.html#setting-{place + 1}"
    series = []
    for name, line in lines.items():
        points = [
            Point(
                x,
                line[x].main_score.value,
                href=places.show(line[x], at=at, as_what=f"{first.main_metric} against {words(key)}"),
            )
            for x in sorted(line)
        ]
        series.append(Series(name, tuple(points)))
    return Chart(title, words(key), with_unit(first.main_metric), tuple(series), log_x=_spans(lines.values()))
