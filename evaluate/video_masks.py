"""Read the numbers in the files of a video's masks, as davis2017-evaluation does, and write them.

Of palette files the index counts, not the color; of RGB files the color, which must be one of the usual palette's.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.splits import shown
from ssl_bench.evaluate.toy_masks import voc_palette

Mask = npt.NDArray[np.uint8]  # (H, W)
VOID = 255
PALETTE = voc_palette()  # (256, 3), with which davis2017-evaluation writes its masks

# Modes of files, and as what their pixels are read: by palette or gray level, or by color. Alpha says nothing.
_FORMS = {"P": "P", "L": "L", "LA": "L", "1": "L", "RGB": "RGB", "RGBA": "RGB"}


def size_of(path: str) -> tuple[int, int]:
    """Width and height of a frame or a mask, from the file's header."""
    with _opened(path, "its header") as image:
        return image.size


def mode_of(path: str) -> str:
    """How a mask says its numbers: P, L or RGB; from the file's header."""
    with _opened(path, "its header") as image:
        return _form(image, path)


def read_mask(path: str) -> Mask:
    """The numbers in a mask's file."""
    with _opened(path, "the mask") as image:
        form = _form(image, path)
        pixels = np.array(image if image.mode == form else image.convert(form))
    return _indices(pixels, path) if form == "RGB" else pixels


def mask_png(mask: Mask) -> bytes:
    """The file of a mask, with the palette."""
    image, content = Image.fromarray(mask), io.BytesIO()
    image.putpalette(PALETTE.tobytes())
    image.save(content, format="PNG")
    return content.getvalue()


@contextlib.contextmanager
def _opened(path: str, what: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except UserError:  # it is a ValueError, too
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(path, f"{what} cannot be read ({error})") from error


def _form(image: Image.Image, path: str) -> str:
    if image.mode not in _FORMS:
        raise UserError(
            f"{path} is a mask of mode {image.mode}. Expected a palette, or 8 bits of gray, a number an object."
        )
    return _FORMS[image.mode]


def _indices(colors: npt.NDArray[np.uint8], path: str) -> Mask:
    """Of RGB, the place of each color in the palette; DAVIS' own has 191 where others have 192, and white is 255."""
    packed = colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    known = {int(color @ np.array([1 << 16, 1 << 8, 1])): index for index, color in enumerate(PALETTE.astype(np.int64))}
    known |= {_with_191(color): index for index, color in enumerate(PALETTE[:22].tolist())} | {0xFFFFFF: VOID}
    values, inverse = np.unique(packed, return_inverse=True)
    if strange := [f"#{value:06x}" for value in values.tolist() if value not in known]:
        raise UserError(
            f"{path} is an RGB image with {len(strange):,} colors that the palette of DAVIS has not: {shown(strange)}. "
            "Expected a palette file, whose numbers say which object a pixel is of; save it without smoothing."
        )
    return np.array([known[value] for value in values.tolist()], np.uint8)[inverse].reshape(colors.shape[:2])


def _with_191(color: Sequence[int]) -> int:
    red, green, blue = (191 if value == 192 else value for value in color)
    return red << 16 | green << 8 | blue
