"""The toy world: the same bytes everywhere, masks that fit, classes that differ in nothing but shape and pattern."""

from __future__ import annotations

import hashlib
import io
import math
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate import toy_shapes, toyworld
from ssl_bench.evaluate.toy_files import png_bytes, write_class_folders
from ssl_bench.evaluate.toyworld import CLASSES, Scene, scene, sequence


def digest(*scenes: Scene) -> str:
    """Of everything a scene says."""
    state = hashlib.sha256()
    for one in scenes:
        state.update(one.image.tobytes())
        for instance in one.instances:
            state.update(bytes([instance.label]) + instance.mask.tobytes() + instance.amodal.tobytes())
    return state.hexdigest()


def test_golden_bytes() -> None:
    """The world is frozen: if this fails without a new WORLD_VERSION, records made on this data no longer compare."""
    assert toyworld.WORLD_VERSION == 1
    ten = digest(*(scene(seed=0, split="train", index=index) for index in range(10)))
    assert ten == "b6da01ca09e92e0bb6f9d4b9a93d0ed549af42d666e5300c9023d8bb85d89c70"
    several = scene(seed=3, split="val", index=17, height_px=64, width_px=100, labels=(9, 4, 4))
    assert digest(several) == "bc5215ea358736907d5d4717d75d482f95ac05b9a7916415f519ce435fd4535d"
    moving = sequence(seed=0, index=1, frames=40, height_px=48, width_px=80, objects=3)
    assert digest(*list(moving)[::13]) == "97a6ea29b7d34904e9d0cd8272c9a560726b3ff7f94cac8a12127a0ef49796d3"
    assert (
        hashlib.sha256(png_bytes(several.image)).hexdigest()
        == "b702c1e4b7613f38172b8f30b92f98c01c837753b0277af729ab272bdf1041b2"
    )


def test_no_library_can_flip_a_cosine() -> None:
    """Each entry of the table must lie far from where rounding would go the other way, compared with libm's 1e-16."""
    for turn, rounded in enumerate(toy_shapes._COSINES):
        exact = math.cos(2 * math.pi * turn / len(toy_shapes._COSINES)) * 2**30
        assert abs(exact - rounded * 2**30) < 0.5 - 1e-5
    assert toy_shapes._COSINES[:: len(toy_shapes._COSINES) // 4] == (1, 0, -1, 0)


def test_a_picture_depends_on_its_name_alone() -> None:
    def draw(**changed: object) -> str:
        return digest(scene(**({"seed": 0, "split": "train", "index": 20} | changed)))  # type: ignore[arg-type]

    first = draw()
    others = [draw(index=30), draw(seed=1), draw(split="val"), draw(split="test"), draw(labels=(1,)), draw(width_px=49)]
    assert len({first, *others}) == 1 + len(others)
    assert draw() == first
    assert draw(labels=(0,)) == first  # class 20 % 10


@pytest.mark.parametrize("index", range(10))
def test_the_same_scene_at_every_size(index: int) -> None:
    small, large = (
        scene(seed=0, split="val", index=index, height_px=side, width_px=2 * side).instances[0].amodal
        for side in (40, 160)
    )
    shrunk = large.reshape(40, 4, 80, 4).mean(axis=(1, 3)) >= 0.5
    assert (small & shrunk).sum() / (small | shrunk).sum() > 0.85


@pytest.mark.parametrize(("height_px", "width_px"), [(16, 16), (48, 48), (33, 90), (128, 64)])
def test_masks_and_boxes_agree(height_px: int, width_px: int) -> None:
    hidden_somewhere = False
    for index in range(12):
        labels = tuple((index + k) % 10 for k in range(1 + index % 4))
        one = scene(seed=1, split="train", index=index, height_px=height_px, width_px=width_px, labels=labels)
        assert one.image.shape == (height_px, width_px, 3)
        assert one.image.dtype == np.uint8
        assert tuple(instance.label for instance in one.instances) == labels
        for position, instance in enumerate(one.instances):
            assert instance.mask.shape == instance.amodal.shape == (height_px, width_px)
            assert not (instance.mask & ~instance.amodal).any()
            assert instance.mask.any()
            hidden_somewhere |= bool((instance.amodal & ~instance.mask).any())
            x0, y0, x1, y1 = instance.box
            inside = instance.mask[y0:y1, x0:x1]
            assert inside.sum() == instance.mask.sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # noqa: PT018
            assert (one.instance_map == 1 + position).tolist() == instance.mask.tolist()
            assert (one.semantic[instance.mask] == 1 + instance.label).all()
        owners = np.sum([instance.mask for instance in one.instances], axis=0)
        assert owners.max() == 1
        assert ((one.semantic > 0) == (owners == 1)).all()
    assert hidden_somewhere


def test_masks_lie_where_the_color_is() -> None:
    for index in range(40):
        one = scene(seed=2, split="train", index=index, height_px=64, width_px=64)
        chroma = one.image.max(axis=2).astype(int) - one.image.min(axis=2)
        mask = np.pad(one.instances[0].mask, 1)
        near = np.any([np.roll(mask, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)[1:-1, 1:-1]
        assert chroma[~near].max() <= 13  # background, clutter and occluder are gray
        if CLASSES[index % 10] == "triangle":  # coarse stripes of full color
            assert np.mean(chroma[one.instances[0].mask] > 40) > 0.9


def test_every_class_covers_the_same_area() -> None:
    steps = (np.arange(800) - 399.5) / 280
    x, y = np.broadcast_to(steps[None, :], (800, 800)), np.broadcast_to(steps[:, None], (800, 800))
    for name in CLASSES:
        covered = toy_shapes.inside(name, x, y)
        assert covered.sum() / 280**2 == pytest.approx(toy_shapes._SHAPE_AREA, rel=0.01)
        assert not covered[np.hypot(x, y) > 23.5 / 18].any()  # what the grid that balances the patterns takes in
    areas = [
        scene(seed=0, split="test", index=index, height_px=32, width_px=32).instances[0].amodal.mean()
        for index in range(800)
    ]
    mean_by_class = np.reshape(areas, (-1, 10)).mean(axis=0)
    assert mean_by_class == pytest.approx(np.full(10, np.mean(areas)), rel=0.12)  # scales vary: 3 % standard error


@pytest.mark.parametrize("index", range(20))
def test_every_pattern_is_half_one_color_half_the_other(index: int) -> None:
    one = scene(seed=5, split="train", index=index, height_px=160, width_px=160)
    pixels = one.image[one.instances[0].mask].astype(float)
    fits = []
    for front, back in np.array(toyworld._COLOR_PAIRS):
        axis = front - back
        share = (pixels - back) @ axis / (axis @ axis)
        fits.append((np.abs(pixels - back - share[:, None] * axis).mean(), share.mean()))
    residual, share_of_front = min(fits)
    assert residual < 4
    occluded = one.instances[0].mask.sum() < one.instances[0].amodal.sum()
    assert share_of_front == pytest.approx(0.5, abs=0.15 if occluded else 0.03)


def test_color_tells_nothing_and_pixels_tell_little() -> None:
    """k-NN on mean color must stay at chance, 10 %, and on raw pixels far below what a trained network reaches."""
    train, val = (
        np.array([scene(seed=0, split=split, index=index).image for index in range(count)], np.float32)
        for split, count in (("train", 1500), ("val", 500))
    )

    def accuracy(bank: np.ndarray, queries: np.ndarray) -> float:
        colors = bank.reshape(-1, 3)
        mean, std = colors.mean(axis=0), colors.std(axis=0)
        bank, queries = (((x - mean) / std).reshape(len(x), -1) for x in (bank, queries))
        bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
        nearest = np.argsort(-queries @ bank.T, axis=1)[:, :20] % 10
        votes = np.array([np.bincount(row, minlength=10).argmax() for row in nearest])
        return 100 * float(np.mean(votes == np.arange(len(votes)) % 10))

    assert accuracy(train.mean(axis=(1, 2)), val.mean(axis=(1, 2))) < 14  # one standard error is 1.3
    assert 15 < accuracy(train, val) < 35  # more pictures make it better: 33 with 4,000


@pytest.mark.parametrize(("count", "least_visible_share"), [(1, 0.6), (3, 0.5), (10, 0.4), (16, 0.1)])
def test_objects_stay_visible(count: int, least_visible_share: float) -> None:
    """Behind each other and the occluder: candidates for a place are chosen far from the objects that stand already."""
    for index in range(30):
        labels = tuple((index + position) % 10 for position in range(count))
        for instance in scene(seed=0, split="val", index=index, height_px=64, width_px=64, labels=labels).instances:
            assert instance.mask.sum() >= least_visible_share * instance.amodal.sum() > 0


def test_sequences_keep_identities_and_move() -> None:
    frames = list(sequence(seed=0, index=1, frames=60, height_px=48, width_px=80, objects=3))
    labels = [tuple(instance.label for instance in frame.instances) for frame in frames]
    assert len(set(labels)) == 1
    assert len(set(labels[0])) == 3
    for before, after in pairwise(frames):
        for a, b in zip(before.instances, after.instances, strict=True):
            assert (a.amodal & b.amodal).sum() > 0.5 * b.amodal.sum()  # it moves less than itself from frame to frame
    for position in range(3):
        masks = [frame.instances[position].amodal for frame in frames]
        centers = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
        assert np.ptp(centers, axis=0).max() > 10  # but it does get somewhere
        assert max(map(np.sum, masks)) > 1.2 * min(map(np.sum, masks))  # and changes its size
    early = list(sequence(seed=0, index=1, frames=3, height_px=48, width_px=80, objects=3))
    assert digest(*early) == digest(*frames[:3])
    assert digest(*early) != digest(*sequence(seed=0, index=2, frames=3, height_px=48, width_px=80, objects=3))


def test_an_object_of_a_sequence_can_hide() -> None:
    seen = [
        instance
        for index in range(12)
        for frame in list(sequence(seed=0, index=index, frames=70, height_px=24, width_px=24, objects=2))[::5]
        for instance in frame.instances
    ]
    hidden = [instance for instance in seen if not instance.mask.any()]
    assert 0 < len(hidden) < len(seen) / 4
    assert {instance.box for instance in hidden} == {(0, 0, 0, 0)}


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_class_folders_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        reports: list[tuple[int, int]] = []
        report = partial(lambda reports, *given: reports.append(given), reports)
        write_class_folders(tmp_path / name, train=123, val=57, size_px=16, processes=processes, progress=report)
        assert [done for done, _ in reports] == [50, 100, 123, 173, 180]
        assert {total for _, total in reports} == {180}
    one, two = files_below(tmp_path / "one"), files_below(tmp_path / "two")
    assert one == two
    assert len(set(one.values())) == 180  # train and val share no picture
    expected = {f"{s}/{CLASSES[i % 10]}/{i:05d}.png" for s, n in (("train", 123), ("val", 57)) for i in range(n)}
    assert set(one) == expected
    assert sorted(path.name for path in (tmp_path / "one" / "train").iterdir()) == list(
        CLASSES
    )  # label = folder's place
    with Image.open(io.BytesIO(one["val/disc/00042.png"])) as image:
        assert (np.asarray(image) == scene(seed=0, split="val", index=42, height_px=16, width_px=16).image).all()


def test_a_script_without_main_guard_is_served(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from pathlib import Path\nfrom ssl_bench.evaluate.toy_files import write_class_folders\n"
        f"write_class_folders(Path({str(tmp_path / 'out')!r}), train=60, val=60, size_px=16, processes=2)\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True, timeout=60)
    assert len(files_below(tmp_path / "out")) == 120


@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_disk_refuses_is_raised(tmp_path: Path, processes: int) -> None:
    (tmp_path / "val" / "arrow" / "00000.png").mkdir(parents=True)
    with pytest.raises(OSError, match=r"00000\.png"):
        write_class_folders(tmp_path, train=1, val=1, size_px=16, processes=processes)


@pytest.mark.parametrize("shape", [(1, 1, 3), (200, 150, 3), (7, 5), (300, 300)])
def test_png_opens_as_what_was_written(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    with Image.open(io.BytesIO(png_bytes(array))) as image:
        image.load()
        assert image.mode == ("RGB" if len(shape) == 3 else "L")
        assert (np.asarray(image) == array).all()


def test_png_with_palette() -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    palette = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
    with Image.open(io.BytesIO(png_bytes(indices, palette=palette))) as image:
        assert image.mode == "P"
        assert (np.asarray(image) == indices).all()
        assert (np.asarray(image.convert("RGB")) == palette[indices]).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"index": -1}, "index=-1"),
        ({"height_px": 15}, "height_px=15"),
        ({"width_px": 0}, "width_px=0"),
        ({"split": "vall"}, "did you mean 'val'"),
        ({"labels": ()}, "1 to 16 objects"),
        ({"labels": (0,) * 17}, "1 to 16 objects"),
        ({"labels": (10,)}, "0 to 9"),
    ],
)
def test_bad_scenes_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scene(**({"seed": 0, "split": "val", "index": 0} | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", [{"train": 0}, {"val": 0}, {"size_px": 15}, {"seed": -1}, {"processes": 0}])
def test_bad_folders_are_refused_before_anything_is_written(tmp_path: Path, changed: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected an integer"):
        write_class_folders(tmp_path / "out", **changed)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [{"frames": 0}, {"objects": 0}, {"height_px": 8}, {"seed": -2}])
def test_bad_sequences_are_refused(changed: dict[str, int]) -> None:
    with pytest.raises(UserError, match="toy world"):
        sequence(**({"seed": 0, "index": 0, "frames": 2, "height_px": 32, "width_px": 32} | changed))
