"""TEC against a slow calculation in float64, written from the paper with loops, and against the paper's tables."""

from __future__ import annotations

import dataclasses
import math
import socket

import foreign_checkpoints as foreign
import numpy as np
import pytest
import torch
from torch import multiprocessing

from ssl_bench.errors import UserError
from ssl_bench.evaluate.adapters import EncoderAdapter, InputAdapter, block_outputs
from ssl_bench.evaluate.architecture import HALF, IMAGENET_MEAN, IMAGENET_STD, Architecture, named
from ssl_bench.evaluate.backbone import build, canonical_state
from ssl_bench.evaluate.checkpoints import Checkpoint, open_checkpoint
from ssl_bench.evaluate.recipes import with_settings
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.training.distributed import replicated
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.pretrain import networks, tec
from ssl_bench.pretrain.tec import RECIPES

STUDENT, BASE = "vit_32x4x2_patch8_32", "vit_32x3x4_patch8_32"  # 16 patches; another depth, another number of heads


@pytest.fixture(autouse=True)
def _one_thread():
    """These networks are too small to be shared between threads."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def checkpoint(architecture: Architecture | str = BASE, seed=5) -> Checkpoint:
    """A base whose every weight is random."""
    shape = named(architecture) if isinstance(architecture, str) else architecture
    torch.manual_seed(seed)
    network = build(shape)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = canonical_state(network)
    return Checkpoint("base.pt", "base", "ssl-bench", "model", shape, "0" * 64, _weights=lambda: state)


def small(**changes):
    """The paper's first row on a network for tests."""
    fields = {"arch": STUDENT, "decoder_dim": 16, "decoder_heads": 2, "blocks_per_adapter": 2, "top_k": 3}
    return dataclasses.replace(RECIPES["mae-b"], **(fields | changes))


def made(recipe=None, base=None, seed=0, shake=0.2):
    """A method; `shake` moves every trained weight, so that no zero bias or token hides an error."""
    recipe = recipe or small()
    torch.manual_seed(seed)
    method = tec.make(recipe, named(recipe.arch), base or checkpoint()).train()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(shake * torch.randn_like(parameter))
    return method


def views(batch=3, arch=STUDENT, seed=1):
    architecture = named(arch)
    generator = torch.Generator().manual_seed(seed)
    rngs = [np.random.default_rng([seed, i]) for i in range(batch)]
    draws = np.stack([tec.draw(RECIPES["mae-b"], architecture, rng)[0] for rng in rngs])
    images = torch.randn(batch, 3, architecture.image_px, architecture.image_px, generator=generator)
    return Views((images,), (torch.from_numpy(draws),))


def as_double(method, given):
    return method.double(), Views(tuple(image.double() for image in given.images), given.draws)


# ------------------------------------------------------------------ the slow calculation, one image at a time


def norm(weights, name, x, eps=1e-6):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def mlp(weights, name, x):
    y = linear(weights, f"{name}.fc1", x)
    return linear(weights, f"{name}.fc2", y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))


def block(weights, name, x, heads):
    """One transformer block on (T, D); also the logits of its attention (heads, T, T)."""
    width = x.shape[-1] // heads
    query, key, value = linear(weights, f"{name}.attn.qkv", norm(weights, f"{name}.norm1", x)).split(x.shape[-1], -1)
    parts, logits = [], []
    for h in range(heads):
        of_head = slice(h * width, (h + 1) * width)
        scores = query[:, of_head] @ key[:, of_head].T / math.sqrt(width)
        logits.append(scores)
        parts.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ value[:, of_head])
    x = x + linear(weights, f"{name}.attn.proj", torch.cat(parts, 1))
    return x + mlp(weights, f"{name}.mlp", norm(weights, f"{name}.norm2", x)), torch.stack(logits)


def patch_tokens(weights, image, patch):
    rows = []
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            pixels = image[:, top : top + patch, left : left + patch]
            kernel = weights["patch_embed.proj.weight"]
            rows.append((kernel * pixels).sum((1, 2, 3)) + weights["patch_embed.proj.bias"])
    return torch.stack(rows) + weights["pos_embed"][0, 1:]


def base_outputs(weights, architecture, image):
    """Of one image: tokens after every block, and the last block's logits."""
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = image * std + mean
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (architecture.mean, architecture.std))
    x = patch_tokens(weights, (pixels - mean) / std, architecture.patch_px)
    x = torch.cat([weights["cls_token"][0] + weights["pos_embed"][0, :1], x])
    after, logits = [], None
    for n in range(architecture.depth):
        x, logits = block(weights, f"blocks.{n}", x, architecture.heads)
        after.append(x)
    return after, logits


def slow_feature_target(after, how):
    y = (after[-1][1:] + after[-2][1:]) / 2
    patches, channels = y.shape
    result = y.clone()
    if how == "patch":
        for c in range(channels):
            mean = sum(y[:, c]) / patches
            variance = sum((y[:, c] - mean) ** 2) / (patches - 1)
            result[:, c] = (y[:, c] - mean) / torch.sqrt(variance + 1e-6)
    if how == "channel":
        for p in range(patches):
            mean = sum(y[p]) / channels
            variance = sum((y[p] - mean) ** 2) / (channels - 1)
            result[p] = (y[p] - mean) / torch.sqrt(variance + 1e-6)
    return result


def slow_selection(logits, recipe):
    """Patches, counted from 0 without the class token."""
    patches = logits.shape[-1] - 1
    if recipe.attention in ("cls", "all"):
        return [] if recipe.attention == "cls" else list(range(patches))
    score = torch.zeros(patches, dtype=torch.float64)
    for of_head in logits:
        row = of_head[0].exp() / of_head[0].exp().sum() if recipe.ranking == "map" else of_head[0]
        score += row[1:] / len(logits)
    return sorted(range(patches), key=lambda p: -float(score[p]))[: recipe.top_k]


def slow_student(method, recipe, image, visible):
    """Z_e: (1 + n, D)."""
    weights = canonical_state(method.student)
    architecture = named(recipe.arch)
    x = patch_tokens(weights, image, architecture.patch_px)[visible]
    token = weights["cls_token"][0]
    if recipe.adapters != "none":
        adapter = method.input_adapter.state_dict()
        token = mlp(adapter, "mlp", adapter["cls_token"][0])
    x, after = torch.cat([token, x]), []  # the position of the class token is zero
    for n in range(architecture.depth):
        x, _ = block(weights, f"blocks.{n}", x, architecture.heads)
        after.append(x)
    after[-1] = norm(weights, "norm", x)
    if recipe.adapters != "both":
        return after[-1]
    adapter, dim = method.encoder_adapter.state_dict(), architecture.dim
    everything = norm(adapter, "norm_blocks", torch.cat(after, 1))
    total, width = 0, dim * recipe.blocks_per_adapter
    for n in range(architecture.depth // recipe.blocks_per_adapter):
        z = linear(adapter, f"merge.{n}", everything[:, n * width : (n + 1) * width])
        total = total + z + mlp(adapter, f"mlp.{n}", z)
    return norm(adapter, "norm", total)


def slow_decoder(method, recipe, z, visible, target):
    """Tokens in the order of the image: (1 + N, d), the class token first."""
    weights = method.decoder.state_dict()
    positions = method.decoder.tokens[target].positions[0].double()
    projected = linear(weights, f"tokens.{target}.project", z)
    x = [projected[0]] + [weights[f"tokens.{target}.mask_token"][0, 0]] * (len(positions) - 1)
    for place, patch in enumerate(visible.tolist()):
        x[1 + patch] = projected[1 + place]
    x = torch.stack(x) + positions
    for n in range(recipe.decoder_depth):
        x, _ = block(weights, f"blocks.{n}", x, recipe.decoder_heads)
    return norm(weights, f"norms.{target}", x)


def slow_attention_loss(method, recipe, decoded, logits, architecture):
    """Cross-entropy of every row and head, one key after the other."""
    weights, dim, heads = method.decoder.state_dict(), architecture.dim, architecture.heads
    query, key = linear(weights, "query", decoded), linear(weights, "key", decoded)
    factor = {"width": dim**-0.5, "head": (dim / heads) ** -0.5, "none": 1.0}[recipe.scale]
    width, terms = dim // heads, []
    for row in [0] + [1 + patch for patch in slow_selection(logits, recipe)]:
        for h in range(heads):
            target = (logits[h, row, 1:] / recipe.temperature).exp()
            target = target / target.sum()
            of_head = slice(h * width, (h + 1) * width)
            predicted = (key[1:, of_head] @ query[row, of_head] * factor).exp()
            predicted = predicted / predicted.sum()
            terms.append(-sum(t * torch.log(p) for t, p in zip(target, predicted, strict=True)))
    return torch.stack(terms).mean()


@torch.no_grad()
def slow_losses(method, recipe, base, given):
    weights = {key: value.double() for key, value in base.state.items()}
    kept, features, attention = named(recipe.arch).grid ** 2 // 4, [], []
    for image, order in zip(given.images[0], given.draws[0], strict=True):
        visible, masked = order[:kept], order[kept:]
        after, logits = base_outputs(weights, base.architecture, image)
        z = slow_student(method, recipe, image, visible)
        predicted = linear(method.decoder.state_dict(), "feature", slow_decoder(method, recipe, z, visible, "feature"))
        target = slow_feature_target(after, recipe.normalization)
        features += [((predicted[1 + p] - target[p]) ** 2).mean() for p in masked.tolist()]
        if recipe.attention != "none":
            decoded = slow_decoder(method, recipe, z, visible, "attention")
            attention.append(slow_attention_loss(method, recipe, decoded, logits, base.architecture))
    losses = {"feature": torch.stack(features).mean()}
    return losses | ({"attention": torch.stack(attention).mean()} if attention else {})


VARIANTS = {
    "as the paper": {},
    "as the code": {"ranking": "logits"},
    "no adapters": {"adapters": "none"},
    "input adapter": {"adapters": "input", "scale": "head"},
    "raw features": {"normalization": "none", "attention": "none"},
    "channels": {"normalization": "channel", "attention": "cls", "scale": "none"},
    "all attention": {"attention": "all", "temperature": 0.7},
    "one block a group": {"blocks_per_adapter": 1, "temperature": 1.0, "top_k": 16, "decoder_depth": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_equal_a_slow_calculation(variant):
    recipe, base = small(**VARIANTS[variant]), checkpoint()
    method, given = as_double(made(recipe, base), views())
    losses, expected = method(given), slow_losses(method, recipe, base, given)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        # Targets and losses are in float32, whatever comes in.
        assert losses[name].item() == pytest.approx(value.item(), rel=2e-5), name


def test_a_base_with_other_image_statistics_sees_its_own_normalization():
    shape = dataclasses.replace(named(BASE), mean=HALF, std=(0.5, 0.4, 0.3))
    base = checkpoint(shape)
    method, given = as_double(made(small(), base), views())
    expected = slow_losses(method, small(), base, given)
    assert method(given)["feature"].item() == pytest.approx(expected["feature"].item(), rel=2e-5)
    other, _ = as_double(made(small(), checkpoint(named(BASE))), given)
    assert abs(other(given)["feature"].item() - expected["feature"].item()) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_weight_gets_a_gradient_and_no_other_does(variant):
    method = made(small(**VARIANTS[variant]))
    sum(method(views()).values()).backward()
    for name, parameter in method.named_parameters():
        if name.startswith("base.") or name == "student.vit.pos_embed":
            assert not parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name  # noqa: PT018
        else:
            assert parameter.grad is None, name
    trained = {name.split(".")[0] for name, parameter in method.named_parameters() if parameter.requires_grad}
    adapters = {"none": set(), "input": {"input_adapter"}, "both": {"input_adapter", "encoder_adapter"}}
    assert trained == {"student", "decoder"} | adapters[method.recipe.adapters]
    assert method.student.vit.cls_token.requires_grad == (method.recipe.adapters == "none")


def test_each_target_has_its_own_way_into_the_shared_blocks():
    method = made()
    losses = method(views())
    losses["feature"].backward(retain_graph=True)
    for own, other in (("feature", "attention"), ("attention", "feature")):
        assert method.decoder.tokens[own].mask_token.grad.any()
        assert method.decoder.norms[own].weight.grad.any()
        for name, parameter in method.decoder.named_parameters():
            if f".{other}." in name:
                assert parameter.grad is None or not parameter.grad.any(), name
        shared = list(method.decoder.blocks.parameters())
        assert all(parameter.grad.any() for parameter in shared)
        method.zero_grad()
        losses["attention"].backward(retain_graph=True)
        if own == "attention":
            assert method.decoder.feature.weight.grad is None


# ------------------------------------------------------------------ targets


def test_selection_by_the_map_and_by_the_logits_can_differ():
    """One head is sure of patch 0; the other likes patch 1, and dislikes patch 0 very much."""
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 0, 0] = torch.tensor([0.0, 4.0, 1.0, 0.0])
    logits[0, 1, 0] = torch.tensor([0.0, -20.0, 1.0, 0.0])
    by_map = tec.chosen_patches(logits, 1, small(top_k=1, ranking="map"))
    by_logits = tec.chosen_patches(logits, 1, small(top_k=1, ranking="logits"))
    assert (by_map.tolist(), by_logits.tolist()) == ([[0]], [[1]])


def test_the_attention_target_has_no_class_key_k_plus_1_rows_and_is_softened():
    logits = torch.randn(2, 4, 17, 17)
    rows = torch.tensor([[3, 5], [0, 15]])
    keys = torch.stack([torch.randperm(16) for _ in range(2)])
    target = tec.attention_target(logits, rows, keys, prefix=1, temperature=1.8)
    assert target.shape == (2, 4, 3, 16)
    assert torch.allclose(target.sum(-1), torch.ones(2, 4, 3))
    changed = logits.clone()
    changed[..., 0] += 100.0  # the class token's key does not count
    assert torch.equal(tec.attention_target(changed, rows, keys, prefix=1, temperature=1.8), target)
    sharp = tec.attention_target(logits, rows, keys, prefix=1, temperature=1.0)
    assert (sharp.max(-1).values > target.max(-1).values).all()
    assert target[1, 2, 2, 7].item() == pytest.approx(
        (logits[1, 2, 16, 1:] / 1.8).softmax(-1)[keys[1, 7]].item(), rel=1e-5
    )


def test_patch_normalization_gives_each_channel_of_an_image_mean_0_and_variance_1():
    blocks = [torch.randn(2, 196, 8) * torch.logspace(-1, 2, 8) + 5 for _ in range(2)]
    target = tec.feature_target(blocks, "patch")
    assert target.mean(1).abs().max() < 1e-4
    assert torch.allclose(target.var(1), torch.ones(2, 8), atol=0.02)
    assert torch.equal(tec.feature_target(blocks, "none"), (blocks[0] + blocks[1]) / 2)
    assert tec.feature_target(blocks, "channel").mean(2).abs().max() < 1e-4


def test_targets_do_not_depend_on_the_base_s_final_norm():
    base = checkpoint()
    before = made(small(), base)(views())
    with torch.no_grad():
        base.backbone.vit.norm.weight.mul_(3.0)
        base.backbone.vit.norm.bias.add_(1.0)
    after = made(small(), base)(views())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_targets_are_float32_and_losses_finite_under_autocast():
    method = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method(views())
    exact = method(views())
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)
    sum(losses.values()).backward()


# ------------------------------------------------------------------ counts of the paper


def test_counts_at_224_px(monkeypatch):
    """49 of 196 patches and the class token enter the new model; the base sees all, the decoder all of both."""
    recipe = small(arch="vit_64x2x4_patch16_224", top_k=15)
    method = made(recipe, checkpoint("vit_64x2x2_patch16_224"), shake=0.0)
    seen = {}
    for name, module in (
        ("student", method.student.vit.blocks[0]),
        ("base", method.base.vit.blocks[0]),
        ("decoder", method.decoder.blocks[0]),
        ("query", method.decoder.query),
        ("key", method.decoder.key),
        ("feature", method.decoder.feature),
        ("adapter", method.encoder_adapter.merge[0]),
    ):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: tuple(inputs[0].shape)}))
    targets, made_by = [], tec.attention_target
    monkeypatch.setattr(tec, "attention_target", lambda *a, **k: targets.append(made_by(*a, **k)) or targets[-1])
    method(views(2, recipe.arch))
    assert targets[0].shape == (2, 2, 16, 196)
    assert seen == {
        "student": (2, 50, 64),
        "base": (2, 197, 64),
        "decoder": (4, 197, 16),  # both targets at once
        "query": (2, 16, 16),
        "key": (2, 196, 16),
        "feature": (2, 147, 16),
        "adapter": (2, 50, 128),
    }


def test_official_sizes_of_vit_b_and_vit_l(monkeypatch):
    # Shapes alone are looked at, on the meta device, where remembered positions are not.
    monkeypatch.setattr(networks, "sincos_positions", lambda dim, grid, prefix: torch.zeros(1, prefix + grid**2, dim))
    with torch.device("meta"):
        for name, dim, groups, hidden, decoder in (("mae-b", 768, 4, 2048, 512), ("mae-l", 1024, 8, 3072, 768)):
            recipe = RECIPES[name]
            shape = named(recipe.arch)
            method = tec.TEC(recipe, build(shape), build(shape))
            assert len(method.encoder_adapter.merge) == groups
            assert method.encoder_adapter.merge[0].weight.shape == (dim, 3 * dim)
            assert method.encoder_adapter.mlp[0].fc1.weight.shape == (hidden, dim)
            assert method.input_adapter.mlp.fc1.weight.shape == (4 * dim, dim)
            assert method.decoder.feature.weight.shape == (dim, decoder)
            assert method.decoder.query.weight.shape == (dim, decoder)
            assert len(method.decoder.blocks) == 2
            assert method.decoder.blocks[0].attn.num_heads == 16
            assert method.decoder.scale == pytest.approx(dim**-0.5)
            assert method.kept == 49


def test_initialization_is_mae_s():
    method = made(small(arch="vit_96x4x2_patch8_32"), checkpoint("vit_96x3x4_patch8_32"), shake=0.0)
    mask_tokens = [tokens.mask_token for tokens in method.decoder.tokens.values()]
    assert not torch.equal(*mask_tokens)
    for token in (method.input_adapter.cls_token, method.student.vit.cls_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.25)
    for name, parameter in method.named_parameters():
        if name.startswith("base."):
            continue
        if name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("weight") and parameter.ndim == 2:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.8 * bound < parameter.abs().max() <= bound, name


def test_draws_are_permutations_of_all_patches_equally_often():
    architecture, recipe = named(STUDENT), RECIPES["mae-b"]
    (first,) = tec.draw(recipe, architecture, np.random.default_rng(3))
    assert sorted(first.tolist()) == list(range(16))
    assert first.tolist() == tec.draw(recipe, architecture, np.random.default_rng(3))[0].tolist()
    rng = np.random.default_rng(0)
    visible = np.zeros(16)
    for _ in range(4000):
        visible[tec.draw(recipe, architecture, rng)[0][:4]] += 1
    assert np.abs(visible / 4000 - 0.25).max() < 0.035  # five standard deviations


# ------------------------------------------------------------------ the base


def test_the_base_never_trains():
    base = checkpoint()
    method = made(small(), base)
    before = {key: value.clone() for key, value in base.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.1)
    sum(method(views()).values()).backward()
    optimizer.step()
    assert not method.base.training
    assert not any(module.training for module in method.base.modules())
    assert method.student.training
    assert all(torch.equal(value, before[key]) for key, value in method.base.state_dict().items())
    assert "base.vit.cls_token" in method.state_dict()


def test_the_new_model_starts_from_the_base_if_asked():
    base = checkpoint(STUDENT)
    loaded, fresh = made(small(load_base=True), base, shake=0.0), made(small(), base, shake=0.0)
    for name, value in base.backbone.state_dict().items():
        assert torch.equal(loaded.student.state_dict()[name], value), name
    assert torch.equal(loaded.input_adapter.cls_token, base.backbone.vit.cls_token)
    assert loaded.student.vit.blocks[0].attn.qkv.weight.requires_grad
    assert not loaded.student.vit.pos_embed.requires_grad
    assert loaded.student.vit.blocks[0].attn.qkv.weight is not base.backbone.vit.blocks[0].attn.qkv.weight
    assert not torch.equal(fresh.student.vit.blocks[0].attn.qkv.weight, base.backbone.vit.blocks[0].attn.qkv.weight)


WRITERS = {
    "mae": foreign.mae,
    "ibot": foreign.ibot,
    "dino": foreign.dino,
    "moca": foreign.moca,
    "beit": foreign.beit,
    "dinov2-registers": lambda path: foreign.dinov2(path, registers=2),
    "hf-vit": foreign.hf_vit,
    "tec-training": foreign.tec_training,
    "tec-release": foreign.tec_release,
}


@pytest.mark.parametrize("name", WRITERS)
def test_any_checkpoint_that_opens_can_be_the_base(name, tmp_path):
    known = WRITERS[name](tmp_path / f"{name}.pth")
    base = open_checkpoint(known.path)
    recipe = small(arch="vit_128x2x4_patch4_16")
    method = made(recipe, base)
    given = views(2, recipe.arch)
    images = given.images[0]
    features, attention = method.of_base(images)
    tokens = 16 + base.backbone.n_prefix
    assert attention.shape == (2, base.architecture.heads, tokens, tokens)
    # The project's own forward pass, which normalizes: so does this test.
    pixels = images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in known.mean_std)
    _, patches = known.networks[base.key]((pixels - mean) / std)
    assert torch.allclose(base.backbone.vit.norm(features[-1]), patches, atol=2e-4)
    assert [x.shape for x in features] == [(2, 16, 128)] * 2
    sum(method(given).values()).backward()


def test_a_base_of_another_image_size_is_asked_at_ours():
    method = made(small(), checkpoint("vit_32x3x4_patch8_48"))
    features, _ = method.of_base(views().images[0])
    assert features[0].shape == (3, 16, 32)
    sum(method(views()).values()).backward()


def refused(*words, base=None, **changes):
    recipe = small(**changes)
    with pytest.raises(UserError) as caught:
        tec.make(recipe, named(recipe.arch), base)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_base_that_does_not_fit_is_refused_with_a_way_out():
    refused("--base CKPT")
    refused("base.pt", "width 64", "32", "--set arch", base=checkpoint("vit_64x3x4_patch8_32"))
    refused("patches of 16 px", "8 px", base=checkpoint("vit_32x3x4_patch16_32"))
    bare = dataclasses.replace(named(BASE), cls=False, position_of_prefix=False)
    for attention in ("cls", "all", "selected"):
        refused("no class token", "--set attention=none", base=checkpoint(bare), attention=attention)
    class_attention = dataclasses.replace(bare, class_attention_blocks=2)
    refused("no class token", "--set attention=none", base=checkpoint(class_attention))
    refused("target_blocks=4", base=checkpoint(), target_blocks=4)
    refused("top_k=17", "16 patches", base=checkpoint(), top_k=17)
    refused("blocks_per_adapter=3", "4 blocks", base=checkpoint(), blocks_per_adapter=3)
    refused("mask_ratio=0.99", base=checkpoint(), mask_ratio=0.99)
    refused(
        "no network", base=open_checkpoint("pixels:"), arch="vit_192x4x2_patch8_32", target_blocks=1, attention="none"
    )


@pytest.mark.parametrize("extra", [{}, {"class_attention_blocks": 2}])
def test_a_base_without_class_token_gives_features(extra):
    bare = dataclasses.replace(named(BASE), cls=False, position_of_prefix=False, **extra)
    method = made(small(attention="none"), checkpoint(bare))
    losses = method(views())
    assert set(losses) == {"feature"}
    losses["feature"].backward()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"depth": 3}, "depth=3"),
        ({"heads": 4}, "heads=4"),
        ({"image_px": 48}, "image_px=48"),
        ({"mean": HALF}, "mean="),
        ({"layer_scale": True}, "layer_scale=True"),
    ],
)
def test_weights_of_another_form_are_not_loaded(change, word):
    refused(word, "load_base=false", base=checkpoint(dataclasses.replace(named(STUDENT), **change)), load_base=True)


@pytest.mark.parametrize(
    "change",
    [
        {"mask_ratio": 1.0},
        {"mask_ratio": 0.0},
        {"temperature": 0.0},
        {"top_k": 0},
        {"decoder_depth": 0},
        {"target_blocks": 0},
        {"blocks_per_adapter": 0},
        {"epochs": 0},
    ],
)
def test_impossible_recipes_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(RECIPES["mae-b"], **change)


def test_settings_from_the_command_line():
    recipe = with_settings(
        RECIPES["mae-b"],
        {"attention": "none", "normalization": "channel", "adapters": "input", "load_base": "true", "top_k": "4"},
    )
    assert (recipe.attention, recipe.normalization, recipe.adapters) == ("none", "channel", "input")
    assert (recipe.load_base, recipe.top_k) == (True, 4)


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("adapters", ["none", "input", "both"])
def test_the_saved_network_gives_the_outputs_of_the_trained_one(adapters, tmp_path):
    method = made(small(adapters=adapters)).eval()
    images = views().images[0]
    token = None if method.input_adapter is None else method.input_adapter()
    before = block_outputs(method.student, images, class_token=token)
    raw = method.student.vit.cls_token.clone()
    saved = method.saved()
    assert list(saved.networks) == ["model"]
    assert torch.equal(method.student.vit.cls_token, raw)  # training goes on as before
    expected = {"none": {"decoder"}, "input": {"decoder", "input_adapter"}}
    assert set(saved.extras) == expected.get(adapters, {"decoder", "input_adapter", "encoder_adapter"})

    save_checkpoint(tmp_path / "tec.pt", saved.networks, extras=saved.extras)
    opened = open_checkpoint(tmp_path / "tec.pt")
    assert (opened.key, opened.match.matched_percent, opened.match.unexpected) == ("model", 100.0, ())
    tokens = opened.backbone(images).tokens[0]
    assert torch.allclose(tokens.cls, before[-1][:, 0], rtol=0, atol=1e-5)
    assert torch.allclose(tokens.patches.flatten(1, 2), before[-1][:, 1:], rtol=0, atol=1e-5)
    if adapters == "both":
        visible = torch.arange(16).expand(3, -1)
        rebuilt = EncoderAdapter.from_state(opened.require_extra("encoder_adapter"))
        again = rebuilt(block_outputs(opened.backbone, images))
        assert torch.allclose(again, method.encode(images, visible), rtol=0, atol=1e-5)
        with_token = InputAdapter.from_state(opened.require_extra("input_adapter"))()
        assert torch.allclose(with_token, opened.backbone.vit.cls_token, rtol=0, atol=1e-6)


def test_tec_on_tec(tmp_path):
    first = made()
    save_checkpoint(tmp_path / "first.pt", first.saved().networks, extras=first.saved().extras)
    base = open_checkpoint(tmp_path / "first.pt")
    second = made(small(), base)
    features, _ = second.of_base(views().images[0])
    raw = first.saved().networks["model"](views().images[0], layers=(-2, -1), norm=False).tokens
    assert all(torch.equal(x, y.patches.flatten(1, 2)) for x, y in zip(features, raw, strict=True))
    sum(second(views()).values()).backward()
    assert made(small(load_base=True), base)(views())["feature"].isfinite()


def test_state_survives_a_resume():
    method, other = made(seed=0), made(seed=9)
    other.load_state_dict(method.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(method(views()).values(), other(views()).values(), strict=True))


def test_it_watches_only_when_asked():
    method = made()
    method(views())
    assert method.vitals == {}
    assert method.embedding is None
    method.watching = True
    losses = method(views())
    order = views().draws[0]
    z = method.encode(views().images[0], order[:, :4])
    assert torch.allclose(method.embedding, z[:, 1:].mean(1), atol=1e-6)
    assert not method.embedding.requires_grad
    assert set(method.vitals) == {"feature_explained", "attention_kl"}
    assert 0 < method.vitals["attention_kl"] < losses["attention"]
    assert all(value.ndim == 0 and not value.requires_grad for value in method.vitals.values())
    assert not method.compares_images


def test_it_learns():
    """A few steps on two images: both terms fall, and the prediction becomes better than the mean."""
    method, given = made(small(decoder_dim=64), shake=0.0), views(2)
    method.watching = True
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    history = []
    for _ in range(60):
        losses = method(given)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(
            {name: loss.item() for name, loss in losses.items()} | {"kl": method.vitals["attention_kl"].item()}
        )
    assert history[-1]["feature"] < 0.6 * history[0]["feature"]
    assert history[-1]["kl"] < 0.6 * history[0]["kl"]
    assert method.vitals["feature_explained"] > 0.3


# ------------------------------------------------------------------ several processes


def _losses_and_gradients(model, given):
    losses = model(given)
    sum(losses.values()).backward()
    return torch.stack(list(losses.values())).detach()


def _process(rank, port, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    method, whole = made(), views(4)
    half = slice(2 * rank, 2 * rank + 2)
    model = replicated(method)
    losses = _losses_and_gradients(model, Views((whole.images[0][half],), (whole.draws[0][half],)))
    torch.distributed.all_reduce(losses)
    if rank == 0:
        gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        torch.save({"losses": losses / 2, "gradients": gradients}, path)
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_process, (port, str(tmp_path / "two.pt")), nprocs=2)
    two = torch.load(tmp_path / "two.pt")
    method = made()
    assert torch.allclose(two["losses"], _losses_and_gradients(method, views(4)), rtol=1e-5)
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(two["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-6), name


# ------------------------------------------------------------------ the paper's tables

# name: base, epochs, architecture, tau, k, adapters, normalization, attention, load, result
PUBLISHED = {
    "mae-b": ("MAE", 300, "base", 1.8, 15, "both", "patch", "selected", False, "84.7"),  # Tables 5 and 14
    "mae-b-code": ("MAE", 300, "base", 1.8, 15, "both", "patch", "selected", False, "84.7"),
    "mae-b-800ep": ("MAE", 800, "base", 1.8, 15, "both", "patch", "selected", False, "84.8"),  # Table 5
    "ibot-b": ("iBOT", 300, "base", 1.0, 9, "both", "patch", "selected", False, "84.8"),  # Tables 5 and 14
    "ibot-b-800ep": ("iBOT", 800, "base", 1.0, 9, "both", "patch", "selected", False, "85.1"),  # Table 5
    "mae-l": ("MAE ViT-L", 300, "large", 1.4, 15, "both", "patch", "selected", False, "86.5"),  # Tables 5 and 14
    "tec-b-800ep": ("TEC_iBOT", 800, "base", 1.0, 9, "both", "patch", "selected", False, "85.2"),  # Table 10
    "mae300-b": ("300 epochs", 300, "base", 1.8, 15, "both", "patch", "selected", False, "84.3"),  # Table 11d
    "mae300-b-100ep": ("300 epochs", 100, "base", 1.8, 15, "both", "patch", "selected", False, "83.9"),
    "11a-none": ("11a", 300, "base", 1.8, 15, "none", "none", "none", False, "83.9"),
    "11a-channel": ("11a", 300, "base", 1.8, 15, "none", "channel", "none", False, "83.9"),
    "11a-patch": ("11a", 300, "base", 1.8, 15, "none", "patch", "none", False, "84.2"),
    "11b-input": ("11b", 300, "base", 1.8, 15, "input", "patch", "none", False, "84.3"),
    "11b-both": ("11b", 300, "base", 1.8, 15, "both", "patch", "none", False, "84.6"),
    "11c-load": ("11c", 300, "base", 1.0, 9, "both", "patch", "selected", True, "84.4"),
    "11e-none": ("11e", 300, "base", 1.0, 9, "none", "patch", "none", False, "84.5"),
    "11e-cls": ("11e", 300, "base", 1.0, 9, "none", "patch", "cls", False, "84.5"),
    "11e-all": ("11e", 300, "base", 1.0, 9, "none", "patch", "all", False, "84.6"),
    "11e-selected": ("11e", 300, "base", 1.0, 9, "none", "patch", "selected", False, "84.7"),
    "12-mae-attention": ("12", 300, "base", 1.8, 15, "none", "patch", "selected", False, "84.3"),
    "12-ibot-adapters": ("12", 300, "base", 1.0, 9, "both", "patch", "none", False, "84.7"),
}


def test_every_row_is_tested():
    assert set(RECIPES) == {*PUBLISHED, "toy"}
    assert next(iter(RECIPES)) == "mae-b"


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_what_the_paper_says(name):
    recipe = RECIPES[name]
    base, epochs, size, tau, k, adapters, normalization, attention, load, result = PUBLISHED[name]
    assert (base in recipe.source or base in recipe.published) or name == "mae-b-code"
    assert (recipe.epochs, recipe.arch) == (epochs, f"vit_{size}_patch16_224")
    assert (recipe.temperature, recipe.top_k) == (tau, k)
    assert (recipe.adapters, recipe.normalization, recipe.attention) == (adapters, normalization, attention)
    assert recipe.load_base is load
    assert result in recipe.published
    assert recipe.ranking == ("logits" if name == "mae-b-code" else "map")
    # Table 13, and what is common to all.
    assert (recipe.batch, recipe.base_lr, recipe.weight_decay, recipe.betas) == (4096, 1.5e-4, 0.05, (0.9, 0.95))
    assert recipe.base_lr * recipe.batch / 256 == pytest.approx(2.4e-3)
    assert (recipe.warmup_epochs, recipe.min_lr, recipe.horizon, recipe.clip) == (40, 0.0, 1.0, None)
    assert (recipe.weight_decay_end, recipe.drop_path, recipe.augmentation) == (0.05, 0.0, "mae")
    assert (recipe.mask_ratio, recipe.blocks_per_adapter, recipe.target_blocks) == (0.75, 3, 2)
    assert (recipe.decoder_depth, recipe.decoder_heads, recipe.scale) == (2, 16, "width")
    assert recipe.decoder_dim == {"base": 512, "large": 768}[size]


def test_the_toy_row_is_for_toy_images():
    recipe = RECIPES["toy"]
    assert (recipe.arch, recipe.augmentation) == ("vit_96x4x3_patch8_48", "toy-mae")
    method = made(recipe, checkpoint("vit_96x4x3_patch8_48"))
    assert method.kept == 9
    sum(method(views(2, recipe.arch)).values()).backward()
