"""`ssl-bench reproduce moca:8`: what every number of a paper's table needs, what of it there is, and running the rest.

    reproduce moca:8 --dry-run                          the plan: which runs, on which data, what is missing for them
    reproduce moca:8 --ckpt MOCA=x.pth --ckpt DINO=timm:vit_base_patch16_224.dino

A run is called after the line of the table that it is for, by which the table finds it (leaderboards/standing.py). One
`running.run` serves all recipes of a checkpoint on a dataset, since they can share the forward pass.
"""

from __future__ import annotations

import dataclasses
import shlex
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_bench import efficiency, estimating, running
from ssl_bench.errors import UserError, unknown
from ssl_bench.files import expanded, require_writable, results_folder
from ssl_bench.leaderboards import tables
from ssl_bench.leaderboards.origins import contradictions, our_arch, paper_arch, said_of
from ssl_bench.leaderboards.published import Cell
from ssl_bench.leaderboards.record import Record
from ssl_bench.leaderboards.standing import (
    as_typed,
    lines_named,
    lines_of,
    methods_of,
    other_settings,
)
from ssl_bench.leaderboards.store import load_results
from ssl_bench.leaderboards.strict_json import canonical
from ssl_bench.leaderboards.tables import Measure, Pretraining, Row
from ssl_bench.progress import say

if TYPE_CHECKING:
    from ssl_bench.evaluate.checkpoints import Checkpoint
    from ssl_bench.evaluate.splits import AnyDataset

DONE, TO_RUN = "done", "to run"


@dataclass(frozen=True)
class Options:
    """How the runs of a table are made."""

    datasets: Mapping[str, str] = field(default_factory=dict)  # the table's name for it -> another name, or a path
    device: str = "auto"
    dtype: str = "fp32"
    batch_size: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Need:
    """Some numbers of a line that one run gives, and whether it can be made."""

    row: str
    columns: tuple[str, ...]
    recipe: str = ""  # protocol/recipe; "": cannot be measured
    settings: Mapping[str, str] = field(default_factory=dict)
    dataset: str = ""  # as it is to be opened; "": none is read
    spec: str = ""  # the checkpoint
    model: str = ""  # what the run is to be called
    state: str = TO_RUN  # or done, or what is missing
    why: tuple[str, ...] = ()  # ... and what to do about that
    seconds: float | None = None
    estimate: str = ""  # what the seconds are taken from
    note: str = ""  # what the paper leaves open

    @property
    def run(self) -> tuple[str, str, str, str]:
        """Equal for needs that one `running.run` serves."""
        return self.model, self.spec, self.dataset, canonical(self.settings)


def plan(table: str, checkpoints: Sequence[str], options: Options, *, dry_run: bool = False) -> list[Need]:
    """All that the table needs, line by line. With `dry_run` no checkpoint is downloaded to look at it."""
    planner = _Planner(table, checkpoints, options, dry_run)
    needs = [planner.need(row, columns, measure) for row in planner.lines for columns, measure in planner.measures(row)]
    if any(need.state == TO_RUN for need in needs):
        require_writable(results_folder())
    return needs


def run(needs: Sequence[Need], options: Options) -> dict[str, str]:
    """Run what is to be run. One failure does not stop the others: what failed, and why."""
    groups: dict[tuple[str, str, str, str], dict[str, Need]] = {}
    for need in needs:
        if need.state == TO_RUN:
            groups.setdefault(need.run, {})[need.recipe] = need
    failures: dict[str, str] = {}
    for number, group in enumerate(groups.values(), 1):
        first = next(iter(group.values()))
        on = f" on {first.dataset}" if first.dataset else ""
        say(f"[{number}/{len(groups)}] {first.model}: {', '.join(group)}{on}")
        if len(group) == 1 or _run(first, list(group), options) is not None:  # one of several may stop the others
            for recipe in group:
                if error := _run(first, [recipe], options):
                    failures[f"{first.model}: {recipe}{on}"] = error
                    say(f"failed: {first.model}: {recipe}{on}: {error}")
    return failures


def _run(need: Need, recipes: list[str], options: Options) -> str | None:
    """None, or why it failed."""
    how = running.Options(
        dataset=need.dataset or None,
        settings=need.settings,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size if need.dataset else None,
        workers=options.workers,
        name=need.model,
    )
    try:
        running.run(need.spec, recipes, how)
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - hours of other runs must not be lost to a fault in one
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def known_here(dataset: str) -> tuple[bool, list[Path]]:
    """Whether a dataset that is given by name is on this machine, and where it is looked for."""
    from ssl_bench.evaluate.datasets import DATASETS, named_places
    from ssl_bench.evaluate.splits import BUILT_IN

    places = named_places(dataset)
    if dataset in DATASETS and DATASETS[dataset].classes_of:  # classes of a dataset that may be there as a whole
        places += named_places(DATASETS[dataset].classes_of)
    return dataset in BUILT_IN or any(place.exists() for place in places), places


@dataclass(frozen=True)
class _Given:
    """`--ckpt NAME=SPEC`."""

    model: str
    spec: str
    rows: frozenset[str]
    arch: str  # "" where it was not looked at


class _Planner:
    """What is known while a table is planned."""

    def __init__(self, table: str, checkpoints: Sequence[str], options: Options, dry_run: bool) -> None:
        from ssl_bench.machine import device_named

        self.table, self.options, self.dry_run = table, options, dry_run
        self.layout, self.lines = tables.find(table), lines_of(table)
        self.device = device_named(options.device)
        self.records = load_results().records
        self.given: list[_Given] = []
        self._opened: dict[tuple[str, str], Checkpoint] = {}
        self._datasets: dict[tuple[str, str], AnyDataset | UserError] = {}
        for text in checkpoints:
            self._give(text)
        wanted = {
            measure.dataset for row in self.lines for _, measure in self.measures(row) if isinstance(measure, Measure)
        }
        for name in options.datasets:
            if name not in wanted:
                raise unknown(f"dataset of {table}", name, wanted - {""})

    def measures(self, row: Row) -> list[tuple[dict[str, Cell], Measure | str]]:
        """The ways in which the numbers of a line are measured, each with its columns."""
        ways: dict[str, tuple[dict[str, Cell], Measure | str]] = {}
        for column in self.layout.columns:
            if cell := row.cells.get(column.name):
                way = column.measure_of(cell)
                trained_by = self.layout.pretraining_of(cell)  # efficiency may differ by column
                key = way if isinstance(way, str) else f"{way.recipe} {way.dataset} {canonical(way.settings)}"
                key += f" {trained_by.folder if trained_by else ''}"
                ways.setdefault(key, ({}, way))[0][column.name] = cell
        return list(ways.values())

    def need(self, row: Row, cells: Mapping[str, Cell], measure: Measure | str) -> Need:
        """Whether a line's numbers of one way of measuring can be had here."""
        cell = next(iter(cells.values()))
        if isinstance(measure, str):
            return Need(row.label, tuple(cells), state="cannot be measured", why=(measure,))
        settings = {name: as_typed(value) for name, value in measure.settings.items()}
        dataset = self.options.datasets.get(measure.dataset, measure.dataset)
        need = Need(row.label, tuple(cells), measure.recipe, settings, dataset, note=measure.note)
        if measure.of == "pretraining":
            return self._cost(row, cell, need)
        given = next((each for each in self.given if row.label in each.rows), None)
        if given:
            need = dataclasses.replace(need, spec=given.spec, model=given.model)
            if self._is_done(need):
                return dataclasses.replace(need, state=DONE)
        lacks = {} if given else {"no checkpoint": self._how_to_give(row, cell)}
        if absent := self._absent(measure.dataset, dataset):
            lacks["no dataset"] = absent
        opened = None if lacks else self._dataset(need)
        if isinstance(opened, UserError):
            lacks["no such data"] = str(opened)
        if opened is None or isinstance(opened, UserError):
            return dataclasses.replace(need, state=", ".join(lacks), why=tuple(lacks.values()))
        arch = (given.arch if given else "") or our_arch(cell.arch)
        images = estimating.images_of(opened, measure.dataset)
        work = estimating.Work(measure.recipe, settings, images, arch, self.device, self.options.dtype)
        seconds, estimate = estimating.seconds_of(work, self.records)
        return dataclasses.replace(need, seconds=seconds, estimate=estimate)

    def _cost(self, row: Row, cell: Cell, need: Need) -> Need:
        """Of pre-training: a recipe stands in the place of a checkpoint."""
        pretraining = self.layout.pretraining_of(cell)
        if pretraining is None:
            why = f"{cell.method} is not pre-trained here, so what it costs cannot be measured"
            return dataclasses.replace(need, state="cannot be measured", why=(why,))
        changes = "".join(f",{name}={as_typed(value)}" for name, value in pretraining.settings.items())
        spec = f"{efficiency.PREFIX}{pretraining.recipe}{changes}"
        name = pretraining.recipe.replace("/", "-")  # by which other tables find it too
        only = [line.label for line in lines_named(self.layout, self.lines, name)] == [row.label] and not changes
        need = dataclasses.replace(need, spec=spec, model=name if only else row.label)
        if self._is_done(need):
            return dataclasses.replace(need, state=DONE)
        _, _, recipe = efficiency.choose(need.recipe)
        if recipe.processes is not None and not self.device.startswith("cuda"):
            why = (
                f"{need.recipe} times steps of {recipe.batch} images, and wants a GPU; what this machine takes by "
                f"small steps: ssl-bench run --protocol {efficiency.NAME} --ckpt {shlex.quote(spec)}"
            )
            return dataclasses.replace(need, state="no GPU", why=(why,))
        return dataclasses.replace(need, estimate="unknown")

    def _give(self, text: str) -> None:
        """`NAME=SPEC`, where a name may hold "=" itself."""
        names = [name for row in self.lines for name in (*methods_of(row), row.label)]
        known = {name.casefold(): name for name in names}
        cuts = [place for place, character in enumerate(text) if character == "="]
        fitting = [place for place in cuts if text[:place].strip().casefold() in known]
        name, spec = (text[: max(fitting)], text[max(fitting) + 1 :]) if fitting else text.partition("=")[::2]
        name, spec = name.strip(), spec.strip()
        if not name or not spec:
            raise UserError(f"--ckpt {text}: expected NAME=SPEC with the name of a line, as {names[0]}=x.pth.")
        if not fitting:
            raise unknown(f"line of {self.table}", name, dict.fromkeys(names))
        named = lines_named(self.layout, self.lines, name)
        arch = self._arch(spec)
        said = {"arch": paper_arch(arch)}
        ours = [row for row in named if any(not contradictions(said, said_of(cell)) for cell in row.cells.values())]
        given = _Given(known[name.casefold()], spec, frozenset(row.label for row in ours or named), arch)
        for other in self.given:
            if both := sorted(other.rows & given.rows):
                raise UserError(
                    f"--ckpt: {other.spec} and {spec} are both for the line {both[0]!r}; give it one of them."
                )
        self.given.append(given)

    def _arch(self, spec: str) -> str:
        if spec.startswith(efficiency.PREFIX):
            raise UserError(f"--ckpt {spec}: what recipes cost is measured without being asked for; give a checkpoint.")
        if self._is_remote(spec):
            _require_known(spec)
            return ""
        return self._open(spec, "knn").architecture.name

    def _is_remote(self, spec: str) -> bool:
        return self.dry_run and spec.startswith(("timm:", "hf:"))

    def _open(self, spec: str, protocol: str) -> Checkpoint:
        """As the protocol opens it, which may be the file's teacher or its student."""
        from ssl_bench.evaluate.checkpoints import open_checkpoint

        if (spec, protocol) not in self._opened:
            opener = efficiency.open_recipe if spec.startswith(efficiency.PREFIX) else open_checkpoint
            self._opened[spec, protocol] = opener(spec, protocol=protocol)
        return self._opened[spec, protocol]

    def _is_done(self, need: Need) -> bool:
        """Whether there is a record of exactly this, of the same images."""
        protocol, _, recipe = need.recipe.partition("/")
        version = efficiency.protocols()[protocol].VERSION
        wanted = Measure(need.recipe, "", "", need.settings)

        def fits(record: Record) -> bool:
            return (
                (record.model, record.protocol, record.recipe, record.version)
                == (need.model, protocol, recipe, version)
                and not (record.limited or record.seed or record.checkpoint_key_given or record.arch_overrides)
                and not (record.skip_broken or {"train_list", "val_list", "class_list"} & set(record.subset))
                and record.dtype == self.options.dtype
                and not other_settings(record, wanted)
            )

        def is_same(record: Record) -> bool:
            if not self._is_of(record, need):
                return False
            if self._is_remote(need.spec):
                return record.checkpoint.spec == need.spec
            return record.weights_sha256 == self._open(need.spec, protocol).weights_sha256

        return any(is_same(record) for record in self.records if fits(record))

    def _is_of(self, record: Record, need: Need) -> bool:
        if not need.dataset:
            return record.dataset == efficiency.noise(self.device).name
        if self._absent(need.dataset, need.dataset) or isinstance(dataset := self._dataset(need), UserError):
            return False
        manifests = {split.name: split.manifest_sha256 for split in dataset.splits.values()}
        return record.dataset == dataset.name and record.dataset_manifest_sha256 == manifests

    def _dataset(self, need: Need) -> AnyDataset | UserError:
        """As the protocol reads it, or why it cannot."""
        from ssl_bench.evaluate.datasets import KINDS

        kind = efficiency.protocols()[need.recipe.partition("/")[0]].DATA
        if (kind, need.dataset) not in self._datasets:
            try:
                self._datasets[kind, need.dataset] = KINDS[kind].open(need.dataset)
            except UserError as error:
                self._datasets[kind, need.dataset] = error
        return self._datasets[kind, need.dataset]

    def _absent(self, name: str, dataset: str) -> str:
        """Where a dataset is expected that is not here."""
        from ssl_bench.evaluate.datasets import KINDS

        if not any(dataset in kind.names for kind in KINDS.values()):
            path = expanded(dataset)
            return "" if path.exists() else f"--dataset {name}={dataset}: there is no {path}"
        here, places = known_here(dataset)
        expected = " or ".join(map(str, places))
        return (
            "" if here else f"{dataset} is not here: expected in {expected} (SSL_BENCH_DATA), or --dataset {name}=PATH"
        )

    def _how_to_give(self, row: Row, cell: Cell) -> str:
        """And where it may come from. Lines that one pre-training serves are given together."""
        pretraining = self.layout.pretraining_of(cell)
        lines = [line for line in self.lines if cell.method in methods_of(line)]
        trained = [self.layout.pretraining_of(each) for line in lines for each in line.cells.values()]
        together = pretraining is not None and all(each == pretraining for each in trained)
        name = cell.method if len(lines) == 1 or together else row.label
        spec = f"random:{our_arch(cell.arch) or 'vit_base_patch16_224'}" if cell.method == "Random" else "SPEC"
        option = f"{name}: --ckpt {shlex.quote(f'{name}={spec}')}"
        if pretraining is None:
            return option
        data = self.options.datasets.get(pretraining.data, "")
        base = self._base(pretraining)
        notes = [pretraining.note, f"SPEC: {pretraining.base}" if pretraining.base and not base else ""]
        note = f" ({'; '.join(filter(None, notes))})" if any(notes) else ""
        return f"{option}; to train one{note}: {pretraining.command(data=data, base=base or 'SPEC')}"

    def _base(self, pretraining: Pretraining) -> str:
        """Where the checkpoint lies that it learns from, if another line's pre-training makes it."""
        named = lines_named(self.layout, self.lines, pretraining.base)
        trained = [self.layout.pretraining_of(cell) for row in named for cell in row.cells.values()]
        folders = {each.folder if each else "" for each in trained}
        return folders.pop() if len(folders) == 1 else ""


def _require_known(spec: str) -> None:
    """A checkpoint that is not downloaded must at least have a name that there is."""
    if not spec.startswith("timm:"):
        return
    import timm

    name = spec.removeprefix("timm:")
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models(["vit_*", "deit*", "beit*"]))
    base, _, tag = name.partition(".")
    if tag and name not in (tagged := timm.list_pretrained(f"{base}.*")):
        raise unknown("timm model", name, tagged)
