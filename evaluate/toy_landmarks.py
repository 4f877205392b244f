"""The toy world as a landmark dataset, in the layout in which revisited Oxford and Paris are distributed.

    write_landmarks(folder, "toy-roxford")     600 database images and 60 queries of 96 x 96 pixels, 19 MB

Where a real query shows a building, a toy query shows an object: a box around the front one of three. The database
holds scenes of one object or three of different classes, and an image is relevant if it shows the query's class:

    easy    what can be seen of the object is a tenth of the picture or more, and nine tenths of the object
    hard    it is smaller, or more of it is hidden
    junk    what can be seen is less than 4 % of the picture: counts neither way

All are of the toy world's test split, of which nothing is trained on.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl_bench.evaluate.toy_files import png_bytes
from ssl_bench.evaluate.toyworld import CLASSES, Instance, Scene, scene
from ssl_bench.progress import Report

LAYOUT_VERSION = 1  # raised when one byte of what is written changes
SIZE_PX = 96
_OBJECTS = (1, 1, 1, 3)  # in a database image, in turn
_OBJECTS_OF_QUERY = 3
_MARGIN_PX = 12  # around the object, where it fits

Relevance = Literal["easy", "hard", "junk"]


def write_landmarks(
    folder: Path, name: str, *, database: int = 600, queries: int = 60, seed: int = 0, progress: Report | None = None
) -> None:
    """Write folder/jpg/IMAGE.png and folder/gnd_NAME.pkl."""
    (folder / "jpg").mkdir(parents=True)
    shown: list[dict[int, Relevance]] = []  # for every database image: class -> how well it can be seen
    images, query_images = [], []
    truths: list[dict[str, Any]] = []
    for index in range(database + queries):
        is_query = index >= database
        count = _OBJECTS_OF_QUERY if is_query else _OBJECTS[index % len(_OBJECTS)]
        # RandomState: its streams never change. The last object is the one in front: a query's, in turn of each class.
        labels = np.random.RandomState([seed, index]).permutation(len(CLASSES)).tolist()
        if is_query:
            labels.remove((index - database) % len(CLASSES))
            labels = [*labels[: count - 1], (index - database) % len(CLASSES)]
        picture = scene(
            seed=seed, split="test", index=index, height_px=SIZE_PX, width_px=SIZE_PX, labels=tuple(labels[:count])
        )
        image = f"query_{index - database:06d}" if is_query else f"toy_{index:06d}"
        (folder / "jpg" / f"{image}.png").write_bytes(png_bytes(picture.image))
        if is_query:
            query_images.append(image)
            truths.append(_truth(picture.instances[-1], shown))
        else:
            images.append(image)
            shown.append(relevances(picture))
        if progress is not None:
            progress(index + 1, database + queries)
    content = {"imlist": images, "qimlist": query_images, "gnd": truths}
    (folder / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))  # 2: what Python 2 wrote


def relevances(picture: Scene) -> dict[int, Relevance]:
    """For every class in a picture, how well its object can be seen."""
    found: dict[int, Relevance] = {}
    for instance in picture.instances:
        covered = int(instance.mask.sum()) / instance.mask.size
        visible = int(instance.mask.sum()) / max(int(instance.amodal.sum()), 1)
        if covered < 0.04:
            found[instance.label] = "junk"
        else:
            found[instance.label] = "easy" if covered >= 0.1 and visible >= 0.9 else "hard"
    return found


def _truth(queried: Instance, shown: list[dict[int, Relevance]]) -> dict[str, Any]:
    """One entry of gnd: the box around what can be seen, and the database images that show the same class."""
    x0, y0, x1, y1 = queried.box
    box = [
        float(edge)
        for edge in (
            *(max(x0 - _MARGIN_PX, 0), max(y0 - _MARGIN_PX, 0)),
            *(min(x1 + _MARGIN_PX, SIZE_PX), min(y1 + _MARGIN_PX, SIZE_PX)),
        )
    ]
    by_relevance = {
        relevance: [index for index, classes in enumerate(shown) if classes.get(queried.label) == relevance]
        for relevance in ("easy", "hard", "junk")
    }
    return {"bbx": box, **by_relevance}
