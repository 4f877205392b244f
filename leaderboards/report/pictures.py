"""What protocols drew or counted beside their scores: similarity histograms, zero-shot and DAVIS overlays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssl_bench.leaderboards.record import Record, files_path, settings_text
from ssl_bench.leaderboards.report.charts import COLORS, Chart, Point, Series
from ssl_bench.leaderboards.report.places import Places, anchor
from ssl_bench.leaderboards.report.words import finite, plural, score_text
from ssl_bench.leaderboards.table import records_by_cell

GALLERIES, PICTURES, HISTOGRAMS, CURVES = 60, 8, 24, 12
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A file beside a record, and its copy in the report."""

    source: Path
    target: str
    alternative: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Gallery:
    """The pictures of one record."""

    title: str
    href: str
    caption: str
    pictures: tuple[Picture, ...]
    id: str


def name_of(record: Record) -> str:
    """A run as headings show it."""
    parts = [settings_text(record.overrides), f"--limit {record.limit}" if record.limited else ""]
    more = ", ".join(filter(None, parts))
    return f"{record.model} on {record.dataset}, {record.protocol}/{record.recipe}@v{record.version}" + (
        f" [{more}]" if more else ""
    )


def galleries(places: Places) -> tuple[list[Gallery], list[str]]:
    """The overlays of every record that has some, and what is left out."""
    found: list[Gallery] = []
    more = 0
    for record, path in zip(places.results.records, places.results.paths, strict=True):
        sources = sorted(files_path(path).glob("overlays/*.png"))
        pictures = [each for each in (_picture(source, path, record, places) for source in sources) if each]
        if not pictures:
            continue
        if len(found) == GALLERIES:
            more += 1
            continue
        id_ = f"g{len(found) + 1}"
        href = places.show(record, at=f"pictures.html#{id_}", as_what="overlays")
        left = len(pictures) - PICTURES
        caption = f"{plural(left, 'more picture')} beside the record." if left > 0 else ""
        found.append(Gallery(name_of(record), href, caption, tuple(pictures[:PICTURES]), id_))
    return found, [f"the overlays of {plural(more, 'more record')}"] if more else []


def _picture(source: Path, path: Path, record: Record, places: Places) -> Picture | None:
    """None for what is no PNG, whatever it is called: a folder, a link to nothing."""
    if not source.is_file():
        return None
    with source.open("rb") as file:
        head = file.read(24)
    if not head.startswith(_PNG) or len(head) < 24:
        return None
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    folder = path.parent.relative_to(places.results.root).as_posix()
    target = f"pictures/{folder}/{anchor(path)}/{source.name}"
    what = {"davis": "Objects followed through the video", "zeroshot": "Segment found from one prompted patch:"}
    start = what.get(record.protocol, "Overlay")
    return Picture(source, target, f"{start} {source.stem} ({record.model})", source.stem, width, height)


def histograms(places: Places) -> tuple[list[Chart], list[str]]:
    """Similarities within and between objects, out of the counts that the protocol records."""
    drawn: list[tuple[str, Chart]] = []
    more = broken = 0
    for record in places.in_order():
        if record.protocol != "similarity" or "counts" not in record.details:
            continue
        counted = _counted(record.details)
        if counted is None or len(drawn) == HISTOGRAMS:
            broken, more = broken + (counted is None), more + (counted is not None)
            continue
        href = places.show(record, at="pictures.html#similarity", as_what="similarity histogram")
        main = f"{record.main_metric} {score_text(record.main_score)[0]}"
        low, high, counts = counted
        series = tuple(_density(f"{kind} objects", counts[key], low, high, href) for key, kind in _KINDS.items())
        axes = "cosine similarity of two patches", "density"
        drawn.append((record.dataset, Chart(name_of(record), *axes, series, main)))
    tops: dict[str, float] = defaultdict(float)  # one scale for what is measured on the same images
    for dataset, chart in drawn:
        tops[dataset] = max(tops[dataset], *(point.y for series in chart.series for point in series.points))
    left_out = [f"the {'histogram' if more == 1 else 'histograms'} of {plural(more, 'more record')}"] if more else []
    left_out += [f"{plural(broken, 'record')} of similarity without a histogram that can be drawn"] if broken else []
    return [replace(chart, y_top=tops[dataset]) for dataset, chart in drawn], left_out


_KINDS = {"intra": "within", "inter": "between"}


def _counted(details: dict[str, Any]) -> tuple[float, float, dict[str, list[int]]] | None:
    """The ends of the bins and the counts in them, if they are what the protocol writes."""
    edges, counts = details.get("bin_edges"), details["counts"]
    if not isinstance(edges, list) or len(edges) != 2 or not isinstance(counts, dict):
        return None
    low, high = map(finite, edges)
    if low is None or high is None or not -1e3 <= low < high <= 1e3:
        return None
    for key in _KINDS:
        numbers = counts.get(key)
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            return None
        if not sum(numbers):
            return None
    return low, high, counts


def _density(name: str, counts: Sequence[int], low: float, high: float, href: str) -> Series:
    """Steps, of which at most 100 are told apart; in the table, the middles of bins."""
    merged = -(-len(counts) // 100)
    width = (high - low) / len(counts)
    starts = range(0, len(counts), merged)
    edges = [low + width * min(at, len(counts)) for at in (*starts, len(counts))]
    points = []
    for at, left, right in zip(starts, edges, edges[1:], strict=False):
        density = sum(counts[at : at + merged]) / sum(counts) / (right - left)
        points.append(Point((left + right) / 2, density, href=href))
    return Series(name, tuple(points), "area", edges=tuple(edges))


def threshold_curves(places: Places) -> tuple[list[Chart], list[str]]:
    """Zero-shot mIoU against the threshold, all models of one way of measuring in one chart (MMC's Table 1)."""
    records = [
        record
        for record in places.in_order()
        if record.protocol == "zeroshot" and isinstance(record.details.get("thresholds"), list) and not record.limited
    ]
    found = []
    for column, by_row in records_by_cell(records).items():
        series = []
        for row, of_row in by_row.items():
            for record in of_row:
                name = f"{row}, seed {record.seed}" if len(of_row) > 1 or record.seed else row
                series.append(_thresholds(name, record, places))
        series = [each for each in series if each.points]
        if series:
            main = next(iter(by_row.values()))[0].main_metric
            title = f"mIoU against threshold, {column.replace(f' · {main}', '')}"
            left = len(series) - COLORS
            caption = f"{plural(left, 'more curve')} left out." if left > 0 else ""
            found.append(Chart(title, "threshold", "mIoU, %", tuple(series[:COLORS]), caption))
    more = len(found) - CURVES
    return found[:CURVES], [f"{plural(more, 'more chart')} of thresholds"] if more > 0 else []


def _thresholds(name: str, record: Record, places: Places) -> Series:
    href = places.show(record, at="pictures.html#zeroshot", as_what="mIoU against threshold")
    thresholds = [t for each in record.details["thresholds"] if (t := finite(each)) is not None]
    scores = {t: record.scores.get(f"miou_t{t:g}") for t in thresholds}
    return Series(name, tuple(Point(t, s.value, href=href) for t, s in scores.items() if s is not None))
