"""`ssl-bench run` as people call it: records, errors, exit codes, and what must not be imported on the way."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_backbone
from two_processes import run_together

import ssl_bench
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.leaderboards.record import Record
from ssl_bench.leaderboards.store import load_results, load_samples

SMALL = ["--set", "neighbors=5", "--set", "resize_px=16", "--set", "crop_px=16", "--workers", "0"]


def cli(
    *arguments: str | Path, python: tuple[str, ...] = ("-m", "ssl_bench.cli"), **kwargs
) -> subprocess.CompletedProcess:
    """The command in a process of its own, as a user's shell runs it."""
    command = [sys.executable, *python, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def in_process(monkeypatch, capsys, *arguments: str | Path) -> tuple[int, str, str]:
    """The same without the seconds that importing torch takes."""
    from ssl_bench import cli as module

    monkeypatch.setattr(sys, "argv", ["ssl-bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.fixture
def tiny(tmp_path) -> Path:
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    return tmp_path / "tiny.pt"


def test_one_json_document_with_every_field_of_a_record(tiny, image_folder):
    done = cli("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", image_folder(), *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["records"]
    assert list(record) == list(Record.__struct_fields__)
    assert record["protocol"] == "knn"
    assert record["recipe"] == "dino"
    assert record["overrides"] == {"neighbors": [5], "resize_px": 16, "crop_px": 16}
    assert record["n_samples"] == {"original": {"train": 12, "val": 8}, "evaluated": {"train": 12, "val": 8}}
    assert record["main_metric"] in record["scores"]
    assert record["checkpoint"]["format"] == "ssl-bench"
    assert record["checkpoint"]["matched_percent"] == 100.0
    assert {used["source"] for used in record["features"]} == {"extracted"}


def test_several_protocols_share_one_extraction_and_records_are_kept(tiny, image_folder, monkeypatch):
    from ssl_bench.evaluate import features

    passes = []
    load = features.load
    monkeypatch.setattr(features, "load", lambda split, *rest: (passes.append(split.name), load(split, *rest))[1])
    options = {"dataset": str(image_folder()), "settings": {"resize_px": "16", "crop_px": "16", "neighbors": "3"}}
    records = ssl_bench.run(tiny, ["knn/dino", "knn/moca-paper", "knn/mmc-hybrid"], **options)
    assert passes == ["train", "val"]
    assert [record.recipe for record in records] == ["dino", "moca-paper", "mmc-hybrid"]
    assert {used.key for record in records for used in record.features} == {used.key for used in records[2].features}
    assert ssl_bench.run(tiny, "knn/mmc-hybrid", **options) == [records[2]]
    assert passes == ["train", "val"]
    frame = ssl_bench.load_results().to_dataframe()
    assert set(frame[frame.is_main].recipe) == {"dino", "moca-paper", "mmc-hybrid"}


def test_a_folder_that_is_called_like_built_in_data_is_another_dataset(tiny, image_folder):
    folder = image_folder(name="toy")
    (record,) = ssl_bench.run(
        tiny, "knn", dataset=str(folder), settings={"resize_px": "16", "crop_px": "16", "neighbors": "3"}
    )
    assert record.dataset == "toy-folder"


def test_a_size_that_built_in_data_do_not_take_is_refused():
    with pytest.raises(ssl_bench.UserError, match=r"--set resize_px=\.\.\.: the images of digits are brought"):
        ssl_bench.run("pixels:", "knn", dataset="digits", settings={"crop_px": "16", "resize_px": "16"})


def test_protocols_without_a_dataset_take_the_toy_world_in_their_own_form(tiny):
    records = ssl_bench.run(tiny, "fewshot,locality/toy,retrieval", limit=200)
    assert [record.dataset for record in records] == ["toy", "toy-coco", "toy-roxford"]
    assert records[0].n_samples.evaluated == {"train": 0, "val": 200}
    with pytest.raises(ssl_bench.UserError, match="toy-coco is a dataset of boxes, which other protocols read"):
        ssl_bench.run(tiny, "knn", dataset="toy-coco")
    with pytest.raises(ssl_bench.UserError, match="efficiency reads no images"):
        ssl_bench.run(tiny, "efficiency", dataset="digits")


def test_two_processes_share_what_trains_and_the_first_does_the_rest():
    command = ["--ckpt", "random:vit_32x1x2_patch4_8", "--dataset", "digits", "--device", "cpu", "--workers", "0"]
    run_together([*command, "-p", "fewshot,linear/cached,knn", "--json"])
    assert sorted(record.protocol for record in ssl_bench.load_results()) == ["fewshot", "knn", "linear"]


def test_four_protocols_read_every_image_once(monkeypatch):
    from ssl_bench.evaluate import features

    passes = []
    load = features.load
    monkeypatch.setattr(features, "load", lambda split, *rest: (passes.append(split.name), load(split, *rest))[1])
    four = "knn,linear/cached,lowshot,fewshot"
    records = ssl_bench.run("random:vit_32x1x2_patch4_8", four, dataset="digits", seed=7)
    assert passes == ["train", "val"]
    assert [record.protocol for record in records] == ["knn", "linear", "lowshot", "fewshot"]
    assert len({record.seconds["extract_shared"] for record in records}) == 1
    assert all(used.source == "extracted" for record in records for used in record.features)


def test_accuracy_and_samples_agree_with_a_count_by_hand(tiny, image_folder):
    (record,) = ssl_bench.run(
        tiny, "knn", dataset=str(image_folder()), settings={"resize_px": "16", "crop_px": "16", "neighbors": "1"}
    )
    samples = load_samples(record)
    assert list(samples.sample_id) == [f"{c}/000{i}.png" for c in "ab" for i in range(4)]
    assert (samples.label == samples.prediction).tolist() == samples.correct.tolist()
    top1 = 100 * samples.correct.mean()
    assert record.main_score.value == pytest.approx(top1)
    assert record.main_score.stderr == pytest.approx(100 * np.sqrt(top1 / 100 * (1 - top1 / 100) / 8))


def test_overwrite_policies(tiny, image_folder, call):
    command = ("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", image_folder(), *SMALL, "--json")
    first = json.loads(call(*command)[1])["records"][0]
    assert json.loads(call(*command)[1])["records"][0] == first
    again = json.loads(call(*command, "--overwrite", "always")[1])["records"][0]
    assert {used["source"] for used in again["features"]} == {"cache"}
    assert again["scores"] == first["scores"]
    code, _, errors = call(*command, "--overwrite", "never")
    assert code == 2
    assert "knn/dino" in errors
    assert len(load_results()) == 1


def test_a_limited_run_is_marked_and_sees_every_class(tiny, image_folder):
    folder = image_folder(train=6, val=4, classes=("a", "b", "c"))
    options = {"dataset": str(folder), "settings": {"resize_px": "16", "crop_px": "16", "neighbors": "1"}}
    (record,) = ssl_bench.run(tiny, "knn", limit=4, **options)
    assert record.limited
    assert record.n_samples.evaluated == {"train": 4, "val": 4}
    assert record.n_samples.original == {"train": 18, "val": 12}
    assert set(load_samples(record).label) == {0, 1, 2}
    assert ssl_bench.run(tiny, "knn", limit=4, **options) == [record]  # found again, not computed again
    with pytest.raises(ssl_bench.UserError, match="limit"):
        ssl_bench.leaderboard(load_results())
    ssl_bench.run(tiny, "knn", **options)
    assert ssl_bench.leaderboard(load_results()).shape == (1, 1)


def test_a_run_on_listed_images_never_passes_for_a_run_on_all(tiny, image_folder, tmp_path, call):
    folder = image_folder(classes=("a", "b", "c"))
    (tmp_path / "few.txt").write_text("".join(f"{c}/000{i}.png\n" for c in "abc" for i in range(4)))
    (tmp_path / "two.txt").write_text("a\nc\n")
    (tmp_path / "one.txt").write_text("a\n")
    options = {"dataset": str(folder), "settings": {"resize_px": 16, "crop_px": 16, "neighbors": 2}}
    (whole,) = ssl_bench.run(tiny, "knn", **options)
    (few,) = ssl_bench.run(tiny, "knn", train_list=tmp_path / "few.txt", **options)
    (two,) = ssl_bench.run(tiny, "knn", class_list=str(tmp_path / "two.txt"), **options)
    assert few.n_samples.evaluated == {"train": 12, "val": 12}
    assert two.n_samples.evaluated == {"train": 12, "val": 8}
    assert few.n_samples.original == two.n_samples.original == whole.n_samples.original == {"train": 18, "val": 12}
    columns = list(ssl_bench.leaderboard(load_results()).columns)
    assert len(columns) == 3
    assert sum("few.txt" in column for column in columns) == sum("two.txt" in column for column in columns) == 1
    command = ("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", folder, *SMALL)
    code, _, errors = call(*command, "--class-list", tmp_path / "one.txt")
    assert code == 2
    assert "one class" in errors


def test_what_can_be_known_to_fail_fails_before_an_image_is_read(tiny, image_folder, call, monkeypatch):
    from ssl_bench.evaluate import features

    monkeypatch.setattr(features, "load", lambda *arguments: pytest.fail("an image was read"))
    command = ("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", image_folder(), "--set", "resize_px=16")
    code, _, errors = call(*command, "--set", "crop_px=16", "--set", "neighbors=5,3,200")
    assert code == 2
    assert "--set neighbors=5,3" in errors


def test_a_record_lists_only_what_its_protocol_read(tiny, image_folder):
    options = {"dataset": str(image_folder()), "settings": {"resize_px": 16, "crop_px": 16, "neighbors": (3,)}}
    ibot, mmc = ssl_bench.run(tiny, "knn/ibot,knn/mmc-hybrid", **options)
    assert {used.reading.split()[0] for used in ibot.features} == {"cls"}
    assert {used.reading.split()[0] for used in mmc.features} == {"cls", "patch_mean"}
    assert ibot.seconds["extract_shared"] == mmc.seconds["extract_shared"] > 0


def test_misspelled_options_of_the_python_api_are_explained(tiny):
    with pytest.raises(ssl_bench.UserError, match="did you mean 'dataset'"):
        ssl_bench.run(tiny, "knn", datset="digits")


def test_skipped_images_are_counted(tiny, image_folder, call):
    folder = image_folder()
    (folder / "val" / "a" / "0002.png").write_bytes(b"\x89PNG truncated")
    code, _, errors = call("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", folder, *SMALL)
    assert code == 2
    assert "0002.png" in errors
    assert not list(Path(os.environ["SSL_BENCH_RESULTS"]).rglob("*.json"))
    code, out, _ = call(
        "run", "--ckpt", tiny, "--protocol", "knn", "--dataset", folder, *SMALL, "--skip-broken", "--json"
    )
    record = json.loads(out)["records"][0]
    assert record["skipped_broken"] == {"train": 0, "val": 1}
    assert record["n_samples"]["evaluated"] == {"train": 12, "val": 7}


def test_a_recipe_that_the_network_cannot_serve_is_refused_with_those_that_fit(tmp_path, image_folder, call):
    state = {f"vit.{key}": value for key, value in tiny_backbone().vit.state_dict().items()}
    flat = {key.removeprefix("vit."): value for key, value in state.items() if "cls_token" not in key}
    flat["pos_embed"] = flat["pos_embed"][:, 1:]
    torch.save(flat, tmp_path / "no-cls.pth")
    command = ("run", "--ckpt", tmp_path / "no-cls.pth", "--arch", "heads=2", "--dataset", image_folder(), *SMALL)
    code, _, errors = call(*command, "--protocol", "knn/dino")
    assert code == 2
    assert "no class token" in errors
    assert "knn/moca-paper" in errors
    assert "knn/ibot" not in errors
    assert call(*command, "--protocol", "knn/moca-paper")[0] == 0
    no_norm = {key: value for key, value in flat.items() if not key.startswith("norm.")}
    torch.save(no_norm, tmp_path / "no-norm.pth")
    command = ("run", "--ckpt", tmp_path / "no-norm.pth", *command[3:], "--protocol", "knn/moca-paper")
    code, _, errors = call(*command)
    assert code == 2
    assert "--set norm=false" in errors
    assert call(*command, "--set", "norm=false")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--protocol", "knm"], ["knm", "did you mean 'knn'"]),
        (["--protocol", "knn/dinno"], ["dinno", "did you mean 'dino'"]),
        (["--protocol", "knn", "--set", "neighbours=5"], ["neighbours", "did you mean 'neighbors'"]),
        (["--protocol", "knn", "--set", "neighbors=five"], ["neighbors=five", "whole number"]),
        (["--protocol", "knn", "--set", "neighbors"], ["key=value"]),
        (["--protocol", "knn", "--set", "interpolation=cubic"], ["bicubic, bilinear"]),
        (["--protocol", "knn", "--set", "norm=perhaps"], ["true or false"]),
        (["--protocol", "knn", "--set", "crop_px=300"], ["crop_px=300", "resize_px=16"]),
        (["--protocol", "knn", "--set", "source=me"], ["source"]),
        (["--protocol", ""], ["no protocol"]),
        (["--protocol", "knn", "--dtype", "fp8"], ["fp8", "fp16"]),
        (["--protocol", "knn", "--overwrite", "sometimes"], ["sometimes", "only-missing"]),
        (["--protocol", "knn", "--device", "cuda:7"], ["cuda:7", "auto or cpu"]),
        (["--protocol", "knn", "--device", "meta"], ["--device meta", "cuda:N"]),
        (["--protocol", "knn", "--limit", "0"], ["--limit 0"]),
        (["--protocol", "knn", "--workers", "-1"], ["--workers -1"]),
        (["--protocol", "knn/extrema", "--seed", "-1"], ["--seed -1"]),
        (["--protocol", "knn", "--name", " "], ["--name"]),
        (["--protocol", "knn", "--ckpt", "pixels:", "--checkpoint-key", "teacher"], ["--checkpoint-key teacher"]),
        (["--protocol", "knn", "--ckpt", "pixels:", "--arch", "heads=6"], ["--arch heads"]),
        (["--protocol", "knn", "--set", "neighbors=13"], ["neighbors=13", "12 images"]),
        (["--protocol", "knn", "--checkpoint-key", "teacher"], ["--checkpoint-key 'teacher'", "Known: model"]),
        (["--protocol", "knn", "--arch", "hedas=2"], ["hedas", "did you mean 'heads'"]),
    ],
)
def test_wrong_options_are_explained(arguments, expected, tiny, image_folder, call):
    code, out, errors = call("run", "--ckpt", tiny, "--dataset", image_folder(), *SMALL, *arguments)
    assert code == 2
    assert out == ""
    assert errors.startswith("ssl-bench: ")
    assert "Traceback" not in errors
    for part in expected:
        assert part in errors
    assert not list(Path(os.environ["SSL_BENCH_RESULTS"]).rglob("*.json"))


def test_wrong_files_are_explained(tmp_path, image_folder, call):
    folder = image_folder()
    (tmp_path / "text.pth").write_text("not a checkpoint at all")
    torch.save({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    for spec, expected in (
        ("absent.pth", "does not exist"),
        ("text.pth", "not a checkpoint"),
        ("resnet.pth", "ResNet"),
    ):
        code, _, errors = call("run", "--ckpt", tmp_path / spec, "--protocol", "knn", "--dataset", folder)
        assert (code, expected in errors, spec in errors) == (2, True, True), errors


class _Evil:
    """Unpickling it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


def test_a_pickle_that_would_execute_code_does_not(tmp_path, call):
    proof = tmp_path / "executed"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": _Evil(proof)}, protocol=2))
    for command in ("inspect", "run"):
        arguments = ["--protocol", "knn", "--dataset", "digits", "--ckpt"] if command == "run" else []
        code, _, errors = call(command, *arguments, tmp_path / "evil.pth")
        assert code == 2
        assert "mkdir" in errors
        assert not proof.exists()


def test_wrong_data_is_explained(tiny, image_folder, call, tmp_path):
    one_class = image_folder(classes=("a",), name="one")
    differ = image_folder(name="differ")
    (differ / "val" / "b").rename(differ / "val" / "z")
    (tmp_path / "empty").mkdir()
    for dataset, expected in (
        (one_class, "class"),
        (differ, "z"),
        (tmp_path / "empty", "empty"),
        ("imagnet", "imagenet"),
        (tmp_path / "none", "none"),
    ):
        code, _, errors = call("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", dataset, *SMALL)
        assert (code, expected in errors, "Traceback" in errors) == (2, True, False), errors


def test_a_results_folder_that_cannot_be_written_is_said_before_any_work(
    tiny, image_folder, call, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSL_BENCH_RESULTS", str(tmp_path / "file" / "results"))
    code, _, errors = call("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", image_folder(), *SMALL)
    assert code == 2
    assert str(tmp_path / "file") in errors


def test_pixels_take_built_in_images_at_their_stored_size(call):
    code, out, _ = call("run", "--ckpt", "pixels:", "--protocol", "knn", "--dataset", "digits", "--json")
    record = json.loads(out)["records"][0]
    assert code == 0
    assert "None/None" in record["features"][0]["reading"]
    assert record["scores"]["top1"]["value"] > 95  # raw pixels are nearly enough for digits
    assert record["n_samples"]["evaluated"] == {"train": 1438, "val": 359}


def test_the_seed_of_a_random_network_is_part_of_the_run(call):
    def sha(seed):
        out = call(
            "run",
            "--ckpt",
            "random:vit_32x1x2_patch4_8",
            "--protocol",
            "knn",
            "--dataset",
            "digits",
            "--seed",
            seed,
            "--json",
        )[1]
        return json.loads(out)["records"][0]["weights_sha256"]

    assert sha("0") != sha("1")
    table = ssl_bench.leaderboard(load_results())
    assert table.shape[1] == 1


@pytest.mark.parametrize("kind", ["protocols", "recipes", "datasets", "results"])
def test_ls_prints_names_as_json(kind, call):
    code, out, _ = call("ls", kind, "--json")
    assert code == 0
    rows = json.loads(out)[kind]
    assert all(row["name"] for row in rows)
    assert rows or kind == "results"
    assert call("ls", kind)[0] == 0


def test_inspect_leaderboard_cache_doctor_and_data(tiny, image_folder, call):
    folder = image_folder()
    found = json.loads(call("inspect", tiny, "--json")[1])
    assert (found["arch"], found["format"], found["matched_percent"]) == ("vit_32x2x2_patch8_16", "ssl-bench", 100.0)
    assert call("leaderboard")[0] == 2  # no records yet
    call("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", folder, *SMALL)
    for form in ("table", "csv", "md", "latex", "html"):
        code, out, _ = call("leaderboard", "--format", form)
        assert code == 0
        assert "tiny" in out
    assert json.loads(call("leaderboard", "--json")[1])["leaderboard"][0]["model"] == "tiny"
    assert call("leaderboard", "--format", "word")[0] == 2
    assert any(row["model"] == "tiny" for row in json.loads(call("cache", "ls", "--json")[1])["cache"])
    assert call("cache", "verify")[0] == 0
    assert call("cache", "gc")[0] == 0
    assert json.loads(call("doctor", "--json")[1])["doctor"][0]["what"] == "python"
    assert call("data", "check", folder)[0] == 0
    shutil.rmtree(folder / "val" / "b")
    assert call("data", "check", folder)[0] == 1


def test_data_toy_writes_a_dataset_that_run_reads_and_overwrites_nothing(tiny, call, tmp_path):
    code, _, _ = call("data", "toy", "--out", tmp_path / "toy", "--train", 20, "--val", 10, "--size", 16)
    assert code == 0
    assert len(list((tmp_path / "toy").rglob("*.png"))) == 30
    assert call("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", tmp_path / "toy", *SMALL)[0] == 0
    code, _, errors = call("data", "toy", "--out", tmp_path / "toy")
    assert code == 2
    assert "not an empty folder" in errors
    assert call("data", "toy", "--out", tmp_path / "other", "--train", 0)[0] == 2
    assert not (tmp_path / "other").exists()


# Runs the command and then says, in the last line of stderr, what it imported.
WATCH = """
import sys
from ssl_bench.cli import main
try:
    main()
finally:
    sys.stderr.write(chr(10) + ",".join(sys.modules))
"""


def test_help_and_version_are_quick_because_they_import_nothing(tmp_path):
    for arguments in (("--help",), ("run", "--help"), ("--version",)):
        done = cli(*arguments, python=("-c", WATCH))
        assert done.returncode == 0
        assert not {"torch", "numpy", "pandas", "PIL"} & set(done.stderr.splitlines()[-1].split(","))


def test_a_warm_run_imports_neither_torchvision_nor_timm_nor_pandas_nor_sklearn(tiny, image_folder):
    command = ("run", "--ckpt", tiny, "--protocol", "knn", "--dataset", image_folder(), *SMALL)
    assert cli(*command).returncode == 0
    for extra in ((), ("--overwrite", "always")):  # the record is there; the features are there
        done = cli(*command, *extra, python=("-c", WATCH))
        assert done.returncode == 0
        loaded = set(done.stderr.splitlines()[-1].split(","))
        assert "torch" in loaded
        assert not {"torchvision", "timm", "pandas", "sklearn", "scipy", "matplotlib"} & loaded


def test_warm_runs_of_built_in_data_and_random_networks_are_light_too():
    command = ("run", "--ckpt", "random:vit_32x1x2_patch4_8", "--protocol", "knn", "--dataset", "digits")
    assert cli(*command).returncode == 0
    done = cli(*command, "--overwrite", "always", python=("-c", WATCH))
    assert not {"torchvision", "timm", "pandas", "sklearn", "scipy"} & set(done.stderr.splitlines()[-1].split(","))
