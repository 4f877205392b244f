"""Variances over views against plain loops: one view at a time, in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_architecture, tiny_backbone
from PIL import Image

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.evaluate.backbone import build
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.training import augment
from ssl_bench.evaluate.training.blockwise import Corruption, draw_corruption
from ssl_bench.protocols import stability
from ssl_bench.protocols.stability import RECIPES, Spread, chosen_images, mean_over_images

SMALL = {"resize_px": "16", "crop_px": "16", "views": "7"}


def stable(path, folder, name="mmc", **options):
    """The record of a small run."""
    settings = SMALL | options.pop("settings", {})
    (record,) = ssl_bench.run(path, f"stability/{name}", dataset=str(folder), settings=settings, **options)
    return record


@pytest.fixture
def tiny(tmp_path):
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    return tmp_path / "tiny.pt"


def tokens_by_hand(folder, *, norm, seed=0, views=7, scale=(0.25, 1.0)):
    """Class tokens of crops (images, V, D) and patch tokens of covered views (images, V, H, W, D), in float64."""
    backbone = copy.deepcopy(tiny_backbone()).double()
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (tiny_architecture().mean, tiny_architecture().std))
    table = Corruption().table.double()
    crop = augment.View(scale, "bicubic", flip_p=0.0)
    of_crops, of_covered, shares = [], [], []
    for index, path in enumerate(sorted((folder / "val").rglob("*.png"))):
        image = Image.open(path).convert("RGB")
        rng, classes = np.random.default_rng((seed, index, 1)), []
        for _ in range(views):
            (pixels,) = augment.draw_views(image, (crop,), image_px=16, patch_px=8, rng=rng)
            with torch.no_grad():
                tokens = backbone(((torch.from_numpy(pixels) / 255 - mean) / std)[None], norm=norm).tokens[0]
            classes.append(tokens.cls[0].numpy())
        clean = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        rng, patches = np.random.default_rng((seed, index, 2)), []
        for _ in range(views):
            covered, start = draw_corruption(
                rng, 16, noise_area=0.5, alien_area=0.5, alien_share=0.0, block=0.3, align=1
            )
            seen = clean.clone()
            for c, y, x in np.ndindex(3, 16, 16):
                if covered[y, x]:
                    seen[c, y, x] = table[start + c * 256 + y * 16 + x]
            shares.append(covered.mean())
            with torch.no_grad():
                patches.append(backbone(seen[None], norm=norm).tokens[0].patches[0].numpy())
        of_crops.append(classes)
        of_covered.append(patches)
    return np.array(of_crops), np.array(of_covered), 100 * np.mean(shares)


def variance(values):
    """Unbiased."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def slow(tokens):
    """Of (images, V, ..., D): mean within images, its standard error, and the mean between images."""
    flat = tokens.reshape(*tokens.shape[:2], -1)
    count, views, numbers = flat.shape
    within = [
        sum(variance([flat[i, v, d] for v in range(views)]) for d in range(numbers)) / numbers for i in range(count)
    ]
    between = (
        sum(variance([sum(flat[i, :, d].tolist()) / views for i in range(count)]) for d in range(numbers)) / numbers
    )
    return sum(within) / count, math.sqrt(variance(within) / count), between


@pytest.mark.parametrize("norm", [True, False])
def test_variances_are_those_of_a_plain_loop(tiny, image_folder, norm):
    folder = image_folder(train=1, val=2, classes=tuple("abc"))
    record = stable(tiny, folder, "mmc" if norm else "mmc-raw", seed=3)
    *tokens, share = tokens_by_hand(folder, norm=norm, seed=3)
    for name, found in zip(("cls", "patch"), tokens, strict=True):
        within, error, between = slow(found)
        score = record.scores[f"{name}_variance"]
        assert (score.value, score.stderr) == (pytest.approx(within, rel=1e-4), pytest.approx(error, rel=1e-3))
        assert score.n == 6
        assert record.scores[f"{name}_variance_ratio"].value == pytest.approx(within / between, rel=1e-4)
        assert record.details["variance_between_images"][name] == pytest.approx(between, rel=1e-4)
    assert record.main_metric == "cls_variance"
    assert record.selected_on == "none"
    assert record.details["covered_percent"] == pytest.approx(share)
    about = {"images": 6, "of_images": 6, "views": 7, "seed": 3}
    assert about.items() <= record.details.items()


def test_the_area_of_crops_is_the_recipes(tiny, image_folder):
    folder = image_folder(train=1, val=1, classes=("a", "b"))
    record = stable(tiny, folder, "default-crop")
    found, _, _ = tokens_by_hand(folder, norm=True, scale=(0.08, 1.0))
    assert record.scores["cls_variance"].value == pytest.approx(slow(found)[0], rel=1e-4)


def test_batches_and_workers_change_nothing(tiny, image_folder):
    folder = image_folder(train=1, val=2)
    whole = stable(tiny, folder)
    for effort in ({"batch_size": 1}, {"batch_size": 3}, {"workers": 1}):
        other = stable(tiny, folder, overwrite="always", **effort)
        assert other.scores.keys() == whole.scores.keys()
        for name, score in whole.scores.items():
            assert other.scores[name].value == pytest.approx(score.value, rel=1e-4)
    assert stable(tiny, folder, seed=1).main_score.value != pytest.approx(whole.main_score.value, rel=1e-3)


def test_processes_are_started_where_they_are_worth_it(monkeypatch):
    started = []
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda *_, **given: (started.append(given["num_workers"]), [])[1]
    )
    monkeypatch.setattr(stability, "automatic_workers", lambda world: 7 * world)
    views = SimpleNamespace(recipe=RECIPES["mmc"])
    for images, workers in ((127, None), (128, None), (1, 3), (1000, 0)):
        list(stability._drawn(views, list(range(images)), SimpleNamespace(effort=SimpleNamespace(workers=workers))))
    assert started == [0, 7, 3, 0]


def test_views_are_cut_into_even_batches(tiny):
    made = object.__new__(stability._LastBlock)
    for views, batch in ((128, 113), (128, 4096), (7, 1), (7, 3), (5, 5)):
        made.batch = batch
        sizes = [len(range(views)[piece]) for piece in made._pieces(views)]
        assert sum(sizes) == views
        assert max(sizes) <= batch
        assert max(sizes) - min(sizes) <= len(sizes)


def test_the_first_views_do_not_depend_on_how_many_there_are(tiny_checkpoint):
    split = SimpleNamespace(
        image=lambda _: Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 50, 3), np.uint8))
    )
    subject = SimpleNamespace(seed=0, view=lambda *_: stability.View(32, 32))
    few, many = (
        stability._Views(split, subject, dataclasses.replace(RECIPES["mmc"], views=n), crops=True)[4] for n in (3, 9)
    )
    assert many.crops.shape == (9, 3, 32, 32)
    assert np.array_equal(few.crops, many.crops[:3])
    assert np.array_equal(few.maps, many.maps[:3])
    assert np.array_equal(few.noise_at, many.noise_at[:3])
    assert np.array_equal(few.center, many.center)
    assert len({crop.tobytes() for crop in many.crops}) == len({mask.tobytes() for mask in many.maps}) == 9


def test_about_half_of_the_pixels_are_covered_at_224_px():
    split = SimpleNamespace(image=lambda _: Image.new("RGB", (300, 260)))
    subject = SimpleNamespace(seed=0, view=lambda *_: stability.View(256, 224))
    drawn = stability._Views(split, subject, RECIPES["mmc"], crops=False)[0]
    assert len(drawn.crops) == 0  # for a network without a class token
    maps = drawn.maps
    assert maps.shape == (128, 224, 224)
    assert set(np.unique(maps)) == {0, 1}
    shares = maps.mean(axis=(1, 2))
    assert shares.min() >= 0.5
    assert shares.max() < 0.59  # a block of 67 x 67 is 9 %
    assert 0.5 < shares.mean() < 0.54
    everywhere = maps.mean(axis=0)
    assert everywhere[20:-20, 20:-20].min() > 0.15  # no place is spared; GMML's corners leave more of the upper left


def test_a_network_that_ignores_its_input_is_perfectly_steady(tmp_path, image_folder):
    backbone = tiny_backbone()
    torch.nn.init.zeros_(backbone.vit.patch_embed.proj.weight)
    save_checkpoint(tmp_path / "blind.pt", backbone)
    record = stable(tmp_path / "blind.pt", image_folder(train=1, val=2))
    assert set(record.scores) == {"cls_variance", "patch_variance"}
    assert all(0 <= score.value < 1e-10 for score in record.scores.values())
    assert "patch tokens do not differ between images, so there is no patch_variance_ratio" in record.warnings
    assert len(record.warnings) == 2


def test_the_ratio_knows_no_scale(tmp_path, tiny, image_folder):
    backbone = tiny_backbone()
    with torch.no_grad():
        for parameter in backbone.vit.norm.parameters():
            parameter.mul_(3)
    save_checkpoint(tmp_path / "scaled.pt", backbone)
    folder = image_folder(train=1, val=2)
    plain, scaled = (stable(path, folder).scores for path in (tiny, tmp_path / "scaled.pt"))
    for name in ("cls", "patch"):
        assert scaled[f"{name}_variance"].value == pytest.approx(9 * plain[f"{name}_variance"].value, rel=1e-4)
        ratio = f"{name}_variance_ratio"
        assert scaled[ratio].value == pytest.approx(plain[ratio].value, rel=1e-4)


@pytest.mark.parametrize("change", [{"cls": False}, {"cls": False, "class_attention_blocks": 1}])
def test_networks_whose_trunk_has_no_class_token(tmp_path, image_folder, change):
    save_checkpoint(tmp_path / "other.pt", build(dataclasses.replace(tiny_architecture(), **change)).eval())
    record = stable(tmp_path / "other.pt", image_folder(train=1, val=2))
    with_cls = "class_attention_blocks" in change
    assert record.main_metric == ("cls_variance" if with_cls else "patch_variance")
    assert ("cls_variance" in record.scores) == with_cls


def test_pixels_are_measured_at_their_stored_size():
    settings = {"images": "3", "views": "4"}
    (record,) = ssl_bench.run("pixels:", "stability/toy", dataset="digits", settings=settings)
    assert record.details["images"] == 3
    assert record.details["of_images"] == 359
    assert record.scores["patch_variance"].value > 0.1
    with pytest.raises(UserError, match=r"block=0\.1 of 8 px is 0 px"):
        ssl_bench.run("pixels:", "stability/toy", dataset="digits", settings={"block": "0.1"})


def test_images_are_drawn_by_the_seed():
    assert chosen_images(10, None, 0) == chosen_images(10, 10, 0) == chosen_images(10, 99, 0) == list(range(10))
    few = chosen_images(100, 30, 0)
    assert few == sorted(set(few))
    assert len(few) == 30
    assert few == chosen_images(100, 30, 0) != chosen_images(100, 30, 1)
    assert max(few) > 60  # not the first ones


def test_a_few_images_are_measured(tiny, image_folder):
    folder = image_folder(train=1, val=6)
    record = stable(tiny, folder, settings={"images": "4"}, seed=2)
    kept = chosen_images(12, 4, 2)
    crops, patches, _ = tokens_by_hand(folder, norm=True, seed=2)
    assert record.scores["cls_variance"].value == pytest.approx(slow(crops[kept])[0], rel=1e-4)
    assert record.scores["patch_variance"].value == pytest.approx(slow(patches[kept])[0], rel=1e-4)
    assert (record.details["images"], record.details["of_images"]) == (4, 12)


def test_one_image_has_no_error_and_no_ratio(tiny, image_folder):
    record = stable(tiny, image_folder(train=1, val=2), limit=1)
    assert record.main_score.n == 1
    assert record.main_score.stderr is None
    assert set(record.scores) == {"cls_variance", "patch_variance"}
    assert "cls tokens of one image only were read, so there is no cls_variance_ratio" in record.warnings


def test_broken_images_are_refused_or_left_out(tiny, image_folder):
    folder = image_folder(train=1, val=2)
    (folder / "val" / "a" / "0001.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0001\.png.*--skip-broken"):
        stable(tiny, folder)
    record = stable(tiny, folder, skip_broken=True)
    assert record.main_score.n == 3
    assert record.skipped_broken == {"train": 0, "val": 1}
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="not one of 4 val images could be read"):
        stable(tiny, folder, skip_broken=True)


def test_tokens_that_are_not_finite_are_refused(tmp_path, image_folder):
    backbone = tiny_backbone()
    backbone.vit.norm.bias.data[0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", backbone)
    with pytest.raises(UserError, match="cls tokens of nan are not finite"):
        stable(tmp_path / "nan.pt", image_folder(train=1, val=1))


def test_a_network_without_a_final_norm_is_told_the_row_that_fits(tmp_path, image_folder):
    save_checkpoint(tmp_path / "bare.pt", build(dataclasses.replace(tiny_architecture(), final_norm=False)).eval())
    folder = image_folder(train=1, val=1)
    with pytest.raises(UserError, match=r"no final norm.* Try stability/mmc-raw\."):
        stable(tmp_path / "bare.pt", folder)
    assert stable(tmp_path / "bare.pt", folder, "mmc-raw").main_metric == "cls_variance"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"images": "1"}, "images=1: expected at least 2"),
        ({"views": "1"}, "views=1: expected at least 2"),
        ({"crop_scale": "0.5"}, r"crop_scale=0\.5: expected two shares"),
        ({"crop_scale": "0.5,0.2"}, r"crop_scale=0\.5,0\.2: expected two shares"),
        ({"crop_scale": "0,1"}, r"crop_scale=0,1: expected two shares"),
        ({"crop_scale": "0.5,1.1"}, r"crop_scale=0\.5,1\.1: expected two shares"),
        ({"covered_percent": "0"}, "covered_percent=0: expected more than 0, at most 50"),
        ({"covered_percent": "75"}, "covered_percent=75: expected more than 0, at most 50"),
        ({"block": "0"}, r"block=0: expected a share in \(0, 1\]"),
        ({"block": "1.5"}, r"block=1\.5: expected a share in \(0, 1\]"),
        ({"align": "3"}, "align=3: expected a divisor"),
        ({"align": "8"}, "less than the smallest block, align=8"),
    ],
)
def test_impossible_settings_are_refused(tiny, image_folder, settings, said, monkeypatch):
    monkeypatch.setattr(stability, "_drawn", None)
    with pytest.raises(UserError, match=said):
        stable(tiny, image_folder(train=1, val=1), settings=settings)


def test_spread_by_hand():
    spread = Spread()
    assert spread.between() is None
    spread.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))  # variances 2 and 0, means 1 and 1
    assert spread.between() is None
    spread.add(torch.tensor([[5.0, 2.0], [5.0, 6.0]]))  # variances 0 and 8, means 5 and 4
    assert spread.within == [1.0, 4.0]
    assert spread.between() == pytest.approx((8 + 4.5) / 2)
    score = mean_over_images(spread.within)
    assert (score.value, score.stderr) == (2.5, pytest.approx(math.sqrt(4.5 / 2)))


# Table 10 and its text, typed again; what the text leaves open is in the docstring of the protocol.
@pytest.mark.parametrize(
    ("name", "images", "scale", "norm"),
    [
        ("mmc", 1000, (0.25, 1.0), True),
        ("mmc-all", None, (0.25, 1.0), True),
        ("mmc-raw", 1000, (0.25, 1.0), False),
        ("mmc-raw-all", None, (0.25, 1.0), False),
        ("default-crop", 1000, (0.08, 1.0), True),
        ("toy", 64, (0.25, 1.0), True),
    ],
)
def test_recipes_are_what_the_paper_says(name, images, scale, norm):
    row = RECIPES[name]
    assert (row.views, row.covered_percent) == (128, 50)
    assert (row.images, row.crop_scale, row.norm) == (images, scale, norm)
    assert (row.block, row.align) == (0.3, 1)
    assert (row.resize_px, row.crop_px, row.interpolation) == (256, 224, "bicubic")
    if name != "toy":
        assert "Table 10" in row.source
        assert all(number in row.published for number in (".19", ".32", ".43", "1.00", ".33", ".75", ".34", ".56"))
    assert next(iter(RECIPES)) == "mmc"
    assert len(RECIPES) == 6
