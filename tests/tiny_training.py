"""A training that takes a second: few images, a network of width 32, every method's own toy row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_images
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.loop import Job, Settings
from ssl_bench.pretrain.networks import student

# What does not fit a batch of 8.
FEWER: dict[str, dict[str, Any]] = {"moca": {"new_words": 4}}
ARCHITECTURE = "vit_32x4x2_patch8_48"


def write_images(folder: Path, count: int = 20, side: int = 48) -> Path:
    rng = np.random.RandomState(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = rng.randint(0, 256, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR).save(folder / f"{number:03d}.png")
    return folder


def write_base(path: Path) -> Path:
    import torch

    torch.manual_seed(7)
    save_checkpoint(path, student(named(ARCHITECTURE)))
    return path


def job(method: str, images: Path, **changes: Any) -> Job:
    """Two steps an epoch, three epochs."""
    recipe = METHODS[method].RECIPES["toy"]
    settings = {"arch": ARCHITECTURE, "epochs": 3, "warmup_epochs": 1, "batch": 8} | FEWER.get(method, {}) | changes
    base = open_checkpoint(write_base(images.parent / "base.pt")) if method == "tec" else None
    return Job(
        name=method,
        module=METHODS[method],  # type: ignore[arg-type]
        recipe=dataclasses.replace(recipe, **settings),
        split=open_images(str(images)).train,  # type: ignore[arg-type]
        origin={"method": method},
        base=base,
    )


def settings(out: Path, **changes: Any) -> Settings:
    return dataclasses.replace(Settings(out=out, workers=0, log_steps=1), **changes)
