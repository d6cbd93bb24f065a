"""A small tokenizer trained on the spot, and documents to feed it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.words import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder
