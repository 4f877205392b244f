"""A sweep of 45 learning rates on cached features, trained side by side, against one head alone, and 45 runs."""

from __future__ import annotations

import dataclasses
import os
import tempfile

import numpy as np
from measure import alternate, report

from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.features import Features
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.splits import Dataset, ImageArray, Names, Split
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols import linear

TRAIN, VAL, EPOCHS = 5_000, 1_000, 2


def subject(dim: int, classes: int) -> Subject:
    """Vectors around class centers in the place of extracted features; no image is ever read."""
    rng = np.random.RandomState(0)
    centers = rng.randn(classes, dim).astype(np.float32)
    splits, found = {}, {}
    for name, count in (("train", TRAIN), ("val", VAL)):
        labels = np.arange(count, dtype=np.int64) % classes
        ids = Names(f"{name}{index}" for index in range(count))
        source = ImageArray(np.zeros((count, 1, 1), np.uint8))
        splits[name] = Split(name, tuple(map(str, range(classes))), labels, ids, source)
        rows = centers[labels] + 3 * rng.randn(count, dim).astype(np.float32)
        found[name] = Features(name, (rows,), (), "cache")
    data = Dataset("vectors", None, True, splits["train"], splits["val"])
    made = Subject(open_checkpoint("random:vit_96x4x3_patch8_48"), data, Effort())
    for name, features in found.items():
        for reading in linear.readings(made, linear.RECIPES["cached"])[name]:
            made._features[name, reading] = features
    return made


def ratio(dim: int, classes: int, batch: int) -> float:
    """Seconds of 45 heads over seconds of one."""
    vectors = subject(dim, classes)
    sweep = dataclasses.replace(linear.RECIPES["cached"], vector="patch_mean", epochs=EPOCHS, batch=batch)
    one = dataclasses.replace(sweep, base_lr=(0.1,))
    times = alternate({"45": lambda: linear.run(vectors, sweep), "1": lambda: linear.run(vectors, one)}, repeats=2)
    return times["45"] / times["1"]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SSL_BENCH_CACHE"] = cache
        # The toy world's size, a small dataset with a ViT-S, ImageNet's classes with a ViT-B.
        for dim, classes, batch in ((96, 10, 128), (384, 10, 256), (768, 1000, 256)):
            found = ratio(dim, classes, batch)
            rows += [
                (f"{dim} numbers, {classes} classes, batch {batch}: 45 heads / one head", f"{found:.1f}", "2"),
                ("    times faster than 45 runs", f"{45 / found:.1f}", ""),
            ]
    report(f"linear sweep on {TRAIN:,} cached vectors", rows)


if __name__ == "__main__":
    main()
