"""Time an epoch, memory, images a second: what a pre-training recipe costs on this machine.

    ssl-bench run --protocol efficiency --ckpt recipe:moca/paper           METHOD/ROW, as `ssl-bench ls recipes` has it
    ssl-bench run --protocol efficiency --ckpt recipe:moca/ablation,decoder_depth=4,mask_ratios=.65,.65
    ssl-bench run --protocol efficiency --ckpt runs/moca                   the recipe that made a checkpoint
    torchrun --nproc-per-node 8 -m ssl_bench.cli run --protocol efficiency/moca --dtype bf16 --ckpt recipe:moca/paper

MOCA, Tables 1, 2b, 2c, 3, 7 and 12; ExtreMA, Tables 8 and 12; SdAE, Tables 1 and 7.

A few steps of the training loop are timed, on noise instead of images; an epoch is extrapolated from the median step.
Times and bytes belong to a machine, so the machine is part of what the run's dataset is called, and neither
`only-missing` nor a leaderboard takes one machine's record for another's.

It looks like a file of protocols/ and cannot be one: protocols do not know how to pre-train. So the command line
composes it, from pretrain/measure.py and what is here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import statistics
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssl_bench.errors import UserError, unknown

if TYPE_CHECKING:
    from ssl_bench.evaluate.checkpoints import Checkpoint
    from ssl_bench.evaluate.readings import Reading
    from ssl_bench.evaluate.splits import AnyDataset
    from ssl_bench.evaluate.subject import Scores, Subject
    from ssl_bench.pretrain.measure import Cost
    from ssl_bench.pretrain.method import Training
    from ssl_bench.protocols.catalog import ProtocolModule

NAME = "efficiency"
VERSION = 1
DATA, DISTRIBUTED = "noise", True
PREFIX = "recipe:"


@dataclass(frozen=True)
class Recipe:
    """How one paper measures. Which pre-training is measured, `--ckpt` says."""

    batch: int  # images a step of one process, which is one GPU
    processes: int | None  # of the published times
    steps: int  # that are timed
    images: int  # of the epoch that is extrapolated to
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("batch", "processes", "steps", "images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: expected at least 1.")

    @property
    def selected_on(self) -> Literal["none"]:
        """Nothing is chosen."""
        return "none"


_MOCA = (
    "minutes an epoch and GB, by row of pretrain/moca.py: ablation 8.15, 23.0; table3-full-decoding 9.00, 30.4; "
    "table3-two-rounds 10.35, 39.5; table2-depth1 8.08, 21.5; table2-depth4 8.55, 26.2 (all decoded: 10.25, 37.7); "
    "table2-depth8 9.30, 32.6 (all decoded: 12.41, 52.4); table2-mask55 9.00, 28.6; table2-mask75 7.37, 18.2; "
    "table2-mask80 7.35, 15.7; paper 11.23 minutes (MAE 5.35); vit-l 89 hours for 200 epochs (MAE 187 for 1600)"
)
_EXTREMA = (
    "hours for 300 epochs, by row of pretrain/extrema.py: 75x1 30, 75x2 40, 80x1 29, 80x2 36, 80x5 60, 90x1 28, "
    "90x2 30 (MAE 650 for 1600 epochs)"
)
_SDAE = (
    "seconds an epoch and GB, by row of pretrain/sdae.py: paper 706, 16.02 (60.8 hours for 300 epochs); full-image "
    "826, 16.24; only-masked 761, 16.01; teacher crop 616, 15.54; mae/300ep 551, 14.93 (45.0 hours); 800ep 174.1 hours "
    "(mae/800ep 140.1)"
)

# fmt: off
RECIPES: dict[str, Recipe] = {
    #                batch processes steps images
    "moca":    Recipe(256, 8,        30,   1_281_167,
                      source="MOCA, Tables 1, 2b, 2c, 3, 7 and 12: 8 A100, a batch of 2048", published=_MOCA),
    # Assumption: what a GPU gets of the batch is computed at once.
    "extrema": Recipe(256, 8,        30,   1_281_167,
                      source="ExtreMA, Tables 8 and 12: 8 V100, a batch of 2048", published=_EXTREMA),
    # The paper says V100 and a batch of 768, the README's command that it is 8 x 96.
    "sdae":    Recipe(96,  8,        30,   1_281_167,
                      source="SdAE, Tables 1 and 7, appendix A.1; official code, README", published=_SDAE),
    # What a CPU can do, which takes this row where no other is named.
    "toy":     Recipe(16,  None,     3,    1_281_167, source="ours, for a laptop", published="none"),
}
# fmt: on


def protocols() -> dict[str, ProtocolModule]:
    """All that --protocol knows: the files of protocols/, and this one."""
    from ssl_bench.protocols.catalog import PROTOCOLS

    return {**PROTOCOLS, NAME: typing.cast("ProtocolModule", sys.modules[__name__])}


def choose(name: str, *, built_in: bool = False) -> tuple[str, str, Any]:
    """As protocols/catalog.py chooses, from all of them."""
    from ssl_bench.protocols import catalog

    return catalog.choose(name, built_in=built_in, protocols=protocols())


# The subject: a pre-training recipe, in the place of a checkpoint. -----------------------------------------------


def open_recipe(
    spec: str,
    *,
    key: str | None = None,
    protocol: str | None = None,
    arch: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Checkpoint:
    """`recipe:METHOD/ROW,field=value,...`: what `open_checkpoint` would say of a checkpoint that this recipe made.

    A bare method is its first row. A piece without "=" goes on with the value before it: mask_ratios=.65,.65
    """
    from ssl_bench.evaluate.architecture import named
    from ssl_bench.evaluate.checkpoints import Checkpoint
    from ssl_bench.evaluate.recipes import with_settings
    from ssl_bench.leaderboards.record import settings_text
    from ssl_bench.leaderboards.strict_json import canonical, plain
    from ssl_bench.pretrain.catalog import choose as choose_pretraining
    from ssl_bench.pretrain.run_folder import flat

    del seed  # of networks that were never trained
    if protocol != NAME:
        raise UserError(
            f"{spec}: a pre-training recipe has a cost and no weights, so {protocol} has nothing to score. Measure it "
            f"by --protocol {NAME}, or give {protocol} a checkpoint."
        )
    if key is not None or arch:
        given = f"--checkpoint-key {key}" if key is not None else f"--arch {next(iter(arch or {}))}"
        raise UserError(f"{spec}: {given}: a recipe is no file; change it by {spec},field=value.")
    names, *pieces = spec.removeprefix(PREFIX).split(",")
    method, _, row = (part.strip() for part in names.partition("/"))
    settings = _settings(spec, pieces)
    try:
        _, row, original = choose_pretraining(method, row or None, built_in=False)
        recipe = with_settings(original, settings)
        architecture = named(recipe.arch)
    except UserError as error:
        raise _about(spec, error) from error
    before, after = flat(dataclasses.asdict(original)), flat(dataclasses.asdict(recipe))
    changes = {name: after[name] for name in after if after[name] != before[name]}
    identity = canonical({"method": method, **after})
    return Checkpoint(
        spec=spec,
        name=f"{method}-{row}" + (f" [{settings_text(changes)}]" if changes else ""),
        format="recipe",
        key="none",
        architecture=architecture,
        weights_sha256=hashlib.sha256(identity.encode()).hexdigest(),
        notes=("a recipe, not a network: weights_sha256 is of its method and fields",),
        origin={
            "method": method,
            "recipe": row,
            "resolved_recipe": plain(dataclasses.asdict(recipe)),
            "overrides": changes,
        },
    )


def _about(spec: str, error: UserError) -> UserError:
    """Recipes of pre-training speak of --set, which here changes the measurement's."""
    hint = f" Here that is {PREFIX}METHOD/ROW,field=value." if "--set" in str(error) else ""
    return UserError(f"{spec}: {error}{hint}")


def _settings(spec: str, pieces: list[str]) -> dict[str, str]:
    """`["a=1", "2", "b=3"]` -> `{"a": "1,2", "b": "3"}`."""
    from ssl_bench.evaluate.recipes import settings_from_text

    pairs: list[str] = []
    for piece in pieces:
        if "=" in piece or not pairs:
            pairs.append(piece)
        else:
            pairs[-1] += f",{piece}"
    settings = settings_from_text(pairs, f"{PREFIX}moca/ablation,decoder_depth=4,mask_ratios=.65,.65")
    if len(settings) < len(pairs):
        raise UserError(f"{spec}: a field is given twice; give each once.")
    if "batch" in settings:
        raise UserError(
            f"{spec}: batch={settings['batch']}: what one process computes at a time is a setting of the measurement: "
            f"--set batch={settings['batch']}"
        )
    return settings


def _pretraining(checkpoint: Checkpoint) -> tuple[str, Training]:
    """The method and the recipe that made the checkpoint (or would make it), as it says itself."""
    from ssl_bench.pretrain.catalog import METHODS

    method, values = (checkpoint.origin.get(name) for name in ("method", "resolved_recipe"))
    if not isinstance(method, str) or not isinstance(values, dict):
        raise UserError(
            f"{checkpoint.spec} ({checkpoint.format}) does not say which recipe made it, and {NAME} measures recipes: "
            f"expected a checkpoint that `ssl-bench pretrain` wrote, or {PREFIX}METHOD/ROW, such as {PREFIX}moca/paper "
            "(ssl-bench ls recipes)."
        )
    if method not in METHODS:
        raise UserError(f"{checkpoint.spec}: {unknown('method', method, METHODS)}")
    known = {field.name for field in dataclasses.fields(METHODS[method].Recipe)}
    if differing := sorted(known ^ set(values)):
        raise UserError(
            f"{checkpoint.spec}: made by another version of {method}, whose recipe had other fields "
            f"({', '.join(differing)}). Measure a recipe of this version: {PREFIX}{method}/ROW."
        )
    made = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    recipe: Training = METHODS[method].Recipe(**made)
    return method, recipe


# The data: noise, on this machine. -------------------------------------------------------------------------------


def noise(device: str) -> AnyDataset:
    """What stands in the place of a dataset: named after the machine, since that is what the numbers are of."""
    import numpy as np

    from ssl_bench.evaluate.splits import Names, Split

    name = f"noise on {_machine(device)}"

    class Noise(Split):
        """No images: of this split only the identity is asked for."""

        @functools.cached_property
        def manifest_sha256(self) -> str:
            text = f"{name}: standard normal values of the shape of the recipe's views, the same at every step"
            return hashlib.sha256(text.encode()).hexdigest()

    split = Noise("noise", (), np.zeros(0, dtype=np.int64), Names(()), typing.cast("Any", None))
    return _NoiseOn(name, built_in=not device.startswith("cuda"), splits={"noise": split})


@dataclass(frozen=True, eq=False)
class _NoiseOn:
    """A dataset as `run` knows them. That it is built in brings the `toy` row to where there is no GPU."""

    name: str
    built_in: bool
    splits: Mapping[str, Any]
    root: Path | None = None

    def limited(self, limit: int) -> AnyDataset:
        """There is nothing to limit."""
        raise UserError(
            f"--limit {limit}: {NAME} reads no images. Leave it out; fewer steps (--set steps=2) and smaller ones "
            "(--set batch=4) are what makes it quick."
        )


def _machine(device: str) -> str:
    """The processor, how much of it, and how many processes: `2 threads of AMD EPYC`, `NVIDIA H100, 8 processes`."""
    import torch

    from ssl_bench.evaluate.training import distributed

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    elif device == "cpu":
        threads = torch.get_num_threads()
        name = f"{threads} thread{'s' if threads > 1 else ''} of {_processor()}"
    else:
        name = f"{_processor()} ({device})"
    world = distributed.world_size()
    return name if world == 1 else f"{name}, {world} processes"


def _processor() -> str:
    """As Linux or the platform calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [" ".join(line.partition(":")[2].split()) for line in lines if line.startswith("model name")]
    return next((name for name in [*names, platform.processor(), platform.machine()] if name), "an unknown processor")


# The protocol. ---------------------------------------------------------------------------------------------------


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """No features are read."""
    del subject, recipe
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """A checkpoint that says which recipe made it, and nothing asked for that means something else."""
    _pretraining(subject.checkpoint)
    if (size := subject.effort.batch_size) is not None:
        raise UserError(f"--batch-size {size}: {NAME} extracts nothing; images a step are --set batch={size}.")
    if subject.effort.dtype == "fp16" and not subject.effort.device.startswith("cuda"):
        raise UserError("--dtype fp16 needs a CUDA device; use bf16 or fp32 here.")
    del recipe


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Time steps of the recipe on this machine. Under torchrun all processes do, as they would in training."""
    import torch

    from ssl_bench.evaluate.checkpoints import open_checkpoint
    from ssl_bench.evaluate.training import distributed
    from ssl_bench.pretrain.catalog import METHODS
    from ssl_bench.pretrain.loop import Settings
    from ssl_bench.pretrain.measure import NOWHERE, measure

    method, pretraining = _pretraining(subject.checkpoint)
    effort, world = subject.effort, distributed.world_size()
    pretraining = dataclasses.replace(pretraining, batch=recipe.batch * world)
    needs_base = getattr(METHODS[method], "NEEDS_BASE", False)
    base = open_checkpoint(f"random:{pretraining.arch}", seed=subject.seed) if needs_base else None
    settings = Settings(out=NOWHERE, device=effort.device, dtype=effort.dtype, seed=subject.seed)  # type: ignore[arg-type]
    try:
        cost = measure(method, pretraining, settings, steps=recipe.steps, base=base)
    except UserError as error:
        raise _about(subject.checkpoint.spec, error) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{subject.checkpoint.spec}: batch={recipe.batch} does not fit into {_machine(effort.device)}. Choose a "
            f"smaller one, for example --set batch={max(recipe.batch // 2, 1)}."
        ) from error
    return scores(
        cost,
        recipe,
        world,
        warnings=_warnings(method, recipe, world=world, dtype=effort.dtype, base=base),
        measured={
            "method": method,
            "recipe": subject.checkpoint.origin.get("recipe"),
            "overrides": subject.checkpoint.origin.get("overrides"),
            "resolved_recipe": subject.checkpoint.origin.get("resolved_recipe"),
            "base": None if base is None else base.spec,
        },
    )


def scores(
    cost: Cost, recipe: Recipe, world: int, *, warnings: tuple[str, ...] = (), measured: Mapping[str, Any] | None = None
) -> Scores:
    """Numbers of a step and what they come to; none of them is a percentage."""
    from ssl_bench.evaluate.subject import Score, Scores
    from ssl_bench.pretrain.measure import UNCOUNTED_STEPS

    steps = len(cost.step_seconds)
    spread = statistics.stdev(cost.step_seconds) if steps > 1 else None
    return Scores(
        {
            "epoch_minutes": Score(cost.epoch_seconds(recipe.images) / 60, steps),
            "images_per_second": Score(cost.images_per_second, steps),
            "step_seconds": Score(cost.seconds_per_step, steps, std=spread),
            "peak_memory_gib": Score(cost.peak_memory_bytes / 2**30, steps),
            "gflops_per_image": Score(cost.flops_per_step * world / cost.batch / 1e9, 1),
        },
        main="epoch_minutes",
        warnings=warnings,
        details={
            "extrapolated": True,
            "images": recipe.images,
            "batch": cost.batch,
            "batch_per_process": recipe.batch,
            "processes": world,
            "steps": steps,
            "uncounted_steps": UNCOUNTED_STEPS,
            "step_seconds": list(cost.step_seconds),
            "memory_of": cost.memory_of + (", the largest of the processes" if world > 1 else ""),
            "flops": "forward and backward; a multiplication and an addition are two",
            "compiled": False,
            "pretraining": dict(measured or {}),
        },
    )


def _warnings(method: str, recipe: Recipe, *, world: int, dtype: str, base: Checkpoint | None) -> tuple[str, ...]:
    """What keeps a reader from comparing with the published figures, and what was not as in a real run."""
    said = [f"epoch_minutes is extrapolated from the median of {recipe.steps} steps on noise: no epoch was run"]
    if method in RECIPES and recipe.source != RECIPES[method].source and recipe.processes is not None:
        said.append(f"batch and source are another paper's; {method}'s own are efficiency/{method}")
    if recipe.processes not in (None, world):
        said.append(
            f"measured with {world} process{'es' if world > 1 else ''}; published times are of {recipe.processes}"
        )
    if recipe.processes is not None and dtype == "fp32":
        said.append("measured in fp32; the official code trains in half precision (--dtype fp16 or bf16)")
    if base is not None:
        said.append(f"the base is {base.spec}, never trained: what it costs does not depend on its weights")
    return tuple(said)
