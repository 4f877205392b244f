"""What a method shows its student (MMC, Fig. 8): views and masks drawn by the code that trains it.

A sample is drawn as the loop would draw it (pretrain/method.py), with the recipe of the checkpoint if it was trained by
this method, else the first row of its table or the one that is named, at the checkpoint's own image and patch size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.pictures.masked import without
from ssl_bench.evaluate.pictures.sheet import Cell, Row, sheet, shown
from ssl_bench.evaluate.pictures.views import denormalized, normalized, picture
from ssl_bench.evaluate.recipes import with_settings
from ssl_bench.evaluate.training.augment import augmentation_named
from ssl_bench.evaluate.training.blockwise import ALIEN, Corruption
from ssl_bench.evaluate.training.loader import sample_generator

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ssl_bench.evaluate.architecture import Architecture
    from ssl_bench.evaluate.checkpoints import Checkpoint

_CELLS_A_ROW = 6

Seen = list[tuple[str, "Tensor"]]  # labels, and images in [0, 1] (1, 3, S, S)
Batch = Sequence["Tensor"]  # views in [0, 1] (B, 3, S, S), or draws (B, ...); the picture is of the first image


def choose_recipe(method: str, checkpoint: Checkpoint) -> tuple[str, str, Any]:
    """Method, name of the recipe, and recipe: `mmc`, or `mmc/vit-b`."""
    from ssl_bench.pretrain.catalog import choose

    name, _, row = method.partition("/")
    origin: Any = checkpoint.origin
    if not row and origin.get("method") == name and "recipe" in origin:
        settings = {key: value for key, value in origin.get("overrides", {}).items() if key != "arch"}
        _, row, recipe = choose(name, str(origin["recipe"]), built_in=False)
        return name, row, with_settings(recipe, settings)
    _, row, recipe = choose(name, row or None, built_in=False)
    return name, row, recipe


def why_not(checkpoint: Checkpoint) -> str | None:
    """Why there is no size to draw views for, in words; None if there is."""
    return None if checkpoint.architecture.image_px else "the image itself has no input size to draw views for"


def draw(method: str, checkpoint: Checkpoint, images: Sequence[Image.Image], *, seed: int) -> Image.Image:
    """Views and what is left of them, of the first image; others lend their pixels where the method wants some."""
    from ssl_bench.pretrain.catalog import METHODS
    from ssl_bench.pretrain.method import Sampling

    name, row, recipe = choose_recipe(method, checkpoint)
    architecture = checkpoint.architecture
    sampling = Sampling(
        augmentation=augmentation_named(recipe.augmentation),
        image_px=architecture.image_px,
        patch_px=architecture.patch_px,
        draw=functools.partial(METHODS[name].draw, recipe, architecture),
    )
    samples = [sampling(image, index, sample_generator(seed, 0, index)) for index, image in enumerate(images)]
    views = [torch.from_numpy(np.stack(each)).float() / 255 for each in zip(*(s[0] for s in samples), strict=True)]
    draws = [torch.from_numpy(np.stack(each)) for each in zip(*(s[1] for s in samples), strict=True)]
    drawn = [(f"view {number + 1}", view[:1]) for number, view in enumerate(views)]
    rows = [
        *_rows([Cell(shown(images[0]), "original"), *map(_cell, drawn)], "views"),
        *_rows(list(map(_cell, _INPUTS[name](recipe, architecture, views, draws))), "inputs"),
    ]
    note = (
        f"{name}/{row}, for {architecture.name}, seed {seed}. {_HIDDEN.get(name, 'Gray patches are hidden.')} "
        f"Augmentation: {recipe.augmentation}."
    )
    return sheet(f"What {name} shows its student", rows, note=note)


def _cell(labeled: tuple[str, Tensor]) -> Cell:
    return Cell(shown(picture(labeled[1])), labeled[0])


def _rows(cells: Sequence[Cell], heading: str) -> list[Row]:
    starts = range(0, len(cells), _CELLS_A_ROW)
    return [Row(cells[at : at + _CELLS_A_ROW], "" if at else heading) for at in starts]


def _left(view: Tensor, visible: Tensor, architecture: Architecture) -> Tensor:
    return without(view[:1], visible.reshape(1, -1), architecture.patch_px)


def _one_mask(recipe: Any, architecture: Architecture, views: Batch, draws: Batch) -> Seen:
    """MAE, TEC: the first patches of a random order."""
    from ssl_bench.pretrain.networks import kept_patches

    order = draws[0][0]
    count = kept_patches(len(order), recipe.mask_ratio)
    return [(f"{count} of {len(order)} patches", _left(views[0], order[:count], architecture))]


def _folds(recipe: Any, architecture: Architecture, views: Batch, draws: Batch) -> Seen:
    """SdAE: the student's patches, and the folds of the others that the teacher sees one by one."""
    from ssl_bench.pretrain.networks import kept_patches
    from ssl_bench.pretrain.sdae import patches_of_a_fold

    order = draws[0][0]
    seen = _one_mask(recipe, architecture, views, draws)
    if recipe.teacher_input == "image":
        return [*seen, ("teacher: all patches", views[0][:1])]
    count = kept_patches(len(order), recipe.mask_ratio)
    size = patches_of_a_fold(recipe, len(order) - count)
    folds = order[count : count + recipe.folds * size].reshape(recipe.folds, size)
    return seen + [
        (f"teacher, fold {number + 1}: {size} patches", _left(views[0], fold, architecture))
        for number, fold in enumerate(folds)
    ]


def _several_masks(recipe: Any, architecture: Architecture, views: Batch, draws: Batch) -> Seen:
    """ExtreMA: masks of one view; the teacher sees all of the last one."""
    masks = draws[0][0]
    return [
        *(
            (f"mask {number + 1}: {len(mask)} patches", _left(views[0], mask, architecture))
            for number, mask in enumerate(masks)
        ),
        ("teacher: all patches", views[-1][:1]),
    ]


def _two_views(recipe: Any, architecture: Architecture, views: Batch, draws: Batch) -> Seen:
    """MOCA: both views in every masking round."""
    from ssl_bench.pretrain.moca import rounds

    found = []
    for number, (visible, decoded) in enumerate(rounds(recipe, architecture.grid**2)):
        for view in range(2):
            ids = draws[number][0, view]
            label = f"round {number + 1}, view {view + 1}: {visible} patches, {decoded} to predict"
            found.append((label, _left(views[view], ids[:visible], architecture)))
    return found


def _covered(recipe: Any, architecture: Architecture, views: Batch, draws: Batch) -> Seen:
    """MMC: noise or another image's pixels over blocks; local views are given as they are drawn above."""
    maps, noise_at = draws
    if len(maps) < 2 and bool((maps == ALIEN).any()):
        raise UserError(
            "--masked-views mmc covers this view with the pixels of another image, and only one was given: name two "
            "images or more, or try another --seed."
        )
    clean = torch.stack([normalized(view, architecture) for view in views[:2]])
    masked = Corruption()(clean, maps.transpose(0, 1), noise_at.T)[:, :1]
    labels = ("covered by another image" if bool((each == ALIEN).any()) else "covered by noise" for each in maps[0])
    return [
        (f"view {number + 1}, {label}", denormalized(each, architecture))
        for number, (each, label) in enumerate(zip(masked, labels, strict=True))
    ]


_HIDDEN = {
    "mmc": "Noise or another image covers blocks of the first two views; other views are local, and given as they are."
}
_INPUTS: dict[str, Callable[[Any, Architecture, Batch, Batch], Seen]] = {
    "mae": _one_mask,
    "tec": _one_mask,
    "sdae": _folds,
    "extrema": _several_masks,
    "moca": _two_views,
    "mmc": _covered,
}
