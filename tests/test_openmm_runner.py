"""The quiet Runner: what it computes, what it leaves alone, and that an interruption changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.training.signals import StopFlag
from ssl_bench.protocols.openmm import packages
from ssl_bench.protocols.state_file import StateFile

packages.require()

from mmengine.logging import MessageHub, MMLogger  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import BaseDataElement  # noqa: E402

from ssl_bench.protocols.openmm import runner as runner_module  # noqa: E402
from ssl_bench.protocols.openmm.runner import Course, Data, Diverged, build, config_json, forget, train, validate  # noqa: E402

STEPS, BATCH = 10, 4


class Points:
    """Twelve vectors with noise that the "pipeline" draws from the global generators."""

    metainfo: ClassVar = {"classes": ("a", "b")}

    def __init__(self, count: int = 12, bad: dict[int, Exception] | None = None) -> None:
        self.count, self.bad = count, bad or {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if index in self.bad:
            raise self.bad[index]
        x = torch.tensor([float(index), 1.0, np.random.rand(), random.random()])
        return {"inputs": x, "data_samples": BaseDataElement(metainfo={"index": index})}


class Clean(Points):
    """The same without noise, to score."""

    def __getitem__(self, index: int) -> dict:
        packed = super().__getitem__(index)
        return packed | {"inputs": torch.tensor([float(index), 1.0, 0.5, 0.5])}


class Line(BaseModel):
    """A linear layer with dropout, whose target is the first number."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.layer, self.dropout, self.seen = nn.Linear(4, 1), nn.Dropout(dropout), []

    def forward(self, inputs, data_samples, mode="tensor"):
        x = torch.stack(list(inputs))
        self.seen.append(x[:, 0].int().tolist())
        out = self.layer(self.dropout(x / 10))[:, 0]
        if mode == "loss":
            return {"loss": (out - x[:, 0] / 10).square().mean()}
        return [
            BaseDataElement(metainfo={"index": each.index, "out": value})
            for each, value in zip(data_samples, out, strict=True)
        ]


class Mean:
    """The mean output, and which images it saw."""

    def read(self, sample):
        return sample["index"], float(sample["out"])

    def scores(self, results):
        return {"main": float(np.mean([out for _, out in results])), "images": [index for index, _ in results]}


@pytest.fixture(autouse=True)
def _own(own_cache):
    """State files of a test are its own."""


def line(**kwargs) -> Line:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build({"type": Line, **kwargs}, scope="mmengine", seed=0)


def course(**changes) -> Course:
    return dataclasses.replace(
        Course(title="", identity={"a": 1}, steps=STEPS, batch=BATCH, seed=5, evaluate_every=4), **changes
    )


def run(network, *, data=None, effort=None, factor=lambda step: 1.0, optimizer=None, keep=False, **changes):
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    data, effort = data or Data(Points(), Clean(6), Mean()), effort or Effort(workers=0)
    history = train(network, course(**changes), data, optimizer=optimizer, lr_factor=factor, effort=effort)
    if not keep:
        forget(course(**changes), effort)
    return history


def weights(network) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_it_steps_as_plain_torch_does():
    network, twin = line(dropout=0.0), line(dropout=0.0)
    history = run(network, factor=lambda step: 1 / (1 + step), clip_norm=0.05)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    from ssl_bench.evaluate.training.loader import epoch_order
    from ssl_bench.evaluate.training.seeds import seeded

    for step in range(STEPS):
        epoch, place = divmod(step, 3)
        indices = epoch_order(12, seed=5, epoch=epoch)[BATCH * place : BATCH * (place + 1)]
        assert network.seen[step + (step > 3) * 6 + (step > 7) * 6] == indices.tolist()
        inputs = []
        for index in indices.tolist():
            with seeded(5, epoch, index):
                inputs.append(Points()[index]["inputs"])
        loss = twin(inputs, [], mode="loss")["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
    torch.testing.assert_close(weights(network), weights(twin))
    assert history.steps == [4, 8, 10]
    assert [outcome["images"] for outcome in history.outcomes] == [list(range(6))] * 3
    twin.eval()
    expected = twin.layer(torch.stack([Clean()[index]["inputs"] for index in range(6)]) / 10).mean()
    assert history.outcomes[-1]["main"] == pytest.approx(float(expected.detach()), abs=1e-6)


def test_the_best_is_the_earlier_of_equal_ones():
    history = runner_module.History([1, 2, 3, 4], [{"main": 1.0}, {"main": 3.0}, {"main": 3.0}, {"main": 2.0}])
    assert history.best == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_training_that_was_stopped_goes_on_bit_for_bit(monkeypatch, capsys, workers):
    """Ten steps are five, a stop, and five; workers do not matter."""
    whole = line()
    expected = run(whole)
    agreed = StateFile.agreed
    calls = []

    def stop_after_five(state, flag, seconds):
        calls.append(1)
        return len(calls) == 5, agreed(state, flag, seconds=seconds)[1]

    effort = Effort(workers=workers)
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "agreed", stop_after_five)
        with pytest.raises(SystemExit) as stopped:
            run(line(), effort=effort)
    assert stopped.value.code == 143
    assert "stopped in step 5 of 10" in capsys.readouterr().err
    again = line()
    history = run(again, effort=effort)
    assert weights(again).equal(weights(whole))
    assert dataclasses.asdict(history) == dataclasses.asdict(expected)
    assert "after step 5" in capsys.readouterr().err
    anew = line()
    run(anew)  # the state file is gone
    assert len(anew.seen) == len(whole.seen)


@pytest.mark.parametrize("at", [4, 10])
def test_a_training_that_was_stopped_while_val_was_scored_scores_it_again(monkeypatch, at, capsys):
    whole = line()
    expected = run(whole)
    flags = []

    @contextlib.contextmanager
    def signals():
        flags.append(StopFlag())
        yield flags[-1]

    class Stopping(Mean):
        def read(self, sample):
            if at == len(network.seen) - 1 - {4: 0, 10: 12}[at]:
                flags[-1].signal = 15
            return super().read(sample)

    network = line()
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "stop_signals", signals)
        with pytest.raises(SystemExit) as stopped:
            run(network, data=Data(Points(), Clean(6), Stopping()))
    assert stopped.value.code == 143
    assert f"stopped in step {at} of 10, while val was scored" in capsys.readouterr().err
    again = line()
    history = run(again)
    assert weights(again).equal(weights(whole))
    assert (history.steps, history.outcomes) == (expected.steps, expected.outcomes)


def test_a_finished_training_is_not_repeated_until_it_is_forgotten(own_cache):
    """So that a search of many goes on after those that are done."""
    history = run(line(), keep=True)
    again = line()
    assert dataclasses.asdict(run(again, keep=True)) == dataclasses.asdict(history)
    assert not again.seen
    other = line()
    run(other, effort=Effort(workers=0, batch_size=1))  # other parts of a batch: another training
    assert other.seen
    forget(course(), Effort(workers=0))
    run(again)
    assert again.seen
    assert not list((own_cache / "training").iterdir())


def test_the_steps_depend_on_the_seed_and_on_what_is_random_alone():
    reference = line()
    run(reference)
    torch.manual_seed(99)
    np.random.seed(1)
    same = line()
    run(same)
    assert weights(same).equal(weights(reference))
    for changes in ({"seed": 6}, {"batch": 6}):
        other = line()
        run(other, **changes)
        assert not weights(other).equal(weights(reference))


def test_parts_of_a_batch_are_the_batch():
    whole, parts = line(dropout=0.0), line(dropout=0.0)
    run(whole)
    run(parts, effort=Effort(workers=0, batch_size=1))
    assert {len(batch) for batch in parts.seen} == {1}
    torch.testing.assert_close(weights(parts), weights(whole))


def test_nothing_is_printed_written_or_left_changed(tmp_path, monkeypatch, capfd):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cv2.setNumThreads(3)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), warnings.filters[:], torch.get_num_threads())
    singletons = [len(kind._instance_dict) for kind in (MMLogger, MessageHub, DefaultScope)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(line())
        validate(line(), Data(Points(), Clean(), Mean()), Effort())
    assert capfd.readouterr() == ("", "")
    assert not list((tmp_path / "here").iterdir())
    assert before == (
        random.getstate(), np.random.get_state()[1].tolist(), warnings.filters[:], torch.get_num_threads()
    )  # fmt: skip
    assert cv2.getNumThreads() == 3
    assert singletons == [len(kind._instance_dict) for kind in (MMLogger, MessageHub, DefaultScope)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("where", "wrong"), [("train", UserError("mask of x.png")), ("val", UserError("of y.png"))])
def test_a_bad_sample_is_told_as_it_is(workers, where, wrong):
    bad = {"train": {}, "val": {}} | {where: {3: wrong}}
    data = Data(Points(bad=bad["train"]), Clean(bad=bad["val"]), Mean())
    with pytest.raises(UserError) as caught:
        run(line(), data=data, effort=Effort(workers=workers, skip_broken=True))
    assert str(caught.value) == str(wrong)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_refused_or_skipped(workers):
    broken = BrokenImage("z.png", "it is empty")
    data = Data(Points(bad={2: broken}), Clean(6, bad={4: broken}), Mean())
    with pytest.raises(UserError, match=r"z\.png.*--skip-broken"):
        run(line(), data=data, effort=Effort(workers=workers))
    network = line()
    history = run(network, data=data, effort=Effort(workers=workers, skip_broken=True))
    assert history.outcomes[-1]["images"] == [0, 1, 2, 3, 5]
    assert (history.broken, history.replaced) == ([4], [2])
    seen = [index for batch in network.seen if len(batch) == BATCH for index in batch]
    assert 2 not in seen
    assert seen[:12].count(3) == 2


def test_bad_input_is_refused_in_words():
    with pytest.raises(UserError, match="3 images, which do not fill one batch of 4"):
        run(line(), data=Data(Points(3), Clean(), Mean()))
    with pytest.raises(Diverged, match="the training diverged"):
        run(line(), factor=lambda step: 1e30)
    with pytest.raises(UserError, match="fp16 trains on CUDA only"):
        run(line(), effort=Effort(dtype="fp16"))


def test_bf16_computes_in_bf16_in_training_and_in_validation():
    network = line(dropout=0.0)
    kinds = []
    network.layer.register_forward_hook(lambda module, given, out: kinds.append((module.training, out.dtype)))
    run(network, effort=Effort(workers=0, dtype="bf16"))
    assert set(kinds) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    kinds.clear()
    validate(network, Data(Points(), Clean(), Mean()), Effort())
    assert set(kinds) == {(False, torch.float32)}


def test_a_config_is_kept_as_mmengine_reads_it(tmp_path):
    from mmengine import Config

    path = tmp_path / "mm_config.json"
    path.write_bytes(config_json({"model": {"type": Line, "dropout": 0.25}, "effort": Effort()}))
    read = Config.fromfile(path)
    assert read.model.type == f"{Line.__module__}.Line"
    assert (read.model.dropout, read.effort.device) == (0.25, "cpu")
    with pytest.raises(TypeError, match="Tensor"):
        config_json({"x": torch.ones(1)})


_TOGETHER = """
import os, sys, torch
from test_openmm_runner import *
from ssl_bench.evaluate.training.distributed import together
with together("cpu"):
    network = line(dropout=0.0)
    history = run(network)
    only = validate(network, Data(Points(), Clean(7), Mean()), Effort())
torch.save([weights(network), history.outcomes, only.outcomes], sys.argv[1] + os.environ["RANK"])
"""


_ONE_IS_WRONG = """
import os, sys
from test_openmm_runner import *
from ssl_bench.evaluate.training.distributed import together
where, index = sys.argv[1].split()
bad = {int(index): UserError("mask of z.png is bad")}
data = Data(Points(bad=bad if where == "train" else None), Clean(7, bad=bad if where == "val" else None), Mean())
said = ""
with together("cpu"):
    try:
        run(line(dropout=0.0), data=data)
    except UserError as error:
        said = str(error)
os._exit(3 if said == "mask of z.png is bad" else 1)  # as the command line leaves
"""


@pytest.mark.parametrize("where", ["train 5", "val 6"])
def test_what_one_process_is_refused_all_are(tmp_path, where):
    """A process that goes on alone would wait for ever."""
    assert [code for code, _ in together(tmp_path, _ONE_IS_WRONG, where)] == [3, 3]


def together(tmp_path, code, argument):
    """The exit codes of two processes, and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        environment = os.environ | ranks | where | {"PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-W", "ignore", "-c", code, argument]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path))
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_two_processes_are_one(tmp_path):
    for code, said in together(tmp_path, _TOGETHER, str(tmp_path / "rank")):
        assert code == 0, said[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2))
    assert first[0].equal(second[0])
    assert first[1:] == second[1:]
    network = line(dropout=0.0)
    history = run(network)
    torch.testing.assert_close(first[0], weights(network))
    assert first[2][0]["images"] == list(range(7))
    for mine, theirs in zip(history.outcomes, first[1], strict=True):
        assert theirs["images"] == mine["images"]
        assert theirs["main"] == pytest.approx(mine["main"], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["rank0", "rank1"]
