"""Zero-shot segmentation: a sweep of ten thresholds against one: the run, similarities and counting, the sweep.

ViT-S/16 of random weights on 480 x 480 px, 8 of toy-coco's images; and 40 prompts on the tokens of a 480 x 480 image.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from measure import alternate, report

from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.object_masks import open_objects
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols import zeroshot
from ssl_bench.protocols.zeroshot import RECIPES, run, sweep

IMAGES, PROMPTS, TOKENS, DIM = 8, 40, 900, 384
TEN = RECIPES["mmc"].thresholds


def whole() -> dict[str, float]:
    data = open_objects("toy-coco").limited(IMAGES)
    subject = Subject(open_checkpoint("random:vit_small_patch16_224"), data, Effort())
    zeroshot._OVERLAYS = 0
    ten = RECIPES["mmc"]
    one = dataclasses.replace(ten, thresholds=(0.3,))
    return alternate({"ten": lambda: run(subject, ten), "one": lambda: run(subject, one)})


def counting() -> dict[str, float]:
    rng = np.random.RandomState(0)
    unit = rng.randn(TOKENS, DIM).astype(np.float32) + 1
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    target, counted = (rng.rand(PROMPTS, TOKENS) < 0.2).astype(float), np.ones(TOKENS)

    def similarity() -> np.ndarray:
        return unit[:PROMPTS] @ unit.T

    def plainly(thresholds: tuple[float, ...]) -> list[np.ndarray]:
        found = []
        for threshold in thresholds:
            chosen = similarity() > np.float32(threshold)
            inside = (chosen * target).sum(axis=1)
            found.append(inside / ((chosen * counted).sum(axis=1) + target.sum(axis=1) - inside))
        return found

    def at_once(thresholds: tuple[float, ...]) -> np.ndarray:
        inside, union = sweep(similarity(), target, counted, thresholds)
        return inside / union

    assert np.array_equal(np.stack(plainly(TEN), axis=1), at_once(TEN))
    found = similarity()
    actions = {
        "ten": lambda: at_once(TEN),
        "one": lambda: at_once((0.3,)),
        "passes": lambda: plainly(TEN),
        "sweep of ten": lambda: sweep(found, target, counted, TEN),
        "sweep of one": lambda: sweep(found, target, counted, (0.3,)),
    }
    return alternate({name: (lambda action=action: [action() for _ in range(100)]) for name, action in actions.items()})


def main() -> None:
    run_times, count_times = whole(), counting()
    report(
        f"zero-shot segmentation: {IMAGES} images in {run_times['ten']:.1f} s; {PROMPTS} prompts x {TOKENS} tokens "
        f"counted in {10 * count_times['ten']:.2f} ms",
        [
            (
                "ten thresholds, times as long as one: the whole run",
                f"{run_times['ten'] / run_times['one']:.2f}",
                "1.3",
            ),
            (
                "ten thresholds, times as long as one: similarities and counting",
                f"{count_times['ten'] / count_times['one']:.2f}",
                "1.3",
            ),
            (
                "ten thresholds, times as long as one: the sweep alone, which compares with each threshold",
                f"{count_times['sweep of ten'] / count_times['sweep of one']:.2f}",
                "",
            ),
            ("... and times faster than ten passes", f"{count_times['passes'] / count_times['ten']:.1f}", ""),
        ],
    )


if __name__ == "__main__":
    main()
