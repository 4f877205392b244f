"""Fine-tuning: every row against its source, every step against a plain torch loop, resumed == whole, two == one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_architecture, tiny_backbone
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.backbone import build
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.readings import View
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.subject import Subject
from ssl_bench.evaluate.training import supervised
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.protocols import finetune, network_training
from ssl_bench.protocols.finetune import RECIPES, Classifier, first_layer, labeled_part, layer_groups, trunk
from ssl_bench.protocols.label_splits import labeled_splits
from ssl_bench.protocols.network_training import NetworkLearner, Shared
from ssl_bench.protocols.state_file import StateFile

# --- what the sources say, typed again ---

# fmt: off
#                         lr    decay drop  batch warm epochs pooling
PUBLISHED = {
    "mae":                 (5e-4, 0.65, 0.1, 1024, 5,  100, "avg"),
    "mae-vit-l":           (1e-3, 0.75, 0.2, 1024, 5,  50,  "avg"),
    "moca":                (1e-3, 0.65, 0.2, 1024, 5,  100, "avg"),
    "mmc":                 (5e-4, 0.65, 0.1, 64*2, 5,  200, "cls+avg"),
    "mmc-in1k":            (5e-4, 0.65, 0.1, 64*4, 5,  100, "cls+avg"),
    "tec-mae":             (1e-3, 0.55, 0.1, 1024, 20, 100, "avg"),
    "tec-ibot":            (1e-3, 0.65, 0.1, 1024, 20, 100, "avg"),
    "tec-vit-l":           (1e-3, 0.65, 0.1, 1024, 5,  50,  "avg"),
    "tec-mae-readme":      (5e-4, 0.65, 0.1, 1024, 20, 100, "avg"),
    "tec-mae-800-readme":  (5e-4, 0.55, 0.1, 1024, 20, 100, "avg"),
    "tec-mae300-readme":   (5e-4, 0.65, 0.1, 1024, 5,  100, "avg"),
    "tec-ibot-readme":     (5e-4, 0.50, 0.1, 1024, 5,  100, "avg"),
    "tec-ibot-800-readme": (5e-4, 0.55, 0.1, 1024, 20, 100, "avg"),
    "sdae":                (5e-4, 0.65, 0.1, 2048, 10, 100, "avg"),
    "sdae-readme":         (5e-4, 0.65, 0.1, 1024, 5,  100, "avg"),
    "sdae-vit-l":          (1e-3, 0.75, 0.2, 2048, 5,  50,  "avg"),
    "extrema":             (1e-3, 0.75, 0.1, 1024, 5,  100, "avg"),
    "extrema-vit-s":       (1e-3, 0.75, 0.1, 1024, 5,  200, "avg"),
    "extrema-22k":         (5e-4, 0.65, 0.1, 1024, 5,  100, "avg"),
    "extrema-22k-vit-s":   (5e-4, 0.65, 0.1, 1024, 5,  200, "avg"),
    "extrema-readme":      (5e-4, 0.65, 0.2, 1024, 5,  100, "avg"),
    "extrema-semi-1":      (5e-6, 1.00, 0.1, 1024, 5, 1000, "cls"),
    "extrema-semi-10":     (5e-6, 1.00, 0.1, 1024, 5, 1000, "cls"),
    "ibot-vit-s":          (4e-3, 0.75, 0.1, 1024, 20, 200, "cls"),
    "ibot":                (4e-3, 0.65, 0.2, 1024, 20, 100, "cls"),
    "ibot-vit-l":          (4e-3, 0.75, 0.4, 1024, 5,  50,  "cls"),
}
FIELDS = ("lr", "layer_decay", "drop_path", "batch", "warmup_epochs", "epochs", "pooling")
EVERYWHERE = {
    "weight_decay": 0.05, "betas": (0.9, 0.999), "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "least_area": 0.08,
    "resize_px": 256, "crop_px": 224, "interpolation": "bicubic", "augmentation": "randaug", "erasing": 0.25,
    "min_lr": 1e-6, "scale_lr": True, "positions": "trained", "projector": False, "labels": "all", "lists": None,
    "every_epoch": True,
}
SEMI = {"scale_lr": False, "projector": True, "every_epoch": False}
OTHERWISE = {
    "mmc": {"augmentation": "three", "erasing": 0.0, "every_epoch": False}, "mmc-in1k": {"every_epoch": False},
    "tec-vit-l": {"min_lr": 1e-5}, "extrema-semi-1": SEMI | {"labels": "1percent"},
    "extrema-semi-10": SEMI | {"labels": "10percent"},
}
NUMBERS = {
    "mae": "83.6", "mae-vit-l": "85.9", "moca": "83.6", "mmc": "91.02", "tec-mae": "84.7", "tec-ibot": "84.8",
    "tec-vit-l": "86.5", "tec-mae300-readme": "83.9", "tec-ibot-800-readme": "85.1", "sdae": "84.1",
    "sdae-vit-l": "85.7", "extrema": "83.7", "extrema-vit-s": "81.8", "extrema-22k": "83.9",
    "extrema-22k-vit-s": "81.5", "extrema-semi-1": "67.3", "extrema-semi-10": "76.1", "ibot": "84.0",
    "ibot-vit-l": "84.8",
}
# fmt: on


def test_every_row_is_what_its_source_says():
    assert set(PUBLISHED) == set(RECIPES) - {"toy"}
    for name, row in PUBLISHED.items():
        family = {"positions": "fixed"} if name.startswith("tec") else {"scale_lr": False} if "ibot" in name else {}
        said = EVERYWHERE | dict(zip(FIELDS, row, strict=True)) | family | OTHERWISE.get(name, {})
        assert set(said) == {field.name for field in dataclasses.fields(RECIPES[name])} - {"source", "published"}
        for field, value in said.items():
            assert getattr(RECIPES[name], field) == value, (name, field)
        assert RECIPES[name].selected_on == "none"
        assert RECIPES[name].source
        assert NUMBERS.get(name, "") in RECIPES[name].published
    assert next(iter(RECIPES)) == "mae"


def test_learning_rates_of_the_rows():
    assert RECIPES["moca"].peak_lr == pytest.approx(4e-3)  # methods: lr 4e-3 at 1024
    assert RECIPES["ibot"].peak_lr == 4e-3
    assert RECIPES["extrema-semi-1"].peak_lr == 5e-6
    assert RECIPES["sdae"].peak_lr == pytest.approx(4e-3)
    recipe, per_epoch = RECIPES["moca"], 10
    rates = [recipe.lr_at(Progress(step, per_epoch, 100)) for step in (0, 25, 50, 525, 1000)]
    middle = 1e-6 + (4e-3 - 1e-6) * 0.5
    assert rates == pytest.approx([0, 2e-3, 4e-3, middle, 1e-6])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch": 0}, "batch=0"),
        ({"lr": 0.0}, "lr=0"),
        ({"min_lr": 1.0}, "min_lr=1"),
        ({"warmup_epochs": 100.0}, "warmup_epochs=100"),
        ({"betas": (0.9,)}, "betas"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"mixup": -1.0}, "mixup"),
        ({"erasing": 1.5}, "erasing"),
        ({"least_area": 0.0}, "least_area"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"projector": True, "pooling": "cls+avg"}, "projector"),
    ],
)
def test_impossible_recipes_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        replace(RECIPES["mae"], **change)


# --- small things to train ---

TINY = replace(
    RECIPES["mae"], epochs=2, batch=4, lr=0.02, warmup_epochs=0.5, resize_px=16, crop_px=16, augmentation="crop",
    every_epoch=False,
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone(), extras={"projector": projector().state_dict()})
    return open_checkpoint(tmp_path / "tiny.pt", protocol="finetune")


@pytest.fixture
def folder(image_folder):
    return image_folder(train=6, val=5)


def subject_of(checkpoint, folder, **effort):
    return Subject(checkpoint, open_dataset(str(folder)), Effort(workers=0, **effort))


def projector():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 8))


def trained(monkeypatch, subject, recipe):
    """The scores, and the learner at the end."""
    kept = []
    make = NetworkLearner.__init__

    def remember(self, *arguments):
        make(self, *arguments)
        kept.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(NetworkLearner, "__init__", remember)
        finetune.check(subject, recipe)
        scores = finetune.run(subject, recipe)
    return scores, kept[0]


def weights(learner):
    return torch.cat([value.flatten() for value in learner.model.state_dict().values()])


# --- the network ---


@pytest.mark.parametrize("pooling", ["avg", "cls", "cls+avg"])
def test_what_the_head_reads(checkpoint, pooling):
    model = Classifier(trunk(checkpoint, replace(TINY, pooling=pooling)), pooling, 3).eval()
    nn.init.normal_(model.head.weight)
    images = torch.randn(4, 3, 16, 16)
    vit = checkpoint.backbone.vit
    with torch.no_grad():
        x = vit.patch_embed(images)
        x = torch.cat([vit.cls_token.expand(4, -1, -1), x], 1) + vit.pos_embed
        x = vit.blocks(x)
        if pooling == "avg":
            vector = nn.functional.layer_norm(x[:, 1:].mean(1), (32,), eps=1e-6)
        else:
            normed = vit.norm(x)
            vector = normed[:, 0] if pooling == "cls" else torch.cat([normed[:, 0], normed[:, 1:].mean(1)], 1)
        assert torch.allclose(model(images), vector @ model.head.weight.T, atol=1e-5)
    assert ("vit.norm.weight" in model.backbone.state_dict()) == (pooling != "avg")


def test_head_and_fresh_norm_at_the_start(checkpoint):
    model = Classifier(trunk(checkpoint, TINY), "avg", 500)
    assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
    assert (model.head.bias == 0).all()
    assert (model.fc_norm.weight == 1).all()
    assert model.fc_norm.eps == 1e-6


def test_the_projectors_first_layer_stands_before_the_head(checkpoint):
    whole = projector()
    layers = first_layer(checkpoint.require_extra("projector"), 32)
    model = Classifier(trunk(checkpoint, replace(TINY, pooling="cls")), "cls", 3, layers).eval()
    assert model.head.in_features == 24
    nn.init.normal_(model.head.weight)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        cls = checkpoint.backbone(images).tokens[0].cls
        assert torch.allclose(model(images), whole[:3](cls) @ model.head.weight.T, atol=1e-5)


def test_a_projector_without_norm_and_one_that_is_not_known():
    state = {f"head.mlp.{name}": value for name, value in nn.Sequential(nn.Linear(32, 5)).state_dict().items()}
    layers = first_layer(state, 32)
    x = torch.randn(2, 32)
    expected = nn.functional.gelu(x @ state["head.mlp.0.weight"].T + state["head.mlp.0.bias"])
    assert torch.allclose(layers(x), expected)
    normed = nn.Sequential(nn.Linear(32, 5), nn.BatchNorm1d(5)).state_dict()
    for bad in (normed, {"fc1.weight": torch.zeros(5, 32)}, {"0.weight": torch.zeros(5, 31)}):
        with pytest.raises(UserError, match=r"expected a Linear of 32 inputs .*projector=false"):
            first_layer(bad, 32)


def expected_group(name, depth, blocks_of_class_attention=0):
    """Layer and whether decayed, by the rules of MAE's lr_decay.py, written out."""
    top = depth + blocks_of_class_attention + 1
    parts = name.split(".")
    if "class_attention" in parts:
        layer = depth + 1 + (int(parts[3]) if parts[2] == "blocks" else 0)
    elif "blocks" in parts:
        layer = int(parts[3]) + 1
    elif any(part in name for part in ("patch_embed", "cls_token", "pos_embed", "reg_token")):
        layer = 0
    else:
        layer = top
    vector = parts[-1] in (
        "bias",
        "q_bias",
        "k_bias",
        "v_bias",
        "gamma_1",
        "gamma_2",
        "cls_token",
        "pos_embed",
        "reg_token",
    )
    return top - layer, not (vector or "norm" in parts[-2] or parts[-2] == "fc_norm")


@pytest.mark.parametrize("kind", ["plain", "cls", "beit", "class attention", "registers", "fixed"])
def test_layer_and_weight_decay_of_every_parameter(kind):
    changes = {
        "beit": {"beit": True, "position": False, "position_of_prefix": False},
        "class attention": {"cls": False, "class_attention_blocks": 2, "position_of_prefix": False},
        "registers": {"registers": 2},
    }.get(kind, {})
    architecture = replace(tiny_architecture(), **changes)
    pooling = "cls" if kind in ("cls", "class attention") else "avg"
    recipe = replace(TINY, pooling=pooling, layer_decay=0.5, positions="fixed" if kind == "fixed" else "trained")
    backbone = build(architecture if pooling == "cls" else replace(architecture, final_norm=False))
    if kind == "fixed":
        backbone.vit.pos_embed.requires_grad_(False)
    model = Classifier(backbone, pooling, 3)
    found = {
        id(parameter): (group["scale"], group["weight_decay"])
        for group in layer_groups(model, recipe)
        for parameter in group["params"]
    }
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == {id(parameter) for parameter in named.values()}
    assert len(found) == sum(len(group["params"]) for group in layer_groups(model, recipe))
    for name, parameter in named.items():
        below, decayed = expected_group(name, 2, architecture.class_attention_blocks)
        assert found[id(parameter)] == (0.5**below, 0.05 if decayed else 0.0), name
    assert ("backbone.vit.pos_embed" in named) == (kind not in ("fixed", "beit"))
    if kind == "beit":
        assert found[id(named["backbone.vit.blocks.1.attn.relative_position_bias_table"])] == (0.5, 0.05)
    if kind == "class attention":
        assert found[id(named["head.weight"])][0] == 1
        assert found[id(named["backbone.class_attention.blocks.1.mlp.fc1.weight"])] == (0.5, 0.05)
        assert found[id(named["backbone.class_attention.cls_token"])] == (0.25, 0.0)
        assert found[id(named["backbone.vit.patch_embed.proj.weight"])] == (0.5**5, 0.05)


@pytest.mark.parametrize("positions", ["fixed", "trained"])
def test_positions_stay_or_move(monkeypatch, checkpoint, folder, positions):
    _, learner = trained(monkeypatch, subject_of(checkpoint, folder), replace(TINY, positions=positions))
    moved = not torch.equal(learner.model.backbone.vit.pos_embed, checkpoint.state["pos_embed"])
    assert moved == (positions == "trained")
    assert not torch.equal(learner.model.backbone.vit.cls_token, checkpoint.state["cls_token"])


def test_extremas_class_attention_is_left_out_with_average_pooling(tmp_path):
    architecture = replace(tiny_architecture(), cls=False, class_attention_blocks=2, position_of_prefix=False)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "extrema.pt", build(architecture))
    opened = open_checkpoint(tmp_path / "extrema.pt")
    assert trunk(opened, TINY).class_attention is None
    assert trunk(opened, replace(TINY, pooling="cls")).class_attention is not None
    same = trunk(opened, TINY).vit.blocks.state_dict(), opened.backbone.vit.blocks.state_dict()
    assert all(torch.equal(same[0][key], same[1][key]) for key in same[1])


# --- steps ---


def test_steps_are_those_of_a_plain_torch_loop(checkpoint, folder):
    subject = subject_of(checkpoint, folder, batch_size=3)
    recipe = replace(TINY, mixup=0.0, cutmix=0.0, erasing=0.0, drop_path=0.0, smoothing=0.2, layer_decay=0.5)
    torch.manual_seed(3)
    models = [Classifier(trunk(checkpoint, recipe), "avg", 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    learner = NetworkLearner(Shared(subject, recipe), models[0], layer_groups(models[0], recipe))
    model = models[1].train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(3):
        images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
        nothing = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        learner.step(Views((images.clone(),), (labels, *nothing)), Progress(step, 3, 2))
        loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.2)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        epoch, peak = step / 3, 0.02 * 4 / 256
        share = (epoch - 0.5) / 1.5
        lr = peak * epoch / 0.5 if epoch < 0.5 else 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * share))
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                below, decayed = expected_group(name, 2)
                rate = lr * 0.5**below
                first, second = moments[name]
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.999).add_(gradient**2, alpha=0.001)
                parameter.mul_(1 - rate * (0.05 if decayed else 0))
                scaled = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                parameter.sub_(rate * scaled)
    for (name, mine), (_, plain) in zip(models[0].named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(mine, plain, atol=1e-6), name
        assert not torch.equal(plain, start[name]), name


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_change_nothing_but_rounding(monkeypatch, checkpoint, folder, parts):
    recipe = replace(TINY, drop_path=0.3, erasing=1.0)  # mixing, erasing and drop path on
    whole, one = trained(monkeypatch, subject_of(checkpoint, folder, batch_size=4), recipe)
    cut, other = trained(monkeypatch, subject_of(checkpoint, folder, batch_size=parts), recipe)
    assert torch.allclose(weights(one), weights(other), atol=2e-5)
    assert np.array_equal(whole.predictions, cut.predictions)


def test_drop_path_erasing_mixing_and_seed_matter(monkeypatch, checkpoint, folder):
    plain = replace(TINY, drop_path=0.0, erasing=0.0, mixup=0.0, cutmix=0.0)
    subject = subject_of(checkpoint, folder)
    reference = weights(trained(monkeypatch, subject, plain)[1])
    assert weights(trained(monkeypatch, subject, plain)[1]).equal(reference)
    for change in ({"drop_path": 0.5}, {"erasing": 1.0}, {"mixup": 0.8}, {"cutmix": 1.0}, {"augmentation": "three"}):
        assert not weights(trained(monkeypatch, subject, replace(plain, **change))[1]).equal(reference), change
    subject.seed = 1
    assert not weights(trained(monkeypatch, subject, plain)[1]).equal(reference)


def test_a_training_that_was_stopped_goes_on_bit_for_bit(monkeypatch, own_cache, checkpoint, folder):
    recipe = replace(TINY, drop_path=0.3, every_epoch=True)
    subject = subject_of(checkpoint, folder)
    whole, learner = trained(monkeypatch, subject, recipe)
    expected, step = weights(learner).clone(), NetworkLearner.step

    def stop_after_four(state, flag):
        return learners[-1].seen == 4, False

    class Counting(NetworkLearner):
        seen = 0

        def step(self, views, now):
            step(self, views, now)
            self.seen = now.step + 1

    learners = []
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "agreed", stop_after_four)
        patch.setattr(finetune, "NetworkLearner", lambda *a: learners.append(Counting(*a)) or learners[-1])
        with pytest.raises(SystemExit) as stopped:
            finetune.run(subject, recipe)
    assert stopped.value.code == 143
    (saved,) = (own_cache / "training").iterdir()
    torch.manual_seed(99)  # what ran in between does not matter
    again, learner = trained(monkeypatch, subject, recipe)
    assert weights(learner).equal(expected)
    assert np.array_equal(again.predictions, whole.predictions)
    assert again.metrics == whole.metrics
    assert again.details == whole.details
    assert again.details["epochs"] == [1, 2]
    assert not saved.exists()


_TWO = """
import sys, json, torch, dataclasses
sys.path.insert(0, {tests!r})
import test_finetune as t
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.training.distributed import together
from ssl_bench.protocols import finetune
from ssl_bench.protocols.network_training import NetworkLearner
from pathlib import Path
from ssl_bench.evaluate.training import supervised
torch.set_num_threads(1)
supervised.MIXED_TOGETHER = 2
with together("cpu"):
    kept, make = [], NetworkLearner.__init__
    def remember(self, *a):
        make(self, *a)
        kept.append(self)
    NetworkLearner.__init__ = remember
    subject = t.subject_of(open_checkpoint({checkpoint!r}, protocol="finetune"), Path({folder!r}), batch_size=1)
    recipe = dataclasses.replace(t.TINY, drop_path=0.3, erasing=1.0, every_epoch=True)
    finetune.check(subject, recipe)
    scores = finetune.run(subject, recipe)
    from ssl_bench.evaluate.training import distributed
    torch.save(dict(weights=t.weights(kept[0]), predictions=torch.from_numpy(scores.predictions)),
               {out!r} + str(distributed.rank()))
"""


def test_two_processes_are_one(monkeypatch, checkpoint, folder, tmp_path):
    """With mixing, erasing and drop path on: all of it goes by an image's place in the whole batch."""
    recipe = replace(TINY, drop_path=0.3, erasing=1.0, every_epoch=True)
    monkeypatch.setattr(supervised, "MIXED_TOGETHER", 2)  # so that each process has a group of its own
    one, learner = trained(monkeypatch, subject_of(checkpoint, folder), recipe)
    tests = str(Path(__file__).parent)
    (tmp_path / "two.py").write_text(
        _TWO.format(tests=tests, checkpoint=checkpoint.spec, folder=str(folder), out=str(tmp_path / "out"))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.getcwd()}
    environment["SSL_BENCH_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"out{rank}", weights_only=True) for rank in (0, 1))
    assert first["weights"].equal(second["weights"])
    assert torch.allclose(first["weights"], weights(learner), atol=2e-5)
    assert first["predictions"].equal(second["predictions"])
    assert np.array_equal(first["predictions"].numpy(), one.predictions)


def test_a_loss_that_is_no_number_is_said(monkeypatch, checkpoint, folder):
    recipe = replace(TINY, lr=1e30, warmup_epochs=0.0)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d.*--set lr="):
        finetune.run(subject_of(checkpoint, folder), recipe)


# --- predictions and data ---


def test_predictions_are_those_of_the_trained_network_on_val(monkeypatch, checkpoint, folder):
    subject = subject_of(checkpoint, folder, batch_size=3)
    scores, learner = trained(monkeypatch, subject, TINY)
    split, view = subject.split("val"), View(16, 16, "bicubic")
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (
            learner.known.subject.checkpoint.architecture.mean,
            learner.known.subject.checkpoint.architecture.std,
        )
    )
    learner.model.eval()
    expected = []
    for index in range(len(split)):
        pixels = torch.from_numpy(view.pixels(split.image(index))).float() / 255
        expected.append(int(learner.model(((pixels - mean) / std)[None]).argmax()))
    assert scores.predictions.tolist() == expected
    assert scores.metrics["top1"].value == pytest.approx(100 * np.mean(np.array(expected) == split.labels))
    assert scores.metrics["top1"].n == 10
    assert set(scores.metrics) == {"top1"}
    json.dumps(scores.details, allow_nan=False)


def test_it_learns_and_the_best_epoch_stands_beside_the_last(monkeypatch, checkpoint, image_folder):
    subject = subject_of(checkpoint, image_folder(train=16, val=8))
    recipe = replace(
        TINY, epochs=6, lr=0.1, every_epoch=True, mixup=0.0, cutmix=0.0, erasing=0.0, drop_path=0.0, least_area=0.5
    )
    scores, _ = trained(monkeypatch, subject, recipe)
    assert scores.metrics["top1"].value >= 90  # the two classes differ in brightness
    curve = scores.details["top1_by_epoch"]
    assert len(curve) == 6
    assert curve[-1] == scores.metrics["top1"].value
    assert max(curve) == scores.metrics["top1_best_epoch"].value


def test_broken_val_images_are_refused_at_once_or_left_out(monkeypatch, checkpoint, folder):
    (folder / "val" / "b" / "0001.png").write_bytes(b"no image")
    steps = []
    monkeypatch.setattr(network_training.NetworkLearner, "step", lambda self, views, now: steps.append(now))
    with pytest.raises(UserError, match=r"0001.png.*--skip-broken"):
        finetune.run(subject_of(checkpoint, folder), TINY)
    assert not steps
    subject = subject_of(checkpoint, folder, skip_broken=True, batch_size=1)
    scores = finetune.run(subject, TINY)
    assert steps
    assert len(scores.predictions) == scores.metrics["top1"].n == 9
    assert subject.broken("val") == (6,)


def test_a_share_of_the_labels(checkpoint, image_folder):
    root = image_folder(train=20, val=2)
    subject = subject_of(checkpoint, root)
    split = subject.split("train")
    assert labeled_part(subject, replace(TINY, labels="all")) == (split, "all")
    part, said = labeled_part(subject, replace(TINY, labels="10percent"))
    assert np.bincount(part.labels).tolist() == [2, 2]
    assert said.startswith("drawn: shuffling 0 of seed 0")
    (root / "10percent.txt").write_text("a/0003.png\nb/0007.png\n")
    labeled_splits.cache_clear()
    listed, said = labeled_part(subject, replace(TINY, labels="10percent"))
    assert list(listed.sample_ids) == ["a/0003.png", "b/0007.png"]
    assert said.endswith("10percent.txt")
    assert len(labeled_part(subject, replace(TINY, labels="1percent"))[0]) == 2  # the list of 10 % is not that of 1 %


def test_only_the_labeled_part_is_trained_on(monkeypatch, checkpoint, image_folder):
    subject = subject_of(checkpoint, image_folder(train=20, val=2))
    seen = []
    step = NetworkLearner.step
    monkeypatch.setattr(
        NetworkLearner, "step", lambda self, v, now: (seen.append(v.images[0].shape[0]), step(self, v, now))[1]
    )
    recipe = replace(TINY, labels="10percent", projector=True, pooling="cls")
    finetune.check(subject, recipe)
    scores = finetune.run(subject, recipe)
    assert scores.details["train_images"] == 4
    assert scores.details["labels"].startswith("drawn: shuffling 0 of seed 0")
    assert seen == [4] * 2  # a step an epoch
    assert len(subject.split("train")) == 40
    with pytest.raises(UserError, match="2 images, which do not fill one batch of 4"):
        finetune.check(subject, replace(recipe, labels="1percent"))


# --- refusals ---


def test_what_a_network_cannot_serve_is_refused(tmp_path, checkpoint, folder):
    with pytest.raises(UserError, match="pixels: has no weights to train"):
        finetune.check(subject_of(open_checkpoint("pixels:"), folder), TINY)
    subject = subject_of(checkpoint, folder)
    with pytest.raises(UserError, match="crop_px=20 does not divide into patches of 8 px"):
        finetune.check(subject, replace(TINY, resize_px=24, crop_px=20))
    with pytest.raises(UserError, match="batch=5: mixup and cutmix mix pairs"):
        finetune.check(subject, replace(TINY, batch=5))
    finetune.check(subject, replace(TINY, batch=5, mixup=0.0, cutmix=0.0))
    with pytest.raises(UserError, match="fp16 trains on CUDA only"):
        finetune.check(subject_of(checkpoint, folder, dtype="fp16"), TINY)
    with pytest.raises(UserError, match="12 images, which do not fill one batch of 64"):
        finetune.check(subject, replace(TINY, batch=64))
    no_norm = replace(checkpoint, architecture=replace(checkpoint.architecture, final_norm=False))
    with pytest.raises(UserError, match=r"holds no final norm.*pooling=avg"):
        finetune.check(subject_of(no_norm, folder), replace(TINY, pooling="cls"))
    finetune.check(subject_of(no_norm, folder), TINY)
    no_cls = replace(checkpoint, architecture=replace(checkpoint.architecture, cls=False))
    with pytest.raises(UserError, match=r"no class token.*pooling=avg"):
        finetune.check(subject_of(no_cls, folder), replace(TINY, pooling="cls+avg"))
    random = open_checkpoint("random:vit_32x2x2_patch8_16")
    with pytest.raises(UserError, match="holds no projector"):
        finetune.check(subject_of(random, folder), replace(TINY, pooling="cls", projector=True))


def test_bf16_trains_too(monkeypatch, checkpoint, folder):
    subject = subject_of(checkpoint, folder, dtype="bf16")
    _, learner = trained(monkeypatch, subject, TINY)
    full = weights(trained(monkeypatch, subject_of(checkpoint, folder), TINY)[1])
    assert weights(learner).dtype == torch.float32
    assert not weights(learner).equal(full)
    assert torch.allclose(weights(learner), full, atol=5e-3)
