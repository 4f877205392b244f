"""Paired tests against direct sums, plain resampling, simulation and published numbers; which runs they accept."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_record import make_record

from ssl_bench.errors import UserError
from ssl_bench.leaderboards import paired, sides
from ssl_bench.leaderboards.record import OpenedCheckpoint, Record, Score, write_record
from ssl_bench.leaderboards.store import load_results, load_samples

A, B = "a/toy/knn/dino", "b/toy/knn/dino"


# Statistics ---------------------------------------------------------------------------------------------------------


def direct_binomial(only_a: int, only_b: int) -> float:
    """All outcomes of the coin that are no likelier than the observed one, in whole numbers."""
    n = only_a + only_b
    ways = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(only_a - only_b))
    return float(Fraction(ways, 2**n))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 25, 150, 1001])
def test_mcnemar_is_the_direct_sum_of_binomials(n):
    for only_a in range(0, n + 1, max(1, n // 9)):
        assert paired.mcnemar(only_a, n - only_a) == pytest.approx(direct_binomial(only_a, n - only_a), rel=1e-12)


def test_published_examples():
    # Airway hyper-responsiveness before and after transplantation (1, 1, 7, 12): Fagerland, Lydersen and Laake 2013,
    # exact conditional p = 0.070; 2 (1 + 8) / 256.
    assert paired.mcnemar(1, 7) == pytest.approx(0.0703125, rel=1e-12)
    # Bonett and Price's interval, the example of R's statpsych::ci.prop.ps(.05, 12, 4, 26, 6).
    assert paired.adjusted_interval(np.array([4, 18, 26])) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)


def test_thousands_of_pairs_keep_their_precision():
    assert paired.mcnemar(20_000, 20_000) == 1
    # Normal approximation with continuity correction: |b - c| - 1 over sqrt(b + c).
    assert paired.mcnemar(20_300, 19_700) == pytest.approx(2 * stats.norm.sf(599 / math.sqrt(40_000)), rel=1e-3)
    assert 0 < paired.mcnemar(200, 0) < 1e-59


def all_signs(values: Sequence[int]) -> float:
    """The share of all ways to give the values signs whose sum is at least as far from 0 as theirs."""
    observed = abs(sum(values))
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    return sum(total >= observed for total in sums) / len(sums)


def counts_of(values: Sequence[int], seeds: int) -> np.ndarray:
    return np.bincount(np.array(values) + seeds, minlength=2 * seeds + 1)


@pytest.mark.parametrize(
    "values",
    [[3, 1, -2, 0, 1, 1], [2, 2, 2], [-3, -3, 1, 2, -1, -1, 0], [1, -1], [0, 0], [3, 3, 3, 2, 1, 2, 1, 3, 1, -1]],
)
def test_the_clustered_test_counts_all_signs(values):
    assert paired.clustered(counts_of(values, 3)) == pytest.approx(all_signs(values), abs=1e-9)


def test_one_seed_makes_the_clustered_test_mcnemars_and_so_do_seeds_that_agree():
    assert paired.clustered(np.array([7, 12, 1])) == paired.mcnemar(1, 7)
    assert paired.clustered(np.array([7, 0, 0, 12, 0, 0, 1])) == pytest.approx(paired.mcnemar(1, 7), abs=1e-12)


def test_seeds_are_no_images():
    """Ten seeds that say the same on 12 images are 12 observations, not 120."""
    right_a = np.zeros((10, 100), dtype=bool)
    right_b = np.zeros((10, 100), dtype=bool)
    right_a[:, :8], right_b[:, 8:12] = True, True
    assert paired.clustered(paired.difference_counts(right_a, right_b)) == pytest.approx(paired.mcnemar(8, 4), abs=1e-9)
    assert paired.mcnemar(80, 40) < 0.001
    assert paired.mcnemar(8, 4) > 0.1


def test_the_clustered_test_is_precise_for_a_whole_imagenet():
    counts = np.array([300, 900, 2000, 43_000, 2100, 1000, 350])
    values = np.arange(-3, 4)
    total = np.ones(1)  # of how many signs are +, weighted by value: one binomial a value, added up
    for value in (1, 2, 3):
        images = counts[3 + value] + counts[3 - value]
        spread_out = np.zeros(value * images + 1)
        spread_out[::value] = stats.binom.pmf(np.arange(images + 1), images, 0.5)
        total = np.convolve(total, spread_out)
    sums = 2 * np.arange(len(total)) - (len(total) - 1)
    assert paired.clustered(counts) == pytest.approx(total[np.abs(sums) >= abs(values @ counts)].sum(), rel=1e-6)
    assert paired.clustered(np.array([0, 0, 0, 100, 0, 500, 400])) == 1e-9  # as small as it can tell


def test_difference_counts():
    right_a = np.array([[1, 1, 0, 0, 1], [1, 1, 0, 1, 0]], dtype=bool)
    right_b = np.array([[0, 1, 0, 1, 1], [0, 0, 0, 1, 1]], dtype=bool)
    assert list(paired.difference_counts(right_a, right_b)) == [0, 2, 1, 1, 1]  # sums 2, 1, 0, -1, -1


def test_the_multinomial_is_plain_resampling_in_distribution():
    """Against all 6^6 ways to draw 6 images, and against drawing indices."""
    images = np.array([1, 1, 0, 0, -1, 1])
    ways = Counter(sum(drawn) for drawn in itertools.product(images, repeat=6))
    draws = 200_000
    quick = Counter(np.rint(6 * paired.resampled_means(counts_of(images, 1), draws, 0)).astype(int).tolist())
    for total in range(-6, 7):
        share = ways[total] / 6**6
        assert abs(quick[total] / draws - share) <= 5 * math.sqrt(max(share, 1e-5) / draws)

    rng = np.random.default_rng(1)
    sums = rng.choice([-2, -1, 0, 1, 2], p=[0.05, 0.1, 0.6, 0.2, 0.05], size=300)  # two seeds
    plain = np.array([sums[rng.integers(0, 300, 300)].mean() / 2 for _ in range(4000)])
    assert stats.ks_2samp(plain, paired.resampled_means(counts_of(sums, 2), 4000, 0)).pvalue > 0.01
    low, high = paired.bootstrap_interval(counts_of(sums, 2))
    assert (low, high) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.006)


def test_the_bootstrap_is_seeded_and_quick():
    counts = np.array([2500, 45_000, 2500])
    started = time.perf_counter()
    assert paired.bootstrap_interval(counts) == paired.bootstrap_interval(counts)
    assert time.perf_counter() - started < 2
    assert paired.bootstrap_interval(counts) != paired.bootstrap_interval(counts, seed=1)


@pytest.mark.parametrize(
    ("images", "p_a", "p_b", "least"), [(400, 0.12, 0.07, 0.93), (60, 0.10, 0.05, 0.93), (25, 0.04, 0.04, 0.95)]
)
def test_intervals_cover(images, p_a, p_b, least):
    drawn = np.random.default_rng(0).multinomial(images, [p_b, 1 - p_a - p_b, p_a], size=600)
    truth = p_a - p_b
    adjusted = [paired.adjusted_interval(counts) for counts in drawn]
    assert least <= np.mean([low <= truth <= high for low, high in adjusted]) <= (0.99 if images > 50 else 1)
    if images == 400:
        bootstrap = [paired.bootstrap_interval(counts, resamples=1000) for counts in drawn]
        assert 0.93 <= np.mean([low <= truth <= high for low, high in bootstrap]) <= 0.97


def test_mcnemar_never_rejects_too_often_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    same, better = (rng.multinomial(500, [p, 0.8, 0.2 - p], size=4000) for p in (0.1, 0.06))
    reject_same, reject_better = (np.mean([paired.clustered(c) < 0.05 for c in drawn]) for drawn in (same, better))
    assert 0.02 < reject_same < 0.05
    assert reject_better > 0.95


def test_no_discordant_pairs():
    assert paired.clustered(np.array([0, 50, 0])) == 1
    assert paired.bootstrap_interval(np.array([0, 50, 0])) == (0, 0)
    low, high = paired.adjusted_interval(np.array([0, 50, 0]))
    assert low == -high == pytest.approx(-1.96 * math.sqrt(2 / 52 / 52), rel=1e-3)
    assert paired.odds_ratio(0, 0) == (None, (0.0, None))


@pytest.mark.parametrize(("only_a", "only_b"), [(12, 5), (5, 12), (30, 30), (1, 9)])
def test_the_odds_ratio_has_its_exact_interval(only_a, only_b):
    ratio, (low, high) = paired.odds_ratio(only_a, only_b)
    assert ratio == only_a / only_b
    n = only_a + only_b
    # At the bounds, what was seen or more (less) of it has a probability of 2.5 %.
    assert stats.binom.sf(only_a - 1, n, low / (1 + low)) == pytest.approx(0.025)
    assert stats.binom.cdf(only_a, n, high / (1 + high)) == pytest.approx(0.025)


def test_the_odds_ratio_without_bounds():
    ratio, (low, high) = paired.odds_ratio(5, 0)
    assert (ratio, high) == (None, None)
    assert low == pytest.approx(0.025 ** (1 / 5) / (1 - 0.025 ** (1 / 5)))
    ratio, (low, high) = paired.odds_ratio(0, 5)
    assert (ratio, low) == (0, 0)


def test_paired_t_and_welch_are_scipys():
    x, y = np.array([61.0, 62.5, 60.2, 63.0]), np.array([60.1, 61.0, 60.0, 61.5])
    ours, theirs = paired.paired_t(list(x - y)), stats.ttest_rel(x, y)
    assert (ours.p, *ours.interval95) == pytest.approx((theirs.pvalue, *theirs.confidence_interval()))
    a, b = (Score(value=v.mean(), n=4, std=float(v.std(ddof=1)), ddof=1) for v in (x, y))
    ours, theirs = paired.welch(a, b), stats.ttest_ind(x, y, equal_var=False)
    assert (ours.p, ours.df, *ours.interval95) == pytest.approx(
        (theirs.pvalue, theirs.df, *theirs.confidence_interval())
    )
    ddof0 = Score(value=x.mean(), n=4, std=float(x.std(ddof=0)), ddof=0)
    stderr = Score(value=x.mean(), n=4, stderr=float(x.std(ddof=1)) / 2)
    half = Score(value=x.mean(), n=4, interval95=1.96 * float(x.std(ddof=1)) / 2)
    for same in (ddof0, stderr, half):
        assert paired.welch(same, b).p == pytest.approx(ours.p)


@pytest.mark.parametrize("differences", [[], [1.5], [0.1 + 0.2, 0.3, 0.3]])
def test_seeds_without_a_spread_say_nothing(differences):
    assert paired.paired_t(differences) is None


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results"


def store(
    root: Path, model: str, right: Sequence[int] | None, order: Sequence[int] | None = None, **changes: object
) -> Path:
    """A record with outcomes: image i is right where right[i] is 1."""
    weights = f"{sum(map(ord, model)):064x}"
    samples = None
    if right is not None:
        order = range(len(right)) if order is None else order
        correct = np.array([bool(right[i]) for i in order])
        labels = np.array([i % 3 for i in order])
        ids = [f"val/{i:04d}" for i in order]
        samples = {"sample_id": ids, "label": labels, "prediction": np.where(correct, labels, 9), "correct": correct}
        value = 100 * float(np.mean(correct))
        changes = {"scores": {"top1": Score(value=value, n=len(correct), stderr=1.0)}, **changes}
    record = make_record(**{"model": model, "weights_sha256": weights, **changes})
    return write_record(record, root, samples=samples)


RIGHT_A = [1] * 30 + [1] * 12 + [0] * 3 + [0] * 55
RIGHT_B = [1] * 30 + [0] * 12 + [1] * 3 + [0] * 55


def test_two_runs_by_name_and_by_path_whatever_the_order_of_their_images(root):
    path_a = store(root, "a", RIGHT_A)
    path_b = store(root, "b", RIGHT_B, order=list(reversed(range(100))))
    outcome = paired.compare(A, B, root=root)
    assert outcome.values == (42, 33)
    assert (outcome.difference, outcome.better, outcome.test) == (9, "a", "McNemar's exact test")
    assert outcome.p == paired.mcnemar(12, 3) < 0.05
    pairs = outcome.pairs
    assert (pairs.images, pairs.both, pairs.only_a, pairs.only_b, pairs.neither) == (100, 30, 12, 3, 55)
    assert pairs.odds_ratio == 4
    assert outcome.interval95 == tuple(100 * x for x in paired.adjusted_interval(np.array([3, 85, 12])))
    assert pairs.bootstrap_interval95 == tuple(100 * x for x in paired.bootstrap_interval(np.array([3, 85, 12])))
    assert outcome.over_seeds is None
    assert outcome.notes == ()
    by_path = paired.compare(path_a, str(path_b))
    assert (by_path.p, by_path.values) == (outcome.p, outcome.values)
    other_way = paired.compare(B, A, root=root)
    assert (other_way.difference, other_way.better) == (-9, "b")


def test_a_difference_that_may_be_luck(root):
    store(root, "a", [1] * 10 + [0] * 90)
    store(root, "b", [1] * 8 + [0] * 92)
    outcome = paired.compare(A, B, root=root)
    assert (outcome.better, outcome.p) == (None, 0.5)


@pytest.mark.parametrize(("value", "lower"), [(50.0, False), (42.0, True)])
def test_outcomes_that_are_not_what_the_main_metric_counts_decide_nothing(root, value, lower):
    path = store(root, "a", RIGHT_A, lower_is_better=lower, scores={"top1": Score(value=value, n=100, stderr=2.0)})
    store(root, "b", RIGHT_B, lower_is_better=lower)
    outcome = paired.compare(A, B, root=root)
    assert (outcome.pairs, outcome.test) == (None, "Welch's unpaired t test")
    assert outcome.values == (value, 33)
    assert outcome.better == ("b" if lower else "a")
    said = "lower is better" if lower else "50.00"
    assert outcome.notes[0].startswith(f"{path}: kept outcomes have an accuracy of 42.00, top1 is not ({said}). So ")


def test_a_recipe_that_was_edited_without_a_new_version_is_refused(root):
    path_a = store(root, "a", RIGHT_A, resolved_recipe={"k": 20, "norm": True, "source": "x", "old": 1})
    same = store(root, "b", RIGHT_B, resolved_recipe={"k": 20, "norm": True, "source": "y", "new": 1})
    assert paired.compare(path_a, same).notes == ()
    path_b = store(root, "b", RIGHT_B, resolved_recipe={"k": 10, "norm": True})
    with pytest.raises(UserError, match=r"recipe: k=20 against k=10.*--allow recipe"):
        paired.compare(path_a, path_b)
    assert paired.compare(path_a, path_b, allow=["recipe"]).p == paired.mcnemar(12, 3)
    other = store(root, "b", RIGHT_B, resolved_recipe={"k": 10, "norm": True}, overrides={"k": 10})
    assert paired.compare(path_a, other, allow=["settings"]).notes == ("settings differs: none against k=10.",)


REFUSED = {
    "dataset": ({"dataset": "digits"}, "dataset: toy against digits"),
    "data": ({"dataset_manifest_sha256": {"val": "e" * 64}}, "images .manifest.: .*dddddddd against val=eeeeeeee"),
    "version": ({"version": 2}, "version: 1 against 2.*--allow version"),
    "recipe": ({"recipe": "ibot"}, "recipe: dino against ibot.*--allow recipe"),
    "protocol": ({"protocol": "linear"}, "protocol: knn against linear.*--allow protocol"),
    "settings": ({"overrides": {"neighbors": 5}}, "settings: none against neighbors=5.*--allow settings"),
    "dtype": ({"dtype": "bf16"}, "dtype: fp32 against bf16"),
    "limit": ({"limit": 100}, "--limit: None against 100"),
    "lists": ({"subset": {"val_list": "x 12345678"}}, "lists: none against val_list=x 12345678"),
    "skipped": ({"skipped_broken": {"train": 1, "val": 0}}, "broken images left out"),
    "seed": ({"seed": 1}, r"no seed in common \(0 against 1\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_did_not_measure_the_same_is_refused(root, name):
    change, message = REFUSED[name]
    path_a, path_b = store(root, "a", RIGHT_A), store(root, "b", RIGHT_B, **change)
    with pytest.raises(UserError, match=message) as raised:
        paired.compare(path_a, path_b)
    if name in ("dataset", "data", "limit", "lists", "skipped", "seed"):
        assert "--allow" not in str(raised.value)
    if name in paired.ALLOWED:
        outcome = paired.compare(path_a, path_b, allow=[name])
        assert outcome.p == paired.mcnemar(12, 3)
        assert outcome.notes[0].startswith(f"{name} differs: ")


def test_another_metric_is_refused(root):
    path_a = store(root, "a", RIGHT_A)
    path_b = store(root, "b", RIGHT_B, scores={"mAP": Score(value=1, n=9, stderr=1.0)}, main_metric="mAP")
    with pytest.raises(UserError, match="metric: top1 against mAP"):
        paired.compare(path_a, path_b)


def test_another_protocol_brings_its_own_recipe(root):
    path_a = store(root, "a", RIGHT_A)
    path_b = store(root, "a", RIGHT_B, protocol="linear", recipe="moca", version=3)
    assert paired.compare(path_a, path_b, allow=["protocol"]).p == paired.mcnemar(12, 3)
    with pytest.raises(UserError, match="protocol: knn against linear; version: 1 against 3"):
        paired.compare(path_a, path_b, allow=["recipe"])
    with pytest.raises(UserError, match="unknown --allow 'recipes'; did you mean 'recipe'"):
        paired.compare(path_a, path_b, allow=["recipes"])


def test_other_images_or_labels_are_refused(root):
    path_a = store(root, "a", RIGHT_A)
    with pytest.raises(UserError, match="1 images are not in both runs, for instance 'val/0099'"):
        paired.compare(path_a, store(root, "b", RIGHT_B[:-1]))
    other = store(root, "c", RIGHT_B)
    frame = load_samples(other)
    frame.loc[8, "label"] = 2 - frame.loc[8, "label"]
    frame.to_parquet(other.with_name(other.name.removesuffix(".json") + ".samples.parquet"))
    with pytest.raises(UserError, match="some images have another label"):
        paired.compare(path_a, other)


def test_a_run_is_not_compared_with_itself(root):
    path = store(root, "a", RIGHT_A)
    with pytest.raises(UserError, match="the same run twice"):
        paired.compare(A, path, root=root)


def test_limited_runs_are_said(root):
    store(root, "a", RIGHT_A, limit=100)
    store(root, "b", RIGHT_B, limit=100)
    assert paired.compare(A, B, root=root).notes == ("Limited runs: 100 images a split, a quick try.",)


def test_a_name_is_the_plain_run(root):
    plain = store(root, "a", RIGHT_A)
    store(root, "a", RIGHT_B, overrides={"neighbors": 5})
    store(root, "a", RIGHT_B, limit=5)
    store(root, "a", RIGHT_B, dtype="bf16")
    assert sides.find(A, load_results(root)).paths == (plain,)


def test_a_plain_run_may_have_any_seed(root):
    plain = [store(root, "a", RIGHT_A, seed=seed) for seed in (12, 3)]
    store(root, "a", RIGHT_B, overrides={"neighbors": 5}, seed=3)
    found = sides.find(A, load_results(root))
    assert (found.seeds, found.paths) == ((3, 12), (plain[1], plain[0]))


def test_a_name_of_several_kinds_lists_them(root):
    paths = [store(root, "a", RIGHT_B, overrides={"neighbors": 5}), store(root, "a", RIGHT_B, limit=5)]
    with pytest.raises(UserError, match="may be any of 2 records") as raised:
        sides.find(A, load_results(root))
    for path, what in zip(paths, ("neighbors=5", "limit=5"), strict=True):
        assert any(str(path) in line and what in line for line in str(raised.value).splitlines())
    plain = [store(root, "a", RIGHT_A), store(root, "a", RIGHT_A, weights_sha256="0" * 64)]
    with pytest.raises(UserError, match=r"may be any of 4 records(?s:.*)000000000000"):
        sides.find(A, load_results(root))
    assert sides.find(str(plain[1]), load_results(root)).paths == (plain[1],)


def test_names_that_do_not_exist(root):
    with pytest.raises(UserError, match="no records under"):
        paired.compare(A, B, root=root)
    store(root, "moca", RIGHT_A)
    with pytest.raises(UserError, match=r"unknown run .*'mocca/toy/knn/dino'; did you mean 'moca/toy/knn/dino'"):
        paired.compare("mocca/toy/knn/dino", B, root=root)
    with pytest.raises(UserError, match="cannot be read"):
        paired.compare("none.json", A, root=root)
    with pytest.raises(UserError, match="no user of that name"):
        paired.compare("~nobody-of-this-name/x.json", A, root=root)


def test_what_cannot_be_read_is_named(root):
    torn = store(root, "moca", RIGHT_A)
    store(root, "a", RIGHT_A), store(root, "b", RIGHT_B)
    torn.write_text(torn.read_text()[:100])
    with pytest.raises(UserError, match="unknown run") as raised:
        paired.compare("moca/toy/knn/dino", A, root=root)
    assert f"left out: {torn}" in str(raised.value)
    (problem,) = paired.compare(A, B, root=root).problems
    assert str(torn) in problem


# Seeds --------------------------------------------------------------------------------------------------------------


def seeded(root: Path, model: str, rates: Sequence[float], images: int = 400, **changes: object) -> np.ndarray:
    """Runs of one network with several seeds, on images of which some are easier than others."""
    rng = np.random.default_rng(7)
    ease = rng.random(images)
    right = np.array(
        [
            ease + 0.1 * np.random.default_rng([seed, ord(model[0])]).random(images) < rate
            for seed, rate in enumerate(rates)
        ]
    )
    for seed, row in enumerate(right):
        store(root, model, row.astype(int), seed=seed, **changes)
    return right


def test_several_seeds_give_both_tests(root):
    right_a, right_b = seeded(root, "a", [0.60, 0.61, 0.62]), seeded(root, "b", [0.50, 0.52, 0.51])
    outcome = paired.compare(A, B, root=root)
    assert outcome.a.seeds == (0, 1, 2)
    assert outcome.values == pytest.approx((100 * right_a.mean(), 100 * right_b.mean()))
    reference = stats.ttest_rel(100 * right_a.mean(axis=1), 100 * right_b.mean(axis=1))
    assert (outcome.over_seeds.p, *outcome.over_seeds.interval95) == pytest.approx(
        (reference.pvalue, *reference.confidence_interval())
    )
    sums = right_a.sum(axis=0) - right_b.sum(axis=0)
    assert outcome.p == paired.clustered(counts_of(sums, 3))
    assert outcome.better == "a"
    assert outcome.pairs.images == 400
    assert outcome.pairs.only_a == int((right_a & ~right_b).sum())
    assert outcome.pairs.odds_ratio_interval95 is None


def test_better_on_these_images_with_seeds_that_disagree_is_not_better(root):
    seeded(root, "a", [0.90, 0.52]), seeded(root, "b", [0.50, 0.50])
    outcome = paired.compare(A, B, root=root)
    assert outcome.p < 0.001
    assert outcome.over_seeds.p > 0.05
    assert outcome.better is None


def test_only_common_seeds_are_compared(root):
    seeded(root, "a", [0.6, 0.6, 0.6]), seeded(root, "b", [0.5, 0.5])
    outcome = paired.compare(A, B, root=root)
    assert outcome.a.seeds == outcome.b.seeds == (0, 1)
    assert outcome.notes[0] == "Left out, since only one side has them: seeds 2."


def test_seeds_that_change_nothing_are_said(root):
    for seed in (0, 1, 2):
        store(root, "a", RIGHT_A, seed=seed)
        store(root, "b", RIGHT_B, seed=seed)
    outcome = paired.compare(A, B, root=root)
    assert outcome.p == pytest.approx(paired.mcnemar(12, 3), abs=1e-9)
    assert (outcome.over_seeds, outcome.better) == (None, "a")
    assert outcome.notes == ("Every seed gives the same difference, which says nothing about other seeds.",)


def test_random_networks_of_several_seeds_are_one_side(root):
    opened = OpenedCheckpoint(spec="random:x", format="random", matched_percent=None, notes=[])
    for seed in (0, 1):
        store(root, "a", RIGHT_A, seed=seed, checkpoint=opened, weights_sha256=f"{seed}" * 64)
    assert sides.find(A, load_results(root)).seeds == (0, 1)


# Without outcomes of images -----------------------------------------------------------------------------------------


def scored(root: Path, model: str, value: float, stderr: float | None, **changes: object) -> Record:
    store(root, model, None, scores={"miou": Score(value=value, n=1000, stderr=stderr)}, main_metric="miou", **changes)


def test_without_outcomes_the_standard_errors_decide_and_it_is_said(root):
    scored(root, "a", 45.0, 0.6), scored(root, "b", 43.0, 0.7)
    outcome = paired.compare(A, B, root=root)
    assert outcome.test == "Welch's unpaired t test"
    error = math.hypot(0.6, 0.7)
    assert outcome.p == pytest.approx(2 * stats.norm.sf(2 / error), rel=0.02)
    assert outcome.interval95 == pytest.approx((2 - 1.96 * error, 2 + 1.96 * error), rel=0.01)
    assert (outcome.better, outcome.pairs) == ("a", None)
    assert "unpaired test from the two standard errors" in outcome.notes[0]


def test_low_may_be_good(root):
    scored(root, "a", 45.0, 0.1, lower_is_better=True), scored(root, "b", 43.0, 0.1, lower_is_better=True)
    assert paired.compare(A, B, root=root).better == "b"


def test_one_side_without_outcomes_is_enough_to_fall_back(root):
    store(root, "a", RIGHT_A)
    store(root, "b", None, scores={"top1": Score(value=33, n=100, stderr=1.0)})
    assert paired.compare(A, B, root=root).test == "Welch's unpaired t test"


def test_seeds_that_differ_by_the_same_have_nothing_to_say(root):
    for seed in range(3):
        scored(root, "a", 45.0 + seed, None, seed=seed), scored(root, "b", 43.0 + seed, None, seed=seed)
    with pytest.raises(UserError, match="All 3 seeds give the same difference"):
        paired.compare(A, B, root=root)


def test_numbers_at_the_ends_of_floats():
    a, b = Score(value=3.0, n=10**400, stderr=1e200), Score(value=1.0, n=10**400, std=1.0, ddof=0)
    assert paired.welch(a, b).p == pytest.approx(1)


def test_without_outcomes_seeds_decide(root):
    for seed, (x, y) in enumerate([(45, 43), (46, 43.5), (44, 42.5)]):
        scored(root, "a", x, None, seed=seed), scored(root, "b", y, None, seed=seed)
    outcome = paired.compare(A, B, root=root)
    assert outcome.p == pytest.approx(stats.ttest_1samp([2, 2.5, 1.5], 0).pvalue)
    assert (outcome.test, outcome.better) == ("paired t test over 3 seeds", "a")


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (None, "a score has no standard error.*Run both with several seeds"),
        (0.0, "standard error of 0"),
        (1e-15, "standard error of 0"),  # rounding
    ],
)
def test_without_any_uncertainty_it_is_refused(root, stderr, message):
    scored(root, "a", 45.0, stderr), scored(root, "b", 43.0, stderr)
    with pytest.raises(UserError, match=message):
        paired.compare(A, B, root=root)
