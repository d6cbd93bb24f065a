"""The command line and the `--config` file: words are read by the tables of flags, and the result is what was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError
from runtime.settings.architecture import Fact
from runtime.settings.config_file import Event, read_config
from runtime.settings.fields import Setting
from runtime.settings.megatron import Fixed, NoEffect
from runtime.settings.options import nearest, options
from runtime.settings.parser import PROGRAM, make_parser


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a command line and its `--config` file say, each flag's value read and in itself valid."""

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    """(group, field) -> value, for the settings that were given."""
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    """(group, field) -> the flag that gave it."""
    stated: dict[str, Any] = field(default_factory=dict)
    """Flag -> value, for flags that state something of the model."""
    notes: tuple[str, ...] = ()
    """Lines for the log: the flags that were given and have no effect, with the reason."""

    def of(self, group: str) -> dict[str, Any]:
        """Give the fields of a group that were given."""
        return {name: value for (owner, name), value in self.values.items() if owner == group}


def parse_flags(arguments: Sequence[str], program: str = PROGRAM) -> Given:
    """Read a command line, and the `--config` file that it names.

    Args:
        arguments: the command line without the program's name; `--help` prints the help and ends the program.
        program: how `--help` names the program.

    Returns:
        What was given; flags win over the file.

    Raises:
        ConfigError: a flag is unknown, has a value that it can't have, contradicts another, or can't be honoured; names
            the flag and what fits.
    """
    known, unknown = make_parser(program).parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(_unknown(unknown[0]))
    events: list[Event] = getattr(known, "events", [])
    files = [Path(event.words[0]) for event in events if event.name == "--config"]
    if len(files) > 1:
        raise ConfigError("--config is given twice; one file holds a run's settings")
    flags = [event for event in events if event.name != "--config"]
    layers = (
        [read_config(files[0], {name: o.nargs for name, o in options().items() if name != "--config"})] if files else []
    )
    given = Given()
    notes: list[str] = []
    for layer in (*layers, flags):
        _read_layer(layer, given, notes)
    return Given(values=given.values, names=given.names, stated=given.stated, notes=tuple(dict.fromkeys(notes)))


def _unknown(word: str) -> str:
    name = word.split("=")[0]
    if not name.startswith("--"):
        return f"{word!r} belongs to no flag; flags begin with -- (all of them: --help)"
    near = nearest(name, options())
    return f"unknown flag {name}{f'; nearest: {near}' if near else ''} (all flags: --help)"


def _read_layer(events: Iterable[Event], given: Given, notes: list[str]) -> None:
    """Read the flags of a command line or file, over what was read before."""
    by: dict[tuple[str, str], str] = {}
    for event in events:
        option = options()[event.name]
        target = option.target
        if isinstance(target, str):
            raise ConfigError(f"{event.where}{event.name}: {target}")
        if isinstance(target, Setting):
            value = option.constant if option.nargs == 0 else _value(target, event)
            _set(target, value, event, by, given)
        elif isinstance(target, Fact):
            given.stated[event.name] = True if option.nargs == 0 else target.parse(event.words[0])
        elif isinstance(target, Fixed):
            _check_fixed(target, event)
        elif isinstance(target, NoEffect):
            notes.append(f"{event.name}: no effect ({target.reason})")


def _value(setting: Setting, event: Event) -> Any:
    values = [setting.parse(word, event.where + event.name) for word in event.words]
    if not setting.many:
        return values[0]
    return tuple(part for value in values for part in (value if isinstance(value, list) else [value]))


def _set(setting: Setting, value: Any, event: Event, by: Mapping[Any, str], given: Given) -> None:
    assert isinstance(by, dict)
    before = by.get(setting.key)
    if before is not None and before != event.name and given.values[setting.key] != value:
        short = [name in setting.mark.shorthands for name in (before, event.name)]
        if not (setting.mark.yields and any(short) and not all(short)):
            raise ConfigError(f"{event.where}{before} and {event.name} contradict each other: give one")
        if short[1]:
            return
    by[setting.key] = event.name
    given.values[setting.key], given.names[setting.key] = value, event.name


def _check_fixed(row: Fixed, event: Event) -> None:
    word = event.words[0]
    allowed = [_number(text) for text in row.allowed]
    if _number(word) not in allowed:
        raise ConfigError(f"{event.where}{event.name} is {word}; {row.reason}: give {' or '.join(row.allowed)}")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
