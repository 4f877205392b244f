"""The linear probe: each head of a sweep against a plain torch loop of its own, on the same features."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from two_processes import run_together

from ssl_bench import running
from ssl_bench.errors import UserError
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.subject import Subject
from ssl_bench.evaluate.training.augment import View, draw_views
from ssl_bench.evaluate.training.loader import epoch_order, sample_generator
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.leaderboards.store import load_results
from ssl_bench.protocols import linear
from ssl_bench.protocols.heads import Heads
from ssl_bench.protocols.linear import RECIPES, Recipe
from ssl_bench.protocols.optimizers import StackedSgd
from ssl_bench.protocols.state_file import StateFile
from ssl_bench.protocols.training import Labeled, image_batches

EFFORT = Effort(workers=0)


@pytest.fixture(autouse=True)
def _own(own_cache):
    """Features and interrupted trainings of a test are its own."""


@pytest.fixture
def subject(tiny_checkpoint, image_folder) -> Subject:
    return Subject(tiny_checkpoint, open_dataset(str(image_folder(train=20, val=7, classes=("a", "b", "c")))), EFFORT)


def recipe(name: str = "cached", **changes: object) -> Recipe:
    plain = dataclasses.replace(RECIPES[name], resize_px=16, crop_px=16, batch=8, epochs=3, warmup_epochs=0)
    return dataclasses.replace(plain, **{"base_lr": (0.5,), **changes})


# --- heads and optimizer ---


@pytest.mark.parametrize("nesterov", [False, True])
def test_every_head_is_moved_as_torch_would_move_it_alone(nesterov):
    generator = torch.Generator().manual_seed(0)
    weight, gradients = torch.randn(3, 4, 5, generator=generator), torch.randn(6, 3, 4, 5, generator=generator)
    lr, decay, scales = torch.tensor([0.1, 1.0, 3.0]), torch.tensor([0.0, 0.01, 0.1]), [0.2, 1.0, 0.9, 0.5, 0.3, 0.0]
    stacked = torch.nn.Parameter(weight.clone())
    ours = StackedSgd([stacked], lr=lr, weight_decay=decay, nesterov=nesterov)
    for gradient, scale in zip(gradients, scales, strict=True):
        stacked.grad = gradient.clone()
        ours.set_scale(scale)
        ours.step()
    for k in range(3):
        alone = torch.nn.Parameter(weight[k].clone())
        theirs = torch.optim.SGD([alone], lr=1.0, momentum=0.9, weight_decay=float(decay[k]), nesterov=nesterov)
        for gradient, scale in zip(gradients, scales, strict=True):
            theirs.param_groups[0]["lr"] = scale * float(lr[k])
            alone.grad = gradient[k].clone()
            theirs.step()
        torch.testing.assert_close(stacked[k], alone, rtol=1e-5, atol=1e-6)


def test_lars_by_hand():
    """MAE's: trust ratio and decay for matrices only; the ratio multiplies the decayed gradient; then the momentum."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, generator=generator)
    lr, decay = [0.5, 2.0], [0.1, 0.0]
    stacked = [torch.nn.Parameter(weight.clone()), torch.nn.Parameter(bias.clone())]
    ours = StackedSgd(stacked, lr=torch.tensor(lr), weight_decay=torch.tensor(decay), trust=0.001)
    expected, buffers = [weight.double(), bias.double()], [torch.zeros(2, 3, 4).double(), torch.zeros(2, 3).double()]
    for _ in range(4):
        gradients = [torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, generator=generator)]
        for parameter, gradient in zip(stacked, gradients, strict=True):
            parameter.grad = gradient.clone()
        ours.step()
        for k in range(2):
            g = gradients[0][k].double() + decay[k] * expected[0][k]
            g = g * 0.001 * float(expected[0][k].norm()) / float(g.norm())
            buffers[0][k] = 0.9 * buffers[0][k] + g
            buffers[1][k] = 0.9 * buffers[1][k] + gradients[1][k].double()
            for which in range(2):
                expected[which][k] -= lr[k] * buffers[which][k]
    for parameter, value in zip(stacked, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_lars_leaves_a_head_of_zeros_its_gradient():
    weight = torch.nn.Parameter(torch.zeros(1, 2, 2))
    weight.grad = torch.ones(1, 2, 2)
    StackedSgd([weight], lr=torch.ones(1), weight_decay=torch.zeros(1), trust=0.001).step()
    assert torch.equal(weight.detach(), -torch.ones(1, 2, 2))


def test_heads_begin_alike_and_lose_as_one_would():
    x, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 2, 1, 0])
    heads = Heads(4, 5, 3, "plain", seed=3)
    assert torch.equal(heads.weight[0], heads.weight[3])
    with torch.no_grad():
        heads.weight.add_(torch.randn_like(heads.weight))
        heads.bias.add_(torch.randn_like(heads.bias))
    losses = heads.losses(x, labels)
    for k in range(4):
        logits = x @ heads.weight[k].T + heads.bias[k]
        assert losses[k].item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_batch_norm_is_torchs():
    x = 3 * torch.randn(7, 10, 5) + 2
    theirs = torch.nn.BatchNorm1d(5, affine=False, eps=1e-6)
    ours = Heads(1, 5, 3, "batch_norm", seed=0)
    for batch in x:
        torch.testing.assert_close(ours._batch_norm(batch), theirs(batch), rtol=1e-5, atol=1e-5)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours._batch_norm(x[0]), theirs(x[0]), rtol=1e-5, atol=1e-5)


def test_layer_norm_head_is_norm_then_unit_length_then_linear():
    heads, x = Heads(1, 5, 3, "layer_norm", seed=0), torch.randn(4, 5)
    with torch.no_grad():
        heads.gain.mul_(2).add_(torch.randn(1, 5))
        heads.shift.add_(torch.randn(1, 5))
    normed = torch.nn.functional.layer_norm(x, (5,), heads.gain[0], heads.shift[0])
    normed = normed / normed.norm(dim=1, keepdim=True)
    torch.testing.assert_close(heads(x)[0], normed @ heads.weight[0].T + heads.bias[0])


# --- the whole probe against a plain loop ---


def plain_loop(x, labels, queries, given: Recipe, lr: float, seed: int = 0):
    """One head, torch's own layers, optimizer and schedule: predictions after every epoch."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[1], int(labels.max()) + 1)
    layer.weight.data = Heads(1, x.shape[1], int(labels.max()) + 1, given.head, seed=seed).weight[0].detach().clone()
    layer.bias.data.zero_()
    norm = torch.nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6) if given.head == "batch_norm" else None
    model = torch.nn.Sequential(*([norm] if norm else []), layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    steps = len(x) // given.batch
    found = []
    for epoch in range(given.epochs):
        order = epoch_order(len(x), seed=seed, epoch=epoch)
        model.train()
        for step in range(steps):
            now = epoch if given.schedule == "epoch" else epoch + step / steps
            if now < given.warmup_epochs:
                factor = now / given.warmup_epochs
            else:
                factor = (
                    1 + math.cos(math.pi * (now - given.warmup_epochs) / (given.epochs - given.warmup_epochs))
                ) / 2
            optimizer.param_groups[0]["lr"] = lr * given.batch / 256 * factor
            rows = order[step * given.batch : (step + 1) * given.batch].copy()
            loss = torch.nn.functional.cross_entropy(model(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found.append(model(queries).argmax(1).numpy())
    return np.array(found), layer.weight.detach()


def features_by_hand(subject: Subject, split: str) -> torch.Tensor:
    """[CLS] + [AVG] of the last block after the final norm, one image at a time through timm's own forward."""
    backbone, rows = subject.checkpoint.backbone, []
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.architecture.mean, backbone.architecture.std))
    for index in range(len(subject.split(split))):
        image = torch.from_numpy(np.asarray(subject.split(split).image(index)).copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            tokens = backbone.vit.forward_features(((image - mean) / std)[None])[0]
        rows.append(torch.cat([tokens[0], tokens[1:].mean(0)]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "epoch", "epochs": 4},
        {"head": "batch_norm", "warmup_epochs": 1},
        {"base_lr": (0.1, 2.0, 30.0), "reported": "best"},
    ],
)
def test_the_probe_is_a_plain_loop(subject, changes):
    given = recipe(**changes)
    scores = linear.run(subject, given)
    labels = torch.from_numpy(subject.split("train").labels)
    truth = subject.split("val").labels
    x, queries = features_by_hand(subject, "train"), features_by_hand(subject, "val")
    curves = [
        [100 * float((found == truth).mean()) for found in plain_loop(x, labels, queries, given, lr)[0]]
        for lr in given.base_lr
    ]
    assert [head["last"] for head in scores.details["heads"]] == pytest.approx([curve[-1] for curve in curves])
    assert [head["best"] for head in scores.details["heads"]] == pytest.approx([max(curve) for curve in curves])
    assert [head["best_epoch"] for head in scores.details["heads"]] == [1 + curve.index(max(curve)) for curve in curves]
    assert scores.metrics["top1_best"].value == pytest.approx(max(max(curve) for curve in curves))
    assert scores.metrics["top1_last"].value == pytest.approx(max(curve[-1] for curve in curves))
    reported = "top1_best" if given.reported == "best" else "top1_last"
    assert scores.metrics["top1"] == scores.metrics[reported]
    assert 100 * (scores.predictions == truth).mean() == pytest.approx(scores.metrics["top1"].value)
    assert scores.metrics["top1"].n == len(truth)


def test_the_weights_too(subject):
    given = recipe(head="batch_norm", epochs=2)
    probe = linear.Probe(subject, given)
    steps = probe.images // given.batch
    for step, views in enumerate(probe.batches(0, 2 * steps)):
        probe.step(views, Progress(step, steps, 2))
    labels = torch.from_numpy(subject.split("train").labels)
    x, queries = features_by_hand(subject, "train"), features_by_hand(subject, "val")
    _, weight = plain_loop(x, labels, queries, given, 0.5)
    torch.testing.assert_close(probe.heads.weight[0].detach(), weight, rtol=1e-3, atol=1e-4)


def test_augmented_features_are_those_of_the_drawn_crops(subject):
    given = recipe("dino", blocks=2, epochs=1, batch=8)
    probe = linear.Probe(subject, given)
    views = next(iter(probe.batches(0, 1)))
    order = epoch_order(60, seed=0, epoch=0)[:8]
    backbone = subject.checkpoint.backbone
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.architecture.mean, backbone.architecture.std))
    expected = []
    for index in order.tolist():
        crop = View((0.08, 1.0), "bilinear")
        rng = sample_generator(0, 0, index)
        (pixels,) = draw_views(subject.split("train").image(index), (crop,), image_px=16, patch_px=8, rng=rng)
        with torch.no_grad():
            x = backbone.embed(((torch.from_numpy(pixels) / 255 - mean) / std)[None])[0]
            outputs = [x := block(x) for block in backbone.vit.blocks]
            expected.append(torch.cat([backbone.vit.norm(tokens)[0, 0] for tokens in outputs[-2:]]))
    torch.testing.assert_close(views.images[0], torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert views.draws[0].tolist() == subject.split("train").labels[order].tolist()


def test_a_batch_that_is_made_in_pieces_is_the_same_batch(subject):
    sizes = []

    def note(images):
        sizes.append(len(images))
        return images

    sample = Labeled(View((0.08, 1.0), "bilinear"), 16, 8, subject.split("train").labels)
    whole, pieces = (list(image_batches(subject, sample, 12, piece=piece, read=note)(0, 3)) for piece in (None, 5))
    assert sizes == [12] * 3 + [4] * 9  # the largest equal pieces that are small enough
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one.images[0], other.images[0])
        assert torch.equal(one.draws[0], other.draws[0])


def test_the_frozen_network_stays_as_it_is(subject):
    before = {name: value.clone() for name, value in subject.checkpoint.backbone.state_dict().items()}
    linear.run(subject, recipe("toy", epochs=1))
    after = subject.checkpoint.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_nothing_of_train_is_extracted_when_it_is_augmented(subject):
    assert set(linear.readings(subject, recipe("toy"))) == {"val"}
    assert set(linear.readings(subject, recipe("cached"))) == {"train", "val"}
    read = linear.readings(subject, recipe("dino"))["val"]
    assert [(reading.token, reading.layer, reading.norm) for reading in read] == [
        ("cls", -layer, True) for layer in (4, 3, 2, 1)
    ]
    both = linear.readings(subject, dataclasses.replace(recipe("extrema-paper"), vector="cls+patch_mean"))["val"]
    assert [(reading.token, reading.layer, reading.norm) for reading in both] == [
        ("cls", -1, False),
        ("patch_mean", -1, False),
    ]


@pytest.mark.parametrize("batch_size", [3, None])
def test_the_number_of_images_a_pass_changes_nothing(tiny_checkpoint, image_folder, batch_size):
    data = open_dataset(str(image_folder(train=12, val=5)))
    scores = linear.run(Subject(tiny_checkpoint, data, Effort(workers=0, batch_size=batch_size)), recipe("toy"))
    probe = linear.run(Subject(tiny_checkpoint, data, Effort(workers=0, batch_size=1)), recipe("toy"))
    assert np.array_equal(scores.predictions, probe.predictions)


# --- going on, several processes ---


def test_an_interrupted_training_goes_on_bit_for_bit(subject, monkeypatch, own_cache):
    given = recipe("toy", base_lr=(0.1, 1.0), epochs=3)
    whole = linear.run(subject, given)
    calls = []
    step = linear.Probe.step

    def interrupted(self, views, now):
        step(self, views, now)
        calls.append(now.step)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(linear.Probe, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        linear.run(subject, given)
    assert stopped.value.code == 143
    assert len(list((own_cache / "training").glob("*.pt"))) == 1
    again = linear.run(subject, given)
    assert calls[:10] == list(range(10))
    assert calls[10] == 10  # went on, did not begin anew
    assert np.array_equal(whole.predictions, again.predictions)
    assert whole.details == again.details
    assert not list((own_cache / "training").glob("*"))


def test_an_interrupted_sweep_remembers_which_heads_are_lost(subject):
    probe = linear.Probe(subject, recipe(base_lr=(0.5, 1e38)))
    steps = probe.images // 8
    for step, views in enumerate(probe.batches(0, steps)):
        probe.step(views, Progress(step, steps, 3))
    assert probe.finite.tolist() == [True, False]
    again = linear.Probe(subject, recipe(base_lr=(0.5, 1e38)))
    again.load_state_dict(probe.state_dict())
    assert again.finite.tolist() == [True, False]
    assert set(again.predict()[1]) == {-1}


IDENTITY = {
    "weights": lambda c: dataclasses.replace(c, weights_sha256="0" * 64),
    "heads": lambda c: dataclasses.replace(c, architecture=dataclasses.replace(c.architecture, heads=4)),
    "normalization": lambda c: dataclasses.replace(c, architecture=dataclasses.replace(c.architecture, mean=(0, 0, 0))),
}


def courses(subject, given, monkeypatch):
    """What identifies the training."""
    kept = []

    def stop(course, *rest):
        kept.append(StateFile(dataclasses.asdict(course)).key)
        raise KeyboardInterrupt

    monkeypatch.setattr(linear, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        linear.run(subject, given)
    return kept[0]


def test_a_training_is_identified_by_all_that_decides_its_numbers(subject, monkeypatch, image_folder):
    first = courses(subject, recipe(), monkeypatch)
    assert courses(subject, recipe(), monkeypatch) == first
    assert courses(subject, dataclasses.replace(recipe(), source="elsewhere"), monkeypatch) == first
    keys = {first, courses(subject, recipe(head="batch_norm"), monkeypatch)}
    keys.add(courses(dataclasses.replace(subject, seed=3, _features={}), recipe(), monkeypatch))
    keys.add(
        courses(
            dataclasses.replace(subject, effort=Effort(dtype="bf16", workers=0), _features={}), recipe(), monkeypatch
        )
    )
    for change in IDENTITY.values():
        other = dataclasses.replace(subject, checkpoint=change(subject.checkpoint), _features={})
        keys.add(courses(other, recipe(), monkeypatch))
    part = dataclasses.replace(subject.dataset, train=subject.split("train").subset(range(5, 60)))
    keys.add(courses(dataclasses.replace(subject, dataset=part, _features={}), recipe(), monkeypatch))
    assert len(keys) == 8


def test_broken_training_images_are_replaced_and_counted(tiny_checkpoint, image_folder):
    root = image_folder(train=10, val=5)
    (root / "train" / "a" / "0009.png").write_bytes(b"no image")  # the next one is b's first
    options = running.Options(
        dataset=str(root),
        settings={"batch": "10", "epochs": "2", "warmup_epochs": "0", "resize_px": "16", "crop_px": "16"},
        workers=0,
        device="cpu",
        skip_broken=True,
    )
    (record,) = running.run(tiny_checkpoint.spec, "linear/toy", options)
    assert record.skipped_broken == {"train": 1, "val": 0}
    assert record.n_samples.evaluated == {"train": 19, "val": 10}
    assert any("1 broken training images were replaced" in warning for warning in record.warnings)
    subject = Subject(tiny_checkpoint, open_dataset(str(root)), Effort(workers=0, skip_broken=True))
    (views,) = linear.Probe(subject, recipe("toy", batch=20, epochs=1)).batches(0, 1)
    order = epoch_order(20, seed=0, epoch=0)
    expected = subject.split("train").labels[order]
    expected[order == 9] = 1  # the replacement comes with its own label
    assert views.draws[0].tolist() == expected.tolist()


def test_two_processes_train_as_one(tmp_path, monkeypatch, image_folder, tiny_checkpoint):
    data = image_folder(train=16, val=9)
    settings = {"batch": "8", "epochs": "2", "warmup_epochs": "1", "resize_px": "16", "crop_px": "16"}
    options = running.Options(dataset=str(data), settings=settings, workers=0, device="cpu")
    (one,) = running.run(tiny_checkpoint.spec, "linear/toy", options)
    monkeypatch.setenv("SSL_BENCH_RESULTS", str(tmp_path / "two"))
    command = ["--ckpt", tiny_checkpoint.spec, "--dataset", str(data), "--workers", "0", "--device", "cpu"]
    command += [f"--set={name}={value}" for name, value in settings.items()]
    run_together([*command, "-p", "linear/toy"])
    (two,) = load_results()
    assert two.run.key() == one.run.key()
    for ours, theirs in zip(one.details["heads"], two.details["heads"], strict=True):
        assert ours == pytest.approx(theirs)
    assert one.n_samples == two.n_samples


# --- what goes wrong ---


def test_a_head_that_is_not_finite_is_dropped_and_named(subject):
    scores = linear.run(subject, recipe(base_lr=(0.5, 1e38)))
    assert [head["base_lr"] for head in scores.details["heads"]] == [0.5]
    assert scores.details["dropped"] == [1e38]
    assert any("base_lr=1e+38" in warning for warning in scores.warnings)
    alone = linear.run(subject, recipe(base_lr=(0.5,)))
    assert scores.metrics["top1_last"] == alone.metrics["top1_last"]  # the others are what they would have been
    json.dumps(scores.details, allow_nan=False)


def test_all_heads_lost_is_an_error(subject):
    with pytest.raises(UserError, match=r"loss of every head is not finite .*1e\+38.*smaller"):
        linear.run(subject, recipe(base_lr=(1e38,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_lr": (0.0,)}, "base_lr"),
        ({"batch": 0}, "batch=0"),
        ({"warmup_epochs": 3}, "warmup_epochs=3"),
        ({"scale": (0.5,)}, "scale"),
        ({"scale": (0.9, 0.2)}, "scale"),
        ({"head": "layer_norm", "base_lr": (1.0, 2.0)}, "one base_lr"),
        ({"vector": "patch_mean", "blocks": 2}, "blocks=2"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


def test_what_data_cannot_give_is_refused_before_any_image(subject, image_folder, tiny_checkpoint):
    with pytest.raises(UserError, match=r"60 images, which do not fill one batch of 64"):
        linear.check(subject, recipe(batch=64))
    pixels = Subject(open_checkpoint("pixels:"), subject.dataset, EFFORT)
    with pytest.raises(UserError, match="linear/cached"):
        linear.check(pixels, recipe("toy"))
    linear.check(pixels, recipe("cached"))
    train = subject.split("train")
    one = dataclasses.replace(subject.dataset, train=train.subset(np.flatnonzero(train.labels == 1)))
    with pytest.raises(UserError, match="all of one class"):
        linear.check(Subject(tiny_checkpoint, one, EFFORT), recipe())
    two = dataclasses.replace(subject.dataset, train=train.subset(np.flatnonzero(train.labels != 1)))
    with pytest.raises(UserError, match=r"1 classes of val have no training image .*: b\."):
        linear.check(Subject(tiny_checkpoint, two, EFFORT), recipe())


def test_broken_val_images_are_left_out(tiny_checkpoint, image_folder):
    root = image_folder(train=10, val=5)
    next(iter(sorted((Path(root) / "val" / "a").glob("*.png")))).write_bytes(b"no image")
    data = open_dataset(str(root))
    scores = linear.run(Subject(tiny_checkpoint, data, Effort(workers=0, skip_broken=True)), recipe("toy"))
    assert scores.metrics["top1"].n == len(scores.predictions) == 9


# --- the table ---

_45 = tuple(round(d * 10.0**p, 10) for p in (-4, -3, -2, -1, 0) for d in range(1, 10))
# Typed again: vector, blocks, norm, head, optimizer, lr, batch, epochs, warm-up, reported, selected on.
PUBLISHED = {
    "ibot": ("cls+patch_mean", 1, True, "plain", "sgd", _45, 1024, 100, 0, "best", "test"),
    "ibot-small": ("cls", 4, True, "plain", "sgd", _45, 1024, 100, 0, "best", "test"),
    "dino": ("cls", 4, True, "plain", "sgd", (0.001,), 1024, 100, 0, "best", "test"),
    "dino-base": ("cls+patch_mean", 1, True, "plain", "sgd", (0.001,), 1024, 100, 0, "best", "test"),
    "moca": ("cls+patch_mean", 1, True, "plain", "sgd", _45, 1024, 100, 0, "best", "test"),
    "moca-avg": ("patch_mean", 1, True, "plain", "sgd", _45, 1024, 100, 0, "best", "test"),
    "moca-paper": ("patch_mean", 1, True, "plain", "sgd", (0.04,), 1024, 100, 0, "last", "none"),
    "mae": ("cls", 1, True, "batch_norm", "lars", (0.1,), 16384, 90, 10, "best", "test"),
    "mae-large": ("cls", 1, True, "batch_norm", "lars", (0.1,), 16384, 50, 10, "best", "test"),
    "tec": ("cls", 1, True, "batch_norm", "lars", (0.1,), 16384, 90, 10, "last", "none"),
    "sdae": ("cls", 1, True, "batch_norm", "lars", (0.1,), 4096, 90, 10, "best", "test"),
    "extrema-readme": ("cls", 1, False, "batch_norm", "sgd", (0.1,), 4096, 90, 10, "best", "test"),
    "extrema-paper": ("cls", 1, False, "batch_norm", "lars", (0.1,), 4096, 90, 10, "last", "none"),
    "msn": ("cls", 1, False, "layer_norm", "nesterov", (6.4 * 256 / 8192,), 8192, 100, 0, "best", "test"),
    "mocov3": ("cls", 1, True, "plain", "sgd", (3.0,), 1024, 90, 0, "best", "test"),
}


NUMBERS = {
    "ibot": "iBOT ViT-B/16 79.6 (MOCA Table 6), ViT-L/16 81.0",
    "ibot-small": "not in",
    "dino": "DINO ViT-S/16 77.0",
    "dino-base": "DINO ViT-B/16 78.2",
    "moca": "79.5",
    "moca-avg": "78.7 (Table 6), 400 ep. 79.3, ViT-L 80.3",
    "moca-paper": "78.7",
    "mae": "67.8 (SdAE Table 2), 68.0 (TEC Table 3)",
    "mae-large": "75.1",
    "tec": "69.8",
    "sdae": "64.9, 100 epochs 60.3",
    "extrema-readme": "73.3 with colors, 67.1 without",
    "extrema-paper": "73.3, ViT-S/16 69.4, 22k 74.5 and 65.7",
    "msn": "ViT-S/16 76.9, ViT-B/16 76.8",
    "mocov3": "76.7",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_what_their_sources_say(name):
    row = RECIPES[name]
    fields = (
        "vector",
        "blocks",
        "norm",
        "head",
        "optimizer",
        "batch",
        "epochs",
        "warmup_epochs",
        "reported",
        "selected_on",
    )
    vector, blocks, norm, head, optimizer, lr, *rest = PUBLISHED[name]
    assert [getattr(row, field) for field in fields] == [vector, blocks, norm, head, optimizer, *rest]
    assert row.base_lr == pytest.approx(lr)
    assert (row.scale, row.resize_px, row.crop_px) == ((0.08, 1.0), 256, 224)
    assert row.crops == ("bicubic" if name in {"mae", "mae-large", "tec", "sdae"} else "bilinear")
    bilinear = name in {"extrema-readme", "extrema-paper", "msn", "mocov3"}
    assert row.interpolation == ("bilinear" if bilinear else "bicubic")
    stepwise = {"mae", "mae-large", "tec", "sdae", "extrema-readme", "extrema-paper", "msn"}
    assert row.schedule == ("step" if name in stepwise else "epoch")
    assert NUMBERS[name] in row.published


def test_every_row_is_held_and_the_rest_are_ours():
    assert set(RECIPES) - set(PUBLISHED) == {"cached", "toy"}
    assert RECIPES["cached"].scale is None
    assert next(iter(RECIPES)) == "ibot"
