"""Features and their cache: right values, shared passes, and nothing stale, damaged or half-written is ever used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_backbone
from PIL import Image
from torchvision import transforms

from ssl_bench.errors import UserError
from ssl_bench.evaluate import cache, features, loading
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.features import extract
from ssl_bench.evaluate.loading import Effort, load
from ssl_bench.evaluate.readings import Reading, View, why_not
from ssl_bench.evaluate.saving import save_checkpoint

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
    cache.collect_garbage(everything=True)
    both = extract(tiny_checkpoint, split, [Reading("cls", VIEW, layer=1), CLS], EFFORT)  # nor does it wait for itself
    assert [each.key for each in both.values()] == [second[CLS].key] * 2


def test_the_key_follows_everything_that_decides_the_numbers(tiny_checkpoint, image_folder, tmp_path):
    """And nothing else: the same weights in another file share the entry."""
    folder = image_folder()
    split = open_dataset(str(folder)).train

    def key(checkpoint=tiny_checkpoint, split=split, reading=CLS, dtype="fp32"):
        return features.Entry(checkpoint, split, reading, Effort(dtype=dtype)).key

    save_checkpoint(tmp_path / "copy.pt", tiny_backbone())
    assert key(open_checkpoint(tmp_path / "copy.pt")) == key()
    assert features.Entry(tiny_checkpoint, split, CLS, Effort(device="cuda")).key == key()
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


def collecting_garbage(original, removed):
    """The method, with a `cache gc --all` in another process just before it."""

    def method(*arguments, **named):
        removed.append(cache.collect_garbage(everything=True)[0])
        return original(*arguments, **named)

    return method


def test_gc_leaves_alone_what_a_run_is_reading(tiny_checkpoint, image_folder, small_shards, monkeypatch):
    """Both after extraction and when everything was there."""
    split = open_dataset(str(image_folder())).train
    removed = []
    monkeypatch.setattr(features.Entry, "features", collecting_garbage(features.Entry.features, removed))
    assert extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS].source == "extracted"
    assert extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS].source == "cache"
    assert removed == [0, 0]
    assert cache.collect_garbage(everything=True)[0] == 1


def test_what_gc_takes_before_a_run_has_it_is_made_anew(tiny_checkpoint, image_folder, small_shards, monkeypatch):
    split = open_dataset(str(image_folder())).train
    before = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS].array().copy()
    removed = []
    monkeypatch.setattr(features.Entry, "lock", collecting_garbage(features.Entry.lock, removed))
    found = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS]
    assert (found.source, removed) == ("extracted", [1, 0])
    assert cache.collect_garbage(everything=True)[0] == 1  # the arrays outlive their files
    assert np.array_equal(found.array(), before)


def test_a_lock_on_an_entry_that_gc_removed_meanwhile_is_taken_anew(tiny_checkpoint, image_folder, monkeypatch):
    split = open_dataset(str(image_folder())).train
    extract(tiny_checkpoint, split, [CLS], EFFORT)
    entry = features.Entry(tiny_checkpoint, split, CLS, EFFORT)
    waiting, seen = threading.Event(), []
    monkeypatch.setattr(features, "say", lambda text: waiting.set())

    def hold():
        with entry.lock(shared=False), cache._unlocked(entry.folder) as free:
            seen.append(((entry.folder / "lock").exists(), free))

    thread = threading.Thread(target=hold)
    with cache._unlocked(entry.folder) as free:
        assert free
        thread.start()
        assert waiting.wait(timeout=30)
        cache._remove_entry(entry.folder)
    thread.join(timeout=30)
    assert seen == [(True, False)]


def test_verify_leaves_alone_what_is_being_extracted(tiny_checkpoint, image_folder, small_shards):
    split = open_dataset(str(image_folder())).train
    extract(tiny_checkpoint, split, [CLS], EFFORT)
    entry = features.Entry(tiny_checkpoint, split, CLS, EFFORT)
    array, note = features.shard_files(entry.folder, 0)
    array.write_bytes(b"the new array, whose note is not yet written")
    with entry.lock(shared=False):
        assert cache.verify() == []
        assert array.exists()
        assert note.exists()
    assert cache.verify() == [(entry.key, 0)]
    assert not array.exists()


@contextlib.contextmanager
def only_readable(folder):
    """The folder as it is for somebody who may not write to it; root, who may do anything, becomes nobody."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def open_cache(monkeypatch):
    """A cache that others can reach, which pytest's own folders are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("SSL_BENCH_CACHE", folder)
        yield Path(folder)


@pytest.mark.parametrize("lock", ["there", "gone"])
def test_a_cache_that_one_may_only_read_serves_what_it_has(lock, tiny_checkpoint, image_folder, open_cache):
    split = open_dataset(str(image_folder())).train
    expected = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS]
    if lock == "gone":
        (open_cache / "features" / expected.key / "lock").unlink()
    with only_readable(open_cache):
        found = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS]
        assert cache.verify() == []
        with pytest.raises(UserError, match="cannot write"):
            extract(tiny_checkpoint, split, [MEAN], EFFORT)
    assert found.source == "cache"
    assert np.array_equal(found.array(), expected.array())


@pytest.mark.parametrize("leftover", ["entry", "part"])
def test_gc_of_a_cache_that_one_may_not_write_says_so(leftover, tiny_checkpoint, image_folder, open_cache):
    if leftover == "entry":
        extract(tiny_checkpoint, open_dataset(str(image_folder())).train, [CLS], EFFORT)
    else:
        (open_cache / ".x.part").write_text("left over")
        os.utime(open_cache / ".x.part", (1, 1))
    with only_readable(open_cache), pytest.raises(UserError, match="cannot write"):
        cache.collect_garbage(everything=True)


def test_gc_removes_what_was_half_written_anywhere_once_it_is_old(own_cache):
    for name in ("datasets/.toy.x.part", "datasets/.now.x.part"):
        (own_cache / name / "train").mkdir(parents=True)
        (own_cache / name / "train" / "0.png").write_bytes(b"12345")
    (own_cache / "memo").mkdir()
    for name in ("memo/.a.json.x.part", "memo/.b.json.x.part", "memo/a.json"):
        (own_cache / name).write_bytes(b"123")
    old = time.time() - 2 * 86400
    for name in ("datasets/.toy.x.part/train/0.png", "datasets/.toy.x.part/train", "datasets/.toy.x.part"):
        os.utime(own_cache / name, (old, old))
    os.utime(own_cache / "datasets/.now.x.part", (old, old))  # the folder is old, but a file in it is new
    for name in ("memo/.a.json.x.part", "memo/a.json"):
        os.utime(own_cache / name, (old, old))
    assert cache.collect_garbage() == (0, 8)
    left = {str(path.relative_to(own_cache)) for path in own_cache.glob("*/*")}
    assert left == {"datasets/.now.x.part", "memo/.b.json.x.part", "memo/a.json"}


@pytest.mark.parametrize("days", [-1.0, float("nan")])
def test_gc_refuses_a_negative_age(days):
    with pytest.raises(UserError, match="expected 0 or more"):
        cache.collect_garbage(unused_days=days)


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
    # The same words when the features come from the cache.
    with pytest.raises(UserError, match=r"0001\.png.*remove it.*Or give --skip-broken") as cached:
        extract(tiny_checkpoint, split, [CLS], EFFORT)
    shutil.rmtree(features.cache_folder())
    with pytest.raises(UserError) as fresh:
        extract(tiny_checkpoint, split, [CLS], EFFORT)
    assert str(cached.value) == str(fresh.value)
    assert str(fresh.value).count("emove it") == 1


def test_an_image_that_was_broken_when_the_features_were_made_is_named(tiny_checkpoint, image_folder):
    """Repaired with its size and time as they were, which no key can tell."""
    folder = image_folder()
    path = folder / "train" / "a" / "0001.png"
    good, then = path.read_bytes(), path.stat()
    path.write_bytes(good[:60] + bytes(len(good) - 60))
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    split = open_dataset(str(folder)).train
    key = extract(tiny_checkpoint, split, [CLS], dataclasses.replace(EFFORT, skip_broken=True))[CLS].key
    path.write_bytes(good)
    with pytest.raises(UserError, match=rf"0001\.png.*now it can.*Remove .*{key}.*Or give --skip-broken"):
        extract(tiny_checkpoint, split, [CLS], EFFORT)


def test_a_split_of_broken_images_alone_is_an_error(tiny_checkpoint, image_folder, small_shards):
    folder = image_folder()
    paths = list((folder / "train").rglob("*.png"))
    good = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    for path, (content, when) in good.items():
        path.write_bytes(b"\x89PNG nonsense".ljust(len(content)))
        os.utime(path, ns=(when, when))
    split, effort = open_dataset(str(folder)).train, dataclasses.replace(EFFORT, skip_broken=True)
    with pytest.raises(UserError, match="not one of 12 images of train"):
        extract(tiny_checkpoint, split, [CLS], effort)
    for path, (content, _) in good.items():  # as if the drive had been away: nothing of it was kept
        path.write_bytes(content)
    assert len(extract(tiny_checkpoint, split, [CLS], effort)[CLS]) == 12


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("source", ["extracted", "cache"])
def test_a_shard_of_broken_images_alone_is_left_out(shard, source, tiny_checkpoint, image_folder, small_shards):
    folder = image_folder()
    for path in sorted((folder / "train").rglob("*.png"))[4 * shard : 4 * shard + 4]:
        path.write_bytes(b"\x89PNG nonsense")
    split, effort = open_dataset(str(folder)).train, dataclasses.replace(EFFORT, skip_broken=True)
    if source == "cache":
        extract(tiny_checkpoint, split, [CLS, MEAN], effort)
    found = extract(tiny_checkpoint, split, [CLS, MEAN], effort)
    left = [index for index in range(12) if index // 4 != shard]
    for reading, expected in zip((CLS, MEAN), by_hand(tiny_checkpoint, split.subset(left)), strict=True):
        assert (len(found[reading]), found[reading].dim, found[reading].source) == (8, 32, source)
        assert found[reading].broken == tuple(range(4 * shard, 4 * shard + 4))
        np.testing.assert_allclose(found[reading].array(), expected, atol=2e-6)


def test_as_many_workers_as_processors_that_the_process_may_use(image_folder, monkeypatch):
    split, asked = open_dataset(str(image_folder())).train, []
    monkeypatch.setattr(loading, "WORTH_WORKERS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, num_workers, **__: asked.append(num_workers) or [])
    assert list(load(split, VIEW, [range(12)], Effort())) == []
    assert asked == [3]


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
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
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
    assert (about["device"], about["torch"]) == ("cpu", torch.__version__)
    assert shutil.disk_usage(Path(features.cache_folder())).free > 0


def test_bf16_features_are_close_but_not_the_same(tiny_checkpoint, image_folder):
    split = open_dataset(str(image_folder())).train
    exact = extract(tiny_checkpoint, split, [CLS], EFFORT)[CLS].array()
    rough = extract(tiny_checkpoint, split, [CLS], dataclasses.replace(EFFORT, dtype="bf16"))[CLS].array()
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_docker_example_gives_workers_memory_and_anybody_a_cache(name):
    text = (Path(__file__).parent.parent / "docker" / f"{name}.Dockerfile").read_text()
    build, run = (line for line in text.splitlines() if line.startswith("# ") and "docker " in line)
    assert "--build-arg COMMIT=" in build
    assert "--shm-size 8g" in run  # loader workers hand batches over through /dev/shm, of which Docker gives 64 MB
    assert '--user "$(id -u):$(id -g)"' in run
    assert "chmod 1777 /results /cache /home/bench" in text
    assert text.index("ARG COMMIT") < text.index("SSL_BENCH_COMMIT=$COMMIT")
