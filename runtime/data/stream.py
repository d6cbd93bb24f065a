"""Token files as one row of tokens, and rows of documents in any order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from runtime.data.errors import DataError
from runtime.data.indexed import TokenFile

_COUNTED = 1 << 22
Ids = npt.NDArray[np.int64]
Span = tuple[int, int, bool]
"""First token of a stretch, the token behind its last, and whether a document begins there."""


class TokenStream:
    """Token files as one row of tokens."""

    def __init__(self, files: Sequence[TokenFile], vocab_size: int) -> None:
        self.files = tuple(files)
        self.vocab_size = vocab_size
        self._begins = np.cumsum([0, *(len(file.tokens) for file in files)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def document_ends(self, first: int, last: int, *, sequences: bool = False) -> Ids:
        """Give where the documents of some of the files end.

        Args:
            first: first file.
            last: file behind the last.
            sequences: Megatron's sequences instead, empty ones too.

        Returns:
            [D] positions in the row.
        """
        parts = []
        for file, begin in zip(self.files[first:last], self._begins[first:last], strict=True):
            ends = file.sequence_ends if sequences and file.sequence_ends is not None else file.document_ends
            parts.append(ends + begin if begin else ends)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def begin(self, file: int) -> int:
        """Give the position in the row where a file begins; for the number of files, the row's length."""
        return int(self._begins[file])

    def gather(self, spans: Iterable[Span]) -> Ids:
        """Read stretches of tokens.

        Args:
            spans: stretches in positions of the row.

        Returns:
            [sum of their lengths] token ids.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        parts = [part for begin, end, _ in spans for part in self._read(begin, end)]
        ids = np.concatenate([tokens for _, _, tokens in parts]).astype(np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise self._foreign(parts)
        return ids

    def count_marks(self, starts: Ids, ends: Ids) -> Ids:
        """Count the odd ids of stretches: of marked ids those that are learned.

        Args:
            starts: [D] rising, where each stretch begins.
            ends: [D] behind each; no stretch reaches into the next.

        Returns:
            [D] odd ids of each.
        """
        counts = np.zeros(len(starts), np.int64)
        first = 0
        while first < len(starts):
            last = max(first + 1, int(np.searchsorted(ends, starts[first] + _COUNTED, side="right")))
            parts = [tokens & 1 for _, _, tokens in self._read(int(starts[first]), int(ends[last - 1]))]  # type: ignore[operator]
            odd = np.concatenate([*parts, [0]])  # one more, because a stretch may end with the last
            bounds = np.stack([starts[first:last], ends[first:last]], axis=1).flatten() - starts[first]
            counts[first:last] = np.add.reduceat(odd, bounds, dtype=np.int64)[::2] if len(odd) > 1 else 0
            first = last
        return np.where(ends > starts, counts, 0)

    def _read(self, begin: int, end: int) -> list[tuple[int, int, npt.NDArray[np.generic]]]:
        """Give the stretch as (file, position in it, tokens)."""
        parts = []
        index = int(np.searchsorted(self._begins, begin, side="right")) - 1
        while begin < end:
            offset, stop = int(self._begins[index]), min(end, int(self._begins[index + 1]))
            if stop > begin:
                parts.append((index, begin - offset, self.files[index].tokens[begin - offset : stop - offset]))
            begin, index = stop, index + 1
        return parts

    def _foreign(self, parts: list[tuple[int, int, npt.NDArray[np.generic]]]) -> DataError:
        for index, begin, tokens in parts:
            ids = tokens.astype(np.int64)
            wrong = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
            if wrong.size:
                place = int(wrong[0])
                return DataError(
                    f"{self.files[index].path}: token id {ids[place]} at position {begin + place}; the model's vocabulary "
                    f"is {self.vocab_size}: tokenize with the model's own tokenizer, or say the right --bare-dtype"
                )
        raise AssertionError


class Row:
    """Documents laid end to end in some order."""

    def __init__(self, starts: Ids, ends: Ids) -> None:
        """Make a row.

        Args:
            starts: [D] where each document begins in its stream, in the order of the row.
            ends: [D] where each ends in the row.
        """
        self._starts, self._ends = starts, ends

    def __len__(self) -> int:
        return int(self._ends[-1])

    def spans(self, begin: int, end: int) -> list[Span]:
        """Give the stretches of the stream that a part of the row is made of.

        Args:
            begin: first position in the row.
            end: position behind the last; not behind the row's end.
        """
        found = []
        document = int(np.searchsorted(self._ends, begin, side="right"))
        document_begin = int(self._ends[document - 1]) if document else 0
        while begin < end:
            document_end = int(self._ends[document])
            stop = min(end, document_end)
            # The document is at `start` in its stream, and from `document_begin` on in the row.
            shift = int(self._starts[document]) - document_begin
            if stop > begin:
                found.append((begin + shift, stop + shift, begin == document_begin))
            begin, document, document_begin = stop, document + 1, document_end
        return found
