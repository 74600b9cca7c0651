"""What every command of the project shares: how it ends, and how it shows its options."""

import argparse
import errno
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from captioner.errors import CaptionerError

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
    quietly; a bug keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()  # a closed pipe must show here, not when Python ends
        except CaptionerError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # Python flushes standard output once more at exit: give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            if error.errno not in NO_BUGS:
                raise
            print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
            return 1

    return run
