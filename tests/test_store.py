"""Everything under a results folder is either a record or a named problem."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pandas
import pytest
from test_record import OTHER_SAMPLES, SAMPLES, imported_by, make_record

from ssl_bench.errors import UserError
from ssl_bench.leaderboards.record import Score, record_path, samples_path, write_record
from ssl_bench.leaderboards.store import load_results, load_samples


def test_all_records_are_found_in_the_order_of_their_paths(tmp_path):
    records = [
        make_record(model="b"),
        make_record(model="a"),
        make_record(model="a", seed=1),
        make_record(model="a", dataset_manifest_sha256={"val": "0" * 64}),  # at its other place
    ]
    paths = {write_record(record, tmp_path): record for record in records}
    results = load_results(tmp_path)
    assert results.problems == {}
    assert list(results.paths) == sorted(paths)
    assert list(results) == list(results.records) == [paths[path] for path in results.paths]
    assert len(results) == len(records)
    assert load_results(str(tmp_path)) == results


def test_the_default_root_is_the_environments(tmp_path, monkeypatch):
    write_record(make_record(), tmp_path)
    monkeypatch.setenv("SSL_BENCH_RESULTS", str(tmp_path))
    assert len(load_results()) == 1
    monkeypatch.setenv("SSL_BENCH_RESULTS", str(tmp_path / "none"))
    assert len(load_results()) == 0


def test_what_is_no_record_file_is_ignored(tmp_path):
    path = write_record(make_record(), tmp_path, samples=SAMPLES)
    path.with_name(f".{path.name}.x1y2.part").write_text("{")
    path.with_name("notes.json").write_text("{")
    (tmp_path / "knn-dino@v1.json").write_text("{")
    results = load_results(tmp_path)
    assert (len(results), results.problems) == (1, {})


def test_a_broken_file_is_named_and_hides_no_other(tmp_path):
    good = write_record(make_record(), tmp_path)
    torn = good.with_name("knn-moca@v1.json")
    torn.write_text(good.read_text()[:100])
    newer = good.with_name("knn-dino@v2.json")
    newer.write_text(json.dumps(json.loads(good.read_text()) | {"schema_version": 2}))
    unreadable = good.with_name("knn-dino@v3.json")
    unreadable.mkdir()
    results = load_results(tmp_path)
    assert list(results.paths) == [good]
    assert set(results.problems) == {torn, newer, unreadable}
    assert "not a JSON document" in results.problems[torn]
    assert "newer ssl-bench" in results.problems[newer]
    assert all(message.startswith(str(path)) for path, message in results.problems.items())


def test_a_copied_record_is_not_counted_twice(tmp_path):
    path = write_record(make_record(), tmp_path)
    renamed = tmp_path / "other-model" / path.parent.parent.name / "toy" / path.name
    shutil.copytree(tmp_path / "moca-b", tmp_path / "other-model")
    results = load_results(tmp_path)
    assert list(results.paths) == [path]
    assert str(path) in results.problems[renamed]


def test_a_renamed_record_does_not_pass_under_its_new_name(tmp_path):
    write_record(make_record(overrides={"neighbors": 5}), tmp_path)
    deviating = write_record(make_record(overrides={"neighbors": 10}), tmp_path)
    plain = deviating.rename(record_path(make_record().run, tmp_path))
    results = load_results(tmp_path)
    assert [record.overrides for record in results] == [{"neighbors": 5}]
    assert f"which belongs at {deviating}" in results.problems[plain]


def test_the_same_run_at_both_its_places_is_counted_once(tmp_path):
    write_record(make_record(), tmp_path)
    other = make_record(dataset_manifest_sha256={"val": "0" * 64})
    path = write_record(other, tmp_path)
    shutil.copy(path, record_path(other.run, tmp_path))  # as when two folders are merged
    results = load_results(tmp_path)
    assert len(results) == 1
    assert "the same run as" in next(iter(results.problems.values()))


def test_take(tmp_path):
    for model in "abc":
        write_record(make_record(model=model), tmp_path)
    (tmp_path / "a" / ("ab" * 6) / "toy" / "knn-x@v1.json").write_text("{")
    results = load_results(tmp_path)
    taken = results.take([2, 0])
    assert [record.model for record in taken] == ["c", "a"]
    assert taken.paths == (results.paths[2], results.paths[0])
    assert taken.problems == results.problems != {}


def test_filter(tmp_path):
    for protocol, dataset, model in [("knn", "toy", "a"), ("knn", "digits", "a"), ("linear", "toy", "b")]:
        write_record(make_record(protocol=protocol, dataset=dataset, model=model), tmp_path)
    (record_path(make_record(model="a").run, tmp_path)).with_name("x-y@v1.json").write_text("")
    results = load_results(tmp_path)
    assert {r.dataset for r in results.filter(protocol="knn")} == {"toy", "digits"}
    assert {r.protocol for r in results.filter(dataset="toy")} == {"knn", "linear"}
    only = results.filter(protocol="linear", dataset="toy", model="b")
    assert [r.model for r in only] == ["b"]
    assert [path.name for path in only.paths] == ["linear-dino@v1.json"]
    assert len(results.filter(protocol="linear", model="a")) == 0
    assert len(results.filter()) == len(results)
    assert only.problems == results.problems != {}


def test_dataframe_has_one_row_a_metric_with_its_origin(tmp_path):
    scores = {"top1": Score(value=58.25, n=10, stderr=1.5), "top5": Score(value=90, n=3, std=0.5, ddof=1)}
    path = write_record(make_record(scores=scores, overrides={"neighbors": 5}, limit=10, seed=2), tmp_path)
    write_record(make_record(model="z", checkpoint_key=None), tmp_path)
    frame = load_results(tmp_path).to_dataframe()
    assert list(frame.columns) == [
        *("model", "weights", "arch", "checkpoint_key", "dataset", "protocol", "recipe", "version", "metric", "value"),
        *("stderr", "std", "interval95", "n", "is_main", "limited", "selected_on", "overrides", "seed", "dtype"),
        *("device", "code_version", "started", "path"),
    ]
    assert list(frame["model"]) == ["moca-b"] * 2 + ["z"] * 3
    top1, top5 = frame.iloc[0], frame.iloc[1]
    assert top1[frame.columns.difference(["std", "interval95", "started"])].to_dict() == {
        "model": "moca-b",
        "weights": "ab" * 6,
        "arch": "vit_base_patch16_224",
        "checkpoint_key": "teacher",
        "dataset": "toy",
        "protocol": "knn",
        "recipe": "dino",
        "version": 1,
        "metric": "top1",
        "value": 58.25,
        "stderr": 1.5,
        "n": 10,
        "is_main": True,
        "limited": True,
        "selected_on": "none",
        "overrides": "neighbors=5",
        "seed": 2,
        "dtype": "fp32",
        "device": "cpu",
        "code_version": "0.1.0+abc",
        "path": str(path),
    }
    assert pandas.isna(top1["std"])
    assert (top5["metric"], top5["value"], top5["std"], top5["is_main"]) == ("top5", 90.0, 0.5, False)
    assert pandas.isna(top5["stderr"])
    assert top1["started"] == pandas.Timestamp("2026-01-31 12:00", tz="UTC")
    assert frame["value"].dtype == frame["std"].dtype == "float64"


def test_an_empty_dataframe_has_the_same_columns_and_kinds(tmp_path):
    empty = load_results(tmp_path).to_dataframe()
    write_record(make_record(), tmp_path)
    full = load_results(tmp_path).to_dataframe()
    assert list(empty.columns) == list(full.columns)
    assert (len(empty), empty["value"].dtype, empty["started"].dtype.kind) == (0, full["value"].dtype, "M")


def test_dataframe_is_what_going_row_by_row_gives(tmp_path):
    for number in range(6):
        scores = {f"m{index}": Score(value=index / 3, n=index + 1, stderr=0.5) for index in range(number % 4 + 1)}
        changes = {"scores": scores, "main_metric": f"m{number % 4}", "seed": number, "limit": number or None}
        write_record(make_record(**changes, checkpoint_key=None if number % 2 else "teacher"), tmp_path)
    results = load_results(tmp_path)
    rows = [
        {name: getattr(record, name, None) for name in results.to_dataframe().columns}
        | {name: getattr(score, name) for name in ("value", "stderr", "std", "interval95", "n")}
        | {"weights": record.weights_sha256[:12], "path": str(path), "overrides": ""}
        | {"metric": metric, "is_main": metric == record.main_metric}
        for record, path in zip(results.records, results.paths, strict=True)
        for metric, score in record.scores.items()
    ]
    expected = pandas.DataFrame(rows).astype({"stderr": float, "std": float, "interval95": float})
    expected["started"] = pandas.to_datetime(expected["started"], utc=True)
    pandas.testing.assert_frame_equal(results.to_dataframe(), expected)


def test_reading_quickly_changes_nothing(tmp_path, monkeypatch):
    """Every kind of file, once as it is and once with each file parsed at length."""
    for number in range(30):
        change = [{}, {"overrides": {"k": number}}, {"dataset_manifest_sha256": {"val": f"{number:064d}"}}][number % 3]
        write_record(make_record(model=f"m{number % 7}", seed=number % 2, limit=number % 5 or None, **change), tmp_path)
    paths = load_results(tmp_path).paths
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    paths[1].write_bytes(b"\xff" + paths[1].read_bytes())
    paths[2].write_text(paths[2].read_text().replace('"schema_version": 1', '"schema_version": 2'))
    paths[3].write_text(paths[3].read_text().replace('"seed": ', '"seed": 0, "seed": '))
    paths[4].write_text(paths[4].read_text().replace('"status": "done"', '"status": "done", "more": 1'))
    paths[5].write_text(paths[5].read_text().replace('"arch": "', '"arch": "\\u003a'))  # valid
    shutil.copy(paths[6], paths[6].with_name("linear-dino@v1.json"))
    (paths[7].parent.parent.parent / "file.json").write_text("{}")
    quick = load_results(tmp_path)
    assert (len(quick), len(quick.problems)) == (len(paths) - 5, 6)
    monkeypatch.setattr("ssl_bench.leaderboards.record.read_quickly", lambda *_: None)
    slow = load_results(tmp_path)
    assert quick == slow
    assert repr(quick) == repr(slow)
    assert list(quick.problems) == list(slow.problems)
    assert list(quick.paths) == sorted(quick.paths)


def test_valid_files_are_read_quickly(tmp_path, monkeypatch):
    write_record(make_record(limit=3, overrides={"neighbors": 5}), tmp_path)
    monkeypatch.delattr("ssl_bench.leaderboards.record._read_carefully")
    assert len(load_results(tmp_path)) == 1


def test_a_record_of_many_kilobytes(tmp_path):
    details = {"curve": [number / 7 for number in range(30_000)]}
    record = make_record(details=details)
    assert write_record(record, tmp_path).stat().st_size > 5 * 2**16
    assert list(load_results(tmp_path)) == [record]


def test_a_folder_that_cannot_be_read_is_named_and_hides_no_other(tmp_path):
    write_record(make_record(), tmp_path)
    loop = tmp_path / "m" / "w" / "loop"
    loop.parent.mkdir(parents=True)
    loop.symlink_to("loop")
    results = load_results(tmp_path)
    assert len(results) == 1
    assert results.problems[loop].startswith(f"{loop}: cannot be read (Too many")
    assert load_results(tmp_path / "m" / "w" / "gone").problems == {}


def test_a_relative_root_gives_relative_paths(tmp_path, monkeypatch):
    path = write_record(make_record(), tmp_path)
    torn = path.with_name("knn-moca@v1.json")
    torn.write_text("{")
    monkeypatch.chdir(tmp_path)
    for root in (".", "./", Path()):
        results = load_results(root)
        assert [str(each) for each in results.paths] == [str(path.relative_to(tmp_path))]
        assert list(results.problems) == [torn.relative_to(tmp_path)]
        message = results.problems[torn.relative_to(tmp_path)]
        assert message.startswith(f"{torn.relative_to(tmp_path)}: not a JSON document")


def test_the_garbage_collector_is_left_as_it_was(tmp_path):
    write_record(make_record(), tmp_path)
    assert gc.isenabled()
    load_results(tmp_path)
    assert gc.isenabled()
    gc.disable()
    try:
        load_results(tmp_path)
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(TypeError):
        load_results(5)  # type: ignore[arg-type]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0  # nothing is kept from being collected for good


def test_samples_of_a_record_and_of_a_path(tmp_path):
    record, other = make_record(), make_record(dataset_manifest_sha256={"val": "0" * 64})
    path = write_record(record, tmp_path, samples=SAMPLES)
    write_record(other, tmp_path, samples=OTHER_SAMPLES)
    assert load_samples(path).to_dict("list") == SAMPLES
    assert load_samples(str(path)).to_dict("list") == SAMPLES
    assert load_samples(record, tmp_path).to_dict("list") == SAMPLES
    assert load_samples(other, tmp_path).to_dict("list") == OTHER_SAMPLES
    assert load_samples(path)["correct"].dtype == bool


DAMAGES = {
    "garbage": b"PAR1 no parquet PAR1",
    "empty": b"",
    "truncated": None,
    "no rows": lambda frame: frame.iloc[:0],
    "an id twice": lambda frame: pandas.concat([frame, frame.iloc[:1]]),
    "no id": lambda frame: frame.assign(sample_id=["a", None]),
    "ids that are numbers": lambda frame: frame.assign(sample_id=[1, 2]),
    "a column less": lambda frame: frame.drop(columns="label"),
    "a column more": lambda frame: frame.assign(other=1),
    "NaN": lambda frame: frame.assign(correct=[1.0, float("nan")]),
    "null": lambda frame: frame.assign(correct=[True, None]),
    "a label less": lambda frame: frame.assign(label=[1, None]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_samples_are_refused(tmp_path, damage):
    path = write_record(make_record(), tmp_path, samples=SAMPLES)
    change, kept = DAMAGES[damage], samples_path(path)
    if callable(change):
        change(load_samples(path)).to_parquet(kept)
    else:
        kept.write_bytes(kept.read_bytes()[:-20] if change is None else change)
    with pytest.raises(UserError, match="--overwrite always") as raised:
        load_samples(path)
    assert str(raised.value).startswith(f"{kept}: ")


def test_samples_that_are_missing(tmp_path):
    record = make_record()
    with pytest.raises(UserError, match="no record of moca-b on knn-dino, toy"):
        load_samples(record, tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_samples(tmp_path / "gone.json")
    path = write_record(record, tmp_path)
    with pytest.raises(UserError, match=r"has no per-sample outcomes \(knn-dino@v1.samples.parquet is missing\)"):
        load_samples(path)
    assert not samples_path(path).exists()


def test_results_need_no_pandas_until_asked(tmp_path):
    write_record(make_record(), tmp_path)
    load = f"from ssl_bench.leaderboards.store import load_results\nr = load_results({str(tmp_path)!r})\nassert len(r)"
    assert not imported_by(load) & {"torch", "pandas", "pyarrow"}


def test_no_file_of_leaderboards_imports_torch_or_the_other_folders():
    folder = Path(__file__).parent.parent / "leaderboards"
    names = sorted(path.stem for path in folder.glob("*.py"))
    assert "store" in names
    script = "\n".join(f"import ssl_bench.leaderboards.{name}" for name in names)
    script += "\nfor n in ('evaluate', 'pretrain', 'protocols'): assert f'ssl_bench.{n}' not in sys.modules, n"
    assert not imported_by(script) & {"torch", "torchvision", "timm"}
