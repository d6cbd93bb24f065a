"""How many bytes of text each token stands for, so that a loss can be told per byte, whatever the tokenizer."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.data.tokenizer import Tokenizer

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Count the bytes of UTF-8 text that each token of a vocabulary stands for.

    Args:
        tokenizer: as `load_tokenizer` gives it.

    Returns:
        [tokens] bytes, 0 for special tokens; None where the kind of tokenizer doesn't tell. With sentencepiece a
        document has one byte more, the space that is put before it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    kinds = {str(node.get("type")) for node in _nodes(described.get("decoder"))}
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    replaces = _SPACE in json.dumps(described.get("decoder"), ensure_ascii=False)
    if "ByteLevel" in kinds:
        sizes = {number: len(token) for token, number in vocabulary.items()}  # each character is a byte
    elif replaces:
        sizes = {number: 1 if _BYTE.fullmatch(token) else _length(token) for token, number in vocabulary.items()}
    else:
        return None
    for added in described.get("added_tokens", ()):
        sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    out = np.zeros(max(sizes) + 1, np.int64)
    out[list(sizes)] = list(sizes.values())
    return out


def _length(token: str) -> int:
    return len(token.replace(_SPACE, " ").encode())


def _nodes(decoder: Any) -> list[dict[str, Any]]:
    """A decoder and the parts that it is a sequence of."""
    if not isinstance(decoder, dict):
        return []
    return [decoder, *(node for part in decoder.get("decoders") or () for node in _nodes(part))]
