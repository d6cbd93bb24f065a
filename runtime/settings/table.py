"""Every flag and what becomes of it, as the table of docs/trainer.md: `python -m runtime.settings.table docs/trainer.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.settings.architecture import FACTS
from runtime.settings.fields import GROUPS, Setting, settings
from runtime.settings.megatron import FIXED, NO_EFFECT, REFUSED
from runtime.settings.parser import default_text, metavar_of

BEGIN, END = "<!-- flags: generated, see runtime/settings/table.py -->", "<!-- end of flags -->"


def render() -> str:
    """Give the tables of all flags in Markdown."""
    lines: list[str] = []
    for group in GROUPS:
        rows = [row for s in settings() if s.group == group.name for row in _setting_rows(s)]
        lines += _table(f"{_sentence(group.title)}", ("flag", "default", "what it does"), rows)
    rows = [(_code(fact.flag, _value(fact.kind)), fact.help) for fact in FACTS]
    lines += _table("Architecture: of a checkpoint or a new model", ("flag", "what it says of the model"), rows)
    rows = [(_code(name, "VALUE"), " or ".join(row.allowed), row.reason) for name, row in FIXED.items()]
    lines += _table("With one value only", ("flag", "value", "because"), rows)
    rows = [(_code(name, "VALUE" if row.values else ""), row.reason) for name, row in NO_EFFECT.items()]
    lines += _table("Accepted without effect; the log says so", ("flag", "because"), rows)
    rows = [(f"`{name}`", reason) for name, reason in REFUSED.items()]
    lines += _table("Refused", ("flag", "reason and remedy"), rows)
    return "\n".join(lines)


def _setting_rows(setting: Setting) -> Iterator[tuple[str, ...]]:
    names = (*setting.names, str(setting.off)) if setting.default is True else setting.names
    metavar = metavar_of(setting) or ""
    if setting.choices and not metavar.startswith("{"):
        metavar = "{" + ",".join(setting.choices) + "} ..."
    elif setting.many and "," not in metavar:
        metavar += " ..."
    flags = ", ".join(f"`{name}`" for name in names[:-1])
    yield (flags + ", " if flags else "") + _code(names[-1], metavar), default_text(setting), setting.help
    for name, value in setting.mark.shorthands.items():
        yield f"`{name}`", "", f"the same as `{setting.name} {value}`"


def _code(name: str, value: str) -> str:
    return f"`{name} {value}`" if value else f"`{name}`"


def _value(kind: type) -> str:
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "")


def _sentence(title: str) -> str:
    return title[0].upper() + title[1:]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"### {title}", "", *(f"| {' | '.join(row)} |" for row in cells), ""]


def main(arguments: Sequence[str]) -> int:
    """Print the tables, or put them between the marks of a file.

    Args:
        arguments: the file; none prints.

    Returns:
        0.
    """
    if not arguments:
        print(render())
        return 0
    path = Path(arguments[0])
    text = path.read_text(encoding="utf8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    path.write_text(f"{before}\n\n{render()}\n{after}", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
