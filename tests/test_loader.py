"""The data of a step: the same for any number of workers, processes and parts, and wherever the run began."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import HALF, named
from ssl_bench.evaluate.datasets import open_dataset
from ssl_bench.evaluate.splits import Split
from ssl_bench.evaluate.training import loader
from ssl_bench.evaluate.training.augment import View, augmentation_named, draw_views
from ssl_bench.evaluate.training.loader import (
    Plan,
    automatic_workers,
    batches,
    epoch_order,
    micro_batches,
    prepared,
    sample_generator,
    steps_per_epoch,
)
from ssl_bench.pretrain.method import Sampling


def masks(patches: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return rng.permutation(patches), rng.random((2, 3)).astype(np.float32), np.array(rng.random() < 0.5)


SAMPLING = Sampling(augmentation_named("toy-mmc"), 16, 4, functools.partial(masks, 16))
PLAN = Plan(
    sample=SAMPLING,
    batch=4,
    accumulate=1,
    seed=5,
    rank=0,
    world=1,
    workers=0,
)


def write(folder: Path, count: int) -> Split:
    """`count` images whose sizes and content tell them apart, in two classes."""
    for number in range(count):
        path = folder / "train" / ("a", "b")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (18 + number, 30 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    split = open_dataset(str(folder)).train
    assert split is not None
    assert len(split) == count
    return split


@pytest.fixture
def split(tmp_path) -> Split:
    return write(tmp_path / "images", 11)


def listed(split: Split, plan: Plan, start: int, stop: int) -> list[list[np.ndarray]]:
    """All micro-batches: views, then draws."""
    return [
        [tensor.numpy() for tensor in (*images, *draws)]
        for images, draws in batches(split, plan, start_step=start, stop_step=stop)
    ]


def same(first: list[list[np.ndarray]], second: list[list[np.ndarray]]) -> bool:
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def no_children() -> bool:
    return not multiprocessing.active_children()


def test_a_batch_is_what_its_epoch_and_step_say(split):
    got = listed(split, PLAN, 0, 5)
    assert len(got) == 5
    for step, batch in enumerate(got):
        epoch, place = divmod(step, 2)  # 11 images make two batches of four
        for row, index in enumerate(epoch_order(11, seed=5, epoch=epoch)[4 * place : 4 * place + 4]):
            rng = sample_generator(5, epoch, int(index))
            views = draw_views(split.image(int(index)), SAMPLING.augmentation, image_px=16, patch_px=4, rng=rng)
            for tensor, expected in zip(batch, (*views, *masks(16, rng)), strict=True):
                assert tensor.dtype == expected.dtype
                np.testing.assert_array_equal(tensor[row], expected)
    assert [tensor.shape for tensor in got[0]] == [
        *[(4, 3, 16, 16)] * 2, *[(4, 3, 8, 8)] * 2, (4, 16), (4, 2, 3), (4,),
    ]  # fmt: skip


def test_every_epoch_has_an_order_of_its_own():
    orders = [epoch_order(1000, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in range(4)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert len({tuple(order) for order in orders}) == 8
    np.testing.assert_array_equal(epoch_order(1000, seed=1, epoch=2), orders[6])
    # A permutation at random keeps no image in its place, on average but one.
    for first in range(8):
        for second in range(first):
            assert (orders[first] == orders[second]).sum() < 9


def test_samples_share_no_random_numbers():
    streams = [sample_generator(s, e, i).random(3) for s in range(3) for e in range(3) for i in range(3)]
    # The seed of an epoch's order is none of a sample's, though NumPy fills short seeds with zeros.
    streams += [np.random.default_rng((s, e, 0, loader._ORDER)).random(3) for s in range(3) for e in range(3)]
    assert len({tuple(stream) for stream in streams}) == 36
    rows = np.array([sample_generator(0, 0, i).random(4) for i in range(2000)])
    assert np.abs(rows.mean(axis=0) - 0.5).max() < 4 / np.sqrt(12 * 2000)
    off_diagonal = np.corrcoef(np.column_stack([rows[:-1], rows[1:]]).T) - np.eye(8)
    assert np.abs(off_diagonal).max() < 4.5 / np.sqrt(2000)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_data(split, workers):
    # The parent has threads running when it forks.
    torch.mm(torch.rand(300, 300), torch.rand(300, 300))
    assert same(listed(split, PLAN, 0, 7), listed(split, replace(PLAN, workers=workers), 0, 7))
    assert no_children()


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (2, 0), (5, 0), (3, 2)])
def test_a_resumed_run_sees_what_comes_next(split, start, workers):
    whole = listed(split, PLAN, 0, 7)
    assert same(listed(split, replace(PLAN, workers=workers), start, 7), whole[start:])


def test_nothing_comes_after_the_end(split):
    assert listed(split, PLAN, 3, 3) == []


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_processes_and_parts_put_together_are_the_batch(split, world, accumulate):
    whole = listed(split, PLAN, 0, 4)
    ranks = [listed(split, replace(PLAN, world=world, rank=rank, accumulate=accumulate), 0, 4) for rank in range(world)]
    for step in range(4):
        pieces = [ranks[rank][step * accumulate + part] for part in range(accumulate) for rank in range(world)]
        assert same([[np.concatenate(tensors) for tensors in zip(*pieces, strict=True)]], [whole[step]])


def test_no_sample_comes_twice_in_an_epoch_and_every_one_comes():
    plan = replace(PLAN, batch=8, accumulate=2, world=2)
    seen = [
        key for rank in (0, 1) for keys in micro_batches(50, replace(plan, rank=rank), start_step=0, stop_step=60)
        for key in keys
    ]  # fmt: skip
    assert len(seen) == len(set(seen)) == 60 * 8
    for epoch in range(10):
        assert sum(e == epoch for e, _ in seen) == 48  # 6 steps of 8; 2 of 50 are left over
    assert {index for _, index in seen} == set(range(50))


def test_another_seed_draws_other_views_and_another_order(split):
    assert not same(listed(split, PLAN, 0, 1), listed(split, replace(PLAN, seed=6), 0, 1))
    # The same image in another epoch is another crop.
    first, second = (sample_generator(5, epoch, 3).random(6) for epoch in (0, 1))
    assert not np.array_equal(first, second)


def test_too_few_images_are_refused_before_anything_runs(split):
    assert steps_per_epoch(11, 4) == 2
    assert steps_per_epoch(4, 4) == 1
    with pytest.raises(UserError, match=r"has 11 images, .* one batch of 16; .* --set batch=8\."):
        batches(split, replace(PLAN, batch=16), start_step=0, stop_step=1)


@pytest.mark.parametrize(
    ("batch", "accumulate", "world", "said"),
    [
        (10, 4, 1, "batch of 10 images cannot be cut into 4 equal parts for 1 process; choose a multiple of 4 "),
        (10, 1, 4, "batch of 10 images cannot be cut into 1 equal parts for 4 processes; choose a multiple of 4 "),
        (12, 4, 2, "batch of 12 images cannot be cut into 4 equal parts for 2 processes; choose a multiple of 8 "),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(batch, accumulate, world, said):
    with pytest.raises(UserError, match=said):
        replace(PLAN, batch=batch, accumulate=accumulate, world=world)
    assert replace(PLAN, batch=24, accumulate=4, world=2).piece == 3


def broken_at(split: Split, *indices: int) -> list[str]:
    files = [str(Path(split.source.root) / split.source.paths[index]) for index in indices]
    for file in files:
        Path(file).write_bytes(Path(file).read_bytes()[:60])
    return files


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_run_with_its_name(split, workers):
    (file,) = broken_at(split, int(epoch_order(11, seed=5, epoch=0)[5]))
    got = batches(split, replace(PLAN, workers=workers), start_step=0, stop_step=9)
    next(got)
    with pytest.raises(UserError) as caught:
        next(got)
    said = str(caught.value)
    assert said.startswith(f"cannot decode {file}: ")
    assert "--skip-broken" in said
    assert "Traceback" not in said
    assert no_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_by_the_next_and_counted_once(split, workers, capsys):
    other = open_dataset(split.source.root).train
    files = broken_at(split, 3, 4, 10)
    plan = replace(PLAN, batch=11, workers=workers, skip_broken=True)
    got = listed(split, plan, 0, 3)
    # Seen as if the data had been so all along, with the random numbers of the images that are gone.
    instead = {3: 5, 4: 5, 10: 0}
    for epoch, batch in enumerate(got):
        for row, index in enumerate(epoch_order(11, seed=5, epoch=epoch).tolist()):
            rng = sample_generator(5, epoch, index)
            image = other.image(instead.get(index, index))
            views = draw_views(image, SAMPLING.augmentation, image_px=16, patch_px=4, rng=rng)
            for tensor, expected in zip(batch, (*views, *masks(16, rng)), strict=True):
                np.testing.assert_array_equal(tensor[row], expected)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("cannot decode ")
    assert first.endswith("; the next image of the split is taken instead")
    assert any(file in first for file in files)
    assert last.startswith("3 broken images were replaced by the next one of the split: ")
    assert all(file in last for file in files)


def test_broken_images_are_counted_over_all_batches(split, capsys):
    broken_at(split, 3, 8)
    listed(split, replace(PLAN, batch=11, accumulate=11, skip_broken=True), 0, 2)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("cannot decode ")
    assert last.startswith("2 broken images were replaced")


def test_if_nothing_can_be_read_the_run_stops(split):
    broken_at(split, *range(11))
    with pytest.raises(UserError, match=r"11 images in a row cannot be read: .* and 6 more"):
        listed(split, replace(PLAN, skip_broken=True), 0, 1)


def test_a_users_error_in_the_draw_reaches_him_as_it_is(split):
    with pytest.raises(UserError, match=r"^no such mask$"):
        listed(split, replace(PLAN, sample=replace(SAMPLING, draw=refusing), workers=1), 0, 1)


def refusing(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    raise UserError("no such mask")


def test_closing_early_ends_the_workers(split):
    got = batches(split, replace(PLAN, workers=2), start_step=0, stop_step=10_000)
    next(got)
    assert len(multiprocessing.active_children()) == 2
    before = time.monotonic()
    got.close()
    assert no_children()
    assert time.monotonic() - before < 20  # workers that hang would be waited for much longer
    assert list(got) == []


def test_signals_to_all_processes_do_not_take_the_workers(split):
    got = batches(split, replace(PLAN, workers=2), start_step=0, stop_step=40)
    seen = [next(got)]
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    for name in ("-TERM", "-INT", "-TERM"):
        subprocess.run(["/bin/sh", "-c", 'kill "$@"', "kill", name, *workers], check=True)
    time.sleep(0.2)
    seen += list(got)
    assert len(seen) == 40
    assert no_children()


def test_a_signal_while_the_workers_start_reaches_the_parent(split, monkeypatch):
    got, fork, noted = batches(split, replace(PLAN, workers=1), start_step=0, stop_step=3), os.fork, []

    def fork_and_signal() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        pid = fork()
        if pid:
            subprocess.run(["/bin/sh", "-c", f"kill -TERM {pid}; kill -INT {pid}"], check=True)
        return pid

    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append((number, os.getpid())))
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fork", fork_and_signal)
            next(got)
        assert noted == [(signal.SIGTERM, os.getpid())]
        assert len(list(got)) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_program_that_ends_without_closing_does_not_hang(split, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np\n"
        "from ssl_bench.evaluate.datasets import open_dataset\n"
        "from ssl_bench.evaluate.training.augment import augmentation_named\n"
        "from ssl_bench.evaluate.training.loader import Plan, batches\n"
        "from ssl_bench.pretrain.method import Sampling\n"
        f"split = open_dataset({split.source.root!r}).train\n"
        "sampling = Sampling(augmentation_named('mae'), 16, 4, lambda rng: (rng.random(2),))\n"
        "plan = Plan(sampling, 4, 1, 0, 0, 1, workers=2)\n"
        "got = batches(split, plan, start_step=0, stop_step=10_000)\n"
        "print(next(got)[1][0].shape, flush=True)\n"
        "raise ValueError('boom')\n"
    )  # no __main__ guard either
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "torch.Size([4, 2])\n"
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: boom\n")
    assert "Worker" not in done.stderr


def test_the_global_generators_are_left_alone(split):
    torch.manual_seed(3)
    np.random.seed(3)
    state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        listed(split, replace(PLAN, workers=workers), 0, 2)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpys)


def test_no_warning_where_python_warns_of_forks(split, monkeypatch):
    fork = os.fork

    def warning_fork() -> int:
        warnings.warn(
            "This process (pid=1) is multi-threaded, use of fork() may lead to deadlocks in the child.",
            DeprecationWarning,
            stacklevel=2,
        )
        return fork()

    monkeypatch.setattr(os, "fork", warning_fork)
    # Nor where more workers are asked for than there are processors.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert len(listed(split, replace(PLAN, workers=2), 0, 2)) == 2


class Counting:
    """A source that counts what is decoded."""

    def __init__(self, source) -> None:
        self.source, self.decoded = source, 0

    def image(self, index: int) -> Image.Image:
        self.decoded += 1
        return self.source.image(index)


@pytest.mark.parametrize(("memory", "decoded"), [(2**28, 11), (1000, 44)])
def test_small_splits_are_decoded_once(split, monkeypatch, memory, decoded):
    monkeypatch.setattr(loader, "_MEMORY_BYTES", memory)
    counting = Counting(split.source)
    plan = replace(PLAN, batch=11)
    got = listed(replace(split, source=counting), plan, 0, 4)
    assert counting.decoded == decoded
    assert same(got, listed(split, plan, 0, 4))


def test_a_split_that_turns_out_large_is_not_kept(split, monkeypatch):
    # Sizes grow from 540 to 560 and beyond: what was seen of the split lets it pass first, and then no longer.
    monkeypatch.setattr(loader, "_MEMORY_BYTES", 4 * 560 * 11)
    samples = loader.Samples(split, PLAN)
    sizes = [image.width * image.height for image in map(split.image, range(11))]
    means = [sum(sizes[:n]) / n for n in range(1, 12)]
    over = next(index for index, mean in enumerate(means) if mean > 560)
    assert 0 < over < 10
    for index in range(11):
        samples[0, index]
        samples[1, index]
        assert sorted(samples._kept) == (list(range(index + 1)) if index < over else [])


def test_workers_are_chosen_by_the_processors(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for processors, world, expected in ((1, 1, 1), (2, 1, 1), (4, 1, 3), (64, 1, 16), (32, 4, 7), (4, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, count=processors: set(range(count)))
        assert automatic_workers(world) == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # eight processes on four machines
    assert automatic_workers(8) == 15


@pytest.mark.parametrize("half", [False, True])
def test_prepared_images_are_normalized_as_the_network_expects(half):
    architecture = named("vit_32x2x2_patch8_16")
    architecture = replace(architecture, mean=HALF, std=HALF) if half else architecture
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8))
    mask = torch.arange(4) % 2 == 0
    views = prepared((pixels, pixels[:, :, :8, :8]), (mask,), device=torch.device("cpu"), architecture=architecture)
    mean, std = ([0.5] * 3, [0.5] * 3) if half else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = tv.normalize(pixels.double() / 255, mean, std)
    for got, wanted in zip(views.images, (expected, expected[:, :, :8, :8]), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)
    assert views.draws[0] is mask


def test_a_method_without_draws_gets_none(split):
    view = View((0.2, 1.0), "bicubic")
    plan = replace(PLAN, sample=replace(SAMPLING, augmentation=(view,), draw=nothing), workers=1)
    (images, draws), *_ = batches(split, plan, start_step=0, stop_step=2)
    assert draws == ()
    assert [image.shape for image in images] == [(4, 3, 16, 16)]


def nothing(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return ()
