"""What is known of a checkpoint, in the words of the papers: its method, shape, epochs and data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ssl_bench.leaderboards.published import Cell
from ssl_bench.leaderboards.record import Record

# What a file's format says of its method. Not here: "mae", since MOCA's extracted teachers have that form too.
_METHOD_OF_FORMAT = {
    "moca": "MOCA",
    "tec-training": "TEC",
    "tec-release": "TEC",
    "extrema": "ExtreMA",
    "sdae": "SdAE",
    "hf-vit-mae": "MAE",
    "dino": "DINO",
    "ibot": "iBOT",
    "ibot-backbone": "iBOT",
    "msn": "MSN",
    "moco-v3": "MoCo-v3",
    "beit": "BEiT",
    "hf-beit": "BEiT",
    "data2vec": "data2vec",
    "sit": "SiT",
    "mc-ssl": "MC-SSL",
    "cae": "CAE",
    "simmim": "SimMIM",
    "random": "Random",
}


@dataclass(frozen=True)
class Origin:
    """What is known of where some weights come from. Whatever does not fit counts as not said."""

    method: str = ""  # as the file's format says it
    made: Mapping[str, Any] = field(default_factory=dict)  # what our own checkpoints say of their pre-training

    @property
    def epochs(self) -> str:
        """Fewer than the recipe's, if it was stopped."""
        recipe = self.made.get("resolved_recipe")
        planned = recipe.get("epochs") if isinstance(recipe, Mapping) else None
        done = self.made.get("epochs_done", planned)
        return f"{done:g}" if isinstance(done, (int, float)) and not isinstance(done, bool) else ""

    def told(self, arch: str) -> dict[str, str]:
        """As the paper would say it, of a network of this shape."""
        data = self.made.get("data")
        return {
            "arch": paper_arch(arch),
            "epochs": self.epochs,
            "pretrain_data": data if isinstance(data, str) else "",
        }


def origins(results: Iterable[Record]) -> dict[tuple[str, str], Origin]:
    """By model and weights. Records of one checkpoint may say more or less: what the fullest says."""
    found: dict[tuple[str, str], Origin] = {}
    for record in results:
        made = record.details.get("pretraining")
        made = made if isinstance(made, Mapping) else {}
        method = _METHOD_OF_FORMAT.get(record.checkpoint.format, "")
        who = (record.model, record.weights_sha256)
        known = found.setdefault(who, Origin())
        if method > known.method or (made and made != known.made):
            fullest = max(known.made, made, key=lambda each: (len(each), repr(sorted(each.items(), key=str))))
            found[who] = Origin(max(known.method, method), fullest)
    return found


def said_of(cell: Cell) -> dict[str, str]:
    """What the paper says of the network, where it says it."""
    return {name: cell.field(name) for name in _IDENTITY}


def contradictions(told: Mapping[str, str], said: Mapping[str, str]) -> list[str]:
    """Where what is known of a checkpoint is not what the paper says: "epochs: 4, not 200"."""
    return [
        f"{words}: {told[name]}, not {said[name]}"
        for name, words in _IDENTITY.items()
        if told.get(name)
        and said.get(name)
        and told[name] != said[name]
        and not told[name].startswith(f"{said[name]}/")  # ViT-B/16 is a ViT-B
    ]


_IDENTITY = {"arch": "architecture", "epochs": "epochs", "pretrain_data": "pre-trained on"}
_SIZES = {"tiny": "T", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}


def paper_arch(arch: str) -> str:
    """As papers write it, where they do: vit_base_patch16_224 -> ViT-B/16."""
    match = re.match(r"(?:vit|beit)_([a-z]+)_patch(\d+)_", arch)
    return f"ViT-{_SIZES[match[1]]}/{match[2]}" if match and match[1] in _SIZES else arch


def our_arch(arch: str) -> str:
    """The other way round, for images of 224 px; empty for what has no such name."""
    match = re.fullmatch(r"ViT-([A-Za-z])/(\d+)", arch)
    size = next((size for size, letter in _SIZES.items() if match and letter == match[1]), "")
    return f"vit_{size}_patch{match[2]}_224" if match and size else ""
