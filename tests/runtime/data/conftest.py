"""A small tokenizer trained on the spot, and documents to feed it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.words import make_tokenizer, real_text


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some hundred documents, short and long, with line ends, quotes and letters beyond ASCII."""
    text = real_text()
    pieces = [text[begin : begin + 37 * (1 + begin % 40)] for begin in range(0, len(text), 700)]
    return [*pieces, "d\u00e9j\u00e0 vu \u4e2d\u6587 \U0001f600", 'quotes "\\" and\ttabs', " leading", "x"]
