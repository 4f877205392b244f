"""A record is whole or absent, is taken for its own run only, and comes back as it was written."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet
import pytest

from ssl_bench.errors import UserError
from ssl_bench.leaderboards import record as record_module
from ssl_bench.leaderboards.record import (
    SCHEMA_VERSION,
    Deviations,
    FeaturesUsed,
    OpenedCheckpoint,
    Record,
    SampleCounts,
    Score,
    files_path,
    find_path,
    find_record,
    ordinary_place,
    path_name,
    possible_paths,
    read_record,
    record_path,
    samples_path,
    settings_text,
    write_record,
)
from ssl_bench.leaderboards.store import load_results
from ssl_bench.leaderboards.strict_json import plain, read_quickly

SAMPLES = {"sample_id": ["a", "b"], "label": [0, 1], "prediction": [0, 0], "correct": [True, False]}
OTHER_SAMPLES = SAMPLES | {"prediction": [1, 1], "correct": [False, True]}


def make_record(**changes: object) -> Record:
    """A valid record of a plain run; also used by the tests of the store and of the tables."""
    values: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "status": "done",
        "model": "moca-b",
        "weights_sha256": "ab" * 32,
        "arch": "vit_base_patch16_224",
        "checkpoint": OpenedCheckpoint(spec="runs/moca", format="moca", matched_percent=100.0, notes=["teacher"]),
        "checkpoint_key": "teacher",
        "checkpoint_key_given": False,
        "arch_overrides": {},
        "protocol": "knn",
        "recipe": "dino",
        "version": 1,
        "overrides": {},
        "resolved_recipe": {"neighbors": 20, "temperatures": [0.07], "metric": "cosine", "nested": {"a": None}},
        "dataset": "toy",
        "subset": {},
        "dataset_manifest_sha256": {"train": "c" * 64, "val": "d" * 64},
        "n_samples": SampleCounts(original={"train": 100, "val": 10}, evaluated={"train": 100, "val": 10}),
        "skipped_broken": {"train": 0, "val": 0},
        "skip_broken": False,
        "limited": False,
        "limit": None,
        "seed": 0,
        "selected_on": "none",
        "scores": {
            "top1": Score(value=58.25, n=10, stderr=1.5),
            "top5": Score(value=90.0, n=3, std=0.5, ddof=1),
            "speed": Score(value=3.0, n=1),
        },
        "main_metric": "top1",
        "lower_is_better": False,
        "device": "cpu",
        "dtype": "fp32",
        "environment": {"python": "3.11", "threads": 2},
        "code_version": "0.1.0+abc",
        "started": "2026-01-31T12:00:00+00:00",
        "seconds": {"extract": 1.5, "score": 0.25},
        "peak_memory_bytes": 1_000_000,
        "features": [FeaturesUsed(key="k" * 8, split="val", reading="last 1, cls, norm", source="cache")],
        "warnings": ["k-NN is near chance"],
        "details": {"curve": [1.5, 2.5], "chosen": {"lr": 0.1}},
    }
    if "limit" in changes:
        values["limited"] = changes["limit"] is not None
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def document_of(tmp_path: Path) -> dict:
    return json.loads(write_record(make_record(), tmp_path / "source").read_text())


# Round trip ---------------------------------------------------------------------------------------------------------


def test_every_field_comes_back_and_stands_in_the_file_in_order(tmp_path):
    record = make_record(limit=7, seed=3, checkpoint_key_given=True, skip_broken=True, overrides={"neighbors": 5})
    path = write_record(record, tmp_path)
    back = read_record(path)
    for field in msgspec.structs.fields(Record):
        assert getattr(back, field.name) == getattr(record, field.name), field.name
    assert list(json.loads(path.read_text())) == [field.name for field in msgspec.structs.fields(Record)]


def test_design_fields_are_all_there():
    design = (
        "schema_version status model weights_sha256 arch checkpoint_key protocol recipe version overrides "
        "resolved_recipe dataset dataset_manifest_sha256 n_samples limited seed selected_on scores main_metric device "
        "dtype environment code_version started seconds peak_memory_bytes checkpoint features skipped_broken warnings"
    )
    assert set(design.split()) <= {field.name for field in msgspec.structs.fields(Record)}


def test_scores_are_written_as_the_design_says(tmp_path):
    scores = document_of(tmp_path)["scores"]
    assert scores == {
        "top1": {"value": 58.25, "n": 10, "stderr": 1.5},
        "top5": {"value": 90.0, "n": 3, "std": 0.5, "ddof": 1},
        "speed": {"value": 3.0, "n": 1},
    }


def test_numpy_numbers_tuples_and_paths_are_written_as_json(tmp_path):
    record = make_record(
        scores={"top1": Score(value=np.float32(0.5), n=np.int64(4), stderr=np.float64(0.25))},
        resolved_recipe={"grid": (1, np.int32(2)), "nesterov": np.bool_(True), "at": Path("x"), "name": np.str_("y")},
        seed=np.int64(0),
    )
    back = read_record(write_record(record, tmp_path))
    assert back.scores["top1"] == Score(value=0.5, n=4, stderr=0.25)
    assert back.resolved_recipe == {"grid": [1, 2], "nesterov": True, "at": "x", "name": "y"}
    assert back.run.key() == record.run.key()


# Where a record lies ------------------------------------------------------------------------------------------------


def test_path_of_the_plain_run(tmp_path):
    path = write_record(make_record(), tmp_path)
    assert path == tmp_path / "moca-b" / ("ab" * 6) / "toy" / "knn-dino@v1.json"


def test_path_of_a_deviating_run_is_stable(tmp_path):
    # Computed by hand: sha256 of '{"overrides":{"neighbors":5}}'. A change of the rule would orphan users' records.
    run = make_record(overrides={"neighbors": 5}).run
    assert record_path(run, tmp_path).name == "knn-dino@v1+5486880a.json"


def test_default_folder_is_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_RESULTS", str(tmp_path / "elsewhere"))
    assert write_record(make_record()).is_relative_to(tmp_path / "elsewhere")
    assert find_record(make_record().run) is not None


def test_the_order_of_overrides_does_not_matter():
    one = make_record(overrides={"a": 1, "b": {"x": (1, 2), "y": 2}}).run
    two = make_record(overrides={"b": {"y": 2, "x": [1, 2]}, "a": 1}).run
    assert record_path(one) == record_path(two)
    assert one.key() == two.key()


def test_no_two_deviations_share_a_path_or_a_key():
    choices = {
        "overrides": [{}, {"neighbors": 5}, {"neighbors": "5"}, {"neighbors": 10}, {"seed": 1}, {"limit": 10}],
        "limit": [None, 1, 10],
        "seed": [0, 1, 10],
        "dtype": ["fp32", "bf16"],
        "checkpoint_key_given": [False, True],
        "arch_overrides": [{}, {"heads": "6"}, {"neighbors": "5"}],
        "skip_broken": [False, True],
        "subset": [{}, {"train_list": "1percent.txt 0a1b2c3d"}],
    }
    runs = [
        make_record(**dict(zip(choices, values, strict=True))).run for values in itertools.product(*choices.values())
    ]
    assert len({record_path(run) for run in runs}) == len({run.key() for run in runs}) == len(runs) == 2592


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"weights_sha256": "12" * 32},
        {"dataset": "digits"},
        {"protocol": "linear"},
        {"recipe": "moca"},
        {"version": 2},
    ],
)
def test_every_part_of_the_identity_is_in_the_path(change):
    assert record_path(make_record(**change).run) != record_path(make_record().run)


def test_what_does_not_decide_a_number_is_not_in_the_identity():
    same = make_record(started="2027-01-01T00:00:00Z", device="cuda", environment={}, code_version="2")
    assert same.run.key() == make_record().run.key()


def test_names_become_one_safe_component():
    assert path_name("hf:org/vit b") == "hf-org-vit-b"
    assert path_name("../..//etc") == "etc"
    assert path_name("a\\b\n*?") == "a-b"
    assert "/" not in path_name("/")
    assert path_name("模型") not in ("", path_name("型模"))
    assert len(path_name("x" * 1000)) <= 100


@pytest.mark.parametrize(
    "change",
    [
        {"dataset_manifest_sha256": {"train": "c" * 64, "val": "e" * 64}},  # images were added
        {"dataset_manifest_sha256": {"val": "d" * 64}},
        {"model": "moca b"},  # the same folder
        {"model": "moca:b"},
        {"weights_sha256": "ab" * 6 + "00" * 26},  # the same 12 digits
    ],
)
def test_a_run_with_the_same_path_is_another_run_and_overwrites_nothing(tmp_path, change):
    first, second = make_record(), make_record(**change)
    assert record_path(first.run, tmp_path) == record_path(second.run, tmp_path)
    first_path = write_record(first, tmp_path, samples=SAMPLES)
    assert find_record(second.run, tmp_path) is None

    second_path = write_record(second, tmp_path, samples=OTHER_SAMPLES)
    assert second_path == possible_paths(second.run, tmp_path)[1] != first_path
    assert find_record(first.run, tmp_path) == first
    assert find_record(second.run, tmp_path) == second
    # Written again, each finds its own place: even when the ordinary place has become free.
    assert write_record(second, tmp_path) == second_path
    first_path.unlink()
    assert write_record(second, tmp_path) == second_path
    assert find_path(first.run, tmp_path) is None


def test_a_file_that_cannot_be_read_is_neither_found_nor_overwritten(tmp_path):
    record = make_record()
    place = record_path(record.run, tmp_path)
    place.parent.mkdir(parents=True)
    place.write_text('{"schema_version": 99}')  # perhaps of a newer version
    assert find_record(record.run, tmp_path) is None
    assert write_record(record, tmp_path) != place
    assert place.read_text() == '{"schema_version": 99}'
    assert find_record(record.run, tmp_path) == record


def test_rewriting_replaces_the_record_in_place(tmp_path):
    path = write_record(make_record(), tmp_path)
    assert write_record(make_record(device="cuda"), tmp_path) == path
    assert read_record(path).device == "cuda"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_deviations_write_only_what_deviates():
    assert Deviations().as_json() == {}
    assert Deviations(limit=5, seed=2).as_json() == {"limit": 5, "seed": 2}


def test_settings_as_text():
    assert (
        settings_text({"pooling": "cls", "neighbors": 5, "grid": (1, 2.5)}) == "grid=[1,2.5], neighbors=5, pooling=cls"
    )


# Whole or absent ----------------------------------------------------------------------------------------------------


def test_samples_are_kept_beside_the_record(tmp_path):
    path = write_record(make_record(), tmp_path, samples={name: np.array(column) for name, column in SAMPLES.items()})
    assert samples_path(path).name == "knn-dino@v1.samples.parquet"
    assert pyarrow.parquet.read_table(samples_path(path)).to_pydict() == SAMPLES


def test_other_files_are_kept_in_a_folder_of_the_record(tmp_path):
    path = write_record(make_record(), tmp_path, files={"config.json": b"{}", "overlays/one.png": b"png"})
    assert files_path(path).name == "knn-dino@v1.files"
    assert (files_path(path) / "config.json").read_bytes() == b"{}"
    assert (files_path(path) / "overlays" / "one.png").read_bytes() == b"png"
    assert len(load_results(tmp_path)) == 1  # a config is no record
    assert write_record(make_record(), tmp_path, files={"other.txt": b"text"}) == path
    assert [each.name for each in files_path(path).iterdir()] == ["other.txt"]
    write_record(make_record(), tmp_path)
    assert not files_path(path).exists()
    assert path.exists()


def test_a_record_goes_before_the_files_that_belong_to_it(tmp_path, monkeypatch):
    path = write_record(make_record(), tmp_path, files={"config.json": b"{}"})

    def pulled(*_: object) -> None:
        raise AssertionError("pulled the plug")

    monkeypatch.setattr(record_module, "replace_folder", pulled)
    with pytest.raises(AssertionError, match="pulled"):
        write_record(make_record(device="cuda"), tmp_path, files={"other.txt": b"text"})
    assert not path.exists()


def test_a_record_written_again_without_samples_does_not_keep_old_ones(tmp_path):
    path = write_record(make_record(), tmp_path, samples=SAMPLES)
    write_record(make_record(), tmp_path)
    assert path.exists()
    assert not samples_path(path).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": None}, "columns"),
        ({"extra": [1, 2]}, "columns"),
        ({"correct": [1, 0]}, "booleans"),
        ({"sample_id": ["a", "a"]}, "twice"),
        ({"label": [None, 1]}, "every row"),
    ],
)
def test_wrong_samples_leave_nothing_behind(tmp_path, change, message):
    samples = {name: column for name, column in {**SAMPLES, **change}.items() if column is not None}
    with pytest.raises(AssertionError, match=message):
        write_record(make_record(), tmp_path, samples=samples)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_failure_while_writing_samples_keeps_the_old_pair(tmp_path, monkeypatch):
    path = write_record(make_record(), tmp_path, samples=SAMPLES)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(UserError, match="no space left"):
        write_record(make_record(device="cuda"), tmp_path, samples=OTHER_SAMPLES)
    assert read_record(path).device == "cpu"
    assert pyarrow.parquet.read_table(samples_path(path)).to_pydict() == SAMPLES


@pytest.mark.parametrize("old", [False, True], ids=["first time", "over an old pair"])
@pytest.mark.parametrize("samples", [None, OTHER_SAMPLES], ids=["no samples", "samples"])
@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
def test_whatever_call_fails_a_record_has_its_own_samples(tmp_path, monkeypatch, old, samples, failing_call):
    if old:
        write_record(make_record(), tmp_path, samples=SAMPLES)
    calls = itertools.count(1)
    originals = {"replace": Path.replace, "unlink": Path.unlink}

    def failing(name: str):
        def call(self: Path, *arguments: object, **options: object) -> object:
            if not self.name.endswith(".part") or name == "replace":  # temporary files may always be removed
                assert next(calls) != failing_call, "pulled the plug"
            return originals[name](self, *arguments, **options)

        return call

    for name in originals:
        monkeypatch.setattr(Path, name, failing(name))
    finished = True
    try:
        write_record(make_record(device="cuda"), tmp_path, samples=samples)
    except AssertionError:
        finished = False
    monkeypatch.undo()

    found = find_path(make_record().run, tmp_path)
    assert found is not None or not finished
    if found is not None:
        mine = read_record(found).device == "cuda"
        assert mine or old
        expected = samples if mine else SAMPLES
        beside = samples_path(found)
        assert (pyarrow.parquet.read_table(beside).to_pydict() if beside.exists() else None) == expected


def test_killed_between_the_two_files_there_is_no_record(tmp_path):
    """No exception handler runs here: the process is gone after the samples, before the record."""
    script = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_record import SAMPLES, make_record
from ssl_bench.leaderboards.record import write_record
replace = Path.replace
Path.replace = lambda self, target: os._exit(9) if target.suffix == ".json" else replace(self, target)
write_record(make_record(), Path({str(tmp_path)!r}), samples=SAMPLES)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    place = record_path(make_record().run, tmp_path)
    assert samples_path(place).exists()
    assert not place.exists()
    assert find_record(make_record().run, tmp_path) is None
    assert write_record(make_record(), tmp_path, samples=SAMPLES) == place


# Validation ---------------------------------------------------------------------------------------------------------

WRONG = {
    "score is text": (("scores", "top1", "value"), "58", "scores.top1: value: expected a finite number, found '58'"),
    "score is true": (("scores", "top1", "value"), True, "scores.top1: value: expected a finite number"),
    "n is broken": (("scores", "top1", "n"), 10.5, "scores.top1: n: expected a whole number"),
    "n is zero": (("scores", "top1", "n"), 0, "scores.top1: n: expected at least 1"),
    "stderr and std": (("scores", "top1", "std"), 1.0, "scores.top1: stderr, std: expected one of them, found 2"),
    "std without ddof": (("scores", "speed", "std"), 1.0, "scores.speed: ddof"),
    "ddof without std": (("scores", "speed", "ddof"), 1, "scores.speed: ddof"),
    "ddof is true": (("scores", "top5", "ddof"), True, "ddof: expected one of 0, 1"),
    "negative stderr": (("scores", "top1", "stderr"), -1.0, "stderr: expected at least 0"),
    "score is no object": (("scores", "top1"), 58.0, "scores.top1: expected an object"),
    "unknown in score": (("scores", "top1", "stdev"), 1.0, "unknown field 'stdev'; did you mean 'std'"),
    "main metric": (("main_metric",), "top3", "main_metric: expected one of ['speed', 'top1', 'top5'], found 'top3'"),
    "status": (("status",), "failed", "status: expected one of \"done\", found 'failed'"),
    "selected_on": (("selected_on",), "luck", "selected_on: expected one of"),
    "schema too old": (("schema_version",), 0, "schema_version: expected 1"),
    "schema is text": (("schema_version",), "1", "schema_version: expected a whole number"),
    "sha too short": (("weights_sha256",), "abc", "weights_sha256: expected 64 hexadecimal digits"),
    "manifest sha": (("dataset_manifest_sha256", "val"), "x", "dataset_manifest_sha256.val: expected 64"),
    "no manifest": (("dataset_manifest_sha256",), {}, "dataset_manifest_sha256: expected a sha256"),
    "protocol": (("protocol",), "knn/dino", "protocol: expected a bare file name"),
    "recipe": (("recipe",), "../x", "recipe: expected a bare name"),
    "version": (("version",), 0, "version: expected 1 or more"),
    "no model": (("model",), " ", "model: expected a name"),
    "limited without limit": (("limited",), True, "limited: expected true with a limit only"),
    "limit not marked": (("limit",), 5, "limited: expected true with a limit only"),
    "seed is null": (("seed",), None, "seed: expected a whole number, found None"),
    "local time": (("started",), "2026-01-31T12:00:00", "started: expected an ISO 8601 time in UTC"),
    "other zone": (("started",), "2026-01-31T12:00:00+02:00", "started: expected an ISO 8601 time in UTC"),
    "no time": (("started",), "yesterday", "started: expected an ISO 8601 time in UTC"),
    "counted twice": (("n_samples", "evaluated", "val"), 11, "n_samples: evaluated.val: expected 0 to 10"),
    "unknown split": (("n_samples", "evaluated", "test"), 1, "n_samples: evaluated.test"),
    "warning is number": (("warnings",), [1], "warnings[0]: expected a string"),
    "warnings no list": (("warnings",), "x", "warnings: expected a list"),
    "features source": (("features", 0, "source"), "guess", "features[0]: source: expected one of"),
    "seconds": (("seconds", "score"), None, "seconds.score: expected a finite number"),
    "overrides no object": (("overrides",), [], "overrides: expected an object"),
    "key given but null": (("checkpoint_key_given",), 1, "checkpoint_key_given: expected true or false"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named_with_its_file(tmp_path, case):
    place, value, message = WRONG[case]
    document = document_of(tmp_path)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError) as error:
        read_record(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_every_field_is_required_and_no_other_allowed(tmp_path):
    document = document_of(tmp_path)
    path = tmp_path / "wrong.json"
    for name in document:
        path.write_text(json.dumps({key: value for key, value in document.items() if key != name}))
        with pytest.raises(UserError, match=f"wrong.json: the field '{name}' is missing"):
            read_record(path)
    path.write_text(json.dumps(document | {"modle": "x"}))
    with pytest.raises(UserError, match=r"wrong.json: unknown field 'modle'; did you mean 'model'"):
        read_record(path)
    path.write_text(json.dumps(document))
    read_record(path)  # and as it is, it is right


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ["58.25", "0.07"], ids=["score", "recipe"])
def test_infinite_numbers_are_refused(tmp_path, number, place):
    text = write_record(make_record(), tmp_path).read_text()
    assert place in text
    path = tmp_path / "wrong.json"
    path.write_text(text.replace(place, number))
    with pytest.raises(UserError, match=r"wrong.json: .*(not a number|finite)"):
        read_record(path)


@pytest.mark.parametrize(
    "change",
    [
        {"scores": {"top1": Score(value=float("nan"), n=1)}},
        {"resolved_recipe": {"clip": float("inf")}},
        {"resolved_recipe": {"clip": object()}},
        {"seed": "0"},
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, change):
    with pytest.raises(UserError):
        write_record(make_record(**change), tmp_path)
    assert list(tmp_path.rglob("*.json")) == []


def test_a_newer_schema_says_so_before_anything_else(tmp_path):
    path = tmp_path / "new.json"
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1, "strange": 1}))
    with pytest.raises(UserError, match=r"new.json: schema_version: written by a newer ssl-bench \(schema 2; .*Update"):
        read_record(path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1} x', b"[" * 100_000])
def test_a_file_that_is_no_record(tmp_path, text):
    path = tmp_path / "wrong.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"wrong.json: "):
        read_record(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"gone.json: cannot be read \(No such file"):
        read_record(tmp_path / "gone.json")


def test_a_key_that_was_given_has_a_name():
    with pytest.raises(UserError, match="checkpoint_key: expected a name"):
        make_record(checkpoint_key=None, checkpoint_key_given=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"value": 58.25', f'"value": {"9" * 400}', "scores.top1: value: expected a finite number"),
        ('"value": 58.25', f'"value": {"9" * 5000}', "not a JSON document"),
        ("0.07", "9" * 5000, "not a JSON document"),
        ('"seed": 0', '"seed": 0, "seed": 0', "'seed' stands twice"),
        ('"x": null', '"x": 1, "y": 2, "x": null', "'x' stands twice"),
        ('"schema_version": 1', '"schema_version": 0', "schema_version: expected 1, found 0, which no ssl-bench ever"),
        ('"schema_version": 1,', '"modle": 1,', "the field 'schema_version' is missing"),
    ],
)
def test_what_would_be_read_wrong_is_refused(tmp_path, old, new, message):
    text = write_record(make_record(details={"x": None}), tmp_path).read_text()
    assert text.count(old) == 1
    path = tmp_path / "wrong.json"
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_record(path)
    assert str(error.value).startswith(f"{path}: ")


# Read quickly: nothing that a careful look refuses, and nothing else than it finds -----------------------------------

POOL = [None, True, False, 0, 1, 2, -1, 3.0, 0.5, -0.0, 2**64, 10**30, 10**400, "", " ", "x", "a:b", "\\u003a", [], {}]
POOL += [["x"], [1], {"x": 1}, {"x": "y"}, {"value": 1.0, "n": 1}, "done", "fp32", "c" * 64, "2026-01-31T12:00:00Z"]


def slowly(content: bytes) -> Record | str:
    try:
        return record_module._read_carefully(content, "x")
    except UserError as error:
        return str(error)


def same(content: bytes) -> bool:
    """Whether `content` was read quickly; if it was, then to what a careful look finds, to the type of each number."""
    quick, slow = read_quickly(Record, content), slowly(content)
    assert quick is None or (quick == slow and repr(quick) == repr(slow)), content.decode(errors="replace")
    return quick is not None


def places_in(value: object, place: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for key, item in items for inner in places_in(item, (*place, key)))]


def changed(document: dict, place: tuple, change) -> dict:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    return copy


def full_document() -> dict:
    """Every field holds something."""
    record = make_record(
        limit=7, seed=3, overrides={"neighbors": [5]}, subset={"list": "1percent"}, arch_overrides={"heads": "6"}
    )
    document = plain(record)
    document["scores"]["acc"] = {"value": 1, "n": 9, "interval95": 0.5}
    document["n_samples"]["evaluated"]["val"] = 7
    return document


def written(document: dict) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode()


def test_a_valid_record_is_read_quickly(tmp_path):
    assert same(written(full_document()))
    assert same(json.dumps(full_document(), separators=(",", ":")).encode())
    path = write_record(make_record(warnings=['C:\\x: new\nline "quoted": ü 模型']), tmp_path)
    assert same(path.read_bytes())


def test_every_value_changed_to_every_other_kind():
    document = full_document()
    read = {True: 0, False: 0}
    for place in places_in(document)[1:]:
        for value in POOL:
            read[same(written(changed(document, place, lambda at, key, new=value: at.__setitem__(key, new))))] += 1
    assert read[True] > 500  # free-form values, counts, names
    assert read[False] > 1500


def test_every_key_missing_added_renamed_or_twice():
    document = full_document()
    text = written(document).decode()
    for place in places_in(document)[1:]:
        same(written(changed(document, place, lambda at, key: at.pop(key))))
        if isinstance(place[-1], str):
            assert slowly(written(changed(document, place, lambda at, key: at.__setitem__(key + "_", at.pop(key)))))
            same(written(changed(document, place, lambda at, key: at.__setitem__("unknown", 1))))
    for found in re.finditer(r'^ *("[^"]*": )(.*?),?$', text, re.MULTILINE):
        key, value = found.groups()
        for other in ("0", "null", '"a:b"', {"[": "[]", "{": "{}"}.get(value, value)):
            twice = text[: found.start()] + key + other + "," + text[found.start() :]
            assert not same(twice.encode())
            assert "stands twice" in slowly(twice.encode())
            for colon in (r"\u003a", r"\u003A"):  # one colon more when it is read, to make up for one key less
                assert not same(twice.replace('"k-NN is near chance"', f'"{colon}"').encode())


def test_damaged_bytes():
    content = written(full_document())
    for end in range(0, len(content), 7):
        assert not same(content[:end])
    for more in (b" ", b"\n", b"\r\n", b"\xef\xbb\xbf", b"x", b"{}", b"\x00", b"// x"):
        same(content + more)
        same(more + content)
    random = np.random.default_rng(0)
    for place, byte in zip(random.integers(0, len(content), 4000), random.integers(0, 256, 4000), strict=True):
        same(content[:place] + bytes([byte]) + content[place + 1 :])
        same(content[:place] + content[place + 1 :])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400", "01", "1.", ".5", "+1", "0x1"])
def test_what_is_no_number(number):
    text = written(full_document()).decode()
    for old in ("58.25", "0.07", '"seed": 3'):
        assert text.count(old) == 1
        content = text.replace(old, '"seed": ' + number if "seed" in old else number).encode()
        assert not same(content)
        assert isinstance(slowly(content), str)


def test_numbers_are_the_same_to_the_last_bit():
    random = np.random.default_rng(0)
    floats = random.integers(0, 2**64, 3000, dtype=np.uint64).view(np.float64)
    texts = [repr(float(number)) for number in floats if np.isfinite(number)]
    texts += [str(int(digits) * 10 ** int(power)) for digits, power in random.integers(0, (2**62, 60), (500, 2))]
    texts += ["0." + "".join(map(str, random.integers(0, 10, 40))) for _ in range(500)]
    texts += ["5e-324", "2.4703282292062327e-324", "1.7976931348623157e308", "9007199254740993", "-0", "-0.0", "1E5"]
    content = written(full_document() | {"details": {"x": 0}})
    for text in texts:
        assert same(content.replace(b"58.25", text.encode()).replace(b'"x": 0', b'"x": ' + text.encode())), text


@pytest.mark.parametrize("depth", [10, 100, 400, 900, 1100, 100_000])
def test_deep_nesting_does_not_crash(tmp_path, depth):
    text = written(full_document() | {"details": {"x": 0}}).decode()
    deep = text.replace('"x": 0', '"x": ' + "[" * depth + "]" * depth)
    slow = slowly(deep.encode())
    assert isinstance(slow, Record) if depth < 500 else isinstance(slow, Record | str)
    overrides = text.replace('"neighbors": [', '"neighbors": [' + "[" * depth + "]" * depth + ",")
    path = tmp_path / "m" / "w" / "d" / "knn-dino@v1.json"
    path.parent.mkdir(parents=True)
    path.write_text(overrides)
    assert load_results(tmp_path).problems[path].startswith(f"{path}: ")


def test_plain_is_what_deviates_in_nothing():
    choices = {
        "overrides": [{}, {"neighbors": 5}],
        "limit": [None, 1],
        "seed": [0, 1],
        "dtype": ["fp32", "bf16"],
        "checkpoint_key_given": [False, True],
        "arch_overrides": [{}, {"heads": "6"}],
        "skip_broken": [False, True],
        "subset": [{}, {"train_list": "1percent.txt 0a1b2c3d"}],
    }
    for values in itertools.product(*choices.values()):
        record = make_record(**dict(zip(choices, values, strict=True)))
        assert record.is_plain == (record.deviations == Deviations())
        assert Path("r", ordinary_place(record)) == record_path(record.run, Path("r"))


# Imports ------------------------------------------------------------------------------------------------------------


def imported_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `statement`."""
    script = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


def test_looking_up_a_record_imports_nothing_heavy(tmp_path):
    write_record(make_record(), tmp_path)
    modules = imported_by(
        "from pathlib import Path\nfrom ssl_bench.leaderboards import record\n"
        f"r = record.read_record(next(Path({str(tmp_path)!r}).rglob('*.json')))\n"
        f"assert record.find_record(r.run, Path({str(tmp_path)!r})) == r"
    )
    assert "ssl_bench" in modules
    assert not modules & {"torch", "pandas", "pyarrow", "numpy", "rich"}
