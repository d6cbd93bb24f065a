"""Temporary folders in memory, for the tests of the converter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.moeconv.models import RAM


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Give an empty folder, in memory where the machine has such."""
    with tempfile.TemporaryDirectory(dir=RAM) as name:
        yield Path(name)
