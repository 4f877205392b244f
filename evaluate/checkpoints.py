"""Open any checkpoint: recognize who wrote it, choose the network that its authors evaluate, check that it fits.

    open_checkpoint("x.pth")                    a file (torch, safetensors), or a folder of ours or Hugging Face's
    open_checkpoint("timm:vit_small_patch16_224.dino")
    open_checkpoint("hf:facebook/dinov2-base")
    open_checkpoint("random:vit_tiny_patch16_224")   never trained; also random:vit_96x4x3_patch8_48
    open_checkpoint("pixels:")                  no network: the image itself

Opening reads the weights and names them as timm does. The network is built only when somebody asks for it, so a run
whose features are cached never builds it. It is built under one rule: at least 95 % of its parameters come from the
file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl_bench.errors import UserError, unknown
from ssl_bench.evaluate.architecture import (
    HALF,
    Architecture,
    State,
    from_plain,
    infer,
    overrule,
    parse_name,
    read_overrides,
)
from ssl_bench.evaluate.formats import Format, Place, recognize
from ssl_bench.evaluate.naming import canonical_names, split_extras
from ssl_bench.evaluate.weights import find_networks, read_file
from ssl_bench.files import expanded, remembered

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Backbone, Pixels

LEAST_MATCHED_PERCENT = 95.0
# Names that every project gives to its files: the folder's name tells more.
_NO_NAME = re.compile(r"(checkpoint|model|pytorch_model|last|best|weights|latest|teacher|student)([-_.]?\d+)?")


@dataclass(frozen=True)
class Match:
    """How the file's weights met the network's parameters. Percent of parameters, not of names."""

    matched_percent: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights in timm's names, what they are, and where they come from."""

    spec: str
    name: str
    format: str
    key: str  # which network of the file: teacher, student, model, ...
    architecture: Architecture
    weights_sha256: str
    notes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # the file's other networks
    extras: Mapping[str, State] = field(default_factory=dict)  # projector, predictor, adapters, decoder, ...
    origin: Mapping[str, object] = field(default_factory=dict)  # what `ssl-bench pretrain` says of it
    _weights: Callable[[], State] = dict  # drawn or read only when they are needed

    @functools.cached_property
    def state(self) -> State:
        """The backbone's weights under timm's names."""
        return self._weights()

    @functools.cached_property
    def backbone(self) -> Backbone | Pixels:
        """The network, built, loaded and in eval mode. Refused when less than 95 % of it is in the file."""
        from ssl_bench.evaluate.backbone import Pixels, build, load_canonical

        if self.format == "pixels":
            return Pixels(self.architecture.patch_px).eval()
        self.require_match()
        # What little is missing is drawn, and drawn alike every time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build(self.architecture)
        load_canonical(network, {key: value for key, value in self.state.items() if key not in self.match.unexpected})
        return network.eval()

    def require_match(self) -> None:
        """Refuse when less than 95 % of the network is in the file."""
        match = self.match
        if match.matched_percent < LEAST_MATCHED_PERCENT:
            raise UserError(
                f"{self.spec}: only {match.matched_percent:.1f} % of the parameters of {self.architecture.name} are in "
                f"the file ({self.key}); at least {LEAST_MATCHED_PERCENT:.0f} % are needed, since the rest would be "
                f"random. Missing: {_some(match.missing)}. Not used: {_some(match.unexpected)}. "
                f"See `ssl-bench inspect {self.spec}`."
            )

    @functools.cached_property
    def match(self) -> Match:
        """Names and shapes of the file against those of the network, remembered by content."""
        if self.format == "pixels":
            return Match(100.0, (), ())
        key = {"weights": self.weights_sha256, "architecture": dataclasses.asdict(self.architecture)}
        answer = remembered("match", key, self._compare)
        return Match(answer["matched_percent"], tuple(answer["missing"]), tuple(answer["unexpected"]))

    def _compare(self) -> dict[str, object]:
        from ssl_bench.evaluate.backbone import build, canonical_state

        with torch.device("meta"):  # names and shapes alone
            expected = canonical_state(build(self.architecture))
        fits = {key for key, value in expected.items() if key in self.state and self.state[key].shape == value.shape}
        matched, total = sum(expected[key].numel() for key in fits), sum(value.numel() for value in expected.values())
        return {
            "matched_percent": 100.0 * matched / total,
            "missing": sorted(set(expected) - fits),
            "unexpected": sorted(set(self.state) - fits),
        }

    def require_extra(self, name: str) -> State:
        """A part beyond the trunk that a protocol needs, or an error that says which parts there are."""
        if name not in self.extras:
            raise UserError(
                f"{self.spec} holds no {name}; beyond the backbone it holds: {', '.join(self.extras) or 'nothing'}."
            )
        return self.extras[name]


def open_checkpoint(
    spec: str | Path,
    *,
    key: str | None = None,
    protocol: str | None = None,
    arch: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Open `spec`. `key` chooses the network in a file of several; else `protocol` does, as the method's authors would.

    `arch` says what the file does not (heads, eps, mean, std, image_px, position_resize), as strings; `seed` draws
    the weights of `random:`.
    """
    spec = str(spec)
    known = read_overrides(arch or {})
    kind, _, rest = spec.partition(":") if ":" in spec else ("", "", "")
    if kind in ("pixels", "random", "timm") and key is not None:
        raise UserError(f"{spec}: --checkpoint-key {key}: it holds one network, so there is nothing to choose.")
    if kind == "pixels" and known:
        raise UserError(f"{spec}: --arch {next(iter(known))}: pixels have no architecture to speak of.")
    if kind == "pixels":
        return _pixels(spec, rest)
    if kind == "random":
        return _random(spec, rest, seed, known)
    if kind == "timm":
        return _from_timm(spec, rest, known)
    if kind == "hf":
        from ssl_bench.evaluate.hub import download

        return _from_file(spec, download(rest), f"hf-{rest.replace('/', '-')}", key, protocol, known=known)
    path = expanded(spec)
    return _from_file(spec, path, _model_name(path), key, protocol, known=known)


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """The identity of a network: names, shapes and float32 values of its weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def _from_file(
    spec: str, path: Path, name: str, key: str | None, protocol: str | None, *, known: dict[str, object]
) -> Checkpoint:
    content, beside = read_file(path)
    if "ssl_bench" in content:
        return _own(spec, name, content, key, protocol, known=known)
    networks, keys = find_networks(content, path)
    row = recognize(networks, keys)
    roles = _roles(row, list(networks))
    role = _choose(spec, row, roles, key, protocol)
    everything, container_rest = networks[roles[role]]
    state, extras = split_extras(canonical_names(everything), container_rest)
    _refuse_windows(spec, state)
    width = int(state["patch_embed.proj.weight"].shape[0])
    told: dict[str, object] = {}
    if row:
        told = {**row.known} | ({"heads": row.heads[width]} if width in row.heads else {})
    try:  # a configuration beside the weights knows better than the table, and the user best
        architecture = infer(state, told | beside | known)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    notes = [row.note if row else "no known project writes files of this form; timm's names were found and used"]
    if not architecture.final_norm:
        notes.append("no final norm in the file: norm = identity")
    return Checkpoint(
        spec=spec,
        name=name,
        format=row.name if row else "unknown",
        key=role,
        architecture=architecture,
        weights_sha256=weights_sha256(state),
        notes=tuple(note for note in notes if note),
        others=tuple(sorted(set(roles) - {role})),
        extras=extras,
        _weights=lambda: state,
    )


def _own(
    spec: str, name: str, content: Mapping[str, Any], key: str | None, protocol: str | None, *, known: dict[str, object]
) -> Checkpoint:
    """What save_checkpoint wrote."""
    parts = [content.get(part) for part in ("architecture", "networks", "by_protocol", "extras", "origin")]
    if content["ssl_bench"] != 1 or not all(isinstance(part, dict) for part in parts) or not content["networks"]:
        version = content["ssl_bench"]
        raise UserError(f"{spec}: written by another version of ssl-bench (file version {version}, this one reads 1).")
    networks: dict[str, State] = content["networks"]
    role = key or content["by_protocol"].get(protocol or "", next(iter(networks)))
    if role not in networks:
        raise UserError(f"{spec}: {unknown('--checkpoint-key', str(key), list(networks))}")
    state = networks[role]
    try:
        architecture = overrule(from_plain(content["architecture"]), known)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    return Checkpoint(
        spec=spec,
        name=name,
        format="ssl-bench",
        key=role,
        architecture=architecture,
        weights_sha256=weights_sha256(state),
        others=tuple(sorted(set(networks) - {role})),
        extras=content["extras"],
        origin=content["origin"],
        _weights=lambda: state,
    )


def _roles(row: Format | None, places: list[Place]) -> dict[str, Place]:
    """The file's networks under the names that users choose by."""
    if row is not None:
        return {role: place for role, place in row.networks.items() if place in places}
    return {"/".join(part.rstrip(".") for part in place if part) or "model": place for place in places}


def _choose(spec: str, row: Format | None, roles: Mapping[str, Place], key: str | None, protocol: str | None) -> str:
    """Which network to measure: the user's word, else the protocol's custom, else the format's."""
    if key is None:
        if row is None and len(roles) > 1:
            raise UserError(
                f"{spec} holds {len(roles)} networks and its format is not known, so which one to measure must be "
                "said: " + " or ".join(f"--checkpoint-key {role}" for role in sorted(roles))
            )
        custom = row.by_protocol.get(protocol or "", "") if row else ""
        return custom if custom in roles else next(iter(roles))
    if key in roles:
        return key
    # The file's own names serve too (encoder_teacher, target_encoder), where they mean one network.
    meant = [role for role, place in roles.items() if key in (place[0], place[1].rstrip("."))]
    if len(meant) != 1:
        raise UserError(f"{spec}: {unknown('--checkpoint-key', key, roles)}")
    return meant[0]


def _refuse_windows(spec: str, state: State) -> None:
    """ViTDet's and SAM's blocks differ from a plain ViT's only by these tables, so most of them would seem to fit."""
    sizes = sorted({(len(value) + 1) // 2 for name, value in state.items() if name.endswith(".attn.rel_pos_h")})
    if sizes:
        raise UserError(
            f"{spec}: its blocks hold relative positions (attn.rel_pos_h) for windows of "
            f"{' and '.join(map(str, sizes))} patches a side, as ViTDet's and SAM's do; ssl-bench measures plain "
            "vision transformers. Give the checkpoint from which that network was trained: recipes with windows make "
            "relative positions of their own."
        )


def _pixels(spec: str, rest: str) -> Checkpoint:
    if rest:
        raise UserError(f"{spec!r}: nothing stands behind pixels:, since it has no weights.")
    patch_px = 8
    architecture = Architecture(
        dim=3 * patch_px**2, depth=1, heads=1, patch_px=patch_px, image_px=0, mlp_dim=0, mean=HALF, std=HALF
    )
    digest = hashlib.sha256(b"pixels: flattened image, normalized to [-1, 1]").hexdigest()
    return Checkpoint(
        spec=spec, name="pixels", format="pixels", key="none", architecture=architecture, weights_sha256=digest
    )


def _random(spec: str, name: str, seed: int, known: dict[str, object]) -> Checkpoint:
    """A network that was never trained. Its identity is remembered, so that cached features are found without timm."""
    shape = parse_name(name)

    def draw() -> State:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if shape is None:
                return _timm_state(spec, name, pretrained=False)
            from ssl_bench.evaluate.backbone import build, canonical_state

            return canonical_state(build(shape))

    def identify() -> dict[str, object]:
        state = draw()
        architecture = shape or infer(state, _timm_facts(name))
        return {"weights_sha256": weights_sha256(state), "architecture": dataclasses.asdict(architecture)}

    origin: dict[str, object] = {"random": name, "seed": seed}
    # Another torch or timm may draw other numbers.
    answer = remembered("random", {**origin, "torch": version("torch"), "timm": version("timm")}, identify)
    return Checkpoint(
        spec=spec,
        name=f"random-{name}",
        format="random",
        key="none",
        architecture=overrule(from_plain(answer["architecture"]), known),
        weights_sha256=answer["weights_sha256"],
        notes=(f"never trained: timm's initialization, seed {seed}",),
        origin=origin,
        _weights=draw,
    )


def _from_timm(spec: str, name: str, known: dict[str, object]) -> Checkpoint:
    state = _timm_state(spec, name, pretrained=True)
    return Checkpoint(
        spec=spec,
        name=f"timm-{name}",
        format="timm",
        key="model",
        architecture=infer(state, _timm_facts(name) | known),
        weights_sha256=weights_sha256(state),
        _weights=lambda: state,
    )


def _timm_state(spec: str, name: str, *, pretrained: bool) -> State:
    from ssl_bench.evaluate.hub import timm_model

    state, _ = split_extras(canonical_names(timm_model(spec, name, pretrained=pretrained).state_dict()), {})
    return state


def _timm_facts(name: str) -> dict[str, object]:
    from ssl_bench.evaluate.hub import timm_facts

    return timm_facts(name)


def _model_name(path: Path) -> str:
    """A name for people: the file's, or its folder's where every file is called the same."""
    stem = path.name.removesuffix(".tar").removesuffix(path.suffix if path.suffix != ".tar" else Path(path.stem).suffix)
    if path.is_dir() or _NO_NAME.fullmatch(stem):
        folder = path if path.is_dir() else path.parent
        return folder.resolve().name or stem
    return stem


def _some(names: tuple[str, ...], count: int = 4) -> str:
    shown = ", ".join(names[:count]) or "nothing"
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def describe(checkpoint: Checkpoint) -> dict[str, object]:
    """What `ssl-bench inspect` prints."""
    match = checkpoint.match
    return {
        "spec": checkpoint.spec,
        "model": checkpoint.name,
        "format": checkpoint.format,
        "checkpoint_key": checkpoint.key,
        "other_networks": list(checkpoint.others),
        "arch": checkpoint.architecture.name,
        "architecture": json.loads(json.dumps(dataclasses.asdict(checkpoint.architecture))),
        "weights_sha256": checkpoint.weights_sha256,
        "matched_percent": match.matched_percent,
        "missing": list(match.missing),
        "unexpected": list(match.unexpected),
        "extras": {name: sum(value.numel() for value in state.values()) for name, state in checkpoint.extras.items()},
        "origin": dict(checkpoint.origin),
        "notes": list(checkpoint.notes),
    }
