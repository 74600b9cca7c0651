"""Experiment files: read and checked, with changes from the command line."""

import copy
import dataclasses
import difflib
import inspect
import json
import shlex
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from captioner.config import Config
from captioner.errors import ConfigError, UsageError
from captioner.files import read_text

T = TypeVar("T")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read an experiment file and apply overrides such as ``training.epochs=3``.

    Raises:
        ConfigError: The file is missing or not TOML; a key is unknown (the nearest right one is
            named) or a value has the wrong type or is impossible. It names the file or the
            overrides, whichever is at fault.
        UsageError: An override isn't of the form ``section.key=value``.
    """
    try:
        content = tomllib.loads(read_text(path, ConfigError))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    changed, override_by_key = copy.deepcopy(content), {}
    for override in overrides:
        override_by_key[_apply(changed, override)] = override
    try:
        return _make(Config, changed)
    except ConfigError as error:
        source = _source_of(str(error), str(path), content, override_by_key)
        raise ConfigError(f"{source}: {error}") from None


def _source_of(
    message: str, path: str, content: Mapping[str, Any], override_by_key: Mapping[str, str]
) -> str:
    """Return what is to blame for an error: the experiment file, or overrides."""
    try:
        _make(Config, content)
    except ConfigError as error_of_file:
        if str(error_of_file) == message:
            return path
    named = [override for key, override in override_by_key.items() if key in message]
    return f"override {' '.join(map(shlex.quote, named or override_by_key.values()))}"


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
    try:
        return _make(kind, content)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _make(kind: type[T], content: Mapping[str, Any]) -> T:
    _check_known_keys(kind, content, list(_keys(kind)))
    try:
        # JSON is the form in which pydantic is strict (no "3" for 3) and still reads lists.
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] == "missing" else f", found {first['input']!r}"
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise ConfigError(f"{key}: {message}{found}") from None


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key, each section's after it: ``data``, ``data.train_annotations``, …."""
    for name, part in typing.get_type_hints(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(part):
            yield from _keys(part, f"{prefix}{name}.")


def _check_known_keys(kind: Any, content: Any, every_key: list[str], prefix: str = "") -> None:
    if not dataclasses.is_dataclass(kind) or not isinstance(content, Mapping):
        return
    kinds = typing.get_type_hints(kind)
    for name, value in content.items():
        if name not in kinds:
            hint = _nearest(name, list(kinds), every_key, prefix)
            raise ConfigError(f"unknown key '{prefix}{name}'; {hint}")
        _check_known_keys(kinds[name], value, every_key, f"{prefix}{name}.")


def _nearest(name: str, siblings: list[str], every_key: list[str], prefix: str) -> str:
    """Name the same key of another section, else the nearest in this one, else all in it."""
    elsewhere = [key for key in every_key if key.rpartition(".")[2] == name]
    nearest = [prefix + key for key in difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)]
    if elsewhere or nearest:
        keys = "' or '".join(elsewhere or nearest)
        return f"did you mean '{keys}'?"
    return f"known are {', '.join(prefix + key for key in siblings)}"


def _apply(content: dict[str, Any], override: str) -> str:
    """Set one ``section.key=value`` in ``content``; return its key."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if key.startswith("-") and key.strip("-"):
        undashed = f"{key.lstrip('-')}={text or 'VALUE'}"
        raise UsageError(f"override '{override}': it is written without dashes: {undashed}")
    *sections, name = key.split(".")
    if not equals or not sections:
        raise UsageError(
            f"override '{override}': 'section.key=value' was expected{_with_section(name, text)}"
        )
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"override '{override}': '{section}' is no section")
    content[name] = _value(_type_of(key), text)
    return key


def _with_section(name: str, text: str) -> str:
    """Return a hint at the setting that is meant by a name without its section."""
    keys = [key for key in _keys(Config) if "." in key]
    names = [key.rpartition(".")[2] for key in keys]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    meant = [f"{key}={text or 'VALUE'}" for key in keys if key.rpartition(".")[2] in nearest]
    return "; did you mean '" + "' or '".join(meant) + "'?" if meant else ""


def _type_of(key: str) -> Any:
    """Return the type of the setting ``section.key``; None if there is no such setting."""
    kind: Any = Config
    for part in key.split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def _value(kind: Any, text: str) -> Any:
    """Read an override's value as TOML, else as text; a list may be written ``a,b`` too."""
    value = _toml_value(text)
    if typing.get_origin(kind) is not tuple or isinstance(value, list):
        return value
    if isinstance(value, str) and value != text:  # in quotes: one element
        return [value]
    words = [word.strip() for word in text.split(",") if word.strip()]
    values = [_toml_value(word) for word in words]
    if typing.get_args(kind)[0] is str:
        return [v if isinstance(v, str) else word for v, word in zip(values, words, strict=True)]
    return values


def _toml_value(text: str) -> Any:
    text = {"True": "true", "False": "false"}.get(text, text)
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return value["value"] if len(value) == 1 else text
