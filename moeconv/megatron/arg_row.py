"""A row of the table of arguments: what a model says in one, and what a value of it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeconv.families.base import Model
from moeconv.megatron.args import RunArgs


@dataclass(frozen=True, slots=True)
class Row:
    """An argument: what a model says, what a value means, and whether Megatron needs its flag.

    Megatron does not read every argument back from a checkpoint; `flag` gives the words to call it with for a value, None
    where its default is right or the argument is read back. `also` is another name of the argument. Rows that are not
    `checked` are a run's own choice, or follow from the tensors' shapes.
    """

    arg: str
    say: Callable[[Model], Any]
    read: Callable[[RunArgs], Any]
    flag: Callable[[Any], str | None] = lambda value: None
    also: str | None = None
    checked: bool = True


def fixed(arg: str, value: Any, *others: Any) -> Row:
    """Make a row of an argument that one value alone is converted for; `others` mean the same."""

    def read(args: RunArgs) -> Any:
        found = args.values.get(arg)
        alike = any(found is same or (type(found) is type(same) and found == same) for same in (value, *others, None))
        return value if alike else found

    return Row(arg, lambda model: value, read)


def size_row(arg: str, name: str) -> Row:
    """Make a row of an argument that is a size of the model."""
    return Row(arg, lambda model: model.sizes[name], lambda args: args.whole(arg))


def flagged(name: str) -> Callable[[Any], str | None]:
    """Give the words for an argument that is true: its flag."""
    return lambda value: name if value else None


def given(name: str, default: Any = None) -> Callable[[Any], str | None]:
    """Give the words for an argument with a value that is not its default."""
    return lambda value: None if value in (default, None) else f"{name} {value}"


def listed(name: str) -> Callable[[Any], str | None]:
    """Give the words for an argument that is a list."""
    return lambda value: None if value is None else f"{name} '[{','.join(map(str, value))}]'"
