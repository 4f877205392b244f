"""Outlines of objects: what pycocotools must never see is refused, by the id of its annotation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.outlines import run_counts

SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0]


@pytest.fixture
def opened(tmp_path):
    """Open a dataset of one 8 x 6 image with three objects, the second of which has the given outline."""

    def write(outline):
        (tmp_path / "annotations").mkdir()
        (tmp_path / "val2017").mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / "val2017" / "a.png")
        common = {"image_id": 3, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 8, "iscrowd": 0}
        outlines = [[SQUARE], outline, [SQUARE, SQUARE]]
        document = {
            "images": [{"id": 3, "file_name": "a.png", "width": 8, "height": 6}],
            "annotations": [{**common, "id": 70 + k, "segmentation": each} for k, each in enumerate(outlines)],
            "categories": [{"id": 1, "name": "x"}],
        }
        (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
        return open_coco(str(tmp_path))

    return write


@pytest.mark.parametrize(
    ("outline", "said"),
    [
        ([[1, 2, 3, 4, 5]], "a polygon of 5 numbers"),
        ([SQUARE, [1, 2, 3, float("nan"), 5, 6]], "the coordinate nan"),
        ([[1, 2, 3, 1e12, 5, 6]], r"the coordinate 1e\+12"),
        ({"size": [6, 8], "counts": [1, 2, 3]}, "do not fill its image of 8 x 6 px"),
        ({"size": [6, 8], "counts": [49, -1]}, "do not fill"),
        ({"size": [6, 8], "counts": ["a"]}, "do not fill"),
        ({"size": [6, 8], "counts": "\x7f"}, "do not fill"),
        ({"size": [6, 8], "counts": "PPP"}, "do not fill"),
        ({"size": [8, 6], "counts": [48]}, r"run lengths of size \[8, 6\]"),
    ],
)
def test_what_no_program_can_read_is_refused(opened, outline, said):
    with pytest.raises(UserError, match=f"instances_val2017.json: annotation 71 has .*{said}"):
        opened(outline)


@pytest.mark.parametrize(
    "outline", [[], [[1, 1, 2, 2]], [[-3, 0, 9, 0, 9, 7]], {"size": [6, 8], "counts": [0, 48]}, None]
)
def test_what_is_common_is_taken(opened, outline):
    assert len(opened(outline).annotations["val"]) == 3


def test_compressed_run_lengths_are_decoded_as_pycocotools_does():
    rng = np.random.RandomState(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        for _ in range(20):
            mask = np.asfortranarray(rng.rand(37, 61) < share, np.uint8)
            counts = run_counts(reference.encode(mask)["counts"].decode())
            flat = np.concatenate([np.full(count, number % 2) for number, count in enumerate(counts)])
            assert (flat == mask.ravel(order="F")).all()
