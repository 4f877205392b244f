"""Do several ways of measuring put the same networks into the same order, and where they do not, does it matter?

`variants` are ways of measuring, `models` what is measured. Agreement is Kendall's tau-b between the scores under two
variants: 1 the same order, -1 the reverse, 0 no relation. With few models it takes few values (two give only -1 and 1),
so every pair of models is looked at too: by McNemar's exact test under each variant, all p corrected together by Holm's
procedure. A swap counts as significant if one model is significantly better under one variant and the other one under
another; that a difference is significant here and not there is no swap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssl_bench.leaderboards.paired import LEVEL, BoolArray, mcnemar


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Tau-b: (concordant - discordant pairs) / sqrt(pairs untied in a x pairs untied in b). None if all are tied."""
    assert len(a) == len(b), f"expected as many scores in both, found {len(a)} and {len(b)}"
    first, second = (np.sign(np.subtract.outer(x, x)) for x in (np.asarray(a, float), np.asarray(b, float)))
    untied = float((first**2).sum()) * float((second**2).sum())
    return float((first * second).sum()) / math.sqrt(untied) if untied else None


def taus(scores: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float | None]:
    """Of every pair of variants, over the models that both have scored: {variant: {model: score}}."""
    found = {}
    for first, second in itertools.combinations(scores, 2):
        common = [model for model in scores[first] if model in scores[second]]
        found[first, second] = kendall_tau(
            [scores[first][model] for model in common], [scores[second][model] for model in common]
        )
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction: p of the k-th smallest of n, times n - k + 1, never below that of a smaller one."""
    order = sorted(range(len(ps)), key=lambda place: ps[place])
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, ps[place] * (len(ps) - rank)))
        corrected[place] = largest
    return corrected


@dataclass(frozen=True)
class Duel:
    """Two models under one variant; `p` is McNemar's, corrected over all duels."""

    variant: str
    a: str
    b: str
    difference: float  # a - b, in points
    p: float


def duels(correct: Mapping[str, Mapping[str, BoolArray]]) -> list[Duel]:
    """All of them, from the outcomes on the same images: {variant: {model: correct}}."""
    found = [
        (variant, a, b, int((of[a] & ~of[b]).sum()), int((of[b] & ~of[a]).sum()), len(of[a]))
        for variant, of in correct.items()
        for a, b in itertools.combinations(of, 2)
    ]
    ps = holm([mcnemar(only_a, only_b) for *_, only_a, only_b, _ in found])
    return [
        Duel(variant, a, b, 100 * (only_a - only_b) / images, p)
        for (variant, a, b, only_a, only_b, images), p in zip(found, ps, strict=True)
    ]


@dataclass(frozen=True)
class Swap:
    """Two models whose order is not the same under all variants."""

    a: str
    b: str
    a_leads: tuple[Duel, ...]  # the variants under which a is ahead, and
    b_leads: tuple[Duel, ...]  # b; the surest first

    @property
    def significant(self) -> bool:
        """Whether each is significantly better somewhere."""
        return self.a_leads[0].p < LEVEL and self.b_leads[0].p < LEVEL


def swaps(fought: Sequence[Duel]) -> list[Swap]:
    """The pairs of models that swap order, the significant ones first. Equal scores are no order."""
    pairs: dict[tuple[str, str], list[Duel]] = {}
    for duel in sorted(fought, key=lambda duel: duel.p):
        pairs.setdefault((duel.a, duel.b), []).append(duel)
    found = [
        Swap(a, b, tuple(d for d in of if d.difference > 0), tuple(d for d in of if d.difference < 0))
        for (a, b), of in pairs.items()
    ]
    return sorted((swap for swap in found if swap.a_leads and swap.b_leads), key=lambda swap: not swap.significant)
