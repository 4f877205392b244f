"""What is no checkpoint is refused with a sentence that helps; what is one has an identity, whatever its container."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_checkpoints as foreign
import pytest
import safetensors.torch
import torch
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.backbone import Backbone, Pixels
from ssl_bench.evaluate.checkpoints import describe, open_checkpoint, weights_sha256
from ssl_bench.evaluate.hub import timm_facts

RANDOM = "random:vit_32x2x4_patch8_16"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path / "cache"))


def refused(spec: Any, *parts: str, **options: Any) -> str:
    """The message of the refusal, which must hold every part."""
    with pytest.raises(UserError) as error:
        open_checkpoint(spec, **options).backbone  # noqa: B018
    message = str(error.value)
    for part in parts:
        assert part in message, message
    return message


# ---------------------------------------------------------------- no checkpoint at all


def test_a_missing_file(tmp_path: Path):
    refused(tmp_path / "none.pth", "none.pth", "does not exist", "timm:NAME")
    refused("randon:vit_tiny_patch16_224", "randon:vit_tiny", "random:ARCH")


def test_folders_without_one_weights_file(tmp_path: Path):
    refused(tmp_path, tmp_path.name, "found none")
    foreign.mae(tmp_path / "a.pth")
    assert open_checkpoint(tmp_path).format == "mae"
    foreign.mae(tmp_path / "b.pth")
    refused(tmp_path, "found a.pth, b.pth", "Give the file's own path")


# The whole reason: what torch's unpickler stumbled over ("101", "Unsupported operand 149") helps nobody.
NO_FILE_OF_OURS = (
    "is not a checkpoint: it is neither a torch file, nor a pickle of tensors, nor safetensors, or it is damaged. "
    "Fetch it again, or save the state_dict of the model with torch.save."
)
BYTES: dict[str, tuple[bytes, str]] = {
    "text.pth": (b"hello, I am no checkpoint\n" * 20, NO_FILE_OF_OURS),
    "numbers.pth": (bytes([0x80, 2, 149]) * 20, NO_FILE_OF_OURS),
    "empty.pth": (b"", NO_FILE_OF_OURS),
    "zip.pth": (gzip.compress(b"garbage"), "a gzip archive; unpack it first"),
    "page.pth": (b"<!doctype html><html>404</html>", "a web page; the download went wrong"),
    "page2.pth": (b"\n\n<HTML><head>", "a web page"),
    "pointer.pth": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "a Git LFS pointer; fetch the file",
    ),
    "cat.pth": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
    "noise.bin": (bytes(range(256)) * 8, NO_FILE_OF_OURS),
    "noise.safetensors": (bytes(range(256)) * 8, "is not a readable safetensors file"),
}


@pytest.mark.parametrize("name", BYTES)
def test_files_of_another_kind(name: str, tmp_path: Path):
    content, part = BYTES[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name, part)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_half_downloads(share: float, tmp_path: Path):
    whole = foreign.mae(tmp_path / "whole.pth").path.read_bytes()
    (tmp_path / "part.pth").write_bytes(whole[: int(len(whole) * share)])
    message = refused(tmp_path / "part.pth", "part.pth", "damaged, cut off or another kind of zip archive")
    assert "PytorchStreamReader" not in message
    whole = safetensors.torch.save(foreign.Weights(1).vit())
    for name in ("part.safetensors", "part.bin"):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        refused(tmp_path / name, name)


def test_other_networks(tmp_path: Path):
    resnet = {"conv1.weight": torch.zeros(4, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}
    for content in (resnet, {"state_dict": {f"module.{key}": value for key, value in resnet.items()}}):
        refused(foreign.save(tmp_path / "r.pth", content), "r.pth", "ResNet", "vision transformers")
    swin = {
        "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
        "layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(169, 3),
        "layers.0.blocks.0.attn.qkv.weight": torch.zeros(24, 8),
    }
    refused(foreign.save(tmp_path / "s.pth", {"model": swin}), "s.pth", "Swin")
    hf_swin = {
        "swin.embeddings.patch_embeddings.projection.weight": torch.zeros(8, 3, 4, 4),
        "swin.encoder.layers.0.blocks.0.attention.self.query.weight": torch.zeros(8, 8),
    }
    refused(foreign.save(tmp_path / "h.pth", hf_swin), "h.pth", "Swin")
    clip = {"visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(3, 3)}
    refused(foreign.save(tmp_path / "c.pth", clip), "c.pth", "CLIP")
    other = {f"thing.{number}": torch.zeros(2) for number in range(9)}
    refused(foreign.save(tmp_path / "o.pth", other), "o.pth", "no vision transformer was found", "thing.0", "...")


def test_a_tensor_or_a_list_alone(tmp_path: Path):
    refused(foreign.save(tmp_path / "t.pth", torch.zeros(3)), "t.pth", "holds a Tensor", "Save the state_dict")
    refused(foreign.save(tmp_path / "l.pth", [1, 2]), "l.pth", "holds a list")
    refused(foreign.save(tmp_path / "e.pth", {}), "e.pth", "The file holds: nothing")


# ---------------------------------------------------------------- files that would run code


class Bomb:
    """When unpickled, leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def plain_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def torch_zip(path: Path, content: object) -> None:
    torch.save(content, path)


def torch_legacy(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def zip_by_hand(path: Path, content: object) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("write", [plain_pickle, torch_zip, torch_legacy, zip_by_hand])
@pytest.mark.parametrize("where", ["alone", "beside", "inside-args"])
def test_code_in_a_file_is_not_run(write: Callable[[Path, object], None], where: str, tmp_path: Path):
    trap = tmp_path / "ran"
    bomb: Any = Bomb(trap)
    if where == "beside":
        bomb = {"model": foreign.Weights(1).vit() if write is not plain_pickle else {}, "hook": bomb}
    elif where == "inside-args":
        bomb = {"args": foreign.argparse.Namespace(output_dir=bomb)}
    write(tmp_path / "x.pth", bomb)
    message = refused(tmp_path / "x.pth", "x.pth")
    assert not trap.exists()
    if write is not zip_by_hand:  # whose form torch may refuse even before
        assert "mkdir, which loading would have to import and could execute; it was not loaded" in message
    pickle.loads(pickle.dumps(Bomb(trap), protocol=2))  # noqa: S301  (the trap itself works)
    assert trap.exists()


def test_numpys_objects_are_no_way_around(tmp_path: Path):
    """A numpy scalar of dtype object would hold a pickle of its own."""

    class Scalar:
        def __reduce__(self) -> Any:
            import numpy as np

            function = np.float64(0).__reduce__()[0]
            return function, (np.dtype("O"), pickle.dumps(Bomb(tmp_path / "ran")))

    torch.save({"model": foreign.Weights(1).vit(), "best": Scalar()}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["timm", "sam", "detectron2", "mmdet"])
def test_a_network_of_windows_is_refused(form: str, tmp_path: Path):
    """Nearly all its weights fit a plain network, which would be scored without windows and relative positions."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    network = VisionTransformerSAM(
        img_size=64, embed_dim=64, depth=3, num_heads=1, num_classes=0, neck_chans=0, use_rel_pos=True, window_size=7,
        global_attn_indexes=(1,),
    )  # fmt: skip
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("neck.")}
    flat = state | {"pos_embed": torch.zeros(1, 16, 64)}
    content = {
        "timm": state,
        "sam": foreign.under("image_encoder.", {name.replace("fc", "lin"): state[name] for name in state}),
        "detectron2": {"model": foreign.under("backbone.net.", flat)},
        "mmdet": {"state_dict": foreign.under("backbone.", flat)},
    }
    path = foreign.save(tmp_path / "x.pth", content[form])
    refused(path, "x.pth", "attn.rel_pos_h", "windows of 4 and 7 patches", "plain vision transformers", "Give the")
    plain = {name: value for name, value in flat.items() if "rel_pos" not in name}
    assert open_checkpoint(foreign.save(tmp_path / "plain.pth", plain)).match.matched_percent == 100


# ---------------------------------------------------------------- parts of networks


def parameters(state: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in state.values())


def test_a_network_of_which_little_is_there_is_refused(tmp_path: Path):
    state = foreign.Weights(1).vit(depth=5)
    partial = {
        key: value for key, value in state.items() if not key.startswith(("blocks.1.", "blocks.2.", "blocks.3."))
    }
    path = foreign.save(tmp_path / "x.pth", {"model": partial})
    checkpoint = open_checkpoint(path)  # opening alone does not judge
    percent = 100 * parameters(partial) / parameters(state)
    assert 35 < percent < 45
    assert checkpoint.match.matched_percent == pytest.approx(percent)
    assert set(checkpoint.match.missing) == set(state) - set(partial)
    message = refused(path, "x.pth", f"only {percent:.1f} %", "vit_128x5x2_patch4_16", "at least 95 %")
    assert "blocks.1.attn.proj.bias" in message
    assert "and 32 more" in message


def test_a_network_of_which_nearly_all_is_there_is_loaded_and_said_so(tmp_path: Path):
    state = foreign.Weights(1).vit(depth=10)
    partial = {key: value for key, value in state.items() if key != "blocks.4.mlp.fc1.weight"}
    partial["blocks.5.norm1.weight"] = torch.zeros(7)  # of another shape
    partial["blocks.5.attn.gate"] = torch.zeros(3)
    path = foreign.save(tmp_path / "x.pth", {"model": partial})
    percent = 100 * (parameters(state) - 128 * 192 - 128) / parameters(state)
    assert 96 < percent < 99
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint.backbone, Backbone)
    report = describe(checkpoint)
    assert report["matched_percent"] == pytest.approx(percent)
    assert report["missing"] == ["blocks.4.mlp.fc1.weight", "blocks.5.norm1.weight"]
    assert report["unexpected"] == ["blocks.5.attn.gate", "blocks.5.norm1.weight"]
    again = open_checkpoint(path).backbone
    assert isinstance(again, Backbone)  # what is missing is drawn alike every time
    images = torch.randn(1, 3, 16, 16)
    assert again(images).tokens[0].patches.equal(checkpoint.backbone(images).tokens[0].patches)


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path):
    path = foreign.mae(tmp_path / "x.pth").path
    before = torch.random.get_rng_state()
    open_checkpoint(path).backbone  # noqa: B018
    open_checkpoint(RANDOM).backbone  # noqa: B018
    assert torch.random.get_rng_state().equal(before)


# ---------------------------------------------------------------- what the user must say


def test_a_wrong_key_lists_the_networks(tmp_path: Path):
    refused(foreign.dino(tmp_path / "x.pth").path, "x.pth", "'techer'", "did you mean 'teacher'", key="techer")
    refused(foreign.mae(tmp_path / "m.pth").path, "m.pth", "'teacher'", "Known: model", key="teacher")


def test_an_unknown_file_of_two_networks_asks(tmp_path: Path):
    one, two = foreign.Weights(1).vit(), foreign.Weights(2).vit()
    content = {"weights": foreign.under("left.", one) | foreign.under("right.", two)}
    path = foreign.save(tmp_path / "x.pth", content)
    refused(path, "x.pth", "2 networks", "--checkpoint-key weights/left or --checkpoint-key weights/right")
    for key in ("weights/right", "right"):
        checkpoint = open_checkpoint(path, key=key)
        assert (checkpoint.format, checkpoint.key, checkpoint.others) == ("unknown", "weights/right", ("weights/left",))
        assert checkpoint.weights_sha256 == weights_sha256(two)


def test_an_unknown_file_of_one_network_is_taken_with_a_note(tmp_path: Path):
    state = foreign.Weights(1).vit()
    path = foreign.save(tmp_path / "x.pth", {"net": foreign.under("vision.", state)})
    checkpoint = open_checkpoint(path)
    assert (checkpoint.format, checkpoint.key) == ("unknown", "net/vision")
    assert "no known project" in checkpoint.notes[0]
    assert checkpoint.weights_sha256 == weights_sha256(state)


def test_an_unknown_beit_keeps_its_biases(tmp_path: Path):
    state = foreign.Weights(1).beit(shared=True)
    path = foreign.save(tmp_path / "x.pth", {"net": foreign.under("vision.", state)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture.beit
    assert (checkpoint.match.matched_percent, checkpoint.match.missing) == (100, ())


def test_heads_that_cannot_be_guessed_are_asked_for(tmp_path: Path):
    path = foreign.save(tmp_path / "x.pth", foreign.Weights(1).vit(dim=36))
    refused(path, "x.pth", "width 36", "--arch heads=N")
    refused(path, "x.pth", "heads", "36", arch={"heads": "5"})
    assert open_checkpoint(path, arch={"heads": "3"}).architecture.heads == 3


@pytest.mark.parametrize(
    ("arch", "parts"),
    [
        ({"haeds": "3"}, ("unknown --arch field 'haeds'", "did you mean 'heads'")),
        ({"depth": "3"}, ("unknown --arch field 'depth'", "Known: ")),
        ({"heads": "many"}, ("--arch heads=many", "such as 12")),
        ({"eps": "tiny"}, ("--arch eps=tiny", "1e-6")),
        ({"mean": "0.5"}, ("--arch mean=0.5", "0.5,0.5,0.5")),
        ({"position_resize": "nearest"}, ("--arch position_resize=nearest", "bicubic, antialias or dino")),
        ({"image_px": "448"}, ("image_px=448", "for 16 px", "interpolated")),
    ],
)
def test_arch_is_checked(arch: dict[str, str], parts: tuple[str, ...], tmp_path: Path):
    refused(foreign.mae(tmp_path / "x.pth").path, *parts, arch=arch)


def test_arch_is_checked_against_beit_and_random_networks(tmp_path: Path):
    refused(foreign.beit(tmp_path / "x.pth").path, "x.pth", "heads=4", "2 heads", arch={"heads": "4"})
    refused(RANDOM, "heads=5", "32", arch={"heads": "5"})
    assert open_checkpoint(RANDOM, arch={"mean": "0,0,0"}).architecture.mean == (0, 0, 0)


def test_networks_without_positions_need_an_image_size(tmp_path: Path):
    path = foreign.save(tmp_path / "x.pth", foreign.Weights(1).vit(slots=0))
    refused(path, "x.pth", "--arch image_px=224")
    assert open_checkpoint(path, arch={"image_px": "16"}).architecture.image_px == 16


def test_shapes_that_no_network_has(tmp_path: Path):
    state = foreign.Weights(1).vit()
    broken: list[tuple[dict[str, Tensor], str]] = [
        (state | {"pos_embed": torch.zeros(1, 13, 128)}, "13 position embeddings"),
        (state | {"patch_embed.proj.weight": torch.zeros(128, 4, 4, 4)}, "4 x 4 x 4"),
        (state | {"patch_embed.proj.weight": torch.zeros(128, 48)}, "four dimensions"),
        ({key: value for key, value in state.items() if "blocks" not in key}, "no vision transformer was found"),
        (foreign.Weights(1).beit(True) | {"rel_pos_bias.relative_position_bias_table": torch.zeros(9, 2)}, "9 rows"),
    ]
    for content, part in broken:
        refused(foreign.save(tmp_path / "x.pth", content), "x.pth", part)


def test_a_configuration_that_is_nonsense_is_no_crash(tmp_path: Path):
    folder = foreign.hf_folder(tmp_path / "folder").path
    (folder / "config.json").write_text("[1, 2")
    assert open_checkpoint(folder).architecture.heads == 2
    (folder / "config.json").write_text("[1, 2]")
    assert open_checkpoint(folder).architecture.heads == 2
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": "two"}))
    refused(folder, "folder", "heads")


# ---------------------------------------------------------------- identity


def test_the_identity_is_the_weights_not_the_file(tmp_path: Path):
    state = foreign.Weights(1).vit()
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    safetensors.torch.save_file(state, tmp_path / "x.bin")  # recognized by its content
    legacy = tmp_path / "legacy.pth"
    torch.save({"state_dict": foreign.under("module.", state)}, legacy, _use_new_zipfile_serialization=False)
    backwards = dict(reversed(state.items()))
    files = [
        foreign.save(tmp_path / "mae.pth", {"model": state, **foreign.junk()}),
        foreign.save(tmp_path / "flat.pth", backwards),
        foreign.save(tmp_path / "dino.pth", {"teacher": foreign.under("backbone.", state)}),
        legacy,
        tmp_path / "x.safetensors",
        tmp_path / "x.bin",
    ]
    assert {open_checkpoint(path).weights_sha256 for path in files} == {weights_sha256(state)}


def test_the_identity_is_that_of_float32_values(tmp_path: Path):
    state = foreign.Weights(1).vit()
    half = {key: value.half() for key, value in state.items()}
    back = {key: value.float() for key, value in half.items()}
    of_half = open_checkpoint(foreign.save(tmp_path / "half.pth", {"model": half}))
    assert of_half.weights_sha256 == open_checkpoint(foreign.save(tmp_path / "b.pth", back)).weights_sha256
    assert of_half.weights_sha256 != weights_sha256(state)
    assert isinstance(of_half.backbone, Backbone)
    assert next(of_half.backbone.parameters()).dtype == torch.float32


def test_other_values_names_or_shapes_have_another_identity():
    state = foreign.Weights(1).vit()
    one_bit = {**state, "norm.bias": torch.nextafter(state["norm.bias"], torch.tensor(9.0))}
    renamed = {key.replace("norm.", "norn."): value for key, value in state.items()}
    reshaped = {**state, "pos_embed": state["pos_embed"].reshape(17, 1, 128)}
    states = [
        state,
        one_bit,
        renamed,
        reshaped,
        {**state, "empty": torch.zeros(0)},
        {**state, "scalar": torch.tensor(1)},
    ]
    assert len({weights_sha256(each) for each in states}) == len(states)
    assert weights_sha256({**state, "norm.bias": state["norm.bias"][None].expand(2, -1)[1]}) == weights_sha256(state)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("moca_vitb.pth", "moca_vitb"),
        ("my-run/checkpoint.pth", "my-run"),
        ("my-run/checkpoint0799.pth", "my-run"),
        ("my-run/checkpoint-799.pth", "my-run"),
        ("my-run/checkpoint_0299.pth.tar", "my-run"),
        ("my-run/model.safetensors", "my-run"),
        ("my-run/teacher.pt", "my-run"),
        ("my-run/teacher_vitb.pt", "teacher_vitb"),
        ("my-run/modelnet.pt", "modelnet"),
        ("dino_v1.0.pth", "dino_v1.0"),
        ("ExtreMA-1k.pth.tar", "ExtreMA-1k"),
    ],
)
def test_names_for_people(path: str, name: str, tmp_path: Path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    state = foreign.Weights(1).vit(depth=1)
    if path.endswith("safetensors"):
        safetensors.torch.save_file(state, tmp_path / path)
    else:
        foreign.save(tmp_path / path, state)
    assert open_checkpoint(tmp_path / path).name == name


def test_a_files_own_name_may_be_a_keyword(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    foreign.mae(tmp_path / "timm")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("timm").format == "mae"


# ---------------------------------------------------------------- random:, timm:, hf:, pixels:


def run_python(code: str, cache: Path) -> Any:
    environment = os.environ | {"SSL_BENCH_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_was_opened_once_opens_without_timm(tmp_path: Path):
    """A random network is the same in every process; its identity, and how a file fits, are remembered."""
    path = foreign.mae(tmp_path / "x.pth").path
    code = f"""
import json, sys
from ssl_bench.evaluate.checkpoints import open_checkpoint
random, file = open_checkpoint({RANDOM!r}, seed=3), open_checkpoint({str(path)!r})
answer = [random.weights_sha256, random.architecture.name, file.weights_sha256, file.match.matched_percent]
print(json.dumps([answer, [name for name in ("timm", "torchvision") if name in sys.modules]]))
"""
    first, heavy = run_python(code, tmp_path / "a")
    assert heavy == ["timm", "torchvision"]
    again, heavy = run_python(code, tmp_path / "a")
    assert heavy == []
    here = open_checkpoint(RANDOM, seed=3)
    assert first == again
    assert first == [weights_sha256(here.state), "vit_32x2x4_patch8_16", open_checkpoint(path).weights_sha256, 100.0]
    assert open_checkpoint(RANDOM, seed=4).weights_sha256 != first[0]
    assert isinstance(here.backbone, Backbone)
    assert here.match.matched_percent == 100
    assert (here.name, here.origin["seed"]) == ("random-vit_32x2x4_patch8_16", 3)


def test_random_networks_by_timms_names():
    checkpoint = open_checkpoint("random:vit_tiny_patch16_224")
    assert checkpoint.architecture.name == "vit_tiny_patch16_224"
    assert checkpoint.match.matched_percent == 100  # also draws the weights


def test_what_timm_knows_of_its_models():
    """Without drawing a weight."""
    vit, beit = timm_facts("vit_small_patch14_dinov2"), timm_facts("beit_base_patch16_224")
    assert vit == {
        "heads": 6,
        "eps": 1e-6,
        "position_resize": "antialias",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    assert (beit["heads"], beit["mean"]) == (12, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vit_tinny_patch16_224", ("unknown timm model", "did you mean 'vit_tiny_patch16_224'")),
        ("resnet50", ("ResNet is not supported", "VisionTransformer and Beit")),
        ("vit_base_patch16_clip_quickgelu_224", ("QuickGELU is not supported",)),
        ("vit_32x2x5_patch8_16", ("vit_32x2x5_patch8_16", "divisible by the heads")),
        ("", ("unknown timm model ''",)),
        ("vit_tiny_patch16_224.augreg_in21", ("did you mean 'vit_tiny_patch16_224.augreg_in21k'",)),
    ],
)
def test_random_networks_that_cannot_be(name: str, parts: tuple[str, ...]):
    refused(f"random:{name}", *parts)


def test_models_by_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refused("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", "Without a network", "give its path")
    refused("timm:resnet50", "timm:resnet50", "ResNet is not supported")
    refused("hf:nobody/no-such-model", "hf:nobody/no-such-model", "Without a network", "folder's path")


def test_hundreds_of_names_are_not_listed():
    for spec in ("timm:nonsense", "random:nonsense"):
        message = refused(spec, "unknown timm model 'nonsense'", " more")
        assert message.count("patch") <= 12


@pytest.mark.parametrize("repository", ["", "facebook", "a/b/c", "/b", "a/", "https://huggingface.co/a/b", "a b/c"])
def test_a_repository_is_owner_and_name(repository: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ssl_bench.evaluate.hub._hub_answers", lambda: pytest.fail("the hub was asked"))
    refused(f"hf:{repository}", f"hf:{repository}:", "expected hf:owner/name")


@pytest.mark.parametrize("spec", ["hf:nobody/no-such-model", "timm:vit_tiny_patch16_224"])
def test_an_unreachable_hub_is_asked_once_and_in_silence(
    spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    import huggingface_hub.constants

    calls = []

    def slept(seconds: float) -> None:
        calls.append(seconds)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens on this port
    monkeypatch.setattr("time.sleep", slept)
    refused(spec, "cannot be reached")
    assert calls == []
    assert capfd.readouterr().err == ""
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_model_from_the_hub_is_named_after_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = foreign.hf_folder(tmp_path / "snapshots" / "0123abcd")
    monkeypatch.setattr("ssl_bench.evaluate.hub.download", lambda repository: file.path)
    checkpoint = open_checkpoint("hf:facebook/dino-vits16")
    assert (checkpoint.name, checkpoint.format) == ("hf-facebook-dino-vits16", "hf-vit")
    assert checkpoint.architecture.heads == 4


def test_timms_pretrained_models(monkeypatch: pytest.MonkeyPatch):
    """As if the network were there: create_model answers a pretrained request with other weights."""
    import timm

    create = timm.create_model

    def with_network(name: str, pretrained: bool = False, **options: Any) -> Any:
        model = create(name, **options)
        if pretrained:
            torch.nn.init.normal_(model.cls_token, std=3.0, generator=torch.Generator().manual_seed(1))
        return model

    monkeypatch.setattr(timm, "create_model", with_network)
    checkpoint = open_checkpoint("timm:vit_tiny_patch16_224")
    assert checkpoint.state["cls_token"].std() > 2
    assert (checkpoint.name, checkpoint.format) == ("timm-vit_tiny_patch16_224", "timm")
    assert checkpoint.architecture.position_resize == "antialias"
    assert checkpoint.match.matched_percent == 100


def test_pixels():
    checkpoint = open_checkpoint("pixels:")
    assert isinstance(checkpoint.backbone, Pixels)
    assert (checkpoint.name, checkpoint.match.matched_percent) == ("pixels", 100)
    assert checkpoint.weights_sha256 == open_checkpoint("pixels:").weights_sha256
    refused("pixels:8", "pixels:8", "nothing stands behind")


def test_a_description_is_plain_json(tmp_path: Path):
    for spec in (foreign.extrema(tmp_path / "x.pth").path, RANDOM, "pixels:"):
        report = describe(open_checkpoint(spec))
        assert json.loads(json.dumps(report)) == report
    report = describe(open_checkpoint(tmp_path / "x.pth"))
    assert (report["format"], report["checkpoint_key"], report["other_networks"]) == ("extrema", "teacher", ["student"])
    assert report["extras"] == {"predictor": 24 * 16 + 24, "projector": 24 * 128 + 24 + 48}


@pytest.mark.parametrize("zipped", [True, False])
def test_large_files_are_mapped_not_read(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(foreign.Weights(1).vit(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    load, calls = torch.load, []

    def watched(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", watched)
    open_checkpoint(tmp_path / "x.pth")
    (options,) = calls
    assert options["weights_only"] is True
    assert options["mmap"] is zipped  # the old format cannot be mapped
