"""Files: read with errors that name them, locked, and written so that they appear whole or not."""

import codecs
import contextlib
import ctypes
import errno
import json
import os
import re
import secrets
import shlex
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

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
    with error_naming(path, error):
        with open_regular(path) if regular else open(path, "rb") as file:
            content = file.read()
        if _is_utf16(content):
            raise error(f"{path}: not UTF-8 text but UTF-16{_conversion(path, 'UTF-16')}")
        text = content.decode("utf-8-sig")
    return text  # noqa: RET504 (mypy thinks that a context manager may swallow an error)


@contextlib.contextmanager
def error_naming(path: str | Path, error: type[CaptionerError]) -> Iterator[None]:
    """Turn what goes wrong in reading a file into one line that names it, and the reason."""
    try:
        yield
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
def locked(path: str | Path, busy: CaptionerError | str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file; the system releases it when a process dies.

    Args:
        path: The lock file; it stays behind, empty.
        busy: What to do while another process holds it: an error is raised; a text is printed,
            and the lock waited for.
        patience: Seconds to wait for it before that.
    """
    from filelock import FileLock, Timeout  # not at the top: captioner.runtime does without

    lock = FileLock(path)
    try:
        # ``is_locked`` may hold it for a moment.
        lock.acquire(timeout=max(patience, 0.05), poll_interval=0.01)
    except Timeout:
        if isinstance(busy, CaptionerError):
            raise busy from None
        log_line(busy)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_locked(path: str | Path) -> bool:
    """Tell whether another process holds a lock file at this moment.

    The lock is shared with all who ask, for some microseconds. False where there is no such file,
    or where it can't be asked.
    """
    try:
        import fcntl  # not on Windows

        file = open_regular(path)
    except (ImportError, OSError):
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


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
    aside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    # Of 0o666 the system takes away what the user's umask says.
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _O_BINARY, 0o666)
    try:
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


# --- directories that are replaced whole ------------------------------------------------------
#
# A new version is filled in ``.NAME.RANDOM.tmp``, written to the disk, and swapped with ``NAME`` in
# one system call. Where the file system can't swap, NAME is moved to ``.NAME.previous`` and the new
# one to NAME: whoever is killed in between leaves the previous one alone, which readers then take.
# Readers move nothing. Writers tidy up after those before them; there is one at a time.


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory that replaces ``path`` only when the block ends without an error.

    At each moment, also after a crash of the machine, there is the old version or the new one,
    whole, for those who read by ``open_together``. One writer at a time: hold a lock.
    """
    path = Path(path).resolve()  # a link stays a link
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    aside = _name_aside(path)
    os.mkdir(aside)
    try:
        yield aside
        _sync_tree(aside)
        if not path.exists():
            os.rename(aside, path)
        elif not _exchange(aside, path):
            os.rename(path, _previous(path))
            os.rename(aside, path)
        _sync(path.parent)
    finally:
        recover_directory(path)


def recover_directory(path: str | Path) -> None:
    """Tidy up after writers that were killed; for the one that writes now.

    A previous version is put back where none has taken its place, and what is left over is removed.
    """
    path = Path(path).resolve()
    previous = _previous(path)
    if os.path.isdir(previous):
        # Renamed before it is removed: a previous version is whole, or not there.
        os.rename(previous, _name_aside(path) if path.exists() else path)
    leftover = re.compile(rf"\.{re.escape(path.name)}\.\w+\.tmp")
    for name in os.listdir(path.parent) if path.parent.is_dir() else []:
        if leftover.fullmatch(name):
            shutil.rmtree(path.with_name(name), ignore_errors=True)


def remove_directory(path: str | Path) -> None:
    """Remove a directory that ``atomic_directory`` has written: it is there, whole, or not."""
    path = Path(path).resolve()
    try:
        os.rename(path, _name_aside(path))
    finally:
        recover_directory(path)


ATTEMPTS = 100  # a writer needs more than a millisecond, and an attempt far less


def open_together(
    directory: str | Path,
    names: Iterable[str],
    optional: Iterable[str] = (),
    error: type[CaptionerError] = DataError,
) -> dict[str, BinaryIO]:
    """Open files of a directory that may be replaced at any moment: all of the same version.

    Args:
        directory: As ``atomic_directory`` writes it.
        names: Files in it, which must be regular ones.
        optional: More of them, which may be missing.
        error: What to raise.

    Returns:
        The files by name, open for reading bytes; close them.

    Raises:
        CaptionerError: One is missing or can't be opened; the message names it.
    """
    directory, names = Path(directory), list(names)
    every_name = [*names, *optional]
    with error_naming(directory, error):
        previous = _previous(directory.resolve())
    for _ in range(ATTEMPTS):
        version = directory if os.path.isdir(directory) else previous
        with contextlib.ExitStack() as opened:
            files = {}
            for name in every_name:
                with error_naming(directory / name, error), contextlib.suppress(FileNotFoundError):
                    files[name] = opened.enter_context(open_regular(version / name))
            # Versions only follow each other: what has its name still was there all the time.
            unchanged = all(_has_name(files.get(name), version / name) for name in every_name)
            if unchanged and files.keys() >= set(names):
                opened.pop_all()
                return files
    for name in names:
        if name not in files:
            raise error(f"{directory / name}: no such file")
    raise error(f"{directory}: it is replaced again and again; try once more")


def _has_name(file: BinaryIO | None, path: Path) -> bool:
    """Whether a path still leads to an open file, or still nowhere where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return file is None
    return file is not None and os.path.samestat(os.fstat(file.fileno()), status)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _name_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system can't."""
    names = os.fsencode(one), os.fsencode(other)
    swap = ctypes.c_uint(2)  # RENAME_EXCHANGE, RENAME_SWAP
    try:
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(*names, swap) == 0
        here = ctypes.c_int(-100)  # AT_FDCWD
        return ctypes.CDLL(None).renameat2(here, names[0], here, names[1], swap) == 0
    except (AttributeError, OSError, TypeError):  # another system, or an old one
        return False


MANY_FILES = 32


def _sync_tree(directory: Path) -> None:
    """Write all files of a directory to the disk, then the directories themselves."""
    walk = [(Path(folder), names) for folder, _, names in os.walk(directory)]
    paths = [folder / name for folder, names in walk for name in names]
    files = [path for path in paths if stat.S_ISREG(path.lstat().st_mode)]
    if len(files) > MANY_FILES:
        with ThreadPoolExecutor(8) as threads:  # the disk takes many at a time in one go
            list(threads.map(_sync, files))
    else:  # such as a checkpoint's
        for path in files:
            _sync(path)
    for folder, _ in reversed(walk):
        _sync(folder)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise  # the others are file systems that don't know this
    finally:
        os.close(descriptor)
