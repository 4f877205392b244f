"""Parts of a split that a list names: images (low-shot lists), or classes (ImageNet-100).

An image list has one name a line, in any of these forms; MSN's and SimCLR's files hold the first:

    n01440764_10026.JPEG    n01440764_10026    n01440764/n01440764_10026.JPEG    train/n01440764/n01440764_10026.JPEG

The order stays the dataset's, so that two lists of the same images give the same split.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from ssl_bench.errors import UserError, unknown
from ssl_bench.evaluate.decoding import is_image_name
from ssl_bench.evaluate.splits import Split, shown
from ssl_bench.progress import say


def listed_images(split: Split, path: Path, *, of_its_classes: bool = False) -> Split:
    """The samples of `split` that the list names. Every name must be there, and name one sample only.

    With `of_its_classes`, ImageNet's lists serve a part of ImageNet too: names of synsets that the split does not have
    are left out.
    """
    lines = [line.removeprefix("./").removeprefix(f"{split.name}/") for line in _lines(path, "image names")]
    if of_its_classes:
        synsets = [_SYNSET.match(line.rpartition("/")[2]) for line in lines]
        mine = [line for line, found in zip(lines, synsets, strict=True) if found is None or found[1] in split.classes]
        lines = mine or lines
    names = Counter(lines)
    if repeated := [name for name, times in names.items() if times > 1]:
        say(f"{path} names {len(repeated):,} images more than once ({shown(repeated)}); each counts once")
    exact: dict[str, list[int]] = {name: [] for name in names}
    by_stem: dict[str, list[int]] = {_without_suffix(name): [] for name in names}
    for index, sample in enumerate(split.sample_ids):
        base = sample.rpartition("/")[2]
        for form in {sample, base}:
            if form in exact:
                exact[form].append(index)
            if (stem := _without_suffix(form)) in by_stem:
                by_stem[stem].append(index)
    # A name with a suffix means the file with that suffix if there is one; else the same image saved in another format.
    found = {name: exact[name] or by_stem[_without_suffix(name)] for name in names}
    if absent := [name for name, hits in found.items() if not hits]:
        raise UserError(
            f"{len(absent):,} of the {len(names):,} images in {path} are not in {split.name}: {shown(absent)}. "
            f"Expected names such as {split.sample_ids[0]}; check that the list is for this dataset and this split."
        )
    if several := [f"{name} ({len(hits):,} images)" for name, hits in found.items() if len(hits) > 1]:
        raise UserError(
            f"{len(several):,} names in {path} fit more than one image of {split.name}: {shown(several)}. "
            f"Expected names with the class folder, such as {split.sample_ids[0]}."
        )
    return split.subset(np.unique([hits[0] for hits in found.values()]))


_SYNSET = re.compile(r"(n\d{8})_")


def listed_classes(split: Split, path: Path) -> Split:
    """The samples of the listed classes; labels count the kept classes, in the dataset's order."""
    wanted = set(_lines(path, "class names"))
    for name in sorted(wanted - set(split.classes)):
        raise unknown(f"class of {split.name} (in {path})", name, split.classes)
    kept = [label for label, name in enumerate(split.classes) if name in wanted]
    new_label = np.full(len(split.classes), -1, dtype=np.int64)
    new_label[kept] = np.arange(len(kept))
    part = split.subset(np.flatnonzero(new_label[split.labels] >= 0))
    return replace(part, classes=tuple(split.classes[label] for label in kept), labels=new_label[part.labels])


def _lines(path: Path, what: str) -> list[str]:
    """The lines of a list that are not blank."""
    if not path.is_file():
        raise UserError(f"the list {path} does not exist. Expected a text file of {what}, one a line.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    if not any(lines):
        raise UserError(f"the list {path} is empty. Expected {what}, one a line.")
    return [line for line in lines if line]


def _without_suffix(name: str) -> str:
    """The name without its image suffix."""
    return name.rpartition(".")[0] if is_image_name(name.rpartition("/")[2]) and "." in name else name
