"""A column holds nothing that was measured otherwise, and every rendering says the same."""

from __future__ import annotations

import csv
import html.parser
import io
import pickle
import re
import statistics
from pathlib import Path

import pandas
import pytest
import rich.console
from test_record import make_record

from ssl_bench.errors import UserError
from ssl_bench.leaderboards.record import Record, Score, write_record
from ssl_bench.leaderboards.store import Results, load_results
from ssl_bench.leaderboards.table import FORMATS, cell_of, leaderboard, render, text_of

KNN = "knn/dino@v1 · toy · top1"


def results_of(*records: Record) -> Results:
    paths = tuple(Path(f"{index}.json") for index in range(len(records)))
    return Results(Path("results"), records, paths)


def scored(value: float, stderr: float | None = 1.0, **changes: object) -> Record:
    return make_record(scores={"top1": Score(value=value, n=100, stderr=stderr)}, **changes)


# What stands in the table -------------------------------------------------------------------------------------------


def test_models_by_columns_best_on_top():
    frame = leaderboard(
        results_of(
            scored(50, model="low"),
            scored(60, model="high"),
            scored(55, model="middle"),
            scored(99, model="only-linear", protocol="linear"),
        )
    )
    assert list(frame.index) == ["high", "middle", "low", "only-linear"]
    assert list(frame.columns) == [KNN, "linear/dino@v1 · toy · top1"]
    assert list(frame[KNN])[:3] == [60, 55, 50]
    assert pandas.isna(frame.loc["only-linear", KNN])
    assert frame.index.name == "model"


def test_equal_scores_stand_in_the_order_of_their_names():
    names = [f"m{number:02d}" for number in range(60)]  # enough for a sort that is not stable to show it
    frame = leaderboard(results_of(*(scored(50, model=name) for name in reversed(names)), scored(51, model="z")))
    assert list(frame.index) == ["z", *names]


def test_only_the_main_metric_enters():
    frame = leaderboard(results_of(make_record()))
    assert frame.to_dict() == {KNN: {"moca-b": 58.25}}


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"version": 2}, "knn/dino@v2 · toy · top1"),
        ({"recipe": "moca"}, "knn/moca@v1 · toy · top1"),
        ({"protocol": "linear"}, "linear/dino@v1 · toy · top1"),
        ({"dataset": "digits"}, "knn/dino@v1 · digits · top1"),
        ({"overrides": {"neighbors": 5, "metric": "dot"}}, "knn/dino@v1 [metric=dot, neighbors=5] · toy · top1"),
        ({"dtype": "bf16"}, "knn/dino@v1 [bf16] · toy · top1"),
        ({"skip_broken": True}, "knn/dino@v1 [broken images skipped] · toy · top1"),
        ({"arch_overrides": {"heads": "6"}}, "knn/dino@v1 [heads=6] · toy · top1"),
        ({"subset": {"train_list": "1percent"}}, "knn/dino@v1 [train_list=1percent] · toy · top1"),
        ({"overrides": {"neighbors": 5}, "dtype": "fp16"}, "knn/dino@v1 [neighbors=5, fp16] · toy · top1"),
    ],
)
def test_what_was_measured_otherwise_has_a_column_of_its_own(change, column):
    frame = leaderboard(results_of(scored(50), scored(60, **change)))
    assert set(frame.columns) == {KNN, column}
    assert frame.loc["moca-b", KNN] == 50
    assert frame.loc["moca-b", column] == 60


def test_another_main_metric_has_a_column_of_its_own():
    other = make_record(model="b", scores={"mAP": Score(value=9, n=1)}, main_metric="mAP")
    frame = leaderboard(results_of(scored(50), other))
    assert set(frame.columns) == {KNN, "knn/dino@v1 · toy · mAP"}


def test_one_dataset_name_with_two_contents_gives_two_columns():
    frame = leaderboard(results_of(scored(50), scored(60, dataset_manifest_sha256={"val": "e" * 64})))
    assert len(frame.columns) == 2
    assert all(re.fullmatch(re.escape(KNN) + r" · manifest [0-9a-f]{8}", column) for column in frame.columns)
    assert sorted(frame.loc["moca-b"]) == [50, 60]


def test_settings_that_read_alike_are_still_apart():
    frame = leaderboard(results_of(scored(50, overrides={"a": "1, b=2"}), scored(60, overrides={"a": "1", "b": "2"})))
    assert len(frame.columns) == 2
    assert sorted(frame.loc["moca-b"]) == [50, 60]


def test_the_plain_run_stands_before_changed_ones():
    frame = leaderboard(
        results_of(scored(1, overrides={"neighbors": [5]}), scored(2, dtype="bf16"), scored(3), scored(4, recipe="b"))
    )
    label = "knn/{}@v1{} · toy · top1"
    assert list(frame.columns) == [
        label.format("b", ""),
        label.format("dino", ""),
        label.format("dino", " [bf16]"),
        label.format("dino", " [neighbors=[5]]"),
    ]


@pytest.mark.parametrize(("value", "text"), [(0.6106, "0.611"), (0.01923, "0.0192"), (1.26, "1.3"), (0.0, "0.0")])
def test_small_values_without_a_spread_keep_three_digits(value, text):
    assert f"| {text} |" in render(leaderboard(results_of(scored(value, None))), "md")


def test_the_text_of_a_number_and_of_its_spread():
    split = Score(value=23.1, n=3, std=1.82, ddof=1)
    assert text_of(split.value, cell_of(split)) == ("23.1", "1.8 (n=3, ddof=1)")
    assert text_of(0.6106, cell_of(Score(value=0.6106, n=5))) == ("0.611", "")
    assert text_of(40.0, cell_of(Score(value=40.0, n=5, interval95=0.5))) == ("40.0", "0.5 (95 %)")
    assert text_of(float("nan"), {}) == ("-", "")


def test_versions_sort_as_numbers():
    frame = leaderboard(results_of(scored(50, version=10), scored(60, version=9)))
    assert [column[:11] for column in frame.columns] == ["knn/dino@v9", "knn/dino@v1"]


def test_two_weights_of_one_name_are_two_rows():
    frame = leaderboard(
        results_of(scored(50), scored(60, weights_sha256="12" * 32), scored(70, model="other", weights_sha256="0" * 64))
    )
    assert list(frame.index) == ["other", f"moca-b · {'12' * 6}", f"moca-b · {'ab' * 6}"]
    assert list(frame[KNN]) == [70, 60, 50]


def test_a_checkpoint_key_that_was_asked_for_is_a_row_of_its_own():
    student = scored(40, checkpoint_key="student", checkpoint_key_given=True)
    frame = leaderboard(results_of(scored(50), student))
    assert frame[KNN].to_dict() == {"moca-b · default key": 50, "moca-b · student": 40}
    assert list(leaderboard(results_of(student)).index) == ["moca-b"]


def test_limited_runs_never_enter_and_are_counted():
    frame = leaderboard(results_of(scored(50), scored(99, limit=10), scored(98, model="m", limit=10)))
    assert frame.to_dict() == {KNN: {"moca-b": 50}}
    assert "Left out: 2 limited runs (--limit)." in frame.attrs["notes"]
    assert not any("limited" in note for note in leaderboard(results_of(scored(50))).attrs["notes"])


def test_seeds_are_averaged_with_ddof_1():
    # Mean (50 + 52 + 57) / 3 = 53; squared deviations 9 + 1 + 16 = 26; std = sqrt(26 / 2) = 3.6056.
    seeds = [scored(value, seed=seed) for seed, value in enumerate([50, 52, 57])]
    frame = leaderboard(results_of(*seeds, scored(54, model="one-seed", stderr=2.0)))
    assert frame[KNN].to_dict() == {"one-seed": 54, "moca-b": 53}
    cell = frame.attrs["cells"][KNN]["moca-b"]
    assert cell["std"] == pytest.approx(3.605551275)
    assert {**cell, "std": None} == {
        "value": 53,
        "stderr": None,
        "std": None,
        "ddof": 1,
        "interval95": None,
        "n": 3,
        "seeds": 3,
    }
    one = frame.attrs["cells"][KNN]["one-seed"]
    assert one == {"value": 54, "stderr": 2.0, "std": None, "ddof": None, "interval95": None, "n": 100, "seeds": 1}
    assert any("ddof=1" in note for note in frame.attrs["notes"])


def test_the_order_of_settings_makes_no_column():
    one = scored(50, overrides={"a": 1, "b": 2}, dataset_manifest_sha256={"train": "c" * 64, "val": "d" * 64})
    two = scored(60, overrides={"b": 2, "a": 1}, dataset_manifest_sha256={"val": "d" * 64, "train": "c" * 64}, seed=1)
    frame = leaderboard(results_of(one, two))
    assert frame.to_numpy().tolist() == [[55]]


def test_a_whole_number_and_a_text_that_read_alike_are_two_columns():
    frame = leaderboard(results_of(scored(50, overrides={"a": 1}), scored(60, overrides={"a": "1"})))
    assert sorted(frame.loc["moca-b"]) == [50, 60]


def test_many_records_stand_where_looking_for_each_of_them_finds_it():
    random = statistics.NormalDist(50, 10).samples(600, seed=0)
    records = [
        scored(value, model=f"m{index % 20}", protocol=f"p{index // 20 % 10}", seed=index // 200)
        for index, value in enumerate(random)
    ]
    frame = leaderboard(results_of(*reversed(records)))
    assert frame.shape == (20, 10)
    for column in frame:
        for model in frame.index:
            found = [r.main_score.value for r in records if r.model == model and column.startswith(f"{r.protocol}/")]
            assert len(found) == 3
            assert frame.loc[model, column] == pytest.approx(statistics.mean(found), rel=1e-14)
            cell = frame.attrs["cells"][column][model]
            assert cell["std"] == pytest.approx(statistics.stdev(found), rel=1e-13)
    assert list(frame.iloc[:, 0]) == sorted(frame.iloc[:, 0], reverse=True)


@pytest.mark.parametrize("format", FORMATS)
def test_rendering_does_not_copy_what_is_known_about_the_cells(frame, format):
    """Each column that pandas takes out of a frame gets a deep copy of attrs: hours for a thousand columns."""

    class Known(dict):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    expected = frame.attrs["cells"]
    before = render(frame, format)
    frame.attrs["cells"] = Known(expected)
    after = render(frame, format)
    if format != "table":
        assert after == before


def test_a_run_with_several_spreads_keeps_its_own():
    record = make_record(scores={"top1": Score(value=50, n=3, std=0.8, ddof=0)})
    frame = leaderboard(results_of(record))
    expected = {"value": 50, "stderr": None, "std": 0.8, "ddof": 0, "interval95": None, "n": 3, "seeds": 1}
    assert frame.attrs["cells"][KNN]["moca-b"] == expected
    assert "50.0 ± 0.8 (n=3, ddof=0)" in render(frame, "md")


def test_where_low_is_good_the_lowest_is_on_top():
    records = [
        make_record(model=name, lower_is_better=True, scores={"top1": Score(value=value, n=5)})
        for name, value in (("a", 3), ("b", 2))
    ]
    frame = leaderboard(results_of(*records))
    assert list(frame.index) == ["b", "a"]
    assert "Lower is better: top1." in frame.attrs["notes"]


SHOWN = {
    "97.30 ± 0.04": (97.3, 0.04),
    "1.020 ± 0.004": (1.02, 0.004),
    "0.190 ± 0.002": (0.19, 0.002),
    "58.2 ± 1.5": (58.25, 1.5),
    "40.0 ± 0.0": (40.0, 0.0),
}


@pytest.mark.parametrize("text", SHOWN)
def test_a_spread_is_never_shown_as_nothing(text):
    value, stderr = SHOWN[text]
    record = make_record(scores={"top1": Score(value=value, n=5, stderr=stderr)})
    assert f" {text} " in render(leaderboard(results_of(record)), "md")


def test_a_mean_over_episodes_keeps_its_interval():
    frame = leaderboard(results_of(make_record(scores={"top1": Score(value=50, n=600, interval95=0.7)})))
    assert "50.0 ± 0.7 (95 %)" in render(frame, "md")
    assert any("95 % confidence interval" in note for note in frame.attrs["notes"])
    assert "0.7" in render(frame, "csv").splitlines()[1]


def test_selection_on_test_is_said():
    frame = leaderboard(results_of(scored(50, selected_on="test"), scored(50, protocol="linear", selected_on="val")))
    assert "Selected on the test set, in whole or in part, by its recipe: knn/dino@v1." in frame.attrs["notes"]


def test_nothing_to_show(tmp_path):
    with pytest.raises(UserError, match=f"no records under {re.escape(str(tmp_path))}; run `ssl-bench run"):
        leaderboard(load_results(tmp_path))
    path = write_record(make_record(limit=5), tmp_path)
    with pytest.raises(UserError, match=r"every record under .* --limit, which never enters"):
        leaderboard(load_results(tmp_path))
    path.write_text("{")
    with pytest.raises(UserError, match=r"no records .* 1 files could not be read, for instance: .*knn-dino"):
        leaderboard(load_results(tmp_path))


def test_from_disk_and_back(tmp_path):
    write_record(scored(50), tmp_path)
    write_record(scored(60, seed=1), tmp_path)
    frame = leaderboard(load_results(tmp_path))
    assert frame.to_dict() == {KNN: {"moca-b": 55}}
    assert pickle.loads(pickle.dumps(frame)).attrs == frame.attrs  # noqa: S301 - our own
    frame.to_parquet(tmp_path / "table.parquet")  # which fails if attrs hold anything but plain values
    assert pandas.read_parquet(tmp_path / "table.parquet").attrs == frame.attrs


# Rendering ----------------------------------------------------------------------------------------------------------

NASTY = r"a|b_c & 50% <b> $x$ \ {y} #1 ~^ [z] *w* `v`"


@pytest.fixture
def frame() -> pandas.DataFrame:
    """Two models of which one has a nasty name, two columns, one empty cell, three kinds of spread."""
    seeds = [scored(value, seed=seed, model="seeds") for seed, value in enumerate([50, 52, 57])]
    splits = make_record(
        model=NASTY, protocol="lowshot", scores={"top1": Score(value=1 / 3, n=3, std=0.25, ddof=0)}, dataset="a_b"
    )
    return leaderboard(results_of(*seeds, splits, scored(58.25, model=NASTY, stderr=1.625), scored(1, limit=1)))


CELLS = [
    ["model", KNN, "lowshot/dino@v1 · a_b · top1"],
    [NASTY, "58.2 ± 1.6", "0.3 ± 0.2 (n=3, ddof=0)"],
    ["seeds", "53.0 ± 3.6 (3 seeds)", "-"],
]


def test_markdown_reads_back(frame):
    text = render(frame, "md")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [
        [re.sub(r"\\(.)", r"\1", cell) for cell in re.split(r"(?<!\\) ?\| ?", line.strip())[1:-1]] for line in table
    ]
    assert cells[1] == ["---", "---:", "---:"]
    assert [cells[0], *cells[2:]] == CELLS
    assert "Left out: 1 limited run (--limit)." in text.replace("\\", "")
    assert r"a\|b\_c \& 50% \<b\>" in text


def test_csv_reads_back_in_full_precision(frame):
    rows = list(csv.DictReader(io.StringIO(render(frame, "csv"))))
    assert [row["model"] for row in rows] == [NASTY, "seeds"]
    lowshot = "lowshot/dino@v1 · a_b · top1"
    assert list(rows[0]) == [
        *("model", KNN, f"{KNN} stderr", f"{KNN} std", f"{KNN} ddof", f"{KNN} n", f"{KNN} seeds"),
        *(lowshot, f"{lowshot} std", f"{lowshot} ddof", f"{lowshot} n", f"{lowshot} seeds"),
    ]
    assert float(rows[0][KNN]) == 58.25
    assert float(rows[0][f"{KNN} stderr"]) == 1.625
    assert rows[0][f"{KNN} std"] == rows[1][f"{KNN} stderr"] == rows[1][lowshot] == ""
    assert float(rows[1][f"{KNN} std"]) == pytest.approx(3.605551275)
    assert (rows[1][f"{KNN} seeds"], rows[1][f"{KNN} n"], rows[1][f"{KNN} ddof"]) == ("3", "3", "1")
    assert float(rows[0][lowshot]) == 1 / 3
    back = pandas.read_csv(io.StringIO(render(frame, "csv")), index_col="model")
    pandas.testing.assert_frame_equal(back[list(frame.columns)], frame, check_names=False)


def test_latex_escapes_and_has_a_row_a_line(frame):
    text = render(frame, "latex")
    assert r"a$|$b\_c \& 50\% $<$b$>$ \$x\$ \textbackslash{} \{y\} \#1 \textasciitilde{}\textasciicircum{} [z]" in text
    assert r" & 58.2 $\pm$ 1.6 & 0.3 $\pm$ 0.2 (n=3, ddof=0) \\" in text
    assert r"seeds & 53.0 $\pm$ 3.6 (3 seeds) & - \\" in text
    assert r"model & knn/dino@v1 $\cdot$ toy $\cdot$ top1 & lowshot/dino@v1 $\cdot$ a\_b $\cdot$ top1 \\" in text
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\end{tabular}") == 1
    assert "% Left out: 1 limited run (--limit)." in text
    visible = [line for line in text.splitlines() if not line.startswith("%")]
    assert all(character.isascii() for character in "".join(visible))


def test_latex_row_that_begins_with_a_bracket():
    text = render(leaderboard(results_of(scored(50, model="[x]"))), "latex")
    assert "\n{}[x] & 50.0" in text


def test_html_is_well_formed_and_escaped(frame):
    class Reader(html.parser.HTMLParser):
        rows: list[list[str]]

        def __init__(self) -> None:
            super().__init__()
            self.rows, self.open = [], []

        def handle_starttag(self, tag, attrs):
            if tag == "br":
                return
            self.open.append(tag)
            if tag == "tr":
                self.rows.append([])
            elif tag in ("th", "td"):
                self.rows[-1].append("")

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            if self.open and self.open[-1] in ("th", "td"):
                self.rows[-1][-1] += data

    text = render(frame, "html")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.rows == CELLS
    assert "Left out: 1 limited run (--limit)." in text
    assert "&lt;b&gt;" in text


def test_table_prints_every_cell_literally(frame):
    console = rich.console.Console(width=200, file=io.StringIO())
    console.print(render(frame, "table"))
    text = console.file.getvalue()
    for cell in [cell for row in CELLS for cell in row]:
        assert cell in text
    assert "Left out: 1 limited run" in text


def test_a_changed_number_loses_its_old_spread(frame):
    frame.loc["seeds", KNN] = 12.0
    assert "| seeds | 12.0 | - |" in render(frame, "md")


def test_any_other_frame_of_numbers_and_words():
    frame = pandas.DataFrame({"ours": [1.25, None], "note": ["x", None], "epochs": [100, 200]}, index=["a", "b"])
    assert render(frame, "md") == (
        "|  | ours | note | epochs |\n| --- | ---: | ---: | ---: |\n| a | 1.2 | x | 100 |\n| b | - | - | 200 |\n"
    )
    assert render(frame, "csv") == ",ours,note,epochs\na,1.25,x,100\nb,,,200\n"


def test_an_unknown_format_is_refused(frame):
    with pytest.raises(UserError, match=r"unknown format 'markdown'.*Known: csv, html, latex, md, table"):
        render(frame, "markdown")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_renders_without_notes_or_spreads(format):
    frame = leaderboard(results_of(scored(50, stderr=None)))
    assert frame.attrs["notes"] == []
    assert render(frame, format)
