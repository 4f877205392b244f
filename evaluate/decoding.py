"""Decode one image file of any mode into 8-bit RGB, or say which file is broken and why.

The pixels are those that the reference protocols see, `PIL.Image.open(file).convert("RGB")` as torchvision's
ImageFolder does, with these rules spelled out:

- The EXIF orientation is NOT applied. ImageFolder does not apply it, so no published number has seen it applied.
- Alpha is dropped, not blended; an animation gives its first frame.
- 16-bit gray is divided by 257 (65535 -> 255) with rounding. Here we depart from `convert("RGB")`, which clips
  every value above 255 to white and so turns a microscope's image into a blank page.
- A truncated file is an error. Pillow can be told to fill the missing rows with gray; that would change a score in
  silence.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ssl_bench.errors import UserError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"})

_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, OverflowError, NotImplementedError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class BrokenImage(UserError):  # noqa: N818  (the name says it)
    """Names the file and the decoder's reason."""

    def __init__(self, file: str, reason: str) -> None:
        """Keep both as `args`, with which the error is pickled on its way out of a worker."""
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        """What `ssl-bench` prints."""
        return (
            f"cannot decode {self.file}: {self.reason}. Expected a complete image; fetch the file again or remove it "
            "(ssl-bench data check lists every broken image)."
        )


def is_image_name(name: str) -> bool:
    """Whether a file of this name is read as an image. Hidden files are not: `._x.jpg` is macOS's, not a picture."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def decode_image(source: str | Path | bytes, *, shown_as: str) -> Image.Image:
    """The image of a file, or of a file's bytes, as RGB; `shown_as` names it in the error."""
    try:
        # Pillow warns above 89 million pixels and refuses above 179 million: the refusal becomes a BrokenImage.
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return to_rgb(image)
    except _DECODER_ERRORS as error:
        raise BrokenImage(shown_as, _reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an opened image, by the rules above."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in {"PNG", "PPM"}):  # Pillow opens 16-bit PGM as "I"
        return Image.fromarray(_sixteen_to_eight_bits(np.asarray(image))).convert("RGB")
    if mode in {"I", "F"}:
        raise ValueError(f"it has 32-bit pixels (mode {mode}), whose white is not defined; save it with 8 or 16 bits")
    if mode == "P" and "transparency" in image.info:
        # The same colors as by the direct way, on which Pillow warns once for every such file.
        return image.convert("RGBA").convert("RGB")
    if mode == "RGB":
        image.load()
        return image.copy()  # a plain Image: a JpegImageFile would keep the file's name and not pickle to workers
    return image.convert("RGB")


def _sixteen_to_eight_bits(gray: np.ndarray) -> np.ndarray:
    """round(v / 257) in integers: 0 -> 0, 65535 -> 255. (H, W)."""
    return ((gray.astype(np.int64) + 128) // 257).astype(np.uint8)


def _reason(error: BaseException) -> str:
    """The decoder's own words, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in any known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
