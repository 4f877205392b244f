"""The toy world on disk, in the layouts of real datasets, so that they are read by the loaders that users use.

    write_class_folders(folder)     4,000 + 1,000 images in class folders

Files have the same bytes on every machine, as pictures do: see `png_bytes`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np

from ssl_bench.evaluate.toyworld import CLASSES, Bytes, at_least, check, scene


def png_bytes(array: Bytes, *, palette: Bytes | None = None) -> bytes:
    """(H, W, 3) color, (H, W) gray, or (H, W) indices into a palette (N, 3), as a PNG file.

    Not compressed, because no two builds of zlib promise the same bytes: a stored deflate stream has only one form.
    """
    height_px, width_px = array.shape[:2]
    rows = np.zeros((height_px, 1 + array[0].size), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = array.reshape(height_px, -1)
    raw = rows.tobytes()
    stored = b"\x78\x01"
    for start in range(0, len(raw), 0xFFFF):
        block = raw[start : start + 0xFFFF]
        is_last = start + 0xFFFF >= len(raw)
        stored += struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF) + block
    stored += struct.pack(">I", zlib.adler32(raw))
    color_type = 2 if array.ndim == 3 else 0 if palette is None else 3
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, 8, color_type, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", palette.tobytes()))
    chunks += [(b"IDAT", stored), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


_CHUNK = 50  # images a task
Task = tuple[str, range]  # split, indices


def _write_chunk(folder: Path, size_px: int, seed: int, task: Task) -> int:
    split, indices = task
    for index in indices:
        picture = scene(seed=seed, split=split, index=index, height_px=size_px, width_px=size_px)
        (folder / split / CLASSES[index % len(CLASSES)] / f"{index:05d}.png").write_bytes(png_bytes(picture.image))
    return len(indices)


def write_class_folders(
    folder: Path,
    *,
    train: int = 4000,
    val: int = 1000,
    size_px: int = 48,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    processes: int | None = None,
) -> None:
    """Write folder/{train,val}/CLASS/INDEX.png, as balanced as the counts allow; `progress` is called with done, total.

    The files do not depend on the number of processes (by default, one for each core that this one may use).
    """
    at_least(1, train=train, val=val)
    check(seed=seed, index=0, height_px=size_px, width_px=size_px, labels=(0,))
    processes = _usable_cores() if processes is None else processes
    at_least(1, processes=processes)
    tasks: list[Task] = []
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        tasks += [(split, range(start, min(start + _CHUNK, count))) for start in range(0, count, _CHUNK)]
    done = 0
    for written in _written(partial(_write_chunk, folder, size_px, seed), tasks, min(processes, len(tasks))):
        done += written
        if progress is not None:
            progress(done, train + val)


def _written(write: Callable[[Task], int], tasks: list[Task], processes: int) -> Iterator[int]:
    """How many images each task wrote."""
    done = 0
    # Spawned, not forked: the caller may run threads (torch does), and a forked child may then hang. A spawned child
    # imports the caller's script, which fails if that lacks a `__main__` guard; such callers are served here.
    if processes > 1:
        with (
            contextlib.suppress(BrokenProcessPool),
            ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            for written in pool.map(write, tasks):
                done += 1
                yield written
    yield from map(write, tasks[done:])


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
