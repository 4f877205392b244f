"""The backbone that mmseg and mmdet get, against our Backbone and plain loops; and its parameters, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_backbone import KINDS, PLAIN, close, images, make
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.backbone import Backbone, build, load_canonical
from ssl_bench.evaluate.checkpoints import Checkpoint, open_checkpoint
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.protocols.openmm import packages

packages.require()

from mmengine.model import BaseModule  # noqa: E402

from ssl_bench.protocols.openmm.network import (  # noqa: E402
    Network,
    WindowedNetwork,
    layers_of,
    parameter_groups,
)
from ssl_bench.protocols.openmm.pyramids import SimplePyramid, UpDown  # noqa: E402

SWIGLU = replace(PLAIN, swiglu=True)
WITH_NORM = [kind for kind in KINDS if KINDS[kind].final_norm]
# All that ViTDet's form can be made of. Three blocks: (2, 5, 8, 11) of 12 are all of them.
WINDOWABLE = ["vit", "scaled", "no-norm", "class-attention"]


def checkpoint_of(backbone: Backbone, path: Path) -> Checkpoint:
    save_checkpoint(path / "x.pt", backbone)
    return open_checkpoint(path / "x.pt")


def fill(module: nn.Module, seed: int = 5, scale: float = 0.3) -> None:
    """Every weight random, so that nothing is at its initial zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def identity_blocks(trunk: Backbone) -> None:
    """Blocks that add nothing: what comes out is what entered the first."""
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if ".attn.proj." in name or ".mlp.fc2." in name:
                parameter.zero_()


# ---------------------------------------------------------------- the same maps


@pytest.mark.parametrize("size", [(16, 16), (24, 8), (20, 28)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_are_those_of_the_backbone(kind: str, size: tuple[int, int], tmp_path: Path):
    backbone = make(kind)
    checkpoint = checkpoint_of(backbone, tmp_path)
    for norm in {False, KINDS[kind].final_norm}:
        network = Network(KINDS[kind], layers=(1, 0, 2, 0), norm=norm)
        network.load(checkpoint)
        with torch.no_grad():
            maps = network.eval()(images(*size))
            expected = backbone(images(*size), layers=(1, 0, 2, 0), norm=norm).tokens
        assert len(maps) == 4
        for found, tokens in zip(maps, expected, strict=True):
            assert found.shape == (2, 32, size[0] // 4, size[1] // 4)
            assert found.is_contiguous()
            close(found, torch.stack([tokens.patches[..., channel] for channel in range(32)], 1))
    assert (network.dim, network.depth, network.patch_px) == (32, 3, 4)


def test_rows_are_rows_and_columns_are_columns():
    network = Network(PLAIN, layers=(2,), norm=False).eval()
    identity_blocks(network.trunk)
    vit: Any = network.trunk.vit
    rows, columns = 5, 7
    batch = torch.zeros(2, 3, 4 * rows, 4 * columns)
    for row in range(rows):
        for column in range(columns):
            batch[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 10 * row + column
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.patch_embed.proj.bias.zero_()
        vit.patch_embed.proj.weight.fill_(1 / (3 * 4 * 4))  # the mean of a patch
        (found,) = network(batch)
    for row in range(rows):
        for column in range(columns):
            assert found[0, :, row, column].sub(10 * row + column).abs().max() < 1e-4
    assert found[1].abs().max() == 0


def cubic(distance: float) -> float:
    """Keys' kernel, as torch has it (a = -0.75)."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_bicubic(square: Any, height: int, width: int) -> Any:
    """(h, w, D) -> (height, width, D), pixel by pixel; pixel centers at halves, edges repeated."""
    old_height, old_width, dim = square.shape
    result = np.zeros((height, width, dim))
    for row in range(height):
        y = (row + 0.5) * old_height / height - 0.5
        for column in range(width):
            x = (column + 0.5) * old_width / width - 0.5
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    source = square[min(max(i, 0), old_height - 1), min(max(j, 0), old_width - 1)]
                    result[row, column] += cubic(y - i) * cubic(x - j) * source
    return result


@pytest.mark.parametrize("size", [(24, 20), (8, 12)])
@pytest.mark.parametrize("windows", [False, True])
def test_position_embeddings_are_resized_by_plain_bicubic_interpolation(windows: bool, size: tuple[int, int]):
    """Also ViTDet's, where timm has antialiasing, and whatever the checkpoint's own project does."""
    own = replace(PLAIN, position_resize="antialias", cls=not windows, position_of_prefix=not windows)
    network: Any = (
        WindowedNetwork(own, image_px=16)
        if windows
        else Network(own, layers=(2,), norm=False, position_resize="bicubic")
    )
    fill(network)
    identity_blocks(network.trunk)
    vit: Any = network.trunk.vit
    with torch.no_grad():
        vit.patch_embed.proj.weight.zero_()
        vit.patch_embed.proj.bias.zero_()
        (found,) = network.eval()(images(*size))
    square = vit.pos_embed.detach()[0, 0 if windows else 1 :].reshape(4, 4, 32)
    expected = slow_bicubic(square.double().numpy(), size[0] // 4, size[1] // 4)
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_the_interpolation_is_the_checkpoints_own_unless_the_recipe_names_one():
    def positions(own: Any, named: Any) -> Tensor:
        network = Network(replace(PLAIN, position_resize=own), layers=(0,), norm=False, position_resize=named)
        fill(network)
        with torch.no_grad():
            return network.eval()(images(8, 12))[0]

    ways = ("bicubic", "antialias", "dino")
    maps = {way: positions(way, None) for way in ways}
    for way in ways:
        for other in ways:
            assert maps[way].equal(maps[other]) == (way == other)
            assert positions(way, other).equal(maps[other])


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="18 x 16 px do not divide into patches of 4 px"):
        Network(PLAIN, layers=(0,), norm=False)(images(18, 16))
    with pytest.raises(UserError, match="16 x 18 px do not divide into patches of 4 px"):
        WindowedNetwork(PLAIN, image_px=16)(images(16, 18))


def test_long_sequences_have_fused_attention_on_a_cpu_too():
    def fused(network: Any) -> list[bool]:
        return [block.attn.fused_attn for block in network.trunk.vit.blocks]

    plain = Network(PLAIN, layers=(2,), norm=False).eval()
    windowed = WindowedNetwork(PLAIN, image_px=16, window=3, global_layers=(7,)).eval()  # block 1 of 3
    with torch.no_grad():
        for network in (plain, windowed):
            network(images(96, 96))
        assert (fused(plain), fused(windowed)) == ([True] * 3, [False, True, False])  # 576 tokens, and 9
        for network in (plain, windowed):
            network(images(16, 16))
        assert (fused(plain), fused(windowed)) == ([False] * 3, [False] * 3)


def test_what_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"vit_32x3x4_patch4_16 has no final norm.*norm=true.*--set norm=false"):
        Network(KINDS["no-norm"], layers=(0,), norm=True)
    for layer in (3, -1):
        with pytest.raises(UserError, match=rf"layers=\(0, {layer}\): layer {layer} does not exist.*3 blocks, 0 to 2"):
            Network(PLAIN, layers=(0, layer), norm=True)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_are_the_checkpoints(kind: str, tmp_path: Path):
    checkpoint = checkpoint_of(make(kind), tmp_path)
    network = Network(KINDS[kind], layers=(2,), norm=KINDS[kind].final_norm)
    network.load(checkpoint)
    state = {key: value for key, value in checkpoint.state.items() if not key.startswith("class_attention.")}
    found = {name.removeprefix("trunk.vit."): value for name, value in network.state_dict().items()}
    assert state.keys() == found.keys()
    assert all(found[name].equal(value) for name, value in state.items())


def test_a_checkpoint_of_which_little_is_there_is_refused(tmp_path: Path):
    backbone = make("vit")
    save_checkpoint(tmp_path / "x.pt", backbone)
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    for key in [key for key in content["networks"]["model"] if key.startswith("blocks.1.")]:
        del content["networks"]["model"][key]
    torch.save(content, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    for network in (Network(PLAIN, layers=(2,), norm=True), WindowedNetwork(PLAIN, image_px=16)):
        with pytest.raises(UserError, match=r"x\.pt: only .* % of the parameters"):
            network.load(checkpoint)


class Whole(BaseModule):
    """A model as mm builds them: the network, a neck, a head."""

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck or nn.Identity()
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.head(map_).mean() for map_ in self.neck(self.backbone(x))), torch.zeros(()))


@pytest.mark.parametrize("windows", [False, True])
def test_mms_initialization_leaves_the_weights_alone(windows: bool, tmp_path: Path):
    checkpoint = checkpoint_of(make("vit"), tmp_path)
    network: Any = WindowedNetwork(PLAIN, image_px=16) if windows else Network(PLAIN, layers=(2,), norm=True)
    network.load(checkpoint)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = Whole(network, UpDown(32))
    assert isinstance(model.neck, UpDown)
    model.neck.init_cfg = {"type": "Constant", "layer": "ConvTranspose2d", "val": 7.0}
    model.init_weights()
    assert model.neck.scales[1].weight.eq(7).all()
    for name, value in network.state_dict().items():
        assert value.equal(before[name]), name


# ---------------------------------------------------------------- training


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def networks(kind: str) -> list[nn.Module]:
    architecture = KINDS[kind]
    made: list[nn.Module] = [
        Network(architecture, layers=(0, 1), norm=False, drop_path=0.1),
        Network(architecture, layers=(2,), norm=architecture.final_norm, drop_path=0.1),
    ]
    return [*made, WindowedNetwork(architecture, image_px=16, window=3)] if kind in WINDOWABLE else made


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # of the class token beside registers: no error
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_as_data_parallel_processes_demand(kind: str):
    for network in networks(kind):
        fill(network)
        for parameter in network.parameters():
            assert parameter.requires_grad
        model = nn.parallel.DistributedDataParallel(Whole(network)).train()
        for _ in range(2):  # the second forward refuses what the first left unused
            model(images(20, 16)).square().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_blocks_after_the_last_layer_are_gone_and_the_others_keep_their_drop_path():
    architecture = replace(PLAIN, depth=5)
    network = Network(architecture, layers=(2, 1), norm=True, drop_path=0.4)
    vit: Any = network.trunk.vit
    assert len(vit.blocks) == 3
    assert network.depth == 5
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    windowed: Any = WindowedNetwork(architecture, image_px=16, drop_path=0.4).trunk.vit
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in windowed.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("kind", ["vit", "beit", "windows"])
def test_drop_path_acts_in_training_only(kind: str):
    network: Any = (
        WindowedNetwork(PLAIN, image_px=16, drop_path=0.5)
        if kind == "windows"
        else Network(KINDS[kind], layers=(2,), norm=False, drop_path=0.5)
    )
    fill(network)
    batch = images(batch=8)
    with torch.no_grad():
        torch.manual_seed(0)
        one, other = network.train()(batch)[0], network(batch)[0]
        assert not one.equal(other)
        assert network.eval()(batch)[0].equal(network(batch)[0])


@pytest.mark.usefixtures("one_process")
def test_a_frozen_network_stays_as_it_is():
    network = Network(PLAIN, layers=(0, 2), norm=True, frozen=True, drop_path=0.9)
    fill(network)
    whole = Whole(network)
    model = nn.parallel.DistributedDataParallel(whole).train()
    assert whole.training
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    first = network(images())
    assert not any(map_.requires_grad for map_ in first)
    assert not network(images().requires_grad_())[0].requires_grad
    assert first[1].equal(network(images())[1])
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    before = whole.head.weight.clone()
    for _ in range(2):
        model(images()).square().backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not whole.head.weight.equal(before)
    with torch.no_grad():
        assert not model(images()).requires_grad


# ---------------------------------------------------------------- windows


def without_class_token(backbone: Backbone) -> Backbone:
    """The same network of patches alone, with plain bicubic positions."""
    architecture = backbone.architecture
    plain = build(
        replace(architecture, cls=False, position_of_prefix=False, class_attention_blocks=0, position_resize="bicubic")
    )
    state = {name.removeprefix("vit."): value for name, value in backbone.state_dict().items()}
    if architecture.cls:
        del state["cls_token"]
        if architecture.position_of_prefix:
            state["pos_embed"] = state["pos_embed"][:, 1:]
    load_canonical(plain, state)
    return plain.eval()


@pytest.mark.parametrize("size", [(16, 16), (24, 20)])
@pytest.mark.parametrize("kind", [*WINDOWABLE, "swiglu"])
def test_global_blocks_without_relative_positions_are_the_plain_network(
    kind: str, size: tuple[int, int], tmp_path: Path
):
    if kind == "swiglu":
        backbone = build(SWIGLU).eval()
        fill(backbone)
    else:
        backbone = make(kind)
    network = WindowedNetwork(backbone.architecture, image_px=16).eval()  # whose tables start at zero
    network.load(checkpoint_of(backbone, tmp_path))
    with torch.no_grad():
        (found,) = network(images(*size))
        expected = without_class_token(backbone)(images(*size), layers=(-1,), norm=False).tokens[0].patches
    assert found.is_contiguous()
    assert found.shape == (2, 32, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(found.permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-5)


def slow_table(table: Tensor, side: int) -> Tensor:
    """Relative positions of -(side - 1) to side - 1, interpolated linearly between the table's."""
    count, rows = 2 * side - 1, []
    for number in range(count):
        place = min(max((number + 0.5) * len(table) / count - 0.5, 0), len(table) - 1)
        low = math.floor(place)
        high = min(low + 1, len(table) - 1)
        rows.append(table[low] * (1 - (place - low)) + table[high] * (place - low))
    return torch.stack(rows)


def slow_attention(attention: Any, x: Tensor, heads: int) -> Tensor:
    """Attention over one window or map (h, w, D): logits q.k / sqrt(d) + q.R_h + q.R_w, query by query."""
    height, width, dim = x.shape
    query, key, value = attention.qkv(x.reshape(-1, dim)).chunk(3, dim=1)
    of_rows, of_columns = slow_table(attention.rel_pos_h, height), slow_table(attention.rel_pos_w, width)
    out = torch.zeros(height * width, dim)
    size = dim // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(height * width):
            logits = key[:, part] @ query[i, part] / math.sqrt(size)
            for_row = i // width - torch.arange(height).repeat_interleave(width) + height - 1
            for_column = i % width - torch.arange(width).repeat(height) + width - 1
            logits = logits + of_rows[for_row] @ query[i, part] + of_columns[for_column] @ query[i, part]
            out[i, part] = logits.softmax(0) @ value[:, part]
    return attention.proj(out).reshape(height, width, dim)


def slow_vitdet(network: Any, image: Tensor, window: int, global_blocks: set[int]) -> Tensor:
    """(3, H, W) -> (h, w, D)"""
    x, grid = network.trunk.embed(image[None])
    x = x.reshape(*grid, -1)
    for number, block in enumerate(network.trunk.vit.blocks):
        y = block.norm1(x)
        if number in global_blocks:
            attended = slow_attention(block.attn, y, 4)
        else:
            rows, columns = -(-grid[0] // window), -(-grid[1] // window)
            padded = torch.zeros(rows * window, columns * window, y.shape[-1])
            padded[: grid[0], : grid[1]] = y
            for row in range(rows):
                for column in range(columns):
                    place = (
                        slice(row * window, (row + 1) * window),
                        slice(column * window, (column + 1) * window),
                    )
                    padded[place] = slow_attention(block.attn, padded[place].clone(), 4)
            attended = padded[: grid[0], : grid[1]]
        x = x + attended
        x = x + block.mlp(block.norm2(x))
    return x


@pytest.mark.parametrize(
    ("size", "window"), [((16, 16), 2), ((20, 12), 3), ((12, 24), 3), ((8, 12), 5), ((16, 16), 14)]
)
def test_windows_and_relative_positions_equal_plain_loops(size: tuple[int, int], window: int):
    """Grids that divide and that do not, of other sizes than the tables', smaller than the window."""
    network = WindowedNetwork(PLAIN, image_px=16, window=window, global_layers=(7,)).eval()
    fill(network)
    tables = [tuple(block.attn.rel_pos_h.shape) for block in network.trunk.vit.blocks]
    assert tables == [(2 * window - 1, 8), (7, 8), (2 * window - 1, 8)]
    batch = images(*size)
    with torch.no_grad():
        (found,) = network(batch)
        for number in range(2):
            expected = slow_vitdet(network, batch[number], window, {1})
            torch.testing.assert_close(found[number].permute(1, 2, 0), expected, rtol=1e-4, atol=1e-4)


def test_drop_path_drops_images_not_windows():
    network = WindowedNetwork(replace(PLAIN, depth=2), image_px=16, window=2, global_layers=(5,), drop_path=0.5)
    fill(network)
    first, last = network.trunk.vit.blocks
    with torch.no_grad():
        for part in (first.attn.proj, first.mlp.fc2, last.mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
        batch = images(batch=16)
        branch = network.eval()(batch)[0]
        last.attn.proj.weight.zero_()
        last.attn.proj.bias.zero_()
        untouched = network(batch)[0]
        fill(network)
        for part in (first.attn.proj, first.mlp.fc2, last.mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
        torch.manual_seed(0)
        trained = network.train()(batch)[0]
    dropped = 0
    for number in range(16):
        difference = trained[number] - untouched[number]
        if difference.abs().max() < 1e-6:
            dropped += 1
        else:  # kept: twice the branch, everywhere
            close(difference, 2 * (branch[number] - untouched[number]))
    assert 0 < dropped < 16


def test_what_windows_cannot_be_made_of_is_refused():
    with pytest.raises(UserError, match=r"beit_32x3x4_patch4_16 has BEiT's relative positions.*expected a plain"):
        WindowedNetwork(KINDS["beit"], image_px=16)
    with pytest.raises(UserError, match=r"has register tokens"):
        WindowedNetwork(KINDS["registers"], image_px=16)


def test_bf16_trains():
    for network in networks("vit"):
        fill(network)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = network(images(20, 16))
        torch.stack([map_.float().square().mean() for map_ in maps]).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


# ---------------------------------------------------------------- layers


def test_layers_of_other_depths():
    assert layers_of((2, 5, 8, 11), 12) == (2, 5, 8, 11)
    # ViTDet's configurations of ViT-L and ViT-H.
    assert layers_of((2, 5, 8, 11), 24) == (5, 11, 17, 23)
    assert layers_of((2, 5, 8, 11), 32) == (7, 15, 23, 31)
    # BEiT's UPerNet on ViT-L.
    assert layers_of((3, 5, 7, 11), 24) == (7, 11, 15, 23)
    assert layers_of((5, 7, 9, 11), 6) == (2, 3, 4, 5)
    assert layers_of((3, 5, 7, 11), 4) == (0, 1, 2, 3)
    assert layers_of((0, 5, 11), 2) == (0, 0, 1)
    assert layers_of((11,), 1) == (0,)


TWELVE = Architecture(dim=32, depth=12, heads=4, patch_px=4, image_px=16, mlp_dim=64)

# By name, for a learning rate of 2 and a decay of 0.65: block 0 of 12 has 0.65^12, what is before it 0.65^13.
RATES = {
    "input": 2 * 0.65**13,
    "block 0": 2 * 0.65**12,
    "block 1": 2 * 0.65**11,
    "block 2": 2 * 0.65**10,
    "block 3": 2 * 0.65**9,
    "block 4": 2 * 0.65**8,
    "block 5": 2 * 0.65**7,
    "block 6": 2 * 0.65**6,
    "block 7": 2 * 0.65**5,
    "block 8": 2 * 0.65**4,
    "block 9": 2 * 0.65**3,
    "block 10": 2 * 0.65**2,
    "block 11": 2 * 0.65,
    "top": 2.0,
}
BLOCK_DECAYED = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
BLOCK_OTHERS = {
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"),
}
UP_DOWN = {"neck.scales.0.0.weight", "neck.scales.0.3.weight", "neck.scales.1.weight", "head.weight"}
UP_DOWN_OTHERS = {
    *("neck.scales.0.0.bias", "neck.scales.0.1.weight", "neck.scales.0.1.bias", "neck.scales.0.3.bias"),
    *("neck.scales.1.bias", "head.bias"),
}


def grouped(model: nn.Module, layer_decay: float = 0.65) -> dict[str, set[str]]:
    """Names of parameters by group; learning rate and weight decay of each are checked on the way."""
    groups = parameter_groups(model, lr=2.0, weight_decay=0.05, layer_decay=layer_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, set[str]] = {}
    for group in groups:
        layer, _, decay = group["name"].partition(", ")
        if layer_decay == 0.65:
            assert group["lr"] == pytest.approx(RATES[layer], rel=1e-12)
        else:
            assert group["lr"] == 2.0
        assert group["weight_decay"] == {"decayed": 0.05, "not decayed": 0.0}[decay]
        members = [names[id(parameter)] for parameter in group["params"]]
        assert group["name"] not in found
        assert len(set(members)) == len(members)
        found[group["name"]] = set(members)
    everything = [name for members in found.values() for name in members]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(everything) == sorted(trainable)  # every one once, and no other
    torch.optim.AdamW(groups)  # takes them as they are
    return found


def in_block(number: int, names: set[str]) -> set[str]:
    return {f"backbone.trunk.vit.blocks.{number}.{name}" for name in names}


def in_vit(*names: str) -> set[str]:
    return {f"backbone.trunk.vit.{name}" for name in names}


def test_groups_of_a_plain_network_with_neck_and_head():
    model = Whole(Network(TWELVE, layers=(3, 5, 7, 11), norm=True), UpDown(32))
    expected = {
        "input, decayed": in_vit("patch_embed.proj.weight"),
        "input, not decayed": in_vit("patch_embed.proj.bias", "cls_token", "pos_embed"),
        "top, decayed": UP_DOWN,
        "top, not decayed": in_vit("norm.weight", "norm.bias") | UP_DOWN_OTHERS,
    }
    for number in range(12):
        expected[f"block {number}, decayed"] = in_block(number, BLOCK_DECAYED)
        expected[f"block {number}, not decayed"] = in_block(number, BLOCK_OTHERS)
    assert grouped(model) == expected
    assert grouped(model, layer_decay=1.0) == expected
    assert list(expected) != list(grouped(model))  # their order is that of the layers, everywhere the same
    assert list(grouped(model))[:4] == [
        *("input, decayed", "input, not decayed", "block 0, decayed", "block 0, not decayed")
    ]


def test_the_depth_is_the_whole_networks():
    found = grouped(Whole(Network(TWELVE, layers=(5,), norm=False)))
    assert set(found) == {
        f"{layer}, {decay}"
        for layer in ("input", "top", *(f"block {number}" for number in range(6)))
        for decay in ("decayed", "not decayed")
    }
    assert found["top, decayed"] == {"head.weight"}
    assert found["top, not decayed"] == {"head.bias"}


def test_groups_of_windows():
    model = Whole(WindowedNetwork(TWELVE, image_px=32), SimplePyramid(32, 32))
    found = grouped(model)
    assert found["input, decayed"] == in_vit("patch_embed.proj.weight")
    assert found["input, not decayed"] == in_vit("patch_embed.proj.bias", "pos_embed")
    for number in range(12):
        assert found[f"block {number}, decayed"] == in_block(number, BLOCK_DECAYED)
        others = BLOCK_OTHERS | {"attn.rel_pos_h", "attn.rel_pos_w"}
        assert found[f"block {number}, not decayed"] == in_block(number, others)
    assert all(name.startswith(("neck.", "head.")) for name in found["top, decayed"] | found["top, not decayed"])


def test_groups_of_beit():
    architecture = replace(TWELVE, beit=True, position=False, layer_scale=True)
    found = grouped(Whole(Network(architecture, layers=(11,), norm=False)))
    assert found["input, not decayed"] == in_vit("patch_embed.proj.bias", "cls_token")
    own = {"attn.q_bias", "attn.v_bias", "attn.relative_position_bias_table", "gamma_1", "gamma_2"}
    for number in range(12):
        assert found[f"block {number}, decayed"] == in_block(number, BLOCK_DECAYED)
        assert found[f"block {number}, not decayed"] == in_block(number, BLOCK_OTHERS - {"attn.qkv.bias"} | own)


def test_groups_of_extremas_trunk():
    architecture = replace(TWELVE, cls=False, position_of_prefix=False, class_attention_blocks=2)
    found = grouped(Whole(Network(architecture, layers=(11,), norm=True)))
    assert found["input, not decayed"] == in_vit("patch_embed.proj.bias", "pos_embed")
    assert found["block 11, decayed"] == in_block(11, BLOCK_DECAYED)
    assert found["top, not decayed"] == in_vit("norm.weight", "norm.bias") | {"head.bias"}
    assert not any("class_attention" in name for names in found.values() for name in names)


def test_groups_of_registers_and_of_a_norm_before_the_blocks():
    architecture = replace(TWELVE, registers=3, position_of_prefix=False, pre_norm=True)
    found = grouped(Whole(Network(architecture, layers=(0,), norm=False)))
    tokens = in_vit("cls_token", "reg_token", "pos_embed", "norm_pre.weight", "norm_pre.bias")
    assert found["input, not decayed"] == tokens  # no bias of the projection: timm leaves it out before a norm


def test_what_is_frozen_is_in_no_group():
    found = grouped(Whole(Network(TWELVE, layers=(11,), norm=True, frozen=True), UpDown(32)))
    assert found == {"top, decayed": UP_DOWN, "top, not decayed": UP_DOWN_OTHERS}
    network = Network(TWELVE, layers=(0,), norm=False)
    network.trunk.vit.pos_embed.requires_grad_(False)
    assert grouped(Whole(network))["input, not decayed"] == in_vit("patch_embed.proj.bias", "cls_token")


def test_class_tokens_of_a_head_are_not_decayed():
    model = Whole(Network(TWELVE, layers=(0,), norm=False))
    model.cls_emb = nn.Parameter(torch.zeros(1, 4, 32))
    assert grouped(model)["top, not decayed"] == {"head.bias", "cls_emb"}


def test_a_part_of_the_network_that_nobody_thought_of_is_no_head():
    network = Network(TWELVE, layers=(0,), norm=False)
    network.trunk.extra = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match=r"trunk\.extra"):
        parameter_groups(Whole(network), lr=1.0, weight_decay=0.0)


def test_updates_follow_the_groups():
    """One step of SGD moves a parameter by the rate of its layer times its gradient."""
    model = Whole(Network(TWELVE, layers=(11,), norm=True))
    fill(model)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.0, layer_decay=0.5), lr=0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(images()).square().backward()
    optimizer.step()
    steps = {"head.weight": 0.1, "backbone.trunk.vit.blocks.11.mlp.fc2.bias": 0.1 * 0.5}
    steps |= {"backbone.trunk.vit.blocks.0.attn.qkv.weight": 0.1 / 4096, "backbone.trunk.vit.pos_embed": 0.1 / 8192}
    for name, parameter in model.named_parameters():
        if name in steps:
            assert parameter.grad is not None
            torch.testing.assert_close(before[name] - steps[name] * parameter.grad, parameter.detach())
            assert not parameter.detach().equal(before[name])
