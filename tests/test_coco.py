"""COCO's layout, read and written: against pycocotools, and against files written by hand."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate import toy_coco
from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.toy_coco import CATEGORY_IDS, labels_of, polygons, run_lengths, write_coco
from ssl_bench.evaluate.toyworld import scene

SQUARE = [[10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]]


def annotation(number: int, image: int, category: int, box: list[float], **more: object) -> dict[str, object]:
    """An entry as in COCO's files; the image may come first, last or in between."""
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
    return entry | {"iscrowd": 0, "segmentation": SQUARE} | more


def hand_written() -> dict[str, list]:
    """Three images, not in the order of their names; two categories with ids that leave a gap.

    8.44 + 22.98 - 8.44 is not 22.98 in binary floating point: a box must stay as it is given.
    """
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "c.png", "width": 40, "height": 30},
            {"id": 5, "file_name": "a.png", "width": 50, "height": 30},
        ],
        "annotations": [
            annotation(12, 7, 9, [1, 2, 10, 20], segmentation=[[0, 0, 5, 0, 5, 5], [7, 7.25, 9, 7, 9, 9.5, 8, 8]]),
            annotation(11, 7, 4, [8.44, 0.2, 22.98, 20.7]),
            annotation(15, 5, 9, [-5, 25, 15, 15], area=33.5),  # reaches out of the image on two sides
            annotation(13, 3, 4, [5, 5, 10, 0]),  # no height
            annotation(14, 3, 4, [40, 5, 10, 5]),  # beside the image
            annotation(16, 5, 4, [3, 4, 5, 6], iscrowd=1, segmentation={"counts": [600, 30, 870], "size": [30, 50]}),
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
    }


def write(root: Path, document: object, split: str = "val2017", *, seed: int = 0) -> Path:
    """A document and random images for it, in COCO's layout."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    rng = np.random.RandomState(seed)
    for image in document["images"] if isinstance(document, dict) else ():
        pixels = rng.randint(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / image["file_name"])
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return root


def test_columns_are_those_of_the_file(tmp_path):
    opened = open_coco(str(write(tmp_path / "mine", hand_written())))
    assert (opened.name, opened.built_in, opened.categories) == ("mine", False, ("cat", "dog"))
    assert list(opened.splits) == list(opened.annotations) == ["val"]
    split, annotations = opened.splits["val"], opened.annotations["val"]
    assert list(split.sample_ids) == ["a.png", "b.png", "c.png"]
    assert split.labels.tolist() == [0, 0, 0]
    assert len(split.classes) == 1
    assert split.image(1).size == (40, 30)
    assert annotations.id.tolist() == [15, 16, 11, 12]
    assert annotations.image.tolist() == [0, 0, 1, 1]
    assert annotations.category.tolist() == [1, 0, 0, 1]
    assert annotations.box.tolist() == [[0, 25, 10, 5], [3, 4, 5, 6], [8.44, 0.2, 22.98, 20.7], [1, 2, 10, 20]]
    assert annotations.area.tolist() == [33.5, 30, 22.98 * 20.7, 200]
    assert annotations.crowd.tolist() == [False, True, False, False]
    assert annotations.size_px.tolist() == [[50, 30], [40, 30], [40, 30]]
    assert [list(annotations.rows(image)) for image in range(3)] == [[0, 1], [2, 3], []]
    assert annotations.outlines[1] == {"counts": [600, 30, 870], "size": [30, 50]}
    assert annotations.outlines[0] == annotations.outlines[2] == SQUARE
    assert annotations.outlines[3] == [[0, 0, 5, 0, 5, 5], [7, 7.25, 9, 7, 9, 9.5, 8, 8]]
    (note,) = opened.notes
    assert note.startswith("2 boxes of instances_val2017.json have no extent")
    assert note.endswith("annotation 13, annotation 14")
    assert opened.without_extent == {"val": (13, 14)}
    assert opened.files == {"val": tmp_path / "mine" / "annotations" / "instances_val2017.json"}


def test_a_limit_takes_images_with_what_is_in_them(tmp_path):
    whole = open_coco(str(write(tmp_path / "mine", hand_written())))
    assert whole.limited(9).splits["val"].manifest_sha256 == whole.splits["val"].manifest_sha256
    part = whole.limited(2)
    assert list(part.splits["val"].sample_ids) == ["a.png", "b.png"]
    assert len(part.annotations["val"]) == 4
    assert (part.files, part.without_extent) == (whole.files, whole.without_extent)
    chosen = whole.annotations["val"].take(np.array([1]))
    assert chosen.size_px.tolist() == [[40, 30]]
    assert (chosen.id.tolist(), chosen.image.tolist(), chosen.category.tolist()) == ([11, 12], [0, 0], [0, 1])
    assert [chosen.outlines[row] for row in range(2)] == [whole.annotations["val"].outlines[row] for row in (2, 3)]
    assert part.splits["val"].manifest_sha256 != whole.splits["val"].manifest_sha256


def manifest(root: Path, document: dict) -> str:
    return open_coco(str(write(root, document))).splits["val"].manifest_sha256


MOVED = [0, 0, 5, 0, 5, 5, 7, 7.25, 9, 7, 9, 9.5, 8, 8]  # the same numbers, another end of the first polygon

# fmt: off
CHANGES = {
    "box":           lambda d: d["annotations"][0]["bbox"].__setitem__(2, 11),
    "area":          lambda d: d["annotations"][0].update(area=1.5),
    "crowd":         lambda d: d["annotations"][0].update(iscrowd=1),
    "category":      lambda d: d["annotations"][0].update(category_id=4),
    "name":          lambda d: d["categories"][0].update(name="wolf"),
    "image":         lambda d: d["annotations"][0].update(image_id=5),
    "coordinate":    lambda d: d["annotations"][0]["segmentation"][0].__setitem__(1, 0.5),
    "polygons":      lambda d: d["annotations"][0].update(segmentation=[MOVED[:8], MOVED[8:]]),
    "run":           lambda d: d["annotations"][5]["segmentation"].update(counts=[601, 29, 870]),
    "no outline":    lambda d: d["annotations"][0].pop("segmentation"),
    "one more":      lambda d: d["annotations"].append(annotation(99, 3, 4, [0, 0, 9, 9])),
    "one less":      lambda d: d["annotations"].pop(0),
}
# fmt: on


@pytest.mark.parametrize("what", CHANGES)
def test_the_manifest_tells_changed_annotations_apart(what, tmp_path):
    changed = hand_written()
    CHANGES[what](changed)
    assert manifest(tmp_path / "a", changed) != manifest(tmp_path / "b", hand_written())


def test_the_manifest_does_not_depend_on_order_ids_or_place(tmp_path):
    other = hand_written()
    for entries in other.values():
        entries.reverse()
    for image in other["images"]:
        image["id"] += 100
    for each in other["annotations"]:
        each["image_id"] += 100
        each["id"] += 10**6
    root = write(tmp_path / "a", hand_written())
    write(tmp_path / "b", hand_written())  # the same images
    path = tmp_path / "b" / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(other, indent=3))
    first, second = (open_coco(str(at)).splits["val"] for at in (root, tmp_path / "b"))
    assert first.manifest_sha256 == second.manifest_sha256
    assert first.freshness != second.freshness


def set_value(kind: str, number: int, **values: object):
    return lambda document: document[kind][number].update(values)


# fmt: off
BAD = {
    "unknown image":     (set_value("annotations", 1, image_id=99),             "1 annotations .* image_id: 99"),
    "unknown category":  (set_value("annotations", 1, category_id=1),           "unknown category_id: 1. .*categories"),
    "annotation twice":  (set_value("annotations", 1, id=12),                   "several annotations with the id 12"),
    "image twice":       (set_value("images", 1, id=7),                         "several images with the id 7"),
    "file twice":        (set_value("images", 1, file_name="a.png"),            "several images named a.png"),
    "category twice":    (set_value("categories", 1, id=9),                     "several categories with the id 9"),
    "name twice":        (set_value("categories", 1, name="dog"),               "several categories named dog"),
    "no box":            (lambda d: d["annotations"][1].pop("bbox"),            "annotation 11 has bbox null. .*COCO"),
    "short box":         (set_value("annotations", 1, bbox=[1, 2, 3]),          r"annotation 11 has bbox \[1, 2, 3\]"),
    "box of words":      (set_value("annotations", 1, bbox=["1", 2, 3, 4]),     r"\[left, top, width, height\]"),
    "box of nan":        (set_value("annotations", 1, bbox=[1, 2, 3, float("nan")]), "annotation 11 has bbox"),
    "no area":           (lambda d: d["annotations"][1].pop("area"),            "annotation 11 has area null"),
    "crowd of two":      (set_value("annotations", 1, iscrowd=2),               "annotation 11 has iscrowd 2"),
    "outline of words":  (set_value("annotations", 1, segmentation=[["a"]]),    "annotation 11 has segmentation"),
    "flat outline":      (set_value("annotations", 1, segmentation=[1, 2, 3]),  "annotation 11 has segmentation"),
    "runs without size": (set_value("annotations", 1, segmentation={"counts": [1]}), "annotation 11 has segmentation"),
    "id of words":       (set_value("annotations", 1, id="x"),                  "annotation x has id .x."),
    "no id":             (lambda d: d["annotations"][1].pop("id"),              "annotation number 1 has id null"),
    "no object":         (lambda d: d["annotations"].insert(0, 5),              "annotation number 0 has no object"),
    "no width":          (set_value("images", 1, width=0),                      "image 3 has width 0"),
    "elsewhere":         (set_value("images", 1, file_name="../c.png"),         "image 3 has file_name .*below"),
    "absolute":          (set_value("images", 1, file_name="/c.png"),           "image 3 has file_name .*below"),
    "missing file":      (set_value("images", 1, file_name="d.png"),            "1 of 3 images .* d.png"),
    "no images":         (lambda d: d.update(images=[], annotations=[]),        "lists no images"),
    "no annotations":    (lambda d: d.pop("annotations"),                       "lacks the lists annotations"),
    "not lists":         (lambda d: d.update(images={}, categories=5),          "lacks the lists images, categories"),
}
# fmt: on


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_by_name(what, tmp_path):
    change, message = BAD[what]
    document = hand_written()
    root = write(tmp_path / "mine", document)
    changed = copy.deepcopy(document)
    change(changed)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=message) as error:
        open_coco(str(root))
    assert "val2017" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_what_is_not_json_is_refused(text, tmp_path):
    root = write(tmp_path / "mine", hand_written())
    (root / "annotations" / "instances_val2017.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is not JSON"):
        open_coco(str(root))


def test_a_list_is_no_document(tmp_path):
    with pytest.raises(UserError, match="lacks the lists images, annotations, categories"):
        open_coco(str(write(tmp_path / "mine", [1])))


def test_layouts_that_are_found_and_that_are_not(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no folder nothing-here.*toy-coco.*instances_val"):
        open_coco("nothing-here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no folder annotations"):
        open_coco(str(tmp_path / "empty"))
    root = write(tmp_path / "mine", hand_written(), "train")
    assert list(open_coco(str(root)).splits) == ["train"]
    write(root, hand_written(), "val_b")
    assert list(open_coco(str(root)).splits) == ["train", "val"]
    write(root, hand_written(), "val_c")
    with pytest.raises(UserError, match=r"2 files of val: instances_val_b.json, instances_val_c.json"):
        open_coco(str(root))
    write(root, hand_written() | {"annotations": []}, "val2017")
    assert len(open_coco(str(root)).annotations["val"]) == 0
    (root / "images").mkdir()
    (root / "val2017").rename(root / "images" / "val2017")
    assert len(open_coco(str(root)).splits["val"]) == 3
    (root / "images").rename(root / "elsewhere")
    with pytest.raises(UserError, match=r"expected them in .*val2017 or .*images/val2017"):
        open_coco(str(root))


def test_the_name_coco_means_coco_2017_under_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    with pytest.raises(UserError, match="coco is no dataset of images with boxes"):
        open_coco("coco")
    write(tmp_path / "coco", hand_written(), "val2014")
    with pytest.raises(UserError, match=r"no instances_train2017.json or instances_val2017.json"):
        open_coco("coco")
    write(tmp_path / "coco", hand_written(), "val2017")
    opened = open_coco("coco")
    assert opened.name == "coco"
    assert opened.splits["val"].source.files.root.endswith("val2017")


def test_the_annotations_of_train_without_its_images_leave_val(tmp_path):
    for split in ("train2017", "val2017"):
        write(tmp_path, hand_written(), split)
    shutil.rmtree(tmp_path / "train2017")
    opened = open_coco(str(tmp_path))
    assert set(opened.splits) == {"val"}
    assert any("no train split" in note for note in opened.notes)


def test_every_split_keeps_its_own_file_and_what_it_lacks(tmp_path):
    document = hand_written()
    root = write(tmp_path / "mine", document, "train2017")
    document["annotations"] = document["annotations"][:4]
    opened = open_coco(str(write(root, document)))
    folder = root / "annotations"
    assert opened.files == {name: folder / f"instances_{name}2017.json" for name in ("train", "val")}
    assert opened.without_extent == {"train": (13, 14), "val": (13,)}


def test_train_and_val_must_have_the_same_categories(tmp_path):
    root = write(tmp_path / "mine", hand_written(), "val2017")
    other = hand_written()
    other["categories"][0]["name"] = "wolf"
    write(root, other, "train2017")
    with pytest.raises(UserError, match="different categories"):
        open_coco(str(root))


def test_an_image_of_another_size_than_its_annotations_say_is_broken(tmp_path):
    root = write(tmp_path / "mine", hand_written())
    Image.new("RGB", (30, 40)).save(root / "val2017" / "b.png")
    split = open_coco(str(root)).splits["val"]
    assert split.image(0).size == (50, 30)
    with pytest.raises(BrokenImage, match=r"b.png: it has 30 x 40 px, and its annotations say 40 x 30"):
        split.image(1)
    with pytest.raises(BrokenImage, match=r"b.png: .* say 40 x 30"):
        split.subset(np.array([1])).image(0)


# pycocotools is older than NumPy 2's rules for copies.
quiet = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def pycoco(path: Path):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@quiet
def test_pycocotools_finds_the_exact_masks_in_the_toy_files(tmp_path):
    write_coco(tmp_path, train=60, val=25)
    crowds = in_parts = 0
    for split, count in (("train", 60), ("val", 25)):
        opened = pycoco(tmp_path / "annotations" / f"instances_{split}2017.json")
        assert set(opened.dataset) == {"info", "licenses", "images", "annotations", "categories"}
        assert [each["name"] for each in opened.loadCats(opened.getCatIds())][:2] == ["arrow", "cross"]
        assert max(CATEGORY_IDS) > len(CATEGORY_IDS)
        assert len(opened.imgs) == count
        for index, image in enumerate(opened.dataset["images"]):
            labels = labels_of(0, split, index)
            picture = scene(seed=0, split=split, index=index, height_px=96, width_px=96, labels=labels)
            stored = np.asarray(Image.open(tmp_path / f"{split}2017" / image["file_name"]))
            np.testing.assert_array_equal(stored, picture.image)
            entries = opened.loadAnns(opened.getAnnIds(image["id"]))
            painted, members = np.zeros((96, 96), int), 0
            for entry in entries:
                mask = opened.annToMask(entry).astype(bool)
                painted[mask] = 1 + CATEGORY_IDS.index(entry["category_id"])
                same = [each for each in picture.instances if (each.mask & mask).any()]
                union = np.any([each.mask for each in same], axis=0)
                assert (union == mask).all()  # pixel by pixel, where IoU > .95 was asked for
                assert len(same) > 1 if entry["iscrowd"] else len(same) == 1
                x, y, width, height = entry["bbox"]
                x0, y0 = (np.flatnonzero(mask.any(axis=axis))[0] for axis in (0, 1))
                x1, y1 = (np.flatnonzero(mask.any(axis=axis))[-1] + 1 for axis in (0, 1))
                assert (x, y, x + width, y + height) == (x0, y0, x1, y1)
                assert entry["area"] == mask.sum()
                members += len(same)
                crowds += entry["iscrowd"]
                in_parts += not entry["iscrowd"] and len(entry["segmentation"]) > 1
            assert members == len(labels)
            assert (painted == picture.semantic).all()
    assert crowds > 0
    assert in_parts > 0


@quiet
def test_any_mask_comes_back_from_its_polygons_and_its_run_lengths():
    """Noise: pixels that meet at a corner, holes in islands in holes."""
    from pycocotools import mask as tools

    rng = np.random.RandomState(0)
    for share in (0.03, 0.3, 0.5, 0.7, 0.97):
        for height, width in ((1, 1), (1, 7), (5, 1), (12, 17)):
            mask = rng.rand(height, width) < share
            mask[0, 0] = True
            outlines = polygons(mask)
            decoded = tools.decode(tools.merge(tools.frPyObjects(outlines, height, width)))
            np.testing.assert_array_equal(decoded.astype(bool), mask)
            areas = [area_of(outline) for outline in outlines]
            assert sum(areas) == mask.sum()  # none overlaps another one
            assert min(areas) > 0
            runs = run_lengths(mask)
            np.testing.assert_array_equal(tools.decode(tools.frPyObjects(runs, height, width)).astype(bool), mask)
            assert sum(runs["counts"]) == height * width


def area_of(outline: list[float]) -> float:
    x, y = np.array(outline).reshape(-1, 2).T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def test_a_ring_is_cut_in_two():
    ring = np.ones((5, 5), bool)
    ring[1:4, 1:4] = False
    upper, lower = polygons(ring)
    assert area_of(upper) + area_of(lower) == 16
    assert len(upper) == len(lower) == 2 * 8
    whole = np.zeros((5, 6), bool)
    whole[1:3, 2:5] = True
    assert polygons(whole) == [[2, 1, 5, 1, 5, 3, 2, 3]]


def test_pixels_that_meet_at_a_corner_have_outlines_of_their_own():
    falling = [[0, 0, 1, 0, 1, 1, 0, 1], [1, 1, 2, 1, 2, 2, 1, 2]]
    rising = [[0, 1, 1, 1, 1, 2, 0, 2], [1, 0, 2, 0, 2, 1, 1, 1]]
    assert polygons(np.eye(2, dtype=bool)) == falling
    assert polygons(np.eye(2, dtype=bool)[::-1]) == rising


def test_objects_of_a_class_that_touch_are_one_crowd():
    from types import SimpleNamespace

    def thing(label, rows, columns):
        mask = np.zeros((20, 20), bool)
        mask[rows, columns] = True
        return SimpleNamespace(label=label, mask=mask)

    a = thing(1, slice(0, 5), slice(0, 5))
    beside, corner, apart = (
        thing(1, slice(0, 5), slice(5, 9)),
        thing(1, slice(5, 9), slice(9, 12)),
        thing(1, slice(0, 3), slice(11, 14)),
    )
    other, hidden = thing(2, slice(5, 9), slice(0, 5)), thing(2, slice(0, 0), slice(0, 0))
    entries = toy_coco.annotate(SimpleNamespace(instances=(a, other, corner, apart, beside, hidden)))
    assert sorted((each["category_id"], each["iscrowd"], each["area"]) for each in entries) == [
        (CATEGORY_IDS[1], 0, 9.0),
        (CATEGORY_IDS[1], 0, 12.0),
        (CATEGORY_IDS[1], 1, 45.0),
        (CATEGORY_IDS[2], 0, 20.0),
    ]


def test_toy_coco_is_frozen_and_has_its_sizes():
    opened = open_coco("toy-coco")
    assert (opened.name, opened.built_in, len(opened.categories), opened.notes) == ("toy-coco", True, 10, ())
    assert {name: len(split) for name, split in opened.splits.items()} == {"train": 400, "val": 200}
    assert {name: len(each) for name, each in opened.annotations.items()} == {"train": 946, "val": 489}
    assert int(opened.annotations["val"].crowd.sum()) == 12
    assert opened.splits["val"].image(0).size == (96, 96)
    for name, expected in (("train", "e016ab3432c04a46"), ("val", "1c450b3a9771a6d6")):
        path = opened.root / "annotations" / f"instances_{name}2017.json"
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == expected
    assert open_coco("toy-coco").splits["val"].manifest_sha256 == opened.splits["val"].manifest_sha256
    assert {len(labels_of(0, "train", index)) for index in range(400)} == {1, 2, 3, 4}


def test_the_first_of_a_toy_file_do_not_depend_on_how_many_there_are(tmp_path):
    seen = []
    write_coco(tmp_path / "a", train=3, val=1, progress=lambda done, total: seen.append((done, total)))
    write_coco(tmp_path / "b", train=5, val=1)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    first, second = (
        json.loads((tmp_path / at / "annotations" / "instances_train2017.json").read_text()) for at in "ab"
    )
    assert second["images"][:3] == first["images"]
    assert second["annotations"][: len(first["annotations"])] == first["annotations"]
    ids = [each["id"] for each in first["annotations"]]
    later = json.loads((tmp_path / "a" / "annotations" / "instances_val2017.json").read_text())
    assert not {each["id"] for each in later["annotations"]} & set(ids)
    assert later["images"][0]["id"] not in {each["id"] for each in first["images"]}
    with pytest.raises(UserError, match="train=0"):
        write_coco(tmp_path / "c", train=0)
