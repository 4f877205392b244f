"""The folder of a run: what `ssl-bench run` opens, what `--resume` needs, and the log.

checkpoint.pt    the network that the method evaluates, the resolved recipe, where it comes from
training.pt      everything that the next step depends on
log.jsonl        one JSON object a line
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.saving import save, save_checkpoint
from ssl_bench.files import atomic_file, explained, require_writable
from ssl_bench.pretrain.method import Method, Saved


class RunFolder:
    """Reads and writes the files of one run. Only process 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.training, self.checkpoint, self.log = path / "training.pt", path / "checkpoint.pt", path / "log.jsonl"

    def begin(self, *, resume: bool) -> None:
        """Refuse to overwrite a run, and to resume what is not there; make sure that the folder can be written."""
        if resume and not self.training.exists():
            raise UserError(
                f"--resume: there is no {self.training}. Name the folder of an interrupted run with --out, or start a "
                "new one without --resume."
            )
        if not resume and (self.training.exists() or self.checkpoint.exists()):
            raise UserError(
                f"{self.path} holds a run already. Go on with it by --resume, or name another folder with --out."
            )
        require_writable(self.path)
        for half in self.path.glob(".*.part"):  # of a process that was killed while it saved
            half.unlink(missing_ok=True)
        if not resume:
            self.cut_log(-1)  # of a run that ended before it was ever saved

    def read(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """The state to go on from. Refused when it comes from another method, recipe, data or arithmetic."""
        try:
            content: Any = torch.load(self.training, map_location="cpu", weights_only=True)
            theirs: Any = content["identity"]
        except Exception as error:  # torch raises whatever the damage makes it trip over
            raise UserError(
                f"{self.training} cannot be read as the state of a run ({type(error).__name__}); it is damaged or "
                "not ours. Start again in another folder."
            ) from error
        differing = [name for name in identity if identity[name] != theirs.get(name)]
        if differing:
            said = "; ".join(
                f"{name} was {_short(theirs.get(name))}, now {_short(identity[name])}" for name in differing
            )
            raise UserError(
                f"--resume: {self.path} is another run: {said}. Give the command that started it, or name another "
                "folder with --out."
            )
        state: dict[str, Any] = content
        return state

    def write(self, state: Mapping[str, Any], method: Method, origin: Mapping[str, object], keep: str | None) -> None:
        """Both files, each whole or not at all; `keep` names one more copy of the checkpoint that stays."""
        saved = method.saved()
        try:
            # The state in the middle: whatever stops this, the folder can be resumed, and the kept file is not lost.
            if keep:
                self._put(keep, saved, origin)
            save(state, self.training)
            self._put("checkpoint.pt", saved, origin)
        except UserError as error:
            there = "What was saved before stays; --resume goes on from there." if self.training.exists() else ""
            raise UserError(f"{error} {there or 'Nothing was saved before.'}") from error

    def _put(self, name: str, saved: Saved, origin: Mapping[str, object]) -> None:
        save_checkpoint(
            self.path / name, saved.networks, by_protocol=saved.by_protocol, extras=saved.extras, origin=origin
        )

    def cut_log(self, step: int) -> None:
        """Forget lines of steps that are about to be made again."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
                    if json.loads(line).get("step", 0) <= step:
                        lines.append(line)
        with atomic_file(self.log) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines))

    def append(self, line: Mapping[str, Any]) -> None:
        """One more line of the log."""
        with explained(self.log), self.log.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as identity: its values as JSON gives them back, without where it comes from."""
    kept = {name: value for name, value in recipe.items() if name not in ("source", "published")}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain
