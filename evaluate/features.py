"""Features: one forward pass for every protocol that can share it, kept under a hash of what decides the numbers.

A cache entry is a folder `features/{key}` of shards of 8,192 images. Each shard is a plain .npy (n, D) float32 with a
small JSON beside it that holds its checksum; the JSON is written last, so a shard either counts or does not exist.
Interrupted extraction goes on at the first missing shard. A shard whose checksum does not fit is made anew. A lock per
entry lets a second process wait and then use what the first one made; `cache gc` leaves locked entries alone. Once the
arrays are mapped into memory, no file of the entry is needed any more.

The key hashes the weights (never a file's name), the architecture, the reading, the data (names, labels, sizes and
modification times of its files), the dtype of the forward pass and EXTRACTOR_VERSION.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.hardware import choose_attention
from ssl_bench.evaluate.loading import Effort, load, refused
from ssl_bench.evaluate.readings import Reading, View
from ssl_bench.files import atomic_file, cache_folder, explained
from ssl_bench.progress import bar, say

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Backbone, Pixels
    from ssl_bench.evaluate.datasets import Split

# Bump when the same key would give other numbers: preprocessing, pooling, anything below.
EXTRACTOR_VERSION = 1
SHARD_ROWS = 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Features:
    """One vector an image, (n, D), memory-mapped. Rows of broken images (--skip-broken) are left out.

    A shard of broken images alone is (n, 0): nobody knows D there, and nobody is given its rows.
    """

    key: str
    shards: tuple[FloatArray, ...]
    broken: tuple[int, ...]  # images without a row, by their index in the split
    source: Literal["cache", "extracted"]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards) - len(self.broken)

    @property
    def dim(self) -> int:
        """The length of a vector."""
        return max(int(shard.shape[1]) for shard in self.shards)

    def blocks(self) -> Iterator[FloatArray]:
        """The rows in order, a shard at a time, without reading all of them into memory."""
        start = 0
        for shard in self.shards:
            gone = [index - start for index in self.broken if start <= index < start + len(shard)]
            if len(gone) < len(shard):
                yield np.delete(shard, gone, axis=0) if gone else shard
            start += len(shard)

    def array(self) -> FloatArray:
        """All rows: the memory map itself where there is one shard, else a copy."""
        blocks = list(self.blocks())
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def extract(
    checkpoint: Checkpoint, split: Split, readings: Sequence[Reading], effort: Effort
) -> dict[Reading, Features]:
    """The features of every reading, from the cache where they are there, else by as few passes as there are views."""
    entries = {reading: Entry(checkpoint, split, reading, effort) for reading in readings}
    by_view: dict[View, list[Entry]] = {}
    for entry in entries.values():
        by_view.setdefault(entry.reading.view, []).append(entry)
    found: dict[str, Features] = {}
    for group in by_view.values():
        found |= _cached(group, effort) or _extracted(checkpoint, split, group, effort)
    return {reading: found[entry.key] for reading, entry in entries.items()}


def _cached(group: Sequence[Entry], effort: Effort) -> dict[str, Features]:
    """The features of all entries by key, if nothing is missing; else an empty dictionary."""
    with _locked(group, shared=True):
        if any(entry.missing() for entry in group):
            return {}
        return {entry.key: entry.features("cache", effort.skip_broken) for entry in group}


def _extracted(checkpoint: Checkpoint, split: Split, group: Sequence[Entry], effort: Effort) -> dict[str, Features]:
    """The same, after a pass over what is still missing once nobody else is at it."""
    with _locked(group, shared=False):
        written = _extract_missing(checkpoint, split, group, effort)
        return {
            entry.key: entry.features("extracted" if entry.key in written else "cache", effort.skip_broken)
            for entry in group
        }


@contextlib.contextmanager
def _locked(group: Sequence[Entry], *, shared: bool) -> Iterator[None]:
    with contextlib.ExitStack() as locks:
        # Two names of one layer are one entry, locked once; and one order for all, so nobody waits in a circle.
        for _, entry in sorted({entry.key: entry for entry in group}.items()):
            locks.enter_context(entry.lock(shared=shared))
        yield


class Entry:
    """One reading of one split by one network: a folder of the cache."""

    def __init__(self, checkpoint: Checkpoint, split: Split, reading: Reading, effort: Effort) -> None:
        depth = checkpoint.architecture.depth
        self.reading, self.split = reading, split
        identity = {
            "extractor": EXTRACTOR_VERSION,
            "weights": checkpoint.weights_sha256,
            "architecture": dataclasses.asdict(checkpoint.architecture),
            "reading": dataclasses.asdict(dataclasses.replace(reading, layer=reading.layer % depth)),
            "data": split.manifest_sha256,
            "data_freshness": split.freshness,
            "dtype": effort.dtype,
        }
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = cache_folder() / "features" / self.key
        self.about = {
            "model": checkpoint.name,
            "checkpoint": checkpoint.spec,
            "split": split.name,
            "images": len(split),
            "shown": str(reading),
            "device": effort.device,  # of whoever began; like torch's version not in the key, but good to know
            "torch": str(torch.__version__),
            **identity,
        }
        self._verified: dict[int, tuple[FloatArray, list[int]]] = {}

    @property
    def shard_count(self) -> int:
        """How many shards the split needs."""
        return -(-len(self.split) // SHARD_ROWS)

    def missing(self) -> list[int]:
        """Shards that are not there, or that are damaged."""
        return [number for number in range(self.shard_count) if self._shard(number) is None]

    def _shard(self, number: int) -> tuple[FloatArray, list[int]] | None:
        if number not in self._verified:
            rows = min(SHARD_ROWS, len(self.split) - number * SHARD_ROWS)
            shard = read_shard(self.folder, number)
            if shard is None or len(shard[0]) != rows:
                return None
            self._verified[number] = shard
        return self._verified[number]

    def write(self, number: int, rows: FloatArray, broken: Sequence[int]) -> None:
        """Commit one shard: the array first, then the JSON that makes it count."""
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "entry.json").exists():
            with atomic_file(self.folder / "entry.json") as temporary:
                temporary.write_text(json.dumps(self.about, indent=1))
        array, note = shard_files(self.folder, number)
        content = io.BytesIO()  # np.save straight to a file hides why the system refused to write
        np.save(content, rows, allow_pickle=False)
        with atomic_file(array) as temporary:
            temporary.write_bytes(content.getbuffer())
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        with atomic_file(note) as temporary:
            temporary.write_text(json.dumps({"sha256": digest, "rows": len(rows), "broken": list(broken)}))
        self._verified.pop(number, None)

    def features(self, source: Literal["cache", "extracted"], skip_broken: bool) -> Features:
        """All shards. Broken images are an error unless the user chose to skip them."""
        found = [shard for number in range(self.shard_count) if (shard := self._shard(number)) is not None]
        assert len(found) == self.shard_count
        broken = [number * SHARD_ROWS + row for number, (_, rows) in enumerate(found) for row in rows]
        if broken and not skip_broken:
            raise refused(self._what_is_broken(broken[0]))
        if broken and len(broken) == len(self.split):
            self._forget()
            raise UserError(
                f"not one of {len(broken)} images of {self.split.name} could be read; see `ssl-bench data check`."
            )
        with contextlib.suppress(OSError):  # a cache that one may only read serves as well
            os.utime(self.folder / "entry.json")  # for `cache gc`: last use
        return Features(self.key, tuple(rows for rows, _ in found), tuple(broken), source)

    def _what_is_broken(self, index: int) -> str:
        from ssl_bench.evaluate.datasets import BrokenImage

        try:
            self.split.image(index)
        except BrokenImage as error:
            return str(error)
        return (
            f"{self.split.sample_ids[index]} could not be read when the features were made, and now it can. Remove "
            f"{self.folder} to make them anew."
        )

    def _forget(self) -> None:
        """The next run tries all images again: perhaps their drive was away, which does not change the key."""
        for number in range(self.shard_count):
            with contextlib.suppress(OSError):
                shard_files(self.folder, number)[1].unlink()

    @contextlib.contextmanager
    def lock(self, *, shared: bool) -> Iterator[None]:
        """Only one process at a time extracts an entry; the others wait, and then find it done and read it together."""
        handle = self._lock_file(shared)
        if handle is None:
            yield
            return
        with handle:
            try:
                yield
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough while a forked worker has it open too

    def _lock_file(self, shared: bool) -> IO[str] | None:
        """The lock file, locked. None for a reader who can open none: no entry yet, or not his to lock."""
        path = self.folder / "lock"
        while True:
            handle = None
            if shared:
                with contextlib.suppress(OSError):
                    handle = path.open()
            else:
                with explained(self.folder), contextlib.suppress(FileNotFoundError):  # if `cache gc` is just as quick
                    self.folder.mkdir(parents=True, exist_ok=True)
                    handle = path.open("w")
            if handle is not None:
                self._wait_for(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
                if _is_still(handle, path):
                    return handle
                handle.close()  # `cache gc` removed the entry while we waited
            elif shared:
                return None

    def _wait_for(self, handle: IO[str], kind: int) -> None:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that works on {self.about['model']} on {self.split.name}")
            fcntl.flock(handle, kind)


def _is_still(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except OSError:
        return False


def shard_files(folder: Path, number: int) -> tuple[Path, Path]:
    """The array of a shard, and the JSON that makes it count."""
    return folder / f"shard-{number:05d}.npy", folder / f"shard-{number:05d}.json"


def read_shard(folder: Path, number: int) -> tuple[FloatArray, list[int]] | None:
    """A shard whose checksum fits, memory-mapped, and its rows of broken images; None if it is missing or damaged."""
    array, note = shard_files(folder, number)
    try:
        expected = json.loads(note.read_text())
        with array.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return None
        return np.load(array, mmap_mode="c", allow_pickle=False), list(expected["broken"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _extract_missing(checkpoint: Checkpoint, split: Split, entries: Sequence[Entry], effort: Effort) -> set[str]:
    """One pass over the images of all shards that any of the entries lacks. Returns the keys that were written."""
    lacking = {entry.key: set(entry.missing()) for entry in entries}
    numbers = sorted(set().union(*lacking.values()))
    if not numbers:
        return set()
    for entry in entries:
        for number in sorted(lacking[entry.key]):
            array, note = shard_files(entry.folder, number)
            if note.exists():
                say(f"{array} is damaged (its checksum does not fit); it is made anew")
    forward = Forward(checkpoint.backbone, [entry.reading for entry in entries], effort)
    batch = effort.batch_size or forward.batch_size
    shards = [range(n * SHARD_ROWS, min((n + 1) * SHARD_ROWS, len(split))) for n in numbers]
    plan = [list(shard[at : at + batch]) for shard in shards for at in range(0, len(shard), batch)]
    gathered, safe, total = _Shard(len(entries)), 0, sum(len(shard) for shard in shards)
    try:
        with bar(f"features of {checkpoint.name} on {split.name}", total) as advance:
            for indices, (pixels, broken) in zip(plan, load(split, entries[0].reading.view, plan, effort), strict=True):
                gathered.add(indices, [] if pixels is None else forward(pixels), broken)
                advance(len(indices))
                if indices[-1] + 1 in (len(split), SHARD_ROWS * (indices[-1] // SHARD_ROWS + 1)):
                    number = indices[-1] // SHARD_ROWS
                    for entry, rows in zip(entries, gathered.finish(), strict=True):
                        if number in lacking[entry.key]:
                            _check_finite(rows, gathered.broken, entry, number)
                            entry.write(number, rows, gathered.broken)
                    safe += len(gathered.broken) + gathered.good
                    gathered = _Shard(len(entries))
    except KeyboardInterrupt:
        say(f"{safe} of {total} images are safe in the cache; the same command goes on from there")
        raise
    return {key for key, missing in lacking.items() if missing}


class Forward:
    """Pixels (B, 3, H, W) uint8 -> one float32 array (B, D) a reading, by one pass through the network."""

    def __init__(self, backbone: Backbone | Pixels, readings: Sequence[Reading], effort: Effort) -> None:
        self.readings, self.effort = readings, effort
        self.backbone = backbone.to(effort.device)
        architecture = backbone.architecture
        depth = architecture.depth
        self.layers = sorted({reading.layer % depth for reading in readings})
        self.where = [self.layers.index(reading.layer % depth) for reading in readings]
        crop_px = readings[0].view.crop_px or architecture.image_px
        tokens = max(crop_px // architecture.patch_px, 1) ** 2
        # On a CPU activations should stay in its cache, and for short sequences the explicit attention of timm is
        # faster than the fused kernel: together 1.2x in fp32 and 1.3x in bf16 for ViT-S/16 at 224 px.
        self.batch_size = max(4, 4096 // tokens) if effort.device == "cpu" else 256
        choose_attention(self.backbone.modules(), device=effort.device, tokens=tokens)
        self.mean = torch.tensor(architecture.mean, device=effort.device).view(3, 1, 1)
        self.std = torch.tensor(architecture.std, device=effort.device).view(3, 1, 1)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> list[FloatArray]:
        """The readings, in their order."""
        images = pixels.to(self.mean.device, non_blocking=True).float().div_(255).sub_(self.mean).div_(self.std)
        return [vector.cpu().numpy() for vector in self.vectors(images)]

    @torch.no_grad()
    def vectors(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The readings of normalized images on the device, float32 (B, D) each."""
        device, dtype = images.device, DTYPES[self.effort.dtype]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            raw = self.backbone(images, layers=self.layers, norm=False).tokens
            normed = {
                n: self.backbone.normalized(raw[n])
                for n in {w for w, r in zip(self.where, self.readings, strict=True) if r.norm}
            }
        results = []
        for where, reading in zip(self.where, self.readings, strict=True):
            vector = getattr((normed if reading.norm else raw)[where], reading.token)
            results.append(vector.float())
        return results


class _Shard:
    """The rows of one shard while they come in, batch by batch, for every reading."""

    def __init__(self, readings: int) -> None:
        self.parts: list[list[FloatArray | int]] = [[] for _ in range(readings)]  # an int stands for that many broken
        self.broken: list[int] = []  # by their row in the shard
        self.good = 0

    def add(self, indices: Sequence[int], blocks: Sequence[FloatArray], broken: Sequence[int]) -> None:
        """One batch: the rows of its good images, and the places of the broken ones in it."""
        self.broken += [indices[place] % SHARD_ROWS for place in broken]
        self.good += len(indices) - len(broken)
        for reading, parts in enumerate(self.parts):
            if not blocks:
                parts.append(len(indices))
                continue
            rows = np.full((len(indices), blocks[reading].shape[1]), np.nan, np.float32)
            rows[np.setdiff1d(np.arange(len(indices)), broken)] = blocks[reading]
            parts.append(rows)

    def finish(self) -> list[FloatArray]:
        """The whole shard for every reading; broken images have rows of NaN (of no numbers if all are broken)."""
        dims = [next((part.shape[1] for part in parts if not isinstance(part, int)), 0) for parts in self.parts]
        filled = zip(self.parts, dims, strict=True)
        return [
            np.concatenate([np.full((p, dim), np.nan, np.float32) if isinstance(p, int) else p for p in parts])
            for parts, dim in filled
        ]


def _check_finite(rows: FloatArray, broken: Sequence[int], entry: Entry, number: int) -> None:
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    finite[list(broken)] = True
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        raise UserError(
            f"{int((~finite).sum())} feature vectors of {entry.about['model']} are not finite, the first for "
            f"{entry.split.sample_ids[number * SHARD_ROWS + first]}. Are there NaN in the weights? With fp16 try "
            "bf16 or fp32. None of these were cached."
        )
