"""DAVIS label propagation against the dense formulation, an oracle, and the script's steps written again."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import tiny_backbone
from PIL import Image
from test_video_measures import slow
from test_videos import add_list, add_video, mask_of, save_mask

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import HALF, Architecture
from ssl_bench.evaluate.backbone import Output, Tokens
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.subject import Subject
from ssl_bench.evaluate.toyworld import sequence
from ssl_bench.evaluate.videos import open_videos
from ssl_bench.protocols import davis, propagation
from ssl_bench.protocols.davis import RECIPES, run
from ssl_bench.protocols.propagation import Context, Rule, hard_mask, passed_on, propagated, soft_mask

# Propagation ---------------------------------------------------------------------------------------------------------


def dense(target, frames, rule):
    """All similarities of all tokens, in float64; every step as the method is described."""
    height, width, dim = target.shape
    y, x = (axis.ravel() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    near = ((y[:, None] - y).abs() <= rule.radius) & ((x[:, None] - x).abs() <= rule.radius)
    query = F.normalize(target.reshape(-1, dim).double(), dim=1)
    keys = F.normalize(torch.cat([tokens.reshape(-1, dim) for tokens, _ in frames]).double(), dim=1)
    masks = torch.cat([mask.reshape(height * width, -1) for _, mask in frames]).double()
    affinity = ((query @ keys.T) / rule.temperature).exp() * near.repeat(1, len(frames))
    least = affinity.topk(min(rule.topk, affinity.shape[1]), dim=1)[0][:, -1:]
    affinity = torch.where(affinity >= least, affinity, 0)
    return ((affinity / affinity.sum(dim=1, keepdim=True)) @ masks).reshape(height, width, -1)


def ours(target, frames, rule):
    context = Context(*frames[0], frames=len(frames) + 1)  # and two places that stay empty
    for frame in frames[1:]:
        context.add(*frame)
    return passed_on(target, context, rule)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frames_of(height, width, count, *, classes=3, dim=6, seed=1):
    return [
        (F.normalize(noise(height, width, dim, seed=seed + k), dim=2), noise(height, width, classes, seed=99 + k).abs())
        for k in range(count)
    ]


@pytest.mark.parametrize(
    ("height", "width", "count", "rule"),
    [
        (30, 27, 4, Rule(7, 5, 5, 0.1)),  # several tiles in both directions
        (5, 40, 3, Rule(7, 12, 5, 0.1)),  # a radius beyond the border
        (41, 3, 1, Rule(7, 1, 5, 0.1)),  # 4 neighbors in the corner, of which 5 are wanted
        (23, 9, 2, Rule(7, 2, 1, 0.1)),
        (6, 5, 8, Rule(7, 30, 7, 1.0)),
        (1, 1, 1, Rule(7, 1, 5, 0.1)),
        (9, 17, 2, Rule(7, 3, 5, 0.02)),
    ],
)
def test_masks_are_those_of_the_dense_formulation(height, width, count, rule):
    target, frames = F.normalize(noise(height, width, 6), dim=2), frames_of(height, width, count)
    found = ours(target, frames, rule)
    torch.testing.assert_close(found.double(), dense(target, frames, rule), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tile", [(1, 1), (4, 16), (64, 64)])
def test_tiles_change_nothing(tile, monkeypatch):
    target, frames, rule = F.normalize(noise(13, 11, 6), dim=2), frames_of(13, 11, 3), Rule(7, 4, 5, 0.1)
    monkeypatch.setattr(propagation, "_TILE", {"cpu": tile})
    torch.testing.assert_close(ours(target, frames, rule).double(), dense(target, frames, rule), atol=1e-5, rtol=0)


def test_whatever_is_as_similar_as_the_kth_counts_too():
    """Tokens of a few kinds, exactly alike: the dense formulation keeps all that are tied, so no order decides."""
    kinds = torch.eye(3)[torch.randint(0, 3, (4, 12, 10), generator=torch.Generator().manual_seed(0))]
    target, tokens = kinds[0], kinds[1:]
    frames = [(each, mask) for each, (_, mask) in zip(tokens, frames_of(12, 10, 3), strict=True)]
    rule = Rule(7, 2, 5, 0.1)
    found = ours(target, frames, rule)
    torch.testing.assert_close(found.double(), dense(target, frames, rule), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, ours(target, frames[::-1], rule))
    constant = torch.ones(12, 10, 3)
    mean = ours(constant / 3**0.5, [(constant / 3**0.5, frames[0][1])], rule)
    expected = [
        frames[0][1][max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].mean(dim=(0, 1)) for y in (0, 6) for x in (0, 9)
    ]
    torch.testing.assert_close(torch.stack([mean[y, x] for y in (0, 6) for x in (0, 9)]), torch.stack(expected))


def test_nothing_overflows_and_nothing_outside_is_chosen():
    """With unlike neighbors only: what is outside would be more similar, if it counted as 0."""
    target = torch.full((3, 3, 4), -0.5)
    frames = [(torch.full((3, 3, 4), 0.5), torch.full((3, 3, 2), 0.25))]
    for temperature in (0.1, 1e-3):
        found = ours(target, frames, Rule(7, 12, 5, temperature))
        torch.testing.assert_close(found, torch.full((3, 3, 2), 0.25))


@pytest.mark.parametrize("last", [0, 1, 2, 7])
def test_the_first_frame_and_the_last_ones_pass_masks_on(last):
    tokens = [noise(7, 6, 5, seed=k) for k in range(6)]  # not yet of unit length
    first = noise(7, 6, 3, seed=50).abs()
    rule = Rule(last, 3, 5, 0.1)
    found = list(propagated(iter(tokens), first, rule))
    assert len(found) == 5
    masks = [first]
    for number in range(1, 6):
        sources = sorted({0, *range(max(number - last, 0), number)}) if last else [0]
        # The first frame is one of them once: in the script the queue holds only new ones.
        masks.append(dense(tokens[number], [(tokens[k], masks[k]) for k in sources], rule).float())
        torch.testing.assert_close(found[number - 1], masks[number], atol=1e-5, rtol=0)


# Masks ---------------------------------------------------------------------------------------------------------------


def script_mask(soft, patch, size):
    """eval_video_segmentation.py's upsampling, norm_mask and argmax, step by step."""
    large = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    for plane in large:
        if plane.max() > 0:
            plane.sub_(plane.min().item())
            plane.div_(plane.max().item())
    labels = torch.max(large, dim=0)[1].numpy().astype(np.uint8)
    return np.array(Image.fromarray(labels).resize(size, 0))


@pytest.mark.parametrize("patch", [4, 16])
def test_soft_masks_become_labels_as_in_the_script(patch):
    for seed in range(5):
        soft = noise(5, 7, 4, seed=seed).abs() ** 3
        soft[..., seed % 4] = 0  # an object that nobody passed on
        size = (7 * patch - 3, 5 * patch + 5)
        np.testing.assert_array_equal(hard_mask(soft, patch, size), script_mask(soft, patch, size))
    assert hard_mask(torch.zeros(2, 2, 3), patch, (9, 9)).max() == 0
    everywhere = torch.tensor([0.0, 1.0]).expand(2, 2, 2)
    assert hard_mask(everywhere, patch, (9, 9)).min() == 1
    # The script divides 0 by 0, and NaN is largest everywhere; here the background keeps the place of its maximum.
    share, size = torch.tensor([[[0.75, 0.25], [0.5, 0.25]]]), (2 * patch, patch)
    assert script_mask(share.clone(), patch, size).min() == 1
    assert hard_mask(share, patch, size)[0, [0, -1]].tolist() == [0, 1]


def test_labels_become_soft_masks_at_the_middle_of_tokens():
    labels = np.random.RandomState(0).randint(0, 4, (24, 40)).astype(np.uint8)
    soft = soft_mask(labels, 5, (6, 10))
    assert soft.shape == (6, 10, 6)
    np.testing.assert_array_equal(soft.argmax(dim=2).numpy(), labels[2::4, 2::4])
    assert soft.sum(dim=2).unique().tolist() == [1]


# The protocol --------------------------------------------------------------------------------------------------------

RED = 40  # of an object's number


class Oracle(torch.nn.Module):
    """Knows of every patch of 4 px which object is in its middle: frames are painted with their numbers."""

    architecture = Architecture(dim=6, depth=1, heads=1, patch_px=4, image_px=16, mlp_dim=0, mean=HALF, std=HALF)

    def forward(self, images, *, layers=(-1,), norm=True):
        numbers = ((images[:, 0, 2::4, 2::4] * 0.5 + 0.5) * 255 / RED).round().long()
        return Output((Tokens(None, F.one_hot(numbers, 6).float()),))


class Blind(Oracle):
    """Sees nothing but noise."""

    def forward(self, images, *, layers=(-1,), norm=True):
        shape = (len(images), images.shape[2] // 4, images.shape[3] // 4, 6)
        return Output((Tokens(None, noise(*shape, seed=int(images.sum().abs()))),))


def subject(root, network=None, **effort) -> Subject:
    network = network or Oracle()
    checkpoint = SimpleNamespace(
        backbone=network, architecture=network.architecture, name="fake", spec="fake.pt", format="fake"
    )
    dataset = root if not hasattr(root, "joinpath") else open_videos(str(root))
    return Subject(checkpoint, dataset, Effort(**effort))


def recipe(**changes):
    return dataclasses.replace(RECIPES["toy"], **changes)


def painted(root, *, index=1, frames=8, height=192, width=256, objects=2, name="moving"):
    """A sequence of the toy world with each object in the color of its number."""
    scenes = sequence(seed=0, index=index, frames=frames, height_px=height, width_px=width, objects=objects)
    for number, scene in enumerate(scenes):
        save_mask(root / "Annotations/480p" / name / f"{number:05d}.png", scene.instance_map)
        frame = root / "JPEGImages/480p" / name / f"{number:05d}.png"
        frame.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(RED * scene.instance_map[..., None], 3, axis=2)).save(frame)
    return root


STRIDE_4 = {"short_side_px": 192, "multiple_px": 64}


def test_an_oracle_reaches_the_bound_of_its_grid(tmp_path):
    """Also one that sees only noise, which does not."""
    root = painted(tmp_path)
    found = run(subject(root), recipe(**STRIDE_4)).metrics
    assert found["jf_mean"].value > 95
    assert abs(found["jf_mean"].value - found["grid_bound"].value) < 1
    assert found["jf_mean"].n == 2
    blind = run(subject(root, Blind()), recipe(**STRIDE_4)).metrics
    assert blind["jf_mean"].value < 60
    assert blind["grid_bound"] == found["grid_bound"]


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """A run over three videos, and everything that it wrote."""
    root = tmp_path_factory.mktemp("videos")
    painted(root, index=1, frames=6, height=48, width=64, objects=2, name="b")
    painted(root, index=2, frames=5, height=64, width=48, objects=3, name="a")
    painted(root, index=3, frames=2, height=48, width=64, objects=1, name="short")
    one = subject(root, Blind(), batch_size=3)
    return root, one, run(one, recipe(short_side_px=48, multiple_px=16, radius=3))


def test_scores_are_those_of_the_masks_that_were_written(tried):
    root, _, scores = tried
    j, f = [], []
    for name, frames, objects in (("a", 5, 3), ("b", 6, 2)):
        for number in range(1, objects + 1):
            values = []
            for frame in range(1, frames - 1):  # neither the first nor the last
                truth = np.array(Image.open(root / f"Annotations/480p/{name}/{frame:05d}.png"))
                found = np.array(Image.open(io.BytesIO(scores.files[f"masks/{name}/{frame:05d}.png"])))
                values.append(slow(truth == number, found == number))
            j.append([value for value, _ in values])
            f.append([value for _, value in values])
    for letter, measure in (("j", j), ("f", f)):
        means = [sum(values) / len(values) for values in measure]
        found = scores.metrics[f"{letter}_mean"]
        assert found.value == pytest.approx(100 * sum(means) / 5, abs=1e-9)  # over objects, not over videos
        assert found.stderr == pytest.approx(100 * np.std(means, ddof=1) / math.sqrt(5))
        recalls = [sum(value > 0.5 for value in values) / len(values) for values in measure]
        assert scores.metrics[f"{letter}_recall"].value == pytest.approx(100 * sum(recalls) / 5)
    both = (scores.metrics["j_mean"].value + scores.metrics["f_mean"].value) / 2
    assert scores.metrics["jf_mean"].value == pytest.approx(both)
    assert {score.n for score in scores.metrics.values()} == {5}
    assert scores.main == "jf_mean"
    detail = scores.details["videos"]["b"]["objects"][1]
    assert detail["j_mean"] == pytest.approx(100 * sum(j[4]) / 4, abs=1e-3)
    first, last = j[4][:2], j[4][2:]  # of four frames
    assert detail["j_decay"] == pytest.approx(100 * (sum(first) / 2 - sum(last) / 2), abs=1e-3)


def test_the_bound_is_that_of_masks_shrunk_and_enlarged(tried):
    root, _, scores = tried
    expected = []
    for frame in range(1, 5):
        truth = np.array(Image.open(root / f"Annotations/480p/b/{frame:05d}.png"))
        small = torch.from_numpy(truth[2::4, 2::4].astype(np.int64))
        shrunk = script_mask(F.one_hot(small, 3).float(), 4, (64, 48))
        expected.append([sum(slow(truth == number, shrunk == number)) / 2 for number in (1, 2)])
    found = [each["grid_bound"] for each in scores.details["videos"]["b"]["objects"]]
    assert found == pytest.approx((100 * np.mean(expected, axis=0)).tolist(), abs=1e-3)


def test_a_video_without_a_frame_between_first_and_last_is_followed_but_not_counted(tried):
    _, _, scores = tried
    assert scores.details["not_counted"] == ["short"]
    assert "1 of 3 videos have nothing to compare with" in scores.warnings[0]
    assert {"masks/short/00000.png", "masks/short/00001.png"} <= set(scores.files)
    assert scores.evaluated == {"val": 13}
    json.dumps(scores.details, allow_nan=False)


def test_files_are_what_the_official_evaluator_reads(tried):
    root, _, scores = tried
    assert sorted(name for name in scores.files if name.startswith("masks/a/")) == [
        f"masks/a/{frame:05d}.png" for frame in range(5)
    ]
    first = Image.open(io.BytesIO(scores.files["masks/a/00000.png"]))
    assert (first.mode, first.size) == ("P", (48, 64))
    assert np.reshape(first.getpalette(), (-1, 3))[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    np.testing.assert_array_equal(np.array(first), np.array(Image.open(root / "Annotations/480p/a/00000.png")))
    strip = Image.open(io.BytesIO(scores.files["overlays/b.png"]))
    assert (strip.mode, strip.size) == ("RGB", (4 * 320, 240))
    pixels = np.array(strip)
    assert (pixels == 255).all(axis=2).sum() > 100  # lines around what is true
    truth = np.array(Image.open(root / "Annotations/480p/b/00000.png"))
    inside = [(y, x) for y, x in np.argwhere(truth == 2) if (truth[y - 2 : y + 3, x - 2 : x + 3] == 2).all()]
    for y, x in inside:
        assert pixels[5 * y + 2, 5 * x + 2].tolist() == [RED, RED + 64, RED]  # halfway from its gray to green
    assert len(inside) > 10


def test_numbers_are_of_the_network_that_ran(tried):
    """The grid in rows and columns, and the precision that was asked for."""
    root, _, scores = tried
    assert {name: each["grid"] for name, each in scores.details["videos"].items()} == {
        "a": [16, 12],  # 48 x 64 px of frame, upright
        "b": [12, 16],
        "short": [12, 16],
    }
    seen = []

    class Multiplying(Oracle):
        def forward(self, images, *, layers=(-1,), norm=True):
            seen.append((images @ images.transpose(2, 3)).dtype)
            return super().forward(images)

    row = recipe(short_side_px=48, multiple_px=16)
    for dtype in ("bf16", "fp32"):
        one = subject(root, Multiplying(), dtype=dtype, batch_size=99)
        list(davis._tokens(one, row, "val", one.dataset.videos["val"]))
    assert seen == [torch.bfloat16] * 3 + [torch.float32] * 3  # a batch a video


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9, 10, 12])
def test_a_short_video_needs_fewer_places_and_loses_no_source(length):
    rule = recipe(radius=2).rule(length)
    assert rule == Rule(min(7, max(length - 2, 0)), 2, 5, 0.1)
    tokens, first = [noise(4, 5, 3, seed=k) for k in range(length)], noise(4, 5, 2).abs()
    found, expected = (list(propagated(iter(tokens), first, each)) for each in (rule, Rule(7, 2, 5, 0.1)))
    assert len(found) == length - 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_batches_change_nothing(tried):
    root, _, scores = tried
    again = run(subject(root, Oracle(), batch_size=1), recipe(short_side_px=48, multiple_px=16))
    assert run(subject(root, Oracle(), batch_size=4), recipe(short_side_px=48, multiple_px=16)).files == again.files
    assert again.files != scores.files


def test_masks_of_the_first_frame_alone_are_followed_for_an_evaluation_server(tmp_path):
    painted(tmp_path, frames=3, height=48, width=64, name="a")
    for frame in (1, 2):
        (tmp_path / f"Annotations/480p/a/{frame:05d}.png").unlink()
    add_list(tmp_path, "2017/test-dev.txt", "a")
    scores = run(subject(tmp_path), recipe(short_side_px=48, multiple_px=16))
    assert (scores.main, scores.metrics["frames_followed"].value) == ("frames_followed", 3)
    assert scores.evaluated == {"test-dev": 3}
    assert set(scores.files) == {f"masks/a/{k:05d}.png" for k in range(3)} | {"overlays/a.png"}


def test_objects_that_appear_vanish_or_are_too_small(tmp_path):
    """Nothing is dropped in silence. Object 2 is not in the first mask, and 4 appears later."""
    masks = [mask_of(1, 3), mask_of(1, 3, 2, 4), mask_of(0, 3), mask_of(1, 3)]
    masks = [np.kron(mask, np.ones((8, 8), np.uint8)) for mask in masks]
    masks[0][0, 40] = 4  # one pixel
    add_video(tmp_path, "a", masks, size=(64, 48))
    masks[0][0, 40] = 0
    add_video(tmp_path, "b", masks, size=(64, 48))
    scores = run(subject(tmp_path, Blind()), recipe(short_side_px=48, multiple_px=16))
    a, b = (scores.details["videos"][name] for name in "ab")
    assert (a["numbers_that_the_first_mask_lacks"], a["objects_that_appear_later"]) == ([2], [])
    assert a["objects_without_a_token_in_the_first_frame"] == [4]
    assert (b["numbers_that_the_first_mask_lacks"], b["objects_that_appear_later"]) == ([2], [4])
    assert b["objects_without_a_token_in_the_first_frame"] == []
    assert [len(each["objects"]) for each in (a, b)] == [4, 3]
    # Never found: 0 where it is there (frame 1), and 1 where it is not (frame 2).
    assert [each["j_mean"] for each in (a["objects"][1], a["objects"][3], b["objects"][1])] == [50, 50, 50]
    (warning,) = scores.warnings
    assert "1 of 7 objects cover the middle of no token" in warning
    assert "2 of 7 objects are numbers that the first mask lacks, and each counts 100 where it is absent" in warning
    assert "1 more appear later, and count as background" in warning


@pytest.mark.parametrize("drawn", [0, 8])
def test_what_is_told_does_not_depend_on_pictures(drawn, tmp_path, monkeypatch):
    """An object that appears in the last frame alone, of a video that is scored and of one that is too short."""
    monkeypatch.setattr(davis, "OVERLAYS", drawn)
    large = [np.kron(mask_of(*numbers), np.ones((8, 8), np.uint8)) for numbers in ((1,), (1,), (1, 2))]
    add_video(tmp_path, "long", large, size=(64, 48))
    add_video(tmp_path, "short", large[1:], size=(64, 48))
    scores = run(subject(tmp_path), recipe(short_side_px=48, multiple_px=16))
    late = [scores.details["videos"][name]["objects_that_appear_later"] for name in ("long", "short")]
    assert late == [[2], [2]]
    assert any("2 more appear later" in warning for warning in scores.warnings)
    assert sum(name.startswith("overlays") for name in scores.files) == min(drawn, 2)
    assert scores.metrics["jf_mean"].n == 1


def test_void_and_merged_objects_are_told(tmp_path, monkeypatch):
    for name, masks in {"two": [(1, 2), (1, 2), (2,), (1,)], "one": [(1,), (1,), (255,), (1,)]}.items():
        large = [np.kron(mask_of(*numbers), np.ones((8, 8), np.uint8)) for numbers in masks]
        add_video(tmp_path / "davis-2017", name, large, size=(64, 48))
    for year in ("2016", "2017"):
        add_list(tmp_path / "davis-2017", f"{year}/val.txt", "two", "one")
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    row = recipe(short_side_px=48, multiple_px=16)
    void, merged = run(subject(open_videos("davis-2016")), row).warnings
    assert "1 masks show nothing but 255" in void
    assert "(one/00002)" in void
    assert "1 of 2 videos have several objects, taken as one" in merged
    assert run(subject(open_videos("davis-2017")), row).warnings == (void,)


# What the network sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),  # by hand, from the script's read_frame
    [((854, 480), (832, 480)), ((1920, 1080), (832, 480)), ((480, 854), (480, 832)), ((500, 500), (448, 480))],
)
def test_sizes_are_those_of_the_script(size, expected):
    assert RECIPES["dino"].grid_px(*size) == expected


def test_frames_are_resized_without_antialiasing():
    rng = np.random.RandomState(0)
    image = rng.randint(0, 256, (54, 96, 3)).astype(np.uint8)
    found = davis._View(recipe(short_side_px=24, multiple_px=8)).pixels(Image.fromarray(image))
    assert (found.shape, found.dtype) == ((3, 24, 40), np.uint8)
    for row, column in ((0, 0), (5, 7), (23, 39), (11, 20)):
        y, x = (row + 0.5) * 54 / 24 - 0.5, (column + 0.5) * 96 / 40 - 0.5
        y, x = min(max(y, 0), 53), min(max(x, 0), 95)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 53), min(left + 1, 95)
        v, u = y - top, x - left
        upper = (1 - u) * image[top, left].astype(float) + u * image[top, right]
        lower = (1 - u) * image[bottom, left].astype(float) + u * image[bottom, right]
        np.testing.assert_allclose(found[:, row, column], (1 - v) * upper + v * lower, atol=0.51)
    cv2 = pytest.importorskip("cv2")
    theirs = cv2.resize(image, (40, 24)).transpose(2, 0, 1)
    assert np.abs(theirs.astype(int) - found.astype(int)).max() <= 1


def test_tokens_are_the_last_blocks_after_the_final_norm(tmp_path):
    """Of a real network: pixels normalized with .228, positions resized as DINO does it, and no class token."""
    painted(tmp_path, frames=3, height=48, width=64, name="a")
    network = tiny_backbone()
    network.architecture = dataclasses.replace(network.architecture, position_resize="bicubic")
    patch = network.architecture.patch_px
    one = subject(tmp_path, network)
    row = dataclasses.replace(RECIPES["dino"], short_side_px=6 * patch, multiple_px=2 * patch)
    with davis._positions_resized(one, row):
        found = torch.stack(list(davis._tokens(one, row, "val", one.dataset.videos["val"])))
    assert network.architecture.position_resize == "bicubic"
    images = []
    for frame in range(3):
        pixels = davis._View(row).pixels(one.split("val").image(frame)).astype(np.float32) / 255
        mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.228, 0.224, 0.225])
        images.append(torch.from_numpy((pixels - mean[:, None, None]) / std[:, None, None]))
    network.architecture = dataclasses.replace(network.architecture, position_resize="dino")
    with torch.no_grad():
        expected = network.vit.norm(network(torch.stack(images), norm=False).tokens[0].patches)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.shape[1:3] == (6, 8)


def test_a_network_with_other_pixels_keeps_its_own(tmp_path):
    add_video(tmp_path, "a", [mask_of(1)] * 3)
    assert davis._normalization(subject(tmp_path), RECIPES["dino"]) == (HALF, HALF)
    usual = subject(tmp_path, tiny_backbone())
    assert davis._normalization(usual, RECIPES["dino"])[1] == (0.228, 0.224, 0.225)
    assert davis._normalization(usual, RECIPES["toy"])[1] == (0.229, 0.224, 0.225)


# What the script writes (its defaults), typed again.
def test_recipes_are_what_their_sources_say():
    assert list(RECIPES) == ["dino", "toy"]
    row = RECIPES["dino"]
    assert (row.short_side_px, row.multiple_px) == (480, 64)  # scale_size=[480]; // 64 * 64
    assert (row.frames, row.radius, row.topk) == (7, 12, 5)  # n_last_frames, size_mask_neighborhood, topk
    assert row.temperature == 0.1  # torch.exp(... / 0.1)
    assert (row.norm, row.normalization, row.position_resize) == (True, "dino", "dino")
    for figure in ("62.3 / 60.7 / 63.9", "63.8 / 61.8 / 65.6", "DINO 57.7, iBOT 59.7, MMC 60.3"):  # MMC, Table 2
        assert figure in row.published
    toy = RECIPES["toy"]
    assert (toy.short_side_px, toy.multiple_px, toy.frames, toy.radius, toy.topk) == (144, 48, 7, 6, 5)
    assert (toy.temperature, toy.norm, toy.normalization, toy.position_resize) == (0.1, True, "own", "own")
    assert {row.selected_on for row in RECIPES.values()} == {"none"}


@pytest.mark.parametrize(
    "change",
    [
        {"short_side_px": 0},
        {"multiple_px": 0},
        {"multiple_px": 999},
        {"frames": -1},
        {"radius": 0},
        {"topk": 0},
        {"temperature": 0.0},
    ],
)
def test_impossible_recipes_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        recipe(**change)


def test_what_cannot_be_run_is_refused_before_an_image_is_read(tmp_path):
    root = add_video(tmp_path, "a", [mask_of(1)] * 3)
    row = recipe(short_side_px=8, multiple_px=4)
    davis.check(subject(root), row)
    assert davis.readings(subject(root), row) == {}
    with pytest.raises(UserError, match=r"multiple_px=6 does not divide into patches of 4 px.*--set multiple_px=4"):
        davis.check(subject(root), recipe(short_side_px=8, multiple_px=6))
    with pytest.raises(UserError, match=r"short_side_px=10 .*--set short_side_px=8"):
        davis.check(subject(root), recipe(short_side_px=10, multiple_px=4))
    with pytest.raises(UserError, match="--skip-broken"):
        davis.check(subject(root, skip_broken=True), row)
    network = Oracle()
    network.architecture = dataclasses.replace(network.architecture, final_norm=False)
    with pytest.raises(UserError, match=r"final norm.*norm=false"):
        davis.check(subject(root, network), row)
    Image.new("RGB", (9, 6)).save(root / "JPEGImages/480p/a/00001.jpg")
    with pytest.raises(UserError, match=r"00001.jpg has 9 x 6 px"):
        davis.check(subject(root), row)
    save_mask(add_video(tmp_path / "b", "a", [mask_of(1)] * 3) / "Annotations/480p/a/00000.png", mask_of())
    with pytest.raises(UserError, match="shows no object"):
        davis.check(subject(tmp_path / "b"), row)
    add_list(add_video(tmp_path / "c", "a", [mask_of(1)] * 3), "2017/train.txt", "a")
    with pytest.raises(UserError, match="no val split"):
        davis.check(subject(tmp_path / "c"), row)


def test_broken_frames_and_tokens_that_are_not_finite_are_refused(tmp_path):
    root = painted(tmp_path, frames=3, height=48, width=64)

    class Broken(Oracle):
        def forward(self, images, *, layers=(-1,), norm=True):
            return Output((Tokens(None, super().forward(images).tokens[0].patches * math.nan),))

    with pytest.raises(UserError, match=r"tokens of fake are not finite, of moving/00000"):
        run(subject(root, Broken()), recipe(short_side_px=48, multiple_px=16))
    path = root / "JPEGImages/480p/moving/00001.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"moving/00001.png") as error:
        run(subject(root), recipe(short_side_px=48, multiple_px=16))
    assert "--skip-broken" not in str(error.value)


def test_a_run_from_checkpoint_to_record(tmp_path):
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    patch = tiny_backbone().architecture.patch_px
    small = {"short_side_px": str(4 * patch), "multiple_px": str(patch), "radius": "2", "frames": "1"}
    (record,) = ssl_bench.run(tmp_path / "tiny.pt", "davis", dataset="toy-davis", settings=small, limit=1)
    assert (record.recipe, record.dataset, record.main_metric) == ("toy", "toy-davis", "jf_mean")
    assert record.n_samples.evaluated == {"train": 0, "val": 24}
    assert record.scores["jf_mean"].n == 3
    assert record.overrides["radius"] == 2
    root = painted(tmp_path / "mine", frames=3, height=48, width=64)
    (record,) = ssl_bench.run(tmp_path / "tiny.pt", "davis/dino", dataset=str(root), settings=small)
    assert record.scores["j_recall"].n == 2
    with pytest.raises(UserError, match="is no dataset of annotated videos"):
        ssl_bench.run(tmp_path / "tiny.pt", "davis", dataset="toy")
