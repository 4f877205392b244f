"""What protocols drew or counted beside their scores: similarity histograms, zero-shot and DAVIS overlays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_bench.leaderboards.record import Record, files_path, settings_text
from ssl_bench.leaderboards.report.charts import Chart, Point, Series, number
from ssl_bench.leaderboards.report.places import Places, anchor
from ssl_bench.leaderboards.strict_json import canonical

GALLERIES, PICTURES, HISTOGRAMS, CURVES = 60, 8, 24, 12
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A file beside a record, and its copy in the report."""

    source: Path
    target: str
    alternative: str
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
        pictures = [each for each in (_picture(source, path, record, places) for source in sources[:PICTURES]) if each]
        if not pictures:
            continue
        if len(found) == GALLERIES:
            more += 1
            continue
        id_ = f"g{len(found) + 1}"
        href = places.show(record, at=f"pictures.html#{id_}", as_what="overlays")
        left = len(sources) - PICTURES
        caption = f"{left} more pictures beside the record." if left > 0 else ""
        found.append(Gallery(name_of(record), href, caption, tuple(pictures), id_))
    return found, [f"the overlays of {more} more records"] if more else []


def _picture(source: Path, path: Path, record: Record, places: Places) -> Picture | None:
    """None for what is no PNG, whatever it is called."""
    with source.open("rb") as file:
        head = file.read(24)
    if not head.startswith(_PNG) or len(head) < 24:
        return None
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    folder = path.parent.relative_to(places.results.root).as_posix()
    target = f"pictures/{folder}/{anchor(path)}/{source.name}"
    what = {"davis": "Objects followed through the video", "zeroshot": "Segment found from one prompted patch:"}
    start = what.get(record.protocol, "Overlay")
    return Picture(source, target, f"{start} {source.stem} ({record.model})", width, height)


def histograms(places: Places) -> tuple[list[Chart], list[str]]:
    """Similarities within and between objects, out of the counts that the protocol records."""
    found: list[Chart] = []
    more = 0
    for record in places.results:
        counts, edges = record.details.get("counts"), record.details.get("bin_edges")
        if record.protocol != "similarity" or not isinstance(counts, dict) or not isinstance(edges, list):
            continue
        if not all(isinstance(counts.get(key), list) and sum(counts[key]) for key in _KINDS):
            continue
        if len(found) == HISTOGRAMS:
            more += 1
            continue
        href = places.show(record, at="pictures.html#similarity", as_what="similarity histogram")
        main = f"{record.main_metric} {number(record.main_score.value)}"
        series = tuple(_density(f"{kind} objects", counts[key], edges, href) for key, kind in _KINDS.items())
        found.append(Chart(name_of(record), "cosine similarity of two patches", "density", series, main))
    return found, [f"the histograms of {more} more records"] if more else []


_KINDS = {"intra": "within", "inter": "between"}


def _density(name: str, counts: Sequence[int], edges: Sequence[float], href: str) -> Series:
    """Drawn at the middles of bins, of which at most 100 are told apart."""
    merged = -(-len(counts) // 100)
    width = (edges[1] - edges[0]) / len(counts)
    points = []
    for at in range(0, len(counts), merged):
        part = counts[at : at + merged]
        density = sum(part) / sum(counts) / (width * len(part))
        points.append(Point(edges[0] + width * (at + len(part) / 2), density, href=href))
    return Series(name, tuple(points), "area")


def threshold_curves(places: Places) -> tuple[list[Chart], list[str]]:
    """Zero-shot mIoU against the threshold, all models of one way of measuring in one chart (MMC's Table 1)."""
    together: dict[str, list[Record]] = defaultdict(list)
    for record in places.results:
        if record.protocol == "zeroshot" and isinstance(record.details.get("thresholds"), list) and not record.limited:
            way = [record.recipe, record.version, record.dataset, record.overrides, record.dataset_manifest_sha256]
            together[canonical(way)].append(record)
    found = []
    for records in together.values():
        first = records[0]
        series = tuple(_thresholds(record, places) for record in records[:8])
        if series := tuple(each for each in series if each.points):
            name = f"{first.protocol}/{first.recipe}@v{first.version} on {first.dataset}"
            caption = f"{len(records) - 8} more models are left out." if len(records) > 8 else ""
            found.append(Chart(f"mIoU against threshold, {name}", "threshold", "mIoU, %", series, caption))
    return found[:CURVES], [f"{len(found) - CURVES} more charts of thresholds"] if len(found) > CURVES else []


def _thresholds(record: Record, places: Places) -> Series:
    href = places.show(record, at="pictures.html#zeroshot", as_what="mIoU against threshold")
    scores = {t: record.scores.get(f"miou_t{t:g}") for t in record.details["thresholds"] if isinstance(t, (int, float))}
    return Series(record.model, tuple(Point(float(t), s.value, href=href) for t, s in scores.items() if s is not None))
