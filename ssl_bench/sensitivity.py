"""`ssl-bench sensitivity`: does the order of checkpoints depend on how k-NN accuracy is taken?

    ssl-bench sensitivity --ckpt moca.pth --ckpt mae.pth --dataset imagenet

Papers read other vectors (class token, mean patch), other neighbors and temperatures. Every recipe of protocols/knn.py
is a variant, and so is every change of CHANGES to the two recipes of BASES, one field at a time. Each (variant,
checkpoint) is an ordinary run with an ordinary record, so a second call computes nothing; all features that a
checkpoint's variants read come from one pass over the images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_bench import running
from ssl_bench.errors import UserError
from ssl_bench.files import results_folder
from ssl_bench.leaderboards import agreement
from ssl_bench.leaderboards.record import Record, settings_text
from ssl_bench.leaderboards.store import load_samples
from ssl_bench.machine import device_named

if TYPE_CHECKING:
    from ssl_bench.evaluate.subject import Subject
    from ssl_bench.leaderboards.paired import BoolArray
    from ssl_bench.protocols.knn import Recipe

BASES = ("dino", "moca-paper")  # class token and mean patch, k = 20, temperature .07
CHANGES: tuple[Mapping[str, str], ...] = (
    {"neighbors": "5"},
    {"neighbors": "100"},
    {"temperature": "0.04"},
    {"temperature": "0.2"},
    {"norm": "false"},
    {"layer": "-2"},
    {"layer": "-2", "norm": "false"},
)


@dataclass(frozen=True)
class Variant:
    """A recipe of k-NN with settings."""

    recipe: str
    settings: Mapping[str, str]

    @property
    def name(self) -> str:
        """knn/dino, neighbors=5"""
        return ", ".join([f"knn/{self.recipe}", *filter(None, [settings_text(self.settings)])])

    def resolved(self) -> Recipe:
        """The recipe with the settings applied."""
        from ssl_bench.evaluate.recipes import with_settings
        from ssl_bench.protocols.knn import RECIPES

        return with_settings(RECIPES[self.recipe], self.settings)


@dataclass(frozen=True)
class Sensitivity:
    """What was found. Names of checkpoints are those of their records, lengthened where two would share one."""

    dataset: str
    limit: int | None
    records: dict[str, dict[str, Record]]  # variant -> checkpoint -> record
    skipped: list[tuple[str, str, str]]  # variant, checkpoint, why
    same: dict[str, str]  # a recipe that reports the same number -> the variant that stands for it
    taus: dict[tuple[str, str], float | None]
    duels: list[agreement.Duel]
    swaps: list[agreement.Swap]

    def verdict(self) -> str:
        """In a sentence or two."""
        pairs = len({(duel.a, duel.b) for duel in self.duels})
        where = f"under all {len(self.records)} variants"
        if not self.swaps:
            return f"No: the order of the checkpoints is the same {where}, wherever they do not tie."
        sure = [swap for swap in self.swaps if swap.significant]
        if not sure:
            return (
                f"Not that these images could tell: {len(self.swaps)} of {pairs} pairs of checkpoints swap order "
                "between variants, but none significantly both ways. Do not rank these pairs by one variant."
            )
        one = sure[0]
        return (
            f"Yes: {len(sure)} of {pairs} pairs of checkpoints swap order significantly. {one.a} is better than "
            f"{one.b} under {one.a_leads[0].variant} and worse under {one.b_leads[0].variant}. Whoever ranks them must "
            "say by which variant."
        )


def variants() -> tuple[list[Variant], dict[str, str]]:
    """All that report another number than those before them, and which recipes report the same as which variant."""
    from ssl_bench.protocols.knn import RECIPES

    every = [Variant(name, {}) for name in RECIPES]
    every += [Variant(base, change) for base in BASES for change in CHANGES]
    kept: dict[Recipe, Variant] = {}
    same = {}
    for variant in every:
        first = kept.setdefault(_reported(variant.resolved()), variant)
        if first is not variant:
            same[variant.name] = first.name
    return list(kept.values()), same


def _reported(recipe: Recipe) -> Recipe:
    """What decides the reported number: of several combinations the first, and not who published it."""
    if recipe.reported == "first":
        first = {name: getattr(recipe, name)[:1] for name in ("neighbors", "temperature", "vector")}
        recipe = dataclasses.replace(recipe, **first)
    return dataclasses.replace(recipe, source="", published="")


def sensitivity(ckpts: Sequence[str], options: running.Options) -> Sensitivity:
    """Score every checkpoint by every variant that it can serve, and compare the orders."""
    if len(ckpts) < 2 or len(set(ckpts)) < len(ckpts):
        raise UserError(
            f"expected two different checkpoints or more, found {', '.join(ckpts) or 'none'}: --ckpt A --ckpt B"
        )
    if options.settings:
        raise UserError("settings: expected none, since the variants are settings.")
    running._check(["knn"], options)
    wanted, same = variants()
    subjects = {ckpt: _subject(ckpt, options) for ckpt in ckpts}  # all are opened before the first image is read
    names = _names(subjects)
    reasons = {(variant.name, ckpt): _why_not(variant, subjects[ckpt]) for variant in wanted for ckpt in ckpts}
    skipped = [(variant, names[ckpt], reason) for (variant, ckpt), reason in reasons.items() if reason]
    # A variant that fewer than two checkpoints can serve compares nothing.
    useful = [variant for variant in wanted if sum(reasons[variant.name, ckpt] is None for ckpt in ckpts) > 1]
    if not useful:
        why = " ".join(dict.fromkeys(f"{reason.rstrip('.')}." for _, _, reason in skipped))
        raise UserError(f"no variant can be taken of two of these checkpoints: {why}")
    found: dict[str, dict[str, Record]] = {variant.name: {} for variant in useful}
    for ckpt, subject in subjects.items():
        served = [variant for variant in useful if not reasons[variant.name, ckpt]]
        for name, record in _scored(ckpt, subject, served, options).items():
            found[name][names[ckpt]] = record
    root = options.results or results_folder()
    fought = agreement.duels({name: _correct(of, root) for name, of in found.items()})
    return Sensitivity(
        dataset=next(iter(subjects.values())).dataset.name,
        limit=options.limit,
        records=found,
        skipped=skipped,
        same=same,
        taus=agreement.taus({name: {m: r.main_score.value for m, r in of.items()} for name, of in found.items()}),
        duels=fought,
        swaps=agreement.swaps(fought),
    )


def _subject(ckpt: str, options: running.Options) -> Subject:
    from ssl_bench.evaluate.checkpoints import open_checkpoint
    from ssl_bench.evaluate.datasets import open_dataset
    from ssl_bench.evaluate.loading import Effort
    from ssl_bench.evaluate.subject import Subject

    dataset = open_dataset(options.dataset or "toy")
    if options.limit is not None:
        dataset = dataset.limited(options.limit)
    effort = Effort(device_named(options.device), options.dtype, options.batch_size, options.workers)
    return Subject(open_checkpoint(ckpt, protocol="knn", seed=options.seed), dataset, effort, options.seed)


def _names(subjects: Mapping[str, Subject]) -> dict[str, str]:
    """The model's name, with weights where two share it. The same weights twice are no comparison."""
    weights = {ckpt: subject.checkpoint.weights_sha256 for ckpt, subject in subjects.items()}
    names = {ckpt: subject.checkpoint.name for ckpt, subject in subjects.items()}
    for ckpt, sha in weights.items():
        if twins := [other for other in weights if other != ckpt and weights[other] == sha]:
            raise UserError(f"{ckpt} and {twins[0]} hold the same weights; expected different checkpoints.")
    doubled = [ckpt for ckpt in names if list(names.values()).count(names[ckpt]) > 1]
    return names | {ckpt: f"{names[ckpt]} · {weights[ckpt][:12]}" for ckpt in doubled}


def _why_not(variant: Variant, subject: Subject) -> str | None:
    """Why this checkpoint has no number under this variant; None if it has one."""
    from ssl_bench.evaluate.readings import why_not
    from ssl_bench.protocols import knn

    recipe = variant.resolved()
    for reading in knn.readings(subject, recipe)["val"]:
        if reason := why_not(reading, subject.checkpoint.architecture):
            return reason
    subject.require_shared_classes()  # a fault of the data, not of a variant
    try:
        knn.check(subject, recipe)
    except UserError as error:  # more neighbors than the bank has images
        return str(error)
    return None


def _scored(ckpt: str, subject: Subject, served: Sequence[Variant], options: running.Options) -> dict[str, Record]:
    """A record a variant; variants of the same settings in one run."""
    from ssl_bench.protocols import knn

    read = [knn.readings(subject, variant.resolved()) for variant in served]
    for split in ("train", "val"):  # into the cache, all by one pass; the runs below find them there
        subject.prepare(split, [reading for readings in read for reading in readings[split]])
    records: dict[str, Record] = {}
    for settings in {settings_text(variant.settings): variant.settings for variant in served}.values():
        together = [variant for variant in served if variant.settings == settings]
        names = [f"knn/{variant.recipe}" for variant in together]
        done = running.run(ckpt, names, dataclasses.replace(options, settings=settings))
        records |= {variant.name: record for variant, record in zip(together, done, strict=True)}
    return records


def _correct(records: Mapping[str, Record], root: Path) -> dict[str, BoolArray]:
    """The outcomes of each checkpoint, in the order of the images' names, which must be the same images."""
    frames = {model: load_samples(record, root).sort_values("sample_id") for model, record in records.items()}
    first = next(iter(frames.values()))
    for model, frame in frames.items():
        if list(frame["sample_id"]) != list(first["sample_id"]):
            raise UserError(
                f"{model}: the kept outcomes of {records[model].protocol}/{records[model].recipe} are of other images "
                f"than those of {next(iter(frames))}. Expected the same; do the run again with --overwrite always."
            )
    return {model: frame["correct"].to_numpy(dtype=bool) for model, frame in frames.items()}
