"""100,000 records as `ssl-bench run` writes them: from files to a leaderboard, with no index or cache to help.

2,000 checkpoints under 50 ways of measuring each: 10 datasets, 4 recipes, and a setting under two seeds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from measure import python, report

from ssl_bench.leaderboards.record import Record, Score, read_record, write_record
from ssl_bench.leaderboards.store import load_results
from ssl_bench.leaderboards.table import leaderboard, render

MODELS, WAYS = 2_000, 50
MODEL, SHA256 = "the-model", "0123456789ab" + "0" * 52


def real_record(folder: Path) -> Record:
    """k-NN of digits, as the command line records it."""
    os.environ |= {"SSL_BENCH_CACHE": str(folder / "cache"), "SSL_BENCH_RESULTS": str(folder / "real")}
    run = ("-m", "ssl_bench.cli", "run", "--ckpt", "pixels:", "--dataset", "digits", "--protocol", "knn")
    python(*run)()
    return read_record(next((folder / "real").rglob("knn-*.json")))


def ways(record: Record) -> Iterator[Record]:
    """The same checkpoint, measured in 50 ways."""
    recipes = [("knn", "dino"), ("knn", "msn"), ("linear", "dino"), ("lowshot", "msn")]
    plain = [(f"dataset-{number}", *names, {}, 0) for number in range(10) for names in recipes]
    others = [(f"dataset-{number}", "knn", "dino", {"neighbors": [5]}, seed) for number in range(5) for seed in (0, 1)]
    for dataset, protocol, recipe, overrides, seed in plain + others:
        shas = {split: hashlib.sha256(f"{dataset} {split}".encode()).hexdigest() for split in ("train", "val")}
        yield msgspec.structs.replace(
            record,
            model=MODEL,
            weights_sha256=SHA256,
            dataset=dataset,
            dataset_manifest_sha256=shas,
            protocol=protocol,
            recipe=recipe,
            overrides=overrides,
            seed=seed,
            checkpoint=msgspec.structs.replace(record.checkpoint, spec=f"hf:{MODEL}", matched_percent=100.0),
            scores={name: Score(77.777, score.n, stderr=0.555) for name, score in record.scores.items()},
        )


def write_all(record: Record, folder: Path) -> int:
    """The files of all models; as text, since 100,000 calls of write_record would take longer than what is measured."""
    templates = [write_record(way, folder / "templates") for way in ways(record)]
    texts = {path.relative_to(folder / "templates").parts[2:]: path.read_text("utf-8") for path in templates}
    assert len(texts) == WAYS
    draw, size = random.Random(0), 0
    for number in range(MODELS):
        model, sha256 = f"vit-{number:04d}", hashlib.sha256(str(number).encode()).hexdigest()
        for dataset in {dataset for dataset, _ in texts}:
            (folder / "results" / model / sha256[:12] / dataset).mkdir(parents=True)
        for (dataset, name), template in texts.items():
            text = template.replace(MODEL, model).replace(SHA256, sha256)
            text = text.replace("77.777", repr(draw.uniform(20, 90))).replace("0.555", repr(draw.uniform(0.1, 1)))
            (folder / "results" / model / sha256[:12] / dataset / name).write_text(text, "utf-8")
            size += len(text)
    return size


@dataclasses.dataclass
class Clock:
    """Seconds of the wall, and of the processor: on a machine that others use too, the two differ."""

    rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    total: float = 0
    total_cpu: float = 0

    def __call__(self, what: str, action: Callable[[], object], goal: str = "") -> object:
        wall, cpu = time.perf_counter(), time.process_time()
        result = action()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.total, self.total_cpu = self.total + wall, self.total_cpu + cpu
        self.rows.append((f"{what}, seconds (processor: {cpu:.2f})", f"{wall:.2f}", goal))
        return result


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_all(real_record(folder), folder)
        clock = Clock()
        results = clock("load_results", lambda: load_results(folder / "results"))
        frame = clock("leaderboard, with the import of pandas", lambda: leaderboard(results))
        assert (len(results), results.problems, frame.shape) == (MODELS * WAYS, {}, (MODELS, 45))
        clock.rows.append((f"both (processor: {clock.total_cpu:.2f})", f"{clock.total:.2f}", "under 5"))
        clock("to_dataframe", results.to_dataframe)
        for format in ("md", "csv", "html"):
            clock(f"render, {format}", lambda: render(frame, format))  # noqa: B023 - called at once
        kilobytes = size / MODELS / WAYS / 1000
        report(f"leaderboard: {len(results):,} records of {kilobytes:.1f} kB, {len(frame):,} models", clock.rows)


if __name__ == "__main__":
    main()
