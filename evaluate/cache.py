"""Look after the feature cache: what is there, what can go, what is damaged."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssl_bench.evaluate.features import read_shard, shard_files
from ssl_bench.files import cache_folder, explained


@dataclass(frozen=True)
class CacheEntry:
    """One reading of one split by one network, as `ssl-bench cache ls` shows it."""

    key: str
    model: str
    split: str
    reading: str
    dtype: str
    images: int
    bytes: int
    unused_days: float
    complete: bool


def entries() -> list[CacheEntry]:
    """Every entry, the longest unused first."""
    return sorted((entry for folder in _folders() if (entry := _read(folder))), key=lambda entry: -entry.unused_days)


def collect_garbage(*, unused_days: float = 30.0, everything: bool = False) -> tuple[int, int]:
    """Remove entries that nobody used for so long, and what was half-written; returns their number and bytes."""
    removed, freed = 0, 0
    for folder in _folders():
        entry = _read(folder)
        with _unlocked(folder) as free:
            if free and (everything or entry is None or entry.unused_days > unused_days):
                freed += _size(folder)
                removed += 1
                with explained(folder):
                    shutil.rmtree(folder)
            elif free:
                for leftover in folder.glob(".*.part"):
                    freed += leftover.stat().st_size
                    leftover.unlink(missing_ok=True)
    return removed, freed


def verify() -> list[tuple[str, int]]:
    """Check every checksum; remove damaged shards, which the next run makes anew. Returns (key, shard) of each."""
    damaged = []
    for folder in _folders():
        for note in sorted(folder.glob("shard-*.json")):
            number = int(re.findall(r"\d+", note.stem)[0])
            if read_shard(folder, number) is None:
                damaged.append((folder.name, number))
                for path in shard_files(folder, number):
                    path.unlink(missing_ok=True)
    return damaged


def _folders() -> list[Path]:
    root = cache_folder() / "features"
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _read(folder: Path) -> CacheEntry | None:
    try:
        about = json.loads((folder / "entry.json").read_text())
        rows = sum(json.loads(note.read_text())["rows"] for note in folder.glob("shard-*.json"))
        return CacheEntry(
            key=folder.name,
            model=about["model"],
            split=about["split"],
            reading=about["shown"],
            dtype=about["dtype"],
            images=rows,
            bytes=_size(folder),
            unused_days=(time.time() - (folder / "entry.json").stat().st_mtime) / 86400,
            complete=rows == about["images"],
        )
    except (OSError, ValueError, KeyError):
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@contextlib.contextmanager
def _unlocked(folder: Path) -> Iterator[bool]:
    """Whether no process is extracting into the folder; holds its lock meanwhile."""
    with (folder / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
