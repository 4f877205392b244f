"""The gate: what fails and what does not, the numbers behind it, the file in git, and what CI systems read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas
import pytest
from scipy.stats import ttest_ind_from_stats
from test_record import make_record
from test_run import in_process

from ssl_bench.errors import UserError
from ssl_bench.leaderboards import baseline as baselines
from ssl_bench.leaderboards.baseline import Baseline, read_baseline, write_baseline
from ssl_bench.leaderboards.gate import check, corrected, updated
from ssl_bench.leaderboards.record import Deviations, OpenedCheckpoint, Score, samples_path, write_record
from ssl_bench.leaderboards.store import load_results

N = 203  # no multiple of 8
ALL = np.arange(N)
BEFORE = ALL < 100
OTHER_WEIGHTS = "cd" * 32


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SSL_BENCH_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, "check", *arguments)


def counted(root: Path, right: np.ndarray, *, ids: list[str] | None = None, **changes: object) -> Path:
    """A record whose samples were counted; `right` says which were."""
    score = Score(value=100 * float(right.mean()), n=len(right), stderr=3.0)
    samples = {
        "sample_id": ids or [f"{place:04d}" for place in range(len(right))],
        "label": np.ones(len(right), int),
        "prediction": right.astype(int),
        "correct": right,
    }
    record = make_record(scores={"top1": score}, **changes)
    return write_record(record, root, samples=samples)


def scored(root: Path, value: float, *, metric: str = "miou", **changes: object) -> Path:
    """A record of one number; its uncertainty among `changes`: stderr, std, n, ..."""
    spread = {name: changes.pop(name) for name in ("n", "stderr", "std", "ddof", "interval95") if name in changes}
    score = Score(value=value, **({"n": 10} | spread))
    return write_record(make_record(scores={metric: score}, main_metric=metric, **changes), root)


def baseline_of(root: Path, **changes: object) -> Baseline:
    """Of all records under `root`, with fields of the entries changed."""
    made, _ = updated(Baseline(1, [], []), load_results(root))
    return dataclasses.replace(made, entries=[dataclasses.replace(entry, **changes) for entry in made.entries])


def only(baseline: Baseline, root: Path):
    (verdict,) = check(baseline, load_results(root)).verdicts
    return verdict


def coin(lost: int, won: int) -> float:
    """The chance that a fair coin, thrown lost + won times, falls to this side so often."""
    thrown = lost + won
    return sum(math.comb(thrown, heads) for heads in range(lost, thrown + 1)) / 2**thrown


# Significant, and larger than the tolerance. ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "won", "tolerance", "state"),
    [
        (0, 0, 0.0, "passed"),
        (30, 5, 1.0, "dropped"),
        (30, 5, 12.4, "passed"),  # 25 of 203 samples are 12.3 %
        (30, 5, 12.3, "dropped"),
        (30, 25, 1.0, "within noise"),
        (5, 30, 1.0, "improved"),
        (5, 30, 12.4, "passed"),
        (25, 30, 1.0, "within noise"),
        (5, 0, 1.0, "dropped"),  # 1 / 32
        (4, 0, 1.0, "within noise"),  # 1 / 16
        (14, 6, 1.0, "within noise"),  # .0577
    ],
)
def test_counted_samples_are_compared_one_by_one(root, lost, won, tolerance, state):
    counted(root, BEFORE)
    baseline = baseline_of(root, tolerance=tolerance)
    now = BEFORE.copy()
    now[:lost], now[100 : 100 + won] = False, True
    counted(root, now)
    verdict = only(baseline, root)
    assert (verdict.state, verdict.test) == (state, "McNemar")
    assert verdict.change == pytest.approx(100 * (won - lost) / N)
    if lost != won:
        assert verdict.p == pytest.approx(coin(max(lost, won), min(lost, won)))
    assert f"{lost} samples that were right are wrong now, {won} the other way" in verdict.why
    assert verdict.fails == (state == "dropped")


def test_pairing_sees_what_standard_errors_do_not(root):
    path = counted(root, BEFORE)
    baseline = baseline_of(root, tolerance=1.0)
    now = BEFORE.copy()
    now[:10] = False  # 4.9 points, of a standard error of 3
    counted(root, now)
    assert only(baseline, root).state == "dropped"
    without = dataclasses.replace(baseline, entries=[dataclasses.replace(baseline.entries[0], samples=None)])
    samples_path(path).unlink()
    verdict = only(without, root)
    assert (verdict.state, verdict.test) == ("within noise", "Welch")


def test_the_order_of_samples_is_their_ids_and_other_samples_are_not_paired(root):
    ids = [f"{place:04d}" for place in range(N)]
    counted(root, BEFORE, ids=ids)
    baseline = baseline_of(root, tolerance=0.0)
    counted(root, BEFORE[::-1], ids=ids[::-1])  # the same outcomes, listed from the end
    verdict = only(baseline, root)
    assert (verdict.test, verdict.state, verdict.p) == ("McNemar", "passed", 0.5)
    assert verdict.why.startswith("0 samples")
    for now, names in ((BEFORE, [f"x{name}" for name in ids]), (BEFORE[:-1], ids[:-1])):
        counted(root, now, ids=names)
        verdict = only(baseline, root)
        assert (verdict.state, verdict.value) == ("incomparable", None)
        assert "of other samples than the baseline counts" in verdict.why


def _halved(frame):
    return frame.iloc[: N // 2]


def _doubled(frame):
    return pandas.concat([frame, frame])


def _gaps(frame):
    return frame.assign(correct=[None, *frame["correct"][1:]])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (None, "is missing"),
        (b"PAR1", "cannot be read"),
        (_halved, "the accuracy of what was kept is not the record's top1"),
        (_doubled, "each with an id of its own"),
        (_gaps, "without gaps"),
    ],
)
def test_a_paired_test_never_becomes_a_weaker_one(root, damage, told):
    """Ten samples fewer are within the noise of standard errors; see above."""
    path = counted(root, BEFORE)
    counted(root, BEFORE, model="whole")
    baseline = baseline_of(root, tolerance=1.0)
    kept = samples_path(path)
    if damage is None:
        kept.unlink()
    elif isinstance(damage, bytes):
        kept.write_bytes(damage)
    else:
        damage(pandas.read_parquet(kept)).to_parquet(kept)
    verdicts = {verdict.entry.model: verdict for verdict in check(baseline, load_results(root)).verdicts}
    assert (verdicts["moca-b"].state, verdicts["moca-b"].fails, verdicts["whole"].state) == (
        "incomparable",
        True,
        "passed",
    )
    assert told in verdicts["moca-b"].why
    assert str(kept) in verdicts["moca-b"].why
    new, changes = updated(baseline, load_results(root))
    assert new.entries == baseline.entries
    assert [change.kind for change in changes] == ["kept"]


def test_samples_of_another_metric_are_not_taken_for_it(root):
    path = counted(root, BEFORE)
    record = json.loads(path.read_text())
    record["scores"]["other"] = record["scores"]["top1"]  # by chance the same number
    path.write_text(json.dumps(record))
    (loaded,) = load_results(root)
    assert baselines.entry_of(loaded, path, "top1").samples is not None
    assert baselines.entry_of(loaded, path, "other").samples is None
    record["scores"]["top1"]["value"] = 40.0  # not the accuracy of these samples
    path.write_text(json.dumps(record))
    assert baseline_of(root).entries[0].samples is None


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize(
    ("uncertainty", "errors"),
    [
        ({"stderr": 0.5, "n": 40}, (0.5, 0.5)),
        ({"std": 0.9, "ddof": 1, "n": 3}, (0.9 / math.sqrt(3), 0.9 / math.sqrt(3))),
        ({"std": 0.9, "ddof": 0, "n": 3}, (0.9 / math.sqrt(2), 0.9 / math.sqrt(2))),
        ({"interval95": 0.98, "n": 600}, (0.5, 0.5)),
    ],
)
def test_without_samples_the_standard_error_decides(root, uncertainty, errors, lower):
    scored(root, 50.0, lower_is_better=lower, **uncertainty)
    baseline = baseline_of(root, tolerance=0.1)
    for change in (-4.0, -0.3, 0.3, 4.0):
        scored(root, 50.0 + change, lower_is_better=lower, **uncertainty)
        verdict = only(baseline, root)
        better = -change if lower else change
        n = uncertainty["n"]
        spread = [error * math.sqrt(n) for error in errors]
        side = "less" if change < 0 else "greater"
        expected = ttest_ind_from_stats(50.0 + change, spread[0], n, 50.0, spread[1], n, False, side).pvalue
        assert verdict.p == pytest.approx(float(expected), rel=1e-6)
        significant = "dropped" if better < 0 else "improved"
        assert verdict.state == (significant if verdict.p < 0.05 else "within noise")
        assert verdict.change == pytest.approx(better)
        assert (verdict.state == "within noise") == (abs(change) < 1)


@pytest.mark.parametrize(("now", "state"), [(9.0, "passed"), (8.9, "dropped"), (11.1, "improved"), (10.5, "passed")])
def test_without_an_uncertainty_the_tolerance_alone_decides(root, now, state):
    scored(root, 10.0, metric="ap", n=10)
    baseline = baseline_of(root, tolerance=1.0)
    scored(root, now, metric="ap", n=10)
    verdict = only(baseline, root)
    assert (verdict.state, verdict.p, verdict.test) == (state, None, "none")
    assert "tolerance alone" in verdict.why


def test_holm_against_its_definition():
    values = [0.01, None, 0.04, 0.03, 0.005, None, 1.0]
    found = corrected(values)
    for alpha in np.linspace(0.001, 0.999, 500):
        rejected = set()
        left = {place for place, p in enumerate(values) if p is not None}
        while left and values[smallest := min(left, key=lambda place: values[place])] <= alpha / len(left):
            rejected.add(smallest)
            left.remove(smallest)
        assert rejected == {place for place, p in enumerate(found) if p is not None and p <= alpha}
    assert found[1] is found[5] is None
    assert corrected([]) == []


def test_a_long_baseline_does_not_cry_wolf(root):
    lost = BEFORE.copy()
    lost[:6] = False  # p = 1 / 64: enough alone, not among ten
    names = [f"m{place}" for place in range(10)]
    for name in names:
        counted(root, BEFORE, model=name)
    baseline = baseline_of(root, tolerance=1.0)
    counted(root, lost, model="m3")
    report = check(baseline, load_results(root))
    assert [verdict.state for verdict in report.verdicts] == ["passed"] * 3 + ["within noise"] + ["passed"] * 6
    assert report.verdicts[3].p == pytest.approx(10 / 64)
    assert not report.failed
    # An improvement is no candidate for a drop, and takes the last place of the correction.
    counted(root, ALL < 140, model="m4")
    two = dataclasses.replace(baseline, entries=baseline.entries[3:5])
    drop, rise = check(two, load_results(root)).verdicts
    assert (drop.p, rise.state) == (pytest.approx(2 / 64), "improved")
    alone = dataclasses.replace(baseline, entries=[baseline.entries[3]])
    assert only(alone, root).state == "dropped"


# What fits an entry. ------------------------------------------------------------------------------------------------


def test_a_missing_record_fails_and_its_command_is_told(root):
    changes = {
        "overrides": {"neighbors": 5, "temperatures": [0.07, 0.1]},
        "dtype": "bf16",
        "seed": 3,
        "skip_broken": True,
        "subset": {"class_list": "some classes.txt 1234abcd"},
    }
    counted(root, BEFORE, model="my model", **changes)
    baseline = baseline_of(root)
    counted(root, BEFORE, model="another")
    path = next(path for path in root.rglob("my-model/**/*.json"))
    path.unlink()
    verdict = only(baseline, root)
    assert (verdict.state, verdict.fails) == ("missing", True)
    command = verdict.why.partition("run: ")[2]
    assert shlex.split(command) == [
        *("ssl-bench", "run", "--ckpt", "CHECKPOINT", "--name", "my model", "--protocol", "knn/dino"),
        *("--dataset", "toy", "--set", "neighbors=5", "--set", "temperatures=0.07,0.1", "--seed", "3"),
        *("--dtype", "bf16", "--class-list", "FILE", "--skip-broken"),
    ]


def test_a_checkpoint_that_means_the_same_everywhere_is_named(root):
    random = OpenedCheckpoint(spec="random:vit_tiny", format="random", matched_percent=None, notes=[])
    counted(root, BEFORE, checkpoint=random)
    assert "--ckpt random:vit_tiny --name moca-b" in baseline_of(root).entries[0].command


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 2}, "version: 1 in the baseline, 2 now"),
        ({"recipe": "moca-paper"}, "recipe: dino in the baseline, moca-paper now"),
        ({"dataset_manifest_sha256": {"train": "c" * 64, "val": "e" * 64}}, "the images of val are others (manifest)"),
        ({"overrides": {"neighbors": 5}}, 'overrides: none in the baseline, {"neighbors": 5} now'),
        ({"seed": 1}, "seed: none in the baseline, 1 now"),
        ({"resolved_recipe": {"neighbors": 7}}, "of this name and version holds other values"),
        ({"lower_is_better": True}, "lower_is_better: false in the baseline, true now"),
        (
            {"scores": {"top5": Score(90.0, 10)}, "main_metric": "top5"},
            "metric: top1 in the baseline, now there are only",
        ),
    ],
)
def test_what_was_measured_otherwise_is_incomparable(root, changes, told):
    path = scored(root, 50.0, metric="top1")
    baseline = baseline_of(root)
    path.unlink()
    if "scores" in changes:
        write_record(make_record(**changes), root)
    else:
        scored(root, 50.0, metric="top1", **changes)
    verdict = only(baseline, root)
    assert (verdict.state, verdict.fails, verdict.value) == ("incomparable", True, None)
    assert told in verdict.why
    assert "--update" in verdict.why
    new, (change, *_) = updated(baseline, load_results(root))
    if changes.keys() <= {"version", "dataset_manifest_sha256", "resolved_recipe"}:
        assert (change.kind, change.before) == ("replaced", 50.0)
        assert only(new, root).state == "passed"
        assert new.entries[0].tolerance == baseline.entries[0].tolerance
    else:  # another measurement, which must not take the old one's place
        assert (change.kind, change.before) == ("kept", 50.0)
        assert new == baseline


def test_the_nearest_record_is_told_and_one_that_may_replace_the_entry_is_nearest(root):
    path = counted(root, BEFORE)
    baseline = baseline_of(root)
    path.unlink()
    near = counted(root, BEFORE, recipe="extrema", started="2026-04-01T00:00:00+00:00")
    counted(root, BEFORE, recipe="moca-paper", seed=2, started="2026-03-01T00:00:00+00:00")
    counted(root, BEFORE, recipe="mmc-patch", seed=2, started="2026-05-01T00:00:00+00:00")
    assert only(baseline, root).path == near
    assert len(check(baseline, load_results(root)).new) == 3  # all of them can be added
    newer = counted(root, BEFORE, version=2, dataset_manifest_sha256={"val": "e" * 64})
    assert only(baseline, root).path == newer
    assert only(baseline, root).replaceable
    assert len(check(baseline, load_results(root)).new) == 3  # the newer one takes the entry's place


def test_an_entry_that_does_not_know_its_recipes_values_learns_them(root):
    counted(root, BEFORE)
    baseline = baseline_of(root, recipe_sha256=None)
    counted(root, BEFORE, resolved_recipe={"neighbors": 7})
    assert only(baseline, root).state == "passed"
    new, (change,) = updated(baseline, load_results(root))
    assert (change.kind, change.before) == ("changed", change.now)
    counted(root, BEFORE, resolved_recipe={"neighbors": 7, "published": "x", "source": "y"})
    assert only(new, root).state == "passed"
    counted(root, BEFORE, resolved_recipe={"neighbors": 8})
    assert only(new, root).state == "incomparable"


def test_settings_are_compared_as_deviations_alone(root):
    counted(root, BEFORE, overrides={"lists": "a"}, resolved_recipe={"lists": ["a"], "k": 1})
    baseline = baseline_of(root)
    counted(root, BEFORE, overrides={"lists": "a"}, resolved_recipe={"lists": "a", "k": 1})
    assert only(baseline, root).state == "passed"


def test_errors_are_no_accuracy(root):
    counted(root, BEFORE, lower_is_better=True)
    (entry,) = baseline_of(root).entries
    assert (entry.samples, entry.lower_is_better) == (None, True)


def test_a_record_of_another_entry_is_not_compared(root):
    counted(root, BEFORE, recipe="dino")
    gone = counted(root, BEFORE, recipe="ibot")
    baseline = baseline_of(root)
    gone.unlink()
    states = {verdict.entry.recipe: verdict.state for verdict in check(baseline, load_results(root)).verdicts}
    assert states == {"dino": "passed", "ibot": "missing"}


def test_the_newest_of_two_weights_is_taken_and_said(root):
    counted(root, BEFORE, started="2026-03-01T12:00:00+00:00")
    baseline = baseline_of(root, tolerance=0.0)
    assert "the weights are those of the baseline" in only(baseline, root).why
    counted(root, ALL < 0, weights_sha256=OTHER_WEIGHTS, started="2026-02-28T23:00:00+00:00")
    verdict = only(baseline, root)
    assert (verdict.state, verdict.record.weights_sha256) == ("passed", "ab" * 32)
    counted(root, BEFORE, started="2026-03-01T12:00:00.500000Z")
    counted(root, ALL < 0, weights_sha256=OTHER_WEIGHTS, started="2026-03-01T12:00:00Z")  # "Z" is behind "."
    assert only(baseline, root).state == "passed"
    counted(root, BEFORE, started="2026-03-01T12:00:00+00:00")
    counted(root, ALL < 0, weights_sha256=OTHER_WEIGHTS, started="2026-02-28T23:00:00+00:00")
    counted(root, ALL < 50, weights_sha256="0" * 64, started="2026-03-01T12:00:01+00:00")
    verdict = only(baseline, root)
    assert (verdict.state, verdict.record.weights_sha256) == ("dropped", "0" * 64)
    assert "3 records fit; the newest was taken, of weights 000000000000" in verdict.why
    assert "those of the baseline" not in verdict.why


def test_new_and_limited_records_fail_nothing(root, call, tmp_path):
    counted(root, BEFORE)
    write_baseline(baseline_of(root), tmp_path / "b.json")
    counted(root, ALL < 0, limit=5)
    for place in range(12):
        counted(root, BEFORE, model=f"n{place:02d}")
    code, out, _ = call("--baseline", tmp_path / "b.json")
    assert code == 0
    assert "new, without an entry (--update --add NAME adds it): n09/toy/knn/dino" in out
    assert "n10" not in out
    assert "and 2 more" in out
    assert "left out: 1 runs with --limit" in out
    assert out.endswith("passed: 1 passed\n")


# The file, and --update. --------------------------------------------------------------------------------------------


def test_update_shows_what_changes_and_keeps_what_was_edited(root, call, tmp_path):
    path = tmp_path / "deep" / "b.json"
    counted(root, BEFORE)
    gone = counted(root, BEFORE, model="gone")
    v1 = counted(root, BEFORE, protocol="linear")
    code, out, err = call("--baseline", path, "--update")
    assert code == 0
    assert "added    moca-b · toy · knn/dino@v1 · top1: 49.26 (tolerance 0.99: a guess" in out
    assert "written" in err
    document = json.loads(path.read_text())
    assert [entry["tolerance"] for entry in document["entries"]] == [0.99] * 3
    for entry in document["entries"]:
        entry["tolerance"] = 7.5
    document["about"] = ["why 7.5"]
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    before = path.read_bytes()
    code, out, err = call("--baseline", path, "--update")
    assert (code, out, path.read_bytes()) == (0, "", before)
    assert "stays as it is" in err

    gone.unlink()
    v1.unlink()
    counted(root, ALL < 60, weights_sha256=OTHER_WEIGHTS, started="2026-06-01T00:00:00+00:00", code_version="2.0")
    counted(root, ALL < 90, protocol="linear", version=2)
    counted(root, ALL < 0, model="quick", limit=3)
    for place in range(12):
        counted(root, BEFORE, model=f"unrelated{place:02d}")
    code, out, err = call("--baseline", path, "--update")
    assert code == 0
    assert "changed  moca-b · toy · knn/dino@v1 · top1: 49.26 -> 29.56 (dropped, tolerance 7.5)" in out
    assert "replaced moca-b · toy · linear/dino@v2 · top1: 49.26 -> 44.33 (version: 1 in the baseline, 2 now)" in out
    assert "kept     gone · toy · knn/dino@v1 · top1: 49.26 (no such record; run: ssl-bench run" in out
    assert "left out unrelated09/toy/knn/dino: 49.26 (it has no entry; --add takes it in)" in out
    assert "unrelated10" not in out
    assert "left out 2 more records" in out
    assert "left out: 1 runs with --limit" in err
    new = read_baseline(path)
    assert new.about == ["why 7.5"]
    entries = {(entry.model, entry.protocol): entry for entry in new.entries}
    assert list(entries) == [("gone", "knn"), ("moca-b", "knn"), ("moca-b", "linear")]  # in order of their names
    assert {entry.tolerance for entry in new.entries} == {7.5}
    changed = entries["moca-b", "knn"]
    assert (changed.score.value, changed.code_version, changed.weights) == (pytest.approx(6000 / N), "2.0", "cd" * 6)
    assert changed.made == "2026-06-01T00:00:00+00:00"
    assert baselines.unpacked(changed.samples) == list(ALL < 60)
    gone_again = counted(root, BEFORE, model="gone")
    assert gone_again == gone
    assert call("--baseline", path)[0] == 0


def test_two_entries_never_become_one(root):
    for version in (1, 2):
        counted(root, BEFORE, version=version)
    baseline = baseline_of(root)
    for path in list(root.glob("*/*/*/*.json")):
        path.unlink()
    counted(root, BEFORE, version=3)
    new, changes = updated(baseline, load_results(root))
    assert [change.kind for change in changes] == ["replaced", "kept"]
    assert {entry.version for entry in new.entries} == {2, 3}


def test_records_are_added_by_name(root, call, tmp_path):
    path = tmp_path / "b.json"
    counted(root, BEFORE)
    call("--baseline", path, "--update")
    for recipe in ("ibot", "extrema"):
        counted(root, BEFORE, recipe=recipe)
    counted(root, BEFORE, model="other")
    code, _, err = call("--baseline", path, "--update", "--add", "moca-b/toy/knn/ibott")
    assert code == 2
    assert "did you mean 'moca-b/toy/knn/ibot'" in err
    code, out, _ = call("--baseline", path, "--update", "--add", "moca-b/toy/knn/ibot", "--json")
    kinds = [(change["kind"], change["name"]) for change in json.loads(out)["changes"]]
    assert kinds == [
        ("left out", "moca-b/toy/knn/extrema"),
        ("added", "moca-b · toy · knn/ibot@v1 · top1"),
        ("left out", "other/toy/knn/dino"),
    ]
    assert call("--baseline", path, "--update", "--add", "moca-b/*")[0] == 0
    assert [(e.model, e.recipe) for e in read_baseline(path).entries] == [
        ("moca-b", "dino"),
        ("moca-b", "extrema"),
        ("moca-b", "ibot"),
    ]
    assert "with --update" in call("--baseline", path, "--add", "x")[2]


def test_where_a_checkpoint_comes_from_stays_as_somebody_wrote_it(root):
    counted(root, BEFORE)
    baseline = baseline_of(root, ckpt="hf:someone/moca")
    counted(root, ALL < 60)
    (entry,) = updated(baseline, load_results(root))[0].entries
    assert (entry.ckpt, entry.score.value) == ("hf:someone/moca", pytest.approx(6000 / N))


def test_a_number_of_zero_has_a_tolerance_too(root):
    scored(root, 0.0)
    assert baseline_of(root).entries[0].tolerance == 0.02


def test_an_interrupted_update_leaves_the_old_file(root, tmp_path, monkeypatch):
    counted(root, BEFORE)
    path = tmp_path / "b.json"
    write_baseline(baseline_of(root), path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_baseline(baseline_of(root, tolerance=9.0), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".part"] == []


def test_a_baseline_comes_back_as_it_was_written(root, tmp_path):
    counted(root, BEFORE, overrides={"neighbors": 5})
    scored(root, 0.25, metric="overlap", lower_is_better=True, model="z")
    baseline = baseline_of(root)
    write_baseline(baseline, tmp_path / "b.json")
    assert read_baseline(tmp_path / "b.json") == baseline
    assert baselines.unpacked(baseline.entries[0].samples) == list(BEFORE)
    assert (tmp_path / "b.json").read_text().count("\n") > 40  # a line a field: diffs are read by people


def test_a_metric_that_was_added_by_hand_is_gated_and_updated(root):
    write_record(make_record(), root)
    baseline = baseline_of(root)
    speed = dataclasses.replace(baseline.entries[0], metric="speed", score=Score(2.0, 1), lower_is_better=True)
    baseline = dataclasses.replace(baseline, entries=[*baseline.entries, dataclasses.replace(speed, tolerance=0.5)])
    states = {verdict.entry.metric: verdict.state for verdict in check(baseline, load_results(root)).verdicts}
    assert states == {"top1": "passed", "speed": "dropped"}
    new, _ = updated(baseline, load_results(root))
    again = {entry.metric: entry for entry in new.entries}["speed"]
    assert (again.score.value, again.lower_is_better, again.tolerance) == (3.0, True, 0.5)


# Bad input. ---------------------------------------------------------------------------------------------------------


def test_no_baseline_no_records(root, call, tmp_path):
    code, _, err = call("--baseline", tmp_path / "none.json")
    assert code == 2
    assert "there is no such file. `--update` makes it" in err
    scored(root, 1.0)
    write_baseline(baseline_of(root), tmp_path / "b.json")
    (file,) = root.rglob("*.json")
    file.write_text(file.read_text()[:200])
    code, _, err = call("--baseline", tmp_path / "b.json", "--update")
    assert code == 2
    assert "there are no records" in err
    assert "1 files could not be read" in err
    file.unlink()
    code, out, err = call("--baseline", tmp_path / "b.json", "--junit", tmp_path / "j.xml")
    assert (code, out.splitlines()[-1]) == (1, "failed: 1 missing")
    assert f"{root}: there are no records" in err
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "1"
    scored(root, 1.0, limit=2)
    assert call("--baseline", tmp_path / "b.json")[0] == 1
    code, _, err = call("--baseline", tmp_path / "b.json", "--update")
    assert code == 2
    assert "all 1 records come from runs with --limit" in err


def test_a_torn_record_is_named_and_its_entry_is_missing(root, call, tmp_path):
    torn = counted(root, BEFORE)
    counted(root, BEFORE, model="whole")
    write_baseline(baseline_of(root), tmp_path / "b.json")
    torn.write_text(torn.read_text()[:200])
    code, out, err = call("--baseline", tmp_path / "b.json")
    assert code == 1
    assert f"left out: {torn}" in err
    assert "missing: moca-b" in out
    assert "passed: " not in out.splitlines()[-1]
    assert out.splitlines()[-1] == "failed: 1 missing, 1 passed"


def test_torn_samples_enter_no_baseline(root):
    path = counted(root, BEFORE)
    samples_path(path).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"samples.parquet: cannot be read .* --overwrite always"):
        baseline_of(root)


def _without(name):
    return lambda document: document["entries"][0].pop(name)


def _with(**changes):
    return lambda document: document["entries"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda document: document.update(schema_version=2), "schema_version: expected 1, found 2"),
        (lambda document: document.pop("schema_version"), "schema_version: expected 1, found None"),
        (lambda document: document.pop("entries"), "expected a baseline of `ssl-bench check`"),
        (lambda document: document["entries"].clear(), "would let everything pass"),
        (lambda document: document["entries"].append(document["entries"][0]), "two of moca-b"),
        (_without("score"), r"entries\[0\]: the field 'score' is missing"),
        (_with(tolerence=1.0), "did you mean 'tolerance'"),
        (_with(tolerance=-1.0), "tolerance: expected 0 or more"),
        (_with(tolerance="1"), "tolerance: expected a finite number"),
        (_with(deviations={"limit": 5}), "a run with --limit is no baseline"),
        (_with(deviations={"manifest": 5}), "unknown field of deviations 'manifest'"),
        (_with(deviations={"version": 1}), "unknown field of deviations 'version'"),
        (_with(deviations={"seed": True}), "deviations: seed: expected int, found True"),
        (_with(deviations={"overrides": 5}), "deviations: overrides: expected dict, found 5"),
        (_with(deviations={"seed": 0}), "only what deviates from the plain run, found seed=0"),
        (lambda document: document["entries"][0]["samples"].update(correct="é"), "not base64"),
        (_with(score={"value": 60.0, "n": N}), "49.2611 % are right, but score.value is 60"),
        (lambda document: document["entries"][0]["samples"].update(correct="AAAA"), "a bit for each of n=203"),
        (lambda document: document["entries"][0]["samples"].update(correct="!"), "not base64"),
    ],
)
def test_a_baseline_that_was_edited_wrongly_is_refused(root, tmp_path, change, told):
    counted(root, BEFORE)
    path = tmp_path / "b.json"
    write_baseline(baseline_of(root), path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=told) as refused:
        read_baseline(path)
    assert str(path) in str(refused.value)


def test_every_deviation_of_a_run_may_stand_in_an_entry():
    assert list(baselines._DEVIATIONS) == [field.name for field in dataclasses.fields(Deviations)]


def test_names_and_numbers_at_the_ends_of_what_json_holds(root, call, tmp_path):
    path = tmp_path / "b.json"
    scored(root, 1e308, stderr=1e200)
    scored(root, 5.0, model="two\nlines")
    call("--baseline", path, "--update")
    document = json.loads(path.read_text())
    document["entries"].append(document["entries"][0] | {"model": "half \ud800"})
    path.write_text(json.dumps(document))
    code, out, _ = call("--baseline", path, "--markdown", tmp_path / "m.md")
    assert code == 1
    assert all(len(line) < 500 for line in out.splitlines())
    assert "lines · toy" not in [line[: len("lines · toy")] for line in out.splitlines()]
    assert "half \\ud800" in (tmp_path / "m.md").read_text()
    before = read_baseline(path)
    write_baseline(before, path)
    assert {entry.model for entry in read_baseline(path).entries} == {"half \ud800", "moca-b", "two\nlines"}


def test_files_that_are_no_baselines(tmp_path, root):
    path = tmp_path / "b.json"
    counted(root, BEFORE)
    write_baseline(baseline_of(root), path)
    for content in (path.read_bytes()[:300], b"", b"\xff\xfe", b"[1]", b"NaN"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"b\.json"):
            read_baseline(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_baseline(tmp_path)


# What machines and people read. -------------------------------------------------------------------------------------


@pytest.fixture
def failing(root, tmp_path) -> Path:
    """A baseline with an entry in every state, and names that markup could trip over."""
    for model in ("a|b <&> \"'\x01 `c`", "dropped", "missing", "improved", "noise"):
        counted(root, BEFORE, model=model)
    counted(root, BEFORE, model="incomparable")
    write_baseline(baseline_of(root, tolerance=1.0), tmp_path / "b.json")
    for path in [*root.glob("missing/**/*.json"), *root.glob("incomparable/**/*.json")]:
        path.unlink()
    counted(root, ALL < 60, model="dropped")
    counted(root, ALL < 140, model="improved")
    counted(root, ALL < 97, model="noise")
    counted(root, BEFORE, model="incomparable", version=2)
    return tmp_path / "b.json"


def test_junit_is_what_parsers_expect(failing, call, tmp_path):
    code, _, _ = call("--baseline", failing, "--junit", tmp_path / "out" / "junit.xml")
    assert code == 1
    suites = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    (suite,) = suites
    assert (suites.tag, suite.tag) == ("testsuites", "testsuite")
    for element in (suites, suite):
        assert {name: element.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
            "tests": "6",
            "failures": "3",
            "errors": "0",
            "skipped": "0",
        }
    cases = suite.findall("testcase")
    assert len(cases) == 6
    failures = {case.get("name").split(" ")[0]: case.find("failure") for case in cases}
    types = {name: failure.get("type") for name, failure in failures.items() if failure is not None}
    assert types == {"dropped": "dropped", "missing": "missing", "incomparable": "incomparable"}
    dropped = failures["dropped"]
    assert dropped.get("message").startswith("dropped: 49.26 -> 29.56 (tolerance 1). 40 samples that were right")
    assert "ssl-bench run --ckpt CHECKPOINT --name dropped" in dropped.text
    assert all(float(case.get("time")) >= 0 and case.get("classname") == "toy" for case in cases)
    assert any(case.get("name").startswith("a|b <&> \"'� `c` · toy") for case in cases)


def test_markdown_is_one_table_and_what_failed(failing, call, tmp_path):
    assert call("--baseline", failing, "--markdown", tmp_path / "summary.md")[0] == 1
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[0] == (
        "## ssl-bench check failed: 1 dropped, 1 incomparable, 1 missing, 1 passed, 1 improved, 1 within noise"
    )
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 8
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}
    assert "| dropped | 49.26 | 29.56 | -19.70 | 1.00 | " in rows[2]
    assert any(line.startswith("missing: missing · toy") and "ssl-bench run" in line for line in lines)


def test_json_is_one_document_and_the_terminal_names_what_failed(failing, call):
    code, out, _ = call("--baseline", failing, "--json")
    document = json.loads(out)
    assert (code, document["failed"], document["new"]) == (1, 3, [])
    by_state = {row["state"]: row for row in document["check"]}
    assert by_state.keys() == {"dropped", "missing", "incomparable", "passed", "improved", "within noise"}
    assert (by_state["dropped"]["value"], by_state["missing"]["value"]) == (pytest.approx(6000 / N), None)
    code, out, _ = call("--baseline", failing)
    assert code == 1
    for state in ("dropped", "missing", "incomparable"):
        assert f"\n{state}: {state} · toy · knn/dino@v1 · top1: " in out


def test_reports_are_written_into_what_is_there(failing, call, tmp_path):
    summary, junit, real = (tmp_path / name for name in ("summary.md", "junit.xml", "real.xml"))
    summary.write_text("what the step said before\n")
    junit.symlink_to(real)
    for runs in (1, 2):
        assert call("--baseline", failing, "--markdown", summary, "--junit", junit)[0] == 1
        text = summary.read_text()
        assert text.startswith("what the step said before\n## ssl-bench")
        assert text.count("## ssl-bench check failed") == runs
        assert junit.is_symlink()
        assert ElementTree.parse(real).getroot().tag == "testsuites"
    pipe = tmp_path / "pipe"  # like a device: no regular file
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert call("--baseline", failing, "--junit", pipe)[0] == 1
    assert os.read(reader, 5) == b"<?xml"
    os.close(reader)
    assert pipe.is_fifo()


def test_reports_never_overwrite_the_baseline_or_one_another(failing, call, tmp_path):
    before = failing.read_bytes()
    link = tmp_path / "link.json"
    link.symlink_to(failing)
    for arguments in (["--junit", failing], ["--markdown", link], ["--junit", "x", "--markdown", "x"]):
        code, _, err = call("--baseline", failing, *arguments)
        assert code == 2
        assert "expected a file for each" in err
    assert failing.read_bytes() == before
    assert call("--baseline", link, "--update")[0] == 0
    assert link.is_symlink()
    assert failing.read_bytes() != before


@pytest.mark.parametrize(
    "place", [".", "", "/proc/none/x.xml", "b.json/x.xml", "loop/x.xml", "~nobody-of-this-name/x.xml"]
)
def test_a_report_that_cannot_be_written_is_no_failed_check(failing, call, place, monkeypatch):
    monkeypatch.chdir(failing.parent)
    Path("loop").symlink_to("loop")
    for option in ("--junit", "--markdown"):
        code, _, err = call("--baseline", failing, option, place)
        assert code == 2
        assert "cannot write" in err or "no user" in err


def test_what_cannot_be_written_is_not_said_to_be_updated(root, call):
    counted(root, BEFORE)
    code, out, err = call("--baseline", "/proc/none/b.json", "--update")
    assert (code, out) == (2, "")
    assert "cannot write /proc/none/b.json" in err


def test_reports_are_of_checks(call, tmp_path):
    code, _, err = call("--baseline", tmp_path / "b.json", "--update", "--junit", tmp_path / "x.xml")
    assert code == 2
    assert "without --update" in err
