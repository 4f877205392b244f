"""The commands `compare` and `sensitivity`: is it luck, and does it depend on the protocol?"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssl_bench.cli_stores import Json, print_json

if TYPE_CHECKING:
    from ssl_bench.leaderboards.paired import Outcome
    from ssl_bench.leaderboards.sides import Side
    from ssl_bench.sensitivity import Sensitivity

_RUN = "A record file, or a name of `ssl-bench ls results`: model/dataset/protocol/recipe"
# The test is exact, the interval follows from a formula for many images.
_DISAGREE = "The interval alone would say otherwise, as happens where few images decide; the test is what counts here."
_LISTED = 8  # swaps that are printed; --json has all


def compare(
    run_a: Annotated[str, typer.Argument(help=_RUN)],
    run_b: Annotated[str, typer.Argument(help=_RUN)],
    allow: Annotated[
        list[str] | None,
        typer.Option(help="What may differ, since it is what you compare: protocol, recipe, version, settings, dtype."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Is one run better than another, or was it luck? Paired by image: McNemar's exact test, paired bootstrap.

    A name means the plain runs of a model with all their seeds; then both sides need the same seeds.
    """
    from ssl_bench.leaderboards.paired import compare as compared

    outcome = compared(run_a, run_b, allow=allow or ())
    for problem in outcome.problems:  # which name the file
        sys.stderr.write(f"ssl-bench: left out: {problem}\n")
    if as_json:
        print_json({"compare": _outcome_document(outcome)})
    else:
        _print_outcome(outcome)


def sensitivity(
    ckpt: Annotated[
        list[str], typer.Option("--ckpt", help="A file, a folder, timm:NAME, hf:REPO, random:ARCH or pixels:; repeat.")
    ],
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="A name (ssl-bench ls datasets) or a folder. Default: toy.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use so many images a split: a quick try.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast in the forward pass).")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of everything random: random: weights, sampled banks.")] = 0,
    as_json: Json = False,
) -> None:
    """Does the order of checkpoints depend on how k-NN is done? All recipes, and other vectors, k, temperatures, norms.

    Records are ordinary records, so the same command again computes nothing.
    """
    from ssl_bench import running
    from ssl_bench.sensitivity import sensitivity as examined

    options = running.Options(dataset=dataset, limit=limit, device=device, dtype=dtype, seed=seed)
    found = examined(ckpt, options)
    if as_json:
        print_json({"sensitivity": _sensitivity_document(found)})
    else:
        _print_sensitivity(found)


# compare ------------------------------------------------------------------------------------------------------------


def conclusion(outcome: Outcome) -> str:
    """In a sentence or two."""
    from ssl_bench.leaderboards.paired import LEVEL

    low, high = outcome.interval95
    span = f"95 % interval {low:+.2f} to {high:+.2f}"
    tests = f"{outcome.test}, {_p(outcome.p)}"
    t = outcome.over_seeds if outcome.pairs else None
    if t:
        tests += f"; over {len(outcome.a.records)} seeds {_p(t.p)}"
    if outcome.better:
        better, worse = (outcome.a, outcome.b) if outcome.better == "a" else (outcome.b, outcome.a)
        text = f"{better.name} is better than {worse.name}: A - B = {outcome.difference:+.2f} ({span}; {tests})."
    else:
        text = f"No significant difference: A - B = {outcome.difference:+.2f} ({span}; {tests})."
    if outcome.pairs and (outcome.p < LEVEL) == (low <= 0 <= high):
        text = f"{text} {_DISAGREE}"
    if t and not outcome.better and (outcome.p < LEVEL) != (t.p < LEVEL):
        here, not_here = ("other images", "other seeds") if outcome.p < LEVEL else ("other seeds", "other images")
        return f"{text} It would hold on {here}, but perhaps not on {not_here}."
    return text


def _p(p: float) -> str:
    """As people write it, and never as zero."""
    if p < 1e-8:
        return "p < 1e-8"
    return f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def _print_outcome(outcome: Outcome) -> None:
    from ssl_bench import showing

    rows: dict[str, str] = {}
    for letter, side, value in zip("AB", (outcome.a, outcome.b), outcome.values, strict=True):
        rows[letter] = f"{side.name}{_seeds(side)}: {value:.2f}"
    record = outcome.a.records[0]
    low, high = outcome.interval95
    rows["measured"] = f"{record.main_metric}, {record.protocol}/{record.recipe}@v{record.version} on {record.dataset}"
    rows["A - B"] = f"{outcome.difference:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
    if pairs := outcome.pairs:
        low, high = pairs.bootstrap_interval95
        rows["paired bootstrap"] = f"95 % interval {low:+.2f} to {high:+.2f}"
        counted = "images" if len(outcome.a.records) == 1 else "(image, seed) pairs"
        rows[counted] = f"{pairs.both:,} both right, {pairs.only_a:,} only A, {pairs.only_b:,} only B"
        rows[counted] += f", {pairs.neither:,} neither"
        rows["odds ratio, only A : only B"] = _odds(pairs.odds_ratio, pairs.odds_ratio_interval95)
    rows["p"] = f"{_p(outcome.p)} ({outcome.test})"
    if pairs and (t := outcome.over_seeds):
        low, high = t.interval95
        rows[f"over {len(outcome.a.records)} seeds"] = f"95 % interval {low:+.2f} to {high:+.2f}, {_p(t.p)} (paired t)"
    showing.fields(rows)
    for line in (*outcome.notes, conclusion(outcome)):
        sys.stdout.write(f"{line}\n")


def _seeds(side: Side) -> str:
    seeds = ", ".join(str(seed) for seed in side.seeds)
    return f" (mean of seeds {seeds})" if len(side.seeds) > 1 else ""


def _odds(ratio: float | None, interval: tuple[float | None, float | None] | None) -> str:
    if interval is None:
        return "no bound" if ratio is None else f"{ratio:.2f}"
    low, high = (("no bound" if bound is None else f"{bound:.2f}") for bound in interval)
    return f"{'-' if ratio is None else f'{ratio:.2f}'}, 95 % interval {low} to {high}"


def _outcome_document(outcome: Outcome) -> dict[str, Any]:
    from ssl_bench.leaderboards.strict_json import plain

    sides = {
        letter: {
            "name": side.name,
            "value": value,
            "seeds": side.seeds,
            "weights_sha256": [record.weights_sha256 for record in side.records],
            "records": side.paths,
        }
        for letter, side, value in zip("ab", (outcome.a, outcome.b), outcome.values, strict=True)
    }
    record = outcome.a.records[0]
    measured = {name: getattr(record, name) for name in ("dataset", "protocol", "recipe", "version", "limited")}
    rest = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    numbers = {name: value for name, value in rest.items() if name not in ("a", "b", "values")}
    document: dict[str, Any] = plain(
        {**sides, "metric": record.main_metric, **measured, **numbers, "conclusion": conclusion(outcome)}
    )
    return document


# sensitivity --------------------------------------------------------------------------------------------------------


def _print_sensitivity(found: Sensitivity) -> None:
    import pandas

    from ssl_bench import showing
    from ssl_bench.leaderboards.table import render

    models = list(dict.fromkeys(model for of in found.records.values() for model in of))
    rows = []
    for variant, of in found.records.items():
        taus = {pair: tau for pair, tau in found.taus.items() if variant in pair and tau is not None}
        row = {m: f"{of[m].main_score.value:.1f}" if m in of else "-" for m in models}
        mean = f"{sum(taus.values()) / len(taus):+.2f}" if taus else "-"
        rows.append(row | {"mean tau": mean, "lowest tau": f"{min(taus.values()):+.2f}" if taus else "-"})
    showing.show(render(pandas.DataFrame(rows, index=pandas.Index(found.records, name="variant")), "table"))
    limit = f" (--limit {found.limit})" if found.limit else ""
    lines = [f"top1 on {found.dataset}{limit}; tau: Kendall's tau-b with the other variants, over common checkpoints."]
    lines += [f"{name} reports the same as {first}." for name, first in found.same.items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for variant, model, why in found.skipped:
        reasons.setdefault((model, why), []).append(variant)
    lines += [f"Left out for {model}: {'; '.join(of)}: {why}." for (model, why), of in reasons.items()]
    known = [tau for tau in found.taus.values() if tau is not None]
    agreeing = sum(tau == 1 for tau in known)
    lines.append(f"{agreeing} of {len(known)} pairs of variants agree on the order in full (tau 1).")
    for swap in found.swaps[:_LISTED]:
        a, b = swap.a_leads[0], swap.b_leads[0]
        lines.append(
            f"{'Significant swap' if swap.significant else 'Swap, perhaps by chance'}: {swap.a} leads {swap.b} under "
            f"{len(swap.a_leads)} variants (most under {a.variant}: {a.difference:+.1f}, {_p(a.p)}), trails under "
            f"{len(swap.b_leads)} (most under {b.variant}: {b.difference:+.1f}, {_p(b.p)})."
        )
    if len(found.swaps) > _LISTED:
        lines.append(f"... and {len(found.swaps) - _LISTED} more swaps (--json has all).")
    lines.append(f"p: McNemar's exact test, corrected for all {len(found.duels)} comparisons (Holm).")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"Does the order depend on the protocol? {found.verdict()}\n")


def _sensitivity_document(found: Sensitivity) -> dict[str, Any]:
    from ssl_bench.leaderboards.strict_json import plain

    document: dict[str, Any] = plain(
        {
            "dataset": found.dataset,
            "limit": found.limit,
            "scores": {name: {m: r.main_score for m, r in of.items()} for name, of in found.records.items()},
            "skipped": [{"variant": v, "checkpoint": c, "why": why} for v, c, why in found.skipped],
            "same": found.same,
            "taus": [{"variants": pair, "tau": tau} for pair, tau in found.taus.items()],
            "duels": found.duels,
            "swaps": [{"significant": swap.significant, **vars(swap)} for swap in found.swaps],
            "verdict": found.verdict(),
        }
    )
    return document
