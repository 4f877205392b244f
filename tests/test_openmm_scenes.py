"""Images with masks behind mmseg's transforms: both change alike, only the seed decides, val stays whole."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from ssl_bench.evaluate.masks import IGNORE, Masks, open_masks
from ssl_bench.evaluate.training.seeds import seeded
from ssl_bench.protocols.openmm import packages
from ssl_bench.protocols.semseg import RECIPES, Recipe

packages.require()

from ssl_bench.protocols.openmm.scenes import Scaled, Scenes, ShortSide, scoring, training  # noqa: E402  (needs the packages)

HIGH, WIDE = 60, 90
TOY = RECIPES["linear-toy"]


@pytest.fixture
def masks(tmp_path: Path) -> Masks:
    """One image a split: left black and class 0, right white and class 1; a strip at the bottom is class 2, and red.

    In the mask, the two topmost rows are ignored.
    """
    pixels, classes = np.zeros((HIGH, WIDE, 3), np.uint8), np.zeros((HIGH, WIDE), np.uint8)
    pixels[:, WIDE // 2 :], classes[:, WIDE // 2 :] = 255, 1
    pixels[HIGH - 20 :], classes[HIGH - 20 :] = (250, 0, 0), 2
    classes[:2] = 255
    for split in ("train", "val"):
        for folder, values in (("images", pixels), ("masks", classes)):
            place = tmp_path / "world" / folder / split
            place.mkdir(parents=True)
            Image.fromarray(values).save(place / "a.png")
    (tmp_path / "world" / "classes.txt").write_text("left\nright\nbottom\n")
    return open_masks(str(tmp_path / "world"))


def _recipe(**changes: Any) -> Recipe:
    return replace(TOY, **{"crop_px": 40, "stride_px": 40, **changes})


def _sample(scenes: Scenes, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    with seeded(seed):
        packed = scenes[0]
    return packed["inputs"].permute(1, 2, 0).numpy(), packed["data_samples"].gt_sem_seg.data[0].numpy()


def _agreement(pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> float:
    """The share of labeled pixels whose color (BGR) is that of their class; what blends two colors may be wrong."""
    blue, red = pixels[..., 0].astype(int), pixels[..., 2].astype(int)
    seen = np.where(red - blue > 60, 2, np.where(blue > 70, 1, 0))
    known = labels != IGNORE
    return float((seen == labels)[known].mean())


@pytest.mark.parametrize("augmentation", ["scale", "resized-crop"])
def test_image_and_mask_are_changed_alike(masks: Masks, augmentation: str) -> None:
    scenes = Scenes(masks, "train", training(_recipe(augmentation=augmentation), (WIDE, HIGH)))
    mirrored, shares, sizes = [], [], set()
    for seed in range(40):
        pixels, labels = _sample(scenes, seed)
        assert pixels.shape[:2] == labels.shape
        assert max(labels.shape) <= 40
        assert set(np.unique(labels)) <= {0, 1, 2, IGNORE}
        assert _agreement(pixels, labels) > 0.9
        upper = labels[: len(labels) // 2]
        if {0, 1} <= set(np.unique(upper)):
            columns = np.nonzero(upper == 0)[1].mean(), np.nonzero(upper == 1)[1].mean()
            mirrored.append(columns[0] > columns[1])
        shares.append(float((labels == 2).mean()))
        sizes.add(labels.shape)
    assert 0.2 < np.mean(mirrored) < 0.8
    assert len(set(shares)) > 12  # another place every time
    if augmentation == "scale":  # by half, the image is smaller than the crop
        assert any(min(size) < 40 for size in sizes)
    else:
        assert sizes == {(40, 40)}


def test_samples_depend_on_the_seed_alone(masks: Masks) -> None:
    for augmentation in ("scale", "resized-crop+colors"):
        scenes = Scenes(masks, "train", training(_recipe(augmentation=augmentation), (WIDE, HIGH)))
        first, labels = _sample(scenes, 5)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        again = _sample(pickle.loads(pickle.dumps(scenes)), 5)  # noqa: S301  (ours)
        np.testing.assert_array_equal(first, again[0])
        np.testing.assert_array_equal(labels, again[1])
        assert any(not np.array_equal(first, _sample(scenes, seed)[0]) for seed in (6, 7))


def test_no_class_fills_more_than_three_quarters_of_a_crop(masks: Masks) -> None:
    """Ten tries are not always enough, but they help: crops of a quarter of the image are mostly of one class."""
    scenes = Scenes(masks, "train", training(_recipe(crop_px=24, stride_px=24), (WIDE, HIGH)))
    largest = []
    for seed in range(60):
        labels = _sample(scenes, seed)[1]
        counts = np.unique(labels[labels != IGNORE], return_counts=True)[1]
        largest.append(counts.max() / counts.sum())
    assert np.mean([share < 0.75 for share in largest]) > 0.7


def test_areas_of_resized_crops(masks: Masks) -> None:
    """14 to 100 % of the image, read off an image whose colors are its coordinates."""
    scenes = Scenes(masks, "train", training(_recipe(augmentation="resized-crop"), (WIDE, HIGH)))
    boxes = []
    step = scenes.steps[1]
    ramp = np.zeros((HIGH, WIDE, 3), np.uint8)
    ramp[..., 2], ramp[..., 1] = np.arange(WIDE), np.arange(HIGH)[:, None]  # red: across, green: down
    for seed in range(300):
        with seeded(seed):
            found = step({"img": ramp.copy(), "gt_seg_map": np.zeros((HIGH, WIDE), np.uint16)})["img"].astype(float)
        wide = np.ptp(found[..., 2].mean(axis=0)) * 40 / 39
        high = np.ptp(found[..., 1].mean(axis=1)) * 40 / 39
        boxes.append(wide * high / (HIGH * WIDE))
    assert 0.1 < min(boxes) < 0.2
    assert max(boxes) > 0.85
    assert 0.4 < np.mean(boxes) < 0.65


def test_colors_are_only_distorted_where_the_recipe_says_so(masks: Masks) -> None:
    def colors(augmentation: str) -> int:
        scenes = Scenes(masks, "train", training(_recipe(augmentation=augmentation), (WIDE, HIGH)))
        return sum(int(_sample(scenes, seed)[0].max() != 255) for seed in range(12))

    assert colors("resized-crop") <= 2  # of crops without white
    assert colors("resized-crop+colors") >= 4


def test_val_images_are_scaled_and_their_masks_stay(masks: Masks) -> None:
    image, mask = masks.pair("val", 0)
    packed = Scenes(masks, "val", scoring(_recipe(), (180, 100)))[0]
    assert packed["inputs"].shape == (3, 100, 150)  # as large as fits into 180 x 100
    sample = packed["data_samples"]
    np.testing.assert_array_equal(sample.gt_sem_seg.data[0], mask)
    assert (mask[:2] == IGNORE).all()
    assert (sample.metainfo["index"], sample.metainfo["ori_shape"]) == (0, (HIGH, WIDE))
    # Channels are mm's: blue, green, red.
    np.testing.assert_array_equal(packed["inputs"][:, -1, 0], np.asarray(image)[-1, 0, ::-1])


def test_the_short_side_is_torchvisions(masks: Masks) -> None:
    packed = Scenes(masks, "val", scoring(_recipe(resize_px=25), (180, 100)))[0]
    image = masks.pair("val", 0)[0].resize((int(25 * WIDE / HIGH), 25), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(packed["inputs"].permute(1, 2, 0), np.asarray(image)[..., ::-1])
    np.testing.assert_array_equal(packed["data_samples"].gt_sem_seg.data[0], masks.pair("val", 0)[1])
    tall = ShortSide(25)({"img": np.zeros((90, 60, 3), np.uint8)})
    assert tall["img_shape"] == (37, 25)


def test_labels_beyond_a_byte_stay_as_they_are(masks: Masks) -> None:
    """ImageNet-S has 920 classes."""
    scenes = Scenes(masks, "train", training(_recipe(augmentation="resized-crop"), (WIDE, HIGH)))
    mask = np.full((HIGH, WIDE), 919, np.uint16)
    with seeded(0):
        found = scenes.steps[1]({"img": np.zeros((HIGH, WIDE, 3), np.uint8), "gt_seg_map": mask})["gt_seg_map"]
    assert np.unique(found).tolist() == [919]


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (1, 1), (5000, 1)])
@pytest.mark.parametrize("augmentation", ["scale", "resized-crop"])
def test_very_thin_images_keep_a_pixel(size: tuple[int, int], augmentation: str, masks: Masks) -> None:
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            Image.new("RGB" if folder == "images" else "L", size).save(masks.root / folder / split / "a.png")
    masks = open_masks(str(masks.root))
    train = Scenes(masks, "train", training(_recipe(augmentation=augmentation), (64, 64)))
    for seed in range(6):
        pixels, labels = _sample(train, seed)
        assert min(pixels.shape) >= 1
        assert pixels.shape[:2] == labels.shape
    packed = Scenes(masks, "val", scoring(_recipe(), (64, 64)))[0]
    assert packed["inputs"].shape[1:] == tuple(max(1, round(64 * side / max(size))) for side in size[::-1])


def test_other_images_are_scaled_as_mmseg_scales_them() -> None:
    from mmseg.datasets.transforms import Resize

    rng = np.random.default_rng(0)
    for high, wide, scale in ((37, 91, (64, 64)), (91, 37, (2048, 512)), (60, 90, (180, 100)), (33, 70, (128, 50))):
        pixels, mask = rng.integers(0, 256, (high, wide, 3), np.uint8), rng.integers(0, 9, (high, wide), np.uint16)
        found, expected = (
            each({"img": pixels, "gt_seg_map": mask, "seg_fields": ["gt_seg_map"]})
            for each in (Scaled(scale=scale), Resize(scale=scale, keep_ratio=True))
        )
        for name in ("img", "gt_seg_map"):
            np.testing.assert_array_equal(found[name], expected[name])
        assert (found["img_shape"], found["scale_factor"]) == (expected["img_shape"], expected["scale_factor"])


def test_transforms_are_made_in_silence(masks: Masks, capfd: pytest.CaptureFixture[str]) -> None:
    """mmengine's logger would print on stdout that it overwrites its own earlier one."""
    from mmengine.logging import MMLogger

    before = dict(MMLogger._instance_dict)
    for _ in range(2):
        Scenes(masks, "train", training(_recipe(), (WIDE, HIGH)))
    assert MMLogger._instance_dict == before
    assert capfd.readouterr().out == ""
