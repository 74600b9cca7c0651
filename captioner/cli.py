"""What every command of the project shares: how it ends, and how it shows its options."""

import argparse
import contextlib
import errno
import functools
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from captioner.errors import CaptionerError
from captioner.progress import log_line, printable

# What the system refuses whatever the program does.
NO_BUGS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Main(Protocol):
    """A command: takes its arguments (None: those of the process), returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run."""
        ...


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there are any, and keeps the description's own line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors show file names escaped, as all other messages do."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with 2."""
        super().error(printable(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help; argparse's own hides that nobody reads it."""
        (file or sys.stderr).write(message or "")


def program_name(name: str, tool: str) -> str:
    """Return what a command's usage line calls it: as the user has started it.

    Args:
        name: The command's name after ``captioner``, such as ``"caption"``.
        tool: Its file in ``tools/``, such as ``"caption_folder.py"``.

    Returns:
        ``"captioner caption"``; or ``"python tools/caption_folder.py"``, its path as it was typed.
    """
    started = sys.argv[0]
    return f"python {started}" if Path(started).name == tool else f"captioner {name}"


def command(main: Main) -> Main:
    """Turn a ``main(argv) -> exit code`` into one that ends as users expect.

    A ``CaptionerError`` becomes one line on standard error and its exit code (1; 2 for a usage
    error), and so does a full or forbidden disk; Ctrl-C becomes exit code 130; a closed pipe ends
    quietly; a bug keeps its traceback. Standard streams may be closed or know ASCII alone.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        _prepare_streams()
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged and large files: lines more
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()  # a closed pipe must show here, not when Python ends
        except CaptionerError as error:
            return _end(f"error: {error}" if str(error) else "", error.exit_code)
        except KeyboardInterrupt:
            return _end("stopped by Ctrl-C", 130)
        except BrokenPipeError:
            return _end("", 141)
        except OSError as error:
            if error.errno not in NO_BUGS:
                raise
            return _end(f"error: {error.filename or 'writing'}: {error.strerror}", 1)

    return run


def output_is_closed() -> bool:
    """Tell whether the process was started without standard output (``>&-``)."""
    return sys.__stdout__ is None


def _prepare_streams() -> None:
    """Let standard output and error be printed to, whatever the process was started with."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: else the next file gets its number, and all that is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a notebook has replaced it
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone


def _end(message: str, exit_code: int) -> int:
    """Tell how a command ended, if anybody listens; return its exit code."""
    with contextlib.suppress(OSError):
        if message:
            log_line(message, urgent=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python flushes once more at exit: what is left needs somewhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return exit_code
