"""Masks are read before a training that takes hours: what is wrong with them is said now, not at its end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.loading import refused
from ssl_bench.evaluate.masks import IGNORE, Masks
from ssl_bench.evaluate.training import distributed
from ssl_bench.progress import bar

_THREADS = 8
_SAMPLE = 64  # training images that are enough if one of them has a label


def read_before_training(masks: Masks, trained_on: Sequence[Masks], *, skip_broken: bool) -> None:
    """Read every pair of val, and of each training set so many that one pixel has a label."""
    if not _labeled(masks, "val", range(len(masks.splits["val"])), skip_broken=skip_broken):
        raise UserError("no pixel of val has a label, so nothing can be scored. Expected masks that name classes.")
    for each in trained_on:
        rows = range(len(each.splits["train"]))
        sample = rows[:: max(1, len(rows) // _SAMPLE)]
        if not any(_labeled(each, "train", some, skip_broken=skip_broken) for some in (sample, rows)):
            raise UserError(
                "no pixel of the training images has a label, so nothing can be learned. Expected masks that name "
                "classes."
            )


def _labeled(masks: Masks, split: str, rows: Sequence[int], *, skip_broken: bool) -> bool:
    """Whether any pixel has a label; every process reads its share, and all are refused what one is refused."""

    def look(row: int) -> bool | UserError:
        try:
            return bool((masks.pair(split, row)[1] != IGNORE).any())
        except BrokenImage as error:
            return False if skip_broken else refused(str(error))
        except UserError as error:
            return error

    mine, labeled, said = rows[distributed.rank() :: distributed.world_size()], False, list[str]()
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool, bar(f"reading {split}", len(mine)) as advance:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        for found in pool.map(look, mine):
            advance(1)
            if isinstance(found, UserError):
                said.append(str(found))
                break
            labeled |= found
    if everywhere := distributed.gathered_objects(said):
        raise UserError(everywhere[0])
    return any(distributed.gathered_objects([labeled]))
