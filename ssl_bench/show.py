"""`ssl-bench show`: pictures of what a network makes of images. Decides what to draw and where; others draw.

What can be refused without a forward pass is refused before the first picture is drawn. A picture is a PNG named after
image and kind, `cat-similarity.png`, written whole or not at all. A file of that name is replaced if `show` wrote it,
which the PNG itself says, and never otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import UserError, unknown
from ssl_bench.files import atomic_file, expanded, require_writable
from ssl_bench.picture_kinds import (
    DEFAULT,
    KINDS,
    Network,
    Options,
    Scene,
    check_read,
    label,
    query_box,
    reads_attention,
    whole_numbers,
)
from ssl_bench.progress import say

if TYPE_CHECKING:
    from PIL.Image import Image

    from ssl_bench.evaluate.checkpoints import Checkpoint
    from ssl_bench.evaluate.pictures.histogram import Mask
    from ssl_bench.evaluate.pictures.views import Point


def show(spec: str, images: Sequence[Path], options: Options | None = None) -> list[Path]:
    """Draw every kind of every image, and return the files. Images are decoded once, and all kept until the end."""
    from ssl_bench.evaluate.decoding import decode_image
    from ssl_bench.machine import device_named

    options = options or Options()
    _check(options, images)
    decoded = {path: decode_image(path, shown_as=str(path)) for path in images}
    points = {path: _points(options.points, path, image.size) for path, image in decoded.items()}
    device = device_named(options.device)
    networks = _open(spec, options)
    kinds = _kinds(options, networks)
    check_read(options, kinds)
    _check_networks(kinds, options, [image.size for image in decoded.values()], networks)
    query = _query(kinds, options, decoded)
    masks = _masks(kinds, options, decoded)
    files = _files(images, kinds, options.out)
    for number, (path, image) in enumerate(decoded.items()):
        scene = Scene(
            networks=networks,
            image=image,
            others=[decoded[other] for other in [*images[number + 1 :], *images[:number]]],
            points=points[path],
            mask=masks.get(path),
            query=query,
            kinds=kinds,
            options=options,
            device=device,
        )
        _draw(scene, {kind: files[path, kind] for kind in kinds})
    return list(files.values())


def _draw(scene: Scene, files: Mapping[str, Path]) -> None:
    from ssl_bench.evaluate.pictures.sheet import png

    for kind, file in files.items():
        content = png(KINDS[kind].draw(scene))
        with atomic_file(file) as temporary:
            temporary.write_bytes(content)


def _check(options: Options, images: Sequence[Path]) -> None:
    """What is wrong whatever the network is."""
    for kind in options.kinds:
        if kind not in KINDS:
            raise unknown("kind of picture", kind, KINDS)
    if not images:
        raise UserError("no image was given; name one or several files.")
    for name, value in (("--size", options.size_px), ("--steps", options.steps)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: expected at least 1.")
    for threshold in options.thresholds:
        if not -1 <= threshold < 1:
            raise UserError(f"--threshold {threshold:g}: expected a cosine in [-1, 1).")
    for ratio in options.mask_ratios:
        if not 0 < ratio < 1:
            raise UserError(f"--mask-ratio {ratio:g}: expected a share between 0 and 1, for example 0.75.")
    if "histogram" in options.kinds and not options.masks:
        raise UserError("--kind histogram needs to know the objects: --mask FILE, one for every image.")
    if options.masks and len(options.masks) != len(images):
        raise UserError(f"{len(options.masks)} --mask for {len(images)} images; expected one for each, in their order.")
    if "masked-views" in options.kinds and options.masked_views is None:
        raise UserError("--kind masked-views needs a method: --masked-views mmc (ssl-bench ls methods).")
    for path in images:
        twin = next((other for other in images if other is not path and other.stem == path.stem), None)
        if twin is not None:
            raise UserError(
                f"{path} and {twin} have the same name, so their pictures would, too. Draw them one after the other "
                "with an --out of their own."
            )


def _points(texts: Sequence[str], path: Path, size: tuple[int, int]) -> tuple[Point, ...]:
    """Pixels of the image; its center if none is given."""
    width, height = size
    found = []
    for text in texts:
        x, y = whole_numbers(text, 2, "--point", "x,y in pixels, for example 120,80")
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"--point {text} lies outside of {path}, which has {width} x {height} px: expected x in 0 to "
                f"{width - 1}, y in 0 to {height - 1}."
            )
        found.append((x, y))
    return tuple(dict.fromkeys(found)) or ((width // 2, height // 2),)


def _open(spec: str, options: Options) -> list[Network]:
    """All checkpoints under different names. --checkpoint-key and --arch speak of the first."""
    from ssl_bench.evaluate.checkpoints import open_checkpoint

    networks: list[Network] = []
    for number, each in enumerate([spec, *options.beside]):
        own: dict[str, Any] = {} if number else {"key": options.checkpoint_key, "arch": options.arch}
        reopen = functools.partial(_reopen, each, seed=options.seed, **own)
        checkpoint = open_checkpoint(each, seed=options.seed, **own)
        name = label(checkpoint)
        if name in {network.name for network in networks}:
            name = f"{name} ({number + 1}: {each})"
        networks.append(Network(checkpoint, name, reopen))
    return networks


def _reopen(spec: str, protocol: str, **own: Any) -> Checkpoint:
    from ssl_bench.evaluate.checkpoints import open_checkpoint

    return open_checkpoint(spec, protocol=protocol, **own)


def _kinds(options: Options, networks: Sequence[Network]) -> list[str]:
    """What to draw: what was asked for, which every network must be able to do; else what they can of DEFAULT."""
    asked = [*options.kinds]
    implied = {"inversion": options.invert, "masked-views": options.masked_views, "histogram": options.masks}
    asked += [kind for kind, wanted in implied.items() if wanted and kind not in asked]
    kinds = []
    for kind in dict.fromkeys(asked or DEFAULT):
        reasons = [(network.checkpoint.spec, KINDS[kind].why_not(network)) for network in networks]
        spec, reason = next(((spec, reason) for spec, reason in reasons if reason), ("", None))
        if reason is None:
            kinds.append(kind)
        elif asked:
            raise UserError(f"{spec}: {kind} cannot be drawn: {reason}.")
        else:
            say(f"{kind} is left out: {reason} ({spec})")
    return kinds


def _check_networks(
    kinds: Sequence[str], options: Options, sizes: Sequence[tuple[int, int]], networks: Sequence[Network]
) -> None:
    """What depends on the network."""
    from ssl_bench.evaluate.pictures.views import fitted

    for network in networks:
        for size in sizes:
            fitted(size, network.checkpoint.architecture, options.size_px, attention=reads_attention(kinds))
        depth = network.checkpoint.architecture.depth
        if not -depth <= options.layer < depth:
            raise UserError(
                f"--layer {options.layer}: {network.name} has {depth} blocks, 0 to {depth - 1} (or -1 from the end)."
            )
        network.checkpoint.require_match()
    if "masked-views" in kinds:
        from ssl_bench.masked_views import choose_recipe

        assert options.masked_views is not None
        choose_recipe(options.masked_views, networks[0].checkpoint)


def _query(kinds: Sequence[str], options: Options, images: Mapping[Path, Image]) -> Image | None:
    """The image that locality's query is cut from, if it is one for all; a box must lie in it, or in each image."""
    from ssl_bench.evaluate.decoding import decode_image

    if "locality" not in kinds:
        return None
    query = decode_image(options.query, shown_as=str(options.query)) if options.query else None
    for image in [query] if query else images.values():
        query_box(options.box, image, None)
    return query


def _masks(kinds: Sequence[str], options: Options, images: Mapping[Path, Image]) -> dict[Path, Mask]:
    """Objects of every image, for the histogram."""
    from ssl_bench.evaluate.pictures.histogram import read_mask

    if "histogram" not in kinds:
        return {}
    return {path: read_mask(mask, image) for mask, (path, image) in zip(options.masks, images.items(), strict=True)}


def _files(images: Sequence[Path], kinds: Sequence[str], out: Path) -> dict[tuple[Path, str], Path]:
    """Where every picture goes; refused if something that `show` did not write stands there."""
    from ssl_bench.evaluate.pictures.sheet import is_ours

    folder = expanded(out)
    require_writable(folder)
    files = {(path, kind): folder / f"{path.stem}-{kind}.png" for path in images for kind in kinds}
    for file in files.values():
        if file.exists() and not is_ours(file):
            raise UserError(
                f"{file} exists, and it was not written by `ssl-bench show`, so it is not replaced. Move it away, or "
                "choose another folder: --out DIR."
            )
    return files
