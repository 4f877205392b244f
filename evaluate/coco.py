"""Open images with boxes and masks in COCO's layout.

    open_coco("coco")            COCO 2017 under SSL_BENCH_DATA/coco
    open_coco("/data/mine")      annotations/instances_{train,val}*.json, and the image folders named after the *
    open_coco("toy-coco")        the toy world in the same layout, made on first use

Coordinates are packed into arrays while the parser still runs; outlines become lists again when asked for. Boxes are
cut at the image's border; a box without extent (COCO has two) is left out with its object, and listed in `notes` and
`without_extent`.
The manifest of a split holds a hash of every image's annotations: with a changed box it is another dataset.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.outlines import Outlines, is_outline, packed_outlines, unfit
from ssl_bench.evaluate.splits import ImageFiles, Integers, Names, Split, name_of, shown
from ssl_bench.files import atomic_folder, cache_folder, data_folder, expanded
from ssl_bench.progress import follow

Floats = npt.NDArray[np.float64]

_EXPECTED = (
    "Expected toy-coco (built in), coco (COCO 2017 under SSL_BENCH_DATA/coco), or a folder of COCO's layout: "
    "annotations/instances_train*.json or instances_val*.json (val alone is enough), and beside annotations/ the "
    "image folders, train2017/ for instances_train2017.json"
)


@dataclass(frozen=True, eq=False)
class Annotations:
    """The objects of one split as columns, ordered by image and then by their id."""

    size_px: Integers  # (images, 2): width, height
    image: Integers  # (n,) index into the split
    id: Integers  # (n,) as in the file
    category: Integers  # (n,) index into the dataset's categories
    box: Floats  # (n, 4): left, top, width, height in pixels, within the image
    area: Floats  # (n,) of the mask
    crowd: npt.NDArray[np.bool_]  # (n,) a region of many objects, not one
    outlines: Outlines

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, image: int) -> range:
        """The objects of one image."""
        first, end = np.searchsorted(self.image, [image, image + 1])
        return range(int(first), int(end))

    def take(self, images: Integers) -> Annotations:
        """Those of the given images, which are then counted from 0."""
        per_image = [self.rows(int(image)) for image in images]
        rows = np.array([row for rows in per_image for row in rows], np.int64)
        columns = {name: getattr(self, name)[rows] for name in ("id", "category", "box", "area", "crowd")}
        counts = [len(rows) for rows in per_image]
        outlines = Outlines.packed(self.outlines[int(row)] for row in rows)
        image = np.repeat(np.arange(len(images)), counts)
        return Annotations(size_px=self.size_px[images], image=image, outlines=outlines, **columns)

    def hashes(self, categories: Sequence[str]) -> Names:
        """For every image, a hash of what is annotated in it."""
        return Names(self._hash(image, categories) for image in range(len(self.size_px)))

    def _hash(self, image: int, categories: Sequence[str]) -> str:
        rows = self.rows(image)
        chosen, polygons = slice(rows.start, rows.stop), self.outlines.bounds[rows.start : rows.stop + 1]
        ends = self.outlines.ends[polygons[0] : polygons[-1]]
        start = self.outlines.ends[polygons[0] - 1] if polygons[0] else np.int64(0)
        named = [categories[label] for label in self.category[chosen].tolist()]
        runs = [self.outlines.runs.get(row) for row in rows]
        digest = hashlib.sha256(json.dumps([self.size_px[image].tolist(), named, runs]).encode())
        for part in (self.box[chosen], self.area[chosen], self.crowd[chosen], polygons - polygons[0], ends - start):
            digest.update(part.tobytes())
        digest.update(self.outlines.numbers[start : ends[-1] if len(ends) else start].tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class AnnotatedFiles:
    """Image files whose size must be that of their annotations, and whose identity includes these."""

    files: ImageFiles
    size_px: Integers  # (n, 2)
    hashes: Names

    def image(self, index: int) -> Image.Image:
        """Read, decode and measure one file."""
        image, expected = self.files.image(index), tuple(self.size_px[index].tolist())
        if image.size != expected:
            reason = f"it has {image.width} x {image.height} px, and its annotations say {expected[0]} x {expected[1]}"
            raise BrokenImage(os.path.join(self.files.root, self.files.paths[index]), reason)
        return image

    def take(self, indices: Integers) -> AnnotatedFiles:
        """The source of these samples only."""
        hashes = Names(self.hashes[int(i)] for i in indices)
        return AnnotatedFiles(self.files.take(indices), self.size_px[indices], hashes)

    def contents(self) -> Iterable[str]:
        """Size in bytes, and the hash of the annotations."""
        return (f"{size} {said}" for size, said in zip(self.files.contents(), self.hashes, strict=True))

    def freshness(self) -> str:
        """That of the files."""
        return self.files.freshness()


@dataclass(frozen=True, eq=False)
class Coco:
    """A dataset of images with boxes, as opened. Its splits' only class stands for "unlabeled"."""

    name: str
    root: Path
    built_in: bool
    splits: Mapping[str, Split]  # train, val, or one of them; images in the order of their files' names
    annotations: Mapping[str, Annotations]  # by split
    categories: tuple[str, ...]  # in the order of their ids
    notes: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)  # by split: the annotations as they are given
    without_extent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by split: ids of what was left out

    def limited(self, limit: int) -> Coco:
        """The first images of every split, and what is annotated in them."""
        kept = {name: np.arange(min(limit, len(split))) for name, split in self.splits.items()}
        splits = {name: split.subset(kept[name]) for name, split in self.splits.items()}
        return replace(self, splits=splits, annotations={n: each.take(kept[n]) for n, each in self.annotations.items()})


COCO: dict[str, str] = {
    "toy-coco": "the toy world: 400 + 200 images of one to four objects, with boxes, outlines and crowds",
    "coco": "COCO 2017: 118,287 + 5,000 images, instances of 80 categories",
}


def open_coco(spec: str) -> Coco:
    """Open a dataset of images with boxes by name or path."""
    if spec == "toy-coco":
        return _open_toy()
    root = data_folder() / "coco" if spec == "coco" else expanded(spec)
    if not (root / "annotations").is_dir():
        found = f"{root} has no folder annotations" if root.is_dir() else f"there is no folder {root}"
        raise UserError(f"{spec} is no dataset of images with boxes: {found}. {_EXPECTED}.")
    try:
        return _open_root(root, spec if spec == "coco" else name_of(root), only_2017=spec == "coco")
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror or error}.") from error


def _open_toy() -> Coco:
    from ssl_bench.evaluate import toy_coco, toyworld

    versions = f"v{toyworld.WORLD_VERSION}.{toy_coco.TOY_COCO_VERSION}"
    folder = cache_folder() / "datasets" / f"toy-coco-{versions}-seed0"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary, follow("making the toy world in COCO's layout") as report:
            toy_coco.write_coco(temporary, progress=report)
    return replace(_open_root(folder, "toy-coco", only_2017=True), built_in=True)


def _open_root(root: Path, name: str, *, only_2017: bool) -> Coco:
    notes: list[str] = []
    splits, annotations, categories, files, without_extent = {}, {}, {}, {}, {}
    for split in ("train", "val"):
        if path := _annotation_file(root, split, only_2017=only_2017):
            if split == "train" and not any(place.is_dir() for place in _image_places(root, path)):
                notes.append(f"{path.name} is there and its images are not, so there is no train split")
                continue
            reader = _Reader(path)
            splits[split], annotations[split] = reader.read(split, _image_folder(root, path), notes)
            categories[split], files[split], without_extent[split] = reader.categories, path, reader.without_extent
    if not splits:
        year = "2017" if only_2017 else "*"
        raise UserError(
            f"{root / 'annotations'} has no instances_train{year}.json or instances_val{year}.json. {_EXPECTED}."
        )
    first, *others = categories.values()
    if any(other != first for other in others):
        raise UserError(
            f"train and val in {root / 'annotations'} have different categories ({len(first):,} and "
            f"{len(others[0]):,}, or other names or ids). Expected the same in both files; take them from one source."
        )
    return Coco(name, root, False, splits, annotations, tuple(first.values()), tuple(notes), files, without_extent)


def _annotation_file(root: Path, split: str, *, only_2017: bool) -> Path | None:
    """The one file of that split; among several, that of 2017."""
    official = root / "annotations" / f"instances_{split}2017.json"
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if official in found or only_2017 or not found:
        return official if official in found else None
    if len(found) > 1:
        raise UserError(
            f"{root / 'annotations'} has {len(found)} files of {split}: {shown(path.name for path in found)}. Expected "
            f"one, or {official.name} among them; move the others away."
        )
    return found[0]


def _image_places(root: Path, annotations: Path) -> tuple[Path, Path]:
    name = annotations.stem.removeprefix("instances_")
    return root / name, root / "images" / name


def _image_folder(root: Path, annotations: Path) -> Path:
    places = _image_places(root, annotations)
    if there := [place for place in places if place.is_dir()]:
        return there[0]
    raise UserError(f"the images of {annotations} are not there: expected them in {places[0]} or {places[1]}.")


class _Reader:
    """One file of instances, checked entry by entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open(encoding="utf-8") as file:
                document = json.load(file, object_hook=packed_outlines)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}). Unpack or fetch it again.") from error
        lists = ("images", "annotations", "categories")
        lacking = [key for key in lists if not isinstance(document, dict) or not isinstance(document.get(key), list)]
        if lacking:
            raise UserError(
                f"{path} holds no instances: it lacks the lists {', '.join(lacking)}. Expected a file like COCO's "
                "instances_val2017.json (test images have no annotations)."
            )
        self.images, self.objects, categories = (document[key] for key in lists)
        ids = self._whole(categories, "id", "category")
        self._require_unique(ids.tolist(), "categories with the id")
        names = self._column(categories, "name", "category", lambda name: isinstance(name, str) and bool(name))
        self._require_unique(names, "categories named")
        self.categories = dict(sorted(zip(ids.tolist(), names, strict=True)))
        self.without_extent: tuple[int, ...] = ()

    def read(self, split: str, folder: Path, notes: list[str]) -> tuple[Split, Annotations]:
        """The images and what is annotated in them."""
        names = self._column(self.images, "file_name", "image", _is_relative)
        if not names:
            raise UserError(f"{self.path} lists no images. Unpack or fetch it again.")
        self._require_unique(names, "images named")
        order = sorted(range(len(names)), key=names.__getitem__)
        self.images = [self.images[i] for i in order]
        image_ids = self._whole(self.images, "id", "image")
        self._require_unique(image_ids.tolist(), "images with the id")
        sides = [self._whole(self.images, key, "image", least=1) for key in ("width", "height")]
        files = self._files(folder, Names(names[i] for i in order))
        annotations = self._annotations(image_ids, np.stack(sides, axis=1), notes)
        source = AnnotatedFiles(files, annotations.size_px, annotations.hashes(tuple(self.categories.values())))
        labels = np.zeros(len(names), np.int64)
        return Split(split, ("unlabeled",), labels, files.paths, source), annotations

    def _files(self, folder: Path, names: Names) -> ImageFiles:
        sizes, modified_ns = np.zeros((2, len(names)), np.int64)
        missing = []
        for index, name in enumerate(names):
            try:
                status = os.stat(folder / name)
                sizes[index], modified_ns[index] = status.st_size, status.st_mtime_ns
            except FileNotFoundError:
                missing.append(name)
        if missing:
            raise UserError(
                f"{len(missing):,} of {len(names):,} images of {self.path} are not in {folder}: {shown(missing)}. "
                "Complete the folder."
            )
        return ImageFiles(str(folder), names, sizes, modified_ns)

    def _annotations(self, image_ids: Integers, size_px: Integers, notes: list[str]) -> Annotations:
        ids = self._whole(self.objects, "id", "annotation")
        self._require_unique(ids.tolist(), "annotations with the id")
        image = self._positions("image_id", image_ids)
        category = self._positions("category_id", np.array(list(self.categories), np.int64))
        box = np.array(self._column(self.objects, "bbox", "annotation", _is_box), np.float64).reshape(-1, 4)
        area = np.array(self._column(self.objects, "area", "annotation", _is_number), np.float64)
        self._column(self.objects, "segmentation", "annotation", is_outline)
        self._column(self.objects, "iscrowd", "annotation", lambda value: value in (0, 1, None))
        crowd = np.array([bool(each.get("iscrowd")) for each in self.objects], np.bool_)
        cut, empty = _cut(box, size_px[image])
        self.without_extent = tuple(ids[empty].tolist())
        if self.without_extent:
            named = shown(f"annotation {each}" for each in self.without_extent)
            notes.append(
                f"{len(self.without_extent):,} boxes of {self.path.name} have no extent within their image; their "
                f"objects are left out: {named}"
            )
        order = np.lexsort((ids, image))
        order = order[~empty[order]]
        outlines = Outlines.packed(self.objects[row].get("segmentation") or [] for row in order.tolist())
        for row, wrong in unfit(outlines, size_px[image[order]]):
            raise UserError(
                f"{self.path}: annotation {ids[order[row]]} has {wrong}. Programs that read it would crash or hang; "
                "mend or remove it."
            )
        return Annotations(
            size_px=size_px,
            image=image[order],
            id=ids[order],
            category=category[order],
            box=cut[order],
            area=area[order],
            crowd=crowd[order],
            outlines=outlines,
        )

    def _positions(self, key: str, known: Integers) -> Integers:
        """Of every annotation's image or category, its position among the known ids."""
        given = self._whole(self.objects, key, "annotation")
        order = np.argsort(known)
        place = np.minimum(np.searchsorted(known[order], given), max(len(known) - 1, 0))
        absent = known[order][place] != given if len(known) else np.ones(len(given), np.bool_)
        if absent.any():
            values = shown(str(value) for value in np.unique(given[absent]))
            raise UserError(
                f"{int(absent.sum()):,} annotations of {self.path} have an unknown {key}: {values}. Expected the ids "
                f"of its list of {'images' if key == 'image_id' else 'categories'}; fetch or make the file again."
            )
        return order[place]

    def _column(self, rows: list[Any], key: str, what: str, fits: Callable[[Any], bool]) -> list[Any]:
        """One value of every entry, which must fit."""
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or not fits(row.get(key)):
                which = f"{what} {row['id']}" if isinstance(row, dict) and "id" in row else f"{what} number {number}"
                value = "no object" if not isinstance(row, dict) else f"{key} {json.dumps(row.get(key), default=list)}"
                raise UserError(
                    f"{self.path}: {which} has {value[:200]}. Expected {_FITTING[key]}, as in COCO's instances files."
                )
        return [row.get(key) for row in rows]

    def _whole(self, rows: list[Any], key: str, what: str, *, least: int = -(2**63)) -> Integers:
        def fits(value: Any) -> bool:
            return type(value) is int and least <= value < 2**63

        return np.array(self._column(rows, key, what, fits), np.int64)

    def _require_unique(self, values: Sequence[Any], what: str) -> None:
        if twice := [str(value) for value, count in Counter(values).items() if count > 1]:
            raise UserError(f"{self.path} has several {what} {shown(twice)}. Expected each once; mend the file.")


_FITTING = {
    **dict.fromkeys(("id", "image_id", "category_id"), "a whole number"),
    **dict.fromkeys(("width", "height"), "the image's side in pixels"),
    "name": "a name",
    "file_name": "the path of a file below the image folder",
    "bbox": "[left, top, width, height] in pixels",
    "area": "the area in pixels",
    "iscrowd": "0 or 1",
    "segmentation": 'polygons [[x, y, x, y, ...], ...] or {"counts": ..., "size": [height, width]}',
}


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not os.path.isabs(value) and ".." not in value.split("/")


def _cut(box: Floats, size_px: Integers) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Boxes cut at the border of their images, and which of them have no extent then."""
    first = np.clip(box[:, :2], 0, size_px)
    last = np.clip(box[:, :2] + np.maximum(box[:, 2:], 0), 0, size_px)
    # Where nothing is cut the width stays as given: (left + width) - left would differ in the last digit.
    inside = (first == box[:, :2]) & (last == box[:, :2] + box[:, 2:])
    extent = np.where(inside, box[:, 2:], last - first)
    return np.concatenate([first, extent], axis=1), np.asarray(extent.min(axis=1) <= 0)
