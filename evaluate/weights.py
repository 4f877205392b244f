"""Read checkpoint files safely: tensors and plain values, never arbitrary code."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import pickle
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import State
from ssl_bench.evaluate.formats import Place

# What published checkpoints hold beside tensors: MAE's argparse.Namespace, numpy scalars (best accuracy), paths.
# Nothing on this list can execute anything when it is loaded. The names are those that files use, old and new.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),  # SimMIM's settings, a dictionary; yacs need not be installed
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PurePosixPath, f"{module}.PurePosixPath") for module in ("pathlib", "pathlib._local")),
    np.dtype,
    # The function behind every pickled numpy scalar; numpy 2 moved it.
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")),
]
_WEIGHTS = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.ckpt", "*.tar")
_PREFERRED = ("checkpoint.pt", "model.safetensors", "pytorch_model.bin")  # ours, then Hugging Face's
_NOT_WEIGHTS = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"<!doctype": "a web page; the download went wrong",
    b"<html": "a web page; the download went wrong",
    b"version https:/": "a Git LFS pointer; fetch the file itself",
    b"\x89png": "a picture",
    b"\xff\xd8\xff": "a picture",
}
_MARK = re.compile(r"(|.*\.)(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight")
_BLOCK = re.compile(r"(blocks|encoder\.layer)\.\d+\.")


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, object]]:
    """The content of a checkpoint, and what a configuration beside it says of the architecture."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(
            f"checkpoint {str(path)!r} does not exist. "
            "Give a file, a folder, timm:NAME, hf:REPO, random:ARCH or pixels:"
        )
    return _read_weights(path), {}


def find_networks(content: Mapping[str, Any], path: Path) -> tuple[dict[Place, tuple[State, State]], list[str]]:
    """Every vision transformer in the file: place -> (its weights, what stands beside it); and all keys of the file."""
    containers = {"": _tensors(content)} | {
        str(name): _tensors(value) for name, value in content.items() if isinstance(value, Mapping)
    }
    networks: dict[Place, tuple[State, State]] = {}
    for container, state in containers.items():
        prefixes = {match[1] for key in state if (match := _MARK.fullmatch(key))}
        for prefix in prefixes:
            mine, rest = _part(state, prefix, prefixes)
            if any(_BLOCK.match(key) for key in mine):  # else a Swin transformer, a decoder, half a network
                networks[container, prefix] = (mine, rest)
    # transformers names its trunk vit., dinov2., ...: there is but one, so the prefix says nothing.
    if len(networks) == 1:
        ((network, rest),) = networks.values()
        if any(key.startswith("embeddings.") for key in network):
            networks = {("", ""): (network, rest)}
    keys = [key for state in containers.values() for key in state] + [str(key) for key in content]
    if not networks:
        raise UserError(f"{path}: {_what_it_is(keys)}")
    return networks, keys


def _part(state: State, prefix: str, prefixes: set[str]) -> tuple[State, State]:
    """The network under `prefix`, and what belongs to no network."""
    mine: State = {}
    rest: State = {}
    for key, value in state.items():
        owner = max((p for p in prefixes if key.startswith(p)), key=len, default=None)
        if owner == prefix:
            mine[key.removeprefix(prefix)] = value
        elif owner is None:
            rest[key] = value
    return mine, rest


def _what_it_is(keys: list[str]) -> str:
    if any(re.search(r"layer1\.0\.conv1\.weight$", key) for key in keys):
        return "these are the weights of a ResNet; ssl-bench measures vision transformers."
    if any(re.search(r"layers\.0\.blocks\.0\.att\w+\.", key) for key in keys):
        return "these are the weights of a Swin transformer; ssl-bench measures plain vision transformers."
    if any("visual.transformer.resblocks" in key for key in keys):
        return "these are OpenAI-CLIP weights; convert them to timm's names (timm:vit_base_patch16_clip_224...)."
    shown = ", ".join(keys[:5]) or "nothing"
    return (
        "no vision transformer was found, that is no patch_embed.proj.weight beside blocks.0..., nor what Hugging Face "
        f"calls them. The file holds: {shown}{' ...' if len(keys) > 5 else ''}"
    )


def _tensors(value: Mapping[Any, Any]) -> State:
    """A mapping's tensors, under their names without DDP's and torch.compile's prefixes."""
    return {
        re.sub(r"\b(module|_orig_mod)\.", "", str(key)): entry
        for key, entry in value.items()
        if isinstance(entry, Tensor)
    }


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, object]]:
    found = next((folder / name for name in _PREFERRED if (folder / name).is_file()), None)
    if found is None:
        candidates = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
        if len(candidates) != 1:
            names = ", ".join(path.name for path in candidates[:8]) or "none"
            raise UserError(
                f"{folder}: expected one weights file in the folder, found {names}. Give the file's own path."
            )
        found = candidates[0]
    return _read_weights(found), _configuration(folder)


def _configuration(folder: Path) -> dict[str, object]:
    """What Hugging Face's and timm's configuration files say that the weights do not."""
    config: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        with contextlib.suppress(OSError, ValueError):
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(content, dict):
                config |= content | (content.get("pretrained_cfg") or {})
    renamed = {"num_attention_heads": "heads", "layer_norm_eps": "eps"}
    facts: dict[str, object] = {ours: config[theirs] for theirs, ours in renamed.items() if theirs in config}
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std"), ("mean", "mean"), ("std", "std")):
        if isinstance(config.get(theirs), list) and len(config[theirs]) == 3:
            facts[ours] = tuple(float(value) for value in config[theirs])
    return facts


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    for magic, what in _NOT_WEIGHTS.items():
        if head.lstrip().lower().startswith(magic):
            raise UserError(f"{path} is not a checkpoint: it is {what}.")
    content = _read_safetensors(path) if _is_safetensors(path, head) else _read_torch(path, head)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}, expected a dictionary of tensors. "
            "Save the state_dict of the model."
        )
    return dict(content)


def _is_safetensors(path: Path, head: bytes) -> bool:
    if path.suffix == ".safetensors":
        return True
    # The format begins with the length of its JSON header.
    return len(head) == 16 and struct.unpack("<Q", head[:8])[0] < path.stat().st_size and head[8:10] == b'{"'


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    try:
        state: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    return state


def _read_torch(path: Path, head: bytes) -> Any:
    # torch's format since 1.6 is a zip archive, which can be mapped: tensors that nobody needs (the optimizer's) are
    # not read, and a file may be larger than memory.
    mapped = head.startswith(b"PK")
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old pickles warn of typed storages
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden is None:
            raise _unreadable(path, mapped) from error
        raise UserError(
            f"{path} holds {forbidden[1]}, which loading would have to import and could execute; it was not loaded. "
            "If you trust the file, load it yourself and save the state_dict alone."
        ) from error
    except Exception as error:  # a damaged file can make the unpickler raise nearly anything
        raise _unreadable(path, mapped) from error


def _unreadable(path: Path, zipped: bool) -> UserError:
    """Without torch's own reason, which is that of its unpickler ("Unsupported operand 149") or just a number."""
    if zipped:
        return UserError(
            f"{path} is not a checkpoint that torch can read: it begins like a torch file, but is damaged, cut off or "
            "another kind of zip archive. Fetch it again."
        )
    return UserError(
        f"{path} is not a checkpoint: it is neither a torch file, nor a pickle of tensors, nor safetensors, or it is "
        "damaged. Fetch it again, or save the state_dict of the model with torch.save."
    )
