"""What a masked image looks like to a network: hidden patches in gray."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_count(patches: int, mask_ratio: float) -> int:
    """int(N (1 - r)), MAE's count of visible patches, but at least one and not all."""
    return min(max(int(patches * (1 - mask_ratio) + 1e-9), 1), max(patches - 1, 1))


def without(images: Tensor, visible: Tensor, patch_px: int, *, gray: float | Tensor = 0.5) -> Tensor:
    """Images (n, 3, height, width) of which only the patches with indices `visible` (n, k) remain."""
    rows, columns = images.shape[-2] // patch_px, images.shape[-1] // patch_px
    kept = torch.zeros(len(images), rows * columns, dtype=torch.bool).scatter(1, visible.cpu(), True)
    kept = kept.reshape(-1, 1, rows, columns)
    where = kept.repeat_interleave(patch_px, -2).repeat_interleave(patch_px, -1)
    return torch.where(where, images, gray)
