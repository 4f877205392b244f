"""Samples for mmdet: objects, crowds, masks after every transform, against polygons that are filled by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_coco import annotation, write

from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.toy_coco import CATEGORY_IDS, write_coco
from ssl_bench.evaluate.training.seeds import seeded
from ssl_bench.protocols import detection
from ssl_bench.protocols.openmm import packages

packages.require()

from ssl_bench.protocols.openmm.objects import Learned, Objects, training_transforms, val_transforms  # noqa: E402
from ssl_bench.protocols.openmm.quiet import quiet  # noqa: E402

TOY = detection.RECIPES["maskrcnn-toy"]
SAME = dataclasses.replace(TOY, shorter_px=(96,), longer_px=96)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_coco(folder, train=24, val=2)
    return open_coco(str(folder))


def samples(coco, recipe, **changes):
    chosen = detection.choose(coco.annotations["train"])
    learned = Learned(coco.annotations["train"], chosen.usable)
    transforms = training_transforms(dataclasses.replace(recipe, **changes))
    return Objects(coco.splits["train"], transforms, coco.categories, images=chosen.images, learned=learned)


def drawn(made, index, seed=0):
    with quiet(), seeded(seed):
        return made[index]


def filled(outline, height, width):
    """By the rule of even and odd crossings, at the middle of every pixel; or run lengths, written out."""
    if isinstance(outline, dict):
        values = np.concatenate([np.full(run, k % 2, bool) for k, run in enumerate(outline["counts"])])
        return values.reshape(width, height).T
    mask = np.zeros((height, width), bool)
    y, x = np.mgrid[:height, :width] + 0.5
    for polygon in outline:
        points = np.array(polygon).reshape(-1, 2)
        inside = np.zeros((height, width), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y0 != y1:
                inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        mask |= inside
    return mask


@pytest.mark.parametrize("size", [96, 192])
def test_boxes_labels_and_masks_stay_with_their_pixels(toy, size):
    made, truth = samples(toy, SAME, shorter_px=(size,), longer_px=size), toy.annotations["train"]
    flips, ignored = set(), 0
    for index in range(len(made)):
        place = int(made.images[index])
        packed = drawn(made, index, seed=index)
        sample = packed["data_samples"]
        assert (sample.index, sample.ori_shape, sample.img_shape) == (index, (96, 96), (size, size))
        rows = list(truth.rows(place))
        kept = [row for row in rows if not truth.crowd[row]]
        crowds = [row for row in rows if truth.crowd[row]]
        for found, expected in ((sample.gt_instances, kept), (sample.ignored_instances, crowds)):
            assert found.labels.tolist() == truth.category[expected].tolist()
            corners = np.concatenate([truth.box[expected, :2], truth.box[expected].reshape(-1, 2, 2).sum(axis=1)], 1)
            if sample.flip:
                corners = np.stack([96 - corners[:, 2], corners[:, 1], 96 - corners[:, 0], corners[:, 3]], axis=1)
            np.testing.assert_allclose(found.bboxes.tensor.numpy(), corners * size / 96, atol=1e-4)
            masks = [filled(truth.outlines[row], 96, 96)[:, :: -1 if sample.flip else 1] for row in expected]
            for mask, wanted in zip(found.masks.masks, masks, strict=True):
                assert wanted.any()
                assert np.array_equal(mask, np.kron(wanted, np.ones((size // 96,) * 2, bool)))
        if size == 96:
            pixels = np.asarray(toy.splits["train"].image(place))[:, :: -1 if sample.flip else 1, ::-1]
            assert packed["inputs"].dtype == torch.uint8
            assert np.array_equal(packed["inputs"].permute(1, 2, 0).numpy(), pixels)  # blue, green, red
        flips.add(sample.flip)
        ignored += len(crowds)
    assert flips == {True, False}
    assert ignored


def test_the_same_random_numbers_give_the_same_sample(toy):
    made = samples(toy, SAME, shorter_px=(64, 80, 96), augmentation="multi-scale")
    first, again, other = drawn(made, 0, 1), drawn(made, 0, 1), [drawn(made, 0, seed) for seed in range(2, 12)]
    assert torch.equal(first["inputs"], again["inputs"])
    assert {tuple(each["inputs"].shape[1:]) for each in other} == {(64, 64), (80, 80), (96, 96)}


def wide(tmp_path):
    """One image of 900 x 600 with a square, of which transforms show what they do."""
    corners = [[300.0, 200.0, 500.0, 200.0, 500.0, 400.0, 300.0, 400.0]]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 900, "height": 600}],
        "annotations": [annotation(1, 1, 4, [300, 200, 200, 200], segmentation=corners)],
        "categories": [{"id": 4, "name": "cat"}],
    }
    for split in ("train2017", "val2017"):
        write(tmp_path / "wide", document, split)
        pixels = np.zeros((600, 900, 3), np.uint8)
        pixels[200:400, 300:500] = 255
        Image.fromarray(pixels).save(tmp_path / "wide" / split / "a.png")
    return open_coco(str(tmp_path / "wide"))


def test_sizes_of_the_papers(tmp_path):
    coco = wide(tmp_path)
    whole = samples(coco, detection.RECIPES["cascade-ibot"], augmentation="multi-scale")
    shapes = {tuple(drawn(whole, 0, seed)["inputs"].shape[1:]) for seed in range(60)}
    assert shapes == {(side, round(1.5 * side)) for side in range(480, 801, 32)}  # 800 x 1200: below 1333
    parts = samples(coco, detection.RECIPES["cascade-ibot"])
    ratios, cut = [], 0
    for seed in range(40):
        packed = drawn(parts, 0, seed)
        (height, width), found = packed["inputs"].shape[1:], packed["data_samples"].gt_instances
        assert min(height, width) in range(480, 801, 32) or max(height, width) == 1333
        ratios.append(width / height)
        if len(found):  # the crop may miss the square
            (left, top, right, bottom), cut = found.bboxes.tensor[0].tolist(), cut + 1
            # Resized twice, each time to whole pixels: some pixels of tolerance.
            white = np.argwhere(packed["inputs"][0].numpy() > 127)
            np.testing.assert_allclose([top, left], white.min(axis=0), atol=4)
            np.testing.assert_allclose([bottom, right], white.max(axis=0) + 1, atol=4)
            mask = np.argwhere(found.masks.masks[0])
            np.testing.assert_allclose(mask.min(axis=0), white.min(axis=0), atol=4)
    as_they_are = np.isclose(ratios, 1.5, atol=2e-3)
    assert 10 < as_they_are.sum() < 30  # half of them are parts
    assert 0.6 < min(ratios) < 1.3
    assert cut > 30


def test_large_scale_jitter(tmp_path):
    made = samples(wide(tmp_path), detection.RECIPES["cascade-tec-vitdet"])
    widths, missed = [], 0
    for seed in range(30):
        packed = drawn(made, 0, seed)
        found, (height, width) = packed["data_samples"].gt_instances, packed["inputs"].shape[1:]
        assert height <= 1024
        assert width <= 1024
        widths.append(width)
        missed += not len(found)
        for box, mask in zip(found.bboxes.tensor.numpy(), found.masks.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert min(widths) < 400  # a tenth of 1024 at least
    assert sum(width == 1024 for width in widths) > 8
    assert missed < 10


def test_val_is_the_largest_size_and_holds_no_objects(tmp_path):
    coco = wide(tmp_path)
    for row, shape in (("cascade-ibot", (800, 1200)), ("cascade-tec-vitdet", (683, 1024)), ("maskrcnn-toy", (64, 96))):
        transforms = val_transforms(detection.RECIPES[row])
        (packed,) = Objects(coco.splits["val"], transforms, coco.categories, images=np.arange(1))
        sample = packed["data_samples"]
        assert tuple(packed["inputs"].shape[1:]) == sample.img_shape == shape
        assert sample.ori_shape == (600, 900)
        assert sample.scale_factor == pytest.approx((shape[1] / 900, shape[0] / 600))
        assert not len(sample.gt_instances)


def test_thin_objects_are_not_learned_and_crowds_are_marked(tmp_path):
    runs = {"counts": [0, 40 * 50], "size": [40, 50]}
    corners = [[10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]]
    document = {
        "images": [
            {"id": 1, "file_name": "b.png", "width": 50, "height": 40},
            {"id": 2, "file_name": "a.png", "width": 50, "height": 40},
            {"id": 3, "file_name": "c.png", "width": 31, "height": 40},
            {"id": 4, "file_name": "d.png", "width": 50, "height": 40},
        ],
        "annotations": [
            annotation(1, 1, 30, [10, 10, 10, 10], segmentation=corners),
            annotation(2, 1, 4, [10, 10, 0.5, 10], segmentation=corners),
            annotation(3, 1, 4, [10, 10, 10, 10], segmentation=corners, area=0),
            annotation(4, 1, 4, [0, 0, 50, 40], segmentation=runs, iscrowd=1),
            annotation(5, 2, 4, [0, 0, 50, 40], segmentation=runs, iscrowd=1),
            annotation(6, 3, 4, [10, 10, 10, 10], segmentation=corners),
        ],
        "categories": [{"id": 30, "name": "dog"}, {"id": 4, "name": "cat"}],
    }
    coco = open_coco(str(write(tmp_path / "mine", document, "train2017")))
    chosen = detection.choose(coco.annotations["train"])
    assert chosen.images.tolist() == [1]  # b
    assert (chosen.small, chosen.empty, chosen.thin) == (1, 2, 2)
    made = samples(coco, SAME)
    assert len(made) == 1
    sample = drawn(made, 0)["data_samples"]
    assert sample.index == 0  # among what is learned from
    assert sample.gt_instances.labels.tolist() == [1]  # dog: its id is 30, its place among the categories 1
    assert sample.ignored_instances.labels.tolist() == [0]
    assert CATEGORY_IDS[5] != 5 + 1  # so the toy data would tell too
