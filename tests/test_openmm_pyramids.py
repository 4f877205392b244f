"""Necks against plain torch, against mmseg's own, and as mm builds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_bench.protocols.openmm import packages

packages.require()

from mmcv.cnn import build_norm_layer  # noqa: E402
from mmdet.registry import MODELS as MMDET  # noqa: E402
from mmseg.models.necks import Feature2Pyramid  # noqa: E402
from mmseg.registry import MODELS as MMSEG  # noqa: E402

from ssl_bench.protocols.openmm.pyramids import Chain, LayerNorm2d, SimplePyramid, UpDown  # noqa: E402


def fill(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def maps(count: int = 4, channels: int = 8, height: int = 6, width: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, channels, height, width, generator=generator) for _ in range(count))


def slow_norm(x: Tensor, norm: Any, eps: float = 1e-6) -> Tensor:
    """Pixel by pixel over the channels."""
    out = torch.zeros_like(x)
    for image in range(x.shape[0]):
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                v = x[image, :, row, column]
                scaled = (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + eps)
                out[image, :, row, column] = scaled * norm.weight + norm.bias
    return out


def slow_deconvolution(x: Tensor, layer: Any) -> Tensor:
    """Every pixel becomes 2 x 2 pixels."""
    batch, _, height, width = x.shape
    out = torch.zeros(batch, layer.weight.shape[1], 2 * height, 2 * width)
    for i in range(2):
        for j in range(2):
            mixed = torch.einsum("bchw,cd->bdhw", x, layer.weight[:, :, i, j])
            out[:, :, i::2, j::2] = mixed + layer.bias[:, None, None]
    return out


def halved(x: Tensor) -> Tensor:
    """The largest of every 2 x 2 pixels."""
    return torch.stack([x[:, :, i::2, j::2] for i in range(2) for j in range(2)]).amax(0)


# ---------------------------------------------------------------- LayerNorm2d


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_layer_norm_is_over_channels_and_contiguous(eps: float):
    norm: Any = fill(LayerNorm2d(8, eps=eps))
    (x,) = maps(1)
    for given in (x, x.to(memory_format=torch.channels_last)):
        found = norm(given)
        assert found.is_contiguous()
        torch.testing.assert_close(found, slow_norm(x, norm, eps), rtol=1e-5, atol=1e-5)
    assert LayerNorm2d(8).eps == 1e-6


def test_mmcv_builds_layer_norm_from_the_class():
    _, norm = build_norm_layer({"type": LayerNorm2d, "eps": 1e-6}, 8)
    assert type(norm) is LayerNorm2d
    assert norm.eps == 1e-6
    assert norm.weight.requires_grad
    assert build_norm_layer({"type": LayerNorm2d}, 8)[1].eps == 1e-5  # as the docstring warns


# ---------------------------------------------------------------- UpDown


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_up_down_is_mmsegs_feature2pyramid(norm: Any):
    ours = fill(UpDown(8, norm))
    theirs = Feature2Pyramid(8, rescales=[4, 2, 1, 0.5], norm_cfg={"type": norm})
    names = {"scales.0.": "upsample_4x.", "scales.1.": "upsample_2x.0."}
    renamed = {}
    for name, value in ours.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        renamed[name.replace(prefix, names[prefix])] = value
    theirs.load_state_dict(renamed)
    for training in (True, False, False):  # the averages of training are used in evaluation
        ours.train(training)
        theirs.train(training)
        for found, expected in zip(ours(maps()), theirs(maps()), strict=True):
            assert found.equal(expected)


def test_up_down_by_hand():
    neck: Any = fill(UpDown(8, "LN")).eval()
    given = maps()
    with torch.no_grad():
        found = neck(given)
        first, norm, _, last = neck.scales[0]
        expected = [
            slow_deconvolution(F.gelu(slow_norm(slow_deconvolution(given[0], first), norm)), last),
            slow_deconvolution(given[1], neck.scales[1]),
            given[2],
            halved(given[3]),
        ]
    assert [map_.shape[2:] for map_ in found] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    for one, other in zip(found, expected, strict=True):
        assert one.shape[1] == 8
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("side", "halved_side"), [(1, 1), (4, 2), (5, 3)])
def test_maps_of_odd_sides_are_not_cut(side: int, halved_side: int):
    """An image one patch high has a map of one row, which would vanish."""
    x = maps(height=side)
    coarsest = UpDown(8)(x)[3]
    assert coarsest.shape == (2, 8, halved_side, 2)
    rows = [x[3][:, :, top : top + 2].amax(dim=2) for top in range(0, side, 2)]
    expected = torch.stack([torch.stack([row[..., k : k + 2].amax(-1) for k in (0, 2)], -1) for row in rows], dim=2)
    torch.testing.assert_close(coarsest, expected)


def test_up_down_takes_four_maps():
    with pytest.raises(ValueError, match="zip"):
        UpDown(8)(maps(3))


# ---------------------------------------------------------------- SimplePyramid


def test_simple_pyramid_by_hand():
    neck: Any = fill(SimplePyramid(8, 6)).eval()
    given = maps(2)
    with torch.no_grad():
        found = neck(given)
        x = given[-1]
        up = neck.scales[0][0]
        starts = [
            slow_deconvolution(F.gelu(slow_norm(slow_deconvolution(x, up[0]), up[1])), up[3]),
            slow_deconvolution(x, neck.scales[1][0]),
            x,
            halved(x),
        ]
        expected = []
        for start, (_, one, norm, three, last) in zip(starts, neck.scales, strict=True):
            assert (one.kernel_size, three.kernel_size, three.padding) == ((1, 1), (3, 3), (1, 1))
            assert one.bias is None
            assert three.bias is None
            mixed = slow_norm(torch.einsum("bchw,dc->bdhw", start, one.weight[:, :, 0, 0]), norm)
            expected.append(slow_norm(F.conv2d(mixed, three.weight, padding=1), last))
        expected.append(expected[3][:, :, ::2, ::2])
    assert [tuple(start.shape[1:]) for start in starts] == [(2, 24, 16), (4, 12, 8), (8, 6, 4), (8, 3, 2)]
    assert [tuple(map_.shape) for map_ in found] == [
        *((2, 6, 24, 16), (2, 6, 12, 8), (2, 6, 6, 4), (2, 6, 3, 2), (2, 6, 2, 1))
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert {norm.eps for norm in neck.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}


def test_simple_pyramids_size():
    """ViTDet's neck on ViT-B: counted by hand from the paper's description."""
    up = (768 * 384 * 4 + 384) + 2 * 384 + (384 * 192 * 4 + 192) + (768 * 384 * 4 + 384)
    outer = sum(channels * 256 + 2 * 256 + 256 * 256 * 9 + 2 * 256 for channels in (192, 384, 768, 768))
    assert sum(parameter.numel() for parameter in SimplePyramid(768).parameters()) == up + outer


# ---------------------------------------------------------------- as mm builds them


@pytest.mark.parametrize("registry", [MMSEG, MMDET])
def test_a_chain_with_mmdets_fpn(registry: Any):
    fpn = {"type": "mmdet.FPN", "in_channels": [8] * 4, "out_channels": 6, "num_outs": 5}
    chain = registry.build({"type": Chain, "necks": [{"type": UpDown, "dim": 8, "norm": "SyncBN"}, fpn]})
    assert isinstance(chain, Chain)
    chain.init_weights()
    found = chain.eval()(maps())
    assert [tuple(map_.shape[1:]) for map_ in found] == [(6, 24, 16), (6, 12, 8), (6, 6, 4), (6, 3, 2), (6, 2, 1)]
    up_down, pyramid = chain.necks
    for one, other in zip(found, pyramid(up_down(maps())), strict=True):
        assert one.equal(other)


def test_a_chain_of_modules_in_their_order():
    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: str) -> str:
            return x + self.name

    assert Chain([Named("b"), Named("c")])("a") == "abc"  # type: ignore[arg-type, comparison-overlap]
