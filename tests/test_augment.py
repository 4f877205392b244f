"""Views against torchvision, which the official codes use, and against numbers written out here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import CenterCrop, ColorJitter, InterpolationMode, RandomResizedCrop, Resize
from torchvision.transforms import functional as tv

from ssl_bench.errors import UserError
from ssl_bench.evaluate.training import augment
from ssl_bench.evaluate.training.augment import AUGMENTATIONS, View, augmentation_named, draw_views, view_px


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth color with noise on it, so that neither edges nor hues are all alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse, dtype=np.int64) + rng.integers(-25, 26, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


class Scripted:
    """A generator whose numbers are given: those of the geometry, of further tries, of the colors."""

    def __init__(self, *calls: list[float]) -> None:
        self.calls = list(calls)

    def random(self, count: int) -> np.ndarray:
        numbers = self.calls.pop(0)
        assert len(numbers) == count
        return np.array(numbers)


def drawn(image: Image.Image, *views: View, seed: int = 0, image_px: int = 48, patch_px: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [v.transpose(1, 2, 0) for v in draw_views(image, views, image_px=image_px, patch_px=patch_px, rng=rng)]


def tried(
    numbers: list[float], scale: tuple[float, float], width: int, height: int
) -> tuple[int, int, int, int] | None:
    """torchvision's algorithm for one try, from given uniform numbers: top, left, height, width."""
    area = width * height * (scale[0] + (scale[1] - scale[0]) * numbers[0])
    ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * numbers[1])
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if not (0 < w <= width and 0 < h <= height):
        return None
    return math.floor(numbers[3] * (height - h + 1)), math.floor(numbers[2] * (width - w + 1)), h, w


def reference(image: Image.Image, augmentation: tuple[View, ...], px: list[int], seed: int) -> list[np.ndarray]:
    """All views without rotation by torchvision's functions, from the same random numbers."""
    rng = np.random.default_rng(seed)
    geometry, result = [], []
    for view, side in zip(augmentation, px, strict=True):
        if view.crop_of is None:
            numbers = list(rng.random(6))
            flip, box = numbers[1] < view.flip_p, None
            if view.scale is not None:
                box = tried(numbers[2:], view.scale, *image.size)
                for _ in range(9):
                    box = box or tried(list(rng.random(4)), view.scale, *image.size)
            geometry.append((flip, box))
        else:
            geometry.append(geometry[view.crop_of])
        flip, box = geometry[-1]
        mode = InterpolationMode(view.interpolation)
        if view.scale is None:
            picture = CenterCrop(side)(Resize(side * 256 // 224, mode)(image))
        else:
            assert box is not None, "choose images that fit within ten tries"
            picture = tv.resized_crop(image, *box, [side, side], mode)
        jittered, b, c, s, h, order, gray, blurred, radius, solarized = rng.random(10).tolist()
        if jittered < view.jitter_p:
            jitters = [
                lambda p, x=x, u=u, f=f: f(p, max(0, 1 - x) + u * (1 + x - max(0, 1 - x)))
                for x, u, f in zip(
                    view.jitter,
                    (b, c, s),
                    (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation),
                    strict=False,
                )
            ]
            jitters.append(lambda p, x=view.jitter[3], u=h: tv.adjust_hue(p, -x + 2 * x * u))
            for which in list(itertools.permutations(range(4)))[int(order * 24)]:
                if view.jitter[which] > 0:
                    picture = jitters[which](picture)
        if gray < view.gray_p:
            picture = tv.to_grayscale(picture, 3)
        if blurred < view.blur_p:
            picture = picture.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * radius))
        if solarized < view.solarize_p:
            picture = tv.solarize(picture, 128)
        # The flip is last here: it must not matter (but for the rounding of the blur).
        result.append(np.asarray(tv.hflip(picture) if flip else picture))
    return result


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if not name.startswith("toy")])
def test_views_are_torchvisions(name):
    views = augmentation_named(name)
    px = [view_px(view, image_px=64, patch_px=8) for view in views]
    for seed in range(25):
        image = photo(90 + seed, 70 + 2 * seed, seed)
        got = drawn(image, *views, seed=seed, image_px=64, patch_px=8)
        for number, (view, ours, theirs) in enumerate(zip(views, got, reference(image, views, px, seed), strict=True)):
            difference = np.abs(ours.astype(int) - theirs.astype(int)).max()
            assert difference <= (1 if view.blur_p else 0), (seed, number)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "side"), [((48, 48), 48), ((50, 37), 24), ((33, 80), 64), ((500, 375), 224)])
def test_crops_are_torchvisions(interpolation, size, side):
    image = photo(*size)
    for seed in range(30):
        flip, *numbers = np.random.default_rng(seed).random(5)
        box = tried(numbers, (0.05, 1.0), *size)
        if box is None:
            continue
        rng = Scripted([0.3, flip, *numbers], [1.0] * 10)
        view = View((0.05, 1.0), interpolation)
        (got,) = draw_views(image, (view,), image_px=side, patch_px=8, rng=rng)
        expected = tv.resized_crop(image, *box, [side, side], InterpolationMode(interpolation))
        expected = tv.hflip(expected) if flip < 0.5 else expected
        np.testing.assert_array_equal(got, np.asarray(expected).transpose(2, 0, 1))
        assert (got.dtype, got.shape, got.flags.c_contiguous) == (np.uint8, (3, side, side), True)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_is_torchvisions_in_every_order(order):
    image = photo(40, 30)
    strengths, uniform = (0.4, 0.4, 0.2, 0.1), np.random.default_rng(sum(order[:2])).random(4).tolist()
    expected = image
    factors = [0.6 + 0.8 * uniform[0], 0.6 + 0.8 * uniform[1], 0.8 + 0.4 * uniform[2], -0.1 + 0.2 * uniform[3]]
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for which in order:
        expected = functions[which](expected, factors[which])
    got = augment._jittered(image, strengths, uniform, order)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    assert np.any(np.asarray(got) != np.asarray(image))


@pytest.mark.parametrize("which", range(3))
def test_jitter_factors_reach_from_one_minus_x_to_one_plus_x_but_not_below_zero(which):
    image, functions = photo(20, 20), (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for strength, share, factor in ((0.4, 0.0, 0.6), (0.4, 0.5, 1.0), (0.4, 1.0, 1.4), (1.5, 0.0, 0.0), (1.5, 1, 2.5)):
        strengths, uniform = [0.0] * 4, [0.123] * 4
        strengths[which], uniform[which] = strength, share
        got = augment._jittered(image, tuple(strengths), uniform, (0, 1, 2, 3))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(functions[which](image, factor)))


def test_hue_turns_both_ways_and_wraps_around():
    image = photo(64, 64)
    for share, turn in ((0.0, -0.5), (0.25, -0.25), (0.5, 0.0), (0.75, 0.25), (1.0, 0.5)):
        got = augment._jittered(image, (0, 0, 0, 0.5), [0, 0, 0, share], (3, 2, 1, 0))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(tv.adjust_hue(image, turn)))


@pytest.mark.parametrize(("width", "height"), [(96, 96), (200, 150), (64, 200), (900, 60)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.25)])
def test_boxes_are_distributed_as_torchvisions(width, height, scale):
    image, torch_state = Image.new("RGB", (width, height)), torch.get_rng_state()
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
    torch.set_rng_state(torch_state)
    rng, ours = np.random.default_rng(0), []
    for _ in range(4000):
        left, top, right, bottom = augment._draw_box(scale, (width, height), rng.random(4).tolist(), rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        ours.append((top, left, bottom - top, right - left))
    a, b = np.array(theirs, float), np.array(ours, float)
    for first, second in (
        (a[:, 2] * a[:, 3] / (width * height), b[:, 2] * b[:, 3] / (width * height)),
        (np.log(a[:, 3] / a[:, 2]), np.log(b[:, 3] / b[:, 2])),
        (a[:, 0] / height, b[:, 0] / height),
        (a[:, 1] / width, b[:, 1] / width),
    ):
        points = np.unique(np.concatenate([first, second]))
        cumulated = [np.searchsorted(np.sort(each), points, side="right") / 4000 for each in (first, second)]
        assert np.abs(cumulated[0] - cumulated[1]).max() < 0.043  # Kolmogorov-Smirnov, 4000 against 4000, p = .001


@pytest.mark.parametrize(("size", "box"), [((900, 60), (410, 0, 490, 60)), ((60, 900), (0, 410, 60, 490))])
def test_an_image_that_fits_no_try_gives_its_center(size, box):
    whole = [[1.0, 0.5, 0.0, 0.0] for _ in range(10)]
    rng = Scripted(*whole[1:])
    assert augment._draw_box((1.0, 1.0), size, whole[0], rng) == box
    assert not rng.calls, "ten tries"
    assert augment._draw_box((1.0, 1.0), (50, 48), [0, 1.0, 0, 0], Scripted(*[[0, 1.0, 0, 0]] * 9)) == (0, 0, 50, 48)


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (256, 256), (100, 61)])
def test_without_a_crop_it_is_the_usual_center(size):
    image = photo(*size)
    (got,) = drawn(image, *augmentation_named("extrema-none"), image_px=224, patch_px=16)
    np.testing.assert_array_equal(got, np.asarray(CenterCrop(224)(Resize(256)(image))))


def test_scale_one_would_not_be_the_center():
    image = photo(120, 100)
    squeezed = tv.resized_crop(image, 0, 0, 100, 120, [48, 48])
    assert any(np.array_equal(drawn(image, View((1, 1), "bilinear", flip_p=0), seed=s)[0], squeezed) for s in range(9))


def slow_turn(image: np.ndarray, degrees: float) -> np.ndarray:
    """Bilinear in float64; beyond the border the image goes on mirrored."""
    height, width = image.shape[:2]
    angle, result = math.radians(degrees), np.zeros(image.shape)

    def at(y: int, x: int) -> np.ndarray:
        y, x = y % (2 * height), x % (2 * width)
        return image[min(y, 2 * height - 1 - y), min(x, 2 * width - 1 - x)].astype(float)

    for row, column in np.ndindex(height, width):
        x, y = column + 0.5 - width / 2, row + 0.5 - height / 2
        from_x = math.cos(angle) * x + math.sin(angle) * y + width / 2 - 0.5
        from_y = -math.sin(angle) * x + math.cos(angle) * y + height / 2 - 0.5
        left, top = math.floor(from_x), math.floor(from_y)
        a, b = from_x - left, from_y - top
        result[row, column] = (1 - b) * ((1 - a) * at(top, left) + a * at(top, left + 1)) + b * (
            (1 - a) * at(top + 1, left) + a * at(top + 1, left + 1)
        )
    return result


@pytest.mark.parametrize("size", [(24, 24), (40, 9)])
@pytest.mark.parametrize("degrees", [-180.0, -133.3, -90.0, 12.5, 45.0, 100.0])
def test_rotation_is_about_the_center_and_mirrors_the_border(size, degrees):
    image = photo(*size)
    got = np.asarray(augment._Turned(image).by(degrees)).astype(float)
    np.testing.assert_allclose(got, slow_turn(np.asarray(image), degrees), atol=1.01)  # Pillow's rounding
    if size == (24, 24) and degrees == -90:
        assert np.abs(got - np.rot90(np.asarray(image))).max() <= 1


def test_rotation_leaves_no_dark_corner():
    for size in ((48, 48), (100, 20), (31, 57)):
        turned = augment._Turned(Image.new("RGB", size, (200, 150, 100)))
        for degrees in np.linspace(-180, 180, 37):
            got = np.asarray(turned.by(float(degrees)))
            assert got.shape == (size[1], size[0], 3)
            assert (got == (200, 150, 100)).all()


def test_the_angle_is_uniform_to_both_sides_and_comes_before_the_crop():
    image, view = photo(30, 30), View((1.0, 1.0), "bilinear", flip_p=0.0, rotate_degrees=40.0)
    whole = [0.5, 0.5, 0, 0]
    for turn, degrees in ((0.0, -40.0), (0.25, -20.0), (0.5, 0.0), (1.0, 40.0)):
        rng = Scripted([turn, 0.9, *whole], [1.0] * 10)
        (got,) = draw_views(image, (view,), image_px=30, patch_px=5, rng=rng)
        np.testing.assert_array_equal(got.transpose(1, 2, 0), np.asarray(augment._Turned(image).by(degrees)))


def test_a_shared_crop_is_the_same_picture_but_for_the_colors():
    image = photo(70, 60)
    for name in ("extrema", "toy-extrema"):
        first, second = augmentation_named(name)
        without = [View(**{**vars(view), "jitter_p": 0.0, "gray_p": 0.0}) for view in (first, second)]
        different = 0
        for seed in range(20):
            a, b = drawn(image, *without, seed=seed)
            np.testing.assert_array_equal(a, b)
            a, b = drawn(image, first, second, seed=seed)
            different += not np.array_equal(a, b)
        assert different >= 17  # 1 - .2 * .2 of them, less where both are gray
    for name in ("extrema-crop-2", "byol", "toy-byol"):
        a, b = drawn(image, *augmentation_named(name))
        assert not np.array_equal(a, b)


def test_a_shared_crop_of_another_size_is_the_same_place():
    image = photo(70, 60)
    half = View((0.9, 0.9), "bicubic", crop_of=0, size=0.5)
    again = View((0.9, 0.9), "bilinear", crop_of=1)
    cubic = View((0.9, 0.9), "bicubic", crop_of=0)
    for seed in range(5):
        first = View((0.2, 0.6), "bilinear")
        whole, other, small, third, fourth = drawn(image, first, first, half, again, cubic, seed=seed)
        flip, *numbers = np.random.default_rng(seed).random(6)[1:]
        box = tried(numbers, (0.2, 0.6), 70, 60)
        for got, side, mode in ((whole, 48, "bilinear"), (small, 24, "bicubic"), (fourth, 48, "bicubic")):
            expected = tv.resized_crop(image, *box, [side, side], InterpolationMode(mode))
            np.testing.assert_array_equal(got, np.asarray(tv.hflip(expected) if flip < 0.5 else expected))
        np.testing.assert_array_equal(third, other)
        assert not np.array_equal(other, whole)


def test_solarization_inverts_from_128_up():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    view = View(None, "bilinear", flip_p=0.0, solarize_p=1.0)
    drawing = augment._draw_colors(view, ramp, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(drawing), np.asarray(tv.solarize(ramp, 128)))
    assert np.asarray(drawing)[8, 0, 0] == 127  # 128


@pytest.mark.parametrize(
    ("change", "share"),
    [
        ({"flip_p": 0.5}, 0.5),
        ({"flip_p": 0.0}, 0.0),
        ({"gray_p": 0.2}, 0.2),
        ({"blur_p": 0.1}, 0.1),
        ({"blur_p": 1.0}, 1.0),
        ({"solarize_p": 0.2}, 0.2),
        ({"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8}, 0.8),
    ],
)
def test_how_often(change, share):
    image, plain = photo(16, 16), {"scale": (0.5, 1.0), "interpolation": "bilinear", "flip_p": 0.0}
    changed = sum(
        not np.array_equal(
            drawn(image, View(**{**plain, **change}), seed=seed, image_px=16)[0],
            drawn(image, View(**plain), seed=seed, image_px=16)[0],
        )
        for seed in range(1000)
    )
    # A blur of small radius changes nothing, so that fewer are seen than are drawn.
    low = 0.8 * share if "blur_p" in change else share
    assert (
        low - 3.5 * math.sqrt(share * (1 - share) / 1000)
        <= changed / 1000
        <= share + 3.5 * math.sqrt(share * (1 - share) / 1000)
    )


def test_color_jitter_has_the_ranges_of_torchvisions():
    theirs = ColorJitter(0.4, 0.4, 0.2, 0.1)
    assert tuple(theirs.brightness) == tuple(theirs.contrast) == (0.6, 1.4)
    assert (tuple(theirs.saturation), tuple(theirs.hue)) == ((0.8, 1.2), (-0.1, 0.1))
    assert sorted(augment._ORDERS) == sorted(itertools.permutations(range(4)))


def test_what_is_drawn_depends_on_the_generator_alone():
    image = photo(60, 50)
    for name, views in AUGMENTATIONS.items():
        first, again, other = (drawn(image, *views, seed=seed) for seed in (3, 3, 4))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        if name not in ("extrema-none",):
            assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


COLOR = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray_p": 0.2}
MMC = {"interpolation": "bicubic", "jitter": (0.4, 0.4, 0.4, 0.0), "jitter_p": 0.8, "gray_p": 0.2}
MMC_GLOBAL = [
    {**MMC, "scale": (0.25, 1.0), "blur_p": 1.0},
    {**MMC, "scale": (0.25, 1.0), "blur_p": 0.1, "solarize_p": 0.2},
]
CENTER = {"scale": None, "flip_p": 0.0}
TOY = {"jitter": (0.4, 0.4, 0.0, 0.0), "jitter_p": 0.8, "rotate_degrees": 180.0}
EXPECTED = {
    "mae": [{"interpolation": "bicubic"}],
    "byol": [{**COLOR, "blur_p": 1.0}, {**COLOR, "blur_p": 0.1, "solarize_p": 0.2}],
    "extrema": [COLOR, {**COLOR, "crop_of": 0}],
    "extrema-none": [CENTER],
    "extrema-color-1": [{**CENTER, **COLOR}],
    "extrema-color-2": [{**CENTER, **COLOR}] * 2,
    "extrema-crop-1": [{}],
    "extrema-crop-2": [{}] * 2,
    "extrema-crop-color-1": [COLOR],
    "extrema-crop-color-2": [COLOR] * 2,
    "mmc": MMC_GLOBAL + [{**MMC, "scale": (0.05, 0.25), "size": 96 / 224, "blur_p": 0.5}] * 10,
    "mmc-2": MMC_GLOBAL,
    "toy-mae": [TOY],
    "toy-byol": [{**TOY, "scale": (0.4, 1.0)}] * 2,
    "toy-extrema": [TOY, {**TOY, "crop_of": 0}],
    "toy-mmc": [{**TOY, "scale": (0.4, 1.0)}] * 2 + [{**TOY, "scale": (0.1, 0.4), "size": 0.5}] * 2,
    "toy-mmc-2": [{**TOY, "scale": (0.4, 1.0)}] * 2,
}


def test_every_row_is_that_of_its_source():
    """methods.md, 1.5 (MOCA), 2.2 (MMC), 3.3 (TEC), 4.2 (ExtreMA), 5.3 (SdAE)."""
    default = {
        "scale": (0.2, 1.0), "interpolation": "bilinear", "crop_of": None, "size": 1.0, "flip_p": 0.5, "jitter": None,
        "jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0, "rotate_degrees": 0.0,
    }  # fmt: skip
    assert {name: [vars(v) for v in views] for name, views in AUGMENTATIONS.items()} == {
        name: [{**default, **view} for view in views] for name, views in EXPECTED.items()
    }


def test_sizes_are_whole_patches():
    views = augmentation_named("mmc")
    assert [view_px(view, image_px=224, patch_px=16) for view in views] == [224] * 2 + [96] * 10
    assert [view_px(view, image_px=48, patch_px=8) for view in augmentation_named("toy-mmc")] == [48, 48, 24, 24]
    assert [view_px(views[5], image_px=px, patch_px=patch) for px, patch in ((192, 16), (32, 16), (16, 16))] == [
        80,
        16,
        16,
    ]
    got = draw_views(photo(50, 50), views, image_px=64, patch_px=16, rng=np.random.default_rng(0))
    assert [each.shape for each in got] == [(3, 64, 64)] * 2 + [(3, 32, 32)] * 10


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="unknown augmentation 'byoll'; did you mean 'byol'"):
        augmentation_named("byoll")
