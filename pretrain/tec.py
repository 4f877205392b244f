"""TEC: a new model learns from masked images what a frozen, finished one sees in whole ones, and surpasses it.

Gao, Zhou, Cheng, Yan: Towards Sustainable Self-supervised Learning (Target-Enhanced Conditional pre-training).

    ssl-bench pretrain tec --data DIR --base mae_pretrain_vit_base.pth --out DIR        the first row below
    ssl-bench pretrain tec/ibot-b --data DIR --base checkpoint_teacher.pth --out DIR

The base may be any checkpoint that opens, one of TEC's own too (Table 10). Of the whole image it gives two targets:
    feature     the mean of its last two blocks, each channel normalized over the patches (Eq. 3)
    attention   where the class token and the k patches that it attends to most attend to, in every head of the last
                block, with softmax temperature tau
The new model sees a quarter of the patches. Its class token passes an MLP first (input adapter), the features of all
its blocks are merged and adapted (encoder adapter, Eqs. 1-2), and two shared decoder blocks predict both targets from
target-specific projections and mask tokens (Eqs. 4-5). Adapters and decoder are not part of the saved backbone: the
MLP is merged into its class token, and they stand beside it as extras (evaluate/adapters.py).

Where paper and official code differ:
- The k patches: highest mean over heads of the attention map (paper, followed), or of the logits before the softmax
  (code, row mae-b-code).
- Z_a has no scale in the paper's formula; the code's width^-.5 is followed (`scale`).
- Two layers give queries and keys (paper, followed); the code has one of twice the width, so xavier draws smaller
  numbers there. Keys have no bias here: it would add the same to all logits of a row.
- Eq. 4 is a sum; as in the code it is the mean over channels and masked patches. Eq. 3's sigma is the standard
  deviation, with the unbiased variance over all patches; "variance" in the text is a slip.
- LayerNorms around the encoder adapter are the code's.
- A_s has L keys, without the class token; the softmax is over these alone, as in the code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.adapters import EncoderAdapter, InputAdapter, block_outputs
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.backbone import Backbone, canonical_state, load_canonical
from ssl_bench.evaluate.checkpoints import Checkpoint
from ssl_bench.evaluate.training.loader import Draws, Views
from ssl_bench.pretrain.method import Method, Saved, Training
from ssl_bench.pretrain.networks import (
    EPS,
    MaskTokens,
    decoder_blocks,
    gathered,
    initialize_as_mae,
    kept_patches,
    standardized,
    student,
)

NEEDS_BASE = True


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """TEC's settings."""

    mask_ratio: float
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    adapters: Literal["none", "input", "both"]
    blocks_per_adapter: int  # neighbors that an encoder adapter merges
    target_blocks: int  # of the base, the last so many are averaged
    normalization: Literal["none", "channel", "patch"]  # of the feature target
    attention: Literal["none", "cls", "all", "selected"]  # whose attention is a target
    ranking: Literal["map", "logits"]  # what selects the patches (paper, code)
    top_k: int
    temperature: float  # of the base's attention; the prediction has none
    scale: Literal["width", "head", "none"]  # of predicted logits: width^-.5 (code), (width / heads)^-.5, 1 (paper)
    load_base: bool  # start from the base's weights

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio={self.mask_ratio:g}: expected a share between 0 and 1.")
        for name in ("decoder_dim", "decoder_depth", "decoder_heads", "blocks_per_adapter", "target_blocks", "top_k"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature:g}: expected a positive number.")


# Tables 13 and 14, MAE (ViT-base).
_MAE_B = Recipe(
    arch="vit_base_patch16_224",
    epochs=300,
    batch=4096,
    base_lr=1.5e-4,
    min_lr=0.0,
    warmup_epochs=40.0,
    horizon=1.0,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    weight_decay_end=0.05,
    clip=None,
    clip_each=False,
    drop_path=0.0,
    augmentation="mae",
    mask_ratio=0.75,
    decoder_dim=512,
    decoder_depth=2,
    decoder_heads=16,
    adapters="both",
    blocks_per_adapter=3,
    target_blocks=2,
    normalization="patch",
    attention="selected",
    ranking="map",
    top_k=15,
    temperature=1.8,
    scale="width",
    load_base=False,
    source="TEC, Tables 13 and 14 (base: MAE ViT-B, 1600 epochs); sail-sg/TEC for what they leave open",
    published="ImageNet fine-tuning 84.7 (Table 5)",
)
_IBOT_B = replace(
    _MAE_B,
    top_k=9,
    temperature=1.0,
    source="TEC, Tables 13 and 14 (base: iBOT ViT-B, 1600 epochs); sail-sg/TEC for what they leave open",
    published="ImageNet fine-tuning 84.8 (Table 5)",
)
_MAE300 = "TEC, Table 11d (base: MAE ViT-B, 300 epochs, which MAE's authors have not released)"
# Ablations: 300 epochs, the base in the table's name. Adapters and attention are added one by one (Table 12).
_A, _B, _E, _12 = (f"TEC, Table {number}" for number in ("11a", "11b", "11e", "12"))
_TUNED = "ImageNet fine-tuning"
_MAE_PLAIN = replace(_MAE_B, attention="none", adapters="none")
_IBOT_PLAIN = replace(_IBOT_B, adapters="none")

# fmt: off
RECIPES: dict[str, Recipe] = {
    "mae-b":            _MAE_B,
    "mae-b-800ep":      replace(_MAE_B, epochs=800,
                                published="ImageNet fine-tuning 84.8 (Table 5), linear 69.8, + input adapter 72.6, "
                                          "+ encoder adapter 79.9 (Table 8); ADE20K 49.9 mIoU (Table 6)"),
    "mae-b-code":       replace(_MAE_B, ranking="logits", source="sail-sg/TEC, main_pretrain.py"),
    "ibot-b":           _IBOT_B,
    "ibot-b-800ep":     replace(_IBOT_B, epochs=800,
                                published="ImageNet fine-tuning 85.1 (Table 5); ADE20K 51.0 mIoU (Table 6)"),
    "mae-l":            replace(_MAE_B, arch="vit_large_patch16_224", decoder_dim=768, temperature=1.4,
                                source="TEC, Tables 13 and 14 (base: MAE ViT-L, 1600 epochs); sail-sg/TEC",
                                published="ImageNet fine-tuning 86.5 (Table 5)"),
    # A second round. The paper names no k and tau for a base of TEC's: assumption those of its own base, iBOT.
    "tec-b-800ep":      replace(_IBOT_B, epochs=800, source="TEC, Table 10 (base: TEC_iBOT, 800 epochs)",
                                published="ImageNet fine-tuning 85.2 (Table 10)"),
    # An unfinished base. The code's warm-up is 40 epochs also in the short run.
    "mae300-b":         replace(_MAE_B, source=_MAE300, published="ImageNet fine-tuning 84.3 (Table 11d)"),
    "mae300-b-100ep":   replace(_MAE_B, epochs=100, source=_MAE300, published="ImageNet fine-tuning 83.9 (Table 11d)"),

    "11a-none":         replace(_MAE_PLAIN, normalization="none", source=_A, published=f"{_TUNED} 83.9"),
    "11a-channel":      replace(_MAE_PLAIN, normalization="channel", source=_A, published=f"{_TUNED} 83.9"),
    "11a-patch":        replace(_MAE_PLAIN, source=_A, published=f"{_TUNED} 84.2; 11b, no adapter; 12, row 1"),
    "11b-input":        replace(_MAE_PLAIN, adapters="input", source=_B, published=f"{_TUNED} 84.3"),
    "11b-both":         replace(_MAE_PLAIN, adapters="both", source=_B, published=f"{_TUNED} 84.6; 12, row 3"),
    "11c-load":         replace(_IBOT_B, load_base=True, source="TEC, Table 11c", published=f"{_TUNED} 84.4"),
    "11e-none":         replace(_IBOT_PLAIN, attention="none", source=_E, published=f"{_TUNED} 84.5; 12, row 1"),
    "11e-cls":          replace(_IBOT_PLAIN, attention="cls", source=_E, published=f"{_TUNED} 84.5"),
    "11e-all":          replace(_IBOT_PLAIN, attention="all", source=_E, published=f"{_TUNED} 84.6"),
    "11e-selected":     replace(_IBOT_PLAIN, source=_E, published=f"{_TUNED} 84.7; 12, row 2"),
    "12-mae-attention": replace(_MAE_B, adapters="none", source=_12, published=f"{_TUNED} 84.3 (row 2)"),
    "12-ibot-adapters": replace(_IBOT_B, attention="none", source=_12, published=f"{_TUNED} 84.7 (row 3)"),

    "toy":              replace(_MAE_B, arch="vit_96x4x3_patch8_48", epochs=20, batch=128, base_lr=2e-3,
                                warmup_epochs=2.0, augmentation="toy-mae", decoder_dim=64, decoder_heads=4,
                                blocks_per_adapter=2, top_k=5, source="ours, for toy images", published=""),
}
# fmt: on


def draw(recipe: Recipe, architecture: Architecture, rng: np.random.Generator) -> Draws:
    """The order of an image's patches: the first are visible, the others masked."""
    return (rng.permutation(architecture.grid**2),)


def make(recipe: Recipe, architecture: Architecture, base: Checkpoint | None) -> TEC:
    """A new model of this architecture, and the base, which stays as it is."""
    if base is None:
        raise UserError(
            "TEC learns from a finished model, and none was given. Name its checkpoint: --base CKPT "
            "(the file of an MAE, an iBOT, another TEC, ...)."
        )
    _check(recipe, architecture, base)
    network = base.backbone
    if not isinstance(network, Backbone):
        raise UserError(f"--base {base.spec}: it is no network, so there is nothing to learn from it.")
    new = student(architecture, drop_path=recipe.drop_path)
    if recipe.load_base:
        load_canonical(new, canonical_state(network))  # with its positions, which then stay fixed as well
    return TEC(recipe, new, network)


def _check(recipe: Recipe, architecture: Architecture, base: Checkpoint) -> None:
    """Refuse a base that does not fit, before it is built."""
    given, patches = base.architecture, architecture.grid**2
    where = f"--base {base.spec} ({given.name})"
    if given.dim != architecture.dim:
        raise UserError(
            f"{where} has width {given.dim}, the new model {architecture.name} has {architecture.dim}. TEC predicts "
            "the base's channels: give a base of that width, or train a new model of the base's (--set arch=...)."
        )
    if given.patch_px != architecture.patch_px:
        raise UserError(
            f"{where} has patches of {given.patch_px} px, the new model {architecture.name} has patches of "
            f"{architecture.patch_px} px. Patch by patch there must be one to learn from: use the same patch size "
            "(--set arch=...)."
        )
    if given.depth < recipe.target_blocks:
        raise UserError(f"target_blocks={recipe.target_blocks}, but {where} has {given.depth} block(s).")
    if recipe.attention != "none" and not given.cls:
        raise UserError(
            f"{where} has no class token among its patches, whose attention is a target of TEC. Learn from its "
            "features alone: --set attention=none"
        )
    if recipe.attention == "selected" and recipe.top_k > patches:
        raise UserError(f"top_k={recipe.top_k}: expected at most the {patches} patches of {architecture.name}.")
    if recipe.adapters == "both" and architecture.depth % recipe.blocks_per_adapter:
        raise UserError(
            f"blocks_per_adapter={recipe.blocks_per_adapter} does not divide the {architecture.depth} blocks of "
            f"{architecture.name}: choose a divisor (--set blocks_per_adapter=...)."
        )
    if recipe.load_base:
        indifferent = ("position_resize", "eps")
        for field in dataclasses.fields(Architecture):
            theirs, ours = getattr(given, field.name), getattr(architecture, field.name)
            if theirs != ours and field.name not in indifferent:
                raise UserError(
                    f"load_base=true: {where} has {field.name}={theirs}, the new model {ours}. Weights can be taken "
                    "from a network of the same form only; start without them: --set load_base=false"
                )


class TargetDecoder(nn.Module):
    """Shared blocks that predict every target from its own projection, mask token and norm. (appendix A)"""

    def __init__(self, recipe: Recipe, grid: int, base: Architecture, encoder_dim: int) -> None:
        super().__init__()
        dim = recipe.decoder_dim
        targets = ["feature"] if recipe.attention == "none" else ["feature", "attention"]
        self.tokens = nn.ModuleDict({target: MaskTokens(encoder_dim, dim, grid) for target in targets})
        self.blocks = decoder_blocks(dim, recipe.decoder_depth, recipe.decoder_heads)
        self.norms = nn.ModuleDict({target: nn.LayerNorm(dim, eps=EPS) for target in targets})
        self.feature = nn.Linear(dim, base.dim)
        self.heads = base.heads
        self.scale = {"width": base.dim, "head": base.dim // base.heads, "none": 1}[recipe.scale] ** -0.5
        if "attention" in targets:
            self.query = nn.Linear(dim, base.dim)
            self.key = nn.Linear(dim, base.dim, bias=False)  # a bias would cancel in the softmax over keys

    def forward(self, z: Tensor, visible: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """Z_e (B, 1 + n, D) of the visible patches -> for every target (B, 1 + N, d): CLS, visible, masked patches."""
        inputs = [tokens(z[:, 0], z[:, 1:], visible, masked) for tokens in self.tokens.values()]
        decoded = self.blocks(torch.cat(inputs)).chunk(len(inputs))  # one pass for all targets
        return {name: self.norms[name](part) for name, part in zip(self.tokens, decoded, strict=True)}

    def attention_logits(self, decoded: Tensor, rows: Tensor) -> Tensor:
        """(B, 1 + N, d) and places (B, k) of patches in it -> Z_a before the softmax: (B, heads, 1 + k, N).

        Rows are those of CLS and the k patches; keys are the patches, in the order of `decoded`.
        """
        patches = decoded[:, 1:]
        query = self.query(torch.cat([decoded[:, :1], gathered(patches, rows)], dim=1))
        query, key = (x.reshape(len(x), x.shape[1], self.heads, -1).transpose(1, 2) for x in (query, self.key(patches)))
        logits: Tensor = (query * self.scale) @ key.transpose(-2, -1)
        return logits


class TEC(Method):
    """The new model with its adapters and decoder, and the base."""

    def __init__(self, recipe: Recipe, network: Backbone, base: Backbone) -> None:
        super().__init__()
        architecture = network.architecture
        dim, depth = architecture.dim, architecture.depth
        self.recipe = recipe
        self.kept = kept_patches(architecture.grid**2, recipe.mask_ratio)
        self.base = base.requires_grad_(False).eval()
        self.student = network
        self.input_adapter: InputAdapter | None = None
        self.encoder_adapter: EncoderAdapter | None = None
        if recipe.adapters != "none":
            self.input_adapter = InputAdapter(dim, 4 * dim)
            initialize_as_mae(self.input_adapter)
            network.vit.cls_token.requires_grad_(False)  # the adapter's is used instead
            self.input_adapter.cls_token.data.copy_(network.vit.cls_token)
        if recipe.adapters == "both":
            self.encoder_adapter = EncoderAdapter(
                dim, depth, blocks_per_group=recipe.blocks_per_adapter, hidden=4 * recipe.decoder_dim
            )
            initialize_as_mae(self.encoder_adapter)
        self.decoder = TargetDecoder(recipe, architecture.grid, base.architecture, dim)
        initialize_as_mae(self.decoder)
        # Views are normalized for the student; the base may have been trained with other numbers (BEiT: .5).
        mean, std, base_mean, base_std = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
            for values in (architecture.mean, architecture.std, base.architecture.mean, base.architecture.std)
        )
        self.rescale: Tensor
        self.shift: Tensor
        self.register_buffer("rescale", (std / base_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - base_mean) / base_std).float(), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """The base is never in training mode."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, views: Views) -> dict[str, Tensor]:
        """The feature loss of the masked patches, and the attention loss."""
        (images,), (order,) = views.images, views.draws
        visible, masked = order[:, : self.kept], order[:, self.kept :]
        features, attention = self.of_base(images)
        z = self.encode(images, visible)
        decoded = self.decoder(z, visible, masked)
        target = gathered(feature_target(features, self.recipe.normalization), masked)
        predicted = self.decoder.feature(decoded["feature"][:, 1 + self.kept :]).float()
        losses = {"feature": F.mse_loss(predicted, target)}  # Eq. 4
        if attention is not None:
            rows = chosen_patches(attention, self.base.n_prefix, self.recipe)
            target_map = attention_target(
                attention, rows, order, prefix=self.base.n_prefix, temperature=self.recipe.temperature
            )
            places = order.argsort(dim=1).gather(1, rows)  # where the decoder has these patches
            logits = self.decoder.attention_logits(decoded["attention"], places).float()
            losses["attention"] = -(target_map * logits.log_softmax(-1)).sum(-1).mean()  # Eq. 5
        if self.watching:
            self.embedding = z[:, 1:].detach().float().mean(1)
            self.vitals["feature_explained"] = 1 - losses["feature"].detach() / target.var()
            if attention is not None:
                entropy = torch.special.entr(target_map).sum(-1).mean()
                self.vitals["attention_kl"] = losses["attention"].detach() - entropy
        return losses

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Z_e of the visible patches (B, n): (B, 1 + n, D), the class token first."""
        class_token = None if self.input_adapter is None else self.input_adapter()
        blocks = block_outputs(self.student, images, class_token=class_token, keep=visible)
        if self.encoder_adapter is None:
            return blocks[-1]
        z: Tensor = self.encoder_adapter(blocks)
        return z

    @torch.no_grad()
    def of_base(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Raw patch tokens of the last blocks (B, N, D), and the last block's attention logits (B, heads, T, T)."""
        looked_at = () if self.recipe.attention == "none" else (-1,)
        layers = range(-self.recipe.target_blocks, 0)
        output = self.base(
            images * self.rescale + self.shift, layers=layers, norm=False, attention=looked_at, logits=True
        )
        features = [tokens.patches.flatten(1, 2) for tokens in output.tokens]
        return features, output.attention[0] if looked_at else None

    def saved(self) -> Saved:
        """The new model with the input adapter merged into its class token; the other parts beside it."""
        network = self.student if self.input_adapter is None else self.input_adapter.merged_into(self.student)
        parts = {
            "input_adapter": self.input_adapter,
            "encoder_adapter": self.encoder_adapter,
            "decoder": self.decoder,
        }
        return Saved(
            {"model": network}, extras={name: part.state_dict() for name, part in parts.items() if part is not None}
        )


def feature_target(features: Sequence[Tensor], normalization: Literal["none", "channel", "patch"]) -> Tensor:
    """Y_f: the mean of the blocks' outputs (B, N, D), in float32; each channel normalized over the patches (Eq. 3)."""
    mean = torch.stack([x.float() for x in features]).mean(0)
    if normalization == "none":
        return mean
    return standardized(mean, dim=1 if normalization == "patch" else 2)


def chosen_patches(logits: Tensor, prefix: int, recipe: Recipe) -> Tensor:
    """The patches whose attention is a target, beside that of CLS: (B, k), from logits (B, heads, T, T)."""
    batch, patches = len(logits), logits.shape[-1] - prefix
    if recipe.attention == "cls":
        return torch.zeros(batch, 0, dtype=torch.long, device=logits.device)
    if recipe.attention == "all":
        return torch.arange(patches, device=logits.device).expand(batch, -1)
    of_cls = logits[:, :, 0].float()
    if recipe.ranking == "map":
        of_cls = of_cls.softmax(-1)
    return of_cls[..., prefix:].mean(1).topk(recipe.top_k, dim=1).indices


def attention_target(logits: Tensor, rows: Tensor, keys: Tensor, *, prefix: int, temperature: float) -> Tensor:
    """A_s: (B, heads, 1 + k, N), the attention of CLS and the patches `rows` (B, k) to the patches, ordered as `keys`.

    The softmax is over patches alone: what went to the class token is shared out.
    """
    heads, patches = logits.shape[1], logits.shape[-1] - prefix
    to_patches = logits[..., prefix:]
    of_rows = to_patches[:, :, prefix:].gather(2, rows[:, None, :, None].expand(-1, heads, -1, patches))
    chosen = torch.cat([to_patches[:, :, :1], of_rows], dim=2)
    ordered = chosen.gather(3, keys[:, None, None].expand(-1, heads, chosen.shape[2], -1))
    return (ordered.float() / temperature).softmax(-1)
