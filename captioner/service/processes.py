"""Processes that answer one message after the other, and may be killed.

They are forked from one that has imported what they need and runs no thread: at once, and sharing
its memory.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_processes = multiprocessing.get_context("forkserver")


def start_forkserver() -> None:
    """Start it; it imports while the caller goes on. Later calls do nothing."""
    _processes.set_forkserver_preload(
        ["captioner.service.decoding", "captioner.service.captioning"]
    )
    forkserver.ensure_running()


class Worker:
    """A process, and the connection to it.

    Args:
        name: What system tools call it.
        serve: Called there with its end of the connection and ``arguments``. It ends when the
            connection does.
        arguments: For ``serve``.

    Attributes:
        connection: This end. Once the process has died, it is at its end.
    """

    def __init__(self, name: str, serve: Callable[..., object], *arguments: Any) -> None:
        start_forkserver()
        self.connection, theirs = _processes.Pipe()
        self._process = _processes.Process(
            target=_run, args=(name, serve, theirs, *arguments), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _run(name: str, serve: Callable[..., object], connection: Connection, *arguments: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the group; the service finishes first
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # not on Linux
        Path("/proc/self/comm").write_text(name)
    with contextlib.suppress(EOFError, OSError):  # the service has ended
        serve(connection, *arguments)
