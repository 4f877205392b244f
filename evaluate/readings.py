"""What a protocol asks of a network: which view of the image, and which vector of the output.

A `Reading` names one vector an image. Everything that decides its numbers is in it, so it can be hashed, shared between
protocols and found again in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Interpolation = Literal["bicubic", "bilinear"]
Token = Literal["cls", "patch_mean"]


@dataclass(frozen=True)
class View:
    """Resize the short side, cut out the center. None leaves the image as it is."""

    resize_px: int | None
    crop_px: int | None
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if self.resize_px is not None and self.crop_px is not None and not 0 < self.crop_px <= self.resize_px:
            raise UserError(
                f"crop_px={self.crop_px} does not fit into resize_px={self.resize_px}; set both, the crop no larger."
            )

    def pixels(self, image: Image) -> np.ndarray:
        """The view as uint8 (3, H, W), by torchvision's rules for PIL images."""
        import numpy as np
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as transform

        if self.resize_px is not None:
            image = transform.resize(image, [self.resize_px], InterpolationMode(self.interpolation))
        if self.crop_px is not None:
            image = transform.center_crop(image, [self.crop_px])
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


@dataclass(frozen=True)
class Reading:
    """One vector an image: the class token or the mean of the patch tokens, after one block."""

    token: Token
    view: View
    layer: int = -1  # 0 is the first block, -1 the last
    norm: bool = True  # through the network's final norm

    def __str__(self) -> str:
        norm = "final norm" if self.norm else "no norm"
        view = f"{self.view.resize_px}/{self.view.crop_px} {self.view.interpolation}"
        return f"{self.token} of block {self.layer}, {norm}, {view}"


def why_not(reading: Reading, architecture: Architecture) -> str | None:
    """Why this network cannot give this reading, in words; None if it can."""
    depth = architecture.depth
    last = reading.layer in (-1, depth - 1)
    if not -depth <= reading.layer < depth:
        return f"block {reading.layer} does not exist: the network has {depth} blocks"
    if reading.token == "cls" and not architecture.has_cls:
        return "the network has no class token"
    if reading.token == "cls" and not architecture.cls and not last:
        return "the class token enters this network after the last block, so only layer -1 has one"
    if reading.norm and not architecture.final_norm:
        return "the file has no final norm (norm = identity)"
    return None
