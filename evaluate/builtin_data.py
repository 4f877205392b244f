"""The two datasets that need no download: scikit-learn's digits and the toy world. Both are made once and kept in
the cache.

Digits: 1,797 gray images of 8 x 8 pixels, 10 classes. Values 0..16 become 0..255 by (v * 255 + 8) // 16, the
rounded v * 255 / 16 in integers. The split is ours, because scikit-learn publishes none for this version of
the data: 1,438 train and 359 val, stratified. A class gives val its share of 359, rounded down; the classes with the
largest remainders (the lower digit first) give one more until there are 359. Which images: those with the smallest
sha256 of "digits split, seed 0: INDEX". No random number generator is involved, so that no new version of one can
move a sample from one side to the other.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssl_bench.errors import UserError
from ssl_bench.evaluate.layouts import open_split_folders
from ssl_bench.evaluate.splits import Dataset, ImageArray, Integers, Names, Split
from ssl_bench.files import atomic_folder, cache_folder
from ssl_bench.progress import follow

_DIGITS_VAL = 359


def open_digits() -> Dataset:
    """The digits, from the cache; scikit-learn is imported the first time only."""
    folder = cache_folder() / "datasets" / "digits-v1"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            _write_digits(temporary / "digits.npz")
    try:
        with np.load(folder / "digits.npz", allow_pickle=False) as stored:
            pixels, labels = stored["pixels"], stored["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the built-in digits in {folder} are damaged ({error}); remove that folder and try again."
        ) from error
    in_val = digits_in_val(labels)
    splits = {}
    for name, chosen in (("train", np.flatnonzero(~in_val)), ("val", np.flatnonzero(in_val))):
        ids = Names(f"digit-{index:04d}" for index in chosen)
        splits[name] = Split(name, tuple("0123456789"), labels[chosen], ids, ImageArray(pixels[chosen]))
    return Dataset("digits", folder, True, splits["train"], splits["val"], layout="built in (scikit-learn's digits)")


def _write_digits(path: Path) -> None:
    """Take the images out of scikit-learn."""
    from sklearn.datasets import load_digits  # a second; the warm path does without it

    digits = load_digits()
    values = digits.images.astype(np.int64)  # (1797, 8, 8)
    np.savez(path, pixels=((values * 255 + 8) // 16).astype(np.uint8), labels=digits.target.astype(np.int64))


def digits_in_val(labels: Integers) -> npt.NDArray[np.bool_]:
    """Which samples are of the val split: the rule is at the top of this file."""
    counts = np.bincount(labels)
    share, remainder = np.divmod(counts * _DIGITS_VAL, len(labels))
    share[np.argsort(-remainder, kind="stable")[: _DIGITS_VAL - share.sum()]] += 1
    rank = [hashlib.sha256(f"digits split, seed 0: {index}".encode()).digest() for index in range(len(labels))]
    in_val = np.zeros(len(labels), dtype=bool)
    for digit, size in enumerate(share.tolist()):
        members = np.flatnonzero(labels == digit).tolist()
        in_val[sorted(members, key=rank.__getitem__)[:size]] = True
    return in_val


def open_toy() -> Dataset:
    """The toy world's class folders, generated the first time (4,000 train, 1,000 val, 48 x 48 pixels, seed 0)."""
    from ssl_bench.evaluate import toyworld  # the renderer is not needed once the images are there

    folder = cache_folder() / "datasets" / f"toy-v{toyworld.WORLD_VERSION}-seed0"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            _write_toy(temporary)
    opened = open_split_folders(folder, "toy")
    return Dataset("toy", folder, True, opened.train, opened.val, layout="built in (the toy world, class folders)")


def _write_toy(folder: Path) -> None:
    """Generate, in one process (7 seconds): others would have to be spawned, and a spawned process first runs the
    user's script again, which fails where the script has no __main__ guard."""
    from ssl_bench.evaluate import toy_files

    with follow("making the toy world") as report:
        toy_files.write_class_folders(folder, train=4000, val=1000, size_px=48, seed=0, processes=1, progress=report)
