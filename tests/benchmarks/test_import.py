"""Every benchmark can be imported where no GPU and no peer is: what it needs of them it asks for when it runs."""

from __future__ import annotations

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_module_can_be_imported() -> None:
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    assert len(files) > 30
    for file in files:
        importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
