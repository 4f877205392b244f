"""The published numbers are read as they stand in the files, or refused with file and line; every file is sound."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict

import pandas
import pytest

from ssl_bench.errors import UserError
from ssl_bench.leaderboards import published as module
from ssl_bench.leaderboards.published import COLUMNS, PAPERS, UNITS, cells, published, read_cells

HEADER = "paper,table,method,arch,pretrain_data,epochs,multicrop,setting,dataset,metric,value,std,unit,note"
FOLDER = module._FOLDER
GOOD = {
    "paper": "moca",
    "table": "8",
    "method": "MOCA",
    "arch": "ViT-B/16",
    "pretrain_data": "imagenet",
    "epochs": "200",
    "multicrop": "no",
    "setting": "images_per_class=1;solver=a+b",
    "dataset": "imagenet",
    "metric": "lowshot_top1",
    "value": "55.40",
    "std": "0.4",
    "unit": "percent",
    "note": "",
}


def written(folder, *lines, header=HEADER):
    path = folder / "moca.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def line(**changes):
    return ",".join((GOOD | changes)[name] for name in HEADER.split(","))


def raw(paper):
    """Rows of strings, by nothing that is tested here."""
    with (FOLDER / f"{paper}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Reading. ------------------------------------------------------------------------------------------------------------


def test_a_line_becomes_a_cell_with_every_field_in_its_place(tmp_path):
    (cell,) = read_cells(written(tmp_path, line()), "moca")
    assert vars(cell) == GOOD | {
        "epochs": 200,
        "setting": {"images_per_class": "1", "solver": "a+b"},
        "value": 55.4,
        "std": 0.4,
    }
    empty = line(arch="", pretrain_data="", epochs="", multicrop="", setting="", dataset="", std="", value="-7.20")
    (cell,) = read_cells(written(tmp_path, empty), "moca")
    assert (cell.epochs, cell.std, cell.setting, cell.value, cell.arch) == (None, None, {}, -7.2, "")


def test_fields_of_a_cell_as_text(tmp_path):
    (cell,) = read_cells(written(tmp_path, line()), "moca")
    assert cell.field("epochs") == "200"
    assert cell.field("value") == "55.4"
    assert cell.field("images_per_class") == "1"
    assert cell.field("threshold") == cell.field("note") == ""
    assert cell.field("setting") == ""  # no key of this name
    assert cell.agrees({"method": "MOCA", "epochs": "200", "solver": "a+b", "threshold": ""})
    assert not cell.agrees({"method": "MOCA", "epochs": "300"})
    assert not cell.agrees({"images_per_class": ""})
    assert cell.agrees({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": ""}, "value: expected something, found nothing"),
        ({"method": ""}, "method: expected something"),
        ({"table": ""}, "table: expected something"),
        ({"metric": ""}, "metric: expected something"),
        *(
            ({"value": text}, f"value: expected a plain number .*{re.escape(repr(text))}")
            for text in ("nan", "inf", "1_0", "1e1", ".5", "5.", " 37.1", "37.1 ", "37.1±0.3", "--3", "37.1%", "٣")
        ),
        ({"std": "-0.1"}, "std: expected a plain number"),
        *(({"epochs": text}, "epochs: expected a plain number") for text in ("300.5", "-1", "1600+100", "3e2")),
        ({"unit": "percents"}, "unit: expected one of percent, .* found 'percents'"),
        ({"unit": ""}, "unit: expected one of percent, .* found ''"),
        ({"multicrop": "maybe"}, "multicrop: expected one of yes, no, found 'maybe'"),
        ({"paper": "mmc"}, "paper: expected moca, found 'mmc'"),
        *(
            ({"setting": text}, f"setting: expected key=value;key=value, each key once, found {re.escape(repr(text))}")
            for text in ("a", "a=", "=1", "A=1", "a b=1", "a=1;", "a=1;;b=2", "a=1;a=2", "epochs=3", "a=b=c")
        ),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path, changes, message):
    path = written(tmp_path, line(), line(**changes))
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}, line 3, {message}"):
        read_cells(path, "moca")


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        ([line() + ","], HEADER, "line 2: expected 14 fields, found 15"),
        ([line(), "moca,8"], HEADER, "line 3: expected 14 fields, found 2"),
        ([line(), "", line()], HEADER, "line 3: expected 14 fields, found 0"),
        ([line(note='"open')], HEADER, "line 2: expected comma-separated values"),
        ([line()], HEADER.replace("std,unit", "unit,std"), "line 1: expected the columns paper,.* found paper,"),
        ([line()], "", "line 1: expected the columns"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, lines, header, message):
    path = written(tmp_path, *lines, header=header)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}, {message}"):
        read_cells(path, "moca")


def test_an_empty_file_is_refused_too(tmp_path):
    (tmp_path / "moca.csv").write_text("")
    with pytest.raises(UserError, match="line 1: expected the columns"):
        read_cells(tmp_path / "moca.csv", "moca")


# The frame. ----------------------------------------------------------------------------------------------------------


def test_published_gives_the_columns_of_the_file_in_their_types(tmp_path, monkeypatch):
    bare = line(table="fig3c", epochs="", std="", setting="", value="9")
    path = written(tmp_path, line(), line(setting="images_per_class=2", value="63.9"), bare)
    monkeypatch.setattr(module, "cells", lambda paper: read_cells(path, paper))
    frame = published("moca")
    assert list(frame.columns) == HEADER.split(",")
    assert frame["epochs"].tolist() == [200, 200, pandas.NA]
    assert str(frame["epochs"].dtype) == "Int64"
    assert frame["value"].tolist() == [55.4, 63.9, 9.0]
    assert {str(frame[name].dtype) for name in ("value", "std")} == {"float64"}
    assert frame["std"].isna().tolist() == [False, False, True]
    assert frame["setting"].tolist() == ["images_per_class=1;solver=a+b", "images_per_class=2", ""]
    assert frame["method"].tolist() == ["MOCA"] * 3
    for table in (8, "8"):
        assert published("moca", table)["value"].tolist() == [55.4, 63.9]
    assert published("moca", "fig3c")["value"].tolist() == [9.0]


def test_unknown_names_suggest_the_nearest(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown paper 'mocca'; did you mean 'moca'"):
        published("mocca")
    path = written(tmp_path, line(table="11a"), line(table="12"))
    monkeypatch.setattr(module, "cells", lambda paper: read_cells(path, paper))
    with pytest.raises(UserError, match=r"unknown table of moca '11'; did you mean '11a'.* Known: 11a, 12"):
        published("moca", 11)


@pytest.mark.parametrize("paper", PAPERS)
def test_the_frame_holds_every_line_of_the_file(paper):
    frame, lines = published(paper), raw(paper)
    assert len(frame) == len(lines) > 100
    for name in HEADER.split(","):
        values = frame[name]
        if name in ("value", "std", "epochs"):
            expected = [float(each[name]) if each[name] else None for each in lines]
            assert [None if pandas.isna(value) else float(value) for value in values] == expected
        else:
            assert values.tolist() == [each[name] for each in lines]
    tables = list(dict.fromkeys(each["table"] for each in lines))
    assert sum(len(published(paper, table)) for table in tables) == len(frame)


# The files. ----------------------------------------------------------------------------------------------------------


def test_there_are_about_950_numbers_in_five_papers():
    assert list(PAPERS) == ["moca", "mmc", "tec", "extrema", "sdae"]
    assert tuple(HEADER.split(",")) == COLUMNS
    assert {path.stem for path in FOLDER.glob("*.csv")} == set(PAPERS)
    assert 900 < sum(len(cells(paper)) for paper in PAPERS) < 1100


@pytest.mark.parametrize("paper", PAPERS)
def test_files_are_written_in_one_way(paper):
    """UTF-8, newlines alone, quoted where needed only, no blanks around: so that a change is a small difference."""
    content = (FOLDER / f"{paper}.csv").read_bytes()
    again = io.StringIO(newline="")
    rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    csv.writer(again, lineterminator="\n").writerows(rows)
    assert again.getvalue().encode() == content
    for row in rows:
        for text in row:
            assert text == " ".join(text.split()), row


@pytest.mark.parametrize("paper", PAPERS)
def test_no_number_stands_twice_under_one_name(paper):
    seen = defaultdict(list)
    for number, each in enumerate(raw(paper), 2):
        setting = tuple(sorted(each["setting"].split(";")))
        seen[(*(each[name] for name in HEADER.split(",")[:7]), setting, each["dataset"], each["metric"])].append(number)
    assert {key: lines for key, lines in seen.items() if len(lines) > 1} == {}


@pytest.mark.parametrize("paper", PAPERS)
def test_units_and_ranges(paper):
    for cell in cells(paper):
        where = (cell.table, cell.method, cell.metric, cell.value, cell.unit)
        assert cell.unit in UNITS
        if cell.unit in ("percent", "fraction"):
            assert 0 <= cell.value <= {"percent": 100, "fraction": 1}[cell.unit], where
        elif cell.unit == "points":
            assert -100 < cell.value < 100, where
        else:
            assert 0 < cell.value < 100_000, where
        if cell.unit == "images":
            assert cell.value == int(cell.value), where
        assert cell.std is None or 0 <= cell.std < cell.value, where
        assert cell.epochs is None or 1 <= cell.epochs <= 3200, where
        assert re.fullmatch(r"[0-9]+[a-z]?|fig[0-9]+[a-z]?|text:\S+", cell.table), where
        assert re.fullmatch(r"[a-z][a-z0-9_]*", cell.metric), where
        assert cell.dataset or cell.note, where
        kind = [words for words in UNIT_OF if any(re.fullmatch(word, cell.metric) for word in words.split())]
        assert [UNIT_OF[words] for words in kind] in ([], [cell.unit]), where


# Where a metric's name says what it is in.
UNIT_OF = {
    r"[a-z]+_top1 miou box_ap\d* mask_ap\d* map_[a-z]+ fewshot_f1 [jf]_mean j_and_f_mean": "percent",
    r".*_top1_(gain|drop) .*_ap\d*_(gain|drop) miou_(gain|drop)": "points",
    r".*_seconds": "seconds",
    r".*_minutes": "minutes",
    r".*_hours": "hours",
    r"memory": "GB",
}


def test_a_metric_has_one_unit_in_all_papers():
    units = defaultdict(set)
    for paper in PAPERS:
        for cell in cells(paper):
            units[cell.metric].add(cell.unit)
    assert {metric: found for metric, found in units.items() if len(found) > 1} == {}


@pytest.mark.parametrize("name", ["method", "arch", "pretrain_data", "dataset", "metric"])
def test_one_thing_has_one_name_in_all_papers(name):
    """MoCo-v3, MoCo v3 and MoCov3 would be three rows of a leaderboard."""
    spellings = defaultdict(set)
    for paper in PAPERS:
        for cell in cells(paper):
            spellings[re.sub(r"[^a-z0-9+]", "", cell.field(name).lower())].add(cell.field(name))
    assert {key: found for key, found in spellings.items() if len(found) > 1} == {}


@pytest.mark.parametrize("paper", PAPERS)
def test_a_table_stands_in_one_piece_and_has_its_settings_in_one_order(paper):
    tables = [each["table"] for each in raw(paper)]
    starts = [table for place, table in enumerate(tables) if place == 0 or tables[place - 1] != table]
    assert len(starts) == len(set(starts)), starts
    order = defaultdict(dict)
    for cell in cells(paper):
        keys = list(cell.setting)
        for place, first in enumerate(keys):
            for second in keys[place + 1 :]:
                order[cell.table].setdefault((first, second), True)
                assert (second, first) not in order[cell.table], (cell.table, keys)
