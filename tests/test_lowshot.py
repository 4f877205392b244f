"""Few labeled images: which ones, what is done to their vectors, and the accuracy that comes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
from conftest import tiny_backbone
from PIL import Image
from sklearn.linear_model import LogisticRegression

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.features import extract
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols import label_splits, lowshot
from ssl_bench.protocols.lowshot import RECIPES, prepared, splits_of

CLASSES = ("n01", "n02", "n03")


@pytest.fixture
def world(tmp_path):
    """Three classes of 12, 20 and 31 training images and 7 test images, named as ImageNet's are."""
    rng = np.random.RandomState(0)
    for split, counts in (("train", (12, 20, 31)), ("val", (7, 7, 7))):
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (tmp_path / "world" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.randint(0, 130, (16, 16, 3))
                pixels[4 * label : 4 * label + 5] += 60
                path = tmp_path / "world" / split / name / f"{name}_{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "world"


def subject_of(folder, checkpoint="random:vit_32x2x2_patch8_16", seed=0, **effort):
    return Subject(open_checkpoint(checkpoint), open_dataset(str(folder)), Effort(workers=0, **effort), seed)


def small(name="msn", **changes):
    return dataclasses.replace(RECIPES[name], resize_px=16, crop_px=16, **changes)


def write_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_msn(folder, *, third_of_five="3imgs_class.txt"):
    """MSN's folders: split s has the images that start at 3 s, of every class."""
    for split in (1, 2, 3):
        for shots in (1, 2, 5):
            name = third_of_five if (split, shots) == (3, 5) else f"{shots}imgs_class.txt"
            images = [f"{c}_{number}.JPEG" for c in CLASSES for number in range(3 * split - 3, 3 * split - 3 + shots)]
            write_list(folder / f"imagenet_subsets{split}" / name, images)
    write_list(folder / "imagenet_subsets1" / "1percent.txt", ["n01_11.JPEG", "n02_19.JPEG", "n03_29", "n03_30.JPEG"])


def ids(subject, labeled):
    return [subject.split("train").sample_ids[row] for row in labeled.rows]


# --- which images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["dataset", "data folder", "named"])
@pytest.mark.parametrize("third", ["3imgs_class.txt", "5imgs_class.txt"])
def test_lists_are_read_as_they_are(world, place, third, tmp_path, monkeypatch):
    folder = world if place == "dataset" else tmp_path / "elsewhere"
    write_msn(folder, third_of_five=third)
    if place == "data folder":
        monkeypatch.setenv("SSL_BENCH_DATA", str(folder))
    subject = subject_of(world)
    found = splits_of(subject, small(lists=str(folder) if place == "named" else None))
    assert {amount: len(labeled) for amount, labeled in found.items()} == {
        "1shot": 3,
        "2shot": 3,
        "5shot": 3,
        "1percent": 1,
    }
    assert ids(subject, found["1shot"][1]) == [f"{c}/{c}_3.png" for c in CLASSES]
    assert set(ids(subject, found["5shot"][2])) == {f"{c}/{c}_{n}.png" for c in CLASSES for n in range(6, 11)}
    assert set(ids(subject, found["1percent"][0])) == {
        "n01/n01_11.png",
        "n02/n02_19.png",
        "n03/n03_29.png",
        "n03/n03_30.png",
    }
    assert found["5shot"][2].origin == f"list imagenet_subsets3/{third}"


def test_lists_that_were_found_are_part_of_the_runs_identity(world, tmp_path):
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    settings = {"amounts": "1shot", "splits": "1", "resize_px": "16", "crop_px": "16"}

    def run():
        label_splits.labeled_splits.cache_clear()
        (record,) = ssl_bench.run(tmp_path / "tiny.pt", "lowshot", dataset=str(world), settings=settings)
        return record

    drawn = run()
    assert drawn.subset == {}
    write_msn(world)
    listed = run()
    assert listed.details["amounts"]["1shot"]["splits"][0]["origin"].startswith("list")
    write_list(world / "imagenet_subsets1" / "1imgs_class.txt", [f"{name}_5.JPEG" for name in CLASSES])
    other = run()
    assert len({record.run.key() for record in (drawn, listed, other)}) == 3
    assert (drawn.n_samples.evaluated["train"], listed.n_samples.evaluated["train"]) == (3, 3)
    assert run() == other


def test_imagenets_lists_serve_a_part_of_its_classes(tmp_path):
    classes = ("n00000001", "n00000002", "n00000003")
    for name in classes[:2]:
        for split in ("train", "val"):
            (tmp_path / "part" / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (16, 16)).save(tmp_path / "part" / split / name / f"{name}_{number}.JPEG")
    write_list(tmp_path / "part" / "1percent.txt", [f"{name}_1.JPEG" for name in classes])
    subject = subject_of(tmp_path / "part")
    found = splits_of(subject, small("ibot", amounts=("1percent",)))["1percent"][0]
    assert ids(subject, found) == [f"{name}/{name}_1.JPEG" for name in classes[:2]]


@pytest.mark.parametrize("folder", ["", "imagenet_subsets", "imagenet_subsets1"])
def test_simclrs_lists_serve_percents(world, folder):
    write_list(world / folder / "10percent.txt", ["n01_0.JPEG", "n02_0.JPEG", "n02_1.JPEG", "n03_5.JPEG"])
    subject = subject_of(world)
    found = splits_of(subject, small("ibot"))
    assert ids(subject, found["10percent"][0]) == ["n01/n01_0.png", "n02/n02_0.png", "n02/n02_1.png", "n03/n03_5.png"]
    assert found["1percent"][0].origin.startswith("drawn")


def test_five_images_are_not_read_from_a_list_of_three_where_there_is_one_of_five(world):
    write_msn(world, third_of_five="5imgs_class.txt")
    write_list(world / "imagenet_subsets3" / "3imgs_class.txt", ["n01_0.JPEG"])
    assert splits_of(subject_of(world), small())["5shot"][2].origin == "list imagenet_subsets3/5imgs_class.txt"


def test_lists_of_another_dataset_that_lie_about_are_not_taken(world, tmp_path, monkeypatch):
    write_list(tmp_path / "data" / "imagenet_subsets1" / "1percent.txt", ["n77_1.JPEG"])
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path / "data"))
    subject = subject_of(world)
    assert splits_of(subject, small(amounts=("1percent",)))["1percent"][0].origin.startswith("drawn")
    with pytest.raises(UserError, match=r"1 of the 1 images in .* are not in train: n77_1.JPEG.*--set lists=draw"):
        splits_of(subject, small(amounts=("1percent",), lists=str(tmp_path / "data")))


def test_draw_draws_although_there_are_lists(world):
    write_msn(world)
    assert all(each.origin.startswith("drawn") for each in splits_of(subject_of(world), small(lists="draw"))["1shot"])


def test_drawn_splits_are_balanced_seeded_and_nested(world):
    labels = open_dataset(str(world)).train.labels
    recipe = small(amounts=("1shot", "2shot", "5shot", "1percent", "10percent"), lists="draw")
    found = splits_of(subject_of(world), recipe)
    expected = {
        "1shot": [1, 1, 1],
        "2shot": [2, 2, 2],
        "5shot": [5, 5, 5],
        "1percent": [1, 1, 1],
        "10percent": [1, 2, 3],  # of 12, 20 and 31
    }
    for amount, counts in expected.items():
        assert [np.bincount(labels[each.rows]).tolist() for each in found[amount]] == [counts] * 3
        assert len({tuple(each.rows) for each in found[amount]}) == 3
        assert all((np.diff(each.rows) > 0).all() for each in found[amount])
    for one, two, five in zip(found["1shot"], found["2shot"], found["5shot"], strict=True):
        assert set(one.rows) < set(two.rows) < set(five.rows)
    again, other = (splits_of(subject_of(world, seed=seed), recipe) for seed in (0, 1))
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(found["5shot"], again["5shot"], strict=True))
    assert not any(np.array_equal(a.rows, b.rows) for a, b in zip(found["5shot"], other["5shot"], strict=True))


def test_a_percent_of_a_class_is_rounded_to_the_nearest(tmp_path, image_folder):
    train = open_dataset(str(image_folder(train=60, val=1))).train
    for percent, count in ((10, 6), (1, 1)):
        assert label_splits._share(train, f"{percent}percent").tolist() == [count, count]
    labels = np.repeat([0, 1], [1299, 851])
    big = dataclasses.replace(train, labels=labels, sample_ids=[str(n) for n in range(len(labels))])
    assert label_splits._share(big, "1percent").tolist() == [13, 9]
    assert np.bincount(labels[label_splits._drawn(big, "1percent", 0, 0).rows]).tolist() == [13, 9]


@pytest.mark.parametrize(
    ("lists", "names", "message"),
    [
        ("named", {"imagenet_subsets1/1imgs_class.txt": ["n01_0.JPEG", "n02_0.JPEG"]}, r"1shot.*n03 \(0\)"),
        (
            "named",
            {"imagenet_subsets1/1imgs_class.txt": ["n01_0", "n02_0", "n03_0", "n03_99"]},
            r"not in train: n03_99",
        ),
        ("named", {"1percent.txt": ["n01_0"]}, r"no list of 1shot.*imagenet_subsets1/1imgs_class.txt"),
        ("absent", {}, r"there is no such folder.*lists=draw"),
    ],
)
def test_bad_lists_are_refused_before_any_image_is_read(world, tmp_path, lists, names, message):
    for name, lines in names.items():
        write_list(tmp_path / "named" / name, lines)
    recipe = small(lists=str(tmp_path / lists), splits=1, amounts=("1shot",))
    with pytest.raises(UserError, match=message):
        lowshot.check(subject_of(world), recipe)


def test_too_few_of_a_class_in_a_list_of_five(world):
    write_msn(world)
    write_list(world / "imagenet_subsets2" / "5imgs_class.txt", [f"{c}_{n}" for c in CLASSES for n in range(4)])
    with pytest.raises(
        UserError, match=r"5shot: the list .*5imgs_class.txt has fewer than 5 images of 3 classes: n01 \(4\)"
    ):
        lowshot.check(subject_of(world), small())


def test_a_missing_split_is_named(world):
    write_msn(world)
    (world / "imagenet_subsets2" / "2imgs_class.txt").unlink()
    with pytest.raises(UserError, match=r"2 of 3 splits of 2shot; imagenet_subsets2/2imgs_class.txt.*--set splits=2"):
        lowshot.check(subject_of(world), small())
    lowshot.check(subject_of(world), small(splits=1))


def test_a_dataset_with_fewer_images_than_shots(image_folder):
    with pytest.raises(
        UserError, match=r"5shot: train \(6 images\) has fewer than 5 images of 2 classes: a \(3\), b \(3\)"
    ):
        lowshot.check(subject_of(image_folder(train=3)), small())


def test_classes_that_only_one_split_has_are_refused(world):
    write_list(world / "val.txt", [f"n03/n03_{number}.png" for number in range(7)])
    write_list(world / "train.txt", [f"{c}/{c}_{number}.png" for c in CLASSES[:2] for number in range(9)])
    dataset = open_dataset(str(world), train_list=world / "train.txt", val_list=world / "val.txt")
    subject = Subject(open_checkpoint("random:vit_32x2x2_patch8_16"), dataset, Effort(workers=0))
    with pytest.raises(UserError, match=r"no training image in world: n03"):
        lowshot.check(subject, small(amounts=("1shot",)))


# --- the numbers -----------------------------------------------------------------------------------------------------


def plain(vector, centering):
    vector = vector.astype(np.float64)
    if centering:
        vector = vector - sum(vector) / len(vector)
    return vector / np.sqrt(sum(vector**2))


@pytest.mark.parametrize("centering", [True, False])
def test_preparation_is_each_samples_own(centering):
    vectors = (np.random.RandomState(0).randn(5, 9) + 3).astype(np.float32)
    expected = np.stack([plain(vector, centering) for vector in vectors])
    np.testing.assert_allclose(prepared(vectors, centering), expected, atol=1e-7)
    assert np.array_equal(prepared(np.zeros((1, 4), np.float32), centering), np.zeros((1, 4)))
    assert np.array_equal(vectors, (np.random.RandomState(0).randn(5, 9) + 3).astype(np.float32))  # left as it was


def by_hand(subject, recipe, labeled, given):
    """Percent correct by scikit-learn, of features that are extracted in full."""
    reading = lowshot._reading(subject, recipe)
    rows = {}
    for name in ("train", "val"):
        array = extract(subject.checkpoint, subject.split(name), [reading], subject.effort)[reading].array()
        rows[name] = np.stack([plain(vector, recipe.centering) for vector in array])
    train, val = subject.split("train").labels, subject.split("val").labels
    n = len(labeled.rows)
    strength = 1 / given if recipe.divided_by_n else 1 / (n * given)
    model = LogisticRegression(C=strength, fit_intercept=False, tol=1e-10, max_iter=10_000)
    return 100 * (model.fit(rows["train"][labeled.rows], train[labeled.rows]).predict(rows["val"]) == val).mean()


@pytest.mark.parametrize("name", RECIPES)
def test_scores_equal_scikit_learn(world, name, tmp_path):
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    subject, recipe = subject_of(world, tmp_path / "tiny.pt"), small(name)
    scores = lowshot.run(subject, recipe)
    for amount, labeled in splits_of(subject, recipe).items():
        results = np.array([[by_hand(subject, recipe, each, given) for given in recipe.lambdas] for each in labeled])
        means = results.mean(axis=0)
        assert scores.metrics[f"top1_{amount}"].value == pytest.approx(means.max())
        about = scores.details["amounts"][amount]
        assert about["chosen_lambda"] == recipe.lambdas[int(means.argmax())]
        assert [[fit["top1"] for fit in split["fits"]] for split in about["splits"]] == pytest.approx(results)
        if len(labeled) > 1:
            chosen = results[:, means.argmax()]
            assert scores.metrics[f"top1_{amount}"].std == pytest.approx(np.std(chosen, ddof=1))
            assert scores.metrics[f"top1_{amount}"].n == 3
        for given, mean in zip(recipe.lambdas, means, strict=True):
            if len(recipe.lambdas) > 1:
                assert scores.metrics[f"top1_{amount}_lambda{given:g}"].value == pytest.approx(mean)
    assert scores.main == f"top1_{recipe.amounts[0]}"
    assert scores.predictions is None
    assert json.loads(json.dumps(scores.details, allow_nan=False)) == scores.details


def test_the_record_says_what_was_fitted(world):
    recipe = small("moca", amounts=("2shot",), splits=2)
    subject = subject_of(world)
    scores = lowshot.run(subject, recipe)
    for labeled, about in zip(
        splits_of(subject, recipe)["2shot"], scores.details["amounts"]["2shot"]["splits"], strict=True
    ):
        names = "\n".join(ids(subject, labeled))
        assert about["sample_ids_sha256"] == hashlib.sha256(names.encode()).hexdigest()
        assert (about["images"], about["images_of_a_class"]) == (6, [2, 2])
        assert re.fullmatch(r"drawn: shuffling [01] of seed 0, .*", about["origin"])
        (fit,) = about["fits"]
        assert (fit["lambda"], fit["penalty"], fit["solver"]) == (0.1, pytest.approx(0.1 / 6), "lbfgs")
        assert 0 <= fit["optimality_gap"] <= 1e-8 * fit["objective"]
        assert fit["iterations"] > 0
    assert "no published lists of 2shot" in scores.warnings[0]


@pytest.mark.parametrize("solver", ["lbfgs", "cyanure"])
def test_a_class_without_any_images_is_never_predicted(world, tmp_path, solver):
    """n01 is known by its folder, but the lists leave its images out."""
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    for split, count in (("train", 9), ("val", 7)):
        write_list(world / f"{split}.txt", [f"{c}/{c}_{number}.png" for c in CLASSES[1:] for number in range(count)])
    dataset = open_dataset(str(world), train_list=world / "train.txt", val_list=world / "val.txt")
    subject = Subject(open_checkpoint(tmp_path / "tiny.pt"), dataset, Effort(workers=0))
    recipe = small(amounts=("5shot",), splits=1, solver=solver)
    lowshot.check(subject, recipe)
    scores = lowshot.run(subject, recipe)
    assert set(scores.predictions) == {1, 2}
    if solver == "lbfgs":
        expected = by_hand(subject, recipe, splits_of(subject, recipe)["5shot"][0], 0.075)
        assert scores.metrics["top1_5shot"].value == pytest.approx(expected)


def test_both_solvers_agree(world):
    found = [
        lowshot.run(subject_of(world), small(amounts=("5shot",), splits=1, solver=solver))
        for solver in ("lbfgs", "cyanure")
    ]
    assert (found[0].predictions == found[1].predictions).mean() > 0.9
    ours, theirs = (each.details["amounts"]["5shot"]["splits"][0]["fits"][0] for each in found)
    assert theirs["solver"] == "cyanure"
    assert ours["objective"] <= theirs["objective"] * (1 + 1e-8)


def test_one_split_keeps_its_predictions_and_only_its_images_are_read(world, tmp_path, monkeypatch):
    monkeypatch.setattr(lowshot, "_FEW", 20)  # train has 63
    write_msn(world)
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    settings = {"amounts": "1shot", "splits": "1", "resize_px": "16", "crop_px": "16"}
    (world / "train" / "n03" / "n03_30.png").write_bytes(b"broken")  # not in the list
    (record,) = ssl_bench.run(tmp_path / "tiny.pt", "lowshot", dataset=str(world), settings=settings)
    assert record.recipe == "msn"
    assert record.scores["top1_1shot"].n == 21
    assert record.scores["top1_1shot"].stderr is not None
    assert record.details["train_images_read"] == 3
    assert record.details["amounts"]["1shot"]["splits"][0]["origin"] == "list imagenet_subsets1/1imgs_class.txt"
    assert record.selected_on == "none"
    assert record.warnings == []


def test_few_training_images_are_read_whole_to_the_same_end(world, monkeypatch):
    recipe = small(amounts=("2shot", "5shot"))
    assert set(lowshot.readings(subject_of(world), recipe)) == {"train", "val"}
    whole = lowshot.run(subject_of(world), recipe)
    monkeypatch.setattr(lowshot, "_FEW", 20)
    assert set(lowshot.readings(subject_of(world), recipe)) == {"val"}
    part = lowshot.run(subject_of(world), recipe)
    assert whole.metrics == part.metrics
    assert whole.details["train_features"] != part.details["train_features"]


@pytest.mark.parametrize("few", [20, 100])
def test_broken_images_are_left_out_and_a_class_must_stay(world, monkeypatch, few):
    monkeypatch.setattr(lowshot, "_FEW", few)
    subject = subject_of(world, skip_broken=True)
    recipe = small(amounts=("2shot", "10percent"), splits=1)
    rows = splits_of(subject, recipe)["10percent"][0].rows
    names = [subject.split("train").sample_ids[row] for row in rows]  # 1, 2 and 3 images of the classes
    (world / "train" / names[-1]).write_bytes(b"broken")
    only = dataclasses.replace(recipe, amounts=("10percent",))
    about = lowshot.run(subject_of(world, skip_broken=True), only).details["amounts"]["10percent"]["splits"][0]
    assert (about["images"], about["images_of_a_class"]) == (5, [1, 2])
    (world / "train" / names[0]).write_bytes(b"broken")
    with pytest.raises(
        UserError, match=r"10percent: what could be read has fewer than 1 images of 1 classes: n01 \(0\)"
    ):
        lowshot.run(subject_of(world, skip_broken=True), only)


def test_pixels_have_more_dimensions_than_images(world):
    recipe = small("ibot", norm=False, amounts=("10percent",), lambdas=(0.01,))
    scores = lowshot.run(subject_of(world, "pixels:"), recipe)
    assert scores.metrics["top1_10percent"].value > 50  # a bright bar whose place is the class


def test_no_penalty_is_refused_where_there_is_no_minimum(world):
    with pytest.raises(UserError, match="no best finite weights"):
        lowshot.run(subject_of(world), small(lambdas=(0.0,), amounts=("1shot",)))


# --- recipes ---------------------------------------------------------------------------------------------------------

# What the sources say, typed again: vector, norm, centering, lambdas, / n, interpolation, amounts, splits.
SOURCES = {
    "msn": ("cls", False, True, {0.075}, True, "bilinear", ["1shot", "2shot", "5shot", "1percent"], 3),
    "moca": ("patch_mean", False, True, {0.1}, True, "bilinear", ["1shot", "2shot", "5shot", "1percent"], 3),
    "ibot": ("cls", True, False, {0.01, 0.1, 1.0}, False, "bicubic", ["1percent", "10percent"], 1),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_what_their_sources_say(name):
    recipe = RECIPES[name]
    vector, norm, centering, lambdas, divided, interpolation, amounts, splits = SOURCES[name]
    assert (recipe.vector, recipe.norm, recipe.centering, set(recipe.lambdas)) == (vector, norm, centering, lambdas)
    assert (recipe.divided_by_n, recipe.interpolation, recipe.splits) == (divided, interpolation, splits)
    assert (list(recipe.amounts), recipe.resize_px, recipe.crop_px) == (amounts, 256, 224)
    assert (recipe.solver, recipe.lists) == ("lbfgs", None)
    assert recipe.selected_on == ("test" if len(lambdas) > 1 else "none")


def test_the_reading_is_the_recipes(world):
    for name, (token, norm, *_, interpolation, _amounts, _splits) in SOURCES.items():
        (reading,) = lowshot.readings(subject_of(world), RECIPES[name])["val"]
        assert (reading.token, reading.norm, reading.layer) == (token, norm, -1)
        assert (reading.view.resize_px, reading.view.crop_px, reading.view.interpolation) == (256, 224, interpolation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": 0}, "splits=0"),
        ({"lambdas": (-1.0,)}, "lambdas=-1"),
        ({"lambdas": (0.1, 0.1)}, "lambdas=0.1,0.1"),
        ({"amounts": ("1shot", "1shot")}, "amounts=1shot,1shot"),
        ({"lambdas": (0.0,), "solver": "cyanure"}, "solver=lbfgs"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RECIPES["msn"], **change)
