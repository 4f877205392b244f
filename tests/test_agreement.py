"""Rank correlation and swaps of order, against counting by hand and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ssl_bench.leaderboards import agreement
from ssl_bench.leaderboards.paired import mcnemar


def counted(a: list[float], b: list[float]) -> float | None:
    """Tau-b, pair by pair."""
    concordant = discordant = untied_a = untied_b = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        product = (a[i] - a[j]) * (b[i] - b[j])
        concordant, discordant = concordant + (product > 0), discordant + (product < 0)
        untied_a, untied_b = untied_a + (a[i] != a[j]), untied_b + (b[i] != b[j])
    return (concordant - discordant) / math.sqrt(untied_a * untied_b) if untied_a and untied_b else None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("values", [3, 100])  # with many ties, and with few
def test_tau_is_the_counted_one_and_scipys(seed, values):
    a, b = np.random.default_rng(seed).integers(0, values, (2, 12)).tolist()
    assert agreement.kendall_tau(a, b) == pytest.approx(counted(a, b))
    assert agreement.kendall_tau(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)


def test_tau_at_its_ends():
    assert agreement.kendall_tau([1, 2, 3], [5, 6, 9]) == 1
    assert agreement.kendall_tau([1, 2], [9, 1]) == -1
    assert agreement.kendall_tau([1, 1], [1, 2]) is None
    assert agreement.kendall_tau([1], [2]) is None


def test_taus_are_over_common_models():
    found = agreement.taus({"x": {"a": 1, "b": 2, "c": 3}, "y": {"a": 1, "b": 2, "c": 0}, "z": {"a": 5, "b": 1}})
    assert found == {("x", "y"): pytest.approx(-1 / 3), ("x", "z"): -1, ("y", "z"): -1}


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04: 4 x .01, then 3 x .02 = .06, then 2 x .03 = .06, then .04, which may not fall below .06.
    assert agreement.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert agreement.holm([0.9, 0.8]) == [1.0, 1.0]
    assert agreement.holm([]) == []


def outcomes(rights: int, of: int = 200) -> np.ndarray:
    """The first so many images are right: an easier image is right for every better model."""
    return np.arange(of) < rights


def test_duels_are_corrected_mcnemar_tests():
    found = agreement.duels({"x": {"a": outcomes(60), "b": outcomes(50), "c": outcomes(50)}})
    assert [(duel.a, duel.b, duel.difference) for duel in found] == [("a", "b", 5), ("a", "c", 5), ("b", "c", 0)]
    assert [duel.p for duel in found] == pytest.approx([3 * mcnemar(10, 0), 3 * mcnemar(10, 0), 1])


def test_a_swap_is_significant_only_if_it_is_on_both_sides():
    correct = {
        "x": {"a": outcomes(100), "b": outcomes(60), "c": outcomes(99), "d": outcomes(99)},
        "y": {"a": outcomes(60), "b": outcomes(100), "c": outcomes(100), "d": outcomes(99)},
    }
    found = agreement.swaps(agreement.duels(correct))
    significant = [swap for swap in found if swap.significant]
    assert [(swap.a, swap.b) for swap in significant] == [("a", "b")]
    assert found[0] is significant[0]
    assert (found[0].a_leads[0].variant, found[0].b_leads[0].variant) == ("x", "y")
    # b trails c and d under x and under y it ties c and leads d by one image; c and d never swap: they tie under x.
    assert {(swap.a, swap.b) for swap in found} == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "d")}


def test_the_surest_variant_of_a_swap_comes_first():
    rights = {"x": (80, 79), "y": (100, 60), "z": (10, 12)}
    (swap,) = agreement.swaps(
        agreement.duels({v: {"a": outcomes(a), "b": outcomes(b)} for v, (a, b) in rights.items()})
    )
    assert [duel.variant for duel in swap.a_leads] == ["y", "x"]
    assert [duel.variant for duel in swap.b_leads] == ["z"]
    assert not swap.significant
