"""Missing, wrong and doubled packages: what `run` refuses and `doctor` shows, with the command that mends it."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from test_run import in_process

from ssl_bench import doctor
from ssl_bench.errors import UserError
from ssl_bench.protocols.openmm import packages

FORKS = ("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")


@pytest.fixture
def pretend(monkeypatch):
    """Installed versions by name, on top of the real ones; None: not installed."""

    def set_versions(**versions: str | None) -> None:
        real = metadata.version
        changed = {name.replace("_", "-"): value for name, value in versions.items()}

        def version(name: str) -> str | None:
            if name not in changed:
                return real(name)
            if changed[name] is None:
                raise metadata.PackageNotFoundError(name)
            return changed[name]

        monkeypatch.setattr(metadata, "version", version)

    return set_versions


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


def row(name: str) -> dict[str, str]:
    (found,) = [finding for finding in doctor.examine() if finding["what"] == name]
    return found


def refusal() -> str:
    with pytest.raises(UserError) as refused:
        packages.installed()
    return str(refused.value)


def test_what_is_installed_here_is_fine():
    packages.installed()
    states = {finding.what: finding.state for finding in packages.findings()}
    assert set(states) == {*FORKS, "opencv-python-headless", "mmcv's operators"}
    assert set(states.values()) == {"fine"}
    assert row("mmcv's operators")["found"] == "none compiled: torchvision stands in"


def test_bounds_are_those_of_pyproject(pretend):
    pretend(onedl_mmcv="2.4.0", onedl_mmdetection="3.4.9", onedl_mmsegmentation="1.4.9", onedl_mmengine="0.10.12")
    states = {finding.what: (finding.state, finding.to_do) for finding in packages.findings()}
    assert states["onedl-mmengine"][0] == states["onedl-mmsegmentation"][0] == "fine"
    assert states["onedl-mmcv"][0] == states["onedl-mmdetection"][0] == "wrong"
    assert states["onedl-mmcv"][1].startswith("expected <2.4,>=2.3.6: pip install 'ssl-bench[openmm]'")
    assert "onedl-mmcv: 2.4.0. To do: expected <2.4" in refusal()


def test_without_the_extra_doctor_notes_it_and_run_refuses(pretend, call):
    pretend(**{name.replace("-", "_"): None for name in (*FORKS, "opencv-python-headless")})
    assert row("onedl-mmcv")["state"] == "note"
    assert not [finding for finding in doctor.examine() if finding["what"] == "opencv"]
    assert call("doctor")[0] == 0  # nobody needs dense protocols
    message = refusal()
    assert message.startswith("the dense protocols (semseg, detection) cannot run on this installation:")
    for name in FORKS:
        assert f"{name}: missing. To do: pip install 'ssl-bench[openmm]' (in a checkout: make -B setup)" in message
    with pytest.raises(UserError, match="onedl-mmengine: missing"):
        packages.require()


@pytest.mark.parametrize(
    ("original", "fork", "folder"),
    [
        ("mmengine", "onedl-mmengine", "mmengine/"),
        ("mmengine-lite", "onedl-mmengine", "mmengine/"),
        ("mmcv", "onedl-mmcv", "mmcv/"),
        ("mmcv-lite", "onedl-mmcv", "mmcv/"),
        ("mmdet", "onedl-mmdetection", "mmdet/"),
        ("mmsegmentation", "onedl-mmsegmentation", "mmseg/"),
    ],
)
def test_an_original_beside_its_fork_is_wrong(original, fork, folder, pretend, call):
    pretend(**{original.replace("-", "_"): "1.2.3"})
    found = row(fork)
    assert found["state"] == "wrong"
    assert f"and {original} 1.2.3, the original, which writes the same folder {folder}" in found["found"]
    assert found["to_do"].startswith(f"pip uninstall -y {original} {fork}, then pip install 'ssl-bench[openmm]'")
    assert found["found"] in refusal()
    assert call("doctor")[0] == 1
    pretend(**{fork.replace("-", "_"): None})  # somebody else's mmdet is not our business until dense protocols run
    assert row(fork)["state"] == "note"
    assert f"pip uninstall -y {original} {fork}" in refusal()


def test_a_folder_that_went_with_the_original_is_told(monkeypatch, tmp_path):
    real = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "mmdet" else real(name))
    assert row("onedl-mmdetection")["state"] == "wrong"
    assert "without its folder mmdet/" in refusal()
    assert "pip uninstall -y onedl-mmdetection, then pip install 'ssl-bench[openmm]'" in refusal()
    (tmp_path / "leftover").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert real("leftover") is not None
    monkeypatch.setattr(packages, "find_spec", real)
    assert not packages._there("leftover")


def test_a_desktop_opencv_without_libgl_and_two_opencvs(monkeypatch, pretend, tmp_path):
    assert row("opencv")["found"].startswith("opencv-python-headless ")
    pretend(opencv_python="5.0.0")
    assert row("opencv")["state"] == "note"
    uninstall = "pip uninstall -y opencv-python opencv-python-headless && pip install opencv-python-headless"
    assert row("opencv")["to_do"] == uninstall
    packages.installed()  # pip always installs both, and where libGL is they work

    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = row("opencv")
    assert found["state"] == "wrong"
    assert found["found"].startswith("ImportError: libGL.so.1: cannot open shared object file")
    assert found["to_do"] == uninstall


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("libGL.so.1: cannot open shared object file", "To do: pip uninstall -y opencv-python-headless && pip install"),
        ("No module named 'addict'", "cannot be imported: No module named 'addict'. To do: pip install 'ssl-bench"),
    ],
)
def test_what_cannot_be_imported_is_the_users_to_mend(said, expected, monkeypatch):
    def fail(name: str) -> None:
        print("Could not import OneDL")
        raise ImportError(said)

    monkeypatch.setattr(packages.importlib, "import_module", fail)
    with pytest.raises(UserError) as refused:
        packages.require()
    assert expected in str(refused.value)


def test_ssl_bench_from_a_tree_that_was_never_installed(monkeypatch):
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert row("ssl-bench")["state"] == "note"
    packages.installed()


def test_doctor_lives_without_torch(monkeypatch):
    real = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "torch" else real(name))
    assert not {"cpu", "gpu"} & {finding["what"] for finding in doctor.examine()}


# Imports


def test_requiring_is_silent_imports_all_and_leaves_no_logger_behind():
    code = """
import logging, sys, warnings
from ssl_bench.protocols.openmm import packages
packages.installed()
assert not {"torch", "mmengine", "mmcv", "mmseg", "mmdet", "cv2"} & set(sys.modules)
filters = list(warnings.filters)
packages.require()
loaded = set(sys.modules)
packages.require()
assert set(sys.modules) == loaded
assert warnings.filters[-len(filters):] == filters
from mmengine.logging import MMLogger
assert not MMLogger._instance_dict
loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
streams = [getattr(each, "stream", None) for logger in loggers for each in getattr(logger, "handlers", ())]
assert "StringIO" not in {type(stream).__name__ for stream in streams}
# What a protocol imports later is there already, so that it is silent, too.
import mmseg.datasets, mmseg.models, mmseg.evaluation, mmdet.datasets, mmdet.models, mmdet.evaluation
from mmengine.registry import DefaultScope, MODELS, TRANSFORMS
import mmseg.registry, mmdet.registry
for registry in (mmseg.registry.MODELS, mmdet.registry.MODELS, mmseg.registry.TRANSFORMS, mmdet.registry.TRANSFORMS):
    registry.import_from_location()
assert {name for name in set(sys.modules) - loaded if name.startswith(("mmseg.", "mmdet."))} == set()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_doctor_lists_and_the_other_protocols_import_none_of_them():
    code = """
import sys
import ssl_bench.protocols.detection, ssl_bench.protocols.semseg
from ssl_bench.cli import main
network = ["--ckpt", "random:vit_32x1x2_patch4_8", "--dataset", "digits"]
for arguments in (["doctor"], ["ls", "recipes"], ["run", *network, "--protocol", "knn"]):
    sys.argv = ["ssl-bench", *arguments, "--json"]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, arguments
    assert not {"mmengine", "mmcv", "mmseg", "mmdet", "cv2", "pycocotools"} & set(sys.modules), arguments
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"knn"' in done.stdout
