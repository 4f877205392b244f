"""J and F against their definitions, written again pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ssl_bench.evaluate.video_measures import boundaries, dilated, measure_frame, summary


def boundary_pixels(mask):
    """A pixel of which the right, the lower or the lower right neighbor differs; at the border only those within."""
    height, width = mask.shape
    mask, found = mask.tolist(), []
    for y in range(height):
        for x in range(width):
            if (y, x) == (height - 1, width - 1):
                continue
            around = [(y, x + 1)] if y == height - 1 else [(y + 1, x)] if x == width - 1 else None
            around = around or [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if any(mask[v][u] != mask[y][x] for v, u in around):
                found.append((y, x))
    return np.array(found).reshape(-1, 2)


def slow(truth, found):
    """J and F of one object, of boolean masks."""
    union, shared = int((truth | found).sum()), int((truth & found).sum())
    one, other = boundary_pixels(truth), boundary_pixels(found)
    radius = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))

    def met(points, others):
        """The share of points that have one of the others within the radius."""
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in points]
        return sum(near) / len(near)

    if len(one) and len(other):
        precision, recall = met(other.tolist(), one.tolist()), met(one.tolist(), other.tolist())
    else:
        precision, recall = float(len(other) == 0), float(len(one) == 0)
    return (
        1.0 if union == 0 else shared / union,
        2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    )


def blocks(rng, height, width, objects, density):
    """Labels in blocks, some of them background."""
    grid = rng.randint(1, objects + 1, (5, 6)) * (rng.rand(5, 6) < density)
    return grid[np.arange(height)[:, None] * 5 // height, np.arange(width)[None] * 6 // width].astype(np.uint8)


def assert_as_slow(truth, found, objects):
    j, f = measure_frame(truth, found, objects)
    assert j.shape == f.shape == (objects,)
    for number in range(1, objects + 1):
        expected = slow(truth == number, found == number)
        assert (j[number - 1], f[number - 1]) == pytest.approx(expected, abs=1e-12), number


@pytest.mark.parametrize("seed", range(12))
def test_measures_are_their_definitions(seed):
    rng = np.random.RandomState(seed)
    height, width = rng.randint(2, 34, 2)
    objects = (1, 2, 3, 8, 9, 11)[seed % 6]  # more than eight are measured in two groups
    truth, found = (blocks(rng, height, width, objects, rng.rand()) for _ in range(2))
    assert_as_slow(truth, found, objects)


@pytest.mark.parametrize("shift", [(2, 0), (3, 3), (0, 5), (9, 4)])
def test_the_tolerance_grows_with_the_frame(shift):
    """A frame of 180 x 260 has a tolerance of 3 pixels; small objects, whose windows are smaller than that."""
    truth, found = np.zeros((180, 260), np.uint8), np.zeros((180, 260), np.uint8)
    for y, x, number, size in ((100, 50, 1, 9), (170, 250, 2, 10), (0, 200, 3, 6), (150, 150, 4, 1)):
        truth[y : y + size, x : x + size] = number
        rows, columns = slice(y + shift[0], y + shift[0] + size), slice(x - shift[1], x - shift[1] + size)
        found[rows, columns] = number
    assert_as_slow(truth, found, 4)
    assert_as_slow((truth == 4).astype(np.uint8), (found == 4).astype(np.uint8), 1)  # in a window of its own


def test_objects_that_are_not_there():
    nothing, something = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    something[4:9, 5:12] = 1
    for truth, found, expected in ((nothing, nothing, 1), (something, nothing, 0), (nothing, something, 0)):
        assert [each.tolist() for each in measure_frame(truth, found, 1)] == [[expected], [expected]]
    assert [each.tolist() for each in measure_frame(something, something, 2)] == [[1, 1], [1, 1]]
    everything = np.ones((20, 30), np.uint8)  # has no boundary
    assert [each.tolist() for each in measure_frame(everything, everything, 1)] == [[1], [1]]
    assert_as_slow(everything, something, 1)
    assert measure_frame(something, np.where(something == 0, 7, 1).astype(np.uint8), 1)[0] == 1  # 7 is background


@pytest.mark.parametrize("radius", range(10))
def test_a_disk_is_a_disk(radius):
    rng = np.random.RandomState(radius)
    for shape in ((40, 30), (3, 40), (40, 2), (1, 1)):
        bits = (rng.randint(0, 256, shape) * (rng.rand(*shape) < 0.02)).astype(np.uint8)
        bits[0, 0] |= 1
        expected = np.zeros_like(bits)
        for y, x in np.argwhere(bits):
            for v in range(shape[0]):
                for u in range(shape[1]):
                    if (v - y) ** 2 + (u - x) ** 2 <= radius**2:
                        expected[v, u] |= bits[y, x]
        np.testing.assert_array_equal(dilated(bits, radius), expected)


def test_boundaries_lie_half_a_pixel_towards_the_origin():
    mask = np.zeros((4, 5), np.uint8)
    mask[2:, 3:] = 1
    assert boundaries(mask).tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]]


# The quarters by hand, for n frames: positions of the first and of the last.
@pytest.mark.parametrize(
    ("n", "first", "last"),
    [
        (1, [0], [0]),
        (2, [0], [1]),  # borders at 0, 0.25, .5 (up), .75, 1
        (3, [0, 1], [2]),  # at 0, .5 (up), 1, 1.5 (up), 2: halves always go up, not to the even number
        (7, [0, 1, 2], [5, 6]),  # at 0, 1.5 (up), 3, 4.5 (up), 6
        (4, [0, 1], [2, 3]),
        (10, [0, 1, 2], [7, 8, 9]),
        (300, list(range(76)), list(range(224, 300))),
    ],
)
def test_mean_recall_and_decay(n, first, last):
    values = np.random.RandomState(n).rand(n)
    found = summary(values)
    assert found.mean == pytest.approx(sum(values) / n)
    assert found.recall == pytest.approx(sum(value > 0.5 for value in values) / n)
    expected = sum(values[k] for k in first) / len(first) - sum(values[k] for k in last) / len(last)
    assert found.decay == pytest.approx(expected)
    assert summary(np.array([0.5, 0.5])).recall == 0
