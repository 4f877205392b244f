"""`ssl-bench pretrain`, from the command line to the file that `run` opens, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
import torch
from PIL import Image
from test_run import in_process

import ssl_bench
from ssl_bench import pretraining
from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_images
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.pretrain.catalog import METHODS, choose
from ssl_bench.pretrain.loop import Settings
from ssl_bench.pretrain.measure import NOWHERE, measure
from ssl_bench.pretrain.networks import student

TINY = [
    *("--recipe", "toy", "--arch", tiny.ARCHITECTURE, "--set", "epochs=2", "--set", "warmup_epochs=1"),
    *("--set", "batch=8", "--workers", "0", "--device", "cpu", "--dtype", "fp32"),
]


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tiny.write_images(tmp_path / "images")


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    """Two classes that differ in color, in train and val."""
    rng = np.random.RandomState(0)
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate("ab"):
            folder = tmp_path / "labeled" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.randint(0, 100, (48, 48, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "labeled"


@pytest.mark.parametrize("method", METHODS)
def test_pretrain_then_run(method: str, images: Path, labeled: Path, tmp_path: Path, call: Callable) -> None:
    base = ["--base", str(tiny.write_base(tmp_path / "base.pt"))] if method == "tec" else []
    out = tmp_path / "runs" / method
    fewer = [f"--set={name}={value}" for name, value in tiny.FEWER.get(method, {}).items()]
    code, _, said = call("pretrain", method, "--data", images, "--out", out, *TINY, *fewer, *base)
    assert code == 0, said
    assert "epochs of batches of 8" in said
    opened = open_checkpoint(out)
    assert opened.name == method
    origin = opened.origin
    assert (origin["method"], origin["recipe"], origin["epochs_done"], origin["images"]) == (method, "toy", 2.0, 20)
    assert origin["resolved_recipe"]["epochs"] == 2
    changed = {"epochs": "2", "warmup_epochs": "1", "batch": "8", "arch": tiny.ARCHITECTURE}
    assert origin["overrides"] == changed | {name: str(value) for name, value in tiny.FEWER.get(method, {}).items()}
    token = "patch_mean" if method == "moca" else "cls"
    settings = ["--set", "neighbors=3", "--set", "resize_px=48", "--set", "crop_px=48", "--set", f"vector={token}"]
    code, out_text, said = call(
        "run", "--ckpt", out, "--protocol", "knn/dino", "--dataset", labeled, *settings, "--json"
    )
    assert code == 0, said
    (record,) = json.loads(out_text)["records"]
    assert record["model"] == method
    assert record["checkpoint"]["matched_percent"] == 100


def test_fine_tuning_opens_another_network_of_extrema_than_knn(images: Path, tmp_path: Path, call: Callable) -> None:
    assert call("pretrain", "extrema", "--data", images, "--out", tmp_path / "x", *TINY)[0] == 0
    teacher, trunk = (open_checkpoint(tmp_path / "x", protocol=protocol) for protocol in ("knn", "finetune"))
    assert (teacher.key, trunk.key) == ("teacher", "student")
    assert teacher.others == ("student",)
    assert teacher.weights_sha256 != trunk.weights_sha256
    assert open_checkpoint(tmp_path / "x", key="student").weights_sha256 == trunk.weights_sha256
    with pytest.raises(UserError, match=r"student, teacher|teacher, student"):
        open_checkpoint(tmp_path / "x", key="techer")


def test_monitor_writes_knn_into_the_log(labeled: Path, tmp_path: Path, call: Callable) -> None:
    code, _, said = call("pretrain", "mae", "--data", labeled, "--out", tmp_path / "x", *TINY, "--monitor-epochs", "1")
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "knn_cls" in line]
    assert [line["epoch"] for line in scores] == [1.0, 2.0]
    assert all(0 <= line["knn_patch_mean"] <= 100 for line in scores)


def test_monitor_does_not_change_the_run(labeled: Path, tmp_path: Path, call: Callable) -> None:
    states = []
    for name, more in (("with", ["--monitor-epochs", "1"]), ("without", [])):
        assert call("pretrain", "mae", "--data", labeled, "--out", tmp_path / name, *TINY, *more)[0] == 0
        states.append(open_checkpoint(tmp_path / name).state)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


def test_keep_epochs_keeps_files_that_run_opens(images: Path, tmp_path: Path, call: Callable) -> None:
    assert call("pretrain", "mae", "--data", images, "--out", tmp_path / "x", *TINY, "--keep-epochs", "1")[0] == 0
    first, second = (open_checkpoint(tmp_path / "x" / f"checkpoint-epoch000{n}.pt") for n in (1, 2))
    assert first.weights_sha256 != second.weights_sha256 == open_checkpoint(tmp_path / "x").weights_sha256


def test_from_python(images: Path, tmp_path: Path) -> None:
    settings = {"epochs": 1, "warmup_epochs": 0, "batch": 8, "betas": (0.9, 0.9)}
    small = {"recipe": "toy", "arch": tiny.ARCHITECTURE, "workers": 0, "device": "cpu"}
    path = ssl_bench.train("mae", images, tmp_path / "x", settings=settings, **small)
    assert ssl_bench.open_checkpoint(path).origin["resolved_recipe"]["betas"] == [0.9, 0.9]
    with pytest.raises(UserError, match="did you mean 'recipe'"):
        ssl_bench.train("mae", images, tmp_path / "y", recip="toy")


# What is given


def test_any_folder_of_images_will_do(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    flat = tiny.write_images(tmp_path / "flat", count=5)
    deep = tiny.write_images(tmp_path / "deep" / "a" / "b", count=4).parent.parent
    tiny.write_images(tmp_path / "split" / "train" / "only", count=3)
    assert len(open_images(str(flat)).train or ()) == 5
    assert len(open_images(str(deep)).train or ()) == 4
    assert len(open_images(str(tmp_path / "split")).train or ()) == 3
    labeled = image_folder(train=2, val=1)
    assert open_images(str(labeled)).train is not None
    assert open_images(str(labeled)).val is not None  # for the monitor
    assert len(open_images(str(labeled / "train")).train or ()) == 4


def test_what_has_no_training_images_is_refused(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    only_val = image_folder(train=1)
    for split in ("train",):
        for path in sorted((only_val / split).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (only_val / split).rmdir()
    for path, message in (
        (tmp_path / "empty", "is empty"),
        (tmp_path / "texts", "no folders of images|no images"),
        (only_val, "no training images"),
        (tmp_path / "nowhere", "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_images(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mocca"], "did you mean 'moca'"),
        (["moca", "--recipe", "papr"], "paper"),
        (["moca", "--set", "epoch=3"], "epochs"),
        (["moca", "--set", "epochs=many"], "a whole number"),
        (["mae", *TINY, "--set", "batch=64"], "20 images"),
        (["mae", *TINY, "--arch", "vit_base"], "vit_base_patch16_224"),
        (["mae", *TINY, "--monitor-epochs", "1"], "labeled"),
        (["mae", *TINY, "--base-key", "teacher"], "--base"),
        (["mae", *TINY, "--base", "random:vit_32x4x2_patch8_48"], "starts from scratch"),
        (["mae", *TINY, "--dtype", "fp16"], "CUDA"),
        (["mae", *TINY, "--dtype", "half"], "fp32, bf16 or fp16"),
        (["mae", *TINY, "--device", "cuda:99"], "not available"),
        (["mae", *TINY, "--accumulate", "3"], "multiple of 3"),
        (["mae", *TINY, "--resume"], "there is no"),
        (["tec", *TINY], "--base"),
        (["mmc", *TINY, "--accumulate", "2"], "compares"),
    ],
)
def test_refusals(arguments: list[str], message: str, images: Path, tmp_path: Path, call: Callable) -> None:
    code, _, said = call("pretrain", *arguments, "--data", images, "--out", tmp_path / "x")
    assert code == 2
    assert message in said, said
    assert not list((tmp_path / "x").glob("*")) if (tmp_path / "x").exists() else True


def test_a_base_of_another_width_is_refused(images: Path, tmp_path: Path, call: Callable) -> None:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "wide.pt", student(named("vit_64x2x2_patch8_48")))
    code, _, said = call(
        "pretrain", "tec", "--data", images, "--out", tmp_path / "x", *TINY, "--base", tmp_path / "wide.pt"
    )
    assert code == 2
    assert "64" in said
    assert "32" in said


def test_broken_images_stop_or_are_replaced(images: Path, tmp_path: Path, call: Callable) -> None:
    (images / "003.png").write_bytes(b"not an image")
    code, _, said = call("pretrain", "mae", "--data", images, "--out", tmp_path / "x", *TINY)
    assert code == 2
    assert "003.png" in said
    assert call("pretrain", "mae", "--data", images, "--out", tmp_path / "y", *TINY, "--skip-broken")[0] == 0


# Lists and costs


def test_methods_and_their_recipes_are_listed(call: Callable) -> None:
    code, out, _ = call("ls", "methods", "--json")
    assert code == 0
    listed = {row["name"]: row for row in json.loads(out)["methods"]}
    assert list(listed) == list(METHODS)
    code, out, _ = call("ls", "recipes", "--json")
    names = [row["name"] for row in json.loads(out)["recipes"]]
    assert "moca/v1.0" in names
    assert "knn/dino" in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_says_where_it_comes_from(method: str) -> None:
    recipes = METHODS[method].RECIPES
    assert "toy" in recipes
    assert next(iter(recipes)) != "toy"
    for recipe in recipes.values():
        assert recipe.source
        named(recipe.arch)


def test_built_in_data_takes_the_toy_row_and_real_data_the_paper_s() -> None:
    assert choose("moca", None, built_in=True)[1] == "toy"
    assert choose("moca", None, built_in=False)[1] == "paper"
    assert choose("moca", "v1.0", built_in=True)[1] == "v1.0"


def test_cost_of_a_step_counts_what_masking_saves() -> None:
    recipe = dataclasses.replace(METHODS["mae"].RECIPES["toy"], arch=tiny.ARCHITECTURE, batch=8)
    costs = [
        measure("mae", dataclasses.replace(recipe, mask_ratio=ratio), Settings(out=NOWHERE), steps=2)
        for ratio in (0.25, 0.75)
    ]
    # 18 more tokens an image, 24 D^2 operations a token in each of 4 blocks, three times over with the backward pass.
    saved = 8 * 18 * 24 * 32**2 * 4 * 3
    assert costs[0].flops_per_step - costs[1].flops_per_step == pytest.approx(saved, rel=0.05)
    assert costs[1].epoch_seconds(80) == pytest.approx(10 * costs[1].seconds_per_step)
    assert not NOWHERE.exists()


def test_options_are_the_loop_s_settings() -> None:
    assert set(pretraining._SAME) <= {field.name for field in dataclasses.fields(Settings)}
