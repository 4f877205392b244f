"""The toy world: seeded pictures in which self-supervised learning visibly works within minutes on a CPU.

Each of ten classes is a shape that wears its own surface pattern (see toy_shapes.py), at random place, turn, scale,
phase and frequency.

Never color: every object wears one of three two-color pairs, in either polarity, drawn independently of its class; each
pattern shows both colors in equal parts and each shape covers the same area, so that mean color is at chance. The
background is near-neutral and mottled, with two small gray clutter items behind the object and, in one picture of four,
an occluder before it. Where colors are free, color alone tells instances apart, and nothing else is learned.

    scene(seed=0, split="train", index=7)                                   one object of class 7 % 10
    scene(seed=0, split="val", index=7, labels=(2, 5, 5), width_px=96)      three objects, the last in front
    sequence(seed=0, index=7, frames=30, height_px=96, width_px=128)        two objects that move

Exact masks and boxes come with every picture. A picture depends on WORLD_VERSION, seed, split, index, size and labels
alone, and its bytes are the same on every machine: see `_Draws` for the random numbers, toy_shapes.py for the
arithmetic, toy_files.py for files. The world is frozen: whoever changes one byte of a picture raises WORLD_VERSION.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ssl_bench.errors import UserError, unknown
from ssl_bench.evaluate.toy_shapes import (
    PATTERNS,
    TURNS,
    Floats,
    Mask,
    Surface,
    direction,
    front_share,
    inside,
    rotated,
    smooth,
)

WORLD_VERSION = 1
# In alphabetical order, so that a label is also the position among sorted class folders, as torchvision counts them.
CLASSES = ("arrow", "cross", "disc", "ellipse", "lshape", "ring", "square", "star", "triangle", "tshape")
SPLITS = ("train", "val", "test")
MIN_SIZE_PX = 16
MOST_OBJECTS = 16  # of a scene; more would begin to hide each other altogether

Bytes = npt.NDArray[np.uint8]
Color = tuple[float, float, float]
Number = TypeVar("Number", np.uint8, np.uint16)

_COLOR_PAIRS: tuple[tuple[Color, Color], ...] = (
    ((232.0, 186.0, 60.0), (44.0, 70.0, 176.0)),  # yellow, blue
    ((214.0, 76.0, 52.0), (66.0, 190.0, 190.0)),  # red, cyan
    ((86.0, 190.0, 74.0), (170.0, 48.0, 150.0)),  # green, magenta
)
_OBJECT_SCALE = (0.24, 0.40)  # in units of the picture's shorter side, as all lengths outside an object
_MARGIN = 1.1  # of an object to the border of the picture, in units of its scale
_OCCLUDED_SHARE = 0.25  # of the pictures
_SEQUENCES = len(SPLITS)  # the stream of draws that no split uses


class _Draws:
    """Random numbers: the raw stream of Philox, which NumPy guarantees for good, as it does not for its distributions.

    Philox is counter-based: a draw is a function of key and counter. Streams that differ in one word never meet, and a
    picture does not depend on what was drawn before it, or by which process.
    """

    def __init__(self, seed: int, stream: int, index: int) -> None:
        key = np.array([seed, WORLD_VERSION], np.uint64)
        counter = np.array([0, 0, index, stream], np.uint64)  # the first word counts the draws
        self._bits = np.random.Philox(key=key, counter=counter)

    def array(self, *shape: int) -> Floats:
        """Uniform in [0, 1), with 53 random bits."""
        raw = np.asarray(self._bits.random_raw(math.prod(shape)), np.uint64)
        return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.array(1)[0])

    def below(self, end: int) -> int:
        return int(self.between(0, end))


@dataclass(frozen=True, eq=False)
class _Thing:
    """Whatever stands before the background: clutter, object or occluder."""

    shape: str
    x: float
    y: float
    scale: float
    turn: int  # of TURNS
    color: Color
    back: Color
    label: int | None = None  # None: clutter or occluder, without a surface
    surface: Surface | None = None
    stretch: float = 1.0  # lengthens along the thing's own x axis and narrows along y
    bend: float = 0.0  # a shear that grows along y, and leaves areas as they are


class _Backdrop(NamedTuple):
    tone: float
    contrast: float
    nodes: Floats


@dataclass(frozen=True, eq=False)
class Instance:
    """One object: what of it is visible, and what would be if nothing stood before it (within the picture)."""

    label: int
    mask: Mask  # (H, W), visible pixels; the masks of a scene never overlap
    amodal: Mask  # (H, W)

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in pixels around the visible mask, half-open; all 0 where nothing is visible."""
        if not self.mask.any():
            return (0, 0, 0, 0)
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and its objects, from back to front."""

    image: Bytes  # (H, W, 3)
    instances: tuple[Instance, ...]

    @property
    def semantic(self) -> Bytes:
        """(H, W): 1 + label on objects; 0 on background, clutter and occluder."""
        return self._painted([instance.label for instance in self.instances])

    @property
    def instance_map(self) -> Bytes:
        """(H, W): 1 + position in `instances`; 0 elsewhere."""
        return self._painted(range(len(self.instances)))

    def _painted(self, values: Iterable[int]) -> Bytes:
        painted = np.zeros(self.image.shape[:2], np.uint8)
        for value, instance in zip(values, self.instances, strict=True):
            painted[instance.mask] = 1 + value
        return painted


def _span(center: float, reach: float, unit: int, end: int) -> slice:
    start = min(max(math.floor((center - reach) * unit), 0), end)
    return slice(start, max(start, min(math.ceil((center + reach) * unit), end)))


def _paint(thing: _Thing, canvas: Bytes, unit: int) -> tuple[tuple[slice, slice], Mask]:
    """Draw on `canvas` (H, W, 3), where `unit` samples make a length of 1; return a window and what it covers there."""
    reach = 1.6 * thing.scale * max(thing.stretch, 1 / thing.stretch)  # no shape goes further from its center
    window = (_span(thing.y, reach, unit, canvas.shape[0]), _span(thing.x, reach, unit, canvas.shape[1]))
    y = ((np.arange(window[0].start, window[0].stop) + 0.5) / unit - thing.y) / thing.scale
    x = ((np.arange(window[1].start, window[1].stop) + 0.5) / unit - thing.x) / thing.scale
    x, y = rotated(x[None, :], y[:, None], thing.turn)
    x, y = x / thing.stretch, y * thing.stretch
    x = x + thing.bend * y * y
    covered = inside(thing.shape, x, y)
    if thing.surface is None:
        canvas[window][covered] = thing.color
        return window, covered
    share = front_share(thing.shape, thing.surface, x[covered], y[covered])[:, None]
    color, back = np.array(thing.color), np.array(thing.back)
    canvas[window][covered] = np.floor(back + (color - back) * share + 0.5)
    return window, covered


def _paint_backdrop(backdrop: _Backdrop, height_px: int, width_px: int) -> Bytes:
    """Near-neutral mottle: three octaves of value noise in gray, and a breath of one more between red and blue."""
    unit = min(height_px, width_px)
    y, x = (np.arange(height_px)[:, None] + 0.5) / unit, (np.arange(width_px)[None, :] + 0.5) / unit
    coarse, middle, fine, tint = (
        smooth(backdrop.nodes, x * frequency + offset, y * frequency + offset) - 0.5
        for frequency, offset in ((3.0, 0.0), (8.0, 7.5), (20.0, 15.2), (4.0, 23.7))
    )
    gray = backdrop.tone + backdrop.contrast * (coarse + 0.6 * middle + 0.5 * fine)
    return np.floor(np.stack([gray + 12 * tint, gray, gray - 12 * tint], axis=-1) + 0.5).astype(np.uint8)


def _four_sum(samples: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """(2H, 2W, ...) samples -> (H, W, ...): pictures are drawn with four samples a pixel, for soft edges."""
    pairs: npt.NDArray[Number] = samples[::2] + samples[1::2]
    total: npt.NDArray[Number] = pairs[:, ::2] + pairs[:, 1::2]
    return total


def _render(backdrop: _Backdrop, things: Sequence[_Thing], height_px: int, width_px: int) -> Scene:
    canvas = _paint_backdrop(backdrop, height_px, width_px).repeat(2, axis=0).repeat(2, axis=1)
    top = np.zeros(canvas.shape[:2], np.uint16)  # which thing is in front, counted from 1
    amodal: dict[int, Mask] = {}
    for order, thing in enumerate(things, start=1):
        window, covered = _paint(thing, canvas, 2 * min(height_px, width_px))
        top[window][covered] = order
        if thing.label is not None:
            samples = np.zeros(top.shape, np.uint8)
            samples[window] = covered
            amodal[order] = _four_sum(samples) >= 2
    # A pixel belongs to whatever shows in half of its samples; if two things do, to the one in front.
    taken = np.zeros((height_px, width_px), np.bool_)
    visible: dict[int, Mask] = {}
    for order in range(len(things), 0, -1):
        visible[order] = (_four_sum((top == order).view(np.uint8)) >= 2) & ~taken
        taken |= visible[order]
    image = ((_four_sum(canvas.astype(np.uint16)) + 2) >> 2).astype(np.uint8)
    instances = tuple(
        Instance(label=thing.label, mask=visible[order], amodal=amodal[order])
        for order, thing in enumerate(things, start=1)
        if thing.label is not None
    )
    return Scene(image=image, instances=instances)


def _draw_backdrop(draws: _Draws) -> _Backdrop:
    return _Backdrop(tone=draws.between(112, 144), contrast=draws.between(28, 44), nodes=draws.array(32, 32))


def _draw_object(draws: _Draws, label: int, x: float, y: float, scale: float) -> _Thing:
    pair, polarity = _COLOR_PAIRS[draws.below(len(_COLOR_PAIRS))], draws.below(2)
    turn = draws.below(TURNS)
    surface = Surface(
        period=draws.between(*PATTERNS[CLASSES[label]].period),
        phase=(draws.between(0, 1), draws.between(0, 1)),
        turn=draws.below(TURNS),
        nodes=draws.array(24, 24),
    )
    color, back = pair[polarity], pair[1 - polarity]
    return _Thing(CLASSES[label], x, y, scale, turn, color, back, label, surface)


def _draw_gray(draws: _Draws, shape: str, x: float, y: float, scale: float) -> _Thing:
    """Clutter or an occluder: darker or lighter than any background, and without a pattern."""
    tone = (52.0, 204.0)[draws.below(2)]
    return _Thing(shape, x, y, scale, draws.below(TURNS), color=(tone,) * 3, back=(tone,) * 3)


def _draw_places(draws: _Draws, count: int, wide: float, high: float) -> list[tuple[float, float, float]]:
    """x, y, scale of each object: inside the picture, and far from the others by the best of a few candidates."""
    shrink = min(1.0, max(0.4, math.sqrt(wide * high / count)))
    places: list[tuple[float, float, float]] = []
    for _ in range(count):
        scale = shrink * draws.between(*_OBJECT_SCALE)
        margin = min(_MARGIN * scale, 0.5)
        best, best_gap = (0.0, 0.0), -1.0
        for _ in range(12 if places else 1):
            x, y = draws.between(margin, wide - margin), draws.between(margin, high - margin)
            gaps = (((x - a) * (x - a) + (y - b) * (y - b)) / ((scale + s) * (scale + s)) for a, b, s in places)
            gap = min(gaps, default=0.0)
            if gap > best_gap:
                best, best_gap = (x, y), gap
        places.append((*best, scale))
    return places


def _draw_clutter(draws: _Draws, wide: float, high: float) -> list[_Thing]:
    shapes = [("disc", "square", "triangle")[draws.below(3)] for _ in range(2)]
    return [
        _draw_gray(draws, shape, draws.between(0, wide), draws.between(0, high), draws.between(0.05, 0.09))
        for shape in shapes
    ]


def _draw_occluder(draws: _Draws, hidden: _Thing) -> _Thing:
    """A bar over one side of an object."""
    cosine, sine = direction(draws.below(TURNS))
    away = hidden.scale * draws.between(0.4, 0.8)
    x, y, scale = hidden.x + away * cosine, hidden.y + away * sine, hidden.scale * draws.between(0.36, 0.5)
    return replace(_draw_gray(draws, "square", x, y, scale), stretch=draws.between(1.3, 1.8))


def scene(
    *,
    seed: int,
    split: str,
    index: int,
    height_px: int = 48,
    width_px: int = 48,
    labels: tuple[int, ...] | None = None,
) -> Scene:
    """One picture: one object of class `index % 10`, or one of each label given, from back to front."""
    if split not in SPLITS:
        raise unknown("split of the toy world", split, SPLITS)
    labels = (index % len(CLASSES),) if labels is None else labels
    check(seed=seed, index=index, height_px=height_px, width_px=width_px, labels=labels)
    wide, high = width_px / min(height_px, width_px), height_px / min(height_px, width_px)
    draws = _Draws(seed, SPLITS.index(split), index)
    backdrop, things = _draw_backdrop(draws), _draw_clutter(draws, wide, high)
    things += [
        _draw_object(draws, label, *place)
        for label, place in zip(labels, _draw_places(draws, len(labels), wide, high), strict=True)
    ]
    if draws.between(0, 1) < _OCCLUDED_SHARE:
        things.append(_draw_occluder(draws, things[-1 - draws.below(len(labels))]))
    return _render(backdrop, things, height_px, width_px)


def check(*, seed: int, index: int, height_px: int, width_px: int, labels: tuple[int, ...]) -> None:
    """Refuse what no picture can be drawn of."""
    at_least(0, seed=seed, index=index)
    at_least(MIN_SIZE_PX, height_px=height_px, width_px=width_px)
    if not 1 <= len(labels) <= MOST_OBJECTS or not set(labels) <= set(range(len(CLASSES))):
        raise UserError(
            f"toy world: got objects of the classes {labels}, expected 1 to {MOST_OBJECTS} objects, and for each an "
            f"integer from 0 to {len(CLASSES) - 1}; give positions in CLASSES."
        )


def at_least(least: int, **given: int) -> None:
    """Refuse an integer that is too small, by its name."""
    for name, value in given.items():
        if not least <= value < 2**63:
            raise UserError(f"toy world: got {name}={value}, expected an integer from {least} up; give another {name}.")


def _swing(time: float) -> float:
    """A smooth wave of period 1 between -1 and 1: what a sine would be, in exact arithmetic."""
    ramp = abs(2 * (time - math.floor(time)) - 1)
    return 2 * ramp * ramp * (3 - 2 * ramp) - 1


def _bounced(x: float, end: float, margin: float) -> float:
    """Fold a straight motion along the real line into [margin, end - margin]."""
    room = max(end - 2 * margin, 1e-3)
    turns = (x - margin) / (2 * room)
    return margin + room * (1 - abs(2 * (turns - math.floor(turns)) - 1))


def _moved(thing: _Thing, motion: Sequence[float], frame: int, wide: float, high: float) -> _Thing:
    """Where a thing is, and how it is turned, scaled and bent, that many frames later; `motion` is in [0, 1)."""
    cosine, sine = direction(int(motion[0] * TURNS))
    way = frame * (0.008 + 0.012 * motion[1])
    return replace(
        thing,
        x=_bounced(thing.x + way * cosine, wide, 0.8 * thing.scale),
        y=_bounced(thing.y + way * sine, high, 0.8 * thing.scale),
        turn=thing.turn + math.floor(frame * 64 * (motion[2] - 0.5)),  # up to 2.8 degrees a frame
        scale=thing.scale * (1 + 0.15 * _swing(motion[3] + frame / (20 + 20 * motion[4]))),
        bend=0.2 * _swing(motion[5] + frame / (15 + 15 * motion[6])),
    )


def sequence(*, seed: int, index: int, frames: int, height_px: int, width_px: int, objects: int = 2) -> Iterator[Scene]:
    """Objects of different classes that move, turn, grow and shrink, bend, and pass behind each other and an occluder.

    Every frame lists the same instances in the same order; a hidden one has an empty mask. Frame k does not depend on
    how many frames are asked for.
    """
    check(seed=seed, index=index, height_px=height_px, width_px=width_px, labels=(0,) * objects)
    at_least(1, frames=frames)
    draws = _Draws(seed, _SEQUENCES, index)
    wide, high = width_px / min(height_px, width_px), height_px / min(height_px, width_px)
    backdrop, clutter = _draw_backdrop(draws), _draw_clutter(draws, wide, high)
    first, step = draws.below(len(CLASSES)), (1, 3, 7, 9)[draws.below(4)]  # prime to 10: ten objects have ten classes
    start = [
        _draw_object(draws, (first + step * position) % len(CLASSES), *place)
        for position, place in enumerate(_draw_places(draws, objects, wide, high))
    ]
    motions: list[list[float]] = [draws.array(7).tolist() for _ in start]
    occluder = _draw_gray(draws, "square", 0.0, high * draws.between(0.35, 0.65), 0.41)
    occluder = replace(occluder, turn=draws.below(TURNS // 16), stretch=0.7)
    enters = draws.between(-0.6, -0.3)

    def frame_of(frame: int) -> Scene:
        things = [_moved(thing, motion, frame, wide, high) for thing, motion in zip(start, motions, strict=True)]
        passing = replace(occluder, x=_bounced(enters + 0.03 * frame, wide, -0.6))
        return _render(backdrop, [*clutter, *things, passing], height_px, width_px)

    return map(frame_of, range(frames))
