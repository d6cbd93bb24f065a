"""The page of what is tested holds what the tests say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.coverage import page


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_is_made_from_the_tests() -> None:
    held = Path(__file__).parents[2] / "docs/coverage.md"
    assert held.read_text(encoding="utf8") == page(), "python -m tests.support.coverage > docs/coverage.md"
