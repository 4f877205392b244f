"""ExtreMA: a heavily masked image predicts the vector of the whole image (Wu et al., TMLR 2023, arXiv:2206.04667).

    ssl-bench pretrain extrema --data DIR --out DIR                the first row below, 80 % x 5 masks with colors
    ssl-bench pretrain extrema --data DIR --out DIR --recipe 90x8  one of the paper's ablations

Masking is the augmentation, and the supervision is BYOL's, in one direction only. A vision transformer without a class
token encodes patches; two class-attention blocks (CaiT) gather them into one vector; a projector and a predictor
follow. The student does this from each of several disjoint sets of visible patches of an image, the teacher (a moving
average of trunk, class attention and projector) once from all patches. The loss is |p - z|^2 = 2 - 2 cos(p, z) between
unit vectors, the mean over masks and images. The paper numbers no equation of it (section 3, "Learning Objective").
`loss=infonce` is MoCo-v3's contrastive loss instead (Table 6): 2 T times the cross-entropy over the global batch.

The teacher carries the class token that linear probes and k-NN read. Fine-tuning starts from the trunk's patches
(section 5.1), the student's as in the official script; segmentation and detection, which have none, are assumed to do
the same.

Paper and official code (microsoft/ExtreMA):
- Betas (.9, .95), 40 epochs of warm-up and drop path .1 (in the student's trunk) stand only in the code's README.
- "3 and 2 hidden layers" of projector and predictor are 3 and 2 linear layers in the code. The code is followed.
- The code moves the teacher between the student's forward and its own, before the optimizer's step. Here it moves after
  the step, with the momentum of the next one: every teacher forward sees the same weights, since the first move of the
  code's is one towards an equal student, and the last one here has momentum 1.
- The code cannot turn `disjoint` off, and its InfoNCE branch does not run (it reads an attribute that does not exist).
- Neither says how long the warm-up is in 30 epochs of ImageNet-22k: assumption 4, the same share of the steps. Neither
  has an implementation of the class-token designs of Fig. 5: "average" is the mean of the patches after the final norm.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture, named
from ssl_bench.evaluate.backbone import Backbone
from ssl_bench.evaluate.training.loader import Draws, Views
from ssl_bench.evaluate.training.schedules import Progress, cosine
from ssl_bench.pretrain.contrast import info_nce
from ssl_bench.pretrain.method import Method, Saved, Training
from ssl_bench.pretrain.networks import gathered, initialize_as_mae, kept_patches, move_teacher, student, teacher_of

ClassToken = Literal["cait", "vit", "average"]


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """One way to train ExtreMA."""

    mask_ratio: float
    num_masks: int  # student passes of an image, for one pass of the teacher
    disjoint: bool  # masks of one image share no visible patch; else each is drawn by itself
    class_token: ClassToken  # reads the finished patches; goes through all blocks; is the mean of the patches (Fig. 5)
    class_attention_blocks: int  # of "cait"; 0 with the others
    head_hidden: int
    head_out: int
    loss: Literal["byol", "infonce"]
    temperature: float  # of infonce
    momentum: float  # of the teacher in the first step; cosine to ...
    momentum_end: float  # ... in the last

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, and more disjoint masks than an image has patches for."""
        super().__post_init__()
        if self.num_masks < 1:
            raise UserError(f"num_masks={self.num_masks}: expected at least 1.")
        if min(self.head_hidden, self.head_out) < 1:
            raise UserError(f"head_hidden={self.head_hidden}, head_out={self.head_out}: expected at least 1.")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature:g}: expected a positive number, in the paper 0.2.")
        if not 0 <= self.momentum <= self.momentum_end <= 1:
            raise UserError(
                f"momentum={self.momentum:g}, momentum_end={self.momentum_end:g}: expected two numbers in [0, 1], the "
                "second not smaller."
            )
        if (self.class_attention_blocks >= 1) != (self.class_token == "cait") or self.class_attention_blocks < 0:
            raise UserError(
                f"class_token={self.class_token} with class_attention_blocks={self.class_attention_blocks}: expected "
                "at least one block with cait, and 0 with vit and average."
            )
        visible_patches(self, named(self.arch).grid ** 2)


def visible_patches(recipe: Recipe, n_patches: int) -> int:
    """Patches that a mask leaves, 39 of 196 at 80 %; refused where disjoint masks would need more than there are."""
    kept = kept_patches(n_patches, recipe.mask_ratio)
    if recipe.disjoint and recipe.num_masks * kept > n_patches:
        raise UserError(
            f"num_masks={recipe.num_masks} with mask_ratio={recipe.mask_ratio:g}: {recipe.num_masks} x {kept} visible "
            f"patches are more than the {n_patches} of an image. Expected at most {n_patches // kept} disjoint masks: "
            f"choose --set num_masks={n_patches // kept}, a larger mask_ratio, or --set disjoint=false."
        )
    return kept


# fmt: off
_PAPER = Recipe(
    arch="vit_base_patch16_224", epochs=300, batch=2048, base_lr=1.5e-4, min_lr=0.0, warmup_epochs=40.0, horizon=1.0,
    betas=(0.9, 0.95), weight_decay=0.1, weight_decay_end=0.1, clip=None, clip_each=False, drop_path=0.1,
    augmentation="extrema", mask_ratio=0.8, num_masks=5, disjoint=True, class_token="cait", class_attention_blocks=2,
    head_hidden=4096, head_out=256, loss="byol", temperature=0.2, momentum=0.996, momentum_end=1.0,
    source="ExtreMA, Table 7; microsoft/ExtreMA README.md",
    published="ImageNet: finetune 83.7, linear 73.3; ADE20K 47.9 (Table 9); 1 % 67.3, 10 % 76.1 (Table 10); "
              "COCO AP 47.5 (Table 11)",
)
_CROP = replace(_PAPER, augmentation="extrema-crop-1")  # the default of the ablations
_TWO = replace(_CROP, num_masks=2)  # ... and of Tables 4 to 6
_IN22K = replace(_PAPER, epochs=30, warmup_epochs=4.0)
_SMALL = replace(_CROP, arch="vit_small_patch16_224", mask_ratio=0.9, num_masks=8)
_TOY = replace(
    _PAPER, arch="vit_96x4x3_patch8_48", epochs=20, batch=64, base_lr=4e-3, warmup_epochs=2.0, weight_decay=0.05,
    weight_decay_end=0.05, drop_path=0.0, augmentation="toy-extrema", mask_ratio=0.5, num_masks=2, head_hidden=256,
    head_out=64, source="ours, for the toy world", published="none",
)


def _row(base: Recipe, source: str, finetune: float | None, linear: float | None, **changes: Any) -> Recipe:
    published = "plotted only" if finetune is None else f"ImageNet: finetune {finetune}, linear {linear}"
    return replace(base, source=f"ExtreMA, {source}", published=published, **changes)


RECIPES: dict[str, Recipe] = {
    "paper":         _PAPER,
    "vit-s":         _row(_PAPER, "Table 7", 81.8, 69.4, arch="vit_small_patch16_224"),
    "in22k":         _row(_IN22K, "Table 7; microsoft/ExtreMA README.md", 83.9, 74.5),
    "in22k-vit-s":   _row(_IN22K, "Table 7", 81.5, 65.7, arch="vit_small_patch16_224"),
    "90x8-color":    _row(_PAPER, "microsoft/ExtreMA README.md", 83.5, 68.4, mask_ratio=0.9, num_masks=8),

    # RATIOxMASKS: one mask at other ratios, and several. 80x5 is also a released model ("no color").
    "50x1":          _row(_CROP, "Table 1", 81.9, 36.3, mask_ratio=0.5, num_masks=1),
    "70x1":          _row(_CROP, "Table 1", 82.3, 64.4, mask_ratio=0.7, num_masks=1),
    "85x1":          _row(_CROP, "Table 1", 82.4, 66.3, mask_ratio=0.85, num_masks=1),
    "95x1":          _row(_CROP, "Table 1", 81.6, 49.3, mask_ratio=0.95, num_masks=1),
    "75x1":          _row(_CROP, "Table 2", 82.4, 64.8, mask_ratio=0.75, num_masks=1),
    "75x2":          _row(_CROP, "Table 2", 82.7, 67.2, mask_ratio=0.75, num_masks=2),
    "75x4":          _row(_CROP, "Table 2", 82.9, 67.7, mask_ratio=0.75, num_masks=4),
    "80x1":          _row(_CROP, "Tables 1 and 2", 82.4, 67.3, num_masks=1),
    "80x2":          _row(_TWO,  "Tables 2, 4, 5 and 6", 82.6, 68.8),
    "80x4":          _row(_CROP, "Table 2", 82.8, 67.5, num_masks=4),
    "80x5":          _row(_CROP, "Table 2; microsoft/ExtreMA README.md", 82.9, 67.1),
    "90x1":          _row(_CROP, "Tables 1 and 2", 82.3, 61.6, mask_ratio=0.9, num_masks=1),
    "90x2":          _row(_CROP, "Table 2", 82.5, 64.0, mask_ratio=0.9, num_masks=2),
    "90x4":          _row(_CROP, "Table 2", 82.7, 63.1, mask_ratio=0.9, num_masks=4),
    "90x8":          _row(_CROP, "Table 2", 82.9, 60.3, mask_ratio=0.9, num_masks=8),
    "90x10":         _row(_CROP, "Table 2", 83.0, 59.3, mask_ratio=0.9, num_masks=10),
    "75x1-600ep":    _row(_CROP, "Table 12", 82.6, 67.8, mask_ratio=0.75, num_masks=1, epochs=600),
    "80x1-600ep":    _row(_CROP, "Table 12", 82.6, 69.1, num_masks=1, epochs=600),
    "90x1-600ep":    _row(_CROP, "Table 12", 82.5, 63.4, mask_ratio=0.9, num_masks=1, epochs=600),

    # On ImageNet-22k, where many masks do not overfit.
    "in22k-90x1":    _row(_IN22K, "Table 3", 82.5, 60.4, augmentation="extrema-crop-1", mask_ratio=0.9, num_masks=1),
    "in22k-90x2":    _row(_IN22K, "Table 3", 82.7, 65.6, augmentation="extrema-crop-1", mask_ratio=0.9, num_masks=2),
    "in22k-90x4":    _row(_IN22K, "Table 3", 83.0, 69.0, augmentation="extrema-crop-1", mask_ratio=0.9, num_masks=4),
    "in22k-90x8":    _row(_IN22K, "Table 3", 83.2, 71.4, augmentation="extrema-crop-1", mask_ratio=0.9, num_masks=8),
    "in22k-90x10":   _row(_IN22K, "Table 3", 83.2, 72.0, augmentation="extrema-crop-1", mask_ratio=0.9, num_masks=10),

    # 80x2 is the base of all these, and the cropped row, the row of two blocks and the BYOL row of their tables.
    # One augmentation is seen by both networks; of two, the first by the student, the second by the teacher.
    "none":          _row(_TWO, "Table 4", 82.3, 55.1, augmentation="extrema-none"),
    "color-1":       _row(_TWO, "Table 4", 82.5, 62.0, augmentation="extrema-color-1"),
    "color-2":       _row(_TWO, "Table 4", 83.3, 62.4, augmentation="extrema-color-2"),
    "crop-2":        _row(_TWO, "Table 4", 82.2, 66.8, augmentation="extrema-crop-2"),
    "crop-color-1":  _row(_TWO, "Table 4", 82.6, 69.0, augmentation="extrema-crop-color-1"),
    "crop-color-2":  _row(_TWO, "Table 4", 83.1, 73.3, augmentation="extrema-crop-color-2"),
    "shared-crop":   _row(_TWO, "Table 4", 83.3, 73.1, augmentation="extrema"),
    "blocks-1":      _row(_TWO, "Table 5", 82.6, 66.2, class_attention_blocks=1),
    "blocks-3":      _row(_TWO, "Table 5", 82.6, 68.5, class_attention_blocks=3),
    "infonce":       _row(_TWO, "Table 6", 82.8, 66.8, loss="infonce"),

    # ViT-S, 90 % x 8. In the paper, "vit" is unstable and "average" finds a shortcut.
    "token-cait":    _row(_SMALL, "Fig. 5", None, None),
    "token-vit":     _row(_SMALL, "Fig. 5", None, None, class_token="vit", class_attention_blocks=0),
    "token-average": _row(_SMALL, "Fig. 5", None, None, class_token="average", class_attention_blocks=0),

    # Ours, for the toy world. From scratch and in a thousand steps BYOL first shrinks all vectors towards one before
    # they spread again (see the log's spread), so `toy` takes Table 6's InfoNCE, and `toy-byol` shows the other.
    "toy":           replace(_TOY, loss="infonce", momentum=0.98),
    "toy-byol":      replace(_TOY, augmentation="toy-byol"),
}
# fmt: on


def draw(recipe: Recipe, architecture: Architecture, rng: np.random.Generator) -> Draws:
    """Indices of the patches that each mask leaves visible, (masks, n): one permutation cut into parts, or several."""
    n_patches = architecture.grid**2
    kept = visible_patches(recipe, n_patches)
    if recipe.disjoint:
        return (rng.permutation(n_patches)[: recipe.num_masks * kept].reshape(recipe.num_masks, kept),)
    return (np.stack([rng.permutation(n_patches)[:kept] for _ in range(recipe.num_masks)]),)


def make(recipe: Recipe, architecture: Architecture, base: None = None) -> Method:
    """ExtreMA, initialized."""
    visible_patches(recipe, architecture.grid**2)
    return ExtreMA(recipe, architecture)


class ExtreMA(Method):
    """A student on masked images, its teacher on whole ones."""

    undecayed = ("student.vit.cls_token", "student.class_attention.cls_token")

    def __init__(self, recipe: Recipe, architecture: Architecture) -> None:
        super().__init__()
        self.recipe = recipe
        self.compares_images = recipe.loss == "infonce"
        # In every design the positions have no slot for the class token, as in the official checkpoints.
        architecture = replace(
            architecture,
            cls=recipe.class_token == "vit",
            position_of_prefix=False,
            class_attention_blocks=recipe.class_attention_blocks,
        )
        self.student = student(architecture, drop_path=recipe.drop_path)
        self.projector = _head(architecture.dim, recipe.head_hidden, recipe.head_hidden, recipe.head_out)
        self.predictor = _head(recipe.head_out, recipe.head_hidden, recipe.head_out)
        self.teacher = teacher_of(self.student)
        self.teacher_projector = teacher_of(self.projector)

    def forward(self, views: Views) -> dict[str, Tensor]:
        """The first view is masked for the student, the last one is the teacher's: the same if there is only one."""
        if len(views.images) > 2:
            raise UserError(
                f"augmentation={self.recipe.augmentation} gives {len(views.images)} views of an image; ExtreMA expects "
                "one for both networks, or one for the student and one for the teacher."
            )
        (visible,) = views.draws  # (B, masks, n)
        predicted = self.predictor(self.projector(instances(self.student, views.images[0], visible)))
        with torch.no_grad():
            whole = instances(self.teacher, views.images[-1])
            targets = F.normalize(self.teacher_projector(whole).float(), dim=-1)  # (B, d)
        predicted = F.normalize(predicted.float(), dim=-1).reshape(*visible.shape[:2], -1)  # (B, masks, d)
        cosines = (predicted * targets[:, None]).sum(-1)  # (B, masks)
        if self.watching:
            self.embedding = whole
            self.vitals["cosine"] = cosines.detach().mean()
            # Of unit vectors: near 1 when they point everywhere, 0 when all are the same.
            self.vitals["target_std"] = targets.std(0, correction=0).mean() * targets.shape[1] ** 0.5
        if self.recipe.loss == "byol":
            return {"byol": 2 - 2 * cosines.mean()}
        temperature = self.recipe.temperature
        of_masks = [info_nce(queries, targets, temperature) for queries in predicted.unbind(1)]
        return {"infonce": 2 * temperature * torch.stack(of_masks).mean()}

    def after_step(self, now: Progress) -> None:
        """Move the teacher, with the momentum of the step that comes next: see the top of the file."""
        self.momentum = cosine(self.recipe.momentum, self.recipe.momentum_end, now.share)
        move_teacher(self.teacher, self.student, self.momentum)
        move_teacher(self.teacher_projector, self.projector, self.momentum)

    def saved(self) -> Saved:
        """The teacher for its class token, the student for its trunk; "projector" is the student's."""
        assert isinstance(self.teacher, Backbone)
        return Saved(
            networks={"teacher": self.teacher, "student": self.student},
            by_protocol={"finetune": "student", "semseg": "student", "detection": "student"},
            extras={
                "projector": self.projector.state_dict(),
                "teacher_projector": self.teacher_projector.state_dict(),
                "predictor": self.predictor.state_dict(),
            },
        )


def instances(network: nn.Module, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """One vector an image (B, D), or with `visible` (B, masks, n) one a mask of each image (B * masks, D).

    The same as Backbone.forward(images, keep=...), but patches are projected once for all masks of an image, and the
    final norm is spent only on what is used.
    """
    assert isinstance(network, Backbone)
    x, _ = network.embed(images)
    if visible is not None:
        x = _of_masks(x, visible, network.n_prefix)
    x = network.vit.blocks(x)
    if network.class_attention is not None:
        x, _ = network.class_attention(x)
    averaged = not network.architecture.has_cls
    vector: Tensor = network.vit.norm(x).mean(1) if averaged else network.vit.norm(x[:, 0])
    return vector


def _of_masks(x: Tensor, visible: Tensor, n_prefix: int) -> Tensor:
    """(B, prefix + N, D) -> (B * masks, prefix + n, D), all masks of one image after each other."""
    batch, masks, kept = visible.shape
    patches = gathered(x[:, n_prefix:], visible.flatten(1)).reshape(batch * masks, kept, -1)
    if not n_prefix:
        return patches
    prefix = x[:1, :n_prefix].expand(batch * masks, -1, -1)  # the same for all images, before the first block
    return torch.cat([prefix, patches], dim=1)


def _head(*widths: int) -> nn.Sequential:
    """Linear layers with LayerNorm (of torch's eps, 1e-5) and GELU between them, initialized as the trunk."""
    layers: list[nn.Module] = []
    for number, (dim_in, dim_out) in enumerate(itertools.pairwise(widths)):
        if number:
            layers += [nn.LayerNorm(dim_in), nn.GELU()]
        layers.append(nn.Linear(dim_in, dim_out))
    head = nn.Sequential(*layers)
    initialize_as_mae(head)
    return head
