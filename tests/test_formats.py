"""Every project's files are recognized, and give the outputs of the network that wrote them."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import foreign_checkpoints as foreign
import pytest
import torch
from foreign_checkpoints import Foreign, Tokens

from ssl_bench.errors import UserError
from ssl_bench.evaluate.backbone import Backbone
from ssl_bench.evaluate.checkpoints import Checkpoint, open_checkpoint
from ssl_bench.evaluate.formats import FORMATS
from ssl_bench.evaluate.saving import save_checkpoint


def simmim(path: Path) -> Foreign:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("yacs", "yacs.config"):
            patch.setitem(sys.modules, module, foreign.yacs)
        return foreign.simmim(path)


WRITERS: dict[str, Callable[[Path], Foreign]] = {
    "mae": foreign.mae,
    "mae-visualize": foreign.mae_visualize,
    "mae-finetuned": foreign.mae_finetuned,
    "sdae": foreign.sdae,
    "moca": foreign.moca,
    "moca-extracted": foreign.moca_extracted,
    "tec-release": foreign.tec_release,
    "tec-training": foreign.tec_training,
    "dino-backbone": foreign.dino_backbone,
    "dino": foreign.dino,
    "ibot": foreign.ibot,
    "ibot-teacher": foreign.ibot_backbone,
    "ibot-student": partial(foreign.ibot_backbone, student=True),
    "sit": foreign.sit,
    "mc-ssl": foreign.mc_ssl,
    "gmml": foreign.gmml,
    "msn": foreign.msn,
    "msn-release": partial(foreign.msn, training=False),
    "moco-v3": foreign.moco_v3,
    "extrema": foreign.extrema,
    "beit": foreign.beit,
    "beit-shared": partial(foreign.beit, shared=True),
    "beit-both": partial(foreign.beit, shared=True, both=True),
    "beit-deepspeed": partial(foreign.beit, container="module"),
    "data2vec": foreign.data2vec,
    "simmim": simmim,
    "cae": foreign.cae,
    "cae-small": partial(foreign.cae, dim=384, heads=12),
    "timm": foreign.timm_flat,
    "timm-training": foreign.timm_training,
    "dinov2": foreign.dinov2,
    "dinov2-registers": partial(foreign.dinov2, registers=4),
    "dinov2-chunks": partial(foreign.dinov2, chunk=True),
    "dinov2-swiglu": partial(foreign.dinov2, swiglu=True),
    "dinov2-training": foreign.dinov2_training,
    "dinov2-training-registers": partial(foreign.dinov2_training, registers=4),
    "hf-vit": foreign.hf_vit,
    "hf-vit-prefix": partial(foreign.hf_vit, prefix="vit."),
    "hf-vit-mae": foreign.hf_vit_mae,
    "hf-folder": foreign.hf_folder,
    "hf-dinov2": foreign.hf_dinov2,
    "hf-dinov2-registers": partial(foreign.hf_dinov2, registers=4),
    "hf-dinov2-swiglu": partial(foreign.hf_dinov2, swiglu=True),
    "hf-beit": partial(foreign.hf_beit, shared=False),
    "hf-beit-shared": partial(foreign.hf_beit, shared=True),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Foreign]:
    """Every file is written once."""

    @functools.cache
    def once(name: str) -> Foreign:
        folder = tmp_path_factory.mktemp(name)
        return WRITERS[name](folder / ("folder" if name == "hf-folder" else "x.pth"))

    return once


@torch.inference_mode()
def tokens_of(checkpoint: Checkpoint) -> Callable[[torch.Tensor], Tokens]:
    def run(images: torch.Tensor) -> Tokens:
        assert isinstance(checkpoint.backbone, Backbone)
        (tokens,) = checkpoint.backbone(images).tokens
        return tokens.cls, tokens.patches.flatten(1, 2)

    return run


def assert_same(found: Callable[[torch.Tensor], Tokens], expected: Callable[[torch.Tensor], Tokens]) -> None:
    images = torch.randn(3, 3, foreign.IMAGE, foreign.IMAGE, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        for one, other in zip(found(images), expected(images), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_gives_the_outputs_of_the_network_that_wrote_it(name: str, write: Callable[[str], Foreign]):
    file = write(name)
    default = next(iter(file.networks))
    checkpoint = open_checkpoint(file.path)
    assert (checkpoint.format, checkpoint.key) == (file.format, default)
    assert checkpoint.others == tuple(sorted(set(file.networks) - {default}))
    assert tuple(sorted(checkpoint.extras)) == file.extras
    architecture = checkpoint.architecture
    assert (architecture.heads, architecture.eps) == (file.heads, file.eps)
    assert (architecture.mean, architecture.std) == file.mean_std
    assert architecture.position_resize == file.resize
    assert (checkpoint.match.matched_percent, checkpoint.match.missing, checkpoint.match.unexpected) == (100, (), ())
    assert checkpoint.name == ("folder" if name == "hf-folder" else "x")
    assert_same(tokens_of(checkpoint), file.networks[default])


@pytest.mark.parametrize("name", ["sdae", "moca", "dino", "ibot", "sit", "mc-ssl", "msn", "moco-v3", "extrema"])
def test_every_network_of_a_file_can_be_chosen(name: str, write: Callable[[str], Foreign]):
    file = write(name)
    assert len(file.networks) == 2
    for role, reference in file.networks.items():
        checkpoint = open_checkpoint(file.path, key=role)
        assert checkpoint.key == role
        assert_same(tokens_of(checkpoint), reference)


@pytest.mark.parametrize(
    ("name", "key", "role"),
    [
        ("moca", "encoder_teacher", "teacher"),
        ("moca", "encoder", "student"),
        ("sdae", "model_teacher", "teacher"),
        ("sdae", "model", "student"),
        ("msn", "encoder", "student"),
        ("moco-v3", "momentum_encoder", "teacher"),
        ("data2vec", "model_ema", "teacher"),
        ("cae", "teacher", "teacher"),
        ("timm-training", "state_dict_ema", "ema"),
    ],
)
def test_the_files_own_names_choose_too(name: str, key: str, role: str, write: Callable[[str], Foreign]):
    file = write(name)
    checkpoint = open_checkpoint(file.path, key=key)
    assert checkpoint.key == role
    assert_same(tokens_of(checkpoint), file.networks[role])


def test_a_name_that_means_two_networks_is_refused(tmp_path: Path):
    file = foreign.moco_v3(tmp_path / "x.pth")
    with pytest.raises(UserError, match="Known: student, teacher"):
        open_checkpoint(file.path, key="state_dict")


def test_the_protocol_chooses_as_extremas_authors_do(tmp_path: Path):
    file = foreign.extrema(tmp_path / "x.pth")
    for protocol, role in file.by_protocol.items():
        checkpoint = open_checkpoint(file.path, protocol=protocol)
        assert checkpoint.key == role
        assert_same(tokens_of(checkpoint), file.networks[role])
    assert open_checkpoint(file.path, protocol="finetune", key="teacher").key == "teacher"


def test_one_network_alone_is_still_recognized(tmp_path: Path):
    both = torch.load(foreign.dino(tmp_path / "both.pth").path, weights_only=False)
    student = foreign.save(tmp_path / "student.pth", {"student": both["student"]})
    assert open_checkpoint(student).format == "dino"
    assert open_checkpoint(student).key == "student"


def test_class_attention_without_layer_scale(tmp_path: Path):
    content = torch.load(foreign.extrema(tmp_path / "x.pth").path, weights_only=False)
    content["state_dict"] = {key: value for key, value in content["state_dict"].items() if ".gamma_" not in key}
    checkpoint = open_checkpoint(foreign.save(tmp_path / "y.pth", content))
    prefix = "module.momentum_encoder."
    teacher = {key.removeprefix(prefix): value for key, value in content["state_dict"].items() if prefix in key}
    ones = {f"blocks_token.{block}.gamma_{n}": torch.ones(foreign.DIM) for block in (0, 1) for n in (1, 2)}
    assert checkpoint.match.missing == ()
    assert_same(tokens_of(checkpoint), partial(foreign.extrema_forward, teacher | ones))


def test_the_key_of_cae_has_no_bias(tmp_path: Path):
    """Which the outputs do not show: softmax forgives a bias of the key. The attention logits do not."""
    bias = open_checkpoint(foreign.cae(tmp_path / "x.pth").path).state["blocks.0.attn.qkv.bias"]
    query, key, value = bias.chunk(3)
    assert not key.any()
    assert query.all()
    assert value.all()


def test_tec_merges_its_class_token_and_keeps_the_adapters(tmp_path: Path):
    checkpoint = open_checkpoint(foreign.tec_training(tmp_path / "x.pth").path)
    assert {"cls_token_mlp.fc1.weight", "encoder_adaptor.proj.0.weight"} <= set(checkpoint.require_extra("adapters"))
    with pytest.raises(UserError, match=r"holds no predictor; .* adapters, decoder"):
        checkpoint.require_extra("predictor")


def test_no_final_norm_is_noted(tmp_path: Path):
    checkpoint = open_checkpoint(foreign.tec_release(tmp_path / "x.pth").path)
    assert not checkpoint.architecture.final_norm
    assert any("norm = identity" in note for note in checkpoint.notes)


def test_a_flat_mae_file_is_not_taken_for_tec(tmp_path: Path):
    state = foreign.Weights(1).vit()
    assert open_checkpoint(foreign.save(tmp_path / "x.pth", state)).format == "timm"


def test_heads_and_eps_can_be_said(tmp_path: Path):
    state = foreign.Weights(1).vit()
    path = foreign.save(tmp_path / "x.pth", state)
    told = {"heads": "4", "eps": "1e-3", "mean": "0.1,0.2,0.3", "std": "1,2,3", "position_resize": "dino"}
    checkpoint = open_checkpoint(path, arch=told)
    assert checkpoint.architecture.mean == (0.1, 0.2, 0.3)
    assert checkpoint.architecture.std == (1.0, 2.0, 3.0)
    assert checkpoint.architecture.position_resize == "dino"
    assert_same(tokens_of(checkpoint), foreign.timm_vit(state, heads=4, eps=1e-3))


def test_what_is_said_overrules_the_configuration(tmp_path: Path):
    file = foreign.hf_folder(tmp_path / "folder")
    assert open_checkpoint(file.path, arch={"heads": "2"}).architecture.heads == 2
    # Without the folder's configuration, transformers' defaults hold.
    lone = open_checkpoint(file.path / "model.safetensors")
    assert (lone.architecture.eps, lone.architecture.mean, lone.architecture.heads) == (1e-12, foreign.HALF[0], 2)


@pytest.mark.parametrize("name", ["mae", "extrema", "beit-shared", "tec-release", "dinov2-registers", "dinov2-swiglu"])
def test_our_own_file_brings_everything_back(name: str, write: Callable[[str], Foreign], tmp_path: Path):
    file = write(name)
    original = open_checkpoint(file.path)
    assert isinstance(original.backbone, Backbone)
    extras = {"projector": {"weight": torch.randn(1000, 8)[:2]}}  # a view of a large storage
    folder = tmp_path / "runs" / "mine"
    save_checkpoint(folder / "checkpoint.pt", original.backbone, extras=extras, origin={"method": "toy", "epochs": 3})
    for spec in (folder, folder / "checkpoint.pt"):
        copy = open_checkpoint(spec)
        assert (copy.format, copy.key, copy.name, copy.others) == ("ssl-bench", "model", "mine", ())
        assert copy.weights_sha256 == original.weights_sha256
        assert copy.architecture == original.architecture
        assert copy.origin == {"method": "toy", "epochs": 3}
        assert copy.require_extra("projector")["weight"].equal(extras["projector"]["weight"])
        assert copy.extras["projector"]["weight"].untyped_storage().nbytes() == 2 * 8 * 4
    assert_same(tokens_of(copy), file.networks[original.key])


def test_our_own_file_of_another_version_is_refused(tmp_path: Path):
    backbone = open_checkpoint(foreign.mae(tmp_path / "x.pth").path).backbone
    assert isinstance(backbone, Backbone)
    save_checkpoint(tmp_path / "checkpoint.pt", backbone)
    content = torch.load(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"x\.pt.*file version 2, this one reads 1"):
        open_checkpoint(foreign.save(tmp_path / "x.pt", content | {"ssl_bench": 2}))
    strange = content | {"architecture": content["architecture"] | {"mixture": 3}}
    with pytest.raises(UserError, match=r"y\.pt.*architecture field 'mixture'"):
        open_checkpoint(foreign.save(tmp_path / "y.pt", strange))
    with pytest.raises(UserError, match=r"checkpoint\.pt.*unknown --checkpoint-key 'teacher'.*Known: model"):
        open_checkpoint(tmp_path / "checkpoint.pt", key="teacher")


def test_every_row_of_the_table_is_tested(write: Callable[[str], Foreign]):
    assert {row.name for row in FORMATS} == {write(name).format for name in WRITERS}


def test_an_architecture_names_itself(tmp_path: Path):
    names = {
        "mae": "vit_128x2x2_patch4_16",
        "extrema": "vit_128x2x2_patch4_ca2_16",
        "dinov2-registers": "vit_128x2x2_patch4_reg4_16",
        "beit": "beit_128x2x2_patch4_16",
    }
    for name, expected in names.items():
        architecture = open_checkpoint(WRITERS[name](tmp_path / f"{name}.pth").path).architecture
        assert architecture.name == expected
    base = dataclasses.replace(architecture, beit=False, dim=768, depth=12, heads=12, patch_px=16, image_px=224)
    assert base.name == "vit_base_patch16_224"
    assert dataclasses.replace(base, heads=6).name == "vit_768x12x6_patch16_224"
