"""Every ImageNet-scale row of the dense protocols, with ViT-B/16 at its full size: it builds, steps and is scored.

Minutes on a CPU and up to 20 GB: `make slow` runs it, `make test` does not. Each row has a process of its own, whose
peak of memory it prints.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_bench.protocols import detection, semseg

pytestmark = pytest.mark.slow

_RUN = """
import dataclasses, json, resource, sys
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.masks import open_masks
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols import detection, semseg
protocol, row, folder, changes = sys.argv[1:]
module = {"detection": detection, "semseg": semseg}[protocol]
dataset = {"detection": open_coco, "semseg": open_masks}[protocol](folder)
recipe = dataclasses.replace(module.RECIPES[row], **json.loads(changes))
subject = Subject(open_checkpoint("random:vit_base_patch16_224"), dataset, Effort(workers=0))
module.check(subject, recipe)
scores = module.run(subject, recipe)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"main": scores.metrics[scores.main].value, "peak_gib": peak}))
"""


def run(protocol: str, row: str, folder: Path, **changes: object) -> None:
    command = [sys.executable, "-c", _RUN, protocol, row, str(folder), json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print(f"{protocol}/{row}: peak {said['peak_gib']:.1f} GiB")
    assert 0 <= said["main"] <= 100


def pixels(rng: np.random.RandomState, width: int, height: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.randint(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ADE20K's layout and 150 classes: two images to train on, one to score."""
    folder, rng = tmp_path_factory.mktemp("ade20k"), np.random.RandomState(0)
    for split, count in (("training", 2), ("validation", 1)):
        for index in range(count):
            pixels(rng, 683, 512, folder / "images" / split / f"ADE_{split}_{index:08d}.jpg")
            mask = folder / "annotations" / split / f"ADE_{split}_{index:08d}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            blocks = rng.randint(0, 151, (8, 11), np.uint8)
            Image.fromarray(np.kron(blocks, np.ones((64, 63), np.uint8))[:512, :683]).resize((683, 512), 0).save(mask)
    return folder


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO's layout and 80 categories: two images to train on, one to score, eight objects each."""
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.RandomState(0)
    (folder / "annotations").mkdir()
    for split, count in (("train", 2), ("val", 1)):
        images, annotations = [], []
        for index in range(count):
            name = f"{index:012d}.jpg"
            pixels(rng, 640, 480, folder / f"{split}2017" / name)
            images.append({"id": index, "file_name": name, "width": 640, "height": 480})
            for _ in range(8):
                left, top = int(rng.randint(0, 440)), int(rng.randint(0, 300))
                wide, high = int(rng.randint(20, 200)), int(rng.randint(20, 180))
                corners = [left, top, left + wide, top, left + wide, top + high, left, top + high]
                annotations.append({
                    "id": len(annotations), "image_id": index, "category_id": int(rng.randint(1, 81)), "iscrowd": 0,
                    "bbox": [left, top, wide, high], "area": wide * high, "segmentation": [corners],
                })  # fmt: skip
        categories = [{"id": number, "name": f"category {number}"} for number in range(1, 81)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))
    return folder


def _full(recipes: object) -> list[str]:
    return [row for row in recipes if not row.endswith("-toy")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", _full(semseg.RECIPES))
def test_a_step_of_segmentation(scenes: Path, row: str) -> None:
    recipe = semseg.RECIPES[row]
    length = {"iterations": 1} if recipe.epochs is None else {"epochs": 1}
    run("semseg", row, scenes, batch=2, lrs=recipe.lrs[:1], warmup=0, best_every=None, train_images=None, splits=1,
        **length)  # fmt: skip


@pytest.mark.parametrize("row", _full(detection.RECIPES))
def test_a_step_of_detection(objects: Path, row: str) -> None:
    run("detection", row, objects, batch=2, epochs=1, drop_epochs=[0.5], warmup_steps=0)
