"""What a report meets on a disk: places it must not write to, and files that are not what their names say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from report_world import PNG, Page, scored, training_runs, world

from ssl_bench.errors import UserError
from ssl_bench.leaderboards.record import files_path, write_record
from ssl_bench.leaderboards.report.build import MANIFEST, build
from ssl_bench.leaderboards.store import Results, load_results


@pytest.fixture
def results(tmp_path: Path) -> Results:
    write_record(scored(50.0, model="m"), tmp_path / "results")
    return load_results(tmp_path / "results")


# Places -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [".", "..", "{}"])
def test_the_current_folder_is_refused(results, tmp_path, monkeypatch, out):
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match="found the current one, or one above it"):
        build(results, Path(out.format(here)))
    assert {path.name for path in tmp_path.iterdir()} == {"above", "results"}
    assert list(here.iterdir()) == []


def test_a_link_stays_and_what_it_leads_to_holds_the_report(results, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        assert build(results, tmp_path / "link") == tmp_path / "link" / "index.html"
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "index.html").is_file()
        assert {path.name for path in tmp_path.iterdir()} == {"link", "real", "results"}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"--out|cannot write"):
        build(results, tmp_path / "loop")


@pytest.mark.parametrize("out", ["/proc/foo/site", "{}/results/m/x/y.json/site", "{}/" + "x" * 300])
def test_where_nothing_can_be_made_the_system_is_quoted(results, tmp_path, out):
    (tmp_path / "results" / "m" / "x").mkdir(parents=True)
    (tmp_path / "results" / "m" / "x" / "y.json").write_text("")
    with pytest.raises(UserError, match=r"--out|cannot write"):
        build(Results(tmp_path / "none", results.records, results.paths), Path(out.format(tmp_path)))


@pytest.mark.parametrize("out", ["results", "results/site", "linked/site"])
def test_the_results_hold_no_report(results, tmp_path, out):
    (tmp_path / "linked").symlink_to("results")
    with pytest.raises(UserError, match="expected a folder outside the results"):
        build(results, tmp_path / out)
    assert not (tmp_path / "results" / "site").exists()


def test_a_list_of_files_that_is_no_text_names_nothing(results, tmp_path):
    site = build(results, tmp_path / "site").parent
    (site / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="which no report wrote"):
        build(results, site)


def test_a_link_among_the_files_is_nobodys(results, tmp_path):
    site = build(results, tmp_path / "site").parent
    (tmp_path / "mine").mkdir()
    (site / "photos").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="photos, which no report wrote"):
        build(results, site)


def test_the_older_report_comes_back_if_the_new_one_cannot_take_its_place(results, tmp_path, monkeypatch):
    site = build(results, tmp_path / "site").parent
    (site / "index.html").write_text("older")
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(UserError, match="Input/output error"):
        build(results, site)
    assert (site / "index.html").read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == {"site", "results"}


def test_the_older_report_is_whole_until_the_new_one_is_there(results, tmp_path, monkeypatch):
    site = build(results, tmp_path / "site").parent
    removed = []
    rmtree = shutil.rmtree

    def watching(path: Path, **options: object) -> None:
        removed.append((site / "index.html").is_file())
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watching)
    build(results, site)
    assert removed == [True]


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "points"),
    [
        ('{"step": 5, "epoch": 3, "loss": ' + "7" * 400 + ', "rec": 1, "lr": 1}', 4),
        ('{"step": ' + "7" * 400 + ', "epoch": 3, "loss": 2, "rec": 1, "lr": 1}', 5),
        ("[" * 100_000, 4),
        ('{"epoch": 3, "loss": 1e308, "rec": 1, "lr": 1}\n{"epoch": 3, "loss": -1e308, "rec": 1, "lr": 1}', 6),
        ('{"epoch": NaN, "loss": Infinity, "rec": 1, "lr": 1}', 4),
    ],
)
def test_lines_of_logs_that_are_no_numbers(results, tmp_path, line, points):
    log = training_runs(tmp_path / "runs") / "c" / "log.jsonl"
    log.write_text(f"{log.read_text()}{line}\n")
    site = build(results, tmp_path / "site", [log.parent]).parent
    text = (site / "curves.html").read_text("utf-8").partition("Loss: rec")[2].partition("</figure>")[0]
    assert text.count('<th scope="row">') == points
    assert "nan" not in text
    assert "inf" not in text


def test_what_is_called_a_picture_and_is_none(tmp_path):
    results = world(tmp_path / "results")
    path = next(path for path in results.paths if "zeroshot" in path.name)
    overlays = files_path(path) / "overlays"
    (overlays / "zz.png").mkdir()
    (overlays / "00.png").symlink_to("nothing.png")
    os.mkfifo(overlays / "01.png")
    site = build(results, tmp_path / "site").parent
    assert len(list(site.glob("pictures/**/*.png"))) == 8
    assert all(each.read_bytes() == PNG for each in site.glob("pictures/**/*.png"))
    assert "2 more pictures" in Page(site / "pictures.html").text


@pytest.mark.parametrize(
    "details",
    [
        {"bin_edges": []},
        {"bin_edges": [0.0]},
        {"bin_edges": [1.0, -1.0]},
        {"bin_edges": ["a", "b"]},
        {"bin_edges": [-1e308, 1e308]},
        {"bin_edges": None},
        {"counts": {"intra": ["1", "2"], "inter": [1, 2]}},
        {"counts": {"intra": [-1, 2], "inter": [1, 2]}},
        {"counts": {"intra": [0, 0], "inter": [1, 2]}},
        {"counts": {"intra": [], "inter": []}},
        {"counts": [1, 2]},
    ],
)
def test_counts_that_are_no_histogram_are_left_out(tmp_path, details):
    whole = {"counts": {"intra": [1, 2], "inter": [2, 1]}, "bin_edges": [-1.0, 1.0]}
    record = scored(0.5, protocol="similarity", details={**whole, **details})
    write_record(record, tmp_path / "results")
    site = build(load_results(tmp_path / "results"), tmp_path / "site").parent
    page = Page(site / "pictures.html")
    assert "1 record of similarity without a histogram that can be drawn" in page.text
    assert "density" not in page.text
