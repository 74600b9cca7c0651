"""Errors that a user can act on.

    CaptionerError
    ├── UsageError        a wrong command line (exit code 2)
    ├── ConfigError       a wrong experiment file or override
    ├── DataError         annotations, captions, result files
    ├── ImageError        one image file that can't be read
    ├── WeightsError      CNN weights that can't be found, fetched or loaded
    ├── CheckpointError   a checkpoint that can't be read or doesn't fit
    ├── CacheError        a feature cache that can't be used
    ├── TrainingError     training that can't go on, such as a non-finite loss
    ├── ProcessError      another process of the same run has ended; "" if it says why itself
    ├── RequestError      what a client asked of the service that it can't have; with an HTTP status
    └── SearchError       a model that gives no probabilities to search among

The command line prints the message of a ``CaptionerError`` as one line and exits with its
``exit_code``. Anything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class CaptionerError(Exception):
    """Base of all errors that name what is wrong and what to do about it."""

    exit_code = 1


class UsageError(CaptionerError):
    """The command line is wrong."""

    exit_code = 2


class ConfigError(CaptionerError):
    """An experiment file or an override is wrong."""


class DataError(CaptionerError):
    """Annotations, captions or results are missing, malformed or inconsistent."""


class ImageError(CaptionerError):
    """An image file can't be read."""


class WeightsError(CaptionerError):
    """CNN weights can't be found, downloaded or loaded."""


class CheckpointError(CaptionerError):
    """A checkpoint can't be read, or it doesn't fit."""


class CacheError(CaptionerError):
    """A feature cache can't be used."""


class TrainingError(CaptionerError):
    """Training can't go on."""


class ProcessError(CaptionerError):
    """Another process of the same run has ended."""


class RequestError(CaptionerError):
    """A client's request is refused.

    Attributes:
        status: Of the answer, in HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)

    def __reduce__(self) -> tuple[type["RequestError"], tuple[int, str]]:
        """Tell how it is sent to another process."""
        return type(self), (self.status, str(self))


class SearchError(CaptionerError):
    """Captions can't be searched for."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or ``""``."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def name_some(values: Iterable[object], at_most: int = 5, count: int = 0) -> str:
    """Return the first few values for a message: ``"3, 7, 9 and 12 more"``.

    Args:
        values: All of them, or the first few.
        at_most: How many are named.
        count: How many there are, where just the first few are given.
    """
    items = [str(value) for value in values]
    left = max(count, len(items)) - len(items[:at_most])
    shown = ", ".join(items[:at_most])
    return f"{shown} and {left} more" if left else shown
