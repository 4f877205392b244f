"""The command line. Each command parses, calls one function, and prints; nothing is imported before it is needed."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ssl_bench import __version__
from ssl_bench.cli_check import check
from ssl_bench.cli_compare import compare, sensitivity
from ssl_bench.cli_report import report
from ssl_bench.cli_show import Arch, CheckpointKey, show
from ssl_bench.cli_stores import Json, cache_app, data_app, print_json, print_listing
from ssl_bench.cli_tables import leaderboard, reproduce
from ssl_bench.errors import UserError

app = typer.Typer(
    name="ssl-bench",
    help="Measure self-supervised vision transformers the way their papers do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Data is looked for under SSL_BENCH_DATA, results go to SSL_BENCH_RESULTS, features to SSL_BENCH_CACHE.",
)
_INTERRUPTED = 130
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a check failed, 2 the user's input is at fault."""
    _print_whatever_comes()
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"ssl-bench: {error}\n")
    except SystemExit as stopped:
        if stopped.code != _INTERRUPTED:  # Ctrl-C, as typer has it
            raise
        sys.stderr.write("ssl-bench: interrupted; nothing half-written stays. Give the same command again to go on.\n")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads of a process group that is left in the middle of its work abort an interpreter that ends in order.
        sys.stderr.flush()
        os._exit(2)
    sys.exit(2)


def _print_whatever_comes() -> None:
    """A name that the terminal cannot show is no reason to end with a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In UTF-8 that is half a surrogate pair, for which JSON has the same escape.
        sys.stdout.reconfigure(errors="backslashreplace" if "utf" in sys.stdout.encoding.lower() else "replace")


def _version(show: bool) -> None:
    if show:
        sys.stdout.write(f"ssl-bench {__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def run(
    ckpt: Annotated[
        str,
        typer.Option(
            "--ckpt",
            help="A file, a folder, timm:NAME, hf:REPO, random:ARCH or pixels:; for --protocol efficiency also a "
            "pre-training recipe: recipe:moca/paper, recipe:moca/ablation,decoder_depth=4",
        ),
    ],
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol",
            "-p",
            help="One or several, separated by commas: knn, knn/moca-paper, ... (ssl-bench ls recipes)",
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "-d",
            help="A name (ssl-bench ls datasets) or a folder. Default: the toy world, as each protocol reads it.",
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="The recipe of protocols that are given without one.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field of the recipe: --set neighbors=10")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name in records and tables (default: the file's).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use so many images a split: a quick try, kept out of leaderboards.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast in the forward pass).")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of everything random: random: weights, sampled banks and splits.")] = 0,
    checkpoint_key: CheckpointKey = None,
    arch: Arch = None,
    overwrite: Annotated[
        str,
        typer.Option(help="only-missing: keep records that exist; always: score again; never: stop if there are any."),
    ] = "only-missing",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read, and count them in the record.")
    ] = False,
    train_list: Annotated[
        Path | None, typer.Option(help="Only these training images (a file, one name a line).")
    ] = None,
    val_list: Annotated[Path | None, typer.Option(help="Only these validation images.")] = None,
    class_list: Annotated[Path | None, typer.Option(help="Only these classes.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a forward pass (default: what fits the CPU's cache; 256 on GPU).")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that decode images (default: one a core, none for fewer than 512 images)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint by one or several protocols.

    One forward pass serves all of them, and features are cached by content. The same command again does only what is
    missing.
    """
    from ssl_bench import running
    from ssl_bench.evaluate.recipes import settings_from_text

    names = [part if recipe is None or "/" in part else f"{part}/{recipe}" for part in protocol.split(",")]
    options = running.Options(
        dataset=dataset,
        settings=settings_from_text(setting or [], "--set neighbors=10"),
        limit=limit,
        device=device,
        dtype=dtype,
        seed=seed,
        checkpoint_key=checkpoint_key,
        arch=settings_from_text(arch or [], "--arch heads=6"),
        overwrite=overwrite,  # type: ignore[arg-type]  # checked there
        name=name,
        train_list=train_list,
        val_list=val_list,
        class_list=class_list,
        skip_broken=skip_broken,
        batch_size=batch_size,
        workers=workers,
    )
    records = running.run(ckpt, names, options)
    if int(os.environ.get("RANK", "0")) > 0:  # of several processes the first speaks
        return
    if as_json:
        from ssl_bench.leaderboards.strict_json import plain

        print_json({"records": [plain(record) for record in records]})
        return
    from ssl_bench import showing

    showing.records(records)


@app.command()
def pretrain(
    method: Annotated[str, typer.Argument(help="mae, moca, mmc, tec, extrema or sdae")],
    data: Annotated[str, typer.Option("--data", "-d", help="A name (ssl-bench ls datasets) or a folder of images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder: checkpoint, state, log.")],
    recipe: Annotated[
        str | None, typer.Option(help="A row of the method's table (default: the paper's; on built-in data: toy).")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field of the recipe: --set epochs=100")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="vit_small_patch16_224, vit_96x4x3_patch8_48, ...")] = None,
    base: Annotated[
        str | None, typer.Option(help="The frozen checkpoint that TEC learns from: as --ckpt of run.")
    ] = None,
    base_key: Annotated[str | None, typer.Option(help="Which network of the base file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 where the hardware has it), fp32, bf16 or fp16")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    accumulate: Annotated[int, typer.Option(help="Cut a batch into so many parts, one after the other.")] = 1,
    workers: Annotated[int | None, typer.Option(help="Processes that read images (default: by the machine).")] = None,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="torch.compile every transformer block.")] = False,
    log_steps: Annotated[int, typer.Option(help="A line of the log every so many steps.")] = 50,
    checkpoint_minutes: Annotated[float, typer.Option(help="Save every so many minutes, and at the end.")] = 30.0,
    keep_epochs: Annotated[int | None, typer.Option(help="Keep a checkpoint of every so many epochs.")] = None,
    monitor_epochs: Annotated[int | None, typer.Option(help="k-NN accuracy every so many epochs, in the log.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard's files.")] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Replace images that cannot be read.")] = False,
) -> None:
    """Pre-train a network on images, without labels. Under torchrun the processes train together.

    An interrupted run (SIGTERM, Ctrl-C) saves itself; the same command with --resume goes on.
    """
    from ssl_bench import pretraining
    from ssl_bench.evaluate.recipes import settings_from_text

    options = pretraining.Options(
        recipe=recipe,
        settings=settings_from_text(setting or [], "--set epochs=100"),
        arch=arch,
        base=base,
        base_key=base_key,
        resume=resume,
        device=device,
        dtype=dtype,
        seed=seed,
        accumulate=accumulate,
        workers=workers,
        compile=compile_blocks,
        log_steps=log_steps,
        checkpoint_minutes=checkpoint_minutes,
        keep_epochs=keep_epochs,
        monitor_epochs=monitor_epochs,
        tensorboard=tensorboard,
        skip_broken=skip_broken,
    )
    pretraining.train(method, data, out, options)


@app.command()
def ls(
    kind: Annotated[str, typer.Argument(help="methods, protocols, recipes, datasets, tables or results")],
    as_json: Json = False,
) -> None:
    """List what there is."""
    print_listing(kind, as_json=as_json)


@app.command()
def inspect(
    spec: Annotated[str, typer.Argument(help="A file, a folder, timm:NAME, hf:REPO, random:ARCH or pixels:")],
    checkpoint_key: CheckpointKey = None,
    protocol: Annotated[str | None, typer.Option("--protocol", "-p", help="As this protocol would open it.")] = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint is: format, network, architecture, how much of it matched. Never executes code from it."""
    from ssl_bench.evaluate.checkpoints import describe, open_checkpoint
    from ssl_bench.evaluate.recipes import settings_from_text

    overrides = settings_from_text(arch or [], "--arch heads=6")
    found = describe(open_checkpoint(spec, key=checkpoint_key, protocol=protocol, arch=overrides))
    if as_json:
        print_json(found)
        return
    from ssl_bench import showing

    showing.fields(found)


app.command()(show)
app.command()(report)
app.command()(compare)
app.command()(sensitivity)
app.command()(check)


app.command()(leaderboard)
app.command()(reproduce)


@app.command()
def demo() -> None:
    """The whole chain on built-in data: minutes on a laptop's CPU."""
    from ssl_bench import demo as demonstration

    demonstration.run()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, device, folders. Says how to mend what is wrong; exits with 1 if anything is."""
    from ssl_bench import doctor as examination

    findings = examination.examine()
    if as_json:
        print_json({"doctor": findings})
    else:
        from ssl_bench import showing

        showing.rows(findings, "nothing to say")
    if any(finding["state"] == "wrong" for finding in findings):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
