"""Every project's parameter names, brought to timm's.

Renaming is by what a key looks like, not by who wrote it, so one function serves all formats. What is not part of the
trunk (heads, decoders, predictors) is sorted into named extras, because some protocols need it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_bench.evaluate.architecture import State

# Hugging Face's ViT, DINOv2 and BEiT -> timm. Query, key and value are joined afterwards.
_HUGGING_FACE = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"\.attention\.attention\.(relative_position_bias\.)?", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"^layernorm\.", "norm."),
)
_EVERYWHERE = (
    (r"^blocks\.(\d+)\.(\d+)\.", r"blocks.\2."),  # DINOv2's chunks for FSDP; the second number counts on
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # DINOv2's SwiGLU
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^blocks_token\.", "class_attention.blocks."),  # ExtreMA
)
_NO_WEIGHTS = re.compile(r"relative_position_index$|^pooler\.")
_TRUNK = re.compile(
    r"(cls_token|pos_embed|reg_token)$|(norm_pre|patch_embed\.proj|norm)\.(weight|bias)$"
    r"|blocks\.\d+\.|class_attention\."
)
# First fit wins. The names are the vocabulary that protocols use.
_EXTRAS = (
    ("classifier", r"(head\.(weight|bias)|fc_norm\..*|classifier\..*)$"),
    ("pixel_head", r"head_recons\."),
    ("projector", r"(head|fc|encoder_pred|dino_head|ibot_head)\."),
    ("predictor", r"(predictor|lm_head|pretext_neck|encoder_to_decoder\w*)\."),
    ("adapters", r"(encoder_adaptor|cls_token_mlp)\."),
    ("decoder", r"(.*decoder|mask_token|masked_embed|norm_cls_pt)"),
    ("codebook", r"bow_extractor\."),
    ("other", r""),
)


def canonical_names(state: Mapping[str, Tensor]) -> State:
    """timm's names for a network's weights, with the few values that must change together with the names."""
    hugging_face = any(key.startswith("embeddings.") for key in state)
    renames = (*(_HUGGING_FACE if hugging_face else ()), *_EVERYWHERE)
    renamed: State = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if not _NO_WEIGHTS.search(name):
            renamed[name] = value
    if hugging_face:
        renamed = _join_query_key_value(renamed)
    renamed = _relative_or_fused(renamed)
    if any(key.startswith("class_attention.") for key in renamed) and "cls_token" in renamed:
        renamed = _class_attention(renamed)
    if {"cls_token", "cls_token_mlp.fc1.weight", "cls_token_mlp.fc2.weight"} <= renamed.keys():
        renamed["cls_token"] = _tec_class_token(renamed)
    if {"reg_token", "pos_embed", "cls_token"} <= renamed.keys():
        renamed = _position_into_class_token(renamed)
    return renamed


def split_extras(state: State, rest: Mapping[str, Tensor]) -> tuple[State, dict[str, State]]:
    """The trunk's weights, and everything else by name; `rest` is what stood beside the network in its container."""
    trunk = {key: value for key, value in state.items() if _TRUNK.match(key)}
    extras: dict[str, State] = {}
    for key, value in {**rest, **{key: value for key, value in state.items() if key not in trunk}}.items():
        name = next(name for name, pattern in _EXTRAS if re.match(pattern, key))
        extras.setdefault(name, {})[key] = value
    return trunk, extras


def _join_query_key_value(state: State) -> State:
    """One qkv from three; where the key has no bias (BEiT), q_bias and v_bias stay apart."""
    joined = dict(state)
    for key in state:
        if not key.endswith(".attn.query.weight"):
            continue
        stem = key.removesuffix("query.weight")
        for kind in ("weight", "bias"):
            parts = [joined.pop(f"{stem}{part}.{kind}", None) for part in ("query", "key", "value")]
            present = [part for part in parts if part is not None]
            if len(present) == 3:
                joined[f"{stem}qkv.{kind}"] = torch.cat(present)
            elif parts[0] is not None and parts[2] is not None:
                joined |= {f"{stem}q_bias": parts[0], f"{stem}v_bias": parts[2]}
    return joined


def _relative_or_fused(state: State) -> State:
    """BEiT's family. A bias shared by all blocks is given to each; without relative bias a block is a plain ViT's."""
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    result = {key: value for key, value in state.items() if not key.startswith("rel_pos_bias.")}
    if shared is not None:
        for number in {key.split(".")[1] for key in state if key.startswith("blocks.")}:
            name = f"blocks.{number}.attn.relative_position_bias_table"
            result[name] = result[name] + shared if name in result else shared
    if any(key.endswith("relative_position_bias_table") for key in result):
        return result
    plain: State = {}
    for key, value in result.items():
        stem = key.removesuffix("q_bias")
        if key.endswith("attn.q_bias") and stem + "v_bias" in result:
            plain[stem + "qkv.bias"] = torch.cat([value, torch.zeros_like(value), result[stem + "v_bias"]])
        elif not key.endswith("attn.v_bias"):
            plain[re.sub(r"^(blocks\.\d+)\.gamma_(\d)$", r"\1.ls\2.gamma", key)] = value
    return plain


def _class_attention(state: State) -> State:
    """The class token belongs to the blocks that it enters; where these have no layer scale, it is one."""
    result = {"class_attention.cls_token" if key == "cls_token" else key: value for key, value in state.items()}
    for key, value in state.items():
        if key.startswith("class_attention.") and key.endswith(".norm1.weight"):
            for number in (1, 2):
                result.setdefault(key.replace("norm1.weight", f"gamma_{number}"), torch.ones_like(value))
    return result


def _tec_class_token(state: State) -> Tensor:
    """TEC's input adapter: the class token is MLP(cls), without a residual, so it can be merged for good."""
    first, second = ((state[f"cls_token_mlp.{fc}.weight"], state[f"cls_token_mlp.{fc}.bias"]) for fc in ("fc1", "fc2"))
    return F.linear(F.gelu(F.linear(state["cls_token"], *first)), *second)


def _position_into_class_token(state: State) -> State:
    """DINOv2 with registers gives positions to [cls; patches]; timm's form of it has positions for patches alone."""
    slots = state["pos_embed"].shape[1]
    side = round((slots - 1) ** 0.5)
    if side * side != slots - 1:
        return state
    merged = {"cls_token": state["cls_token"] + state["pos_embed"][:, :1], "pos_embed": state["pos_embed"][:, 1:]}
    return {**state, **merged}
