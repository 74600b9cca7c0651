"""Where the processes that decode images come from.

They are forked from one that has imported what they need and runs no thread: at once, and sharing
its memory.
"""

import multiprocessing
from multiprocessing import forkserver

processes = multiprocessing.get_context("forkserver")


def start_forkserver() -> None:
    """Start it; it imports while the caller goes on. Later calls do nothing."""
    processes.set_forkserver_preload(["captioner.service.decoding"])
    forkserver.ensure_running()
