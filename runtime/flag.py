"""How a field of a settings class says its flag: the field is the one place of type, default, range, name and help.

A settings class is a frozen dataclass whose fields each have the string that explains them below. A field's flag is `--`
and its own name with dashes, unless `flag` says otherwise; everything else (parser, `--help`, `--config` keys, docs) is
read from the class by `runtime.settings.fields`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moeconv.errors import MoeconvError
from runtime.errors import ConfigError

MARK = "flag"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """What a field says of its flag beyond type, default and docstring."""

    names: tuple[str, ...] = ()
    """Its option strings, the one that messages use first; () derives one from the field's name."""
    off: str | None = None
    """The option that turns a field off whose default is true; None is `--no-` and the name."""
    shorthands: Mapping[str, object] = field(default_factory=dict)
    """Options without a value that stand for one of the field's values."""
    yields: bool = False
    """A shorthand is only a default: the flag itself may be given beside it."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    metavar: str = ""
    """How `--help` names the value."""


def flag(default: Any, *names: str, **marks: Any) -> Any:
    """Make a field of a settings class that says more of its flag than its name does.

    Args:
        default: the field's default.
        *names: option strings, the one that messages use first; none derives one from the field's name.
        **marks: the other fields of `Mark`.

    Returns:
        What `dataclasses.field` gives.
    """
    return field(default=default, metadata={MARK: Mark(names=names, **marks)})


def mark_of(item: dataclasses.Field[Any]) -> Mark:
    """Give what a field says of its flag; an empty mark where it says nothing."""
    mark: Mark = item.metadata.get(MARK) or Mark()
    return mark


@cache
def flag_name(owner: type, name: str) -> str:
    """Give the flag that a message uses for a field.

    Args:
        owner: the settings class.
        name: the field's name.
    """
    item = next(item for item in dataclasses.fields(owner) if item.name == name)
    names = mark_of(item).names
    return names[0] if names else f"--{name.replace('_', '-')}"


def check_fields(settings: Any, error: type[MoeconvError] = ConfigError) -> None:
    """Check every value of a settings object against the choices and ranges that its fields state.

    Args:
        settings: an instance of a settings class.
        error: what is raised.

    Raises:
        MoeconvError: a value is outside, as the given class; names the flag, the value and what fits.
    """
    owner: type = type(settings)
    for item in dataclasses.fields(settings):
        mark, value = mark_of(item), getattr(settings, item.name)
        allowed = choices_of(owner, item.name)
        for part in value if isinstance(value, tuple) else (value,):
            name = flag_name(owner, item.name)
            if allowed and part is not None and part not in allowed:
                raise error(f"{name} is {part!r}; expected one of {', '.join(map(str, allowed))}")
            number = isinstance(part, int | float) and not isinstance(part, bool)
            if number and not _in_range(mark, part):
                raise error(f"{name} is {part}; expected {describe_range(mark)}")


def _in_range(mark: Mark, number: float) -> bool:
    limits = (mark.at_least, mark.above, mark.at_most, mark.below)
    if all(limit is None for limit in limits):
        return True
    return math.isfinite(number) and (
        (mark.at_least is None or number >= mark.at_least)
        and (mark.above is None or number > mark.above)
        and (mark.at_most is None or number <= mark.at_most)
        and (mark.below is None or number < mark.below)
    )


def describe_range(mark: Mark) -> str:
    """Say in words which numbers fit, such as `at least 0 and less than 1`; empty where all do."""
    words = ("at least", "more than", "at most", "less than")
    limits = (mark.at_least, mark.above, mark.at_most, mark.below)
    return " and ".join(f"{word} {limit:g}" for word, limit in zip(words, limits, strict=True) if limit is not None)


@cache
def types_of(owner: type) -> dict[str, Any]:
    """Give the resolved types of a settings class's fields."""
    return get_type_hints(owner)


@cache
def choices_of(owner: type, name: str) -> tuple[Any, ...]:
    """Give the values that a field's Literal names, be it alone, optional or in a tuple; () where it has none."""

    def literals(kind: Any) -> tuple[Any, ...]:
        if get_origin(kind) is Literal:
            return get_args(kind)
        return tuple(value for part in get_args(kind) for value in literals(part))

    return literals(types_of(owner)[name])
