"""The toy world in the layouts of datasets with masks, held against its scenes pixel by pixel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate import toy_masks
from ssl_bench.evaluate.masks import IGNORE, open_masks
from ssl_bench.evaluate.splits import BUILT_IN
from ssl_bench.evaluate.toy_coco import labels_of
from ssl_bench.evaluate.toy_layouts import LAYOUTS
from ssl_bench.evaluate.toy_masks import SIZES_PX, TOY_MASKS_VERSION, WRITERS
from ssl_bench.evaluate.toyworld import CLASSES, Scene, scene

TRAIN_IDS = {7: 0, 8: 1, 12: 3, 17: 5, 20: 7, 22: 9, 24: 11, 26: 13, 28: 15, 32: 17, 33: 18}  # of Cityscapes


def touching(picture: Scene) -> np.ndarray:
    """Background beside an object, pixel by pixel."""
    covered, found = picture.semantic > 0, np.zeros(picture.semantic.shape, bool)
    height, width = covered.shape
    for y in range(height):
        for x in range(width):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = [(a, b) for a, b in around if 0 <= a < height and 0 <= b < width]
            found[y, x] = not covered[y, x] and any(covered[place] for place in inside)
    return found


def classes_of(name: str, picture: Scene) -> np.ndarray:
    """What a mask must say."""
    semantic = picture.semantic.astype(int)
    if name == "toy-cityscapes":
        expected = np.array([TRAIN_IDS[value] for value in toy_masks.CITYSCAPES_IDS])[semantic]
        expected[-6:] = IGNORE
        return expected
    return np.where(touching(picture), IGNORE, semantic)


def drawn(name: str, split: str, index: int) -> Scene:
    height, width = SIZES_PX[name]
    labels = None if name == "toy-imagenet-s" else labels_of(0, split, index)
    return scene(seed=0, split=split, index=index, height_px=height, width_px=width, labels=labels)


@pytest.mark.parametrize("name", WRITERS)
def test_masks_are_those_of_the_scenes(name, tmp_path):
    calls: list[tuple[int, int]] = []
    WRITERS[name](tmp_path / name, train=12, val=10, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 22) for done in range(1, 23)]
    opened = open_masks(str(tmp_path / name))
    assert (opened.name, opened.built_in) == (f"{name}-folder", False)  # at its own size only where it is built in
    if name == "toy-cityscapes":
        assert len(opened.classes) == 19
    else:
        first = "other" if name == "toy-imagenet-s" else "background"
        assert opened.classes == (first, *CLASSES)
    for split, count in (("train", 12), ("val", 10)):
        assert len(opened.splits[split]) == count
        found = {np.asarray(opened.pair(split, i)[0]).tobytes(): opened.pair(split, i)[1] for i in range(count)}
        for index in range(count):
            picture = drawn(name, split, index)
            np.testing.assert_array_equal(found[picture.image.tobytes()], classes_of(name, picture))


@pytest.mark.parametrize("name", WRITERS)
def test_built_in_by_name(name, shared_cache):
    opened = open_masks(name)
    assert name in BUILT_IN
    assert (opened.name, opened.built_in) == (name, True)
    assert {split: len(each) for split, each in opened.splits.items()} == {"train": 400, "val": 100}
    height, width = SIZES_PX[name]
    assert opened.scale_px == (max(height, width), min(height, width))
    assert opened.pair("train", 0)[0].size == (width, height)
    assert opened.notes == ()
    assert opened.root.parent == shared_cache / "datasets"
    seen = np.unique(np.concatenate([np.unique(opened.pair("val", i)[1]) for i in range(100)])).tolist()
    assert seen == [*(sorted(TRAIN_IDS.values()) if name == "toy-cityscapes" else range(11)), IGNORE]


def test_toy_coco_as_masks_is_what_its_scenes_show():
    opened = open_masks("toy-coco")
    assert (opened.name, opened.built_in, opened.scale_px) == ("toy-coco", True, (96, 96))
    assert opened.classes == ("background", *CLASSES)
    crowds = 0
    for index in range(40):
        shown, mask = opened.pair("val", index)
        picture = scene(seed=0, split="val", index=index, height_px=96, width_px=96, labels=labels_of(0, "val", index))
        assert shown.tobytes() == picture.image.tobytes()
        assert ((mask == picture.semantic) | (mask == IGNORE)).all()
        assert (mask[picture.semantic == 0] == 0).all()
        crowds += int((mask == IGNORE).any())
    assert crowds > 0


def stored(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def values(root: Path, pattern: str) -> set[int]:
    return {int(value) for path in root.glob(pattern) for value in np.unique(stored(path))}


def test_files_are_in_the_true_formats(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / name, train=20, val=20)
    ade, city = tmp_path / "toy-ade20k", tmp_path / "toy-cityscapes"
    assert (ade / "images/training/ADE_train_00000001.png").is_file()
    assert values(ade, "annotations/validation/*.png") == set(range(12))
    assert (ade / "objectInfo150.txt").read_text().splitlines()[1].split("\t")[-1] == "background"
    assert values(city, "gtFine/*/*/*_gtFine_labelIds.png") == {1, *TRAIN_IDS}
    assert len(list(city.glob("leftImg8bit/train/*/*_leftImg8bit.png"))) == 20
    voc = tmp_path / "toy-voc"
    own, augmented = ({p.stem for p in (voc / f"SegmentationClass{end}").iterdir()} for end in ("", "Aug"))
    lists = {p.stem: p.read_text().split() for p in (voc / "ImageSets/Segmentation").iterdir()}
    assert {name: len(names) for name, names in lists.items()} == {"train": 15, "trainaug": 20, "val": 20}
    assert own == {*lists["train"], *lists["val"]}
    assert augmented == set(lists["trainaug"]) - set(lists["train"])
    with Image.open(next((voc / "SegmentationClass").iterdir())) as opened:
        assert opened.mode == "P"
        colors = np.reshape(opened.getpalette("RGB"), (-1, 3)).tolist()
    # VOC's colors of aeroplane, bicycle, bird, person, tvmonitor and the border.
    expected = {1: [128, 0, 0], 2: [0, 128, 0], 3: [128, 128, 0], 15: [192, 128, 128], 20: [0, 64, 128]}
    assert {k: colors[k] for k in expected} == expected
    assert colors[255] == [224, 224, 192]
    assert values(voc, "SegmentationClass*/*.png") == {*range(11), 255}
    (first, *_) = sorted((tmp_path / "toy-imagenet-s/validation-segmentation/arrow").iterdir())
    assert stored(first).shape == (96, 96, 3)
    assert {tuple(color) for color in stored(first).reshape(-1, 3).tolist()} == {
        (0, 0, 0),
        (1, 0, 0),
        (1000 % 256, 1000 // 256, 0),
    }


# What two images a split of each layout are made of. Whoever changes a byte raises TOY_MASKS_VERSION.
FROZEN = {
    "toy-ade20k": "74da2e02537f969f",
    "toy-cityscapes": "822f58fab8518ff4",
    "toy-voc": "bf9a04a9e5155034",
    "toy-imagenet-s": "0bf931628aa79f7e",
}


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("name", WRITERS)
def test_not_a_byte_changes(name, tmp_path):
    write: Callable[..., None] = WRITERS[name]
    write(tmp_path / "a", train=10, val=10)
    assert TOY_MASKS_VERSION == 1
    assert digest(tmp_path / "a") == FROZEN[name]
    write(tmp_path / "b", train=10, val=10, seed=1)
    assert digest(tmp_path / "b") != FROZEN[name]


@pytest.mark.parametrize(
    ("name", "counts", "message"),
    [
        ("toy-ade20k", {"train": 0}, "train=0, expected an integer from 1"),
        ("toy-imagenet-s", {"val": 9}, "val=9, expected an integer from 10"),
    ],
)
def test_counts_that_are_too_small(name, counts, message, tmp_path):
    with pytest.raises(UserError, match=message):
        WRITERS[name](tmp_path / "x", **counts)


def test_every_layout_has_a_writer():
    assert set(LAYOUTS) == {"folders", "coco", "davis", "roxford", *(name.removeprefix("toy-") for name in WRITERS)}
