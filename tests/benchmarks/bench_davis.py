"""DAVIS at 480 x 854: passing masks on against the dense affinity written plainly; J and F against frame by frame."""

from __future__ import annotations

import functools
import importlib.util
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from measure import alternate, report
from scipy import ndimage

from ssl_bench.evaluate.video_measures import measure_frame
from ssl_bench.protocols.davis import RECIPES
from ssl_bench.protocols.propagation import Context, hard_mask, passed_on

RECIPE = RECIPES["dino"]
SIZE = (854, 480)  # width, height
DIM, CLASSES = 384, 4
FRAMES, OBJECTS = 60, 3

Frames = list[tuple[torch.Tensor, torch.Tensor]]


def tokens_and_masks(patch: int) -> tuple[torch.Tensor, Frames]:
    """A frame and the eight before it: noise over something that varies slowly, as tokens do."""
    generator = torch.Generator().manual_seed(0)
    width, height = (side // patch for side in RECIPE.grid_px(*SIZE))
    coarse = torch.randn(1, DIM, 6, 10, generator=generator)
    scene = F.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0)
    frames = [
        F.normalize(scene + 0.5 * torch.randn(height, width, DIM, generator=generator), dim=2)
        for _ in range(RECIPE.frames + 2)
    ]
    masks = torch.rand(RECIPE.frames + 1, height, width, CLASSES, generator=generator) ** 3
    return frames[-1], list(zip(frames, masks, strict=False))


@functools.cache
def neighborhood(height: int, width: int) -> torch.Tensor:
    """1 for tokens near each other. (N, N); made once, as in the script."""
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    near = ((y[:, None] - y).abs() <= RECIPE.radius) & ((x[:, None] - x).abs() <= RECIPE.radius)
    return near.float()


def dense(target: torch.Tensor, frames: Frames) -> torch.Tensor:
    """All N x N similarities with every frame, then most of them times 0, as eval_video_segmentation.py does it."""
    height, width, dim = target.shape
    sources = torch.stack([tokens.reshape(-1, dim).T for tokens, _ in frames])  # (n, D, N)
    queries = target.reshape(1, -1, dim).repeat(len(frames), 1, 1)
    affinity = torch.exp(torch.bmm(F.normalize(queries, dim=2), F.normalize(sources, dim=1)) / RECIPE.temperature)
    affinity *= neighborhood(height, width)
    affinity = affinity.transpose(2, 1).reshape(-1, height * width)  # (n N, N)
    least = torch.topk(affinity, dim=0, k=RECIPE.topk)[0].min(dim=0)[0]
    affinity[affinity < least] = 0
    affinity = affinity / affinity.sum(dim=0, keepdim=True)
    masks = torch.cat([mask.reshape(height * width, -1) for _, mask in frames])  # (n N, C)
    return (masks.T @ affinity).T.reshape(height, width, -1)


def context_of(frames: Frames) -> Context:
    """As it is before the last of these frames is added, in the middle of a video."""
    context = Context(*frames[0], frames=len(frames) - 1)
    for frame in frames[1:-1]:
        context.add(*frame)
    return context


def ours(target: torch.Tensor, frames: Frames, context: Context | None = None) -> torch.Tensor:
    context = context or context_of(frames)
    context.seen = len(frames) - 1
    context.add(*frames[-1])
    return passed_on(target, context, RECIPE.rule(100))


def extra_megabytes(connection: Any, which: Callable[[torch.Tensor, Frames], torch.Tensor], patch: int) -> None:
    """In a process of its own: the peak of one frame, less what the data and the libraries take."""
    which(*tokens_and_masks(80))  # what libraries allocate once
    target, frames = tokens_and_masks(patch)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the data
    before = status_kilobytes("VmRSS")
    which(target, frames)
    connection.send((status_kilobytes("VmHWM") - before) / 1024)


def status_kilobytes(name: str) -> int:
    """Linux only, as clear_refs is."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def measured_megabytes(which: Callable[[torch.Tensor, Frames], torch.Tensor], patch: int) -> float:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=extra_megabytes, args=(there, which, patch))
    process.start()
    megabytes = float(here.recv())
    process.join()
    return megabytes


def propagation(patch: int, goal: str, repeats: int) -> None:
    data = tokens_and_masks(patch)
    found, expected = (hard_mask(which(*data), patch, SIZE) for which in (ours, dense))
    context = context_of(data[1])
    times = alternate({"ours": lambda: ours(*data, context), "dense": lambda: dense(*data)}, repeats)
    small, large = (measured_megabytes(which, patch) for which in (ours, dense))
    report(
        f"DAVIS, one frame of 480 x 854 from 8 others, patch {patch}, ours {times['ours']:.2f} s",
        [
            ("times faster than the dense affinity", f"{times['dense'] / times['ours']:.1f}", goal),
            ("share of its extra memory", f"{small:.0f} of {large:.0f} MB", "a quarter"),
            ("pixels with the same label, percent", f"{100 * (found == expected).mean():.4f}", "100"),
        ],
    )


# Measures ------------------------------------------------------------------------------------------------------------


def star(center: tuple[float, float], radius: float, turn: float) -> np.ndarray:
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    y, x = y - center[0], x - center[1]
    return np.hypot(y, x) < radius * (1 + 0.2 * np.sin(5 * np.arctan2(y, x) + turn))


def video(offset: float) -> list[np.ndarray]:
    """Three large objects that move, and hide each other in part."""
    frames = []
    for frame in range(FRAMES):
        labels = np.zeros((SIZE[1], SIZE[0]), np.uint8)
        for number in range(1, OBJECTS + 1):
            center = (80 + 100 * number + offset, 200 * number + 2 * frame - offset)
            labels[star(center, 105, 0.1 * frame + offset / 10)] = number
        frames.append(labels)
    return frames


def boundary(mask: np.ndarray) -> np.ndarray:
    right, lower, diagonal = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1], lower[:-1], diagonal[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    result = (mask ^ right) | (mask ^ lower) | (mask ^ diagonal)
    result[-1], result[:, -1] = mask[-1] ^ right[-1], mask[:, -1] ^ lower[:, -1]
    result[-1, -1] = False
    return result


Dilate = Callable[[np.ndarray, np.ndarray], np.ndarray]


def by_scipy(mask: np.ndarray, disk: np.ndarray) -> np.ndarray:
    return ndimage.binary_dilation(mask, disk)


def by_opencv(mask: np.ndarray, disk: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.dilate(mask.astype(np.uint8), disk.astype(np.uint8)) > 0


def plain(truths: list[np.ndarray], founds: list[np.ndarray], dilate: Dilate) -> np.ndarray:
    """Object by object and frame by frame, on whole frames, as davis2017-evaluation does it. (frames, 2, objects)"""
    radius = math.ceil(0.008 * math.hypot(*SIZE))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    values = np.zeros((len(truths), 2, OBJECTS))
    for k, (truth, found) in enumerate(zip(truths, founds, strict=True)):
        for number in range(OBJECTS):
            one, other = truth == number + 1, found == number + 1
            values[k, 0, number] = (one & other).sum() / (one | other).sum()
            edge, given = boundary(one), boundary(other)
            precision = (given & dilate(edge, disk)).sum() / given.sum()
            recall = (edge & dilate(given, disk)).sum() / edge.sum()
            values[k, 1, number] = 2 * precision * recall / (precision + recall)
    return values


def measures() -> None:
    truths, founds = video(0), video(7)

    def ours_of_all() -> np.ndarray:
        return np.array([measure_frame(*pair, OBJECTS) for pair in zip(truths, founds, strict=True)])

    expected = []  # by SciPy it takes so long that it runs twice and no more
    by_frame = {"ours": ours_of_all, "scipy": lambda: expected.append(plain(truths, founds, by_scipy))}
    times = alternate(by_frame, repeats=1)
    rows = [
        ("times faster than object by object, dilated by SciPy", f"{times['scipy'] / times['ours']:.0f}", "5"),
        ("largest difference", f"{np.abs(ours_of_all() - expected[0]).max():.0e}", "1e-09"),
    ]
    if importlib.util.find_spec("cv2"):
        both = alternate({"ours": ours_of_all, "opencv": lambda: plain(truths, founds, by_opencv)})
        ratio = f"{both['opencv'] / both['ours']:.1f}"
        rows.insert(1, ("times faster than the same, dilated by OpenCV as the official evaluator", ratio, ""))
    report(f"J and F, {FRAMES} frames of 480 x 854, {OBJECTS} objects, ours {times['ours']:.2f} s", rows)


def main() -> None:
    propagation(16, "5", repeats=5)
    propagation(8, "20", repeats=1)
    measures()


if __name__ == "__main__":
    main()
