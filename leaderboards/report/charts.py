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

COLORS = 8  # --series-0 ... in style.css; after that, the same colors with other markers and dashes
_WIDTH, _HEIGHT = 520.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 18.0, 34.0, 46.0
_CHARACTER_PX = 6.4  # of a label, about
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
    """Points that belong together: joined by a line, as an area above zero, or on their own."""

    name: str
    points: tuple[Point, ...]
    kind: str = "line"  # line, area, points
    beside: int | None = None  # the number of the series that it belongs to: its color, but dashed


@dataclass(frozen=True)
class Chart:
    """Two axes and what is drawn between them."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str = ""
    log_x: bool = False
    identity: bool = False  # the line y = x, and equal scales
    write_labels: bool = False  # the points' labels into the drawing

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


def number(value: float) -> str:
    """A number as axes and tables show it."""
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


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
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**power for power in powers for f in factors if low * 0.999 <= f * 10.0**power <= high * 1.001]


@dataclass(frozen=True)
class _Axis:
    """From numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def _range(values: Iterable[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """With some air on both sides."""
    found = list(values)
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
        self.log = chart.log_x and self.xs[0] > 0
        area = any(series.kind == "area" for series in chart.series)
        x, y = _range(self.xs, log=self.log), _range([point.y for point in points], zero=area)
        if chart.identity:
            x = y = min(x[0], y[0]), max(x[1], y[1])
        self.x = _Axis(*x, _LEFT, _WIDTH - _RIGHT, self.log)
        self.y = _Axis(*y, _HEIGHT - _BOTTOM, _TOP)
        self.taken: list[tuple[float, float, float, float]] = []  # by labels

    def text(self) -> str:
        """The whole drawing."""
        chart = self.chart
        parts = [
            f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
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
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = [f'<text class="axis-name" x="4" y="16">{escape(self.chart.y_label)}</text>']
        for tick in ticks(self.y.low, self.y.high):
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{right:g}"/>')
            parts.append(
                f'<text class="tick" x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
            )
        for tick in self._x_ticks():
            x = self.x(tick)
            parts.append(f'<path class="grid" d="M{x:.1f} {bottom:g}v4"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{bottom + 19:g}" text-anchor="middle">{number(tick)}</text>'
            )
        parts.append(f'<path class="axis" d="M{_LEFT:g} {bottom:g}H{right:g}"/>')
        name = escape(self.chart.x_label)
        middle = (_LEFT + right) / 2
        return [
            *parts,
            f'<text class="axis-name" x="{middle:g}" y="{_HEIGHT - 6:g}" text-anchor="middle">{name}</text>',
        ]

    def _x_ticks(self) -> list[float]:
        """The numbers themselves, where they are few and far enough from each other: nobody shoots 2.5 images."""
        places = [self.x(value) for value in self.xs]
        gaps = [right - left for left, right in itertools.pairwise(places)]
        if not self.chart.identity and len(places) <= 8 and all(gap >= 34 for gap in gaps):
            return self.xs
        return log_ticks(self.x.low, self.x.high) if self.log else ticks(self.x.low, self.x.high, 6)

    def _series(self, index: int, series: Series) -> list[str]:
        places = [(self.x(point.x), self.y(point.y)) for point in series.points]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dash, index = _dash(series, index), index if series.beside is None else series.beside
        parts = [f'<g class="{_color(index)}">']
        if series.kind == "area":
            base = self.y(0.0)
            parts.append(
                f'<path class="area" d="{line}L{places[-1][0]:.1f} {base:.1f}L{places[0][0]:.1f} {base:.1f}Z"/>'
            )
        if series.kind != "points" and len(places) > 1:
            parts.append(f'<path class="line"{dash} d="{line}"/>')
        if series.kind == "points" or (series.kind == "line" and len(places) <= 30):
            for (x, y), point in zip(places, series.points, strict=True):
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
            tries = ((x + 9, y + 4), (x - 9 - width, y + 4), (x - width / 2, y - 10), (x - width / 2, y + 20))
            boxes = [(left, base - 11, left + width, base + 3) for left, base in tries]
            free = [k for k, box in enumerate(boxes) if _inside(box) and not any(_meet(box, b) for b in self.taken)]
            if free:  # else the table below says it
                left, base = tries[free[0]]
                self.taken.append(boxes[free[0]])
                parts.append(f'<text class="label" x="{left:.1f}" y="{base:.1f}">{escape(text)}</text>')
        return parts


Box = tuple[float, float, float, float]


def _inside(box: Box) -> bool:
    return box[0] >= _LEFT and box[2] <= _WIDTH - 2 and box[1] >= _TOP - 12 and box[3] <= _HEIGHT - _BOTTOM


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
