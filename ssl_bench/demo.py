"""`ssl-bench demo`: the whole chain on built-in data, and what to try next."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from ssl_bench import running, showing
from ssl_bench.files import cache_folder
from ssl_bench.leaderboards.store import load_results
from ssl_bench.leaderboards.table import leaderboard, render
from ssl_bench.progress import say

# The small ViT that every `toy` recipe trains.
ARCHITECTURE = "vit_96x4x3_patch8_48"

_NEXT = """
[bold]What to try next[/bold]
  ssl-bench inspect x.pth                                   what is this file?
  ssl-bench run --ckpt x.pth --protocol knn,linear,lowshot --dataset /data/imagenet
  ssl-bench run --ckpt x.pth --protocol knn/dino,knn/mmc-patch --dataset digits
  ssl-bench pretrain extrema --data toy --out runs/extrema  a minute or two
  ssl-bench pretrain moca --data /data/imagenet --out runs/moca
  ssl-bench show x.pth image.jpg --point 320,200            pictures
  ssl-bench ls recipes                                      settings and sources
  ssl-bench leaderboard --format md
  ssl-bench check --baseline leaderboards/baselines/toy.json   as before?
"""


PROTOCOLS = "knn/moca-paper,lowshot/moca,linear"
DENSE = "semseg,zeroshot,similarity,davis"


def run() -> None:
    """Two baselines, and a network that MOCA trains here and now, through eight protocols on the toy world."""
    say("drawing the toy world (once), then k-NN of the image's own pixels")
    options = running.Options(dataset="toy")
    showing.records(running.run("pixels:", "knn", options))
    say("k-NN, low-shot and linear classification on a network that was never trained: half a minute")
    showing.records(running.run(f"random:{ARCHITECTURE}", PROTOCOLS, options))
    say("pre-training by MOCA, without labels: about two minutes on two cores")
    trained = _pretrained("moca")
    showing.records(running.run(trained, PROTOCOLS, dataclasses.replace(options, name="moca-toy")))
    showing.show(render(leaderboard(load_results().filter(dataset="toy")), "table"))
    say("segmentation and videos, each on the toy world in a layout of its own; with mmseg, about half a minute each")
    showing.records(running.run(f"random:{ARCHITECTURE}", DENSE, running.Options()))
    showing.records(running.run(trained, DENSE, running.Options(name="moca-toy")))
    say("detection with mmdet: a minute")
    showing.records(running.run(trained, "detection", running.Options(name="moca-toy")))
    showing.show(_NEXT)


def _pretrained(method: str) -> Path:
    """The checkpoint of the method's toy recipe: kept from the last time, gone on with, or trained."""
    from ssl_bench.pretrain.catalog import METHODS
    from ssl_bench.pretraining import Options, train

    recipe = json.dumps(dataclasses.asdict(METHODS[method].RECIPES["toy"]), sort_keys=True)
    folder = cache_folder() / "demo" / f"{method}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not (folder / "done").exists():
        train(method, "toy", folder, Options(resume=(folder / "training.pt").exists()))
        (folder / "done").touch()
    return folder / "checkpoint.pt"
