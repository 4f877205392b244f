"""The tokens and the attention of a Backbone against plain loops over timm's blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture, parse_name
from ssl_bench.evaluate.backbone import Backbone, Pixels, build, canonical_state, load_canonical

PLAIN = Architecture(dim=32, depth=3, heads=4, patch_px=4, image_px=16, mlp_dim=64)
KINDS = {
    "vit": PLAIN,
    "scaled": Architecture(**{**PLAIN.__dict__, "layer_scale": True, "qk_norm": True, "pre_norm": True}),
    "registers": Architecture(**{**PLAIN.__dict__, "registers": 3, "position_of_prefix": False}),
    "registers-with-positions": Architecture(**{**PLAIN.__dict__, "registers": 3}),
    "no-norm": Architecture(**{**PLAIN.__dict__, "final_norm": False, "qkv_bias": False}),
    "beit": Architecture(**{**PLAIN.__dict__, "beit": True, "position": False, "layer_scale": True}),
    "class-attention": Architecture(
        **{**PLAIN.__dict__, "cls": False, "position_of_prefix": False, "class_attention_blocks": 2}
    ),
}


def make(kind: str, **changes: object) -> Backbone:
    """A network in eval mode whose every weight is random."""
    backbone = build(Architecture(**{**KINDS[kind].__dict__, **changes}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.3 * torch.randn(parameter.shape, generator=generator))
    return backbone.eval()


def images(height: int = 16, width: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def plain_blocks(backbone: Backbone, x: Tensor) -> list[Tensor]:
    """After every block, by timm's own blocks."""
    outputs = []
    for block in backbone.vit.blocks:
        x = block(x)
        outputs.append(x)
    return outputs


def embedded(backbone: Backbone, x: Tensor) -> Tensor:
    """What timm lets into the first block, at the native size."""
    vit: Any = backbone.vit
    x = vit.patch_embed(x)
    if backbone.architecture.beit:
        return torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1)
    return vit.norm_pre(vit._pos_embed(x))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("kind", ["vit", "scaled", "registers", "registers-with-positions", "no-norm"])
@pytest.mark.parametrize("norm", [True, False])
def test_layers_equal_timms_intermediates(kind: str, norm: bool):
    backbone = make(kind)
    vit: Any = backbone.vit
    with torch.no_grad():
        tokens = backbone(images(), layers=(2, 0, -2), norm=norm).tokens
        expected = vit.forward_intermediates(
            images(), indices=[0, 1, 2], norm=norm, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    for found, (patches, prefix) in zip(tokens, (expected[2], expected[0], expected[1]), strict=True):
        assert found.cls is not None
        assert found.patches.shape == (2, 4, 4, 32)
        close(found.cls, prefix[:, 0])
        close(found.patches.flatten(1, 2), patches)
        close(found.patch_mean, patches.mean(1))


@pytest.mark.parametrize("norm", [True, False])
def test_beits_layers_equal_its_own_blocks(norm: bool):
    backbone = make("beit")
    vit: Any = backbone.vit
    with torch.no_grad():
        expected = plain_blocks(backbone, embedded(backbone, images()))
        for layer, found in enumerate(backbone(images(), layers=(0, 1, 2), norm=norm).tokens):
            x = vit.norm(expected[layer]) if norm else expected[layer]
            assert found.cls is not None
            close(found.cls, x[:, 0])
            close(found.patches.flatten(1, 2), x[:, 1:])


def test_class_attention_gives_a_class_token_at_the_last_layer_alone():
    backbone = make("class-attention")
    assert backbone.class_attention is not None
    vit: Any = backbone.vit
    with torch.no_grad():
        early, last = backbone(images(), layers=(1, 2), norm=False).tokens
        x = plain_blocks(backbone, embedded(backbone, images()))[-1]
        cls = backbone.class_attention.cls_token.expand(2, -1, -1)
        for block in backbone.class_attention.blocks:
            cls = block(x, cls)
        (normed,) = backbone(images()).tokens
    assert early.cls is None
    assert last.cls is not None
    assert normed.cls is not None
    close(last.cls, cls[:, 0])
    close(last.patches.flatten(1, 2), x)
    close(normed.cls, vit.norm(cls[:, 0]))
    close(normed.patches.flatten(1, 2), vit.norm(x))


def slow_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """q k^T / sqrt(d), head by head. (B, N, D), (B, M, D) -> (B, heads, N, M)"""
    maps = [
        q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        for q, k in zip(query.chunk(heads, -1), key.chunk(heads, -1), strict=True)
    ]
    return torch.stack(maps, 1)


@pytest.mark.parametrize("kind", ["vit", "registers"])
def test_attention_is_softmax_of_scaled_products(kind: str):
    backbone = make(kind)
    with torch.no_grad():
        entering = [embedded(backbone, images())]
        entering += plain_blocks(backbone, entering[0])[:-1]
        logits = backbone(images(), attention=(1, -1), logits=True).attention
        probabilities = backbone(images(), attention=(1, -1)).attention
        for number, found, soft in zip((1, 2), logits, probabilities, strict=True):
            block: Any = backbone.vit.blocks[number]
            query, key, _ = block.attn.qkv(block.norm1(entering[number])).chunk(3, -1)
            expected = slow_attention(query, key, 4)
            close(found, expected)
            close(soft, expected.softmax(-1))
    assert logits[0].shape[-1] == 16 + backbone.n_prefix


def test_attention_with_normalized_queries_and_keys():
    backbone = make("scaled")
    block: Any = backbone.vit.blocks[0]
    with torch.no_grad():
        (found,) = backbone(images(), attention=(0,), logits=True).attention
        query, key, _ = block.attn.qkv(block.norm1(embedded(backbone, images()))).chunk(3, -1)
        query = torch.cat([block.attn.q_norm(part) for part in query.chunk(4, -1)], -1)
        key = torch.cat([block.attn.k_norm(part) for part in key.chunk(4, -1)], -1)
    close(found, slow_attention(query, key, 4))


def test_beits_attention_has_its_bias():
    backbone = make("beit")
    block: Any = backbone.vit.blocks[0]
    with torch.no_grad():
        (found,) = backbone(images(), attention=(0,), logits=True).attention
        attn, x = block.attn, block.norm1(embedded(backbone, images()))
        query, key, _ = (x @ attn.qkv.weight.T).chunk(3, -1)
        expected = slow_attention(query + attn.q_bias, key, 4)
        table = attn.relative_position_bias_table
        for i in range(16):
            for j in range(16):  # 7 x 7 offsets of a 4 x 4 window, row by row
                offset = (i // 4 - j // 4 + 3) * 7 + (i % 4 - j % 4 + 3)
                expected[:, :, 1 + i, 1 + j] += table[offset]
        expected[:, :, 0, 1:] += table[49][None, :, None]  # class token to patches, patches to it, to itself
        expected[:, :, 1:, 0] += table[50][None, :, None]
        expected[:, :, 0, 0] += table[51]
    close(found, expected)


def test_class_attention_maps():
    backbone = make("class-attention")
    assert backbone.class_attention is not None
    with torch.no_grad():
        trunk, first, last = backbone(images(), attention=(2, 3, -1), logits=True).attention
        (soft,) = backbone(images(), attention=(4,)).attention
        x = plain_blocks(backbone, embedded(backbone, images()))[-1]
        cls = backbone.class_attention.cls_token.expand(2, -1, -1)
        assert trunk.shape == (2, 4, 16, 16)
        for block, found in zip(backbone.class_attention.blocks, (first, last), strict=True):
            part: Any = block
            u = part.norm1(torch.cat([cls, x], 1))
            expected = slow_attention(part.attn.q(u[:, :1]), part.attn.k(u), 4)
            close(found, expected)
            cls = part(x, cls)
    close(soft, expected.softmax(-1))


# ---------------------------------------------------------------- other image sizes


def cubic(t: float) -> float:
    """The kernel of torch's bicubic interpolation, a = -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resized_by_hand(values: Tensor, n_out: int, scale: float) -> Tensor:
    """Along the first dimension: sample i lies at (i + 1/2) / scale - 1/2; the border is repeated."""
    n_in, rows = len(values), []
    for i in range(n_out):
        center = (i + 0.5) / scale - 0.5
        base = int(center // 1)
        rows.append(sum(cubic(center - k) * values[min(max(k, 0), n_in - 1)] for k in range(base - 1, base + 3)))
    return torch.stack(rows)  # type: ignore[arg-type]


def positions_by_hand(square: Tensor, grid: tuple[int, int], how: str) -> Tensor:
    """(g, g, D) -> (H, W, D)."""
    for axis, side in enumerate(grid):
        native = square.shape[axis]
        scale = (side + 0.1) / native if how == "dino" else side / native
        square = resized_by_hand(square.transpose(0, axis), side, scale).transpose(0, axis)
    return square


@pytest.mark.parametrize("how", ["bicubic", "dino", "antialias"])
@pytest.mark.parametrize("size", [(24, 32), (40, 16), (8, 12)])
def test_other_sizes_interpolate_the_positions(how: str, size: tuple[int, int]):
    backbone = make("vit", position_resize=how)
    vit: Any = backbone.vit
    grid = (size[0] // 4, size[1] // 4)
    square = vit.pos_embed[0, 1:].reshape(4, 4, -1)
    if how != "antialias":
        positions = positions_by_hand(square.double(), grid, how).float()
    elif size[0] < 16:  # only shrinking differs, by a wider kernel
        positions = F.interpolate(square.permute(2, 0, 1)[None], grid, mode="bicubic", antialias=True)[0].permute(
            1, 2, 0
        )
        plain = F.interpolate(square.permute(2, 0, 1)[None], grid, mode="bicubic")[0].permute(1, 2, 0)
        assert not positions.allclose(plain, atol=1e-2)
    else:  # torch's antialiased kernel has a = -0.5
        positions = F.interpolate(square.permute(2, 0, 1)[None], grid, mode="bicubic", antialias=True)[0].permute(
            1, 2, 0
        )
    with torch.no_grad():
        x = vit.patch_embed.proj(images(*size)).permute(0, 2, 3, 1) + positions
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1)
        x = plain_blocks(backbone, torch.cat([cls, x.flatten(1, 2)], 1))[-1]
        (tokens,) = backbone(images(*size), norm=False).tokens
    assert tokens.patches.shape == (2, *grid, 32)
    assert tokens.cls is not None
    close(tokens.cls, x[:, 0])
    close(tokens.patches.flatten(1, 2), x[:, 1:])


def test_as_many_patches_in_another_shape_are_interpolated_too():
    backbone = make("vit")
    vit: Any = backbone.vit
    entering, grid = backbone.embed(images(8, 32))
    assert grid == (2, 8)
    plain = vit.patch_embed.proj(images(8, 32)).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    assert not entering[:, 1:].allclose(plain, atol=1e-2)


def resized(backbone: Backbone, size: tuple[int, int]) -> Any:
    vit: Any = backbone.vit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's interpolation uses what torch is about to drop
        vit.set_input_size(img_size=size)
    return vit


@pytest.mark.parametrize("size", [(24, 32), (8, 12), (16, 24), (64, 64)])
def test_beit_at_another_size_equals_timms(size: tuple[int, int]):
    backbone, twin = make("beit"), make("beit")
    vit: Any = resized(twin, size)
    with torch.no_grad():
        (tokens,) = backbone(images(*size)).tokens
        expected = vit.forward_features(images(*size))
    assert tokens.cls is not None
    close(tokens.cls, expected[:, 0])
    close(tokens.patches.flatten(1, 2), expected[:, 1:])


def test_sizes_do_not_change_the_network():
    for kind in ("vit", "beit"):
        backbone = make(kind)
        with torch.no_grad():
            before = backbone(images()).tokens[0].patches
            backbone(images(24, 32))
            assert backbone(images()).tokens[0].patches.equal(before)


# ---------------------------------------------------------------- masked forwards

KEEP = torch.tensor([[0, 5, 10, 15, 3], [7, 2, 1, 14, 8]])  # another choice for every image, in any order


def counted(block: nn.Module, run: Callable[[], object]) -> int:
    """How many tokens a block sees."""
    seen: list[int] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    run()
    hook.remove()
    return sum(seen)


@pytest.mark.parametrize("kind", ["vit", "scaled", "registers", "registers-with-positions", "class-attention"])
def test_a_masked_forward_runs_the_kept_tokens_alone(kind: str):
    backbone = make(kind)
    prefix = backbone.n_prefix
    with torch.no_grad():
        x = embedded(backbone, images())
        kept = torch.stack([torch.cat([row[:prefix], row[prefix:][keep]]) for row, keep in zip(x, KEEP, strict=True)])
        expected = plain_blocks(backbone, kept)
        first, last = backbone(images(), layers=(0, 2), norm=False, keep=KEEP).tokens
    close(first.patches, expected[0][:, prefix:])
    close(last.patches, expected[2][:, prefix:])
    assert last.patches.shape == (2, 5, 32)
    if prefix:
        assert last.cls is not None
        close(last.cls, expected[2][:, 0])
    assert counted(backbone.vit.blocks[0], lambda: backbone(images(), keep=KEEP)) == prefix + 5


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_beits_masked_forward_keeps_the_bias_of_the_kept_pairs(size: tuple[int, int]):
    """One image at a time, with the full bias from timm, and rows and columns taken from it."""
    backbone, twin = make("beit"), make("beit")
    vit: Any = resized(twin, size)
    with torch.no_grad():
        (tokens,) = backbone(images(*size), norm=False, keep=KEEP).tokens
        assert tokens.cls is not None
        for number, keep in enumerate(KEEP):
            index = torch.cat([torch.tensor([0]), keep + 1])
            x = vit.patch_embed(images(*size)[number : number + 1])
            x = torch.cat([vit.cls_token, x], 1)[:, index]
            for block in vit.blocks:
                attn, y = block.attn, block.norm1(x)
                q, k, v = (y @ attn.qkv.weight.T).chunk(3, -1)
                scores = slow_attention(q + attn.q_bias, k, 4) + attn._get_rel_pos_bias()[:, :, index][..., index]
                heads = [
                    p @ part
                    for p, part in zip(scores.softmax(-1).unbind(1), (v + attn.v_bias).chunk(4, -1), strict=True)
                ]
                x = x + block.gamma_1 * attn.proj(torch.cat(heads, -1))
                x = x + block.gamma_2 * block.mlp(block.norm2(x))
            close(tokens.cls[number], x[0, 0])
            close(tokens.patches[number], x[0, 1:])


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_in_order_is_a_full_forward(kind: str):
    backbone = make(kind)
    keep = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        (full,) = backbone(images()).tokens
        (kept,) = backbone(images(), keep=keep).tokens
    close(kept.patches, full.patches.flatten(1, 2))
    assert full.cls is not None
    assert kept.cls is not None
    close(kept.cls, full.cls)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight_and_kept_pixels_alone(kind: str):
    backbone = make(kind)
    x = images().requires_grad_()
    output = backbone(x, keep=KEEP).tokens[0]
    assert output.cls is not None
    (output.patches.square().sum() + output.cls.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert x.grad is not None
    touched = F.max_pool2d(x.grad.abs(), 4).sum(1).flatten(1) > 0
    for row, keep in zip(touched, KEEP, strict=True):
        assert set(row.nonzero().flatten().tolist()) == set(keep.tolist())


# ---------------------------------------------------------------- costs and refusals


def test_blocks_behind_the_last_one_wanted_do_not_run():
    backbone = make("class-attention")
    assert backbone.class_attention is not None
    blocks = [*backbone.vit.blocks, *backbone.class_attention.blocks]

    def ran(**options: Any) -> list[bool]:
        return [counted(block, lambda: backbone(images(), **options)) > 0 for block in blocks]

    assert ran(layers=(0,)) == [True, False, False, False, False]
    assert ran(layers=(0,), attention=(1,)) == [True, True, False, False, False]
    assert ran() == [True] * 5
    assert ran(layers=(0,), attention=(3,)) == [True] * 5
    assert ran(layers=(), attention=(0,))[1:] == [False] * 4


def test_what_does_not_exist_is_refused():
    backbone = make("vit")
    with pytest.raises(UserError, match=r"layer 3 does not exist: the network has 3 of them, 0 to 2"):
        backbone(images(), layers=(3,))
    with pytest.raises(UserError, match="layer -4 does not exist"):
        backbone(images(), layers=(-4,))
    with pytest.raises(UserError, match="attention 3 does not exist"):
        backbone(images(), attention=(3,))
    with pytest.raises(UserError, match=r"18 x 16 px do not divide into patches of 4 px; .* for example 16 x 16"):
        backbone(images(18, 16))


# ---------------------------------------------------------------- building


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_under_timms_names(kind: str):
    backbone, other = make(kind), build(KINDS[kind]).eval()
    state = canonical_state(backbone)
    assert not any(key.startswith("vit.") for key in state)
    load_canonical(other, state)
    with torch.no_grad():
        assert other(images()).tokens[0].patches.equal(backbone(images()).tokens[0].patches)


@pytest.mark.parametrize(("dim", "mlp_dim"), [(96, 250), (48, 127), (33, 100)])
def test_any_width_of_the_mlp_is_built(dim: int, mlp_dim: int):
    architecture = Architecture(dim=dim, depth=1, heads=3, patch_px=4, image_px=8, mlp_dim=mlp_dim)
    block: Any = build(architecture).vit.blocks[0]
    assert block.mlp.fc1.out_features == mlp_dim


def test_the_epsilon_is_everywhere():
    for kind in KINDS:
        backbone = make(kind, eps=1e-3)
        norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
        assert norms
        assert {module.eps for module in norms} == {1e-3}


def test_short_names():
    assert parse_name("vit_96x4x3_patch8_48") == Architecture(
        dim=96, depth=4, heads=3, patch_px=8, image_px=48, mlp_dim=384
    )
    assert parse_name("vit_tiny_patch16_224") is None
    for name in ("vit_96x4x5_patch8_48", "vit_96x4x3_patch8_50", "vit_96x0x3_patch8_48", "vit_96x4x3_patch8_0"):
        with pytest.raises(UserError, match=name):
            parse_name(name)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(16, 16), (24, 8), (28, 20), (8, 8), (4, 30)])
def test_pixels(size: tuple[int, int]):
    backbone, batch = Pixels(8), images(*size)
    first, second = backbone(batch, layers=(0, 5), norm=False).tokens
    assert first.cls is not None
    assert second.patches.equal(first.patches)
    assert first.patches.shape == (2, size[0] // 8, size[1] // 8, 192)
    for number, image in enumerate(batch):
        assert first.cls[number].equal(image.reshape(-1))
        for row in range(size[0] // 8):
            for column in range(size[1] // 8):
                patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                assert first.patches[number, row, column].equal(patch.reshape(-1))
    assert backbone.architecture.mean == (0.5, 0.5, 0.5)
