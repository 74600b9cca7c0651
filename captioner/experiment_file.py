"""Experiment files: read and checked, with changes from the command line."""

import copy
import dataclasses
import difflib
import functools
import inspect
import json
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from captioner.config import Config
from captioner.errors import ConfigError, UsageError, did_you_mean
from captioner.files import read_text
from captioner.progress import log_line

T = TypeVar("T")

# To make one takes longer than all that it does.
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)

SECTIONS = tuple(field.name for field in dataclasses.fields(Config))
RESERVED = {"best", "last"}  # what a stage can't be called: folders of these names are checkpoints
STAGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
INIT_FROM = "training.init_from"  # the setting that ties a stage to the one before it


@dataclass(frozen=True)
class Stage:
    """One of the training runs that an experiment file asks for.

    Attributes:
        name: A word, its folder below that of the experiment; "" for the one run of a file without
            ``[[stages]]``.
        config: The settings that all stages share, with its own.
        follows: Whether it begins with the best checkpoint of the stage before it.
        source: The file and the stage, for messages.
    """

    name: str
    config: Config
    follows: bool
    source: str


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read an experiment file without stages and apply overrides such as ``training.epochs=3``.

    Raises:
        ConfigError, UsageError: See ``load_stages``; or the file has stages.
    """
    stages = load_stages(path, overrides)
    if stages[0].name:
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(f"{path}: a file without [[stages]] was expected, found {names}")
    return stages[0].config


def load_stages(
    path: str | Path, overrides: Iterable[str] = (), only: Collection[str] = ()
) -> list[Stage]:
    """Read an experiment file and apply overrides; return all of its stages, checked.

    The settings outside ``[[stages]]`` are shared by all stages, but for ``training.init_from``,
    which is that of the first; what a stage sets itself wins. An override changes a shared setting
    (``training.epochs=3``) or, with the stage's name before it, the setting of one stage
    (``fine_tune.training.epochs=3``). A line is printed where one has no effect.

    Args:
        path: The file.
        overrides: The changes, the last of which wins.
        only: Names of the stages that are to run; none: all.

    Raises:
        ConfigError: The file is missing or not TOML; a stage's name is no word or comes twice; a
            key is unknown (the nearest right one is named) or a value has the wrong type or is
            impossible. It names the file and the stage or the overrides, whichever is at fault.
        UsageError: An override isn't of the form ``section.key=value``; or no stage is called so.
    """
    try:
        shared = tomllib.loads(read_text(path, ConfigError))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    own = _split_off_stages(shared, str(path))
    _check_stages_to_run(only, list(own), str(path))
    changes = [_parse_override(text, list(own)) for text in overrides]
    changed_shared, changed_own = copy.deepcopy(shared), copy.deepcopy(own)
    for change in changes:
        _set(changed_own[change.stage] if change.stage else changed_shared, change)
    stages: list[Stage] = []
    for name in own:
        first = not stages
        source = f"{path}: stage '{name}'" if name else str(path)
        try:
            config = _make(Config, _merge(changed_shared, changed_own[name], first))
        except ConfigError as error:
            in_file = {str(path): shared, source: _merge(shared, own[name], first)}
            applied = [change for change in changes if change.stage in ("", name)]
            raise ConfigError(f"{_source_of(str(error), in_file, applied)}: {error}") from None
        follows = not first and not _has(changed_own[name], INIT_FROM)
        stages.append(Stage(name, config, follows, source))
    _tell_overrides_without_effect(changes, changed_own, only or list(own))
    return stages


def _split_off_stages(content: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """Take ``stages`` out of a file's content; return each one's own settings by its name.

    A file without stages has one that is called "".
    """
    if "stages" not in content:
        return {"": {}}
    tables = content.pop("stages")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"{path}: stages: a table [[stages]] for each stage was expected")
    own: dict[str, dict[str, Any]] = {}
    for number, table in enumerate(tables, 1):
        if "name" not in table:
            raise ConfigError(f"{path}: stages: the name of stage {number} is missing")
        name = table.pop("name")
        if not isinstance(name, str) or not STAGE_NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: stages: a name of letters, digits, _ and -, a letter first and 64 at "
                f"most, was expected of stage {number}, found {name!r}"
            )
        if name.lower() in RESERVED:
            raise ConfigError(f"{path}: stages: '{name}' has another meaning; rename this stage")
        # On many systems, folders whose names differ in case alone are the same.
        if name.lower() in (other.lower() for other in own):
            raise ConfigError(f"{path}: stages: two are called '{name}'")
        own[name] = table
    return own


def _check_stages_to_run(only: Collection[str], names: list[str], path: str) -> None:
    for name in only:
        if names == [""]:
            raise UsageError(f"--stages {name}: {path} has no [[stages]]")
        if name not in names:
            hint = did_you_mean(name, names) or f"; there are {', '.join(names)}"
            raise UsageError(f"--stages: {path} has no stage '{name}'{hint}")


def _merge(shared: Mapping[str, Any], own: Mapping[str, Any], first: bool) -> dict[str, Any]:
    """Return a stage's settings: the shared ones, and its own in place of them."""
    merged = copy.deepcopy(dict(shared))
    section, _, name = INIT_FROM.partition(".")
    if not first and isinstance(merged.get(section), dict):
        merged[section].pop(name, None)  # this is where the first stage begins
    for section, settings in own.items():
        if isinstance(settings, dict) and isinstance(merged.get(section), dict):
            merged[section] |= settings
        else:
            merged[section] = settings
    return merged


def _has(content: Mapping[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    return name in content.get(section, {})


def _tell_overrides_without_effect(
    overrides: Iterable["_Override"], own: Mapping[str, Any], running: Collection[str]
) -> None:
    for override in overrides:
        if override.stage and override.stage not in running:
            log_line(
                f"warning: override {override.text} has no effect: --stages leaves "
                f"'{override.stage}' out"
            )
        elif not override.stage:
            unchanged = [name for name in own if name in running and _has(own[name], override.key)]
            if unchanged:
                log_line(
                    f"warning: override {override.text} has no effect on {', '.join(unchanged)}: "
                    f"it is set there too; {unchanged[0]}.{override.text} changes that"
                )


def _source_of(
    message: str, in_file: Mapping[str, Mapping[str, Any]], overrides: Iterable["_Override"]
) -> str:
    """Return what is to blame for an error: the file, its stage, or overrides.

    Args:
        message: The error.
        in_file: Settings without overrides by what is to blame if they give the same error.
        overrides: Those that were applied.
    """
    for source, content in in_file.items():
        try:
            _make(Config, content)
        except ConfigError as error_of_file:
            if str(error_of_file) == message:
                return source
    last = {override.key: override.text for override in overrides}
    named = [text for key, text in last.items() if key in message]
    return f"override {' '.join(map(shlex.quote, named or last.values()))}"


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
        made: T = _adapter(kind).validate_json(json.dumps(content, default=str), strict=True)
        return made
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


@dataclass(frozen=True)
class _Override:
    """A change from the command line.

    Attributes:
        text: As it was given.
        stage: Whose setting it is; "" for one that the stages share.
        key: Which one: ``section.name``.
        value: What it is set to.
    """

    text: str
    stage: str
    key: str
    value: Any


def _parse_override(text: str, stages: list[str]) -> _Override:
    """Read ``section.key=value`` or ``stage.section.key=value``."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if key.startswith("-") and key.strip("-"):
        undashed = f"{key.lstrip('-')}={value or 'VALUE'}"
        raise UsageError(f"override '{text}': it is written without dashes: {undashed}")
    first, _, rest = key.partition(".")
    has_section = rest.partition(".")[0] in SECTIONS
    # A stage may have a section's name: ``search.beam_size``, ``search.training.epochs``.
    stage = first if first in stages and (has_section or first not in SECTIONS) else ""
    if has_section and not stage and first not in SECTIONS:
        known = did_you_mean(first, stages) or "".join(f"; there is '{name}'" for name in stages)
        raise UsageError(f"override '{text}': no stage is called '{first}'{known}")
    key = rest if stage else key
    if not equals or "." not in key:
        hint = _with_section(key.rpartition(".")[2], value, f"{stage}." if stage else "")
        raise UsageError(f"override '{text}': 'section.key=value' was expected{hint}")
    return _Override(text, stage, key, _value(_type_of(key), value))


def _set(content: dict[str, Any], override: _Override) -> None:
    """Change a setting in ``content``."""
    *sections, name = override.key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"override '{override.text}': '{section}' is no section")
    content[name] = override.value


def _with_section(name: str, text: str, stage: str) -> str:
    """Return a hint at the setting that is meant by a name without its section."""
    keys = [key for key in _keys(Config) if "." in key]
    names = [key.rpartition(".")[2] for key in keys]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    meant = [f"{stage}{key}={text or 'VALUE'}" for key in keys if key.rpartition(".")[2] in nearest]
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
