"""A page's folder, served as users serve it, and what a tab does with it."""

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsers import wait_until

from captioner.errors import DataError
from captioner.page.onnxruntime_web import read_onnxruntime_web


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as ``python -m http.server`` does; give its address."""
    handler = functools.partial(_Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def onnxruntime_web() -> dict[str, bytes]:
    """Return the real one; skip the test where it can't be had."""
    try:
        return read_onnxruntime_web()
    except DataError as error:
        pytest.skip(f"needs onnxruntime-web: {error}")


def open_page(context, address: str):
    """Open the page in a new tab and wait for the captioner; return it and its problems."""
    tab = context.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    tab.goto(address)
    state = "document.getElementById('state').textContent"
    wait_until(tab, f"/^ready|can't be/.test({state})", 60)
    assert tab.evaluate(state).startswith("ready"), tab.evaluate(state)
    return tab, problems
