"""Tiny checkpoint files, written just as each project writes its own: names, containers, prefixes, and junk beside.

Key names are spelled out here from the projects' documentation, independently of evaluate/naming.py. Every weight is
random, also those that start at zero or one, so that a dropped or a swapped tensor changes the output.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

State = dict[str, Tensor]
Tokens = tuple[Tensor | None, Tensor]  # cls (B, D) and patches (B, N, D), after the final norm

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DIM, DEPTH, PATCH, IMAGE, MLP = 128, 2, 4, 16, 192
GRID = IMAGE // PATCH


@dataclass
class Foreign:
    """A file, and what must be found in it."""

    path: Path
    format: str
    networks: dict[str, Callable[[Tensor], Tokens]]  # role -> its reference; the first is the one chosen by default
    eps: float = 1e-6
    heads: int = 2
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    extras: tuple[str, ...] = ()
    resize: str = "bicubic"
    by_protocol: dict[str, str] = field(default_factory=dict)


class Weights:
    """Draws random tensors under given names."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def linear(self, name: str, n_out: int, n_in: int, bias: bool = True) -> State:
        weight = {f"{name}.weight": self.normal(n_out, n_in, std=n_in**-0.5)}
        return weight | ({f"{name}.bias": self.normal(n_out)} if bias else {})

    def norm(self, name: str, dim: int) -> State:
        return {f"{name}.weight": 1 + self.normal(dim), f"{name}.bias": self.normal(dim)}

    def block(self, name: str, dim: int, mlp: int, qkv_bias: bool = True) -> State:
        return {
            **self.norm(f"{name}.norm1", dim),
            **self.linear(f"{name}.attn.qkv", 3 * dim, dim, bias=qkv_bias),
            **self.linear(f"{name}.attn.proj", dim, dim),
            **self.norm(f"{name}.norm2", dim),
            **self.linear(f"{name}.mlp.fc1", mlp, dim),
            **self.linear(f"{name}.mlp.fc2", dim, mlp),
        }

    def vit(
        self, dim: int = DIM, depth: int = DEPTH, mlp: int = MLP, slots: int = 1 + GRID**2, cls: bool = True
    ) -> State:
        """A ViT in timm's names, which MAE, DINO, iBOT, MSN, MoCo-v3, SiT, SdAE, MOCA and TEC use."""
        state = {"cls_token": self.normal(1, 1, dim)} if cls else {}
        state |= {"pos_embed": self.normal(1, slots, dim)} if slots else {}
        state |= {
            "patch_embed.proj.weight": self.normal(dim, 3, PATCH, PATCH),
            "patch_embed.proj.bias": self.normal(dim),
        }
        for number in range(depth):
            state |= self.block(f"blocks.{number}", dim, mlp)
        return state | self.norm("norm", dim)

    def beit(self, shared: bool, both: bool = False) -> State:
        """BEiT's names: q_bias and v_bias without a key's, gamma_1 and gamma_2, relative positions."""
        state = {"cls_token": self.normal(1, 1, DIM), "mask_token": self.normal(1, 1, DIM)}
        state |= {
            "patch_embed.proj.weight": self.normal(DIM, 3, PATCH, PATCH),
            "patch_embed.proj.bias": self.normal(DIM),
        }
        table, index = (2 * GRID - 1) ** 2 + 3, torch.zeros(GRID**2 + 1, GRID**2 + 1, dtype=torch.long)
        if shared:
            state["rel_pos_bias.relative_position_bias_table"] = self.normal(table, 2, std=1.0)
            state["rel_pos_bias.relative_position_index"] = index
        for number in range(DEPTH):
            name = f"blocks.{number}"
            state |= self.block(name, DIM, MLP, qkv_bias=False)
            state |= {f"{name}.gamma_{n}": self.normal(DIM, std=0.5) for n in (1, 2)}
            state |= {f"{name}.attn.q_bias": self.normal(DIM), f"{name}.attn.v_bias": self.normal(DIM)}
            if not shared or both:
                state[f"{name}.attn.relative_position_bias_table"] = self.normal(table, 2, std=1.0)
                state[f"{name}.attn.relative_position_index"] = index
        return state | self.norm("norm", DIM)


def timm_vit(state: State, heads: int = 2, eps: float = 1e-6, **options: Any) -> Callable[[Tensor], Tokens]:
    """timm's own VisionTransformer with these weights, all of them."""
    dim = state["patch_embed.proj.weight"].shape[0]
    settings: dict[str, Any] = {
        "img_size": IMAGE, "patch_size": PATCH, "embed_dim": dim, "num_heads": heads,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "norm_layer": partial(nn.LayerNorm, eps=eps), "num_classes": 0, "global_pool": "",
    }  # fmt: skip
    model = VisionTransformer(**(settings | options)).eval()
    model.load_state_dict(state)

    def run(images: Tensor) -> Tokens:
        x, prefix = model.forward_features(images), model.num_prefix_tokens
        return (x[:, 0] if prefix else None), x[:, prefix:]

    return run


def timm_beit(state: State, eps: float = 1e-6, shared: bool = False, both: bool = False) -> Callable[[Tensor], Tokens]:
    """timm's own Beit with these weights."""
    model = Beit(
        img_size=IMAGE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=2, mlp_ratio=MLP / DIM, init_values=0.1,
        norm_layer=partial(nn.LayerNorm, eps=eps), num_classes=0, global_pool="", use_abs_pos_emb=False,
        use_rel_pos_bias=not shared or both, use_shared_rel_pos_bias=shared, use_fc_norm=False,
    ).eval()  # fmt: skip
    model.load_state_dict(
        {key: value for key, value in state.items() if not key.endswith("_index") and key != "mask_token"}
    )

    def run(images: Tensor) -> Tokens:
        x = model.forward_features(images)
        return x[:, 0], x[:, 1:]

    return run


def junk() -> dict[str, Any]:
    """What training scripts leave in their files."""
    return {
        "optimizer": {
            "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(3, 3)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0]}],
        },
        "scaler": {"scale": 65536.0, "growth_tracker": 3},
        "epoch": 99,
        "best_acc": np.float64(71.5),
        "args": argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("/runs/x"), resume="", blr=np.float32(0.5)),
    }


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def mlp_head(weights: Weights, name: str) -> State:
    """The projectors of DINO's family."""
    return {
        **weights.linear(f"{name}.mlp.0", 24, DIM),
        **weights.linear(f"{name}.mlp.2", 16, 24),
        f"{name}.last_layer.weight_g": weights.normal(32, 1),
        f"{name}.last_layer.weight_v": weights.normal(32, 16),
    }


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


# ---------------------------------------------------------------- MAE and its descendants


def mae(path: Path) -> Foreign:
    state = Weights(1).vit()
    return Foreign(save(path, {"model": state, **junk()}), "mae", {"model": timm_vit(state)})


def _mae_decoder(weights: Weights) -> State:
    return {
        "mask_token": weights.normal(1, 1, 32),
        **weights.linear("decoder_embed", 32, DIM),
        "decoder_pos_embed": weights.normal(1, 1 + GRID**2, 32),
        **weights.block("decoder_blocks.0", 32, 64),
        **weights.norm("decoder_norm", 32),
        **weights.linear("decoder_pred", 3 * PATCH**2, 32),
    }


def mae_visualize(path: Path) -> Foreign:
    weights = Weights(2)
    state = weights.vit()
    content = {"model": state | _mae_decoder(weights)}
    return Foreign(save(path, content), "mae", {"model": timm_vit(state)}, extras=("decoder",))


def mae_finetuned(path: Path) -> Foreign:
    weights = Weights(3)
    state = {key: value for key, value in weights.vit().items() if not key.startswith("norm.")}
    head = weights.norm("fc_norm", DIM) | weights.linear("head", 10, DIM)
    networks = {"model": timm_vit(state, final_norm=False, fc_norm=False)}
    return Foreign(save(path, {"model": state | head, **junk()}), "mae-finetuned", networks, extras=("classifier",))


def sdae(path: Path) -> Foreign:
    weights = Weights(4)
    student, teacher = weights.vit(), weights.vit()
    content = {"model": student | _mae_decoder(weights), "model_teacher": teacher, **junk()}
    networks = {"student": timm_vit(student), "teacher": timm_vit(teacher)}
    return Foreign(save(path, content), "sdae", networks, extras=("decoder",))


def moca(path: Path) -> Foreign:
    weights = Weights(5)
    student, teacher = weights.vit(), weights.vit()
    prefix = "bow_extractor.bow_extractor.0."
    content = {
        **under("encoder.", student),
        **under("encoder_teacher.", teacher),
        **weights.linear("encoder_pred.layers_w.0", 24, DIM, bias=False),
        **weights.linear("decoder_pred.layers_w.0", 24, DIM, bias=False),
        **weights.norm("norm_cls_pt", DIM),
        **weights.linear("decoder_embed_cls_pt", 32, DIM),
        "mask_token_cls_pt": weights.normal(1, 1, 32),
        **weights.block("decoder_blocks_cls_pt.0", 32, 64),
        prefix + "_embedding": weights.normal(64, DIM),
        prefix + "_embedding_ptr": torch.zeros(1, dtype=torch.long),
        prefix + "_dist_norm": torch.tensor(0.5),
    }
    networks = {"teacher": timm_vit(teacher), "student": timm_vit(student)}
    extras = ("codebook", "decoder", "projector")
    return Foreign(save(path, {"model": content, **junk()}), "moca", networks, extras=extras)


def moca_extracted(path: Path) -> Foreign:
    state = Weights(6).vit()
    return Foreign(save(path, {"model": state}), "mae", {"model": timm_vit(state)})


def tec_release(path: Path) -> Foreign:
    state = {key: value for key, value in Weights(7).vit().items() if not key.startswith("norm.")}
    return Foreign(save(path, state), "tec-release", {"model": timm_vit(state, final_norm=False)})


def tec_training(path: Path) -> Foreign:
    weights = Weights(8)
    state = weights.vit()
    cls_mlp = weights.linear("cls_token_mlp.fc1", 4 * DIM, DIM) | weights.linear("cls_token_mlp.fc2", DIM, 4 * DIM)
    rest = {
        **weights.norm("encoder_adaptor.norm", 2 * DIM),
        **weights.linear("encoder_adaptor.proj.0", DIM, 2 * DIM),
        **weights.linear("forward_fea_decoder.decoder_pred", DIM, 32),
        **weights.linear("forward_att_decoder.decoder_pred", DIM, 32),
        **weights.block("decoder_blocks.0", 32, 64),
        "decoder_pos_embed": weights.normal(1, 1 + GRID**2, 32),
    }
    hidden = state["cls_token"] @ cls_mlp["cls_token_mlp.fc1.weight"].T + cls_mlp["cls_token_mlp.fc1.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))  # GELU
    merged = hidden @ cls_mlp["cls_token_mlp.fc2.weight"].T + cls_mlp["cls_token_mlp.fc2.bias"]
    networks = {"model": timm_vit(state | {"cls_token": merged})}
    content = {"model": state | cls_mlp | rest, **junk()}
    return Foreign(save(path, content), "tec-training", networks, extras=("adapters", "decoder"))


# ---------------------------------------------------------------- DINO and its descendants


def dino_backbone(path: Path) -> Foreign:
    state = Weights(10).vit()
    return Foreign(save(path, state), "timm", {"model": timm_vit(state)})


def _pair(weights: Weights, student_ddp: bool, teacher_ddp: bool, heads: Callable[[], State]) -> tuple[Any, Any]:
    student, teacher = weights.vit(), weights.vit()
    content = {
        "student": under("module." * student_ddp, under("backbone.", student) | heads()),
        "teacher": under("module." * teacher_ddp, under("backbone.", teacher) | heads()),
    }
    return content, {"teacher": timm_vit(teacher), "student": timm_vit(student)}


def dino(path: Path) -> Foreign:
    weights = Weights(11)
    content, networks = _pair(weights, True, False, lambda: mlp_head(weights, "head"))
    content |= {**junk(), "dino_loss": {"center": weights.normal(1, 32)}}
    return Foreign(save(path, content), "dino", networks, extras=("projector",), resize="dino")


def ibot(path: Path) -> Foreign:
    weights = Weights(12)
    content, networks = _pair(weights, True, False, lambda: mlp_head(weights, "head"))
    content["student"]["module.backbone.masked_embed"] = weights.normal(1, DIM)
    content |= {**junk(), "ibot_loss": {"center": weights.normal(1, 32), "center2": weights.normal(1, 1, 32)}}
    return Foreign(save(path, content), "ibot", networks, extras=("projector",), resize="dino")


def ibot_backbone(path: Path, student: bool = False) -> Foreign:
    weights = Weights(13 + student)
    state = weights.vit()
    content = {"state_dict": state | ({"masked_embed": weights.normal(1, DIM)} if student else {})}
    extras = ("decoder",) if student else ()
    return Foreign(save(path, content), "ibot-backbone", {"model": timm_vit(state)}, extras=extras, resize="dino")


def sit(path: Path) -> Foreign:
    weights = Weights(15)
    heads = lambda: weights.linear("head.mlp.0", 24, DIM) | weights.linear("head_recons.mlp.0", DIM, DIM)  # noqa: E731
    content, networks = _pair(weights, True, True, heads)
    return Foreign(
        save(path, {**content, **junk()}), "sit", networks, extras=("pixel_head", "projector"), resize="dino"
    )


def mc_ssl(path: Path) -> Foreign:
    weights = Weights(16)

    def heads() -> State:
        data_layer = {"head.data_layer.weight_g": weights.normal(32, 1)}
        return mlp_head(weights, "head") | data_layer | weights.linear("head_recons.mlp.0", DIM, DIM)

    content, networks = _pair(weights, True, False, heads)
    content |= junk()
    return Foreign(save(path, content), "mc-ssl", networks, extras=("pixel_head", "projector"), resize="dino")


def gmml(path: Path) -> Foreign:
    weights = Weights(17)
    state = weights.vit()
    content = {"SiT_model": under("module.", under("backbone.", state) | weights.linear("head_recons.mlp.0", DIM, DIM))}
    return Foreign(save(path, {**content, **junk()}), "gmml", {"model": timm_vit(state)}, extras=("pixel_head",))


# ---------------------------------------------------------------- joint embeddings


def msn(path: Path, training: bool = True) -> Foreign:
    weights = Weights(20)
    student, teacher = weights.vit(), weights.vit()
    head = weights.linear("fc.fc1", 24, DIM) | weights.norm("fc.bn1", 24) | weights.linear("fc.fc2", 16, 24)
    content: dict[str, Any] = {"target_encoder": under("module.", teacher | head), "epoch": 800}
    networks = {"teacher": timm_vit(teacher)}
    if training:
        content |= {"encoder": under("module.", student | head), "opt": junk()["optimizer"]}
        content |= {"prototypes": weights.normal(16, 16), "loss": 3.1, "batch_size": 32, "lr": 1e-3}
        networks["student"] = timm_vit(student)
    return Foreign(save(path, content), "msn", networks, extras=("projector",))


def moco_v3(path: Path) -> Foreign:
    weights = Weights(21)  # ViT-S: width 384, but 12 heads
    student, teacher = (weights.vit(dim=384, depth=1, mlp=64) for _ in range(2))
    head = {"head.0.weight": weights.normal(24, 384), **weights.norm("head.1", 24)}
    predictor = {"module.predictor.0.weight": weights.normal(24, 16)}
    state = (
        under("module.base_encoder.", student | head) | under("module.momentum_encoder.", teacher | head) | predictor
    )
    networks = {"student": timm_vit(student, heads=12), "teacher": timm_vit(teacher, heads=12)}
    content = {"epoch": 300, "arch": "vit_small", "state_dict": state, **junk()}
    return Foreign(save(path, content), "moco-v3", networks, heads=12, extras=("predictor", "projector"))


def _extrema_network(weights: Weights) -> State:
    state = weights.vit(slots=GRID**2)  # no slot for the class token
    for number in range(2):
        name = f"blocks_token.{number}"
        state |= weights.norm(f"{name}.norm1", DIM) | weights.norm(f"{name}.norm2", DIM)
        for part in ("q", "k", "v", "proj"):
            state |= weights.linear(f"{name}.attn.{part}", DIM, DIM)
        state |= weights.linear(f"{name}.mlp.fc1", 4 * DIM, DIM) | weights.linear(f"{name}.mlp.fc2", DIM, 4 * DIM)
        state |= {f"{name}.gamma_{n}": weights.normal(DIM, std=0.5) for n in (1, 2)}
    return state


def extrema_forward(state: State, images: Tensor, heads: int = 2) -> Tokens:
    """ExtreMA's forward, slowly: self-attention among patches; then the class token alone attends to [cls; patches]."""

    def norm(name: str, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        x = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for q_head, k_head, v_head in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            out.append((q_head @ k_head.transpose(1, 2) / q_head.shape[-1] ** 0.5).softmax(-1) @ v_head)
        return torch.cat(out, -1)

    def mlp(name: str, x: Tensor) -> Tensor:
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", x)))

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    for number in range(DEPTH):
        name = f"blocks.{number}"
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).chunk(3, -1)
        x = x + linear(f"{name}.attn.proj", attend(q, k, v))
        x = x + mlp(f"{name}.mlp", norm(f"{name}.norm2", x))
    cls = state["cls_token"].expand(len(x), -1, -1)
    for number in range(2):
        name = f"blocks_token.{number}"
        u = norm(f"{name}.norm1", torch.cat([cls, x], 1))
        q, k, v = linear(f"{name}.attn.q", u[:, :1]), linear(f"{name}.attn.k", u), linear(f"{name}.attn.v", u)
        cls = cls + state[f"{name}.gamma_1"] * linear(f"{name}.attn.proj", attend(q, k, v))
        cls = cls + state[f"{name}.gamma_2"] * mlp(f"{name}.mlp", norm(f"{name}.norm2", cls))
    return norm("norm", cls)[:, 0], norm("norm", x)


def extrema(path: Path) -> Foreign:
    weights = Weights(22)
    student, teacher = _extrema_network(weights), _extrema_network(weights)
    head = weights.linear("head.0", 24, DIM) | weights.norm("head.1", 24)
    state = under("module.base_encoder.", student | head) | under("module.momentum_encoder.", teacher | head)
    state |= weights.linear("module.predictor.0", 24, 16)
    content = {"epoch": 300, "arch": "vit_base", "state_dict": state, **junk()}
    networks = {"teacher": partial(extrema_forward, teacher), "student": partial(extrema_forward, student)}
    by_protocol = {"knn": "teacher", "linear": "teacher", "finetune": "student", "semseg": "student"}
    extras = ("predictor", "projector")
    return Foreign(save(path, content), "extrema", networks, extras=extras, by_protocol=by_protocol)


# ---------------------------------------------------------------- BEiT and its descendants


def _lm_head(weights: Weights) -> State:
    return weights.linear("lm_head", 24, DIM)


def beit(path: Path, shared: bool = False, both: bool = False, container: str = "model") -> Foreign:
    weights = Weights(30 + shared + 2 * both)
    state = weights.beit(shared, both)
    content = {container: state | _lm_head(weights), **junk()}
    networks = {"model": timm_beit(state, shared=shared, both=both)}
    return Foreign(save(path, content), "beit", networks, mean_std=HALF, extras=("decoder", "predictor"))


def data2vec(path: Path) -> Foreign:
    weights = Weights(35)
    student, teacher = weights.beit(True), weights.beit(True)
    content = {"model": student | _lm_head(weights), "model_ema": teacher, **junk()}
    networks = {"student": timm_beit(student, shared=True), "teacher": timm_beit(teacher, shared=True)}
    return Foreign(save(path, content), "data2vec", networks, extras=("decoder", "predictor"))


class CfgNode(dict):  # type: ignore[type-arg]
    """Takes the place of yacs.config.CfgNode, which SimMIM puts into its files; yacs need not be installed."""


CfgNode.__module__ = "yacs.config"
yacs = ModuleType("yacs")
yacs.config, yacs.CfgNode = yacs, CfgNode  # type: ignore[attr-defined]


def simmim(path: Path) -> Foreign:
    """To be called while `yacs` stands in sys.modules, where pickle insists on finding it."""
    weights = Weights(36)
    state = weights.beit(True)
    content = {
        "model": under("encoder.", state) | {"decoder.0.weight": weights.normal(3 * PATCH**2, DIM, 1, 1)},
        "max_accuracy": 0.0,
        "config": CfgNode(DATA=CfgNode(IMG_SIZE=IMAGE)),
        **junk(),
    }
    return Foreign(save(path, content), "simmim", {"model": timm_beit(state, shared=True)}, extras=("decoder",))


def _plain_from_cae(state: State) -> State:
    """CAE's encoder is a ViT with layer scale, whose key has no bias."""
    plain: State = {}
    for key, value in state.items():
        if key.endswith("q_bias"):
            v_bias = state[key.replace("q_bias", "v_bias")]
            plain[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v_bias])
        elif not key.endswith("v_bias"):
            plain[key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")] = value
    return plain


def cae(path: Path, dim: int = DIM, heads: int = 2) -> Foreign:
    weights = Weights(37)

    def encoder() -> State:
        state = {key: value for key, value in weights.vit(dim=dim).items() if not key.endswith("qkv.bias")}
        for number in range(DEPTH):
            state |= {f"blocks.{number}.attn.{part}_bias": weights.normal(dim) for part in ("q", "v")}
            state |= {f"blocks.{number}.gamma_{n}": weights.normal(dim, std=0.5) for n in (1, 2)}
        return state

    student, teacher = encoder(), encoder()
    content = {
        **under("encoder.", student),
        **under("teacher.", teacher),
        **weights.linear("pretext_neck.head", 24, dim),
        **weights.linear("encoder_to_decoder", 32, dim),
        "mask_token": weights.normal(1, 1, dim),
    }
    networks = {
        "student": timm_vit(_plain_from_cae(student), heads=heads, init_values=0.1),
        "teacher": timm_vit(_plain_from_cae(teacher), heads=heads, init_values=0.1),
    }
    return Foreign(
        save(path, {"model": content, **junk()}), "cae", networks, heads=heads, extras=("decoder", "predictor")
    )


# ---------------------------------------------------------------- timm and DINOv2


def timm_flat(path: Path) -> Foreign:
    weights = Weights(40)
    state = weights.vit()
    content = OrderedDict(state | weights.linear("head", 10, DIM))
    return Foreign(save(path, content), "timm", {"model": timm_vit(state)}, extras=("classifier",))


def timm_training(path: Path) -> Foreign:
    weights = Weights(41)
    state, ema = weights.vit(), weights.vit()
    head = weights.linear("head", 10, DIM)
    content = {"arch": "vit_x", "state_dict": state | head, "state_dict_ema": ema | head, "version": 2, "metric": 71.0}
    networks = {"model": timm_vit(state), "ema": timm_vit(ema)}
    return Foreign(save(path, {**content, **junk()}), "timm-training", networks, extras=("classifier",))


def _dinov2(weights: Weights, registers: int = 0, swiglu: bool = False, chunk: bool = False) -> tuple[State, Any]:
    """Weights in DINOv2's names, and the reference: positions go to [cls; patches], then registers go between."""
    state = weights.vit()
    for number in range(DEPTH):
        state |= {f"blocks.{number}.ls{n}.gamma": weights.normal(DIM, std=0.5) for n in (1, 2)}
        if swiglu:
            state |= weights.linear(f"blocks.{number}.mlp.fc1", 2 * MLP, DIM)
            state |= weights.linear(f"blocks.{number}.mlp.fc2", DIM, MLP)
    plain = dict(state)
    written = state | {"mask_token": weights.normal(1, DIM)}
    options: dict[str, Any] = {"init_values": 0.1}
    if registers:
        written["register_tokens"] = weights.normal(1, registers, DIM)
        plain["reg_token"] = written["register_tokens"]
        plain["cls_token"] = plain["cls_token"] + plain["pos_embed"][:, :1]
        plain["pos_embed"] = plain["pos_embed"][:, 1:]
        options |= {"reg_tokens": registers, "no_embed_class": True}
    if swiglu:
        written = {key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): v for key, v in written.items()}
        options |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if chunk:  # FSDP's chunks of blocks
        written = {
            key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.3.1."): v for key, v in written.items()
        }
    return written, timm_vit(plain, **options)


def dinov2(path: Path, registers: int = 0, swiglu: bool = False, chunk: bool = False) -> Foreign:
    state, reference = _dinov2(Weights(42), registers, swiglu, chunk)
    name, resize = ("dinov2-registers", "antialias") if registers else ("dinov2", "dino")
    return Foreign(save(path, state), name, {"model": reference}, extras=("decoder",), resize=resize)


def dinov2_training(path: Path, registers: int = 0) -> Foreign:
    weights = Weights(43)
    state, reference = _dinov2(weights, registers, chunk=True)
    head = mlp_head(weights, "dino_head") | mlp_head(weights, "ibot_head")
    name, resize = ("dinov2-registers", "antialias") if registers else ("dinov2", "dino")
    extras = ("decoder", "projector")
    content = {"teacher": under("backbone.", state) | head}
    return Foreign(save(path, content), name, {"teacher": reference}, extras=extras, resize=resize)


# ---------------------------------------------------------------- Hugging Face


def _hugging_face(state: State) -> State:
    """timm's names -> transformers', with query, key and value apart."""
    mlp = {"fc1": "intermediate.dense", "fc2": "output.dense"}
    if any(".ls1." in key for key in state):
        mlp = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    if any(".w12." in key for key in state):
        mlp = {"w12": "mlp.weights_in", "w3": "mlp.weights_out"}
    norms = {"norm1": "norm1", "norm2": "norm2"} if any(".ls1." in key for key in state) else {}
    norms = norms or {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    result: State = {}
    for key, value in state.items():
        parts = key.split(".")
        layer, kind = f"encoder.layer.{parts[1]}" if parts[0] == "blocks" else "", parts[-1]
        if not layer:
            name = {
                "cls_token": "embeddings.cls_token",
                "mask_token": "embeddings.mask_token",
                "register_tokens": "embeddings.register_tokens",
                "pos_embed": "embeddings.position_embeddings",
            }.get(key) or key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            name = name.replace("rel_pos_bias.", "encoder.relative_position_bias.")
            result[re.sub("^norm", "layernorm", name)] = value
        elif parts[2].startswith("gamma_"):  # BEiT
            result[f"{layer}.lambda_{parts[2][-1]}"] = value
        elif kind in ("q_bias", "v_bias"):
            result[f"{layer}.attention.attention.{'query' if kind == 'q_bias' else 'value'}.bias"] = value
        elif kind == "relative_position_bias_table":
            result[f"{layer}.attention.attention.relative_position_bias.{kind}"] = value
        elif parts[2] == "attn" and parts[3] == "qkv":
            for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[f"{layer}.attention.attention.{name}.{kind}"] = third
        elif parts[2] == "attn":
            result[f"{layer}.attention.output.dense.{kind}"] = value
        elif parts[2] == "mlp":
            result[f"{layer}.{mlp[parts[3]]}.{kind}"] = value
        elif parts[2] in ("ls1", "ls2"):
            result[f"{layer}.layer_scale{parts[2][-1]}.lambda1"] = value
        else:
            result[f"{layer}.{norms[parts[2]]}.{kind}"] = value
    return {key: value.contiguous() for key, value in result.items()}


def hf_vit(path: Path, prefix: str = "") -> Foreign:
    weights = Weights(50)
    state = weights.vit()
    content = _hugging_face(state)
    content |= weights.linear("pooler.dense", DIM, DIM) if not prefix else {}
    content = under(prefix, content) | (weights.linear("classifier", 10, DIM) if prefix else {})
    extras = ("classifier",) if prefix else ()
    networks = {"model": timm_vit(state, eps=1e-12)}
    return Foreign(save(path, content), "hf-vit", networks, eps=1e-12, mean_std=HALF, extras=extras)


def hf_vit_mae(path: Path) -> Foreign:
    weights = Weights(51)
    state = weights.vit()
    decoder = {
        **weights.linear("decoder.decoder_embed", 32, DIM),
        "decoder.mask_token": weights.normal(1, 1, 32),
        "decoder.decoder_pos_embed": weights.normal(1, 1 + GRID**2, 32),
        **weights.linear("decoder.decoder_layers.0.attention.attention.query", 32, 32),
        **weights.linear("decoder.decoder_layers.0.attention.attention.key", 32, 32),
        **weights.linear("decoder.decoder_layers.0.attention.attention.value", 32, 32),
        **weights.linear("decoder.decoder_pred", 3 * PATCH**2, 32),
    }
    content = under("vit.", _hugging_face(state)) | decoder
    networks = {"model": timm_vit(state, eps=1e-12)}
    return Foreign(save(path, content), "hf-vit-mae", networks, eps=1e-12, extras=("decoder",))


def hf_folder(folder: Path) -> Foreign:
    """model.safetensors beside config.json and preprocessor_config.json, which overrule transformers' defaults."""
    state = Weights(52).vit()
    folder.mkdir(parents=True)
    safetensors.torch.save_file(under("vit.", _hugging_face(state)), folder / "model.safetensors")
    config = {"model_type": "vit", "hidden_size": DIM, "num_attention_heads": 4, "layer_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": IMAGE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    networks = {"model": timm_vit(state, heads=4, eps=1e-5)}
    mean_std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return Foreign(folder, "hf-vit", networks, eps=1e-5, heads=4, mean_std=mean_std)


def hf_dinov2(path: Path, registers: int = 0, swiglu: bool = False) -> Foreign:
    state, reference = _dinov2(Weights(53), registers, swiglu)
    content = _hugging_face(state)
    resize = "antialias" if registers else "dino"
    return Foreign(save(path, content), "hf-dinov2", {"model": reference}, extras=("decoder",), resize=resize)


def hf_beit(path: Path, shared: bool) -> Foreign:
    state = {key: value for key, value in Weights(54 + shared).beit(shared).items() if not key.endswith("_index")}
    content = under("beit.", _hugging_face(state))
    networks = {"model": timm_beit(state, eps=1e-12, shared=shared)}
    return Foreign(save(path, content), "hf-beit", networks, eps=1e-12, mean_std=HALF, extras=("decoder",))
