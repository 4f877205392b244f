"""The report says what the records say, links every number to its origin, and is one folder that needs nothing else."""

from __future__ import annotations

import csv
import html
import json
import re
import urllib.parse
from pathlib import Path

import pytest
from report_world import NASTY, NONE, Page, pages, scored, training_runs, world
from typer.testing import CliRunner

from ssl_bench.cli import app
from ssl_bench.errors import UserError
from ssl_bench.leaderboards.published import PAPERS
from ssl_bench.leaderboards.record import record_path, write_record
from ssl_bench.leaderboards.report import boards, paper_pages, provenance
from ssl_bench.leaderboards.report.build import MANIFEST, build
from ssl_bench.leaderboards.store import Results, load_results
from ssl_bench.leaderboards.table import leaderboard


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return world(tmp_path_factory.mktemp("world") / "results")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def site(results: Results, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only looked at: tests that write build their own."""
    return build(results, tmp_path_factory.mktemp("report") / "site", [runs]).parent


# The folder ---------------------------------------------------------------------------------------------------------


def test_every_page_is_well_formed_and_every_link_leads_somewhere_inside(site):
    found = pages(site)
    assert {"index.html", "papers.html", "curves.html", "pictures.html", "records.html"} <= set(found)
    assert {f"paper-{paper}.html" for paper in PAPERS} <= set(found)
    checked = 0
    for name, page in found.items():
        assert len(set(page.ids)) == len(page.ids), f"{name}: an id twice"
        for address in page.addresses:
            if address == "data:,":  # no icon
                continue
            parts = urllib.parse.urlsplit(address)
            assert (parts.scheme, parts.netloc) == ("", ""), f"{name}: {address}"
            assert not parts.path.startswith("/"), f"{name}: {address}"
            target = (page.path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page.path
            assert target.is_file(), f"{name}: {address} leads nowhere"
            assert target.is_relative_to(site.resolve())
            if parts.fragment:
                there = found[target.relative_to(site.resolve()).as_posix()]
                assert urllib.parse.unquote(parts.fragment) in there.ids, f"{name}: {address} has no such place"
                checked += 1
    assert checked > 100


def test_nothing_comes_from_outside(site):
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text("utf-8")
            assert not re.search(r"https?://|//cdn|@import|url\(", text), path.name


def test_the_same_records_give_the_same_bytes(results, runs, tmp_path):
    first, second = (build(results, tmp_path / name / "site", [runs]).parent for name in ("one", "two"))
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert files == {path.relative_to(second): path.read_bytes() for path in second.rglob("*") if path.is_file()}
    elsewhere = world(tmp_path / "another place" / "results")
    third = build(elsewhere, tmp_path / "three", [runs]).parent
    assert files == {path.relative_to(third): path.read_bytes() for path in third.rglob("*") if path.is_file()}


def test_an_older_report_is_replaced_and_nothing_of_it_stays(results, tmp_path):
    site = build(results, tmp_path / "site").parent
    before = {path.relative_to(site) for path in site.rglob("*")}
    only = Results(results.root, results.records[:1], results.paths[:1])
    build(only, site)
    after = {path.relative_to(site) for path in site.rglob("*")}
    assert after < before
    assert {path.name for path in tmp_path.iterdir()} == {"site"}
    assert set((site / MANIFEST).read_text().splitlines()) == {str(path) for path in after if (site / path).is_file()}


def test_what_no_report_wrote_is_never_touched(results, tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "index.html").write_text("mine")
    with pytest.raises(UserError, match=r"found index\.html, which no report wrote"):
        build(results, own)
    assert (own / "index.html").read_text() == "mine"
    site = build(results, tmp_path / "site").parent
    (site / "records" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"records/notes\.txt"):
        build(results, site)
    assert (site / "records" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="found the file file, which no report wrote"):
        build(results, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert build(results, tmp_path / "empty").is_file()


def test_a_report_that_fails_leaves_the_older_one(results, tmp_path, monkeypatch):
    site = build(results, tmp_path / "site").parent
    before = (site / "index.html").read_bytes()
    monkeypatch.setattr(provenance, "listing", lambda places: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(results, site)
    assert (site / "index.html").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"site"}


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match=r"no records under .*; run `ssl-bench run"):
        build(load_results(tmp_path / "results"), tmp_path / "site")
    write_record(scored(1.0, limit=3), tmp_path / "results")
    with pytest.raises(UserError, match="--limit"):
        build(load_results(tmp_path / "results"), tmp_path / "site")
    assert not (tmp_path / "site").exists()


# Numbers ------------------------------------------------------------------------------------------------------------


def test_the_leaderboards_hold_the_numbers_of_the_frame(site, results):
    shown = {}
    page = Page(site / "index.html")
    for table in page.tables:
        header, *rows = table
        for row in rows:
            shown |= {(row[0], " ".join(name.split())): cell for name, cell in zip(header[1:], row[1:], strict=True)}
    assert shown["MOCA", "knn/dinov1 · top1, %"] == "50.0 ± 1.2"
    assert shown[NASTY, "knn/dinov1 · top1, %"] == "61.5 ± 1.2"
    assert shown["seeds", "knn/dinov1 · top1, %"].startswith("54.5 ± 3.5 (2 seeds)")
    assert shown["MOCA", "knn/dinov1 · top1, %neighbors=5"] == "48.0 ± 1.2"
    assert shown["c", "knn/dinov1 · top1, %neighbors=5"] == NONE
    assert shown["d", "knn/dinov1 · error, %lower is better"] == "2.0"
    numbers = [cell for cell in shown.values() if cell != NONE]
    frames = [leaderboard(results.filter(dataset=name)) for name in ("toy", "digits", "toy-coco")]
    assert len(numbers) == sum(int(frame.notna().sum().sum()) for frame in frames)
    assert "limited" not in {model for model, _ in shown}
    assert "1 run with --limit" in page.text


def test_the_best_of_a_column_is_marked_and_the_first_column_is_sorted(site):
    text = (site / "index.html").read_text("utf-8")
    best = re.findall(r'<td class="num best"[^>]*data-value="([\d.]+)"', text)
    assert sorted(best) == ["2.0", "61.5"]  # of columns with one number there is no best
    toy = text.partition(">toy</h2>")[2].partition("</table>")[0]
    first = [float(row.partition('data-value="')[2].partition('"')[0]) for row in toy.split("<tr>")[2:]]
    assert first == sorted(first, reverse=True) == [61.5, 54.5, 50.0, 40.25]
    digits = text.partition(">digits</h2>")[2].partition("</table>")[0]
    assert re.findall(r'data-value="([\d.]+)"', digits) == ["2.0", "3.0"]
    assert 'aria-sort="ascending"' in digits
    assert 'data-first="ascending"' in digits
    assert 'aria-sort="descending"' in toy


def test_the_csv_has_all_numbers_in_full_precision(site, results):
    with (site / "leaderboards" / "toy.csv").open(encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["c"]["knn/dino@v1 · toy · top1"]) == 40.25
    with (site / "records.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(record.scores) for record in results)
    assert all((results.root / line["path"]).is_file() for line in lines)


def test_names_are_escaped_everywhere(site):
    for page in pages(site).values():
        assert "<script>alert" not in page.path.read_text("utf-8")
    assert NASTY in Page(site / "index.html").text


def test_every_number_leads_to_its_record_and_back(site, results):
    index = (site / "index.html").read_text("utf-8")
    for record, path in zip(results.records, results.paths, strict=True):
        page_name = f"records/{path.parent.relative_to(results.root)}.html"
        section = path.name.removesuffix(".json")
        page = Page(site / page_name)
        assert section in page.ids
        assert json.dumps(record.weights_sha256) in page.text
        assert path.relative_to(results.root).as_posix() in page.text
        if not record.limited:
            assert f'href="{page_name}#{section}"' in index
            body = (site / page_name).read_text("utf-8").partition(f'<h2 id="{section}">')[2].partition("</section>")[0]
            back = re.findall(r'href="\.\./\.\./\.\./index\.html#([^"]+)"', body)
            assert back, path
            cell = re.search(rf'<td [^>]*id="{back[0]}".*?</td>', index)
            assert f"{page_name}#{section}" in cell[0]


def test_a_record_page_says_every_field_and_what_differs(site, results):
    index = next(k for k, record in enumerate(results.records) if record.overrides.get("neighbors") == 5)
    path = results.paths[index]
    text = (site / f"records/{path.parent.relative_to(results.root)}.html").read_text("utf-8")
    section = text.partition(f'<h2 id="{path.name.removesuffix(".json")}">')[2].partition("</section>")[0]
    document = re.search(r"<pre[^>]*><code>(.*?)</code>", section, flags=re.DOTALL)
    assert json.loads(html.unescape(document[1])) == json.loads(path.read_text("utf-8"))
    for said in (
        "<dt>neighbors</dt><dd>5</dd>",
        "k-NN is near chance",
        "python 3.11",
        "runs/moca",
        "0.1.0+abc",
        '<td class="num" title="48.0">48.0</td><td class="num" title="1.25">1.2</td>',
        '±<span class="small">standard error</span>',
    ):
        assert said in section
    assert "In nothing: the plain run" in text


def test_files_that_are_no_records_are_listed(tmp_path):
    results = world(tmp_path / "results")
    broken = results.paths[0].with_name("knn-broken@v1.json")
    broken.write_text("{ <b>")
    site = build(load_results(results.root), tmp_path / "site").parent
    text = Page(site / "records.html").text
    assert broken.relative_to(results.root).as_posix() in text
    assert "not a JSON document" in text
    assert str(tmp_path) not in text
    assert "1 file could not be read" in Page(site / "index.html").text


# Scale, command line ------------------------------------------------------------------------------------------------


def test_many_records_make_pages_that_can_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(boards, "ROWS", 7)
    monkeypatch.setattr(boards, "COLUMNS", 2)
    monkeypatch.setattr(provenance, "SECTIONS", 20)
    monkeypatch.setattr(paper_pages, "COMPARED", 6)
    root = tmp_path / "results"
    records = [
        scored(float(value), model=f"m{value:02d}", weights_sha256=f"{value:064x}", protocol=protocol)
        for value in range(30)
        for protocol in ("knn", "linear", "lowshot")
    ]
    many = Results(root, tuple(records), tuple(record_path(record.run, root) for record in records))
    site = build(many, tmp_path / "site").parent
    index = Page(site / "index.html")
    assert [row[0] for row in index.tables[0][1:]] == [f"m{value}" for value in range(29, 22, -1)]
    assert "23 more models and 1 more column." in index.text
    assert len((site / "leaderboards" / "toy.csv").read_text().splitlines()) == 31
    assert "84 older runs" in Page(site / "papers.html").text
    records_page = Page(site / "records.html")
    sections = sum(len(Page(path).ids) - 1 for path in site.glob("records/**/*.html"))
    assert 14 <= sections <= 20
    assert f"{90 - sections} runs of which no page shows a number" in records_page.text


def test_the_command_prints_the_first_page(tmp_path, monkeypatch, runs):
    world(tmp_path / "results")
    (tmp_path / "results" / "MOCA" / ("1" * 12) / "toy" / "knn-x@v1.json").write_text("{")
    done = CliRunner().invoke(app, ["report", "--out", str(tmp_path / "site"), "--runs", str(runs)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'site' / 'index.html'}\n"
    assert "1 file could not be read" in done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
