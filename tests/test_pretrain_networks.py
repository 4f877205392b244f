"""The parts that several methods share, against MAE's description written out slowly."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.backbone import build
from ssl_bench.pretrain import networks

TINY = "vit_32x2x2_patch8_32"  # 4 x 4 patches


def slow_positions(dim, grid):
    """MAE's table, entry by entry: [sin(c w), cos(c w), sin(r w), cos(r w)], w = 10000^(-k / (dim / 4))."""
    table = np.zeros((grid * grid, dim))
    quarter = dim // 4
    for row in range(grid):
        for column in range(grid):
            for k in range(quarter):
                w = 1 / 10000 ** (k / quarter)
                entry = table[row * grid + column]
                entry[k], entry[quarter + k] = math.sin(column * w), math.cos(column * w)
                entry[2 * quarter + k], entry[3 * quarter + k] = math.sin(row * w), math.cos(row * w)
    return table


@pytest.mark.parametrize(("dim", "grid"), [(768, 14), (32, 4), (96, 6)])
def test_positions_are_laid_out_as_in_mae(dim, grid):
    positions = networks.sincos_positions(dim, grid, prefix=1)
    assert positions.shape == (1, 1 + grid * grid, dim)
    assert positions.dtype == torch.float32
    assert not positions[0, 0].any()
    np.testing.assert_allclose(positions[0, 1:].numpy(), slow_positions(dim, grid), atol=1e-6)


def test_positions_of_no_prefix_and_of_an_odd_width():
    np.testing.assert_allclose(networks.sincos_positions(8, 3, prefix=0)[0].numpy(), slow_positions(8, 3), atol=1e-6)
    with pytest.raises(UserError, match="divisible by 4, not 30"):
        networks.sincos_positions(30, 4, prefix=1)


def test_the_table_of_positions_is_not_shared_between_networks():
    first = networks.sincos_positions(8, 3, prefix=1)
    first.zero_()
    assert networks.sincos_positions(8, 3, prefix=1)[0, 1:].any()


def test_a_student_has_fixed_positions_with_a_slot_for_the_class_token():
    student = networks.student(named(TINY))
    positions = student.vit.pos_embed
    assert isinstance(positions, nn.Parameter)
    assert not positions.requires_grad
    assert all(p.requires_grad for name, p in student.named_parameters() if name != "vit.pos_embed")
    np.testing.assert_allclose(positions[0, 1:].numpy(), slow_positions(32, 4), atol=1e-6)
    assert positions.shape == (1, 17, 32)
    assert not positions[0, 0].any()


def test_initialization_is_mae_s():
    torch.manual_seed(0)
    architecture = named("vit_192x2x3_patch16_64")
    student = networks.student(architecture)
    decoder = networks.Decoder(192, 128, 2, 4, architecture.grid)
    networks.initialize_as_mae(decoder)
    linear = 0
    for module in [*student.modules(), *decoder.modules()]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.detach().flatten(1)  # the patch projection as a linear layer of 3 * 16 * 16 inputs
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.97 * bound < weight.abs().max() <= bound
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
            assert module.bias.any() == isinstance(module, nn.Conv2d)  # which MAE leaves as torch draws it
            linear += 1
        elif isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
            assert module.eps == 1e-6
    assert linear == 1 + 2 * 4 + 1 + 2 * 4  # patches; qkv, projection and two of the MLP a block; the way in
    for token in (student.vit.cls_token, decoder.tokens.mask_token):
        assert token.requires_grad
        assert token.std().item() == pytest.approx(0.02, rel=0.2)


# What the papers count: MAE 49; TEC 49; MOCA 88, 49, 68; ExtreMA 80 % 39, 90 % 19, 75 % 49.
@pytest.mark.parametrize(
    ("n_patches", "ratio", "kept"),
    [(196, 0.75, 49), (196, 0.55, 88), (196, 0.65, 68), (196, 0.8, 39), (196, 0.9, 19), (196, 0.5, 98), (36, 0.75, 9)],
)
def test_counts_of_visible_patches(n_patches, ratio, kept):
    assert networks.kept_patches(n_patches, ratio) == kept


def test_counts_do_not_depend_on_how_a_ratio_rounds():
    for n_patches in (36, 100, 144, 196, 256, 400):
        for percent in range(5, 96):
            exact = math.floor(n_patches * (1 - Fraction(percent, 100)))
            assert networks.kept_patches(n_patches, percent / 100) == exact


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_a_ratio_that_hides_nothing_or_all_is_refused(ratio):
    with pytest.raises(UserError, match=r"dec_ratio=.* of 16 patches visible; expected at least one visible"):
        networks.kept_patches(16, ratio, name="dec_ratio")


def test_patches_are_rows_of_pixels_with_channels_last_and_nothing_is_lost():
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    patches = networks.patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    rebuilt = torch.full_like(images, -1)
    for number in range(6):
        row, column = divmod(number, 3)
        for y in range(4):
            for x in range(4):
                for channel in range(3):
                    value = patches[:, number, (y * 4 + x) * 3 + channel]
                    rebuilt[:, channel, row * 4 + y, column * 4 + x] = value
    assert torch.equal(rebuilt, images)


def test_standardized_uses_the_unbiased_variance():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 0.003 + 2
    for dim in (-1, 1):
        values = x.double().numpy()
        mean, variance = values.mean(dim, keepdims=True), values.var(dim, ddof=1, keepdims=True)
        np.testing.assert_allclose(
            networks.standardized(x.double(), dim=dim), (values - mean) / np.sqrt(variance + 1e-6)
        )


def test_gathered_takes_each_image_s_own_tokens():
    x, ids = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    expected = torch.stack([torch.stack([x[image, token] for token in ids[image]]) for image in range(2)])
    assert torch.equal(networks.gathered(x, ids), expected)
    assert torch.equal(networks.gathered(x[:1], ids)[1], x[0][ids[1]])  # one table for all images


@pytest.mark.parametrize("with_prefix", [True, False])
def test_the_decoder_is_mae_s_with_every_token_in_its_place(with_prefix):
    """Ours leaves the tokens in the order of the mask; MAE puts them back in place. The answer is the same."""
    torch.manual_seed(1)
    decoder = networks.Decoder(12, 16, 2, 2, 3)
    networks.initialize_as_mae(decoder)
    prefix, visible = torch.randn(2, 12), torch.randn(2, 4, 12)
    order = torch.stack([torch.randperm(9), torch.randperm(9)])[:, :8]  # one patch goes unseen and unasked
    visible_ids, masked_ids = order[:, :4], order[:, 4:]
    with torch.no_grad():
        ours = decoder(prefix if with_prefix else None, visible, visible_ids, masked_ids)
    assert ours.shape == (2, int(with_prefix) + 8, 16)
    positions = torch.from_numpy(slow_positions(16, 3)).float()
    for image in range(2):
        places = {int(patch): decoder.tokens.project(visible[image, n]) for n, patch in enumerate(visible_ids[image])}
        places |= {int(patch): decoder.tokens.mask_token[0, 0] for patch in masked_ids[image]}
        tokens = [places[patch] + positions[patch] for patch in sorted(places)]
        if with_prefix:
            tokens.insert(0, decoder.tokens.project(prefix[image]))  # its position is 0
        with torch.no_grad():
            x = torch.stack(tokens)[None]
            for block in decoder.blocks:
                x = block(x)
            x = decoder.norm(x)[0]
        for n, patch in enumerate(order[image]):
            place = sorted(places).index(int(patch)) + int(with_prefix)
            torch.testing.assert_close(ours[image, n + int(with_prefix)], x[place], atol=1e-5, rtol=1e-4)
        if with_prefix:
            torch.testing.assert_close(ours[image, 0], x[0], atol=1e-5, rtol=1e-4)


def test_a_decoder_whose_heads_do_not_divide_its_width_is_refused():
    with pytest.raises(UserError, match="width 30 cannot have 4 heads"):
        networks.decoder_blocks(30, 1, 4)


def test_a_teacher_is_a_frozen_copy_without_stochastic_depth():
    student = networks.student(named(TINY), drop_path=0.9).train()
    teacher = networks.teacher_of(student)
    images = torch.randn(4, 3, 32, 32)
    assert not any(p.requires_grad for p in teacher.parameters())
    for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, other)
        assert own.data_ptr() != other.data_ptr()
    whole = teacher(images).tokens[0].patches
    assert torch.equal(whole, teacher(images).tokens[0].patches)
    assert torch.equal(whole, student.eval()(images).tokens[0].patches)
    assert student.vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.9)  # the student keeps its own


def test_a_teacher_moves_by_its_momentum():
    student, teacher = build(named(TINY)), build(named(TINY)).requires_grad_(False)
    before = [p.detach().double().clone() for p in teacher.parameters()]
    networks.move_teacher(teacher, student, 0.9)
    for now, old, new in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(now.double(), 0.9 * old + 0.1 * new.detach().double(), atol=1e-7, rtol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    networks.move_teacher(teacher, student, 0.0)
    for now, new in zip(teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(now, new.detach(), atol=1e-7, rtol=0)
