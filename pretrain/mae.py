"""MAE: rebuild the pixels of hidden patches from the few that are left (He et al. 2022, arXiv 2111.06377).

    ssl-bench pretrain mae --data DIR --out DIR             the first row below: ViT-B, 1600 epochs
    ssl-bench pretrain mae/300ep --data DIR --out DIR

Three quarters of the patches, drawn anew for every image, are hidden. The encoder sees only the others (49 of 196) and
the class token. A light decoder gets what the encoder made of them, a learned mask token in every hidden place and
positions for all; a linear layer then predicts the pixels of each hidden patch. The loss is the mean squared error, on
the hidden patches only. In the target each patch is normalized by its own mean and standard deviation, which makes
better representations (Table 1d); without that the predictions are easier to look at.

MAE is no method of the five papers that this project is about. It is the baseline in all of them, and the base that
TEC starts from.

Code and paper agree, with one thing to know: in the official code normalized pixels are an option (`--norm_pix_loss`)
that is off by default, while the paper's best results, and so our rows, use them. Images are in ImageNet's
normalization when pixels are compared, as in the code; of the squared error without per-patch normalization that
changes the scale of the color channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.training.loader import Draws, Views
from ssl_bench.pretrain.method import Method, Saved, Training
from ssl_bench.pretrain.networks import (
    Decoder,
    gathered,
    initialize_as_mae,
    kept_patches,
    patchify,
    standardized,
    student,
)


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """MAE's settings."""

    mask_ratio: float
    normalize_pixels: bool  # each patch of the target by its own mean and standard deviation
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio={self.mask_ratio:g}: expected a share between 0 and 1, for example 0.75.")
        if min(self.decoder_dim, self.decoder_depth, self.decoder_heads) < 1:
            raise UserError(
                f"decoder_dim={self.decoder_dim}, decoder_depth={self.decoder_depth}, decoder_heads="
                f"{self.decoder_heads}: expected at least 1 of each; the paper's decoder is 512, 8, 16."
            )


# Table 8, and Section 4.1 for mask and decoder. No drop path, no clipping.
_PAPER = Recipe(
    arch="vit_base_patch16_224", epochs=1600, batch=4096, base_lr=1.5e-4, min_lr=0.0, warmup_epochs=40, horizon=1.0,
    betas=(0.9, 0.95), weight_decay=0.05, weight_decay_end=0.05, clip=None, clip_each=False, drop_path=0.0,
    augmentation="mae", mask_ratio=0.75, normalize_pixels=True, decoder_dim=512, decoder_depth=8, decoder_heads=16,
    source="MAE, Tables 3 and 8",
    published="fine-tuning 83.6 (Table 3), linear 68.0 (Table 12; 67.8 in SdAE, Table 2)",
)  # fmt: skip
_LARGE = replace(_PAPER, arch="vit_large_patch16_224")

# fmt: off
RECIPES: dict[str, Recipe] = {
    "paper":        _PAPER,
    "800ep":        replace(_PAPER, epochs=800,
                            source="MAE, Table 8 at 800 epochs; SdAE, Table 7",
                            published="fine-tuning 83.4, COCO 47.8 AP^b, ADE20K 47.3 mIoU (SdAE, Table 7)"),
    "300ep":        replace(_PAPER, epochs=300,
                            source="MAE, Table 8 at 300 epochs; SdAE, Table 2. Assumption: the warm-up stays",
                            published="fine-tuning 82.9, linear 61.5 (SdAE, Table 2); 82.9 (TEC)"),
    "vit-l":        replace(_LARGE,
                            source="MAE, Tables 3 and 8",
                            published="fine-tuning 85.9 (Table 3), linear 75.8 (Table 12)"),

    # Table 1d compares targets on ViT-L at 800 epochs.
    "normalized":   replace(_LARGE, epochs=800,
                            source="MAE, Table 1d",
                            published="fine-tuning 85.4, linear 73.9"),
    "unnormalized": replace(_LARGE, epochs=800, normalize_pixels=False,
                            source="MAE, Table 1d",
                            published="fine-tuning 84.9, linear 73.5"),

    "toy":          replace(_PAPER, arch="vit_96x4x3_patch8_48", epochs=25, batch=128, base_lr=4e-3, warmup_epochs=3,
                            augmentation="toy-mae", decoder_dim=64, decoder_depth=2, decoder_heads=4,
                            source="ours, for the built-in data",
                            published="none"),
}
# fmt: on


def draw(recipe: Recipe, architecture: Architecture, rng: np.random.Generator) -> Draws:
    """The patches in random order: the first are visible, the others hidden. (N,)"""
    return (rng.permutation(architecture.grid**2),)


def make(recipe: Recipe, architecture: Architecture, base: Any) -> Mae:
    """The encoder and the decoder, initialized. `base` is not used."""
    return Mae(recipe, architecture)


class Mae(Method):
    """Encoder, decoder, and the linear layer to pixels."""

    def __init__(self, recipe: Recipe, architecture: Architecture) -> None:
        super().__init__()
        self.n_visible = kept_patches(architecture.grid**2, recipe.mask_ratio)
        self.patch_px = architecture.patch_px
        self.normalize_pixels = recipe.normalize_pixels
        self.encoder = student(architecture, drop_path=recipe.drop_path)
        self.decoder = Decoder(
            architecture.dim, recipe.decoder_dim, recipe.decoder_depth, recipe.decoder_heads, architecture.grid
        )
        self.predict = nn.Linear(recipe.decoder_dim, 3 * architecture.patch_px**2)
        initialize_as_mae(self.decoder)
        initialize_as_mae(self.predict)

    def forward(self, views: Views) -> dict[str, Tensor]:
        """The mean squared error of the hidden patches' pixels."""
        (images,), (order,) = views.images, views.draws
        visible_ids, masked_ids = order[:, : self.n_visible], order[:, self.n_visible :]
        tokens = self.encoder(images, keep=visible_ids).tokens[0]
        decoded = self.decoder(tokens.cls, tokens.patches, visible_ids, masked_ids)
        predicted = self.predict(decoded[:, -masked_ids.shape[1] :]).float()  # (B, m, 3 p^2)
        target = self.targets(images, masked_ids)
        loss = F.mse_loss(predicted, target)
        if self.watching:
            self.vitals["explained"] = 1 - loss.detach() / target.var()  # share of the pixels' variance
            self.embedding = tokens.patch_mean.detach()
        return {"pixels": loss}

    def targets(self, images: Tensor, masked_ids: Tensor) -> Tensor:
        """The pixels of the hidden patches. (B, m, 3 p^2), float32"""
        pixels = gathered(patchify(images, self.patch_px), masked_ids).float()
        return standardized(pixels) if self.normalize_pixels else pixels

    def saved(self) -> Saved:
        """The encoder; the decoder with its last layer as `predict.*`, for pictures of reconstructions."""
        last = {f"predict.{name}": value for name, value in self.predict.state_dict().items()}
        return Saved({"model": self.encoder}, extras={"decoder": {**self.decoder.state_dict(), **last}})
