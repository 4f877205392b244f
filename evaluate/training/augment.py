"""Random views of an image: crops, flips and colors, as each paper's official code draws them.

    draw_views(image, augmentation_named("byol"), image_px=224, patch_px=16, rng=np.random.default_rng(0))

Pixels are those of torchvision's transforms on PIL images, which all the official codes use: RandomResizedCrop with its
ten tries, flip, ColorJitter in random order, gray, and on PIL directly Gaussian blur and solarization. Pillow is called
without torchvision in between, and every random number comes from the generator that is given.

The order is: rotation, crop, flip, jitter, gray, blur, solarization. MOCA flips last, ExtreMA and SiT right after the
crop. That is the same picture (a mirrored image has the same colors, and a blur is symmetric up to its rounding), and
views that share a crop then share its flip.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from ssl_bench.errors import unknown

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class View:
    """One view of an image: RandomResizedCrop and flip, then colors."""

    # Of the image's area; aspect ratio in [3/4, 4/3]. None: nothing is random, the short side is resized to 8/7 of the
    # view (256 for 224) and the center cut out. scale=(1, 1) would not be that: RandomResizedCrop then falls back to
    # the whole image, squeezed into a square.
    scale: tuple[float, float] | None
    interpolation: Literal["bilinear", "bicubic"]
    crop_of: int | None = None  # take the rotation, crop and flip of that earlier view
    size: float = 1.0  # of the network's image size; rounded to whole patches (local crops: 96 / 224)
    flip_p: float = 0.5
    jitter: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_p: float = 0.0  # Gaussian of radius U(.1, 2)
    solarize_p: float = 0.0  # invert from 128 up
    rotate_degrees: float = 0.0  # U(-d, d); no paper rotates: only for the toy world, whose objects are posed at random


_COLOR = (0.4, 0.4, 0.2, 0.1)  # BYOL's, as MoCo-v3, MOCA, SiT and ExtreMA have it
_THREE = (0.4, 0.4, 0.4, 0.0)  # MMC's supplement: "color jittering with parameters (0.4, 0.4, 0.4)"
_LIGHT = (0.4, 0.4, 0.0, 0.0)  # toy world: never the hue, which is not what tells its classes apart
_WHOLE, _GLOBAL, _LOCAL = (0.2, 1.0), (0.25, 1.0), (0.05, 0.25)


def _colored(view: View) -> View:
    """ExtreMA's colors: BYOL's without blur and solarization."""
    return replace(view, jitter=_COLOR, jitter_p=0.8, gray_p=0.2)


# fmt: off
_MAE    = View(_WHOLE, "bicubic")
_BYOL   = View(_WHOLE, "bilinear", jitter=_COLOR, jitter_p=0.8, gray_p=0.2)
_CROP   = View(_WHOLE, "bilinear")
_CENTER = View(None,   "bilinear", flip_p=0.0)
_MMC    = View(_GLOBAL, "bicubic", jitter=_THREE, jitter_p=0.8, gray_p=0.2)
_TOY    = View(_WHOLE, "bilinear", jitter=_LIGHT, jitter_p=0.8, rotate_degrees=180.0)

_MMC_GLOBAL = (replace(_MMC, blur_p=1.0), replace(_MMC, blur_p=0.1, solarize_p=0.2))
_TOY_GLOBAL = (replace(_TOY, scale=(0.4, 1.0)),) * 2

AUGMENTATIONS: dict[str, tuple[View, ...]] = {
    # MAE, TEC, SdAE: crop and flip. facebookresearch/mae main_pretrain.py; the same lines in sail-sg/TEC and
    # AbrahamYabo/SdAE.
    "mae":                  (_MAE,),
    # MOCA: two fixed pipelines. valeoai/MOCA util/transforms.py, after MoCo-v3 and BYOL; the paper says nothing.
    "byol":                 (replace(_BYOL, blur_p=1.0), replace(_BYOL, blur_p=0.1, solarize_p=0.2)),
    # ExtreMA: a shared crop, two colors, the first for the student. microsoft/ExtreMA lib/augment.py.
    "extrema":              (_colored(_CROP), _colored(replace(_CROP, crop_of=0))),
    # Table 4. One view: student and teacher see the same image. Two: independent. "none" is the official code's
    # --aug_centercrop (resize 256, center crop 224, no flip); "crop" its --aug_spatial (the paper: "random resized crop
    # + flipping"); the released code has no color without a shared crop, so the same colors are assumed.
    "extrema-none":         (_CENTER,),
    "extrema-color-1":      (_colored(_CENTER),),
    "extrema-color-2":      (_colored(_CENTER),) * 2,
    "extrema-crop-1":       (_CROP,),
    "extrema-crop-2":       (_CROP,) * 2,
    "extrema-crop-color-1": (_colored(_CROP),),
    "extrema-crop-color-2": (_colored(_CROP),) * 2,
    # MMC, supplement: jitter (.4, .4, .4), "Gaussian blur with a strength of 1.0", solarization .2. No code is known;
    # the rest is SiT's and MC-SSL's (Sara-Ahmed/MCSSL datasets_utils.py): bicubic, jitter p .8, gray .2, blur 1 in the
    # first view and .1 with the solarization in the second, 10 local crops of 96 px with blur .5. Without local crops
    # the global ones stay as they are, so that the ablation changes one thing (SiT's own have scale (.2, 1)).
    "mmc":                  (*_MMC_GLOBAL, *(replace(_MMC, scale=_LOCAL, size=96 / 224, blur_p=0.5),) * 10),
    "mmc-2":                _MMC_GLOBAL,
    # The toy world: ours. Any rotation, brightness and contrast; no blur, which would hide the patterns.
    "toy-mae":              (_TOY,),
    "toy-byol":             _TOY_GLOBAL,
    "toy-extrema":          (_TOY, replace(_TOY, crop_of=0)),
    "toy-mmc":              (*_TOY_GLOBAL, *(replace(_TOY, scale=(0.1, 0.4), size=0.5),) * 2),
    "toy-mmc-2":            _TOY_GLOBAL,
}
# fmt: on


def augmentation_named(name: str) -> tuple[View, ...]:
    """The views of a row; an unknown name is refused with the nearest one."""
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


def view_px(view: View, *, image_px: int, patch_px: int) -> int:
    """The side of a view: whole patches, at least one."""
    return max(1, round(view.size * image_px / patch_px)) * patch_px


def draw_views(
    image: Image.Image,
    augmentation: tuple[View, ...],
    *,
    image_px: int,
    patch_px: int,
    rng: np.random.Generator,
) -> tuple[Pixels, ...]:
    """The views of an RGB image, each uint8 (3, S, S) with an S of its own."""
    turned = _Turned(image)
    where: list[_Where] = []
    # Crops that were made, by place, size and interpolation: views with the same crop resize it once.
    made: dict[tuple[_Where, int, str], Image.Image] = {}
    drawn = []
    for view in augmentation:
        where.append(_draw_where(view, image.size, rng) if view.crop_of is None else where[view.crop_of])
        side = view_px(view, image_px=image_px, patch_px=patch_px)
        key = (where[-1], side, view.interpolation)
        if key not in made:
            made[key] = _cut(turned.by(where[-1].degrees), where[-1], side, view.interpolation)
        pixels = np.asarray(_draw_colors(view, made[key], rng))  # (S, S, 3)
        drawn.append(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return tuple(drawn)


@dataclass(frozen=True)
class _Where:
    """The place of a view."""

    degrees: float
    box: Box | None  # None: the center
    flip: bool


def _draw_where(view: View, size: tuple[int, int], rng: np.random.Generator) -> _Where:
    turn, flip, *uniform = rng.random(6).tolist()
    degrees = (2 * turn - 1) * view.rotate_degrees
    box = None if view.scale is None else _draw_box(view.scale, size, uniform, rng)
    return _Where(degrees, box, flip < view.flip_p)


_TRIES = 10
_NARROW, _WIDE = 3 / 4, 4 / 3
_LOG_NARROW, _LOG_WIDE = math.log(_NARROW), math.log(_WIDE)


def _draw_box(scale: tuple[float, float], size: tuple[int, int], uniform: list[float], rng: np.random.Generator) -> Box:
    """RandomResizedCrop's box: area and log of the aspect ratio uniform, until it fits; `uniform` is the first try."""
    width, height = size
    for number in range(_TRIES):
        share, aspect, across, down = uniform if number == 0 else rng.random(4).tolist()
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        ratio = math.exp(_LOG_NARROW + aspect * (_LOG_WIDE - _LOG_NARROW))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(across * (width - wide + 1)), int(down * (height - high + 1))
            return left, top, left + wide, top + high
    return _largest_box(width, height)


def _largest_box(width: int, height: int) -> Box:
    """Where no try fits: the center of an image that is too narrow or too wide, else all of it."""
    wide, high = width, height
    if width / height < _NARROW:
        high = round(width / _NARROW)
    elif width / height > _WIDE:
        wide = round(height * _WIDE)
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def _cut(image: Image.Image, where: _Where, side: int, interpolation: str) -> Image.Image:
    """Crop, resize, flip. In two steps: resize(box=...) would let pixels from outside of the box bleed in."""
    if where.box is None:
        image = _center(image, side, interpolation)
    else:
        image = image.crop(where.box).resize((side, side), _FILTERS[interpolation])
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if where.flip else image


def _center(image: Image.Image, side: int, interpolation: str) -> Image.Image:
    """Resize the short side to 8/7 of `side`, cut out the center: Resize(256), CenterCrop(224)."""
    width, height = image.size
    short = round(side * 8 / 7)
    wide, high = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = round((wide - side) / 2), round((high - side) / 2)
    return image.resize((wide, high), _FILTERS[interpolation]).crop((left, top, left + side, top + side))


class _Turned:
    """An image, turned about its center within a frame of its own size; corners show the image mirrored at its border.

    Black corners would tell by how much an image was turned, and crops that avoid the corners would be small ones.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def by(self, degrees: float) -> Image.Image:
        """Turned clockwise, bilinear; the image itself at 0."""
        if degrees == 0:
            return self.image
        padded, margin = self._padded
        width, height = self.image.size
        x, y = width / 2, height / 2
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        # Of a point of the result, where it is in the padded image.
        matrix = (cosine, sine, x + margin - cosine * x - sine * y, -sine, cosine, y + margin + sine * x - cosine * y)
        return padded.transform(self.image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    @functools.cached_property
    def _padded(self) -> tuple[Image.Image, int]:
        """The image with a mirrored border that holds every corner; made once for all views."""
        width, height = self.image.size
        margin = math.ceil((math.hypot(width, height) - min(width, height)) / 2) + 1
        border = ((margin, margin), (margin, margin), (0, 0))
        return Image.fromarray(np.pad(np.asarray(self.image), border, mode="symmetric")), margin


_ORDERS = tuple(itertools.permutations(range(4)))
_BLUR_RADIUS = (0.1, 2.0)
_SOLARIZED = 3 * [value if value < 128 else 255 - value for value in range(256)]


def _draw_colors(view: View, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Jitter, gray, blur and solarization, each with its probability."""
    jittered, *factors, order, gray, blurred, radius, solarized = rng.random(10).tolist()
    if view.jitter is not None and jittered < view.jitter_p:
        image = _jittered(image, view.jitter, factors, _ORDERS[int(order * len(_ORDERS))])
    if gray < view.gray_p:
        image = image.convert("L").convert("RGB")
    if blurred < view.blur_p:
        low, high = _BLUR_RADIUS
        image = image.filter(ImageFilter.GaussianBlur(low + radius * (high - low)))
    if solarized < view.solarize_p:
        image = image.point(_SOLARIZED)
    return image


def _jittered(
    image: Image.Image, strengths: tuple[float, float, float, float], uniform: list[float], order: tuple[int, ...]
) -> Image.Image:
    """ColorJitter: factors U(max(0, 1 - x), 1 + x), hue U(-x, x), in the given order; of strength 0: not at all."""
    for which in order:
        strength, share = strengths[which], uniform[which]
        if strength == 0:
            continue
        if which == _HUE:
            image = _shifted_hue(image, (2 * share - 1) * strength)
            continue
        low = max(0.0, 1 - strength)
        image = Image.blend(_faded(image, which), image, low + share * (1 + strength - low))
    return image


_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


def _faded(image: Image.Image, which: int) -> Image.Image:
    """What an image is blended with: black, its mean gray, or itself in gray. (Pillow's ImageEnhance, but quicker.)"""
    if which == _BRIGHTNESS:
        return Image.new("RGB", image.size)
    gray = image.convert("L")
    if which == _SATURATION:
        return gray.convert("RGB")
    mean = int(int(np.asarray(gray).sum()) / (image.width * image.height) + 0.5)
    return Image.new("RGB", image.size, (mean, mean, mean))


def _shifted_hue(image: Image.Image, turn: float) -> Image.Image:
    """The hue turned by a share of the circle; 8-bit hues wrap around."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.uint8(int(turn * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
