"""CIFAR's binary batches and tar shards: tiny files of the true form, pixels and labels checked, and broken ones."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_images import holds, picture, save

from ssl_bench.errors import UserError
from ssl_bench.evaluate import archives
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.tar_index import tar_members

# CIFAR


def make_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, label_bytes: int) -> Path:
    """Both binary versions at full size are 180 MB: fewer records a file, all else true."""
    ten, hundred = archives.CIFAR_FORMATS
    small = (
        archives.CifarFormat(ten.folder, ten.train, ten.val, ten.class_names, 1, 4, 3),
        archives.CifarFormat(hundred.folder, hundred.train, hundred.val, hundred.class_names, 2, 5, 3),
    )
    monkeypatch.setattr(archives, "CIFAR_FORMATS", small)
    cifar = small[label_bytes - 1]
    folder = root / cifar.folder
    folder.mkdir(parents=True)
    (folder / cifar.class_names).write_text("airplane\nbird\ncat\n\n")
    for number, file in enumerate((*cifar.train, cifar.val)):
        records = cifar.val_records if file == cifar.val else cifar.train_records
        data = b""
        for record in range(records):
            pixels = picture(100 * number + record, 32).transpose(2, 0, 1)
            data += bytes([7] * (label_bytes - 1) + [(number + record) % 3]) + pixels.tobytes()
        (folder / file).write_bytes(data)
    return root


def test_the_true_cifar_formats() -> None:
    ten, hundred = archives.CIFAR_FORMATS
    assert (ten.label_bytes, ten.train_records, ten.val_records, len(ten.train)) == (1, 10_000, 10_000, 5)
    assert (hundred.label_bytes, hundred.train_records, hundred.val_records, len(hundred.train)) == (
        2,
        50_000,
        10_000,
        1,
    )


@pytest.mark.parametrize("label_bytes", [1, 2])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label_bytes: int, inside: bool) -> None:
    make_cifar(tmp_path, monkeypatch, label_bytes)
    folder = tmp_path / archives.CIFAR_FORMATS[label_bytes - 1].folder
    dataset = open_dataset(str(folder if inside else tmp_path))
    train, val = dataset.train, dataset.val
    assert train is not None
    assert val is not None
    assert (len(train), len(val)) == ((20, 3) if label_bytes == 1 else (5, 3))
    assert train.classes == ("airplane", "bird", "cat")
    index, number = (9, 201) if label_bytes == 1 else (4, 4)  # record 1 of data_batch_3, record 4 of train
    np.testing.assert_array_equal(np.asarray(train.image(index)), picture(number, 32))
    assert train.labels[index] == (number // 100 + number % 100) % 3
    last = 500 if label_bytes == 1 else 100
    np.testing.assert_array_equal(np.asarray(val.subset([2, 0]).image(0)), picture(last + 2, 32))
    assert (train.sample_ids[0], val.sample_ids[2]) == (
        ("data_batch_1/00000", "test_batch/00002") if label_bytes == 1 else ("train/00000", "test/00002")
    )


def test_cifar_manifest_is_of_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(tmp_path, monkeypatch, 1)
    before = open_dataset(str(tmp_path)).val
    assert before is not None
    assert before.manifest_sha256  # computed from the files as they are now
    file = tmp_path / "cifar-10-batches-bin/test_batch.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    after = open_dataset(str(tmp_path)).val
    assert after is not None
    assert before.manifest_sha256 != after.manifest_sha256
    assert before.freshness != after.freshness
    assert before.subset([0, 1]).manifest_sha256 == after.subset([0, 1]).manifest_sha256


def test_bad_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(tmp_path, monkeypatch, 1)
    folder = tmp_path / "cifar-10-batches-bin"
    data = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"data_batch_2\.bin has 12,291 bytes\. Expected 12,292 bytes"):
        open_dataset(str(tmp_path))
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_2\.bin is missing\. Expected 12,292 bytes"):
        open_dataset(str(tmp_path))
    (folder / "data_batch_2.bin").write_bytes(b"\x09" + data[1:])
    with pytest.raises(UserError, match=r"label 9 is out of range in the train files of .*Expected 0 to 2"):
        open_dataset(str(tmp_path))
    (folder / "batches.meta.txt").unlink()
    with pytest.raises(UserError, match=r"batches\.meta\.txt is missing"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "binary"), [("cifar-10-batches-py", "-10-batches-bin"), ("cifar-100-python", "-100-b")]
)
def test_cifar_pickles_are_not_opened(tmp_path: Path, name: str, binary: str) -> None:
    (tmp_path / name).mkdir()
    for place in (tmp_path, tmp_path / name):
        (tmp_path / name / "data_batch_1").write_bytes(b"")
        with pytest.raises(UserError, match=f"pickles are not opened .*Expected the binary version.*{binary}"):
            open_dataset(str(place))


# Tar shards


def write_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> None:
    """A tar file, as Python's library (and so WebDataset) writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def png(number: int) -> bytes:
    """A picture as a file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, format="PNG")
    return buffer.getvalue()


def make_shards(root: Path) -> Path:
    """Two train shards, one val shard; labels in .cls and in .json."""
    first = {"s/000.jpg": png(0), "s/000.cls": b"1\n", "s/001.cls": b"0", "s/001.png": png(1), "__keys__": b""}
    write_tar(root / "train/a-0.tar", first)
    write_tar(root / "train/a-1.tar", {"./000.JPEG": png(2), "000.json": json.dumps({"label": 2, "x": "é"}).encode()})
    write_tar(
        root / "test/my-0.tar",
        {"0.webp": png(3), "0.cls": b"2", "1.png": png(4), "1.seg.png": png(9), "1.cls": b"0"},
    )
    return root


def test_tar_shards(tmp_path: Path) -> None:
    dataset = open_dataset(str(make_shards(tmp_path)))
    assert holds(dataset.train, {"a-0/s/000": ("1", 0), "a-0/s/001": ("0", 1), "a-1/000": ("2", 2)})
    assert holds(dataset.val, {"my-0/0": ("2", 3), "my-0/1": ("0", 4)})
    assert dataset.train is not None
    assert holds(dataset.train.subset([2]), {"a-1/000": ("2", 2)})
    (tmp_path / "classes.txt").write_text("ant bear\ncat\n\ndog\n")
    dataset = open_dataset(str(tmp_path))
    assert holds(dataset.train, {"a-0/s/000": ("cat", 0), "a-0/s/001": ("ant bear", 1), "a-1/000": ("dog", 2)})


def test_shards_named_by_split(tmp_path: Path) -> None:
    write_tar(tmp_path / "birds-train-000000.tar", {"0.png": png(0), "0.cls": b"0", "1.png": png(1), "1.cls": b"1"})
    write_tar(tmp_path / "birds-validation-000000.tar", {"0.png": png(2), "0.cls": b"1"})
    dataset = open_dataset(str(tmp_path))
    assert holds(dataset.train, {"birds-train-000000/0": ("0", 0), "birds-train-000000/1": ("1", 1)})
    assert holds(dataset.val, {"birds-validation-000000/0": ("1", 2)})


def test_archives_beside_class_folders_are_no_shards(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/1.png"):
        save(tmp_path / name, int(Path(name).stem))
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "train/a.tar"):
        write_tar(tmp_path / name, {"n01440764.tar": b"tar in tar"})
    assert holds(open_dataset(str(tmp_path)).train, {"a/0.png": ("a", 0), "b/1.png": ("b", 1)})


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_index_agrees_with_tarfile(tmp_path: Path, tar_format: int) -> None:
    names = ["a.jpg", "d" * 90 + "/" + "e" * 60 + ".jpg", "z.cls"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["f" * 300 + "/é.png", "after.png"]
    path = tmp_path / "x.tar"
    write_tar(path, {name: name.encode() * 7 for name in names}, tar_format)
    with tarfile.open(path) as shard:
        expected = [(info.name, info.offset_data, info.size) for info in shard.getmembers()]
    assert [(m.name, m.offset, m.size) for m in tar_members(str(path))] == expected
    assert [name for name, _, _ in expected] == names


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"7.png": png(0)}, r"train-0\.tar:7 has no label \(only png\)\. Expected a \.cls"),
        ({"7.cls": b"0"}, r"train-0\.tar:7 has a label and no image"),
        ({"7.png": png(0), "7.cls": b"dog"}, r"train-0\.tar:7 has the label b'dog'\. Expected an integer"),
        ({"7.png": png(0), "7.cls": b"-1"}, r"train-0\.tar:7 has the label b'-1'"),
        ({"7.png": png(0), "7.json": b"{}"}, r"train-0\.tar:7 has the label b'{}'"),
        (
            {"7.png": png(0), "7.cls": b"2"},
            r"label out of range in 1 samples of train .*train-0/7 has 2\. Expected 0 to 1",
        ),
    ],
)
def test_bad_shards(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    write_tar(tmp_path / "train-0.tar", {"0.png": png(0), "0.cls": b"0"} | members)
    with pytest.raises(UserError, match=message):
        open_dataset(str(tmp_path))


def test_val_label_that_train_has_not(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/0.tar", {"0.png": png(0), "0.cls": b"0", "1.png": png(1), "1.cls": b"1"})
    write_tar(tmp_path / "val/0.tar", {"0.png": png(0), "0.cls": b"2"})
    with pytest.raises(UserError, match=r"label out of range in 1 samples of val .*there is no classes\.txt"):
        open_dataset(str(tmp_path))


def test_truncated_shards(tmp_path: Path) -> None:
    shard = make_shards(tmp_path) / "train/a-0.tar"
    data = shard.read_bytes()
    ends = [m.offset + (m.size + 511) // 512 * 512 for m in tar_members(str(shard))]
    shard.write_bytes(data[: ends[0] - 512])
    with pytest.raises(UserError, match=r"its member s/000\.jpg ends at byte"):
        open_dataset(str(tmp_path))
    for cut in (ends[0], ends[0] + 100, ends[0] + 512, ends[-1]):
        shard.write_bytes(data[:cut])
        with pytest.raises(UserError, match=rf"a-0\.tar is truncated: it has {cut:,} bytes"):
            open_dataset(str(tmp_path))
    shard.write_bytes(os.urandom(2048))
    with pytest.raises(UserError, match=r"a-0\.tar is not a tar file"):
        open_dataset(str(tmp_path))
