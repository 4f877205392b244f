"""Where things are kept, and how a file is written so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssl_bench.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError)


def data_folder() -> Path:
    """Where real datasets are looked for by name: SSL_BENCH_DATA, else ./data."""
    return _named_folder("SSL_BENCH_DATA", "data")


def results_folder() -> Path:
    """Where records are kept: SSL_BENCH_RESULTS, else ./results."""
    return _named_folder("SSL_BENCH_RESULTS", "results")


def cache_folder() -> Path:
    """Where features and built-in data are kept: SSL_BENCH_CACHE, else ~/.cache/ssl-bench."""
    return _named_folder("SSL_BENCH_CACHE", "~/.cache/ssl-bench")


def _named_folder(variable: str, default: str) -> Path:
    # A variable that is set to nothing means the default: Path("") would be the current folder.
    return expanded(os.environ.get(variable) or default)


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~name` as the folders that they stand for."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: there is no user of that name, or no home folder. Expected a path; write it in full, or ./~name "
            "for a folder that is called so."
        ) from error


def require_writable(folder: Path) -> None:
    """Make `folder` and write into it, so that what cannot be kept is known before it is computed."""
    with _placed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write at `path` into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"no space left while writing {path}: {error.strerror}. What was half-written has been removed; "
                "free some space (ssl-bench cache gc) or point SSL_BENCH_CACHE and SSL_BENCH_RESULTS to another disk, "
                "then give the same command again."
            ) from error
        if isinstance(error, _REFUSED) or error.errno == errno.EROFS:
            raise _refusal(path, error) from error
        raise


def _refusal(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}. Choose a place that you may write to.")


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[None]:
    """`explained`, where something new is made: a place that does not exist (/proc/x) cannot be made by anyone."""
    with explained(path):
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise _refusal(path, error) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, else it is removed."""
    with explained(path):
        with _placed(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_report(path: Path, text: str, *, append: bool = False) -> None:
    """Text for a file that the user named. Written into what is there: a link stays one, and a device too."""
    with _placed(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a whole folder. If somebody else finished `path` in the meantime, theirs stays."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            try:
                temporary.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remembered(kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A small JSON answer that depends on `key` alone, computed once and kept under the cache."""
    name = hashlib.sha256(json.dumps([kind, key], sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "memo" / f"{kind}-{name}.json"
    with contextlib.suppress(OSError, ValueError):
        answer = json.loads(path.read_text())
        if isinstance(answer, dict):
            return answer
    answer = compute()
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(answer, indent=1))
    return answer


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that the user named for output: refused if it exists with anything in it, written atomically."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path} exists and is not an empty folder; name a new one, so that nothing of yours is overwritten."
        )
    if path.is_dir():
        path.rmdir()
    with atomic_folder(path) as temporary:
        yield temporary
