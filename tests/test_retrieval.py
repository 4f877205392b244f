"""Retrieval against plain loops: rankings by sorting, average precision by walking down a list."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_backbone
from PIL import Image
from sklearn.metrics import average_precision_score

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import parse_name
from ssl_bench.evaluate.backbone import build
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.landmarks import Truth, open_landmarks
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols import retrieval
from ssl_bench.protocols.retrieval import (
    RECIPES,
    Whole,
    average_precision,
    noninterpolated,
    precision_at,
    ranking,
    ranks_found,
    vectors,
)

SIZES = [(40, 24), (24, 40), (32, 32), (64, 48), (20, 20)]  # width, height


def truth(easy=(), hard=(), junk=()):
    return Truth(*(np.array(each, dtype=np.int64) for each in (easy, hard, junk)))


# One ranking


def walked(ranking, wanted, ignored):
    """AP and mP@k as the benchmark defines them, by walking down the list."""
    kept = [image for image in ranking if image not in ignored]
    area, found, ranks = 0.0, 0, []
    for rank, image in enumerate(kept):
        if image in wanted:
            before = 1.0 if rank == 0 else found / rank
            found += 1
            ranks.append(rank + 1)  # from 1
            area += (before + found / (rank + 1)) / 2 / len(wanted)
    at = {}
    for k in (1, 5, 10):
        within = min(max(ranks), k)
        at[k] = sum(rank <= within for rank in ranks) / within
    return area, at


@pytest.mark.parametrize("seed", range(20))
def test_precisions_equal_a_walk_down_the_list(seed):
    rng = np.random.RandomState(seed)
    order = rng.permutation(60)
    easy, hard, junk, _ = np.split(rng.permutation(60), np.cumsum(rng.randint(1, 8, 3)))
    lists = truth(easy, hard, junk)
    for setting, (wanted, ignored) in {
        "easy": (set(easy), {*hard, *junk}),
        "medium": ({*easy, *hard}, set(junk)),
        "hard": (set(hard), {*easy, *junk}),
    }.items():
        ranks = ranks_found(order, lists, setting)
        area, at = walked(order.tolist(), wanted, ignored)
        assert average_precision(ranks) == pytest.approx(area, abs=1e-12)
        assert {k: precision_at(ranks, k) for k in (1, 5, 10)} == pytest.approx(at, abs=1e-12)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([0, 2], 19 / 24),  # ((1 + 1) / 2 + (1/2 + 2/3) / 2) / 2
        ([1], 1 / 4),  # (0 + 1/2) / 2
        ([1, 2, 5], (1 / 4 + 7 / 12 + 9 / 20) / 3),  # (0 + 1/2)/2, (1/2 + 2/3)/2, (2/5 + 3/6)/2
        ([0, 1, 2, 3], 1.0),
    ],
)
def test_average_precision_by_hand(ranks, expected):
    assert average_precision(np.array(ranks)) == pytest.approx(expected, abs=1e-12)


def test_precision_at_k_looks_no_further_than_the_last_relevant_image():
    assert precision_at(np.array([0, 1]), 10) == 1.0  # both found: not 2 of 10
    assert precision_at(np.array([0, 3]), 10) == 0.5
    assert precision_at(np.array([0, 30]), 10) == 0.1
    assert precision_at(np.array([4]), 1) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_the_noninterpolated_precision_is_scikit_learns(seed):
    rng = np.random.RandomState(seed)
    relevant = rng.rand(50) < 0.2
    expected = average_precision_score(relevant, -np.arange(50))
    assert noninterpolated(np.flatnonzero(relevant)) == pytest.approx(expected, abs=1e-12)
    assert abs(average_precision(np.flatnonzero(relevant)) - expected) > 1e-4  # another formula


def test_what_does_not_count_may_stand_anywhere():
    lists = truth(easy=[0, 1], hard=[2], junk=[3, 4])
    first, last = np.array([3, 4, 0, 5, 2, 1]), np.array([0, 5, 2, 1, 3, 4])
    assert ranks_found(first, lists, "medium").tolist() == ranks_found(last, lists, "medium").tolist() == [0, 2, 3]
    assert ranks_found(first, lists, "hard").tolist() == [1]
    assert ranks_found(first, lists, "easy").tolist() == [0, 2]
    assert ranks_found(first, truth(easy=[0]), "hard").tolist() == []


@pytest.mark.parametrize("dim", [37, 96, 768])
@pytest.mark.parametrize("seed", range(5))
def test_ties_go_by_the_order_of_the_database(seed, dim):
    """In a matrix product the last of equal rows may come out larger in the last bit: hence several vectors."""
    row = np.random.RandomState(seed).randn(dim).astype(np.float32)
    database = np.repeat(row[None], 103, axis=0)
    database[50] *= -1
    assert ranking(row, database).tolist() == [*range(50), *range(51, 103), 50]


# Vectors, against one image at a time


@pytest.fixture
def dataset(tmp_path):
    """`dataset(**changes of the first query)`: nine images and three queries of several sizes."""

    def write(name="roxford5k", **changes):
        root = tmp_path / name
        (root / "jpg").mkdir(parents=True)
        rng = np.random.RandomState(0)
        for number, image in enumerate([*(f"db_{i}" for i in range(9)), "q_0", "q_1", "q_2"]):
            width, height = SIZES[number % len(SIZES)]
            Image.fromarray(rng.randint(0, 256, (height, width, 3), dtype=np.uint8)).save(root / "jpg" / f"{image}.png")
        gnd = [
            {"bbx": [2, 2, 18, 17], "easy": [0, 3], "hard": [5, 6], "junk": [1]} | changes,
            {"bbx": [0, 0, 32, 24], "easy": [], "hard": [2], "junk": [4, 8]},
            {"bbx": [1, 1, 20, 20], "easy": [7], "hard": [], "junk": []},
        ]
        listed = {"imlist": [f"db_{i}" for i in range(9)], "qimlist": ["q_0", "q_1", "q_2"], "gnd": gnd}
        (root / f"gnd_{name}.pkl").write_bytes(pickle.dumps(listed))
        return open_landmarks(str(root))

    return write


def small(**changes):
    """The default recipe for images of 32 px."""
    return dataclasses.replace(RECIPES["mmc"], **({"longer_side_px": 32} | changes))


def subject_of(checkpoint, dataset, **effort):
    return Subject(checkpoint, dataset, Effort(**effort))


def by_hand(checkpoint, image, *, longer_side_px=32, scales=(1.0,), token="cls"):
    """One vector: shrink by Pillow, normalize, shrink by torch, cut to whole patches, average, make it unit length."""
    image = image.copy()
    image.thumbnail((longer_side_px, longer_side_px), Image.Resampling.LANCZOS)
    architecture = checkpoint.architecture
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)
    pixels = (pixels - torch.tensor(architecture.mean)[:, None, None]) / torch.tensor(architecture.std)[:, None, None]
    total = torch.zeros(architecture.dim)
    for scale in scales:
        shrunk = pixels[None]
        if scale != 1:
            shrunk = torch.nn.functional.interpolate(shrunk, scale_factor=scale, mode="bilinear", align_corners=False)
        height, width = shrunk.shape[2] // 8 * 8, shrunk.shape[3] // 8 * 8
        with torch.no_grad():
            tokens = checkpoint.backbone(shrunk[:, :, :height, :width]).tokens[0]
        total += tokens.cls[0] if token == "cls" else tokens.patches[0].mean(dim=(0, 1))
    mean = (total / len(scales)).double().numpy()
    return mean / math.sqrt((mean**2).sum())


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("token", ["cls", "patch_mean"])
def test_vectors_equal_one_image_at_a_time(tiny_checkpoint, dataset, batch_size, token):
    opened = dataset()
    subject = subject_of(tiny_checkpoint, opened, batch_size=batch_size)
    found = vectors(subject, opened.database, small(token=token))
    expected = [by_hand(tiny_checkpoint, opened.database.image(i), token=token) for i in range(9)]
    assert found == pytest.approx(np.array(expected), abs=2e-6)
    assert np.ptp(found, axis=0).max() > 1e-3


def test_several_scales_are_the_mean_of_what_the_network_says(tiny_checkpoint, dataset):
    opened = dataset()
    found = vectors(subject_of(tiny_checkpoint, opened), opened.database, small(multiscale=True))
    scales = (1.0, 1 / math.sqrt(2), 0.5)
    expected = np.array([by_hand(tiny_checkpoint, opened.database.image(i), scales=scales) for i in range(9)])
    assert found == pytest.approx(expected, abs=2e-6)
    single = vectors(subject_of(tiny_checkpoint, opened), opened.database, small())
    assert np.abs(found - single).max() > 1e-3


def test_neighbors_of_one_size_share_a_batch(tiny_checkpoint):
    sizes = [(3, 8, 8)] * 3 + [(3, 8, 16)] * 5 + [(3, 8, 8)]
    images = iter([torch.full(size, number) for number, size in enumerate(sizes)])
    batches = list(retrieval._batches(images, 2))
    assert [len(batch) for batch in batches] == [2, 1, 2, 2, 1, 1]
    assert torch.cat([batch[:, 0, 0, 0] for batch in batches]).tolist() == list(range(9))


def expected_scores(checkpoint, opened, *, box):
    """Every metric, with loops."""
    split = opened.queries if box else opened.whole_queries
    database = [by_hand(checkpoint, opened.database.image(i)) for i in range(len(opened.database))]
    found: dict[str, list[float]] = {}
    for number, lists in enumerate(opened.truths):
        query = by_hand(checkpoint, split.image(number))
        similar = [float((query * each).sum()) for each in database]
        order = sorted(range(len(database)), key=lambda i: (-similar[i], i))
        easy, hard, junk = (set(each.tolist()) for each in lists)
        for setting, wanted, ignored in (
            ("medium", easy | hard, junk),
            ("hard", hard, easy | junk),
            ("easy", easy, hard | junk),
        ):
            if not wanted:
                continue
            area, at = walked(order, wanted, ignored)
            found.setdefault(f"mAP_{setting}", []).append(area)
            for k in (1, 5, 10):
                found.setdefault(f"mP@{k}_{setting}", []).append(at[k])
            kept = [i for i in order if i not in ignored]
            plain = average_precision_score([i in wanted for i in kept], -np.arange(len(kept)))
            found.setdefault(f"mAP_{setting}_noninterpolated", []).append(plain)
    return found


@pytest.mark.parametrize("query", ["image", "box"])
def test_scores_equal_plain_loops(tiny_checkpoint, dataset, query):
    opened = dataset()
    subject, recipe = subject_of(tiny_checkpoint, opened), small(query=query)
    retrieval.check(subject, recipe)
    scores = retrieval.run(subject, recipe)
    expected = expected_scores(tiny_checkpoint, opened, box=query == "box")
    assert set(scores.metrics) == set(expected)
    assert len(expected) == 15
    assert scores.main == "mAP_medium"
    for name, values in expected.items():
        score, percent = scores.metrics[name], 100 * np.array(values)
        assert score.value == pytest.approx(percent.mean(), abs=1e-9), name
        assert score.n == len(values)
        assert score.stderr == pytest.approx(percent.std(ddof=1) / math.sqrt(len(values)), abs=1e-9)
    assert [scores.metrics[f"mAP_{setting}"].n for setting in ("easy", "medium", "hard")] == [2, 3, 2]
    assert scores.details["nothing_to_find"] == {"medium": 0, "hard": 1, "easy": 1}
    assert scores.details["queries"] == ["0000/q_0", "0001/q_1", "0002/q_2"]
    medium = scores.details["average_precision"]["medium"]
    assert medium == pytest.approx([100 * each for each in expected["mAP_medium"]], abs=1e-4)
    assert scores.details["average_precision"]["hard"][2] is None
    assert retrieval.readings(subject, recipe) == {}


def test_boxes_are_cut_out_where_the_recipe_says_so(tiny_checkpoint, dataset):
    here, there = dataset(), dataset("rparis6k", bbx=[8, 8, 24, 23])
    for query, moves in (("box", True), ("image", False)):
        chosen = [each.queries if query == "box" else each.whole_queries for each in (here, there)]
        one, other = (vectors(subject_of(tiny_checkpoint, here), split, small()) for split in chosen)
        assert (np.abs(one[0] - other[0]).max() > 1e-3) == moves
        assert np.array_equal(one[1:], other[1:])
    scores = [
        retrieval.run(subject_of(tiny_checkpoint, each), small(query=query)).details["average_precision"]
        for query in ("box", "image")
        for each in (here, there)
    ]
    assert scores[0] != scores[1]
    assert scores[2] == scores[3]


def test_a_query_of_the_database_finds_itself_and_a_perfect_ranking_is_100(tiny_checkpoint, dataset, monkeypatch):
    opened = dataset()
    itself = dataclasses.replace(
        opened, queries=dataclasses.replace(opened.queries, source=opened.database.source.take(np.array([0, 2, 7])))
    )
    lists = (truth(easy=[0]), truth(easy=[2]), truth(easy=[7]))
    found = retrieval.run(
        subject_of(tiny_checkpoint, dataclasses.replace(itself, truths=lists)), small(query="box")
    ).metrics
    assert {name: score.value for name, score in found.items()} == pytest.approx(dict.fromkeys(found, 100.0))
    assert {name.rpartition("_")[2] for name in found} == {"medium", "easy", "noninterpolated"}  # nothing is hard


def test_the_view_keeps_the_whole_image(tiny_checkpoint):
    image = Image.new("RGB", (100, 60))
    assert Whole(50, False, 8).pixels(image).shape == (3, 30, 50)
    assert image.size == (100, 60)
    assert Whole(200, False, 8).pixels(image).shape == (3, 60, 100)  # never enlarged
    assert Whole(200, True, 8).pixels(image).shape == (3, 120, 200)  # but for built-in data
    assert Whole(50, True, 8).pixels(image).shape == (3, 30, 50)
    assert Whole(None, True, 8).pixels(image).shape == (3, 60, 100)
    assert Whole(50, False, 8).pixels(Image.new("RGB", (200, 4))).shape == (3, 8, 50)
    assert Whole(50, False, 16).pixels(Image.new("RGB", (6, 400))).shape == (3, 50, 16)


def test_very_flat_images_have_a_patch_at_every_scale(tiny_checkpoint, dataset):
    opened = dataset(bbx=[0, 0, 20, 2])
    for multiscale in (False, True):
        found = vectors(subject_of(tiny_checkpoint, opened), opened.queries, small(multiscale=multiscale))
        assert np.isfinite(found).all()


def test_built_in_images_are_brought_to_the_networks_own_size(tiny_checkpoint, dataset, monkeypatch):
    opened = dataclasses.replace(dataset(), built_in=True)
    seen = []
    real = retrieval.Forward.vectors
    monkeypatch.setattr(
        retrieval.Forward, "vectors", lambda self, images: (seen.append(tuple(images.shape)), real(self, images))[1]
    )
    vectors(subject_of(tiny_checkpoint, opened), opened.database, small(longer_side_px=1000))
    # 16 px is this network's size: 40 x 24 becomes 16 x 10 px, of which 16 x 8 are whole patches.
    assert seen[:3] == [(1, 3, 8, 16), (1, 3, 16, 8), (1, 3, 16, 16)]


def test_pixels_are_compared_by_their_mean_patch(dataset):
    opened = dataclasses.replace(dataset(), built_in=True)
    subject = subject_of(open_checkpoint("pixels:"), opened)
    with pytest.raises(UserError, match=r"different lengths.*--set token=patch_mean"):
        retrieval.check(subject, small())
    recipe = small(token="patch_mean", query="box")
    retrieval.check(subject, recipe)
    assert retrieval.run(subject, recipe).metrics["mAP_medium"].n == 3


# What is refused


def test_networks_without_a_class_token_are_refused_with_the_way_around(tmp_path, dataset):
    architecture = dataclasses.replace(parse_name("vit_32x2x2_patch8_16"), cls=False)
    save_checkpoint(tmp_path / "no-cls.pt", build(architecture))
    subject = subject_of(open_checkpoint(tmp_path / "no-cls.pt"), dataset())
    with pytest.raises(UserError, match=r"no class token. Try --set token=patch_mean"):
        retrieval.check(subject, small())
    retrieval.check(subject, small(token="patch_mean"))


def test_networks_without_a_final_norm_are_refused_with_the_way_around(tmp_path, dataset):
    architecture = dataclasses.replace(parse_name("vit_32x2x2_patch8_16"), final_norm=False)
    save_checkpoint(tmp_path / "no-norm.pt", build(architecture))
    subject = subject_of(open_checkpoint(tmp_path / "no-norm.pt"), dataset())
    with pytest.raises(UserError, match=r"no final norm.*Try --set norm=false"):
        retrieval.check(subject, small())
    retrieval.check(subject, small(norm=False))


def test_the_norm_is_the_recipes(tiny_checkpoint, dataset):
    opened = dataset()
    with_norm, without = (
        vectors(subject_of(tiny_checkpoint, opened), opened.queries, small(norm=norm)) for norm in (True, False)
    )
    assert np.abs(with_norm - without).max() > 1e-3


def test_what_cannot_be_scored_is_refused_before_any_image_is_read(tiny_checkpoint, dataset):
    opened = dataset()
    with pytest.raises(UserError, match=r"longer_side_px=7: expected at least one patch, 8 px"):
        retrieval.check(subject_of(tiny_checkpoint, opened), small(longer_side_px=7))
    with pytest.raises(UserError, match=r"--skip-broken.*another benchmark"):
        retrieval.check(subject_of(tiny_checkpoint, opened, skip_broken=True), small())
    nothing = dataclasses.replace(opened, truths=(truth(junk=[1]), truth(), truth()))
    with pytest.raises(UserError, match=r"no query has an easy or hard image to find"):
        retrieval.check(subject_of(tiny_checkpoint, nothing), small())


def test_a_broken_image_is_named_without_the_advice_to_skip_it(tiny_checkpoint, dataset):
    opened = dataset()
    (opened.root / "jpg" / "db_4.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot decode .*db_4\.png") as refused:
        retrieval.run(subject_of(tiny_checkpoint, opened), small())
    assert "skip" not in str(refused.value)


def test_vectors_that_are_not_finite_are_refused(tmp_path, dataset):
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.vit.norm.weight[0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", backbone)
    opened = dataset()
    with pytest.raises(UserError, match=r"the vector of db_0 .*is not finite"):
        vectors(subject_of(open_checkpoint(tmp_path / "nan.pt"), opened), opened.database, small())


# What the sources say, typed again: longer side, scales, what of the query is seen; and MMC's Table 9.
PUBLISHED = {
    "mmc": (224, False, "box", "26.1 / 8.9", "53.4 / 28.6"),
    "dino": (224, False, "image", "32.8 / 10.7", "60.4 / 34.2"),
    "ibot": (512, True, "image", "34.2 / 13.4", "61.9 / 35.2"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_what_their_sources_say(name):
    recipe = RECIPES[name]
    longer_side_px, multiscale, query, oxford, paris = PUBLISHED[name]
    assert (recipe.longer_side_px, recipe.multiscale, recipe.query) == (longer_side_px, multiscale, query)
    assert (recipe.token, recipe.norm, recipe.selected_on) == ("cls", True, "none")
    assert f"ROxford {oxford}, RParis {paris} (MMC Table 9)" in recipe.published
    assert pytest.approx((1, 0.70710678, 0.5)) == retrieval.SCALES


def test_the_first_row_is_mmcs_and_toy_queries_are_boxes():
    assert list(RECIPES) == ["mmc", "dino", "ibot", "toy"]
    assert (RECIPES["toy"].query, RECIPES["toy"].token, RECIPES["toy"].published) == ("box", "cls", "none")


def test_impossible_recipes_are_refused():
    with pytest.raises(UserError, match="longer_side_px=0"):
        dataclasses.replace(RECIPES["mmc"], longer_side_px=0)
