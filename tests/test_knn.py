"""k-NN against a float64 brute force that is written to be obviously right."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.vectors import Vectors
from ssl_bench.protocols import knn
from ssl_bench.protocols.knn import RECIPES, bank_rows, nearest, vote


@pytest.fixture(autouse=True, params=[True, False], ids=["bf16 first", "fp32 first"])
def _arithmetic(request, monkeypatch):
    """Every test with and without bf16 arithmetic, whatever this machine has."""
    monkeypatch.setattr(knn, "cpu_has_bf16", lambda: request.param)


def brute_force(queries, bank, labels, k, temperature, classes):
    """Neighbors and predictions, one query at a time, in float64 and plain Python."""
    unit = [row.astype(np.float64) / max(math.sqrt(float((row.astype(np.float64) ** 2).sum())), 1e-300) for row in bank]
    predictions, neighbors = [], []
    for raw in queries.astype(np.float64):
        query = raw / max(math.sqrt(float((raw**2).sum())), 1e-300)
        similarity = [float((query * row).sum()) for row in unit]
        first = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = [0.0] * classes
        for i in first:
            votes[labels[i]] += math.exp(similarity[i] / temperature)
        neighbors.append(first)
        predictions.append(votes.index(max(votes)))
    return np.array(neighbors), np.array(predictions)


def data(queries=37, bank=211, dim=9, classes=5, seed=0):
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, classes, bank)
    centers = rng.randn(classes, dim)
    return (
        rng.randn(queries, dim).astype(np.float32) + centers[rng.randint(0, classes, queries)].astype(np.float32),
        (rng.randn(bank, dim) + centers[labels]).astype(np.float32),
        labels,
        classes,
    )


@pytest.mark.parametrize("memory_bytes", [1, 20_000, 2**28])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.03), (20, 0.07), (211, 0.2)])
def test_neighbors_and_votes_equal_brute_force(k, temperature, memory_bytes):
    queries, bank, labels, classes = data()
    similarity, index = nearest(Vectors([[queries]]), Vectors([[bank]]), k, memory_bytes=memory_bytes)
    expected, predictions = brute_force(queries, bank, labels, k, temperature, classes)
    assert np.array_equal(index, expected)
    assert np.array_equal(vote(similarity, labels[index], temperature, classes), predictions)


@pytest.mark.parametrize("bank_size", [2048, 5001])
def test_a_long_bank_is_searched_by_groups_to_the_same_end(bank_size):
    """Long enough for `_top` to look at group maxima first, with a rest that fills no group."""
    queries, bank, _, _ = data(queries=50, bank=bank_size, dim=12)
    bank[100:140] = bank[3000 % bank_size]  # ties across groups
    _, index = nearest(Vectors([[queries]]), Vectors([[bank]]), 4)
    unit = [
        array.astype(np.float64) / np.linalg.norm(array.astype(np.float64), axis=1)[:, None]
        for array in (queries, bank)
    ]
    expected = np.argsort(-np.round(unit[0] @ unit[1].T, 14), axis=1, kind="stable")[:, :4]
    assert np.array_equal(index, expected)


@pytest.mark.parametrize("columns", [5, 300, 1792, 1793, 4000])
def test_top_by_groups_gives_the_values_of_topk(columns):
    generator = torch.Generator().manual_seed(columns)
    similarity = torch.randint(0, 50, (20, columns), generator=generator).float()  # many ties
    value, index = knn._top(similarity, 7)
    assert torch.equal(value, similarity.topk(min(7, columns), dim=1).values)
    assert torch.equal(similarity.gather(1, index), value)
    assert all(len(set(row)) == len(row) for row in index.tolist())


def test_one_query_and_one_bank_row():
    _, bank, labels, classes = data(bank=1)
    similarity, index = nearest(Vectors([[bank]]), Vectors([[bank]]), 1)
    assert index.tolist() == [[0]]
    assert similarity.item() == pytest.approx(1.0, abs=1e-12)
    assert vote(similarity, labels[index], 0.07, classes).tolist() == [labels[0]]


def test_a_collapsed_network_ties_everywhere_and_the_order_of_the_bank_decides():
    """All vectors equal: float32 candidates are arbitrary, so the answer must come from the exact path."""
    row = np.random.RandomState(0).randn(1, 33).astype(np.float32)
    bank, queries = np.repeat(row, 300, axis=0), np.repeat(row, 4, axis=0)
    _, index = nearest(Vectors([[queries]]), Vectors([[bank]]), 7)
    assert index.tolist() == [list(range(7))] * 4


def test_near_ties_below_float32_are_resolved_in_float64():
    rng = np.random.RandomState(1)
    base = rng.randn(64)
    bank = (base + 2e-7 * rng.randn(500, 64)).astype(np.float32)
    queries = (base + 0.01 * rng.randn(6, 64)).astype(np.float32)
    labels = rng.randint(0, 3, 500)
    _, index = nearest(Vectors([[queries]]), Vectors([[bank]]), 9)
    expected, _ = brute_force(queries, bank, labels, 9, 0.07, 3)
    assert np.array_equal(index, expected)


def test_similarities_too_close_for_bf16_are_settled_in_fp32_or_better(monkeypatch):
    rng = np.random.RandomState(2)
    base = rng.randn(48)
    bank = (base + 0.02 * rng.randn(3000, 48)).astype(np.float32)
    queries = (base + 0.02 * rng.randn(40, 48)).astype(np.float32)
    left_open = []
    settle = knn._settle
    monkeypatch.setattr(knn, "_settle", lambda *a, **k: (left_open.append((k["dtype"], len(a[2]))), settle(*a, **k))[1])
    _, index = nearest(Vectors([[queries]]), Vectors([[bank]]), 10)
    expected, _ = brute_force(queries, bank, rng.randint(0, 3, 3000), 10, 0.07, 3)
    assert np.array_equal(index, expected)
    assert left_open[-1] == (torch.float32, 40)  # bf16, where it was tried, was certain of none


def test_the_slack_bounds_the_error_of_the_arithmetic():
    queries, bank, _, _ = data(queries=60, bank=900, dim=384)
    left, right = Vectors([[queries]]), Vectors([[bank]])
    exact = left.unit(np.arange(60), torch.float64) @ right.unit(np.arange(900), torch.float64).T
    for dtype in (torch.bfloat16, torch.float32):
        best, where, slack = knn._candidates(
            left, right, np.arange(60), 900, dtype=dtype, device="cpu", memory_bytes=2**24
        )
        error = (best.double() - exact.gather(1, where)).abs().max(1).values
        assert (error <= slack).all()
        assert slack.max() < 0.02  # and is small enough to be of use


def test_zero_vectors_have_no_direction_and_no_nan():
    queries, bank, labels, classes = data()
    queries[0] = bank[0] = 0
    similarity, index = nearest(Vectors([[queries]]), Vectors([[bank]]), 5)
    assert torch.isfinite(similarity).all()
    assert np.array_equal(index, brute_force(queries, bank, labels, 5, 0.07, classes)[0])


def test_shards_and_joined_parts_are_the_same_as_one_array():
    queries, bank, _, _ = data()
    whole = nearest(Vectors([[queries]]), Vectors([[bank]]), 6)
    parts = Vectors(
        [[bank[:100, :4], bank[100:150, :4], bank[150:, :4]], [bank[:100, 4:], bank[100:150, 4:], bank[150:, 4:]]]
    )
    split = nearest(Vectors([[queries[:1], queries[1:]]]), parts, 6)
    assert np.array_equal(whole[1], split[1])
    assert torch.equal(whole[0], split[0])


def test_rows_choose_a_part_of_the_bank():
    queries, bank, _, _ = data()
    rows = np.array([3, 5, 8, 100, 210])
    _, index = nearest(Vectors([[queries]]), Vectors([[bank]], rows), 3)
    _, expected = nearest(Vectors([[queries]]), Vectors([[bank[rows]]]), 3)
    assert np.array_equal(index, expected)


def test_low_temperatures_do_not_overflow():
    similarity = torch.tensor([[1.0, 0.99]], dtype=torch.float64)
    assert vote(similarity, np.array([[1, 0]]), 1e-5, 2).tolist() == [1]


def test_a_tied_vote_goes_to_the_first_class():
    similarity = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    assert vote(similarity, np.array([[3, 1]]), 0.07, 5).tolist() == [1]


def test_a_share_of_the_bank_is_drawn_from_every_class_and_by_the_seed():
    labels = np.repeat(np.arange(10), [100, 50, 20, 10, 10, 10, 10, 5, 3, 1])
    rows = bank_rows(labels, 10, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 2, 1, 1, 1, 1, 1, 1, 1]
    assert np.array_equal(rows, bank_rows(labels, 10, seed=0))
    assert not np.array_equal(rows, bank_rows(labels, 10, seed=1))
    assert np.array_equal(bank_rows(labels, 100, seed=0), np.arange(len(labels)))


# What the sources say, typed again: neighbors (reported first), temperatures, vectors, bank, selected on.
PUBLISHED = {
    "dino": ({10, 20, 100, 200}, 20, {0.07}, "cls", 100, "none"),
    "ibot": ({10, 20, 100, 200}, 20, {0.07}, "cls", 100, "none"),
    "moca-paper": ({20}, 20, {0.07}, "patch_mean", 100, "none"),
    "moca-code": (
        {10, 20},
        20,
        {0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.10, 0.12, 0.15, 0.20},
        "patch_mean",
        100,
        "test",
    ),
    "mmc-patch": ({10, 20, 50, 100}, 10, {0.07}, "patch_mean", 100, "none"),
    "mmc-cls": ({10, 20, 50, 100}, 10, {0.07}, "cls", 100, "none"),
    "mmc-hybrid": ({10, 20, 50, 100}, 10, {0.07}, "cls+patch_mean", 100, "none"),
    "extrema": ({200}, 200, {0.07}, "cls", 10, "none"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_what_their_sources_say(name):
    recipe = RECIPES[name]
    neighbors, first, temperatures, vector, bank, selected_on = PUBLISHED[name]
    assert (set(recipe.neighbors), recipe.neighbors[0]) == (neighbors, first)
    assert set(recipe.temperature) == temperatures
    assert recipe.vector[0] == vector
    assert recipe.bank_percent == bank
    assert recipe.selected_on == selected_on
    assert (recipe.resize_px, recipe.crop_px, recipe.interpolation, recipe.norm) == (256, 224, "bicubic", True)


@pytest.mark.parametrize(
    "change", [{"neighbors": (0,)}, {"temperature": (0.0,)}, {"bank_percent": 0.0}, {"bank_percent": 101.0}]
)
def test_impossible_recipes_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(RECIPES["dino"], **change)


def test_chance_is_noticed():
    labels = np.repeat([0, 1], 50)
    assert knn._near_chance(55.0, labels)
    assert not knn._near_chance(90.0, labels)
