"""Open videos whose objects are annotated, in DAVIS' layout.

    open_videos("davis-2017")        ImageSets/2017/{train,val,test-dev}.txt under SSL_BENCH_DATA/davis-2017 or DAVIS
    open_videos("davis-2016")        one object a video: DAVIS 2016 itself, or DAVIS 2017 with its ImageSets/2016
    open_videos("/data/mine")        JPEGImages/[480p/]VIDEO/*.jpg, Annotations/[480p/]VIDEO/*.png; lists if there are
    open_videos("toy-davis")         the toy world in the same layout, made on first use

Masks are read as davis2017-evaluation reads them (evaluate/video_masks.py). The objects are 1 to the highest number in
the first mask: what has a higher number later on is background, and so is 255, void. A number below that the first mask
lacks counts 100 in every frame without it; where more than half of them are lacking, the masks are refused. A first
mask of nothing but 0 and 255 is one of DAVIS 2016, with one object. Of DAVIS 2017 with the lists of 2016 all objects
are taken as one, which is not DAVIS 2016 where 2017 annotated more of them. The first frame needs a mask; the others
have one each, or none at all (test-dev). Frames are in the order of their numbers: 2 comes before 10.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage, is_image_name
from ssl_bench.evaluate.splits import ImageFiles, Names, Split, name_of, shown
from ssl_bench.evaluate.video_masks import VOID, Mask, mode_of, read_mask, size_of
from ssl_bench.files import atomic_folder, cache_folder, data_folder, expanded
from ssl_bench.progress import follow

VIDEOS: dict[str, str] = {
    "toy-davis": "the toy world: 2 + 10 videos of 24 frames with one to three moving objects",
    "davis-2017": "DAVIS 2017: 60 + 30 videos, several objects each",
    "davis-2016": "DAVIS 2016: 30 + 20 videos, one object each",
}
_PLACES = {
    "davis-2017": ("davis-2017", "davis-2017/DAVIS", "DAVIS", "davis"),
    "davis-2016": ("davis-2016", "davis-2016/DAVIS", "davis-2017", "davis-2017/DAVIS", "DAVIS", "davis"),
}
_LISTS = {"davis-2017": ("2017",), "davis-2016": ("2016", "480p")}  # below ImageSets
_SPLITS = ("train", "val", "test-dev", "test-challenge")
_RESOLUTIONS = ("480p", "Full-Resolution", "1080p")
_EXPECTED = (
    f"Expected one of {', '.join(VIDEOS)}, or a folder with JPEGImages/480p/VIDEO/00000.jpg, "
    "Annotations/480p/VIDEO/00000.png and, if not all videos are meant, ImageSets/2017/val.txt"
)


@dataclass(frozen=True)
class Video:
    """One video: which samples of its split it has, and the files of its masks."""

    name: str
    frames: range  # of the split
    stems: tuple[str, ...]  # of the frames' files: "00000", ...
    masks: tuple[str, ...]  # one for every frame, or that of the first alone
    merged: bool  # all objects are taken as one

    @property
    def is_annotated(self) -> bool:
        """Whether there is something to compare with."""
        return len(self.masks) == len(self.frames)


@dataclass(eq=False)
class Objects:
    """The masks of one video: 0 is background, 1 to `count` are its objects. Read when asked for."""

    video: Video
    first: Mask
    numbers: tuple[int, ...]  # in the file of the first mask, but 0 and void; none in one of 0 and 255 alone
    has_void: bool  # the first mask shows 255 and numbers, so 255 is void
    late: set[int] = field(default_factory=set)  # higher numbers seen so far, which are background
    only_void: set[int] = field(default_factory=set)  # frames seen so far with no object, but 255 first seen here

    @property
    def is_binary(self) -> bool:
        """Every pixel that is not 0 is the object."""
        return not self.numbers

    @property
    def count(self) -> int:
        """How many objects there are."""
        return 1 if self.is_binary or self.video.merged else max(self.numbers)

    @property
    def absent(self) -> tuple[int, ...]:
        """Numbers up to `count` that the first mask does not have."""
        return tuple(sorted(set(range(1, self.count)) - set(self.numbers)))

    def mask(self, frame: int) -> Mask:
        """Of one frame, counted from 0."""
        path = self.video.masks[frame]
        values = read_mask(path)
        if values.shape != self.first.shape:
            raise _of_another_size(path, values.shape[::-1], self.video.masks[0], self.first.shape[::-1])
        if self.is_binary:
            return np.asarray(values > 0, np.uint8)
        known = np.where(values == VOID, 0, values).astype(np.uint8)
        if not self.has_void and not known.any() and values.any():
            self.only_void.add(frame)
        if self.video.merged:
            return np.asarray(known > 0, np.uint8)
        self.late.update(np.unique(known[known > self.count]).tolist())
        return np.asarray(np.where(known > self.count, 0, known), np.uint8)


_MEND = {  # by the mode of the mask
    "L": "These look like the gray values of a mask that had colors: save it with its palette.",
    "P": "If they are classes, give the objects of every video numbers from 1 on, in all of its masks.",
    "RGB": "Give the objects the first colors of the palette, in all masks of the video.",
}


def read_objects(video: Video) -> Objects:
    """What the first mask says: how many objects there are, and where."""
    path = video.masks[0]
    values = read_mask(path)
    if not values.any():
        raise UserError(f"{path} shows no object, so there is nothing to follow. Expected at least one; leave it out.")
    numbers = tuple(np.setdiff1d(values, [0, VOID]).tolist())
    objects = Objects(video, values, numbers, bool(numbers) and bool((values == VOID).any()))
    if 2 * len(objects.absent) > objects.count:
        raise UserError(
            f"{path} numbers its objects {shown(map(str, numbers))}. Expected 1, 2, 3, ...: each number that is left "
            f"out would count as an object that is found wherever it is absent. {_MEND[mode_of(path)]}"
        )
    objects.first = objects.mask(0)
    if len(video.masks) > 1:
        objects.mask(1)  # shows whether the others are written in the same way
    if objects.only_void:
        raise UserError(
            f"{path} shows numbers ({shown(map(str, numbers))}), and {video.masks[1]} nothing but 255, which is void. "
            "Expected the same numbers in all masks; of one object save all with 0 and 1, or all with 0 and 255."
        )
    return objects


@dataclass(frozen=True, eq=False)
class FrameFiles:
    """Frames whose size must be that of their masks, and whose identity includes these."""

    files: ImageFiles
    masks: Names  # for every frame its own, or the first one of the video

    def image(self, index: int) -> Image.Image:
        """Read, decode and measure one frame."""
        image = self.files.image(index)
        if image.size != (expected := size_of(self.masks[index])):
            reason = f"it has {_sides(image.size)}, and its mask {self.masks[index]} has {_sides(expected)}"
            raise BrokenImage(self.path(index), reason)
        return image

    def path(self, index: int) -> str:
        """The file of a frame."""
        return os.path.join(self.files.root, self.files.paths[index])

    def take(self, indices: npt.NDArray[np.int64]) -> FrameFiles:
        """The source of these samples only."""
        return FrameFiles(self.files.take(indices), Names(self.masks[int(i)] for i in indices))

    def contents(self) -> Iterable[str]:
        """Size in bytes, and the hash of the mask."""
        hashes: dict[str, str] = {}
        for size, path in zip(self.files.contents(), self.masks, strict=True):
            if path not in hashes:
                hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
            yield f"{size} {hashes[path]}"

    def freshness(self) -> str:
        """That of the files."""
        return self.files.freshness()


@dataclass(frozen=True, eq=False)
class Videos:
    """A dataset of videos, as opened. A sample of its splits is a frame; their only class stands for "unlabeled"."""

    name: str
    root: Path
    built_in: bool
    splits: Mapping[str, Split]
    videos: Mapping[str, tuple[Video, ...]]  # by split
    layout: str = ""  # in words
    notes: tuple[str, ...] = ()

    def limited(self, limit: int) -> Videos:
        """The first `limit` videos of every split, whole: half a video is another benchmark."""
        splits, videos = {}, {}
        for name, split in self.splits.items():
            videos[name] = self.videos[name][:limit]
            splits[name] = split.subset(np.arange(videos[name][-1].frames.stop))
        return replace(self, splits=splits, videos=videos)

    def verify(self, split: str) -> None:
        """Read the headers of all files: frames and masks of a video must have one size, and masks hold numbers."""
        source = self.splits[split].source
        assert isinstance(source, FrameFiles)
        for video in self.videos[split]:
            expected = size_of(video.masks[0])
            for path in video.masks:
                mode_of(path)  # raises
            for path in (*video.masks[1:], *(source.path(index) for index in video.frames)):
                if (size := size_of(path)) != expected:
                    raise _of_another_size(path, size, video.masks[0], expected)


def open_videos(spec: str) -> Videos:
    """Open a dataset of annotated videos by name or path; a name wins, `./name` is a path."""
    try:
        if spec == "toy-davis":
            return _open_toy()
        if spec in VIDEOS:
            return _open_name(spec)
        root = expanded(spec)
        if not looks_like_videos(root):
            found = f"{root} has no such folders" if root.is_dir() else f"there is no folder {root}"
            inside = next((child for child in sorted(root.glob("*")) if looks_like_videos(child)), None)
            hint = f" It looks as if {inside} were meant: give that." if inside else ""
            raise UserError(f"{spec} is no dataset of annotated videos: {found}. {_EXPECTED}.{hint}")
        lists = next((year for year in ("2017", "2016", "480p") if _has_lists(root, year)), None)
        return _open_root(root, name_of(root), lists)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or spec}: {error.strerror or error}.") from error


def looks_like_videos(root: Path) -> bool:
    """Whether frames and masks lie in folders, which they do not in PASCAL VOC."""
    folders = (root / "JPEGImages", root / "Annotations")
    return all(folder.is_dir() and _folders(folder) for folder in folders)


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but hidden ones: `.cache` is no video."""
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _has_lists(root: Path, year: str) -> bool:
    return any((root / "ImageSets" / year / f"{split}.txt").is_file() for split in _SPLITS)


def _open_name(name: str) -> Videos:
    places = [data_folder() / place for place in _PLACES[name]]
    for place in places:
        for year in _LISTS[name]:
            if looks_like_videos(place) and _has_lists(place, year):
                return _open_root(place, name, year, merged=name == "davis-2016")
    lists = " or ".join(f"ImageSets/{year}/val.txt" for year in _LISTS[name])
    raise UserError(
        f"dataset {name!r} ({VIDEOS[name]}) is not in {data_folder()}. Expected {places[0]} with JPEGImages/480p, "
        f"Annotations/480p and {lists}; see the page 'DAVIS: Densely Annotated VIdeo Segmentation'. Set SSL_BENCH_DATA "
        "to the folder that holds it, or give its path instead of its name."
    )


def _open_toy() -> Videos:
    from ssl_bench.evaluate import toy_davis, toyworld

    versions = f"v{toyworld.WORLD_VERSION}.{toy_davis.TOY_DAVIS_VERSION}"
    folder = cache_folder() / "datasets" / f"toy-davis-{versions}-seed0"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary, follow("making toy-davis") as report:
            toy_davis.write_davis(temporary, progress=report)
    return replace(_open_root(folder, "toy-davis", "2017"), built_in=True)


def _open_root(root: Path, name: str, lists: str | None, *, merged: bool = False) -> Videos:
    """All splits that are listed; without lists, all folders of frames as val."""
    frames, masks = (_resolution(root / kind) for kind in ("JPEGImages", "Annotations"))
    if lists is None:
        if not (found := _folders(frames)):
            raise UserError(f"{frames} has no folder with the frames of a video. {_EXPECTED}.")
        named = {"val": found}
    else:
        files = {split: root / "ImageSets" / lists / f"{split}.txt" for split in _SPLITS}
        named = {split: _names(path) for split, path in files.items() if path.is_file()}
    notes, splits, videos = [], {}, {}
    for split, names in named.items():
        if split != "val" and not any((frames / each).is_dir() for each in names):
            notes.append(f"none of the {len(names)} videos of {split} is in {frames}; the split is left out")
            continue
        splits[split], videos[split] = _open_split(split, names, frames, masks, merged=merged)
    if not splits:
        raise UserError(f"{root} has no video that its lists name. {_EXPECTED}.")
    layout = f"DAVIS, {f'ImageSets/{lists}' if lists else 'all folders of JPEGImages'}"
    return Videos(name, root, False, splits, videos, layout, tuple(notes))


def _resolution(folder: Path) -> Path:
    return next((folder / name for name in _RESOLUTIONS if (folder / name).is_dir()), folder)


def _names(path: Path) -> list[str]:
    """A name a line; in DAVIS 2016's lists the paths of a frame and its mask, /JPEGImages/480p/NAME/00000.jpg ..."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8. Expected a name a line; save it as UTF-8.") from error
    lines = [line.split()[0] for line in text.splitlines() if line.strip()]
    names = list(dict.fromkeys(Path(line).parent.name if "/" in line else line for line in lines))
    if not names:
        raise UserError(f"{path} names no video. Expected a name a line.")
    return names


def _open_split(
    split: str, names: Sequence[str], frames: Path, masks: Path, *, merged: bool
) -> tuple[Split, tuple[Video, ...]]:
    paths: list[str] = []
    of_frame: list[str] = []
    videos: list[Video] = []
    stats: list[os.stat_result] = []
    for name in names:
        images = _files(frames / name, is_image_name)
        annotated = _files(masks / name, lambda file: file.lower().endswith(".png") and is_image_name(file))
        own = _own_masks(images, annotated, frames / name, masks / name)
        videos.append(Video(name, range(len(paths), len(paths) + len(images)), tuple(images), own, merged))
        paths += [f"{name}/{file}" for file in images.values()]
        of_frame += own if videos[-1].is_annotated else own * len(images)
        stats += [(frames / name / file).stat() for file in images.values()]
    sizes, modified_ns = (np.array([getattr(s, key) for s in stats], np.int64) for key in ("st_size", "st_mtime_ns"))
    source = FrameFiles(ImageFiles(str(frames), Names(paths), sizes, modified_ns), Names(of_frame))
    ids = Names(path.rpartition(".")[0] for path in paths)
    return Split(split, ("unlabeled",), np.zeros(len(paths), np.int64), ids, source), tuple(videos)


def _files(folder: Path, wanted: Callable[[str], bool]) -> dict[str, str]:
    """Files by their names without suffix, in order."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}. Expected the files of this video; complete it, or its list.")
    names = [entry.name for entry in folder.iterdir() if wanted(entry.name)]
    by_stem = {name.rpartition(".")[0]: name for name in names}
    if len(by_stem) < len(names):
        raise UserError(f"{folder} has several files of one name, such as 00000.jpg and 00000.png. Remove one of them.")
    return {stem: by_stem[stem] for stem in _ordered(by_stem)}


def _ordered(stems: Iterable[str]) -> list[str]:
    """By their number where that is all in which they differ, so that 2 comes before 10; as text otherwise."""
    ordered = sorted(stems)
    parts = [re.fullmatch(r"(.*?)([0-9]+)([^0-9]*)", stem) for stem in ordered]
    numbers = {stem: int(part[2]) for stem, part in zip(ordered, parts, strict=True) if part}
    around = {(part[1], part[3]) if part else None for part in parts}
    return sorted(ordered, key=numbers.__getitem__) if len(around) == 1 and None not in around else ordered


def _own_masks(images: dict[str, str], annotated: dict[str, str], frames: Path, masks: Path) -> tuple[str, ...]:
    """The masks in the order of the frames: all of them, or the first alone."""
    if not images:
        raise UserError(f"{frames} has no frames. Expected images such as 00000.jpg.")
    first, *later = images
    if first not in annotated:
        raise UserError(
            f"the first frame of {frames} has no mask: {masks / first}.png is missing. It says which objects to follow."
        )
    if strange := sorted(set(annotated) - set(images)):
        raise UserError(f"{len(strange):,} masks of {masks} have no frame in {frames}: {shown(strange)}.")
    missing = [stem for stem in later if stem not in annotated]
    if missing and len(annotated) > 1:
        raise UserError(
            f"{len(missing):,} of {len(images):,} frames of {frames} have no mask in {masks}: {shown(missing)}. "
            "Expected a mask for every frame, or for the first alone; complete them."
        )
    return tuple(str(masks / annotated[stem]) for stem in images if stem in annotated)


def _sides(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]} px"


def _of_another_size(path: str, size: tuple[int, ...], first: str, expected: tuple[int, ...]) -> UserError:
    return UserError(
        f"{path} has {_sides(size)}, and {first} has {_sides(expected)}. Expected all frames and masks of a video in "
        "one size; export them again."
    )
