"""Detection: recipes against their sources, detectors that learn, data that are refused, records."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_coco import annotation, hand_written, write

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import parse_name
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.subject import Subject
from ssl_bench.evaluate.toy_coco import write_coco
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.seeds import seeded
from ssl_bench.protocols import detection
from ssl_bench.protocols.detection import RECIPES, check, lr_factor, run
from ssl_bench.protocols.openmm import packages

packages.require()

from ssl_bench.protocols.openmm import detectors, runner  # noqa: E402
from ssl_bench.protocols.openmm.coco_ap import CocoAP  # noqa: E402
from ssl_bench.protocols.openmm.network import Network, WindowedNetwork, parameter_groups  # noqa: E402
from ssl_bench.protocols.openmm.runner import build, quiet, validate  # noqa: E402

TINY = "random:vit_32x2x2_patch8_16"
SMALL = {"channels": 16, "hidden": 32, "proposals": 40, "rois": 16, "convs": 1, "shorter_px": (64,), "longer_px": 64}


def small(row="maskrcnn-toy", **changes):
    return dataclasses.replace(RECIPES[row], **SMALL, **changes)


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_coco(folder, train=6, val=4)
    return folder


def subject(root, spec=TINY, **effort) -> Subject:
    return Subject(open_checkpoint(spec), open_coco(str(root)), Effort(**{"workers": 0} | effort))


# fmt: off
# What the sources say, typed again: SdAE A.1, ExtreMA 5.3, MOCA A.5, TEC B.1 and C, and the configs of iBOT, CAE
# and ViTDet. Columns: stages, blocks, window, lr, weight decay, layer decay, drop path, batch, epochs, drops, warm-up.
FPN4 = (3, 5, 7, 11)
SETTINGS = {
    "maskrcnn-sdae":      (1, FPN4,   0, 3e-4, .05, .75, .2, 32,  12, (9, 11), 500),
    "maskrcnn-extrema":   (1, FPN4,   0, 3e-4, .05, .75, .2, 32,  12, (9, 11), 500),
    "cascade-moca":       (3, FPN4,   0, 2e-4, .05, .75, .2, 16,  12, (8, 11), 500),
    "cascade-ibot":       (3, FPN4,   0, 1e-4, .05, .75, .2, 16,  12, (8, 11), 500),
    "cascade-tec-ibot":   (3, FPN4,   0, 1e-4, .05, .75, .2, 16,  12, (8, 11), 500),
    "cascade-tec-vitdet": (3, (11,), 14, 1e-4, .10, .70, .1, 64, 100, (88.889, 96.296), 250),
}
PUBLISHED = {
    "maskrcnn-sdae": ("48.9", "43.0"), "maskrcnn-extrema": ("47.5", "42.0"), "cascade-moca": ("50.5", "43.6"),
    "cascade-ibot": ("51.2", "44.2"), "cascade-tec-ibot": ("52.7", "45.4"), "cascade-tec-vitdet": ("54.4", "47.1"),
}
# fmt: on
CITED = list(SETTINGS)


@pytest.mark.parametrize("row", CITED)
def test_rows_are_those_of_their_sources(row):
    recipe = RECIPES[row]
    stages, blocks, window, lr, weight_decay, layer_decay, drop_path, batch, epochs, drops, warmup = SETTINGS[row]
    assert (recipe.stages, recipe.blocks, recipe.window) == (stages, blocks, window)
    assert (recipe.lr, recipe.weight_decay, recipe.layer_decay) == (lr, weight_decay, layer_decay)
    assert (recipe.drop_path, recipe.batch, recipe.epochs) == (drop_path, batch, epochs)
    assert recipe.drop_epochs == pytest.approx(drops, abs=1e-3)
    assert recipe.warmup_steps == warmup
    assert all(number in recipe.published for number in PUBLISHED[row])
    assert (recipe.channels, recipe.hidden, recipe.convs, recipe.rois) == (256, 1024, 4, 512)
    assert recipe.candidates == 2000
    assert recipe.selected_on == "none"
    if row == "cascade-tec-vitdet":
        assert (recipe.augmentation, recipe.shorter_px, recipe.longer_px) == ("jitter", (1024,), 1024)
        assert (recipe.norm, recipe.rpn_convs, recipe.box_loss, recipe.class_boxes) == ("layer", 2, "l1", False)
        assert (recipe.rpn_beta, recipe.border_px, recipe.proposals) == (0, -1, 1000)
        assert recipe.positions == "trained"
    else:
        assert recipe.shorter_px == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
        assert (recipe.augmentation, recipe.longer_px) == ("multi-scale-crop", 1333)
        assert (recipe.norm, recipe.rpn_convs, recipe.box_loss, recipe.class_boxes) == ("batch", 1, "giou", True)
        assert recipe.proposals == 2000
        cae = recipe.stages == 1
        assert (recipe.rpn_beta, recipe.border_px) == ((0, -1) if cae else (1 / 9, 0))
        assert recipe.positions == ("fixed" if cae else "trained")
        assert recipe.stage_weights == ((1,) if cae else (1, 0.5, 0.25))


def test_the_first_row_is_sdaes_and_the_first_toy_row_mask_rcnn():
    assert next(iter(RECIPES)) == "maskrcnn-sdae"
    assert [row for row in RECIPES if row.endswith("-toy")] == ["maskrcnn-toy", "cascade-toy", "vitdet-toy"]
    assert list(RECIPES) == [*CITED, "maskrcnn-toy", "cascade-toy", "vitdet-toy"]


def test_learning_rates_are_those_of_mmcv():
    """Step by step, as LrUpdaterHook goes; 7,328 steps an epoch, COCO's."""
    factor = lr_factor(RECIPES["cascade-ibot"], 7328)
    for step in (0, 1, 250, 499, 500, 7328 * 8 - 1, 7328 * 8, 7328 * 11 - 1, 7328 * 11, 7328 * 12 - 1):
        epoch, expected = step // 7328, 1.0
        for drop in (8, 11):
            expected *= 0.1 if epoch >= drop else 1.0
        if step < 500:
            expected *= 1 - (1 - step / 500) * (1 - 0.001)
        assert factor(step) == pytest.approx(expected, rel=1e-12)
    vitdet = lr_factor(RECIPES["cascade-tec-vitdet"], 1844)  # 184,375 of 118,000 images
    changes = [step for step in range(150_000, 184_376) if vitdet(step) != vitdet(step - 1)]
    assert changes == pytest.approx([163_889, 177_546], abs=30)
    assert vitdet(0) == pytest.approx(0.001)
    assert vitdet(125) == pytest.approx(0.5005)
    assert vitdet(250) == 1
    assert vitdet(180_000) == pytest.approx(0.01)


@pytest.mark.parametrize(("patch", "strides"), [(16, [4, 8, 16, 32, 64]), (8, [2, 4, 8, 16, 32])])
@pytest.mark.parametrize("row", CITED)
def test_detectors_are_those_of_the_configs(row, patch, strides):
    recipe, architecture = RECIPES[row], parse_name(f"vit_48x24x2_patch{patch}_{4 * patch}")
    model = detectors.detector(recipe, architecture, 7)
    rois = model["roi_head"]
    assert model["rpn_head"]["anchor_generator"]["strides"] == strides
    assert model["rpn_head"]["num_convs"] == (2 if "vitdet" in row else 1)
    for name, size in (("bbox_roi_extractor", 7), ("mask_roi_extractor", 14)):
        assert rois[name]["featmap_strides"] == strides[:4]
        assert rois[name]["finest_scale"] == 14 * strides[0]
        layer = {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0, "use_torchvision": True}
        assert rois[name]["roi_layer"] == layer
    boxes = rois["bbox_head"] if recipe.stages > 1 else [rois["bbox_head"]]
    rcnn = model["train_cfg"]["rcnn"] if recipe.stages > 1 else [model["train_cfg"]["rcnn"]]
    stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    assert len(boxes) == len(rcnn) == recipe.stages
    for stage, (head, training) in enumerate(zip(boxes, rcnn, strict=True)):
        assert (head["num_classes"], head["num_shared_convs"], head["num_shared_fcs"]) == (7, 4, 1)
        assert head["bbox_coder"]["target_stds"] == stds[stage]
        assert training["assigner"]["pos_iou_thr"] == training["assigner"]["neg_iou_thr"] == (0.5, 0.6, 0.7)[stage]
        assert training["assigner"]["match_low_quality"] is (recipe.stages == 1)
        assert (training["sampler"]["num"], training["sampler"]["pos_fraction"]) == (512, 0.25)
        loss = ("L1Loss", 1.0, False) if "vitdet" in row else ("GIoULoss", 10.0, True)
        assert (head["loss_bbox"]["type"].__name__, head["loss_bbox"]["loss_weight"], head["reg_decoded_bbox"]) == loss
        norm = head["norm_cfg"]["type"]
        assert norm == "SyncBN" if "vitdet" not in row else norm.__name__ == "LayerNorm2d"
    mask_norm = rois["mask_head"]["norm_cfg"]
    assert mask_norm is None if "vitdet" not in row else mask_norm["eps"] == 1e-6
    assert (rois["mask_head"]["num_classes"], rois["mask_head"]["num_convs"]) == (7, 4)
    found = model["train_cfg"]["rpn_proposal"], model["test_cfg"]["rpn"]
    assert [each["nms_pre"] for each in found] == [2000, 1000]
    assert [each["max_per_img"] for each in found] == [1000 if "vitdet" in row else 2000, 1000]
    assert [each["nms"] for each in found] == [{"type": "nms", "iou_threshold": 0.7}] * 2
    assert model["test_cfg"]["rcnn"]["score_thr"] == 0.05
    backbone, divisor = model["backbone"], model["data_preprocessor"]["pad_size_divisor"]
    if "vitdet" in row:
        assert (backbone["type"], backbone["window"], backbone["image_px"]) == (WindowedNetwork, 14, 1024)
        assert divisor == 1024
    else:
        assert (backbone["type"], backbone["layers"], backbone["norm"]) == (Network, (7, 11, 15, 23), False)
        assert divisor == 2 * patch
    assert model["data_preprocessor"]["mean"] == [255 * value for value in architecture.mean]


def one_batch(root, recipe):
    coco = open_coco(str(root))
    config = detection.resolved(Subject(open_checkpoint(TINY), coco, Effort()), recipe)
    data = detection.prepared(coco, detection.choose(coco.annotations["train"]), config)
    with quiet(), seeded(0):
        samples = [data.train[index] for index in range(2)]
    return config, {key: [sample[key] for sample in samples] for key in samples[0]}


@pytest.mark.parametrize("row", ["maskrcnn-toy", "cascade-toy", "vitdet-toy"])
def test_every_loss_falls_on_two_images(row, toy_root):
    recipe = small(row, norm="batch" if row == "cascade-toy" else "layer")
    config, batch = one_batch(toy_root, recipe)
    network = build(config["model"], scope="mmdet", seed=0)
    network.backbone.load(open_checkpoint(TINY))
    optimizer = torch.optim.AdamW(parameter_groups(network, lr=4e-3, weight_decay=0.0))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))
    network.train()
    steps = []
    for _ in range(10):
        torch.manual_seed(0)
        with quiet():
            losses = network(**network.data_preprocessor(batch, training=True), mode="loss")
        parts = {}
        for name, value in losses.items():
            if "loss" in name:
                part = name.rpartition(".")[2]
                parts[part] = parts.get(part, 0.0) + (sum(value) if isinstance(value, list) else value)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
        assert not unused  # DistributedDataParallel would refuse
        optimizer.step()
        steps.append({name: float(value.detach()) for name, value in parts.items()})
    assert set(steps[0]) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    assert np.isfinite([list(step.values()) for step in steps]).all()
    assert steps[0]["loss_mask"] > 0
    for name in ("loss_rpn_cls", "loss_cls", "loss_mask"):  # those of boxes begin when there are any
        assert np.mean([step[name] for step in steps[-3:]]) < 0.9 * np.mean([step[name] for step in steps[:3]]), name


def test_crowds_do_not_change_the_loss(toy_root, tmp_path):
    """The same images with and without a crowd over everything else."""
    document = json.loads((toy_root / "annotations" / "instances_train2017.json").read_text())
    document["annotations"] = [each for each in document["annotations"] if not each["iscrowd"]]
    losses = []
    for crowd in (False, True):
        if crowd:
            runs = {"counts": [0, 96 * 96], "size": [96, 96]}
            for number, image in enumerate(document["images"]):
                entry = annotation(9000 + number, image["id"], 1, [0, 0, 96, 96], iscrowd=1, segmentation=runs)
                document["annotations"].append(entry)
        root = tmp_path / str(crowd)
        (root / "annotations").mkdir(parents=True)
        (root / "train2017").symlink_to(toy_root / "train2017")
        (root / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
        (root / "val2017").symlink_to(toy_root / "val2017")
        (root / "annotations" / "instances_val2017.json").symlink_to(
            toy_root / "annotations" / "instances_val2017.json"
        )
        config, batch = one_batch(root, small())
        assert all(len(sample.ignored_instances) == crowd for sample in batch["data_samples"])
        network = build(config["model"], scope="mmdet", seed=0).train()
        with quiet(), seeded(3), torch.no_grad():
            found = network(**network.data_preprocessor(batch, training=True), mode="loss")
        losses.append({name: float(sum(value) if isinstance(value, list) else value) for name, value in found.items()})
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------- what is refused


def change(root, split="val", **objects):
    """Change the annotations of one split; `objects` maps a0 to the fields of the first annotation."""
    path = root / "annotations" / f"instances_{split}2017.json"
    document = json.loads(path.read_text())
    for name, fields in objects.items():
        document["annotations"][int(name[1:])] |= fields
    path.write_text(json.dumps(document))
    return document["annotations"]


@pytest.fixture
def mine(tmp_path):
    """A copy of a small toy dataset, to be spoiled."""
    write_coco(tmp_path / "mine", train=6, val=2)
    return tmp_path / "mine"


SHORT = {"epochs": 1, "batch": 2, "warmup_steps": 1}


def refused(root, recipe=None, spec=TINY, **effort) -> str:
    with pytest.raises(UserError) as error:
        check(subject(root, spec, **effort), recipe or small(**SHORT))
    return str(error.value)


def test_boxes_without_extent_are_refused_in_val_and_left_out_of_train(mine):
    check(subject(mine), small(**SHORT))
    number = change(mine, "train", a0={"bbox": [5, 5, 10, 0]})[0]["id"]
    given = subject(mine)
    check(given, small(**SHORT))
    chosen = detection.choose(given.dataset.annotations["train"])
    scores = detection.scored(given.dataset, chosen, {"box_ap": 1.0, "main": 1.0}, broken=0)
    assert f"annotation {number}" in scores.warnings[0]
    assert scores.details["train_objects_left_out"] == {"thin": 0, "without_extent": 1}
    number = change(mine, "val", a0={"bbox": [5, 5, 0, 7]})[0]["id"]
    said = refused(mine)
    assert "instances_val2017.json" in said
    assert f"annotation {number}" in said
    assert "no extent" in said


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("outline", [[], None, [[1.0, 2.0, 3.0, 4.0]], [[]]])
def test_objects_without_a_mask_are_refused(mine, split, outline):
    number = change(mine, split, a1={"segmentation": outline, "iscrowd": 0})[1]["id"]
    said = refused(mine)
    assert f"instances_{split}2017.json" in said
    assert f"annotation {number}" in said
    assert "no segmentation" in said


def test_a_polygon_that_pycocotools_takes_for_a_box_is_refused_in_val_alone(mine):
    outline = [[1.0, 2.0, 3.0, 4.0], [10.0, 10.0, 20.0, 10.0, 20.0, 20.0]]
    change(mine, "train", a0={"segmentation": outline, "iscrowd": 0})
    check(subject(mine), small(**SHORT))
    number = change(mine, "val", a0={"segmentation": outline, "iscrowd": 0})[0]["id"]
    assert f"annotation {number}" in refused(mine)


def test_parts_of_a_batch_make_another_run(mine):
    """BatchNorm and the means of the losses are theirs."""
    given = small(**SHORT | {"batch": 4})
    assert detection.data_used(subject(mine), given) == {}
    assert detection.data_used(subject(mine, batch_size=4), given) == {}
    assert detection.data_used(subject(mine, batch_size=3), given) == {"batch_parts": "2"}
    assert detection.data_used(subject(mine, batch_size=1), given) == {"batch_parts": "4"}


def test_drops_of_the_learning_rate_rise():
    for drops in ((0.0,), (9.0, 8.0), (-1.0,)):
        with pytest.raises(UserError, match="expected rising numbers above 0"):
            small(drop_epochs=drops)


def test_run_lengths_of_another_size_are_refused(mine):
    change(mine, "train", a0={"segmentation": {"counts": [10, 90 * 96 - 10], "size": [90, 96]}, "iscrowd": 1})
    assert "size [90, 96]" in refused(mine)


def test_data_that_nothing_can_be_learned_or_found_in_are_refused(mine, tmp_path):
    document = json.loads((mine / "annotations" / "instances_val2017.json").read_text())
    empty = document | {"annotations": []}
    (mine / "annotations" / "instances_val2017.json").write_text(json.dumps(empty))
    assert "no object in its 2 images" in refused(mine)
    (mine / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    train = json.loads((mine / "annotations" / "instances_train2017.json").read_text())
    (mine / "annotations" / "instances_train2017.json").write_text(json.dumps(train | {"annotations": []}))
    assert "no image to learn from" in refused(mine)
    assert "has no train split" in refused(write(tmp_path / "val", val_alone()))


def val_alone():
    document = hand_written()
    document["annotations"] = [each for each in document["annotations"] if each["id"] not in (13, 14)]
    return document


def test_an_absent_image_is_refused(mine):
    next((mine / "train2017").iterdir()).unlink()
    with pytest.raises(UserError, match=r"1 of 6 images of .*instances_train2017.json are not in .*train2017"):
        open_coco(str(mine))


def test_networks_batches_and_machines_that_do_not_fit(toy_root, monkeypatch):
    fits = small(**SHORT)
    assert "pixels: has no weights" in refused(toy_root, fits, "pixels:")
    assert "patches of 14 px" in refused(toy_root, fits, "random:vit_32x2x2_patch14_28")
    assert "do not fill one batch of 64" in refused(toy_root, dataclasses.replace(fits, batch=64))
    assert "the warm-up would never end" in refused(toy_root, dataclasses.replace(fits, warmup_steps=3))
    assert "fp16 trains on CUDA" in refused(toy_root, fits, dtype="fp16")
    jittered = dataclasses.replace(fits, augmentation="jitter", shorter_px=(72,), longer_px=72)
    assert "expected a multiple of 16" in refused(toy_root, jittered)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert "cannot be shared equally by 3 processes" in refused(toy_root, fits)
    monkeypatch.undo()
    monkeypatch.setattr(packages, "installed", lambda: (_ for _ in ()).throw(UserError("mmdet is missing")))
    assert refused(toy_root, fits) == "mmdet is missing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_weights": (1.0, 1.0, 1.0, 1.0)}, "one to three"),
        ({"blocks": (3, 5)}, "four blocks"),
        ({"blocks": (3, 5, 7, 12)}, "0 to 11"),
        ({"window": 14}, "set blocks=11"),
        ({"rois": 0}, "rois=0: expected at least 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1: expected 0 or more"),
        ({"shorter_px": (96, 128)}, "expected sides from 1 px to longer_px"),
        ({"layer_decay": 0.0}, "layer_decay above 0"),
        ({"drop_path": 1.0}, "below 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RECIPES["maskrcnn-toy"], **changes)


# ------------------------------------------------------------------------------------------------------ from end to end


def test_the_record_and_what_lies_beside_it(toy_root, own_cache, tmp_path):
    options = {"dataset": str(toy_root), "settings": SMALL | SHORT, "limit": 4, "workers": 0}
    (record,) = ssl_bench.run(TINY, "detection/maskrcnn-toy", **options)
    assert (record.protocol, record.recipe, record.main_metric) == ("detection", "maskrcnn-toy", "box_ap")
    assert (record.selected_on, record.limited) == ("none", True)
    assert record.n_samples.original == {"train": 6, "val": 4}
    assert record.n_samples.evaluated == {"train": 4, "val": 4}
    assert record.overrides["channels"] == 16
    (config,) = (tmp_path / "results").rglob("mm_config.json")
    assert json.loads(config.read_text())["model"]["neck"]["necks"][1]["out_channels"] == 16
    bad = {"longer_px": 100, "shorter_px": 100, "augmentation": "jitter"}
    with pytest.raises(UserError, match="longer_px=100: expected a multiple of 16"):
        ssl_bench.run(TINY, "detection/maskrcnn-toy", **options | {"settings": SMALL | SHORT | bad})


@pytest.mark.parametrize("row", ["cascade-toy", "vitdet-toy"])
def test_from_end_to_end(row, toy_root, own_cache, capsys):
    given = subject(toy_root)
    jitter = {"augmentation": "jitter"} if row == "vitdet-toy" else {}
    recipe = small(row, epochs=1, batch=2, warmup_steps=1, positions="fixed", **jitter)
    check(given, recipe)
    scores = run(given, recipe)
    captured = capsys.readouterr()
    assert not captured.out
    assert scores.main == "box_ap"
    assert {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"} <= set(scores.metrics)
    assert all(0 <= score.value <= 100 and score.n == 4 for score in scores.metrics.values())
    assert scores.evaluated == {"train": 6, "val": 4}
    assert scores.details["steps"] == 3
    assert scores.details["categories"] == 10
    assert set(scores.details["box_ap_by_class"]) <= set(given.dataset.categories)
    config = json.loads(scores.files["mm_config.json"])
    assert config["model"]["type"].startswith("mmdet.models.detectors.")
    assert config["model"]["backbone"]["architecture"]["dim"] == 32
    json.dumps(scores.details)


class Stop(Exception):  # noqa: N818
    """Instead of the training."""


@pytest.mark.parametrize("positions", ["trained", "fixed"])
def test_what_is_trained_and_how_long(positions, toy_root, monkeypatch):
    given = {}

    def no_training(network, course, data, **more):
        given.update(network=network, course=course, data=data, **more)
        raise Stop

    monkeypatch.setattr(runner, "train", no_training)
    recipe = small(epochs=2, batch=2, warmup_steps=2, positions=positions, lr=1.0, layer_decay=0.5, drop_epochs=(1.5,))
    checkpoint = subject(toy_root)
    with pytest.raises(Stop):
        run(checkpoint, recipe)
    trunk = given["network"].backbone.trunk.vit
    expected = checkpoint.checkpoint.state["pos_embed"]
    assert torch.equal(trunk.pos_embed.detach(), expected)  # the checkpoint's weights are in
    lrs = {id(each): group["lr"] for group in given["optimizer"].param_groups for each in group["params"]}
    trained = [each for each in given["network"].parameters() if each is not trunk.pos_embed]
    assert all(id(each) in lrs for each in trained)
    assert lrs.get(id(trunk.pos_embed)) == (0.5**3 if positions == "trained" else None)
    assert lrs[id(trunk.blocks[0].attn.qkv.weight)] == 0.5**2
    assert lrs[id(given["network"].roi_head.bbox_head.fc_cls.weight)] == 1
    course = given["course"]
    assert (course.steps, course.batch, course.seed, course.clip_norm) == (6, 2, 0, None)
    assert [given["lr_factor"](step) for step in range(6)] == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1])
    assert course.identity["recipe"]["positions"] == positions
    assert len(given["data"].train) == 6
    assert len(given["data"].val) == 4


def test_nothing_detected_scores_0(toy_root, own_cache, monkeypatch):
    original = detectors.detector

    def strict(*arguments):
        model = original(*arguments)
        model["test_cfg"]["rcnn"]["score_thr"] = 0.999
        return model

    monkeypatch.setattr(detectors, "detector", strict)
    scores = run(subject(toy_root), small(**SHORT))
    assert {score.value for score in scores.metrics.values()} == {0.0}
    assert {"box_ap", "mask_ap"} <= set(scores.metrics)


def test_a_broken_val_image_is_skipped_and_counted(mine, own_cache):
    spoiled = sorted((mine / "val2017").iterdir())[0]
    Image.new("RGB", (96, 90)).save(spoiled)
    with pytest.raises(UserError, match=r"96 x 90 px.*--skip-broken"):
        run(subject(mine), small(**SHORT))
    scores = run(subject(mine, skip_broken=True), small(**SHORT))
    assert (scores.evaluated["val"], scores.skipped["val"]) == (1, 1)
    assert scores.metrics["box_ap"].n == 1


class Listed(CocoAP):
    """Every single detection."""

    def scores(self, results):
        return {"main": 0.0, "detections": self.detections(results), "order": [each["index"] for each in results]}


def detections(root: Path) -> dict:
    """What a fresh network takes for objects; one process's share of the images, with the same weights everywhere."""
    coco = open_coco(str(root))
    config = detection.resolved(Subject(open_checkpoint(TINY), coco, Effort()), small())
    network = build(config["model"], scope="mmdet", seed=0)
    network.backbone.load(open_checkpoint(TINY))
    data = detection.prepared(coco, detection.choose(coco.annotations["train"]), config)
    metric = Listed(coco.files["val"], coco.splits["val"].sample_ids)
    found = validate(network, dataclasses.replace(data, metric=metric), Effort(workers=0)).outcomes[-1]
    for each in found["detections"]:
        each["segmentation"]["counts"] = each["segmentation"]["counts"].decode()
    return found


def one_of_two(rank: int, port: int, root: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = detections(root)
    out.with_name(f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path):
    write_coco(tmp_path / "toy", train=2, val=5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = (port, tmp_path / "toy", tmp_path / "out")
    processes = [context.Process(target=one_of_two, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    alone = detections(tmp_path / "toy")
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert alone["order"] == list(range(5))
    assert len(alone["detections"]) > 50
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
