"""`ssl-bench doctor`: is this machine fit, and if not, what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.util import find_spec

from ssl_bench.errors import UserError
from ssl_bench.files import cache_folder, data_folder, require_writable, results_folder
from ssl_bench.protocols.openmm import packages
from ssl_bench.protocols.openmm.packages import State

Finding = dict[str, str]
_LEAST_FREE_GIB = 2.0


def examine() -> list[Finding]:
    """Every finding: what was looked at, its state, what was found, what to do."""
    compute = _compute() if find_spec("torch") else []
    return [_python(), *_packages(), *_dense(), *compute, *_folders(), *_data()]


def _finding(what: str, state: State, found: str, to_do: str = "") -> Finding:
    return {"what": what, "state": state, "found": found, "to_do": to_do}


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return _finding(
        "python", "fine" if good else "wrong", platform.python_version(), "" if good else "install Python 3.11 or newer"
    )


def _packages() -> list[Finding]:
    needed = packages.requirements("")
    if not needed:
        return [_finding("ssl-bench", "note", "not installed as a package: versions are not checked", "make setup")]
    return [_finding(*packages.examined(each, missing="wrong", to_do="make -B setup")) for each in needed]


def _dense() -> list[Finding]:
    return [_finding(*each) for each in (*packages.findings(), *packages.opencv())]


def _compute() -> list[Finding]:
    import torch

    from ssl_bench.evaluate.hardware import cpu_has_bf16

    findings = []
    if torch.cuda.is_available():
        findings += [
            _finding(f"cuda:{number}", "fine", torch.cuda.get_device_name(number))
            for number in range(torch.cuda.device_count())
        ]
    else:
        findings.append(_finding("gpu", "note", "none that torch can use", "everything runs on the CPU, more slowly"))
    capability, cores = torch.backends.cpu.get_cpu_capability(), os.cpu_count() or 1
    findings.append(_finding("cpu", "fine", f"{cores} cores, {torch.get_num_threads()} threads, {capability}"))
    fast = cpu_has_bf16()
    findings.append(
        _finding(
            "bf16 on the cpu",
            "fine" if fast else "note",
            "in hardware" if fast else "emulated",
            "" if fast else "stay with --dtype fp32 on this CPU",
        )
    )
    return findings


def _folders() -> list[Finding]:
    findings = []
    for name, folder in (("SSL_BENCH_RESULTS", results_folder()), ("SSL_BENCH_CACHE", cache_folder())):
        try:
            require_writable(folder)
        except UserError as error:
            findings.append(_finding(name, "wrong", str(error), f"set {name} to a folder that you may write to"))
            continue
        free = shutil.disk_usage(folder).free / 2**30
        enough = free >= _LEAST_FREE_GIB
        findings.append(
            _finding(
                name,
                "fine" if enough else "note",
                f"{folder} ({free:.1f} GiB free)",
                "" if enough else "free some space: ssl-bench cache gc",
            )
        )
    return findings


def _data() -> list[Finding]:
    folder = data_folder()
    if folder.is_dir():
        return [_finding("SSL_BENCH_DATA", "fine", str(folder))]
    return [
        _finding(
            "SSL_BENCH_DATA",
            "note",
            f"{folder} does not exist",
            "only for datasets by name (ssl-bench ls datasets); paths and built-in data work",
        )
    ]
