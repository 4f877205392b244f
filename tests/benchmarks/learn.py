"""Do the methods learn? `make learn`: every method, three seeds, on the toy world; the tables of README.md.

    python tests/benchmarks/learn.py [--only MOCA,MMC] [--seeds 3] [--jobs 2] [--out runs/learn] [--ablations]

Each run is one `ssl-bench pretrain METHOD --data toy` (one to three minutes on two cores), scored on held-out images by
k-NN (k=20, temperature .07) and by a linear probe (scikit-learn's logistic regression on standardized features of the
training images), both on the class token and on the average patch token. TEC's base is the MAE of the same seed. What
is done already is kept, so the command can be given again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_bench.demo import ARCHITECTURE
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.readings import Reading, Token, View
from ssl_bench.evaluate.subject import Subject
from ssl_bench.files import atomic_file
from ssl_bench.progress import say
from ssl_bench.protocols import knn

COLUMNS = ("knn_cls", "knn_patch_mean", "linear_cls", "linear_patch_mean")


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method's toy recipe, perhaps changed."""

    name: str
    method: str
    settings: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None  # another entry's name


# TEC stands after its base.
METHODS = (
    Entry("MAE", "mae"),
    Entry("SdAE", "sdae"),
    Entry("TEC on MAE", "tec", base="MAE"),
    Entry("MMC", "mmc"),
    Entry("ExtreMA", "extrema"),
    Entry("MOCA", "moca"),
)


_EARLY = {"mask_ratio": "0.75", "epochs": "8"}

# The directions of the papers' ablations that small data can show. ExtreMA: at equal, early epochs.
ABLATIONS = (
    Entry("MOCA", "moca"),
    Entry("MOCA without L_IMG", "moca", {"image_weight": "0"}),
    Entry("MMC", "mmc"),
    Entry("MMC without L_CLS", "mmc", {"cls_weight": "0"}),
    *(Entry(f"ExtreMA 75 % x {masks}", "extrema", _EARLY | {"num_masks": str(masks)}) for masks in (1, 2, 4)),
)


def main() -> None:
    """Train what is missing, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learn"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows of the table, separated by commas")
    parser.add_argument("--ablations", action="store_true", help="the ablations instead of the methods")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the processors")
    arguments = parser.parse_args()
    only = arguments.only.split(",") if arguments.only else []
    entries = [entry for entry in (ABLATIONS if arguments.ablations else METHODS) if not only or entry.name in only]
    jobs = [(entry, seed) for entry in entries for seed in range(arguments.seeds)]
    # The same columns for what every method must beat.
    for seed in range(arguments.seeds):
        score("pixels:", arguments.out / "pixels", 0)
        score(f"random:{ARCHITECTURE}", arguments.out / f"random-seed{seed}", seed)
    done: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for entry, seed in jobs:
            base = None if entry.base is None else _folder(arguments.out, entry.base, seed)
            wait = done.get(str(base))
            folder = _folder(arguments.out, entry.name, seed)
            done[str(folder)] = pool.submit(pretrain, entry, folder, seed, base, wait, arguments.jobs)
    rows: dict[str, list[dict[str, float]]] = {}
    if not arguments.ablations:
        rows["raw pixels"] = [score("pixels:", arguments.out / "pixels", 0)]
        random = [(f"random:{ARCHITECTURE}", arguments.out / f"random-seed{seed}") for seed in range(arguments.seeds)]
        rows["never trained"] = [score(spec, folder, seed) for seed, (spec, folder) in enumerate(random)]
    for entry, seed in jobs:
        folder = _folder(arguments.out, entry.name, seed)
        done[str(folder)].result()
        seconds = json.loads((folder / "seconds.json").read_text())
        rows.setdefault(entry.name, []).append({**score(str(folder), folder, seed), "seconds": seconds})
    print_table(rows)


def pretrain(entry: Entry, folder: Path, seed: int, base: Path | None, wait: Future[None] | None, jobs: int) -> None:
    """One `ssl-bench pretrain`, unless it is done; goes on with one that was interrupted."""
    if wait is not None:
        wait.result()
    if (folder / "seconds.json").exists():
        return
    command = [sys.executable, "-m", "ssl_bench.cli", "pretrain", entry.method, "--data", "toy", "--out", str(folder)]
    command += ["--seed", str(seed), *(f"--set={name}={value}" for name, value in entry.settings.items())]
    command += ["--base", str(base)] if base else []
    command += ["--resume"] if (folder / "training.pt").exists() else []
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    start = time.perf_counter()
    say(f"{entry.name}, seed {seed}")
    ran = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stderr[-2000:]}")
    with atomic_file(folder / "seconds.json") as temporary:
        temporary.write_text(json.dumps(time.perf_counter() - start))


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{_slug(name)}-seed{seed}"


def score(spec: str, folder: Path, seed: int) -> dict[str, float]:
    """k-NN and linear probe on the held-out toy images, for both tokens."""
    opened = open_checkpoint(spec, seed=seed)
    kept = folder / "scores.json"
    if kept.exists() and (scores := json.loads(kept.read_text())).pop("weights") == opened.weights_sha256:
        return dict(scores)
    subject = Subject(opened, open_dataset("toy"), Effort())
    own = opened.architecture.image_px or None
    tokens: list[Token] = ["cls", "patch_mean"] if opened.architecture.has_cls else ["patch_mean"]
    scores = {}
    for token in tokens:
        reading = Reading(token, View(own, own))
        train_x, val_x = (subject.features(split, reading).array() for split in ("train", "val"))
        train_y, val_y = (subject.split(split).labels for split in ("train", "val"))
        bank, queries = knn.Vectors([[train_x]]), knn.Vectors([[val_x]])
        similarity, index = knn.nearest(queries, bank, 20)
        scores[f"knn_{token}"] = percent(knn.vote(similarity, train_y[index], 0.07, 10) == val_y)
        if opened.format != "pixels":
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
            scores[f"linear_{token}"] = percent(probe.fit(train_x, train_y).predict(val_x) == val_y)
    if opened.format == "pixels":
        scores.pop("knn_patch_mean")  # the mean color
    with atomic_file(kept) as temporary:
        temporary.write_text(json.dumps({"weights": opened.weights_sha256, **scores}))
    return scores


def percent(correct: np.ndarray) -> float:
    """Of images."""
    return 100 * float(correct.mean())


def print_table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Mean over seeds, with its standard error (ddof 1)."""
    lines = ["| | k-NN, class token | k-NN, average patch | linear, class token | linear, average patch | s |"]
    lines.append("|---|---|---|---|---|---|")
    for name, runs in rows.items():
        cells = [_cell([run[column] for run in runs if column in run]) for column in COLUMNS]
        times = [run["seconds"] for run in runs if "seconds" in run]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {statistics.mean(times):.0f} |"
            if times
            else f"| {name} | {' | '.join(cells)} | |"
        )
    say("\n".join(["", *lines, ""]))


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-").replace("%", "")


if __name__ == "__main__":
    main()
