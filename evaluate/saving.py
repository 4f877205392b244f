"""Write checkpoints: whole or not at all, under names that `open_checkpoint` reads."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl_bench.evaluate.architecture import State
from ssl_bench.files import atomic_file

if TYPE_CHECKING:
    from ssl_bench.evaluate.backbone import Backbone


def save_checkpoint(
    path: Path,
    networks: Backbone | Mapping[str, Backbone],
    *,
    by_protocol: Mapping[str, str] | None = None,
    extras: Mapping[str, State] | None = None,
    origin: Mapping[str, object] | None = None,
) -> None:
    """Write the file that `ssl-bench run` opens: one network, or several of one architecture by role.

    The first is the one to evaluate, unless `by_protocol` names another for a protocol. `origin` says where the file
    comes from, in plain values.
    """
    from ssl_bench.evaluate.backbone import Backbone, canonical_state

    roles = {"model": networks} if isinstance(networks, Backbone) else dict(networks)
    architectures = {network.architecture for network in roles.values()}
    assert len(architectures) == 1
    assert set((by_protocol or {}).values()) <= set(roles)
    content = {
        "ssl_bench": 1,
        "architecture": dataclasses.asdict(architectures.pop()),
        "networks": {role: _plain(canonical_state(network)) for role, network in roles.items()},
        "by_protocol": dict(by_protocol or {}),
        "extras": {name: _plain(state) for name, state in (extras or {}).items()},
        "origin": dict(origin or {}),
    }
    save(content, path)


def save(content: Mapping[str, object], path: Path) -> None:
    """torch.save, atomically, with the system's reason when it cannot write."""
    with atomic_file(path) as temporary:
        buffered = _Checked(temporary.open("wb"))
        try:
            torch.save(dict(content), buffered)  # type: ignore[arg-type]  # it needs no more than write and flush
        except RuntimeError as error:  # torch only says that its writer failed
            raise buffered.error or error from error
        finally:
            buffered.close()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a crash after the renaming could leave an empty file in place of the old one


class _Checked(io.BufferedIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.error = file, None

    error: OSError | None

    def write(self, data: Any) -> int:
        """Pass on."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Pass on."""
        if not self.file.closed:
            self.file.flush()

    def close(self) -> None:
        """Pass on."""
        self.file.close()


def _plain(state: State) -> State:
    # Cloned, because torch saves the whole storage of which a tensor may be a small view.
    return {key: value.detach().cpu().clone() for key, value in state.items()}
