"""What `ssl-bench data check` says of good and of bad datasets."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from tiny_images import make_synsets, save

from ssl_bench.evaluate.datasets import check_dataset


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
