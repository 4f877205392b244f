"""The packages of the dense protocols: are they the right ones; and importing them without their noise.

`installed()` looks at their metadata. `require()` imports them, and is called before anything else does: in a worker
process that was not forked, too. `ssl-bench doctor` shows the same findings.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

from ssl_bench.errors import UserError
from ssl_bench.protocols.openmm import operators

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["fine", "note", "wrong"]

INSTALL = "pip install 'ssl-bench[openmm]' (in a checkout: make -B setup)"
# The maintained forks: the folder of each, and the distributions that write the same folder.
_FORKS = {
    "onedl-mmengine": ("mmengine", ("mmengine", "mmengine-lite")),
    "onedl-mmcv": ("mmcv", ("mmcv", "mmcv-lite", "mmcv-full")),
    "onedl-mmdetection": ("mmdet", ("mmdet",)),
    "onedl-mmsegmentation": ("mmseg", ("mmsegmentation",)),
}
_HEADLESS = "opencv-python-headless"
_OPENCV = ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless", _HEADLESS)
# Whatever of them registers classes or prints when it is imported, so that no later import does.
_PARTS = ("structures", "models", "datasets", "evaluation", "engine", "visualization")
_MODULES = ("mmengine.runner", "mmcv.ops", *(f"{name}.{part}" for name in ("mmseg", "mmdet") for part in _PARTS))


class Finding(NamedTuple):
    """What was looked at, its state, what was found, what to do."""

    what: str
    state: State
    found: str
    to_do: str = ""


def installed() -> None:
    """Refuse when a package is missing or the wrong one, or was imported too early; imports none of them."""
    _refuse([finding for finding in findings() if finding.state != "fine"])
    operators.check_order()


def require() -> None:
    """Import mmengine, mmcv, mmseg and mmdet in silence, with torchvision standing in for mmcv's compiled operators."""
    installed()
    operators.install()
    try:
        with _silence():
            for name in _MODULES:
                importlib.import_module(name)
    except ImportError as error:
        _refuse([_unimportable("the dense packages", str(error))])


def findings() -> list[Finding]:
    """What can be told without importing anything. All but the fine ones keep the dense protocols from running."""
    found = [_dense(requirement) for requirement in requirements("openmm")]
    if _there("mmcv"):
        served = "compiled" if operators.compiled() else "none compiled: torchvision stands in"
        found.append(Finding("mmcv's operators", "fine", served))
    return found


def _dense(requirement: Requirement) -> Finding:
    """A package of the extra: its version, and for a fork also whether its folder is its own."""
    name = requirement.name
    finding = examined(requirement, missing="note", to_do=INSTALL)
    if name not in _FORKS:
        return finding
    folder, originals = _FORKS[name]
    present = [original for original in originals if _version(original)]
    if present:
        others = " and ".join(f"{original} {_version(original)}" for original in present)
        found = f"{finding.found}, and {others}, the original, which writes the same folder {folder}/"
        to_do = f"pip uninstall -y {' '.join(present)} {name}, then {INSTALL}"
        return Finding(name, "note" if finding.state == "note" else "wrong", found, to_do)
    if finding.state == "fine" and not _there(folder):
        found = f"{finding.found}, but without its folder {folder}/, which an original that is uninstalled takes along"
        return Finding(name, "wrong", found, f"pip uninstall -y {name}, then {INSTALL}")
    return finding


def opencv() -> list[Finding]:
    """Can it be imported? Tried in another process (0.2 s); nothing where no OpenCV is."""
    flavors = [f"{name} {_version(name)}" for name in _OPENCV if _version(name)]
    if not flavors:
        return []
    done = subprocess.run([sys.executable, "-c", "import cv2"], capture_output=True, text=True, check=False)
    if done.returncode:
        return [_unimportable("opencv", done.stderr.strip().rpartition("\n")[2])]
    if len(flavors) == 1:
        return [Finding("opencv", "fine", flavors[0])]
    return [Finding("opencv", "note", f"{' and '.join(flavors)} write the same folder cv2/", _only_headless())]


def requirements(extra: str) -> list[Requirement]:
    """Those of ssl-bench itself (""), or those that an extra adds to them; none where ssl-bench runs uninstalled."""
    from packaging.requirements import Requirement

    try:
        everything = [Requirement(line) for line in metadata.requires("ssl-bench") or ()]
    except metadata.PackageNotFoundError:
        return []
    always = [each for each in everything if each.marker is None or each.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [
        each for each in everything if each not in always and each.marker and each.marker.evaluate({"extra": extra})
    ]


def examined(requirement: Requirement, *, missing: State, to_do: str) -> Finding:
    """One package against the versions that are asked for."""
    found = _version(requirement.name)
    if found is None:
        return Finding(requirement.name, missing, "missing", to_do)
    if requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, "fine", found)
    return Finding(requirement.name, "wrong", found, f"expected {requirement.specifier}: {to_do}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _there(module: str) -> bool:
    """Leftovers without an __init__.py would be a namespace package, of no origin."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def _unimportable(what: str, said: str) -> Finding:
    if "libGL" in said:
        return Finding(what, "wrong", f"{said}: this OpenCV needs a desktop's libraries", _only_headless())
    return Finding(what, "wrong", f"cannot be imported: {said}", INSTALL)


def _only_headless() -> str:
    present = " ".join(name for name in _OPENCV if _version(name))
    return f"pip uninstall -y {present} && pip install {_HEADLESS}"


def _refuse(bad: Sequence[Finding]) -> None:
    if bad:
        lines = [f"  {finding.what}: {finding.found}. To do: {finding.to_do}" for finding in bad]
        raise UserError("\n".join(["the dense protocols (semseg, detection) cannot run on this installation:", *lines]))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What they print and warn of at import concerns nothing that is used here.

    Nothing of it goes to stderr, which stays: a logger that is made meanwhile would keep writing into the void.
    """
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
