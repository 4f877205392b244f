"""The loop: a resumed run is the uninterrupted one, two processes are one, and what goes wrong is said."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_training as tiny
import torch
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.training.loader import Views, batches, epoch_order, prepared
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.evaluate.training.signals import StopFlag
from ssl_bench.pretrain import loop
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.method import Method, Saved, Training
from ssl_bench.pretrain.networks import student
from ssl_bench.pretrain.optimization import clip_gradients, lr_at, make_optimizer, set_schedules, weight_decay_at
from ssl_bench.pretrain.run_folder import RunFolder
from ssl_bench.pretrain.vitals import collapse_alarm, spread_and_rank


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tiny.write_images(tmp_path / "images")


def trained(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path / "training.pt", weights_only=True)
    return content


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Stop(Exception):  # noqa: N818
    """Raised inside a step: the process dies there."""


def interrupted(job: loop.Job, settings: loop.Settings, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until step `after` is done and saved, then die in the middle of the next step."""
    update = loop.Run.update

    def dying(run: loop.Run, *, check: bool) -> Tensor:
        if run.step == after:
            raise Stop
        return update(run, check=check)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "update", dying)
        patch.setattr(loop.Run, "_is_time_to_save", lambda run, now: now.step == after)
        with pytest.raises(Stop):
            loop.train(job, settings)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    method: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stochastic depth on, and the stop in the middle of an epoch: what is random must not depend on what ran before.
    job = tiny.job(method, images, drop_path=0.2)
    loop.train(job, tiny.settings(tmp_path / "whole"))
    interrupted(job, tiny.settings(tmp_path / "parts"), 3, monkeypatch)
    assert trained(tmp_path / "parts")["step"] == 3
    loop.train(job, tiny.settings(tmp_path / "parts", resume=True))
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert whole["step"] == parts["step"] == 6
    assert same(whole["method"], parts["method"])
    assert same(whole["optimizer"], parts["optimizer"])
    times = ("images_per_second", "memory_bytes")
    assert [{k: v for k, v in line.items() if k not in times} for line in log_of(tmp_path / "whole")] == [
        {k: v for k, v in line.items() if k not in times} for line in log_of(tmp_path / "parts")
    ]
    left, right = (open_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert left.weights_sha256 == right.weights_sha256


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_saves_is_what_run_opens(method: str, images: Path, tmp_path: Path) -> None:
    job = tiny.job(method, images, epochs=2)
    path = loop.train(job, tiny.settings(tmp_path / "out"))
    opened = open_checkpoint(path)
    assert opened.match.matched_percent == 100
    assert opened.name == "out"
    assert opened.origin["method"] == method
    assert opened.origin["steps_done"] == 4
    output = opened.backbone(torch.randn(2, 3, 48, 48)).tokens[0]
    assert torch.isfinite(output.patches).all()
    assert opened.weights_sha256 != open_checkpoint(f"random:{tiny.ARCHITECTURE}").weights_sha256


@pytest.mark.parametrize("method", METHODS)
def test_another_seed_is_another_run(method: str, images: Path, tmp_path: Path) -> None:
    job = tiny.job(method, images, epochs=1, warmup_epochs=0)
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        loop.train(job, tiny.settings(tmp_path / str(number), seed=seed))
        losses.append(log_of(tmp_path / str(number))[-1]["loss"])
    assert losses[0] == losses[1] != losses[2]


_TWO = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
import tiny_training as tiny
from ssl_bench.pretrain import loop
from ssl_bench.evaluate.training.distributed import together
torch.set_num_threads(1)
with together("cpu"):
    for method in {methods!r}:
        loop.train(tiny.job(method, Path({images!r}), drop_path=0.0), tiny.settings(Path({out!r}) / method))
"""


def test_two_processes_are_one_with_the_same_batch(images: Path, tmp_path: Path) -> None:
    # MMC's heads take the statistics of the batch over all processes; MOCA's generators see the codebook alone.
    methods = list(METHODS)
    tiny.write_base(images.parent / "base.pt")
    script = _TWO.format(
        tests=str(Path(__file__).parent), methods=methods, images=str(images), out=str(tmp_path / "two")
    )
    (tmp_path / "two.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for method in methods:
        loop.train(tiny.job(method, images, drop_path=0.0), tiny.settings(tmp_path / "one" / method))
        one, two = log_of(tmp_path / "one" / method), log_of(tmp_path / "two" / method)
        assert len(one) == len(two) == 6
        for left, right in zip(one, two, strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=2e-4), (method, left, right)
            assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=5e-3, abs=1e-5), (method, left, right)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("mmc", "extrema")])
def test_accumulated_parts_are_the_whole_batch(method: str, images: Path, tmp_path: Path) -> None:
    for parts in (1, 2):
        job = tiny.job(method, images, drop_path=0.0)
        loop.train(job, tiny.settings(tmp_path / str(parts), accumulate=parts))
    for one, two in zip(log_of(tmp_path / "1"), log_of(tmp_path / "2"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)


def test_accumulation_is_refused_where_images_are_compared(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compares the images of a batch"):
        loop.train(tiny.job("mmc", images), tiny.settings(tmp_path / "out", accumulate=2))


@pytest.mark.parametrize(
    ("method", "terms", "vitals"),
    [
        ("mae", {"pixels"}, set()),
        (
            "moca",
            {"image", "local_condenser"},
            {"codebook_usage", "mean_assignment_entropy", "target_entropy", "mu_msd"},
        ),
        ("mmc", {"rec", "cls", "pat"}, {"masked", "cls_similarity", "pat_similarity"}),
        ("tec", {"feature", "attention"}, {"feature_explained"}),
        ("extrema", {"infonce"}, {"cosine", "target_std"}),
        ("sdae", {"cosine"}, {"teacher_std", "prediction_std"}),
    ],
)
def test_a_line_of_the_log(method: str, terms: set[str], vitals: set[str], images: Path, tmp_path: Path) -> None:
    loop.train(tiny.job(method, images), tiny.settings(tmp_path / "out", log_steps=2))
    lines = log_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [2, 4, 6]
    always = {"step", "epoch", "loss", "lr", "weight_decay", "grad_norm", "images_per_second", "memory_bytes"}
    assert always | {"spread", "rank"} | terms | vitals <= set(lines[-1])
    assert lines[-1]["loss"] == pytest.approx(sum(lines[-1][term] for term in terms))
    has_teacher = method in ("moca", "mmc", "extrema", "sdae")
    assert ("momentum" in lines[-1]) == has_teacher
    assert lines[-1]["images_per_second"] > 0


def test_tensorboard_is_asked_for_before_anything_is_written(images: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard"):
        loop.train(tiny.job("mae", images), tiny.settings(tmp_path / "out", tensorboard=True))
        assert list((tmp_path / "out" / "tensorboard").iterdir())
        return
    with pytest.raises(UserError, match="pip install tensorboard"):
        loop.train(tiny.job("mae", images), tiny.settings(tmp_path / "out", tensorboard=True))
    assert not (tmp_path / "out").exists()


# --- a method of one weight, of which everything is known ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneRecipe(Training):
    poison_step: int = -1


class One(Method):
    """The loss is the mean of weight * (first pixel of the draw); it becomes NaN at a chosen step."""

    def __init__(self, recipe: OneRecipe, architecture: Architecture) -> None:
        super().__init__()
        self.recipe = recipe
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.network = student(architecture).requires_grad_(False)
        self.steps: list[Progress] = []

    def forward(self, views: Views) -> dict[str, Tensor]:
        value = (self.weight.sum() + self.bias.sum()) * views.draws[0].float().mean()
        bad = len(self.steps) == self.recipe.poison_step
        return {"good": value, "bad": value * (math.nan if bad else 0.5)}

    def after_step(self, now: Progress) -> None:
        self.steps.append(now)

    def saved(self) -> Saved:
        return Saved({"model": self.network})


class OneModule:
    """One method's file."""

    RECIPES: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def draw(recipe: Any, architecture: Architecture, rng: np.random.Generator) -> tuple[Any, ...]:
        return (rng.random(1, dtype=np.float32),)

    @staticmethod
    def make(recipe: Any, architecture: Architecture, base: Any) -> Method:
        return One(recipe, architecture)


def one_recipe(**changes: Any) -> OneRecipe:
    values: dict[str, Any] = {
        "arch": tiny.ARCHITECTURE,
        "epochs": 3,
        "batch": 8,
        "base_lr": 0.32,
        "min_lr": 0.001,
        "warmup_epochs": 1,
        "horizon": 1.0,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "weight_decay_end": 0.3,
        "clip": None,
        "clip_each": False,
        "drop_path": 0.0,
        "augmentation": "mae",
        "source": "",
        "published": "",
    }
    return OneRecipe(**(values | changes))


@pytest.fixture
def one_job(images: Path) -> Callable[..., loop.Job]:
    def make(**changes: Any) -> loop.Job:
        job = tiny.job("mae", images)
        return dataclasses.replace(job, name="one", module=OneModule, recipe=one_recipe(**changes))  # type: ignore[arg-type]

    return make


def test_schedules_by_hand(one_job: Callable[..., loop.Job], tmp_path: Path) -> None:
    loop.train(one_job(), tiny.settings(tmp_path))
    lines = log_of(tmp_path)
    peak = 0.32 * 8 / 256
    # Two steps an epoch, one epoch of warm-up: 0, half, peak, then a cosine over the last two epochs.
    expected = [0, peak / 2] + [0.001 + (peak - 0.001) * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    decay = [0.3 - 0.2 * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]
    assert [line["weight_decay"] for line in lines] == pytest.approx(decay)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["loss"] == pytest.approx(lines[0]["good"] + lines[0]["bad"])


def test_horizon_stretches_the_cosine() -> None:
    recipe = one_recipe(epochs=200, warmup_epochs=30, horizon=1.25, base_lr=1.5e-4, batch=2048, min_lr=0.0)
    assert lr_at(recipe, 30) == pytest.approx(1.2e-3)
    assert lr_at(recipe, 200) == pytest.approx(1.47e-4, rel=0.01)  # MOCA's last learning rate
    assert lr_at(recipe, 250) == pytest.approx(0, abs=1e-12)
    assert weight_decay_at(recipe, 1.0) == pytest.approx(0.3)


def test_weight_decay_spares_vectors_and_named_parameters() -> None:
    method = One(one_recipe(), tiny_architecture())
    method.extra = nn.Parameter(torch.ones(3, 3))
    method.table = nn.Parameter(torch.ones(3, 3))
    type(method).undecayed, type(method).constant_lr = ("extra",), {"table": 0.5}
    try:
        optimizer = make_optimizer(method, method.recipe)
        set_schedules(optimizer, method.recipe, Progress(3, 2, 3))
    finally:
        type(method).undecayed, type(method).constant_lr = (), {}
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    lr, decay = lr_at(method.recipe, 1.5), weight_decay_at(method.recipe, 0.5)
    assert found[id(method.weight)] == (lr, decay)
    assert found[id(method.bias)] == (lr, 0.0)
    assert found[id(method.extra)] == (lr, 0.0)
    assert found[id(method.table)] == (0.5, method.recipe.weight_decay)
    assert len(found) == 4  # the frozen network is not there


def tiny_architecture() -> Architecture:
    from ssl_bench.evaluate.architecture import named

    return named(tiny.ARCHITECTURE)


def test_clipping() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    for clip, each, expected in (
        (None, False, ([3.0, 4.0], [12.0])),
        (6.5, False, ([1.5, 2.0], [6.0])),  # the whole norm is 13
        (6.0, True, ([3.0, 4.0], [6.0])),  # each for itself: 5 stays
    ):
        a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
        norm = clip_gradients([a, b], one_recipe(clip=clip, clip_each=each))
        assert float(norm) == pytest.approx(13.0)
        assert a.grad.tolist() == pytest.approx(expected[0], rel=1e-5)
        assert b.grad.tolist() == pytest.approx(expected[1], rel=1e-5)


def test_not_finite_loss_names_step_and_term_and_keeps_the_checkpoint(
    one_job: Callable[..., loop.Job], tmp_path: Path
) -> None:
    job = one_job(poison_step=4)
    with pytest.raises(UserError, match=r"the term bad is nan at step 5 .*Nothing was saved yet"):
        loop.train(job, tiny.settings(tmp_path / "a"))
    with pytest.raises(UserError, match=r"the term bad is nan at step 5 .*last checkpoint stays"):
        loop.train(job, tiny.settings(tmp_path / "b", keep_epochs=1))
    assert trained(tmp_path / "b")["step"] == 4
    assert all(torch.isfinite(value).all() for value in trained(tmp_path / "b")["method"].values())


def test_after_step_hears_every_step(images: Path, one_job: Callable[..., loop.Job], tmp_path: Path) -> None:
    run = loop.Run(one_job(), tiny.settings(tmp_path))
    loop_steps = []
    run.method.after_step = lambda now: loop_steps.append((now.step, now.epoch_ended, now.share))  # type: ignore[method-assign]
    for batch in batches(run.job.split, run.plan, start_step=0, stop_step=run.total_steps):
        run.advance([prepared(*batch, device=run.device, architecture=run.architecture)], StopFlag())
    assert loop_steps == [(n, n % 2 == 0, n / 6) for n in range(1, 7)]


def test_sigterm_saves_and_resume_goes_on(images: Path, tmp_path: Path) -> None:
    """A real process, a real signal."""
    script = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); torch.set_num_threads(1)\n"
        "from pathlib import Path\nimport tiny_training as tiny\nfrom ssl_bench.pretrain import loop\n"
        f"job = tiny.job('mae', Path({str(images)!r}), epochs=100000)\n"
        f"loop.train(job, tiny.settings(Path({str(tmp_path / 'out')!r})))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume goes on" in said
    step = trained(tmp_path / "out")["step"]
    assert step >= 1
    assert open_checkpoint(tmp_path / "out").origin["steps_done"] == step
    assert not list((tmp_path / "out").glob(".*"))  # nothing half-written


# --- bad input ---


def test_resume_refuses_another_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = tiny.job("mae", images, epochs=1, warmup_epochs=0)
    with pytest.raises(UserError, match=r"there is no .*training.pt"):
        loop.train(job, tiny.settings(out, resume=True))
    loop.train(job, tiny.settings(out))
    with pytest.raises(UserError, match="holds a run already"):
        loop.train(job, tiny.settings(out))
    with pytest.raises(UserError, match="method was mae, now sdae"):
        loop.train(tiny.job("sdae", images, epochs=1, warmup_epochs=0), tiny.settings(out, resume=True))
    with pytest.raises(UserError, match=r"mask_ratio was 0.75, now 0.5"):
        loop.train(tiny.job("mae", images, epochs=1, warmup_epochs=0, mask_ratio=0.5), tiny.settings(out, resume=True))
    with pytest.raises(UserError, match="seed was 0, now 1"):
        loop.train(job, tiny.settings(out, resume=True, seed=1))
    more = tiny.job("mae", tiny.write_images(tmp_path / "more", count=21), epochs=1, warmup_epochs=0)
    with pytest.raises(UserError, match="data was"):
        loop.train(more, tiny.settings(out, resume=True))
    (out / "training.pt").write_bytes(b"garbage")
    with pytest.raises(UserError, match="damaged"):
        loop.train(job, tiny.settings(out, resume=True))


def test_resuming_a_finished_run_changes_nothing(images: Path, tmp_path: Path) -> None:
    job = tiny.job("mae", images, epochs=1, warmup_epochs=0)
    loop.train(job, tiny.settings(tmp_path / "out"))
    before = open_checkpoint(tmp_path / "out").weights_sha256
    loop.train(job, tiny.settings(tmp_path / "out", resume=True))
    assert open_checkpoint(tmp_path / "out").weights_sha256 == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 21}, "20 images"),
        ({"arch": "vit_32x2x2_patch7_48"}, "divisible|divide"),
        ({"arch": "resnet50"}, "vit_base_patch16_224"),
        ({"mask_ratio": 0.99}, "leaves 0 of 36 patches"),
        ({"mask_ratio": 0.0}, "mask_ratio=0: expected"),
        ({"warmup_epochs": 3}, "warm-up"),
        ({"augmentation": "toy-mea"}, "toy-mae"),
    ],
)
def test_bad_recipes(images: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loop.train(tiny.job("mae", images, **changes), tiny.settings(tmp_path / "out"))
    assert not (tmp_path / "out" / "training.pt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp16"}, "CUDA"),
        ({"dtype": "fp8"}, "fp32, bf16 or fp16"),
        ({"accumulate": 3}, "8"),
        ({"accumulate": 0}, "at least 1"),
        ({"log_steps": 0}, "at least 1"),
        ({"seed": -1}, "0 or more"),
        ({"workers": -1}, "0 or more"),
    ],
)
def test_bad_settings(images: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loop.train(tiny.job("mae", images), tiny.settings(tmp_path / "out", **changes))


_FULL = """
import resource, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import tiny_training as tiny
from ssl_bench.errors import UserError
from ssl_bench.pretrain import loop
job, out = tiny.job("mae", Path({images!r})), Path({out!r})
loop.train(tiny.job("mae", Path({images!r})), tiny.settings(out / "good"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: the system refuses to write more
try:
    loop.train(job, tiny.settings(out / "full"))
except UserError as error:
    print(error)
"""


def test_a_state_that_does_not_fit_leaves_a_folder_that_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is the largest file: what is smaller may have been written before the disk was full."""
    job = tiny.job("mae", images)

    def refuse(content: object, path: Path) -> None:
        raise UserError(f"no space left while writing {path}.")

    with monkeypatch.context() as patch:
        patch.setattr("ssl_bench.pretrain.run_folder.save", refuse)
        with pytest.raises(UserError, match=r"training.pt. Nothing was saved before"):
            loop.train(job, tiny.settings(tmp_path / "out"))
    loop.train(job, tiny.settings(tmp_path / "out"))  # the folder is not held by a run that cannot go on
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]  # and the log is this run's
    assert open_checkpoint(tmp_path / "out").origin["steps_done"] == 6


def test_an_image_that_breaks_loses_nothing(images: Path, tmp_path: Path) -> None:
    job = tiny.job("mae", images)
    order = [index for epoch in range(2) for index in epoch_order(20, seed=0, epoch=epoch)[:16]]
    late = next(index for index in order[16:] if index not in order[:16])  # first seen in the second epoch
    (images / f"{late:03d}.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=f"{late:03d}.png"):
        loop.train(job, tiny.settings(tmp_path / "out"))
    assert trained(tmp_path / "out")["step"] >= 2


def test_full_disk(images: Path, tmp_path: Path) -> None:
    script = _FULL.format(tests=str(Path(__file__).parent), images=str(images), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "no space left while writing" in done.stdout, done.stderr[-2000:]
    assert not list((tmp_path / "full").glob("*.pt"))
    assert not list((tmp_path / "full").glob(".*.part"))


# --- vitals ---


def test_spread_and_rank() -> None:
    torch.manual_seed(0)
    same_everywhere = torch.randn(1, 16).expand(64, -1)
    assert spread_and_rank(same_everywhere)[0] == pytest.approx(0, abs=1e-3)
    isotropic = torch.randn(512, 16)
    spread, rank = spread_and_rank(isotropic)
    assert spread == pytest.approx(1, abs=0.02)
    assert 15 < rank <= 16
    line = torch.randn(64, 1) * torch.randn(1, 16) + 100 * torch.randn(1, 16)
    assert spread_and_rank(line)[1] < 2
    assert collapse_alarm(*spread_and_rank(isotropic), 512) is None
    assert "collapsed" in str(collapse_alarm(*spread_and_rank(same_everywhere), 64))
    assert "collapsed" in str(collapse_alarm(*spread_and_rank(line), 64))
    assert collapse_alarm(0.0, 1.0, 4) is None  # of four images nothing can be said


def test_log_is_cut_to_the_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append({"step": step})
    with folder.log.open("a") as file:
        file.write('{"step": 4, "lo')
    folder.cut_log(2)
    assert log_of(tmp_path) == [{"step": 1}, {"step": 2}]
