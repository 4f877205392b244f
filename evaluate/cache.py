"""Look after the feature cache: what is there, what can go, what is damaged."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import read_shard, shard_files
from ssl_bench.files import cache_folder, explained

# What is half-written after a day belongs to a process that was killed: no file or folder takes so long.
_LEFT_OVER_SECONDS = 86400


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
    if not unused_days >= 0:
        raise UserError(f"--unused-days {unused_days:g}: expected 0 or more.")
    removed, freed = 0, 0
    for folder in _folders():
        with _unlocked(folder) as free:
            entry = _read(folder) if free else None
            if free and (everything or entry is None or entry.unused_days > unused_days):
                freed += _remove_entry(folder)
                removed += 1
            elif free:
                freed += sum(_remove(leftover) for leftover in folder.glob(".*.part"))
    # Interrupted trainings (protocols/training.py) wait to be gone on with; a running one is never older than minutes.
    for state in (cache_folder() / "training").glob("*.pt"):
        age_days = (time.time() - _newest(state)) / 86400
        if age_days > unused_days or (everything and age_days > _LEFT_OVER_SECONDS / 86400):
            freed += _remove(state)
            removed += 1
    # The whole cache, built-in data and memo too: what is not locked is judged by its age.
    for leftover in list(cache_folder().rglob(".*.part")):
        if _newest(leftover) < time.time() - _LEFT_OVER_SECONDS:
            freed += _remove(leftover)
    return removed, freed


def verify() -> list[tuple[str, int]]:
    """Check every checksum; remove damaged shards, which the next run makes anew. Returns (key, shard) of each.

    Entries in use are left alone: a shard that is being made anew looks damaged for a moment.
    """
    damaged = []
    for folder in _folders():
        if not _damaged(folder):  # a healthy cache is checked without writing to it
            continue
        with _unlocked(folder) as free:
            for number in _damaged(folder) if free else []:
                damaged.append((folder.name, number))
                for path in shard_files(folder, number):
                    with explained(path):
                        path.unlink(missing_ok=True)
    return damaged


def _damaged(folder: Path) -> list[int]:
    numbers = [int(re.findall(r"\d+", note.stem)[0]) for note in sorted(folder.glob("shard-*.json"))]
    return [number for number in numbers if read_shard(folder, number) is None]


def _remove_entry(folder: Path) -> int:
    """Out of the way first, in one step: a process that wants the entry now begins a new one beside it."""
    with explained(folder):
        gone = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        folder.rename(gone)
    return _remove(gone)


def _remove(path: Path) -> int:
    """Remove a file or a folder; returns its bytes. Somebody else may have been quicker."""
    try:
        size = _size(path)
        with explained(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _newest(path: Path) -> float:
    """When anything in it was last written. What has gone meanwhile counts as new, and is left alone."""
    try:
        return max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return time.time()


def _folders() -> list[Path]:
    root = cache_folder() / "features"
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


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


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())


@contextlib.contextmanager
def _unlocked(folder: Path) -> Iterator[bool]:
    """Whether no process is using the folder, or has just removed it; holds its lock meanwhile."""
    try:
        with explained(folder):
            handle = (folder / "lock").open("w")
    except FileNotFoundError:
        yield False
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
