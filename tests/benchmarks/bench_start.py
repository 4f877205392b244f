"""How long people wait for nothing: --help, and a run whose features are all cached."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from measure import alternate, python, report

from ssl_bench.evaluate.architecture import parse_name
from ssl_bench.evaluate.backbone import build
from ssl_bench.evaluate.saving import save_checkpoint


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SSL_BENCH_CACHE"] = f"{temporary}/cache"
        os.environ["SSL_BENCH_RESULTS"] = f"{temporary}/results"
        torch.manual_seed(0)
        architecture = parse_name("vit_96x4x3_patch8_48")
        assert architecture is not None
        save_checkpoint(Path(temporary) / "x.pt", build(architecture))
        run = ("-m", "ssl_bench.cli", "run", "--dataset", "toy", "--protocol", "knn", "--ckpt")
        times = alternate(
            {
                "help": python("-m", "ssl_bench.cli", "--help"),
                "imports": python("-c", "import torch, timm"),
                "file": python(*run, f"{temporary}/x.pt", "--overwrite", "always"),
                "random": python(*run, "random:vit_96x4x3_patch8_48", "--overwrite", "always"),
                "recorded": python(*run, f"{temporary}/x.pt"),
            },
            repeats=5,
        )
        rows = [("ssl-bench --help, seconds", f"{times['help']:.2f}", "under 0.6")]
        for name, what in (("file", "a file"), ("random", "random:"), ("recorded", "a record that exists")):
            ratio = times[name] / times["imports"]
            rows.append(
                (
                    f"warm run, {what} / python -c 'import torch, timm' ({times['imports']:.1f} s)",
                    f"{ratio:.2f}",
                    "at most 1.5",
                )
            )
        report("waiting for nothing", rows)


if __name__ == "__main__":
    main()
