"""What the report draws: the papers' numbers and ours, curves, histograms, overlays; each beside its numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_world import PNG, Page, scored, training_runs, world

from ssl_bench.errors import UserError
from ssl_bench.leaderboards.published import PAPERS, cells
from ssl_bench.leaderboards.record import OpenedCheckpoint, write_record
from ssl_bench.leaderboards.report.build import build
from ssl_bench.leaderboards.report.charts import Chart, Point, Series, log_ticks, ticks
from ssl_bench.leaderboards.store import Results, load_results


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


# Papers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", PAPERS)
def test_every_printed_number_stands_on_its_paper_page(site, paper):
    page = Page(site / f"paper-{paper}.html")
    numbers = re.findall(r"\d+(?:\.\d+)?", " ".join(cell for table in page.tables for row in table for cell in row))
    shown = {float(number) for number in numbers}
    assert {abs(cell.value) for cell in cells(paper)} <= shown
    for note in {cell.note for cell in cells(paper) if cell.note}:
        assert note in page.text


def test_ours_stand_below_theirs_with_what_differs(site):
    text = (site / "paper-moca.html").read_text("utf-8")
    measured = re.findall(r'<tr class="ours">.*?</tr>', text, flags=re.DOTALL)
    ours = [row for row in measured if ">50.0</a>" in row]
    assert ours, "MOCA's k-NN on its line"
    assert all("records/MOCA/" in row for row in ours)
    assert "dataset: toy, not imagenet" in text


def test_the_scatter_is_filled_only_for_the_same_settings(tmp_path):
    points = (Point(50.0, 51.0, "same"), Point(60.0, 40.0, "other", solid=False))
    drawn = Chart("t", "x", "y", (Series("MOCA", points, "points"),), identity=True).svg
    assert drawn.count('class="mark"') == 1
    assert drawn.count('class="mark hollow"') == 1
    assert 'class="identity"' in drawn
    write_record(scored(50.0, model="MOCA"), tmp_path / "results")
    site = build(load_results(tmp_path / "results"), tmp_path / "site").parent
    text = (site / "papers.html").read_text("utf-8")
    scatter = text.partition('id="scatter"')[2].partition("</section>")[0]
    assert 'class="mark hollow"' in scatter
    assert 'class="mark"' not in scatter.partition("<ul")[0]  # toy is not imagenet
    assert re.search(r"\b0 of \d+ numbers in percent are comparable", scatter)


def test_the_papers_own_figures_are_drawn_from_their_tables(site):
    text = (site / "papers.html").read_text("utf-8")
    figures = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</figure>", text, flags=re.DOTALL))
    hours = figures["MOCA: k-NN top-1 against pre-training hours"]
    table = re.search(r"<table>.*</table>", hours, flags=re.DOTALL)[0]
    rows = re.findall(r'<td>(.*?)</td><td class="num">(.*?)</td><td class="num">(.*?)</td>', table)
    assert ("MOCA, 200 epochs", "38", "77.2") in rows  # Tables 6 and 7
    assert ("DINO multi-crop, 400 epochs", "154", "76.1") in rows
    shots = figures["moca:8: low-shot top-1 against images per class"]
    assert re.findall(r'<td class="num">(\d+)</td><td class="num">([\d.]+)</td>', shots.partition("MOCA</th>")[2])[
        0
    ] == ("1", "55.4")
    assert "moca:fig3c: mIoU against train images" in figures
    sdae = (site / "paper-sdae.html").read_text("utf-8")
    assert "83.04" in sdae


# Curves, pictures ---------------------------------------------------------------------------------------------------


def test_losses_share_a_chart_only_where_they_are_the_same_sum(site):
    text = (site / "curves.html").read_text("utf-8")
    figures = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</figure>", text, flags=re.DOTALL))
    assert re.findall(r'<th scope="row">(.)</th>', figures["Loss: image + local"]) == ["a"] * 4 + ["b"] * 4
    assert re.findall(r'<th scope="row">(.)</th>', figures["Loss: rec"]) == ["c"] * 4
    knn = figures["k-NN, class token, while training"]
    assert re.findall(r'<th scope="row">(.)</th><td class="num">2</td><td class="num">33.5</td>', knn) == [
        "a",
        "b",
        "c",
    ]
    assert "1 unreadable lines of the log of b" in text


def test_settings_make_curves_of_records(site):
    text = (site / "curves.html").read_text("utf-8")
    figure = text.partition('id="setting-1"')[2].partition("</figure>")[0]
    rows = re.findall(r'<td class="num">([\d.]+)</td><td class="num"><a href="([^"]+)">([\d.]+)</a>', figure)
    assert [(x, y) for x, _, y in rows] == [("5", "48"), ("20", "50"), ("40", "49.5"), ("80", "47.25")]
    assert all(href.startswith("records/MOCA/") for _, href, _ in rows)


def test_the_log_beside_a_scored_checkpoint_is_found(runs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_bytes((runs / "a" / "log.jsonl").read_bytes())
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"")
    checkpoint = OpenedCheckpoint(str(tmp_path / "run" / "checkpoint.pt"), "ssl-bench", 100.0, [])
    write_record(scored(50.0, model="mine", checkpoint=checkpoint), tmp_path / "results")
    site = build(load_results(tmp_path / "results"), tmp_path / "site").parent
    assert '<th scope="row">mine</th>' in (site / "curves.html").read_text("utf-8")


def test_runs_that_are_none_are_refused(results, tmp_path):
    with pytest.raises(UserError, match=r"--runs .*nowhere: expected the folder of a run .* found nothing"):
        build(results, tmp_path / "site", [tmp_path / "nowhere"])
    with pytest.raises(UserError, match="found neither"):
        build(results, tmp_path / "site", [results.root])


def test_histograms_are_densities(site):
    text = (site / "pictures.html").read_text("utf-8")
    figure = text.partition('id="similarity"')[2].partition("</figure>")[0]
    rows = re.findall(
        r'<th scope="row">(\w+) objects</th><td class="num">([-\d.]+)</td><td class="num"><a[^>]*>([\d.]+)', figure
    )
    within = [(float(x), float(y)) for kind, x, y in rows if kind == "within"]
    # Four bins from -1 to 1 are .5 wide; 17 pairs: density = count / 17 / .5.
    assert within == [
        (x, pytest.approx(c / 17 / 0.5, rel=1e-3))
        for x, c in zip((-0.75, -0.25, 0.25, 0.75), (1, 2, 5, 9), strict=True)
    ]


def test_overlays_are_copied_and_what_is_no_picture_is_not(site):
    page = Page(site / "pictures.html")
    copies = sorted(site.glob("pictures/MMC/*/toy-coco/zeroshot-mmc@v1/*"))
    assert len(copies) == 8
    assert {path.read_bytes() for path in copies} == {PNG}
    assert "2 more pictures beside the record" in page.text or "3 more pictures beside the record" in page.text
    assert 'alt="' in page.path.read_text("utf-8")
    curve = page.path.read_text("utf-8").partition('id="zeroshot"')[2].partition("</figure>")[0]
    assert re.findall(r'<td class="num">(0\.\d)</td><td class="num"><a[^>]*>(\d+)', curve) == [
        ("0.1", "31"),
        ("0.2", "32"),
    ]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (66.8, 71.9, [67, 68, 69, 70, 71]), (-3, 3, [-3, -2, -1, 0, 1, 2, 3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_logarithms_are_round():
    assert log_ticks(0.9, 14) == [1, 2, 5, 10]
    assert log_ticks(1, 1e6) == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]


def test_marks_stand_where_the_axes_say():
    drawn = Chart("t", "x", "y", (Series("a", (Point(0.0, 10.0), Point(10.0, 20.0))),)).svg
    marks = [
        tuple(map(float, place)) for place in re.findall(r'<circle class="mark" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    ]
    ticks_x = {
        text: float(x) for x, text in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.]+)<', drawn)
    }
    ticks_y = {text: float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', drawn)}
    assert marks[0] == (ticks_x["0"], pytest.approx(ticks_y["10"], abs=0.11))
    assert marks[1] == (ticks_x["10"], pytest.approx(ticks_y["20"], abs=0.11))


def test_one_point_and_equal_points_can_be_drawn():
    for points in ((Point(1.0, 1.0),), (Point(0.0, 0.0), Point(0.0, 0.0))):
        for kind in ("line", "area", "points"):
            drawn = Chart("t", "x", "y", (Series("a", points, kind),), log_x=True, write_labels=True).svg
            assert "nan" not in drawn
