"""On what a number was computed: the device that the user means, versions, the state of the code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ssl_bench
from ssl_bench.errors import UserError


def device_named(name: str) -> str:
    """`auto` is CUDA where there is one; anything else must be there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps.")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available here ({reason}). Try --device auto or cpu.") from error
    return name


_DENSE = ("mmengine", "mmcv", "mmseg", "mmdet", "cv2")


def environment() -> dict[str, Any]:
    """What else a number may depend on."""
    from importlib.metadata import version

    import torch

    packages = {name: version(name) for name in ("torch", "torchvision", "timm", "numpy", "pillow")}
    # Only of runs that used them: they are optional, and decide the dense protocols' numbers.
    packages |= {name: sys.modules[name].__version__ for name in _DENSE if name in sys.modules}
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": accelerator,
        **packages,
    }


def code_version() -> str:
    """The package's version, and in a checkout the commit, with a mark when there are uncommitted changes."""
    if commit := os.environ.get("SSL_BENCH_COMMIT"):  # an image, which has no checkout
        return f"{ssl_bench.__version__}+g{commit[:12]}"
    root = Path(ssl_bench.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ssl_bench.__version__
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ssl_bench.__version__
    return f"{ssl_bench.__version__}+g{described.stdout.strip()}"
