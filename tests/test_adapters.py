"""TEC's adapters against calculations by hand, and rebuilt from their weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import tiny_architecture, tiny_backbone

from ssl_bench.evaluate.adapters import EncoderAdapter, InputAdapter, block_outputs
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.backbone import build


def shaken(module, seed=0):
    """No weight stays at a special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(state, name, x):
    hidden = gelu(x @ state[f"{name}.fc1.weight"].T + state[f"{name}.fc1.bias"])
    return hidden @ state[f"{name}.fc2.weight"].T + state[f"{name}.fc2.bias"]


def layer_norm(state, name, x):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def test_the_input_adapter_is_an_mlp_without_a_residual():
    adapter = shaken(InputAdapter(8, 20)).double()
    state = adapter.state_dict()
    assert set(state) == {"cls_token", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    assert state["mlp.fc1.weight"].shape == (20, 8)
    assert torch.allclose(adapter(), mlp(state, "mlp", state["cls_token"]), rtol=0, atol=1e-14)
    assert adapter().shape == (1, 1, 8)


@pytest.mark.parametrize(("depth", "size"), [(6, 3), (6, 2), (6, 6), (4, 1)])
def test_the_encoder_adapter_is_equations_1_and_2_between_two_norms(depth, size):
    adapter = shaken(EncoderAdapter(8, depth, blocks_per_group=size, hidden=12)).double()
    state = adapter.state_dict()
    blocks = list(torch.randn(depth, 2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    z_e, parts = torch.zeros(2, 5, 8, dtype=torch.float64), []
    together = layer_norm(state, "norm_blocks", torch.cat(blocks, dim=2))
    for n in range(depth // size):
        of_group = together[:, :, n * size * 8 : (n + 1) * size * 8]
        z = of_group @ state[f"merge.{n}.weight"].T + state[f"merge.{n}.bias"]
        parts.append(z + mlp(state, f"mlp.{n}", z))
        z_e += parts[-1]
    assert len(adapter.parts(blocks)) == depth // size
    for part, expected in zip(adapter.parts(blocks), parts, strict=True):
        assert torch.allclose(part, expected, rtol=0, atol=1e-12)
    assert torch.allclose(adapter(blocks), layer_norm(state, "norm", z_e), rtol=0, atol=1e-12)


def test_shapes_at_vit_b_and_vit_l_are_the_official_ones():
    with torch.device("meta"):
        base = EncoderAdapter(768, 12, blocks_per_group=3, hidden=2048)
        large = EncoderAdapter(1024, 24, blocks_per_group=3, hidden=3072)
    assert (len(base.merge), len(large.merge)) == (4, 8)
    assert base.norm_blocks.weight.shape == (9216,)
    assert base.merge[0].weight.shape == (768, 2304)
    assert base.mlp[3].fc1.weight.shape == (2048, 768)
    assert large.mlp[7].fc2.weight.shape == (1024, 3072)


def test_adapters_are_rebuilt_from_their_weights():
    source, encoder = shaken(InputAdapter(8, 20)), shaken(EncoderAdapter(8, 6, blocks_per_group=3, hidden=12))
    blocks = torch.randn(6, 2, 5, 8)
    assert torch.equal(InputAdapter.from_state(source.state_dict())(), source())
    rebuilt = EncoderAdapter.from_state(encoder.state_dict())
    assert torch.equal(rebuilt(blocks), encoder(blocks))
    assert all(parameter.requires_grad for parameter in rebuilt.parameters())


def test_merging_changes_the_class_token_of_a_copy_and_no_output():
    backbone, adapter = tiny_backbone(), shaken(InputAdapter(32, 40))
    before = backbone.vit.cls_token.clone()
    images = torch.randn(3, 3, 16, 16)
    adapted = block_outputs(backbone, images, class_token=adapter())[-1]
    merged = adapter.merged_into(backbone)
    tokens = merged(images).tokens[0]
    assert torch.equal(backbone.vit.cls_token, before)
    assert torch.allclose(tokens.cls, adapted[:, 0], rtol=0, atol=1e-6)
    assert torch.allclose(tokens.patches.flatten(1, 2), adapted[:, 1:], rtol=0, atol=1e-6)
    assert not torch.allclose(tokens.cls, backbone(images).tokens[0].cls, atol=1e-2)  # it was another token before


@pytest.mark.parametrize("keep", [None, torch.tensor([[3, 0], [1, 2], [0, 3]])])
def test_block_outputs_are_the_backbone_s(keep):
    backbone, images = tiny_backbone(), torch.randn(3, 3, 16, 16)
    outputs = block_outputs(backbone, images, keep=keep)
    raw = backbone(images, layers=(0, 1), norm=False, keep=keep).tokens
    last = backbone(images, keep=keep).tokens[0]
    assert len(outputs) == 2
    for output, tokens in zip(outputs, (raw[0], last), strict=True):
        assert torch.equal(output[:, 0], tokens.cls)
        assert torch.equal(output[:, 1:], tokens.patches.flatten(1, -2))
    assert not torch.allclose(outputs[1][:, 1:], raw[1].patches.flatten(1, -2), atol=1e-2)


def test_the_given_class_token_gets_the_position_and_the_network_s_own_is_not_used():
    backbone, images = tiny_backbone(), torch.randn(2, 3, 16, 16)
    assert backbone.vit.pos_embed[:, 0].abs().min() > 0
    expected = backbone(images).tokens[0].cls
    token = backbone.vit.cls_token.detach().clone()
    with torch.no_grad():
        backbone.vit.cls_token.fill_(7.0)
    assert torch.allclose(block_outputs(backbone, images, class_token=token)[-1][:, 0], expected, rtol=0, atol=1e-6)


def test_registers_stay_between_class_token_and_patches():
    architecture = Architecture(32, 2, 2, patch_px=8, image_px=16, mlp_dim=64, registers=3, position_of_prefix=False)
    backbone = shaken(build(architecture)).eval()
    images = torch.randn(2, 3, 16, 16)
    output = block_outputs(backbone, images, class_token=backbone.vit.cls_token)[-1]
    tokens = backbone(images).tokens[0]
    assert output.shape == (2, 1 + 3 + 4, 32)
    assert torch.allclose(output[:, 0], tokens.cls, atol=1e-6)
    assert torch.allclose(output[:, 4:], tokens.patches.flatten(1, 2), atol=1e-6)


def test_gradients_reach_the_token_the_adapters_and_the_trunk():
    architecture = tiny_architecture()
    backbone, adapter = tiny_backbone(), InputAdapter(32, 40)
    encoder = EncoderAdapter(32, architecture.depth, blocks_per_group=1, hidden=12)
    z = encoder(block_outputs(backbone, torch.randn(2, 3, 16, 16), class_token=adapter()))
    F.mse_loss(z, torch.randn_like(z)).backward()
    for module in (adapter, encoder, backbone.vit.blocks):
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert not backbone.vit.cls_token.grad.any()
