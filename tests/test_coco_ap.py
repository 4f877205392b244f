"""COCO's AP against pycocotools on files, and against an example worked out by hand."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from test_coco import annotation, write

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.toy_coco import run_lengths, write_coco
from ssl_bench.protocols.openmm import packages

packages.require()

from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from pycocotools import mask as masks  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from ssl_bench.protocols.openmm.coco_ap import CocoAP  # noqa: E402

STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def output(index, boxes, scores, labels, size=(80, 100)):
    """What mmdet says of an image: each mask is its box, to whole pixels."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[round(top) : round(bottom), round(left) : round(right)] = True
    sample = DetDataSample(metainfo={"index": index})
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=masks,
    )
    return sample.to_dict()


def square(number, image, category, left, top, side, **more):
    corners = [left, top, left + side, top, left + side, top + side, left, top + side]
    return annotation(number, image, category, [left, top, side, side], segmentation=[corners], **more)


def by_hand(tmp_path, annotations):
    """Images a, b, c whose ids and entries are in other orders; categories with a gap, given backwards."""
    images = [{"id": i, "file_name": f"{n}.png", "width": 100, "height": 80} for i, n in ((7, "b"), (3, "c"), (5, "a"))]
    categories = [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}, {"id": 11, "name": "yak"}]
    write(tmp_path / "mine", {"images": images, "annotations": annotations, "categories": categories})
    coco = open_coco(str(tmp_path / "mine"))
    return CocoAP(coco.files["val"], coco.splits["val"].sample_ids)


def scored(metric, *samples):
    return metric.scores([metric.read(sample) for sample in samples])


def test_an_example_whose_ap_is_known(tmp_path, capsys):
    metric = by_hand(tmp_path, [square(1, 7, 9, 10, 10, 40), square(2, 3, 9, 20, 20, 40), square(3, 5, 4, 0, 0, 20)])
    found = scored(
        metric,
        output(0, [[0, 0, 20, 20]], [0.2], [0]),  # a: the only cat, exactly
        output(1, [[10, 10, 50, 50], [60, 30, 90, 70]], [0.9, 0.8], [1, 1]),  # b: one dog exactly, and one of nothing
        output(2, [[20, 20, 60, 47]], [0.7], [1]),  # c: .675 of the other dog
    )
    # Dogs: recall 0 to .5 at precision 1; up to 1 at 2/3 for the thresholds .5, .55, .6, .65.
    half, whole = 51 / 101, (51 + 50 * 2 / 3) / 101
    dogs = 100 * (4 * whole + 6 * half) / 10
    for kind in ("box", "mask"):
        assert found[f"{kind}_ap_by_class"] == pytest.approx({"cat": 100.0, "dog": dogs}, abs=1e-9)
        assert found[f"{kind}_ap"] == pytest.approx((100 + dogs) / 2, abs=1e-9)
        assert found[f"{kind}_ap50"] == pytest.approx((100 + 100 * whole) / 2, abs=1e-9)
        assert found[f"{kind}_ap75"] == pytest.approx((100 + 100 * half) / 2, abs=1e-9)
        assert f"{kind}_ap_large" not in found  # no object has 96 x 96 px
        assert found[f"{kind}_ap_small"] == pytest.approx(100.0, abs=1e-9)  # the cat
    assert found["main"] == found["box_ap"]
    assert not capsys.readouterr().out


def by_pycocotools(file, results, kind, evaluated):
    """As anyone would do it, from a file of results."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(file))
        evaluation = COCOeval(known, known.loadRes(str(results)), kind)
        evaluation.params.imgIds = evaluated
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATS, (100 * evaluation.stats[:6]).tolist(), strict=True))


def test_equal_to_pycocotools_on_files(tmp_path):
    write_coco(tmp_path / "toy", train=1, val=25)
    coco = open_coco(str(tmp_path / "toy")).limited(20)
    truth, rng = coco.annotations["val"], np.random.RandomState(0)
    samples = []
    for index in range(20):
        box = truth.box[list(truth.rows(index))]
        corners = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)
        moved = np.concatenate([corners + rng.normal(0, scale, corners.shape) for scale in (0.5, 2, 6)])
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        labels = np.tile(truth.category[list(truth.rows(index))], 3)
        labels[rng.rand(len(labels)) < 0.2] = 3
        samples.append(output(index, moved.clip(0, 96).tolist(), rng.rand(len(moved)), labels, size=(96, 96)))
    metric = CocoAP(coco.files["val"], coco.splits["val"].sample_ids)
    results = [metric.read(sample) for sample in samples]
    found = metric.scores(results)

    document = json.loads(coco.files["val"].read_text())
    ids = {entry["file_name"]: entry["id"] for entry in document["images"]}
    numbers, entries = sorted(entry["id"] for entry in document["categories"]), []
    for index, sample in enumerate(samples):
        image, each = ids[coco.splits["val"].sample_ids[index]], sample["pred_instances"]
        for place, (left, top, right, bottom) in enumerate(each["bboxes"].double().tolist()):
            runs = masks.frPyObjects(run_lengths(each["masks"][place].numpy()), 96, 96)
            entries.append({
                "image_id": image, "category_id": numbers[int(each["labels"][place])],
                "score": float(each["scores"][place]),
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": {"size": [96, 96], "counts": runs["counts"].decode()},
            })  # fmt: skip
    evaluated = [ids[name] for name in coco.splits["val"].sample_ids]
    assert len(evaluated) == 20
    for kind, name, key in (("bbox", "box", "bbox"), ("segm", "mask", "segmentation")):
        kept = [{k: entry[k] for k in ("image_id", "category_id", "score", key)} for entry in entries]
        (tmp_path / f"{kind}.json").write_text(json.dumps(kept))
        expected = by_pycocotools(coco.files["val"], tmp_path / f"{kind}.json", kind, evaluated)
        assert 5 < expected["ap"] < 95
        for what, value in expected.items():
            if value < 0:
                assert f"{name}_{what}" not in found
            else:
                assert found[f"{name}_{what}"] == pytest.approx(value, abs=1e-9)
        by_class = found[f"{name}_ap_by_class"]
        assert set(by_class) == {coco.categories[c] for c in truth.category[~truth.crowd]}
        assert np.mean(list(by_class.values())) == pytest.approx(expected["ap"], abs=1e-9)


def test_nothing_found_is_0_and_only_scored_images_count(tmp_path):
    metric = by_hand(tmp_path, [square(1, 7, 9, 10, 10, 50), square(2, 3, 9, 20, 20, 20), square(3, 5, 4, 0, 0, 20)])
    nothing = scored(metric, *(output(index, [], [], []) for index in range(3)))
    assert {value for value in nothing.values() if isinstance(value, float)} == {0.0}
    assert {"main", "box_ap", "mask_ap", "box_ap_small", "mask_ap_medium"} <= set(nothing)
    assert "box_ap_large" not in nothing
    assert nothing["box_ap_by_class"] == {"cat": 0.0, "dog": 0.0}  # yaks are in no image
    one = scored(
        metric, output(1, [[10, 10, 60, 60]], [0.1], [1])
    )  # the others were skipped: broken, or beyond --limit
    assert one["box_ap"] == one["mask_ap"] == pytest.approx(100.0)
    assert one["box_ap_by_class"] == pytest.approx({"dog": 100.0})
    assert "box_ap_small" not in one
    both = scored(metric, output(1, [[10, 10, 60, 60]], [0.1], [1]), output(2, [], [], []))
    assert both["box_ap50"] == pytest.approx(100 * 51 / 101)


def test_crowds_neither_count_nor_spoil_and_iscrowd_may_be_left_out(tmp_path):
    runs = {"counts": [0, 80 * 60, 80 * 40], "size": [80, 100]}
    crowd = annotation(2, 5, 9, [0, 0, 60, 80], iscrowd=1, segmentation=runs)
    single = square(1, 5, 9, 70, 10, 20)
    del single["iscrowd"]
    metric = by_hand(tmp_path, [single, crowd])
    found = scored(metric, output(0, [[5, 5, 30, 30], [70, 10, 90, 30]], [0.9, 0.5], [1, 1]))
    assert found["box_ap"] == found["mask_ap"] == pytest.approx(100.0)  # the first lies in the crowd


def test_scored_images_without_any_object_are_refused(tmp_path):
    metric = by_hand(tmp_path, [square(1, 7, 9, 10, 10, 50)])
    with pytest.raises(UserError, match=r"instances_val2017.json has no object in the 2 val images.*--limit"):
        scored(metric, output(0, [], [], []), output(2, [[0, 0, 5, 5]], [0.5], [0]))


def test_sizes_of_masks_are_those_of_their_pixels_not_of_their_boxes(tmp_path):
    metric = by_hand(tmp_path, [square(1, 5, 9, 0, 0, 20)])
    sample = output(0, [[40, 30, 80, 70], [0, 0, 20, 20]], [0.9, 0.5], [1, 1])
    sample["pred_instances"]["masks"][0, 50:] = False
    sample["pred_instances"]["masks"][0, :, 60:] = False  # 20 x 20 of 40 x 40: small as a mask, medium as a box
    found = scored(metric, sample)
    assert found["box_ap_small"] == pytest.approx(100.0)  # what is found of another size does not count
    assert found["mask_ap_small"] == pytest.approx(50.0)
