"""Opening by name, what makes a split the same split, lists of images and classes, and built-in data."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_images import holds, make_synsets, picture, save

from ssl_bench.errors import UserError
from ssl_bench.evaluate import datasets, toy_files, toyworld
from ssl_bench.evaluate.builtin_data import digits_in_val
from ssl_bench.evaluate.datasets import DATASETS, BrokenImage, Dataset, Split, open_dataset
from ssl_bench.evaluate.splits import Names


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty SSL_BENCH_DATA, and a cache of the test's own."""
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SSL_BENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def split_of(dataset: Dataset) -> Split:
    """The train split."""
    assert dataset.train is not None
    return dataset.train


# Names


def test_a_name_is_looked_for_under_the_data_folder(data: Path) -> None:
    make_synsets(data / "imagenet")
    dataset = open_dataset("imagenet")
    assert (dataset.name, dataset.root) == ("imagenet", data / "imagenet")
    assert len(split_of(dataset)) == 9


def test_an_absent_dataset_says_where_it_is_expected(data: Path) -> None:
    for name, known in DATASETS.items():
        if known.built_in is None:
            with pytest.raises(UserError) as error:
                open_dataset(name)
            for words in (str(data / name), known.layout, "Set SSL_BENCH_DATA", known.page):
                assert words in str(error.value)


def test_a_dataset_in_this_folder_is_offered_as_a_path(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_synsets(tmp_path / "imagenet")
    with pytest.raises(UserError, match=r"given as \./imagenet"):
        open_dataset("imagenet")
    assert len(split_of(open_dataset("./imagenet"))) == 9


def test_an_unknown_name_gets_the_nearest(data: Path) -> None:
    with pytest.raises(UserError, match=r"unknown dataset 'cifar-10'; did you mean 'cifar10'\?"):
        open_dataset("cifar-10")


def test_an_unreadable_folder_is_the_users_to_mend(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_synsets(data / "imagenet")

    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(datasets.layouts, "visible_folders", refuse)
    with pytest.raises(UserError, match=r"cannot read .*train: Permission denied"):
        open_dataset("imagenet")


def test_imagenet_100_is_100_synsets_in_data_and_reachable(data: Path) -> None:
    lines = datasets.IMAGENET_100.read_text().split()
    assert len(set(lines)) == len(lines) == 100
    assert lines[:2] == ["n02869837", "n01749939"]
    assert all(len(line) == 9 and line[0] == "n" and line[1:].isdigit() for line in lines)


def test_imagenet_100_out_of_imagenet(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_synsets(data / "imagenet")
    (tmp_path / "list.txt").write_text("n3\nn1\n")
    row = DATASETS["imagenet-100"]
    monkeypatch.setitem(DATASETS, "imagenet-100", datasets.replace(row, class_list=tmp_path / "list.txt"))
    chosen = open_dataset("imagenet-100")
    assert chosen.name == "imagenet-100"
    assert split_of(chosen).classes == ("n1", "n3")
    assert split_of(chosen).labels.tolist() == [0, 0, 0, 1, 1, 1]
    make_synsets(data / "imagenet-100", ("n1", "n3"))  # unpacked on its own, it goes first
    for i in range(3):
        for split, infix in (("train", ""), ("val", "v")):
            name = f"{split}/n3/n3_{infix}{i}.JPEG"
            shutil.copy(data / "imagenet" / name, data / "imagenet-100" / name)
    own = open_dataset("imagenet-100")
    assert own.root == data / "imagenet-100"
    assert split_of(own).manifest_sha256 == split_of(chosen).manifest_sha256


# Identity


def test_manifest_is_portable_and_freshness_is_local(tmp_path: Path) -> None:
    here = split_of(open_dataset(str(make_synsets(tmp_path / "here"))))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    there = split_of(open_dataset(str(tmp_path / "there")))
    again = split_of(open_dataset(str(tmp_path / "here")))
    assert here.manifest_sha256 == there.manifest_sha256 == again.manifest_sha256
    assert here.freshness == again.freshness != there.freshness


def test_manifest_is_the_documented_hash(tmp_path: Path) -> None:
    make_synsets(tmp_path)
    files = sorted((tmp_path / "train").rglob("*.JPEG"))
    lines = "".join(f"{f.parent.name}/{f.name}\t{f.parent.name}\t{f.stat().st_size}\n" for f in files)
    assert split_of(open_dataset(str(tmp_path))).manifest_sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_an_edit_in_place_changes_freshness(tmp_path: Path) -> None:
    make_synsets(tmp_path)
    before = split_of(open_dataset(str(tmp_path)))
    file = tmp_path / "train/n2/n2_1.JPEG"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1  # of the same size
    file.write_bytes(data)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    after = split_of(open_dataset(str(tmp_path)))
    assert before.manifest_sha256 == after.manifest_sha256
    assert before.freshness != after.freshness
    assert before.subset([0]).freshness == after.subset([0]).freshness
    file.write_bytes(data + b"\0")
    assert split_of(open_dataset(str(tmp_path))).manifest_sha256 != before.manifest_sha256


def test_subsets_have_their_own_identity(tmp_path: Path) -> None:
    whole = split_of(open_dataset(str(make_synsets(tmp_path))))
    parts = [whole, whole.subset([0, 5]), whole.subset([5, 0]), whole.subset([5]), whole.subset([0, 4])]
    assert len({part.manifest_sha256 for part in parts}) == len({part.freshness for part in parts}) == 5
    assert holds(parts[2], {"n2/n2_2.JPEG": ("n2", 12), "n1/n1_0.JPEG": ("n1", 0)})
    assert parts[2].classes == whole.classes
    assert whole.subset(whole.labels == 2).sample_ids == ["n3/n3_0.JPEG", "n3/n3_1.JPEG", "n3/n3_2.JPEG"]
    for wrong in ([0, 0], [9], [-1]):
        with pytest.raises(AssertionError):
            whole.subset(wrong)


def pixels_of(split: Split, index: int) -> np.ndarray:
    """What a DataLoader worker does; the split has come to it by pickle."""
    return np.asarray(split.image(index))


def test_a_split_travels_to_spawned_workers(tmp_path: Path) -> None:
    split = split_of(open_dataset(str(make_synsets(tmp_path)))).subset([4, 2])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(pixels_of, (split, 0)), picture(11))
        (tmp_path / "train/n1/n1_2.JPEG").write_bytes(b"")
        with pytest.raises(BrokenImage, match=r"n1_2\.JPEG"):
            pool.apply(pixels_of, (split, 1))
    copy = pickle.loads(pickle.dumps(split))  # noqa: S301
    assert copy.manifest_sha256 == split.manifest_sha256


def test_names_are_a_sequence() -> None:
    words = ["", "a", "é/\u4e2d.png", os.fsdecode(b"\xff.jpg"), "a"]
    names = Names(words)
    assert names == words
    assert (list(names), names[-1], names[3], list(names[1:3])) == (words, "a", words[3], words[1:3])
    assert Names.joined([names, Names([]), Names(["z"])]) == [*words, "z"]
    assert names != [*words[:-1], "b"]
    with pytest.raises(IndexError):
        names[5]


# Lists


@pytest.mark.parametrize(
    "form", ["n2_{}.JPEG", "n2_{}", "n2/n2_{}.JPEG", "n2/n2_{}", "train/n2/n2_{}.JPEG", "./n2_{}.png"]
)
def test_image_list(tmp_path: Path, form: str) -> None:
    make_synsets(tmp_path / "set")
    (tmp_path / "list.txt").write_text("\n".join([form.format(2), "", "  ", form.format(0), "n1_1.JPEG"]) + "\n")
    dataset = open_dataset(str(tmp_path / "set"), train_list=tmp_path / "list.txt")
    names = ("n1/n1_1.JPEG", "n2/n2_0.JPEG", "n2/n2_2.JPEG")  # in the dataset's order
    assert holds(dataset.train, dict(zip(names, (("n1", 1), ("n2", 10), ("n2", 12)), strict=True)))
    assert split_of(dataset).classes == ("n1", "n2", "n3")
    assert dataset.val is not None
    assert len(dataset.val) == 9


def test_val_list_and_class_list_together(tmp_path: Path) -> None:
    make_synsets(tmp_path / "set")
    (tmp_path / "images.txt").write_text("n3_v1.JPEG\nn1_v0.JPEG\nn2_v2.JPEG\n")
    (tmp_path / "classes.txt").write_text("n3\nn2\n")
    dataset = open_dataset(str(tmp_path / "set"), val_list=tmp_path / "images.txt", class_list=tmp_path / "classes.txt")
    assert holds(dataset.val, {"n2/n2_v2.JPEG": ("n2", 112), "n3/n3_v1.JPEG": ("n3", 121)})
    assert split_of(dataset).classes == ("n2", "n3")
    assert split_of(dataset).labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "n1_0.JPEG\nn1_7\nn9_1.JPEG\n",
            r"2 of the 3 images in .* are not in train: n1_7, n9_1\.JPEG\. Expected names",
        ),
        ("same.JPEG\n", r"1 names in .* fit more than one image of train: same\.JPEG \(2 images\)"),
        ("\n \n", r"is empty\. Expected image names, one a line"),
        (None, r"does not exist\. Expected a text file of image names"),
    ],
)
def test_bad_image_lists(tmp_path: Path, lines: str | None, message: str) -> None:
    make_synsets(tmp_path / "set")
    for name in ("n1", "n2"):
        save(tmp_path / f"set/train/{name}/same.JPEG", 0)
    if lines is not None:
        (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        open_dataset(str(tmp_path / "set"), train_list=tmp_path / "list.txt")


def test_duplicates_in_a_list_are_reported_and_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_synsets(tmp_path / "set")
    (tmp_path / "list.txt").write_text("n1_0.JPEG\nn1_1.JPEG\nn1_0.JPEG\nn1_0.JPEG\n")
    dataset = open_dataset(str(tmp_path / "set"), train_list=tmp_path / "list.txt")
    (line,) = capsys.readouterr().err.splitlines()
    assert "names 1 images more than once (n1_0.JPEG)" in line
    assert len(split_of(dataset)) == 2


def test_an_unknown_class_gets_the_nearest(tmp_path: Path) -> None:
    make_synsets(tmp_path / "set", ("cat", "dog"))
    (tmp_path / "list.txt").write_text("dog\ncatt\n")
    with pytest.raises(UserError, match=r"unknown class of train .*'catt'; did you mean 'cat'"):
        open_dataset(str(tmp_path / "set"), class_list=tmp_path / "list.txt")


# Built-in data


def test_digits(data: Path) -> None:
    from sklearn.datasets import load_digits

    dataset = open_dataset("digits")
    train, val = split_of(dataset), dataset.val
    assert val is not None
    assert dataset.built_in
    assert (len(train), len(val), train.classes) == (1438, 359, tuple("0123456789"))
    assert np.bincount(val.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert val.sample_ids[:3] == ["digit-0001", "digit-0004", "digit-0008"]
    assert train.manifest_sha256[:12] == "0bf9a1bec201"
    official = load_digits()
    for split in (train, val):
        for index in (0, len(split) - 1):
            number = int(split.sample_ids[index].removeprefix("digit-"))
            expected = np.floor(official.images[number] * 255 / 16 + 0.5)
            np.testing.assert_array_equal(np.asarray(split.image(index)), np.stack([expected] * 3, axis=-1))
            assert split.labels[index] == official.target[number]
    assert not set(train.sample_ids) & set(val.sample_ids)


def test_the_digits_rule_follows_the_class_sizes() -> None:
    labels = np.repeat(np.arange(3), [100, 300, 1397])
    assert np.bincount(labels[digits_in_val(labels)]).tolist() == [20, 60, 279]


def test_warm_digits_import_no_scikit_learn(data: Path) -> None:
    open_dataset("digits")
    heavy = ["torch", "torchvision", "sklearn", "scipy", "pandas", "matplotlib"]
    code = (
        "import sys\nfrom ssl_bench.evaluate.datasets import open_dataset\n"
        f"open_dataset('digits').train.manifest_sha256\nprint([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_damaged_digits_are_said(data: Path, tmp_path: Path) -> None:
    open_dataset("digits")
    (tmp_path / "cache/datasets/digits-v1/digits.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"built-in digits in .*digits-v1 are damaged .* remove that folder"):
        open_dataset("digits")


def test_toy_is_written_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def small(folder: Path, *, progress: Callable[[int, int], None], **sizes: int) -> None:
        calls.append(sizes)
        make_synsets(folder)
        progress(5000, 5000)

    monkeypatch.setattr(toy_files, "write_class_folders", small)
    for _ in range(2):
        dataset = open_dataset("toy")
    assert calls == [{"train": 4000, "val": 1000, "size_px": 48, "seed": 0, "processes": 1}]
    assert dataset.built_in
    assert dataset.root == tmp_path / f"cache/datasets/toy-v{toyworld.WORLD_VERSION}-seed0"
    assert len(split_of(dataset)) == 9
