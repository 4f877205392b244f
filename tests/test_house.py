"""The rules of the house: imports point one way, package and lock are sound, nothing is imported for nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pretrain", "evaluate", "protocols", "leaderboards")
# Who may import whom, beside what is common to all (ssl_bench.errors, .files, .progress).
ALLOWED = {
    "evaluate": {"evaluate"},
    "pretrain": {"pretrain", "evaluate"},
    "protocols": {"protocols", "evaluate"},
    "leaderboards": {"leaderboards"},
}
COMMON = {"errors", "files", "progress"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "ssl_bench" and len(parts) > 1:
                assert parts[1] in ALLOWED[folder] | COMMON, f"{path.name} imports {name}"
            assert parts[0] not in FOLDERS, f"{path.name} imports {name} by its bare name"


def test_leaderboards_import_no_torch():
    code = (
        "import sys, ssl_bench.leaderboards.record, ssl_bench.leaderboards.store, ssl_bench.leaderboards.table\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_is_silent_and_imports_nothing():
    code = "import sys, ssl_bench; assert not {'torch', 'numpy', 'pandas', 'typer'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_the_public_names_are_there():
    import ssl_bench

    for name in ssl_bench.__all__:
        assert callable(getattr(ssl_bench, name))
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = ssl_bench.runn


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_links_are_relative_and_the_folders_no_packages(folder):
    link = ROOT / "ssl_bench" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_lock_is_hashed_covers_every_dependency_and_names_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "index" not in lock.lower()
    packages = re.findall(r"^([a-z0-9._-]+)==", lock, flags=re.MULTILINE)
    entries = re.split(r"\n(?=[a-z0-9])", lock.strip())
    assert all("--hash=sha256:" in entry for entry in entries)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["openmm"]]
    wanted += [*project["dependency-groups"]["dev"], *project["build-system"]["requires"]]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")
        assert name in packages, f"{name} is not in requirements.lock; run `make lock`"


def test_a_wheel_from_the_tree_holds_the_four_folders_and_their_data(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [
        *(ROOT / "evaluate").rglob("*.py"),
        *(ROOT / "protocols").glob("*.py"),
        *(ROOT / "leaderboards").glob("*.py"),
    ]:
        assert f"ssl_bench/{path.relative_to(ROOT)}" in names
    assert "ssl_bench/evaluate/synsets/imagenet-100.txt" in names
    assert not any(name.startswith(tuple(f"{folder}/" for folder in FOLDERS)) for name in names)


def test_ci_runs_the_tests_and_nothing_else():
    script = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    assert script[-1].endswith("make test")
    assert all("make" not in line for line in script[:-1])


def test_docker_images_are_built_by_the_makefile():
    for dockerfile in (ROOT / "docker").glob("*.Dockerfile"):
        text = dockerfile.read_text()
        assert "make setup" in text
        assert "pip install" not in text
        assert re.search(r"^USER (?!root)", text, flags=re.MULTILINE)
        assert 'ENTRYPOINT ["ssl-bench"]' in text
        assert "VOLUME" in text
