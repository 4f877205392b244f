"""Is the network still telling images apart? Two numbers about the embeddings of a batch, and an alarm."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# A healthy run has a spread of .1 to 1 and a rank of at least several. Below these, images look the same to it.
LEAST_SPREAD, LEAST_RANK, LEAST_IMAGES = 0.02, 2.0, 16


@torch.no_grad()
def spread_and_rank(embedding: Tensor) -> tuple[float, float]:
    """Of (B, D): the spread of the unit vectors (0: all the same, 1: in all directions), and their effective rank.

    The spread is sqrt(sum of variances), the rank exp(entropy of the normalized singular values) after centering
    (Roy and Vetterli 2007; RankMe uses the same on a trained network).
    """
    unit = F.normalize(embedding.float(), dim=1)
    centered = unit - unit.mean(0)
    singular = torch.linalg.svdvals(centered.cpu()).double()
    shares = singular / singular.sum().clamp(min=1e-30)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
    return float(centered.square().sum(1).mean().sqrt()), float(entropy.exp())


def collapse_alarm(spread: float, rank: float, images: int) -> str | None:
    """Words for the log when the embeddings hardly differ, or differ in one direction only."""
    if images < LEAST_IMAGES or (spread >= LEAST_SPREAD and rank >= LEAST_RANK):
        return None
    return (
        f"embeddings hardly differ between images (spread {spread:.3f}, effective rank {rank:.1f} of {images} images): "
        "the network may have collapsed"
    )
