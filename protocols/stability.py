"""How much the last block's tokens of one image change when the image is cropped or partly covered. Lower is steadier.

    ssl-bench run --ckpt x.pth --dataset imagenet --protocol stability      the first row below, MMC's, on 1,000 images
    ssl-bench run --ckpt x.pth --dataset imagenet --protocol stability/mmc-all

MMC, Property of MMC, Feature Variance, Table 10. Of every val image, by 128 views each:

- `cls_variance`: of the class token over random crops, per dimension, then the mean over dimensions.
- `patch_variance`: of every patch token over views of which half the pixels are noise, at the same position across
  views, per dimension, then the mean over dimensions and positions. All positions count, covered or not.

Both are means over images, with their standard error. They are variances, not percent, and low is good. Networks
without a class token have only the second.

A variance grows with the square of the features' scale, which networks choose freely, and one that gives all images the
same is perfectly steady. So there are two numbers of ours, `cls_variance_ratio` and `patch_variance_ratio`: the
variance within images, divided by the variance between images (of their means over views; same position, same
averages). 0 is steady; at 1 a view tells no more of the image than that.

The paper leaves open, and we assume:

1. Whether the outputs of the last block go through the final norm. A row each; the first one has it.
2. Variances are unbiased (n - 1), so that they do not depend on the number of views.
3. Crops are RandomResizedCrop's of area (.25, 1), MMC's "global views" in pre-training, without flip and colors.
4. Covered views are of the image's center view. Blocks are GMML's, as MMC pre-trains with: rectangles of sides up to .3
   of the image's, not aligned to patches, until half of the pixels are covered. The last one overshoots: about 52 %
   are (`covered_percent` in the record), fewer at the upper and left border, where only few blocks reach. Noise is
   N(0, 1) in the normalized image.
5. 1,000 val images, drawn by the seed, where the paper takes them all.

What is drawn depends on the seed, the image's place in the split and the number of the view; not on batches or workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.features import DTYPES
from ssl_bench.evaluate.hardware import choose_attention
from ssl_bench.evaluate.loading import refused
from ssl_bench.evaluate.readings import Interpolation, Reading, View, why_not
from ssl_bench.evaluate.splits import Split
from ssl_bench.evaluate.subject import Score, Scores, Subject
from ssl_bench.evaluate.training import augment
from ssl_bench.evaluate.training.blockwise import NOISE, Corruption, check_blocks, draw_corruption
from ssl_bench.evaluate.training.loader import automatic_workers
from ssl_bench.progress import bar

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Tokens

VERSION = 1
DATA, DISTRIBUTED = "images", False


@dataclass(frozen=True)
class Recipe:
    """Which views of which images are compared."""

    images: int | None  # of the val split, drawn by the seed, at most; None: all
    views: int  # of each kind, of an image
    crop_scale: tuple[float, ...]  # least and largest area of a crop, of the image's
    covered_percent: float  # of a masked view's pixels, at least
    block: float  # largest side of a block, of the image's
    align: int  # px; the patch size would align blocks with patches
    norm: bool  # the network's final norm
    resize_px: int
    crop_px: int
    interpolation: Interpolation
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("images", "views"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"{name}={value}: expected at least 2, between which something can vary.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            given = ",".join(f"{share:g}" for share in self.crop_scale)
            raise UserError(f"crop_scale={given}: expected two shares of the area, the least first, as in 0.25,1.")
        if not 0 < self.covered_percent <= 50:
            raise UserError(
                f"covered_percent={self.covered_percent:g}: expected more than 0, at most 50; above that GMML's rule "
                "draws the share of every view anew."
            )
        if not 0 < self.block <= 1:
            raise UserError(f"block={self.block:g}: expected a share in (0, 1].")

    @property
    def selected_on(self) -> Literal["none"]:
        """Nothing is chosen."""
        return "none"


_TABLE_10 = "ImageNet, MMC: CLS .19, PAT .32 (DINO .43, 1.00; iBOT .33, .75; MSN .34, .56; MAE .12, .55)"

# Assumptions of all rows stand above; 256 -> 224, bicubic, is what the other protocols show networks.
# fmt: off
RECIPES: dict[str, Recipe] = {
    #                      images views crop scale   covered block align norm   resize crop interpolation
    "mmc":          Recipe(1000,  128,  (0.25, 1.0), 50.0,   0.3,  1,    True,  256,   224, "bicubic",
                           source="MMC, Feature Variance, Table 10; images: ours",
                           published=_TABLE_10),
    "mmc-all":      Recipe(None,  128,  (0.25, 1.0), 50.0,   0.3,  1,    True,  256,   224, "bicubic",
                           source="MMC, Feature Variance, Table 10",
                           published=_TABLE_10),
    "mmc-raw":      Recipe(1000,  128,  (0.25, 1.0), 50.0,   0.3,  1,    False, 256,   224, "bicubic",
                           source="MMC, Feature Variance, Table 10, without the final norm; images: ours",
                           published=_TABLE_10),
    "mmc-raw-all":  Recipe(None,  128,  (0.25, 1.0), 50.0,   0.3,  1,    False, 256,   224, "bicubic",
                           source="MMC, Feature Variance, Table 10, without the final norm",
                           published=_TABLE_10),
    # torchvision's own default area, in case that "random cropping" meant that.
    "default-crop": Recipe(1000,  128,  (0.08, 1.0), 50.0,   0.3,  1,    True,  256,   224, "bicubic",
                           source="MMC, Feature Variance, Table 10, torchvision's crops; images: ours",
                           published=_TABLE_10),
    "toy":          Recipe(64,    128,  (0.25, 1.0), 50.0,   0.3,  1,    True,  256,   224, "bicubic",
                           source="ours, for built-in data",
                           published=""),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """None: no other protocol sees these views."""
    del subject, recipe
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """What the network lacks, and blocks that do not fit the image."""
    view = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
    if len(subject.split("val")) < 1:
        raise UserError(f"dataset {subject.dataset.name} has no val images, of which views are made.")
    if reason := why_not(Reading("patch_mean", view, norm=recipe.norm), subject.checkpoint.architecture):
        raise UserError(f"{subject.checkpoint.spec}: stability cannot be run so: {reason}. Try stability/mmc-raw.")
    side = view.crop_px or subject.split("val").image(0).width  # pixels: takes built-in images as they are, all squares
    check_blocks(side, block=recipe.block, align=recipe.align)


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Variances over the views of every image, one image at a time."""
    split, has_cls = subject.split("val"), subject.checkpoint.architecture.has_cls
    forward = _LastBlock(subject, recipe)
    spreads = {"cls": Spread(), "patch": Spread()} if has_cls else {"patch": Spread()}
    covered, broken = [], 0
    chosen = chosen_images(len(split), recipe.images, subject.seed)
    with bar(f"views of {subject.checkpoint.name} on val", len(chosen)) as advance:
        for views in _drawn(_Views(split, subject, recipe, crops=has_cls), chosen, subject):
            advance(1)
            if isinstance(views, str):
                if not subject.effort.skip_broken:
                    raise refused(views)
                broken += 1
                continue
            if has_cls:
                spreads["cls"].add(forward.cls(views.crops))
            spreads["patch"].add(forward.patches(views))
            covered.append(float(np.mean(views.maps == NOISE)))
    if broken == len(chosen):
        raise UserError(f"not one of {broken} val images could be read; see `ssl-bench data check`.")
    return _scores(subject, recipe, spreads, covered=covered, broken=broken)


def _scores(
    subject: Subject, recipe: Recipe, spreads: dict[str, Spread], *, covered: list[float], broken: int
) -> Scores:
    metrics, warnings, between = {}, [], {}
    for name, spread in spreads.items():
        if not np.isfinite(spread.within).all():
            raise UserError(
                f"{name} tokens of {subject.checkpoint.name} are not finite. Are there NaN in the weights? With fp16 "
                "try bf16 or fp32."
            )
        metrics[f"{name}_variance"] = mean_over_images(spread.within)
        if (of_images := spread.between()) is None:
            why = "do not differ between images" if len(spread.within) > 1 else "of one image only were read"
            warnings.append(f"{name} tokens {why}, so there is no {name}_variance_ratio")
            continue
        between[name] = of_images
        metrics[f"{name}_variance_ratio"] = Score(float(np.mean(spread.within)) / of_images, len(spread.within))
    details = {
        "images": len(covered),
        "of_images": len(subject.split("val")),
        "views": recipe.views,
        "seed": subject.seed,
        "covered_percent": 100 * float(np.mean(covered)),
        "variance_between_images": between,
    }
    return Scores(
        metrics,
        main=next(iter(metrics)),
        warnings=tuple(warnings),
        details=details,
        lower_is_better=True,
        evaluated={"train": 0, "val": len(covered)},
        skipped={"val": broken},
    )


def mean_over_images(values: list[float]) -> Score:
    """The mean with its standard error (ddof 1)."""
    stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(float(np.mean(values)), len(values), stderr=stderr)


def chosen_images(n: int, images: int | None, seed: int) -> list[int]:
    """Indices of at most `images` of `n`, in the order of the split."""
    if images is None or images >= n:
        return list(range(n))
    return sorted(np.random.RandomState(seed).permutation(n)[:images].tolist())


class Spread:
    """Variance of one kind of token: within each image, and between the images' means."""

    def __init__(self) -> None:
        self.within: list[float] = []
        self.mean = torch.zeros((), dtype=torch.float64)  # over images (..., D)
        self.squares = torch.zeros((), dtype=torch.float64)  # sum of squared distances to it (Welford)

    def add(self, tokens: Tensor) -> None:
        """The views of one image. (V, ..., D)"""
        variance, mean = torch.var_mean(tokens, dim=0, correction=1)
        self.within.append(float(variance.mean()))
        step = mean.cpu().double() - self.mean
        self.mean = self.mean + step / len(self.within)
        self.squares = self.squares + step * (mean.cpu().double() - self.mean)

    def between(self) -> float | None:
        """Mean over dimensions (and positions); None if there is nothing but rounding, or only one image."""
        if len(self.within) < 2:
            return None
        variance = float(self.squares.mean()) / (len(self.within) - 1)
        return variance if variance > 1e-10 * float(self.mean.square().mean()) else None


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is seen of one image: crops, and its center view with what covers it in each masked view."""

    crops: npt.NDArray[np.uint8]  # (V, 3, S, S); without a class token, none
    center: npt.NDArray[np.uint8]  # (3, S, S)
    maps: npt.NDArray[np.uint8]  # (V, S, S): 1 where noise is
    noise_at: npt.NDArray[np.int64]  # (V,): place in the table of noise


# Streams of one seed and image.
_CROPS, _MASKS = 1, 2


class _Views(torch.utils.data.Dataset[Any]):
    """Views by the image's index. A broken image comes as its error message, since workers garble exceptions."""

    def __init__(self, split: Split, subject: Subject, recipe: Recipe, *, crops: bool) -> None:
        self.split, self.recipe, self.seed, self.crops = split, recipe, subject.seed, crops
        self.view: View = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)

    def __getitem__(self, index: int) -> Drawn | str:
        try:
            image = self.split.image(index)
        except BrokenImage as error:
            return str(error)
        recipe, center = self.recipe, self.view.pixels(image)
        side = center.shape[-1]
        least, most = recipe.crop_scale
        crop = augment.View((least, most), recipe.interpolation, flip_p=0.0)
        rng = np.random.default_rng((self.seed, index, _CROPS))
        number = recipe.views if self.crops else 0
        crops = augment.draw_views(image, (crop,) * number, image_px=side, patch_px=1, rng=rng)
        rng, share = np.random.default_rng((self.seed, index, _MASKS)), recipe.covered_percent / 100
        masks = [
            draw_corruption(
                rng, side, noise_area=share, alien_area=share, alien_share=0.0, block=recipe.block, align=recipe.align
            )
            for _ in range(recipe.views)
        ]
        maps, noise_at = zip(*masks, strict=True)
        return Drawn(np.array(crops, np.uint8), center, np.stack(maps), np.array(noise_at, np.int64))


# Fewer views than this are drawn sooner than processes are started.
_WORTH_WORKERS = 2**14


def _drawn(views: _Views, chosen: list[int], subject: Subject) -> Iterator[Drawn | str]:
    """One image after the other, drawn by worker processes while the network computes."""
    automatic = automatic_workers(1) if len(chosen) * views.recipe.views >= _WORTH_WORKERS else 0
    workers = automatic if subject.effort.workers is None else subject.effort.workers
    return iter(
        torch.utils.data.DataLoader(
            views,
            sampler=chosen,
            batch_size=None,
            num_workers=workers,
            generator=torch.Generator(),  # else a seed for the workers would be drawn from the global generator
        )
    )


class _LastBlock:
    """Views -> tokens of the last block in float32, by batches through the network."""

    def __init__(self, subject: Subject, recipe: Recipe) -> None:
        self.backbone, self.effort, self.norm = subject.backbone, subject.effort, recipe.norm
        architecture, device = self.backbone.architecture, subject.effort.device
        view = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
        tokens = max((view.crop_px or architecture.image_px) // architecture.patch_px, 1) ** 2
        self.batch = subject.effort.batch_size or (max(4, 4096 // tokens) if device == "cpu" else 256)
        choose_attention(self.backbone.modules(), device=device, tokens=tokens)
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (architecture.mean, architecture.std)
        )
        self.corruption = Corruption().to(device)

    def cls(self, crops: npt.NDArray[np.uint8]) -> Tensor:
        """The class token of every crop. (V, D)"""
        parts = []
        for piece in self._pieces(len(crops)):
            tokens = self._tokens(self._normalized(crops[piece]))
            assert tokens.cls is not None
            parts.append(tokens.cls)
        return torch.cat(parts)

    def patches(self, views: Drawn) -> Tensor:
        """The patch tokens of every masked view. (V, H, W, D)"""
        clean, parts = self._normalized(views.center), []
        for piece in self._pieces(len(views.maps)):
            maps, noise_at = (
                torch.from_numpy(drawn[piece]).to(self.effort.device)[None] for drawn in (views.maps, views.noise_at)
            )
            covered = self.corruption(clean.expand(1, maps.shape[1], -1, -1, -1), maps, noise_at)[0]
            parts.append(self._tokens(covered).patches)
        return torch.cat(parts)

    def _pieces(self, views: int) -> list[slice]:
        """Batches of one image's views, about equally large."""
        size = -(-views // -(-views // self.batch))
        return [slice(start, start + size) for start in range(0, views, size)]

    def _normalized(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(pixels).to(self.effort.device).float().div_(255).sub_(self.mean).div_(self.std)

    @torch.inference_mode()
    def _tokens(self, images: Tensor) -> Tokens:
        device, dtype = torch.device(self.effort.device), DTYPES[self.effort.dtype]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            tokens: Tokens = self.backbone(images, norm=self.norm).tokens[0]
        cls = None if tokens.cls is None else tokens.cls.float()
        return replace(tokens, cls=cls, patches=tokens.patches.float())
