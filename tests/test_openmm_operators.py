"""mmcv's operators as torchvision computes them, called through mmcv's own Python layer, against plain loops."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import subprocess
import sys
import types
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.protocols.openmm import operators, packages


@pytest.fixture(scope="module", autouse=True)
def ops():
    packages.require()
    return importlib.import_module("mmcv.ops")


def random_boxes(count: int, size: float = 40.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) that overlap often, and scores without ties."""
    generator = torch.Generator().manual_seed(seed)
    corners = size * torch.rand(count, 2, generator=generator)
    extent = 0.4 * size * torch.rand(count, 2, generator=generator)
    return torch.cat([corners, corners + extent], 1), torch.randperm(count, generator=generator) / count


def random_rois(size: float = 32.0) -> Tensor:
    """(N, 5) of two images: within them, beyond their border, and one without extent."""
    boxes, _ = random_boxes(9, size)
    boxes = torch.cat([boxes, torch.tensor([[-9.0, -7.0, 12.0, 50.0], [5.0, 6.0, 5.0, 6.0]])])
    return torch.cat([(torch.arange(len(boxes)) % 2)[:, None].float(), boxes], 1)


# RoIAlign


def bilinear(image: list[list[float]], y: float, x: float) -> float:
    height, width = len(image), len(image[0])
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
        total += weight * image[min(row, height - 1)][min(column, width - 1)]
    return total


def slow_roi_align(maps: Tensor, rois: Tensor, *, out: int, scale: float, samples: int, aligned: bool) -> Tensor:
    """Mask R-CNN's RoIAlign: the mean of bilinear samples in every cell; `aligned` shifts by half a pixel."""
    result = torch.zeros(len(rois), maps.shape[1], out, out, dtype=torch.float64)
    for n, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (corner * scale - (0.5 if aligned else 0.0) for corner in corners)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        down, right = (samples or math.ceil(height / out)), (samples or math.ceil(width / out))
        for channel, pixels in enumerate(maps[int(image)].tolist()):
            for i in range(out):
                for j in range(out):
                    values = [
                        bilinear(
                            pixels,
                            y1 + height / out * (i + (a + 0.5) / down),
                            x1 + width / out * (j + (b + 0.5) / right),
                        )
                        for a in range(down)
                        for b in range(right)
                    ]
                    result[n, channel, i, j] = sum(values) / max(len(values), 1)
    return result


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize(("out", "scale"), [(2, 1.0), (3, 0.25)])
def test_roi_align_is_the_mean_of_bilinear_samples(ops, aligned, samples, out, scale):
    torch.manual_seed(0)
    maps, rois = torch.randn(2, 2, 8, 9), random_rois(8 / scale)
    found = ops.RoIAlign(out, scale, samples, aligned=aligned)(maps, rois)
    expected = slow_roi_align(maps, rois, out=out, scale=scale, samples=samples, aligned=aligned)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize(("out", "scale"), [((7, 7), 0.25), ((3, 5), 1.0), ((14, 14), 1 / 16)])
def test_roi_align_and_its_gradient_are_those_of_torchvision(ops, aligned, samples, out, scale):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 9, 11).to(memory_format=torch.channels_last).requires_grad_()
    rois = random_rois(10 / scale)
    found = ops.RoIAlign(out, scale, samples, aligned=aligned)(maps, rois)
    expected = torchvision.ops.roi_align(maps, rois, out, scale, samples, aligned)
    assert torch.equal(found, expected)
    weights = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, maps, weights)
    assert torch.equal(gradient, torch.autograd.grad(expected, maps, weights)[0])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("aligned", [True, False])
def test_the_gradient_is_that_of_finite_differences(ops, aligned):
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = random_rois(6.0).double()
    assert torch.autograd.gradcheck(lambda x: ops.roi_align(x, rois, 2, 0.9, 2, "avg", aligned), maps)


@pytest.mark.parametrize("boxes", [torch.float32, None])  # as under autocast: half maps, full boxes; or all in half
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(ops, dtype, boxes):
    torch.manual_seed(0)
    maps, layer = torch.randn(2, 3, 8, 8).to(dtype).requires_grad_(), ops.RoIAlign(3, 1.0)
    rois = random_rois(8.0).to(boxes or dtype)
    found = layer(maps, rois)
    full = maps.detach().float().requires_grad_()
    expected = layer(full, rois.float())
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    found.float().sum().backward()
    expected.sum().backward()
    assert torch.equal(maps.grad, full.grad.to(dtype))


def test_without_rois_nothing_comes_out_and_no_gradient_goes_back(ops):
    maps = torch.randn(1, 3, 8, 8, requires_grad=True)
    found = ops.RoIAlign(7, 0.25)(maps, torch.zeros(0, 5))
    assert found.shape == (0, 3, 7, 7)
    found.sum().backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


# nms


def iou(a: list[float], b: list[float], offset: int) -> float:
    def side(low: float, high: float) -> float:
        return max(0.0, high - low + offset)

    common = side(max(a[0], b[0]), min(a[2], b[2])) * side(max(a[1], b[1]), min(a[3], b[3]))
    areas = [side(box[0], box[2]) * side(box[1], box[3]) for box in (a, b)]
    return common / (sum(areas) - common)


def slow_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    rows, kept = boxes.tolist(), []
    for candidate in scores.argsort(descending=True).tolist():
        if all(iou(rows[candidate], rows[other], offset) <= threshold for other in kept):
            kept.append(candidate)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("count", [0, 1, 60])
def test_nms_keeps_what_a_plain_loop_keeps(ops, count, threshold, offset):
    boxes, scores = random_boxes(count, size=12.0)
    dets, kept = ops.nms(boxes, scores, threshold, offset)
    assert kept.tolist() == slow_nms(boxes, scores, threshold, offset)
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], 1))
    if offset == 0:
        assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))
    arrays = ops.nms(boxes.numpy(), scores.numpy(), threshold, offset)
    assert all(np.array_equal(array, tensor) for array, tensor in zip(arrays, (dets, kept), strict=True))


def test_the_offset_matters_where_it_is_tested(ops):
    boxes, scores = random_boxes(60, size=12.0)
    assert ops.nms(boxes, scores, 0.5, 0)[1].tolist() != ops.nms(boxes, scores, 0.5, 1)[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nms_in_other_precisions(ops, dtype):
    boxes, scores = (each.to(dtype) for each in random_boxes(40))
    dets, kept = ops.nms(boxes, scores.float(), 0.5)
    assert dets.shape == (len(kept), 5)
    assert kept.tolist() == slow_nms(boxes.double(), scores.float(), 0.5, 0)


@pytest.mark.parametrize("split", [10000, 30])
def test_batched_nms_lets_only_boxes_of_a_class_compete(ops, split):
    boxes, scores = random_boxes(80)
    classes = torch.arange(80) % 3
    dets, kept = ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.3, "split_thr": split})
    expected = [
        int(rows[place])
        for rows in ((classes == label).nonzero()[:, 0] for label in range(3))
        for place in slow_nms(boxes[rows], scores[rows], 0.3, 0)
    ]
    assert sorted(kept.tolist()) == sorted(expected)
    assert set(kept.tolist()) == set(torchvision.ops.batched_nms(boxes, scores, classes, 0.3).tolist())
    assert torch.equal(dets[:, 4], scores[kept].sort(descending=True).values)
    assert len(kept) > len(ops.batched_nms(boxes, scores, classes, {"iou_threshold": 0.3}, class_agnostic=True)[1])


def slow_soft_nms(
    boxes: Tensor, scores: Tensor, *, threshold: float, sigma: float, least: float, method: str, offset: int
):
    """Fig. 2 of Bodla et al. 2017, with their Eq. 3 (linear) and the Gaussian below it."""
    rows, left, kept = boxes.tolist(), dict(enumerate(scores.tolist())), []
    while left:
        best = max(left, key=left.__getitem__)
        kept.append((best, left.pop(best)))
        for other in list(left):
            overlap = iou(rows[best], rows[other], offset)
            if method == "gaussian":
                left[other] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                left[other] *= 1 - overlap if method == "linear" else 0
            if left[other] < least:
                del left[other]
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize(("count", "least"), [(50, 0.1), (50, 1e-3), (1, 0.5), (0, 0.1)])
def test_soft_nms_lowers_scores_as_a_plain_loop_does(ops, method, offset, count, least):
    boxes, scores = random_boxes(count, size=20.0)
    dets, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, least, method, offset)
    expected = slow_soft_nms(boxes, scores, threshold=0.3, sigma=0.5, least=least, method=method, offset=offset)
    assert kept.tolist() == [index for index, _ in expected]
    assert torch.equal(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]), atol=1e-6, rtol=1e-5)
    assert torch.equal(scores, random_boxes(count, size=20.0)[1])  # the caller's are not touched


# What is not there


def test_an_operator_that_is_missing_is_named_when_it_is_called(ops):
    with pytest.raises(
        UserError, match=r"mmcv's compiled operator roi_pool_forward was called\..*torchvision stands in"
    ):
        ops.roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)
    with pytest.raises(UserError, match="roi_align with pool_mode='max' was called"):
        ops.RoIAlign(2, 1.0, pool_mode="max")(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5))
    with pytest.raises(AttributeError):
        _ = sys.modules["mmcv._ext"].__no_such_thing__


# The finder


def without_our_finder(monkeypatch) -> None:
    finders = [finder for finder in sys.meta_path if not isinstance(finder, operators._Finder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.delitem(sys.modules, operators.NAME, raising=False)


def test_the_module_has_a_spec_which_mmengine_asks_for(ops):
    from mmengine.model import revert_sync_batchnorm

    assert find_spec("mmcv._ext").loader is not None
    assert isinstance(revert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(2)))[0](torch.zeros(2, 2, 1, 1)), Tensor)
    assert not operators.compiled()


def test_installing_twice_is_installing_once_and_at_the_end(monkeypatch):
    without_our_finder(monkeypatch)
    monkeypatch.delitem(sys.modules, operators._TOO_LATE)
    before = list(sys.meta_path)
    operators.install()
    operators.install()
    assert sys.meta_path[:-1] == before
    assert isinstance(sys.meta_path[-1], operators._Finder)
    assert sys.meta_path[-1].find_spec("mmcv._ext2") is None


def test_too_late_is_refused_and_a_compiled_mmcv_is_never_too_late(monkeypatch):
    packages.installed()
    without_our_finder(monkeypatch)
    assert operators._TOO_LATE in sys.modules  # so it is after require()
    for refused in (operators.install, operators.install, packages.installed, packages.require):
        with pytest.raises(
            UserError, match=r"mmdet .* was imported before ssl-bench .*call\s.*packages\.require\(\) before"
        ):
            refused()
    monkeypatch.setitem(sys.modules, operators.NAME, types.ModuleType(operators.NAME))
    operators.install()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )


def test_mmdet_before_us_goes_without_operators():
    """What the refusal above is for, with the real package."""
    done = python("import mmdet.structures.mask\nfrom ssl_bench.protocols.openmm import packages\npackages.installed()")
    assert done.returncode == 1
    assert "UserError: mmdet (or mmseg, which imports it) was imported before" in done.stderr


def test_a_compiled_mmcv_wins_by_itself(tmp_path):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("")
    (tmp_path / "mmcv" / "_ext.py").write_text("def nms(): return 'compiled'")
    code = """
from ssl_bench.protocols.openmm import operators
operators.install()
assert operators.compiled()
import sys, mmcv._ext
assert mmcv._ext.nms() == "compiled"
assert "torch" not in sys.modules
"""
    done = python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_have_the_operators_and_say_nothing(start, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forking beside threads
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
            pool.submit(packages.require).result()
            served = "__import__('mmcv.ops').ops.nms.__module__, __import__('mmcv._ext')._ext.nms.__module__"
            assert pool.submit(eval, served).result() == ("mmcv.ops.nms", operators.__name__)
    assert capfd.readouterr() == ("", "")
