"""The tutorial's folder, made once by running the tutorial."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.docs import tutorial


@pytest.fixture(scope="session")
def day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the tutorial leaves; `tutorial.made` in it is the page with what was printed now."""
    folder = tmp_path_factory.mktemp("day")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("OMP_NUM_THREADS", "1")
        made = tutorial.run(tutorial.PAGE.read_text(encoding="utf8"))
    (folder / "tutorial.made").write_text(made, encoding="utf8")
    return folder
