"""What every test stands on: folders of its own, no network, and tiny data and networks that are quick to make."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_bench.evaluate.architecture import Architecture, parse_name
from ssl_bench.evaluate.backbone import Backbone, build
from ssl_bench.evaluate.checkpoints import Checkpoint, open_checkpoint
from ssl_bench.evaluate.saving import save_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # networks here are tiny: a second thread would only wait for the first


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that lives as long as the test run: built-in data are drawn once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_BENCH_CACHE", str(shared_cache))
    monkeypatch.setenv("SSL_BENCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path / "no-data"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test alone."""
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@functools.cache
def tiny_architecture() -> Architecture:
    architecture = parse_name("vit_32x2x2_patch8_16")
    assert architecture is not None
    return architecture


def tiny_backbone(seed: int = 0) -> Backbone:
    """A ViT of width 32 with random weights, biases and norms included, so that nothing is at its initial zero."""
    torch.manual_seed(seed)
    backbone = build(tiny_architecture())
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone.eval()


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Checkpoint:
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    return open_checkpoint(tmp_path / "tiny.pt")


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write class folders of random 16 px images: `image_folder(train=6, val=4, classes=("a", "b"))` a class."""

    def write(train: int = 6, val: int = 4, classes: tuple[str, ...] = ("a", "b"), name: str = "data") -> Path:
        rng = np.random.RandomState(0)
        for split, count in (("train", train), ("val", val)):
            for label, class_name in enumerate(classes):
                folder = tmp_path / name / split / class_name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.randint(0, 128, (16, 16, 3)) + 100 * (label % 2)
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:04d}.png")
        return tmp_path / name

    return write
