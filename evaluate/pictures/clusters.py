"""Patches in three groups by k-means (MMC, Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

from ssl_bench.evaluate.pictures.sheet import BLUE, ORANGE, PURPLE, Cell, Row, sheet, shown, swatches, tinted
from ssl_bench.evaluate.pictures.views import TOKENS, Seen, notes

CLUSTERS = 3
_COLORS = (BLUE, ORANGE, PURPLE)
_NAMES = ("largest", "second", "third")


def clusters(patches: Tensor, *, seed: int) -> npt.NDArray[np.int64]:
    """The group of every patch, 0 for the largest: (H, W, D) -> (H, W).

    Of tokens of length 1, since similarity is their cosine everywhere else. Fewer groups if fewer tokens differ.
    """
    from sklearn.cluster import KMeans

    tokens = F.normalize(patches.double(), dim=-1).flatten(0, 1).numpy()
    count = min(CLUSTERS, len(np.unique(tokens.round(9), axis=0)))
    found = KMeans(count, n_init=10, random_state=seed).fit_predict(tokens)
    by_size = np.argsort(-np.bincount(found, minlength=count), kind="stable")
    ranked: npt.NDArray[np.int64] = np.argsort(by_size)[found].reshape(patches.shape[:2])
    return ranked


def draw(seen: Sequence[Seen], *, seed: int) -> Image.Image:
    """The image, and its patches colored by group for every network."""
    image = shown(seen[0].image)
    cells, most = [Cell(image, "image")], 1
    for each in seen:
        groups = clusters(each.patches, seed=seed)
        most = max(most, int(groups.max()) + 1)
        fine = np.asarray(Image.fromarray(groups.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
        picture = image
        for number, color in enumerate(_COLORS):
            picture = tinted(picture, fine == number, color, strength=0.7)
        shares = ", ".join(f"{share:.0%}" for share in np.bincount(groups.ravel()) / groups.size)
        cells.append(Cell(picture, f"{each.name}: {shares}"))
    return sheet(
        f"Patches in {CLUSTERS} groups by k-means",
        [Row(cells)],
        legends=[swatches(list(zip(_COLORS, (f"{name} group" for name in _NAMES), strict=True))[:most])],
        note=f"Tokens of length 1, the best of 10 starts, seed {seed}. {notes(seen, of=TOKENS)}",
    )
