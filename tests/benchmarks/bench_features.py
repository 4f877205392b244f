"""Feature extraction (ViT-S/16, 224 px) against the bare forward pass; overlap of decoding and computing; bf16."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import alternate, report, seconds
from PIL import Image

from ssl_bench import running
from ssl_bench.evaluate import features
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.features import DTYPES, Effort, extract
from ssl_bench.evaluate.readings import Reading, View

IMAGES, BATCH = 256, 64
READINGS = [Reading("cls", View(224, 224)), Reading("patch_mean", View(224, 224))]
JPEG_READINGS = [replace(reading, view=View(256, 224)) for reading in READINGS]


class InMemory:
    """Decoded images of the right size: what is left is the extraction itself."""

    def __init__(self) -> None:
        rng = np.random.RandomState(0)
        self.pictures = [Image.fromarray(rng.randint(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(IMAGES)]
        self.name, self.manifest_sha256, self.freshness = "train", "memory", "memory"
        self.sample_ids = [str(index) for index in range(IMAGES)]

    def __len__(self) -> int:
        return IMAGES

    def image(self, index: int) -> Image.Image:
        return self.pictures[index]


def cold(checkpoint, split, readings, effort) -> None:
    shutil.rmtree(features.cache_folder() / "features", ignore_errors=True)
    extract(checkpoint, split, readings, effort)


def bare(checkpoint, dtype: str):
    """The model alone: no images, no tokens kept, no features written."""
    images = torch.randn(BATCH, 3, 224, 224)
    model, precision = checkpoint.backbone.vit, DTYPES[dtype]

    def forward() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=precision, enabled=dtype != "fp32"):
            for _ in range(IMAGES // BATCH):
                model.forward_features(images)

    return forward


def write_jpegs(folder: Path) -> None:
    rng = np.random.RandomState(0)
    for split, number in itertools.product(("train", "val"), range(IMAGES)):
        noise = rng.randint(0, 256, (48, 64, 3), dtype=np.uint8)
        path = folder / split / str(number % 2) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SSL_BENCH_CACHE"] = temporary
        os.environ["SSL_BENCH_RESULTS"] = f"{temporary}/results"
        checkpoint, memory = open_checkpoint("random:vit_small_patch16_224"), InMemory()
        rows = []
        speed = {}
        for dtype in ("fp32", "bf16"):
            effort = Effort(dtype=dtype, batch_size=BATCH, workers=0)
            times = alternate(
                {"bare": bare(checkpoint, dtype), "extract": lambda e=effort: cold(checkpoint, memory, READINGS, e)}
            )
            speed[dtype] = IMAGES / times["extract"]
            rows.append(
                (
                    f"extraction / bare forward, throughput, {dtype} ({speed[dtype]:.1f} images/s)",
                    f"{times['bare'] / times['extract']:.2f}",
                    "at least 0.9",
                )
            )
        rows.append(
            (
                "bf16 / fp32, throughput",
                f"{speed['bf16'] / speed['fp32']:.2f}",
                "at least 2, where the CPU has AMX or AVX512-bf16",
            )
        )

        write_jpegs(Path(temporary) / "jpeg")
        split = open_dataset(f"{temporary}/jpeg").train
        apart = {workers: Effort(dtype="bf16", batch_size=BATCH, workers=workers) for workers in (0, os.cpu_count())}
        times = alternate(
            {
                "serial": lambda: cold(checkpoint, split, JPEG_READINGS, apart[0]),
                "overlapped": lambda: cold(checkpoint, split, JPEG_READINGS, apart[os.cpu_count()]),
            }
        )
        decode = seconds(lambda: [JPEG_READINGS[0].view.pixels(split.image(index)) for index in range(IMAGES)])
        rows.append(
            (
                f"from JPEG files: overlapped / one after the other, time (decoding alone {decode:.1f} s)",
                f"{times['overlapped'] / times['serial']:.2f}",
                "below 1",
            )
        )

        top1 = {
            dtype: running.run("random:vit_96x4x3_patch8_48", "knn", running.Options(dtype=dtype))[0].main_score.value
            for dtype in ("fp32", "bf16")
        }
        rows.append(
            (
                f"top-1 on toy, bf16 ({top1['bf16']:.1f}) less fp32 ({top1['fp32']:.1f}), points",
                f"{top1['bf16'] - top1['fp32']:+.2f}",
                "",
            )
        )
        report(f"features: ViT-S/16, 224 px, {IMAGES} images, {torch.get_num_threads()} threads", rows)


if __name__ == "__main__":
    main()
