"""What the report draws: the papers' numbers and ours, curves, histograms, overlays; each beside its numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_world import NONE, PNG, Page, scored, training_runs, world
from test_record import make_record

from ssl_bench.errors import UserError
from ssl_bench.leaderboards.published import PAPERS, cells
from ssl_bench.leaderboards.record import OpenedCheckpoint, Record, SampleCounts, Score, write_record
from ssl_bench.leaderboards.report.build import build
from ssl_bench.leaderboards.report.charts import Chart, Point, Series, log_ticks, tick_texts, ticks
from ssl_bench.leaderboards.report.words import number, unit
from ssl_bench.leaderboards.store import Results, load_results
from ssl_bench.leaderboards.tables import rows, tables


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
    tables_of_paper = [table for table in page.tables if table[0][0] == "Method"]
    names = [name for name in tables() if name.startswith(f"{paper}:")]
    checked = 0
    for name, shown in zip(names, tables_of_paper, strict=True):
        columns = [column.name for column in tables()[name].columns]
        assert [head.startswith(column) for head, column in zip(shown[0][1:], columns, strict=True)]
        by_label = {row[0]: row[1:] for row in shown[1:] if not row[0].startswith("measured")}
        for line in rows(paper, name.partition(":")[2]):
            for column, text in zip(columns, by_label[line.label], strict=True):
                if column not in line.cells:
                    assert text == NONE
                    continue
                cell = line.cells[column]
                said = text.split()
                assert float(said[0]) == cell.value, (name, line.label, column)
                assert said[1:3] == ["\u00b1", f"{cell.std:g}"] if cell.std is not None else "\u00b1" not in said
                assert len(said) == 1 + 2 * (cell.std is not None) + bool(cell.note)
                checked += 1
    prose = [row for table in page.tables if table[0][0] == "Section" for row in table[1:]]
    in_text = [cell for cell in cells(paper) if cell.table.startswith("text:")]
    for row, cell in zip(prose, in_text, strict=True):
        assert (row[1], row[3], row[4], float(row[5])) == (cell.method, cell.dataset, cell.metric, cell.value)
    assert checked + len(prose) == len(cells(paper))
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
    assert "1 unreadable line of the log of b" in text


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
    assert "2 more pictures beside the record" in page.text
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
        text: float(x)
        for x, text in re.findall(r'class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.]+)<', drawn)
    }
    ticks_y = {text: float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', drawn)}
    assert marks[0] == (ticks_x["0"], pytest.approx(ticks_y["10"], abs=0.11))
    assert marks[1] == (ticks_x["10"], pytest.approx(ticks_y["20"], abs=0.11))


def test_one_point_and_equal_points_can_be_drawn():
    for points in ((Point(1.0, 1.0),), (Point(0.0, 0.0), Point(0.0, 0.0))):
        for kind in ("line", "area", "points"):
            edges = tuple(float(k) for k in range(len(points) + 1))
            series = Series("a", points, kind, edges=edges)
            drawn = Chart("t", "x", "y", (series,), log_x=True, write_labels=True).svg
            assert "nan" not in drawn


# What is true -------------------------------------------------------------------------------------------------------


def lowshot(dataset: str, **changes: object) -> Record:
    scores = {
        f"top1_{name}": Score(value=20.0 + k, n=3) for k, name in enumerate(("1shot", "2shot", "5shot", "1percent"))
    }
    fields = {
        "model": "MOCA",
        "protocol": "lowshot",
        "recipe": "moca",
        "main_metric": "top1_1shot",
        "resolved_recipe": {},
    }
    return make_record(dataset=dataset, scores=scores, **{**fields, **changes})


def figure_of(page: Path, title: str) -> str:
    figures = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</figure>", page.read_text("utf-8"), flags=re.DOTALL))
    return figures[title]


@pytest.mark.parametrize("page", ["papers.html", "paper-moca.html"])
def test_only_what_was_measured_as_the_paper_says_is_drawn_on_its_axes(tmp_path, page):
    title = "moca:8: low-shot top-1 against images per class"
    write_record(lowshot("toy"), tmp_path / "toy")
    toy = build(load_results(tmp_path / "toy"), tmp_path / "toy-site").parent
    assert "measured" not in figure_of(toy / page, title)  # 1 % of it are not 13 images a class
    whole = {"train": 1_281_167, "val": 50_000}
    complete = SampleCounts(original=whole, evaluated=whole)
    write_record(lowshot("imagenet", n_samples=complete), tmp_path / "same")
    same = build(load_results(tmp_path / "same"), tmp_path / "same-site").parent
    ours = figure_of(same / page, title).partition("MOCA, measured")[2]
    found = re.findall(r'<td class="num">(\d+)</td><td class="num"><a href="records/[^"]*">(\d+)</a>', ours)
    assert found == [("1", "20"), ("2", "21"), ("5", "22"), ("13", "23")]


def test_thresholds_of_what_was_measured_otherwise_have_a_chart_of_their_own(tmp_path):
    fields = {
        "protocol": "zeroshot",
        "main_metric": "miou_opt",
        "scores": {name: Score(value=30.0, n=9) for name in ("miou_opt", "miou_t0.1", "miou_t0.2")},
        "details": {"thresholds": [0.1, 0.2, 10**400, "x", True]},
        "model": "m",
    }
    for change in (
        {},
        {"dtype": "bf16"},
        {"subset": {"val_list": "few.txt"}},
        {"skip_broken": True},
        {"arch_overrides": {"patch": "8"}},
        {"overrides": {"images": 5}},
        {"dataset_manifest_sha256": {"val": "1" * 64}},
    ):
        write_record(make_record(**{**fields, **change}), tmp_path / "results")
    write_record(make_record(**fields, weights_sha256="7" * 64), tmp_path / "results")
    write_record(make_record(**fields, seed=3), tmp_path / "results")
    site = build(load_results(tmp_path / "results"), tmp_path / "site").parent
    section = (site / "pictures.html").read_text("utf-8").partition('id="zeroshot"')[2].partition("</section>")[0]
    titles = re.findall(r"<h3>(.*?)</h3>", section)
    assert len(set(titles)) == len(titles) == 7
    assert any("images=5" in title for title in titles)
    assert any("bf16" in title for title in titles)
    for figure in section.split("<figure ")[1:]:
        names = re.findall(r"</svg> (.*?)</li>", figure)
        assert len(set(names)) == len(names)
        assert len(names) in (0, 3)  # of one series no legend; two weights, one of them with two seeds


def test_the_plain_run_stands_before_changed_ones_and_the_rest_is_linked(tmp_path):
    for neighbors in (None, 5, 10, 40, 80):
        own = (
            {}
            if neighbors is None
            else {"overrides": {"neighbors": neighbors}, "resolved_recipe": {"neighbors": neighbors}}
        )
        write_record(scored(40.0 + (neighbors or 0) / 10, model="mine", **own), tmp_path / "results")
    site = build(load_results(tmp_path / "results"), tmp_path / "site").parent
    text = (site / "paper-moca.html").read_text("utf-8").partition('id="table-2a"')[2].partition("</table>")[0]
    cell = next(row for row in text.split("<tr") if "mine" in row)
    assert re.findall(r">([\d.]+)</a> <span", cell) == ["40.0", "40.5", "41.0"]
    assert re.search(r'<a href="(records/mine/[^"#]*\.html#[^"]*)">2 more</a>', cell)
    page = next(site.glob("records/mine/*/toy.html")).read_text("utf-8")
    order = re.findall(r"<h2 [^>]*>knn/dino@v1(?: \[neighbors=(\d+)\])?</h2>", page)
    assert order == ["", "5", "10", "40", "80"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.610631542201866, "0.610632"),
        (11.222863917350768, "11.2229"),
        (123456.0, "123456"),
        (999999.9, "1,000,000"),
        (1234567.0, "1,234,567"),
        (-0.0, "0"),
        (1e300, "1e+300"),
    ],
)
def test_numbers_keep_six_digits(value, text):
    assert number(value) == text


def test_ticks_of_an_axis_can_be_told_apart_and_read():
    assert tick_texts([0.0, 2.5, 5.0]) == ["0.0", "2.5", "5.0"]
    assert tick_texts([-0.0, 1.0]) == ["0", "1"]
    assert tick_texts([12345.25, 12345.5, 12345.75]) == ["12345.25", "12345.50", "12345.75"]
    assert tick_texts([50000.0, 100000.0, 150000.0]) == ["50000", "100000", "150000"]
    assert tick_texts([1, 10, 100]) == ["1", "10", "100"]


def test_every_score_has_its_unit(site):
    assert [unit(name) for name in ("top1", "jf_mean", "miou_t0.1", "map_hard", "f1")] == ["%"] * 5
    bare = ("overlap_area", "intra_mean_cosine", "cls_variance", "patch_variance_ratio")
    assert {unit(name) for name in bare} == {""}
    assert [unit(name) for name in ("epoch_minutes", "peak_memory_gib")] == ["minutes", "GiB"]
    assert '<td>top1, %</td><td class="num"' in (site / "records.html").read_text("utf-8")
    assert '<th scope="row">top1, % <span' in next(site.glob("records/c/*/toy.html")).read_text("utf-8")
    settings = (site / "curves.html").read_text("utf-8").partition('id="setting-1"')[2]
    assert 'class="axis-name" x="4" y="18">top1, %</text>' in settings


def test_histograms_of_one_dataset_share_a_scale_and_are_steps_between_edges(tmp_path):
    for model, counts in (("flat", [1, 1, 1, 1]), ("steep", [0, 0, 0, 4])):
        details = {"counts": {"intra": counts, "inter": counts}, "bin_edges": [-1.0, 1.0]}
        changes = {"protocol": "similarity", "model": model, "details": details}
        write_record(scored(0.5, **changes), tmp_path / "results")
    site = build(load_results(tmp_path / "results"), tmp_path / "site").parent
    charts = re.findall(r"<svg class=\"chart\".*?</svg>", (site / "pictures.html").read_text("utf-8"))
    ticks_y = [re.findall(r'text-anchor="end">([\d.]+)<', chart) for chart in charts]
    assert ticks_y == [["0.0", "0.5", "1.0", "1.5", "2.0"]] * 2
    (steep,) = (chart for chart in charts if "steep" in chart)
    path = re.search(r'class="area" d="([^"]*)"', steep)[1]
    assert len(re.findall("H", path)) == 4
    at = {text: float(x) for x, text in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">(-?[\d.]+)<', steep)}
    starts = [float(path[1:].split()[0]), *map(float, re.findall(r"H([\d.]+)", path))]
    assert (
        starts[0] < at["-0.75"] < starts[1] < at["-0.25"] < starts[2] < at["0.25"] < starts[3] < at["0.75"] < starts[4]
    )


def test_curves_say_which_log_they_are_of(site):
    assert "<p>From a/log.jsonl (4 steps), b/log.jsonl (4 steps).</p>" in (site / "curves.html").read_text("utf-8")
    assert "Every number" not in (site / "curves.html").read_text("utf-8")


def test_panels_of_several_datasets_say_which(site):
    for paper in PAPERS:
        titles = re.findall(r"<h3>(.*?)</h3>", (site / f"paper-{paper}.html").read_text("utf-8"))
        assert len(set(titles)) == len(titles), paper
