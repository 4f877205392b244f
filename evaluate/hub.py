"""Models by name, from timm and from the Hugging Face hub. Nothing is downloaded unless the user names it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from ssl_bench.errors import UserError, unknown

_WEIGHT_FILES = ["*.json", "*.safetensors", "pytorch_model.bin"]


# The modules that Backbone runs or rebuilds from weights alone. Another activation, norm or block would have the same
# names and shapes, and silently give other numbers.
_KNOWN_PARTS = {
    *("Block", "Attention", "Linear", "LayerNorm", "Mlp", "GELU", "Dropout", "DropPath", "Identity", "LayerScale"),
    *("GluMlp", "SiLU"),  # SwiGLUPacked
    *("Sequential", "ModuleList"),
}


def timm_model(spec: str, name: str, *, pretrained: bool) -> Any:
    """A VisionTransformer or Beit of timm's, without its classifier."""
    import timm
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models(["vit_*", "deit*", "beit*"]))
    with torch.device("meta"):
        skeleton = timm.create_model(name, num_classes=0)
    supported = isinstance(skeleton, VisionTransformer | Beit)
    strange = {type(part).__name__ for part in skeleton.blocks.modules()} - _KNOWN_PARTS if supported else set()
    if not supported or strange:
        raise UserError(
            f"{spec}: {', '.join(sorted(strange)) or type(skeleton).__name__} is not supported; ssl-bench measures "
            "timm's plain VisionTransformer and Beit (most names that start with vit_, deit_ or beit_)."
        )
    if not pretrained:
        return timm.create_model(name, num_classes=0)
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub raises errors of many libraries
        raise UserError(
            f"{spec}: timm could not give the weights of {name} ({type(error).__name__}: {error}). Without a network, "
            "download the file where there is one and give its path."
        ) from error


@functools.cache
def timm_facts(name: str) -> dict[str, object]:
    """What the state dict of a timm model does not tell."""
    with torch.device("meta"):
        model = timm_model(f"timm:{name}", name, pretrained=False)
    first, config = model.blocks[0], model.default_cfg
    facts: dict[str, object] = {"heads": first.attn.num_heads, "eps": first.norm1.eps, "position_resize": "antialias"}
    return facts | {key: tuple(config[key]) for key in ("mean", "std") if config.get(key)}


def download(repository: str) -> Path:
    """The folder of a Hugging Face repository's weights and configuration."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_WEIGHT_FILES))
    except Exception as error:  # the hub raises errors of many libraries
        raise UserError(
            f"hf:{repository}: the Hugging Face hub did not give it ({type(error).__name__}). Without a network, "
            "download the repository where there is one and give the folder's path."
        ) from error
