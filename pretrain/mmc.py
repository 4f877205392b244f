"""MMC, Masked Momentum Contrastive learning (Wu et al., "Masked Momentum Contrastive Learning for Zero-shot Semantic
Understanding").

    ssl-bench pretrain mmc --data DIR --out DIR              the first row below: ViT-B/16, ImageNet-1k, 400 epochs
    ssl-bench pretrain mmc --recipe ablation-cls-pat --data DIR --out DIR

A student sees two global views of an image with most of their pixels replaced by noise or by another image; a teacher,
its moving average, sees them clean. Three terms with weight 1 (Eq. 4):

- L_REC (Eq. 1): a head on the student's patch tokens predicts the replaced pixels; L1.
- L_CLS (Eq. 3): the student's class token finds the teacher's of the same image among those of other images; InfoNCE.
- L_PAT (Eq. 2): every patch token of the student finds the teacher's at the same place among patches of other images.

Local crops, which are not masked, go through the student and get L_CLS only.

There is no official code. The paper fixes: the three terms, their weights and temperature; independent heads, 3-layer
MLPs of width 4096; AdamW, weight decay .04, learning rate 7.5e-4 to 1e-6; the teacher's momentum .996 to 1, cosine;
batch 48; epochs; color jitter (.4, .4, .4), blur, solarization .2; 75 % noise, 30 % from another image, which 35 % of
images get. What it leaves open is assumed, mostly as in the code of its relatives SiT, MC-SSL and GMML:

 1. Batch 48 is a GPU's, of 8: 5e-4 (theirs, for 256) * 384 / 256 is exactly 7.5e-4. `batch-48` takes it as written.
 2. Warm-up of 10 epochs, constant weight decay, drop path .1 in the student, gradients clipped at 3 a tensor (SiT).
 3. Learnable positions, brought to other sizes as DINO does; class token and all linear layers truncated normal of
    .02 (SiT), in the heads too.
 4. Heads of L_CLS and L_PAT: linear, norm, ReLU, linear, norm, GELU, linear to 256, norm without parameters (SiT's
    class head), with batch norm over the global batch. `head_norm=layer` has LayerNorm, and none at the end.
 5. The head of L_REC: linear, GELU, linear, GELU, linear, without norm. `rec_head=convolution` is SiT's.
 6. L_CLS compares different views, in both directions ("global agreement for the CLS token across views", Fig. 3), and
    each local crop with both teacher views: the mean over all these pairs, as DINO and iBOT do.
 7. L_PAT compares the same place of the same view, for all patches, covered or not: Eq. 2 sums over all P, without the
    mask of Eq. 1. Negatives are all teacher patches of the same view of *other images*, as the text says: other
    patches of the image itself, which may show the same object, are neither positive nor negative.
 8. Negatives come from the whole batch, over all processes; no queue, no predictor (SiT). L_CLS is Eq. 3 without SiT's
    factor 2 T.
 9. L_REC is the mean over replaced pixels and channels (SiT, GMML); Eq. 1 divides by the number of all pixels
    instead: `rec_over=all`, still a mean over the channels. Targets are the normalized pixels of the clean view.
10. The 75 % and 30 % are GMML's two largest areas: noise covers U(.5, .75) of a view, another image .3 of it. A view
    has one or the other, not both; each view is drawn by itself. Blocks have sides up to .3 of the image's and are not
    aligned to patches (GMML's defaults). See blockwise.py.
11. 10 local crops of 96 px, area (.05, .25), beside global ones of area (.25, 1) (MC-SSL). The paper has multi-crop
    views "without masking for the teacher"; taken as DINO's: the student sees local crops, the teacher global views.
12. Which network is evaluated is not said. It is the teacher, as for DINO, iBOT and SiT; reconstruction is the
    student's, who alone learns it and sees masked images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.backbone import Backbone, build
from ssl_bench.evaluate.training.augment import augmentation_named
from ssl_bench.evaluate.training.blockwise import KEPT, Corruption, check_blocks, draw_corruption
from ssl_bench.evaluate.training.distributed import mean_of_all
from ssl_bench.evaluate.training.loader import Draws, Views
from ssl_bench.evaluate.training.schedules import Progress, cosine
from ssl_bench.pretrain.contrast import info_nce, patch_info_nce
from ssl_bench.pretrain.method import Method, Saved, Training
from ssl_bench.pretrain.mmc_heads import contrast_head, pixel_convolution, pixel_mlp
from ssl_bench.pretrain.networks import move_teacher, teacher_of


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """MMC's settings."""

    rec_weight: float  # of the terms; 0 leaves the term and its head out
    cls_weight: float
    pat_weight: float
    temperature: float
    head_dim: int  # width of the three heads
    out_dim: int  # of the vectors that L_CLS and L_PAT compare
    head_norm: Literal["batch", "layer"]
    rec_head: Literal["mlp", "convolution"]
    rec_over: Literal["masked", "all"]  # L_REC is a mean over replaced pixels, or their sum over all pixels (Eq. 1)
    momentum: float  # of the teacher, at the start
    momentum_end: float
    noise_area: float  # largest target area of noise, of the image
    alien_area: float  # ... of another image's pixels
    alien_share: float  # of views that get another image's pixels
    block: float  # largest side of a block, of the image's
    align: int  # px; the patch size would align blocks with patches

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        weights = {name: getattr(self, name) for name in ("rec_weight", "cls_weight", "pat_weight")}
        if min(weights.values()) < 0 or not any(weights.values()):
            given = ", ".join(f"{name}={value:g}" for name, value in weights.items())
            raise UserError(f"{given}: expected no negative weight, and at least one above 0.")
        if self.temperature < 0.025:
            raise UserError(f"temperature={self.temperature:g}: expected at least 0.025; the paper's is 0.2.")
        if min(self.head_dim, self.out_dim) < 1:
            raise UserError(f"head_dim={self.head_dim}, out_dim={self.out_dim}: expected at least 1.")
        for name in ("momentum", "momentum_end", "alien_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name):g}: expected a number in [0, 1].")
        for name in ("noise_area", "alien_area"):
            if not 0 < getattr(self, name) <= 0.95:
                raise UserError(f"{name}={getattr(self, name):g}: expected a share above 0, at most 0.95.")
        if not 0 < self.block <= 1:
            raise UserError(f"block={self.block:g}: expected a share in (0, 1].")
        if self.batch < 2 and (self.cls_weight or self.pat_weight):
            raise UserError(f"batch={self.batch}: MMC contrasts images of the batch, so it needs at least 2.")


_VIT_B = Recipe(
    arch="vit_base_patch16_224", epochs=400, batch=384, base_lr=5e-4, min_lr=1e-6, warmup_epochs=10.0, horizon=1.0,
    betas=(0.9, 0.999), weight_decay=0.04, weight_decay_end=0.04, clip=3.0, clip_each=True, drop_path=0.1,
    augmentation="mmc",
    rec_weight=1.0, cls_weight=1.0, pat_weight=1.0, temperature=0.2,
    head_dim=4096, out_dim=256, head_norm="batch", rec_head="mlp", rec_over="masked",
    momentum=0.996, momentum_end=1.0,
    noise_area=0.75, alien_area=0.3, alien_share=0.35, block=0.3, align=1,
    source="MMC, Implementation Details and Supplementary; assumptions: docstring of pretrain/mmc.py",
    published="ImageNet-1k: COCO zero-shot 38.4 mIoU (Table 1), DAVIS 63.8 (Table 2), ADE20K frozen 37.0 (Table 3), "
    "IN-100 k-NN 90.04 patch mean, 89.94 CLS (Table 11)",
)  # fmt: skip
_VIT_S = replace(
    _VIT_B,
    arch="vit_small_patch16_224",
    epochs=500,
    published="IN-100: DAVIS 60.3 (Table 2)",
)
_400EP = replace(_VIT_S, epochs=400, source="MMC, Data Efficiency, Fig. 7", published="plotted only")
_TABLE_4 = replace(_VIT_S, epochs=200, source="MMC, Table 4", published="")
# In hundreds of steps a head outruns a slow teacher, whose vectors then say nothing of its own: with a momentum of
# .98 L_CLS stays at the level of chance. Blocks cover less, and are aligned with patches, of which there are few.
_TOY = replace(
    _VIT_B, arch="vit_96x4x3_patch8_48", epochs=15, batch=64, base_lr=4e-3, min_lr=1e-5, warmup_epochs=1.0,
    drop_path=0.0, augmentation="toy-mmc-2", head_dim=128, out_dim=64, momentum=0.8, momentum_end=0.99,
    noise_area=0.5, align=8, source="ours, for the toy world", published="",
)  # fmt: skip


def _ablation(terms: str, knn_cls: str, knn_pat: str, finetuned: str) -> Recipe:
    """A row of Table 4. Without L_CLS local crops would do nothing, so they are not made."""
    return replace(
        _TABLE_4,
        rec_weight=float("rec" in terms),
        cls_weight=float("cls" in terms),
        pat_weight=float("pat" in terms),
        augmentation="mmc" if "cls" in terms else "mmc-2",
        published=f"IN-100: k-NN CLS {knn_cls}, patch mean {knn_pat}; fine-tuned {finetuned} (Table 4)",
    )


# fmt: off
RECIPES: dict[str, Recipe] = {
    "vit-b":                _VIT_B,
    # The other reading of the text, one batch of 48 and not 8 of them, at the same rate: 4e-3 * 48 / 256 is 7.5e-4.
    "batch-48":             replace(_VIT_B, batch=48, base_lr=4e-3, published="as vit-b"),
    # On ImageNet-100.
    "vit-s":                _VIT_S,
    "vit-s-400ep":          _400EP,
    "no-multicrop":         replace(_400EP, augmentation="mmc-2"),  # "w/o" in Fig. 7
    # Table 4: which terms.           terms          k-NN CLS, patch mean, fine-tuned
    "ablation-rec":         _ablation("rec",         "17.18", "14.70", "89.94"),
    "ablation-cls":         _ablation("cls",         "75.02", "63.88", "90.62"),
    "ablation-pat":         _ablation("pat",         "39.92", "40.82", "87.84"),
    "ablation-cls-pat":     _ablation("cls pat",     "75.56", "75.54", "89.72"),
    "ablation-rec-pat":     _ablation("rec pat",     "33.54", "33.74", "89.40"),
    "ablation-rec-cls":     _ablation("rec cls",     "72.54", "53.68", "88.24"),
    "ablation-rec-cls-pat": _ablation("rec cls pat", "77.54", "76.96", "91.02"),
    # Other readings of what the paper leaves open, on Table 4's schedule.
    "assumption-layernorm": replace(_TABLE_4, head_norm="layer",
                                    source="MMC, Table 4; LayerNorm in the heads", published="not in the paper"),
    "assumption-sit-head":  replace(_TABLE_4, rec_head="convolution",
                                    source="MMC, Table 4; SiT's reconstruction head", published="not in the paper"),
    "assumption-equation1": replace(_TABLE_4, rec_over="all",
                                    source="MMC, Table 4; L_REC as Eq. 1 prints it", published="not in the paper"),
    "toy":                  _TOY,
    "toy-multicrop":        replace(_TOY, augmentation="toy-mmc"),
}
# fmt: on


def draw(recipe: Recipe, architecture: Architecture, rng: np.random.Generator) -> Draws:
    """What happens to the pixels of the two global views: maps (2, S, S) and places in the table of noise (2,)."""
    drawn = [
        draw_corruption(
            rng,
            architecture.image_px,
            noise_area=recipe.noise_area,
            alien_area=recipe.alien_area,
            alien_share=recipe.alien_share,
            block=recipe.block,
            align=recipe.align,
        )
        for _ in range(2)
    ]
    return np.stack([covered for covered, _ in drawn]), np.array([noise_at for _, noise_at in drawn])


def make(recipe: Recipe, architecture: Architecture, base: Any) -> MMC:
    """MMC from scratch; `base` is not used."""
    check_blocks(architecture.image_px, block=recipe.block, align=recipe.align)
    if not architecture.has_cls:
        raise UserError("MMC compares class tokens: it needs an architecture that has one.")
    if len(augmentation_named(recipe.augmentation)) < 2:
        raise UserError(f"augmentation={recipe.augmentation}: it gives one view, and MMC needs two global ones: mmc-2.")
    return MMC(recipe, architecture)


class MMC(Method):
    """The student, its teacher, and the three terms."""

    compares_images = True

    def __init__(self, recipe: Recipe, architecture: Architecture) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = Encoder(recipe, architecture)
        teacher = teacher_of(self.student)
        assert isinstance(teacher, Encoder)
        self.teacher = teacher
        self.reconstruction: nn.Module | None = None
        if recipe.rec_weight:
            dim, patch_px = architecture.dim, architecture.patch_px
            mlp = recipe.rec_head == "mlp"
            self.reconstruction = (
                pixel_mlp(dim, patch_px, width=recipe.head_dim) if mlp else pixel_convolution(dim, patch_px)
            )
        self.corruption = Corruption()

    def forward(self, views: Views) -> dict[str, Tensor]:
        """The terms that have a weight. Views: two global ones, then any number of local crops of one size."""
        recipe, (maps, noise_at) = self.recipe, views.draws
        clean, maps = torch.stack(views.images[:2]), maps.transpose(0, 1)  # (2, B, 3, S, S), (2, B, S, S)
        masked = self.corruption(clean, maps, noise_at.T)
        tokens = self.student.backbone(masked.flatten(0, 1)).tokens[0]  # of 2 B views
        terms: dict[str, Tensor] = {}
        if self.watching:
            self.vitals["masked"] = (maps != KEPT).float().mean()
            self.embedding = tokens.cls[: clean.shape[1]].detach().float()
        if self.reconstruction is not None:
            predicted = self.reconstruction(tokens.patches).unflatten(0, (2, -1))
            terms["rec"] = recipe.rec_weight * reconstruction_loss(predicted, clean, maps, over=recipe.rec_over)
        if recipe.cls_weight or recipe.pat_weight:
            with torch.no_grad():
                targets = self.teacher.backbone(clean.flatten(0, 1)).tokens[0]
        if recipe.cls_weight:
            terms["cls"] = recipe.cls_weight * self._cls(tokens.cls, views.images[2:], targets.cls)
        if recipe.pat_weight:
            terms["pat"] = recipe.pat_weight * self._pat(tokens.patches.flatten(1, 2), targets.patches.flatten(1, 2))
        return terms

    def _cls(self, student: Tensor, crops: Sequence[Tensor], teacher: Tensor) -> Tensor:
        """L_CLS of class tokens (2 B, D): both directions, and every local crop with both of the teacher's views."""
        batch = len(student) // 2
        if crops:
            local = self.student.backbone(torch.cat(tuple(crops))).tokens[0].cls
            student = torch.cat([student, local])  # one pass of the head, as in DINO: its batch norm sees all views
        queries = self.student.heads["cls"](student).unflatten(0, (-1, batch))  # (2 + L, B, C)
        with torch.no_grad():
            keys = self.teacher.heads["cls"](teacher).unflatten(0, (2, batch))
        if self.watching:
            self.vitals["cls_similarity"] = F.cosine_similarity(queries[0].float(), keys[1].float(), dim=-1).mean()
        losses = [
            info_nce(query, key, self.recipe.temperature)
            for seen, key in enumerate(keys)
            for view, query in enumerate(queries)
            if view != seen
        ]
        return torch.stack(losses).mean()

    def _pat(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L_PAT of patch tokens (2 B, P, D): same view, same place."""
        queries = self.student.heads["pat"](student.flatten(0, 1)).view(2, -1, student.shape[1], self.recipe.out_dim)
        with torch.no_grad():
            keys = self.teacher.heads["pat"](teacher.flatten(0, 1)).view_as(queries)
        if self.watching:
            self.vitals["pat_similarity"] = F.cosine_similarity(queries[0].float(), keys[0].float(), dim=-1).mean()
        losses = [patch_info_nce(queries[view], keys[view], self.recipe.temperature) for view in range(2)]
        return (losses[0] + losses[1]) / 2

    def after_step(self, now: Progress) -> None:
        """Move the teacher, heads included; the first step at the first momentum, as in BYOL, DINO and SiT."""
        done = (now.step - 1) / (now.steps_per_epoch * now.epochs)
        self.momentum = cosine(self.recipe.momentum, self.recipe.momentum_end, done)
        move_teacher(self.teacher, self.student, self.momentum)

    def saved(self) -> Saved:
        """Teacher and student; the teacher's projectors, and the student's way back to pixels."""
        extras = {_EXTRAS[name]: head.state_dict() for name, head in self.teacher.heads.items()}
        if self.reconstruction is not None:
            extras["reconstruction"] = self.reconstruction.state_dict()
        return Saved(
            networks={"teacher": self.teacher.backbone, "student": self.student.backbone},
            by_protocol={"reconstruction": "student"},
            extras=extras,
        )


_EXTRAS = {"cls": "projector", "pat": "patch_projector"}


class Encoder(nn.Module):
    """What student and teacher both are: a trunk, and a head for each of L_CLS and L_PAT that has a weight."""

    def __init__(self, recipe: Recipe, architecture: Architecture) -> None:
        super().__init__()
        self.backbone: Backbone = build(replace(architecture, position_resize="dino"), drop_path=recipe.drop_path)
        nn.init.trunc_normal_(self.backbone.vit.cls_token, std=0.02)
        self.heads = nn.ModuleDict()
        for name, weight in (("cls", recipe.cls_weight), ("pat", recipe.pat_weight)):
            if weight:
                self.heads[name] = contrast_head(
                    architecture.dim,
                    width=recipe.head_dim,
                    out_dim=recipe.out_dim,
                    by_batch=recipe.head_norm == "batch",
                )


def reconstruction_loss(predicted: Tensor, clean: Tensor, maps: Tensor, *, over: Literal["masked", "all"]) -> Tensor:
    """L1 between images (2, B, 3, S, S) at the pixels that the maps (2, B, S, S) say were replaced, mean over channels.

    `masked`: the mean over these pixels in all processes; `all`: their sum over the number of all pixels (Eq. 1).
    """
    replaced = (maps != KEPT).float()
    total = ((predicted.float() - clean.float()).abs().mean(2) * replaced).sum()
    if over == "all":
        return total / replaced.numel()
    # The loop takes the mean over processes: each divides by the mean count, not by its own.
    return total / mean_of_all(replaced.sum())
