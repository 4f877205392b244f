"""Features and their cache: right values, shared passes, and nothing stale, damaged or half-written is ever used."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_backbone
from PIL import Image
from torchvision import transforms

from ssl_bench.errors import UserError
from ssl_bench.evaluate import cache, features
from ssl_bench.evaluate.checkpoints import open_checkpoint, save_checkpoint
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.features import Effort, extract, load
from ssl_bench.evaluate.readings import Reading, View, why_not

VIEW = View(16, 16)
CLS, MEAN = Reading("cls", VIEW), Reading("patch_mean", VIEW)
EFFORT = Effort(workers=0)


@pytest.fixture(autouse=True)
def _own(own_cache):
    """Every test here starts with an empty cache."""


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_ROWS", 4)


def by_hand(checkpoint, split, view=VIEW):
    """One image at a time through torchvision's transforms and timm's own forward: (n, D) cls and mean, normed."""
    architecture = checkpoint.architecture
    pipeline = transforms.Compose(
        [
            transforms.Resize(view.resize_px, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(view.crop_px),
            transforms.ToTensor(),
            transforms.Normalize(architecture.mean, architecture.std),
        ]
    )
    with torch.no_grad():
        tokens = [
            checkpoint.backbone.vit.forward_features(pipeline(split.image(i))[None])[0] for i in range(len(split))
        ]
    return torch.stack([t[0] for t in tokens]).numpy(), torch.stack([t[1:].mean(0) for t in tokens]).numpy()


def test_values_equal_torchvision_and_timm_one_image_at_a_time(tiny_checkpoint, image_folder, small_shards):
    split = open_dataset(str(image_folder())).train
    found = extract(tiny_checkpoint, split, [CLS, MEAN], EFFORT)
    cls, mean = by_hand(tiny_checkpoint, split)
    np.testing.assert_allclose(found[CLS].array(), cls, atol=2e-6)
    np.testing.assert_allclose(found[MEAN].array(), mean, atol=2e-6)
    assert len(found[CLS].shards) == 3
    assert len(found[CLS]) == 12


@pytest.mark.parametrize(
    ("view", "size"), [(View(20, 16), (30, 24)), (View(24, 24, "bilinear"), (16, 40)), (View(19, 8), (33, 57))]
)
def test_views_are_torchvisions(view, size):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8))
    mode = transforms.InterpolationMode(view.interpolation)
    expected = transforms.Compose(
        [transforms.Resize(view.resize_px, mode), transforms.CenterCrop(view.crop_px), transforms.PILToTensor()]
    )
    assert np.array_equal(view.pixels(image), expected(image).numpy())


def test_one_pass_serves_all_readings(tiny_checkpoint, image_folder):
    split = open_dataset(str(image_folder())).train
    calls = []
    tiny_checkpoint.backbone.vit.blocks[0].register_forward_hook(
        lambda module, inputs, output: calls.append(len(output))
    )
    readings = [CLS, MEAN, Reading("cls", VIEW, layer=0, norm=False), Reading("patch_mean", VIEW, layer=-1, norm=False)]
    found = extract(tiny_checkpoint, split, readings, EFFORT)
    assert sum(calls) == len(split)
    assert {each.source for each in found.values()} == {"extracted"}
    again = extract(tiny_checkpoint, split, readings, EFFORT)
    assert sum(calls) == len(split)
    assert {each.source for each in again.values()} == {"cache"}
    normed = tiny_checkpoint.backbone.vit.norm(torch.from_numpy(np.array(found[readings[2]].array())))
    assert not torch.allclose(normed, torch.from_numpy(np.array(found[CLS].array())))


def test_a_layer_counted_from_either_end_is_the_same_entry(tiny_checkpoint, image_folder):
    split = open_dataset(str(image_folder())).train
    first = extract(tiny_checkpoint, split, [Reading("cls", VIEW, layer=1)], EFFORT)
    second = extract(tiny_checkpoint, split, [CLS], EFFORT)
    assert next(iter(second.values())).key == next(iter(first.values())).key


def test_the_key_follows_everything_that_decides_the_numbers(tiny_checkpoint, image_folder, tmp_path):
    """And nothing else: the same weights in another file share the entry."""
    folder = image_folder()
    split = open_dataset(str(folder)).train

    def key(checkpoint=tiny_checkpoint, split=split, reading=CLS, dtype="fp32"):
        return features.Entry(checkpoint, split, reading, dtype).key

    save_checkpoint(tmp_path / "copy.pt", tiny_backbone())
    assert key(open_checkpoint(tmp_path / "copy.pt")) == key()
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone(seed=1))  # the same name, other weights
    others = [
        key(open_checkpoint(tmp_path / "tiny.pt")),
        key(open_checkpoint(tmp_path / "copy.pt", arch={"heads": "4"})),
        key(open_checkpoint(tmp_path / "copy.pt", arch={"mean": "0.5,0.5,0.5"})),
        key(dtype="bf16"),
        key(reading=MEAN),
        key(reading=dataclasses.replace(CLS, layer=0)),
        key(reading=dataclasses.replace(CLS, norm=False)),
        key(reading=dataclasses.replace(CLS, view=View(18, 16))),
        key(reading=dataclasses.replace(CLS, view=View(16, 16, "bilinear"))),
        key(split=split.subset(list(range(11)))),
    ]
    image = folder / "train" / "a" / "0000.png"
    os.utime(image, ns=(1, 1))
    others.append(key(split=open_dataset(str(folder)).train))
    assert len({key(), *others}) == len(others) + 1


def test_a_damaged_shard_is_found_and_made_anew(tiny_checkpoint, image_folder, small_shards, capsys):
    split = open_dataset(str(image_folder())).train
    found = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS]
    good = found.array().copy()
    shard, _ = features.shard_files(features.cache_folder() / "features" / found.key, 1)
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(bytes(raw))
    again = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS]
    assert again.source == "extracted"
    assert np.array_equal(again.array(), good)
    assert "damaged" in capsys.readouterr().err


def test_verify_removes_damaged_shards_and_gc_what_nobody_uses(tiny_checkpoint, image_folder, small_shards):
    split = open_dataset(str(image_folder())).train
    found = extract(tiny_checkpoint, split, [CLS, MEAN], EFFORT)
    assert cache.verify() == []
    entries = cache.entries()
    assert [(e.images, e.complete, e.model, e.split) for e in entries] == [(12, True, "tiny", "train")] * 2
    folder = features.cache_folder() / "features" / found[CLS].key
    features.shard_files(folder, 2)[0].write_bytes(b"nonsense")
    assert cache.verify() == [(found[CLS].key, 2)]
    assert cache.verify() == []
    assert cache.collect_garbage()[0] == 0
    old = time.time() - 40 * 86400
    os.utime(folder / "entry.json", (old, old))
    (features.cache_folder() / "features" / found[MEAN].key / ".shard.part").write_bytes(b"left over")
    assert cache.collect_garbage()[0] == 1
    assert not folder.exists()
    assert not list(features.cache_folder().rglob("*.part"))
    assert cache.collect_garbage(everything=True)[0] == 1
    assert cache.entries() == []


def test_interrupted_extraction_goes_on_where_it_stopped(
    tiny_checkpoint, image_folder, small_shards, monkeypatch, capsys
):
    split = open_dataset(str(image_folder(train=8))).train  # 16 images, 4 shards
    seen = []

    def interrupt(split, view, plan, effort):
        for number, batch in enumerate(load(split, view, plan, effort)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(features, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_checkpoint, split, [CLS], EFFORT)
    assert "8 of 16 images are safe" in capsys.readouterr().err

    def count(split, view, plan, effort):
        seen.extend(row for rows in plan for row in rows)
        return load(split, view, plan, effort)

    monkeypatch.setattr(features, "load", count)
    found = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS]
    assert seen == list(range(8, 16))
    np.testing.assert_allclose(found.array(), by_hand(tiny_checkpoint, split)[0], atol=2e-6)


def test_features_that_are_not_finite_are_refused_and_not_cached(image_folder, tmp_path):
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.vit.norm.bias[3] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", backbone)
    split = open_dataset(str(image_folder())).train
    with pytest.raises(UserError, match=r"not finite.*a/0000\.png"):
        extract(open_checkpoint(tmp_path / "nan.pt"), split, [CLS], EFFORT)
    assert not list(features.cache_folder().rglob("shard-*"))


def test_a_broken_image_is_named_or_skipped_and_counted(tiny_checkpoint, image_folder, small_shards):
    folder = image_folder()
    broken = folder / "train" / "a" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    split = open_dataset(str(folder)).train
    with pytest.raises(UserError, match=r"0001\.png.*--skip-broken"):
        extract(tiny_checkpoint, split, [CLS], EFFORT)
    found = extract(tiny_checkpoint, split, [CLS], dataclasses.replace(EFFORT, skip_broken=True))[CLS]
    assert (found.broken, len(found)) == ((1,), 11)
    expected = by_hand(tiny_checkpoint, split.subset([i for i in range(12) if i != 1]))[0]
    np.testing.assert_allclose(found.array(), expected, atol=2e-6)
    with pytest.raises(UserError, match=r"0001\.png"):  # also when they come from the cache
        extract(tiny_checkpoint, split, [CLS], EFFORT)


def test_a_shard_of_broken_images_alone_is_an_error(tiny_checkpoint, image_folder):
    folder = image_folder(train=2)
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"\x89PNG nonsense")
    with pytest.raises(UserError, match="not one of 4 images"):
        extract(tiny_checkpoint, open_dataset(str(folder)).train, [CLS], dataclasses.replace(EFFORT, skip_broken=True))


def test_images_of_several_sizes_without_a_crop_are_refused(image_folder):
    folder = image_folder()
    Image.new("RGB", (20, 16)).save(folder / "train" / "a" / "0000.png")
    with pytest.raises(UserError, match="several sizes"):
        extract(open_checkpoint("pixels:"), open_dataset(str(folder)).train, [Reading("cls", View(None, None))], EFFORT)


def _extract_in_process(checkpoint: str, folder: str, queue) -> None:
    torch.set_num_threads(1)
    split = open_dataset(folder).train
    queue.put(extract(open_checkpoint(checkpoint), split, [CLS], EFFORT)[CLS].source)


def test_two_processes_at_once_do_the_work_once(tiny_checkpoint, image_folder):
    folder = image_folder(train=20)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_extract_in_process, args=(tiny_checkpoint.spec, str(folder), queue)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    sources = sorted(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert sources == ["cache", "extracted"]
    split = open_dataset(str(folder)).train
    found = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS]
    np.testing.assert_allclose(found.array(), by_hand(tiny_checkpoint, split)[0], atol=2e-6)


def test_a_full_disk_is_said_in_words_and_leaves_nothing_half_written(image_folder, tmp_path):
    """A limit on file size stands in for the disk: the same refusal by the system in the middle of a write."""
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    folder = image_folder(train=300)
    command = [
        sys.executable,
        "-m",
        "ssl_bench.cli",
        "run",
        "--ckpt",
        str(tmp_path / "tiny.pt"),
        "--dataset",
        str(folder),
    ]
    command += [
        "--protocol",
        "knn",
        "--set",
        "neighbors=5",
        "--set",
        "resize_px=16",
        "--set",
        "crop_px=16",
        "--workers",
        "0",
    ]

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    left = features.cache_folder() / "features"
    assert not list(left.rglob("*.part"))
    assert not list(left.rglob("shard-*.json"))
    assert not list((tmp_path / "results").rglob("*.json"))


def test_ctrl_c_leaves_a_consistent_cache_and_says_how_to_go_on(image_folder, tmp_path):
    """A real process, a real signal, in the middle of a slow extraction."""
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    folder = image_folder(train=40)
    slow = (
        "import sys, time\n"
        "from ssl_bench.evaluate import features\n"
        "features.SHARD_ROWS = 8\n"
        "finite = features._check_finite\n"
        "def slowly(*arguments):\n"
        "    print('shard', flush=True)\n"
        "    time.sleep(0.4)\n"
        "    return finite(*arguments)\n"
        "features._check_finite = slowly\n"
        "from ssl_bench.cli import main\n"
        "sys.argv = ['ssl-bench', *sys.argv[1:]]\n"
        "main()\n"
    )
    command = [
        sys.executable,
        "-c",
        slow,
        "run",
        "--ckpt",
        str(tmp_path / "tiny.pt"),
        "--dataset",
        str(folder),
        "--protocol",
        "knn",
    ]
    command += ["--set", "neighbors=5", "--set", "resize_px=16", "--set", "crop_px=16", "--workers", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "shard\n"
    assert process.stdout.readline() == "shard\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "safe in the cache" in errors
    assert "same command" in errors
    assert "Traceback" not in errors
    assert cache.verify() == []
    (entry,) = cache.entries()
    assert 0 < entry.images < 80
    assert not list((tmp_path / "results").rglob("*.json"))


@pytest.mark.parametrize(
    ("reading", "change", "reason"),
    [
        (CLS, {"cls": False}, "no class token"),
        (CLS, {"final_norm": False}, "no final norm"),
        (dataclasses.replace(CLS, layer=2), {}, "block 2 does not exist"),
        (dataclasses.replace(CLS, layer=0), {"cls": False, "class_attention_blocks": 2}, "only layer -1"),
        (CLS, {"cls": False, "class_attention_blocks": 2}, None),
        (dataclasses.replace(CLS, norm=False), {"final_norm": False}, None),
        (MEAN, {"cls": False}, None),
    ],
)
def test_what_a_network_cannot_give_is_said(reading, change, reason, tiny_checkpoint):
    said = why_not(reading, dataclasses.replace(tiny_checkpoint.architecture, **change))
    assert (said is None) == (reason is None)
    assert reason is None or reason in said


def test_the_entry_says_what_it_is(tiny_checkpoint, image_folder):
    found = extract(tiny_checkpoint, open_dataset(str(image_folder())).train, [CLS], EFFORT)[CLS]
    about = json.loads((features.cache_folder() / "features" / found.key / "entry.json").read_text())
    assert about["weights"] == tiny_checkpoint.weights_sha256
    assert about["dtype"] == "fp32"
    assert shutil.disk_usage(Path(features.cache_folder())).free > 0


def test_bf16_features_are_close_but_not_the_same(tiny_checkpoint, image_folder):
    split = open_dataset(str(image_folder())).train
    exact = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS].array()
    rough = extract(tiny_checkpoint, split, [CLS], dataclasses.replace(EFFORT, dtype="bf16"))[CLS].array()
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()
