"""`ssl-bench demo`: the whole chain on built-in data, and what to try next."""

from __future__ import annotations

from ssl_bench import running, showing
from ssl_bench.leaderboards.store import load_results
from ssl_bench.leaderboards.table import leaderboard, render
from ssl_bench.progress import say

# The small ViT that every `toy` recipe trains.
ARCHITECTURE = "vit_96x4x3_patch8_48"

_NEXT = """
[bold]What to try next[/bold]
  ssl-bench inspect x.pth                                   what is this file?
  ssl-bench run --ckpt x.pth --protocol knn --dataset /data/imagenet
  ssl-bench run --ckpt x.pth --protocol knn/dino,knn/mmc --dataset digits
  ssl-bench run --ckpt pixels: --protocol knn --set neighbors=5
  ssl-bench ls recipes                                      settings and sources
  ssl-bench leaderboard --format md
"""


def run() -> None:
    """Two baselines that every trained network must beat, through k-NN on the toy world."""
    say("drawing the toy world (once), then k-NN of the image's own pixels and of a network that was never trained")
    options = running.Options(dataset="toy")
    for spec in ("pixels:", f"random:{ARCHITECTURE}"):
        showing.records(running.run(spec, "knn", options))
    showing.show(render(leaderboard(load_results().filter(dataset="toy")), "table"))
    showing.show(_NEXT)
