"""From the fields of the settings classes to flags: names, types, defaults, choices and help are read, never repeated."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from runtime.checkpoint.config import CheckpointConfig
from runtime.data.config import DataConfig
from runtime.errors import ConfigError
from runtime.flag import Mark, choices_of, describe_range, mark_of, types_of
from runtime.fp8.config import Fp8Config
from runtime.generate.config import GenerateConfig
from runtime.initial.config import InitConfig
from runtime.log.config import LogConfig
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.optim.schedule import ScheduleConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.steps import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A settings class whose fields are flags."""

    name: str
    """Of the group in `--config` files."""
    title: str
    """Of the group in `--help`."""
    owner: type
    given: frozenset[str] = frozenset()
    """Fields that the program fills in: from the checkpoint, or from another class."""


GROUPS = (
    Group(name="checkpoint", title="checkpoints", owner=CheckpointConfig),
    Group(name="init", title="a new model, whose weights are drawn", owner=InitConfig),
    Group(name="data", title="data", owner=DataConfig, given=frozenset({"seq_length", "seed", "vocab_size"})),
    Group(name="train", title="steps and evaluation", owner=TrainConfig),
    Group(name="optim", title="optimizer", owner=OptimConfig),
    Group(name="lora", title="adapters (LoRA)", owner=LoraConfig),
    Group(name="learning_rate", title="learning rate", owner=ScheduleConfig),
    Group(name="parallel", title="parallelism (data parallel is what the world size leaves)", owner=ParallelConfig),
    Group(
        name="moe",
        title="mixture of experts",
        owner=MoEConfig,
        given=frozenset({"router", "expert_bias_centered"}),
    ),
    Group(name="fp8", title="FP8", owner=Fp8Config),
    Group(name="recompute", title="recomputation of activations", owner=RecomputeConfig),
    Group(name="log", title="logs", owner=LogConfig),
    Group(
        name="generate",
        title="text instead of training (moeconv generate)",
        owner=GenerateConfig,
        given=frozenset({"chat_template"}),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A field of a settings class as a flag."""

    group: str
    field: str
    names: tuple[str, ...]
    """Option strings that take a value, or turn a switch on; the first is the one that messages use."""
    off: str | None
    """For a switch: the option that turns it off."""
    mark: Mark
    kind: Any
    """bool, int, float, str or Path: what one word of the value is."""
    many: bool
    """Whether the value is a tuple."""
    choices: tuple[Any, ...]
    default: Any
    """MISSING where it must be given."""
    help: str

    @property
    def key(self) -> tuple[str, str]:
        """Where the value goes: group and field."""
        return self.group, self.field

    @property
    def name(self) -> str:
        """The flag that messages, files and docs use."""
        return self.names[0] if self.names else str(self.off)

    def parse(self, text: str, name: str = "") -> Any:
        """Read the words of a value.

        Args:
            text: one word of a value.
            name: the flag as it was given, for messages.

        Returns:
            One value, or for numbers of a tuple the list that commas separate.

        Raises:
            ConfigError: the word is no such value; names the flag and what fits.
        """
        name = name or self.name
        if self.choices and text not in self.choices:
            raise ConfigError(f"{name} is {text!r}; expected one of {', '.join(self.choices)}")
        if self.kind not in (int, float):
            return self.kind(text)
        try:
            words = text.split(",") if self.many else [text]
            values = [self.kind(word) for word in words]
        except ValueError:
            what = ("whole numbers" if self.kind is int else "numbers") if self.many else _ONE[self.kind]
            limits = describe_range(self.mark)
            raise ConfigError(f"{name} is {text!r}; expected {what}{' of ' + limits if limits else ''}") from None
        return values if self.many else values[0]


_ONE = {int: "a whole number", float: "a number"}


@cache
def settings() -> tuple[Setting, ...]:
    """Give every flag that a settings class has, in the order of the groups and fields."""
    return tuple(setting for group in GROUPS for setting in _settings_of(group))


def _settings_of(group: Group) -> Iterator[Setting]:
    texts = field_docs(group.owner)
    for item in dataclasses.fields(group.owner):
        if item.name in group.given:
            continue
        kind, many = _word(types_of(group.owner)[item.name])
        mark = mark_of(item)
        plain = f"--{item.name.replace('_', '-')}"
        switch_off = kind is bool and item.default is True
        names = mark.names or (() if switch_off else (plain,))
        off = (mark.off or names[0].replace("--", "--no-", 1) if names else mark.off) if kind is bool else None
        if switch_off and off is None:
            off = plain.replace("--", "--no-", 1)
        yield Setting(
            group=group.name,
            field=item.name,
            names=names,
            off=off,
            mark=mark,
            kind=kind,
            many=many,
            choices=choices_of(group.owner, item.name),
            default=item.default if item.default_factory is MISSING else item.default_factory(),
            help=texts.get(item.name, ""),
        )


def _word(kind: Any) -> tuple[Any, bool]:
    """From a field's type to that of one word of its flag, and whether there are many."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        rest = [part for part in parts if part is not type(None)]
        if len(rest) == 1:
            return _word(rest[0])
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        word, many = _word(parts[0])
        if not many:
            return word, True
    if origin is Literal:
        return str, False
    if kind in (bool, int, float, str, Path):
        return kind, False
    raise TypeError(f"a flag of type {kind} can't be read from a command line")


@cache
def field_docs(owner: type) -> dict[str, str]:
    """Read the string below each field of a class.

    Args:
        owner: the class.

    Returns:
        Field -> its text on one line, without the full stop at its end.
    """
    source = Path(inspect.getfile(owner)).read_text(encoding="utf8")
    body = next(n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == owner.__name__)
    docs = {}
    for item, text in pairwise(body):
        explains = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and explains:
            docs[item.target.id] = " ".join(str(text.value.value).split()).removesuffix(".")  # type: ignore[attr-defined]
    return docs
