"""The table of checkpoint formats: how each project writes its files, and which network in them it evaluates.

A file may hold several networks (student and teacher), each under a container ("teacher", "state_dict", ...) and a
prefix ("backbone.", "momentum_encoder.", ...; "module." of DDP is ignored everywhere). A format is recognized by the
networks it holds and by a few telling keys. To add one, add a row.

Head count and LayerNorm eps are not in a state dict. All formats here use timm's eps of 1e-6 unless the row says so,
and 64 channels a head unless `heads` says so. Input normalization is ImageNet's unless the row says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ssl_bench.evaluate.architecture import HALF

Place = tuple[str, str]  # container, prefix without "module."


@dataclass(frozen=True)
class Format:
    """One row: where the networks are, which one its authors evaluate, and what the weights do not tell."""

    name: str
    networks: Mapping[str, Place]  # role -> place; the first is the one evaluated, unless by_protocol says another
    has: tuple[str, ...] = ()  # regular expressions: every one is found in some key of the file
    lacks: tuple[str, ...] = ()  # ... none is found
    by_protocol: Mapping[str, str] = field(default_factory=dict)  # protocol -> role
    heads: Mapping[int, int] = field(default_factory=dict)  # width -> heads, where not width / 64
    known: Mapping[str, object] = field(default_factory=dict)  # fields of Architecture
    note: str = ""


_MODEL: dict[str, Place] = {"model": ("model", "")}
_FLAT: dict[str, Place] = {"model": ("", "")}
_PAIR: dict[str, Place] = {"teacher": ("teacher", "backbone."), "student": ("student", "backbone.")}
_BASE: dict[str, Place] = {"student": ("state_dict", "base_encoder.")}
_MOMENTUM: dict[str, Place] = {"teacher": ("state_dict", "momentum_encoder.")}

_DINO: dict[str, object] = {"position_resize": "dino"}
_REGISTERS: dict[str, object] = {
    "position_resize": "antialias"
}  # DINOv2 corrected its interpolation with the registers
_INCEPTION: dict[str, object] = {"mean": HALF, "std": HALF}
# transformers' default, used where no configuration lies beside the weights.
_TRANSFORMERS: dict[str, object] = {"eps": 1e-12}
_BEIT = (r"attn\.q_bias$", r"relative_position_bias_table$")

# The first row that fits wins, so rows with telling keys stand before general ones.
FORMATS: tuple[Format, ...] = (
    Format(
        "moca",
        {"teacher": ("model", "encoder_teacher."), "student": ("model", "encoder.")},
        has=(r"^encoder_teacher\.",),
    ),
    # CAE's small model has 12 heads; its position embeddings are fixed sin-cos, its q and v biases are separate.
    Format(
        "cae",
        {"student": ("model", "encoder."), "teacher": ("model", "teacher.")},
        has=(r"^encoder\..*q_bias$", r"^(pretext_neck|teacher)\."),
        heads={384: 12},
    ),
    Format("simmim", {"model": ("model", "encoder.")}, has=(r"^decoder\.0\.",)),
    Format("sdae", {"student": ("model", ""), "teacher": ("model_teacher", "")}, has=(r"^model_teacher$",)),
    Format("tec-training", _MODEL, has=(r"^cls_token_mlp\.",), note="the class token is merged: cls = MLP(cls)"),
    Format(
        "extrema",
        {**_MOMENTUM, **_BASE},
        has=(r"\.blocks_token\.",),
        # Linear probing and k-NN read the teacher's class token; fine-tuning starts from the student's trunk.
        by_protocol={"finetune": "student", "semseg": "student", "detection": "student"},
    ),
    Format("moco-v3", {**_BASE, **_MOMENTUM}, heads={384: 12}),
    Format("msn", {"teacher": ("target_encoder", ""), "student": ("encoder", "")}),
    Format("gmml", {"model": ("SiT_model", "backbone.")}),
    Format("mc-ssl", _PAIR, has=(r"^head_recons\.", r"^head\.data_layer"), known=_DINO),
    Format("sit", _PAIR, has=(r"^head_recons\.",), known=_DINO),
    Format("dinov2-registers", _PAIR, has=(r"\.register_tokens$", r"\.ls1\.gamma$"), known=_REGISTERS),
    Format("dinov2", _PAIR, has=(r"\.mask_token$", r"\.ls1\.gamma$"), known=_DINO),
    Format("ibot", _PAIR, has=(r"^ibot_loss|\.masked_embed$",), known=_DINO),
    Format("dino", _PAIR, known=_DINO),
    # timm's own training script, which keeps its average as state_dict_ema.
    Format("timm-training", {"model": ("state_dict", ""), "ema": ("state_dict_ema", "")}, has=(r"^head\.weight$",)),
    Format("ibot-backbone", {"model": ("state_dict", "")}, known=_DINO),
    # data2vec fine-tunes its student, and pre-trains with ImageNet's mean and std, unlike BEiT, whose code it shares.
    Format("data2vec", {"student": ("model", ""), "teacher": ("model_ema", "")}, has=("^model_ema$", *_BEIT)),
    Format("beit", _MODEL, has=_BEIT, known=_INCEPTION),
    Format("beit", {"model": ("module", "")}, has=_BEIT, known=_INCEPTION),  # deepspeed's container
    Format("beit", _FLAT, has=_BEIT, known=_INCEPTION),
    Format(
        "mae-finetuned",
        _MODEL,
        has=(r"^fc_norm\.", r"^head\."),
        lacks=(r"^norm\.weight$",),
        note="fc_norm acts after pooling: the tokens have no final norm",
    ),
    Format("mae", _MODEL, note="MAE's form, which MOCA's extracted teachers have too"),
    Format("hf-dinov2", _FLAT, has=(r"layer_scale1\.lambda1$", r"embeddings\.register_tokens$"), known=_REGISTERS),
    Format("hf-dinov2", _FLAT, has=(r"layer_scale1\.lambda1$",), known=_DINO),
    Format(
        "hf-beit",
        _FLAT,
        has=(r"attention\.query\.", r"relative_position_bias_table$"),
        known=_TRANSFORMERS | _INCEPTION,
    ),
    Format("hf-vit-mae", _FLAT, has=(r"attention\.query\.", r"^decoder\.decoder_layers\."), known=_TRANSFORMERS),
    Format("hf-vit", _FLAT, has=(r"attention\.query\.",), known=_TRANSFORMERS | _INCEPTION),
    Format("dinov2-registers", _FLAT, has=(r"^register_tokens$", r"\.ls1\.gamma$"), known=_REGISTERS),
    Format("dinov2", _FLAT, has=(r"^mask_token$", r"\.ls1\.gamma$"), known=_DINO),
    Format("tec-release", _FLAT, lacks=(r"^norm\.weight$", r"^fc_norm\.", r"^head\.")),
    Format("timm", _FLAT, note="plain timm names, as DINO's backbones and timm's files have"),
)


def recognize(places: Iterable[Place], keys: Iterable[str]) -> Format | None:
    """The first format that knows every network of the file and finds its telling keys; None if no row fits."""
    held, text = set(places), "\n".join(keys)
    for row in FORMATS:
        if (
            held <= set(row.networks.values())
            and all(re.search(part, text, re.MULTILINE) for part in row.has)
            and not any(re.search(part, text, re.MULTILINE) for part in row.lacks)
        ):
            return row
    return None
