"""Files that appear whole or not at all: written aside, then renamed."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that takes its name only when the block ends without an error.

    A device or pipe, such as ``/dev/stdout``, is written to directly: it must not be replaced.

    Args:
        path: Where the file will be. Missing parent folders are made.
        mode: ``"w"`` for UTF-8 text, its line ends untouched, or ``"wb"`` for bytes.
    """
    path = Path(path)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, mode, **text) as file:
            yield file
        return
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    # 40 characters are at most 160 bytes; file names end at 255.
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    try:
        os.chmod(aside, 0o666 & ~_umask())
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def write_json(path: str | Path, value: object, indent: int | None = 2) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=indent)
        file.write("\n")


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory that replaces ``path`` only when the block ends without an error.

    No system call swaps two directories on every platform, so the old one is moved to
    ``.NAME.previous`` for the instant between two renames; ``recover_directory`` puts it back
    if the process is killed just then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    previous = path.with_name(f".{path.name}.previous")
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        os.chmod(aside, 0o777 & ~_umask())
        yield aside
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(path, previous)
        os.rename(aside, path)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        recover_directory(path)
        raise


def recover_directory(path: str | Path) -> None:
    """Put back a directory that a killed ``atomic_directory`` had moved out of the way."""
    path = Path(path)
    previous = path.with_name(f".{path.name}.previous")
    if previous.is_dir() and not path.exists():
        time.sleep(0.2)  # a process that lives is done between its two renames by then
        if not path.exists():
            os.rename(previous, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
