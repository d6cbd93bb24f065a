"""`--config`: a run's settings in a YAML file, under the flags' names, alone or in nested groups."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Event:
    """A flag with the words that follow it, from a command line or a file."""

    name: str
    words: list[str]
    where: str = ""
    """The file, for messages: its path and a colon."""


def read_config(path: Path, known: Mapping[str, str | int | None]) -> list[Event]:
    """Read a `--config` file as the flags that it stands for.

    Args:
        path: a YAML file: a mapping of flags' names, without the dashes before them, to values; true and false turn a
            switch on and off, null leaves a setting at its default; a mapping under any name is a group of them.
        known: option string -> how many words follow it, as argparse says it.

    Returns:
        The flags, in the order of the file.

    Raises:
        ConfigError: the file can't be read or is no such mapping, or a name is unknown or has no fitting value.
    """
    import yaml

    try:
        table = yaml.load(path.read_text(encoding="utf8"), Loader=_loader(yaml))
    except OSError as error:
        raise ConfigError(f"--config {path}: can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: no YAML: {' '.join(str(error).split())}") from None
    if table is None:
        return []
    if not isinstance(table, dict):
        raise ConfigError(f"--config {path}: expected a mapping of names to values, got {type(table).__name__}")
    return list(_events(table, path, known, ()))


def _loader(yaml: Any) -> Any:
    """A safe loader that leaves numbers as they are written, and refuses a name that is there twice."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = [str(key.value) for key, _ in node.value]
            twice = next((name for name in seen if seen.count(name) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(problem=f"{twice} is given twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in numbers]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def _events(
    table: Mapping[Any, Any], path: Path, known: Mapping[str, str | int | None], groups: tuple[str, ...]
) -> Iterator[Event]:
    for key, value in table.items():
        name = f"--{str(key).removeprefix('--').replace('_', '-')}"
        # Megatron has flags with an underscore in them.
        name = next((flag for flag in known if flag.replace("_", "-") == name), name)
        if isinstance(value, dict):
            yield from _events(value, path, known, (*groups, str(key)))
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
            hint = f"; nearest: {', '.join(flag[2:] for flag in near)}" if near else ""
            raise ConfigError(f"--config {path}: unknown setting {'.'.join((*groups, str(key)))}{hint}")
        event = _event(name, value, path, known)
        if event is not None:
            yield event


def _event(name: str, value: Any, path: Path, known: Mapping[str, str | int | None]) -> Event | None:
    where, nargs, off = f"--config {path}: ", known[name], f"--no-{name[2:]}"
    if value is None:
        return None
    if nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}{name[2:]} is {value!r}; expected true or false")
        return Event(name, [], where) if value else Event(off, [], where) if off in known else None
    if nargs == "*":  # refused whatever it says, but for `false`
        return None if value is False else Event(name, [], where)
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{where}{name[2:]} is {value!r}; expected a value or a list of values")
    if not words or (nargs is None and len(words) != 1):
        raise ConfigError(f"{where}{name[2:]} has {len(words)} values; expected {'one' if nargs is None else 'some'}")
    return Event(name, list(words), where)
