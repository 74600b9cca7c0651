"""Experiment files: read and checked, with changes from the command line."""

import dataclasses
import difflib
import inspect
import json
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from captioner.config import Config
from captioner.errors import ConfigError, UsageError

T = TypeVar("T")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read an experiment file and apply overrides such as ``training.epochs=3``.

    Raises:
        ConfigError: The file is missing or not TOML; a key is unknown (the nearest right one is
            named) or a value has the wrong type or is impossible.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(content, override)
    return parse(Config, content, str(path))


def attribute_docs(kind: type) -> dict[str, str]:
    """Return what a config's docstring says of each of its attributes."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2].splitlines():
        begun, colon, text = line.strip().partition(": ")
        if colon and line.startswith("    ") and not line.startswith("     "):
            name, found[begun] = begun, text
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found


def parse(kind: type[T], content: Mapping[str, Any], source: str) -> T:
    """Make a config dataclass of nested dicts, refusing unknown keys and wrong types.

    Raises:
        ConfigError: Names ``source``, the key, and what was expected.
    """
    _check_known_keys(kind, content, source, list(_keys(kind)))
    try:
        # JSON is the form in which pydantic is strict (no "3" for 3) and still reads lists.
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str), strict=True)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] == "missing" else f", found {first['input']!r}"
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise ConfigError(f"{source}: {key}: {message}{found}") from None


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key, each section's after it: ``data``, ``data.train_annotations``, …."""
    for name, part in typing.get_type_hints(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(part):
            yield from _keys(part, f"{prefix}{name}.")


def _check_known_keys(
    kind: Any, content: Any, source: str, every_key: list[str], prefix: str = ""
) -> None:
    if not dataclasses.is_dataclass(kind) or not isinstance(content, Mapping):
        return
    kinds = typing.get_type_hints(kind)
    for name, value in content.items():
        if name not in kinds:
            hint = _nearest(name, list(kinds), every_key, prefix)
            raise ConfigError(f"{source}: unknown key '{prefix}{name}'; {hint}")
        _check_known_keys(kinds[name], value, source, every_key, f"{prefix}{name}.")


def _nearest(name: str, siblings: list[str], every_key: list[str], prefix: str) -> str:
    """Name the same key of another section, else the nearest in this one, else all in it."""
    elsewhere = [key for key in every_key if key.rpartition(".")[2] == name]
    nearest = [prefix + key for key in difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)]
    if elsewhere or nearest:
        keys = "' or '".join(elsewhere or nearest)
        return f"did you mean '{keys}'?"
    return f"known are {', '.join(prefix + key for key in siblings)}"


def _apply(content: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in ``content``; the value is read as TOML, else as text."""
    key, equals, text = override.partition("=")
    *sections, name = key.strip().lstrip("-").split(".")
    if not equals or not sections:
        raise UsageError(f"override '{override}': 'section.key=value' was expected")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"override '{override}': '{section}' is no section")
    content[name] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    text = {"True": "true", "False": "false"}.get(text, text)
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return value["value"] if len(value) == 1 else text
