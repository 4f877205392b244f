"""The toy world in DAVIS' layout: what is written is what the sequences show, and never changes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate import toy_davis
from ssl_bench.evaluate.toy_davis import write_davis
from ssl_bench.evaluate.toyworld import CLASSES, sequence
from ssl_bench.evaluate.videos import open_videos, read_objects


def test_what_is_written_is_what_the_sequences_show(tmp_path):
    reports = []
    write_davis(tmp_path, train=1, val=2, frames=3, progress=lambda *report: reports.append(report))
    assert reports == [(1, 3), (2, 3), (3, 3)]
    lists = {split: (tmp_path / f"ImageSets/2017/{split}.txt").read_text().split() for split in ("train", "val")}
    assert {split: len(names) for split, names in lists.items()} == {"train": 1, "val": 2}
    for name in lists["train"] + lists["val"]:
        index, *labels = name.split("-")
        scenes = list(
            sequence(seed=0, index=int(index), frames=3, height_px=96, width_px=128, objects=1 + int(index) % 3)
        )
        assert [CLASSES[instance.label] for instance in scenes[0].instances] == labels
        assert len({path.name for path in (tmp_path / "JPEGImages/480p" / name).iterdir()}) == 3
        for number, scene in enumerate(scenes):
            frame = Image.open(tmp_path / f"JPEGImages/480p/{name}/{number:05d}.png")
            mask = Image.open(tmp_path / f"Annotations/480p/{name}/{number:05d}.png")
            np.testing.assert_array_equal(np.array(frame), scene.image)
            assert mask.mode == "P"
            np.testing.assert_array_equal(np.array(mask), scene.instance_map)
        assert all((scenes[0].instance_map == k).sum() >= 150 for k in range(1, len(labels) + 1))
    assert np.reshape(mask.getpalette(), (-1, 3))[:3].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]


def test_built_in_by_name(shared_cache):
    videos = open_videos("toy-davis")
    assert videos.built_in
    assert videos.root.parent == shared_cache / "datasets"
    assert {split: len(each) for split, each in videos.videos.items()} == {"train": 2, "val": 10}
    assert {split: len(each) for split, each in videos.splits.items()} == {"train": 48, "val": 240}
    assert [read_objects(video).count for video in videos.videos["val"]].count(1) == 3
    assert sum(read_objects(video).count for video in videos.videos["val"]) == 21


def test_a_sequence_that_hides_an_object_at_first_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(toy_davis, "_LEAST_SEEN_PX", 1000)
    write_davis(tmp_path, train=1, val=1, frames=1)
    assert sorted(path.name[:3] for path in (tmp_path / "JPEGImages/480p").iterdir()) == ["000", "001"]
    monkeypatch.setattr(toy_davis, "_LEAST_SEEN_PX", 1700)
    write_davis(tmp_path / "b", train=1, val=1, frames=1)
    assert sorted(path.name[:3] for path in (tmp_path / "b/JPEGImages/480p").iterdir()) == ["000", "006"]


def test_not_a_byte_changes(tmp_path):
    """Whoever changes one raises TOY_DAVIS_VERSION."""
    write_davis(tmp_path, train=1, val=2, frames=2)
    found = hashlib.sha256()
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(tmp_path)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    assert toy_davis.TOY_DAVIS_VERSION == 1
    assert found.hexdigest()[:16] == "ed2ffe359a152a8f"


@pytest.mark.parametrize("counts", [{"train": 0}, {"val": 0}, {"frames": 0}])
def test_counts_that_are_too_small(counts, tmp_path):
    with pytest.raises(UserError, match=f"{next(iter(counts))}=0"):
        write_davis(tmp_path, **counts)
