"""Images on their way to the network: decoded by worker processes, in batches, while the network computes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.readings import View

if TYPE_CHECKING:
    from ssl_bench.evaluate.datasets import Split


@dataclass(frozen=True)
class Effort:
    """How to compute, where none of it changes the numbers but dtype."""

    device: str = "cpu"
    dtype: str = "fp32"
    batch_size: int | None = None
    workers: int | None = None
    skip_broken: bool = False


class _Images(torch.utils.data.Dataset[Any]):
    """The split's images through a view. A broken one comes as its error message, since workers garble exceptions."""

    def __init__(self, split: Split, view: View) -> None:
        self.split, self.view = split, view

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8] | str:
        from ssl_bench.evaluate.datasets import BrokenImage

        try:
            return self.view.pixels(self.split.image(index))
        except BrokenImage as error:
            return str(error)


def load(
    split: Split, view: View, plan: Sequence[Sequence[int]], effort: Effort
) -> Iterator[tuple[torch.Tensor | None, list[int]]]:
    """Batches of pixels (B, 3, H, W) uint8 without the broken images, and the places of those in the batch."""
    images = sum(len(indices) for indices in plan)
    automatic = min(_processors(), 16) if images >= WORTH_WORKERS else 0
    loader = torch.utils.data.DataLoader(
        _Images(split, view),
        batch_sampler=plan,  # type: ignore[arg-type]  # any iterable of index lists will do
        num_workers=automatic if effort.workers is None else effort.workers,
        collate_fn=_collate,
        pin_memory=effort.device.startswith("cuda"),
    )
    for pixels, broken, shapes in loader:
        if broken and not effort.skip_broken:
            raise refused(next(iter(broken.values())))
        if len(shapes) > 1:
            raise UserError(
                f"the images of {split.name} come out of the view in several sizes, such as {shapes[0]} and "
                f"{shapes[1]}; set resize_px and crop_px (pixels: on built-in data takes images at their stored size)."
            )
        yield pixels, list(broken)


def refused(said: str) -> UserError:
    """The error for a broken image, with the way around it."""
    return UserError(f"{said} Or give --skip-broken to leave such images out and count them.")


def _processors() -> int:
    """Those that this process may use: a cluster's job or a container is often given a few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Fewer images than this are read sooner than processes are started.
WORTH_WORKERS = 512


def _collate(
    items: list[npt.NDArray[np.uint8] | str],
) -> tuple[torch.Tensor | None, dict[int, str], list[tuple[int, ...]]]:
    """Stacked in the worker, so that it goes to the parent through shared memory; broken images by their place."""
    broken = {place: item for place, item in enumerate(items) if isinstance(item, str)}
    good = [item for item in items if not isinstance(item, str)]
    shapes = sorted({item.shape for item in good})
    return (torch.from_numpy(np.stack(good)) if len(shapes) == 1 else None), broken, shapes
