"""What `ssl-bench data check` says of good and of bad datasets."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_run import in_process
from tiny_images import make_synsets, save

from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.datasets import check_dataset
from ssl_bench.evaluate.toy_layouts import LAYOUTS, writer


@pytest.mark.parametrize("decode", [True, False])
def test_check_of_a_good_dataset(tmp_path: Path, decode: bool) -> None:
    make_synsets(tmp_path, images=70)
    Image.new("RGB", (9, 5)).save(tmp_path / "train/n1/n1_0.JPEG")
    (tmp_path / "val/n2/n2_v9.JPEG").unlink()
    calls: list[tuple[int, int]] = []
    report = check_dataset(str(tmp_path), decode=decode, progress=lambda done, total: calls.append((done, total)))
    assert report.ok, report.problems
    assert (report.layout, report.counts, report.classes) == ("class folders", {"train": 210, "val": 209}, 3)
    assert (report.smallest_image_px, report.largest_image_px) == ((4, 4), (9, 5))
    assert report.images_opened == (419 if decode else 140)
    assert calls[-1] == (report.images_opened, report.images_opened)
    assert report.smallest_class == ("n1", 70)


def test_check_reports_and_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    monkeypatch.setenv("SSL_BENCH_DATA", str(data))
    make_synsets(data / "imagenet")
    for i in range(25):
        (data / f"imagenet/train/n1/x{i:02d}.jpg").write_bytes(b"not an image")
    report = check_dataset("imagenet")
    assert len(report.broken) == 25
    assert report.images_opened == 43
    text = "\n".join(report.problems)
    assert text.count("not an image in any known format") == 20
    for words in (
        "3 classes, and the complete imagenet has 1,000",
        "34 train images, and the complete imagenet has 1,281,167",
        "x00.jpg: it is not an image in any known format. Fetch it again",
        "5 more broken images",
    ):
        assert words in text
    for spec, words in (("cifar10", "is not in"), ("no-such", "unknown dataset"), (str(tmp_path / "x"), "no folder")):
        report = check_dataset(spec)
        assert not report.ok
        assert report.layout is None
        assert words in report.problems[0]


def test_check_of_classes_without_images(tmp_path: Path) -> None:
    save(tmp_path / "one.png", 0)
    image = (tmp_path / "one.png").read_bytes()
    for split, labels in (("train", [0] * 101 + [2]), ("val", [0])):
        (tmp_path / "set" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "set" / split / "0.tar", "w") as shard:
            for i, label in enumerate(labels):
                for name, content in ((f"{i}.png", image), (f"{i}.cls", str(label).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    report = check_dataset(str(tmp_path / "set"))
    assert report.smallest_class == ("1", 0)
    assert report.largest_class == ("0", 101)
    assert any("1 classes have no image in train (1)" in problem for problem in report.problems)
    assert any("2 classes have no image in val (1, 2)" in problem for problem in report.problems)


# Other kinds than labeled images

# What each layout is: kind, classes, counts.
KINDS = {
    "folders": ("images", 10, {"train": 20, "val": 10}),
    "ade20k": ("masks", 11, {"train": 20, "val": 10}),
    "cityscapes": ("masks", 19, {"train": 20, "val": 10}),
    "voc": ("masks", 11, {"train": 20, "val": 10}),
    "imagenet-s": ("masks", 11, {"train": 20, "val": 10}),
    "coco": ("boxes", 10, {"train": 20, "val": 10}),
    "davis": ("videos", 0, {"train": 24, "val": 48}),
    "roxford": ("landmarks", 0, {"queries": 60, "database": 600}),
}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_toy_writes_what_data_check_knows(layout, tmp_path, call):
    counts = {"roxford": (), "davis": ("--train", 1, "--val", 2)}.get(layout, ("--train", 20, "--val", 10))
    code, _, errors = call("data", "toy", "--layout", layout, "--out", tmp_path / "made", *counts)
    assert (code, errors) == (0, f"the toy world is in {tmp_path / 'made'} ({layout})\n")
    code, out, _ = call("data", "check", tmp_path / "made", "--json")
    assert code == 0
    report = json.loads(out)["check"]
    assert (report["kind"], report["classes"], report["counts"]) == KINDS[layout]
    assert report["problems"] == report["broken"] == report["unfit"] == []
    assert report["images_opened"] == sum(report["counts"].values())
    assert set(report["manifests"]) == set(report["counts"])
    if report["kind"] == "masks":
        assert report["classes_seen"] == 11


def toy(root: Path, layout: str) -> Path:
    writer(layout, train=10, val=10)(root / layout)
    return root / layout


def some(root: Path, pattern: str) -> Path:
    return min(root.glob(pattern))


# fmt: off
WRONG = {
    "mask missing":     ("ade20k", lambda r: some(r, "annotations/training/*").unlink(), "1 of 10 images .* no mask"),
    "mask broken":      ("ade20k", lambda r: some(r, "annotations/validation/*").write_bytes(b"x"),
                         r"broken image .*ADE_val_00000001.png: it is no PNG"),
    "value outside":    ("ade20k", lambda r: Image.fromarray(np.full((96, 128), 12, np.uint8)).save(
                         some(r, "annotations/training/*")), r"12 \(12,288 px\). Expected 0 \(ignored\) and 1 to 11"),
    "other size":       ("voc", lambda r: Image.new("RGB", (96, 128)).save(r / "JPEGImages/2008_000003.png"),
                         r"2008_000003.png has 128 x 96 px, and its image .* 96 x 128 px"),
    "mask alone":       ("cityscapes", lambda r: some(r, "leftImg8bit/val/*/*").unlink(),
                         "1 masks in .* have no image: .*. Check that this is meant"),
    "synset missing":   ("imagenet-s", lambda r: [shutil.rmtree(p / "arrow") for p in r.iterdir()],
                         r"18 of 18 masks lack the class of the folder|no class: 10 "),
    "image absent":     ("coco", lambda r: some(r, "val2017/*").unlink(), "1 of 10 images of .* are not in"),
    "box of no extent": ("coco", lambda r: flatten(r / "annotations/instances_train2017.json"), "1 boxes .* no extent"),
    "image of another": ("coco", lambda r: Image.new("RGB", (9, 9)).save(some(r, "val2017/*")),
                         "has 9 x 9 px, and its annotations say 96 x 96"),
    "image broken":     ("folders", lambda r: some(r, "val/*/*").write_bytes(b"x"),       "broken image .*val/arrow"),
}
# fmt: on


def flatten(path: Path) -> None:
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"][3] = 0
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_words(what, tmp_path, call):
    layout, spoil, words = WRONG[what]
    root = toy(tmp_path, layout)
    spoil(root)
    code, out, _ = call("data", "check", root, "--json")
    assert code == 1
    problems = json.loads(out)["check"]["problems"]
    assert any(re.search(words, problem) for problem in problems), problems


def test_folders_in_another_order_than_the_class_numbers(tmp_path):
    root = toy(tmp_path, "imagenet-s")
    for place in root.iterdir():
        (place / "star").rename(place / "aaa")
    report = check_dataset(str(root))
    assert len(report.problems) == 1
    assert report.problems[0].startswith("16 of 20 masks lack the class of the folder")  # triangle and tshape keep it


def test_many_misfits_are_counted(tmp_path):
    writer("ade20k", train=25, val=1)(tmp_path / "set")
    for path in (tmp_path / "set/annotations/training").iterdir():
        Image.new("RGB", (128, 96)).save(path)
    report = check_dataset(str(tmp_path / "set"))
    assert len(report.unfit) == 25
    assert report.broken == []
    assert len(report.problems) == 21
    assert report.problems[-1] == "5 more images and masks that do not fit"
    assert report.classes_seen is not None
    assert report.classes_seen < 11


def test_a_class_called_other_makes_no_imagenet_s(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path / f"images/{split}/a.png", 0)
        (tmp_path / f"masks/{split}").mkdir(parents=True)
        with Image.open(tmp_path / f"images/{split}/a.png") as image:
            Image.new("L", image.size, 1).save(tmp_path / f"masks/{split}/a.png")
    (tmp_path / "classes.txt").write_text("other\ncat\n")
    report = check_dataset(str(tmp_path))
    assert report.ok, report.problems
    assert report.classes_seen == 1


def test_a_sample_of_masks_without_decoding_all(tmp_path):
    writer("ade20k", train=130, val=2)(tmp_path / "set")
    calls: list[tuple[int, int]] = []
    report = check_dataset(
        str(tmp_path / "set"), decode=False, progress=lambda done, total: calls.append((done, total))
    )
    assert report.ok
    assert report.images_opened == 67
    assert calls[-1] == (67, 67)


@pytest.mark.parametrize(
    ("spec", "kind", "counts"),
    [
        ("toy-voc", "masks", {"train": 400, "val": 100}),
        ("toy-coco", "boxes", {"train": 400, "val": 200}),
        ("toy-roxford", "landmarks", {"queries": 60, "database": 600}),
    ],
)
def test_built_in_data_of_every_kind_are_complete(spec, kind, counts):
    report = check_dataset(spec, decode=False)
    assert (report.kind, report.counts, report.problems) == (kind, counts, [])


def test_an_incomplete_dataset_of_masks_is_compared_with_the_complete_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    toy(tmp_path, "ade20k")
    text = "\n".join(check_dataset("ade20k").problems)
    for words in ("11 classes, and the complete ade20k has 150", "10 train images, and the complete ade20k has 20,210"):
        assert words in text
    assert "is not in" in check_dataset("cityscapes").problems[0]


def test_the_two_objects_of_coco_without_extent_are_known(tmp_path, monkeypatch):
    """The complete COCO 2017 must pass."""
    from ssl_bench.evaluate import datasets

    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    monkeypatch.setitem(datasets._COMPLETE, "coco", {"classes": 10, "train": 10, "val": 10})
    root = toy(tmp_path, "coco")
    path = root / "annotations/instances_train2017.json"
    flatten(path)
    assert [len(open_coco("coco").without_extent[split]) for split in ("train", "val")] == [1, 0]
    assert not check_dataset("coco").ok
    document = json.loads(path.read_text())
    document["annotations"][1]["bbox"][3] = 0
    path.write_text(json.dumps(document))
    report = check_dataset("coco")
    assert report.ok
    assert report.remarks[0].startswith("2 boxes of instances_train2017.json have no extent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "ade"), "unknown layout 'ade'; did you mean 'ade20k'?"),
        (("--layout", "roxford", "--train", 5), "--train cannot be given with --layout roxford: it has 60 queries"),
        (("--layout", "coco", "--size", 64), "--size cannot be given with --layout coco: its images have 96 x 96 px"),
        (("--layout", "voc", "--val", 0), "val=0, expected an integer from 1"),
    ],
)
def test_what_data_toy_refuses(options, message, tmp_path, call):
    code, out, errors = call("data", "toy", "--out", tmp_path / "made", *options)
    assert (code, out) == (2, "")
    assert message in errors
    assert not (tmp_path / "made").exists()


def test_every_dataset_is_listed_with_its_kind(tmp_path, monkeypatch, call):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    toy(tmp_path, "voc").rename(tmp_path / "VOC2012")
    code, out, _ = call("data", "ls", "--json")
    assert code == 0
    listed = json.loads(out)["datasets"]
    rows = {row["name"]: row for row in listed}
    assert len(rows) == len(listed)
    for name in ("toy-ade20k", "toy-cityscapes", "toy-voc", "toy-imagenet-s", "toy-coco"):
        assert "masks" in rows[name]["kind"].split(", ")
        assert rows[name]["here"]
        assert rows[name]["where"] == "built in"
    assert rows["voc-aug"] | {"what": ""} == {
        **{"name": "voc-aug", "kind": "masks, objects", "what": ""},
        **{"where": str(tmp_path / "VOC2012"), "here": True},
    }
    assert rows["ade20k"]["where"] == str(tmp_path / "ade20k")
    assert not rows["ade20k"]["here"]
    kinds = {name: rows[name]["kind"] for name in ("coco", "roxford5k", "davis-2017")}
    assert kinds == {"coco": "boxes, masks, objects", "roxford5k": "landmarks", "davis-2017": "videos"}
