"""Datasets with masks: files in the true formats, written here by hand, and what is refused."""

from __future__ import annotations

import ast
import importlib.util
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_images import picture

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.mask_layouts import ADE20K_CLASSES
from ssl_bench.evaluate.masks import IGNORE, KNOWN, MASKS, open_masks
from ssl_bench.evaluate.toy_masks import voc_palette

WIDTH, HEIGHT = 6, 4


def image(path: Path, number: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number, 16)[: size[1], : size[0]]).save(path, **options)


def mask(path: Path, values: object, mode: str = "L") -> None:
    """Values (H, W), or one for all pixels but the first, which is 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.zeros((HEIGHT, WIDTH), np.uint8) + np.asarray(values, np.uint8)
    made = Image.fromarray(stored)
    if mode == "P":
        made.putpalette(voc_palette().tobytes())
    made.save(path)


def numbered(start: int = 0) -> np.ndarray:
    return (start + np.arange(HEIGHT * WIDTH)).reshape(HEIGHT, WIDTH).astype(np.uint8)


def make_ade20k(root: Path, suffix: str = "jpg") -> Path:
    for split, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            image(root / f"images/{split}/ADE_{split}_{i}.{suffix}", i)
            mask(root / f"annotations/{split}/ADE_{split}_{i}.png", numbered(i))
    return root


def make_folders(root: Path, masks: str = "masks", classes: int = 24) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            image(root / f"images/{split}/deep/{i}.png", i)
            mask(root / f"{masks}/{split}/deep/{i}.png", numbered())
    (root / "classes.txt").write_text("".join(f"class {k}\n" for k in range(classes)))
    return root


def mmseg_classes(file: str) -> tuple[str, ...]:
    """What mmseg calls the classes; read from its source, as importing it costs seconds."""
    spec = importlib.util.find_spec("mmseg")
    if spec is None or spec.origin is None:
        pytest.skip("mmseg is not installed")
    source = (Path(spec.origin).parent / "datasets" / file).read_text()
    found = re.search(r"classes=(\(.*?\)),\s*palette", source, re.DOTALL)
    assert found
    return ast.literal_eval(found[1])


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path):
    opened = open_masks(str(make_ade20k(tmp_path / "ADEChallengeData2016")))
    assert (opened.name, opened.built_in, opened.scale_px) == ("ADEChallengeData2016", False, (2048, 512))
    assert {name: len(split) for name, split in opened.splits.items()} == {"train": 3, "val": 2}
    assert len(opened.classes) == 150
    assert (opened.classes[0], opened.classes[7], opened.classes[149]) == ("wall", "bed", "flag")
    assert list(opened.splits["val"].sample_ids) == ["ADE_validation_0.jpg", "ADE_validation_1.jpg"]
    shown, values = opened.pair("train", 0)
    assert (shown.mode, shown.size) == ("RGB", (WIDTH, HEIGHT))
    assert values.dtype == np.uint16
    assert values.ravel().tolist() == [IGNORE, *range(23)]
    assert opened.pair("train", 2)[1].ravel().tolist() == list(range(1, 25))
    np.testing.assert_array_equal(opened.pair("train", -1)[1], opened.pair("train", 2)[1])
    with pytest.raises(IndexError):
        opened.pair("train", 3)
    mask(opened.root / "annotations/training/ADE_training_0.png", 151)
    with pytest.raises(UserError, match=r"ADE_training_0.png holds values .*151 \(24 px\).*0 \(ignored\) and 1 to 150"):
        opened.pair("train", 0)


def test_the_names_of_ade20k_come_from_its_own_table(tmp_path):
    assert ADE20K_CLASSES.read_text().splitlines() == [name.strip() for name in mmseg_classes("ade.py")]
    root = make_ade20k(tmp_path / "mine")
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t.1\t9\t1\twall\n2\t.1\t9\t1\tbuilding, edifice\n3\t.1\t9\t1\tsky; blue\n"
    (root / "objectInfo150.txt").write_text(table)
    opened = open_masks(str(root))
    assert opened.classes == ("wall", "building", "sky")
    with pytest.raises(UserError, match=r"4 \(1 px\), 5 \(1 px\).* and 15 more. Expected 0 \(ignored\) and 1 to 3"):
        opened.pair("train", 0)
    (root / "objectInfo150.txt").write_text(table.replace("3\t", "4\t"))
    with pytest.raises(UserError, match=r"objectInfo150.txt does not count its classes from 1"):
        open_masks(str(root))


def test_classes_of_one_name_are_refused(tmp_path):
    """Their scores would overwrite each other."""
    ade20k = make_ade20k(tmp_path / "ade")
    (ade20k / "objectInfo150.txt").write_text("Idx\tName\n1\tscreen, door\n2\twall\n3\tscreen; crt\n")
    folders, voc = make_folders(tmp_path / "folders"), tmp_path / "voc"
    (folders / "classes.txt").write_text("cat\ndog\n\ncat \ndog\n")
    (voc / "JPEGImages").mkdir(parents=True)
    (voc / "SegmentationClass").mkdir()
    (voc / "classes.txt").write_text("cat\ncat\n")
    image(tmp_path / "imagenet-s/validation/other/a.JPEG")
    mask(tmp_path / "imagenet-s/validation-segmentation/other/a.png", 1)
    for root, said in (
        (ade20k, r"objectInfo150.txt names several classes alike: screen\."),
        (folders, r"classes.txt names several classes alike: cat, dog\."),
        (voc, r"classes.txt names several classes alike: cat\."),
        (tmp_path / "imagenet-s", r"imagenet-s names several classes alike: other\."),
    ):
        with pytest.raises(UserError, match=said):
            open_masks(str(root))


# As in the official table of labels: id, train id.
LABELS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
LABELS |= {28: 15, 31: 16, 32: 17, 33: 18}


def make_cityscapes(root: Path, values: object = 7) -> Path:
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "munster"), ("test", "berlin")):
        name = f"{split}/{city}/{city}_000000_000019"
        image(root / f"leftImg8bit/{name}_leftImg8bit.png")
        mask(root / f"gtFine/{name}_gtFine_labelIds.png", values)
        for other in ("color", "instanceIds", "labelTrainIds"):
            mask(root / f"gtFine/{name}_gtFine_{other}.png", 200)
    return root


def test_cityscapes_label_ids_become_the_nineteen_classes(tmp_path):
    values = np.array([*range(12), *range(24, 34), 255, 20], np.uint8).reshape(HEIGHT, WIDTH)
    opened = open_masks(str(make_cityscapes(tmp_path / "data", values)))
    assert opened.classes == mmseg_classes("cityscapes.py")
    assert opened.scale_px == (2048, 1024)
    assert {name: list(split.sample_ids) for name, split in opened.splits.items()} == {
        "train": [f"{city}/{city}_000000_000019_leftImg8bit.png" for city in ("aachen", "ulm")],
        "val": ["munster/munster_000000_000019_leftImg8bit.png"],
    }
    expected = [LABELS.get(value, IGNORE) for value in values.ravel().tolist()]
    assert opened.pair("val", 0)[1].ravel().tolist() == expected
    rest = np.array([*range(12, 24), *[7] * 12], np.uint8).reshape(HEIGHT, WIDTH)
    mask(opened.root / "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png", rest)
    assert opened.pair("val", 0)[1].ravel().tolist() == [LABELS.get(value, IGNORE) for value in rest.ravel().tolist()]
    mask(opened.root / "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png", 34)
    with pytest.raises(UserError, match=r"34 \(24 px\). Expected Cityscapes' label ids"):
        opened.pair("val", 0)


def make_voc(root: Path) -> Path:
    """Three images of VOC's own, two more, which are augmented; a mask of its own stands in both folders."""
    for i in range(5):
        image(root / f"JPEGImages/2007_{i}.jpg", i)
        if i < 3:
            mask(root / f"SegmentationClass/2007_{i}.png", i, mode="P")
        if i > 1:
            mask(root / f"SegmentationClassAug/2007_{i}.png", 10 + i, mode="P" if i == 3 else "L")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_0\n2007_2\n")
    (lists / "val.txt").write_text("2007_1\n")
    (lists / "trainaug.txt").write_text(
        "".join(f"/JPEGImages/2007_{i}.jpg /SegmentationClassAug/2007_{i}.png\n" for i in (3, 0, 4, 2))
    )
    return root


def test_voc_and_its_augmented_form(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    make_voc(tmp_path / "VOCdevkit" / "VOC2012")
    plain, aug = open_masks("voc"), open_masks("voc-aug")
    assert plain.classes == aug.classes == mmseg_classes("voc.py")
    assert (plain.name, aug.name, aug.scale_px) == ("voc", "voc-aug", (2048, 512))
    assert list(plain.splits["train"].sample_ids) == ["2007_0.jpg", "2007_2.jpg"]
    assert [int(plain.pair("train", i)[1].max()) for i in range(2)] == [0, 2]
    assert list(aug.splits["train"].sample_ids) == [f"2007_{i}.jpg" for i in (3, 0, 4, 2)]
    # The last image has a mask in both folders: VOC's own is taken.
    assert [int(aug.pair("train", i)[1].max()) for i in range(4)] == [13, 0, 14, 2]
    assert aug.splits["val"].manifest_sha256 == plain.splits["val"].manifest_sha256
    assert int(aug.pair("val", 0)[1].max()) == 1
    assert list(open_masks(str(aug.root)).splits["train"].sample_ids) == list(aug.splits["train"].sample_ids)
    mask(aug.root / "SegmentationClass/2007_1.png", 255, mode="P")
    assert (aug.pair("val", 0)[1] == IGNORE).all()
    mask(aug.root / "SegmentationClass/2007_1.png", 21, mode="P")
    with pytest.raises(UserError, match=r"21 \(24 px\). Expected 0 to 20, or 255"):
        aug.pair("val", 0)
    (aug.root / "SegmentationClassAug/2007_4.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 masks that .*trainaug.txt lists are not in .*: 2007_4"):
        open_masks("voc-aug")
    (aug.root / "ImageSets/Segmentation/trainaug.txt").unlink()
    with pytest.raises(UserError, match=r"trainaug.txt is missing"):
        open_masks("voc-aug")
    assert len(open_masks(str(aug.root)).splits["train"]) == 2


def make_imagenet_s(root: Path, synsets: tuple[str, ...] = ("n03", "n01", "n02")) -> Path:
    """The value of a mask is its synset's position in sorted order, from 1; pixels 1 and 2 are other and ignored."""
    for split, count in (("train-semi", 2), ("validation", 1)):
        for synset in synsets:
            for i in range(count):
                image(root / f"{split}/{synset}/{synset}_{i}.JPEG", i)
                imagenet_s_mask(
                    root / f"{split}-segmentation/{synset}/{synset}_{i}.png", 1 + sorted(synsets).index(synset)
                )
    return root


def imagenet_s_mask(path: Path, value: int) -> None:
    values = np.full((HEIGHT, WIDTH), value)
    values[0, :2] = 0, 1000
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([values % 256, values // 256, 0 * values], -1).astype(np.uint8)).save(path)


def test_imagenet_s_has_rgb_masks_and_counts_other(tmp_path):
    opened = open_masks(str(make_imagenet_s(tmp_path / "small")))
    assert opened.classes == ("other", "n01", "n02", "n03")
    assert list(opened.splits["val"].sample_ids) == ["n01/n01_0.JPEG", "n02/n02_0.JPEG", "n03/n03_0.JPEG"]
    for index in range(3):
        assert opened.pair("val", index)[1].ravel().tolist() == [0, IGNORE, *[1 + index] * 22]
    path = opened.root / "validation-segmentation/n01/n01_0.png"
    imagenet_s_mask(path, 4)
    with pytest.raises(UserError, match=r"4 \(22 px\). Expected 0 \(other\), 1 to 3, or 1000"):
        opened.pair("val", 0)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), (1, 0, 1), np.uint8)).save(path)  # blue
    with pytest.raises(UserError, match="no class"):
        opened.pair("val", 0)
    mask(path, 1)
    with pytest.raises(UserError, match=r"is gray of 8 bits. Expected an RGB mask, R \+ 256 G"):
        opened.pair("val", 0)


def test_a_class_number_above_255_needs_the_green_channel(tmp_path):
    synsets = tuple(f"n{k:03d}" for k in range(300))
    for folder, suffix in (("validation", "JPEG"), ("validation-segmentation", "png")):
        for synset in synsets:
            path = tmp_path / f"set/{folder}/{synset}/{synset}.{suffix}"
            image(path) if suffix == "JPEG" else imagenet_s_mask(path, 1 + synsets.index(synset))
    opened = open_masks(str(tmp_path / "set"))
    assert opened.pair("val", 289)[1].ravel().tolist() == [0, IGNORE, *[290] * 22]


def test_synsets_that_are_missing_would_rename_all_others(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    root = make_imagenet_s(tmp_path / "imagenet-s" / "ImageNetS50")
    for spec in ("imagenet-s-50", str(root)):
        with pytest.raises(UserError, match=r"has 3 synsets. Expected 50, as its name says"):
            open_masks(spec)
    other = root.rename(tmp_path / "part")
    shutil.rmtree(other / "validation" / "n02")
    with pytest.raises(UserError, match=r"train-semi and validation in .* have different synsets: n02"):
        open_masks(str(other))
    shutil.rmtree(other / "train-semi")
    (other / "train-semi").mkdir()
    shutil.rmtree(other / "validation")
    with pytest.raises(UserError, match="no folders of images by synset"):
        open_masks(str(other))


@pytest.mark.parametrize("masks", ["masks", "annotations"])
def test_folders_of_anybody(tmp_path, masks):
    opened = open_masks(str(make_folders(tmp_path / "mine", masks)))
    assert opened.classes == tuple(f"class {k}" for k in range(24))
    assert list(opened.splits["val"].sample_ids) == ["deep/0.png", "deep/1.png"]
    assert opened.pair("val", 1)[1].ravel().tolist() == list(range(24))
    mask(opened.root / f"{masks}/val/deep/1.png", 255)
    assert (opened.pair("val", 1)[1] == IGNORE).all()
    (opened.root / "classes.txt").write_text("only one")
    with pytest.raises(UserError, match=r"names 1 classes. Expected 2 to 255"):
        open_masks(str(opened.root))
    (opened.root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"classes.txt is missing. Expected the names"):
        open_masks(str(opened.root))


def save_as(mode: str):
    def save(path: Path) -> None:
        ones = np.ones((HEIGHT, WIDTH), np.uint8)
        made = Image.fromarray(ones.astype(np.uint16) if mode == "I;16" else ones)
        (made if mode == "I;16" else made.convert(mode)).save(path)

    return save


def save_bits(bits: int):
    """Gray of so many bits, which Pillow does not write."""

    def save(path: Path) -> None:
        import struct
        import zlib

        rows = b"".join(b"\0" + bytes(-(-WIDTH * bits // 8)) for _ in range(HEIGHT))
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
        made = b"\x89PNG\r\n\x1a\n"
        for kind, data in (*chunks, (b"IEND", b"")):
            made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        path.write_bytes(made)

    return save


# fmt: off
BAD = {
    "rgb":       (save_as("RGB"),                                       "a color picture. Expected an index mask"),
    "rgba":      (save_as("RGBA"),                                      "color picture with alpha"),
    "16 bits":   (save_as("I;16"),                                      "gray of 16 bits. .*8-bit gray or palette"),
    "4 bits":    (save_bits(4),                                         "gray of 4 bits"),
    "2 bits":    (save_bits(2),                                         "gray of 2 bits"),
    "alpha":     (save_as("LA"),                                        "gray with alpha"),
    "turned":    (lambda p: Image.new("L", (HEIGHT, WIDTH)).save(p),    r"0.png has 4 x 6 px, and its image .* 6 x 4"),
    "outside":   (lambda p: mask(p, 24),                                r"24 \(24 px\). Expected 0 to 23, or 255"),
    "jpeg":      (lambda p: Image.new("L", (6, 4)).save(p, "JPEG"),     "cannot decode .*0.png: it is no PNG file"),
    "text":      (lambda p: p.write_text("mask"),                       "it is no PNG file"),
    "cut":       (lambda p: p.write_bytes(p.read_bytes()[:-25]),        "cannot decode .*masks/train/deep/0.png"),
    "gone":      (lambda p: p.unlink(),                                 "0.png has gone"),
}
# fmt: on


@pytest.mark.parametrize("what", BAD)
def test_a_mask_that_does_not_fit_is_refused_by_its_name(what, tmp_path):
    opened = open_masks(str(make_folders(tmp_path / "mine")))
    path = opened.root / "masks/train/deep/0.png"
    BAD[what][0](path)
    with pytest.raises(UserError, match=BAD[what][1]) as error:
        opened.pair("train", 0)
    assert str(path) in str(error.value)
    assert isinstance(error.value, BrokenImage) == (what in {"jpeg", "text", "cut"})
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # noqa: S301
    opened.pair("train", 1)


def test_one_bit_and_small_palettes_hold_what_they_say(tmp_path):
    opened = open_masks(str(make_folders(tmp_path / "mine")))
    bits = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2
    Image.fromarray(bits.astype(bool)).save(opened.root / "masks/train/deep/0.png")
    small = Image.fromarray((3 * bits).astype(np.uint8))
    small.putpalette(voc_palette()[:4].tobytes())
    small.save(opened.root / "masks/train/deep/1.png", bits=2)
    np.testing.assert_array_equal(opened.pair("train", 0)[1], bits)
    np.testing.assert_array_equal(opened.pair("train", 1)[1], 3 * bits)


def test_an_image_turned_by_exif_is_not_turned_here(tmp_path):
    root = make_folders(tmp_path / "mine")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(root / "images/train/deep/0.png", exif=exif)
    opened = open_masks(str(root))
    assert opened.pair("train", 0)[0].size == (WIDTH, HEIGHT)  # the mask is drawn over what is stored
    Image.new("L", (HEIGHT, WIDTH)).save(root / "masks/train/deep/0.png")
    with pytest.raises(UserError, match="The image has an EXIF orientation, which is not applied here"):
        opened.pair("train", 0)


def without(root: Path, *names: str) -> str:
    for name in names:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return str(root)


# fmt: off
OPENING = {
    "masks missing":   (lambda p: without(make_ade20k(p), "annotations/training/ADE_training_1.png"),
                        "1 of 3 images in .*training have no mask in .*annotations/training: ADE_training_1"),
    "no masks at all": (lambda p: without(make_ade20k(p), "annotations"), "there is no folder .*annotations/training"),
    "no images":       (lambda p: without(make_ade20k(p), "images"),      "has neither .*images/training nor"),
    "empty images":    (lambda p: without(make_ade20k(p), *(f"images/training/ADE_training_{i}.jpg" for i in range(3))),
                        "holds no images"),
    "nothing there":   (str,                                              "is no dataset .*there is no folder"),
    "a file":          (lambda p: p.write_text("x") and str(p),           "is a file"),
    "something else":  (lambda p: p.mkdir() or str(p),                    "in a known layout. Expected one of toy"),
    "too high":        (lambda p: str(make_ade20k(p / "x" / "y").parents[1]), "It looks as if .*/x/y were meant"),
    "too deep":        (lambda p: str(make_ade20k(p) / "images/training"), "It looks as if .*mine were meant"),
    "city labels":     (lambda p: without(make_cityscapes(p), "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"),
                        "1 of 2 images .*: ulm/ulm_000000_000019"),
    "city images":     (lambda p: without(make_cityscapes(p), "leftImg8bit"), "has neither .*leftImg8bit/train nor"),
    "voc images":      (lambda p: without(make_voc(p), "JPEGImages/2007_1.jpg"), "1 of 1 images that .*val.txt lists"),
    "voc lists":       (lambda p: without(make_voc(p), "ImageSets"),      "has neither train.txt nor val.txt"),
    "synset mask":     (lambda p: without(make_imagenet_s(p), "train-semi-segmentation/n02/n02_1.png"),
                        "1 of 6 images .*: n02/n02_1"),
    "two images":      (lambda p: image(make_ade20k(p) / "images/training/ADE_training_1.png") or str(p),
                        "has both ADE_training_1.jpg and ADE_training_1.png"),
}
# fmt: on


@pytest.mark.parametrize("what", OPENING)
def test_what_cannot_be_opened(what, tmp_path):
    make, message = OPENING[what]
    with pytest.raises(UserError, match=message):
        open_masks(make(tmp_path / "mine"))


def test_masks_without_images_are_noted_and_one_split_is_enough(tmp_path):
    root = make_ade20k(tmp_path / "mine")
    without(root, "images/training/ADE_training_1.jpg", "images/validation", "annotations/validation")
    opened = open_masks(str(root))
    assert list(opened.splits) == ["train"]
    assert len(opened.splits["train"]) == 2
    (note,) = opened.notes
    assert "1 masks in" in note
    assert note.endswith("have no image: ADE_training_1")


def test_nothing_is_decoded_while_opening(tmp_path):
    root = make_ade20k(tmp_path / "mine")
    for path in root.rglob("*_0.*"):
        path.write_bytes(b"")
    opened = open_masks(str(root))
    with pytest.raises(BrokenImage):
        opened.pair("train", 0)


def test_a_changed_mask_is_another_dataset(tmp_path):
    root = make_folders(tmp_path / "mine")
    before = open_masks(str(root))
    moved = open_masks(str(make_folders(tmp_path / "elsewhere")))
    assert moved.splits["train"].manifest_sha256 == before.splits["train"].manifest_sha256
    assert moved.splits["train"].freshness != before.splits["train"].freshness
    path = root / "masks/train/deep/2.png"
    stored = path.read_bytes()
    changed = numbered()
    changed[0, 0] = 1
    Image.fromarray(changed).save(path, compress_level=0)
    mask_size = path.stat().st_size
    Image.fromarray(numbered()).save(path, compress_level=0)
    assert path.stat().st_size == mask_size  # so sizes would not tell
    same = open_masks(str(root)).splits["train"].manifest_sha256
    Image.fromarray(changed).save(path, compress_level=0)
    after = open_masks(str(root))
    assert after.splits["train"].manifest_sha256 != same
    assert after.splits["train"].freshness != before.splits["train"].freshness
    assert after.splits["val"].manifest_sha256 == before.splits["val"].manifest_sha256
    path.write_bytes(stored)
    (root / "classes.txt").write_text("".join(f"class {k}\n" for k in range(25)))
    assert open_masks(str(root)).splits["val"].manifest_sha256 != before.splits["val"].manifest_sha256


def test_subsets_and_limits_keep_images_and_masks_together(tmp_path):
    opened = open_masks(str(make_ade20k(tmp_path / "mine")))
    part = pickle.loads(pickle.dumps(opened.subset("train", np.array([2, 0]))))  # noqa: S301
    assert list(part.splits["train"].sample_ids) == ["ADE_training_2.jpg", "ADE_training_0.jpg"]
    assert len(part.splits["val"]) == 2
    for index, number in enumerate((2, 0)):
        for one, other in zip(part.pair("train", index), opened.pair("train", number), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    limited = opened.limited(2)
    assert list(limited.splits["train"].sample_ids) == ["ADE_training_0.jpg", "ADE_training_1.jpg"]
    assert list(opened.limited(1).splits["train"].sample_ids) == ["ADE_training_0.jpg"]
    assert len(opened.limited(9).splits["val"]) == 2
    assert opened.splits["val"].manifest_sha256 == opened.limited(9).splits["val"].manifest_sha256
    assert opened.splits["train"].manifest_sha256 != limited.splits["train"].manifest_sha256


def test_a_limit_takes_from_everywhere(tmp_path):
    opened = open_masks(str(make_imagenet_s(tmp_path / "small")))
    assert [name[:3] for name in opened.limited(3).splits["train"].sample_ids] == ["n01", "n02", "n03"]


def test_names_are_looked_for_under_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    for name in KNOWN:
        with pytest.raises(UserError, match=f"dataset '{name}' .* is not in {tmp_path}. Expected {tmp_path / name}"):
            open_masks(name)
    (tmp_path / "ade20k").mkdir()  # an empty folder does not hide the other one
    make_ade20k(tmp_path / "ADEChallengeData2016")
    assert open_masks("ade20k").name == "ade20k"
    make_cityscapes(tmp_path / "cityscapes")
    assert open_masks("cityscapes").scale_px == (2048, 1024)
    assert set(KNOWN) < set(MASKS)


def test_the_complete_datasets_have_the_published_counts():
    """ADE20K: sceneparsing's README; Cityscapes: cityscapesScripts' README; ImageNet-S: the table in its README."""
    assert {name: known.complete for name, known in KNOWN.items()} == {
        "ade20k": (150, 20210, 2000),
        "cityscapes": (19, 2975, 500),
        "voc": (21, 1464, 1449),
        "voc-aug": (21, 10582, 1449),
        "imagenet-s-919": (920, 9190, 12419),
        "imagenet-s-300": (301, 3000, 4097),
        "imagenet-s-50": (51, 500, 752),
    }


# COCO's objects as masks


def rectangle(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def make_coco(root: Path) -> Path:
    """A large and a small object of two categories, a crowd, an object with a box alone, and a line of two points."""
    (root / "annotations").mkdir(parents=True)
    image(root / "val2017/a.png", size=(12, 10))
    image(root / "val2017/b.png", size=(12, 10))
    crowd = {"counts": [60, 60], "size": [10, 12]}  # the right half, column by column
    rows = [
        (1, 4, [2, 2, 3, 3], 9.0, 0, rectangle(2, 2, 5, 5)),
        (2, 9, [0, 0, 8, 8], 64.0, 0, rectangle(0, 0, 8, 8)),
        (3, 4, [6, 0, 6, 10], 60.0, 1, crowd),
        (4, 9, [1, 8.5, 2, 1.5], 3.0, 0, []),
        (5, 4, [9, 9, 1, 1], 1.0, 0, [[9, 9, 10, 10]]),
    ]
    keys = ("id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    document = {
        "images": [{"id": 7 + i, "file_name": f"{n}.png", "width": 12, "height": 10} for i, n in enumerate("ab")],
        "annotations": [{"image_id": 7, **dict(zip(keys, row, strict=True))} for row in rows],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
    }
    (root / "annotations/instances_val2017.json").write_text(json.dumps(document))
    return root


def test_coco_paints_small_over_large_and_ignores_crowds(tmp_path):
    opened = open_masks(str(make_coco(tmp_path / "mine")))
    assert opened.classes == ("background", "cat", "dog")
    assert (opened.name, list(opened.splits)) == ("mine", ["val"])
    expected = np.zeros((10, 12), int)
    expected[:, 6:] = IGNORE  # the crowd
    expected[8:10, 1:3] = IGNORE  # a box, and nothing is known of what is in it
    expected[0:8, 0:8] = 2  # over the crowd
    expected[2:5, 2:5] = 1  # over the larger one, though it is listed first
    np.testing.assert_array_equal(opened.pair("val", 0)[1], expected)
    assert not opened.pair("val", 1)[1].any()
    swapped = opened.subset("val", [1, 0])
    np.testing.assert_array_equal(swapped.pair("val", 1)[1], expected)
    assert opened.splits["val"].manifest_sha256 != open_coco(str(opened.root)).splits["val"].manifest_sha256
    path = opened.root / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace("[60, 60]", "[61, 59]"))
    assert open_masks(str(opened.root)).splits["val"].manifest_sha256 != opened.splits["val"].manifest_sha256
    path.write_text(path.read_text().replace('"size": [10, 12]', '"size": [12, 10]'))
    with pytest.raises(UserError, match=r"instances_val2017.json: annotation 3 has run lengths of size"):
        open_masks(str(opened.root)).pair("val", 0)


def test_coco_by_name_is_coco_2017(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    make_coco(tmp_path / "coco")
    assert (open_masks("coco").name, open_masks("coco").scale_px) == ("coco", (2048, 512))


def test_coco_without_pycocotools_is_refused_while_opening(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="package pycocotools, which is not installed"):
        open_masks(str(make_coco(tmp_path / "mine")))


def test_compressed_run_lengths_are_read_too(tmp_path):
    from pycocotools import mask as tools

    root = make_coco(tmp_path / "mine")
    before = open_masks(str(root)).pair("val", 0)[1]
    path = root / "annotations/instances_val2017.json"
    document = json.loads(path.read_text())
    for entry in document["annotations"]:
        if isinstance(entry["segmentation"], dict):
            packed = tools.frPyObjects(entry["segmentation"], 10, 12)
            entry["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
    path.write_text(json.dumps(document))
    np.testing.assert_array_equal(open_masks(str(root)).pair("val", 0)[1], before)
