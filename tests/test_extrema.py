"""ExtreMA against a float64 computation of one image and one mask at a time, and against the paper's numbers."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.recipes import with_settings
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.training.augment import AUGMENTATIONS
from ssl_bench.evaluate.training.distributed import replicated
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.pretrain import extrema
from ssl_bench.pretrain.extrema import RECIPES, draw, make

TINY = "vit_32x2x2_patch8_32"  # 16 patches, of which 75 % leaves 4


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of tiny products: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_recipe(**changes):
    base = {"arch": TINY, "mask_ratio": 0.75, "num_masks": 3, "drop_path": 0.0, "head_hidden": 24, "head_out": 12}
    return dataclasses.replace(RECIPES["paper"], **{**base, **changes})


def tiny_method(seed=0, **changes):
    """Everything random, so that no weight, bias or norm is at its initial value and the teacher is another network."""
    recipe = tiny_recipe(**changes)
    torch.manual_seed(seed)
    method = make(recipe, named(recipe.arch), None)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return method.train(), recipe


def tiny_views(recipe, images=4, n_views=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    architecture = named(recipe.arch)
    size = architecture.image_px
    pixels = tuple(torch.randn(images, 3, size, size, generator=generator) for _ in range(n_views))
    masks = np.stack([draw(recipe, architecture, rng)[0] for _ in range(images)])
    return Views(pixels, (torch.from_numpy(masks),))


# ---------------------------------------------------------------- the obviously right computation


class Slow:
    """One network of the method in float64: a token at a time where it can be, only the patches that are visible."""

    def __init__(self, state, prefix, heads=2, patch_px=8):
        self.state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        self.heads, self.patch_px = heads, patch_px

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name, x, eps):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / ((centered**2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def gelu(self, x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def attend(self, query, key, value):
        """(q, D), (n, D), (n, D) -> (q, D), head by head."""
        size = query.shape[1] // self.heads
        heads = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            heads.append(weights @ value[:, part])
        return torch.cat(heads, 1)

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", self.gelu(self.linear(f"{name}.fc1", x)))

    def patches(self, image, visible):
        kernel, size = self.state["vit.patch_embed.proj.weight"], self.patch_px
        grid, tokens = image.shape[-1] // size, []
        for index in visible:
            row, column = index // grid, index % grid
            pixels = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            token = (kernel * pixels).sum((1, 2, 3)) + self.state["vit.patch_embed.proj.bias"]
            tokens.append(token + self.state["vit.pos_embed"][0, index])
        return torch.stack(tokens)

    def vector(self, image, visible, class_token):
        x = self.patches(image, visible)
        if class_token == "vit":
            x = torch.cat([self.state["vit.cls_token"][0], x])
        depth = 1 + max(int(key.split(".")[2]) for key in self.state if key.startswith("vit.blocks."))
        for number in range(depth):
            name = f"vit.blocks.{number}"
            query, key, value = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x, 1e-6)).chunk(3, 1)
            x = x + self.linear(f"{name}.attn.proj", self.attend(query, key, value))
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x, 1e-6))
        if class_token == "average":
            return self.norm("vit.norm", x, 1e-6).mean(0)
        if class_token == "vit":
            return self.norm("vit.norm", x[0], 1e-6)
        cls = self.state["class_attention.cls_token"][0]
        blocks = {int(key.split(".")[2]) for key in self.state if key.startswith("class_attention.blocks.")}
        for number in sorted(blocks):
            name = f"class_attention.blocks.{number}"
            entered = self.norm(f"{name}.norm1", torch.cat([cls, x]), 1e-6)
            query, key, value = (self.linear(f"{name}.attn.{part}", entered) for part in "qkv")
            seen = self.linear(f"{name}.attn.proj", self.attend(query[:1], key, value))
            cls = cls + self.state[f"{name}.gamma_1"] * seen
            cls = cls + self.state[f"{name}.gamma_2"] * self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", cls, 1e-6))
        return self.norm("vit.norm", cls[0], 1e-6)

    def head(self, x):
        layers = sorted({int(key.split(".")[0]) for key in self.state})  # 0 Linear, 1 LayerNorm, 2 GELU, 3 Linear, ...
        for layer in layers:
            if self.state[f"{layer}.weight"].ndim == 1:
                x = self.gelu(self.norm(str(layer), x, 1e-5))
            else:
                x = self.linear(str(layer), x)
        return x


def slow_loss(state, recipe, views):
    """The loss from a state dict of float64 tensors."""
    parts = {name: Slow(state, f"{name}.") for name in ("student", "projector", "predictor", "teacher")}
    parts["teacher_projector"] = Slow(state, "teacher_projector.")
    students, teachers = views.images[0].double(), views.images[-1].double()
    n_patches = (students.shape[-1] // 8) ** 2
    targets = []
    for image in teachers:
        with torch.no_grad():
            vector = parts["teacher"].vector(image, range(n_patches), recipe.class_token)
            target = parts["teacher_projector"].head(vector)
            targets.append(target / (target**2).sum().sqrt())
    terms = []
    for number, image in enumerate(students):
        for mask in views.draws[0][number]:
            vector = parts["student"].vector(image, mask.tolist(), recipe.class_token)
            predicted = parts["predictor"].head(parts["projector"].head(vector))
            predicted = predicted / (predicted**2).sum().sqrt()
            if recipe.loss == "byol":
                terms.append(((predicted - targets[number]) ** 2).sum())
            else:
                scores = torch.stack([(predicted * target).sum() / recipe.temperature for target in targets])
                terms.append(2 * recipe.temperature * (scores.exp().sum().log() - scores[number]))
    return sum(terms) / len(terms)


DESIGNS = [("cait", 1), ("cait", 2), ("cait", 3), ("vit", 0), ("average", 0)]


@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize("loss", ["byol", "infonce"])
@pytest.mark.parametrize(("class_token", "blocks"), DESIGNS)
def test_loss_and_gradients_equal_the_slow_computation(class_token, blocks, loss, n_views):
    method, recipe = tiny_method(class_token=class_token, class_attention_blocks=blocks, loss=loss)
    views = tiny_views(recipe, n_views=n_views)
    terms = method(views)
    assert list(terms) == [loss]
    terms[loss].backward()
    state = {
        name: parameter.detach().double().requires_grad_(parameter.requires_grad)
        for name, parameter in method.named_parameters()
    }
    expected = slow_loss(state, recipe, views)
    assert terms[loss].item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:  # all take part; a key's bias has gradient 0, since softmax does not see it
            assert parameter.grad is not None, name
            assert state[name].grad is not None, name
            difference = (parameter.grad.double() - state[name].grad).norm()
            assert difference <= 1e-4 * state[name].grad.norm() + 1e-6, name
            assert parameter.grad.any() or name.endswith("attn.k.bias"), name
        else:
            assert parameter.grad is None, name
            assert name.startswith(("teacher.", "teacher_projector.")) or name == "student.vit.pos_embed", name


@pytest.mark.parametrize(("class_token", "blocks"), DESIGNS)
def test_instances_are_the_tokens_that_are_evaluated(class_token, blocks):
    """Projecting patches once for all masks gives what Backbone.forward gives mask by mask."""
    method, recipe = tiny_method(class_token=class_token, class_attention_blocks=blocks)
    views = tiny_views(recipe)
    images, visible = views.images[0], views.draws[0]
    with torch.no_grad():
        whole, masked = extrema.instances(method.teacher, images), extrema.instances(method.student, images, visible)
        tokens = method.teacher(images).tokens[0]
        torch.testing.assert_close(whole, tokens.patch_mean if class_token == "average" else tokens.cls)
        assert masked.shape == (4 * 3, 32)
        for mask in range(3):
            tokens = method.student(images, keep=visible[:, mask]).tokens[0]
            expected = tokens.patch_mean if class_token == "average" else tokens.cls
            torch.testing.assert_close(masked.reshape(4, 3, 32)[:, mask], expected)


def test_under_autocast_the_loss_is_float32_and_nearly_the_same():
    for loss in ("byol", "infonce"):
        method, recipe = tiny_method(loss=loss)
        views = tiny_views(recipe)
        exact = method(views)[loss]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = method(views)[loss]
        assert rounded.dtype == torch.float32
        assert rounded.item() == pytest.approx(exact.item(), abs=0.03)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("ratio", "masks", "kept"),
    # section 3 and Table 2: int(196 (1 - r)) patches in each of n disjoint masks
    [(0.8, 5, 39), (0.9, 8, 19), (0.9, 10, 19), (0.75, 4, 49), (0.85, 1, 29), (0.95, 1, 9), (0.7, 1, 58), (0.5, 1, 98)],
)
def test_disjoint_masks_of_the_paper(ratio, masks, kept):
    recipe = dataclasses.replace(RECIPES["paper"], mask_ratio=ratio, num_masks=masks)
    (visible,) = draw(recipe, named("vit_base_patch16_224"), np.random.default_rng(0))
    assert visible.shape == (masks, kept)
    assert visible.dtype == np.int64
    assert len(set(visible.flatten().tolist())) == masks * kept
    assert set(visible.flatten().tolist()) <= set(range(196))


@pytest.mark.parametrize("disjoint", [True, False])
def test_every_patch_is_equally_often_in_every_mask(disjoint):
    recipe, architecture, rng = tiny_recipe(disjoint=disjoint), named(TINY), np.random.default_rng(0)
    counts, shared, draws = np.zeros((3, 16)), 0, 4000
    for _ in range(draws):
        (visible,) = draw(recipe, architecture, rng)
        for mask in range(3):
            assert len(set(visible[mask].tolist())) == 4
            counts[mask, visible[mask]] += 1
        shared += len(set(visible[0].tolist()) & set(visible[1].tolist()))
    assert np.abs(counts / draws - 4 / 16).max() < 5 * math.sqrt(0.25 * 0.75 / draws)
    # Independent masks of 4 of 16 share 4 * 4 / 16 = 1 patch on average (hypergeometric variance .6).
    assert shared == 0 if disjoint else abs(shared / draws - 1) < 5 * math.sqrt(0.6 / draws)


def test_draws_follow_the_generator_and_can_be_sent_to_workers():
    recipe, architecture = tiny_recipe(), named(TINY)
    sent = pickle.loads(pickle.dumps(draw))  # noqa: S301  (our own)
    first, again, other = (sent(recipe, architecture, np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_more_disjoint_masks_than_patches_are_refused_and_independent_ones_are_not():
    with pytest.raises(
        UserError, match=r"num_masks=6 with mask_ratio=0\.8: 6 x 39 visible patches are more than the 196"
    ):
        dataclasses.replace(RECIPES["paper"], num_masks=6)
    with pytest.raises(UserError, match="num_masks=5, a larger mask_ratio, or --set disjoint=false"):
        with_settings(RECIPES["paper"], {"num_masks": "6"})
    recipe = with_settings(RECIPES["paper"], {"num_masks": "6", "disjoint": "false"})
    assert draw(recipe, named(recipe.arch), np.random.default_rng(0))[0].shape == (6, 39)
    # 70 % leaves 58 of 196 and 4 of 16 patches, 95 % 9 and 0: what fits one network need not fit another.
    with pytest.raises(UserError, match=r"mask_ratio=0\.95 leaves 0 of 16 patches"):
        make(RECIPES["95x1"], named(TINY), None)


# ---------------------------------------------------------------- the network at the paper's size


def test_shapes_at_the_size_of_the_paper():
    """One trunk block of ViT-B: the student sees 5 x 39 patches an image, the teacher 196; heads of 4096 and 256."""
    recipe = dataclasses.replace(RECIPES["paper"], arch="vit_768x1x12_patch16_224")
    torch.manual_seed(0)
    method = make(recipe, named(recipe.arch), None)
    shapes = [tuple(p.shape) for p in method.projector.parameters() if p.ndim == 2]
    assert shapes == [(4096, 768), (4096, 4096), (256, 4096)]
    assert [tuple(p.shape) for p in method.predictor.parameters() if p.ndim == 2] == [(4096, 256), (256, 4096)]
    kinds = [type(layer).__name__ for layer in method.projector]
    assert kinds == ["Linear", "LayerNorm", "GELU", "Linear", "LayerNorm", "GELU", "Linear"]
    assert [type(layer).__name__ for layer in method.predictor] == ["Linear", "LayerNorm", "GELU", "Linear"]
    assert {layer.eps for layer in [*method.projector, *method.predictor] if hasattr(layer, "eps")} == {1e-5}
    assert {part.eps for part in method.student.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}
    for layer in [*method.projector, *method.predictor]:  # xavier-uniform: U(-a, a), a = sqrt(6 / (in + out)); bias 0
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.99 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()
    assert tuple(method.student.vit.pos_embed.shape) == (1, 196, 768)
    assert method.student.vit.cls_token is None
    assert len(method.student.class_attention.blocks) == 2
    for block in method.student.class_attention.blocks:
        assert torch.equal(block.gamma_1, torch.full((768,), 0.1))
        assert torch.equal(block.gamma_2, torch.full((768,), 0.1))
    entered = {}
    for name in ("student", "teacher"):
        network = getattr(method, name)
        network.vit.blocks[0].register_forward_hook(
            lambda _, inputs, __, name=name: entered.__setitem__(name, tuple(inputs[0].shape))
        )
    with torch.no_grad():
        method(tiny_views(recipe, images=2))
    assert entered == {"student": (2 * 5, 39, 768), "teacher": (2, 196, 768)}


def test_teacher_starts_as_the_student_and_the_heads_do_not_repeat_each_other():
    recipe = tiny_recipe()
    torch.manual_seed(0)
    method = make(recipe, named(TINY), None)
    for one, other in ((method.student, method.teacher), (method.projector, method.teacher_projector)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a is not b
    torch.manual_seed(0)
    again = make(recipe, named(TINY), None)
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), again.parameters(), strict=True))


def test_drop_path_grows_in_the_students_trunk_and_is_nowhere_else():
    recipe = tiny_recipe(arch="vit_32x3x2_patch8_32", drop_path=0.1)
    method = make(recipe, named(recipe.arch), None)
    rates = {name: part.drop_prob for name, part in method.named_modules() if type(part).__name__ == "DropPath"}
    student = {name: rate for name, rate in rates.items() if rate}
    assert student == pytest.approx(
        {f"student.vit.blocks.{block}.drop_path{part}": 0.05 * block for block in (1, 2) for part in (1, 2)}
    )


def test_class_tokens_are_not_decayed():
    for class_token, blocks in (("cait", 2), ("vit", 0), ("average", 0)):
        method, _ = tiny_method(class_token=class_token, class_attention_blocks=blocks)
        spared = [
            name
            for name, parameter in method.named_parameters()
            if parameter.requires_grad and parameter.ndim > 1 and name.startswith(method.undecayed)
        ]
        expected = {"cait": ["student.class_attention.cls_token"], "vit": ["student.vit.cls_token"], "average": []}
        assert spared == expected[class_token]


# ---------------------------------------------------------------- the teacher


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.996), (15, 0.998), (10, 0.997), (30, 1.0)])
def test_the_teacher_moves_with_a_cosine_momentum(step, momentum):
    method, _ = tiny_method()
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    method.after_step(Progress(step, steps_per_epoch=10, epochs=3))
    for name, parameter in method.named_parameters():
        if name.startswith("teacher"):
            source = before[name.replace("teacher_projector", "projector").replace("teacher.", "student.")]
            expected = momentum * before[name].double() + (1 - momentum) * source.double()
            torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-6)
            assert torch.equal(parameter, before[name]) == (momentum == 1.0 or name.endswith("pos_embed")), name
        else:
            assert torch.equal(parameter, before[name])


def test_moving_after_the_step_is_the_official_order():
    """There, the teacher moves after the student's forward, before its own, with the momentum of that iteration."""
    recipe = tiny_recipe(momentum=0.5)
    torch.manual_seed(0)
    method = make(recipe, named(TINY), None)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
    official = [parameter.detach().clone() for parameter in method.teacher.parameters()]
    iterations, moved = 6, 0.0
    for iteration in range(iterations):
        momentum = 1 - 0.5 * (1 + math.cos(math.pi * iteration / iterations)) * (1 - 0.5)
        student = [parameter.detach().clone() for parameter in method.student.parameters()]
        official = [momentum * t + (1 - momentum) * s for t, s in zip(official, student, strict=True)]
        for ours, theirs in zip(method.teacher.parameters(), official, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        (loss,) = method(tiny_views(recipe, seed=iteration)).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved += sum(
            float((p.detach() - s).abs().sum()) for p, s in zip(method.student.parameters(), student, strict=True)
        )
        method.after_step(Progress(iteration + 1, steps_per_epoch=3, epochs=2))
    for ours, theirs in zip(method.teacher.parameters(), official, strict=True):  # also what is saved in the end
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert moved > 1


def test_accumulated_parts_give_the_gradients_of_the_whole_batch():
    method, recipe = tiny_method()
    whole = tiny_views(recipe)
    method(whole)["byol"].backward()
    expected = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        (method(Views(tuple(v[part] for v in whole.images), (whole.draws[0][part],)))["byol"] / 2).backward()
    for name, parameter in method.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert not method.compares_images
    assert tiny_method(loss="infonce")[0].compares_images


def test_a_restored_state_goes_on_alike():
    method, recipe = tiny_method()
    other, _ = tiny_method(seed=5)
    views = tiny_views(recipe)
    assert other(views)["byol"].item() != method(views)["byol"].item()
    other.load_state_dict(method.state_dict())
    assert other(views)["byol"].item() == method(views)["byol"].item()


# ---------------------------------------------------------------- what is watched and saved


def test_vitals_and_embedding_are_written_while_watching_only():
    method, recipe = tiny_method()
    views = tiny_views(recipe)
    method(views)
    assert method.vitals == {}
    assert method.embedding is None
    method.watching = True
    loss = method(views)["byol"]
    assert set(method.vitals) == {"cosine", "target_std"}
    assert method.vitals["cosine"].item() == pytest.approx(1 - loss.item() / 2, abs=1e-5)
    assert not method.vitals["cosine"].requires_grad
    with torch.no_grad():
        tokens = method.teacher(views.images[1]).tokens[0].cls
        targets = torch.nn.functional.normalize(method.teacher_projector(tokens), dim=1)
    torch.testing.assert_close(method.embedding, tokens)
    deviations = [np.std(targets[:, channel].numpy()) for channel in range(12)]
    assert method.vitals["target_std"].item() == pytest.approx(np.mean(deviations) * math.sqrt(12), rel=1e-4)
    same = Views(tuple(image[:1].expand_as(image) for image in views.images), views.draws)
    method(same)
    assert method.vitals["target_std"].item() < 1e-5  # collapsed


def test_saved_files_hold_the_teacher_for_its_class_token_and_the_student_for_its_trunk(tmp_path):
    method, recipe = tiny_method()
    saved = method.saved()
    assert list(saved.networks) == ["teacher", "student"]  # the first is the one to evaluate
    assert saved.networks["teacher"] is method.teacher
    assert saved.networks["student"] is method.student
    assert saved.by_protocol == {"finetune": "student", "semseg": "student", "detection": "student"}
    assert set(saved.extras) == {"projector", "teacher_projector", "predictor"}
    assert torch.equal(saved.extras["projector"]["0.weight"], method.projector[0].weight)
    assert torch.equal(saved.extras["teacher_projector"]["0.weight"], method.teacher_projector[0].weight)
    assert torch.equal(saved.extras["predictor"]["3.bias"], method.predictor[3].bias)
    path = tmp_path / "extrema.pt"
    save_checkpoint(path, saved.networks, by_protocol=saved.by_protocol, extras=saved.extras)
    image = tiny_views(recipe).images[0]
    for protocol, network in (("linear", method.teacher), ("knn", method.teacher), ("finetune", method.student)):
        opened = open_checkpoint(path, protocol=protocol)
        assert opened.architecture.class_attention_blocks == 2
        assert not opened.architecture.cls
        with torch.no_grad():
            torch.testing.assert_close(opened.backbone(image).tokens[0].cls, extrema.instances(network, image))


# ---------------------------------------------------------------- several processes


def _process(rank, world, folder, loss):
    torch.set_num_threads(1)
    method, recipe = tiny_method(loss=loss)
    views = tiny_views(recipe)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    views = Views(tuple(view[mine] for view in views.images), (views.draws[0][mine],))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{loss}", rank=rank, world_size=world)
        wrapped = replicated(method)
    else:
        wrapped = method
    (value,) = wrapped(views).values()
    value.backward()
    value = value.detach()
    if world > 1:
        dist.all_reduce(value)
        value /= world
        dist.destroy_process_group()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save((value, gradients), f"{folder}/{loss}-{world}.pt")


def _both_losses(rank, world, folder):
    for loss in ("byol", "infonce"):
        _process(rank, world, folder, loss)


def test_two_processes_equal_one(tmp_path):
    _both_losses(0, 1, tmp_path)
    mp.spawn(_both_losses, (2, tmp_path), nprocs=2)
    for loss in ("byol", "infonce"):
        (one, expected), (two, gradients) = (torch.load(tmp_path / f"{loss}-{world}.pt") for world in (1, 2))
        assert two.item() == pytest.approx(one.item(), rel=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- recipes

# What the tables say, typed again: (mask ratio, masks, augmentation, finetune, linear), ViT-B/16, 300 epochs on IN1k.
CROP = "extrema-crop-1"
PUBLISHED = {
    "paper": (0.8, 5, "extrema", 83.7, 73.3),  # Table 7
    "vit-s": (0.8, 5, "extrema", 81.8, 69.4),
    "in22k": (0.8, 5, "extrema", 83.9, 74.5),
    "in22k-vit-s": (0.8, 5, "extrema", 81.5, 65.7),
    "90x8-color": (0.9, 8, "extrema", 83.5, 68.4),  # the official README
    "50x1": (0.5, 1, CROP, 81.9, 36.3),  # Table 1
    "70x1": (0.7, 1, CROP, 82.3, 64.4),
    "80x1": (0.8, 1, CROP, 82.4, 67.3),
    "85x1": (0.85, 1, CROP, 82.4, 66.3),
    "90x1": (0.9, 1, CROP, 82.3, 61.6),
    "95x1": (0.95, 1, CROP, 81.6, 49.3),
    "75x1": (0.75, 1, CROP, 82.4, 64.8),  # Table 2
    "75x2": (0.75, 2, CROP, 82.7, 67.2),
    "75x4": (0.75, 4, CROP, 82.9, 67.7),
    "80x2": (0.8, 2, CROP, 82.6, 68.8),
    "80x4": (0.8, 4, CROP, 82.8, 67.5),
    "80x5": (0.8, 5, CROP, 82.9, 67.1),
    "90x2": (0.9, 2, CROP, 82.5, 64.0),
    "90x4": (0.9, 4, CROP, 82.7, 63.1),
    "90x8": (0.9, 8, CROP, 82.9, 60.3),
    "90x10": (0.9, 10, CROP, 83.0, 59.3),
    "75x1-600ep": (0.75, 1, CROP, 82.6, 67.8),  # Table 12
    "80x1-600ep": (0.8, 1, CROP, 82.6, 69.1),
    "90x1-600ep": (0.9, 1, CROP, 82.5, 63.4),
    "in22k-90x1": (0.9, 1, CROP, 82.5, 60.4),  # Table 3
    "in22k-90x2": (0.9, 2, CROP, 82.7, 65.6),
    "in22k-90x4": (0.9, 4, CROP, 83.0, 69.0),
    "in22k-90x8": (0.9, 8, CROP, 83.2, 71.4),
    "in22k-90x10": (0.9, 10, CROP, 83.2, 72.0),
    "none": (0.8, 2, "extrema-none", 82.3, 55.1),  # Table 4
    "color-1": (0.8, 2, "extrema-color-1", 82.5, 62.0),
    "color-2": (0.8, 2, "extrema-color-2", 83.3, 62.4),
    "crop-2": (0.8, 2, "extrema-crop-2", 82.2, 66.8),
    "crop-color-1": (0.8, 2, "extrema-crop-color-1", 82.6, 69.0),
    "crop-color-2": (0.8, 2, "extrema-crop-color-2", 83.1, 73.3),
    "shared-crop": (0.8, 2, "extrema", 83.3, 73.1),
    "blocks-1": (0.8, 2, CROP, 82.6, 66.2),  # Table 5
    "blocks-3": (0.8, 2, CROP, 82.6, 68.5),
    "infonce": (0.8, 2, CROP, 82.8, 66.8),  # Table 6
    "token-cait": (0.9, 8, CROP, None, None),  # Fig. 5
    "token-vit": (0.9, 8, CROP, None, None),
    "token-average": (0.9, 8, CROP, None, None),
}
SMALL = {"vit-s", "in22k-vit-s", "token-cait", "token-vit", "token-average"}
DESIGN = {"token-vit": ("vit", 0), "token-average": ("average", 0), "blocks-1": ("cait", 1), "blocks-3": ("cait", 3)}


def test_every_published_row_is_there_and_the_main_one_is_first():
    assert next(iter(RECIPES)) == "paper"
    assert set(RECIPES) == {*PUBLISHED, "toy", "toy-byol"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_what_the_paper_says(name):
    recipe = RECIPES[name]
    ratio, masks, augmentation, finetune, linear = PUBLISHED[name]
    assert (recipe.mask_ratio, recipe.num_masks, recipe.augmentation) == (ratio, masks, augmentation)
    numbers = "plotted only" if finetune is None else f"ImageNet: finetune {finetune}, linear {linear}"
    assert recipe.published.split(";")[0] == numbers
    assert recipe.arch == ("vit_small_patch16_224" if name in SMALL else "vit_base_patch16_224")
    epochs = 30 if "in22k" in name else 600 if "600ep" in name else 300
    assert (recipe.epochs, recipe.warmup_epochs) == (epochs, 4 if "in22k" in name else 40)
    # Section 5.1 and the README's command.
    assert (recipe.batch, recipe.base_lr, recipe.min_lr, recipe.horizon) == (2048, 1.5e-4, 0, 1)
    assert (recipe.betas, recipe.weight_decay, recipe.weight_decay_end) == ((0.9, 0.95), 0.1, 0.1)
    assert (recipe.clip, recipe.drop_path, recipe.disjoint) == (None, 0.1, True)
    assert (recipe.momentum, recipe.momentum_end, recipe.temperature) == (0.996, 1, 0.2)
    assert (recipe.head_hidden, recipe.head_out) == (4096, 256)
    assert (recipe.class_token, recipe.class_attention_blocks) == DESIGN.get(name, ("cait", 2))
    assert recipe.loss == ("infonce" if name == "infonce" else "byol")


def test_every_augmentation_exists_and_has_the_views_of_table_4():
    """ "1 aug": one view for both networks; "2 augs": the student's and the teacher's."""
    for recipe in RECIPES.values():
        two = recipe.augmentation in ("extrema", "toy-extrema", "toy-byol") or recipe.augmentation.endswith("-2")
        assert len(AUGMENTATIONS[recipe.augmentation]) == (2 if two else 1)


def test_the_toy_row_runs():
    recipe = RECIPES["toy"]
    assert (recipe.arch, recipe.augmentation) == ("vit_96x4x3_patch8_48", "toy-extrema")
    method = make(recipe, named(recipe.arch), None)
    assert all(value.isfinite() for value in method(tiny_views(recipe, images=3)).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_masks": 0}, "num_masks=0: expected at least 1"),
        ({"mask_ratio": 1.0}, r"mask_ratio=1 leaves 0 of 196"),
        ({"mask_ratio": 0.0}, r"mask_ratio=0 leaves 196 of 196"),
        ({"temperature": 0.0}, "temperature=0: expected a positive number"),
        ({"head_out": 0}, "head_out=0: expected at least 1"),
        ({"head_hidden": 0}, "head_hidden=0.* expected at least 1"),
        ({"momentum": 1.5}, r"momentum=1\.5"),
        ({"momentum": 0.99, "momentum_end": 0.9}, r"momentum=0\.99, momentum_end=0\.9"),
        ({"class_attention_blocks": 0}, "class_token=cait with class_attention_blocks=0"),
        ({"class_token": "vit"}, "class_token=vit with class_attention_blocks=2"),
        ({"class_token": "average", "class_attention_blocks": -1}, "class_attention_blocks=-1"),
        ({"drop_path": 1.0}, "drop_path=1"),
        ({"arch": "vit_huge"}, "vit_huge"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RECIPES["paper"], **change)


def test_an_augmentation_of_many_views_is_refused():
    method, recipe = tiny_method()
    with pytest.raises(UserError, match="gives 3 views"):
        method(tiny_views(recipe, n_views=3))
