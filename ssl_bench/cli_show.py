"""The command `show`, and options that it shares with others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ssl_bench.picture_kinds import DEFAULT, KINDS, Options

CheckpointKey = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-key",
        help="Which network of the file: teacher, student, ... (default: the one its authors evaluate)",
    ),
]
Arch = Annotated[
    list[str] | None,
    typer.Option(
        "--arch",
        help="What the file does not say: heads=6, eps=1e-6, mean=0.5,0.5,0.5, std=..., position_resize=dino, ...",
    ),
]


def show(
    spec: Annotated[str, typer.Argument(help="A file, a folder, timm:NAME, hf:REPO, random:ARCH or pixels:")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            "-k",
            help=f"{', '.join(KINDS)}; several by commas. Default: {', '.join(DEFAULT)}.",
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(help="x,y in pixels of the image, for similarity and queries; repeatable. Default: the center."),
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Another checkpoint to draw beside the first; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder; files are IMAGE-KIND.png.")] = Path("pictures"),
    size_px: Annotated[
        int | None,
        typer.Option(
            "--size",
            help="Longer side at which the network sees the image. Default: 480; small networks: twice their own.",
        ),
    ] = None,
    layer: Annotated[int, typer.Option(help="The block to look at; 0 is the first, -1 the last.")] = -1,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Of similarity; repeatable. Default: 0.2, 0.4, 0.6, 0.8.")
    ] = None,
    mask: Annotated[
        list[Path] | None, typer.Option(help="For histogram: an image of object numbers, one for every image.")
    ] = None,
    query: Annotated[
        Path | None, typer.Option(help="For locality: the image that the query is cut from. Default: the image itself.")
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="For locality: left,top,right,bottom of the query. Default: around the point.")
    ] = None,
    invert: Annotated[bool, typer.Option("--invert", help="As --kind inversion. Minutes to hours.")] = False,
    steps: Annotated[int | None, typer.Option(help="Of inversion. Default: 3000.")] = None,
    mask_ratio: Annotated[
        list[float] | None, typer.Option(help="Of inversion; repeatable. Default: 0.5, 0.75, 0.9.")
    ] = None,
    masked_views: Annotated[
        str | None, typer.Option(help="What a method shows its student: mmc, mae/paper, ... (METHOD or METHOD/RECIPE)")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random: random: weights, masks, k-means, boxes.")] = 0,
    checkpoint_key: CheckpointKey = None,
    arch: Arch = None,
) -> None:
    """Draw what a network makes of images, as PNGs: similarity, attention, clusters, and more (--kind).

    Prints the files. A file of that name is replaced only if this command wrote it.
    """
    from ssl_bench import show as pictures
    from ssl_bench.evaluate.recipes import settings_from_text

    options = Options(
        kinds=[each.strip() for text in kind or [] for each in text.split(",")],
        beside=beside or [],
        points=point or [],
        out=out,
        size_px=size_px,
        layer=layer,
        thresholds=threshold or [],
        masks=mask or [],
        query=query,
        box=box,
        invert=invert,
        steps=steps,
        mask_ratios=mask_ratio or [],
        masked_views=masked_views,
        device=device,
        seed=seed,
        checkpoint_key=checkpoint_key,
        arch=settings_from_text(arch or [], "--arch heads=6"),
    )
    for path in pictures.show(spec, images, options):
        sys.stdout.write(f"{path}\n")
