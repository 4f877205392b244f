"""Models by name, from timm and from the Hugging Face hub. Nothing is downloaded unless the user names it."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssl_bench.errors import UserError, unknown

_WEIGHT_FILES = ["*.json", "*.safetensors", "pytorch_model.bin"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PATIENCE_SECONDS = 5.0

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
    base, _, tag = name.partition(".")
    if tag and name not in (tagged := timm.list_pretrained(f"{base}.*")):
        raise unknown("timm model", name, tagged)
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
    with _quick_hub() as reachable:
        try:
            return timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # the hub raises errors of many libraries
            reason = f"{type(error).__name__}: {error}" if reachable else _UNREACHABLE
            raise UserError(
                f"{spec}: timm could not give the weights of {name} ({reason}). Without a network, "
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
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"hf:{repository}: expected hf:owner/name, for example hf:facebook/dino-vits16.")
    import huggingface_hub

    with _quick_hub() as reachable:
        try:
            return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_WEIGHT_FILES))
        except Exception as error:  # the hub raises errors of many libraries
            reason = type(error).__name__ if reachable else _UNREACHABLE
            raise UserError(
                f"hf:{repository}: the Hugging Face hub did not give it ({reason}). Without a network, "
                "download the repository where there is one and give the folder's path."
            ) from error


_UNREACHABLE = "the Hugging Face hub cannot be reached, and its cache on this machine does not hold the file"


@contextlib.contextmanager
def _quick_hub() -> Iterator[bool]:
    """Whether the hub answers; if not, its client looks into its cache alone, where it would try again for a minute."""
    from huggingface_hub import constants

    logger = logging.getLogger("huggingface_hub")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    reachable = _hub_answers()
    try:
        logger.setLevel(logging.ERROR)  # our message says it; a warning for each attempt would stand before it
        constants.HF_HUB_OFFLINE = offline or not reachable
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    with contextlib.suppress(Exception):  # the errors of whichever library the client's version speaks through
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_SECONDS)  # as the client: with the user's proxies
        return True
    return False
