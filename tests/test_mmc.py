from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import DropPath

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.recipes import with_settings
from ssl_bench.evaluate.training.blockwise import ALIEN, NOISE
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.pretrain import mmc
from ssl_bench.pretrain.mmc_heads import GlobalBatchNorm, ToImage, pixel_mlp
from ssl_bench.pretrain.networks import patchify

T = 0.2
ROWS = list(mmc.RECIPES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small gain nothing from several, and lose much where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(row="vit-b", **changes):
    """A row with a network of 4 patches and narrow heads."""
    shape = {"arch": "vit_32x2x2_patch8_16", "head_dim": 24, "out_dim": 10, "batch": 6, "drop_path": 0.0, "align": 1}
    return dataclasses.replace(mmc.RECIPES[row], **(shape | changes))


def made(recipe, seed=0):
    """The method, with weights and teacher moved away from their start, where much is zero or the same."""
    torch.manual_seed(seed)
    method = mmc.make(recipe, named(recipe.arch), None)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def views(recipe, batch=6, local_crops=2, seed=0):
    architecture = named(recipe.arch)
    generator = torch.Generator().manual_seed(seed)
    sizes = [architecture.image_px] * 2 + [architecture.patch_px] * local_crops
    images = tuple(torch.randn(batch, 3, size, size, generator=generator) for size in sizes)
    drawn = [mmc.draw(recipe, architecture, np.random.default_rng([seed, sample])) for sample in range(batch)]
    draws = tuple(torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    return Views(images, draws)


def slow_head(head, rows):
    """The head of L_CLS and L_PAT, layer by layer, in float64. (n, D) -> (n, C)"""
    x = rows.double()
    for layer in head:
        if isinstance(layer, torch.nn.Linear):
            x = x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
        elif isinstance(layer, (GlobalBatchNorm, torch.nn.LayerNorm)):
            over = 0 if isinstance(layer, GlobalBatchNorm) else 1
            x = x - x.mean(over, keepdim=True)
            x = x / (x.square().mean(over, keepdim=True) + 1e-5).sqrt()
            x = x if layer.weight is None else x * layer.weight.double() + layer.bias.double()
        elif isinstance(layer, torch.nn.ReLU):
            x = x * (x > 0)
        else:
            assert isinstance(layer, torch.nn.GELU)
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x / x.norm(dim=1, keepdim=True)


def slow_masked(method, seen):
    maps, noise_at, table = seen.draws[0].numpy(), seen.draws[1].numpy(), method.corruption.table.numpy()
    clean, side = [image.numpy() for image in seen.images[:2]], seen.images[0].shape[-1]
    masked = [image.copy() for image in clean]
    for v, b, y, x in np.ndindex(2, len(maps), side, side):
        for c in range(3):
            if maps[b, v, y, x] == NOISE:
                masked[v][b, c, y, x] = table[noise_at[b, v] + (c * side + y) * side + x]
            elif maps[b, v, y, x] == ALIEN:
                masked[v][b, c, y, x] = clean[v][b + 1 if b % 2 == 0 else b - 1, c, y, x]
    return [torch.from_numpy(image) for image in masked]


def slow_reconstruction(method, patches, seen):
    """L_REC of patch tokens [view](B, P, D)."""
    maps, clean = seen.draws[0].tolist(), [image.tolist() for image in seen.images[:2]]
    batch, side = len(maps), len(clean[0][0][0])
    total, replaced = 0.0, 0
    for v in range(2):
        predicted = method.reconstruction(patches[v].unflatten(1, (side // 8, side // 8))).tolist()
        for b, y, x in np.ndindex(batch, side, side):
            if maps[b][v][y][x]:
                replaced += 1
                total += sum(abs(predicted[b][c][y][x] - clean[v][b][c][y][x]) / 3 for c in range(3))
    return total / (replaced if method.recipe.rec_over == "masked" else 2 * batch * side * side)


def minus_log_share(positive, negatives):
    positive, negatives = math.exp(positive / T), [math.exp(value / T) for value in negatives]
    return -math.log(positive / (positive + sum(negatives)))


@torch.no_grad()
def slow_terms(method, seen):
    """The three terms (unweighted) by loops over images, views, patches and pixels; the trunk one image at a time."""
    batch = len(seen.images[0])

    def tokens(network, images):
        outs = [network.backbone(images[b : b + 1]).tokens[0] for b in range(batch)]
        return torch.cat([out.cls for out in outs]), torch.stack([out.patches.flatten(0, 2) for out in outs])

    student = [tokens(method.student, image) for image in slow_masked(method, seen)]
    teacher = [tokens(method.teacher, image) for image in seen.images[:2]]
    terms = {}
    if method.reconstruction is not None:
        terms["rec"] = slow_reconstruction(method, [patches for _, patches in student], seen)
    if "cls" in method.student.heads:
        rows = torch.cat([cls for cls, _ in student] + [tokens(method.student, crop)[0] for crop in seen.images[2:]])
        q = slow_head(method.student.heads["cls"], rows).view(-1, batch, method.recipe.out_dim)
        k = slow_head(method.teacher.heads["cls"], torch.cat([cls for cls, _ in teacher])).view(2, batch, -1)
        similar = torch.einsum("vbc,woc->vbwo", q, k).tolist()
        losses = [
            minus_log_share(similar[v][b][w][b], [similar[v][b][w][o] for o in range(batch) if o != b])
            for v, b, w in np.ndindex(len(q), batch, 2)
            if v != w
        ]
        terms["cls"] = sum(losses) / len(losses)
    if "pat" in method.student.heads:
        places = student[0][1].shape[1]
        q, k = (
            slow_head(network.heads["pat"], torch.cat([patches for _, patches in both]).flatten(0, 1))
            for network, both in ((method.student, student), (method.teacher, teacher))
        )
        q, k = q.view(2, batch, places, -1), k.view(2, batch, places, -1)
        similar = torch.einsum("vbpc,vorc->vbpor", q, k).tolist()
        losses = [
            minus_log_share(here[b][p], [value for o in range(batch) if o != b for value in here[o]])
            for v, b, p in np.ndindex(2, batch, places)
            for here in [similar[v][b][p]]
        ]
        terms["pat"] = sum(losses) / len(losses)
    return terms


@pytest.mark.parametrize(
    ("row", "local_crops"),
    [
        ("vit-b", 3),
        ("no-multicrop", 0),
        ("assumption-layernorm", 1),
        ("assumption-sit-head", 2),
        ("assumption-equation1", 0),
        *[(row, 2) for row in ROWS if row.startswith("ablation")],
    ],
)
def test_every_term_by_loops(row, local_crops):
    recipe = small(row)
    method, seen = made(recipe), views(recipe, local_crops=local_crops)
    assert {NOISE, ALIEN} < set(seen.draws[0].unique().tolist())
    expected = slow_terms(method, seen)
    terms = method(seen)
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=2e-4), name


def test_weights_of_the_terms():
    recipe = small()
    plain = made(recipe)(views(recipe))
    weighted = made(dataclasses.replace(recipe, rec_weight=2.0, cls_weight=0.5, pat_weight=3.0))(views(recipe))
    for name, factor in (("rec", 2), ("cls", 0.5), ("pat", 3)):
        assert weighted[name].item() == pytest.approx(factor * plain[name].item(), rel=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_all_that_it_has_and_nothing_of_the_teacher(row):
    recipe = small(row)
    torch.manual_seed(0)
    method = mmc.make(recipe, named(recipe.arch), None)
    local_crops = 0 if recipe.augmentation.endswith("-2") else 2
    sum(method(views(recipe, local_crops=local_crops)).values()).backward()
    teacher = {id(parameter) for parameter in method.teacher.parameters()}
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad == (id(parameter) not in teacher), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            # A bias before an average over patches or a batch norm may do nothing; weights never.
            assert parameter.grad.isfinite().all(), name
            assert parameter.ndim < 2 or parameter.grad.abs().max() > 0, name
    assert teacher


def test_local_crops_take_part_in_the_class_term_alone():
    recipe = small()
    method, one, other = made(recipe), views(recipe), views(recipe)
    other = Views((*other.images[:2], *views(recipe, seed=1).images[2:]), other.draws)
    before, after = method(one), method(other)
    assert torch.equal(before["rec"], after["rec"])
    assert torch.equal(before["pat"], after["pat"])
    assert not torch.allclose(before["cls"], after["cls"])


def test_reconstruction_does_not_look_at_kept_pixels_nor_the_teacher_at_masks():
    recipe = small()
    method, seen = made(recipe), views(recipe)
    inputs = []
    method.teacher.backbone.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    method(seen)
    assert torch.equal(inputs[0], torch.cat(seen.images[:2]))
    predicted, clean = torch.randn(2, 2, 6, 3, 16, 16)
    maps = seen.draws[0].transpose(0, 1)
    kept = (maps == 0).unsqueeze(2)
    loss = mmc.reconstruction_loss(predicted, clean, maps, over="masked")
    assert torch.equal(loss, mmc.reconstruction_loss(predicted + 5 * kept, clean, maps, over="masked"))
    assert not torch.equal(loss, mmc.reconstruction_loss(predicted + 5 * ~kept, clean, maps, over="masked"))


def test_shapes_and_negatives_at_224_px():
    """196 patches; with a teacher that says the same of everything the contrasts count: ln 4, ln(1 + 3 * 196)."""
    recipe = small(arch="vit_32x2x2_patch16_224", head_norm="layer")
    method = made(recipe)
    for head in method.teacher.heads.values():
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.ones_(head[-1].bias)
    architecture = named(recipe.arch)
    maps, noise_at = mmc.draw(recipe, architecture, np.random.default_rng(0))
    assert (maps.shape, maps.dtype, noise_at.shape) == ((2, 224, 224), np.uint8, (2,))
    images = tuple(torch.randn(4, 3, size, size) for size in (224, 224, *[96] * 10))
    draws = tuple(torch.from_numpy(part).expand(4, *part.shape) for part in (maps, noise_at))
    terms = method(Views(images, draws))
    assert terms["cls"].item() == pytest.approx(math.log(4), rel=1e-5)
    assert terms["pat"].item() == pytest.approx(math.log(589), rel=1e-5)


def test_heads_of_the_paper_and_of_sit():
    """Three linear layers of width 4096 each; at ViT-B/16 on the meta device, where nothing is computed."""
    recipe = mmc.RECIPES["vit-b"]
    with torch.device("meta"):
        encoder = mmc.Encoder(recipe, named(recipe.arch))
        heads = [*encoder.heads.values(), pixel_mlp(768, 16, width=recipe.head_dim)]
    shapes = [[tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)] for head in heads]
    contrast = [(4096, 768), (4096, 4096), (256, 4096)]
    assert shapes == [contrast, contrast, [(4096, 768), (4096, 4096), (768, 4096)]]
    kinds = [type(layer).__name__ for layer in encoder.heads["cls"]]
    norm = "GlobalBatchNorm"
    assert kinds == ["Linear", norm, "ReLU", "Linear", norm, "GELU", "Linear", norm]
    assert encoder.heads["cls"][-1].weight is None
    sit = made(small("assumption-sit-head")).reconstruction
    assert [type(layer).__name__ for layer in sit] == ["Linear", "GELU"] * 3 + ["ChannelsFirst", "ConvTranspose2d"]
    assert [tuple(layer.weight.shape) for layer in sit if hasattr(layer, "weight")] == [(32, 32)] * 3 + [(32, 3, 8, 8)]


def test_pixels_of_a_patch_are_in_the_order_of_mae():
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(ToImage()(patchify(images, 8).view(2, 3, 3, -1)), images)


def test_initialization():
    recipe = small(arch="vit_96x4x3_patch8_48", head_dim=200, drop_path=0.1)
    torch.manual_seed(0)
    method = mmc.make(recipe, named(recipe.arch), None)
    student, teacher = method.student, method.teacher
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert student.backbone.vit.pos_embed.requires_grad
    weights = {name: parameter for name, parameter in method.named_parameters() if name.endswith("pos_embed")}
    weights |= {f"linear{i}": m.weight for i, m in enumerate(method.modules()) if isinstance(m, torch.nn.Linear)}
    assert len(weights) == 2 + 2 * (4 * 4 + 3 + 3) + 3
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.06) for weight in weights.values())
    rates = [[m.drop_prob for m in network.modules() if isinstance(m, DropPath)] for network in (student, teacher)]
    assert max(rates[0]) == pytest.approx(0.1)
    assert max(rates[1], default=0) == 0


def test_the_teacher_moves_with_its_heads_from_momentum_to_1():
    recipe = small(batch=4)
    method = made(recipe)
    trained = [parameter.detach().clone() for parameter in method.student.parameters()]
    expected = [parameter.detach().double().clone() for parameter in method.teacher.parameters()]
    buffers = [buffer.clone() for buffer in method.teacher.buffers()]
    for step in (1, 2, 100, 200):  # of 10 epochs of 20 steps
        momentum = 1 - 0.004 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 200))
        expected = [momentum * t + (1 - momentum) * s.double() for t, s in zip(expected, trained, strict=True)]
        method.after_step(Progress(step, 20, 10))
    for found, wanted in zip(method.teacher.parameters(), expected, strict=True):
        assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(trained, method.student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, method.teacher.buffers(), strict=True))
    # The first step's momentum is .996 itself.
    method = made(recipe)
    start = next(method.teacher.parameters()).clone()
    method.after_step(Progress(1, 20, 10))
    moved = next(method.teacher.parameters())
    assert torch.allclose(moved, 0.996 * start + 0.004 * next(method.student.parameters()), rtol=1e-5, atol=1e-8)


def test_bf16_is_close_and_finite():
    recipe = small()
    method, seen = made(recipe), views(recipe)
    exact = {name: value.item() for name, value in method(seen).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(seen)
        sum(terms.values()).backward()
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name], rel=0.05)
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_watching():
    recipe = small()
    method, seen = made(recipe), views(recipe)
    method(seen)
    assert method.vitals == {}
    assert method.embedding is None
    method.watching = True
    method(seen)
    assert method.vitals["masked"].item() == pytest.approx((seen.draws[0] != 0).double().mean().item(), rel=1e-5)
    assert {"cls_similarity", "pat_similarity"} < set(method.vitals)
    assert all(value.shape == () and -1 <= value <= 1 for value in method.vitals.values())
    assert method.embedding.shape == (6, 32)
    assert not method.embedding.requires_grad


def test_what_is_saved():
    method = made(small())
    saved = method.saved()
    assert list(saved.networks) == ["teacher", "student"]
    assert saved.networks["teacher"] is method.teacher.backbone
    assert saved.networks["student"] is method.student.backbone
    assert saved.by_protocol == {"reconstruction": "student"}
    assert set(saved.extras) == {"projector", "patch_projector", "reconstruction"}
    assert torch.equal(saved.extras["projector"]["0.weight"], method.teacher.heads["cls"][0].weight)
    assert torch.equal(saved.extras["patch_projector"]["0.weight"], method.teacher.heads["pat"][0].weight)
    head = pixel_mlp(32, 8, width=24)
    head.load_state_dict(saved.extras["reconstruction"])
    tokens = torch.randn(2, 2, 2, 32)
    assert torch.equal(head(tokens), method.reconstruction(tokens))
    assert set(made(small("ablation-rec")).saved().extras) == {"reconstruction"}
    assert set(made(small("ablation-pat")).saved().extras) == {"patch_projector"}


def test_state_survives_a_stop():
    recipe = small()
    method, again, seen = made(recipe), made(recipe, seed=1), views(recipe)
    method(seen)  # moves running statistics
    again.load_state_dict(method.state_dict())
    for name, value in method(seen).items():
        assert torch.equal(value, again(seen)[name])


def test_draws_depend_on_the_generator_alone_and_differ_between_views():
    recipe, architecture = mmc.RECIPES["toy"], named("vit_96x4x3_patch8_48")
    draw = pickle.loads(pickle.dumps(mmc.draw))  # noqa: S301  (what a data worker does)
    first, second = (draw(recipe, architecture, np.random.default_rng(3)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0][0] != 0, first[0][1] != 0)
    drawn = [mmc.draw(recipe, architecture, np.random.default_rng(i))[0].reshape(2, -1) for i in range(600)]
    aliens = np.array([(maps == ALIEN).any(1) for maps in drawn])
    assert aliens.mean() == pytest.approx(0.35, abs=0.05)
    assert aliens.all(1).mean() == pytest.approx(0.35**2, abs=0.05)  # each view by itself


def gradients_of(recipe, seen):
    method = made(recipe)
    terms = method(seen)
    sum(terms.values()).backward()
    gradients = torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad])
    return torch.stack([terms[name].detach() for name in sorted(terms)]), gradients


def process(rank, folder, recipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    seen, half = views(recipe, batch=8), slice(4 * rank, 4 * rank + 4)
    mine = Views(tuple(x[half] for x in seen.images), tuple(x[half] for x in seen.draws))
    torch.save(gradients_of(recipe, mine), f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_losses_and_gradients_of_one(tmp_path):
    recipe = small()
    terms, gradients = gradients_of(recipe, views(recipe, batch=8))
    mp.spawn(process, (str(tmp_path), recipe), nprocs=2)
    results = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(2)]
    assert torch.allclose((results[0][0] + results[1][0]) / 2, terms, rtol=1e-5)
    mean = (results[0][1] + results[1][1]) / 2
    assert torch.cosine_similarity(mean, gradients, dim=0) > 0.99999
    assert torch.allclose(mean, gradients, rtol=1e-3, atol=1e-5)


def test_the_papers_values():
    row = mmc.RECIPES["vit-b"]
    assert next(iter(mmc.RECIPES)) == "vit-b"
    # Implementation Details
    assert (row.arch, row.epochs) == ("vit_base_patch16_224", 400)
    assert row.batch == 48 * 8
    assert row.base_lr * row.batch / 256 == pytest.approx(7.5e-4)
    assert (row.min_lr, row.weight_decay, row.weight_decay_end) == (1e-6, 0.04, 0.04)
    assert (row.momentum, row.momentum_end, row.temperature, row.head_dim) == (0.996, 1.0, 0.2, 4096)
    assert (row.rec_weight, row.cls_weight, row.pat_weight) == (1, 1, 1)  # Eq. 4
    # Supplementary, Augmentation and Fig. 8
    assert (row.noise_area, row.alien_area, row.alien_share) == (0.75, 0.3, 0.35)
    # SiT, GMML
    assert (row.warmup_epochs, row.clip, row.clip_each, row.drop_path, row.betas) == (10, 3.0, True, 0.1, (0.9, 0.999))
    assert (row.block, row.align, row.out_dim, row.head_norm) == (0.3, 1, 256, "batch")
    assert (row.rec_head, row.rec_over, row.augmentation, row.horizon) == ("mlp", "masked", "mmc", 1.0)


def differences(row, base):
    one, other = (dataclasses.asdict(mmc.RECIPES[name]) for name in (row, base))
    return {name: value for name, value in one.items() if value != other[name] and name not in ("source", "published")}


def test_the_other_rows():
    assert differences("vit-s", "vit-b") == {"arch": "vit_small_patch16_224", "epochs": 500}
    assert differences("vit-s-400ep", "vit-s") == {"epochs": 400}  # Data Efficiency
    assert differences("no-multicrop", "vit-s-400ep") == {"augmentation": "mmc-2"}
    assert differences("ablation-rec-cls-pat", "vit-s") == {"epochs": 200}  # Ablation of Components
    assert differences("batch-48", "vit-b") == {"batch": 48, "base_lr": 4e-3}
    assert mmc.RECIPES["batch-48"].base_lr * 48 / 256 == pytest.approx(7.5e-4)
    full = "ablation-rec-cls-pat"
    assert differences("assumption-layernorm", full) == {"head_norm": "layer"}
    assert differences("assumption-sit-head", full) == {"rec_head": "convolution"}
    assert differences("assumption-equation1", full) == {"rec_over": "all"}
    assert differences("toy-multicrop", "toy") == {"augmentation": "toy-mmc"}
    assert mmc.RECIPES["toy"].arch == "vit_96x4x3_patch8_48"


def test_table_4():
    table = {
        "rec": ("17.18", "14.70", "89.94"),
        "cls": ("75.02", "63.88", "90.62"),
        "pat": ("39.92", "40.82", "87.84"),
        "cls-pat": ("75.56", "75.54", "89.72"),
        "rec-pat": ("33.54", "33.74", "89.40"),
        "rec-cls": ("72.54", "53.68", "88.24"),
        "rec-cls-pat": ("77.54", "76.96", "91.02"),
    }
    assert [name.removeprefix("ablation-") for name in ROWS if name.startswith("ablation")] == list(table)
    for terms, numbers in table.items():
        row = mmc.RECIPES[f"ablation-{terms}"]
        for term in ("rec", "cls", "pat"):
            assert getattr(row, f"{term}_weight") == (term in terms.split("-"))
        assert row.augmentation == ("mmc" if "cls" in terms else "mmc-2")
        assert (row.epochs, row.arch) == (200, "vit_small_patch16_224")
        assert all(number in row.published for number in numbers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rec_weight": "0", "cls_weight": "0", "pat_weight": "0"}, "at least one above 0"),
        ({"cls_weight": "-1"}, "rec_weight=1, cls_weight=-1, pat_weight=1: expected no negative weight"),
        ({"temperature": "0.01"}, "temperature=0.01: expected at least 0.025"),
        ({"head_dim": "0"}, "head_dim=0, out_dim=256: expected at least 1"),
        ({"momentum": "1.5"}, r"momentum=1.5: expected a number in \[0, 1\]"),
        ({"alien_share": "35"}, "alien_share=35: expected a number in"),
        ({"noise_area": "75"}, "noise_area=75: expected a share above 0, at most 0.95"),
        ({"alien_area": "0"}, "alien_area=0: expected a share"),
        ({"block": "0"}, "block=0: expected a share"),
        ({"batch": "1"}, "batch=1: MMC contrasts images of the batch"),
        ({"epochs": "5"}, "warmup_epochs=10 of epochs=5"),
        ({"head_norm": "none"}, "head_norm=none: expected one of batch, layer"),
        ({"rec_over": "pixels"}, "rec_over=pixels: expected one of masked, all"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        with_settings(mmc.RECIPES["vit-b"], settings)


def test_blocks_and_networks_that_do_not_fit_are_refused():
    recipe = small(align=16)
    with pytest.raises(UserError, match=r"block=0\.3 of 16 px is 4 px"):
        mmc.make(recipe, named(recipe.arch), None)
    with pytest.raises(UserError, match="augmentation=mae: it gives one view"):
        mmc.make(small(augmentation="mae"), named("vit_32x2x2_patch8_16"), None)
    with pytest.raises(UserError, match="compares class tokens"):
        mmc.make(small(), dataclasses.replace(named("vit_32x2x2_patch8_16"), cls=False), None)


def test_it_says_that_it_compares_images():
    assert mmc.MMC.compares_images
