"""Runs docs/tutorial.md. `python -m tests.docs.tutorial` writes the outputs into the page; the test compares them with it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[0-9][0-9,.:]*(e[+-]?[0-9]+)?")
_COMMAND = re.compile(r"^\$ ((?:[^\n]*\\\n)*[^\n]+)\n", re.MULTILINE)


def run(text: str) -> str:
    """Run a page in the current folder.

    Args:
        text: the page.

    Returns:
        The page with what its commands and Python blocks print.
    """
    names: dict[str, object] = {}
    printed = ""

    def block(found: re.Match[str]) -> str:
        nonlocal printed
        kind, body = found[1], found[2]
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(body, str(PAGE), "exec"), names)
            printed = out.getvalue()
        elif kind == "text":
            body = printed
        else:
            body = "".join(f"$ {shown}\n{call(shown)}" for shown in _COMMAND.findall(body))
        return f"```{kind}\n{body}```"

    return _BLOCK.sub(block, text)


def call(shown: str) -> str:
    """Run a command as it is shown, in this process where it is a conversion, and give what it prints."""
    words = shlex.split(shown.replace("\\\n", " "))
    if words[0] == "moeconv" and words[1] != "train":
        from cli.main import main

        result = CliRunner().invoke(main, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{shown}: {result.output}"
        return _shown(result.stdout)
    modules = {"torchrun": ["torch.distributed.run", "--standalone"], "moeconv": ["cli"]}
    words[0:1] = [sys.executable, "-m", *modules[words[0]]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{shown}: {done.stdout}{done.stderr}"
    return _shown(done.stdout)


def _shown(printed: str) -> str:
    """Put a user's folder in place of this one, and leave out what depends on which process was first."""
    lines = printed.replace(str(Path.cwd()), "/home/you").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("waiting for another process"))


def masked(text: str) -> str:
    """Take out what differs from run to run and from machine to machine: measured numbers, rates, the time that is left."""
    text = re.sub(
        r"^(iteration [0-9/]+)(.*)$", lambda line: line[1] + _NUMBER.sub("#", line[2]), text, flags=re.MULTILINE
    )
    text = re.sub(r"[0-9.]+ [kMG]?B/s", "#", text)
    return re.sub(r"[0-9]+\.[0-9]+(?= s\b)|(?<=^loss )[0-9.]+", "#", text, flags=re.MULTILINE)


def write(make: Callable[[str], str] = run) -> None:
    """Bring the page up to date."""
    text = PAGE.read_text(encoding="utf8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        made = make(text)
    PAGE.write_text(made, encoding="utf8")


if __name__ == "__main__":
    write()
