"""Imports go one way, and a conversion needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each package may import of the project besides itself; the first that fits a module's name counts.
ALLOWED = {
    "moeconv.errors": set[str](),
    "moeconv.dtypes": {"moeconv.errors"},
    "moeconv.layout": {"moeconv.errors"},
    "moeconv.families": {"moeconv.errors"},
    "moeconv.io": {"moeconv.errors", "moeconv.dtypes", "moeconv.layout"},
    "moeconv": {"moeconv"},
    "runtime": {"moeconv", "runtime"},
    "cli": {"moeconv", "runtime", "cli"},
}


@cache
def modules() -> dict[str, ast.Module]:
    """Parse every module of the project."""
    files = [p for top in ("moeconv", "runtime", "cli") for p in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): _parse(p) for p in files}


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"), str(path))


def imported(nodes: list[ast.stmt] | ast.Module) -> set[str]:
    """Give the modules that statements import, however deep."""
    found: set[str] = set()
    for root in nodes if isinstance(nodes, list) else [nodes]:
        for node in ast.walk(root):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, "imports are absolute"
                assert node.module
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_imports_go_from_cli_to_runtime_to_moeconv() -> None:
    parsed = modules()
    assert {"cli.main", "runtime.engine", "moeconv.convert", "moeconv.io.manifest"} <= parsed.keys()
    wrong = []
    for module, tree in parsed.items():
        own = next(package for package in ALLOWED if inside(module, package))
        for target in imported(tree) & parsed.keys():
            bare = target in ("moeconv", "moeconv.io")  # the package of `from moeconv import x`: empty itself
            if not bare and not any(inside(target, allowed) for allowed in ALLOWED[own] | {own}):
                wrong.append(f"{module} imports {target}")
    assert wrong == []


@cache
def edges() -> dict[str, set[str]]:
    """What each module imports of the project, late and for type checkers alike; of a package and a module in it, the module."""
    parsed = modules()
    out = {}
    for module, tree in parsed.items():
        found = {target for target in imported(tree) & parsed.keys() if target != module}
        out[module] = {t for t in found if not any(other.startswith(t + ".") for other in found)}
    return out


def test_no_cycles() -> None:
    """No module reaches itself by what it imports, on its first run or later."""
    left = dict(edges())
    while left:
        leaves = [module for module, targets in left.items() if not targets & left.keys()]
        assert leaves, f"these modules import each other in a circle: {sorted(left)}"
        for module in leaves:
            del left[module]


# Inside a package: each room may import those named before it and itself; the rest of the package comes last.
ROOMS = {
    "moeconv": ("errors", "dtypes", "layout", "io", "families"),
    "runtime": (
        "errors",
        "flag",
        "host_memory",
        "kernels",
        "quantised",
        "parallel",
        "ops",
        "optim",
        "fp8",
        "moe",
        "data",
        "model",
        "checkpoint",
        "initial",
        "log",
        "job",
    ),
}


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_downwards(package: str) -> None:
    order = {room: place for place, room in enumerate(ROOMS[package])}

    def place(module: str) -> int:
        return order.get(module.split(".")[1] if "." in module else "", len(order))

    wrong = [
        f"{module} imports {target}"
        for module, targets in edges().items()
        for target in targets
        if inside(module, package) and inside(target, package) and place(target) > place(module)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    [
        "moeconv.convert",
        "moeconv.checkpoint",
        "moeconv.execute",
        "moeconv.checking",
        "moeconv.describe",
        "moeconv.api.conversions",
        "moeconv.api.looking",
        "moeconv.api.models",
        "moeconv.upcycling.expand",
    ],
)
def test_conversion_needs_no_torch(module: str) -> None:
    program = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'click') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_moeconv_never_imports_torch_but_to_run_models() -> None:
    users = {
        m for m, tree in modules().items() if inside(m, "moeconv") and any(inside(i, "torch") for i in imported(tree))
    }
    assert users <= {
        "moeconv.access",  # for type checkers
        "moeconv.as_torch",
        "moeconv.forward",
        "moeconv.lazy",  # for type checkers
        "moeconv.modules",
        "moeconv.upcycling.texts",
    }
