"""The toy world in COCO's layout: scenes of one to four objects, with boxes, masks and crowds.

    write_coco(folder)     400 + 200 images of 96 x 96 px: annotations/instances_{train,val}2017.json, {train,val}2017/

Masks are exact. An object's outline is written as polygons along the edges of its pixels, so that to fill them gives
the mask back. COCO's polygons know no holes: a mask that has one (a ring) is cut in two at the hole's middle, until
every part is without. Objects of one class that touch become a crowd region, in run lengths, as COCO has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_bench.evaluate.toy_files import png_bytes
from ssl_bench.evaluate.toy_shapes import Mask
from ssl_bench.evaluate.toyworld import CLASSES, Scene, at_least, check, scene

TOY_COCO_VERSION = 1  # raised with every change of a byte
SIZE_PX = 96
YEAR = 2017  # of the files' names, which are those of the real dataset
# Like COCO's, ids of categories start at 1 and leave gaps: whoever takes them for positions is wrong here too.
CATEGORY_IDS = tuple(1 + label + label // 5 for label in range(len(CLASSES)))

Loop = list[tuple[int, int]]  # corners x, y


def write_coco(
    folder: Path,
    *,
    train: int = 400,
    val: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write images and annotations; `progress` is called with done, total."""
    at_least(1, train=train, val=val)
    check(seed=seed, index=0, height_px=SIZE_PX, width_px=SIZE_PX, labels=(0,))
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    done, next_id = 0, 1
    for split, count in (("train", train), ("val", val)):
        images_at = folder / f"{split}{YEAR}"
        images_at.mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            labels = labels_of(seed, split, index)
            picture = scene(seed=seed, split=split, index=index, height_px=SIZE_PX, width_px=SIZE_PX, labels=labels)
            image_id = 1 + done
            name = f"{image_id:012d}.png"
            (images_at / name).write_bytes(png_bytes(picture.image))
            images.append(_image_entry(image_id, name))
            for entry in annotate(picture):
                annotations.append(entry | {"image_id": image_id, "id": next_id})
                next_id += 1
            done += 1
            if progress is not None:
                progress(done, train + val)
        document = _document(split, images, annotations)
        (folder / "annotations" / f"instances_{split}{YEAR}.json").write_text(json.dumps(document), encoding="utf-8")


def labels_of(seed: int, split: str, index: int) -> tuple[int, ...]:
    """One to four classes; in every other picture the last object is of the first one's class."""
    digest = hashlib.sha256(f"toy coco, seed {seed}: {split} {index}".encode()).digest()
    count = 1 + digest[0] % 4
    labels = [int.from_bytes(digest[2 + 4 * k : 6 + 4 * k], "big") % len(CLASSES) for k in range(count)]
    if digest[1] % 2:
        labels[-1] = labels[0]
    return tuple(labels)


def annotate(picture: Scene) -> list[dict[str, Any]]:
    """COCO's entries for what is visible, from back to front, without the ids of image and entry."""
    groups: list[tuple[int, Mask, int]] = []  # label, mask, how many objects
    for instance in picture.instances:
        label, mask, members = instance.label, instance.mask, 1
        touching = [group for group in groups if group[0] == label and bool((grown(mask) & group[1]).any())]
        for group in touching:
            groups.remove(group)
            mask, members = mask | group[1], members + group[2]
        if mask.any():
            groups.append((label, mask, members))
    return [_entry(label, mask, crowd=members > 1) for label, mask, members in groups]


def grown(mask: Mask) -> Mask:
    """With the pixels that share an edge with it."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _entry(label: int, mask: Mask, *, crowd: bool) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "segmentation": run_lengths(mask) if crowd else polygons(mask),
        "area": float(mask.sum()),
        "iscrowd": int(crowd),
        "bbox": [float(left), float(top), float(columns[-1] + 1 - left), float(rows[-1] + 1 - top)],
        "category_id": CATEGORY_IDS[label],
    }


def run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed form: lengths of runs of 0 and 1 in turn, column by column, the first of 0."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return {"counts": np.diff([0, *changes.tolist(), mask.size]).tolist(), "size": list(mask.shape)}


def polygons(mask: Mask) -> list[list[float]]:
    """Outlines x, y, x, y, ... of parts without holes that together are the mask."""
    loops = _outlines(mask)
    holes = [loop for loop in loops if _twice_area(loop) < 0]
    if not holes:
        return [[float(value) for corner in loop for value in corner] for loop in loops]
    rows = [y for _, y in holes[0]]
    middle = (min(rows) + max(rows)) // 2  # the hole then lies open at the cut, in either part that it reaches into
    upper, lower = mask.copy(), mask.copy()
    upper[middle:], lower[:middle] = False, False
    return polygons(upper) + polygons(lower)


_NEXT = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}  # a turn to the right; y points down


def _outlines(mask: Mask) -> list[Loop]:
    """Closed paths along the edges between pixels, with the mask to the right: clockwise around it, and counter-
    clockwise around its holes. Pixels that share a corner alone are not connected."""
    padded = np.pad(mask, 1)
    inside, open_edges = padded[1:-1, 1:-1], dict[tuple[int, int], list[tuple[int, int]]]()
    for way, neighbor, x, y in (
        ((1, 0), padded[:-2, 1:-1], 0, 0),  # along the upper edge of a pixel, from its upper left corner
        ((0, 1), padded[1:-1, 2:], 1, 0),
        ((-1, 0), padded[2:, 1:-1], 1, 1),
        ((0, -1), padded[1:-1, :-2], 0, 1),
    ):
        for row, column in np.argwhere(inside & ~neighbor).tolist():
            open_edges.setdefault((column + x, row + y), []).append(way)
    loops = []
    for start in sorted(open_edges):
        while open_edges[start]:
            loops.append(_followed(start, open_edges))
    return loops


def _followed(start: tuple[int, int], open_edges: dict[tuple[int, int], list[tuple[int, int]]]) -> Loop:
    """One path, whose edges are used up; only the corners at which it turns. `start` is its leftmost, so it turns."""
    way = open_edges[start].pop()
    corners, (x, y) = [start], start
    while True:
        x, y = x + way[0], y + way[1]
        if (x, y) == start and _NEXT[way] not in open_edges[start]:
            break
        ways = open_edges[x, y]
        turn = _NEXT[way] if _NEXT[way] in ways else ways[0]  # where two pixels meet at a corner: around the same one
        ways.remove(turn)
        if turn != way:
            corners.append((x, y))
        way = turn
    return corners


def _twice_area(loop: Loop) -> int:
    """Positive for a clockwise path (y points down)."""
    shifted = [*loop[1:], loop[0]]
    return sum(x * b - a * y for (x, y), (a, b) in zip(loop, shifted, strict=True))


def _image_entry(image_id: int, name: str) -> dict[str, Any]:
    return {
        "license": 1,
        "file_name": name,
        "coco_url": "",
        "height": SIZE_PX,
        "width": SIZE_PX,
        "date_captured": f"{YEAR}-01-01 00:00:00",
        "flickr_url": "",
        "id": image_id,
    }


def _document(split: str, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that a file of COCO's holds."""
    return {
        "info": {
            "description": f"ssl-bench's toy world, {split}",
            "url": "",
            "version": str(TOY_COCO_VERSION),
            "year": YEAR,
            "contributor": "ssl-bench",
            "date_created": f"{YEAR}/01/01",
        },
        "licenses": [{"url": "", "id": 1, "name": "Apache License 2.0"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"supercategory": "shape", "id": number, "name": name}
            for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)
        ],
    }
