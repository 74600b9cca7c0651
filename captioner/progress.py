"""What a person reads while a command runs: lines, and a progress bar or a line now and then.

All text that comes from outside, such as file names, is escaped here: see ``printable``.
"""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

SECONDS_BETWEEN_LINES = 15.0
LONG = 5.0  # seconds; shorter jobs leave no line without a terminal

# Control characters, Unicode's Bidi_Control, line separators, and bytes that aren't UTF-8.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

T = TypeVar("T")

_hushed = False


def hush() -> None:
    """Have this process print what is urgent alone; another one prints what is the same in both."""
    global _hushed
    _hushed = True


class Progress:
    """A progress bar with rate and time left, on standard error.

    Args:
        description: What is being done, such as ``"encoding"``.
        total: How many units there are, or None when that isn't known.
        unit: What is counted, in the singular, such as ``"image"``.
        initial: Units done before this process started (a resumed job).
        scale: Print large counts as k, M, G (bytes, say).
        delay: Seconds before the bar appears, for what is mostly over by then.
        hidden: Show nothing.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        initial: int = 0,
        scale: bool = False,
        delay: float = 0.0,
        hidden: bool = False,
    ) -> None:
        self._hidden = hidden or _hushed
        self._terminal = sys.stderr is not None and sys.stderr.isatty() and not self._hidden
        description = printable(description)
        from tqdm import tqdm  # not at the top: captioner.runtime does without

        self._format_meter = tqdm.format_meter
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
            self._meter["postfix"] = printable(note)
        if self._terminal:
            self._bar.set_postfix_str(self._meter.get("postfix", ""), refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def set_total(self, total: int) -> None:
        """Tell how many units there are, once it is known."""
        self._meter["total"] = self._bar.total = total

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
        if self._hidden:
            return
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        log_line(self._format_meter(n=self._done, elapsed=elapsed, **self._meter))


def progress_iter(items: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
    """Pass items on, with a progress bar should they take longer than a few seconds."""
    with Progress(description, total, unit, delay=LONG) as bar:
        for item in items:
            yield item
            bar.update()


def log_line(message: str, urgent: bool = False) -> None:
    """Print a line for the person who watches, without disturbing a progress bar.

    Args:
        message: The line.
        urgent: Print it even where the process was told to ``hush``.
    """
    if sys.stderr is not None and (urgent or not _hushed):  # a service may have no stderr
        if bars := sys.modules.get("tqdm"):
            bars.tqdm.write(printable(message), file=sys.stderr)
        else:
            print(printable(message), file=sys.stderr)
        sys.stderr.flush()


def print_line(*fields: object) -> None:
    """Print a line of a command's results on standard output: its fields, parted by tabs."""
    print("\t".join(map(printable, fields)))


def printable(text: object) -> str:
    r"""Return a text as a terminal can show it: on one line, and none of it a command.

    File names and captions may hold line breaks, escape sequences and characters that turn the
    direction of writing, and so forge what is shown. These, and the bytes of a name that isn't
    UTF-8, become ``\n``, ``\x1b``, ``\u202e`` or ``\udce9``; all other text stays as it is.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
