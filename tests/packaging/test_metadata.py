"""What files say about the package, and what the package says of its extras, agree."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml

from moeconv import extras

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (project()["version"], project()["license"])


def test_an_error_names_the_extra_that_brings_the_package() -> None:
    optional, base = project()["optional-dependencies"], project()["dependencies"]
    for package, extra in extras._EXTRAS.items():
        assert any(wanted.startswith(package) for wanted in optional[extra])
        assert not any(wanted.startswith(package) for wanted in base)
    for extra in ("gpu", "dev"):
        assert any("torch" in wanted and wanted.startswith("moeconv[") for wanted in optional[extra])
