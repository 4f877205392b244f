"""The commands around `run`: filters, formats, what people and programs are shown, and the words of refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_backbone
from test_run import SMALL, in_process

from ssl_bench import files, listing, progress
from ssl_bench.errors import UserError, unknown
from ssl_bench.evaluate import cache
from ssl_bench.evaluate.saving import save_checkpoint


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.fixture
def scored(tmp_path: Path, image_folder, call, own_cache: Path) -> str:
    """The name of a dataset with one record, by knn."""
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    dataset = image_folder(name="okapis")
    assert call("run", "--ckpt", tmp_path / "tiny.pt", "--protocol", "knn", "--dataset", dataset, *SMALL)[0] == 0
    return "okapis"


@pytest.mark.parametrize(
    ("variable", "folder", "default"),
    [
        ("SSL_BENCH_DATA", files.data_folder, Path("data")),
        ("SSL_BENCH_RESULTS", files.results_folder, Path("results")),
        ("SSL_BENCH_CACHE", files.cache_folder, Path("~/.cache/ssl-bench").expanduser()),
    ],
)
def test_a_variable_set_to_nothing_means_the_default(variable, folder, default, monkeypatch):
    monkeypatch.setenv(variable, "")
    assert folder() == default
    monkeypatch.setenv(variable, "~/elsewhere")
    assert folder() == Path("~/elsewhere").expanduser()
    monkeypatch.setenv(variable, "~no such user/x")
    with pytest.raises(UserError, match="~no such user/x: there is no user of that name"):
        folder()
    monkeypatch.delenv(variable)
    assert folder() == default


def test_require_writable_leaves_an_empty_folder_or_says_why_not(tmp_path):
    files.require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.require_writable(tmp_path / "file" / "results")


def test_doctor_names_the_variable_of_a_folder_that_cannot_be_written(tmp_path, monkeypatch, call):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSL_BENCH_RESULTS", str(tmp_path / "file" / "results"))
    code, out, _ = call("doctor", "--json")
    assert code == 1
    (finding,) = [each for each in json.loads(out)["doctor"] if each["what"] == "SSL_BENCH_RESULTS"]
    assert finding["state"] == "wrong"
    assert "set SSL_BENCH_RESULTS" in finding["to_do"]


def test_twelve_names_are_listed_and_the_others_counted():
    names = [f"name-{number:03d}" for number in range(400)]
    message = str(unknown("name", "nmae-399", names))
    assert "did you mean 'name-399'" in message  # the nearest, though it is not among the first twelve
    assert message.endswith("name-010, name-011 and 388 more")
    assert str(unknown("name", "x", names[:12])).endswith("name-011")


# Leaderboard


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dataset", "okapi"], ["unknown dataset 'okapi'", "did you mean 'okapis'"]),
        (["--protocol", "knm"], ["unknown protocol 'knm'", "did you mean 'knn'"]),
        (["--dataset", "okapis", "--protocol", "linear"], ["unknown protocol on okapis 'linear'", "Known: knn"]),
        (["--json", "--format", "xyz"], ["unknown format 'xyz'", "latex"]),
    ],
)
def test_a_leaderboard_of_what_is_not_there(arguments, expected, scored, call):
    code, out, errors = call("leaderboard", *arguments)
    assert (code, out) == (2, "")
    for part in expected:
        assert part in errors


def test_a_leaderboard_of_what_is_there(scored, call):
    code, out, _ = call("leaderboard", "--dataset", scored, "--protocol", "knn", "--json")
    assert code == 0
    assert [row["model"] for row in json.loads(out)["leaderboard"]] == ["tiny"]


def test_without_any_record_a_filter_is_not_to_blame(call):
    code, _, errors = call("leaderboard", "--dataset", "toy")
    assert code == 2
    assert "no records under" in errors


# Data


def test_the_size_of_toy_pictures_is_refused_by_its_option(tmp_path, call):
    code, _, errors = call("data", "toy", "--out", tmp_path / "deep" / "toy", "--size", "15")
    assert code == 2
    assert "--size 15: expected at least 16" in errors
    assert not (tmp_path / "deep").exists()


def test_data_check_reports_progress(image_folder, call, monkeypatch):
    advanced: list[Any] = []
    monkeypatch.setattr(progress, "bar", recording(advanced))
    assert call("data", "check", image_folder())[0] == 0
    assert advanced[0] == ("checking", 20)
    assert sum(advanced[1:]) == 20


def recording(advanced: list[Any]) -> Any:
    """A bar that writes down its total, and then each step."""
    import contextlib

    @contextlib.contextmanager
    def bar(description, total):
        advanced.append((description, total))
        yield advanced.append

    return bar


def test_follow_turns_totals_into_steps_and_opens_no_bar_for_nothing(monkeypatch):
    advanced: list[Any] = []
    monkeypatch.setattr(progress, "bar", recording(advanced))
    with progress.follow("drawing"):
        pass
    assert advanced == []
    with progress.follow("drawing") as report:
        for done in (3, 3, 10):
            report(done, 10)
    assert advanced == [("drawing", 10), 3, 0, 7]


# Cache


def test_the_cache_for_people_fits_a_terminal_and_for_programs_is_whole(scored, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    rows = json.loads(call("cache", "ls", "--json")[1])["cache"]
    assert {row["split"] for row in rows} == {"train", "val"}
    assert set(rows[0]) == set(cache.CacheEntry.__dataclass_fields__)
    out = call("cache", "ls")[1]
    assert max(map(len, out.splitlines())) <= 100
    for row in rows:
        assert row["key"][:12] in out
        assert row["key"] not in out
    assert "tiny" in out


def test_a_row_of_the_cache():
    entry = cache.CacheEntry("0123456789abcdef", "m", "val", "cls", "fp32", 1000, 3 * 2**19, 0.26, False)
    assert listing.cache_row(entry) == {
        "key": "0123456789ab",
        "model": "m",
        "split": "val",
        "reading": "cls",
        "images": "1,000 (part)",
        "MiB": "1.5",
        "unused days": "0.3",
    }


def test_verify_and_gc_as_json(scored, own_cache, call):
    assert call("cache", "verify", "--json")[:2] == (0, '{\n  "damaged": []\n}\n')
    shard = max(own_cache.glob("features/*/shard-*"), key=lambda path: path.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, _ = call("cache", "verify", "--json")
    assert code == 1
    assert json.loads(out) == {"damaged": [{"key": shard.parent.name, "shard": 0}]}
    code, out, _ = call("cache", "gc", "--all", "--json")
    found = json.loads(out)
    assert (code, found["removed"]) == (0, 2)
    assert found["freed_bytes"] > 0
    assert json.loads(call("cache", "gc", "--json")[1]) == {"removed": 0, "freed_bytes": 0}


def test_gc_hands_on_the_days_that_were_given(call, monkeypatch):
    given = {}

    def collect(**options):
        given.update(options)
        raise UserError("--unused-days -1: expected 0 or more.")

    monkeypatch.setattr(cache, "collect_garbage", collect)
    code, _, errors = call("cache", "gc", "--unused-days", "-1")
    assert given == {"unused_days": -1.0, "everything": False}
    assert (code, "--unused-days -1" in errors) == (2, True)
