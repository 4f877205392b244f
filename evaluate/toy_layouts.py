"""Every layout in which the toy world is written to disk: the work behind `ssl-bench data toy --layout NAME`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ssl_bench.errors import UserError, unknown
from ssl_bench.evaluate import toy_masks
from ssl_bench.evaluate.toy_coco import write_coco
from ssl_bench.evaluate.toy_davis import write_davis
from ssl_bench.evaluate.toy_files import write_class_folders
from ssl_bench.evaluate.toy_landmarks import write_landmarks
from ssl_bench.evaluate.toyworld import MIN_SIZE_PX
from ssl_bench.progress import Report


class Layout(NamedTuple):
    """How it is written, and which options apply."""

    write: Callable[..., None]
    options: frozenset[str]
    fixed: str = ""  # what the other options would change, in words


def _landmarks(folder: Path, *, seed: int, progress: Report) -> None:
    write_landmarks(folder, "toy-roxford", seed=seed, progress=progress)


_COUNTS = frozenset({"train", "val"})
# fmt: off
LAYOUTS: dict[str, Layout] = {
    "folders":    Layout(write_class_folders, _COUNTS | {"size"}),
    "ade20k":     Layout(toy_masks.write_ade20k, _COUNTS, "its images have 128 x 96 px"),
    "cityscapes": Layout(toy_masks.write_cityscapes, _COUNTS, "its images have 192 x 96 px"),
    "voc":        Layout(toy_masks.write_voc, _COUNTS, "its images have 128 x 96 px"),
    "imagenet-s": Layout(toy_masks.write_imagenet_s, _COUNTS, "its images have 96 x 96 px"),
    "coco":       Layout(write_coco, _COUNTS, "its images have 96 x 96 px"),
    "davis":      Layout(write_davis, _COUNTS, "its videos have 24 frames of 128 x 96 px"),
    "roxford":    Layout(_landmarks, frozenset(), "it has 60 queries and 600 images of 96 x 96 px, and no training"),
}
# fmt: on


def writer(
    layout: str, *, train: int | None = None, val: int | None = None, size_px: int | None = None, seed: int = 0
) -> Callable[..., None]:
    """What writes this layout into a folder, `writer(...)(folder, progress=report)`; an option that is None was not
    given."""
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    chosen = LAYOUTS[layout]
    given = {name: value for name, value in (("train", train), ("val", val), ("size", size_px)) if value is not None}
    if wrong := sorted(given.keys() - chosen.options):
        named = " and ".join(f"--{name}" for name in wrong)
        raise UserError(f"{named} cannot be given with --layout {layout}: {chosen.fixed}. Leave it away.")
    if size_px is not None and size_px < MIN_SIZE_PX:  # the renderer would speak of height_px, which nobody gave
        raise UserError(f"--size {size_px}: expected at least {MIN_SIZE_PX} pixels.")
    names = {"size": "size_px"}
    return partial(chosen.write, seed=seed, **{names.get(name, name): value for name, value in given.items()})
