"""Is one run better than another, or was it luck? Paired by image where the protocol counts them.

    ssl-bench compare moca-b/imagenet/knn/dino mae-b/imagenet/knn/dino

1. One seed. Only images that one run gets right and the other wrong say anything about the difference. The test is
   McNemar's, by the exact binomial for any number of them: it costs microseconds, needs no rule about when a chi-square
   is good enough, and never rejects more often than it claims (Fagerland et al. 2013 call it conservative; that is felt
   where a handful of images decide, and there caution is right). The interval of the difference is Wald's after one
   image more for each side (Bonett and Price 2012), which covers as it should for few images too; the percentile
   interval of a paired bootstrap stands beside it and assumes no formula, but collapses where hardly any image decides.
2. Several seeds, the same for both sides. Two questions, two answers. "On other images?": an image is one observation,
   however many seeds saw it, so its outcomes are summed over seeds, and the test flips the signs of these sums (with
   one seed this is McNemar's test); counting every (image, seed) as an observation would find significance everywhere.
   "With other seeds?": a paired t interval of the differences, seed by seed. A side is called better if both say so
   (the first alone, where every seed gives the same difference and the second has no answer).
3. No per-image outcomes (segmentation, detection, episodes): several seeds leave the paired t. One seed leaves an
   unpaired test from the two standard errors (Welch), which is weaker, since what both runs find hard is not cancelled.

Whether training again would give the same answer, no test on one training run can tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ssl_bench.errors import UserError, unknown
from ssl_bench.leaderboards.record import Record, Score, samples_path, settings_text
from ssl_bench.leaderboards.sides import Side, find, is_path
from ssl_bench.leaderboards.store import Results, load_results, load_samples

Interval = tuple[float, float]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

LEVEL = 0.05
_Z = 1.959963984540054  # of a normal distribution, 2.5 % lie above
_FFT_FLOOR = 1e-9  # below it, rounding of the Fourier transform is all there is
_ROUNDING = 1e-9  # points that are no spread
_PRINTED = 0.005  # points that two decimals do not show


# Statistics, on arrays and counts. ----------------------------------------------------------------------------------


def difference_counts(a: BoolArray, b: BoolArray) -> IntArray:
    """Of correct answers (seeds, images): how many images have a sum of a - b over the seeds of -S, ..., 0, ..., S.

    With one seed: [only b is right, both or none, only a is right].
    """
    assert a.shape == b.shape, f"expected the same seeds and images, found {a.shape} and {b.shape}"
    seeds = len(a)
    sums = a.sum(axis=0, dtype=np.int64) - b.sum(axis=0, dtype=np.int64)
    return np.bincount(sums + seeds, minlength=2 * seeds + 1)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: twice the smaller tail of a fair coin thrown `only_a + only_b` times."""
    from scipy.special import bdtr  # the binomial's distribution function

    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))) if only_a + only_b else 1.0


def clustered(counts: IntArray) -> float:
    """Two-sided p for no difference, an image being one observation: all signs of the images' sums are equally likely.

    Their total W is the sum of |v| times a fair sign, so its characteristic function is a product of cosines, and one
    Fourier transform gives its exact distribution. One seed: McNemar's test. `counts`: see difference_counts.
    """
    if len(counts) == 3:
        return mcnemar(int(counts[2]), int(counts[0]))
    values, seeds = _values(counts), len(counts) // 2
    largest, observed = int(np.abs(values) @ counts), abs(int(values @ counts))
    angles = 2 * np.pi * np.arange(largest + 1) / (largest + 1)  # (W + largest) / 2 is one of 0 .. largest
    transform = np.exp(0.5j * angles * largest)
    for value in range(1, seeds + 1):
        transform *= np.cos(0.5 * angles * value) ** int(counts[seeds + value] + counts[seeds - value])
    probability = np.fft.fft(transform).real / (largest + 1)
    totals = 2 * np.arange(largest + 1) - largest
    return float(np.clip(probability[np.abs(totals) >= observed].sum(), _FFT_FLOOR, 1.0))


def adjusted_interval(counts: IntArray) -> Interval:
    """95 % interval of the mean difference: Wald's, after adding one image all for a and one all for b."""
    counts = counts.copy()
    counts[[0, -1]] += 1
    values, n = _values(counts) / (len(counts) // 2), int(counts.sum())
    mean = float(values @ counts) / n
    half = _Z * math.sqrt((float(values**2 @ counts) / n - mean**2) / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def bootstrap_interval(counts: IntArray, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean difference when images are drawn again with replacement.

    The mean depends on how often each value was drawn, and these numbers are multinomial: no image is really drawn.
    """
    means = resampled_means(counts, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def resampled_means(counts: IntArray, resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """The mean differences of so many bootstrap resamples."""
    n = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    means: npt.NDArray[np.float64] = drawn @ _values(counts) / (n * (len(counts) // 2))
    return means


def _values(counts: IntArray) -> IntArray:
    seeds = len(counts) // 2
    return np.arange(-seeds, seeds + 1)


def odds_ratio(only_a: int, only_b: int) -> tuple[float | None, tuple[float | None, float | None]]:
    """Images that only a has right for each that only b has right, and its exact 95 % interval (Clopper and Pearson).

    None: without bound; the ratio itself also where no image tells the two apart.
    """
    from scipy.special import betaincinv

    n = only_a + only_b
    low = float(betaincinv(only_a, only_b + 1, LEVEL / 2)) if only_a else 0.0
    high = float(betaincinv(only_a + 1, only_b, 1 - LEVEL / 2)) if only_b else 1.0
    ratio = only_a / only_b if only_b else None
    return ratio, (low / (1 - low) if n else 0.0, high / (1 - high) if high < 1 else None)


@dataclass(frozen=True)
class StudentTest:
    """A difference a - b with its 95 % interval and its p: of a t distribution with `df` degrees of freedom."""

    difference: float
    interval95: Interval
    p: float
    df: float


def t_test(difference: float, stderr: float, df: float) -> StudentTest:
    """Of a difference that has this standard error."""
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(df, 1 - LEVEL / 2)) * stderr
    p = 2 * float(stdtr(df, -abs(difference) / stderr))
    return StudentTest(difference, (difference - half, difference + half), p, df)


def paired_t(differences: Sequence[float]) -> StudentTest | None:
    """Over seeds; None where their spread is unknown, because there is one, or where all give the same."""
    n = len(differences)
    spread = statistics.stdev(differences) if n > 1 else 0.0
    if spread < _ROUNDING:
        return None
    return t_test(statistics.fmean(differences), spread / math.sqrt(n), n - 1)


def welch(a: Score, b: Score) -> StudentTest:
    """Unpaired, from the two standard errors."""
    (error_a, df_a), (error_b, df_b) = _standard_error(a), _standard_error(b)
    error = math.hypot(error_a, error_b)
    if error < _ROUNDING:
        raise UserError("both scores have a standard error of 0, so there is nothing to hold their difference against.")
    df = 1 / ((error_a / error) ** 4 / df_a + (error_b / error) ** 4 / df_b)
    return t_test(a.value - b.value, error, df)


def _standard_error(score: Score) -> tuple[float, float]:
    """And its degrees of freedom."""
    n = min(score.n, 10**15)  # more make no difference, but may be more than a float can hold
    if n > 1 and score.stderr is not None:
        return score.stderr, n - 1
    if n > 1 and score.interval95 is not None:
        return score.interval95 / 1.96, n - 1
    if n > 1 and score.std is not None:
        return score.std / math.sqrt(n - 1 if score.ddof == 0 else n), n - 1
    raise UserError("a score has no standard error, so there is nothing to hold their difference against.")


# Comparing two of them. ---------------------------------------------------------------------------------------------

# What may differ, if that is what is compared; any other difference would make the comparison meaningless.
ALLOWED = {"protocol": "protocol", "recipe": "recipe", "version": "version", "settings": "overrides", "dtype": "dtype"}
_REFUSED = {"dataset": "dataset", "images (manifest)": "dataset_manifest_sha256", "--limit": "limit", "lists": "subset"}
_REFUSED |= {"broken images left out": "skipped_broken", "metric": "main_metric"}


@dataclass(frozen=True)
class Pairs:
    """Images, or (image, seed) pairs where there are several seeds, by which side is right."""

    images: int
    both: int
    only_a: int
    only_b: int
    neither: int
    odds_ratio: float | None  # only_a / only_b; None: no bound, or nothing to tell them apart
    odds_ratio_interval95: tuple[float | None, float | None] | None  # of one seed only
    bootstrap_interval95: Interval


@dataclass(frozen=True)
class Outcome:
    """a against b. Differences are a - b in the metric's unit, percent points where images are counted."""

    a: Side
    b: Side
    values: tuple[float, float]
    difference: float
    interval95: Interval
    p: float
    test: str
    pairs: Pairs | None
    over_seeds: StudentTest | None
    better: Literal["a", "b"] | None
    notes: tuple[str, ...]
    problems: tuple[str, ...] = ()  # files among which the names were looked up, but which could not be read


def compare(run_a: str | Path, run_b: str | Path, *, allow: Sequence[str] = (), root: Path | None = None) -> Outcome:
    """Whether two runs differ by more than luck: each a record file's path or a name (see `find`)."""
    for name in allow:
        if name not in ALLOWED:
            raise unknown("--allow", name, ALLOWED)
    results = Results(Path()) if is_path(run_a) and is_path(run_b) else load_results(root)
    a, b = find(run_a, results), find(run_b, results)
    if {path.resolve() for path in a.paths} & {path.resolve() for path in b.paths}:
        raise UserError(f"{a.name}: the same run twice; expected two runs.")
    notes = _comparable(a.records[0], b.records[0], allow)
    seeds = sorted(set(a.seeds) & set(b.seeds))
    if not seeds:
        raise UserError(
            f"no seed in common ({_shown(a.seeds)} against {_shown(b.seeds)}), and seeds draw splits and banks; "
            f"expected the same ones. Run one side again with --seed {a.seeds[0]} or {b.seeds[0]}."
        )
    if rest := sorted(set(a.seeds) ^ set(b.seeds)):
        notes.append(f"Left out, since only one side has them: seeds {_shown(rest)}.")
    a, b = a.only(seeds), b.only(seeds)
    right = _outcomes(a, b, notes)
    outcome = _by_scores(a, b, notes) if right is None else _by_images(a, b, *right, notes)
    return replace(outcome, problems=tuple(results.problems.values()))


def _comparable(a: Record, b: Record, allow: Sequence[str]) -> list[str]:
    """What differs and may; an error for what differs and may not."""
    implied = ("recipe", "version", "settings") if "protocol" in allow else ("settings",) if "recipe" in allow else ()
    facts = {name: (getattr(a, field), getattr(b, field)) for name, field in (ALLOWED | _REFUSED).items()}
    differing = {name: pair for name, pair in facts.items() if pair[0] != pair[1]}
    if not {"protocol", "recipe", "version"} & differing.keys() and (others := _other_values(a, b)):
        differing["recipe"] = others
    if refused := [name for name in differing if name not in (*allow, *implied)]:
        said = "; ".join(f"{name}: {' against '.join(map(_shown, differing[name]))}" for name in refused)
        hint = f" If that is what you compare: {' '.join(f'--allow {name}' for name in refused)}."
        raise UserError(
            f"these two runs did not measure the same: {said}. Expected runs that differ in their networks alone."
            + (hint if set(refused) <= set(ALLOWED) else "")
        )
    notes = [f"{name} differs: {' against '.join(map(_shown, pair))}." for name, pair in differing.items()]
    return notes + ([f"Limited runs: {a.limit} images a split, a quick try."] if a.limited else [])


def _other_values(a: Record, b: Record) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What the recipe of one name holds in both, where these are not the same: its file was edited in between."""
    names = (a.resolved_recipe.keys() & b.resolved_recipe.keys()) - {"source", "published", *a.overrides, *b.overrides}
    names = {name for name in names if a.resolved_recipe[name] != b.resolved_recipe[name]}
    values_a, values_b = ({name: record.resolved_recipe[name] for name in names} for record in (a, b))
    return (values_a, values_b) if names else None


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        short = {name: item[:8] if isinstance(item, str) and len(item) == 64 else item for name, item in value.items()}
        return settings_text(short) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _outcomes(a: Side, b: Side, notes: list[str]) -> tuple[BoolArray, BoolArray] | None:
    """Which images each side got right, (seeds, images); None, with a note, if they are not what the metric counts."""
    paths = (*a.paths, *b.paths)
    if not all(samples_path(path).exists() for path in paths):
        notes.append("Not both kept per-image outcomes.")
        return None
    frames = [load_samples(path).set_index("sample_id") for path in paths]
    first = frames[0]
    for path, frame in zip(paths, frames, strict=True):
        if len(other := first.index.symmetric_difference(frame.index)):
            raise UserError(
                f"{path}: {len(other):,} images are not in both runs, for instance {other[0]!r}. Expected outcomes on "
                "the same images; run both again on the same data."
            )
        if (frame["label"].reindex(first.index) != first["label"]).any():
            raise UserError(f"{path}: some images have another label there. Expected outcomes on the same data.")
    correct = np.stack([frame["correct"].reindex(first.index).to_numpy(dtype=bool) for frame in frames])
    for path, record, right in zip(paths, (*a.records, *b.records), correct, strict=True):
        accuracy, value = 100 * float(right.mean()), record.main_score.value
        if abs(accuracy - value) > _PRINTED or record.lower_is_better:
            kind = "lower is better" if record.lower_is_better else f"{value:.2f}"
            notes.append(
                f"{path}: kept outcomes have an accuracy of {accuracy:.2f}, {record.main_metric} is not ({kind})."
            )
            return None
    return correct[: len(a.paths)], correct[len(a.paths) :]


def _by_images(a: Side, b: Side, right_a: BoolArray, right_b: BoolArray, notes: list[str]) -> Outcome:
    counts, seeds = difference_counts(right_a, right_b), len(right_a)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    (low, high), (bootstrap_low, bootstrap_high) = adjusted_interval(counts), bootstrap_interval(counts)
    ratio, ratio_interval = odds_ratio(only_a, only_b)
    pairs = Pairs(
        images=right_a.shape[1],
        both=int((right_a & right_b).sum()),
        only_a=only_a,
        only_b=only_b,
        neither=int((~right_a & ~right_b).sum()),
        odds_ratio=ratio,
        odds_ratio_interval95=ratio_interval if seeds == 1 else None,
        bootstrap_interval95=(100 * bootstrap_low, 100 * bootstrap_high),
    )
    values = 100 * float(right_a.mean()), 100 * float(right_b.mean())
    over_seeds = paired_t([100 * float(x.mean() - y.mean()) for x, y in zip(right_a, right_b, strict=True)])
    p = clustered(counts)
    test = "McNemar's exact test" if seeds == 1 else "sign flips, an image with all its seeds at a time"
    if seeds > 1 and over_seeds is None:
        notes.append("Every seed gives the same difference, which says nothing about other seeds.")
    difference = values[0] - values[1]
    sure = max(p, over_seeds.p if over_seeds else 0.0) < LEVEL
    better: Literal["a", "b"] | None = None if not sure else "a" if difference > 0 else "b"
    return Outcome(a, b, values, difference, (100 * low, 100 * high), p, test, pairs, over_seeds, better, tuple(notes))


def _by_scores(a: Side, b: Side, notes: list[str]) -> Outcome:
    values = [[record.main_score.value for record in side.records] for side in (a, b)]
    t = paired_t([x - y for x, y in zip(*values, strict=True)])
    found = t or _unpaired(a, b)
    how = "over seeds alone" if t else "an unpaired test from the two standard errors, which sees less"
    notes[-1] += f" So this is {how}."
    means = statistics.fmean(values[0]), statistics.fmean(values[1])
    test = f"paired t test over {len(a.records)} seeds" if t else "Welch's unpaired t test"
    a_leads = (found.difference > 0) != a.records[0].lower_is_better
    better: Literal["a", "b"] | None = None if found.p >= LEVEL else "a" if a_leads else "b"
    return Outcome(a, b, means, found.difference, found.interval95, found.p, test, None, t, better, tuple(notes))


def _unpaired(a: Side, b: Side) -> StudentTest:
    try:
        return welch(a.records[0].main_score, b.records[0].main_score)
    except UserError as error:
        seeds = len(a.records)
        hint = (
            f"All {seeds} seeds give the same difference, so they do not say either; expected seeds that differ."
            if seeds > 1
            else "Run both with several seeds (ssl-bench run --seed 1, 2, ...)."
        )
        raise UserError(f"there is no paired test of these two runs, and {error} {hint}") from error
