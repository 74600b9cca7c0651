"""One line of progress: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
LONG = 5.0  # seconds; shorter jobs leave no line without a terminal

T = TypeVar("T")


class Progress:
    """A progress bar with rate and time left, on standard error.

    Args:
        description: What is being done, such as ``"encoding"``.
        total: How many units there are, or None when that isn't known.
        unit: What is counted, in the singular, such as ``"image"``.
        initial: Units done before this process started (a resumed job).
        scale: Print large counts as k, M, G (bytes, say).
        delay: Seconds before the bar appears, for what is mostly over by then.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        initial: int = 0,
        scale: bool = False,
        delay: float = 0.0,
    ) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=description,
            unit=f" {unit}",
            initial=initial,
            unit_scale=scale,
            dynamic_ncols=True,
            disable=not self._terminal,
            file=sys.stderr,
            delay=delay,
        )
        self._meter: dict[str, Any] = {
            "total": total,
            "initial": initial,
            "prefix": description,
            "unit": f" {unit}",
            "unit_scale": scale,
            "ncols": 0,
        }
        self._done = initial
        self._started = self._printed = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more units done; ``note`` is shown at the end of the line."""
        self._done += count
        if note:
            self._meter["postfix"] = note
        if self._terminal:
            self._bar.set_postfix_str(self._meter.get("postfix", ""), refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def close(self) -> None:
        """Finish the line. A job of under 5 seconds leaves no line without a terminal."""
        if self._terminal:
            self._bar.close()
        elif time.monotonic() - self._started >= LONG:
            self._print_line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        log_line(
            tqdm.format_meter(n=self._done, elapsed=self._printed - self._started, **self._meter)
        )


def progress_iter(items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
    """Pass items on, with a progress bar should they take longer than a few seconds."""
    with Progress(description, total, unit, delay=LONG) as bar:
        for item in items:
            yield item
            bar.update()


def log_line(message: str) -> None:
    """Print a line for the person who watches, without disturbing a progress bar."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()
