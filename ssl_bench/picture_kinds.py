"""The kinds of pictures that `ssl-bench show` draws, each by a file of evaluate/pictures/.

To add one, write its file there, a function here that composes it, and its line in KINDS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_bench.errors import UserError
from ssl_bench.progress import bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from ssl_bench.evaluate.checkpoints import Checkpoint
    from ssl_bench.evaluate.pictures.views import Point, Seen


@dataclass(frozen=True)
class Options:
    """Everything beside the network and the images."""

    kinds: Sequence[str] = ()  # none: what this network can do of DEFAULT, or what the options below ask for
    beside: Sequence[str] = ()  # more checkpoints, drawn beside the first
    points: Sequence[str] = ()  # "x,y"
    out: Path = Path("pictures")
    size_px: int | None = None
    layer: int = -1
    thresholds: Sequence[float] = ()
    masks: Sequence[Path] = ()  # histogram: one for every image
    query: Path | None = None  # locality: the image from which the query is cut; None: each image itself
    box: str | None = None  # "left,top,right,bottom" in it
    invert: bool = False
    steps: int | None = None
    mask_ratios: Sequence[float] = ()
    masked_views: str | None = None
    device: str = "auto"
    seed: int = 0
    checkpoint_key: str | None = None
    arch: Mapping[str, str] = field(default_factory=dict)


def label(checkpoint: Checkpoint) -> str:
    """The model's name, with the network of the file if it holds several."""
    return f"{checkpoint.name}, {checkpoint.key}" if checkpoint.others else checkpoint.name


@dataclass(frozen=True, eq=False)
class Network:
    """A checkpoint, and how to open it as a protocol would."""

    checkpoint: Checkpoint
    name: str
    reopen: Callable[[str], Checkpoint]

    @functools.cached_property
    def rebuilding(self) -> Checkpoint:
        """The network of the file whose head gives pixels: MMC's student, who alone learns it."""
        return self.reopen("reconstruction")


@dataclass(frozen=True, eq=False)
class Scene:
    """One image and all networks: what a kind of picture is drawn from."""

    networks: Sequence[Network]
    image: Image
    others: Sequence[Path]  # the other images
    points: tuple[Point, ...]
    mask: Path | None
    kinds: Sequence[str]
    options: Options
    device: str

    @functools.cached_property
    def seen(self) -> list[Seen]:
        """One forward pass a network, for all kinds that can share it."""
        from ssl_bench.evaluate.pictures.views import Look, look

        request = Look(
            points=self.points,
            layer=self.options.layer,
            size_px=self.options.size_px,
            blocks="layers" in self.kinds,
            attention=not {"attention", "queries"}.isdisjoint(self.kinds),
        )
        return [
            look(each.checkpoint, self.image, request, name=each.name, device=self.device) for each in self.networks
        ]


def _similarity(scene: Scene) -> Image:
    from ssl_bench.evaluate.pictures import similarity

    return similarity.draw(scene.seen, scene.options.thresholds or similarity.THRESHOLDS)


def _attention(scene: Scene) -> Image:
    from ssl_bench.evaluate.pictures import attention

    return attention.draw(scene.seen)


def _queries(scene: Scene) -> Image:
    from ssl_bench.evaluate.pictures import attention

    return attention.draw_queries(scene.seen)


def _clusters(scene: Scene) -> Image:
    from ssl_bench.evaluate.pictures import clusters

    return clusters.draw(scene.seen, seed=scene.options.seed)


def _histogram(scene: Scene) -> Image:
    from ssl_bench.evaluate.pictures import histogram

    assert scene.mask is not None
    return histogram.draw(scene.seen, histogram.read_mask(scene.mask, scene.image))


def _layers(scene: Scene) -> Image:
    from ssl_bench.evaluate.pictures import layers

    with_adapters = {
        each.name: each.checkpoint for each in scene.networks if "encoder_adapter" in each.checkpoint.extras
    }
    shares = {
        seen.name: layers.adapter_shares(with_adapters[seen.name], seen.blocks)
        for seen in scene.seen
        if seen.name in with_adapters
    }
    return layers.draw(scene.seen, shares)


def _reconstruction(scene: Scene) -> Image:
    from ssl_bench.evaluate.pictures import reconstruction as pictures

    found = [
        (
            each.rebuilding,
            label(each.rebuilding),
            pictures.reconstruct(each.rebuilding, scene.image, seed=scene.options.seed, device=scene.device),
        )
        for each in scene.networks
    ]
    return pictures.draw(found)


def _inversion(scene: Scene) -> Image:
    from ssl_bench.evaluate.pictures import inversion

    ratios, steps = scene.options.mask_ratios or inversion.MASK_RATIOS, scene.options.steps or inversion.STEPS
    with bar("inverting", len(scene.networks) * len(ratios) * steps) as advance:
        found = [
            (
                each.name,
                inversion.inversions(
                    each.checkpoint,
                    scene.image,
                    ratios,
                    steps=steps,
                    seed=scene.options.seed,
                    device=scene.device,
                    advance=advance,
                ),
            )
            for each in scene.networks
        ]
    return inversion.draw(scene.image, found)


def _locality(scene: Scene) -> Image:
    import numpy as np

    from ssl_bench.evaluate.decoding import decode_image
    from ssl_bench.evaluate.pictures import locality as pictures
    from ssl_bench.protocols.locality import RECIPES, draw_gallery

    source = scene.options.query
    image = scene.image if source is None else decode_image(source, shown_as=str(source))
    query = image.crop(query_box(scene.options.box, image, scene.points[0] if source is None else None))
    recipe, (width, height) = RECIPES["extrema"], scene.image.size
    rng = np.random.default_rng(scene.options.seed)
    boxes = draw_gallery(rng, width, height, scales=recipe.scales, places=recipe.places).tolist()
    found = [
        pictures.retrieve(each.checkpoint, scene.image, query, boxes, name=each.name, device=scene.device)
        for each in scene.networks
    ]
    return pictures.draw(scene.image, query, boxes, found)


def _masked_views(scene: Scene) -> Image:
    from ssl_bench import masked_views
    from ssl_bench.evaluate.decoding import decode_image

    method = scene.options.masked_views
    assert method is not None
    others = [decode_image(path, shown_as=str(path)) for path in scene.others[:1]]  # the one that lends its pixels
    first = scene.networks[0].checkpoint
    return masked_views.draw(method, first, [scene.image, *others], seed=scene.options.seed)


def _anything(network: Network) -> str | None:
    return None


def _why_no_class_attention(network: Network) -> str | None:
    from ssl_bench.evaluate.pictures.views import why_no_attention

    return why_no_attention(network.checkpoint, of_class=True)


def _why_no_attention(network: Network) -> str | None:
    from ssl_bench.evaluate.pictures.views import why_no_attention

    return why_no_attention(network.checkpoint, of_class=False)


def _why_no_blocks(network: Network) -> str | None:
    return "the image itself has no blocks" if network.checkpoint.format == "pixels" else None


def _why_no_reconstruction(network: Network) -> str | None:
    from ssl_bench.evaluate.pictures.reconstruction import why_not

    return why_not(network.rebuilding)


def _why_no_inversion(network: Network) -> str | None:
    from ssl_bench.evaluate.pictures.inversion import why_not

    return why_not(network.checkpoint)


def _why_no_views(network: Network) -> str | None:
    from ssl_bench.masked_views import why_not

    return why_not(network.checkpoint)


@dataclass(frozen=True)
class Kind:
    """One kind of picture: how it is drawn, and why a network cannot have it."""

    draw: Callable[[Scene], Image]
    why_not: Callable[[Network], str | None] = _anything


# fmt: off
KINDS: dict[str, Kind] = {
    "similarity":     Kind(_similarity),  # cosine of the patch under a point with all patches, masks by threshold
    "attention":      Kind(_attention, _why_no_class_attention),  # of the class token, by head and in one picture
    "queries":        Kind(_queries, _why_no_attention),  # attention of the patches under points, mean of heads
    "clusters":       Kind(_clusters),  # patches in three groups by k-means
    "layers":         Kind(_layers, _why_no_blocks),  # CKA of every block with the last; shares of TEC's adapters
    "histogram":      Kind(_histogram),  # similarity within and between the objects of --mask
    "reconstruction": Kind(_reconstruction, _why_no_reconstruction),  # pixels from each of the last blocks
    "inversion":      Kind(_inversion, _why_no_inversion),  # the image that masked features describe; slow
    "locality":       Kind(_locality),  # the box of the image that is most like a crop
    "masked-views":   Kind(_masked_views, _why_no_views),  # what a method shows its student
}
# fmt: on
DEFAULT = ("similarity", "attention", "clusters")


def whole_numbers(text: str, count: int, option: str, expected: str) -> list[int]:
    """The numbers of an option such as `120,80`."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise UserError(f"{option} {text}: expected {expected}.")
    return numbers


def query_box(text: str | None, image: Image, point: Point | None) -> tuple[int, int, int, int]:
    """Where the query is cut out; without a box half of the shorter side, around the point or the center."""
    width, height = image.size
    if text is None:
        x, y = point or (width // 2, height // 2)
        side = max(1, min(width, height) // 2)
        left, top = min(max(0, x - side // 2), width - side), min(max(0, y - side // 2), height - side)
        return left, top, left + side, top + side
    left, top, right, bottom = whole_numbers(text, 4, "--box", "left,top,right,bottom in pixels")
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(
            f"--box {text}: expected 0 <= left < right <= {width} and 0 <= top < bottom <= {height} in an image of "
            f"{width} x {height} px."
        )
    return left, top, right, bottom
