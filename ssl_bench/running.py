"""`ssl-bench run`: open, extract once, score, record. Everything is checked before the first image is read."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssl_bench import efficiency
from ssl_bench.errors import UserError, unknown
from ssl_bench.evaluate.hardware import peak_memory_bytes
from ssl_bench.files import require_writable, results_folder
from ssl_bench.leaderboards import record as records
from ssl_bench.leaderboards.record import Deviations, Record, Run
from ssl_bench.machine import code_version, device_named, environment

if TYPE_CHECKING:
    from ssl_bench.evaluate.checkpoints import Checkpoint
    from ssl_bench.evaluate.loading import Effort
    from ssl_bench.evaluate.readings import Reading
    from ssl_bench.evaluate.splits import AnyDataset
    from ssl_bench.evaluate.subject import Scores, Subject
    from ssl_bench.protocols.catalog import ProtocolModule

Overwrite = Literal["only-missing", "always", "never"]
_OVERWRITE = ("only-missing", "always", "never")
_NOT_LOADED = ("random", "pixels", "recipe")  # formats without weights of a file, of which so many percent matched


@dataclass(frozen=True)
class Options:
    """Everything that `run` takes beside the checkpoint and the protocols."""

    dataset: str | None = None  # None: the built-in data of the kind that a protocol reads
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)  # --set
    limit: int | None = None
    device: str = "auto"
    dtype: str = "fp32"
    seed: int = 0
    checkpoint_key: str | None = None
    arch: Mapping[str, str] = dataclasses.field(default_factory=dict)
    overwrite: Overwrite = "only-missing"
    results: Path | None = None
    name: str | None = None
    train_list: Path | None = None
    val_list: Path | None = None
    class_list: Path | None = None
    skip_broken: bool = False
    batch_size: int | None = None
    workers: int | None = None


@dataclass(eq=False)
class _Task:
    """One protocol of the run, with the network that it reads and the record that it will become."""

    module: ProtocolModule
    recipe: Any
    overrides: dict[str, Any]
    subject: Subject
    full: AnyDataset  # before lists and --limit
    run: Run


def run(ckpt: str | Path, protocol: str | Sequence[str], options: Options) -> list[Record]:
    """Score one checkpoint by several protocols. Records that exist are returned as they are (see `overwrite`).

    Under torchrun every process calls this: protocols that train do so together, the others are the first one's.
    """
    names = protocol.split(",") if isinstance(protocol, str) else list(protocol)
    _check(names, options)
    for name in names:  # before anything is opened: a misspelled name costs nothing
        efficiency.choose(name)
    from ssl_bench.evaluate.training.distributed import together

    with together(device_named(options.device)) as device:
        return _run(ckpt, names, options, device)


def _run(ckpt: str | Path, names: Sequence[str], options: Options, device: str) -> list[Record]:
    started = time.perf_counter()
    from ssl_bench.evaluate.loading import Effort
    from ssl_bench.evaluate.training import distributed

    effort = Effort(device, options.dtype, options.batch_size, options.workers, options.skip_broken)
    opening = _Opening(ckpt, options, effort)
    tasks = [_task(name, opening) for name in names]
    require_writable(options.results or results_folder())
    found = {task.run.key(): records.find_record(task.run, options.results) for task in tasks}
    if options.overwrite == "never" and any(found.values()):
        there = ", ".join(f"{each.protocol}/{each.recipe}" for each in found.values() if each)
        raise UserError(f"--overwrite never: there are records already of {there}. See `ssl-bench leaderboard`.")
    distributed.union([])  # wait: all decide by the same records, before any of them writes a new one
    todo = [task for task in tasks if options.overwrite == "always" or found[task.run.key()] is None]
    opened = time.perf_counter() - started
    results = dict(found)
    extracted = {id(subject): _extract(subject, todo) for subject in opening.subjects.values()}
    for task in todo:
        seconds = {"open": opened, **extracted[id(task.subject)]}
        results[task.run.key()] = _score(task, options, seconds)
    return [each for each in results.values() if each is not None]


def _check(names: Sequence[str], options: Options) -> None:
    if not names or not all(name.strip() for name in names):
        raise UserError("no protocol was named; for example --protocol knn, or --protocol knn/dino,knn/moca-paper")
    if options.overwrite not in _OVERWRITE:
        raise unknown("--overwrite", options.overwrite, _OVERWRITE)
    if options.dtype not in ("fp32", "bf16", "fp16"):
        raise unknown("--dtype", options.dtype, ("fp32", "bf16", "fp16"))
    numbers = (
        ("--limit", options.limit, 1),
        ("--batch-size", options.batch_size, 1),
        ("--workers", options.workers, 0),
    )
    if options.dataset and all(name.strip().partition("/")[0] == efficiency.NAME for name in names):
        raise UserError(f"--dataset {options.dataset}: {efficiency.NAME} reads no images; leave it out.")
    for flag, value, least in (*numbers, ("--seed", options.seed, 0)):
        if value is not None and not (isinstance(value, int) and least <= value < 2**32):
            raise UserError(f"{flag} {value}: expected a whole number, at least {least}.")
    if options.name is not None and not options.name.strip():
        raise UserError("--name: expected a name, got an empty one.")


def _choose(name: str, options: Options, *, built_in: bool) -> tuple[str, str, Any, dict[str, Any]]:
    """The protocol, its recipe with the settings applied, and which fields they really change."""
    from ssl_bench.evaluate.recipes import with_settings

    protocol, recipe_name, original = efficiency.choose(name, built_in=built_in)
    recipe = with_settings(original, options.settings)
    before, after = dataclasses.asdict(original), dataclasses.asdict(recipe)
    return protocol, recipe_name, recipe, {key: after[key] for key in after if after[key] != before[key]}


class _Opening:
    """Opens checkpoint and dataset once for all protocols that read the same of them."""

    def __init__(self, ckpt: str | Path, options: Options, effort: Effort) -> None:
        self.ckpt, self.options, self.effort = ckpt, options, effort
        self.checkpoints: dict[str, Checkpoint] = {}  # by protocol
        self.datasets: dict[str, tuple[AnyDataset, AnyDataset]] = {}  # by kind: in full, and reduced
        self.subjects: dict[tuple[str, str], Subject] = {}  # by weights and kind of dataset

    def checkpoint(self, protocol: str) -> Checkpoint:
        """As this protocol opens it."""
        from ssl_bench.evaluate.checkpoints import open_checkpoint

        if protocol not in self.checkpoints:
            options = self.options
            opener = efficiency.open_recipe if str(self.ckpt).startswith(efficiency.PREFIX) else open_checkpoint
            opened = opener(
                str(self.ckpt), key=options.checkpoint_key, protocol=protocol, arch=options.arch, seed=options.seed
            )
            self.checkpoints[protocol] = dataclasses.replace(opened, name=options.name) if options.name else opened
        return self.checkpoints[protocol]

    def dataset(self, kind: str) -> tuple[AnyDataset, AnyDataset]:
        """In full, and after lists and --limit."""
        from ssl_bench.evaluate.datasets import KINDS

        if kind not in self.datasets:
            noise = kind == efficiency.DATA
            full = efficiency.noise(self.effort.device) if noise else KINDS[kind].open(self.spec(kind))
            self.datasets[kind] = full, _reduced(full, self.options)
        return self.datasets[kind]

    def spec(self, kind: str) -> str:
        """The dataset that the user named, else the built-in one of that kind."""
        from ssl_bench.evaluate.datasets import KINDS

        return self.options.dataset or KINDS[kind].default

    def subject(self, protocol: str, kind: str) -> Subject:
        """Protocols that evaluate the same network of the file on the same data share its features."""
        from ssl_bench.evaluate.subject import Subject

        opened = self.checkpoint(protocol)
        new = Subject(opened, self.dataset(kind)[1], self.effort, self.options.seed)
        return self.subjects.setdefault((opened.weights_sha256, kind), new)


def _task(name: str, opening: _Opening) -> _Task:
    options, protocols = opening.options, efficiency.protocols()
    kind = protocols[efficiency.choose(name)[0]].DATA
    full, dataset = opening.dataset(kind)
    protocol, recipe_name, recipe, overrides = _choose(name, options, built_in=dataset.built_in)
    subject = opening.subject(protocol, kind)
    opened, module = subject.checkpoint, protocols[protocol]
    if dataset.built_in and not getattr(module, "KEEPS_SIZES", False):
        _check_sizes(overrides, dataset)
    _check_readings(module, recipe, subject, protocol)
    module.check(subject, recipe)
    identity = Run(
        model=opened.name,
        weights_sha256=opened.weights_sha256,
        dataset=dataset.name,
        dataset_manifest_sha256={split.name: split.manifest_sha256 for split in dataset.splits.values()},
        protocol=protocol,
        recipe=recipe_name,
        version=module.VERSION,
        deviations=Deviations(
            overrides=overrides,
            limit=options.limit,
            seed=options.seed,
            dtype=options.dtype,
            checkpoint_key=options.checkpoint_key,
            arch=dict(options.arch),
            subset=_subset(options) | _data_used(module, subject, recipe),
            skip_broken=options.skip_broken,
        ),
    )
    return _Task(module, recipe, overrides, subject, full, identity)


def _data_used(module: ProtocolModule, subject: Subject, recipe: Any) -> dict[str, str]:
    """What else decides which images are used, where a protocol has its own lists."""
    return dict(module.data_used(subject, recipe)) if hasattr(module, "data_used") else {}


_SIZES = ("resize_px", "crop_px", "longer_side_px", "interpolation")


def _check_sizes(overrides: Mapping[str, Any], dataset: AnyDataset) -> None:
    """Built-in images come at the network's own size: a setting without effect would be recorded as if it had one."""
    if ignored := [name for name in _SIZES if name in overrides]:
        raise UserError(
            f"--set {ignored[0]}=...: the images of {dataset.name} are brought to the network's own size, whatever the "
            "recipe says. Leave it out, or give the images as a folder (ssl-bench data toy --out ...)."
        )


def _check_readings(module: ProtocolModule, recipe: Any, subject: Subject, protocol: str) -> None:
    """Refuse a recipe that asks for what the network lacks, and name the recipes that it can serve."""
    from ssl_bench.evaluate.readings import why_not

    def problem(candidate: Any) -> str | None:
        read = module.readings(subject, candidate).values()
        reasons = (why_not(reading, subject.checkpoint.architecture) for readings in read for reading in readings)
        return next((reason for reason in reasons if reason), None)

    if reason := problem(recipe):
        fitting = [name for name, candidate in module.RECIPES.items() if problem(candidate) is None]
        hint = f"Recipes that fit: {', '.join(f'{protocol}/{name}' for name in fitting)}. " if fitting else ""
        norm = "Or leave the norm out: --set norm=false. " if "final norm" in reason else ""
        raise UserError(f"{subject.checkpoint.spec}: {protocol} cannot be run so: {reason}. {hint}{norm}".rstrip())


def _extract(subject: Subject, todo: Sequence[_Task]) -> dict[str, float]:
    """All that the tasks of one network will read, by as few passes as possible; the seconds that it took."""
    started = time.perf_counter()
    mine = [task for task in todo if task.subject is subject]
    readings: dict[str, list[Reading]] = {}
    for task in mine:
        for split, wanted in task.module.readings(subject, task.recipe).items():
            readings.setdefault(split, []).extend(wanted)
    for split, wanted in readings.items():
        subject.prepare(split, wanted)
    phase = "extract" if len(mine) < 2 else "extract_shared"
    return {phase: time.perf_counter() - started}


def _score(task: _Task, options: Options, seconds: dict[str, float]) -> Record:
    """Scores and record; the first process writes it."""
    from ssl_bench.evaluate.training import distributed

    started, clock = datetime.now(UTC), time.perf_counter()
    found = task.module.run(task.subject, task.recipe) if task.module.DISTRIBUTED else None

    def write() -> None:
        scores = found or task.module.run(task.subject, task.recipe)
        phases = seconds | {"score": time.perf_counter() - clock}
        record = _record(task, scores, options, started=started, seconds=phases)
        records.write_record(record, options.results, samples=_samples(task.subject, scores), files=scores.files)

    distributed.on_first(write)
    record = records.find_record(task.run, options.results)
    assert record is not None
    return record


def _record(task: _Task, scores: Scores, options: Options, *, started: datetime, seconds: dict[str, float]) -> Record:
    subject, checkpoint = task.subject, task.subject.checkpoint
    original = {split.name: len(split) for split in task.full.splits.values()}
    read = task.module.readings(subject, task.recipe)  # of the other splits the protocol itself must know
    skipped = {split: len(subject.broken(split)) if split in read else 0 for split in original} | dict(scores.skipped)
    evaluated = {
        split.name: len(split) - skipped[split.name] if split.name in read else 0
        for split in subject.dataset.splits.values()
    } | dict(scores.evaluated)
    return Record(
        schema_version=records.SCHEMA_VERSION,
        status="done",
        model=checkpoint.name,
        weights_sha256=checkpoint.weights_sha256,
        arch=checkpoint.architecture.name if checkpoint.format != "pixels" else "pixels",
        checkpoint=records.OpenedCheckpoint(
            spec=checkpoint.spec,
            format=checkpoint.format,
            matched_percent=None if checkpoint.format in _NOT_LOADED else checkpoint.match.matched_percent,
            notes=list(checkpoint.notes),
        ),
        checkpoint_key=checkpoint.key,
        checkpoint_key_given=options.checkpoint_key is not None,
        arch_overrides=dict(options.arch),
        subset=dict(task.run.deviations.subset),
        protocol=task.run.protocol,
        recipe=task.run.recipe,
        version=task.run.version,
        overrides=task.overrides,
        resolved_recipe=dataclasses.asdict(task.recipe),
        dataset=subject.dataset.name,
        dataset_manifest_sha256=dict(task.run.dataset_manifest_sha256),
        n_samples=records.SampleCounts(original=original, evaluated=evaluated),
        skipped_broken=skipped,
        skip_broken=options.skip_broken,
        limited=options.limit is not None,
        limit=options.limit,
        seed=options.seed,
        selected_on=task.recipe.selected_on,
        scores={name: records.Score(**_score_fields(score)) for name, score in scores.metrics.items()},
        main_metric=scores.main,
        lower_is_better=scores.lower_is_better,
        device=subject.effort.device,
        dtype=options.dtype,
        environment=environment(),
        code_version=code_version(),
        started=started.isoformat(timespec="seconds"),
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        peak_memory_bytes=peak_memory_bytes(subject.effort.device),
        features=[
            records.FeaturesUsed(key=features.key, split=split, reading=str(reading), source=features.source)
            for split, reading, features in subject.used(task.module.readings(subject, task.recipe))
        ],
        warnings=list(scores.warnings),
        details=_pretraining(checkpoint) | dict(scores.details),
    )


def _pretraining(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `ssl-bench pretrain` says of its checkpoints, by which a published line of the same method is found."""
    told = ("method", "recipe", "overrides", "data", "images", "seed", "epochs_done", "resolved_recipe")
    origin = checkpoint.origin
    return {"pretraining": {name: origin[name] for name in told if name in origin}} if "method" in origin else {}


def _score_fields(score: Any) -> dict[str, Any]:
    fields = {key: value for key, value in dataclasses.asdict(score).items() if value is not None}
    return fields | ({"ddof": 1} if "std" in fields else {})


def _samples(subject: Subject, scores: Scores) -> dict[str, Sequence[Any]] | None:
    """Per-sample correctness, for paired tests."""
    if scores.predictions is None:
        return None
    split, broken = subject.split("val"), set(subject.broken("val"))
    kept = [index for index in range(len(split)) if index not in broken]
    labels = split.labels[kept]
    return {
        "sample_id": [split.sample_ids[index] for index in kept],
        "label": labels,
        "prediction": scores.predictions,
        "correct": scores.predictions == labels,
    }


def _reduced(full: AnyDataset, options: Options) -> AnyDataset:
    """The dataset after the lists and --limit."""
    from ssl_bench.evaluate.datasets import Dataset, open_dataset

    lists = {"train_list": options.train_list, "val_list": options.val_list, "class_list": options.class_list}
    given = {name: Path(path) for name, path in lists.items() if path}
    dataset = full
    if given:
        if not isinstance(full, Dataset):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{flags}: lists are for datasets of labeled images, which {full.name} is not.")
        dataset = open_dataset(options.dataset or full.name, **given)
        if any(len(split.classes) < 2 for split in dataset.splits.values()):
            raise UserError("--class-list leaves one class, and one class cannot be told from others; name more.")
    return dataset if options.limit is None else dataset.limited(options.limit)


def _subset(options: Options) -> dict[str, str]:
    """Which lists reduced the data: name and content, so that no reduced run passes for a whole one."""
    lists = {"train_list": options.train_list, "val_list": options.val_list, "class_list": options.class_list}
    return {
        name: f"{Path(path).name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}"
        for name, path in lists.items()
        if path is not None
    }
