"""The ten shapes and the ten surface patterns of the toy world, in arithmetic that is exact on every machine.

    arrow     zigzag            cross     noise             disc      fine stripes      ellipse   crosshatch
    lshape    blobs             ring      rings             square    checks            star      dots
    triangle  coarse stripes    tshape    plain shading

Each shape covers the same area, and each pattern shows both of its colors in equal parts. `inside` says which points a
shape covers, `front_share` which of its two colors an object shows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# Pictures are drawn in float64 with the operations that IEEE 754 fixes to the last bit (+ - * / sqrt floor < sort),
# element by element: no sum whose order a library may choose, no sine or exponential whose last digit differs between
# processors. The one table of cosines is rounded a million times more coarsely than any libm errs.
TURNS = 4096
_COSINES = tuple(round(math.cos(2 * math.pi * turn / TURNS) * 2**30) / 2**30 for turn in range(TURNS))


def direction(turn: int) -> tuple[float, float]:
    """Cosine and sine of a turn, of which TURNS make a full circle."""
    return _COSINES[turn % TURNS], _COSINES[(turn - TURNS // 4) % TURNS]


def rotated(x: Floats, y: Floats, turn: int) -> tuple[Floats, Floats]:
    """The same points, in axes that are turned."""
    cosine, sine = direction(turn)
    return x * cosine + y * sine, y * cosine - x * sine


def _fraction(x: Floats) -> Floats:
    return x - np.floor(x)


def _wave(x: Floats) -> Floats:
    """A triangle wave of period 1: 1 at whole numbers, 0 between them."""
    return np.abs(2 * _fraction(x) - 1)


def _cell(nodes: Floats, x: Floats, y: Floats) -> Floats:
    """A random value for every unit cell of the plane; it repeats after as many cells as there are nodes."""
    rows, columns = nodes.shape
    values: Floats = nodes[np.floor(y).astype(np.int64) % rows, np.floor(x).astype(np.int64) % columns]
    return values


def smooth(nodes: Floats, x: Floats, y: Floats) -> Floats:
    """Value noise: the cells' random values, interpolated smoothly."""
    right, down = _fraction(x), _fraction(y)
    right, down = right * right * (3 - 2 * right), down * down * (3 - 2 * down)
    above = _cell(nodes, x, y) * (1 - right) + _cell(nodes, x + 1, y) * right
    below = _cell(nodes, x, y + 1) * (1 - right) + _cell(nodes, x + 1, y + 1) * right
    return above * (1 - down) + below * down


_SHAPE_AREA = 1.7  # of every shape, in units of its squared scale
_STAR = ((0, -1), (0.265, -0.364), (0.951, -0.309), (0.428, 0.139), (0.588, 0.809))  # clockwise from the tip
_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {  # y points down
    "arrow": ((0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 0.9), (-0.3, 0.9), (-0.3, -0.1), (-0.8, -0.1)),
    "cross": (
        (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1),
        (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3), (-0.3, -1),
    ),
    "lshape": ((-0.65, -1), (-0.1, -1), (-0.1, 0.4), (0.75, 0.4), (0.75, 0.95), (-0.65, 0.95)),
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "star": (*_STAR, (0, 0.45), *((-x, y) for x, y in reversed(_STAR[1:]))),
    "triangle": ((0, -1), (0.866, 0.5), (-0.866, 0.5)),
    "tshape": (
        (-0.9, -0.8), (0.9, -0.8), (0.9, -0.25), (0.28, -0.25), (0.28, 1), (-0.28, 1), (-0.28, -0.25), (-0.9, -0.25),
    ),
}  # fmt: skip
_ELLIPSE_FLATNESS = 0.32
_RING_HOLE = 0.52  # inner radius over outer radius
_RING_GAP = 0.7  # the gap lies where |y| < 0.7 x
# Areas before every shape is scaled to _SHAPE_AREA; the ring's gap takes atan(0.7) / pi of it.
_ROUND_AREAS = {
    "disc": 3.141592653589793,
    "ellipse": 3.141592653589793 * _ELLIPSE_FLATNESS,
    "ring": (3.141592653589793 - 0.610725964389209) * (1 - _RING_HOLE * _RING_HOLE),
}


def _polygon_area(corners: tuple[tuple[float, float], ...]) -> float:
    area = 0.0
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        area += x0 * y1 - x1 * y0
    return abs(area) / 2


# What to multiply coordinates by, so that all shapes have the same area.
_SHRINK = {
    name: math.sqrt((_ROUND_AREAS[name] if name in _ROUND_AREAS else _polygon_area(_POLYGONS[name])) / _SHAPE_AREA)
    for name in (*_POLYGONS, *_ROUND_AREAS)
}


def inside(shape: str, x: Floats, y: Floats) -> Mask:
    """Which points (in units of the object's scale, about its center) a shape covers."""
    x, y = x * _SHRINK[shape], y * _SHRINK[shape]
    if shape in _POLYGONS:
        corners = _POLYGONS[shape]
        covered = np.zeros(x.shape, np.bool_)
        for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
            if y0 != y1:  # even-odd rule: count the edges that a ray to the right would cross
                slope = (x1 - x0) / (y1 - y0)
                covered ^= ((y0 <= y) != (y1 <= y)) & (x < (y - y0) * slope + x0)
        return covered
    if shape == "ellipse":
        y = y / _ELLIPSE_FLATNESS
    radius_squared = x * x + y * y
    covered = radius_squared < 1
    if shape == "ring":
        covered &= (radius_squared > _RING_HOLE * _RING_HOLE) & ~(np.abs(y) < _RING_GAP * x)
    return covered


def _grid_within(shape: str) -> tuple[Floats, Floats]:
    """The points of a grid that a shape covers."""
    steps = (np.arange(48) - 23.5) / 18  # no shape reaches further than 1.3
    x, y = np.broadcast_to(steps[None, :], (48, 48)), np.broadcast_to(steps[:, None], (48, 48))
    covered = inside(shape, x, y)
    return x[covered], y[covered]


_POINTS = {name: _grid_within(name) for name in _SHRINK}


class _Pattern(NamedTuple):
    period: tuple[float, float]  # drawn from this range, in units of the object's scale
    height: Callable[[Floats, Floats, Floats], Floats]  # of a relief at (x, y), in periods
    is_shaded: bool = False  # else it has two colors and nothing between


# The higher half of each relief wears the one color, the lower half the other: so all patterns have the same mean.
PATTERNS = {
    "arrow": _Pattern((0.42, 0.56), lambda x, y, _: _wave(y + _wave(0.7 * x))),
    "cross": _Pattern((0.15, 0.20), lambda x, y, nodes: _cell(nodes, x, y)),
    "disc": _Pattern((0.26, 0.36), lambda x, y, _: _wave(x)),
    "ellipse": _Pattern((0.60, 0.80), lambda x, y, _: np.maximum(_wave(x), _wave(y))),
    "lshape": _Pattern((0.40, 0.60), lambda x, y, nodes: smooth(nodes, x, y)),
    "ring": _Pattern((0.50, 0.65), lambda x, y, _: _wave(np.sqrt(x * x + y * y))),
    "square": _Pattern((0.84, 1.10), lambda x, y, _: (_wave(x) - 0.5) * (_wave(y) - 0.5)),
    "star": _Pattern((0.34, 0.44), lambda x, y, _: _wave(x) * _wave(x) + _wave(y) * _wave(y)),
    "triangle": _Pattern((0.62, 0.86), lambda x, y, _: _wave(x)),
    "tshape": _Pattern((3.20, 4.40), lambda x, y, _: _wave(x), is_shaded=True),
}


class Surface(NamedTuple):
    """How one object wears the pattern of its shape."""

    period: float  # in units of the object's scale
    phase: tuple[float, float]  # in periods
    turn: int  # of TURNS, against the shape
    nodes: Floats  # random values, for the patterns that have some


def front_share(shape: str, surface: Surface, x: Floats, y: Floats) -> Floats:
    """How much of its front color an object shows at (x, y): half on average over the shape, whatever its pattern."""
    pattern = PATTERNS[shape]

    def height(x: Floats, y: Floats) -> Floats:
        x, y = rotated(x, y, surface.turn)
        x, y = x / surface.period + surface.phase[0], y / surface.period + surface.phase[1]
        return pattern.height(x, y, surface.nodes)

    ranked = np.sort(height(*_POINTS[shape]))
    share = np.searchsorted(ranked, height(x, y)) / len(ranked)
    return share if pattern.is_shaded else np.floor(2 * share).clip(0, 1)
