"""Efficiency: what is measured, what follows from it by hand, whose record it is, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from conftest import tiny_backbone
from test_run import in_process

import ssl_bench
from ssl_bench import efficiency, running
from ssl_bench.errors import UserError
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.leaderboards.store import load_results
from ssl_bench.pretrain import measure as measuring
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.loop import Settings
from ssl_bench.pretrain.measure import NOWHERE, Cost, measure

TINY = f"arch={tiny.ARCHITECTURE}"
MAE = f"recipe:mae/toy,{TINY}"
QUICK = {"batch": 4, "steps": 2}


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """What `measure` was asked for, without a step being made."""
    asked: list[dict[str, Any]] = []

    def fake(method, recipe, settings, *, steps, base=None):
        asked.append({"method": method, "recipe": recipe, "settings": settings, "steps": steps, "base": base})
        seconds = (0.5, 0.25, 4.0)
        return Cost(seconds, recipe.batch, 3 * 2**29, "tensors on the device", 6_000_000_000)

    monkeypatch.setattr(measuring, "measure", fake)
    return asked


def run(spec: str | Path, protocol: str = "efficiency", **options: Any):
    (record,) = ssl_bench.run(spec, protocol, device="cpu", **options)
    return record


# The numbers


def test_what_follows_from_steps_by_hand():
    cost = Cost((0.5, 0.25, 4.0), 20, 3 * 2**29, "tensors on the device", 6_000_000_000)
    recipe = dataclasses.replace(efficiency.RECIPES["toy"], batch=10, images=2400)
    found = efficiency.scores(cost, recipe, 2)
    values = {name: score.value for name, score in found.metrics.items()}
    assert values == {
        "epoch_minutes": 1.0,  # 2400 images, 20 in the median step of .5 s: 120 steps, 60 s
        "images_per_second": 40.0,
        "step_seconds": 0.5,
        "peak_memory_gib": 1.5,
        "gflops_per_image": 0.6,  # 6 a step in each of two processes, of 20 images
    }
    assert found.main == "epoch_minutes"
    assert found.metrics["step_seconds"].std == pytest.approx((8.7916667 / 2) ** 0.5)  # squares about 4.75 / 3
    assert {name: score.n for name, score in found.metrics.items() if name != "gflops_per_image"} == dict.fromkeys(
        ["epoch_minutes", "images_per_second", "step_seconds", "peak_memory_gib"], 3
    )
    assert found.metrics["epoch_minutes"].std is None
    assert (found.details["batch"], found.details["batch_per_process"], found.details["processes"]) == (20, 10, 2)
    assert found.details["extrapolated"] is True
    one = efficiency.scores(dataclasses.replace(cost, step_seconds=(0.5,)), recipe, 2)
    assert one.metrics["step_seconds"].std is None


def test_a_record_of_real_steps(call, monkeypatch):
    monkeypatch.setattr(efficiency, "_machine", lambda device: f"a {device}/thing")
    code, out, said = call(
        *("run", "--protocol", "efficiency", "--ckpt", f"{MAE},epochs=50", "--device", "cpu"),
        *("--set", "batch=4", "--set", "steps=3", "--set", "images=1000", "--json"),
    )
    assert code == 0, said
    (record,) = json.loads(out)["records"]
    scores, details = record["scores"], record["details"]
    seconds = details["step_seconds"]
    assert len(seconds) == 3
    assert all(value > 0 for value in seconds)
    median = sorted(seconds)[1]
    assert scores["step_seconds"]["value"] == median
    assert scores["step_seconds"]["std"] == pytest.approx(statistics.stdev(seconds))
    assert scores["step_seconds"]["ddof"] == 1
    assert scores["images_per_second"]["value"] == pytest.approx(4 / median)
    assert scores["epoch_minutes"]["value"] == pytest.approx(250 * median / 60)
    assert 0 <= scores["peak_memory_gib"]["value"] < 4
    assert scores["gflops_per_image"]["n"] == 1
    assert record["main_metric"] == "epoch_minutes"
    assert record["model"] == f"mae-toy [arch={tiny.ARCHITECTURE}, epochs=50]"
    assert (record["protocol"], record["recipe"], record["version"]) == ("efficiency", "toy", 1)
    assert record["overrides"] == {"batch": 4, "images": 1000}  # 3 steps are the row's own
    assert record["arch"] == tiny.ARCHITECTURE
    assert record["dataset"] == "noise on a cpu/thing"
    assert record["n_samples"] == {"original": {"noise": 0}, "evaluated": {"noise": 0}}
    assert record["checkpoint"]["format"] == "recipe"
    assert record["checkpoint"]["matched_percent"] is None
    assert record["selected_on"] == "none"
    assert record["limited"] is False
    assert (details["extrapolated"], details["batch"], details["processes"], details["steps"]) == (True, 4, 1, 3)
    assert details["pretraining"]["method"] == "mae"
    assert details["pretraining"]["resolved_recipe"]["epochs"] == 50
    assert details["pretraining"]["overrides"] == {"arch": tiny.ARCHITECTURE, "epochs": 50}
    assert any("extrapolated from the median of 3 steps" in warning for warning in record["warnings"])
    (path,) = load_results().paths
    assert path.parent.name == "noise-on-a-cpu-thing"
    assert not NOWHERE.exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_toy_rows_of_all_methods_are_measured_as_they_are(method):
    record = run(f"recipe:{method}/toy,{TINY}", settings={"steps": 1})
    assert record.details["batch"] == 16
    assert record.scores["gflops_per_image"].value > 0
    base = record.details["pretraining"]["base"]
    assert base == (f"random:{tiny.ARCHITECTURE}" if method == "tec" else None)
    assert any("never trained" in warning for warning in record.warnings) == (method == "tec")


def test_full_decoding_costs_more_than_partial_decoding():
    spec = f"recipe:moca/toy,{TINY},new_words=4,decoder_depth=8"
    part, full = (
        run(f"{spec},decoded_ratio={ratio}", settings={"batch": 8, "steps": 1}).scores["gflops_per_image"].value
        for ratio in ("0.1", "none")
    )
    assert full > 1.1 * part


def test_what_is_measured_is_what_was_asked_for(calls):
    record = run(f"recipe:tec/toy,{TINY}", settings=QUICK, seed=3, dtype="bf16")
    (asked,) = calls
    assert asked["method"] == "tec"
    assert asked["recipe"] == dataclasses.replace(METHODS["tec"].RECIPES["toy"], arch=tiny.ARCHITECTURE, batch=4)
    assert asked["settings"] == Settings(out=NOWHERE, device="cpu", dtype="bf16", seed=3)
    assert asked["steps"] == 2
    assert asked["base"].architecture.name == tiny.ARCHITECTURE
    assert asked["base"].format == "random"
    assert record.scores["epoch_minutes"].value == pytest.approx(1_281_167 / 4 * 0.5 / 60)
    assert record.details["memory_of"] == "tensors on the device"
    assert (record.seed, record.dtype) == (3, "bf16")
    assert not any("fp32" in warning for warning in record.warnings)


def test_the_batch_is_that_of_one_process(calls, monkeypatch):
    from ssl_bench.evaluate.training import distributed

    opened = efficiency.open_recipe(MAE, protocol="efficiency")
    subject = ssl_bench.evaluate.subject.Subject(opened, efficiency.noise("cpu"), ssl_bench.evaluate.loading.Effort())
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    found = efficiency.run(subject, efficiency.RECIPES["moca"])
    assert calls[0]["recipe"].batch == 2048
    assert found.details["batch_per_process"] == 256
    assert found.details["memory_of"].endswith("the largest of the processes")
    assert not any("process" in warning for warning in found.warnings)
    assert efficiency.noise("cpu").name.endswith(", 8 processes")
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    assert any(
        "1 process; published times are of 8" in w for w in efficiency.run(subject, efficiency.RECIPES["moca"]).warnings
    )
    assert any("fp32" in w for w in efficiency.run(subject, efficiency.RECIPES["moca"]).warnings)


def test_what_does_not_fit_is_refused_with_a_smaller_batch(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(measuring, "measure", full)
    with pytest.raises(UserError, match=r"batch=9 does not fit into .*--set batch=4\."):
        run(MAE, settings={"batch": 9})


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told to forget a peak")
def test_memory_is_the_peak_since_it_was_forgotten_beyond_what_was_held_before():
    mebibyte = 2**20
    before = torch.ones(32 * mebibyte // 4)  # held before: does not count
    memory = measuring._Memory("cpu")
    assert "beyond" in memory.what
    large = torch.ones(128 * mebibyte // 4)
    del large
    assert memory.peak_bytes() == pytest.approx(128 * mebibyte, abs=8 * mebibyte)
    kept = torch.ones(16 * mebibyte // 4)
    memory.forget_peak()
    large = torch.ones(48 * mebibyte // 4)
    del large
    assert memory.peak_bytes() == pytest.approx(64 * mebibyte, abs=8 * mebibyte)
    del before, kept


def test_where_no_peak_can_be_forgotten_memory_is_of_the_whole_process(monkeypatch):
    monkeypatch.setattr(measuring, "_forget_peak", lambda: False)
    memory = measuring._Memory("cpu")
    memory.forget_peak()
    assert memory.peak_bytes() == measuring.peak_memory_bytes("cpu")
    assert "since it started" in memory.what


def test_memory_of_cuda_is_that_of_tensors_beyond_those_of_before(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    memory = measuring._Memory("cuda:0")
    assert asked == []
    memory.forget_peak()
    assert asked == ["cuda:0"]
    assert (memory.peak_bytes(), memory.what) == (250, "tensors on the device")


# Whose record it is


def test_only_what_is_missing_is_measured(calls):
    first = run(MAE, settings=QUICK)
    assert run(MAE, settings=QUICK) == first
    assert len(calls) == 1
    run(MAE, settings=QUICK, overwrite="always")
    assert len(calls) == 2
    with pytest.raises(UserError, match="efficiency/toy"):
        run(MAE, settings=QUICK, overwrite="never")
    run(MAE, settings=QUICK | {"steps": 3})
    run(MAE, settings=QUICK, dtype="bf16")
    assert len(calls) == 4
    assert len(load_results()) == 3


def test_another_machine_is_another_record_and_another_column(calls, monkeypatch):
    for name in ("one", "other"):
        monkeypatch.setattr(efficiency, "_machine", lambda device, name=name: name)
        run(MAE, settings=QUICK)
    assert len(calls) == 2
    assert ssl_bench.leaderboard(load_results()).shape == (1, 2)
    assert len({record.dataset_manifest_sha256["noise"] for record in load_results()}) == 2
    assert not load_results().problems


def test_the_machine_is_the_one_that_computes(calls, monkeypatch):
    monkeypatch.setattr(running, "device_named", lambda name: "mps")
    record = run(MAE, settings=QUICK)
    assert record.device == calls[0]["settings"].device == "mps"
    assert record.dataset.endswith("(mps)")


def test_machines_are_named(monkeypatch):
    monkeypatch.setattr(efficiency, "_processor", lambda: "X")
    threads = torch.get_num_threads()
    assert efficiency._machine("cpu") == f"{threads} thread{'s' if threads > 1 else ''} of X"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert efficiency._machine("cpu") == "5 threads of X"
    assert efficiency._machine("mps") == "X (mps)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    assert efficiency.noise("cuda:1").name == "noise on GPU of cuda:1"
    monkeypatch.undo()
    assert efficiency._processor().strip()


def test_a_bare_name_is_the_first_paper_s_row_on_a_gpu_and_toy_elsewhere(monkeypatch, calls):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert efficiency.choose("efficiency", built_in=efficiency.noise("cuda").built_in)[1] == "moca"
    assert efficiency.choose("efficiency", built_in=efficiency.noise("cpu").built_in)[1] == "toy"
    assert efficiency.choose(" efficiency/sdae ", built_in=True)[1:] == ("sdae", efficiency.RECIPES["sdae"])
    assert efficiency.choose("knn/dino")[:2] == ("knn", "dino")
    assert run(MAE).recipe == "toy"


def opened(spec: str):
    return efficiency.open_recipe(spec, protocol="efficiency")


def test_the_recipe_s_fields_are_its_identity():
    plain = opened("recipe:moca/ablation")
    assert plain.name == "moca-ablation"
    assert plain.architecture.name == "vit_base_patch16_224"
    deeper = opened("recipe:moca/ablation,decoder_depth=4")
    assert deeper.name == "moca-ablation [decoder_depth=4]"
    assert deeper.weights_sha256 != plain.weights_sha256
    assert opened("recipe:moca/table2-depth4").weights_sha256 == deeper.weights_sha256  # but its source
    same = opened("recipe:moca/ablation,decoder_depth=2")
    assert (same.name, same.weights_sha256) == (plain.name, plain.weights_sha256)
    assert re.fullmatch("[0-9a-f]{64}", plain.weights_sha256)
    assert opened("recipe:mae/paper").weights_sha256 != opened("recipe:moca/paper").weights_sha256


@pytest.mark.parametrize("method", METHODS)
def test_every_row_can_be_named_and_comes_back_as_it_is(method):
    assert opened(f"recipe:{method}").origin["recipe"] == next(iter(METHODS[method].RECIPES))
    for row, recipe in METHODS[method].RECIPES.items():
        assert efficiency._pretraining(opened(f"recipe:{method}/{row}")) == (method, recipe)


def test_values_of_several_parts():
    spec = "recipe:moca/ablation,mask_ratios=.65,.7,decoder_depth=4,decoded_ratio=none,betas=.9,.95"
    _, recipe = efficiency._pretraining(opened(spec))
    expected = {"mask_ratios": (0.65, 0.7), "decoder_depth": 4, "decoded_ratio": None, "betas": (0.9, 0.95)}
    assert recipe == dataclasses.replace(METHODS["moca"].RECIPES["ablation"], **expected)


def test_a_checkpoint_is_measured_by_the_recipe_that_made_it(tmp_path, image_folder, call, calls):
    images = tiny.write_images(tmp_path / "images")
    small = ["--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "batch=8", "--workers", "0", "--device", "cpu"]
    arguments = ("pretrain", "mae", "--data", images, "--out", tmp_path / "runs", "--arch", tiny.ARCHITECTURE)
    code, _, said = call(*arguments, "--recipe", "toy", *small, "--set", "betas=.8,.9")
    assert code == 0, said
    record = run(tmp_path / "runs", settings=QUICK)
    toy = METHODS["mae"].RECIPES["toy"]
    made = {"arch": tiny.ARCHITECTURE, "epochs": 1, "warmup_epochs": 0, "betas": (0.8, 0.9)}
    assert calls[0]["recipe"] == dataclasses.replace(toy, **made, batch=4)
    assert record.model == "runs"
    assert record.details["pretraining"]["resolved_recipe"]["batch"] == 8
    assert record.weights_sha256 == open_checkpoint(tmp_path / "runs").weights_sha256
    assert record.checkpoint.format == "ssl-bench"
    assert run(tmp_path / "runs", settings=QUICK, name="mine").model == "mine"


def test_beside_a_protocol_that_reads_images(tmp_path, image_folder, calls):
    toy = dataclasses.asdict(METHODS["mae"].RECIPES["toy"])
    save_checkpoint(tmp_path / "x.pt", tiny_backbone(), origin={"method": "mae", "resolved_recipe": toy})
    records = ssl_bench.run(tmp_path / "x.pt", "efficiency,knn/dino", dataset="digits", device="cpu")
    assert [record.protocol for record in records] == ["efficiency", "knn"]
    assert [record.dataset for record in records] == [efficiency.noise("cpu").name, "digits"]
    assert ssl_bench.leaderboard(load_results()).shape == (1, 2)
    assert ssl_bench.run(tmp_path / "x.pt", "efficiency,knn/dino", dataset="digits", device="cpu") == records
    assert len(calls) == 1


# What is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("recipe:mocca/paper", "did you mean 'moca'"),
        ("recipe:", "unknown method"),
        ("recipe:moca/papr", "did you mean 'paper'"),
        ("recipe:moca/paper,decoder_dept=4", "did you mean 'decoder_depth'"),
        ("recipe:moca/paper,decoder_depth=four", "a whole number"),
        ("recipe:moca/paper,decoder_depth=0", "expected at least 1"),
        ("recipe:moca/paper,4", "expected key=value, got '4'"),
        ("recipe:moca/paper,decoder_depth=4,decoder_depth=8", "given twice"),
        ("recipe:moca/paper,batch=8", "--set batch=8"),
        ("recipe:moca/paper,arch=vit_bas", "vit_bas"),
        ("recipe:mae/paper,epochs=10", "--set warmup_epochs=... Here that is recipe:METHOD/ROW,field=value"),
        (f"recipe:moca/toy,{TINY}", "new_words=16"),  # of 4 images: found by the method itself
        (f"recipe:moca/toy,{TINY}", "recipe:METHOD/ROW,field=value"),
        ("random:vit_32x2x2_patch8_16", "recipe:METHOD/ROW"),
    ],
)
def test_wrong_subjects(spec, message, call):
    code, out, said = call("run", "-p", "efficiency", "--ckpt", spec, "--device", "cpu", "--set", "batch=4")
    assert (code, out) == (2, "")
    assert message in said, said
    assert not load_results()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "4"], "reads no images"),
        (["--batch-size", "4"], "--set batch=4"),
        (["--dtype", "fp16"], "needs a CUDA device"),
        (["--arch", "heads=4"], "--arch heads"),
        (["--checkpoint-key", "teacher"], "--checkpoint-key teacher"),
        (["--class-list", "tests/test_efficiency.py"], "noise on"),
        (["--set", "steps=0"], "steps=0"),
        (["--set", "images=0"], "images=0"),
        (["--set", "processes=0"], "processes=0"),
        (["--set", "stepps=1"], "did you mean 'steps'"),
        (["--recipe", "mocca"], "did you mean 'moca'"),
    ],
)
def test_options_that_mean_nothing_here(arguments, message, call, calls):
    code, _, said = call("run", "-p", "efficiency", "--ckpt", MAE, "--device", "cpu", *arguments)
    assert code == 2
    assert message in said, said
    assert not calls


def test_only_efficiency_measures_recipes(call):
    code, _, said = call("run", "-p", "knn,efficiency", "--ckpt", MAE, "--dataset", "digits")
    assert code == 2
    assert "knn has nothing to score" in said
    assert "--protocol efficiency" in said
    assert "did you mean 'efficiency'" in call("run", "-p", "efficency", "--ckpt", MAE)[2]


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({}, "expected a checkpoint that `ssl-bench pretrain` wrote"),
        ({"method": "dino", "resolved_recipe": {}}, "unknown method 'dino'"),
        ({"method": "mae", "resolved_recipe": {"epochs": 3}}, "another version of mae"),
    ],
)
def test_checkpoints_that_do_not_say_which_recipe_made_them(origin, message, tmp_path, calls):
    save_checkpoint(tmp_path / "x.pt", tiny_backbone(), origin=origin)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "x.pt")
    assert not calls


# What there is


def test_it_is_listed_beside_the_protocols(call):
    rows = {row["name"]: row for row in json.loads(call("ls", "protocols", "--json")[1])["protocols"]}
    assert {"knn", "efficiency"} <= set(rows)
    assert rows["efficiency"]["recipes"] == "moca, extrema, sdae, toy"
    assert "pre-training recipe" in rows["efficiency"]["what"]
    listed = {row["name"]: row for row in json.loads(call("ls", "recipes", "--json")[1])["recipes"]}
    assert {f"efficiency/{name}" for name in efficiency.RECIPES} <= set(listed)
    assert listed["efficiency/moca"]["selected_on"] == "none"
    assert "Tables 1, 2b, 2c, 3, 7 and 12" in listed["efficiency/moca"]["source"]


# What the tables say, typed again: images a GPU, GPUs; and the published figures, by row of the pre-training's table.
SETTINGS = {"moca": (2048 // 8, 8), "extrema": (2048 // 8, 8), "sdae": (768 // 8, 8), "toy": (16, None)}
FIGURES = {
    "moca": {
        "ablation": "8.15, 23.0",
        "table3-full-decoding": "9.00, 30.4",
        "table3-two-rounds": "10.35, 39.5",
        "table2-depth1": "8.08, 21.5",
        "table2-depth4": "8.55, 26.2 (all decoded: 10.25, 37.7)",
        "table2-depth8": "9.30, 32.6 (all decoded: 12.41, 52.4)",
        "table2-mask55": "9.00, 28.6",
        "table2-mask75": "7.37, 18.2",
        "table2-mask80": "7.35, 15.7",
        "paper": "11.23 minutes (MAE 5.35)",
        "vit-l": "89 hours for 200 epochs (MAE 187 for 1600)",
    },
    "extrema": {"75x1": "30", "75x2": "40", "80x1": "29", "80x2": "36", "80x5": "60", "90x1": "28", "90x2": "30"},
    "sdae": {
        "paper": "706, 16.02 (60.8 hours for 300 epochs)",
        "full-image": "826, 16.24",
        "only-masked": "761, 16.01",
        "teacher crop": "616, 15.54",
        "mae/300ep": "551, 14.93 (45.0 hours)",
        "800ep": "174.1 hours (mae/800ep 140.1)",
    },
}


@pytest.mark.parametrize("name", efficiency.RECIPES)
def test_recipes_are_what_their_sources_say(name):
    recipe = efficiency.RECIPES[name]
    assert (recipe.batch, recipe.processes) == SETTINGS[name]
    assert recipe.images == 1_281_167
    assert recipe.source
    expected = FIGURES.get(name, {})
    for row, numbers in expected.items():
        assert f" {row} {numbers}" in recipe.published
        assert row in METHODS[name].RECIPES or row in ("teacher crop", "mae/300ep")
    # ... and no figure is there that the tables do not have.
    assert sorted(re.findall(r"\d+\.\d+", recipe.published)) == sorted(re.findall(r"\d+\.\d+", str(expected)))


# Several processes


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting")
    try:
        recipe = dataclasses.replace(METHODS["mae"].RECIPES["toy"], arch=tiny.ARCHITECTURE, batch=8)
        cost = measure("mae", recipe, Settings(out=NOWHERE), steps=2)
    finally:
        torch.distributed.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(dataclasses.asdict(cost)))


def test_two_processes_share_the_batch_and_the_worst_peak_counts(tmp_path: Path) -> None:
    other = torch.multiprocessing.get_context("spawn").Process(target=_one_of_two, args=(1, str(tmp_path)))
    other.start()
    _one_of_two(0, str(tmp_path))
    other.join(60)
    assert other.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    recipe = dataclasses.replace(METHODS["mae"].RECIPES["toy"], arch=tiny.ARCHITECTURE, batch=4)
    alone = measure("mae", recipe, Settings(out=NOWHERE), steps=1)
    assert first["batch"] == second["batch"] == 8
    assert first["peak_memory_bytes"] == second["peak_memory_bytes"] > 0
    assert first["flops_per_step"] == second["flops_per_step"] == alone.flops_per_step
