"""Few-shot episodes against a slow loop in plain Python, and by hand."""

from __future__ import annotations

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
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.subject import Score, Subject
from ssl_bench.protocols import fewshot, knn
from ssl_bench.protocols.fewshot import RECIPES, answered, draw_episodes, pooled_f1

SMALL = {"resize_px": "16", "crop_px": "16", "ways": "3", "queries": "2", "episodes": "40"}


def recipe(**changes):
    return dataclasses.replace(RECIPES["mmc"], **changes)


def cosine(a, b):
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return round(sum(x * y for x, y in zip(a, b, strict=True)) / lengths, 12) if lengths else 0.0


def slow(vectors, labels, episodes, how):
    """Accuracy of every episode, and TP, FP, FN of every episode and threshold, one pair at a time."""
    vectors = [[float(x) for x in row] for row in vectors]
    accuracies, counts = [], []
    for episode in episodes.tolist():
        queries = [row for rows in episode for row in rows[: how.queries]]
        supports = [row for rows in episode for row in rows[how.queries :]]
        right = 0
        count = {threshold: [0, 0, 0] for threshold in how.thresholds}
        for query in queries:
            best, found = -2.0, None
            for support in supports:
                similarity, same = cosine(vectors[query], vectors[support]), labels[query] == labels[support]
                if similarity > best:
                    best, found = similarity, labels[support]
                for threshold in how.thresholds:
                    if similarity > threshold and same:
                        count[threshold][0] += 1
                    elif similarity > threshold:
                        count[threshold][1] += 1
                    elif same:
                        count[threshold][2] += 1
            right += found == labels[query]
        accuracies.append(right / len(queries))
        counts.append(count)
    return accuracies, counts


def slow_f1(counts, threshold):
    tp, fp, fn = (sum(count[threshold][i] for count in counts) for i in range(3))
    if tp == 0:
        return 0.0
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall)


def slow_interval(counts, threshold):
    """Of a ratio of sums, by linearization."""
    above = [2 * count[threshold][0] for count in counts]
    below = [2 * count[threshold][0] + count[threshold][1] + count[threshold][2] for count in counts]
    ratio, n = sum(above) / sum(below), len(counts)
    residuals = [a - ratio * b for a, b in zip(above, below, strict=True)]
    variance = sum(x * x for x in residuals) / (n - 1)  # their mean is 0
    return 1.96 * math.sqrt(variance / n) / (sum(below) / n)


def data(classes=6, each=12, dim=5, noise=0.9, seed=0):
    rng = np.random.RandomState(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), each))
    centers = rng.randn(classes, dim)
    return (centers[labels] + noise * rng.randn(len(labels), dim)).astype(np.float32), labels


@pytest.mark.parametrize(("ways", "shots", "queries"), [(5, 1, 4), (2, 1, 1), (3, 5, 7), (6, 2, 3)])
def test_counts_are_those_of_the_slow_loop(ways, shots, queries):
    how = recipe(ways=ways, shots=shots, queries=queries, episodes=25)
    vectors, labels = data()
    episodes = draw_episodes(labels, how, seed=3)
    correct, hits, errors = answered(vectors, episodes, how)
    accuracies, counts = slow(vectors, labels, episodes, how)
    assert (correct / (ways * queries)).tolist() == pytest.approx(accuracies)
    assert 0.3 < np.mean(accuracies) < 0.999
    for column, threshold in enumerate(how.thresholds):
        assert hits[:, column].tolist() == [count[threshold][0] for count in counts]
        assert errors[:, column].tolist() == [count[threshold][1] + count[threshold][2] for count in counts]
        score = pooled_f1(hits[:, column], errors[:, column])
        assert score.value == pytest.approx(100 * slow_f1(counts, threshold))
        assert score.interval95 == pytest.approx(100 * slow_interval(counts, threshold))
        assert score.n == 25


def test_an_episode_by_hand():
    """Queries (4, 3), (3, 4) of class a and (0, -5), (3, 4) of class b; supports a = (1, 0) and b = (0, 2)."""
    vectors = np.array([[4, 3], [3, 4], [0, -5], [3, 4], [1, 0], [0, 2]], np.float32)
    how = recipe(ways=2, queries=2, episodes=1, thresholds=(-0.5, 0.5, 0.6, 0.7, 0.8))
    correct, hits, errors = answered(vectors, np.array([[[0, 1, 4], [2, 3, 5]]]), how)
    assert correct.tolist() == [2]  # the first and the last; (3, 4) is nearer to b, (0, -5) has 0 with a and -1 with b
    # Cosines of the same class: .8, .6, -1, .8; of the other class: .6, .8, 0, .6. "Above" is not "equal".
    assert hits.tolist() == [[3, 3, 2, 2, 0]]
    assert errors.tolist() == [[4 + 1, 3 + 1, 1 + 2, 1 + 2, 4]]
    score = pooled_f1(hits[:, 1], errors[:, 1])
    assert score.value == pytest.approx(100 * 6 / 10)
    assert score.interval95 is None  # one episode


def test_a_collapsed_network_is_at_chance_and_zeros_are_no_nan():
    _, labels = data()
    how = recipe(shots=2, queries=3, episodes=10)
    episodes = draw_episodes(labels, how, seed=0)
    row = np.random.RandomState(0).randn(1, 33).astype(np.float32)
    for vectors, above in (
        (np.repeat(row, len(labels), axis=0), True),
        (np.zeros((len(labels), 33), np.float32), False),
    ):
        correct, hits, errors = answered(vectors, episodes, how)
        assert (correct == how.queries).all()  # all get the class that was drawn first
        assert (hits == (5 * 3 * 2 if above else 0)).all()
        assert (errors == (5 * 3 * 2 * 4 if above else 5 * 3 * 2)).all()
    assert pooled_f1(np.full(9, 30), np.full(9, 120)) == Score(pytest.approx(200 / 6), 9, interval95=pytest.approx(0))


def test_supports_of_one_direction_tie_whatever_their_length():
    """Unrounded, either of the two is above the other by a last digit; the first one is to win."""
    rng = np.random.RandomState(0)
    direction = rng.randint(-9, 10, (1, 24))
    queries = rng.randint(-9, 10, (200, 24))
    vectors = np.concatenate([direction, 3 * direction, 7 * direction, queries]).astype(np.float32)
    how = recipe(ways=2, queries=100, episodes=2)
    rows = np.arange(3, 203).reshape(2, 100)
    episodes = np.stack([np.hstack([rows, [[first], [second]]]) for first, second in ((0, 1), (2, 0))])
    assert answered(vectors, episodes, how)[0].tolist() == [100, 100]


def test_the_interval_of_f1_is_that_of_a_bootstrap():
    rng = np.random.RandomState(0)
    hits, errors = rng.binomial(75, rng.beta(6, 4, 400)), rng.binomial(150, rng.beta(2, 6, 400))
    drawn = rng.randint(0, 400, (4000, 400))
    f1 = 200 * hits[drawn].sum(1) / (2 * hits[drawn] + errors[drawn]).sum(1)
    assert pooled_f1(hits, errors).interval95 == pytest.approx(1.96 * f1.std(), rel=0.05)


def test_episodes_hold_different_classes_and_different_images():
    _, labels = data()
    how = recipe(ways=4, shots=3, queries=5, episodes=300)
    episodes = draw_episodes(labels, how, seed=0)
    assert episodes.shape == (300, 4, 8)
    seen = np.zeros(len(labels), int)
    for episode in episodes:
        assert len(np.unique(episode)) == 32
        of_class = labels[episode]
        assert (of_class == of_class[:, :1]).all()
        assert len(set(of_class[:, 0])) == 4
        seen[episode.ravel()] += 1
    # Every image is as likely as any other: 300 * 32 / 72 = 133 times, standard deviation 8.6.
    assert seen.min() > 133 - 40
    assert seen.max() < 133 + 40


def test_episodes_are_the_seeds_and_more_shots_keep_the_queries():
    _, labels = data()
    one, five = (draw_episodes(labels, recipe(queries=4, shots=k, episodes=20), seed=1) for k in (1, 5))
    assert np.array_equal(one, draw_episodes(labels, recipe(queries=4, episodes=20), seed=1))
    assert not np.array_equal(one, draw_episodes(labels, recipe(queries=4, episodes=20), seed=2))
    assert np.array_equal(one, five[:, :, :5])


# The whole way, through the public function.


def tokens_by_hand(folder, classes, token="cls"):
    """The network's answer to each image by itself."""
    backbone, vectors, labels = tiny_backbone(), [], []
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tiny_architecture().mean, tiny_architecture().std))
    for label, name in enumerate(classes):
        for path in sorted((folder / "val" / name).iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
            with torch.no_grad():
                tokens = backbone(((pixels - mean) / std)[None]).tokens[0]
            vectors.append(getattr(tokens, token)[0].numpy())
            labels.append(label)
    return np.stack(vectors), np.array(labels)


@pytest.mark.parametrize(("name", "token"), [("mmc", "cls"), ("patch-mean", "patch_mean")])
def test_a_run_is_the_slow_loop_on_the_networks_vectors(tmp_path, image_folder, name, token):
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    folder = image_folder(train=1, val=5, classes=tuple("abcd"))
    (record,) = ssl_bench.run(tmp_path / "tiny.pt", f"fewshot/{name}", dataset=str(folder), settings=SMALL, seed=5)
    vectors, labels = tokens_by_hand(folder, "abcd", token)
    how = recipe(ways=3, queries=2, episodes=40)
    accuracies, counts = slow(vectors, labels, draw_episodes(labels, how, seed=5), how)
    assert record.main_metric == "accuracy"
    assert record.main_score.value == pytest.approx(100 * np.mean(accuracies))
    assert record.main_score.interval95 == pytest.approx(100 * 1.96 * np.std(accuracies, ddof=1) / math.sqrt(40))
    f1 = {threshold: 100 * slow_f1(counts, threshold) for threshold in how.thresholds}
    best = max(f1, key=f1.__getitem__)
    assert record.scores["f1"] == record.scores[f"f1_t{best:g}"]
    assert record.scores["f1"].value == pytest.approx(f1[best])
    for threshold, value in f1.items():
        assert record.scores[f"f1_t{threshold:g}"].value == pytest.approx(value, abs=1e-4)
    assert record.selected_on == "test"
    about = {"ways": 3, "shots": 1, "queries": 2, "episodes": 40, "seed": 5, "classes": 4, "best_threshold": best}
    assert about.items() <= record.details.items()
    assert record.details["accuracy_of_chance"] == pytest.approx(100 / 3)
    assert record.details["f1_of_always_same"] == pytest.approx(50)
    assert record.details["correct_queries"] == [round(6 * value) for value in accuracies]


def test_classes_that_were_never_trained_on_will_do(tmp_path, tiny_checkpoint):
    """mini-ImageNet's layout: val holds other classes than train, at 84 px."""
    rng = np.random.RandomState(0)
    (tmp_path / "mini" / "images").mkdir(parents=True)
    for split, classes in (("train", ("n1", "n2")), ("test", ("n5", "n6", "n7"))):
        lines = ["filename,label"]
        for name in classes:
            for number in range(4):
                Image.fromarray(rng.randint(0, 256, (84, 84, 3)).astype(np.uint8)).save(
                    tmp_path / "mini" / "images" / f"{name}{number}.jpg"
                )
                lines.append(f"{name}{number}.jpg,{name}")
        (tmp_path / "mini" / f"{split}.csv").write_text("\n".join(lines))
    settings = SMALL | {"resize_px": "32", "crop_px": "32"}
    (record,) = ssl_bench.run(tiny_checkpoint.spec, "fewshot", dataset=str(tmp_path / "mini"), settings=settings)
    assert record.details["classes"] == 3
    assert {used.split for used in record.features} == {"val"}


def test_a_pass_over_the_data_is_shared_with_knn(tiny_checkpoint):
    subject = Subject(tiny_checkpoint, SimpleNamespace(built_in=True), Effort())
    of_knn = [reading for row in knn.RECIPES.values() for reading in knn.readings(subject, row)["val"]]
    for row in RECIPES.values():
        assert set(fewshot.readings(subject, row)["val"]) <= set(of_knn)


def test_broken_images_are_left_out_and_counted_again(tmp_path, tiny_checkpoint, image_folder):
    folder = image_folder(train=1, val=4, classes=tuple("abc"))
    (folder / "val" / "b" / "0001.png").write_bytes(b"no image")
    options = {"dataset": str(folder), "settings": SMALL, "skip_broken": True}
    (record,) = ssl_bench.run(tiny_checkpoint.spec, "fewshot", **options)
    (folder / "val" / "b" / "0001.png").unlink()
    (without,) = ssl_bench.run(tiny_checkpoint.spec, "fewshot", **options)
    assert record.scores == without.scores
    (folder / "val" / "b" / "0002.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of the 3 classes of val have fewer: b \(2\)"):
        ssl_bench.run(tiny_checkpoint.spec, "fewshot", **options)


def test_a_network_without_a_class_token_is_told_which_rows_fit(tmp_path, image_folder):
    save_checkpoint(tmp_path / "none.pt", build(dataclasses.replace(tiny_architecture(), cls=False)))
    with pytest.raises(UserError, match=r"no class token\. Recipes that fit: fewshot/patch-mean, fewshot/patch-mean-5"):
        ssl_bench.run(tmp_path / "none.pt", "fewshot", dataset=str(image_folder()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ways": "5"}, r"ways=5 is more than the 3 classes of val; choose fewer, --set ways=3"),
        ({"queries": "15"}, r"16 images of a class \(1 shots, 15 queries\).* 3 of the 3 .*: a \(4\), b \(4\), c \(4\)"),
        ({"queries": "15"}, r"Choose --set queries=3, or"),
        ({"shots": "4", "queries": "1"}, r"Choose fewer shots and queries, or"),
        ({"shots": "0"}, r"shots=0: expected at least 1"),
        ({"ways": "1"}, r"ways=1: expected at least 2"),
        ({"queries": "0"}, r"queries=0: expected at least 1"),
        ({"episodes": "0"}, r"episodes=0: expected at least 1"),
        ({"thresholds": "0.5,0.4"}, r"thresholds=0\.5,0\.4: expected rising"),
        ({"thresholds": "0.5,0.5"}, r"thresholds=0\.5,0\.5: expected rising"),
        ({"thresholds": "0.5,1"}, r"thresholds=0\.5,1: expected rising"),
        ({"thresholds": "-1.5,0"}, r"thresholds=-1\.5,0: expected rising"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_images_are_read(
    tiny_checkpoint, image_folder, settings, said, monkeypatch
):
    from ssl_bench.evaluate import features

    monkeypatch.setattr(features, "load", None)
    folder = image_folder(train=1, val=4, classes=tuple("abc"))
    with pytest.raises(UserError, match=said):
        ssl_bench.run(tiny_checkpoint.spec, "fewshot", dataset=str(folder), settings=SMALL | settings)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="ways=5 is more than the 1 classes of val; choose data of several classes"):
        fewshot._check_images(np.zeros(50, np.int64), ("a",), RECIPES["mmc"])


def test_a_class_without_images_is_named():
    with pytest.raises(UserError, match=r"1 of the 6 classes of val have fewer: f \(0\)"):
        fewshot._check_images(np.repeat(np.arange(5), 16), tuple("abcdef"), RECIPES["mmc"])
    fewshot._check_images(np.repeat(np.arange(5), 16), tuple("abcde"), RECIPES["mmc"])  # just enough


def test_chance_is_noticed():
    assert fewshot._near_chance(Score(20.4, 600, interval95=0.5), RECIPES["mmc"])
    assert fewshot._near_chance(Score(19.0, 1), RECIPES["mmc"])
    assert not fewshot._near_chance(Score(20.6, 600, interval95=0.5), RECIPES["mmc"])


# Table 8 and its text, typed again: ways, shots, token, thresholds; the numbers of MMC.
@pytest.mark.parametrize(
    ("name", "shots", "token"),
    [("mmc", 1, "cls"), ("5-shot", 5, "cls"), ("patch-mean", 1, "patch_mean"), ("patch-mean-5-shot", 5, "patch_mean")],
)
def test_recipes_are_what_the_paper_says(name, shots, token):
    row = RECIPES[name]
    assert (row.ways, row.shots, row.vector) == (5, shots, token)
    assert row.thresholds == tuple(round(0.1 * n, 1) for n in range(1, 10))
    assert (row.queries, row.episodes) == (15, 600)  # ours
    assert (row.resize_px, row.crop_px, row.interpolation, row.norm) == (224, 224, "bicubic", True)
    assert row.selected_on == "test"
    assert ("Table 8" in row.source) == (name == "mmc")
    if name == "mmc":
        assert all(number in row.published for number in ("73.3", "47.4", "69.7", "62.3", "42.9", "62.1"))
    assert list(RECIPES) == ["mmc", "5-shot", "patch-mean", "patch-mean-5-shot"]


def test_one_threshold_is_no_choice():
    assert recipe(thresholds=(0.5,)).selected_on == "none"
