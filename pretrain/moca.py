"""MOCA: predict, from a masked view, the teacher's soft assignments to an online codebook.

Gidaris et al., "MOCA: Self-supervised Representation Learning by Predicting Masked Online Codebook Assignments", 2024.

    ssl-bench pretrain moca --data DIR --out DIR
    ssl-bench pretrain moca --data DIR --out DIR --recipe v1.0 --set batch=1024

The teacher (a moving average of the student) sees both views of an image whole, and assigns every patch token softly to
K words, tokens of past batches (codebook.py). The student sees masked views, and predicts
- the assignments of the same view, token by token, through a decoder: L_LOC (Eq. 3, 4). The condenser decoder reads
  tokens of an intermediate block and the image's global token from the last one (Eq. 7), so that the global token must
  tell what the intermediate tokens do not;
- the mean assignment of the other view, from its global token, the average patch: L_IMG (Eq. 5, 6).
The loss is lambda L_IMG + (1 - lambda) L_LOC (Eq. 1). What it is predicted with are prototypes, generated anew from the
codebook at every step (Eq. 2). A second round of masks reuses the teacher's pass; rounds are averaged.

Paper and official code (valeoai/MOCA v1.0.0) differ. `paper` and the ablations follow the text, and the code where the
text is silent (gradient clipping, augmentation, words from inside the border only, the order of updates); `v0.9` and
`v1.0` follow the code:
                                    text                              code
    generators                      plain MLP                         residual
    their learning rate             that of all                       1e-4, constant
    learning rate                   cosine to 0 at the end            cosine to 0 at 1.25 times the epochs
    teacher's momentum              .99                               from .99 (v0.9) or .994 (v1.0) to 1
    weight decay                    .05                               .05 (v0.9), or rising to .2 (v1.0)
    second round                    masks of its own                  sees what was neither seen nor predicted in the
                                                                      first, and predicts the same tokens
In three things all rows follow the code. The teacher's temperature is mu_MSD / 10, not 1 / (10 mu_MSD). L_LOC is a mean
over tokens, then the sum over views; with Eq. 4's sum over tokens L_IMG would hardly count. It covers all tokens of the
decoder, visible and masked, as Eq. 4 does. And 1.5e-4 is a base learning rate, for a batch of 256, as in Table 15; the
text calls it the peak. What is logged is the paper's cross-entropy; the code's KL divergence is less by the targets'
entropy, with the same gradient.

Targets of Table 4: pixels (normalized in each patch, squared error) and the teacher's own tokens (cosine distance), for
all tokens of the decoder (assumption), and scaled as L_LOC. Of two decoders (Table 10 c, f) each has its own loss and
its own generator (assumption); the losses are added. A lambda of 0 or 1 builds no more than it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.backbone import Backbone
from ssl_bench.evaluate.training.loader import Draws, Views
from ssl_bench.evaluate.training.schedules import Progress, cosine
from ssl_bench.pretrain.codebook import Codebook, Generator, soft_cross_entropy
from ssl_bench.pretrain.method import Method, Saved, Training
from ssl_bench.pretrain.networks import (
    EPS,
    Decoder,
    gathered,
    initialize_as_mae,
    kept_patches,
    move_teacher,
    patchify,
    standardized,
    student,
    teacher_of,
)

DecoderKind = Literal["condenser", "default"]


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """How one row of the paper does it."""

    image_weight: float  # lambda of Eq. 1; what has no weight is not built
    mask_ratios: tuple[float, ...]  # of each masking round, one or two
    decoded_ratio: float | None  # masked patches that are predicted, as a share of all patches; None: all masked ones
    second_round: Literal["independent", "complementary"]
    targets: Literal["assignments", "pixels", "embeddings"]  # of L_LOC
    decoders: tuple[DecoderKind, ...]
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    intermediate_block: int  # l, counted from 1: where the condenser reads patches
    global_token: Literal["avg", "cls"]
    words: int  # K
    new_words: int  # K_new a step, of the whole batch
    border: int  # patches at each side that give no words and do not count in the mean assignment
    student_sharpness: float  # 1 / tau_d = 1 / tau_b
    teacher_sharpness: float  # mu_MSD / tau_T
    residual_generators: bool
    generator_lr: float | None  # constant; None: as the rest
    momentum: float  # of the teacher
    momentum_end: float  # cosine from the one to the other

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if not 0 <= self.image_weight <= 1:
            raise UserError(f"image_weight={self.image_weight:g}: expected a share in [0, 1].")
        if len(self.mask_ratios) not in (1, 2) or not all(0 < ratio < 1 for ratio in self.mask_ratios):
            raise UserError(f"mask_ratios={self.mask_ratios}: expected one or two ratios in (0, 1), such as .55,.75.")
        if self.decoded_ratio is not None and not 0 < self.decoded_ratio < 1:
            raise UserError(f"decoded_ratio={self.decoded_ratio:g}: expected a share in (0, 1), or none to decode all.")
        if len(self.mask_ratios) == 2 and self.second_round == "complementary" and self.decoded_ratio is None:
            raise UserError(
                "second_round=complementary needs partial decoding, since its rounds predict the same patches: set "
                "decoded_ratio, or second_round=independent."
            )
        if not self.decoders or len(set(self.decoders)) != len(self.decoders):
            raise UserError(f"decoders={self.decoders}: expected condenser, default, or both once.")
        for name in ("decoder_dim", "decoder_depth", "decoder_heads", "intermediate_block", "words", "new_words"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.words % self.new_words or self.words < 2:
            raise UserError(f"words={self.words}: expected a multiple of new_words={self.new_words}, and at least 2.")
        if self.border < 0:
            raise UserError(f"border={self.border}: expected 0 or more patches.")
        for name in ("student_sharpness", "teacher_sharpness", "generator_lr"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{name}={value:g}: expected a positive number.")
        if not (0 <= self.momentum <= 1 and 0 <= self.momentum_end <= 1):
            raise UserError(
                f"momentum={self.momentum:g}, momentum_end={self.momentum_end:g}: expected numbers in [0, 1]."
            )


_PAPER = Recipe(
    arch="vit_base_patch16_224", epochs=200, batch=2048, base_lr=1.5e-4, min_lr=0.0, warmup_epochs=30, horizon=1.0,
    betas=(0.9, 0.999), weight_decay=0.05, weight_decay_end=0.05, clip=0.1, clip_each=False, drop_path=0.0,
    augmentation="byol", image_weight=0.5, mask_ratios=(0.55, 0.75), decoded_ratio=0.2, second_round="independent",
    targets="assignments", decoders=("condenser",), decoder_dim=512, decoder_depth=2, decoder_heads=16,
    intermediate_block=8, global_token="avg", words=4096, new_words=4, border=2, student_sharpness=3.0,
    teacher_sharpness=10.0, residual_generators=False, generator_lr=None, momentum=0.99, momentum_end=0.99,
    source="MOCA, Tables 14 and 15, sections 3.5 and C",
    published="ImageNet: k-NN 77.2, linear 78.7, fine-tuning 83.6 (Table 6); 1 % of labels 72.4 (Table 8)",
)  # fmt: skip


def _row(row: Recipe, table: str, published: str, **changes: Any) -> Recipe:
    return dataclasses.replace(row, source=f"MOCA, Table {table}", published=f"ImageNet: {published}", **changes)


# fmt: off
_V1 = dataclasses.replace(
    _PAPER, horizon=1.25, weight_decay_end=0.2, momentum=0.994, momentum_end=1.0, second_round="complementary",
    residual_generators=True, generator_lr=1e-4, source="valeoai/MOCA v1.0.0, main_pretrain.py and README",
    published="ImageNet: linear 79.2, with the class token 79.5; 1 / 2 / 5 shots 55.23 / 63.94 / 69.74; 1 % 72.44",
)
_ABLATION = _row(_PAPER, "2", "k-NN 71.8", epochs=100, mask_ratios=(0.65,))
_LONG = _row(_ABLATION, "4", "k-NN 75.4, linear 77.7, fine-tuning 83.4", epochs=200)
# The depth of these decoders is not said: assumption 2, as in Table 2.
_LOCAL = _row(_ABLATION, "10", "k-NN 13.1, linear 33.7", image_weight=0.0)
_BOTH: tuple[DecoderKind, ...] = ("default", "condenser")

RECIPES: dict[str, Recipe] = {
    "paper": _PAPER,
    "v1.0":  _V1,
    # The released code with the settings of the weights that the paper evaluates.
    "v0.9":  dataclasses.replace(_V1, momentum=0.99, weight_decay_end=0.05, published=_PAPER.published),
    "400ep": _row(_PAPER, "11", "k-NN 77.6, linear 79.3, fine-tuning 83.7", epochs=400),
    # The text does not give l; the code counts 4 blocks from the end, as for ViT-B. Assumption: the same decoder.
    "vit-l": _row(_PAPER, "11", "k-NN 78.4, linear 80.3, fine-tuning 84.9",
                  arch="vit_large_patch16_224", intermediate_block=20),
    # Tables 2 and 3: 100 epochs, one round.
    "ablation":             _ABLATION,
    "table2-default":       _row(_ABLATION, "2a", "k-NN 67.8", decoders=("default",)),
    "table2-depth1":        _row(_ABLATION, "2b", "k-NN 71.7", decoder_depth=1),
    "table2-depth4":        _row(_ABLATION, "2b", "k-NN 70.9", decoder_depth=4),
    "table2-depth8":        _row(_ABLATION, "2b", "k-NN 70.5", decoder_depth=8),
    "table2-mask55":        _row(_ABLATION, "2c", "k-NN 72.6", mask_ratios=(0.55,)),
    "table2-mask75":        _row(_ABLATION, "2c", "k-NN 69.8", mask_ratios=(0.75,)),
    "table2-mask80":        _row(_ABLATION, "2c", "k-NN 68.4", mask_ratios=(0.8,)),
    "table2-cls":           _row(_ABLATION, "2d", "k-NN 60.2", global_token="cls"),
    "table2-lambda1":       _row(_ABLATION, "2e", "k-NN 66.8", image_weight=1.0),
    "table2-lambda0.75":    _row(_ABLATION, "2e", "k-NN 70.2", image_weight=0.75),
    "table2-lambda0.25":    _row(_ABLATION, "2e", "k-NN 71.5", image_weight=0.25),
    "table2-lambda0":       _row(_ABLATION, "2e", "k-NN 13.1", image_weight=0.0),
    "table2-block6":        _row(_ABLATION, "2f", "k-NN 71.4", intermediate_block=6),
    "table2-block9":        _row(_ABLATION, "2f", "k-NN 71.5", intermediate_block=9),
    "table2-block10":       _row(_ABLATION, "2f", "k-NN 70.9", intermediate_block=10),
    "table3-full-decoding": _row(_ABLATION, "3",  "k-NN 71.6", decoded_ratio=None),
    # The ratios of these two rounds are not said: assumption 65 % each, the default of section 4.1.
    "table3-two-rounds":    _row(_ABLATION, "3",  "k-NN 74.4", mask_ratios=(0.65, 0.65)),
    # 200 epochs, one round.
    "table4-image":         _row(_LONG, "4", "k-NN 72.0, linear 76.1, fine-tuning 82.7", image_weight=1.0),
    "table4-default":       _row(_LONG, "4", "k-NN 70.0, linear 75.7, fine-tuning 83.5", decoders=("default",)),
    "table4-assignments":   _LONG,
    "table4-pixels":        _row(_LONG, "4", "k-NN 72.3, linear 76.4, fine-tuning 83.2",
                                 targets="pixels", decoders=("default",), decoder_depth=4),
    "table4-embeddings":    _row(_LONG, "4", "k-NN 73.6, linear 76.9, fine-tuning 83.0", targets="embeddings"),
    # 100 epochs, one round, L_LOC alone.
    "table10-a":            _row(_LOCAL, "10", "k-NN 34.4, linear 51.6", decoders=("default",)),
    "table10-b":            _LOCAL,
    "table10-c":            _row(_LOCAL, "10", "k-NN 52.5, linear 64.2", decoders=_BOTH),
    "table10-d":            _row(_LOCAL, "10", "k-NN 14.6, linear 38.8", decoders=("default",), targets="pixels"),
    "table10-e":            _row(_LOCAL, "10", "k-NN 15.6, linear 42.7", targets="pixels"),
    "table10-f":            _row(_LOCAL, "10", "k-NN 13.9, linear 41.9", decoders=_BOTH, targets="pixels"),
    # Ours, for the toy world: one round, and a teacher that hundreds of steps can move.
    "toy": dataclasses.replace(
        _V1, arch="vit_96x4x3_patch8_48", epochs=12, batch=64, base_lr=4e-3, warmup_epochs=1, horizon=1.0,
        weight_decay_end=0.05, augmentation="toy-byol", mask_ratios=(0.6,), decoder_dim=64, decoder_heads=2,
        intermediate_block=3, words=512, new_words=16, border=1, generator_lr=1e-3, momentum=0.9,
        source="ours, for the toy world", published="none"),
}
# fmt: on


def rounds(recipe: Recipe, n_patches: int) -> list[tuple[int, int]]:
    """Of every masking round, how many patches the student sees, and how many others the decoder predicts."""
    counts = []
    for ratio in recipe.mask_ratios:
        visible = kept_patches(n_patches, ratio, name="mask_ratios")
        masked = n_patches - visible
        decoded = masked if recipe.decoded_ratio is None else int(n_patches * recipe.decoded_ratio + 1e-9)
        if not 1 <= decoded <= masked:
            raise UserError(
                f"decoded_ratio={recipe.decoded_ratio:g} predicts {decoded} of {n_patches} patches, and a mask ratio "
                f"of {ratio:g} hides {masked}: expected at least one, and no more than are hidden."
            )
        counts.append((visible, decoded))
    needed = sum(visible for visible, _ in counts) + counts[0][1]
    if len(counts) == 2 and recipe.second_round == "complementary" and needed > n_patches:
        raise UserError(
            f"mask_ratios={recipe.mask_ratios}, decoded_ratio={recipe.decoded_ratio}: complementary rounds need "
            f"{needed} of {n_patches} patches. Mask more, decode fewer, or --set second_round=independent."
        )
    return counts


def draw(recipe: Recipe, architecture: Architecture, rng: np.random.Generator) -> Draws:
    """What is random about one image.

    For every round the patches of both views (2, visible + decoded), the visible ones first; then the view (0 or 1) and
    the patch that it gives to the codebook if it is among the first of its batch (2,).
    """
    grid = architecture.grid
    (visible, decoded), *second = rounds(recipe, grid**2)
    first = visible + decoded
    orders = [rng.permutation(grid**2) for _ in range(2)]
    masks = [np.stack([order[:first] for order in orders])]
    for visible_again, decoded_again in second:
        if recipe.second_round == "independent":
            others = [rng.permutation(grid**2)[: visible_again + decoded_again] for _ in range(2)]
        else:
            # The same decoded patches; visible ones out of those that the first round did not use.
            others = [np.r_[order[first : first + visible_again], order[visible:first]] for order in orders]
        masks.append(np.stack(others))
    row, column = rng.integers(recipe.border, grid - recipe.border, size=2)
    return *masks, np.array([rng.integers(2), row * grid + column])


def make(recipe: Recipe, architecture: Architecture, base: None = None) -> Moca:
    """The method with fresh weights; the teacher starts as the student."""
    del base
    rounds(recipe, architecture.grid**2)
    if 2 * recipe.border >= architecture.grid:
        raise UserError(
            f"border={recipe.border} leaves nothing of a grid of {architecture.grid} x {architecture.grid} patches; "
            f"expected at most {(architecture.grid - 1) // 2}."
        )
    if not recipe.intermediate_block < architecture.depth:
        raise UserError(
            f"intermediate_block={recipe.intermediate_block}: the network has {architecture.depth} blocks; expected "
            f"one before the last, so at most {architecture.depth - 1}."
        )
    if recipe.global_token == "cls" and not architecture.cls:
        raise UserError(f"global_token=cls: {architecture.name} has no class token; expected avg.")
    return Moca(recipe, architecture)


@dataclass(frozen=True)
class Encoded:
    """What the student makes of its visible patches. (2B, D), (2B, n, D), (2B, n, D)"""

    whole: Tensor  # the global token: after the final norm
    last: Tensor  # patches after the final norm
    middle: Tensor | None  # patches after block l, without norm


@dataclass(frozen=True)
class Goals:
    """What is to be predicted, of both views: for each image (2B, K), views swapped; for each patch (2B, N, ...)."""

    image: Tensor | None
    local: Tensor | None


class LocalDecoder(nn.Module):
    """From visible patches to a prediction for each of them and for some of the masked ones.

    The condenser (Eq. 7) reads patches of an intermediate block, through a norm of their own, and the global token. The
    default decoder (section 3.2) reads the last block's patches and no global token.
    """

    def __init__(self, recipe: Recipe, architecture: Architecture, *, kind: DecoderKind) -> None:
        super().__init__()
        dim = recipe.decoder_dim
        self.norm = nn.LayerNorm(architecture.dim, eps=EPS) if kind == "condenser" else None
        self.decoder = Decoder(architecture.dim, dim, recipe.decoder_depth, recipe.decoder_heads, architecture.grid)
        out_dims = {"pixels": 3 * architecture.patch_px**2, "embeddings": architecture.dim}
        # Assignments are predicted with prototypes instead.
        self.head = nn.Linear(dim, out_dims[recipe.targets]) if recipe.targets in out_dims else nn.Identity()

    def forward(self, encoded: Encoded, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """(2B, n + m, ...): the visible patches, then the masked ones. Nothing is computed for other patches."""
        if self.norm is None:
            return self.head(self.decoder(None, encoded.last, visible_ids, masked_ids))  # type: ignore[no-any-return]
        assert encoded.middle is not None
        decoded = self.decoder(encoded.whole, self.norm(encoded.middle), visible_ids, masked_ids)
        return self.head(decoded[:, 1:])  # type: ignore[no-any-return]


class Moca(Method):
    """Student, teacher, codebook; a decoder or two, and the generators of their prototypes."""

    def __init__(self, recipe: Recipe, architecture: Architecture) -> None:
        super().__init__()
        self.recipe, self.architecture = recipe, architecture
        self.visible = [visible for visible, _ in rounds(recipe, architecture.grid**2)]
        kinds = recipe.decoders if recipe.image_weight < 1 else ()
        self.student = student(architecture, drop_path=recipe.drop_path)
        self.decoders = nn.ModuleDict({kind: LocalDecoder(recipe, architecture, kind=kind) for kind in kinds})
        dims = {"image": architecture.dim} if recipe.image_weight > 0 else {}
        if recipe.targets == "assignments":
            dims |= {f"local_{kind}": recipe.decoder_dim for kind in kinds}
        self.generators = nn.ModuleDict(
            {name: Generator(architecture.dim, dim, residual=recipe.residual_generators) for name, dim in dims.items()}
        )
        self.codebook: Codebook | None = None
        if dims:
            self.codebook = Codebook(
                recipe.words, recipe.new_words, architecture.dim, sharpness=recipe.teacher_sharpness
            )
        initialize_as_mae(self.decoders)
        initialize_as_mae(self.generators)
        self.teacher = teacher_of(self.student)
        if recipe.generator_lr is not None:
            self.constant_lr: Mapping[str, float] = {"generators.": recipe.generator_lr}

    def forward(self, views: Views) -> dict[str, Tensor]:
        """`image` is lambda L_IMG (Eq. 6), `local_KIND` is (1 - lambda) L_LOC (Eq. 3) of that decoder."""
        images = torch.cat(views.images)  # (2B, 3, S, S), view after view
        *masks, drawn = views.draws
        goals = self._goals(images, drawn)
        words = None if self.codebook is None else self.codebook.words
        prototypes = {name: generator(words) for name, generator in self.generators.items()}
        terms: dict[str, Tensor] = {}
        # Eq. 3 and 6 add up two views, and what follows is a mean over both.
        weights = {"image": 2 * self.recipe.image_weight / len(masks)}
        for visible, mask in zip(self.visible, masks, strict=True):
            ids = mask.transpose(0, 1).flatten(0, 1)  # (2B, n + m)
            encoded = self._encode(images, ids[:, :visible])
            if self.watching and not terms:
                self.embedding = encoded.whole[: len(drawn)].detach()
            for name, loss in self._losses(encoded, ids, goals, prototypes, visible).items():
                weight = weights.get(name, 2 * (1 - self.recipe.image_weight) / len(masks))
                terms[name] = terms.get(name, 0.0) + weight * loss
        return terms

    @torch.no_grad()
    def _goals(self, images: Tensor, drawn: Tensor) -> Goals:
        """One teacher pass for both views, and what all rounds take from it."""
        recipe, grid, image = self.recipe, self.architecture.grid, None
        pixels = patchify(images, self.architecture.patch_px) if recipe.targets == "pixels" else None
        if self.codebook is None and pixels is not None:
            return Goals(None, pixels)
        tokens = self.teacher(images).tokens[0].patches.flatten(1, 2)  # (2B, N, D)
        if self.codebook is None:
            return Goals(None, tokens)
        assignments = self.codebook(tokens)  # (2B, N, K)
        self.codebook.take(tokens, drawn)
        if self.watching:
            self._watch(assignments, self.codebook)
        if recipe.image_weight > 0:
            inner = slice(recipe.border, grid - recipe.border)
            square = assignments.reshape(len(images), grid, grid, -1)
            one, other = square[:, inner, inner].mean((1, 2)).chunk(2)
            image = torch.cat([other, one])
        return Goals(image, {"assignments": assignments, "embeddings": tokens}.get(recipe.targets, pixels))

    def _encode(self, images: Tensor, visible_ids: Tensor) -> Encoded:
        """The student's pass over both views, visible patches only."""
        condenses = "condenser" in self.decoders
        layers = (self.recipe.intermediate_block - 1, -1) if condenses else (-1,)
        output = self.student(images, layers=layers, norm=False, keep=visible_ids)
        last = self.student.normalized(output.tokens[-1])
        whole = last.patch_mean if self.recipe.global_token == "avg" else last.cls
        assert whole is not None
        return Encoded(whole, last.patches, output.tokens[0].patches if condenses else None)

    def _losses(
        self, encoded: Encoded, ids: Tensor, goals: Goals, prototypes: Mapping[str, Tensor], visible: int
    ) -> dict[str, Tensor]:
        """Of one round, unweighted: means over images, views and tokens."""
        losses = {}
        if goals.image is not None:
            with torch.autocast(encoded.whole.device.type, enabled=False):  # few rows: full precision costs nothing
                logits = self._logits(encoded.whole.float(), prototypes["image"].float())
            losses["image"] = soft_cross_entropy(logits, goals.image)
        if not self.decoders:
            return losses
        assert goals.local is not None
        target = gathered(goals.local, ids)  # (2B, n + m, ...)
        for kind, decoder in self.decoders.items():
            name = f"local_{kind}"
            predicted = decoder(encoded, *ids.tensor_split([visible], dim=1))
            if self.recipe.targets == "assignments":
                logits = self._logits(predicted.flatten(0, 1), prototypes[name])
                losses[name] = soft_cross_entropy(logits, target.flatten(0, 1))
            elif self.recipe.targets == "embeddings":
                losses[name] = 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()
            else:
                losses[name] = F.mse_loss(predicted.float(), standardized(target.float()))
        return losses

    def _logits(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Eq. 2 and 5. Features are not normalized, prototypes are.

        For tokens in autocast's precision, as in the official code: the largest product of a step. It uses fp16 there;
        bf16 rounds logits eight times as coarsely, by a few percent of a word's probability and without bias.
        """
        return (self.recipe.student_sharpness * features) @ prototypes.T

    def _watch(self, assignments: Tensor, codebook: Codebook) -> None:
        """Is the codebook used, and how sharp are the targets?"""
        used = torch.zeros(assignments.shape[-1], device=assignments.device)
        used[assignments.argmax(-1).flatten()] = 1.0
        entropies = [torch.special.entr(part).sum() for part in assignments.chunk(16)]  # in parts: it is large
        tokens = assignments.shape[0] * assignments.shape[1]
        self.vitals["codebook_usage"] = used.mean()
        self.vitals["mean_assignment_entropy"] = torch.special.entr(assignments.mean((0, 1))).sum()
        self.vitals["target_entropy"] = torch.stack(entropies).sum() / tokens
        self.vitals["mu_msd"] = codebook.spread.clone()

    def after_step(self, now: Progress) -> None:
        """Move the teacher, then the codebook: the next step finds both as the official order leaves them."""
        self.momentum = cosine(self.recipe.momentum, self.recipe.momentum_end, now.share)
        move_teacher(self.teacher, self.student, self.momentum)
        if self.codebook is not None:
            self.codebook.commit()

    def saved(self) -> Saved:
        """MOCA evaluates the teacher."""
        assert isinstance(self.teacher, Backbone)
        parts = {"decoder": self.decoders, "generators": self.generators, "codebook": self.codebook}
        extras = {name: dict(part.state_dict()) for name, part in parts.items() if part is not None}
        return Saved(
            {"teacher": self.teacher, "student": self.student},
            extras={name: state for name, state in extras.items() if state},
        )
