"""k-NN, bank 50,000 x 384, 10,000 queries, k=20: speed against scikit-learn's brute force, and extra memory."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
from measure import alternate, report
from sklearn.neighbors import KNeighborsClassifier

from ssl_bench.evaluate.vectors import Vectors
from ssl_bench.protocols.knn import nearest, vote

BANK, QUERIES, DIM, CLASSES, K = 50_000, 10_000, 384, 100, 20


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.RandomState(0)
    centers = rng.randn(CLASSES, DIM).astype(np.float32)
    labels = rng.randint(0, CLASSES, BANK)
    bank = centers[labels] + 1.5 * rng.randn(BANK, DIM).astype(np.float32)
    queries = centers[rng.randint(0, CLASSES, QUERIES)] + 1.5 * rng.randn(QUERIES, DIM).astype(np.float32)
    return queries, bank, labels


def ours(queries: np.ndarray, bank: np.ndarray, labels: np.ndarray) -> np.ndarray:
    similarity, index = nearest(Vectors([[queries]]), Vectors([[bank]]), K)
    return vote(similarity, labels[index], 0.07, CLASSES)


def extra_megabytes(connection) -> None:
    """In a process of its own: the peak while k-NN runs, less what the data and the libraries take."""
    queries, bank, labels = data()
    ours(queries[:100], bank[:1000], labels[:1000])  # what libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the data
    before = status_kilobytes("VmRSS")
    ours(queries, bank, labels)
    connection.send((status_kilobytes("VmHWM") - before) / 1024)


def status_kilobytes(name: str) -> int:
    """Linux only, as clear_refs is."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def main() -> None:
    queries, bank, labels = data()
    default = KNeighborsClassifier(K, metric="cosine", algorithm="brute").fit(bank, labels)
    parallel = KNeighborsClassifier(K, metric="cosine", algorithm="brute", n_jobs=-1).fit(bank, labels)
    times = alternate(
        {
            "ours": lambda: ours(queries, bank, labels),
            "default": lambda: default.predict(queries),
            "parallel": lambda: parallel.predict(queries),
        }
    )
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=extra_megabytes, args=(there,))
    process.start()
    megabytes = here.recv()
    process.join()
    same = (ours(queries, bank, labels) == default.predict(queries)).mean()
    report(
        f"k-NN: {QUERIES:,} queries, bank {BANK:,} x {DIM}, k={K}, ours {times['ours']:.2f} s",
        [
            (
                "times faster than scikit-learn's brute force, default n_jobs",
                f"{times['default'] / times['ours']:.1f}",
                "5",
            ),
            (
                "times faster than scikit-learn's brute force, n_jobs=-1",
                f"{times['parallel'] / times['ours']:.1f}",
                "2.5",
            ),
            ("extra memory, MB", f"{megabytes:.0f}", "under 500"),
            ("same class as scikit-learn's unweighted vote, percent", f"{100 * same:.1f}", ""),
        ],
    )


if __name__ == "__main__":
    main()
