"""Augmentation on labels: what timm and DeiT III do, and nothing depends on how a batch is cut or who computes it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath as TimmDropPath

from ssl_bench.evaluate.architecture import IMAGENET_MEAN
from ssl_bench.evaluate.backbone import build
from ssl_bench.evaluate.training import supervised
from ssl_bench.evaluate.training.augment import View, draw_views
from ssl_bench.evaluate.training.seeds import seeded
from ssl_bench.evaluate.training.supervised import (
    Mixing,
    Supervised,
    draw_box,
    draw_drop_path,
    erase,
    rand_augmented,
    three_augmented,
    with_own_drop_path,
)


def picture(side=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def sampler(**changes):
    settings = {
        "augmentation": "randaug",
        "least_area": 0.08,
        "erasing": 0.5,
        "image_px": 24,
        "mean": IMAGENET_MEAN,
        "labels": np.array([4, 7]),
    }
    return Supervised(**(settings | changes))


@pytest.mark.parametrize("augmentation", ["crop", "randaug", "three"])
def test_a_sample_depends_on_its_generator_alone(augmentation):
    np.random.seed(1)
    sample = sampler(augmentation=augmentation)
    first = sample(picture(), 1, np.random.default_rng(5))
    state = np.random.get_state()[1].copy()
    second = sample(picture(), 1, np.random.default_rng(5))
    other = sample(picture(), 1, np.random.default_rng(6))
    assert (np.random.get_state()[1] == state).all()
    (views, (label, box, seed)) = first
    assert views[0].shape == (3, 24, 24)
    assert views[0].dtype == np.uint8
    assert label == 7
    assert box.shape == (4,)
    assert all(np.array_equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert np.array_equal(first[0][0], second[0][0])
    assert not np.array_equal(first[0][0], other[0][0])
    assert seed != other[1][2]


def test_crop_is_a_random_resized_crop_with_flip_and_nothing_else():
    ((pixels,), _) = sampler(augmentation="crop", least_area=0.3)(picture(), 0, np.random.default_rng(3))
    view = View((0.3, 1.0), "bicubic", flip_p=0.5)
    (expected,) = draw_views(picture(), (view,), image_px=24, patch_px=8, rng=np.random.default_rng(3))
    assert np.array_equal(pixels, expected)


def test_randaugment_takes_every_strength():
    """At its highest level timm's posterizing keeps no bit at all, which new Pillow refuses: black."""
    (posterize,) = (op for op in supervised._rand_augment(IMAGENET_MEAN).ops if op.name == "PosterizeIncreasing")
    image = picture()
    for level in range(11):
        changed = np.asarray(posterize.aug_fn(image, *posterize.level_fn(level, {})))
        kept = posterize.level_fn(level, {})[0]
        assert np.array_equal(changed, np.asarray(image).astype(int) // 2 ** (8 - kept) * 2 ** (8 - kept))
    for number in range(400):
        rand_augmented(image, IMAGENET_MEAN, np.random.default_rng(1000 + number))


def test_randaugment_is_timms_with_its_conventions():
    image = picture()
    for number in range(20):
        seed = int(np.random.default_rng(number).integers(2**62))
        settings = {"translate_const": 18, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
        with seeded(seed):
            expected = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)(image)
        assert np.array_equal(rand_augmented(image, IMAGENET_MEAN, np.random.default_rng(number)), expected)
    changed = [
        np.asarray(rand_augmented(image, IMAGENET_MEAN, np.random.default_rng(n))) != np.asarray(image)
        for n in range(40)
    ]
    assert 20 < sum(each.any() for each in changed) < 40  # each of two operations happens in half of the cases


def test_three_augment_is_one_of_three_then_jitter(monkeypatch):
    monkeypatch.setattr(supervised, "_JITTER", 0.0)
    image, counts = picture(), {"gray": 0, "solarized": 0, "blurred": 0}
    pixels = np.asarray(image)
    solarized = np.where(pixels < 128, pixels, 255 - pixels)
    for number in range(300):
        found = np.asarray(three_augmented(image, np.random.default_rng(number)))
        if (found == found[..., :1]).all():
            counts["gray"] += 1
            assert np.array_equal(found[..., 0], np.asarray(image.convert("L")))
        elif np.array_equal(found, solarized):
            counts["solarized"] += 1
        else:
            counts["blurred"] += 1
            assert found.std() <= pixels.std()
    assert min(counts.values()) > 75  # 100 each, standard deviation 8


def test_three_augment_jitters_brightness_contrast_and_saturation():
    red = Image.fromarray(np.full((8, 8, 3), (180, 60, 60), np.uint8))
    means, spreads = [], []
    for number in range(200):
        found = np.asarray(three_augmented(red, np.random.default_rng(number))).astype(float)[4, 4]
        means.append(found.mean())
        spreads.append(found[0] - found[1])
    assert 30 < min(means) < 70
    assert 120 < max(means) < 160
    assert 120 < max(spreads) < 255  # of 120 at most, when nothing is scaled


def test_boxes_are_those_of_timms_erasing():
    """Compared in distribution: timm draws from Python's generator."""
    side, n = 32, 4000
    boxes = [draw_box(0.25, side, np.random.default_rng(i)) for i in range(n)]
    drawn = [box for box in boxes if box[2]]
    assert len(drawn) / n == pytest.approx(0.25, abs=0.03)
    for top, left, high, wide in drawn:
        assert top >= 0
        assert top + high <= side
        assert left >= 0
        assert left + wide <= side
        assert high < side > wide
        assert 0.02 * side**2 * 0.6 < high * wide < side**2 / 3 * 1.2
    reference = RandomErasing(1.0, mode="pixel", device="cpu")
    shares, ratios = [], []
    with seeded(0):
        for _ in range(1500):
            erased = reference(torch.zeros(3, side, side))[0] != 0
            shares.append(float(erased.float().mean()))
            ratios.append(math.log(float(erased.any(1).sum()) / float(erased.any(0).sum())))
    mine = np.array([high * wide / side**2 for _, _, high, wide in drawn])
    aspect = np.array([math.log(high / wide) for _, _, high, wide in drawn])
    assert mine.mean() == pytest.approx(np.mean(shares), abs=0.012)
    assert mine.std() == pytest.approx(np.std(shares), abs=0.012)
    assert aspect.std() == pytest.approx(np.std(ratios), abs=0.06)
    assert [box for i in range(50) if (box := draw_box(0.0, side, np.random.default_rng(i)))[2]] == []


def test_erased_is_the_box_with_noise_of_the_seed():
    images = torch.zeros(3, 3, 16, 16)
    boxes = torch.tensor([[2, 3, 5, 4], [0, 0, 0, 0], [0, 0, 15, 15]])
    erase(images, boxes, torch.tensor([9, 1, 9]))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:7, 3:7] = True
    assert (images[0] != 0).all(0).equal(mask)
    assert (images[1] == 0).all()
    assert float(images[2, :, :15, :15].std()) == pytest.approx(1, abs=0.1)
    again = torch.zeros(1, 3, 16, 16)
    erase(again, boxes[:1], torch.tensor([9]))
    assert again[0].equal(images[0])
    erase(again, boxes[:1], torch.tensor([10]))
    assert not again[0].equal(images[0])


def batch(n=12, side=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, side, side, generator=generator), torch.arange(n) % 5


def test_mixing_is_timms_with_neighbors_as_partners():
    images, labels = batch()
    mixing = Mixing(0.8, 1.0, 0.1, 5)
    kinds = set()
    for step in range(12):
        mixed_images, targets = mixing(images, labels, seed=3, step=step, first=0)
        reference = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
        for one in range(0, 12, 2):  # timm on each pair alone, from the same random numbers
            with seeded(3, step, 0, 1):
                pair, target = reference(images[one : one + 2].clone(), labels[one : one + 2])
            assert torch.allclose(mixed_images[one : one + 2], pair)
            assert torch.allclose(targets[one : one + 2], target)
        assert torch.allclose(targets.sum(1), torch.ones(12))
        kinds.add("cutmix" if (mixed_images == images).any() else "mixup")
    assert kinds == {"mixup", "cutmix"}
    assert images.equal(batch()[0])  # what it was given stays


def test_mixing_does_not_depend_on_who_computes_what(monkeypatch):
    monkeypatch.setattr(supervised, "MIXED_TOGETHER", 8)
    images, labels = batch(24)
    mixing = Mixing(0.8, 1.0, 0.1, 5)
    whole, targets = mixing(images, labels, seed=0, step=7, first=0)
    for cut in (2, 6, 12, 20):
        left = mixing(images[:cut], labels[:cut], seed=0, step=7, first=0)
        right = mixing(images[cut:], labels[cut:], seed=0, step=7, first=cut)
        assert torch.equal(torch.cat([left[0], right[0]]), whole)
        assert torch.equal(torch.cat([left[1], right[1]]), targets)
    on = [targets[i : i + 8].amax(1).amax() for i in (0, 8, 16)]
    assert len({round(float(value), 6) for value in on}) > 1  # every group has a draw of its own


def test_without_mixing_labels_are_smoothed():
    images, labels = batch(3)
    same, targets = Mixing(0.0, 0.0, 0.1, 5)(images, labels, seed=0, step=0, first=0)
    assert same is images
    assert torch.allclose(targets, 0.9 * torch.eye(5)[labels] + 0.02)
    _, hard = Mixing(0.0, 0.0, 0.0, 5)(images, labels, seed=0, step=0, first=0)
    assert torch.equal(hard, torch.eye(5)[labels])


def test_drop_path_is_timms_with_numbers_from_outside():
    from conftest import tiny_architecture

    network = build(tiny_architecture(), drop_path=0.4).train()
    shares = [module.drop_prob for module in network.modules() if isinstance(module, TimmDropPath)]
    own = with_own_drop_path(network)
    assert [module.share for module in own] == shares == pytest.approx([0.4, 0.4])
    assert not [module for module in network.modules() if isinstance(module, TimmDropPath)]
    x = torch.ones(3, 4, 5)
    own[0].uniform = torch.tensor([0.1, 0.5, 0.39])
    assert torch.allclose(own[0](x)[:, 0, 0], torch.tensor([0, 1 / 0.6, 0]))
    assert own[0].eval()(x) is x
    numbers = draw_drop_path(2, 1000, seed=0, step=3)
    assert float((numbers >= 0.4).float().mean()) == pytest.approx(0.6, abs=0.03)
    assert numbers.equal(draw_drop_path(2, 1000, seed=0, step=3))
    assert not numbers.equal(draw_drop_path(2, 1000, seed=0, step=4))
