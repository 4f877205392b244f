"""Segmentation: every row against its source, heads, loss, windows and schedules against plain torch, toy rows run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import tiny_architecture, tiny_backbone
from PIL import Image
from torch import Tensor, nn
from two_processes import run_together

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.evaluate.checkpoints import Checkpoint, open_checkpoint
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.masks import IGNORE, Masks, open_masks
from ssl_bench.evaluate.recipes import with_settings
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.subject import Subject
from ssl_bench.files import cache_folder
from ssl_bench.protocols import mask_reading, semseg
from ssl_bench.protocols.image_splits import subsets
from ssl_bench.protocols.openmm import packages
from ssl_bench.protocols.semseg import RECIPES, Recipe, check

packages.require()

from ssl_bench.protocols.openmm import segmentation, segmentation_search, segmentors  # noqa: E402  (they need the packages)
from ssl_bench.protocols.openmm.network import Network, parameter_groups  # noqa: E402
from ssl_bench.protocols.openmm.runner import Diverged, History, build  # noqa: E402
from ssl_bench.protocols.openmm.segmentation import Segmentation  # noqa: E402
from ssl_bench.protocols.openmm.segmentors import PixelCrossEntropy, enlarged_argmax, segmentor  # noqa: E402

CLASSES = 3

# --- what the sources say, typed again ---

# fmt: off
#                         head                frozen layers         norm   optimizer lr     decay drop  wd
PUBLISHED = {
    "linear-mmc":           ("batchnorm+linear", True,  (5, 7, 9, 11), True,  "adamw", 1e-4, 1.0,  0.0, 0.05),
    "linear-ibot":          ("linear",           True,  (3, 5, 7, 11), True,  "adamw", 8e-4, 1.0,  0.0, 0.05),
    "upernet-ibot":         ("upernet",          False, (3, 5, 7, 11), True,  "adamw", 8e-5, 0.65, 0.1, 0.05),
    "upernet-mae":          ("upernet",          False, (3, 5, 7, 11), False, "adamw", 1e-4, 0.65, 0.1, 0.05),
    "upernet-tec":          ("upernet",          False, (3, 5, 7, 11), False, "adamw", 1e-4, 0.65, 0.1, 0.05),
    "upernet-cae":          ("upernet",          False, (3, 5, 7, 11), False, "adamw", 4e-4, 0.65, 0.1, 0.05),
    "upernet-sdae":         ("upernet",          False, (3, 5, 7, 11), False, "adamw", 4e-4, 0.65, 0.1, 0.05),
    "upernet-extrema":      ("upernet",          False, (3, 5, 7, 11), False, "adamw", 1e-4, 0.85, 0.1, 0.05),
    "segmenter-linear":     ("linear",           True,  (11,),         True,  "sgd",   1e-2, 1.0,  0.0, 0.0),
    "segmenter-linear-372": ("linear",           True,  (11,),         True,  "sgd",   1e-2, 1.0,  0.0, 0.0),
    "segmenter-linear-100": ("linear",           True,  (11,),         True,  "sgd",   1e-2, 1.0,  0.0, 0.0),
    "segmenter-mask":       ("mask",             False, (11,),         True,  "sgd",   1e-2, 1.0,  0.1, 0.0),
    "segmenter-mask-372":   ("mask",             False, (11,),         True,  "sgd",   1e-2, 1.0,  0.1, 0.0),
    "segmenter-mask-100":   ("mask",             False, (11,),         True,  "sgd",   1e-2, 1.0,  0.1, 0.0),
    "imagenet-s":           ("layernorm+linear", False, (11,),         False, "adamw", 5e-4, 0.60, 0.1, 0.05),
    "imagenet-s-ft":        ("fc_norm+linear",   False, (11,),         False, "adamw", 1e-4, 0.45, 0.1, 0.05),
}
#                         length, unit            warm-up min_lr power batch crop stride resize images, splits
COURSES = {
    "linear-mmc":           (40_000, "iterations", 1500, 0.0,  1.0,  16,  512, 341,  None, None, 1),
    "linear-ibot":          (160_000, "iterations", 1500, 0.0, 1.0,  16,  512, 341,  None, None, 1),
    "upernet-ibot":         (160_000, "iterations", 1500, 0.0, 1.0,  16,  512, 341,  None, None, 1),
    "upernet-mae":          (160_000, "iterations", 1500, 0.0, 1.0,  16,  512, 341,  None, None, 1),
    "upernet-tec":          (160_000, "iterations", 1500, 0.0, 1.0,  16,  512, 341,  None, None, 1),
    "upernet-cae":          (160_000, "iterations", 1500, 0.0, 1.0,  16,  512, 341,  None, None, 1),
    "upernet-sdae":         (160_000, "iterations", 1500, 0.0, 1.0,  16,  512, 341,  None, None, 1),
    "upernet-extrema":      (80_000, "iterations", 1500, 0.0,  1.0,  16,  512, 341,  None, None, 1),
    "segmenter-linear":     (216, "epochs",        0,    1e-5, 0.9,  8,   768, 512,  None, None, 1),
    "segmenter-linear-372": (100, "epochs",        0,    1e-5, 0.9,  8,   768, 512,  None, 372,  3),
    "segmenter-linear-100": (100, "epochs",        0,    1e-5, 0.9,  8,   768, 512,  None, 100,  3),
    "segmenter-mask":       (216, "epochs",        0,    1e-5, 0.9,  8,   768, 512,  None, None, 1),
    "segmenter-mask-372":   (216, "epochs",        0,    1e-5, 0.9,  8,   768, 512,  None, 372,  3),
    "segmenter-mask-100":   (216, "epochs",        0,    1e-5, 0.9,  8,   768, 512,  None, 100,  3),
    "imagenet-s":           (100, "epochs",        5,    1e-6, None, 256, 224, None, 256,  None, 1),
    "imagenet-s-ft":        (100, "epochs",        5,    1e-6, None, 256, 224, None, 256,  None, 1),
}
SCORES = {  # of the papers' own networks, or the repository's
    "linear-mmc": ("37.0", "62.6", "77.7", "46.4"), "upernet-ibot": ("50.0",), "upernet-mae": ("48.1", "48.15"),
    "upernet-tec": ("49.9", "51.0"), "upernet-cae": ("47.7", "48.8"), "upernet-sdae": ("48.6", "49.0"),
    "upernet-extrema": ("47.9", "48.4"), "segmenter-linear": ("60.1",), "segmenter-linear-372": ("55.2",),
    "segmenter-linear-100": ("49.9",), "segmenter-mask": ("78.2",), "segmenter-mask-372": ("71.1",),
    "segmenter-mask-100": ("51.5",), "imagenet-s": ("42.9", "38.3"), "imagenet-s-ft": ("62.0", "61.0"),
}
# fmt: on
TOYS = [name for name in RECIPES if name.endswith("-toy")]


def test_rows_are_what_their_sources_say() -> None:
    assert list(PUBLISHED) + TOYS == list(RECIPES)
    for name, row in PUBLISHED.items():
        recipe = RECIPES[name]
        found = (recipe.head, recipe.frozen, recipe.layers, recipe.norm, recipe.optimizer)
        searched = recipe.optimizer == "sgd"  # around Segmenter's own
        assert row[5] in recipe.lrs if searched else recipe.lrs == (row[5],), name
        assert (*found, row[5], recipe.layer_decay, recipe.drop_path, recipe.weight_decay) == row, name
        assert recipe.selected_on == ("val" if searched else "none")
        assert (recipe.best_every == 4) if searched else (recipe.best_every is None)
        colors = "resized-crop+colors" if name.startswith("imagenet-s") else "scale"
        assert (recipe.augmentation, recipe.lists) == (colors, None)
        assert recipe.source
        assert all(score in re.findall(r"[\d.]+\d", recipe.published) for score in SCORES.get(name, ()))
    for name, course in COURSES.items():
        recipe = RECIPES[name]
        rest = (recipe.warmup, recipe.min_lr, recipe.power, recipe.batch, recipe.crop_px, recipe.stride_px)
        images = (recipe.resize_px, recipe.train_images, recipe.splits)
        assert (recipe.length, recipe.unit, *rest, *images) == course, name


def test_the_first_toy_row_is_the_linear_one() -> None:
    assert TOYS == ["linear-toy", "upernet-toy", "segmenter-toy", "imagenet-s-toy"]
    assert RECIPES["linear-toy"].frozen


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": "3"}, "iterations=40000, epochs=3: expected one of them"),
        ({"iterations": "none"}, "expected one of them, and none for the other"),
        ({"iterations": "1500"}, "warmup=1500 of 1500 iterations"),
        ({"batch": "0"}, "batch=0: expected at least 1"),
        ({"lrs": "1e-3,1e-3"}, "expected different learning rates"),
        ({"lrs": "1e-3,1e38"}, "above 0, at most 1000"),
        ({"lrs": "0"}, "above 0, at most 1000"),
        ({"min_lr": "1"}, "a smaller min_lr"),
        ({"power": "0"}, "power above"),
        ({"layer_decay": "0"}, "layer_decay=0.0"),
        ({"drop_path": "1"}, "drop_path from 0"),
        ({"head": "mask"}, "expected 1 of the blocks 0 to 11 for head=mask"),
        ({"layers": "3,12"}, "expected 2 of the blocks 0 to 11"),
        ({"head": "upernet"}, "frozen=true: UPerNet"),
        ({"layer_decay": "0.5"}, "frozen=true"),
        ({"stride_px": "600"}, "windows of 512 px would leave pixels between them"),
        ({"splits": "2"}, "splits=2: expected 1, or with train_images=..."),
        ({"splits": "6", "train_images": "10"}, "up to 5"),
        ({"lists": "/somewhere"}, "how many images"),
        ({"head": "linar"}, "expected one of linear, batchnorm"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        with_settings(RECIPES["linear-mmc"], settings)


# --- learning rates ---


def _mmcv(step: int, lr: float, *, steps: int, power: float, min_lr: float, warmup: int) -> float:
    """mmcv 1's PolyLrUpdaterHook and its linear warm-up with ratio 1e-6, as its documentation has them."""
    regular = (lr - min_lr) * (1 - step / steps) ** power + min_lr
    if step >= warmup:
        return regular
    k = (1 - step / warmup) * (1 - 1e-6)
    return regular * (1 - k)


@pytest.mark.parametrize("step", [0, 1, 750, 1499, 1500, 1501, 20_000, 39_999])
def test_polynomial_with_warmup(step: int) -> None:
    factor = RECIPES["linear-mmc"].lr_factor(1e-4, 20_210)
    assert 1e-4 * factor(step) == pytest.approx(_mmcv(step, 1e-4, steps=40_000, power=1, min_lr=0, warmup=1500))


def test_polynomial_of_segmenter() -> None:
    """216 epochs of 372 steps: the last batch of an epoch of 2,975 images has seven of them."""
    recipe = RECIPES["segmenter-linear"]
    factor, steps = recipe.lr_factor(0.03, 2975), 216 * 372
    assert recipe.per_unit(2975) == 372
    for step in (0, 1, 40_000, steps - 1):
        expected = (0.03 - 1e-5) * (1 - step / steps) ** 0.9 + 1e-5
        assert 0.03 * factor(step) == pytest.approx(expected)


def test_cosine_of_imagenet_s() -> None:
    factor = RECIPES["imagenet-s"].lr_factor(5e-4, 9190)
    for step in (0, 90, 180, 1000, 3599):
        epoch = step / 36
        expected = 5e-4 * epoch / 5
        if epoch >= 5:
            expected = 1e-6 + (5e-4 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 95))
        assert 5e-4 * factor(step) == pytest.approx(expected)


# --- networks ---


def _small(row: str, **changes: Any) -> Recipe:
    sizes = {"crop_px": 32, "stride_px": 24, **({"layers": (5, 11)} if "linear-toy" in row else {})}
    return replace(RECIPES[row], **{**sizes, **changes})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    return open_checkpoint(tmp_path / "tiny.pt")


def _built(recipe: Recipe, checkpoint: Checkpoint, classes: int = CLASSES) -> Any:
    network: Any = build(segmentor(recipe, checkpoint.architecture, classes), scope="mmseg", seed=0)
    network.backbone.load(checkpoint)
    return network


def _sample(height: int, width: int, label: Tensor | None = None) -> Any:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo={"ori_shape": (height, width), "img_shape": (height, width)})
    if label is not None:
        sample.gt_sem_seg = PixelData(data=label[None])
    return sample


def _maps(checkpoint: Checkpoint, images: Tensor, layers: tuple[int, ...], *, norm: bool) -> list[Tensor]:
    """(B, D, h, w) each, by our backbone alone."""
    with torch.no_grad():
        tokens = checkpoint.backbone.eval()(images, layers=layers, norm=norm).tokens
    return [each.patches.permute(0, 3, 1, 2) for each in tokens]


def test_linear_head_with_batchnorm(checkpoint: Checkpoint) -> None:
    """Tokens of both layers after the final norm, joined, normalized over the batch, weighted and summed."""
    network = _built(_small("linear-toy"), checkpoint).train()
    head = network.decode_head
    nn.init.normal_(head.conv_seg.weight)
    nn.init.normal_(head.conv_seg.bias)
    nn.init.normal_(head.norm.weight)
    images = torch.randn(3, 3, 32, 40)
    x = torch.cat(_maps(checkpoint, images, (0, 1), norm=True), dim=1)  # (3, 64, 4, 5)
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    x = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    x = x * head.norm.weight[:, None, None] + head.norm.bias[:, None, None]
    expected = torch.einsum("kc,bchw->bkhw", head.conv_seg.weight[:, :, 0, 0], x) + head.conv_seg.bias[:, None, None]
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    # What the head has seen is what it uses afterwards.
    torch.testing.assert_close(head.norm.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-6)


def test_plain_linear_head_reads_the_last_layer(checkpoint: Checkpoint) -> None:
    network = _built(_small("segmenter-toy", head="linear", frozen=True, drop_path=0.0), checkpoint)
    head, images = network.decode_head, torch.randn(2, 3, 16, 24)
    (x,) = _maps(checkpoint, images, (1,), norm=True)
    expected = torch.einsum("kc,bchw->bkhw", head.conv_seg.weight[:, :, 0, 0], x)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-6)


def test_maps_of_another_size_are_resized_before_they_are_joined(checkpoint: Checkpoint) -> None:
    head = _built(_small("linear-toy", head="linear"), checkpoint).decode_head
    coarse, fine = torch.randn(1, 32, 2, 3), torch.randn(1, 32, 4, 6)
    x = torch.cat([fine, F.interpolate(coarse, (4, 6), mode="bilinear", align_corners=False)], dim=1)
    expected = F.conv2d(x, head.conv_seg.weight, head.conv_seg.bias)
    torch.testing.assert_close(head([fine, coarse]), expected)


def test_imagenet_s_head_and_its_loss(checkpoint: Checkpoint) -> None:
    """The official script's lines: a fresh LayerNorm, 1 x 1, logits at twice the map, the nearest labels there."""
    network = _built(_small("imagenet-s-toy", drop_path=0.0), checkpoint)
    head, images = network.decode_head, torch.randn(2, 3, 32, 32)
    assert head.conv_seg.weight.abs().max() < 2e-4
    nn.init.normal_(head.conv_seg.weight)
    nn.init.normal_(head.norm.weight)
    labels = torch.randint(0, CLASSES, (2, 32, 32))
    labels[:, :5] = IGNORE
    (x,) = _maps(checkpoint, images, (1,), norm=False)
    x = F.layer_norm(x.permute(0, 2, 3, 1), (32,), head.norm.weight, head.norm.bias, 1e-6).permute(0, 3, 1, 2)
    logits = F.conv2d(x, head.conv_seg.weight, head.conv_seg.bias)
    logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
    nearest = labels[:, ::4, ::4]  # 32 -> 8
    expected = F.cross_entropy(logits, nearest, ignore_index=IGNORE)
    loss = network.loss(images, [_sample(32, 32, label) for label in labels])
    assert list(loss) == ["decode.loss_ce"]
    torch.testing.assert_close(loss["decode.loss_ce"], expected, rtol=1e-4, atol=1e-5)


def test_a_fine_tuned_file_brings_its_norm(checkpoint: Checkpoint, masks: Masks) -> None:
    fc_norm = {"fc_norm.weight": torch.full((32,), 3.0), "fc_norm.bias": torch.full((32,), -1.0)}
    tuned = replace(checkpoint, extras={"classifier": {**fc_norm, "head.weight": torch.zeros(2, 32)}})
    own, fresh = (_short("imagenet-s-toy", head=head) for head in ("fc_norm+linear", "layernorm+linear"))
    for each, recipe, expected in (
        (tuned, own, (3.0, -1.0)),
        (tuned, fresh, (1.0, 0.0)),
        (checkpoint, fresh, (1.0, 0.0)),
    ):
        subject = _subject(each, masks)
        check(subject, recipe)
        network: Any = Segmentation(subject, recipe, None, "semseg@v0").network()
        norm, blocks = network.decode_head.norm, network.backbone.trunk.vit.blocks
        assert torch.equal(blocks[1].attn.qkv.weight, checkpoint.state["blocks.1.attn.qkv.weight"])
        assert (norm.weight.unique().item(), norm.bias.unique().item()) == expected
    assert "its fc_norm is not used" in semseg.run(_subject(tuned, masks), fresh).warnings[0]
    with pytest.raises(UserError, match=r"holds no fc_norm\. Expected .* fine-tuned .*semseg/imagenet-s and"):
        check(_subject(checkpoint, masks), own)
    spoiled: list[dict[str, Tensor]] = [
        {"fc_norm.weight": torch.ones(32)},
        {**fc_norm, "fc_norm.bias": torch.zeros(16)},
        {**fc_norm, "fc_norm.other": torch.zeros(1)},
    ]
    for classifier in spoiled:
        with pytest.raises(UserError, match=r"holds an fc_norm of .* of 32 numbers"):
            check(_subject(replace(checkpoint, extras={"classifier": classifier}), masks), own)


def test_upernet_is_mmsegs_with_an_auxiliary_head(checkpoint: Checkpoint) -> None:
    """Strides of 1/4, 1/2, 1 and 2 patches; the auxiliary head reads the third and weighs .4."""
    network = _built(_small("upernet-toy"), checkpoint)
    pyramid = network.extract_feat(torch.randn(2, 3, 32, 32))
    assert [tuple(each.shape) for each in pyramid] == [(2, 32, side, side) for side in (16, 8, 4, 2)]
    assert (network.decode_head.channels, network.auxiliary_head.channels) == (32, 32)  # 256 where the network is wider
    assert network.auxiliary_head.in_index == 2
    assert network.decode_head.loss_decode.loss_weight == 1
    assert network.auxiliary_head.loss_decode.loss_weight == 0.4
    loss = network.loss(torch.randn(2, 3, 32, 32), [_sample(32, 32, torch.zeros(32, 32).long())] * 2)
    assert {"decode.loss_ce", "aux.loss_ce"} <= set(loss)
    large = segmentor(RECIPES["upernet-mae"], replace(tiny_architecture(), dim=768, heads=12), 150)
    assert (large["decode_head"]["channels"], large["auxiliary_head"]["channels"]) == (768, 256)


def test_segmenter_has_one_layer_and_a_token_for_every_class(checkpoint: Checkpoint) -> None:
    head = _built(_small("segmenter-toy"), checkpoint).decode_head
    assert len(head.layers) == 1
    assert head.cls_emb.shape == (1, CLASSES, 32)
    assert head.layers[0].attn.num_heads == 2
    dropped = [module.p for module in head.layers.modules() if isinstance(module, nn.Dropout)]
    assert dropped
    assert set(dropped) <= {0.1, 0.0}


@pytest.mark.parametrize("row", list(RECIPES))
def test_every_head_ignores_what_has_no_label(row: str, checkpoint: Checkpoint) -> None:
    recipe = RECIPES[row]
    if len(recipe.layers) == 4:  # the network has two blocks
        recipe = replace(recipe, layers=(5, 5, 11, 11))
    config = segmentor(replace(recipe, drop_path=0.0), checkpoint.architecture, 2)
    for name in ("decode_head", "auxiliary_head"):
        if name in config:
            assert config[name]["ignore_index"] == IGNORE
            assert config[name]["loss_decode"]["type"] is PixelCrossEntropy
    assert config["data_preprocessor"]["seg_pad_val"] == IGNORE
    assert build(config, scope="mmseg", seed=0).decode_head.out_channels == 2  # type: ignore[union-attr]


def test_the_loss_is_the_mean_over_labeled_pixels() -> None:
    logits, labels = torch.randn(2, CLASSES, 5, 6), torch.randint(0, CLASSES, (2, 5, 6))
    labels[0, :3] = IGNORE
    expected = 0.4 * F.cross_entropy(logits.permute(0, 2, 3, 1)[labels != IGNORE], labels[labels != IGNORE])
    loss = PixelCrossEntropy(0.4)
    torch.testing.assert_close(loss(logits, labels, ignore_index=IGNORE), expected)
    other = logits.clone()
    other[0, :, :3] = torch.randn(CLASSES, 3, 6)
    assert loss(other, labels) == loss(logits, labels)
    assert loss(logits, torch.full_like(labels, IGNORE)) == 0


def test_processes_with_unequally_many_labels_weigh_as_much_as_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(2, CLASSES, 5, 6), torch.randint(0, CLASSES, (2, 5, 6))
    labels[0, :4] = IGNORE
    labeled = (labels != IGNORE).sum(dim=(1, 2)).float()
    monkeypatch.setattr(segmentors.distributed, "mean_of_all", lambda mine: torch.stack([labeled.mean(), mine[1]]))
    shares = [PixelCrossEntropy()(logits[[k]], labels[[k]]) for k in (0, 1)]  # of each process
    torch.testing.assert_close(sum(shares) / 2, F.cross_entropy(logits, labels, ignore_index=IGNORE))
    # Another process's loss is not finite: this one's is not either, so that all stop together.
    for other in (math.inf, math.nan):
        monkeypatch.setattr(segmentors.distributed, "mean_of_all", lambda mine, other=other: mine + other)
        assert not PixelCrossEntropy()(logits, labels).isfinite()


def test_a_frozen_network_gets_no_gradient_and_stays(checkpoint: Checkpoint) -> None:
    network = _built(_small("linear-toy"), checkpoint).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))
    before = [parameter.clone() for parameter in network.backbone.parameters()]
    groups = parameter_groups(network, lr=1.0, weight_decay=0.0)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in network.decode_head.parameters()}
    loss = network.loss(images, [_sample(32, 32, label) for label in labels])["decode.loss_ce"]
    loss.backward()
    torch.optim.AdamW(groups).step()
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, network.backbone.parameters(), strict=True))
    assert not network.backbone.training
    assert isinstance(network.backbone, Network)


# --- inference ---


def test_windows_are_averaged(checkpoint: Checkpoint) -> None:
    """44 x 62 px, padded to 48 x 64; windows of 32 every 24 px, the last ones pushed back to the border."""
    network = _built(_small("linear-toy"), checkpoint).eval()
    nn.init.normal_(network.decode_head.conv_seg.weight)
    pixels = torch.randint(0, 256, (3, 44, 62), dtype=torch.uint8)  # BGR
    with torch.no_grad():
        (sample,) = network.test_step({"inputs": [pixels], "data_samples": [_sample(44, 62)]})
        mean, std = (torch.tensor(v)[:, None, None] for v in (tiny_architecture().mean, tiny_architecture().std))
        images = F.pad((pixels.flip(0) / 255 - mean) / std, (0, 2, 0, 4))[None]
        total, times = torch.zeros(1, CLASSES, 48, 64), torch.zeros(48, 64)
        for top in (0, 16):
            for left in (0, 24, 32):
                window = network(images[:, :, top : top + 32, left : left + 32])
                window = F.interpolate(window, (32, 32), mode="bilinear", align_corners=False)
                total[:, :, top : top + 32, left : left + 32] += window
                times[top : top + 32, left : left + 32] += 1
        expected = (total / times)[:, :, :44, :62].argmax(dim=1)
    assert (sample.pred_sem_seg.data == expected).float().mean() > 0.999  # ties apart
    assert len(expected.unique()) > 1


def test_whole_images_are_padded_and_cut_and_brought_to_the_size_of_the_mask(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    enlarged: list[tuple[int, ...]] = []

    def spy(logits: Tensor, *where: Any) -> Tensor:
        enlarged.append(tuple(logits.shape))
        return enlarged_argmax(logits, *where)

    monkeypatch.setattr(segmentors, "enlarged_argmax", spy)
    network = _built(_small("linear-toy", stride_px=None), checkpoint, 20).eval()
    nn.init.normal_(network.decode_head.conv_seg.weight)
    pixels = torch.randint(0, 256, (3, 22, 30), dtype=torch.uint8)
    with torch.no_grad():
        (sample,) = network.test_step({"inputs": [pixels], "data_samples": [_sample(33, 45)]})
        mean, std = (torch.tensor(v)[:, None, None] for v in (tiny_architecture().mean, tiny_architecture().std))
        images = F.pad((pixels.flip(0) / 255 - mean) / std, (0, 2, 0, 2))[None]
        logits = network(images)[0]
    # The map is interpolated once, to the size of the mask, pixel by pixel; what was padded lies below and right.
    assert enlarged == [(20, 3, 4)]
    expected = torch.zeros(33, 45, dtype=torch.int64)
    for row in range(33):
        for column in range(45):
            y, x = (row + 0.5) * 22 / 33 / 8 - 0.5, (column + 0.5) * 30 / 45 / 8 - 0.5
            y, x = min(max(y, 0.0), 2.0), min(max(x, 0.0), 3.0)
            top, left = int(y), int(x)
            down, right = min(top + 1, 2), min(left + 1, 3)
            upper = logits[:, top, left] * (1 - x + left) + logits[:, top, right] * (x - left)
            lower = logits[:, down, left] * (1 - x + left) + logits[:, down, right] * (x - left)
            expected[row, column] = (upper * (1 - y + top) + lower * (y - top)).argmax()
    assert (sample.pred_sem_seg.data[0] == expected).float().mean() > 0.999
    assert len(expected.unique()) > 1


@pytest.mark.parametrize("at_once", [1, 40 * 50 * 3, 2**26])
def test_argmax_in_parts_is_argmax(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentors, "_AT_ONCE", at_once)
    logits = torch.randn(7, 5, 6) - 100
    expected = F.interpolate(logits[None], (40, 50), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    torch.testing.assert_close(enlarged_argmax(logits, (40, 50), (5.0, 6.0)), expected)


def test_no_pixel_is_lost_to_rounding() -> None:
    """Of every size there are enough pixels, also where the covered part of the map is no whole number of cells."""
    logits = torch.randn(2, 64, 1)
    assert int(49 * (1 / 49)) == 0  # 0.9999...
    for shown in range(1, 1025, 8):
        for stored in (1, 97, 375):
            assert enlarged_argmax(logits, (stored, 3), (shown / 16, 0.7)).shape == (stored, 3)
            assert enlarged_argmax(logits, (stored, 3), (1 + shown // 17, 0.7)).shape == (stored, 3)


def test_maps_of_one_patch_are_segmented_too(checkpoint: Checkpoint) -> None:
    """UPerNet's coarsest map is half as high as one patch."""
    network = _built(_small("upernet-toy"), checkpoint).eval()
    pixels = torch.randint(0, 256, (3, 8, 200), dtype=torch.uint8)
    with torch.no_grad():
        (sample,) = network.test_step({"inputs": [pixels], "data_samples": [_sample(8, 200)]})
    assert sample.pred_sem_seg.data.shape == (1, 8, 200)


# --- splits ---


def test_few_images_are_those_of_french_et_al(masks: Masks) -> None:
    train = masks.splits["train"]
    for number, (subset, seed) in enumerate(
        zip(subsets(train, 3, splits=3, lists=None), (12345, 23456, 34567), strict=True)
    ):
        names = sorted(train.sample_ids)
        expected = {names[row] for row in np.random.RandomState(seed).permutation(len(names))[:3]}
        assert {train.sample_ids[row] for row in subset.rows} == expected, number
        assert str(seed) in subset.origin
    assert {*subsets(train, 2, splits=1, lists=None)[0].rows} < {*subsets(train, 3, splits=1, lists=None)[0].rows}
    with pytest.raises(UserError, match="the training split has 8 images"):
        subsets(train, 9, splits=1, lists=None)


def test_lists_of_images(masks: Masks, tmp_path: Path) -> None:
    train = masks.splits["train"]
    (tmp_path / "2_1.txt").write_text("images/train/b.png masks/train/b.png\nd\n\n")
    (found,) = subsets(train, 2, splits=1, lists=str(tmp_path))
    assert [train.sample_ids[row] for row in found.rows] == ["b.png", "d.png"]
    assert found.origin == "list 2_1.txt"
    (tmp_path / "1_30/split_1").mkdir(parents=True)
    (tmp_path / "100_1.txt").write_text("a\n")
    (tmp_path / "1_30/split_1/labeled.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"100_1\.txt names 1 images, and train_images=100 is wanted"):
        subsets(_many(train, 100), 100, splits=2, lists=str(tmp_path))
    (tmp_path / "100_1.txt").unlink()
    with pytest.raises(
        UserError, match=r"Expected 100_1\.txt or 100/split_0/labeled\.txt or 1_30/split_0/labeled\.txt"
    ):
        subsets(_many(train, 100), 100, splits=1, lists=str(tmp_path))
    (tmp_path / "2_1.txt").write_text("a\nz\n")
    with pytest.raises(UserError, match=r"1 of the 2 images in .* are not in the training split: z"):
        subsets(train, 2, splits=1, lists=str(tmp_path))
    with pytest.raises(UserError, match="there is no such folder"):
        subsets(train, 2, splits=1, lists=str(tmp_path / "nowhere"))


def _many(train: Any, count: int) -> Any:
    names = [*train.sample_ids, *(f"x{k}.png" for k in range(count))]
    return replace(train, sample_ids=names, labels=np.zeros(len(names), np.int64))


def test_cityscapes_names_are_found_without_their_ending(masks: Masks, tmp_path: Path) -> None:
    train = replace(masks.splits["train"], sample_ids=[f"ulm/ulm_{k}_leftImg8bit.png" for k in range(8)])
    (tmp_path / "2_1.txt").write_text("ulm_3\nleftImg8bit/train/ulm/ulm_5_leftImg8bit.png gtFine/x.png\n")
    assert subsets(train, 2, splits=1, lists=str(tmp_path))[0].rows.tolist() == [3, 5]


# --- runs ---


@pytest.fixture
def masks(tmp_path: Path) -> Masks:
    """Eight and three images of 24 x 40 px with rectangles of two kinds: bright, and striped."""
    return replace(open_masks(str(_world(tmp_path / "world"))), scale_px=(40, 24))


def _world(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, names in (("train", "abcdefgh"), ("val", "xyz")):
        for name in names:
            pixels, labels = rng.integers(0, 60, (24, 40, 3)).astype(np.uint8), np.zeros((24, 40), np.uint8)
            top, left = rng.integers(0, 10), rng.integers(2, 8)
            pixels[top : top + 12, left : left + 12], labels[top : top + 12, left : left + 12] = 220, 1
            pixels[top : top + 12 : 2, left + 16 : left + 28] = 200
            labels[top : top + 12, left + 16 : left + 28] = 2
            labels[:, :2] = 255
            for folder, values in (("images", pixels), ("masks", labels)):
                place = root / folder / split
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(place / f"{name}.png")
    (root / "classes.txt").write_text("ground\nbright\nstriped\n")
    return root


def _subject(checkpoint: Checkpoint, masks: Masks, *, seed: int = 0, **effort: Any) -> Subject:
    return Subject(checkpoint, masks, Effort(**{"workers": 0, **effort}), seed)


def _short(row: str, **changes: Any) -> Recipe:
    recipe = RECIPES[row]
    layers = (5, 5, 11, 11) if len(recipe.layers) == 4 else recipe.layers
    few = {"train_images": 5, "splits": 2} if recipe.train_images else {}
    sizes = {"crop_px": 32, "stride_px": None if recipe.stride_px is None else 32}
    return replace(recipe, **{"layers": layers, "iterations": 3, "batch": 4, **sizes, **few, **changes})


@pytest.mark.parametrize("row", TOYS)
def test_toy_rows_run(row: str, checkpoint: Checkpoint, masks: Masks, capfd: pytest.CaptureFixture[str]) -> None:
    recipe, subject = _short(row), _subject(checkpoint, masks)
    check(subject, recipe)
    scores = semseg.run(subject, recipe)
    assert set(scores.metrics) == {"miou", "macc", "aacc"}
    assert all(0 <= score.value <= 100 for score in scores.metrics.values())
    assert list(scores.details["classes"]) == ["ground", "bright", "striped"]  # type: ignore[call-overload]
    assert scores.evaluated == {"train": _used(recipe, masks), "val": 3}
    assert scores.skipped == {"train": 0, "val": 0}
    config = json.loads(scores.files["mm_config.json"])
    assert config["model"]["backbone"]["type"].endswith("network.Network")
    assert config["schedule"]["steps"] == 3
    assert (config["seed"], config["dtype"], config["scale_px"], config["parts"]) == (0, "fp32", [40, 24], 1)
    assert config["best_every_steps"] is None
    sgd = recipe.optimizer == "sgd"
    own = {"momentum": 0.9, "nesterov": True} if sgd else {"betas": [0.9, 0.999]}
    assert config["optimizer"].items() >= own.items()
    chosen = [8] if recipe.train_images is None else [list(map(str, part)) for part in _names(recipe, masks)]
    assert config["splits"] == [{"train": each, "val": 3} for each in chosen]
    assert scores.details["parts"] == 1
    json.dumps(scores.details)
    assert capfd.readouterr().out == ""
    main = scores.metrics["miou"]
    assert (main.std is None, main.stderr is None) == ((False, True) if recipe.splits > 1 else (True, False))
    assert main.n == (2 if recipe.splits > 1 else 3)


def _names(recipe: Recipe, masks: Masks) -> list[list[str]]:
    train = masks.splits["train"]
    assert recipe.train_images is not None
    found = subsets(train, recipe.train_images, splits=recipe.splits, lists=None)
    return [[train.sample_ids[row] for row in subset.rows] for subset in found]


def _used(recipe: Recipe, masks: Masks) -> int:
    if recipe.train_images is None:
        return 8
    found = subsets(masks.splits["train"], recipe.train_images, splits=recipe.splits, lists=None)
    return len({int(row) for subset in found for row in subset.rows})


def test_it_learns(checkpoint: Checkpoint, masks: Masks) -> None:
    """The head of a frozen random network tells bright from striped; the same command twice gives the same."""
    recipe = _short("linear-toy", iterations=40, lrs=(0.02,))
    scores, again = (semseg.run(_subject(checkpoint, masks), recipe) for _ in range(2))
    assert scores.metrics["miou"].value > 40  # the ground alone: 24
    assert scores.metrics == again.metrics
    assert scores.metrics != semseg.run(_subject(checkpoint, masks, seed=1), recipe).metrics
    classes: Any = scores.details["classes"]
    assert np.mean([each["iou"] for each in classes.values()]) == pytest.approx(scores.metrics["miou"].value)


def test_the_learning_rate_is_searched_on_the_first_split(
    checkpoint: Checkpoint, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []

    def run(self: Segmentation, lr: float) -> dict[str, Any]:
        assert self.part is not None
        asked.append((self.part.origin, lr))
        main = {0.1: 40.0, 0.2: 60.0, 0.3: 50.0}[lr] + (3 * len(asked) if len(asked) > 3 else 0)
        classes = [10.0, None, float(len(asked))]
        return {"main": main, "stderr": 1.0, "macc": 1.0, "aacc": 2.0, "iou": classes, "accuracy": classes, "step": 9}

    monkeypatch.setattr(Segmentation, "run", run)
    recipe = _short("segmenter-toy", lrs=(0.1, 0.2, 0.3), splits=3)
    scores = semseg.run(_subject(checkpoint, masks), recipe)
    first, second, third = (f"drawn by French et al.'s seed {seed}" for seed in (12345, 23456, 34567))
    assert asked == [(first, 0.1), (first, 0.2), (first, 0.3), (second, 0.2), (third, 0.2)]
    values = [60.0, 72.0, 75.0]
    score = scores.metrics["miou"]
    assert (score.value, score.n, score.std) == (pytest.approx(69.0), 3, pytest.approx(np.std(values, ddof=1)))
    details: Any = scores.details
    assert (details["lr"], details["absent_classes"]) == (0.2, 1)
    assert details["tried"] == [{"lr": 0.1, "miou": 40.0}, {"lr": 0.2, "miou": 60.0}, {"lr": 0.3, "miou": 50.0}]
    assert [split["miou"] for split in details["splits"]] == values
    assert details["splits"][0] == {"images": 5, "origin": first, "steps": 3, "miou": 60.0, "of_step": 9}
    assert details["classes"]["bright"] == {"iou": None, "accuracy": None}
    assert details["classes"]["striped"]["iou"] == pytest.approx((2 + 4 + 5) / 3)
    assert not scores.warnings
    asked.clear()
    scores = semseg.run(_subject(checkpoint, masks), replace(recipe, lrs=(0.1, 0.2), splits=1))
    assert "0.2, is at the end of those tried" in scores.warnings[0]


def test_a_learning_rate_that_diverges_is_left_out(
    checkpoint: Checkpoint, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, forgotten = {0.1, 0.2}, []

    def run(self: Segmentation, lr: float) -> dict[str, Any]:
        if lr not in alive or (self.part is not None and "23456" in self.part.origin and 0.2 not in alive):
            raise Diverged("the loss is nan.")
        classes = [1.0] * 3
        return {"main": lr, "stderr": 1.0, "macc": 1.0, "aacc": 2.0, "iou": classes, "accuracy": classes, "step": 9}

    monkeypatch.setattr(Segmentation, "run", run)
    monkeypatch.setattr(Segmentation, "forget", lambda self, lr: forgotten.append(lr))
    recipe = _short("segmenter-toy", lrs=(0.1, 0.2, 0.3), splits=2)
    scores = semseg.run(_subject(checkpoint, masks), recipe)
    details: Any = scores.details
    assert details["tried"] == [{"lr": 0.1, "miou": 0.1}, {"lr": 0.2, "miou": 0.2}, {"lr": 0.3, "miou": None}]
    assert details["lr"] == 0.2
    assert scores.warnings == ("the loss at learning rate 0.3 was no longer finite",)
    assert forgotten == [0.1, 0.2, 0.3] * 2
    alive.remove(0.2)
    with pytest.raises(UserError, match=r"nan\. With lrs=0\.1, the best on the first split, another one diverged"):
        semseg.run(_subject(checkpoint, masks), recipe)
    alive.clear()
    with pytest.raises(UserError, match=r"the loss is nan\. The learning rates are set as --set lrs=0\.01"):
        semseg.run(_subject(checkpoint, masks), recipe)


def test_a_loss_that_is_infinite_diverges(checkpoint: Checkpoint, masks: Masks) -> None:
    recipe = _short("linear-toy", optimizer="sgd", lrs=(0.01, 1000.0), iterations=8, layer_decay=1.0)
    recipe = replace(recipe, head="mask", layers=(11,), frozen=False)
    details: Any = semseg.run(_subject(checkpoint, masks), recipe).details
    assert details["lr"] == 0.01
    assert details["tried"][1]["miou"] is None
    assert not list(cache_folder().glob("training/*"))


def test_broken_training_images_that_were_replaced_are_told(
    checkpoint: Checkpoint, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    (masks.root / "images/train/b.png").write_bytes(b"no image")
    subject = _subject(checkpoint, masks, skip_broken=True)
    scores = semseg.run(subject, _short("linear-toy"))
    assert scores.warnings == ("1 broken training images were replaced, each by the next one of the split",)


@pytest.mark.parametrize(("row", "warned"), [("linear-toy", True), ("imagenet-s-toy", False)])
def test_batchnorm_that_is_not_synchronized_is_told(
    row: str, warned: bool, checkpoint: Checkpoint, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Segmentation(_subject(checkpoint, masks), _short(row), None, "semseg@v0")
    assert not segmentation_search._warnings([training], {0.1: {"main": 1.0}}, 0.1)
    monkeypatch.setattr(segmentation_search.distributed, "world_size", lambda: 2)
    found = segmentation_search._warnings([training], {0.1: {"main": 1.0}}, 0.1)
    assert ["BatchNorm was not synchronized" in each for each in found] == [True] * warned
    training.subject.effort = replace(training.subject.effort, device="cuda:0")
    assert not segmentation_search._warnings([training], {0.1: {"main": 1.0}}, 0.1)


def test_the_best_on_val_or_the_end(checkpoint: Checkpoint, masks: Masks, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train(network: nn.Module, course: Any, *rest: Any, **others: Any) -> History:
        seen.append((course, others))
        return History([2, 4, 6], [{"main": 1.0}, {"main": 3.0}, {"main": 2.0}], [1], [0, 3])

    monkeypatch.setattr(segmentation, "train", train)
    subject = _subject(checkpoint, masks)
    every = {"epochs": 3, "iterations": None, "warmup": 1, "best_every": 1, "train_images": None, "splits": 1}
    recipe = _short("segmenter-toy", optimizer="sgd", **every)
    one = Segmentation(subject, recipe, None, "semseg@v0")
    assert one.run(0.03) == {"main": 3.0, "step": 4}
    assert (one.skipped, one.replaced) == (1, {0, 3})
    assert (seen[0][0].steps, seen[0][0].evaluate_every, one.steps) == (6, 2, 6)
    optimizer = seen[0][1]["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)
    assert seen[0][1]["lr_factor"](2) == recipe.lr_factor(0.03, 8)(2)
    ended = Segmentation(subject, replace(recipe, best_every=None), None, "semseg@v0")
    assert ended.run(0.03) == {"main": 2.0, "step": 6}
    assert seen[1][0].evaluate_every is None
    assert seen[0][0].identity != seen[1][0].identity
    other = Segmentation(subject, recipe, subsets(masks.splits["train"], 4, splits=1, lists=None)[0], "semseg@v0")
    assert (other.course(0.1).identity, other.images) != (one.course(0.1).identity, one.images)
    assert one.course(0.1).identity != one.course(0.2).identity
    other.run(0.03)
    assert other.part is not None
    assert other.replaced == {int(other.part.rows[0]), int(other.part.rows[3])}
    larger = Segmentation(_subject(checkpoint, replace(masks, scale_px=(80, 48))), recipe, None, "semseg@v0")
    assert larger.course(0.1).identity != one.course(0.1).identity
    assert (one.parts, Segmentation(_subject(checkpoint, masks, batch_size=2), recipe, None, "").parts) == (1, 2)


def test_layer_decay_and_drop_path_reach_the_network(checkpoint: Checkpoint, masks: Masks) -> None:
    one: Any = Segmentation(_subject(checkpoint, masks), _short("upernet-toy", drop_path=0.1), None, "semseg@v0")
    rates = [block.drop_path1.drop_prob for block in one.network().backbone.trunk.vit.blocks[1:]]
    assert rates == pytest.approx([0.1])
    groups = parameter_groups(one.network(), lr=1.0, weight_decay=0.05, layer_decay=0.65)
    by_name = {group["name"]: group["lr"] for group in groups}
    assert by_name["top, decayed"] == 1
    assert by_name["input, decayed"] == pytest.approx(0.65**3)


# --- what is refused ---


@pytest.mark.parametrize(
    ("row", "settings", "effort", "said"),
    [
        ("linear-toy", {"crop_px": "36"}, {}, "does not divide into patches of 8 px"),
        ("linear-toy", {"batch": "9"}, {}, "batch"),
        ("upernet-toy", {"batch": "1"}, {}, "UPerNet's BatchNorm"),
        ("upernet-toy", {}, {"batch_size": 1}, "--batch-size of two or more"),
        ("linear-toy", {}, {"dtype": "fp16"}, "fp16 trains on CUDA only"),
        ("segmenter-toy", {"train_images": "9"}, {}, "the training split has 8 images"),
        ("segmenter-toy", {"train_images": "3"}, {}, "batch"),
        ("segmenter-toy", {"lists": "/nowhere"}, {}, "there is no such folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(
    row: str, settings: dict[str, str], effort: dict[str, Any], said: str, checkpoint: Checkpoint, masks: Masks
) -> None:
    recipe = with_settings(_short(row), settings)
    with pytest.raises(UserError, match=re.escape(said)):
        check(_subject(checkpoint, masks, **effort), recipe)


def test_networks_that_do_not_fit_are_refused(
    checkpoint: Checkpoint, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = replace(checkpoint, architecture=replace(checkpoint.architecture, final_norm=False))
    with pytest.raises(UserError, match=r"holds no final norm.*--set norm=false"):
        check(_subject(bare, masks), _short("linear-toy"))
    check(_subject(bare, masks), _short("linear-toy", norm=False))
    with pytest.raises(UserError, match="pixels: has no network"):
        check(_subject(open_checkpoint("pixels:"), masks), _short("linear-toy"))
    with pytest.raises(UserError, match="has one class, ground"):
        check(_subject(checkpoint, replace(masks, classes=("ground",))), _short("linear-toy"))
    no_train = replace(masks, splits={"val": masks.splits["val"]})
    with pytest.raises(UserError, match="no train split"):
        check(_subject(checkpoint, no_train), _short("linear-toy"))

    def missing() -> None:
        raise UserError("mmseg is missing")

    monkeypatch.setattr(packages, "installed", missing)
    with pytest.raises(UserError, match="mmseg is missing"):
        check(_subject(checkpoint, masks), _short("linear-toy"))


def test_lists_are_part_of_the_identity(checkpoint: Checkpoint, masks: Masks, tmp_path: Path) -> None:
    subject, recipe = _subject(checkpoint, masks), _short("segmenter-toy", splits=1)
    assert semseg.data_used(subject, recipe) == {}
    apart = replace(subject, effort=replace(subject.effort, batch_size=1))  # its numbers are other ones
    parts = {"batch_parts": str(recipe.batch)}
    assert semseg.data_used(apart, recipe) == parts
    found = []
    for names in ("abcde", "abcdf"):
        (tmp_path / "5_1.txt").write_text("\n".join(names))
        found.append(semseg.data_used(subject, replace(recipe, lists=str(tmp_path))))
        assert semseg.data_used(apart, replace(recipe, lists=str(tmp_path))) == parts | found[-1]
    assert found[0] != found[1]
    assert re.fullmatch(r"listed [0-9a-f]{8}", found[0]["train_images"])


def _fill(root: Path, split: str, value: int) -> None:
    for path in (root / "masks" / split).iterdir():
        Image.new("L", (40, 24), value).save(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: Image.new("L", (40, 24), 7).save(root / "masks/val/y.png"), "y.png holds values"),
        (lambda root: (root / "masks/val/y.png").write_bytes(b"no image"), "y.png.*--skip-broken"),
        (lambda root: (root / "images/val/y.png").write_bytes(b"no image"), "y.png.*--skip-broken"),
        (lambda root: _fill(root, "val", 255), "no pixel of val has a label"),
        (lambda root: _fill(root, "train", 255), "no pixel of the training images has a label"),
    ],
)
def test_masks_are_read_before_anything_is_trained(
    spoil: Callable[[Path], None], said: str, checkpoint: Checkpoint, masks: Masks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*given: Any, **others: Any) -> History:
        raise AssertionError("trained before val was read")

    monkeypatch.setattr(segmentation, "train", train)
    spoil(masks.root)
    with pytest.raises(UserError, match=said):
        semseg.run(_subject(checkpoint, masks), _short("linear-toy"))


def test_one_label_is_enough_and_broken_images_may_be_skipped(masks: Masks) -> None:
    _fill(masks.root, "train", 255)
    Image.new("L", (40, 24), 1).save(masks.root / "masks/train/b.png")  # not in a sample of four of eight
    (masks.root / "images/val/x.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_reading, "_SAMPLE", 4)
        mask_reading.read_before_training(masks, [masks], skip_broken=True)
    for name in "yz":
        (masks.root / f"images/val/{name}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no pixel of val has a label"):
        mask_reading.read_before_training(masks, [masks], skip_broken=True)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: Image.new("L", (40, 24), 7).save(root / "masks/train/a.png"), "a.png"),
        (lambda root: Image.new("L", (41, 24), 0).save(root / "masks/val/x.png"), "x.png"),
        (lambda root: (root / "masks/train/c.png").unlink(), "masks/train: c"),
    ],
)
def test_broken_data_name_the_file(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    root = _world(tmp_path / "world")
    spoil(root)
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    with pytest.raises(UserError, match=said):
        _run(tmp_path, root)
    assert not list((tmp_path / "results").rglob("*.json"))


_SETTINGS = {
    **{"iterations": 6, "lrs": 0.03, "batch": 4, "layers": "5,11", "head": "linear", "augmentation": "resized-crop"},
    **{"crop_px": 32, "stride_px": "none", "resize_px": 24},
}


def _run(tmp_path: Path, root: Path, **options: Any) -> Any:
    settings = {name: str(value) for name, value in _SETTINGS.items()}
    return ssl_bench.run(
        str(tmp_path / "tiny.pt"), "semseg/linear-toy", dataset=str(root), settings=settings, workers=0, **options
    )


def test_a_record_with_its_config(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    (record,) = _run(tmp_path, _world(tmp_path / "world"))
    (config,) = (tmp_path / "results").rglob("mm_config.json")
    assert config.parent.name.startswith("semseg-linear-toy@v1")
    assert json.loads(config.read_text())["classes"] == ["ground", "bright", "striped"]
    assert record.n_samples.evaluated == {"train": 8, "val": 3}
    assert record.main_metric == "miou"


def test_a_search_prints_its_record_and_nothing_else(tmp_path: Path) -> None:
    """In a process of its own: mmengine's loggers are made once in each."""
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    settings = _SETTINGS | {"lrs": "0.01,0.03", "augmentation": "scale", "iterations": 2}
    command = [sys.executable, "-m", "ssl_bench.cli", "run", "--ckpt", str(tmp_path / "tiny.pt"), "--json"]
    command += ["--protocol", "semseg/linear-toy", "--dataset", str(_world(tmp_path / "world")), "--workers", "0"]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    json.loads(found.stdout)


def test_two_processes_give_the_metrics_of_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    root = _world(tmp_path / "world")
    (one,) = _run(tmp_path, root, results=tmp_path / "one")
    settings = [part for name, value in _SETTINGS.items() for part in ("--set", f"{name}={value}")]
    run_together(
        [
            *("--ckpt", str(tmp_path / "tiny.pt"), "--protocol", "semseg/linear-toy", "--dataset", str(root)),
            *("--workers", "0", *settings),
        ]
    )
    (path,) = (path for path in (tmp_path / "results").rglob("*.json") if "mm_config" not in path.name)
    two = json.loads(path.read_text())
    assert two["n_samples"]["evaluated"] == {"train": 8, "val": 3}
    for name, score in one.scores.items():
        assert two["scores"][name]["value"] == pytest.approx(score.value, abs=1e-9)
    assert two["details"]["classes"] == one.details["classes"]
