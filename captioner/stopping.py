"""What ends a long job early: Ctrl-C and SIGTERM."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from captioner.errors import ProcessError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_WORDS = b"\nstopping after what is in flight, to keep it"
AT_ONCE = b"; a second signal stops at once"


class Stopped(KeyboardInterrupt):
    """A job was stopped by a signal.

    Attributes:
        signal: Which one.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class StopSignals:
    """In a ``with`` block, turns Ctrl-C and SIGTERM into an orderly end.

    The first signal raises ``Stopped``: wherever the program is, or, once ``deferred`` is
    set, where ``raise_if_received`` is called. A second one ends the process at once. Outside of
    the main thread nothing is changed, and a signal that is ignored stays so.

    Args:
        second_ends: Else those after the first are ignored: a process of torchrun hears both of
            what stops the whole job and of torchrun, which kills it should it take too long.

    Attributes:
        deferred: Whether the first signal waits for ``raise_if_received``.
        received: The signal that came; None before.
    """

    def __init__(self, second_ends: bool = True) -> None:
        self._second = signal.SIG_DFL if second_ends else signal.SIG_IGN
        self.deferred = False
        self.received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.received and isinstance(error, ProcessError):  # the others were stopped, too
            raise Stopped(self.received) from None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        for heard in self._previous:
            signal.signal(heard, self._second)
        self.received = number
        if not self.deferred:
            raise Stopped(number)
        words = LAST_WORDS + (AT_ONCE if self._second == signal.SIG_DFL else b"") + b"\n"
        os.write(2, words)  # print isn't safe here: it may have been interrupted itself

    def raise_if_received(self) -> None:
        """Raise ``Stopped`` if a signal has come."""
        if self.received:
            raise Stopped(self.received)
