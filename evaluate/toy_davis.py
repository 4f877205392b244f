"""The toy world as a video dataset, in DAVIS' layout.

    write_davis(folder)     12 videos of 24 frames of 128 x 96 px: 2 for training, 10 for validation

    JPEGImages/480p/VIDEO/00000.png       frames (PNG where DAVIS has JPEG, of which no two encoders write the same)
    Annotations/480p/VIDEO/00000.png      masks: 0 is the background, 1, 2, ... are objects; with the usual palette
    ImageSets/2017/{train,val}.txt        names of the videos

One to three objects move, turn, grow, shrink and bend, and pass behind each other and behind an occluder. In the first
frame every object can be seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from ssl_bench.evaluate.toy_files import png_bytes
from ssl_bench.evaluate.toy_masks import voc_palette
from ssl_bench.evaluate.toyworld import CLASSES, Scene, at_least, sequence
from ssl_bench.progress import Report

TOY_DAVIS_VERSION = 1  # raised with every change of a byte
HEIGHT_PX, WIDTH_PX = 96, 128
TRAIN, VAL, FRAMES = 2, 10, 24
_LEAST_SEEN_PX = 150  # of every object in the first frame


def write_davis(
    folder: Path,
    *,
    train: int = TRAIN,
    val: int = VAL,
    frames: int = FRAMES,
    seed: int = 0,
    progress: Report | None = None,
) -> None:
    """Write videos; `progress` is called with done, total."""
    at_least(1, train=train, val=val, frames=frames)
    chosen, done = _videos(seed), 0
    lists = folder / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        names = []
        for index in itertools.islice(chosen, count):
            scenes = list(_scenes(seed, index, frames))
            name = f"{index:03d}-{'-'.join(CLASSES[instance.label] for instance in scenes[0].instances)}"
            names.append(name)
            images, masks = (folder / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for frame, picture in enumerate(scenes):
                (images / f"{frame:05d}.png").write_bytes(png_bytes(picture.image))
                (masks / f"{frame:05d}.png").write_bytes(png_bytes(picture.instance_map, palette=voc_palette()))
            done += 1
            if progress is not None:
                progress(done, train + val)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _videos(seed: int) -> Iterator[int]:
    """Sequences of the toy world that begin with all their objects in sight."""
    for index in itertools.count():
        (first,) = _scenes(seed, index, 1)
        if all(instance.mask.sum() >= _LEAST_SEEN_PX for instance in first.instances):
            yield index


def _scenes(seed: int, index: int, frames: int) -> Iterator[Scene]:
    objects = 1 + index % 3
    return sequence(seed=seed, index=index, frames=frames, height_px=HEIGHT_PX, width_px=WIDTH_PX, objects=objects)
