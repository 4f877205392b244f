"""Images as tokens: areas against counting in fractions of pixels, tokens against the network itself."""

from __future__ import annotations

import dataclasses
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_backbone
from PIL import Image
from test_coco import annotation, write
from test_object_masks import run_lengths

from ssl_bench.evaluate.architecture import HALF, Architecture
from ssl_bench.evaluate.backbone import Output, Tokens
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.object_masks import IGNORE, open_objects
from ssl_bench.evaluate.patch_areas import patch_areas
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols.patch_views import PatchRecipe, Read, TokenImage, token_images

RECIPE = PatchRecipe(24, "bilinear", -1, True)


class PatchMean(torch.nn.Module):
    """A network whose patch tokens are the mean colors of 4 px patches, moved by the layer and turned by the norm."""

    architecture = Architecture(dim=3, depth=2, heads=1, patch_px=4, image_px=16, mlp_dim=0, mean=HALF, std=HALF)

    def forward(self, images, *, layers, norm):
        tokens = torch.nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        assert list(layers) == [-1]
        return Output((Tokens(None, tokens if norm else tokens.flip(-1) + 0.5),))


def subject(data, network=None, *, seed=0, **effort) -> Subject:
    network = network or PatchMean()
    checkpoint = SimpleNamespace(
        backbone=network, architecture=network.architecture, name="fake", spec="fake.pt", format="fake"
    )
    return Subject(checkpoint, open_objects(str(data)) if not hasattr(data, "splits") else data, Effort(**effort), seed)


def scenes(root, *, images=6, seed=0):
    """Rectangles of three categories in pictures of several sizes, with crowds; one image without objects."""
    rng = np.random.RandomState(seed)
    entries, boxes, number = [], [], 0
    for index in range(images):
        width, height = [(60, 44), (31, 57), (48, 48)][index % 3]
        entries.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        for k in range(0 if index == 4 else 5):
            mask = np.zeros((height, width), bool)
            left, top = rng.randint(0, width - 12), rng.randint(0, height - 12)
            mask[top : top + rng.randint(3, 30), left : left + rng.randint(3, 30)] = True
            number += 1
            more = {"segmentation": run_lengths(mask), "area": float(mask.sum()), "iscrowd": int(k == 4)}
            boxes.append(annotation(number, index, int(rng.choice([2, 5, 7])), [0, 0, 5, 5], **more))
    categories = [{"id": each, "name": f"kind {each}"} for each in (2, 5, 7)]
    return write(root, {"images": entries, "annotations": boxes, "categories": categories}, seed=seed)


def token_areas(numbers, objects, grid):
    return patch_areas(numbers, [*range(1, objects + 1), 0, IGNORE], (grid, grid))


def by_counting(numbers, objects, grid):
    """Every pixel cut into grid x grid parts, so that tokens hold whole ones."""
    fine = numbers.repeat(grid, axis=0).repeat(grid, axis=1)
    high, wide = numbers.shape
    areas = np.zeros((objects + 2, grid * grid))
    for token in range(grid * grid):
        row, column = divmod(token, grid)
        part = fine[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        for place, value in enumerate([*range(1, objects + 1), 0, IGNORE]):
            areas[place, token] = (part == value).sum()
    return areas


@pytest.mark.parametrize("size", [(12, 18), (13, 7), (6, 6), (3, 20), (1, 1)])
def test_areas_are_exact_at_any_size(size):
    rng = np.random.RandomState(0)
    numbers = rng.choice(np.array([0, 1, 2, 4, IGNORE], np.uint16), size)
    found = token_areas(numbers, 4, 6)
    assert np.array_equal(found, by_counting(numbers, 4, 6))
    assert (found.sum(axis=0) == size[0] * size[1]).all()


def test_areas_of_a_grid_that_is_no_square():
    numbers = np.random.RandomState(1).choice(np.array([0, 3, 9], np.uint8), (7, 10))
    found = patch_areas(numbers, [3, 9, 5], (2, 3))
    fine = numbers.repeat(2, axis=0).repeat(3, axis=1)  # cells of 7 x 10
    for cell in range(6):
        row, column = divmod(cell, 3)
        part = fine[7 * row : 7 * row + 7, 10 * column : 10 * column + 10]
        assert found[:, cell].tolist() == [(part == value).sum() for value in (3, 9, 5)]


def token_image(numbers, ids, categories, grid, features=None, *, by_class=False):
    areas = token_areas(np.asarray(numbers, np.uint16), len(ids), grid)
    features = torch.zeros(grid * grid, 1) if features is None else features
    nobody = np.zeros((3, grid, grid), np.uint8)
    return TokenImage("a.png", 0, nobody, tuple(ids), tuple(categories), areas, by_class, features=features)


def test_a_token_belongs_to_what_covers_most_of_it():
    rows = [
        [1, 1, 0, 0, 0, 2],
        [1, 2, 2, 2, 0, 0],
        [IGNORE, IGNORE, 1, 1, 3, 3],
        [IGNORE, 0, 2, 2, 0, IGNORE],
    ]
    none, ignored = 3, 4
    # 2x2 blocks: {1,1,1,2} {0,0,2,2} {0,2,0,0} / {I,I,I,0} {1,1,2,2} {3,3,0,I}
    image = token_image(np.array([*rows, [3] * 6, [3] * 6]), (7, 8, 9), (0, 0, 1), 3)
    assert image.label.tolist() == [0, 1, none, ignored, 0, 2, 2, 2, 2]
    assert image.without_token == 0
    small = token_image([[1, 0], [0, 0]], (5,), (0,), 1)
    assert (small.label.tolist(), small.without_token, small.drawn(0, seed=0)) == ([1], 1, None)


def test_by_class_the_objects_of_a_category_count_together():
    # 30 % sheep A, 30 % sheep B, 40 % meadow; and below, where a dog covers more than either sheep, 30, 30 and 40 %.
    numbers = np.array([[1, 1, 1, 2, 2, 2, 0, 0, 0, 0], [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]], np.uint16)
    areas = patch_areas(numbers, [1, 2, 3, 0, IGNORE], (2, 1))
    nobody = np.zeros((3, 1, 1), np.uint8)

    def label(by_class, categories=(7, 7, 4)):
        return TokenImage("a.png", 0, nobody, (11, 12, 13), categories, areas, by_class).label.tolist()

    assert label(True) == [0, 0]  # of equal sheep the first
    assert label(False) == [3, 2]
    assert label(True, (7, 6, 4)) == [3, 2]
    # The same as where masks tell classes: one object is all sheep, one all dogs.
    merged = np.array([0, 1, 1, 2], np.uint16)[numbers]
    areas = patch_areas(merged, [1, 2, 0, IGNORE], (2, 1))
    assert TokenImage("a.png", 0, nobody, (7, 4), (7, 4), areas, True).label.tolist() == [0, 0]


def test_by_class_every_token_of_a_category_is_of_the_object_that_covers_most_of_it():
    rng = np.random.RandomState(0)
    numbers = rng.choice(np.array([0, 1, 2, 3, 4, IGNORE], np.uint16), (40, 40))
    categories = (5, 2, 5, 2)
    image = token_image(numbers, range(4), categories, 16, by_class=True)
    areas = by_counting(numbers, 4, 16)
    for token in range(256):
        sums = [areas[[0, 2], token].sum(), areas[[1, 3], token].sum(), areas[4, token], areas[5, token]]
        first = sums.index(max(sums))
        expected = 2 + first if first > 1 else max([0, 2] if first == 0 else [1, 3], key=lambda k: areas[k, token])
        assert image.label[token] == expected
    assert (image.label != areas.argmax(axis=0)).any()


def test_the_drawn_token_is_the_objects_own_and_depends_on_seed_image_and_object_alone():
    numbers = np.zeros((20, 20), np.uint16)
    numbers[:10] = 1
    numbers[10:, :10] = 2
    image = token_image(numbers, (40, 41), (0, 1), 20)
    drawn = [image.drawn(0, seed) for seed in range(2000)]
    assert all(token < 200 for token in drawn)
    assert len(set(drawn)) == 200
    assert np.bincount(drawn, minlength=200).max() < 30  # ten each
    assert image.drawn(0, 3) == drawn[3]
    swapped = token_image(np.array([0, 2, 1], np.uint16)[numbers], (41, 40), (1, 0), 20)
    assert [swapped.drawn(1, seed) for seed in range(50)] == drawn[:50]
    renamed = dataclasses.replace(image, sample_id="b.png")
    assert [renamed.drawn(0, seed) for seed in range(50)] != drawn[:50]
    other = dataclasses.replace(image, ids=(39, 41))
    assert [other.drawn(0, seed) for seed in range(50)] != drawn[:50]
    said = hashlib.sha256(b"token of an object, seed 5: a.png 40").digest()  # on every machine, for ever
    assert image.drawn(0, 5) == int.from_bytes(said[:8], "big") % 200


def test_tokens_are_of_unit_length_in_the_order_of_the_images(tmp_path):
    one = subject(scenes(tmp_path), tiny_backbone())
    settings = dataclasses.replace(RECIPE, image_px=32, interpolation="bicubic")
    found = list(token_images(one, settings, Read()))
    assert [image.sample_id for image in found] == [f"{k}.png" for k in range(6)]
    for image in found:
        whole = Image.open(tmp_path / "val2017" / image.sample_id).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(whole, np.float32)).permute(2, 0, 1)[None] / 255
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in (one.backbone.architecture.mean, one.backbone.architecture.std)
        )
        with torch.no_grad():
            tokens = one.backbone((pixels - mean) / std).tokens[0].patches.reshape(16, -1)
        assert torch.allclose(image.features, tokens / tokens.norm(dim=1, keepdim=True), atol=1e-5)
