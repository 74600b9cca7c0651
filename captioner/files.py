"""Files: read with errors that name them, locked, and written so that they appear whole or not."""

import codecs
import contextlib
import errno
import json
import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from filelock import FileLock, Timeout

from captioner.errors import CaptionerError, DataError
from captioner.progress import log_line


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        OSError: It is missing or forbidden; or it is a folder, pipe, device or socket, whose
            reading might never end.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes into it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _O_BINARY)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "a pipe, device or socket, not a regular file", str(path))


_O_BINARY = getattr(os, "O_BINARY", 0)  # Windows


def read_text(
    path: str | Path, error: type[CaptionerError] = DataError, regular: bool = False
) -> str:
    """Return a UTF-8 file's text, its line ends untouched.

    Args:
        path: The file.
        error: What to raise.
        regular: Refuse pipes and devices. A user may name one as an argument, ``<(command)`` say,
            but no checkpoint holds one.

    Raises:
        CaptionerError: It can't be read; the message names the file and the reason.
    """
    try:
        with open_regular(path) if regular else open(path, "rb") as file:
            content = file.read()
        if _is_utf16(content):
            raise error(f"{path}: not UTF-8 text but UTF-16{_conversion(path, 'UTF-16')}")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except IsADirectoryError:
        raise error(f"{path}: this is a folder, a file was expected") from None
    except UnicodeDecodeError as problem:
        guess = _guess_encoding(path, problem)
        raise error(f"{path}: not UTF-8 text (byte {problem.start}){guess}") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: can't be read ({reason})") from None


_CONTROL_CHARACTERS = bytes(set(range(32)) - set(b"\t\n\v\f\r"))


def _is_utf16(content: bytes) -> bool:
    """Tell whether a file begins with the mark of UTF-16, or with an ASCII character in UTF-16."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return content.startswith(marks) or (len(content) > 1 and content[:2].count(0) == 1)


def _guess_encoding(path: str | Path, problem: UnicodeDecodeError) -> str:
    """Return what a file that isn't UTF-8 may be, and how to convert it, to end a message."""
    content = problem.object
    if problem.reason == "unexpected end of data" and not content[: problem.start].isascii():
        return "; it ends within a character: is the file complete?"
    if len(content.translate(None, _CONTROL_CHARACTERS)) < len(content):
        return "; this is no text file"
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return "; convert it to UTF-8"
    return f"; it looks like Latin-1 or Windows-1252{_conversion(path, 'WINDOWS-1252')}"


def _conversion(path: str | Path, encoding: str) -> str:
    return f"; convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW_FILE"


def read_json(
    path: str | Path, error: type[CaptionerError] = DataError, regular: bool = False
) -> Any:
    """Read a JSON file; the arguments are those of ``read_text``.

    Raises:
        CaptionerError: It can't be read or isn't JSON; the message names line and column.
    """
    return parse_json(read_text(path, error, regular), str(path), error)


def parse_json(text: str, place: str, error: type[CaptionerError] = DataError) -> Any:
    """Parse JSON that was found at ``place``, which the message of an error begins with."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(
            f"{place}: not valid JSON at line {problem.lineno}, column {problem.colno} "
            f"({problem.msg}); is the file complete?"
        ) from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{place}: not usable JSON ({problem})") from None


@contextlib.contextmanager
def locked(path: str | Path, busy: CaptionerError | str) -> Iterator[None]:
    """Hold a lock file; the system releases it when a process dies.

    Args:
        path: The lock file; it stays behind, empty.
        busy: What to do while another process holds it: an error is raised; a text is printed,
            and the lock waited for.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if isinstance(busy, CaptionerError):
            raise busy from None
        log_line(busy)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        content = text.encode()
    except UnicodeEncodeError:  # lone surrogates, of a file name that isn't UTF-8: \\u escapes
        content = json.dumps(value, indent=indent).encode()
    with atomic_write(path, "wb") as file:
        file.write(content + b"\n")


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
