"""The reference's pages, made of the code: every command from click, every flag of the trainer, the Python library's names.

`python docs/_site/reference.py commands` (or trainer_flags, python) prints one.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import click


def commands() -> str:
    """Give the page of all commands: what each does, its arguments and its options with defaults."""
    from cli.main import ExitCode, main

    codes = ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode)
    lines = [
        "# Commands",
        "",
        "Made of the program itself. `moeconv COMMAND --help` says the same.",
        "",
        f"Exit codes: {codes}. `verify` and `diff` end with 3 where checkpoints differ.",
        "",
    ]
    context = click.Context(main, info_name="moeconv")
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        lines += _command(name, command, click.Context(command, info_name=name, parent=context))
    return "\n".join(lines)


def _command(name: str, command: click.Command, context: click.Context) -> Iterator[str]:
    yield from (f"## {name}", "")
    text = inspect.cleandoc(command.help or "").replace("\b\n", "")
    examples = re.findall(r"^Example: (.+)$", text, re.MULTILINE)
    body = re.sub(r"^Example: .+$\n*", "", text, flags=re.MULTILINE).strip()
    yield from (_escaped(body), "")
    arguments = " ".join(p.make_metavar(context) for p in command.get_params(context) if isinstance(p, click.Argument))
    if not context.help_option_names:  # its help is the trainer's, with this before it
        from cli.train import _HELP

        yield from ("```text", _HELP.strip(), "```", "")
        yield from ("FLAGS are the [trainer's flags](trainer-flags.md).", "")
        return
    yield from ("```text", f"moeconv {name} [OPTIONS] {arguments}".rstrip(), "```", "")
    for example in examples:
        yield from ("For example:", "", "```", example, "```", "")
    if command.context_settings.get("ignore_unknown_options"):
        yield from ("It takes the trainer's flags as well: [Trainer flags](trainer-flags.md).", "")
    rows = [row for p in command.get_params(context) if isinstance(p, click.Option) and (row := _option(p, context))]
    if rows:
        yield from ("| option | default | what it does |", "| --- | --- | --- |", *rows, "")


def _option(option: click.Option, context: click.Context) -> str | None:
    """Give an option's row of the table; None for `--help`, which all have."""
    if option.hidden or "--help" in option.opts:
        return None
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    number = isinstance(option.type, click.IntRange) and option.metavar is None
    kind = "" if option.is_flag else f" {_code('N' if number else option.make_metavar(context))}"
    shown = option.get_default(context, call=False)
    given = shown is not None and shown != () and not (option.is_flag and shown is False) and shown != ""
    if option.is_flag and option.secondary_opts:
        default = f"`{(option.opts if shown else option.secondary_opts)[0]}`"
    else:
        default = f"`{shown}`" if given and not callable(shown) and "Sentinel" not in repr(shown) else ""
    return f"| {names}{kind} | {default} | {_cell(option.help or '')} |"


def trainer_flags() -> str:
    """Give the page of all flags of the trainer, those of Megatron's included."""
    from runtime.settings.table import render

    return (
        "# Trainer flags\n\n"
        "Made of the settings themselves (`python -m runtime.settings.table`). `moeconv train`, "
        "`torchrun ... -m runtime.train`, `moeconv plan` and `--config` files take them; "
        "[The trainer](../trainer.md) explains them.\n\n" + re.sub(r"^### ", "## ", render(), flags=re.MULTILINE)
    )


def python() -> str:
    """Give the page of the library: its docstring, and its public names, which autodoc fills with theirs."""
    module = importlib.import_module("moeconv")
    lines = ["# Python library", "", inspect.cleandoc(module.__doc__ or ""), ""]
    for name in _names(module):
        found = getattr(module, name)
        kind = "autoexception" if _is_error(found) else "autoclass" if inspect.isclass(found) else "autofunction"
        if not inspect.isclass(found) and not callable(found):
            kind = "autodata"
        inherits = inspect.isclass(found) and any(base.__module__.startswith("moeconv.") for base in found.__bases__)
        more = ["   :inherited-members:"] if inherits and not _is_error(found) else []
        lines += [f"## {name}", "", "```{eval-rst}", f".. {kind}:: moeconv.{name}", *more, "```", ""]
    return "\n".join(lines)


def _is_error(found: object) -> bool:
    return inspect.isclass(found) and issubclass(found, BaseException)


def _names(module: ModuleType) -> list[str]:
    """Give the public names: functions first, then classes, each in their order."""
    names = [n for n in module.__all__ if not n.startswith("_") and not inspect.ismodule(getattr(module, n))]
    return sorted(names, key=lambda n: (inspect.isclass(getattr(module, n)), n))


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _escaped(text: str) -> str:
    """Keep globs and the like from being read as Markdown."""
    return re.sub(r"(?<!`)([*<_])(?!`)", r"\\\1", text)


if __name__ == "__main__":
    print(globals()[sys.argv[1]]())
