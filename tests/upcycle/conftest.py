"""Temporary folders in memory, and a way to call the program."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from tests.moeconv.models import RAM


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Give an empty folder, in memory where the machine has such."""
    with tempfile.TemporaryDirectory(dir=RAM) as name:
        yield Path(name)


@pytest.fixture
def call() -> Callable[..., Result]:
    """Call the program in this process; the result holds exit code, stdout and stderr."""

    def run(*words: object) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
