"""One view over objects: against pycocotools for COCO's instances, against the masks themselves for class masks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as tools
from test_coco import annotation, write

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import COCO, open_coco
from ssl_bench.evaluate.datasets import check_dataset, open_dataset, open_images
from ssl_bench.evaluate.landmarks import open_landmarks
from ssl_bench.evaluate.masks import MASKS, open_masks
from ssl_bench.evaluate.object_masks import IGNORE, OBJECTS, open_objects
from ssl_bench.evaluate.videos import open_videos

TRIANGLE = [[5.0, 4.0, 45.5, 10.25, 20.0, 35.0]]


def filled(segmentation, height, width):
    """pycocotools' own way."""
    runs = segmentation
    if isinstance(segmentation, list):
        runs = tools.merge(tools.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = tools.frPyObjects(segmentation, height, width)
    with warnings.catch_warnings():  # of its own
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.array(tools.decode(runs), bool)


def run_lengths(mask):
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F"), [0]])))
    return {"counts": np.diff([0, *changes, mask.size]).tolist(), "size": list(mask.shape)}


def hand_written(root):
    """One image with all that COCO has, one without objects, one that has a crowd alone; gray, CMYK and RGB."""
    compressed = np.zeros((40, 60), bool)
    compressed[20:30, 3:50] = True
    packed = tools.encode(np.asfortranarray(compressed.astype(np.uint8)))
    block = np.zeros((40, 60), bool)
    block[2:12, 40:58] = True
    crowd = np.zeros((40, 60), bool)
    crowd[:, 30:36] = True
    boxes = [
        annotation(31, 1, 9, [5, 4, 41, 31], segmentation=TRIANGLE, area=700.0),
        annotation(17, 1, 4, [3, 20, 47, 10], area=470.0,
                   segmentation={"counts": packed["counts"].decode(), "size": [40, 60]}),
        annotation(40, 1, 9, [40, 2, 18, 10], area=180.0, segmentation=run_lengths(block)),
        annotation(12, 1, 4, [30, 0, 6, 40], area=240.0, segmentation=run_lengths(crowd), iscrowd=1),
        annotation(50, 1, 4, [50.5, 30.5, 6, 6], area=36.0, segmentation=[]),  # a box alone
        annotation(60, 1, 9, [41, 3, 3, 3], area=9.0, segmentation=[[41, 3, 44, 3, 44, 6, 41, 6]]),
        annotation(61, 1, 4, [41, 3, 3, 3], area=8.0, segmentation=[[41, 3, 44, 3, 44, 6, 41, 6]]),  # hides 60
        annotation(70, 3, 4, [30, 0, 6, 40], segmentation=run_lengths(crowd), iscrowd=1),
    ]  # fmt: skip
    images = [
        {"id": number, "file_name": name, "width": 60, "height": 40}
        for number, name in ((1, "a.png"), (2, "b.jpg"), (3, "c.png"))
    ]
    write(
        root,
        {"images": images, "annotations": boxes, "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]},
    )
    gray = np.random.RandomState(0).randint(0, 255, (40, 60), np.uint8)
    Image.fromarray(gray).save(root / "val2017" / "a.png")
    Image.fromarray(gray).convert("CMYK").save(root / "val2017" / "b.jpg")
    return boxes


def test_objects_are_those_of_pycocotools_smaller_ones_over_larger(tmp_path):
    boxes = hand_written(tmp_path)
    seen = open_objects(str(tmp_path)).objects("val", 0)
    assert seen.ids == (17, 31, 40, 60, 61)
    assert seen.categories == (0, 1, 1, 1, 0)  # in the order of the categories' ids: cat, dog
    by_id = {box["id"]: box for box in boxes}
    expected = np.zeros((40, 60), int)
    expected[filled(by_id[12]["segmentation"], 40, 60)] = IGNORE
    expected[30:37, 50:57] = IGNORE  # the box alone
    for number in (31, 17, 40, 60, 61):  # from large to small
        expected[filled(by_id[number]["segmentation"], 40, 60)] = 1 + seen.ids.index(number)
    assert np.array_equal(seen.numbers, expected)
    assert (seen.numbers == 1 + seen.ids.index(60)).sum() == 0  # hidden, and still an object
    assert {0, 1, 2, 3, 5, IGNORE} == set(np.unique(seen.numbers).tolist())


def test_images_without_objects_and_what_is_no_object(tmp_path):
    hand_written(tmp_path)
    data = open_objects(str(tmp_path))
    for index, ignored in ((1, 0), (2, 240)):
        seen = data.objects("val", index)
        assert seen.ids == seen.categories == ()
        assert (seen.numbers == IGNORE).sum() == ignored
        assert (seen.numbers == 0).sum() == 2400 - ignored
    seen = [data.objects("val", index) for index in range(3)]
    assert [each.crowds for each in seen] == [1, 0, 1]
    assert [each.without_outline for each in seen] == [1, 0, 0]
    assert data.has_instances
    assert data.categories == ("cat", "dog")


def test_gray_and_cmyk_images_come_as_rgb(tmp_path):
    hand_written(tmp_path)
    data = open_objects(str(tmp_path))
    with Image.open(tmp_path / "val2017" / "b.jpg") as stored:
        assert stored.mode == "CMYK"
    assert [data.objects("val", index).image.mode for index in range(3)] == ["RGB"] * 3


def test_toy_coco_agrees_with_pycocotools_image_by_image():
    data, coco = open_objects("toy-coco"), open_coco("toy-coco")
    annotations, crowds = coco.annotations["val"], 0
    for index in range(40):
        seen = data.objects("val", index)
        rows = [row for row in annotations.rows(index) if not annotations.crowd[row]]
        crowds += len(annotations.rows(index)) - len(rows)
        assert (seen.crowds, seen.without_outline) == (len(annotations.rows(index)) - len(rows), 0)
        assert seen.ids == tuple(annotations.id[rows].tolist())
        assert seen.categories == tuple(annotations.category[rows].tolist())
        for place, row in enumerate(rows):
            assert np.array_equal(seen.numbers == 1 + place, filled(annotations.outlines[row], 96, 96))
        assert seen.image.tobytes() == coco.splits["val"].image(index).tobytes()
    assert crowds > 0


def test_a_part_has_the_same_objects_in_the_same_images():
    data = open_objects("toy-coco")
    part = data.limited(7)
    assert [len(part.splits[name]) for name in ("train", "val")] == [7, 7]
    for index in (0, 6, -1):
        whole, seen = data.objects("val", index % 7), part.objects("val", index)
        assert (seen.ids, seen.categories) == (whole.ids, whole.categories)
        assert np.array_equal(seen.numbers, whole.numbers)
    assert part.splits["val"].manifest_sha256 != data.splits["val"].manifest_sha256


@pytest.mark.parametrize("name", ["toy-voc", "toy-ade20k", "toy-imagenet-s", "toy-cityscapes"])
def test_in_class_masks_every_class_but_the_background_is_one_object(name):
    data, masks = open_objects(name), open_masks(name)
    skipped = 0 if name == "toy-cityscapes" else 1  # whose background is the road, a class
    assert data.categories == masks.classes[skipped:]
    assert not data.has_instances
    assert data.built_in
    for index in range(5):
        image, mask = masks.pair("val", index)
        seen = data.objects("val", index)
        assert seen.image.tobytes() == image.tobytes()
        present = [label for label in np.unique(mask).tolist() if skipped <= label < IGNORE]
        assert present
        assert seen.ids == tuple(present)
        assert [data.categories[each] for each in seen.categories] == [masks.classes[label] for label in present]
        for place, label in enumerate(present):
            assert np.array_equal(seen.numbers == 1 + place, mask == label)
        assert np.array_equal(seen.numbers == IGNORE, mask == IGNORE)
        assert (seen.numbers == IGNORE).any()
        assert (seen.crowds, seen.without_outline) == (0, 0)
    assert len(data.limited(3).splits["val"]) == 3


def test_a_class_named_other_or_background_in_another_place_is_an_object(tmp_path):
    for folder in ("images/val", "masks/val"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images/val/a.png")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3).save(tmp_path / "masks/val/a.png")
    (tmp_path / "classes.txt").write_text("road\nother\nbackground\n")
    data = open_objects(str(tmp_path))
    assert data.categories == ("road", "other", "background")
    assert data.objects("val", 0).ids == (0, 1, 2)


def test_names_are_those_of_both_kinds():
    assert set(OBJECTS) == set(COCO) | set(MASKS)
    assert OBJECTS["toy-coco"] == COCO["toy-coco"]


@pytest.mark.parametrize(
    "opened",
    [open_objects, open_masks, open_coco, open_landmarks, open_videos, open_dataset, open_images, check_dataset],
)
def test_nobodys_home_is_explained(opened):
    with pytest.raises(UserError, match="~no such user/data: there is no user of that name"):
        opened("~no such user/data")


def test_what_cannot_be_opened_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"no-such.*Expected"):
        open_objects(str(tmp_path / "no-such"))
    broken = annotation(1, 1, 4, [1, 1, 5, 5], segmentation={"counts": [100, 5, 2295], "size": [30, 80]})
    image = {"id": 1, "file_name": "a.png", "width": 60, "height": 40}
    write(tmp_path, {"images": [image], "annotations": [broken], "categories": [{"id": 4, "name": "cat"}]})
    with pytest.raises(UserError, match="annotation 1 "):
        open_objects(str(tmp_path)).objects("val", 0)
