"""Chromium for tests of pages."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium; skip the test where it is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("needs the browser Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def wait_until(tab, expression: str, seconds: float = 30) -> None:
    """As ``wait_for_function``, which the pages' Content-Security-Policy forbids."""
    give_up = time.monotonic() + seconds
    while not tab.evaluate(expression):
        assert time.monotonic() < give_up, expression
        time.sleep(0.02)
