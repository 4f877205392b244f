"""The plan of a table says what is there and what is missing; what is to be run is run once, under the right name."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_backbone
from test_record import make_record
from test_run import in_process

from ssl_bench import estimating, listing, machine, reproducing, running
from ssl_bench.errors import UserError
from ssl_bench.evaluate import builtin_data
from ssl_bench.evaluate.datasets import DATASETS, complete_counts, open_dataset
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.leaderboards import published, tables
from ssl_bench.leaderboards.record import FeaturesUsed, SampleCounts, write_record
from ssl_bench.leaderboards.store import load_results
from ssl_bench.leaderboards.tables import Column, Measure, Pretraining, Table
from ssl_bench.reproducing import DONE, TO_RUN, Need, Options

CELLS = """\
paper,table,method,arch,pretrain_data,epochs,multicrop,setting,dataset,metric,value,std,unit,note
moca,1,MAE,ViT-B/16,imagenet,1600,,,imagenet,knn_top1,8.2,,percent,
moca,1,MAE,ViT-B/16,imagenet,1600,,,cifar10,knn_top1,9.2,,percent,
moca,1,MOCA,ViT-S/16,imagenet,200,,,imagenet,knn_top1,50.4,,percent,
moca,1,MOCA,ViT-B/16,imagenet,200,,,imagenet,knn_top1,55.4,,percent,
moca,1,MOCA,ViT-B/16,imagenet,200,,,imagenet,knn_top5,65.4,,percent,
moca,1,MOCA,ViT-B/16,imagenet,200,,,imagenet,knn_patch,66.4,,percent,
moca,1,MOCA,ViT-B/16,imagenet,200,,,coco,clicks,3,,images,
moca,2,MOCA,ViT-B/16,imagenet,200,,depth=2,imagenet,epoch_minutes,11,,minutes,
moca,2,MOCA,ViT-B/16,imagenet,200,,depth=4,imagenet,epoch_minutes,12,,minutes,
moca,2,MOCA,ViT-B/16,imagenet,200,,depth=8,imagenet,epoch_minutes,13,,minutes,
moca,2,DINO,ViT-B/16,imagenet,400,,,imagenet,epoch_minutes,14,,minutes,
moca,3,MMC,,imagenet,,,token=cls,pets,knn_top1,1,,percent,
moca,3,MMC,,imagenet,,,token=patch,pets,knn_top1,2,,percent,
moca,4,TEC,,imagenet,,,base=MAE,pets,knn_top1,1,,percent,
moca,4,TEC,,imagenet,,,base=iBOT,pets,knn_top1,2,,percent,
moca,4,Random,,,,,,pets,knn_top1,2,,percent,
"""
SMALL = {"neighbors": (3, 5), "resize_px": 16, "crop_px": 16}
MINUTES = Measure("efficiency/toy", "", "epoch_minutes", of="pretraining")
ON_IMAGENET = Measure("knn/dino", "imagenet", "top1", SMALL)
PETS = Column("k-NN", {"metric": "knn_top1"}, Measure("knn/dino", "pets", "top1"))
TABLES = {
    "1": Table(
        "k-NN",
        (
            Column("top1", {"metric": "knn_top1", "dataset": "imagenet"}, ON_IMAGENET),
            Column("top5", {"metric": "knn_top5"}, Measure("knn/dino", "imagenet", "top5", SMALL)),
            Column("patch", {"metric": "knn_patch"}, Measure("knn/moca-paper", "imagenet", "top1", SMALL, note="open")),
            Column("CIFAR", {"dataset": "cifar10"}, Measure("knn/dino", "cifar10", "top1")),
            Column("clicks", {"metric": "clicks"}, "people have to click"),
        ),
        (Pretraining({"method": "MOCA", "arch": "ViT-B/16"}, "moca/paper"),),
    ),
    "2": Table(
        "time",
        (Column("Minutes", {"metric": "epoch_minutes"}, MINUTES),),
        (
            Pretraining({"depth": "2"}, "moca/ablation"),
            Pretraining({"depth": "4"}, "moca/ablation", settings={"decoder_depth": 4, "mask_ratios": (0.65, 0.65)}),
            Pretraining({"depth": "8"}, "moca/table2-depth8"),
        ),
    ),
    "3": Table("ways", (Column("k-NN", {"metric": "knn_top1"}, Measure("knn/mmc-cls", "pets", "top1")),),
               (Pretraining({"method": "MMC"}, "mmc/vit-b", note="ours"),)),
    "4": Table("bases", (PETS,), (Pretraining({"base": "MAE"}, "tec/mae-b"), Pretraining({"base": "iBOT"}, "tec/x"))),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "moca.csv").write_text(CELLS)
    monkeypatch.setattr(published, "_FOLDER", tmp_path)
    published.cells.cache_clear()
    monkeypatch.setattr(tables, "of_paper", {"moca": TABLES}.__getitem__)
    monkeypatch.setattr(tables, "PAPERS", ["moca"])
    monkeypatch.setattr(tables, "tables", lambda: {f"moca:{number}": table for number, table in TABLES.items()})
    quick = replace(DATASETS["toy"], built_in=lambda: replace(builtin_data.open_digits(), name="toy"))
    monkeypatch.setitem(DATASETS, "toy", quick)
    monkeypatch.setattr(estimating, "images_per_second", lambda arch, device, dtype: 100.0 if arch else None)
    yield
    published.cells.cache_clear()


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    return tmp_path / "tiny.pt"


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, list[str], running.Options]]:
    """What would have been run."""
    made: list[Any] = []
    monkeypatch.setattr(
        running, "run", lambda ckpt, names, options: made.append((str(ckpt), list(names), options)) or []
    )
    return made


def planned(table: str, *ckpt: str, **options: Any) -> dict[tuple[str, tuple[str, ...]], Need]:
    return {(need.row, need.columns): need for need in reproducing.plan(table, ckpt, Options(**options))}


BASE_LINE = "MOCA, ViT-B/16, 200 epochs"


@pytest.fixture
def labels() -> list[str]:
    return [row.label for row in tables.rows("moca", "1")]


# The plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_without_any_checkpoint_says_what_to_give_and_where_data_is_expected(tmp_path):
    needs = reproducing.plan("moca:1", [], Options(), dry_run=True)
    assert [(need.row.partition(",")[0], need.columns, need.recipe, need.dataset, need.state) for need in needs] == [
        ("MAE", ("top1",), "knn/dino", "imagenet", "no checkpoint, no dataset"),
        ("MAE", ("CIFAR",), "knn/dino", "cifar10", "no checkpoint, no dataset"),
        ("MOCA", ("top1",), "knn/dino", "imagenet", "no checkpoint, no dataset"),
        ("MOCA", ("top1", "top5"), "knn/dino", "imagenet", "no checkpoint, no dataset"),
        ("MOCA", ("patch",), "knn/moca-paper", "imagenet", "no checkpoint, no dataset"),
        ("MOCA", ("clicks",), "", "", "cannot be measured"),
    ]
    data = tmp_path / "no-data"
    imagenet = f"imagenet is not here: expected in {data / 'imagenet'} (SSL_BENCH_DATA), or --dataset imagenet=PATH"
    assert needs[0].why == ("MAE: --ckpt MAE=SPEC", imagenet)
    assert f"{data / 'cifar10'} or {data / 'cifar-10-batches-bin'}" in needs[1].why[1]
    label = needs[3].row
    train = "ssl-bench pretrain moca --data imagenet --recipe paper --out runs/moca-paper"
    assert needs[3].why[0] == f"{label}: --ckpt '{label}=SPEC'; to train one: {train}"
    assert needs[2].why[0] == f"{needs[2].row}: --ckpt '{needs[2].row}=SPEC'"  # no recipe of ours trains the ViT-S
    assert needs[5].why == ("people have to click",)
    assert needs[4].settings == {"neighbors": "3,5", "resize_px": "16", "crop_px": "16"}
    assert needs[4].note == "open"


def test_lines_that_one_pretraining_serves_are_given_together():
    first, second = planned("moca:3").values()
    train = "ssl-bench pretrain mmc --data imagenet --recipe vit-b --out runs/mmc-vit-b"
    assert first.why[0] == second.why[0] == f"MMC: --ckpt MMC=SPEC; to train one (ours): {train}"
    first, second, never_trained = planned("moca:4").values()
    assert first.why[0].startswith("TEC, base=MAE: --ckpt 'TEC, base=MAE=SPEC'; to train one: ssl-bench pretrain tec")
    assert second.why[0].startswith("TEC, base=iBOT: ")
    assert never_trained.why[0] == "Random: --ckpt Random=random:vit_base_patch16_224"


def test_a_dataset_that_is_here_or_given_is_no_obstacle(tmp_path, tiny, image_folder):
    def states(**options: Any) -> dict[str, str]:
        needs = planned("moca:1", f"MOCA={tiny}", **options)
        return {
            f"{need.dataset}": need.state for (row, _), need in needs.items() if row.startswith("MOCA") and need.recipe
        }

    assert states() == {"imagenet": "no dataset"}
    folder = str(image_folder())
    assert states(datasets={"imagenet": folder}) == {folder: TO_RUN}
    assert states(datasets={"imagenet": "toy"}) == {"toy": TO_RUN}
    assert states(datasets={"imagenet": "/nowhere"}) == {"/nowhere": "no dataset"}
    image_folder(name="no-data/imagenet")
    assert states() == {"imagenet": TO_RUN}
    with pytest.raises(UserError, match=r"unknown dataset of moca:1 'imagnet'; did you mean 'imagenet'"):
        states(datasets={"imagnet": "toy"})


@pytest.mark.parametrize(
    ("dataset", "why"),
    [("toy-coco", "toy-coco is a dataset of boxes"), ("empty", "is empty"), ("file.zip", "is a file")],
)
def test_data_that_cannot_be_read_are_no_data(dataset, why, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.zip").touch()
    need = planned("moca:1", f"MOCA={tiny}", datasets={"imagenet": dataset})[BASE_LINE, ("patch",)]
    assert need.state == "no such data"
    assert why in need.why[0]


def test_results_that_cannot_be_written_are_known_before_anything_is_run(tiny, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_RESULTS", "/proc/foo")
    planned("moca:1", f"MOCA={tiny}")  # nothing can be run
    with pytest.raises(UserError, match="cannot write /proc/foo"):
        planned("moca:1", f"MOCA={tiny}", datasets={"imagenet": "toy"})


def test_part_of_a_dataset_may_be_taken_from_the_whole(tmp_path):
    assert reproducing.known_here("imagenet-100")[0] is False
    (tmp_path / "no-data" / "imagenet").mkdir(parents=True)
    assert reproducing.known_here("imagenet-100")[0] is True
    assert reproducing.known_here("toy")[0] is True


def test_a_name_serves_all_its_lines_unless_the_architecture_tells_them_apart(tiny, labels):
    def given(*ckpt: str) -> dict[str, str]:
        needs = reproducing.plan("moca:1", ckpt, Options(datasets={"imagenet": "toy"}))
        return {need.row: need.model for need in needs if need.spec}

    mae, small, base = labels
    assert given(f"moca={tiny}") == {small: "MOCA", base: "MOCA"}  # a network that fits none of them
    assert given("MOCA=random:vit_small_patch16_224") == {small: "MOCA"}
    assert given("MOCA=random:vit_base_patch16_224", "MOCA=random:vit_small_patch16_224") == {
        base: "MOCA",
        small: "MOCA",
    }
    assert given(f"{base.upper()}={tiny}", f"mae = {tiny}") == {base: base, mae: "MAE"}


def test_a_label_may_hold_equal_signs(tiny):
    given = [need.spec for need in reproducing.plan("moca:3", [f"MMC, token=patch={tiny}"], Options())]
    assert given == ["", str(tiny)]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["MOCHA=x.pth"], r"unknown line of moca:1 'MOCHA'; did you mean 'MOCA'"),
        (["x.pth"], r"--ckpt x.pth: expected NAME=SPEC .* MAE=x.pth"),
        (["MOCA="], r"--ckpt MOCA=: expected NAME=SPEC"),
        (["MAE=/nowhere/x.pth"], r"/nowhere/x.pth"),
        (["MAE=recipe:mae/paper"], r"a recipe|what recipes cost"),
        (["MAE=random:vit_base_patch16_224", "MAE=pixels:"], r"random:.* and pixels: are both for the line 'MAE"),
    ],
)
def test_a_checkpoint_that_cannot_be_meant(texts, message):
    with pytest.raises(UserError, match=message):
        reproducing.plan("moca:1", texts, Options())


def test_a_plan_downloads_nothing(monkeypatch):
    from ssl_bench.evaluate import hub

    monkeypatch.setattr(hub, "timm_model", lambda *_, **__: pytest.fail("downloaded"))
    needs = reproducing.plan("moca:1", ["MAE=timm:vit_base_patch16_224.mae"], Options(), dry_run=True)
    assert (needs[0].spec, needs[0].state) == ("timm:vit_base_patch16_224.mae", "no dataset")


@pytest.mark.parametrize("name", ["nonsense", "vit_base_patch16_224.nonsense"])
def test_a_plan_knows_what_timm_has(name):
    with pytest.raises(UserError, match=f"unknown timm model '{name}'"):
        reproducing.plan("moca:1", [f"MAE=timm:{name}"], Options(), dry_run=True)


def test_commands_that_train_name_the_data_and_the_base_as_they_are_here(monkeypatch):
    training = (
        Pretraining({"base": "MAE"}, "tec/mae-b", base="Random"),  # the name of a line that is trained, too
        Pretraining({"base": "iBOT"}, "tec/x", base="iBOT, 1600 epochs", note="ours"),
        Pretraining({"method": "Random"}, "mae/paper"),
    )
    monkeypatch.setitem(TABLES, "4", Table("bases", (PETS,), training))
    first, second, _ = planned("moca:4").values()
    assert "; to train one: ssl-bench pretrain tec --data imagenet --recipe mae-b --base runs/mae-paper" in first.why[0]
    said = (
        "; to train one (ours; SPEC: iBOT, 1600 epochs): ssl-bench pretrain tec --data imagenet --recipe x --base SPEC"
    )
    assert said in second.why[0]
    why = planned("moca:1", datasets={"imagenet": "/my data"})[BASE_LINE, ("top1", "top5")].why[0]
    assert "ssl-bench pretrain moca --data '/my data' --recipe paper --out runs/moca-paper" in why


def test_what_pretraining_costs_needs_no_checkpoint():
    needs = list(planned("moca:2", device="cpu").values())
    assert [need.spec for need in needs] == [
        "recipe:moca/ablation",
        "recipe:moca/ablation,decoder_depth=4,mask_ratios=0.65,0.65",
        "recipe:moca/table2-depth8",
        "",
    ]
    assert [need.model for need in needs[:3]] == ["moca-ablation", "MOCA, 200 epochs, depth=4", "moca-table2-depth8"]
    assert [need.state for need in needs] == [TO_RUN, TO_RUN, TO_RUN, "cannot be measured"]
    assert needs[3].why == ("DINO is not pre-trained here, so what it costs cannot be measured",)


def test_published_costs_want_a_gpu(monkeypatch):
    column = Column(
        "Minutes", {"metric": "epoch_minutes"}, Measure("efficiency/moca", "", "epoch_minutes", of="pretraining")
    )
    monkeypatch.setitem(TABLES, "2", Table("time", (column,), TABLES["2"].pretraining))
    first = next(iter(planned("moca:2", device="cpu").values()))
    assert first.state == "no GPU"
    assert "times steps of 256 images" in first.why[0]
    assert first.why[0].endswith("ssl-bench run --protocol efficiency --ckpt recipe:moca/ablation")


# Running -------------------------------------------------------------------------------------------------------------


def test_one_run_serves_the_recipes_of_a_checkpoint_on_a_dataset(tiny, calls):
    options = Options({"imagenet": "toy", "cifar10": "digits"}, "cpu", "bf16", batch_size=7, workers=0)
    needs = reproducing.plan("moca:1", [f"MOCA={tiny}", "MAE=pixels:"], options)
    assert reproducing.run(needs, options) == {}
    assert [(ckpt, names, made.dataset, made.name) for ckpt, names, made in calls] == [
        ("pixels:", ["knn/dino"], "toy", "MAE"),
        ("pixels:", ["knn/dino"], "digits", "MAE"),
        (str(tiny), ["knn/dino", "knn/moca-paper"], "toy", "MOCA"),  # both lines of MOCA at once
    ]
    made = calls[2][2]
    assert made.settings == {"neighbors": "3,5", "resize_px": "16", "crop_px": "16"}
    assert (made.device, made.dtype, made.batch_size, made.workers) == ("cpu", "bf16", 7, 0)
    assert calls[1][2].settings == {}


def test_a_failure_stops_neither_the_others_nor_its_neighbors(tiny, monkeypatch, capsys):
    tried = []

    def run(ckpt: str, names: list[str], options: running.Options) -> list[Any]:
        tried.append((options.name, *names))
        if "knn/dino" in names and options.name == "MOCA":
            raise UserError("too small")
        if options.dataset == "digits":
            raise RuntimeError("boom")
        return []

    monkeypatch.setattr(running, "run", run)
    options = Options({"imagenet": "toy", "cifar10": "digits"})
    failures = reproducing.run(reproducing.plan("moca:1", [f"MOCA={tiny}", "MAE=pixels:"], options), options)
    assert failures == {"MOCA: knn/dino on toy": "too small", "MAE: knn/dino on digits": "RuntimeError: boom"}
    assert tried == [
        ("MAE", "knn/dino"),
        ("MAE", "knn/dino"),
        ("MOCA", "knn/dino", "knn/moca-paper"),
        ("MOCA", "knn/dino"),
        ("MOCA", "knn/moca-paper"),
    ]
    assert "Traceback" in capsys.readouterr().err


def test_costs_are_run_under_the_recipes_name(calls):
    reproducing.run(reproducing.plan("moca:2", [], Options(batch_size=4)), Options(batch_size=4))
    ckpt, names, made = calls[0]
    assert (ckpt, names, made.name, made.dataset) == ("recipe:moca/ablation", ["efficiency/toy"], "moca-ablation", None)
    assert made.batch_size is None  # which efficiency refuses
    assert len(calls) == 3


# The command ---------------------------------------------------------------------------------------------------------


def test_from_the_plan_to_the_table_and_again(call, tiny, image_folder, calls_through):
    data = ["--dataset", f"imagenet={image_folder(name='imagenet')}", "--workers", "0"]
    label = next(row.label for row in tables.rows("moca", "1") if "ViT-B/16" in row.label and "MOCA" in row.label)
    ckpt = ["--ckpt", f"{label}={tiny}"]
    plan = json.loads(call("reproduce", "moca:1", *ckpt, *data, "--dry-run", "--json")[1])
    assert plan["title"] == "k-NN"
    assert [each["state"] for each in plan["plan"] if each["spec"]] == [TO_RUN, TO_RUN]
    assert load_results().records == ()
    code, out, _ = call("reproduce", "moca:1", *ckpt, *data, "--format", "csv")
    assert code == 0
    (line,) = [row for row in csv.DictReader(io.StringIO(out)) if row["moca:1"] == label]
    records = {record.recipe: record for record in load_results()}
    heading = "patch: knn/moca-paper@v1 [crop_px=16, neighbors=[3,5], resize_px=16] · imagenet"
    assert float(line[heading]) == records["moca-paper"].scores["top1"].value
    assert {record.model for record in records.values()} == {label}
    assert len(calls_through) == 1
    document = json.loads(call("reproduce", "moca:1", *ckpt, *data, "--json")[1])
    assert [each["state"] for each in document["plan"] if each["spec"]] == [DONE, DONE]
    assert len(calls_through) == 1
    assert document["failed"] == []
    assert len(document["leaderboard"]) == 3
    save_checkpoint(tiny, tiny_backbone(seed=1))  # other weights in the same file
    plan = json.loads(call("reproduce", "moca:1", *ckpt, *data, "--dry-run", "--json")[1])
    assert [each["state"] for each in plan["plan"] if each["spec"]] == [TO_RUN, TO_RUN]


@pytest.fixture
def calls_through(monkeypatch) -> list[list[str]]:
    """The runs that were made, and they were made."""
    made, run = [], running.run
    monkeypatch.setattr(running, "run", lambda ckpt, names, options: (made.append(names), run(ckpt, names, options))[1])
    return made


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 4},
        {"seed": 1},
        {"dtype": "bf16"},
        {"version": 9},
        {
            "resolved_recipe": {"neighbors": [3, 5], "resize_px": 16, "crop_px": 16, "norm": True},
            "overrides": SMALL | {"norm": True},
        },
        {"dataset_manifest_sha256": {"train": "c" * 64, "val": "d" * 64}},  # other images under the same name
        {"dataset": "digits"},
        {"model": "MOCA"},
        {"recipe": "moca-paper"},
        {"subset": {"train_list": "few.txt 0a1b"}},
        {"subset": {"val_list": "few.txt 0a1b"}},
        {"subset": {"class_list": "few.txt 0a1b"}},
        {"skip_broken": True},
        {"arch_overrides": {"heads": "2"}},
        {"checkpoint_key_given": True},
        {"weights_sha256": "12" * 32},
    ],
)
def test_another_run_is_not_taken_for_done(change, tiny):
    from ssl_bench.evaluate.checkpoints import open_checkpoint

    manifests = {split.name: split.manifest_sha256 for split in open_dataset("toy").splits.values()}
    plain = {
        "model": "MAE", "dataset": "toy", "dataset_manifest_sha256": manifests, "recipe": "dino",
        "weights_sha256": open_checkpoint(tiny).weights_sha256,
        "resolved_recipe": {"neighbors": [3, 5], "resize_px": 16, "crop_px": 16, "norm": False}, "overrides": SMALL,
    }  # fmt: skip

    def state() -> str:
        return next(iter(planned("moca:1", f"MAE={tiny}", datasets={"imagenet": "toy"}).values())).state

    write_record(make_record(**{**plain, **change}))
    assert state() == TO_RUN
    write_record(make_record(**plain))
    assert state() == DONE


def test_a_failed_run_is_told_and_the_table_printed(call, monkeypatch):
    def run(*_: Any) -> None:
        raise UserError("no such thing")

    monkeypatch.setattr(running, "run", run)
    arguments = ["reproduce", "moca:1", "--ckpt", "MAE=pixels:", "--dataset", "cifar10=digits"]
    code, out, errors = call(*arguments, "--json")
    document = json.loads(out)
    assert code == 2
    assert document["failed"] == [{"run": "MAE: knn/dino on digits", "error": "no such thing"}]
    assert document["leaderboard"][0]["top1"]["value"] == 8.2
    assert "1 failed: MAE: knn/dino on digits: no such thing" in errors


def test_a_dry_run_for_people(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call("reproduce", "moca:1", "--dry-run", "--ckpt", "MAE=pixels:", "--dataset", "cifar10=digits")
    assert code == 0
    for part in ("Missing", "imagenet is not here", "to train one: ssl-bench pretrain moca", "people have to click"):
        assert part in out
    assert "1 to run: > 18 s" in out  # 1438 + 359 digits, 100 a second
    assert "knn/moca-paper (patch): open" in out


def test_a_run_that_serves_two_lines_is_counted_once(call, tiny):
    arguments = ("--dry-run", "--ckpt", f"MOCA={tiny}", "--dataset", "imagenet=toy")
    out = call("reproduce", "moca:1", *arguments)[1]
    assert "2 to run: > 36 s" in out  # k-NN by two recipes of 1797 images each; three needs


def test_nothing_is_timed_for_what_cannot_be_run(monkeypatch):
    monkeypatch.setattr(estimating, "seconds_of", lambda *_: pytest.fail("timed"))
    assert {need.seconds for need in planned("moca:1", "MAE=pixels:").values()} == {None}


def test_time_on_a_path_is_of_what_lies_there(tiny, image_folder):
    folder = str(image_folder(train=6, val=4))
    need = planned("moca:1", f"{BASE_LINE}=random:vit_base_patch16_224", datasets={"imagenet": folder})
    assert need[BASE_LINE, ("patch",)].seconds == pytest.approx(20 / 100)


def test_any_case_of_a_tables_name_will_do(call):
    assert json.loads(call("reproduce", "MOCA:1", "--dry-run", "--json")[1])["table"] == "moca:1"
    assert json.loads(call("leaderboard", "MOCA:1", "--json")[1])["table"] == "moca:1"


def test_with_nothing_to_run_the_command_says_so(call):
    code, _, errors = call("reproduce", "moca:1", "--format", "md")
    assert code == 2
    assert "nothing of moca:1 could be run here: see `ssl-bench reproduce moca:1 --dry-run`" in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["moca:x", "--dry-run"], "unknown table 'moca:x'"),
        (["moca:1", "--dtype", "fp8"], "unknown --dtype 'fp8'"),
        (["moca:1", "--dataset", "imagenet"], "expected key=value, got 'imagenet'"),
        (["moca:1", "--device", "tpu"], "--device tpu: expected auto"),
    ],
)
def test_the_command_refuses(arguments, expected, call):
    code, out, errors = call("reproduce", *arguments)
    assert (code, out) == (2, "")
    assert expected in errors


# Time ----------------------------------------------------------------------------------------------------------------


def work(recipe: str = "knn/dino", dataset: str = "imagenet", **settings: str) -> estimating.Work:
    return estimating.Work(recipe, settings, complete_counts(dataset) or {}, "vit_base_patch16_224", "cpu", "fp32")


def done_here(images: int, took: float, source: str = "extracted", **changes: Any) -> Any:
    features = [FeaturesUsed(key="k", split="val", reading="cls", source=source)]  # type: ignore[arg-type]
    counts = SampleCounts(original={"train": images, "val": 0}, evaluated={"train": images, "val": 0})
    return make_record(
        **{
            "n_samples": counts, "seconds": {"extract": took - 1, "score": 1.0}, "features": features,
            "environment": machine.environment(),
        } | changes
    )  # fmt: skip


def test_time_is_taken_from_the_largest_run_like_it():
    small, large = done_here(10, 5), done_here(1000, 20, seed=1)
    seconds, said = estimating.seconds_of(work(), [small, large])
    assert seconds == pytest.approx(20 / 1000 * 1_281_167)  # val was not read
    assert said == "1,281,167 images; 1,000 took 20 s here"
    same = replace(work(), images={"classes": 10, "train": 10, "val": 0})
    assert estimating.seconds_of(same, [small, large]) == (20 / 1000 * 10, "10 images; 1,000 took 20 s here")
    assert estimating.seconds_of(same, [small]) == (5, "as long as it took here before")
    part = done_here(10, 5, limit=10)
    assert estimating.seconds_of(same, [part])[1] == "10 images; 10 took 5 s here"


def test_opening_takes_no_longer_for_more_images():
    record = done_here(1000, 20, seconds={"open": 7.0, "extract": 19.0, "score": 1.0})
    assert estimating.seconds_of(work(), [record])[0] == pytest.approx(20 / 1000 * 1_281_167 + 7)


def test_of_few_labels_the_labeled_images_are_read():
    """The record's train images are those that it read."""
    counts = SampleCounts(original={"train": 4000, "val": 1000}, evaluated={"train": 200, "val": 1000})
    record = done_here(1, 12, protocol="lowshot", recipe="moca", n_samples=counts)
    seconds, said = estimating.seconds_of(work("lowshot/moca"), [record])
    assert seconds == pytest.approx(12 / 1200 * (3 * (1000 + 2000 + 5000 + 12_811) + 50_000))
    assert said == "112,433 images; 1,200 took 12 s here"


@pytest.mark.parametrize(
    "other",
    [
        done_here(1000, 20, "cache"),
        done_here(1000, 20, arch="vit_small_patch16_224"),
        done_here(1000, 20, dtype="bf16"),
        done_here(1000, 20, device="cuda"),
        done_here(1000, 20, environment={"platform": "another"}),
        done_here(1000, 20, recipe="ibot"),
        done_here(1000, 20, overrides={"norm": True}),
    ],
)
def test_else_from_forward_passes(other):
    seconds, said = estimating.seconds_of(work(), [other])
    assert seconds == pytest.approx((1_281_167 + 50_000) / 100)
    assert said == "at least: 1,331,167 forward passes, 100 a second as timed now"


@pytest.mark.parametrize(
    ("recipe", "settings", "images"),
    [
        ("knn/extrema", {}, 128_116.7 + 50_000),  # a bank of 10 %
        ("lowshot/moca", {}, 3 * (1000 + 2000 + 5000 + 12_811) + 50_000),
        ("linear/moca-paper", {"epochs": "10", "warmup_epochs": "0"}, 10 * 1_281_167 + 50_000),
        ("linear/cached", {}, 1_281_167 + 50_000),
        ("finetune/mae", {}, 3 * 100 * 1_281_167 + 50_000),
        ("finetune/extrema-semi-1", {"epochs": "10"}, 3 * 10 * 12_811.67 + 50_000),
    ],
)
def test_forward_passes(recipe, settings, images):
    assert estimating.seconds_of(work(recipe, **settings), [])[0] == pytest.approx(images / 100)


def test_where_nothing_is_known_the_time_is_not_either():
    assert estimating.seconds_of(work(dataset="my-folder"), []) == (None, "unknown")
    assert estimating.seconds_of(work("davis/dino", "davis-2017"), []) == (None, "unknown")
    nameless = replace(work(), arch="")
    assert estimating.seconds_of(nameless, []) == (None, "unknown")


def test_speed_is_timed(monkeypatch):
    monkeypatch.undo()
    estimating.images_per_second.cache_clear()
    monkeypatch.setattr(estimating, "_TIMED_SECONDS", 0.01)
    assert (estimating.images_per_second("vit_32x2x2_patch8_16", "cpu", "fp32") or 0) > 10
    assert estimating.images_per_second("vit_base_patch16_224_ca2", "cpu", "fp32") is None


# The list ------------------------------------------------------------------------------------------------------------


def test_the_list_says_what_each_table_needs(tmp_path, call, monkeypatch):
    rows = {row["name"]: row for row in listing.tables()}
    assert rows["moca:1"] == {
        "name": "moca:1",
        "title": "k-NN",
        "numbers": 7,
        "runs": ["knn/dino", "knn/moca-paper"],
        "datasets": ["imagenet", "cifar10"],
        "pretraining": ["moca/paper"],
        "here": False,
        "why_not": [
            f"no imagenet in {tmp_path / 'no-data' / 'imagenet'}",
            f"no cifar10 in {tmp_path / 'no-data' / 'cifar10'}",
            "1 of 7: people have to click",
        ],
    }
    assert rows["moca:2"]["here"] is True
    monkeypatch.setattr(listing, "_has_gpu", lambda: False)
    measure = Measure("efficiency/moca", "", "epoch_minutes", of="pretraining")
    column = Column("Minutes", {"metric": "epoch_minutes"}, measure)
    monkeypatch.setitem(TABLES, "2", Table("time", (column,), TABLES["2"].pretraining))
    (row,) = [row for row in listing.tables() if row["name"] == "moca:2"]
    assert (row["here"], row["why_not"]) == (False, ["wants a GPU"])
    monkeypatch.setattr(listing, "_has_gpu", lambda: True)
    (row,) = [row for row in listing.tables() if row["name"] == "moca:2"]
    assert (row["here"], row["why_not"]) == (True, [])
    (tmp_path / "no-data" / "pets").mkdir(parents=True)
    document = json.loads(call("ls", "tables", "--json")[1])
    assert [(row["name"], row["here"]) for row in document["tables"]][2:] == [("moca:3", True), ("moca:4", True)]
    assert "k-NN" in call("ls", "tables")[1]


def test_results_on_a_terminal_are_whole_and_say_what_is_unusual(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_record(make_record(model="moca-of-a-long-name-that-folds", seed=2, overrides={"norm": True}, limit=5))
    out = call("ls", "results")[1]
    (row,) = (listing.result_row(row) for row in listing.results())
    assert row == {
        "name": "moca-of-a-long-name-that-folds/toy/knn/dino@v1",
        "metric": "top1",
        "value": 58.25,
        "unusual": "norm=true, limited, seed 2",
        "started": "2026-01-31 12:00",
    }
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_plan_on_a_terminal_is_whole(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = call("reproduce", "moca:1", "--dry-run")[1]
    assert "…" not in out
    assert "checkpoint ┃" not in out  # none is given


def test_listing_tables_imports_no_torch():
    code = (
        "import sys; from ssl_bench import listing; rows = listing.tables()\n"
        "assert len(rows) > 50 and {row['name'] for row in rows} >= {'moca:8', 'moca:fig3c', 'tec:11e'}\n"
        "assert not {'torch', 'pandas', 'timm'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
