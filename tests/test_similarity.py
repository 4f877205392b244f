"""Distributions of similarities against plain loops over pairs of tokens."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_coco import annotation, write
from test_object_masks import run_lengths
from test_patch_views import scenes, subject, token_image
from test_zeroshot import Oracle

from ssl_bench.errors import UserError
from ssl_bench.evaluate import patch_pairs
from ssl_bench.evaluate.object_masks import IGNORE, open_objects
from ssl_bench.evaluate.patch_pairs import count_pairs, densities, overlap
from ssl_bench.protocols import similarity
from ssl_bench.protocols.patch_views import Read, token_images
from ssl_bench.protocols.similarity import RECIPES, categories_of, ratio, run

TOY = RECIPES["toy"]
OUT, NONE = -2, -1  # in no pair; the background


def recipe(**changes):
    return dataclasses.replace(TOY, **{"image_px": 24, "interpolation": "bilinear"} | changes)


def looped(features, category, background, bins):
    """Pair by pair: counts and lists of the cosines, of inter and intra."""
    counts, values = np.zeros((2, bins), int), ([], [])
    for i, j in itertools.combinations(range(len(category)), 2):
        a, b = category[i], category[j]
        if OUT in (a, b) or (background == "other" and a == b == NONE):
            continue
        cosine = float(features[i].double() @ features[j].double())
        place = min(max(math.floor((cosine + 1) * bins / 2), 0), bins - 1)
        counts[int(a == b), place] += 1
        values[int(a == b)].append(cosine)
    return counts, values


def on_a_lattice(n, seed=0):
    """Vectors whose products are exact in float32, so that every pair has its bin whatever the order of summation."""
    return torch.from_numpy(np.random.RandomState(seed).randint(-3, 4, (n, 6)) / 8).float()


@pytest.mark.parametrize("background", ["out", "in", "other"])
@pytest.mark.parametrize("bins", [2, 7, 200])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_pairs_are_those_of_the_loop(background, bins, rows, monkeypatch):
    monkeypatch.setattr(patch_pairs, "_ROWS", rows)
    rng = np.random.RandomState(1)
    features, category = on_a_lattice(43), rng.choice([OUT, NONE, 0, 1, 2], 43)
    category[category == NONE] = OUT if background == "out" else NONE
    found = count_pairs(features, category, background=background, bins=bins)
    counts, values = looped(features, category, background, bins)
    assert np.array_equal(found.counts, counts)
    assert found.sums == pytest.approx([sum(each) for each in values], abs=1e-9)


def test_tokens_alike_are_in_the_last_bin_and_no_token_is_paired_with_itself():
    features = torch.nn.functional.normalize(torch.ones(3, 7), dim=1)
    found = count_pairs(features, np.array([0, 0, 1]), background="out", bins=10)
    assert found.counts[:, -1].tolist() == [2, 1]
    assert found.counts.sum() == 3
    opposite = torch.tensor([[1.0, 0], [-1.0, 0]])
    assert count_pairs(opposite, np.array([0, 1]), background="out", bins=10).counts[0, 0] == 1
    nothing = count_pairs(features, np.array([OUT, OUT, OUT]), background="out", bins=10)
    assert (nothing.counts.sum(), nothing.sums.tolist()) == (0, [0, 0])


def test_no_more_than_some_rows_of_the_matrix_at_a_time(monkeypatch):
    shapes = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: shapes.append((len(a), b.shape[1])) or product(a, b))
    count_pairs(on_a_lattice(1300), np.zeros(1300, int), background="out", bins=10)
    assert shapes == [(512, 1300), (512, 788), (276, 276)]


def test_tokens_of_two_objects_of_one_category_are_of_the_same_category():
    numbers = [[1, 2, 3], [0, 0, 0], [IGNORE, IGNORE, 1]]
    image = token_image(numbers, (7, 8, 9), (4, 1, 4), 3)
    expected = [4, 1, 4, NONE, NONE, NONE, OUT, OUT, 4]
    assert categories_of(image, "in").tolist() == categories_of(image, "other").tolist() == expected
    assert categories_of(image, "out").tolist() == [OUT if each == NONE else each for each in expected]


def test_a_token_of_two_sheep_is_sheep():
    image = token_image([[1, 2, 0], [1, 2, 0], [1, 0, 0]] * 1, (8, 9), (4, 4), 1, by_class=True)
    assert categories_of(image, "out").tolist() == [4]
    assert categories_of(dataclasses.replace(image, categories=(4, 5)), "in").tolist() == [NONE]


def test_densities_have_an_area_of_one():
    edges, found = densities(np.array([[1, 3, 0, 0], [0, 0, 5, 5]]))
    assert edges.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert found.tolist() == [[0.5, 1.5, 0, 0], [0, 0, 1, 1]]


def test_the_overlap_is_the_integral_of_the_smaller_density():
    counts = np.array([[0, 4, 4, 0], [1, 1, 0, 0]])
    assert overlap(counts) == pytest.approx(0.5)
    assert overlap(np.array([[3, 0], [0, 5]])) == 0
    assert overlap(np.array([[3, 9], [100, 300]])) == 1
    rng = np.random.RandomState(0)  # two normal distributions whose means are two deviations apart
    drawn = [np.histogram(rng.randn(10**6) * 0.1 + shift, 200, (-1, 1))[0] for shift in (0.0, 0.2)]
    assert overlap(np.array(drawn)) == pytest.approx(math.erfc(1 / math.sqrt(2)), abs=0.003)


def test_the_mean_over_pairs_and_its_error_over_images():
    rng = np.random.RandomState(0)
    counts = rng.randint(0, 30, 300)
    sums = counts * 0.3 + rng.randn(300) * counts**0.5
    sums[counts == 0] = 0
    found = ratio(sums, counts)
    assert (found.value, found.n) == (pytest.approx(sums.sum() / counts.sum()), (counts > 0).sum())
    there = np.flatnonzero(counts)
    left_out = [(sums.sum() - sums[k]) / (counts.sum() - counts[k]) for k in there]  # jackknife
    assert found.stderr == pytest.approx(math.sqrt((len(there) - 1) * np.var(left_out)), rel=0.02)
    assert ratio(np.array([3.0, 0]), np.array([10, 0])).stderr is None


@pytest.mark.parametrize("background", ["out", "in", "other"])
def test_scores_are_those_of_all_pairs_of_all_images(background, tmp_path):
    one, settings = subject(scenes(tmp_path)), recipe(background=background, bins=50)
    counts, values = np.zeros((2, 50), int), [[], []]
    for image in token_images(one, settings, Read()):
        names = {None: OUT, len(image.ids): OUT if background == "out" else NONE, len(image.ids) + 1: OUT}
        category = [names[k] if k in names else image.categories[k] for k in image.label.tolist()]
        more, cosines = looped(image.features, category, background, 50)
        counts += more
        for kind, each in zip(values, cosines, strict=True):
            kind.extend(each)
    scores = run(one, settings)
    found = np.array([scores.details["counts"][name] for name in ("inter", "intra")])
    assert scores.details["pairs"] == {"inter": len(values[0]), "intra": len(values[1])}
    assert np.abs(found - counts).sum() <= 4  # in float32 a cosine may lie beyond the edge of its bin
    assert found.sum(axis=1).tolist() == counts.sum(axis=1).tolist()
    assert scores.metrics["inter_mean_cosine"].value == pytest.approx(np.mean(values[0]), abs=1e-6)
    assert scores.metrics["intra_mean_cosine"].value == pytest.approx(np.mean(values[1]), abs=1e-6)
    densities = found / found.sum(axis=1, keepdims=True)
    assert scores.metrics["overlap_area"].value == pytest.approx(np.minimum(*densities).sum())
    assert (scores.main, scores.lower_is_better) == ("overlap_area", True)
    assert (scores.evaluated, scores.skipped) == ({"val": 6}, {"val": 0})
    with_pairs = 6 if background == "in" else 5  # one image has no objects
    assert scores.metrics["overlap_area"].n == with_pairs
    counted = {"images": 6, "images_without_objects": 1, "objects": 20, "crowds": 5}
    assert {name: scores.details[name] for name in counted} == counted


def test_an_oracle_has_no_overlap():
    data = open_objects("toy-coco").limited(40)
    for background in ("out", "in", "other"):
        settings = dataclasses.replace(TOY, background=background)
        scores = run(subject(data, Oracle(data, settings, "category")), settings)
        assert scores.metrics["overlap_area"].value == 0
        assert (scores.metrics["intra_mean_cosine"].value, scores.metrics["inter_mean_cosine"].value) == (1, 0)


def test_the_plot_is_a_picture_that_names_model_data_and_tokens(tmp_path, monkeypatch):
    titles, plotted = [], similarity.plot
    monkeypatch.setattr(similarity, "plot", lambda *given: titles.append(given[2]) or plotted(*given))
    files = run(subject(scenes(tmp_path / "things")), recipe()).files
    assert re.fullmatch(r"fake on things: overlap 0\.\d{3}\npatches of 4 px in 24 px", titles[0])
    assert list(files) == ["similarity.png"]
    with Image.open(io.BytesIO(files["similarity.png"])) as picture:
        assert (picture.format, picture.size) == ("PNG", (720, 480))


def test_without_two_categories_in_any_image_there_is_no_overlap(tmp_path):
    mask = np.zeros((40, 60), bool)
    mask[5:35, 5:35] = True
    boxes = [annotation(1, 1, 4, [5, 5, 30, 30], segmentation=run_lengths(mask))]
    image = {"id": 1, "file_name": "a.png", "width": 60, "height": 40}
    write(tmp_path, {"images": [image], "annotations": boxes, "categories": [{"id": 4, "name": "cat"}]})
    with pytest.raises(UserError, match=r"no inter pairs: no image of 1 has two categories.*background=other"):
        run(subject(tmp_path), recipe())
    assert run(subject(tmp_path), recipe(background="other")).details["pairs"]["inter"] > 0
    boxes[0]["segmentation"] = run_lengths(~mask)
    boxes[0]["iscrowd"] = 1
    write(tmp_path, {"images": [image], "annotations": boxes, "categories": [{"id": 4, "name": "cat"}]})
    with pytest.raises(UserError, match="no inter pairs"):
        run(subject(tmp_path), recipe(background="in"))


# Typed again from MMC's Table 5.
TABLE_5 = "DINO .66 .2 .12, iBOT .56 .19 .05, SiT .63 .5 .46, MAE .76 .29 .17, MC-SSL .58 .47 .35, MMC .55 .48 .38"


def test_recipes_are_what_their_sources_say():
    assert next(iter(RECIPES)) == "mmc"
    assert RECIPES["mmc"].image_px == 480
    for row in TABLE_5.split(", "):
        method, area, intra, inter = row.split()
        assert f"{method} {area} / {intra} / {inter}" in RECIPES["mmc"].published
    assert RECIPES["mmc"].published.startswith("overlap / intra / inter")
    for row in RECIPES.values():  # ours: another value is another VERSION
        assert (row.layer, row.norm, row.interpolation) == (-1, True, "bicubic")
        assert (row.background, row.bins, row.selected_on) == ("out", 200, "none")
    assert TOY.image_px // 8 == 30


def test_what_does_not_fit_is_refused(tmp_path):
    for bins in (1, 10_001):
        with pytest.raises(UserError, match=f"bins={bins}: expected 2 to 10,000"):
            recipe(bins=bins)
    one = subject(scenes(tmp_path))
    similarity.check(one, recipe())
    with pytest.raises(UserError, match="image_px=30 does not divide"):
        similarity.check(one, recipe(image_px=30))
    with pytest.raises(UserError, match="similarity cannot be run so"):
        similarity.check(one, recipe(layer=9))
    assert similarity.readings(one, recipe()) == {}
