"""What a new model takes from a tokenizer: the size of its vocabulary, its special tokens, and the files that go along."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.families.key_states import SPECIAL_TOKENS
from runtime.data.tokenizer import load_tokenizer, tokenizer_files, vocabulary_size

_ALSO = ("chat_template.jinja",)
# What says the whole of a tokenizer; without one of them its files mean something only where they are.
_DESCRIBED = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a model needs to know of its tokenizer."""

    vocab_size: int
    """One more than its largest id."""
    special: Mapping[str, int | None]
    """Key of config.json -> id of the special token; None where the tokenizer has none."""
    files: Mapping[str, bytes]
    """Name -> content, as a folder that transformers loads has them."""


def read_tokenizer(path: Path) -> TokenizerFacts:
    """Read what a model needs to know of its tokenizer.

    Args:
        path: as `--tokenizer-model` takes it.

    Returns:
        The facts. The files are a folder's own, unchanged; of a bare file, those that transformers writes for it.

    Raises:
        DataError: there is no tokenizer, or it can't be loaded.
    """
    tokenizer: Any = load_tokenizer(path)
    if path.is_dir() and any((path / name).is_file() for name in _DESCRIBED):
        own = [*tokenizer_files(path), *(path / name for name in _ALSO if (path / name).is_file())]
        files = {file.name: file.read_bytes() for file in own}
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}
    special = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
    return TokenizerFacts(vocabulary_size(tokenizer), special, files)
