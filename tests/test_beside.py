"""Our numbers stand beside the paper's number that they are of, apart from all that was measured otherwise."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from test_record import make_record
from test_run import in_process

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.evaluate.datasets import DATASETS, complete_counts
from ssl_bench.leaderboards import beside, complete, origins, published, standing, tables
from ssl_bench.leaderboards.beside import comparisons, differences, paper_table
from ssl_bench.leaderboards.record import Record, SampleCounts, Score, write_record
from ssl_bench.leaderboards.store import Results
from ssl_bench.leaderboards.table import FORMATS, render
from ssl_bench.leaderboards.tables import Column, Measure, Pretraining, Table

HEADER = "paper,table,method,arch,pretrain_data,epochs,multicrop,setting,dataset,metric,value,std,unit,note\n"
CELLS = (
    HEADER
    + """\
moca,1,MAE,ViT-B/16,imagenet,1600,,images=1,imagenet,lowshot_top1,8.2,0.3,percent,
moca,1,MAE,ViT-B/16,imagenet,1600,,images=5,imagenet,lowshot_top1,40.25,0.2,percent,
moca,1,DINO,ViT-B/16,imagenet,400,,images=1,imagenet,lowshot_top1,41.8,0.3,percent,"41.8 here, 41.6 there"
moca,1,MOCA,ViT-B/16,imagenet,200,,images=1,imagenet,lowshot_top1,55.4,0.4,percent,
moca,1,MOCA,ViT-B/16,imagenet,200,,images=5,imagenet,lowshot_top1,69.9,0.1,percent,
moca,2,MOCA,ViT-S/16,imagenet,100,,,imagenet,knn_top1,60.1,,percent,
moca,2,MOCA,ViT-B/16,imagenet,100,,,imagenet,knn_top1,70.1,,percent,
moca,2,MOCA,ViT-B/16,imagenet,200,,,imagenet,knn_top1,77.2,,percent,
moca,2,iBOT,ViT-B/16,imagenet,400,,,imagenet,linear_top1,79.5,,percent,
moca,3,MMC,,imagenet,,,token=cls;neighbors=10,pets,knn_top1,72.9,,percent,
moca,3,MMC,,imagenet,,,token=cls;neighbors=20,pets,knn_top1,73.4,,percent,
moca,3,MMC,,imagenet,,,token=patch;neighbors=10,pets,knn_top1,75.9,,percent,
moca,3,MMC,,imagenet,,,token=patch;neighbors=10,cifar10,knn_top1,84.9,,percent,
moca,4,MAE,ViT-B/16,imagenet,1600,,,imagenet,epoch_minutes,5.35,,minutes,
moca,4,MAE,ViT-B/16,imagenet,1600,,,imagenet,pretrain_hours,142,,hours,
moca,4,MOCA,ViT-B/16,imagenet,200,,,imagenet,epoch_minutes,11.23,,minutes,
moca,4,MOCA,ViT-B/16,imagenet,200,,,imagenet,pretrain_hours,38,,hours,
moca,5,MOCA,ViT-B/16,imagenet,100,,,imagenet,knn_top1,1.5,,percent,
moca,5,DToP,,imagenet,,,,imagenet,knn_top1,2.5,,percent,
moca,5,DToP,,imagenet,,,,imagenet,clicks,3,,images,
"""
)
SHOTS = (("1", "1 image"), ("5", "5 images"))


def _neighbors(name: str, dataset: str) -> Column:
    rows = tuple(
        ({"token": token, "neighbors": str(k)}, Measure(recipe, dataset, f"top1_k{k}"))
        for token, recipe in (("cls", "knn/mmc-cls"), ("patch", "knn/mmc-patch"))
        for k in (10, 20)
    )
    return Column(name, {"dataset": dataset}, rows[0][1], rows)


def _hours(epochs: int) -> Measure:
    return Measure("efficiency/moca", "", "epoch_minutes", scale=epochs / 60, of="pretraining")


MINUTES = Measure("efficiency/moca", "", "epoch_minutes", of="pretraining")
TABLES = {
    "1": Table(
        "few labels",
        tuple(
            Column(name, {"images": n}, Measure("lowshot/moca", "imagenet", f"top1_{n}shot")) for n, name in SHOTS
        ),
        (Pretraining({"method": "MOCA"}, "moca/paper"), Pretraining({"method": "MAE"}, "mae/paper", "imagenet-100")),
        note="Three splits.",
    ),
    "2": Table(
        "networks and epochs",
        (
            Column("k-NN", {"metric": "knn_top1"}, Measure("knn/moca-paper", "imagenet", "top1")),
            Column("Linear", {"metric": "linear_top1"}, Measure("linear/ibot", "imagenet", "top1")),
        ),
    ),
    "3": Table("k-NN by k", (_neighbors("Pets", "pets"), _neighbors("CIFAR-10", "cifar10"))),
    "4": Table(
        "time",
        (
            Column("Minutes", {"metric": "epoch_minutes"}, MINUTES),
            Column("Hours", {"metric": "pretrain_hours"}, _hours(200), (({"method": "MAE"}, _hours(1600)),)),
        ),
    ),
    "5": Table(
        "odd",
        (
            Column("k-NN", {"metric": "knn_top1"}, Measure("knn/dino", "imagenet", "top1", {"neighbors": (5, 10)}),
                   (({"method": "DToP"}, "two networks"),)),
            Column("Clicks", {"metric": "clicks"}, "people have to click"),
        ),
    ),
}  # fmt: skip


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A paper of five small tables in the place of MOCA."""
    (tmp_path / "moca.csv").write_text(CELLS)
    monkeypatch.setattr(published, "_FOLDER", tmp_path)
    published.cells.cache_clear()
    monkeypatch.setattr(tables, "of_paper", {"moca": TABLES}.__getitem__)
    monkeypatch.setattr(tables, "PAPERS", ["moca"])
    monkeypatch.setattr(tables, "tables", lambda: {f"moca:{number}": table for number, table in TABLES.items()})
    yield
    published.cells.cache_clear()


def results_of(*records: Record) -> Results:
    return Results(Path("results"), records, tuple(Path(f"{index}.json") for index in range(len(records))))


def counts(dataset: str) -> SampleCounts:
    """Of a complete dataset, read as a whole; else of few images."""
    images = dict(complete.COMPLETE.get(dataset, {"train": 100, "val": 10}))
    return SampleCounts(original=images, evaluated=images)


def record_of(**changes: Any) -> Record:
    return make_record(**{"n_samples": counts(changes["dataset"])} | changes)


def lowshot(one: float, five: float, **changes: Any) -> Record:
    scores = {
        "top1_1shot": Score(value=one, n=3, std=0.5, ddof=1),
        "top1_5shot": Score(value=five, n=3, std=0.25, ddof=1),
    }
    main = {"scores": scores, "main_metric": "top1_1shot", "protocol": "lowshot", "recipe": "moca"}
    return record_of(**{"model": "MOCA", "dataset": "imagenet", "selected_on": "none"} | main | changes)


def knn(value: float, **changes: Any) -> Record:
    scores = {"top1": Score(value=value, n=10, stderr=1.0)}
    return record_of(**{"scores": scores, "recipe": "moca-paper", "dataset": "imagenet"} | changes)


def shown(frame: pandas.DataFrame) -> dict[str, dict[str, float]]:
    return {column: values.dropna().to_dict() for column, values in frame.items()}


OURS = "lowshot/moca@v1 · imagenet"
PRINTED = {
    "1 image": {"MAE": 8.2, "DINO": 41.8, "MOCA": 55.4},
    "5 images": {"MAE": 40.25, "MOCA": 69.9},
}
pytestmark = pytest.mark.usefixtures("paper")


@pytest.fixture
def lines() -> list[str]:
    return [row.label for row in tables.rows("moca", "1")]


# What stands where ---------------------------------------------------------------------------------------------------


def test_the_papers_table_without_any_record(lines):
    assert lines == ["MAE, 1600 epochs", "DINO, 400 epochs", "MOCA, 200 epochs"]
    frame = paper_table("moca:1", results_of())
    assert frame.index.name == "moca:1"
    assert list(frame.index) == lines
    short = {name: {line.partition(",")[0]: value for line, value in of.items()} for name, of in shown(frame).items()}
    assert short == PRINTED
    notes = frame.attrs["notes"]
    assert notes[:2] == ["few labels.", "Three splits."]
    assert "On DINO, 400 epochs: 41.8 here, 41.6 there." in notes
    assert "Lower is better: Minutes; Hours." in paper_table("moca:4", results_of()).attrs["notes"]
    assert not any("Lower" in note for note in notes)
    assert "Nothing of it was measured yet: ssl-bench reproduce moca:1 --dry-run" in notes
    assert frame.attrs["measured"] == {}


def test_ours_stand_beside_the_column_that_they_are_of_and_other_models_below(lines):
    toy = lowshot(
        20,
        30,
        model="moca-toy",
        dataset="toy",
        checkpoint=make_record().checkpoint.__class__("x", "ssl-bench", 100.0, []),
    )
    frame = paper_table("moca:1", results_of(lowshot(50, 60), toy, knn(99)))
    assert list(frame.index) == [*lines, "moca-toy"]
    toys = "lowshot/moca@v1 · toy"
    assert list(frame.columns) == [
        *("1 image", f"1 image: {OURS}", f"1 image: {toys}"),
        *("5 images", f"5 images: {OURS}", f"5 images: {toys}"),
    ]
    ours = {column: values for column, values in shown(frame).items() if column not in PRINTED}
    assert ours == {
        f"1 image: {OURS}": {"MOCA, 200 epochs": 50},
        f"5 images: {OURS}": {"MOCA, 200 epochs": 60},
        f"1 image: {toys}": {"moca-toy": 20},
        f"5 images: {toys}": {"moca-toy": 30},
    }
    assert frame.attrs["measured"] == {column: column.partition(":")[0] for column in ours}
    assert pickle.loads(pickle.dumps(frame)).attrs == frame.attrs  # noqa: S301 - our own
    json.dumps(frame.attrs)


@pytest.mark.parametrize(
    ("change", "heading"),
    [
        ({"version": 2}, "lowshot/moca@v2 · imagenet"),
        ({"recipe": "msn"}, "lowshot/msn@v1 · imagenet"),
        ({"dataset": "toy"}, "lowshot/moca@v1 · toy"),
        ({"overrides": {"splits": 5}}, "lowshot/moca@v1 [splits=5] · imagenet"),
        ({"dtype": "bf16"}, "lowshot/moca@v1 [bf16] · imagenet"),
    ],
)
def test_what_was_measured_otherwise_has_a_column_of_its_own(change, heading):
    frame = paper_table("moca:1", results_of(lowshot(50, 60), lowshot(51, 61, **change)))
    assert list(frame.columns)[:3] == ["1 image", f"1 image: {OURS}", f"1 image: {heading}"]  # the paper's way first
    assert frame.loc["MOCA, 200 epochs"].tolist() == [55.4, 50, 51, 69.9, 60, 61]


def test_one_dataset_name_with_two_contents_gives_two_columns():
    other = lowshot(51, 61, dataset_manifest_sha256={"val": "e" * 64})
    frame = paper_table("moca:1", results_of(lowshot(50, 60), other))
    first = [column for column in frame.columns if column.startswith(f"1 image: {OURS} · manifest ")]
    assert sorted(frame.loc["MOCA, 200 epochs", first]) == [50, 51]


def test_limited_runs_never_enter_and_are_counted():
    frame = paper_table("moca:1", results_of(lowshot(50, 60, limit=9), knn(1, limit=9)))
    assert list(frame.columns) == ["1 image", "5 images"]
    assert "Left out: 1 limited run (--limit)." in frame.attrs["notes"]  # k-NN has no part in this table
    assert comparisons("moca:1", results_of(lowshot(50, 60, limit=9))) == []


def test_seeds_are_averaged_with_ddof_1():
    frame = paper_table("moca:1", results_of(*(lowshot(v, v, seed=seed) for seed, v in enumerate([50, 52, 57]))))
    cell = frame.attrs["cells"][f"1 image: {OURS}"]["MOCA, 200 epochs"]
    assert (cell["value"], cell["seeds"], cell["ddof"]) == (53, 3, 1)
    assert cell["std"] == pytest.approx((26 / 2) ** 0.5)
    assert "53.0 ± 3.6 (3 seeds)" in render(frame, "md")


def test_several_checkpoints_of_one_line_get_lines_of_their_own_below_it(lines):
    results = results_of(lowshot(50, 60), lowshot(40, 41, weights_sha256="12" * 32))
    frame = paper_table("moca:1", results)
    assert list(frame.index) == [*lines, "MOCA, 200 epochs · 12121212", "MOCA, 200 epochs · abababab"]
    assert shown(frame)[f"1 image: {OURS}"] == {
        "MOCA, 200 epochs · 12121212": 40,
        "MOCA, 200 epochs · abababab": 50,
    }
    assert frame.loc["MOCA, 200 epochs"].dropna().tolist() == [55.4, 69.9]
    assert len(comparisons("moca:1", results)) == 4


def test_two_trainings_in_two_columns_of_a_line_are_told_apart(lines):
    other = lowshot(40, 41, weights_sha256="12" * 32, recipe="msn")
    frame = paper_table("moca:1", results_of(lowshot(50, 60), other))
    assert list(frame.index) == [*lines, "MOCA, 200 epochs · 12121212", "MOCA, 200 epochs · abababab"]
    overwritten = knn(60, protocol="linear", recipe="ibot", model="iBOT", weights_sha256="12" * 32)
    index = list(paper_table("moca:2", results_of(knn(50, model="iBOT"), overwritten)).index)
    assert "iBOT, ViT-B/16, 400 epochs · 12121212" in index  # the same file by name, and the same network of it
    student = knn(
        60, protocol="linear", recipe="ibot", model="iBOT", weights_sha256="12" * 32, checkpoint_key="student",
        checkpoint=make_record().checkpoint.__class__("another.pth", "ibot", 100.0, []),
    )  # fmt: skip
    index = list(paper_table("moca:2", results_of(knn(50, model="iBOT"), student)).index)
    assert "iBOT, ViT-B/16, 400 epochs · 12121212" in index  # of another file


def test_one_checkpoint_under_two_names_gets_two_lines():
    frame = paper_table("moca:1", results_of(lowshot(50, 60), lowshot(50, 60, model="moca")))
    assert list(frame.index)[3:] == [f"MOCA, 200 epochs · abababab · {name}" for name in ("MOCA", "moca")]


def test_a_line_of_its_own_never_has_the_label_of_the_papers():
    column = TABLES["5"].columns[0]
    records = [knn(value, model="MOCA", recipe="dino", weights_sha256=f"{value}" * 32) for value in (10, 20)]
    alone = [standing.Placed(each, standing.ALONE, column, column.measure, True, "run", {}) for each in records]
    labels = beside._line_labels(alone, ["MOCA", "DToP"])
    assert sorted(labels.values()) == ["MOCA (measured) · 101010101010", "MOCA (measured) · 202020202020"]


def test_teacher_and_student_of_one_file_share_a_line():
    student = knn(
        60, protocol="linear", recipe="ibot", model="iBOT", weights_sha256="12" * 32, checkpoint_key="student"
    )
    frame = paper_table("moca:2", results_of(knn(50, model="iBOT"), student))
    line = frame.loc["iBOT, ViT-B/16, 400 epochs"].dropna().to_dict()
    assert line == {
        "k-NN: knn/moca-paper@v1 · imagenet": 50,  # where the paper prints a dash
        "Linear": 79.5,
        "Linear: linear/ibot@v1 · imagenet": 60,
    }
    assert frame.attrs["weights"]["Linear: linear/ibot@v1 · imagenet"] == {"iBOT, ViT-B/16, 400 epochs": "12" * 32}


# Lines ---------------------------------------------------------------------------------------------------------------


def opened(form: str) -> Any:
    return make_record().checkpoint.__class__("x.pth", form, 100.0, [])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": "MOCA"}, "MOCA, 200 epochs"),
        ({"model": "moca"}, "MOCA, 200 epochs"),
        ({"model": "moca, 200 EPOCHS"}, "MOCA, 200 epochs"),
        ({"model": "DINO"}, "DINO, 400 epochs"),
        ({"model": "moca-paper"}, "MOCA, 200 epochs"),  # as `ssl-bench pretrain` was told to call its folder
        ({"model": "mae-paper-imagenet-100"}, "MAE, 1600 epochs"),
        ({"model": "x", "checkpoint": opened("moca")}, "MOCA, 200 epochs"),
        ({"model": "x", "checkpoint": opened("dino")}, "DINO, 400 epochs"),
        ({"model": "MAE", "checkpoint": opened("dino")}, "MAE, 1600 epochs"),  # the name is the user's word
        ({"model": "x", "checkpoint": opened("mae")}, "x"),  # MOCA's extracted teachers have MAE's form
        ({"model": "x", "checkpoint": opened("moca"), "arch": "vit_small_patch16_224"}, "x"),
        ({"model": "MOCA", "arch": "vit_small_patch16_224"}, "MOCA, 200 epochs"),
        ({"model": "mocha"}, "mocha"),
    ],
)
def test_the_line_of_a_model(changes, line):
    base = {"checkpoint": opened("ssl-bench")}
    frame = paper_table("moca:1", results_of(lowshot(50, 60, **base | changes)))
    assert shown(frame)[f"1 image: {OURS}"] == {line: 50}


def made(method: str, epochs: int, data: str = "imagenet", recipe: str = "r", **overrides: Any) -> dict[str, Any]:
    """What our own checkpoints say of themselves."""
    pretraining = {"method": method, "recipe": recipe, "data": data, "resolved_recipe": {"epochs": epochs}}
    return {"details": {"pretraining": {**pretraining, "overrides": overrides}}, "checkpoint": opened("ssl-bench")}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (made("moca", 200), "MOCA, 200 epochs"),
        (made("moca", 4), "x"),
        (made("moca", 200, data="toy"), "x"),
        (made("mmc", 200), "x"),
    ],
)
def test_our_own_checkpoints_say_what_made_them(changes, line):
    frame = paper_table("moca:1", results_of(lowshot(50, 60, model="x", **changes)))
    assert shown(frame)[f"1 image: {OURS}"] == {line: 50}


def test_architecture_and_epochs_tell_lines_apart():
    def line_of(**changes: Any) -> str:
        (column,) = [
            values
            for name, values in shown(paper_table("moca:2", results_of(knn(9, **changes)))).items()
            if "knn/" in name
        ]
        (line,) = column
        return line

    assert line_of(model="MOCA", arch="vit_small_patch16_224") == "MOCA, ViT-S/16, 100 epochs"
    assert line_of(model="MOCA") == "MOCA"
    assert line_of(model="MOCA", **made("moca", 200)) == "MOCA, ViT-B/16, 200 epochs"
    assert line_of(model="MOCA, ViT-B/16, 100 epochs") == "MOCA, ViT-B/16, 100 epochs"
    notes = paper_table("moca:2", results_of(knn(9, model="MOCA"))).attrs["notes"]
    assert (
        "MOCA, standing alone, may be of the lines 'MOCA, ViT-B/16, 100 epochs', 'MOCA, ViT-B/16, 200 epochs'; "
        "say which by --name."
    ) in notes


def test_a_name_holds_against_what_is_known_and_that_is_said():
    record = lowshot(50, 60, arch="vit_96x4x3_patch8_48")
    notes = paper_table("moca:1", results_of(record)).attrs["notes"]
    said = "architecture: vit_96x4x3_patch8_48, not ViT-B/16"
    assert f"MOCA, by name on the line MOCA, 200 epochs: {said}." in notes
    assert comparisons("moca:1", results_of(record))[0].differs == (said,)


def test_all_records_of_a_checkpoint_stand_on_one_line_in_any_order():
    """An older record, and one of a copy in another form, say nothing of the pre-training."""
    told = lowshot(50, 60, model="x", **made("moca", 200))
    silent = lowshot(40, 41, model="x", recipe="msn", checkpoint=opened("ssl-bench"))
    for records in ((told, silent), (silent, told)):
        found = comparisons("moca:1", results_of(*records))
        assert [(each.row, each.measured) for each in found[:2]] == [("MOCA, 200 epochs", 50), ("MOCA, 200 epochs", 40)]
    by_form = lowshot(50, 60, model="x", checkpoint=opened("moca"))
    for records in ((by_form, silent), (silent, by_form)):
        assert len(comparisons("moca:1", results_of(*records))) == 4


@pytest.mark.parametrize(
    "pretraining",
    [
        "abc",
        ["moca"],
        {"method": "moca", "epochs_done": "x"},
        {"method": "moca", "resolved_recipe": "x", "data": 5},
        {"method": ["moca"], "epochs_done": [1], "overrides": 3},
    ],
)
def test_what_a_damaged_record_says_counts_as_not_said(pretraining):
    record = lowshot(50, 60, details={"pretraining": pretraining}, checkpoint=opened("ssl-bench"))
    (found, _) = comparisons("moca:1", results_of(record))
    assert (found.row, found.differs) == ("MOCA, 200 epochs", ())
    assert origins.Origin(made={"epochs_done": 4.0}).told("any")["epochs"] == "4"
    assert paper_table("moca:1", results_of(lowshot(1, 2, model="x", details={"pretraining": pretraining}))) is not None


def test_fewer_epochs_than_planned_are_told():
    """A training that was stopped."""
    details = made("moca", 200)
    details["details"]["pretraining"]["epochs_done"] = 120.5
    assert comparisons("moca:1", results_of(lowshot(50, 60, **details)))[0].differs == ("epochs: 120.5, not 200",)


def test_many_models_are_told_in_one_remark():
    records = [lowshot(1, 2, model=f"m{n}", weights_sha256=f"{n:064}", **made("moca", n + 1)) for n in range(50)]
    remarks = standing.place("moca:1", results_of(*records))[1]
    assert remarks == ["m0, m1, m2 and 47 more, though of MOCA, standing alone: other epochs."]
    (remark,) = standing.place("moca:1", results_of(records[0]))[1]
    assert remark == "m0, though of MOCA, standing alone: epochs: 1, not 200."
    many = [knn(9, model=name) for name in ("MOCA", "moca")]
    (remark,) = standing.place("moca:2", results_of(*many))[1]
    assert remark.startswith("MOCA, moca, standing alone, may be of the lines 'MOCA, ViT-B/16, 100 epochs'")


def test_a_model_that_stands_alone_is_on_no_line_by_name():
    """Every line of its method contradicts it, and which of them is meant nobody knows."""
    remarks = standing.place("moca:2", results_of(knn(9, model="MOCA", arch="vit_large_patch16_224")))[1]
    assert len(remarks) == 1
    assert "standing alone, may be" in remarks[0]


def test_rows_that_are_ways_to_measure_are_told_apart_by_the_run():
    scores = {f"top1_k{k}": Score(value=k, n=9) for k in (10, 20)}
    record = record_of(model="MMC", recipe="mmc-cls", dataset="pets", scores=scores, main_metric="top1_k20")
    patches = record_of(model="MMC", recipe="mmc-patch", dataset="cifar10", scores=scores, main_metric="top1_k20")
    found = comparisons("moca:3", results_of(record, patches))
    assert [(each.row, each.column, each.measured) for each in found] == [
        ("MMC, token=cls, neighbors=10", "Pets", 10),
        ("MMC, token=cls, neighbors=20", "Pets", 20),
        ("MMC, token=patch, neighbors=10", "CIFAR-10", 10),
    ]
    assert all(each.differs == () for each in found)


def test_a_run_that_may_be_of_several_columns_is_compared_with_none():
    scores = {"top1_k10": Score(value=1.5, n=9)}
    record = record_of(model="MMC", recipe="mmc-patch", dataset="toy", scores=scores, main_metric="top1_k10")
    frame = paper_table("moca:3", results_of(record))
    assert list(frame.columns) == ["Pets", "CIFAR-10", "knn/mmc-patch@v1 · toy"]
    assert frame["knn/mmc-patch@v1 · toy"].dropna().to_dict() == {"MMC, token=patch, neighbors=10": 1.5}
    assert comparisons("moca:3", results_of(record)) == []


def test_costs_come_in_the_printed_unit_of_the_line():
    def cost(model: str, minutes: float) -> Record:
        scores = {"epoch_minutes": Score(value=minutes, n=5, std=0.6, ddof=1)}
        return record_of(
            model=model, protocol="efficiency", recipe="moca", dataset="noise on a GPU", scores=scores,
            main_metric="epoch_minutes", lower_is_better=True, checkpoint=opened("recipe"),
        )  # fmt: skip

    results = results_of(cost("MAE", 6), cost("MOCA", 12), cost("other", 30))
    found = {(each.row, each.column): each for each in comparisons("moca:4", results)}
    assert {place: each.measured for place, each in found.items()} == pytest.approx(
        {
            ("MAE, 1600 epochs", "Minutes"): 6,
            ("MAE, 1600 epochs", "Hours"): 160,
            ("MOCA, 200 epochs", "Minutes"): 12,
            ("MOCA, 200 epochs", "Hours"): 40,
        }
    )
    assert found["MAE, 1600 epochs", "Hours"].uncertainty == pytest.approx(0.6 * 1600 / 60)
    assert found["MAE, 1600 epochs", "Hours"].differs == ("machine: a GPU, not the paper's",)
    hours = shown(paper_table("moca:4", results))["Hours: efficiency/moca@v1 · noise on a GPU"]
    assert set(hours) == {"MAE, 1600 epochs", "MOCA, 200 epochs"}  # of `other` nobody knows how many epochs


def test_costs_have_a_difference_only_where_the_work_is_the_papers():
    def cost(**changes: Any) -> Record:
        scores = {"epoch_minutes": Score(value=6.0, n=5, std=0.6, ddof=1)}
        plain = {
            "model": "MAE", "protocol": "efficiency", "recipe": "moca", "dataset": "noise on a GPU", "scores": scores,
            "main_metric": "epoch_minutes", "checkpoint": opened("recipe"), "device": "cuda",
            "resolved_recipe": {"processes": 8}, "details": {"processes": 8},
        }  # fmt: skip
        return record_of(**plain | changes)

    def one(**changes: Any) -> Any:
        return comparisons("moca:4", results_of(cost(**changes)))[0]

    assert one().comparable
    assert not one(details={"processes": 1}).comparable
    assert one(details={"processes": 1}).differs == ("machine: a GPU, not the paper's", "processes: 1, not 8")
    assert not one(device="cpu").comparable
    assert not one(recipe="toy").comparable
    assert not one(overrides={"steps": 3}).comparable
    assert differences("moca:4", results_of(cost(device="cpu")))["difference"].isna().all()


# Data ----------------------------------------------------------------------------------------------------------------


def test_complete_counts_are_those_of_data_check():
    assert set(complete.COMPLETE) >= set(DATASETS)
    for name, images in complete.COMPLETE.items():
        known = complete_counts(name)
        assert known is not None
        assert {split: count for split, count in known.items() if split != "classes"} == images, name
    measures = [each for table in module_tables() for column in table.columns for each in standing._measures(column)]
    assert {each.dataset for each in measures} - set(complete.COMPLETE) == {"", "davis-2017"}  # which counts frames
    for folder, name in complete._USUAL_FOLDERS.items():
        assert folder in DATASETS[name].folders


def module_tables() -> list[Table]:
    """The papers' own."""
    from importlib import import_module

    names = ("moca", "mmc", "tec", "extrema", "sdae")
    return [each for name in names for each in import_module(f"ssl_bench.leaderboards.papers.{name}").TABLES.values()]


def with_images(dataset: str, train: int, val: int, *, read: tuple[str, ...] = ("train", "val")) -> Record:
    there = {"train": train, "val": val}
    counts = SampleCounts(original=there, evaluated={name: n if name in read else 0 for name, n in there.items()})
    return lowshot(50, 60, dataset=dataset, n_samples=counts)


WHOLE = (1_281_167, 50_000)


@pytest.mark.parametrize(
    ("record", "differs"),
    [
        (with_images("imagenet", *WHOLE), ()),
        (with_images("ILSVRC2012", *WHOLE), ()),  # whatever the folder is called
        (with_images("imagenet", 200, 60), ("images: 200 of 1,281,167 in train", "images: 60 of 50,000 in val")),
        (with_images("imagenet", 200, 50_000), ("images: 200 of 1,281,167 in train",)),
        (with_images("imagenet", 0, 50_000, read=("val",)), ()),  # the other split is not needed
        (with_images("ILSVRC2012", 0, 50_000, read=("val",)), ()),
        (with_images("ILSVRC2012", 200, 60), ("dataset: ILSVRC2012, not imagenet",)),
        (with_images("ILSVRC2012", 0, 0, read=()), ("dataset: ILSVRC2012, not imagenet",)),
        (with_images("imagenet-100", *WHOLE), ("dataset: imagenet-100, not imagenet",)),
    ],
)
def test_data_are_known_by_what_they_hold(record, differs):
    (found, _) = comparisons("moca:1", results_of(record))
    assert found.differs == differs
    assert found.comparable == (not differs)


def test_two_datasets_of_equal_counts_are_told_apart_by_their_usual_folders():
    def said(folder: str, dataset: str) -> list[str]:
        return complete.other_data(knn(1, dataset=folder, n_samples=counts("cifar10")), dataset)

    assert said("cifar-10-batches-bin", "cifar10") == []
    assert said("cifar-100-binary", "cifar100") == []
    assert said("cifar-100-binary", "cifar10") == ["dataset: cifar-100-binary, not cifar10"]
    assert said("cifar100", "cifar10") == ["dataset: cifar100, not cifar10"]
    assert said("mine", "cifar10") == ["dataset: mine, not cifar10"]


# Differences ---------------------------------------------------------------------------------------------------------


def test_the_difference_to_the_papers_number():
    (first, second) = comparisons("moca:1", results_of(lowshot(50, 60.5)))
    assert (first.table, first.row, first.column, first.metric) == (
        "moca:1",
        "MOCA, 200 epochs",
        "1 image",
        "top1_1shot",
    )
    assert (first.cell.value, first.measured, first.uncertainty, first.differs) == (55.4, 50, 0.5, ())
    assert first.difference == pytest.approx(-5.4)
    assert second.difference == pytest.approx(-9.4)
    assert first.comparable


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"dataset": "toy"}, ["dataset: toy, not imagenet"]),
        ({"arch": "vit_small_patch16_224"}, ["architecture: ViT-S/16, not ViT-B/16"]),
        (made("moca", 4, data="toy"), ["epochs: 4, not 200", "pre-trained on: toy, not imagenet"]),
        ({"recipe": "msn"}, ["recipe: lowshot/msn, not lowshot/moca"]),
        (
            {"recipe": "ibot", "selected_on": "test"},
            ["recipe: lowshot/ibot, not lowshot/moca", "selected on: test, as the paper may not"],
        ),
        ({"selected_on": "test"}, []),  # the paper's own recipe
        ({"overrides": {"splits": 5}, "resolved_recipe": {"splits": 5}}, ["splits: 5, not the recipe's own"]),
        ({"dtype": "bf16"}, ["dtype: bf16, not fp32"]),
        ({"checkpoint_key": "student", "checkpoint_key_given": True}, ["network: student, as asked for"]),
        ({"arch_overrides": {"heads": "6"}}, ["opened with: heads=6"]),
        ({"subset": {"val_list": "few.txt 0a1b"}}, ["images: val_list=few.txt 0a1b"]),
        ({"subset": {"1shot": "msn's list"}}, []),  # what the protocol itself reads
        ({"skip_broken": True, "skipped_broken": {"val": 2}}, ["images: 2 broken ones left out"]),
        ({"seed": 3}, []),
    ],
)
def test_what_differs_is_said(changes, differs):
    assert list(comparisons("moca:1", results_of(lowshot(50, 60, **changes)))[0].differs) == differs


def test_an_older_version_is_said():
    found = comparisons("moca:1", results_of(lowshot(50, 60), lowshot(51, 61, version=2)))
    assert [each.differs for each in found[:2]] == [("version: 1, older than 2",), ()]


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"resolved_recipe": {"neighbors": [5, 10]}, "overrides": {"neighbors": [5, 10]}}, ()),
        ({"resolved_recipe": {"neighbors": [20]}}, ("neighbors: 20, not 5,10",)),
    ],
)
def test_settings_that_no_recipe_has_are_part_of_the_papers_way(changes, differs):
    (found,) = comparisons("moca:5", results_of(knn(1, model="MOCA", recipe="dino", **changes)))
    assert found.differs == differs


def test_values_as_they_are_typed():
    values = [1_281_167, 0.0123456789, 5.0, True, None, (5, 10), [0.65, 0.65], "5,10"]
    typed = ["1281167", "0.0123456789", "5", "true", "none", "5,10", "0.65,0.65", "5,10"]
    assert [standing.as_typed(value) for value in values] == typed


def test_a_number_that_is_not_ours_to_measure_is_compared_with_a_word():
    (found,) = comparisons(
        "moca:5", results_of(knn(1, model="DToP", recipe="dino", resolved_recipe={"neighbors": [5, 10]}))
    )
    assert found.differs == ("how: two networks",)
    assert "Clicks: not measured here: people have to click." in paper_table("moca:5", results_of()).attrs["notes"]


def test_numbers_of_different_data_have_no_difference():
    frame = differences("moca:1", results_of(lowshot(50, 60), lowshot(20, 30, dataset="toy")))
    assert list(frame.columns) == ["row", "column", "published", "measured", "difference", "run", "differs"]
    assert frame["measured"].tolist() == [50, 20, 60, 30]
    assert frame["difference"].tolist()[::2] == pytest.approx([-5.4, -9.9])
    assert frame["difference"].isna().tolist() == [False, True, False, True]
    assert frame["differs"].tolist()[:2] == ["nothing that is known", "dataset: toy, not imagenet"]
    assert frame["run"].tolist()[0] == f"MOCA · {OURS}"
    assert "No difference is given between numbers of different data, or costs of other work." in frame.attrs["notes"]
    assert "| 55.4 ± 0.4 | 50.0 ± 0.5 (n=3, ddof=1) | -5.4 |" in render(frame, "md")


def test_without_anything_to_compare():
    frame = differences("moca:1", results_of(lowshot(50, 60, model="x", checkpoint=opened("timm"))))
    assert len(frame) == 0
    assert "No run stands on a line of moca:1: see `ssl-bench leaderboard moca:1`." in frame.attrs["notes"]
    for format in FORMATS:
        assert render(frame, format)


# Rendering -----------------------------------------------------------------------------------------------------------


def test_published_numbers_are_shown_as_they_were_printed():
    text = render(paper_table("moca:1", results_of(lowshot(50, 60))), "md")
    assert "| MAE, 1600 epochs | 8.2 ± 0.3 | - | 40.25 ± 0.20 | - |" in text
    assert "| MOCA, 200 epochs | 55.4 ± 0.4 | 50.0 ± 0.5 (n=3, ddof=1) | 69.90 ± 0.10 |" in text
    assert "| 11.23 | 38 |" in render(paper_table("moca:4", results_of()), "md")


def test_csv_has_the_papers_spread_in_a_column_of_its_own():
    rows = list(csv.DictReader(io.StringIO(render(paper_table("moca:1", results_of(lowshot(50, 60))), "csv"))))
    assert [row["1 image std"] for row in rows] == ["0.3", "0.3", "0.4"]
    assert [row[f"1 image: {OURS}"] for row in rows] == ["", "", "50.0"]
    assert rows[2][f"1 image: {OURS} std"] == "0.5"


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_renders(format):
    results = results_of(lowshot(50, 60), lowshot(20, 30, dataset="toy", model="x"))
    assert render(paper_table("moca:1", results), format)
    assert render(differences("moca:1", results), format)


# In Python and on the command line -----------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


def test_in_python():
    results = results_of(lowshot(50, 60))
    pandas.testing.assert_frame_equal(ssl_bench.leaderboard("moca:1", results), paper_table("moca:1", results))
    assert ssl_bench.leaderboard("moca:1", results, diff=True)["measured"].tolist() == [50, 60]
    assert ssl_bench.leaderboard(results).columns.tolist() == [f"{OURS} · top1_1shot"]
    write_record(lowshot(50, 60))
    assert ssl_bench.leaderboard().shape == (1, 1)
    assert ssl_bench.leaderboard("moca:1").shape == (3, 4)
    assert ssl_bench.published("moca", 1)["value"].tolist() == [8.2, 40.25, 41.8, 55.4, 69.9]
    with pytest.raises(UserError, match="expected a paper's table first"):
        ssl_bench.leaderboard(results, diff=True)


def test_the_command(call):
    write_record(lowshot(50, 60))
    write_record(lowshot(20, 30, dataset="toy", model="moca-toy", checkpoint=opened("ssl-bench")))
    code, out, _ = call("leaderboard", "moca:1", "--format", "csv")
    rows = {row["moca:1"]: row for row in csv.DictReader(io.StringIO(out))}
    assert (code, set(rows)) == (0, {"MAE, 1600 epochs", "DINO, 400 epochs", "MOCA, 200 epochs", "moca-toy"})
    assert rows["moca-toy"]["1 image: lowshot/moca@v1 · toy"] == "20.0"
    document = json.loads(call("leaderboard", "moca:1", "--json")[1])
    assert (document["table"], document["title"]) == ("moca:1", "few labels")
    assert document["leaderboard"][2]["row"] == "MOCA, 200 epochs"
    assert document["leaderboard"][2][f"1 image: {OURS}"]["value"] == 50
    assert document["measured"][f"5 images: {OURS}"] == "5 images"
    only = call("leaderboard", "moca:1", "--dataset", "toy", "--protocol", "lowshot", "--format", "md")[1]
    assert "· imagenet" not in only
    assert "· toy" in only


def test_the_command_with_differences(call):
    write_record(lowshot(50, 60))
    write_record(lowshot(20, 30, dataset="toy"))
    code, out, _ = call("leaderboard", "moca:1", "--diff", "--format", "md")
    assert code == 0
    assert "| -5.4 | MOCA · lowshot/moca@v1 · imagenet | nothing that is known |" in out
    found = json.loads(call("leaderboard", "moca:1", "--diff", "--json")[1])["differences"]
    assert [each["difference"] for each in found[:2]] == [pytest.approx(-5.4), None]
    assert found[1]["differs"] == ["dataset: toy, not imagenet"]


def test_differences_on_a_terminal(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_record(lowshot(50, 60, dtype="bf16"))
    out = call("leaderboard", "moca:1", "--diff")[1]
    assert all(word in out for word in ("paper", "ours", "diff", "-5.4"))
    assert "1, 2: MOCA · lowshot/moca@v1 [bf16] · imagenet: dtype: bf16, not fp32." in " ".join(out.split())
    document = json.loads(call("leaderboard", "moca:1", "--json")[1])["leaderboard"][2]
    assert document["1 image: lowshot/moca@v1 [bf16] · imagenet"]["weights_sha256"] == "ab" * 32
    assert "weights_sha256" not in document["1 image"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["moca:11"], ["unknown table 'moca:11'", "did you mean 'moca:1'"]),
        (["moca"], ["expected PAPER:TABLE", "moca:{1,2,3,4,5}"]),
        (["--diff"], ["--diff: expected a paper's table"]),
        (["moca:1", "--format", "xyz"], ["unknown format 'xyz'"]),
        (["moca:1", "--dataset", "toi"], ["unknown dataset 'toi'", "did you mean 'toy'"]),
    ],
)
def test_the_command_refuses(arguments, expected, call):
    write_record(lowshot(20, 30, dataset="toy"))
    code, out, errors = call("leaderboard", *arguments)
    assert (code, out) == (2, "")
    for part in expected:
        assert part in errors


# The papers' own tables ----------------------------------------------------------------------------------------------


def every_run_of(name: str) -> tuple[list[Record], set[tuple[str, str, float]]]:
    """The records that would have the paper's own numbers, and what must be found of them."""
    runs: dict[tuple[str, str], tuple[Measure, str, dict[str, Score]]] = {}
    wanted = set()
    paper, _, number = name.partition(":")
    for row in tables.rows(paper, number):
        for column in tables.find(name).columns:
            cell = row.cells.get(column.name)
            measure = column.measure_of(cell) if cell else ""
            if cell and isinstance(measure, Measure):
                run = (row.label, f"{measure.recipe} {measure.dataset} {measure.settings}")
                scores = runs.setdefault(run, (measure, cell.arch, {}))[2]
                value = cell.value / measure.scale
                # One epoch's minutes are printed as hours of all epochs, too: rounded, so not quite the same.
                score = scores.setdefault(measure.metric, Score(value=value, n=9))
                wanted.add((row.label, column.name, round(score.value * measure.scale, 9)))
    records = [
        record_of(
            arch=origins.our_arch(arch) or origins.our_arch(f"{arch}/16") or "any",
            model=label, checkpoint=opened("ssl-bench"), scores=scores,
            main_metric=next(iter(scores)), dataset=measure.dataset or "noise on a GPU",
            protocol=measure.recipe.partition("/")[0], recipe=measure.recipe.partition("/")[2],
            overrides=dict(measure.settings), resolved_recipe=dict(measure.settings),
        )
        for (label, _), (measure, arch, scores) in runs.items()
    ]  # fmt: skip
    return records, wanted


def test_every_number_of_the_papers_is_found_by_the_run_that_measures_it(monkeypatch):
    monkeypatch.undo()
    published.cells.cache_clear()
    assert len(tables.tables()) > 50
    for name in tables.tables():
        records, wanted = every_run_of(name)
        found = comparisons(name, results_of(*records))
        assert {(each.row, each.column, round(each.measured, 9)) for each in found} == wanted, name
        assert {text for each in found for text in each.differs} <= {"machine: a GPU, not the paper's"}, name
        assert list(paper_table(name, results_of(*records)).index) == [row.label for row in standing.lines_of(name)], (
            name
        )
