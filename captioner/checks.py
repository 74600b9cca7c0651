"""What settings must be: numbers within bounds, with errors that name section and field."""

import dataclasses
import math
import re
from typing import Any

from captioner.errors import ConfigError


def check_at_least(config: Any, **bounds: float) -> None:
    """Raise a ConfigError unless each of these fields is finite and at least its bound."""
    for name, bound in bounds.items():
        if not bound <= getattr(config, name) < math.inf:
            raise expected_error(config, name, f"at least {bound}")


def check_between(config: Any, **bounds: tuple[float, float]) -> None:
    """Raise a ConfigError unless each of these fields is a number from a bound to another."""
    for name, (least, most) in bounds.items():
        if not least <= getattr(config, name):
            raise expected_error(config, name, f"at least {least}")
        if not getattr(config, name) <= most:
            raise expected_error(config, name, f"at most {most}")


def check_positive(config: Any, *names: str) -> None:
    """Raise a ConfigError unless each of these fields is finite and above 0."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise expected_error(config, name, "a number above 0")


def check_share(config: Any, name: str) -> None:
    """Raise a ConfigError unless a field is at least 0 and below 1."""
    if not 0 <= getattr(config, name) < 1:
        raise expected_error(config, name, "at least 0 and below 1")


def default_of(config: Any, name: str) -> Any:
    """Return the default of a field."""
    return next(field.default for field in dataclasses.fields(config) if field.name == name)


def expected_error(config: Any, name: str, expected: str) -> ConfigError:
    """Return an error that says what was expected of a field, and what was found."""
    kind = type(config).__name__.removesuffix("Config")
    section = re.sub("(?<=[a-z])(?=[A-Z])", "_", kind).lower()
    return ConfigError(f"{section}.{name}: {expected} was expected, found {getattr(config, name)}")
