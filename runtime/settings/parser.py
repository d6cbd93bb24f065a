"""The parser of the command line, which splits it into flags with their words, and the text of `--help`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from runtime.errors import ConfigError
from runtime.settings.architecture import FACTS
from runtime.settings.config_file import Event
from runtime.settings.fields import GROUPS, Setting, settings
from runtime.settings.megatron import FIXED, NO_EFFECT, REFUSED
from runtime.settings.options import options

PROGRAM = "torchrun [...] -m runtime.train"
_EXAMPLE = """\
example:
  torchrun --nproc-per-node 8 -m runtime.train --load ckpt --data text.jsonl --save run --train-iters 1000 \\
    --global-batch-size 128 --seq-length 4096 --expert-model-parallel-size 8 --use-distributed-optimizer \\
    --moe-aux-loss-coeff 1e-2 --lr 1e-5 --lr-warmup-iters 100 --lr-decay-style cosine

`moeconv train` takes the same flags and starts torchrun by itself. --no- before its name turns a switch off that a
--config file turns on. docs/trainer.md lists every flag, those of Megatron's that are refused included."""
_METAVAR = {int: "N", float: "X", Path: "PATH", str: "NAME"}


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise ConfigError(message.removeprefix("argument "))


class _Record(argparse.Action):
    """Keeps an option with its words, in the order of the command line."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Append an event."""
        words = [values] if isinstance(values, str) else list(values or [])
        namespace.events = [*getattr(namespace, "events", []), Event(str(option), words)]


def make_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Make the parser; what it parses are `events`, the flags in their order.

    Args:
        program: how `--help` names the program.
    """
    parser = _Parser(
        prog=program,
        usage=f"{program} [--load CHECKPOINT] --data PATH ... --save FOLDER --train-iters N [more flags]",
        description="Train a model on any number of ranks: from a checkpoint, or from drawn weights where there is none.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    config = "YAML file of settings under the flags' names, in groups or not; flags that are given beside it win"
    _add(parser, "--config", text=config, metavar="FILE")
    for group in GROUPS:
        section = parser.add_argument_group(group.title)
        for setting in (s for s in settings() if s.group == group.name):
            _add_setting(section, setting)
    section = parser.add_argument_group("architecture (a checkpoint must agree with it; a new model has it)")
    for fact in FACTS:
        _add(section, fact.flag, text=fact.help, metavar=_METAVAR.get(fact.kind))
    section = parser.add_argument_group("with one value only, or accepted without effect")
    for name, fixed in FIXED.items():
        _add(section, name, text=f"Only {' or '.join(fixed.allowed)}: {fixed.reason}", metavar="VALUE")
    for name, row in NO_EFFECT.items():
        _add(section, name, text=f"No effect: {row.reason}", metavar="VALUE")
    for name in REFUSED:
        _add(parser, name)
    return parser


def _add(to: Any, *names: str, text: str = argparse.SUPPRESS, metavar: str | None = None) -> None:
    nargs = options()[names[0]].nargs
    form = {} if nargs == 0 else {"metavar": metavar}
    to.add_argument(*names, action=_Record, nargs=nargs, dest="events", help=text.replace("%", "%%"), **form)


def _add_setting(section: Any, setting: Setting) -> None:
    on, off = setting.names, () if setting.off is None else (setting.off,)
    if setting.default is True:  # what people look for is how to turn it off
        on, off = (*on, *off), ()
    _add(section, *on, text=describe(setting), metavar=metavar_of(setting))
    for name in off:
        _add(section, name)
    for name, value in setting.mark.shorthands.items():
        _add(section, name, text=f"The same as {setting.name} {value}")


def metavar_of(setting: Setting) -> str | None:
    """Give the word that stands for a setting's value in `--help` and docs; None for a switch."""
    if setting.kind is bool:
        return None
    plain = "{" + ",".join(setting.choices) + "}" if setting.choices and not setting.many else _METAVAR[setting.kind]
    return setting.mark.metavar or plain


def describe(setting: Setting) -> str:
    """Give a setting's help with its choices, where its metavar doesn't name them, and its default."""
    shown = default_text(setting)
    some = f"; any of {', '.join(setting.choices)}" if setting.choices and setting.many else ""
    return setting.help + some + (f" (default: {shown})" if shown else "")


def default_text(setting: Setting) -> str:
    """Give a setting's default as it is typed; empty where it has none or its help says it."""
    value = setting.default
    if value is MISSING or value is None or value == () or value == "" or setting.kind is bool:
        return ""
    if isinstance(value, tuple):
        return ("," if "," in setting.mark.metavar else " ").join(word(part) for part in value)
    return word(value)


def word(value: Any) -> str:
    """Write one value as it is typed."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else f"{value:.0f}"
    return str(value)
