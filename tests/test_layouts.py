"""Class folders and flat val: tiny datasets of the true form, pixels and labels checked, and each way to be bad."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_images import holds, save

from ssl_bench.errors import UserError
from ssl_bench.evaluate.datasets import open_dataset


def make_folders(root: Path) -> Path:
    """Two classes, three train and two val images."""
    for number, name in enumerate(
        ["train/b/2.JPEG", "train/b/1.png", "train/a/x/3.webp", "val/a/4.TIF", "val/b/5.jpg"]
    ):
        save(root / name, number)
    return root


TRAIN = {"a/x/3.webp": ("a", 2), "b/1.png": ("b", 1), "b/2.JPEG": ("b", 0)}
VAL = {"a/4.TIF": ("a", 3), "b/5.jpg": ("b", 4)}


def test_class_folders(tmp_path: Path) -> None:
    dataset = open_dataset(str(make_folders(tmp_path)))
    assert dataset.train is not None
    assert dataset.train.classes == ("a", "b")
    assert holds(dataset.train, TRAIN)
    assert holds(dataset.val, VAL)
    assert (dataset.name, dataset.built_in, dataset.notes) == (tmp_path.name, False, ())


def test_hidden_and_other_files_are_ignored_and_said(tmp_path: Path) -> None:
    make_folders(tmp_path)
    for name in ("train/a/.hidden.png", "train/a/._1.png", "train/.cache/1.png", "train/loose.png", "train/a/x.heic"):
        save(tmp_path / name, 9)
    (tmp_path / "train/a/readme.txt").write_text("no image")
    (tmp_path / "train/empty").mkdir()
    dataset = open_dataset(str(tmp_path))
    assert holds(dataset.train, TRAIN)
    assert any("1 images lie directly in" in note for note in dataset.notes)
    assert any("2 files" in note and ".heic" in note for note in dataset.notes)
    assert any("empty" in note for note in dataset.notes)


def test_a_folder_of_hidden_images_is_no_class(tmp_path: Path) -> None:
    for name in ("a/._1.png", "b/._2.png"):
        save(tmp_path / name, 1)
    with pytest.raises(UserError, match="no folders of images"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_val(tmp_path: Path, name: str) -> None:
    make_folders(tmp_path)
    shutil.move(tmp_path / "val", tmp_path / name)
    assert holds(open_dataset(str(tmp_path)).val, VAL)
    save(tmp_path / "val/a/1.png", 7)  # val goes first, where both are there
    save(tmp_path / "val/b/1.png", 8)
    assert holds(open_dataset(str(tmp_path)).val, {"a/1.png": ("a", 7), "b/1.png": ("b", 8)})


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    make_folders(tmp_path / "real")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/train").symlink_to(tmp_path / "real/train")
    (tmp_path / "root/val").symlink_to(tmp_path / "real/val")
    (tmp_path / "real/train/a/x/up").symlink_to(tmp_path / "real/train/a")
    assert holds(open_dataset(str(tmp_path / "root")).train, TRAIN)


def test_dangling_link_is_an_error(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "train/a/gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"1 links in .*lead nowhere: .*gone\.png"):
        open_dataset(str(tmp_path))


def test_train_only(tmp_path: Path) -> None:
    make_folders(tmp_path)
    shutil.rmtree(tmp_path / "val")
    assert open_dataset(str(tmp_path)).val is None
    for name in ("n1/a.jpg", "n2/b.jpg"):
        save(tmp_path / "22k" / name, len(name))
    dataset = open_dataset(str(tmp_path / "22k"))
    assert holds(dataset.train, {"n1/a.jpg": ("n1", 8), "n2/b.jpg": ("n2", 8)})
    assert dataset.val is None


def bad_folder(root: Path, what: str) -> str:
    """Make a folder bad in one way; the path to open."""
    make_folders(root)
    if what == "file":
        return str(root / "train/b/1.png")
    if what == "absent":
        return str(root / "absent")
    if what == "empty":
        (root / "empty").mkdir()
        return str(root / "empty")
    if what == "neither":
        return str(root / "val/a")
    if what == "no images":
        shutil.rmtree(root / "train")
        (root / "train/a").mkdir(parents=True)
    if what == "one class":
        shutil.rmtree(root / "train/a")
        shutil.rmtree(root / "val/a")
    if what == "missing":
        (root / "val/a/4.TIF").unlink()
    if what == "extra":
        save(root / "val/c/1.png", 1)
    return str(root)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("file", r"1\.png is a file\. Expected a dataset's folder"),
        ("absent", r"there is no folder .*absent"),
        ("empty", r"empty is empty"),
        ("neither", r"neither train nor val"),
        ("no images", r"no images in .*train: it holds 1 folders"),
        ("one class", r"only one class in .*: b\. Expected at least two"),
        ("missing", r"val has no images of 1 classes of train \(a\)"),
        ("extra", r"val has 1 classes that train has not \(c\)"),
    ],
)
def test_bad_folders(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(bad_folder(tmp_path / "data", what))


# ImageNet with a flat val


SYNSETS = ("n01440764", "n01751748", "n02000001")
FLAT = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3, 4)]
FLAT_LABELS = (1, 0, 2, 1)


def make_flat(root: Path) -> Path:
    """Three synsets with one train image each, and four val images without folders."""
    for number, synset in enumerate(SYNSETS):
        save(root / f"train/{synset}/{synset}_1.JPEG", number)
    for number, name in enumerate(FLAT):
        save(root / "val" / name, 10 + number)
    return root


@pytest.mark.parametrize(
    ("place", "lines"),
    [
        ("val.txt", [f"{f} {SYNSETS[k]}" for f, k in zip(FLAT, FLAT_LABELS, strict=True)]),
        ("val.txt", [f"{f} {k}" for f, k in reversed(list(zip(FLAT, FLAT_LABELS, strict=True)))]),
        ("val.txt", [f"{f} {k:03d} {SYNSETS[k]}" for f, k in zip(FLAT, FLAT_LABELS, strict=True)]),
        ("val/synset_labels.txt", [SYNSETS[k] for k in FLAT_LABELS]),
        ("devkit/imagenet_2012_validation_synset_labels.txt", ["", *[SYNSETS[k] for k in FLAT_LABELS], ""]),
        (
            "LOC_val_solution.csv",
            ["ImageId,PredictionString"]
            + [f"{f[:-5]},{SYNSETS[k]} 1 2 3 4 {SYNSETS[k]} 5 6 7 8" for f, k in zip(FLAT, FLAT_LABELS, strict=True)],
        ),
    ],
)
def test_flat_val(tmp_path: Path, place: str, lines: list[str]) -> None:
    make_flat(tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("\n".join(lines))
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(f"{name} a fish" for name in SYNSETS))  # another file
    dataset = open_dataset(str(tmp_path))
    order = [1, 0, 3, 2]  # by synset, then by file
    expected = {f"{SYNSETS[FLAT_LABELS[i]]}/{FLAT[i]}": (SYNSETS[FLAT_LABELS[i]], 10 + i) for i in order}
    assert holds(dataset.val, expected)
    assert dataset.notes == ()


def test_flat_val_has_the_manifest_of_the_sorted_one(tmp_path: Path) -> None:
    make_flat(tmp_path / "flat")
    with open(tmp_path / "flat/val" / FLAT[0], "ab") as file:
        file.write(b"of another size")
    (tmp_path / "flat/val.txt").write_text("\n".join(f"{f} {k}" for f, k in zip(FLAT, FLAT_LABELS, strict=True)))
    flat = open_dataset(str(tmp_path / "flat")).val
    shutil.copytree(tmp_path / "flat", tmp_path / "deep")
    for name, label in zip(FLAT, FLAT_LABELS, strict=True):
        (tmp_path / "deep/val" / SYNSETS[label]).mkdir(exist_ok=True)
        shutil.move(tmp_path / "deep/val" / name, tmp_path / "deep/val" / SYNSETS[label] / name)
    deep = open_dataset(str(tmp_path / "deep")).val
    assert flat is not None
    assert deep is not None
    assert flat.manifest_sha256 == deep.manifest_sha256


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"no list of its labels was found\. Expected .*val\.txt with lines like \"ILSVRC2012_val_00000001"),
        ([f"{f} 1" for f in FLAT[:3]], r"1 images have no line in it \(ILSVRC2012_val_00000004\)"),
        ([f"{f} 3" for f in FLAT], r"index 3 is out of range: expected 0 to 2"),
        (["1", "2", "3", "2"], r"the development kit counts synsets in an order of its own"),
        ([SYNSETS[0]] * 3, r"it has 3 lines for 4 images"),
        (["fish"] * 4, r"'fish' is neither a class of train nor an index"),
        ([f"{f} n09999999" for f in FLAT], r"val has 1 classes that train has not \(n09999999\)"),
    ],
)
def test_bad_flat_labels(tmp_path: Path, lines: list[str] | None, message: str) -> None:
    make_flat(tmp_path)
    if lines:
        (tmp_path / "val.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        open_dataset(str(tmp_path))


def test_flat_val_lists_absent_images_in_its_notes(tmp_path: Path) -> None:
    make_flat(tmp_path)
    lines = [f"{f} {k}" for f, k in zip(FLAT, FLAT_LABELS, strict=True)] + ["ILSVRC2012_val_00000009.JPEG 1"]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    (note,) = open_dataset(str(tmp_path)).notes
    assert "1 images listed in" in note
    assert "ILSVRC2012_val_00000009" in note
