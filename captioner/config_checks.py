"""Checks of single settings, shared by the sections of a config."""

import dataclasses
import math
from typing import Any

from captioner.errors import ConfigError


def check_at_least(config: Any, **bounds: float) -> None:
    """Raise a ConfigError unless each of these fields is a finite number from its bound on."""
    for name, bound in bounds.items():
        if not bound <= getattr(config, name) < math.inf:
            raise expected(config, name, f"at least {bound}")


def check_between(config: Any, **bounds: tuple[float, float]) -> None:
    """Raise a ConfigError unless each of these fields is a number from a bound to another."""
    for name, (least, most) in bounds.items():
        if not least <= getattr(config, name):
            raise expected(config, name, f"at least {least}")
        if not getattr(config, name) <= most:
            raise expected(config, name, f"at most {most}")


def check_positive(config: Any, *names: str) -> None:
    """Raise a ConfigError unless each of these fields is a finite number above 0."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise expected(config, name, "a number above 0")


def check_share(config: Any, name: str) -> None:
    """Raise a ConfigError unless a field is at least 0 and below 1."""
    if not 0 <= getattr(config, name) < 1:
        raise expected(config, name, "at least 0 and below 1")


def default_of(config: Any, name: str) -> Any:
    """Return the default of a field."""
    return next(each.default for each in dataclasses.fields(config) if each.name == name)


def expected(config: Any, name: str, what: str) -> ConfigError:
    """Return an error that names a field, what was expected of it and what was found."""
    section = type(config).__name__.removesuffix("Config").lower()
    return ConfigError(f"{section}.{name}: {what} was expected, found {getattr(config, name)}")
