from __future__ import annotations

import numpy as np
import pytest
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.training.blockwise import (
    ALIEN,
    KEPT,
    NOISE,
    TABLE,
    Corruption,
    check_blocks,
    covered_by_blocks,
    draw_corruption,
    neighbors,
)

GMML = {"noise_area": 0.75, "alien_area": 0.3, "alien_share": 0.35, "block": 0.3, "align": 1}


def slow_blocks(rng, side, area, block, align):
    """GMML's loop, one pixel at a time; blocks come from the generator in lots of 32."""
    mask = [[0] * side for _ in range(side)]
    low = area if area < 0.5 else 0.5
    target = rng.uniform(low, area) * side * side
    while True:
        tops, lefts = rng.integers(0, side - align + 1, (2, 32)).tolist()
        heights, widths = rng.integers(align, int(block * side) + 1, (2, 32)).tolist()
        for top, left, height, width in zip(tops, lefts, heights, widths, strict=True):
            top, left = (top // align) * align, (left // align) * align  # noqa: PLW2901
            bottom = top + round(min(height, side - top) / align) * align
            right = left + round(min(width, side - left) / align) * align
            for y in range(top, bottom):
                for x in range(left, right):
                    mask[y][x] = 1
            if sum(map(sum, mask)) >= target:
                return np.array(mask)


@pytest.mark.parametrize(("side", "area", "align"), [(48, 0.75, 1), (48, 0.3, 1), (64, 0.75, 8), (32, 0.6, 2)])
def test_blocks_are_gmmls(side, area, align):
    for seed in range(8):
        fast = covered_by_blocks(np.random.default_rng(seed), side, area, block=0.3, align=align)
        slow = slow_blocks(np.random.default_rng(seed), side, area, 0.3, align)
        assert fast.dtype == np.uint8
        assert np.array_equal(fast, slow)


def test_areas_of_the_paper_at_224_px():
    rng = np.random.default_rng(0)
    noise = [covered_by_blocks(rng, 224, 0.75, block=0.3, align=1).mean() for _ in range(300)]
    alien = [covered_by_blocks(rng, 224, 0.3, block=0.3, align=1).mean() for _ in range(100)]
    # U(.5, .75), and a last block that overshoots by at most 67 x 67 of 224 x 224 = 9 %, mostly far less.
    assert 0.5 <= min(noise) < 0.52
    assert 0.74 < max(noise) < 0.84
    assert 0.625 < np.mean(noise) < 0.645
    assert 0.3 <= min(alien) < max(alien) < 0.39
    assert np.mean(alien) < 0.32


def test_one_block_has_sides_of_1_to_67_px_anywhere():
    """A target so small that one block is enough."""
    rng = np.random.default_rng(0)
    tops, heights, whole = [], [], []
    for _ in range(3000):
        rows = np.flatnonzero(covered_by_blocks(rng, 224, 1e-9, block=0.3, align=1).any(1))
        assert len(rows) == rows[-1] - rows[0] + 1
        tops.append(rows[0])
        heights.append(len(rows))
        if rows[0] < 224 - 67:  # not cut by the border
            whole.append(len(rows))
    assert (min(tops), max(tops), min(heights), max(heights)) == (0, 223, 1, 67)
    assert np.mean(tops) == pytest.approx(111.5, abs=5)
    assert np.mean(whole) == pytest.approx(34, abs=1.5)


def test_aligned_blocks_cover_whole_patches():
    rng = np.random.default_rng(0)
    for _ in range(10):
        mask = covered_by_blocks(rng, 224, 0.75, block=0.3, align=16)
        by_patch = mask.reshape(14, 16, 14, 16).mean((1, 3))
        assert set(np.unique(by_patch)) == {0, 1}
    unaligned = covered_by_blocks(rng, 224, 0.75, block=0.3, align=1).reshape(14, 16, 14, 16).mean((1, 3))
    assert ((unaligned > 0) & (unaligned < 1)).any()


def test_a_view_has_noise_or_an_alien_and_35_percent_have_an_alien():
    rng = np.random.default_rng(0)
    aliens, places = 0, []
    for _ in range(2000):
        drawn, noise_at = draw_corruption(rng, 32, **GMML)
        kinds = set(np.unique(drawn)) - {KEPT}
        assert kinds in ({NOISE}, {ALIEN})
        covered = (drawn != KEPT).mean()
        assert 0.3 <= covered < 0.4 if kinds == {ALIEN} else 0.5 <= covered < 0.85
        aliens += kinds == {ALIEN}
        places.append(noise_at)
    assert aliens / 2000 == pytest.approx(0.35, abs=0.03)
    assert 0 <= min(places) < 0.01 * TABLE
    assert 0.99 * TABLE < max(places) <= TABLE - 3 * 32 * 32
    again = draw_corruption(np.random.default_rng(5), 32, **GMML), draw_corruption(np.random.default_rng(5), 32, **GMML)
    assert np.array_equal(again[0][0], again[1][0])
    assert again[0][1] == again[1][1]


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_corruption_pixel_by_pixel(batch):
    generator = torch.Generator().manual_seed(batch)
    clean = torch.randn(2, batch, 3, 6, 6, generator=generator)
    maps = torch.randint(0, 3, (2, batch, 6, 6), generator=generator, dtype=torch.uint8)
    noise_at = torch.randint(0, TABLE - 108, (2, batch), generator=generator)
    noise_at[0, 0], noise_at[1, -1] = 0, TABLE - 108  # the first and the last place there is
    corruption = Corruption()
    result = corruption(clean, maps, noise_at)
    other = {1: [0], 2: [1, 0], 4: [1, 0, 3, 2], 5: [1, 0, 3, 2, 3]}[batch]
    assert neighbors(batch).tolist() == other
    for v, b, c, y, x in np.ndindex(2, batch, 3, 6, 6):
        expected = {
            KEPT: clean[v, b, c, y, x],
            NOISE: corruption.table[noise_at[v, b] + c * 36 + y * 6 + x],
            ALIEN: clean[v, other[b], c, y, x],
        }[maps[v, b, y, x].item()]
        assert result[v, b, c, y, x] == expected


def test_the_table_is_normal_the_same_everywhere_and_not_saved():
    torch.manual_seed(1)
    first = Corruption()
    torch.manual_seed(2)
    assert torch.equal(first.table, Corruption().table)
    assert first.table.mean().abs() < 0.002
    assert first.table.std().item() == pytest.approx(1, abs=0.002)
    assert not first.state_dict()
    assert list(first.parameters()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0.3, "align": 5}, "align=5: expected a divisor of the image's side of 48 px"),
        ({"block": 0.3, "align": 0}, "align=0: expected a divisor"),
        ({"block": 0.3, "align": 16}, "block=0.3 of 48 px is 14 px, less than the smallest block, align=16"),
        ({"block": 0.01, "align": 1}, "block=0.01 of 48 px is 0 px"),
    ],
)
def test_blocks_that_cannot_be_laid_are_refused(settings, message):
    check_blocks(48, block=0.3, align=1)
    with pytest.raises(UserError, match=message):
        check_blocks(48, **settings)


def test_images_too_large_for_the_table_are_refused():
    check_blocks(512, block=0.3, align=1)
    with pytest.raises(UserError, match="image_px=1024"):
        check_blocks(1024, block=0.3, align=1)
