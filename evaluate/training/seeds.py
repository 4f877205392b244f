"""Seeds that depend on several numbers at once."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def mixed(*numbers: int) -> int:
    """A seed of 63 bits that depends on all of them."""
    low, high = np.random.SeedSequence(numbers).generate_state(2)
    return int(low) | (int(high) >> 1) << 32


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators seeded, and put back after: timm's augmentations use them."""
    seed = mixed(*numbers)
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # That of the CPU alone: torch.manual_seed takes a millisecond, to note who seeded devices that are not in use.
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
