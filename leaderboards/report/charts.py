"""Charts as small inline SVG, colored by the page's style sheet, so that light, dark and print are one drawing.

Every chart stands beside a table of the same numbers (`figure.html.jinja`): a picture is no origin, and not everybody
sees it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ssl_bench.leaderboards.report.words import number

COLORS = 8  # --series-0 ... in style.css; after that, the same colors with other markers and dashes
_WIDTH, _HEIGHT = 420.0, 280.0  # small, so that words can still be read where a phone shrinks the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 16.0, 36.0, 46.0
_CHARACTER_PX = 7.8  # of a label, about, in the largest font (see style.css)
_TICK_GAP_PX = 36
_LARGEST, _SMALLEST = 1e150, 1e-100  # beyond, differences and logarithms leave the numbers that there are
_MARKED = 30  # points of a line; of more, some are marked, since color alone tells lines apart for some readers only
_MARKERS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Point:
    """A number, what it is, and where it comes from."""

    x: float
    y: float
    label: str = ""
    href: str = ""
    solid: bool = True  # hollow: not to be compared as it stands


@dataclass(frozen=True)
class Series:
    """Points that belong together: joined by a line, as steps above zero, or on their own."""

    name: str
    points: tuple[Point, ...]
    kind: str = "line"  # line, area, points
    beside: int | None = None  # the number of the series that it belongs to: its color, but dashed
    edges: tuple[float, ...] = ()  # of the bins of an area, one more than points


@dataclass(frozen=True)
class Chart:
    """Two axes and what is drawn between them."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str = ""
    log_x: bool = False
    identity: bool = False  # the line y = x, and equal scales: the drawing is square
    write_labels: bool = False  # the points' labels into the drawing
    y_top: float | None = None  # where the y axis ends, if other charts are to be compared with this one

    @property
    def alternative(self) -> str:
        """What somebody is told who does not see the drawing."""
        points = [point for series in self.series for point in series.points]
        xs, ys = [point.x for point in points], [point.y for point in points]
        names = ", ".join(series.name for series in self.series)
        return (
            f"{self.title}. {self.y_label} from {number(min(ys))} to {number(max(ys))} against {self.x_label} from "
            f"{number(min(xs))} to {number(max(xs))}. {len(self.series)} series: {names}. The numbers stand in the "
            "table below."
        )

    @property
    def labeled(self) -> bool:
        """Whether the table of numbers needs a column for labels."""
        return any(point.label for series in self.series for point in series.points)

    @property
    def svg(self) -> str:
        """The drawing."""
        return _Drawing(self).text()


def swatch(series: Series, index: int) -> str:
    """The piece of a line that stands in the legend."""
    is_solid = any(point.solid for point in series.points)
    dash, index = _dash(series, index), index if series.beside is None else series.beside
    body = _marker(12, 7, index, is_solid)
    if series.kind == "area":
        body = '<rect class="area" x="1" y="3" width="22" height="8"/>'
    line = f'<path class="line"{dash} d="M1 7H23"/>' if series.kind == "line" else ""
    return f'<svg class="swatch {_color(index)}" viewBox="0 0 24 14" aria-hidden="true">{line}{body}</svg>'


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda each: abs(each - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... or powers of ten where these are many."""
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1, -(-(last - first) // 8) or 1)
    return [f * 10.0**power for power in powers for f in factors if low * 0.999 <= f * 10.0**power <= high * 1.001]


def tick_texts(values: Sequence[float]) -> list[str]:
    """All with as many decimals as the one that needs most, if their steps are equal: 5.0, 7.5, 10.0."""
    steps = [right - left for left, right in itertools.pairwise(values)]
    if not steps or max(steps) - min(steps) > 1e-6 * max(steps) or max(map(abs, values)) >= 1e6:
        return [number(value) for value in values]
    decimals = next((k for k in range(7) if all(abs(round(v, k) - v) < 1e-6 * steps[0] for v in values)), None)
    return [number(value) if decimals is None else f"{value + 0.0:.{decimals}f}" for value in values]


@dataclass(frozen=True)
class _Axis:
    """From numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def _range(values: Iterable[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """With some air on both sides."""
    found = [min(max(value, -_LARGEST), _LARGEST) for value in values]
    low, high = min(found), max(found)
    if log:
        air = (high / low) ** 0.05 if high > low else 2.0
        return low / air, high * air
    air = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (0.0 if zero else low - air), high + air


class _Drawing:
    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        points = [point for series in chart.series for point in series.points]
        assert points, f"{chart.title}: a chart without points"
        self.xs = sorted({point.x for point in points})
        area = any(series.kind == "area" for series in chart.series)
        edges = [edge for series in chart.series for edge in series.edges]
        self.log = chart.log_x and not edges and self.xs[0] > _SMALLEST
        x = _range(edges or self.xs, log=self.log)
        y = _range([point.y for point in points] + ([] if chart.y_top is None else [chart.y_top]), zero=area)
        self.height = _HEIGHT
        if chart.identity:
            x = y = min(x[0], y[0]), max(x[1], y[1])
            self.height = _TOP + (_WIDTH - _LEFT - _RIGHT) + _BOTTOM
        self.bottom = self.height - _BOTTOM
        self.x = _Axis(*x, _LEFT, _WIDTH - _RIGHT, self.log)
        self.y = _Axis(*y, self.bottom, _TOP)
        self.taken: list[tuple[float, float, float, float]] = []  # by labels

    def text(self) -> str:
        """The whole drawing."""
        chart = self.chart
        parts = [
            f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {self.height:g}" role="img" '
            f'aria-label="{escape(chart.alternative)}">',
            *self._axes(),
        ]
        if chart.identity:
            low, high = self.x.low, self.x.high
            ends = f"M{self.x(low):.1f} {self.y(low):.1f}L{self.x(high):.1f} {self.y(high):.1f}"
            parts.append(f'<path class="identity" d="{ends}"/>')
        for index, series in enumerate(chart.series):
            parts += self._series(index, series)
        if chart.write_labels:
            parts += self._labels()
        return "".join([*parts, "</svg>"])

    def _axes(self) -> list[str]:
        bottom, right = self.bottom, _WIDTH - _RIGHT
        parts = [f'<text class="axis-name" x="4" y="18">{escape(self.chart.y_label)}</text>']
        y_ticks, x_ticks = ticks(self.y.low, self.y.high), self._x_ticks()
        for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{right:g}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for tick, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
            x = self.x(tick)
            parts.append(f'<path class="grid" d="M{x:.1f} {bottom:g}v4"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 19:g}" text-anchor="middle">{text}</text>')
        parts.append(f'<path class="axis" d="M{_LEFT:g} {bottom:g}H{right:g}"/>')
        name = escape(self.chart.x_label)
        middle = (_LEFT + right) / 2
        return [
            *parts,
            f'<text class="axis-name" x="{middle:g}" y="{self.height - 6:g}" text-anchor="middle">{name}</text>',
        ]

    def _x_ticks(self) -> list[float]:
        """The numbers themselves, where they are few and far enough from each other: nobody shoots 2.5 images."""
        places = [self.x(value) for value in self.xs]
        gaps = [right - left for left, right in itertools.pairwise(places)]
        if not self.chart.identity and len(places) <= 8 and all(gap >= _TICK_GAP_PX for gap in gaps):
            return self.xs
        return log_ticks(self.x.low, self.x.high) if self.log else ticks(self.x.low, self.x.high)

    def _series(self, index: int, series: Series) -> list[str]:
        places = [(self.x(point.x), self.y(point.y)) for point in series.points]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dash, index = _dash(series, index), index if series.beside is None else series.beside
        parts = [f'<g class="{_color(index)}">']
        if series.kind == "area":
            line = f"M{self.x(series.edges[0]):.1f} {self.y(0.0):.1f}" + "".join(
                f"V{y:.1f}H{self.x(edge):.1f}" for (_, y), edge in zip(places, series.edges[1:], strict=True)
            )
            parts.append(f'<path class="area" d="{line}V{self.y(0.0):.1f}Z"/>')
        if series.kind != "points" and len(places) > 1:
            parts.append(f'<path class="line"{dash} d="{line}"/>')
        if series.kind != "area":
            every = 1 if series.kind == "points" or len(places) <= _MARKED else -(-len(places) // 12)
            for (x, y), point in list(zip(places, series.points, strict=True))[::every]:
                said = ", ".join(filter(None, [series.name, point.label]))
                title = f"<title>{escape(said)}: {number(point.x)}, {number(point.y)}</title>"
                parts.append(_marker(x, y, index, point.solid, title))
        return [*parts, "</g>"]

    def _labels(self) -> list[str]:
        """Beside the points, at the first of four places that is free of other points and labels."""
        points = [point for series in self.chart.series for point in series.points]
        self.taken = [(self.x(p.x) - 5, self.y(p.y) - 5, self.x(p.x) + 5, self.y(p.y) + 5) for p in points]
        parts, written = [], set()
        for point in points:
            text = point.label.partition(",")[0]  # the rest stands in the table
            x, y, width = self.x(point.x), self.y(point.y), _CHARACTER_PX * len(text)
            spot = (text, round(x), round(y))
            if not text or spot in written:
                continue
            written.add(spot)
            tries = (
                (x + 9, y + 4, "start"),
                (x - 9, y + 4, "end"),
                (x, y - 10, "middle"),
                (x, y + 20, "middle"),
            )
            lefts = [at - width * {"start": 0.0, "end": 1.0, "middle": 0.5}[anchor] for at, _, anchor in tries]
            boxes = [(left, base - 13, left + width, base + 4) for left, (_, base, _) in zip(lefts, tries, strict=True)]
            free = [
                k for k, box in enumerate(boxes) if self._inside(box) and not any(_meet(box, b) for b in self.taken)
            ]
            if free:  # else the table below says it
                at, base, anchor = tries[free[0]]
                self.taken.append(boxes[free[0]])
                parts.append(
                    f'<text class="label" x="{at:.1f}" y="{base:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
                )
        return parts

    def _inside(self, box: Box) -> bool:
        return box[0] >= _LEFT and box[2] <= _WIDTH - 2 and box[1] >= _TOP - 12 and box[3] <= self.bottom


Box = tuple[float, float, float, float]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _color(index: int) -> str:
    return f"s{index % COLORS}"


def _dash(series: Series, index: int) -> str:
    """Only where a color comes again."""
    patterns: Sequence[str] = ("", "6 3", "8 3 2 3")
    pattern = patterns[index // COLORS % len(patterns)] if series.beside is None else "2 3"
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _marker(x: float, y: float, index: int, solid: bool, inner: str = "") -> str:
    shape = _MARKERS[(index + index // COLORS) % len(_MARKERS)]
    kind = "mark" if solid else "mark hollow"
    if shape == "circle":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.6">{inner}</circle>'
    paths = {"square": "m-3.3-3.3h6.6v6.6h-6.6z", "diamond": "m0-4.6l4.6 4.6l-4.6 4.6l-4.6-4.6z"}
    paths["triangle"] = "m0-4.4l4.2 7.4h-8.4z"
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}{paths[shape]}">{inner}</path>'
