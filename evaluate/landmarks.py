"""Open a landmark dataset: queries with boxes, a database, and which of its images show the same landmark.

    open_landmarks("roxford5k"), open_landmarks("rparis6k")    names: looked for under SSL_BENCH_DATA
    open_landmarks("/data/roxford5k")                          a path
    open_landmarks("toy-roxford")                              built in, made on first use (see toy_landmarks.py)

The layout is that in which revisited Oxford and Paris are distributed (Radenovic et al. 2018): `gnd_{name}.pkl` beside
`jpg/{image}.jpg`. The pickle holds the names of database and query images, and for every query a box and the positions
in the database of what is easy, hard and junk.

A pickle is a program. This one is read by an Unpickler that knows nothing but containers, text and numbers; arrays are
put together by stand-ins of ours, since NumPy's own reconstruction trusts what it is given. Any other name in the file
is refused before it is imported.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage, is_image_name
from ssl_bench.evaluate.splits import ImageFiles, Integers, Names, Split, name_of, shown
from ssl_bench.files import atomic_folder, cache_folder, data_folder, expanded
from ssl_bench.progress import follow

TOY = "toy-roxford"
LANDMARKS: dict[str, str] = {
    TOY: "the toy world: 60 queries, 600 images, where a landmark is a class of objects",
    "roxford5k": "revisited Oxford: 70 queries, 4,993 images",
    "rparis6k": "revisited Paris: 70 queries, 6,322 images",
}

_LAYOUT = "gnd_NAME.pkl (imlist, qimlist, gnd) beside jpg/IMAGE.jpg"
_WHAT = (
    f"A landmark dataset has queries with boxes, a database, and lists of what shows the same: {_LAYOUT}. "
    f"Give {', '.join(LANDMARKS)}, or the path of such a folder"
)


class Truth(NamedTuple):
    """Positions in the database of the images that show a query's landmark; of all others, none does."""

    easy: Integers
    hard: Integers
    junk: Integers  # hardly visible: to be found or not, it never counts


@dataclass(frozen=True, eq=False)
class Crops:
    """A source of query images cut to their boxes. What counts for a query is part of its identity, as the box is."""

    files: ImageFiles
    boxes: Integers  # (n, 4) pixels: left, upper, right, lower; inside the image
    truths: tuple[Truth, ...]

    def image(self, index: int) -> Image.Image:
        """Read, decode and cut."""
        left, upper, right, lower = self.boxes[index].tolist()
        return self.files.image(index).crop((left, upper, right, lower))

    def take(self, indices: Integers) -> Crops:
        """The source of these queries only."""
        return Crops(self.files.take(indices), self.boxes[indices], tuple(self.truths[int(i)] for i in indices))

    def contents(self) -> Iterable[str]:
        """Size in bytes, box, and a hash of what counts."""
        for size, box, truth in zip(self.files.contents(), self.boxes.tolist(), self.truths, strict=True):
            listed = ";".join(",".join(map(str, positions.tolist())) for positions in truth)
            yield f"{size} box {box} truth {hashlib.sha256(listed.encode()).hexdigest()}"

    def freshness(self) -> str:
        """The files behind, and the boxes."""
        return hashlib.sha256(self.files.freshness().encode() + self.boxes.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Landmarks:
    """A landmark dataset as opened."""

    name: str
    root: Path
    built_in: bool
    queries: Split  # cut to their boxes
    database: Split
    truths: tuple[Truth, ...]  # one a query
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Split]:
        """Queries and database."""
        return {"queries": self.queries, "database": self.database}

    @property
    def whole_queries(self) -> Split:
        """The query images before their boxes are cut out."""
        assert isinstance(self.queries.source, Crops)
        return replace(self.queries, source=self.queries.source.files)

    def limited(self, limit: int) -> Landmarks:
        """The first queries, and the whole database: with a part of it, the others' positions would mean nothing."""
        kept = range(min(limit, len(self.queries)))
        return replace(self, queries=self.queries.subset(kept), truths=self.truths[: len(kept)])


def open_landmarks(spec: str) -> Landmarks:
    """Open a landmark dataset by name or path."""
    try:
        if spec == TOY:
            return replace(_open_folder(_toy_folder(), TOY), built_in=True)
        if spec not in LANDMARKS:
            return _open_folder(_given(spec))
        folder = data_folder() / spec
        if not folder.is_dir():
            raise UserError(
                f"dataset {spec!r} ({LANDMARKS[spec]}) is not in {data_folder()}. Expected {folder} with "
                f"gnd_{spec}.pkl and jpg/; see the page 'Revisiting Oxford and Paris'. Set SSL_BENCH_DATA to the "
                "folder that holds it, or give its path."
            )
        return _open_folder(folder, spec)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or spec}: {error.strerror or error}.") from error


def _given(spec: str) -> Path:
    folder = expanded(spec)
    if not folder.is_dir():
        raise UserError(f"{spec!r} is no landmark dataset, and no folder. {_WHAT}.")
    return folder


def _toy_folder() -> Path:
    """Generated the first time, in one process (3 seconds)."""
    from ssl_bench.evaluate import toy_landmarks, toyworld

    versions = f"v{toyworld.WORLD_VERSION}.{toy_landmarks.LAYOUT_VERSION}"
    folder = cache_folder() / "datasets" / f"{TOY}-{versions}-seed0"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary, follow("making the toy landmarks") as report:
            toy_landmarks.write_landmarks(temporary, TOY, progress=report)
    return folder


def _open_folder(root: Path, name: str | None = None) -> Landmarks:
    """Read the ground truth (of that name), find the images, and hold one against the other."""
    lists = sorted(root.glob(f"gnd_{name or '*'}.pkl"))
    if len(lists) != 1:
        found = f"has {len(lists)}: {shown(path.name for path in lists)}" if lists else "has none"
        raise UserError(f"expected one file gnd_NAME.pkl in {root}, which {found}. {_WHAT}.")
    images, query_images, boxes, truths = _checked(_unpickled(lists[0]), lists[0])
    files = _image_files(root / "jpg", [*images, *query_images])
    database, queries = (files.take(part) for part in np.split(np.arange(len(files.paths)), [len(images)]))
    whole_pixels, clipped = _inside(boxes, queries, lists[0])
    query_ids = Names(f"{number:04d}/{image}" for number, image in enumerate(query_images))  # an image may come twice
    return Landmarks(
        name=name or name_of(Path(lists[0].stem.removeprefix("gnd_"))),
        root=root,
        built_in=False,
        queries=_split("queries", query_ids, Crops(queries, whole_pixels, truths)),
        database=_split("database", Names(images), database),
        truths=truths,
        notes=(f"{clipped} boxes went over the border of their image and were cut there",) if clipped else (),
    )


def _split(name: str, ids: Names, source: Crops | ImageFiles) -> Split:
    """Which landmark an image shows is not said: a single class stands for all."""
    return Split(name, ("landmark",), np.zeros(len(ids), dtype=np.int64), ids, source)


def _image_files(folder: Path, images: Sequence[str]) -> ImageFiles:
    """The files of these images, whose names are given without the suffix (or with it)."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}, which holds the images. Expected {_LAYOUT}.")
    there = {path.name: path for path in folder.iterdir() if is_image_name(path.name)}
    by_name = {
        path.stem: path for path in sorted(there.values(), reverse=True)
    } | there  # of several, a.jpg before a.png
    if missing := list(dict.fromkeys(image for image in images if image not in by_name)):
        raise UserError(
            f"{len(missing):,} of the listed images are not in {folder}: {shown(missing)}. Expected each as IMAGE.jpg "
            "(or .png), all in that folder; fetch or unpack them again."
        )
    paths = [by_name[image] for image in images]
    status = [path.stat() for path in paths]
    sizes = np.array([each.st_size for each in status], dtype=np.int64)
    modified_ns = np.array([each.st_mtime_ns for each in status], dtype=np.int64)
    return ImageFiles(str(folder), Names(path.name for path in paths), sizes, modified_ns)


def _inside(boxes: Sequence[tuple[float, ...]], queries: ImageFiles, file: Path) -> tuple[Integers, int]:
    """Boxes in whole pixels, cut at the border of their image, and how many had to be."""
    whole_pixels, clipped = np.zeros((len(boxes), 4), dtype=np.int64), 0
    for number, (box, image) in enumerate(zip(boxes, queries.paths, strict=True)):
        try:
            with Image.open(Path(queries.root) / image) as opened:  # its header only
                width, height = opened.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BrokenImage(str(Path(queries.root) / image), str(error)) from error
        rounded = [round(edge) for edge in box]  # as Pillow's own crop does
        left, upper, right, lower = cut = [
            min(max(edge, 0), most) for edge, most in zip(rounded, (width, height) * 2, strict=True)
        ]
        if left >= right or upper >= lower:
            raise UserError(
                f"{file}: the box of query {number}, in {image}, is {list(box)}, which is nothing of an image of "
                f"{width} x {height} px. Expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2; are these the images that "
                "the list was made for?"
            )
        whole_pixels[number], clipped = cut, clipped + (cut != rounded)
    return whole_pixels, clipped


def _checked(content: object, file: Path) -> tuple[list[str], list[str], list[tuple[float, ...]], tuple[Truth, ...]]:
    """Database images, query images, boxes and ground truth, if they fit each other."""
    if not isinstance(content, dict) or not {"imlist", "qimlist", "gnd"} <= set(content):
        keys = shown(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{file} holds {keys or 'nothing'}. Expected imlist, qimlist and gnd.")
    images, query_images = (_names(content[key], f"{file}: {key}") for key in ("imlist", "qimlist"))
    if len(set(images)) < len(images):
        raise UserError(f"{file}: imlist names an image twice. Expected every database image once.")
    entries = content["gnd"]
    if not isinstance(entries, (list, tuple)) or len(entries) != len(query_images):
        given = f"{len(entries)} entries" if isinstance(entries, (list, tuple)) else type(entries).__name__
        raise UserError(f"{file}: gnd has {given} for {len(query_images)} queries. Expected one each.")
    boxes, truths = [], []
    for number, entry in enumerate(entries):
        where = f"{file}: query {number} ({query_images[number]})"
        if not isinstance(entry, Mapping) or not {"bbx", "easy", "hard", "junk"} <= set(entry):
            keys = shown(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
            raise UserError(
                f"{where} has {keys or 'nothing'}. Expected bbx, easy, hard and junk, as the *revisited* lists have "
                "(the original ones have ok and junk)."
            )
        boxes.append(_box(entry["bbx"], where))
        truths.append(_truth(entry, len(images), where))
    return images, query_images, boxes, tuple(truths)


def _names(value: object, where: str) -> list[str]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) and name for name in value):
        raise UserError(f"{where} is not a list of names. Expected one name or more, without the suffix .jpg.")
    return list(value)


def _box(value: object, where: str) -> tuple[float, ...]:
    numbers = _numbers(value)
    if numbers.shape != (4,) or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
        raise UserError(f"{where}: bbx is {value!r}. Expected four numbers x1, y1, x2, y2.")
    return tuple(map(float, numbers))


def _truth(entry: Mapping[str, object], database: int, where: str) -> Truth:
    """Three lists of positions, each of them in the database and in one list only."""
    lists = []
    for key in Truth._fields:
        positions = _numbers(entry[key])
        if positions.shape == (0,):  # of floats, as NumPy has it
            positions = positions.astype(np.int64)
        if positions.ndim != 1 or positions.dtype.kind not in "iu":
            raise UserError(f"{where}: {key} is no list of whole numbers. Expected positions in imlist.")
        if positions.size and not 0 <= positions.min() <= positions.max() < database:
            raise UserError(
                f"{where}: {key} goes from {positions.min()} to {positions.max()}. Expected positions in imlist, 0 to "
                f"{database - 1}."
            )
        lists.append(positions.astype(np.int64))
    listed, times = np.unique(np.concatenate(lists), return_counts=True)
    if (times > 1).any():
        raise UserError(
            f"{where}: easy, hard and junk share database images or name one twice, such as number "
            f"{listed[times > 1][0]}. Expected each in one list at most."
        )
    return Truth(*lists)


# Reading the pickle --------------------------------------------------------------------------------------------------


def _unpickled(file: Path) -> object:
    """What the file holds, if that is containers, text and numbers."""
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream, encoding="latin1").load()  # latin1: Python 2 wrote arrays as text
    except UserError:
        raise
    except (*_MALFORMED, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} is not a complete pickle ({reason}). Fetch it again.") from error


_MALFORMED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, ImportError),
    *(OverflowError, MemoryError, RecursionError, struct.error),
)


class _Unpickler(pickle.Unpickler):
    """Imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name of NumPy's; an error for every other name."""
        known = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise UserError(
                f"the ground truth wants to call {module}.{name}, which is refused: expected lists, text, numbers and "
                "NumPy arrays of numbers. Nothing was executed; do not use the file unless you know who wrote it."
            )
        return known


class _Kind:
    """For numpy.dtype: a kind of number, and its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch("[iuf][1248]", code) or code == "f1":
            raise UserError(f"the ground truth has an array of {code!r}. Expected whole numbers or floats.")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def read(self, data: bytes | str) -> np.ndarray:
        """The numbers in some bytes, which Python 2 kept as text."""
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, np.dtype(self.order + self.code))


class _Array:
    """For numpy.ndarray."""

    values: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, data = state
        self.values = kind.read(data).reshape(shape, order="F" if by_columns else "C")


def _empty(*_: object) -> _Array:
    """For _reconstruct: an array that gets its content next."""
    return _Array()


def _from_buffer(data: bytes, kind: _Kind, shape: tuple[int, ...], order: str) -> _Array:
    """For _frombuffer, by which arrays come since protocol 5."""
    array = _Array()
    array.values = kind.read(data).reshape(shape, order="F" if order == "F" else "C")
    return array


def _number(kind: _Kind, data: bytes | str) -> int | float:
    """For numpy's scalars."""
    number: int | float = kind.read(data)[0].item()
    return number


def _encoded(text: str = "", _encoding: str = "latin1") -> bytes:
    """For _codecs.encode, by which Python 3 writes bytes in the protocols of Python 2, and for bytes() if empty."""
    return text.encode("latin1")


class _Call:
    """A stand-in for a function: without attributes that a file could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise UserError("the ground truth wants to change a function, which is refused.")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Call(_empty),
    ("numpy.core.multiarray", "scalar"): _Call(_number),
    ("numpy.core.numeric", "_frombuffer"): _Call(_from_buffer),
    ("_codecs", "encode"): _Call(_encoded),
    ("__builtin__", "bytes"): _Call(_encoded),
}


def _numbers(value: object) -> np.ndarray:
    """A list or an array as NumPy has it; of objects, if it is something else."""
    if isinstance(value, _Array):
        return getattr(value, "values", np.empty((), object))
    try:
        return np.asarray(value if isinstance(value, (list, tuple)) else None)
    except ValueError:  # rows of several lengths
        return np.empty((), object)
