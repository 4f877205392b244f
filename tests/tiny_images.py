"""Tiny pictures for the tests of datasets: each number has its own, and it can be read back exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ssl_bench.evaluate.datasets import Split


def picture(number: int, size_px: int = 4) -> np.ndarray:
    """A picture that no other number has."""
    return np.random.default_rng(number).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)


def save(path: Path, number: int) -> None:
    """Write a picture so that it can be read back exactly, whatever the suffix says (Pillow looks at the content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number)).save(path, format="PNG")


def holds(split: Split | None, expected: dict[str, tuple[str, int]]) -> bool:
    """Whether a split holds exactly these samples, in this order: {sample: (class, picture)}."""
    assert split is not None
    assert list(split.sample_ids) == list(expected)
    assert [split.classes[label] for label in split.labels] == [name for name, _ in expected.values()]
    for index, (_, number) in enumerate(expected.values()):
        image = split.image(index)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), picture(number))
    return True


def make_synsets(root: Path, classes: tuple[str, ...] = ("n1", "n2", "n3"), images: int = 3) -> Path:
    """Class folders with names as ImageNet has them."""
    for number, name in enumerate(classes):
        for i in range(images):
            save(root / f"train/{name}/{name}_{i}.JPEG", 10 * number + i)
            save(root / f"val/{name}/{name}_v{i}.JPEG", 100 + 10 * number + i)
    return root
