"""Where an interrupted training is kept: under the cache, in a file named after all that makes it that training.

It goes on when the same command is given again; nobody has to say so.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.saving import save
from ssl_bench.evaluate.training import distributed
from ssl_bench.evaluate.training.signals import StopFlag
from ssl_bench.files import cache_folder
from ssl_bench.progress import say

SAVE_SECONDS = 600.0


class StateFile:
    """One file a training. `identity` holds plain values: with another one it is another training."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        content = json.dumps(identity, sort_keys=True, default=str)
        self.key = hashlib.sha256(content.encode()).hexdigest()[:32]
        self.saved_at = time.monotonic()

    @property
    def path(self) -> Path:
        """By its key."""
        return cache_folder() / "training" / f"{self.key}.pt"

    def restore(self, put_back: Callable[[Mapping[str, Any]], None]) -> int:
        """Hand what was saved to `put_back`; the step to go on with. A file that cannot be read counts as none."""
        content = self._read()
        step = 0 if content is None else int(content["step"])
        if len(found := distributed.union([step])) > 1:
            raise UserError(
                f"the processes do not find the same interrupted training (steps {sorted(found)}). "
                "Point SSL_BENCH_CACHE of all machines to one shared folder, or remove its folder training."
            )
        if content is not None:
            put_back(content)
            if distributed.rank() == 0:
                say(f"going on with a training that was interrupted after step {step}")
        return step

    def _read(self) -> Mapping[str, Any] | None:
        try:
            content: Any = torch.load(self.path, map_location="cpu", weights_only=True)
            assert isinstance(content["step"], int)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001  (torch raises whatever the damage makes it trip over)
            say(f"{self.path} cannot be read ({type(error).__name__}); training begins anew")
            return None
        checked: Mapping[str, Any] = content
        return checked

    def save(self, content: Mapping[str, Any], step: int) -> None:
        """By the first process."""
        distributed.on_first(lambda: save({**content, "step": step}, self.path))
        self.saved_at = time.monotonic()

    def remove(self) -> None:
        """The training is over."""
        if distributed.rank() == 0:
            self.path.unlink(missing_ok=True)

    def agreed(self, stop: StopFlag, *, seconds: float | None = None) -> tuple[bool, bool]:
        """Whether any process was told to stop, and whether it is time to save for any."""
        is_old = time.monotonic() - self.saved_at > (SAVE_SECONDS if seconds is None else seconds)
        flags = torch.tensor([float(stop.signal is not None), float(is_old)])
        if distributed.world_size() > 1:
            flags = distributed.mean_of_all(flags.to(distributed.device()))
        return bool(flags[0] > 0), bool(flags[1] > 0)


def farewell(where: str) -> int:
    """Say where the training stopped; the exit code of a program that was asked to stop."""
    if distributed.rank() == 0:
        say(f"stopped in {where} and saved; the same command goes on from there")
    return 128 + signal.SIGTERM
