"""What zeroshot and similarity share: every val image as a grid of patch tokens, with what each token shows.

The whole image is brought to a square of `image_px`, as MMC does (480 x 480), whatever its shape. The masks are not
resized: each token is held against its own rectangle of the original mask, and areas are counted exactly
(evaluate/patch_areas.py). A token belongs to what covers most of its area:

    by instance   an object, no object, or what is ignored
    by class      a category, no object, or what is ignored: the areas of a category's objects in the image count
                  together. Within its category the token belongs to the object that covers most of it

So by class a token of 30 % sheep, 30 % another sheep and 40 % meadow is the first sheep's, as it is sheep where masks
tell classes alone; by instance it is nobody's. Of equals, the first object or category wins, and any over none.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)
from PIL import Image
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.features import DTYPES
from ssl_bench.evaluate.hardware import choose_attention
from ssl_bench.evaluate.loading import WORTH_WORKERS, Effort, refused
from ssl_bench.evaluate.object_masks import IGNORE, ObjectImage, ObjectMasks
from ssl_bench.evaluate.patch_areas import Areas, patch_areas
from ssl_bench.evaluate.readings import Interpolation, Reading, View, why_not
from ssl_bench.evaluate.subject import IntArray, Subject
from ssl_bench.evaluate.training.loader import automatic_workers
from ssl_bench.progress import bar

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Backbone, Pixels

SPLIT = "val"
_LARGEST_PX = 8192


@dataclass(frozen=True)
class PatchRecipe:
    """Which tokens are read."""

    image_px: int  # the side of the square that every image is brought to
    interpolation: Interpolation
    layer: int  # block; 0 is the first, -1 the last
    norm: bool  # the network's final norm

    @property
    def by_class(self) -> bool:
        """Whether the objects of a category count together when a token is given to what covers most of it."""
        return True

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 1 <= self.image_px <= _LARGEST_PX:
            raise UserError(f"image_px={self.image_px}: expected a size in pixels up to {_LARGEST_PX}, such as 480.")


def check_tokens(subject: Subject, recipe: PatchRecipe, protocol: str) -> None:
    """A network that has the layer and the norm, a size that divides into patches, and images to read."""
    checkpoint, patch = subject.checkpoint, subject.checkpoint.architecture.patch_px
    whole = View(recipe.image_px, recipe.image_px, recipe.interpolation)
    if reason := why_not(Reading("patch_mean", whole, recipe.layer, recipe.norm), checkpoint.architecture):
        remedy = "--set norm=false" if "final norm" in reason else "--set layer=-1"
        raise UserError(f"{checkpoint.spec}: {protocol} cannot be run so: {reason}. Try {remedy}.")
    if recipe.image_px % patch:
        below = max(recipe.image_px // patch, 1) * patch
        raise UserError(
            f"image_px={recipe.image_px} does not divide into patches of {patch} px; choose a multiple of {patch}: "
            f"--set image_px={below} or --set image_px={below + patch}."
        )
    images, dataset = subject.split(SPLIT), subject.dataset
    assert isinstance(dataset, ObjectMasks)
    if not len(images):
        raise UserError(f"the {SPLIT} split of {dataset.name} has no images; give at least one.")


@dataclass(frozen=True, eq=False)
class TokenImage:
    """One image: its tokens in row-major order, and what they show."""

    sample_id: str
    place: int  # in the split
    pixels: npt.NDArray[np.uint8]  # (3, S, S), as the network sees it
    ids: tuple[int, ...]  # of the n objects
    categories: tuple[int, ...]
    areas: Areas  # (n + 2, N): how much of each token is covered by each object, by no object, and ignored
    by_class: bool
    crowds: int = 0
    without_outline: int = 0
    features: Tensor = field(default_factory=lambda: torch.empty(0))  # (N, D) float32, of unit length

    @cached_property
    def label(self) -> IntArray:
        """Of every token, the object's place from 0 to n - 1; n is no object, n + 1 ignored. (N,)"""
        label: IntArray = self.areas.argmax(axis=0)
        if not self.by_class:
            return label
        kinds = [*dict.fromkeys(self.categories), -1, -2]  # no object and ignored are kinds of their own
        of_kind = np.array([*self.categories, -1, -2]) == np.array(kinds)[:, None]  # (kinds, n + 2)
        kind = (of_kind.astype(np.float64) @ self.areas).argmax(axis=0)
        # Of each kind the object that covers most of the token.
        largest = np.stack([np.where(each[:, None], self.areas, -1).argmax(axis=0) for each in of_kind])
        label = largest[kind, np.arange(len(kind))]
        return label

    @property
    def without_token(self) -> int:
        """Objects that no token belongs to: smaller than a patch, most of them."""
        return len(self.ids) - len(np.intersect1d(self.label, np.arange(len(self.ids))))

    def drawn(self, place: int, seed: int) -> int | None:
        """One of an object's tokens; None if it has none.

        Which one depends on seed, image and object alone, not on the order of the images or on --limit.
        """
        own = np.flatnonzero(self.label == place)
        if not len(own):
            return None
        said = f"token of an object, seed {seed}: {self.sample_id} {self.ids[place]}"
        digest = hashlib.sha256(said.encode("utf-8", "surrogateescape")).digest()
        return int(own[int.from_bytes(digest[:8], "big") % len(own)])


@dataclass
class Read:
    """What was read, counted."""

    images: int = 0
    broken: int = 0
    images_without_objects: int = 0
    objects: int = 0
    objects_without_token: int = 0
    objects_without_outline: int = 0  # these and crowds are no objects: ignored
    crowds: int = 0

    def add(self, image: TokenImage) -> None:
        """One more."""
        self.images += 1
        self.images_without_objects += not image.ids
        self.objects += len(image.ids)
        self.objects_without_token += image.without_token
        self.objects_without_outline += image.without_outline
        self.crowds += image.crowds


def token_images(subject: Subject, recipe: PatchRecipe, read: Read) -> Iterator[TokenImage]:
    """Every val image in turn, but broken ones (--skip-broken); `read` counts all of them."""
    tokens_of = _Tokens(subject.backbone, recipe, subject.effort)
    images = _readable(subject, recipe, read)
    while batch := list(itertools.islice(images, tokens_of.batch_size)):
        for image in tokens_of(batch):
            read.add(image)
            yield image
    if not read.images:
        raise UserError(f"not one of {read.broken} images of {subject.dataset.name} could be read; look at the files.")


def _readable(subject: Subject, recipe: PatchRecipe, read: Read) -> Iterator[TokenImage]:
    """Images without their features, decoded by worker processes where there are many."""
    dataset, effort = _Images(subject, recipe), subject.effort
    automatic = automatic_workers(1) if len(dataset) >= WORTH_WORKERS else 0
    workers = automatic if effort.workers is None else effort.workers
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
    with bar(f"patch tokens of {subject.checkpoint.name} on {subject.dataset.name}", len(dataset)) as advance:
        for each in loader:
            advance(1)
            if isinstance(each, BrokenImage):
                if not effort.skip_broken:
                    raise refused(str(each))
                read.broken += 1
            elif isinstance(each, UserError):
                raise each
            else:
                yield each


class _Images(torch.utils.data.Dataset[Any]):
    """Images without their features. An error comes as itself, since workers garble what is raised in them."""

    def __init__(self, subject: Subject, recipe: PatchRecipe) -> None:
        assert isinstance(subject.dataset, ObjectMasks)
        self.dataset, self.recipe = subject.dataset, recipe
        self.names = subject.split(SPLIT).sample_ids
        self.grid = recipe.image_px // subject.checkpoint.architecture.patch_px

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> TokenImage | UserError:
        try:
            seen = self.dataset.objects(SPLIT, index)
        except UserError as error:
            return error
        areas = patch_areas(seen.numbers, [*range(1, 1 + len(seen.ids)), 0, IGNORE], (self.grid, self.grid))
        return TokenImage(
            sample_id=self.names[index],
            place=index,
            pixels=self._pixels(seen),
            ids=seen.ids,
            categories=seen.categories,
            areas=areas,
            by_class=self.recipe.by_class,
            crowds=seen.crowds,
            without_outline=seen.without_outline,
        )

    def _pixels(self, seen: ObjectImage) -> npt.NDArray[np.uint8]:
        size, how = (self.recipe.image_px,) * 2, Image.Resampling[self.recipe.interpolation.upper()]
        return np.ascontiguousarray(np.asarray(seen.image.resize(size, how)).transpose(2, 0, 1))


class _Tokens:
    """The network's patch tokens, of unit length."""

    def __init__(self, backbone: Backbone | Pixels, recipe: PatchRecipe, effort: Effort) -> None:
        self.backbone, self.recipe, self.effort = backbone, recipe, effort
        architecture = backbone.architecture
        tokens = (recipe.image_px // architecture.patch_px) ** 2
        automatic = max(1, (4096 if effort.device == "cpu" else 65536) // tokens)
        self.batch_size = effort.batch_size or automatic
        choose_attention(backbone.modules(), device=effort.device, tokens=tokens)
        self.mean, self.std = (
            torch.tensor(each, device=effort.device).view(3, 1, 1) for each in (architecture.mean, architecture.std)
        )

    def __call__(self, images: list[TokenImage]) -> list[TokenImage]:
        """With their features."""
        features = self._features(torch.from_numpy(np.stack([image.pixels for image in images])))
        for image, found in zip(images, features, strict=True):
            if not found.isfinite().all():
                raise UserError(
                    f"patch tokens of {image.sample_id} are not finite. Are there NaN in the weights? With fp16 try "
                    "bf16 or fp32."
                )
        return [replace(image, features=found) for image, found in zip(images, features, strict=True)]

    @torch.inference_mode()
    def _features(self, pixels: Tensor) -> Tensor:
        device, dtype = self.mean.device, DTYPES[self.effort.dtype]
        images = pixels.to(device).float().div_(255).sub_(self.mean).div_(self.std)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            tokens = self.backbone(images, layers=(self.recipe.layer,), norm=self.recipe.norm).tokens[0]
        return F.normalize(tokens.patches.float().flatten(1, 2), dim=-1)
