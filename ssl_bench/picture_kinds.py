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
    from ssl_bench.evaluate.pictures.histogram import Mask
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
    others: Sequence[Image]  # the other images
    points: tuple[Point, ...]
    mask: Mask | None
    query: Image | None
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
            attention=reads_attention(self.kinds),
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
    return histogram.draw(scene.seen, scene.mask)


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

    from ssl_bench.evaluate.pictures import locality as pictures
    from ssl_bench.protocols.locality import RECIPES, draw_gallery

    image = scene.query or scene.image
    query = image.crop(query_box(scene.options.box, image, None if scene.query else scene.points[0]))
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

    method = scene.options.masked_views
    assert method is not None
    lender = scene.others[:1]  # of its pixels
    first = scene.networks[0].checkpoint
    return masked_views.draw(method, first, [scene.image, *lender], seed=scene.options.seed)


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
    """One kind of picture: how it is drawn, which options it reads, and why a network cannot have it."""

    draw: Callable[[Scene], Image]
    reads: str  # of READ_BY_SOME
    why_not: Callable[[Network], str | None] = _anything


# fmt: off
KINDS: dict[str, Kind] = {
    # cosine of the patch under a point with all patches, masks by threshold
    "similarity":     Kind(_similarity, "beside points size_px layer thresholds"),
    # of the class token, by head and in one picture
    "attention":      Kind(_attention, "beside size_px layer", _why_no_class_attention),
    # attention of the patches under points, mean of heads
    "queries":        Kind(_queries, "beside points size_px layer", _why_no_attention),
    # patches in three groups by k-means
    "clusters":       Kind(_clusters, "beside size_px layer"),
    # CKA of every block with the last; shares of TEC's adapters
    "layers":         Kind(_layers, "beside size_px", _why_no_blocks),
    # similarity within and between the objects of --mask
    "histogram":      Kind(_histogram, "beside size_px layer masks"),
    # pixels from each of the last blocks
    "reconstruction": Kind(_reconstruction, "beside", _why_no_reconstruction),
    # the image that masked features describe; slow
    "inversion":      Kind(_inversion, "beside steps mask_ratios", _why_no_inversion),
    # the box of the image that is most like a crop
    "locality":       Kind(_locality, "beside points query box"),
    # what a method shows its student
    "masked-views":   Kind(_masked_views, "masked_views", _why_no_views),
}
# Fields of Options and what they are called on the command line.
READ_BY_SOME = {
    "beside": "--beside", "points": "--point", "size_px": "--size", "layer": "--layer", "thresholds": "--threshold",
    "masks": "--mask", "query": "--query", "box": "--box", "steps": "--steps", "mask_ratios": "--mask-ratio",
    "masked_views": "--masked-views",
}
# fmt: on
DEFAULT = ("similarity", "attention", "clusters")


def reads_attention(kinds: Sequence[str]) -> bool:
    """Whether any of them draws attention, which a network has to write down for every pair of patches."""
    return not {"attention", "queries"}.isdisjoint(kinds)


def check_read(options: Options, kinds: Sequence[str]) -> None:
    """Refuse an option that nothing of what is drawn reads."""
    for name, flag in READ_BY_SOME.items():
        readers = [kind for kind, each in KINDS.items() if name in each.reads.split()]
        given = (getattr(options, name) or None) != (getattr(Options(), name) or None)  # [] is as good as ()
        if given and set(kinds).isdisjoint(readers):
            raise UserError(
                f"{flag} is read by {', '.join(readers)}, and what would be drawn is {', '.join(kinds)}: leave it out, "
                f"or add --kind {readers[0]}."
            )
    if (
        options.query is not None
        and options.points
        and not any("points" in KINDS[kind].reads.split() for kind in kinds if kind != "locality")
    ):
        raise UserError("--point says where the query is cut out of the image itself; with --query FILE use --box.")


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
