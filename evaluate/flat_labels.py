"""The labels of a flat validation folder, from whichever list lies beside it.

ImageNet's validation images come as 50,000 files in one folder; who does not sort them into class folders keeps a
list:

    ILSVRC2012_val_00000001.JPEG n01751748        image and synset (val.txt); more columns after these are allowed
    ILSVRC2012_val_00000001.JPEG 65               image and index, from 0, into the sorted synsets of train (val.txt)
    ILSVRC2012_val_00000001,n01751748 111 ...     the competition's LOC_val_solution.csv
    n01751748                                     one synset an image, in the images' order (..._synset_labels.txt)

The development kit's `ILSVRC2012_validation_ground_truth.txt` is refused: its numbers count the synsets in another
order (ILSVRC2012_ID, from 1), and read as indices they give a plausible, entirely wrong labeling.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import is_image_name
from ssl_bench.evaluate.splits import shown

_PATTERNS = ("val.txt", "*val*synset*", "*synset*", "*val*.txt", "*val*.csv")
_SYNSET = re.compile(r"n\d{8}")
_MAX_BYTES = 64 << 20  # no list of labels is larger; do not read a stray archive


@dataclass(frozen=True)
class FlatLabels:
    """The class of each image, in the order in which the images were given."""

    classes: list[str]
    notes: tuple[str, ...]


class _DoesNotFitError(Exception):
    """A file that looks like a list by its name and is none for these images."""


def read_flat_labels(root: Path, folder: Path, files: list[str], classes: tuple[str, ...] | None) -> FlatLabels:
    """Read the first list that fits the images; `classes` are those of train, None where there is no train."""
    reasons = []
    for path in _candidates(root, folder):
        try:
            return _read(path, files, classes)
        except _DoesNotFitError as reason:
            reasons.append(f"{path}: {reason}")
    looked_at = f" Looked at, and not used: {'; '.join(reasons)}." if reasons else ""
    raise UserError(
        f"{folder} is flat ({len(files):,} images, no class folders) and no list of its labels was found. Expected "
        f'{root / "val.txt"} with lines like "{files[0]} n01751748", or '
        f"{root / 'imagenet_2012_validation_synset_labels.txt'} with one synset an image in the order of the images; "
        f"or sort the images into {folder}/<class>/.{looked_at}"
    )


def _candidates(root: Path, folder: Path) -> list[Path]:
    """Files that may be the list, the most specific name first."""
    places = (root, folder, root / "devkit", root / "devkit" / "data")
    found = [path for pattern in _PATTERNS for place in places for path in sorted(place.glob(pattern))]
    return [path for path in dict.fromkeys(found) if path.is_file() and not is_image_name(path.name)]


def _read(path: Path, files: list[str], classes: tuple[str, ...] | None) -> FlatLabels:
    """Read one list, with or without the images' names in it."""
    if path.stat().st_size > _MAX_BYTES:
        raise _DoesNotFitError("it is too large for a list of labels")
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [re.split(r"[\s,;]+", line.strip()) for line in text.splitlines() if line.strip()]
    stems = {file.rpartition(".")[0]: position for position, file in enumerate(files)}
    if len(stems) < len(files):
        raise _DoesNotFitError("two images differ in their suffix only")
    known = {name: name for name in classes or ()}
    named = {_stem(row[0]): row[1:] for row in rows if len(row) > 1}
    if not stems.keys().isdisjoint(named):
        return _by_name(path, stems, named, known)
    if all(row[0].isdigit() for row in rows):
        raise _DoesNotFitError("numbers without image names; the development kit counts synsets in an order of its own")
    return _by_position(files, [row[0] for row in rows], known)


def _by_name(path: Path, stems: dict[str, int], named: dict[str, list[str]], known: dict[str, str]) -> FlatLabels:
    """Each image has a line that begins with its name."""
    if without := sorted(stems.keys() - named.keys()):
        raise _DoesNotFitError(f"{len(without):,} images have no line in it ({shown(without)})")
    header = next(iter(named))
    absent = sorted(name for name in named if name not in stems and name != header)
    notes = [f"{len(absent):,} images listed in {path} are not there: {shown(absent)}"] if absent else []
    return FlatLabels([_class_of(named[stem], known) for stem in stems], tuple(notes))


def _by_position(files: list[str], names: list[str], known: dict[str, str]) -> FlatLabels:
    """The i-th line is the class of the i-th image."""
    if len(names) != len(files):
        raise _DoesNotFitError(f"it has {len(names):,} lines for {len(files):,} images")
    return FlatLabels([_class_of([name], known) for name in names], ())


def _class_of(columns: list[str], known: dict[str, str]) -> str:
    """The class that a line names: a name of train's, else a synset (which train may lack), else an index from 0."""
    for column in columns:
        if column in known or _SYNSET.fullmatch(column):
            return column
    first = columns[0]
    if not first.isdigit():
        raise _DoesNotFitError(f"{first!r} is neither a class of train nor an index")
    if not known:
        raise _DoesNotFitError("it gives indices, which need the classes of train to be understood")
    if int(first) >= len(known):
        raise _DoesNotFitError(f"index {first} is out of range: expected 0 to {len(known) - 1}, in sorted order")
    return next(itertools.islice(known, int(first), None))


def _stem(name: str) -> str:
    """The image's name without folder and image suffix."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[0] if is_image_name(base) else base
