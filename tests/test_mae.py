"""MAE against its description, written out image by image and patch by patch."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.backbone import Backbone
from ssl_bench.evaluate.training.distributed import replicated
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.pretrain import mae
from ssl_bench.pretrain.networks import sincos_positions

TINY = dataclasses.replace(
    mae.RECIPES["paper"], arch="vit_24x2x2_patch8_32", decoder_dim=16, decoder_depth=2, decoder_heads=2
)


def tiny_method(seed=0, **changes):
    """A small MAE in which nothing is at its initial zero or one."""
    recipe = dataclasses.replace(TINY, **changes)
    torch.manual_seed(seed)
    method = mae.make(recipe, named(recipe.arch), None)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method.train()


def some_views(module=mae, recipe=TINY, batch=4, seed=0):
    architecture = named(recipe.arch)
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.standard_normal((batch, 3, architecture.image_px, architecture.image_px))).float()
    order = torch.stack([torch.from_numpy(module.draw(recipe, architecture, rng)[0]) for _ in range(batch)])
    return Views((images,), (order,))


def slow_pixels(image, patch, grid, patch_px):
    """The pixels of one patch, (y, x, channel) with the last running fastest, in float64."""
    row, column = divmod(int(patch), grid)
    values = [
        float(image[channel, row * patch_px + y, column * patch_px + x])
        for y in range(patch_px)
        for x in range(patch_px)
        for channel in range(3)
    ]
    return np.array(values)


def slow_encoder(backbone, image, visible):
    """Class token and the visible patches of one image after the final norm, from pixels on. (1 + n, D)"""
    vit, architecture = backbone.vit, backbone.architecture
    projection = vit.patch_embed.proj
    by_pixel = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, y x channel)
    positions = vit.pos_embed[0]
    tokens = [vit.cls_token[0, 0] + positions[0]]
    for patch in visible:
        pixels = torch.from_numpy(slow_pixels(image, patch, architecture.grid, architecture.patch_px)).to(image.dtype)
        tokens.append(by_pixel @ pixels + projection.bias + positions[1 + int(patch)])
    x = torch.stack(tokens)[None]
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)[0]


def slow_decoder(method, encoded, visible, grid):
    """What is predicted for every patch of one image, visible or not, by its number: MAE's order. (N, ...)"""
    decoder = method.decoder
    dim = decoder.norm.weight.shape[0]
    positions = sincos_positions(dim, grid, prefix=1)[0]
    tokens = [decoder.tokens.project(encoded[0])]
    where = {int(patch): n for n, patch in enumerate(visible)}
    for patch in range(grid * grid):
        seen = patch in where
        token = decoder.tokens.project(encoded[1 + where[patch]]) if seen else decoder.tokens.mask_token[0, 0]
        tokens.append(token + positions[1 + patch])
    x = torch.stack(tokens)[None]
    for block in decoder.blocks:
        x = block(x)
    return method.predict(decoder.norm(x))[0, 1:]


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_papers(normalize):
    method = tiny_method(normalize_pixels=normalize)
    views = some_views()
    loss = method(views)
    total, count = 0.0, 0
    with torch.no_grad():
        for image, order in zip(views.images[0], views.draws[0], strict=True):
            visible, hidden = order[:4], order[4:]  # 16 patches, a quarter visible
            predicted = slow_decoder(method, slow_encoder(method.encoder, image, visible), visible, 4).double().numpy()
            for patch in hidden:
                target = slow_pixels(image, patch, 4, 8)
                if normalize:
                    target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
                total += float(((predicted[patch] - target) ** 2).mean())
                count += 1
    assert count == 4 * 12
    assert list(loss) == ["pixels"]
    assert loss["pixels"].dtype == torch.float32
    assert loss["pixels"].item() == pytest.approx(total / count, rel=1e-5)


def test_the_two_targets_differ():
    views = some_views()
    images = views.images[0] * 3 + 1
    views = Views((images,), views.draws)
    plain, normalized = (tiny_method(normalize_pixels=choice)(views)["pixels"].item() for choice in (False, True))
    assert plain > 5 * normalized


def test_counts_of_tokens_at_224_px():
    """50 tokens through the encoder, 197 through the decoder, 147 patches of 768 numbers predicted."""
    recipe = dataclasses.replace(mae.RECIPES["paper"], arch="vit_32x2x2_patch16_224", decoder_dim=16, decoder_depth=1)
    method = mae.make(recipe, named(recipe.arch), None)
    seen = {}
    for name, module in (
        ("encoder", method.encoder.vit.blocks[0]),
        ("decoder", method.decoder.blocks[0]),
        ("pixels", method.predict),
    ):
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: tuple(output.shape)}))
    method(some_views(recipe=recipe, batch=2))
    assert seen == {"encoder": (2, 50, 32), "decoder": (2, 197, 16), "pixels": (2, 147, 768)}


def test_hidden_pixels_reach_the_target_only():
    method, views = tiny_method(), some_views(batch=1)
    predicted = []
    method.predict.register_forward_hook(lambda _, __, output: predicted.append(output.detach()))
    losses = [method(views)["pixels"]]
    changed = views.images[0].clone()
    row, column = divmod(int(views.draws[0][0, 4]), 4)  # the first hidden patch
    changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.randn(1, 3, 8, 8)
    losses.append(method(Views((changed,), views.draws))["pixels"])
    torch.testing.assert_close(predicted[0], predicted[1], atol=1e-6, rtol=0)
    assert losses[0].item() != losses[1].item()


def test_everything_trainable_learns_and_positions_stay():
    method = tiny_method(drop_path=0.1)
    method(some_views())["pixels"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad == (name != "encoder.vit.pos_embed"), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None


def test_the_encoder_has_the_recipes_stochastic_depth():
    assert TINY.drop_path == 0
    method, views = tiny_method(drop_path=0.5), some_views()
    assert len({method(views)["pixels"].item() for _ in range(5)}) > 1
    method = tiny_method()
    assert len({method(views)["pixels"].item() for _ in range(3)}) == 1


def test_the_loss_falls_when_it_is_minimized():
    method, views = tiny_method(), some_views()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = method(views)["pixels"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_under_autocast_the_loss_is_nearly_the_same_and_in_float32():
    method, views = tiny_method(), some_views()
    exact = method(views)["pixels"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(views)["pixels"]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)


def test_masks_are_drawn_by_the_generator_and_are_uniform():
    architecture = named("vit_32x2x2_patch8_48")
    (first,), (again,) = (mae.draw(TINY, architecture, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first, again)
    assert sorted(first) == list(range(36))
    rng = np.random.default_rng(0)
    visible = np.zeros((36, 36))
    draws = 4000
    for _ in range(draws):
        kept = mae.draw(TINY, architecture, rng)[0][:9]
        visible[np.ix_(kept, kept)] += 1
    share = visible.diagonal() / draws
    assert np.abs(share - 9 / 36).max() < 0.03
    pairs = visible[~np.eye(36, dtype=bool)] / draws  # no blocks, no stripes: all pairs as likely
    assert np.abs(pairs - 9 * 8 / (36 * 35)).max() < 0.025


def test_watching_writes_what_the_log_wants_and_only_then():
    method, views = tiny_method(normalize_pixels=False), some_views()
    loss = method(views)["pixels"]
    assert method.embedding is None
    assert not method.vitals
    method.watching = True
    method(views)
    with torch.no_grad():
        slow = [slow_encoder(method.encoder, *pair)[1:].mean(0) for pair in zip(*visible_of(views), strict=True)]
    torch.testing.assert_close(method.embedding, torch.stack(slow), atol=1e-5, rtol=1e-4)
    assert not method.embedding.requires_grad
    hidden = [
        slow_pixels(image, patch, 4, 8)
        for image, order in zip(views.images[0], views.draws[0], strict=True)
        for patch in order[4:]
    ]
    assert method.vitals["explained"].item() == pytest.approx(1 - loss.item() / np.var(hidden, ddof=1), abs=1e-4)
    assert not method.vitals["explained"].requires_grad


def visible_of(views):
    return views.images[0], views.draws[0][:, :4]


def test_what_is_saved_is_the_encoder_and_its_decoder():
    method = tiny_method()
    saved = method.saved()
    assert list(saved.networks) == ["model"]
    assert isinstance(saved.networks["model"], Backbone)
    with torch.no_grad():
        tokens = saved.networks["model"].eval()(torch.randn(2, 3, 32, 32)).tokens[0]
    assert tokens.patches.shape == (2, 4, 4, 24)
    state = dict(saved.extras["decoder"])
    assert {key.partition(".")[0] for key in state} == {"tokens", "blocks", "norm", "predict"}
    assert torch.equal(state["predict.weight"], method.predict.weight)
    rest = {key: value for key, value in state.items() if not key.startswith("predict.")}
    assert mae.Decoder(24, 16, 2, 2, 4).load_state_dict(rest).missing_keys == []


# Two processes, each with half of the batch, against one with all of it.


def in_one_of_two(rank, folder):
    """A process of the pair: the losses of two steps, averaged over both, and the state after them."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=90)
    )
    job = torch.load(folder / "job.pt", weights_only=False)
    method = job["make"](job["recipe"], named(job["recipe"].arch), None)
    method.load_state_dict(job["state"])
    parallel = replicated(method)
    images, order = (x.chunk(2)[rank] for x in (job["images"], job["order"]))
    losses = train_a_little(parallel, method, Views((images,), (order,)))
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    torch.save({"losses": mean / 2, "state": method.state_dict()}, folder / f"out{rank}.pt")
    dist.destroy_process_group()


def train_a_little(callable_method, method, views):
    from ssl_bench.evaluate.training.schedules import Progress

    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(1, 3):
        loss = sum(callable_method(views).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(Progress(step, 1, 2))
        losses.append(loss.item())
    return losses


def check_two_processes(folder, module, recipe, method):
    """Both processes end where one process would have."""
    views = some_views(module, recipe)
    job = {"make": module.make, "recipe": recipe, "state": method.state_dict()}
    torch.save({**job, "images": views.images[0], "order": views.draws[0]}, folder / "job.pt")
    other = torch.multiprocessing.get_context("spawn").Process(target=in_one_of_two, args=(1, folder))
    other.start()  # only one process more: importing torch is most of the time
    in_one_of_two(0, folder)
    other.join(60)
    assert other.exitcode == 0
    before = {name: value.clone() for name, value in method.state_dict().items()}
    losses = train_a_little(method, method, views)
    assert losses[1] < losses[0]
    states = [torch.load(folder / f"out{rank}.pt") for rank in range(2)]
    for other in states:
        torch.testing.assert_close(other["losses"], torch.tensor(losses), atol=1e-6, rtol=1e-5)
        for name, value in method.state_dict().items():
            torch.testing.assert_close(other["state"][name], value, atol=2e-6, rtol=1e-4, msg=name)
    moved = [name for name, value in method.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before)


def test_two_processes_are_one(tmp_path):
    check_two_processes(tmp_path, mae, TINY, tiny_method())


# What the sources say, typed again: architecture, epochs, normalized pixels.
PUBLISHED = {
    "paper": ("vit_base_patch16_224", 1600, True),
    "800ep": ("vit_base_patch16_224", 800, True),
    "300ep": ("vit_base_patch16_224", 300, True),
    "vit-l": ("vit_large_patch16_224", 1600, True),
    "normalized": ("vit_large_patch16_224", 800, True),
    "unnormalized": ("vit_large_patch16_224", 800, False),
}


def test_the_first_row_is_the_papers_and_no_row_is_unchecked():
    assert next(iter(mae.RECIPES)) == "paper"
    assert set(mae.RECIPES) == {*PUBLISHED, "toy"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_what_the_paper_says(name):
    recipe = mae.RECIPES[name]
    assert (recipe.arch, recipe.epochs, recipe.normalize_pixels) == PUBLISHED[name]
    # Table 8.
    assert recipe.base_lr == 1.5e-4
    assert recipe.base_lr * recipe.batch / 256 == pytest.approx(2.4e-3)
    assert recipe.batch == 4096
    assert recipe.betas == (0.9, 0.95)
    assert (recipe.weight_decay, recipe.weight_decay_end) == (0.05, 0.05)
    assert (recipe.warmup_epochs, recipe.min_lr, recipe.horizon) == (40, 0, 1)
    assert recipe.augmentation == "mae"
    # "We do not use color jittering, drop path, or gradient clip."
    assert (recipe.drop_path, recipe.clip, recipe.clip_each) == (0, None, False)
    # Section 4.1: 75 %, a decoder of 8 blocks of width 512; 16 heads in the code.
    assert (recipe.mask_ratio, recipe.decoder_depth, recipe.decoder_dim, recipe.decoder_heads) == (0.75, 8, 512, 16)
    assert recipe.source
    assert recipe.published


def test_the_decoder_of_the_paper_has_its_size():
    """8 blocks of width 512 and what is around them, counted by hand."""
    recipe = mae.RECIPES["paper"]
    method = mae.make(recipe, named("vit_768x1x12_patch16_224"), None)  # one block of the encoder is enough
    block = 12 * 512**2 + 13 * 512
    around = 768 * 512 + 512 + 512 + 2 * 512
    assert sum(p.numel() for p in method.decoder.parameters()) == 8 * block + around
    assert sum(p.numel() for p in method.predict.parameters()) == 513 * 768
    assert [type(block.attn).__name__ for block in method.decoder.blocks] == ["Attention"] * 8
    assert {block.attn.num_heads for block in method.decoder.blocks} == {16}


@pytest.mark.parametrize("name", mae.RECIPES)
def test_every_row_trains(name):
    recipe = mae.RECIPES[name]
    small = recipe if name == "toy" else dataclasses.replace(recipe, arch=TINY.arch, decoder_dim=32, decoder_depth=1)
    torch.manual_seed(0)
    method = mae.make(small, named(small.arch), None)
    loss = method(some_views(recipe=small, batch=2))["pixels"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio=1: expected a share between 0 and 1"),
        ({"mask_ratio": 0.0}, "mask_ratio=0: expected"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
        ({"decoder_heads": 0}, "decoder_heads=0: expected at least 1"),
        ({"decoder_dim": 0}, "decoder_dim=0"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(mae.RECIPES["paper"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": 0.99}, "mask_ratio=0.99 leaves 0 of 16 patches visible"),
        ({"mask_ratio": 0.01}, None),
        ({"decoder_dim": 18, "decoder_heads": 2}, "width divisible by 4, not 18"),
        ({"decoder_dim": 16, "decoder_heads": 3}, "width 16 cannot have 3 heads"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_when_it_is_made(change, message):
    recipe = dataclasses.replace(TINY, **change)
    if message is None:
        assert mae.make(recipe, named(recipe.arch), None).n_visible == 15
        return
    with pytest.raises(UserError, match=message):
        mae.make(recipe, named(recipe.arch), None)


def test_initialization_is_mae_s_and_follows_the_global_generator():
    def make(seed):
        torch.manual_seed(seed)
        return mae.make(TINY, named(TINY.arch), None)

    one, same, other = make(0), make(0), make(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.predict.weight, other.predict.weight)
    for name, module in one.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name
    assert one.decoder.tokens.mask_token.any()
