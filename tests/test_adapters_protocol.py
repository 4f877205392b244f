"""TEC's adapters: what moves and what stays, every step against a plain torch loop, two processes are one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_backbone
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.adapters import EncoderAdapter, InputAdapter, block_outputs
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.subject import Subject
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.protocols import adapters
from ssl_bench.protocols.adapters import RECIPES, Adapted, Probe
from ssl_bench.protocols.network_training import NetworkLearner, Shared
from ssl_bench.protocols.optimizers import StackedSgd
from ssl_bench.protocols.state_file import StateFile

TABLE_16 = {
    "lr": 0.1, "scale_lr": True, "weight_decay": 0.0, "batch": 16384, "warmup_epochs": 10, "epochs": 90,
    "augmentation": "crop", "least_area": 0.08, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0,
    "min_lr": 0.0, "drop_path": 0.0,
}  # fmt: skip
TABLE_15 = {
    "lr": 1e-3, "scale_lr": True, "min_lr": 1e-6, "weight_decay": 0.05, "betas": (0.9, 0.999), "batch": 1024,
    "warmup_epochs": 20, "epochs": 100, "augmentation": "randaug", "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
    "drop_path": 0.1, "erasing": 0.25,
}  # fmt: skip


def test_rows_are_what_the_tables_say():
    assert list(RECIPES)[:3] == ["linear", "input", "encoder"]
    for name, said, number in (
        ("linear", TABLE_16, "69.8"),
        ("input", TABLE_16, "72.6"),
        ("encoder", TABLE_15, "79.9"),
    ):
        recipe = RECIPES[name]
        assert recipe.mode == name
        assert {field: getattr(recipe, field) for field in said} == said
        assert recipe.betas[0] == 0.9
        assert (recipe.resize_px, recipe.crop_px, recipe.interpolation) == (256, 224, "bicubic")
        assert number in recipe.published
        assert recipe.selected_on == "none"
    assert RECIPES["input"].peak_lr == pytest.approx(6.4)


@pytest.mark.parametrize("field", ["erasing", "mixup", "cutmix", "smoothing", "drop_path"])
def test_a_plain_probe_refuses_what_it_would_ignore(field):
    with pytest.raises(UserError, match=f"{field}=0.1: mode=input is a plain probe"):
        replace(RECIPES["input"], **{field: 0.1})


# --- small things to train ---

PROBE = replace(RECIPES["input"], epochs=2, batch=4, lr=40.0, warmup_epochs=0.5, resize_px=16, crop_px=16)
TUNED = replace(
    RECIPES["encoder"], epochs=2, batch=4, lr=0.1, warmup_epochs=0.5, resize_px=16, crop_px=16, augmentation="crop"
)


def of_mode(mode):
    return TUNED if mode == "encoder" else replace(PROBE, mode=mode)


@pytest.fixture
def checkpoint(tmp_path):
    """As TEC saves it: the class token is merged, and the adapters stand beside the network."""
    backbone = tiny_backbone()
    torch.manual_seed(5)
    first, second = InputAdapter(32, 64), EncoderAdapter(32, 2, blocks_per_group=1, hidden=16)
    with torch.no_grad():
        for parameter in [*first.parameters(), *second.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    extras = {"input_adapter": first.state_dict(), "encoder_adapter": second.state_dict()}
    save_checkpoint(tmp_path / "tec.pt", first.merged_into(backbone), extras=extras)
    return open_checkpoint(tmp_path / "tec.pt")


@pytest.fixture
def folder(image_folder):
    return image_folder(train=6, val=5)


def subject_of(checkpoint, folder, **effort):
    return Subject(checkpoint, open_dataset(str(folder)), Effort(workers=0, **effort))


def trained(monkeypatch, subject, recipe):
    """The scores, and the networks at the start and at the end."""
    made = []
    make = Adapted.__init__

    def remember(self, *arguments):
        make(self, *arguments)
        made.append((self, {name: value.clone() for name, value in self.state_dict().items()}))

    with monkeypatch.context() as patch:
        patch.setattr(Adapted, "__init__", remember)
        adapters.check(subject, recipe)
        scores = adapters.run(subject, recipe)
    ((network, before),) = made
    return scores, before, network.state_dict()


MOVES = {
    "linear": ("head.", "norm."),
    "input": ("head.", "norm.", "input_adapter."),
    "encoder": ("head.", "norm.", "input_adapter.", "encoder_adapter."),
}


@pytest.mark.parametrize("mode", MOVES)
def test_what_moves_and_what_stays(monkeypatch, checkpoint, folder, mode):
    scores, before, after = trained(monkeypatch, subject_of(checkpoint, folder), of_mode(mode))
    for name, value in after.items():
        assert value.equal(before[name]) != name.startswith(MOVES[mode]), name
    trunk = {name.removeprefix("trunk.vit."): value for name, value in after.items() if name.startswith("trunk.")}
    assert set(trunk) == set(checkpoint.state)
    assert all(trunk[name].equal(value) for name, value in checkpoint.state.items())  # bit for bit
    parts = [part for part in ("input_adapter", "encoder_adapter") if f"{part}." in MOVES[mode]]
    count = sum(value.numel() for part in parts for value in checkpoint.extras[part].values())
    fresh = 2 * 32 + 2 + (2 * 32 if mode == "encoder" else 0)
    assert scores.details["trained_parameters"] == count + fresh
    assert scores.details["mode"] == mode
    assert len(scores.predictions) == 10


@pytest.mark.parametrize("mode", MOVES)
def test_what_the_head_reads(checkpoint, mode):
    network = Adapted(checkpoint, of_mode(mode), 2).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        found = network.features(images)
        if mode == "encoder":
            adapter = EncoderAdapter.from_state(checkpoint.extras["encoder_adapter"])
            expected = adapter(block_outputs(checkpoint.backbone, images))[:, 1:].mean(1)
        else:  # the merged class token and MLP(T) are the same thing
            expected = checkpoint.backbone(images).tokens[0].cls
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(network.head.weight.detach().std()) == pytest.approx(2e-5 if mode == "encoder" else 0.01, rel=0.3)


def lars(parameter, gradient, momentum, lr, decay=0.0):
    """MAE's rule, written out for one tensor."""
    if parameter.ndim > 1:
        gradient = gradient + decay * parameter
        gradient = gradient * 0.001 * parameter.norm() / gradient.norm()
    momentum.mul_(0.9).add_(gradient)
    parameter.sub_(lr * momentum)


def test_lars_by_hand_and_vectors_are_spared():
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.zeros(2, 2))]
    plain = [parameter.detach().clone() for parameter in mine]
    momenta = [torch.zeros_like(parameter) for parameter in plain]
    optimizer = StackedSgd(mine, lr=torch.ones(1), weight_decay=torch.full((1,), 0.1), trust=0.001, stacked=False)
    for lr in (0.5, 2.0, 1.0):
        gradients = [torch.randn_like(parameter) for parameter in plain]
        for parameter, gradient in zip(mine, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.set_scale(lr)
        optimizer.step()
        lars(plain[0], gradients[0], momenta[0], lr, decay=0.1)
        lars(plain[1], gradients[1], momenta[1], lr)
        # A matrix of zeros has no length to go by: at first it takes the gradient as it is.
        if lr == 0.5:
            momenta[2].add_(gradients[2])
            plain[2].sub_(lr * momenta[2])
        else:
            lars(plain[2], gradients[2], momenta[2], lr, decay=0.1)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, plain, strict=True))


@pytest.mark.parametrize("mode", ["linear", "input"])
def test_steps_of_a_probe_are_those_of_a_plain_torch_loop(checkpoint, folder, mode):
    """Cut into parts of 3, against one graph over the whole batch through the frozen trunk."""
    recipe = of_mode(mode)
    torch.manual_seed(3)
    network, plain = Adapted(checkpoint, recipe, 2), Adapted(checkpoint, recipe, 2)
    plain.load_state_dict(network.state_dict())
    probe = Probe(Shared(subject_of(checkpoint, folder, batch_size=3), recipe), network)
    token = plain.input_adapter if mode == "input" else None
    trained = [*plain.head.parameters(), *(token.parameters() if token else [])]
    momenta = [torch.zeros_like(parameter) for parameter in trained]
    mean, variance = torch.zeros(32), torch.ones(32)
    for step in range(4):
        images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
        nothing = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        probe.step(Views((images,), (labels, *nothing)), Progress(step, 3, 2))
        features = block_outputs(plain.trunk, images, class_token=token() if token else None)[-1][:, 0]
        centered = features - features.mean(0)
        normed = centered / (centered.square().mean(0) + 1e-6).sqrt()
        loss = nn.functional.cross_entropy(plain.head(normed), labels)
        gradients = torch.autograd.grad(loss, trained)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        epoch, peak = step / 3, 40 * 4 / 256
        lr = peak * epoch / 0.5 if epoch < 0.5 else peak * 0.5 * (1 + math.cos(math.pi * (epoch - 0.5) / 1.5))
        with torch.no_grad():
            mean = 0.9 * mean + 0.1 * features.mean(0)
            variance = 0.9 * variance + 0.1 * features.var(0)
            for parameter, gradient, momentum in zip(trained, gradients, momenta, strict=True):
                lars(parameter, gradient, momentum, lr)
    for (name, a), (_, b) in zip(network.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    assert torch.allclose(network.norm.running_mean, mean, atol=1e-6)
    assert torch.allclose(network.norm.running_var, variance, atol=1e-5)


def test_encoder_mode_is_fine_tuning_without_layers(checkpoint, folder):
    """AdamW at one learning rate; the class token, norms and biases are not decayed."""
    network = Adapted(checkpoint, TUNED, 2)
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    from ssl_bench.protocols.network_training import plain_groups

    groups = plain_groups(named, TUNED)
    learner = NetworkLearner(Shared(subject_of(checkpoint, folder), TUNED), network, groups)
    assert len(learner.drop_paths) == 2  # both branches of the last block: it acts on the frozen blocks
    decayed = {id(parameter) for group in groups if group["weight_decay"] == 0.05 for parameter in group["params"]}
    matrices = {id(p) for name, p in named.items() if name.endswith("weight") and "norm" not in name}
    assert decayed == matrices
    assert {group["scale"] for group in groups} == {1.0}
    assert sum(len(group["params"]) for group in groups) == len(named)


@pytest.mark.parametrize("mode", ["input", "encoder"])
def test_parts_change_nothing_but_rounding(monkeypatch, checkpoint, folder, mode):
    results = [trained(monkeypatch, subject_of(checkpoint, folder, batch_size=n), of_mode(mode)) for n in (4, 1)]
    for name, value in results[0][2].items():
        assert torch.allclose(value, results[1][2][name], atol=1e-4), name
    assert np.array_equal(results[0][0].predictions, results[1][0].predictions)


@pytest.mark.parametrize("mode", ["input", "encoder"])
def test_a_training_that_was_stopped_goes_on_bit_for_bit(monkeypatch, own_cache, checkpoint, folder, mode):
    subject, recipe = subject_of(checkpoint, folder), of_mode(mode)
    whole, _, expected = trained(monkeypatch, subject, recipe)
    calls = []

    def stop_after_four(state, flag):
        calls.append(1)
        return len(calls) == 4, False

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "agreed", stop_after_four)
        with pytest.raises(SystemExit) as stopped:
            adapters.run(subject, recipe)
    assert stopped.value.code == 143
    again, _, after = trained(monkeypatch, subject, recipe)
    assert all(value.equal(expected[name]) for name, value in after.items())
    assert np.array_equal(again.predictions, whole.predictions)


_TWO = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_adapters_protocol as t
from pathlib import Path
from _pytest.monkeypatch import MonkeyPatch
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.training import distributed
torch.set_num_threads(1)
with distributed.together("cpu"):
    for mode in ("input", "encoder"):
        subject = t.subject_of(open_checkpoint({checkpoint!r}), Path({folder!r}), batch_size=1)
        scores, _, after = t.trained(MonkeyPatch(), subject, t.of_mode(mode))
        content = dict(after, predictions=torch.from_numpy(scores.predictions))
        torch.save(content, {out!r} + mode + str(distributed.rank()))
"""


def test_two_processes_are_one(monkeypatch, checkpoint, folder, tmp_path):
    (tmp_path / "two.py").write_text(
        _TWO.format(
            tests=str(Path(__file__).parent), checkpoint=checkpoint.spec, folder=str(folder), out=str(tmp_path / "out")
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.getcwd()}
    environment["SSL_BENCH_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mode in ("input", "encoder"):
        scores, _, one = trained(monkeypatch, subject_of(checkpoint, folder), of_mode(mode))
        first, second = (torch.load(tmp_path / f"out{mode}{rank}", weights_only=True) for rank in (0, 1))
        for name, value in one.items():
            assert first[name].equal(second[name]), name
            assert torch.allclose(first[name], value, atol=1e-4), name
        assert np.array_equal(first["predictions"].numpy(), scores.predictions)


def test_what_is_missing_is_said(checkpoint, folder, tmp_path):
    save_checkpoint(tmp_path / "plain.pt", tiny_backbone())
    plain = subject_of(open_checkpoint(tmp_path / "plain.pt"), folder)
    for mode, part in (("input", "input_adapter"), ("encoder", "input_adapter")):
        with pytest.raises(
            UserError, match=rf"holds no {part} .*nothing.*ssl-bench pretrain tec.*released TEC weights"
        ):
            adapters.check(plain, of_mode(mode))
    adapters.check(plain, of_mode("linear"))
    half = replace(checkpoint, extras={"input_adapter": checkpoint.extras["input_adapter"]})
    adapters.check(subject_of(half, folder), of_mode("input"))
    with pytest.raises(UserError, match="holds no encoder_adapter"):
        adapters.check(subject_of(half, folder), of_mode("encoder"))
    for change in ({"cls": False}, {"final_norm": False}, {"beit": True}, {"class_attention_blocks": 2}):
        odd = replace(checkpoint, architecture=replace(checkpoint.architecture, **change))
        with pytest.raises(UserError, match="expected a plain ViT"):
            adapters.check(subject_of(odd, folder), of_mode("linear"))
    with pytest.raises(UserError, match="12 images, which do not fill"):
        adapters.check(subject_of(checkpoint, folder), replace(PROBE, batch=64))


def test_a_loss_that_is_no_number_is_said(checkpoint, folder):
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d.*--set lr="):
        adapters.run(subject_of(checkpoint, folder), replace(PROBE, lr=1e30, warmup_epochs=0.0))
