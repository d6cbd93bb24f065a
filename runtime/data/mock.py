"""Made-up tokens, to try a run's layout and speed without data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime.data.config import MOCK
from runtime.data.indexed import TokenFile, token_dtype

_NUM_TOKENS = 1 << 22
_MEAN_DOCUMENT = 512


def mock_tokens(vocab_size: int) -> TokenFile:
    """Make tokens that look like a file of documents, the same for every run of a vocabulary.

    Args:
        vocab_size: ids are 0 to vocab_size - 1, each as likely.

    Returns:
        4 Mi tokens in documents of 512 on average.
    """
    random = np.random.Generator(np.random.Philox(0))
    tokens = random.integers(0, vocab_size, _NUM_TOKENS, dtype=np.int64).astype(token_dtype(vocab_size))
    ends = np.unique(random.integers(1, _NUM_TOKENS, _NUM_TOKENS // _MEAN_DOCUMENT))
    return TokenFile(Path(MOCK), tokens, np.append(ends, _NUM_TOKENS).astype(np.int64))
