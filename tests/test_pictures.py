"""The numbers behind the pictures, each against a slow calculation, and the sheets they are laid out on."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_architecture, tiny_backbone
from PIL import Image
from tiny_training import ARCHITECTURE

from ssl_bench.errors import UserError
from ssl_bench.evaluate.adapters import EncoderAdapter, block_outputs
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.backbone import Pixels, build
from ssl_bench.evaluate.checkpoints import Checkpoint, open_checkpoint
from ssl_bench.evaluate.pictures import attention, clusters, histogram, inversion, layers, locality, reconstruction
from ssl_bench.evaluate.pictures import sheet as sheets
from ssl_bench.evaluate.pictures import similarity as similarity_picture
from ssl_bench.evaluate.pictures.masked import kept_count, without
from ssl_bench.evaluate.pictures.sheet import Cell, Row, colored, sheet, upsampled
from ssl_bench.evaluate.pictures.similarity import similarity
from ssl_bench.evaluate.pictures.views import Look, Seen, fitted, look, normalized, pixels, squared
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.networks import kept_patches, patchify


def image(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def trained(method: str, tmp_path, **changes):
    """An untrained network of a method, all of whose weights were moved, and its file as the loop writes it."""
    module = METHODS[method]
    recipe = replace(module.RECIPES["toy"], arch=ARCHITECTURE, **changes)
    torch.manual_seed(3)
    network = module.make(recipe, named(ARCHITECTURE), None).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    saved = network.saved()
    origin = {"method": method, "recipe": "toy", "resolved_recipe": dataclasses.asdict(recipe)}
    path = tmp_path / f"{method}.pt"
    save_checkpoint(path, saved.networks, by_protocol=saved.by_protocol, extras=saved.extras, origin=origin)
    return network, path


# One forward pass


def network_input(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Resized and normalized, pixel by pixel."""
    small = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).astype(np.float64)
    architecture = tiny_architecture()
    small = (small / 255 - np.array(architecture.mean)) / np.array(architecture.std)
    return torch.from_numpy(small.transpose(2, 0, 1)[None]).float()


def attention_by_hand(x: torch.Tensor, block) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) of every head from the weights: (heads, N, N)."""
    x = block.norm1(x)[0]
    query, key, _ = torch.nn.functional.linear(x, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=1)
    maps, width = [], query.shape[1] // 2
    for head in range(2):
        q, k = (z[:, head * width : (head + 1) * width] for z in (query, key))
        maps.append(torch.softmax(q @ k.T / math.sqrt(width), dim=-1))
    return torch.stack(maps)


@torch.no_grad()
def test_look_gives_the_tokens_and_the_softmax_attention_of_the_chosen_block(tiny_checkpoint):
    request = Look(points=((39, 0), (0, 23)), layer=0, size_px=40, blocks=True, attention=True)
    seen = look(tiny_checkpoint, image(), request, name="tiny", device="cpu")
    assert seen.grid == (3, 5)
    assert [seen.patch_of(point) for point in seen.points] == [(0, 4), (2, 0)]
    backbone = tiny_backbone()
    x, _ = backbone.embed(network_input(image(), (40, 24)))
    maps = attention_by_hand(x, backbone.vit.blocks[0])
    torch.testing.assert_close(seen.class_attention, maps[:, 0, 1:].reshape(2, 3, 5))
    torch.testing.assert_close(seen.point_attention[0], maps[:, 1 + 4, 1:].reshape(2, 3, 5))
    torch.testing.assert_close(seen.point_attention[1], maps[:, 1 + 10, 1:].reshape(2, 3, 5))
    first = backbone.vit.blocks[0](x)
    last = backbone.vit.blocks[1](first)
    torch.testing.assert_close(seen.patches, backbone.vit.norm(first)[0, 1:].reshape(3, 5, 32))
    torch.testing.assert_close(seen.blocks[1].patches.flatten(1, 2), last[:, 1:])  # raw
    torch.testing.assert_close(seen.blocks[1].cls, last[:, 0])


@torch.no_grad()
def test_class_attention_of_extrema_is_that_of_its_last_block(tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = build(replace(tiny_architecture(), cls=False, position_of_prefix=False, class_attention_blocks=2)).eval()
    save_checkpoint(tmp_path / "cait.pt", backbone)
    request = Look(points=((0, 0),), size_px=40, attention=True)
    seen = look(open_checkpoint(tmp_path / "cait.pt"), image(), request, name="cait", device="cpu")
    images = network_input(image(), (40, 24))
    patches = backbone(images, norm=False).tokens[0].patches.flatten(1, 2)
    first, last = backbone.class_attention.blocks
    cls = first(patches, backbone.class_attention.cls_token)
    u = last.norm1(torch.cat([cls, patches], dim=1))[0]
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        q, k = last.attn.q(u[:1])[:, part], last.attn.k(u)[:, part]
        expected = torch.softmax(q @ k.T / 4, dim=-1)[0, 1:].reshape(3, 5)
        torch.testing.assert_close(seen.class_attention[head], expected)
    assert seen.point_attention.shape == (1, 2, 3, 5)
    said = []
    monkeypatch.setattr(attention, "sheet", lambda *_, note, **more: said.append(note))
    attention.draw([replace(seen, block="block 1 of 2")])
    attention.draw_queries([replace(seen, block="block 1 of 2")])
    assert "Attention in class-attention block 2 of 2, after the last block." in said[0]
    assert "Attention in block 1 of 2, of the class token in class-attention block 2 of 2" in said[1]


@pytest.mark.parametrize(
    ("size", "image_px", "size_px", "expected"),
    [
        ((640, 480), 224, None, (480, 360 // 16 * 16)),  # 22.5 patches: rounded to even
        ((96, 96), 48, None, (96, 96)),
        ((1, 1), 48, None, (96, 96)),
        ((4000, 3), 224, None, (480, 16)),
        ((3, 4000), 224, 320, (16, 320)),
        ((100, 50), 0, None, (480, 240)),
    ],
)
def test_the_network_sees_whole_patches_of_the_whole_image(size, image_px, size_px, expected):
    architecture = replace(tiny_architecture(), image_px=image_px, patch_px=8 if image_px == 48 else 16)
    assert fitted(size, architecture, size_px) == expected


@pytest.mark.parametrize(
    ("size", "size_px", "attention", "said"),
    [
        (
            (100, 100),
            100_000,
            False,
            r"--size 100000: .* 6,250 x 6,250 patches of 16 px; 16,384 at most.*--size 2048\.$",
        ),
        ((200, 100), 4096, True, r"256 x 128 patches.*; 4,096 at most.* with attention. Try --size 1440, or other"),
    ],
)
def test_more_patches_than_can_be_drawn_are_refused(size, size_px, attention, said):
    architecture = replace(tiny_architecture(), image_px=224, patch_px=16)
    with pytest.raises(UserError, match=said):
        fitted(size, architecture, size_px, attention=attention)
    fitted(size, architecture, int(said.rpartition("--size ")[2][:4]), attention=attention)
    assert fitted((100, 100), architecture, 1024, attention=True) == (1024, 1024)


def test_tokens_that_are_not_finite_are_refused(tmp_path):
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.vit.norm.weight[0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", backbone)
    with pytest.raises(UserError, match="not finite"):
        look(open_checkpoint(tmp_path / "nan.pt"), image(), Look(points=((0, 0),)), name="nan", device="cpu")


# Similarity, attention, clusters


def test_similarity_is_the_cosine_of_the_marked_patch():
    patches = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = similarity(patches, 1, 2)
    marked = patches[1, 2].tolist()
    for row, column in itertools.product(range(3), range(4)):
        other = patches[row, column].tolist()
        dot = sum(a * b for a, b in zip(marked, other, strict=True))
        lengths = math.sqrt(sum(a * a for a in marked)) * math.sqrt(sum(b * b for b in other))
        assert float(found[row, column]) == pytest.approx(dot / lengths, abs=1e-9)


def test_the_label_of_a_token_of_zeros_does_not_say_1(monkeypatch):
    patches = torch.zeros(3, 5, 4)
    seen = Seen("x", replace(tiny_architecture(), patch_px=8), image(), patches, ((0, 0),), "block 1 of 1", "")
    labels = [cell.label for cell in similarity_picture._cells(seen, (0, 0), [0.5])]
    assert labels == ["image", "cosine, 0.00 to 0.00", "above 0.5"]


def test_the_overlay_has_the_color_of_the_head_that_attends_most_and_its_share_as_brightness():
    maps = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(1))
    maps[1] *= 0.01  # heads count relative to their own largest value
    found = attention.overlay(maps, (4, 2))
    colors = attention.head_colors(3)
    assert len(set(colors)) == 3
    for row, column in itertools.product(range(2), range(4)):
        shares = [float(maps[head, row, column] / maps[head].max()) for head in range(3)]
        best = shares.index(max(shares))
        expected = [round(shares[best] * part) for part in colors[best]]
        np.testing.assert_allclose(found[row, column], expected, atol=1)
    assert (attention.overlay(torch.zeros(2, 2, 2), (2, 2)) == 0).all()  # black is no attention


def test_clusters_find_groups_by_direction_and_count_the_largest_first():
    directions = torch.eye(3)
    groups = torch.tensor([[2, 2, 0, 1], [2, 2, 0, 0]])
    lengths = torch.linspace(1, 100, 8).reshape(2, 4, 1)  # k-means on raw tokens would split by length
    found = clusters.clusters(directions[groups] * lengths, seed=0)
    np.testing.assert_array_equal(found, [[0, 0, 1, 2], [0, 0, 1, 1]])
    np.testing.assert_array_equal(clusters.clusters(torch.ones(2, 2, 3), seed=0), np.zeros((2, 2)))  # one group there


@pytest.mark.parametrize(
    ("distinct", "legend"), [(1, ["largest"]), (2, ["largest", "second"]), (9, ["largest", "second", "third"])]
)
def test_the_legend_has_the_groups_that_were_found(distinct, legend, monkeypatch):
    patches = torch.eye(15)[torch.arange(15) % distinct].reshape(3, 5, 15)
    seen = Seen("x", replace(tiny_architecture(), patch_px=8), image(), patches, (), "block 1 of 1", "")
    named_ = []
    monkeypatch.setattr(clusters, "swatches", lambda entries: named_.extend(entries) or Image.new("RGB", (1, 1)))
    clusters.draw([seen], seed=0)
    assert [name for _, name in named_] == [f"{name} group" for name in legend]


# Layers


def cka_by_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al.: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the centering matrix."""
    n = len(x)
    center = np.eye(n) - np.ones((n, n)) / n
    k, m = x @ x.T, y @ y.T
    shared, own_x, own_y = (np.trace(a @ center @ b @ center) for a, b in ((k, m), (k, k), (m, m)))
    return shared / math.sqrt(own_x * own_y)


@pytest.mark.parametrize(("n", "dim"), [(5, 9), (30, 4)])
def test_cka_is_the_ratio_of_hsic(n, dim):
    rng = np.random.RandomState(0)
    x, y = rng.randn(n, dim) + 3, rng.randn(n, dim + 1) - 1
    y[:, 0] += x[:, 0]
    found = layers.cka(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(cka_by_hsic(x, y), abs=1e-9)
    turn = np.linalg.qr(rng.randn(dim, dim))[0]
    assert layers.cka(torch.from_numpy(x), torch.from_numpy(2 * x @ turn + 1)) == pytest.approx(1, abs=1e-9)


def test_cka_of_every_block_is_with_the_last_one(tiny_checkpoint):
    seen = look(tiny_checkpoint, image(), Look(points=(), size_px=40, blocks=True), name="tiny", device="cpu")
    x, y = (tokens.patches[0].reshape(15, 32).double().numpy() for tokens in seen.blocks)
    assert layers.similarity_to_last(seen.blocks) == pytest.approx([cka_by_hsic(x, y), 1.0], abs=1e-6)


@torch.no_grad()
def test_shares_of_adapters_are_those_of_the_lengths_of_their_parts(tmp_path):
    torch.manual_seed(0)
    backbone = tiny_backbone()
    adapter = EncoderAdapter(32, 2, blocks_per_group=1, hidden=16)
    save_checkpoint(tmp_path / "tec.pt", backbone, extras={"encoder_adapter": adapter.state_dict()})
    checkpoint = open_checkpoint(tmp_path / "tec.pt")
    seen = look(checkpoint, image(), Look(points=(), size_px=40, blocks=True), name="tec", device="cpu")
    one, two = adapter.parts(block_outputs(backbone, network_input(image(), (40, 24))))
    shares = [float(a.norm() / (a.norm() + b.norm())) for a, b in zip(one[0], two[0], strict=True)]  # of 1 + 15 tokens
    expected = sum(shares) / 16
    assert len(shares) == 16
    assert layers.adapter_shares(checkpoint, seen.blocks) == pytest.approx([expected, 1 - expected], abs=1e-6)
    drawn = layers.draw([seen], {"tec": np.array([expected, 1 - expected])})
    assert drawn.width > layers.draw([seen], {}).width  # a plot more


# Histogram of one image


def test_patches_belong_to_what_covers_most_of_them_also_between_pixels():
    mask = np.zeros((24, 40), np.uint8)
    mask[:16, :16], mask[8:, 24:32], mask[16:, 32:] = 1, 2, 255
    mask[0:3, 16:24] = 1  # less than half of the patch
    objects = histogram.objects_of_patches(mask, (3, 5))
    np.testing.assert_array_equal(objects, [[1, 1, 0, 0, 0], [1, 1, 0, 2, 0], [0, 0, 0, 2, 255]])
    stripes = np.zeros((50, 50), np.uint8)
    stripes[:, ::5] = 1  # a fifth of every patch; the nearest of 2 x 2 pixels a patch would be these alone
    assert not histogram.objects_of_patches(stripes, (5, 5)).any()
    thin = np.full((1000, 10), 1, np.uint8)
    thin[1::2] = thin[::4] = 2
    assert (histogram.objects_of_patches(thin, (1, 1)) == 2).all()


def test_pairs_within_and_between_objects_are_those_of_a_slow_count():
    mask = np.zeros((24, 40), np.uint8)
    mask[:16, :16], mask[8:, 24:32], mask[16:, 32:] = 1, 2, 255
    flat = histogram.objects_of_patches(mask, (3, 5)).ravel().tolist()
    patches = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    seen = Seen("x", replace(tiny_architecture(), patch_px=8), image(), patches, (), "block 1 of 1", "")
    found = histogram.pairs(seen, mask)
    same, different = [], []
    tokens = patches.reshape(15, 6).double()
    for one, other in itertools.combinations(range(15), 2):
        if 255 in (flat[one], flat[other]) or flat[one] == flat[other] == 0:
            continue
        cosine = float(tokens[one] @ tokens[other] / (tokens[one].norm() * tokens[other].norm()))
        (same if flat[one] == flat[other] else different).append(cosine)
    expected = [np.histogram(each, 200, (-1, 1))[0] for each in (different, same)]
    np.testing.assert_array_equal(found.counts, expected)
    assert found.sums == pytest.approx([sum(different), sum(same)], abs=1e-5)


@pytest.mark.parametrize(
    ("pixels_", "mode", "message"),
    [
        (np.zeros((24, 40, 3)), "RGB", "one number a pixel"),
        (np.ones((40, 24)), "L", "24 x 40 px and its image 40 x 24"),
        (np.zeros((24, 40)), "L", "expected an object"),
        (np.full((24, 40), 255), "L", "holds the values none"),
    ],
)
def test_masks_that_tell_nothing_are_refused(tmp_path, monkeypatch, pixels_, mode, message):
    Image.fromarray(pixels_.astype(np.uint8), mode=None).convert(mode).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=message):
        histogram.read_mask(tmp_path / "mask.png", image())
    picture = image()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"mask\.png.*decompression bomb"):
        histogram.read_mask(tmp_path / "mask.png", picture)
    (tmp_path / "mask.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"mask\.png"):
        histogram.read_mask(tmp_path / "mask.png", image())


# Reconstruction


@pytest.mark.parametrize("head", ["mlp", "convolution"])
@torch.no_grad()
def test_mmc_rebuilds_as_its_own_head_does(tmp_path, head):
    network, path = trained("mmc", tmp_path, rec_head=head)
    checkpoint = open_checkpoint(path, protocol="reconstruction")
    assert checkpoint.key == "student"
    assert reconstruction.why_not(checkpoint) is None
    found = reconstruction.reconstruct(checkpoint, image(), seed=4, device="cpu")
    assert found.blocks == (0, 1, 2, 3)
    tokens = network.student.backbone(found.given, layers=found.blocks).tokens
    for rebuilt, each in zip(found.rebuilt, tokens, strict=True):
        torch.testing.assert_close(rebuilt, network.reconstruction(each.patches))
    torch.testing.assert_close(found.original, normalized(pixels(squared(image(), 48)), checkpoint.architecture))
    covered = (found.given != found.original).any(1)
    assert 0.25 <= float(covered.float().mean()) < 0.75  # noise_area of the toy row is .5, from U(.5 * 1, .5)
    patches = covered.reshape(6, 8, 6, 8).float().mean((1, 3))
    assert set(patches.unique().tolist()) <= {0.0, 1.0}  # aligned to patches, as the recipe says


@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_mae_rebuilds_as_its_own_decoder_does(tmp_path, scaled):
    network, path = trained("mae", tmp_path, normalize_pixels=scaled)
    checkpoint = open_checkpoint(path)
    found = reconstruction.reconstruct(checkpoint, image(), seed=4, device="cpu")
    order = torch.from_numpy(np.random.default_rng(4).permutation(36))[None]
    visible, masked = order[:, : network.n_visible], order[:, network.n_visible :]
    true = patchify(found.original, 8)[0]
    for block, rebuilt in zip(found.blocks, found.rebuilt, strict=True):
        tokens = network.encoder(found.original, layers=[block], keep=visible).tokens[0]
        decoded = network.decoder(tokens.cls, tokens.patches, visible, masked)
        predicted = network.predict(decoded[:, -masked.shape[1] :])[0]
        patches = patchify(rebuilt, 8)[0]
        torch.testing.assert_close(patches[visible[0]], true[visible[0]])
        for place, values in zip(masked[0].tolist(), predicted, strict=True):
            expected = values * (true[place].var() + 1e-6).sqrt() + true[place].mean() if scaled else values
            torch.testing.assert_close(patches[place], expected, atol=1e-4, rtol=1e-4)
    gray = normalized(torch.full((1, 3, 1, 1), 0.5), checkpoint.architecture)[0, :, 0, 0]
    given = patchify(found.given, 8)[0]
    torch.testing.assert_close(given[visible[0]], true[visible[0]])
    torch.testing.assert_close(given[masked[0]], gray.repeat(27, 64))


@torch.no_grad()
def test_official_mae_files_with_a_decoder_rebuild_too(tmp_path):
    """The same weights under the official names; its decoder has 16 heads and predicts pixels as they are."""
    _, path = trained("mae", tmp_path, normalize_pixels=False, decoder_heads=16)
    ours = open_checkpoint(path)
    renamed = {"tokens.mask_token": "mask_token", "tokens.project": "decoder_embed", "predict": "decoder_pred"}
    state = dict(ours.state)
    for key, value in ours.extras["decoder"].items():
        start = next((name for name in renamed if key.startswith(name)), None)
        state[renamed[start] + key.removeprefix(start) if start else f"decoder_{key}"] = value
    state["decoder_pos_embed"] = METHODS["mae"].student(named(ARCHITECTURE)).vit.pos_embed.new_zeros(1, 37, 64)
    state["decoder_pos_embed"][:] = reconstruction._sincos(64, 6)
    torch.save({"model": state}, tmp_path / "official.pth")
    official = open_checkpoint(tmp_path / "official.pth", arch={"heads": "2"})
    assert official.format == "mae"
    one, other = (reconstruction.reconstruct(each, image(), seed=0, device="cpu") for each in (ours, official))
    torch.testing.assert_close(one.rebuilt, other.rebuilt)


@pytest.mark.parametrize("method", ["sdae", "moca"])
def test_a_checkpoint_without_a_pixel_head_says_what_it_holds(tmp_path, method):
    _, path = trained(method, tmp_path)
    reason = reconstruction.why_not(open_checkpoint(path))
    assert reason.startswith(f"it ({method}) has no head that gives pixels. Beyond the backbone it holds: decoder")
    assert "pretrain mmc" in reason


def test_a_deep_network_is_rebuilt_from_its_last_six_blocks(tmp_path):
    architecture = replace(named(ARCHITECTURE), depth=8)
    head = {f"{layer}.weight": torch.zeros(n, m) for layer, n, m in ((0, 8, 32), (2, 8, 8), (4, 192, 8))}
    head |= {key.replace("weight", "bias"): torch.zeros(len(value)) for key, value in head.items()}
    save_checkpoint(tmp_path / "deep.pt", build(architecture), extras={"reconstruction": head})
    checkpoint = open_checkpoint(tmp_path / "deep.pt")
    found = reconstruction.reconstruct(checkpoint, image(), seed=0, device="cpu")
    assert found.blocks == (2, 3, 4, 5, 6, 7)
    drawn = reconstruction.draw([(checkpoint, "deep", found)])
    assert drawn.width == 2 * 20 + 7 * 240 + 6 * 14


# Inversion


def test_the_energy_is_that_of_equation_1_and_falls():
    backbone = tiny_backbone()
    images = network_input(image(), (40, 24))
    visible = torch.tensor([[3, 0, 14, 7]])
    drawn, energy = inversion.invert(backbone, images, visible, steps=40, seed=5)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        generator, noise = inversion.Hourglass((24, 40)), 0.1 * torch.rand(1, 32, 24, 40)
        first = backbone(normalized(generator(noise), backbone.architecture)).tokens[0].patches.reshape(15, 32)
        wanted = backbone(images, keep=visible).tokens[0].patches[0]
        total = sum(float((first[place] - wanted[at]).square().sum()) for at, place in enumerate([3, 0, 14, 7]))
    assert energy[0] == pytest.approx(total / (4 * 32), rel=1e-4)
    assert len(energy) == 40
    assert energy[-1] < 0.6 * energy[0]
    assert drawn.shape == (1, 3, 24, 40)
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1
    again, _ = inversion.invert(backbone, images, visible, steps=40, seed=5)
    torch.testing.assert_close(again, drawn)


def test_published_settings_of_the_inversion():
    assert (inversion.STEPS, inversion.LEARNING_RATE) == (3000, 1e-3)  # ExtreMA, appendix C
    assert clusters.CLUSTERS == 3  # MMC, Fig. 6
    assert reconstruction.LAST_BLOCKS == 6  # MMC, Fig. 9: 7 to 12


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (8, 96), (13, 30), (48, 48)])
def test_the_hourglass_draws_any_size(size):
    assert inversion.Hourglass(size)(torch.rand(1, 32, *size)).shape == (1, 3, *size)


def test_larger_mask_ratios_hide_more_of_the_same(tiny_checkpoint):
    advanced = []
    found = inversion.inversions(
        tiny_checkpoint, image(16, 16), (0.25, 0.75), steps=1, seed=0, device="cpu", advance=advanced.append
    )
    hidden = [(each.visible == 0.5).all(1)[0].reshape(2, 8, 2, 8).all(3).all(1) for each in found]
    assert [int(each.sum()) for each in hidden] == [1, 3]
    assert (hidden[0] <= hidden[1]).all()
    assert sum(advanced) == 2


# Locality


@torch.no_grad()
def test_retrieval_is_by_the_cosine_of_resized_crops(tiny_checkpoint):
    boxes = [(0, 0, 9, 9), (5, 3, 30, 24), (20, 4, 40, 20)]
    query = image().crop(boxes[1])
    found = locality.retrieve(tiny_checkpoint, image(), query, boxes, name="tiny", device="cpu")
    backbone = tiny_backbone()
    vectors = [
        backbone(network_input(crop, (16, 16))).tokens[0].cls[0]
        for crop in (query, *(image().crop(box) for box in boxes))
    ]
    expected = [float(torch.cosine_similarity(vectors[0], each, dim=0)) for each in vectors[1:]]
    assert found.cosine == pytest.approx(expected, abs=1e-5)
    assert found.cosine[1] == pytest.approx(1)
    assert found.vector == "class token"


def test_networks_without_a_class_token_compare_the_mean_of_patches(tmp_path):
    torch.manual_seed(0)
    backbone = build(replace(tiny_architecture(), cls=False, position_of_prefix=False)).eval()
    save_checkpoint(tmp_path / "flat.pt", backbone)
    checkpoint = open_checkpoint(tmp_path / "flat.pt")
    found = locality.retrieve(checkpoint, image(), image(), [(0, 0, 8, 8)], name="flat", device="cpu")
    with torch.no_grad():
        one, other = (
            backbone(network_input(crop, (16, 16))).tokens[0].patches.mean((1, 2))[0]
            for crop in (image(), image().crop((0, 0, 8, 8)))
        )
    assert found.vector == "mean of patches"
    assert found.cosine[0] == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-5)


# Sheets


def test_pixels_are_compared_as_pixels():
    found = locality.retrieve(open_checkpoint("pixels:"), image(), image(), [(0, 0, 8, 8)], name="p", device="cpu")
    assert found.vector == "all pixels of the crop at 48 x 48"


def test_a_sheet_is_as_large_as_what_is_on_it():
    cell = Cell(Image.new("RGB", (240, 100)), "label")
    one, two = sheet("title", [Row([cell])]), sheet("title", [Row([cell]), Row([cell], "heading")])
    assert one.width == 2 * 20 + 3 * 240  # at least three cells wide, for the title
    assert sheet("title", [Row([cell] * 5)]).width == 2 * 20 + 5 * 240 + 4 * 14
    assert two.height > one.height + 100
    narrow = sheet("title", [Row([Cell(Image.new("RGB", (40, 240)), "many words that do not fit above it")] * 8)])
    assert narrow.width == 2 * 20 + 8 * 120 + 7 * 14
    assert sheet("title", [Row([Cell(None), cell])]).height == one.height  # an empty place


def test_long_words_are_broken_to_the_width_and_nothing_is_lost():
    font = sheets._font(False, 13)
    text = "a/very/long/checkpoint-name-without-any-space.pth and words"
    lines = sheets._wrapped(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_maps_are_upsampled_smoothly_within_their_values():
    values = np.array([[0.0, 1.0], [0.25, 0.5]])
    fine = upsampled(values, (40, 20))
    assert fine.shape == (20, 40)
    assert 0 <= fine.min() <= fine.max() <= 1
    assert abs(np.diff(fine, axis=1)).max() < 0.15  # no steps
    np.testing.assert_allclose(upsampled(values, (2, 2)), values)


def test_colors_grow_lighter_with_the_number():
    strip = np.asarray(colored(np.linspace(-1, 2, 7)[None], low=0, high=1)).astype(int)[0]
    light = strip @ [299, 587, 114]
    assert (np.diff(light[2:5]) > 0).all()
    assert (strip[0] == strip[2]).all()  # below the lowest and above the highest
    assert (strip[4] == strip[6]).all()
    assert colored(np.zeros((1, 1)), low=0, high=0).size == (1, 1)  # a constant map


@pytest.mark.parametrize(("size", "expected"), [((640, 480), (240, 180)), ((1, 1), (240, 240)), ((2000, 3), (240, 40))])
def test_images_are_shown_at_one_size(size, expected):
    assert sheets.shown(Image.new("RGB", size)).size == expected


def test_a_picture_knows_who_wrote_it(tmp_path, monkeypatch):
    (tmp_path / "ours.png").write_bytes(sheets.png(Image.new("RGB", (3, 2))))
    with Image.open(tmp_path / "ours.png") as opened:
        assert (opened.format, opened.size) == ("PNG", (3, 2))
    assert sheets.is_ours(tmp_path / "ours.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "theirs.png")
    (tmp_path / "text.png").write_text("no image")
    assert not sheets.is_ours(tmp_path / "theirs.png")
    assert not sheets.is_ours(tmp_path / "text.png")
    assert io.BytesIO(sheets.png(Image.new("RGB", (1, 1)))).read(4) == b"\x89PNG"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    assert not sheets.is_ours(tmp_path / "theirs.png")  # a decompression bomb


def test_what_is_hidden_is_gray_and_the_rest_untouched():
    images = torch.rand(1, 3, 16, 24)
    left = without(images, torch.tensor([[1, 5]]), 8)
    for place in range(6):
        row, column = divmod(place, 3)
        part = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        torch.testing.assert_close(left[part], images[part] if place in (1, 5) else torch.full((1, 3, 8, 8), 0.5))


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.8, 0.9])
def test_visible_patches_are_counted_as_in_training(ratio):
    assert kept_count(196, ratio) == kept_patches(196, ratio)
    assert kept_count(1, ratio) == 1
    assert kept_count(2, 0.99) == 1


def test_pixels_are_looked_at_like_a_network(tmp_path):
    checkpoint = open_checkpoint("pixels:")
    assert isinstance(checkpoint, Checkpoint)
    seen = look(checkpoint, image(), Look(points=((0, 0),), size_px=40), name="pixels", device="cpu")
    expected = Pixels()(2 * pixels(image()) - 1).tokens[0].patches[0]
    torch.testing.assert_close(seen.patches, expected)
