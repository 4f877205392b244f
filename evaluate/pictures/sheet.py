"""Sheets: rows of labeled pictures with a legend, so that a PNG explains itself.

Numbers become colors by one perceptual map (viridis, whose lightness rises all the way and which no color blindness
turns upside down) and things by one palette (Okabe and Ito's). Sheets have a white background of their own, whatever
surrounds them.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

Numbers = npt.NDArray[np.floating[Any]]
Color = tuple[int, int, int]

CELL_PX = 240  # the longer side of a picture on a sheet
_SHORTEST_PX = 40  # a very long image is drawn less long than it is, or nobody would see it
_MARGIN, _GAP, _LEAST_COLUMN = 20, 14, 120
_INK, _PALE, _PAPER = (25, 25, 25), (95, 95, 95), (255, 255, 255)
ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = PALETTE = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
_SOFTWARE = "ssl-bench show"


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture and what stands above it; no picture leaves the place empty."""

    picture: Image.Image | None
    label: str = ""


@dataclass(frozen=True, eq=False)
class Row:
    """Cells side by side, below a heading."""

    cells: Sequence[Cell]
    heading: str = ""


def cell_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height on a sheet of an image of that width and height."""
    scale = CELL_PX / max(size)
    return max(_SHORTEST_PX, round(scale * size[0])), max(_SHORTEST_PX, round(scale * size[1]))


def shown(image: Image.Image) -> Image.Image:
    """An image at its size on a sheet; small ones keep their pixels apart."""
    size = cell_size(image.size)
    how = Image.Resampling.NEAREST if max(image.size) < CELL_PX // 3 else Image.Resampling.LANCZOS
    return image.resize(size, how)


def upsampled(values: Numbers, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A map (h, w) at `size`, smoothly and without values that it does not have. (height, width)"""
    grid = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    smooth = np.asarray(grid.resize(size, Image.Resampling.BICUBIC))
    clipped: npt.NDArray[np.float32] = np.clip(smooth, values.min(), values.max())
    return clipped


def colored(values: Numbers, *, low: float, high: float) -> Image.Image:
    """Numbers as colors from `low` to `high`, point by point."""
    import matplotlib

    share = (values - low) / (high - low if high > low else 1.0)
    return Image.fromarray(matplotlib.colormaps["viridis"](np.clip(share, 0, 1), bytes=True)[..., :3])


def heat(values: Numbers, image: Image.Image, *, low: float, high: float) -> Image.Image:
    """A map over the image, of which only light and dark remain, at its size on a sheet."""
    under = shown(image).convert("L").convert("RGB")
    return Image.blend(under, colored(upsampled(values, under.size), low=low, high=high), 0.72)


def tinted(image: Image.Image, where: npt.NDArray[np.bool_], color: Color, *, strength: float = 0.6) -> Image.Image:
    """The picture with a color laid over some of its pixels, `where` (height, width)."""
    mask = Image.fromarray((255 * strength * where).astype(np.uint8))
    return Image.composite(Image.new("RGB", image.size, color), image, mask)


def marked(picture: Image.Image, places: Iterable[tuple[float, float, Color]]) -> Image.Image:
    """The picture with discs at places given as shares of width and height; white and dark rings show on anything."""
    scale = 4  # drawn larger and reduced: Pillow draws edges as steps
    width, height = picture.size
    large = picture.resize((scale * width, scale * height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(large)
    for x, y, color in places:
        center = (x * large.width, y * large.height)
        for radius, fill in ((7.5, _INK), (6.5, _PAPER), (4.5, color)):
            draw.circle(center, scale * radius, fill=fill)
    return large.resize(picture.size, Image.Resampling.LANCZOS)


def bordered(picture: Image.Image, color: Color, *, width: int = 4) -> Image.Image:
    """The picture in a frame, drawn over its edge."""
    framed = picture.copy()
    ImageDraw.Draw(framed).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=color, width=width)
    return framed


def color_bar(low: str, high: str, meaning: str) -> Image.Image:
    """The legend of `colored`."""
    strip = colored(np.tile(np.linspace(0, 1, 160), (12, 1)), low=0, high=1)
    parts: list[Image.Image] = [_text(low), strip, _text(high), _text(f"  {meaning}", color=_PALE)]
    return _beside(parts)


def swatches(entries: Iterable[tuple[Color, str]]) -> Image.Image:
    """The legend of a palette."""
    parts = []
    for color, meaning in entries:
        parts += [Image.new("RGB", (14, 14), color), _text(f"{meaning}  ")]
    return _beside(parts)


def sheet(title: str, rows: Sequence[Row], *, legends: Sequence[Image.Image] = (), note: str = "") -> Image.Image:
    """All rows below each other: pictures of one column are aligned."""
    count = max(len(row.cells) for row in rows)
    columns = [_LEAST_COLUMN] * count
    for row in rows:
        for place, cell in enumerate(row.cells):
            columns[place] = max(columns[place], cell.picture.width if cell.picture else 0)
    inner = max(sum(columns) + _GAP * (count - 1), 3 * CELL_PX, *(legend.width for legend in legends), 0)
    parts: list[Image.Image] = [_text(title, bold=True, size=17, width=inner)]
    for row in rows:
        parts += [_text(row.heading, bold=True, width=inner)] if row.heading else []
        parts.append(_laid_out(row, columns))
    parts += list(legends)
    parts += [_text(note, color=_PALE, width=inner)] if note else []
    height = sum(part.height for part in parts) + _GAP * (len(parts) - 1)
    page = Image.new("RGB", (inner + 2 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    top = _MARGIN
    for part in parts:
        page.paste(part, (_MARGIN, top))
        top += part.height + _GAP
    return page


def _laid_out(row: Row, columns: Sequence[int]) -> Image.Image:
    labels = [_text(cell.label, width=width) for cell, width in zip(row.cells, columns, strict=False)]
    above = max((label.height for cell, label in zip(row.cells, labels, strict=True) if cell.label), default=0)
    below = max((cell.picture.height for cell in row.cells if cell.picture), default=0)
    strip = Image.new("RGB", (sum(columns) + _GAP * (len(columns) - 1), above + below), _PAPER)
    left = 0
    for cell, label, width in zip(row.cells, labels, columns, strict=False):
        if cell.label:
            strip.paste(label, (left, above - label.height))
        if cell.picture:
            strip.paste(cell.picture, (left, above))
        left += width + _GAP
    return strip


def _beside(parts: Sequence[Image.Image]) -> Image.Image:
    """In one line, centered."""
    height, gap = max(part.height for part in parts), 6
    line = Image.new("RGB", (sum(part.width + gap for part in parts), height), _PAPER)
    left = 0
    for part in parts:
        line.paste(part, (left, (height - part.height) // 2))
        left += part.width + gap
    return line


def _text(
    text: str, *, bold: bool = False, size: int = 13, color: Color = _INK, width: int | None = None
) -> Image.Image:
    """Words on paper, wrapped to a width."""
    font = _font(bold, size)
    lines = [text] if width is None else _wrapped(text, font, width)
    high = round(1.4 * size)
    wide = max(1, *(round(font.getlength(line)) + 2 for line in lines))
    page = Image.new("RGB", (wide, high * len(lines) + 2), _PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(page).text((0, number * high), line, fill=color, font=font)
    return page


@functools.cache
def _font(bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings along: it knows more of the world's letters than Pillow's own."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Broken between words; a word that is wider than the line, within it."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def png(picture: Image.Image) -> bytes:
    """The file, signed: `is_ours` knows it again."""
    signature = PngImagePlugin.PngInfo()
    signature.add_text("Software", _SOFTWARE)
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=signature)
    return content.getvalue()


def is_ours(path: Path) -> bool:
    """Whether a file was written by `png`, and may be replaced."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
