"""Tokens as text while they come: whole characters only."""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"
"""What stands in decoded text for bytes that are no whole character (yet)."""


class TextStream:
    """Turns tokens into text piece by piece; the pieces together are what the tokenizer decodes at once."""

    def __init__(self, tokenizer: Any) -> None:
        """Begin a text.

        Args:
            tokenizer: of transformers.
        """
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = self._shown = 0
        """Tokens from `_begin` on are decoded together, since what a token stands for depends on the one before; those up
        to `_shown` have been given."""

    def push(self, token: int) -> str:
        """Take a token.

        Args:
            token: its id.

        Returns:
            The text that is complete now, without special tokens; empty where a character's bytes are missing.
        """
        self._ids.append(token)
        before, now = self._decode(self._ids[self._begin : self._shown]), self._decode(self._ids[self._begin :])
        if now.endswith(_INCOMPLETE) or len(now) <= len(before):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def end(self) -> str:
        """Give what is left: bytes that never became a character, as the tokenizer shows them."""
        before, now = self._decode(self._ids[self._begin : self._shown]), self._decode(self._ids[self._begin :])
        self._begin = self._shown = len(self._ids)
        return now[len(before) :]

    def whole(self) -> str:
        """Give the text of all tokens."""
        return self._decode(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
