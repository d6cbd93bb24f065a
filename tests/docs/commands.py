"""The commands that the documentation shows, as the words that a shell would make of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("moeconv", "torchrun", "python", "pip", "make", "pytest", "mkdocs")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:moeconv|torchrun|python -m|pip install) [^`\n]+)`")


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    words: tuple[str, ...]
    refused: str = ""
    """The error that the page shows that it ends in."""

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """Every page that people read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[tuple[Command, ...]]:
    """Give the commands of each fenced block of a page."""
    text, name = page.read_text(encoding="utf8"), page.relative_to(ROOT).as_posix()
    for kind, block in _FENCE.findall(text):
        if kind not in ("", "console", "bash", "sh"):
            continue
        made: list[Command] = []
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = _split(line.removeprefix("$ ").strip())
            if words and words[0] in PROGRAMS:
                made.append(Command(name, words))
            elif line.startswith("error: ") and made:
                made[-1] = Command(name, made[-1].words, line.removeprefix("error: "))
        if made:
            yield tuple(made)


def inline(page: Path) -> Iterator[Command]:
    """Give the commands that stand in a page's lines of text, which may leave arguments out."""
    text, name = page.read_text(encoding="utf8"), page.relative_to(ROOT).as_posix()
    for line in _INLINE.findall(_FENCE.sub("", text)):
        if words := _split(line):
            yield Command(name, words)


def _split(line: str) -> tuple[str, ...]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe of prose
        return ()
    if "|" in words:  # what is piped into a program
        words = words[words.index("|") + 1 :]
    return tuple(words[: words.index(">")] if ">" in words else words)
