"""Flowers-102, Pets, Cars and mini-ImageNet: tiny datasets with the official files, and incomplete ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from tiny_images import holds, save

from ssl_bench.errors import UserError
from ssl_bench.evaluate.datasets import open_dataset


def test_flowers(tmp_path: Path) -> None:
    for number in range(1, 7):
        save(tmp_path / f"jpg/image_{number:05d}.jpg", number)
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[2, 1, 1, 2, 1, 2]], dtype=np.uint8)})
    savemat(tmp_path / "setid.mat", {"trnid": [[6]], "valid": [[2]], "tstid": [[5, 1, 4]]})
    dataset = open_dataset(str(tmp_path))
    assert holds(dataset.train, {"image_00002.jpg": ("001", 2), "image_00006.jpg": ("002", 6)})  # trnid and valid
    assert holds(dataset.val, {f"image_0000{i}.jpg": (name, i) for i, name in ((1, "002"), (4, "002"), (5, "001"))})
    (tmp_path / "jpg/image_00004.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images listed for val are not in .*jpg: image_00004\.jpg"):
        open_dataset(str(tmp_path))
    (tmp_path / "setid.mat").write_bytes(b"x" * 200)
    with pytest.raises(UserError, match=r"setid\.mat is not a MATLAB file"):
        open_dataset(str(tmp_path))
    (tmp_path / "setid.mat").unlink()
    with pytest.raises(UserError, match=r"setid\.mat is missing"):
        open_dataset(str(tmp_path))


def test_pets(tmp_path: Path) -> None:
    for number, name in enumerate(("great_pug_1", "great_pug_2", "Bengal_1", "Bengal_2")):
        save(tmp_path / f"images/{name}.jpg", number)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/trainval.txt").write_text(
        "#Image CLASS-ID SPECIES BREED\ngreat_pug_2 2 2 1\nBengal_1 1 1 1\n"
    )
    (tmp_path / "annotations/test.txt").write_text("Bengal_2 1 1 1\ngreat_pug_1 2 2 1\n")
    dataset = open_dataset(str(tmp_path))
    assert holds(dataset.train, {"Bengal_1.jpg": ("Bengal", 2), "great_pug_2.jpg": ("great_pug", 1)})
    assert holds(dataset.val, {"Bengal_2.jpg": ("Bengal", 3), "great_pug_1.jpg": ("great_pug", 0)})
    (tmp_path / "annotations/test.txt").write_text("Bengal_2\n")
    with pytest.raises(UserError, match=r"test\.txt, line 1: 'Bengal_2'\. Expected \"IMAGE CLASS"):
        open_dataset(str(tmp_path))
    (tmp_path / "annotations/test.txt").unlink()
    with pytest.raises(UserError, match=r"test\.txt is missing"):
        open_dataset(str(tmp_path))


def cars_annotations(path: Path, rows: list[tuple[str, int]], *, labeled: bool = True) -> None:
    """A struct array as the development kit holds it."""
    boxes = [(f"bbox_{corner}", "O") for corner in ("x1", "y1", "x2", "y2")]
    kind = np.dtype([*boxes, *([("class", "O")] if labeled else []), ("fname", "O")])
    table = np.array([(1, 2, 3, 4, *([label] if labeled else []), name) for name, label in rows], dtype=kind)
    savemat(path, {"annotations": table.reshape(1, -1)})


@pytest.mark.parametrize("place", [".", "devkit"])
def test_cars(tmp_path: Path, place: str) -> None:
    for number, name in enumerate(("cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg")):
        save(tmp_path / name, number)
    (tmp_path / "devkit").mkdir()
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": np.array([["Ram C/V 2012", "Audi S4"]], dtype=object)})
    cars_annotations(tmp_path / "devkit/cars_train_annos.mat", [("00002.jpg", 1), ("00001.jpg", 2)])
    cars_annotations(tmp_path / "devkit/cars_test_annos.mat", [("00001.jpg", 0)], labeled=False)
    with pytest.raises(UserError, match=r"cars_test_annos_withlabels\.mat is missing; .* has no classes"):
        open_dataset(str(tmp_path))
    cars_annotations(tmp_path / place / "cars_test_annos_withlabels.mat", [("00001.jpg", 2)])
    dataset = open_dataset(str(tmp_path))
    assert holds(dataset.train, {"cars_train/00001.jpg": ("Audi S4", 0), "cars_train/00002.jpg": ("Ram C/V 2012", 1)})
    assert holds(dataset.val, {"cars_test/00001.jpg": ("Audi S4", 2)})
    cars_annotations(tmp_path / place / "cars_test_annos_withlabels.mat", [("00001.jpg", 3)])
    with pytest.raises(UserError, match=r"class out of range for cars_test/00001\.jpg has 3 .*Expected 1 to 2"):
        open_dataset(str(tmp_path))


def test_mini_imagenet(tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        save(tmp_path / f"images/{name}.jpg", number)
    (tmp_path / "train.csv").write_text("filename,label\nb.jpg,n2\na.jpg,n1\n")
    (tmp_path / "val.csv").write_text("filename,label\nc.jpg,n3\n")
    (tmp_path / "test.csv").write_text("filename,label\nd.jpg,n4\nc.jpg,n5\n")
    dataset = open_dataset(str(tmp_path))
    assert holds(dataset.train, {"n1/a.jpg": ("n1", 0), "n2/b.jpg": ("n2", 1)})
    assert holds(dataset.val, {"n4/d.jpg": ("n4", 3), "n5/c.jpg": ("n5", 2)})
    assert dataset.disjoint_classes
    (tmp_path / "test.csv").write_text("name\nd.jpg\n")
    with pytest.raises(UserError, match=r"test\.csv has the columns \['name'\]\. Expected filename,label"):
        open_dataset(str(tmp_path))
