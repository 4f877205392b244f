"""The command line's groups `data` and `cache`, and what all commands share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ssl_bench.errors import unknown

data_app = typer.Typer(help="Built-in data, and checks of your own.", no_args_is_help=True)
cache_app = typer.Typer(help="The feature cache.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def print_json(document: dict[str, Any]) -> None:
    """On stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_listing(kind: str, *, as_json: bool) -> None:
    """What there is of a kind, as a table or as JSON."""
    from ssl_bench import listing, showing

    if kind not in listing.KINDS:
        raise unknown("kind", kind, listing.KINDS)
    rows = listing.KINDS[kind]()
    if as_json:
        print_json({kind: rows})
    else:
        showing.rows(list(map(listing.SHORT.get(kind, dict), rows)), f"no {kind}")


@data_app.command("toy")
def data_toy(
    out: Annotated[Path, typer.Option("--out", help="A folder that does not exist yet.")],
    layout: Annotated[
        str, typer.Option(help="folders (of classes), ade20k, cityscapes, voc, imagenet-s, coco, davis or roxford")
    ] = "folders",
    train: Annotated[int | None, typer.Option(help="Training images. Default: as many as the built-in data.")] = None,
    val: Annotated[int | None, typer.Option(help="Validation images.")] = None,
    size_px: Annotated[int | None, typer.Option("--size", help="Pixels a side, of folders. Default: 48.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes on every machine.")] = 0,
) -> None:
    """Write the toy world in the layout of a real dataset; by default as class folders, out/{train,val}/CLASS/*.png."""
    from ssl_bench.evaluate.toy_layouts import writer
    from ssl_bench.files import new_folder
    from ssl_bench.progress import follow, say

    write = writer(layout, train=train, val=val, size_px=size_px, seed=seed)
    with new_folder(out) as folder, follow("drawing") as report:
        write(folder, progress=report)
    say(f"the toy world is in {out} ({layout})")


@data_app.command("check")
def data_check(
    dataset: Annotated[str, typer.Argument(help="A name or a folder.")],
    decode: Annotated[bool, typer.Option(help="Open every image.")] = True,
    as_json: Json = False,
) -> None:
    """Say in words what a dataset is and what is wrong with it; exits with 1 if anything is."""
    import dataclasses

    from ssl_bench.evaluate.datasets import check_dataset
    from ssl_bench.leaderboards.strict_json import plain
    from ssl_bench.progress import follow

    with follow("checking") as progress:
        report = check_dataset(dataset, decode=decode, progress=progress)
    if as_json:
        print_json({"check": plain(dataclasses.asdict(report))})
    else:
        from ssl_bench import showing

        showing.fields(plain(dataclasses.asdict(report)))
    if report.problems:
        raise typer.Exit(1)


@data_app.command("ls")
def data_ls(as_json: Json = False) -> None:
    """The datasets that are known by name, and where they are expected."""
    print_listing("datasets", as_json=as_json)


@cache_app.command("ls")
def cache_ls(as_json: Json = False) -> None:
    """What is cached, the longest unused first."""
    import dataclasses

    from ssl_bench.evaluate import cache

    entries = cache.entries()
    if as_json:
        print_json({"cache": [dataclasses.asdict(entry) for entry in entries]})
        return
    from ssl_bench import listing, showing

    showing.rows([listing.cache_row(entry) for entry in entries], "the cache is empty")


@cache_app.command("gc")
def cache_gc(
    unused_days: Annotated[float, typer.Option(help="Remove what nobody used for so long.")] = 30.0,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old entries and what was half-written. Entries in use are left alone."""
    from ssl_bench.evaluate import cache
    from ssl_bench.progress import say

    removed, freed = cache.collect_garbage(unused_days=unused_days, everything=everything)
    if as_json:
        print_json({"removed": removed, "freed_bytes": freed})
        return
    say(f"{removed} entries removed, {freed / 2**20:.1f} MiB freed")


@cache_app.command("verify")
def cache_verify(as_json: Json = False) -> None:
    """Check every checksum. Damaged shards are removed, and made anew when they are next needed; exits with 1."""
    from ssl_bench.evaluate import cache
    from ssl_bench.progress import say

    damaged = cache.verify()
    if as_json:
        print_json({"damaged": [{"key": key, "shard": shard} for key, shard in damaged]})
    else:
        for key, shard in damaged:
            say(f"{key}: shard {shard} was damaged and has been removed")
        if not damaged:
            say("every checksum fits")
    if damaged:
        raise typer.Exit(1)
