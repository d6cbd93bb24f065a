"""What every setting and flag must have: a name of its own, help, and somebody who reads it."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime.settings.fields import GROUPS, settings
from runtime.settings.idle import IDLE
from runtime.settings.megatron import FIXED, NO_EFFECT, REFUSED
from runtime.settings.options import Option, options
from runtime.settings.parser import make_parser
from runtime.settings.table import BEGIN, END, render

ROOT = Path(__file__).parents[3]


class Module(NamedTuple):
    """The nodes of a file that these tests look at, found in one walk."""

    annotated: list[tuple[str, set[str]]]
    """Variables and arguments, with the names in their annotation."""
    assigned: list[tuple[ast.expr, ast.expr]]
    read: list[ast.Attribute]
    classes: list[ast.ClassDef]


def _modules() -> list[Module]:
    return [
        _module(ast.parse(path.read_text(encoding="utf8")))
        for top in ("runtime", "cli")
        for path in sorted((ROOT / top).rglob("*.py"))
    ]


def _module(tree: ast.Module) -> Module:
    out = Module([], [], [], [])
    for node in ast.walk(tree):
        annotation = getattr(node, "annotation", None)
        if annotation is not None:
            target = node.arg if isinstance(node, ast.arg) else getattr(getattr(node, "target", None), "id", "")
            out.annotated.append((target, {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}))
        if isinstance(node, ast.Assign):
            out.assigned.extend(_pairs(node))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            out.read.append(node)
        elif isinstance(node, ast.ClassDef):
            out.classes.append(node)
    return out


def _names_of(owner: str, modules: list[Module]) -> set[str]:
    """The variables and attributes that hold a settings object: whatever is annotated with its class, or read of those."""
    held = {target for module in modules for target, names in module.annotated if owner in names}
    names = held | {f"_{target}" for target in held}
    for module in modules:  # config = self.run.train; a, b = x.optim, y
        for target, value in module.assigned:
            made = isinstance(value, ast.Call) and getattr(value.func, "id", "") == owner
            read = isinstance(value, ast.Attribute) and value.attr in names
            if isinstance(target, ast.Name) and (made or read):
                names.add(target.id)
    return names


def _pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=False))
    return [(target, value)]


def test_every_field_has_a_reader_outside_its_class() -> None:
    modules = _modules()
    unread = set()
    for group in GROUPS:
        owner, holders = group.owner.__name__, _names_of(group.owner.__name__, modules)
        own = [cls for module in modules for cls in module.classes if cls.name == owner]
        inside = {id(node) for cls in own for node in ast.walk(cls)}
        # Methods of the class are its public face: what they read is read by whoever calls them.
        read = {
            node.attr
            for module in modules
            for node in module.read
            if _holder(node.value) in holders and id(node) not in inside
        }
        for cls in own:
            for method in (m for m in cls.body if isinstance(m, ast.FunctionDef) and m.name in read):
                read |= {n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute)}
                ends = _computed_names(method)
                read |= {f.name for f in dataclasses.fields(group.owner) if f.name.endswith(ends)}
            for method in (m for m in cls.body if isinstance(m, ast.FunctionDef) and m.name == "__post_init__"):
                # A field that another is derived from in the class counts where that one is read.
                read |= _sources(method, read)
        unread |= {f"{owner}.{f.name}" for f in dataclasses.fields(group.owner) if f.name not in read}
    assert not unread, f"nobody reads {sorted(unread)}"


def _holder(base: ast.expr) -> str:
    return base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""


def _computed_names(method: ast.FunctionDef) -> tuple[str, ...]:
    """The ends of the names that `getattr(self, f"{...}_end")` reads."""
    calls = [n for n in ast.walk(method) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "getattr"]
    texts = [call.args[1].values[-1] for call in calls if isinstance(call.args[1], ast.JoinedStr)]
    return tuple(text.value for text in texts if isinstance(text, ast.Constant) and isinstance(text.value, str))


def _sources(method: ast.FunctionDef, read: set[str]) -> set[str]:
    """The fields that decide, in `__post_init__`, what a field that is read becomes."""
    out = set()
    for node in ast.walk(method):
        if isinstance(node, ast.If):
            sets = [n.args[1] for n in ast.walk(node) if isinstance(n, ast.Call) and len(n.args) == 3]
            if any(isinstance(name, ast.Constant) and name.value in read for name in sets):
                out |= {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
    return out


def test_every_flag_has_help() -> None:
    assert [s.name for s in settings() if not s.help] == []
    shown = [a for a in make_parser()._actions if a.help != "==SUPPRESS=="]
    assert len(shown) > 100
    assert [a.option_strings for a in shown if not a.help or not a.help.strip()] == []


def test_every_option_has_one_meaning_and_refusals_say_what_to_do() -> None:
    tables = [NO_EFFECT.keys(), FIXED.keys(), REFUSED.keys()]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert all(isinstance(option, Option) for option in options().values())
    for name, reason in REFUSED.items():
        assert len(reason) > 20, name
    assert all(row.reason for row in (*NO_EFFECT.values(), *FIXED.values()))


def test_what_may_be_idle_is_a_setting() -> None:
    known = {setting.key for setting in settings()}
    assert {(row.group, field) for row in IDLE for field in row.fields} <= known


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "trainer.md").read_text(encoding="utf8")
    found = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert found.strip() == render().strip(), "run `python -m runtime.settings.table docs/trainer.md`"


@pytest.mark.parametrize(
    ("flags", "status", "first"),
    [
        (["--help"], 0, "usage: torchrun [...] -m runtime.train [--load CHECKPOINT]"),
        (["--moe-aux-loss", "1"], 2, "error: unknown flag --moe-aux-loss; nearest: "),
        (["--recompute-modules", "nonsense"], 2, "error: --recompute-modules is 'nonsense'"),
    ],
)
def test_help_and_misspelt_flags_need_no_torch(flags: list[str], status: int, first: str) -> None:
    program = f"""
import sys
from runtime.train import main
try:
    status = main({flags!r})
except SystemExit as end:
    status = end.code
print("imported", [m for m in ("torch", "transformers", "numpy", "yaml") if m in sys.modules])
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert (done.stdout + done.stderr).lstrip().startswith(first) or done.stderr.startswith(first)
    assert done.stdout.splitlines()[-1] == "imported []"
    assert len(done.stderr.splitlines()) == (1 if status else 0)
