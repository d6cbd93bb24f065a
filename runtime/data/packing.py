"""Samples: documents shuffled, laid end to end, cut to the sequence length, and shuffled again, all from a seed.

The position in the data is one number, how many samples were taken. It says nothing of ranks, so that a run goes on
exactly under any data-parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from runtime.data.indexed import DataError, TokenFile

Ids = npt.NDArray[np.int64]

SPLITS = ("train", "valid", "test")


def permutation(size: int, *key: int) -> Ids:
    """Permute range(size) as the key says: the same on every machine and with every version of numpy.

    Args:
        size: number of elements.
        key: integers that select the permutation.

    Returns:
        [size] the permutation.

    Source:
        Elements are sorted by their SplitMix64 hash, https://prng.di.unimi.it/splitmix64.c.
    """
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for word in key:
            state = _splitmix64(state ^ np.uint64(word % (1 << 64)))
        hashes = _splitmix64(np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state)
    return np.argsort(hashes, kind="stable")


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TokenStream:
    """Token files as one row of tokens."""

    def __init__(self, files: Sequence[TokenFile], vocab_size: int) -> None:
        self.files = tuple(files)
        self.vocab_size = vocab_size
        sizes = [len(file.tokens) for file in files]
        self._begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        ends = [file.document_ends + begin for file, begin in zip(files, self._begins[:-1], strict=True)]
        self.document_ends: Ids = np.concatenate(ends)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def read(self, begin: int, end: int) -> Ids:
        """Read tokens `begin` to `end` of the row.

        Args:
            begin: first position.
            end: position past the last.

        Returns:
            [end - begin] token ids.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        parts = []
        first = int(np.searchsorted(self._begins, begin, side="right")) - 1
        for index in range(first, len(self.files)):
            offset = int(self._begins[index])
            if offset >= end:
                break
            part = self.files[index].tokens[max(begin - offset, 0) : end - offset].astype(np.int64)
            if part.size and not 0 <= part.min() <= part.max() < self.vocab_size:
                raise DataError(
                    f"{self.files[index].path}: token id {part.max() if part.min() >= 0 else part.min()} at positions "
                    f"{begin - offset} to {end - offset}; the model's vocabulary is {self.vocab_size}"
                )
            parts.append(part)
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class _Epoch:
    number: int
    starts: Ids
    ends: Ids
    order: Ids


class PackedSamples:
    """Samples of seq_length + 1 tokens of a token stream; neighbours share one token, so each is predicted once."""

    def __init__(
        self, stream: TokenStream, begin: int, end: int, *, seq_length: int, seed: int, shuffle: bool, name: str
    ) -> None:
        self.stream, self.seq_length, self.seed, self.shuffle = stream, seq_length, seed, shuffle
        inner = stream.document_ends[(stream.document_ends > begin) & (stream.document_ends < end)]
        self._bounds: Ids = np.concatenate([[begin], inner, [end]]).astype(np.int64)
        self.num_samples = (end - begin - 1) // seq_length
        self.num_tokens = end - begin
        if self.num_samples < 1:
            raise DataError(
                f"the {name} split has {end - begin} of {len(stream)} tokens; one sample takes {seq_length + 1} "
                "(--seq-length + 1): give more data, a larger share in --split, or a shorter --seq-length"
            )
        self._epoch = self._make_epoch(0)

    def _make_epoch(self, number: int) -> _Epoch:
        starts, lengths = self._bounds[:-1], np.diff(self._bounds)
        order = np.arange(self.num_samples, dtype=np.int64)
        if self.shuffle:
            documents = permutation(len(starts), self.seed, number, 0)
            starts, lengths = starts[documents], lengths[documents]
            order = permutation(self.num_samples, self.seed, number, 1)
        return _Epoch(number, starts, np.cumsum(lengths), order)

    def sample(self, index: int) -> Ids:
        """Give a sample.

        Args:
            index: counts on through the epochs: sample `index % num_samples` of epoch `index // num_samples`.

        Returns:
            [seq_length + 1] token ids: inputs are all but the last, labels all but the first.
        """
        number, position = divmod(index, self.num_samples)
        if number != self._epoch.number:
            self._epoch = self._make_epoch(number)
        epoch = self._epoch
        begin = int(epoch.order[position]) * self.seq_length
        end = begin + self.seq_length + 1
        parts = []
        document = int(np.searchsorted(epoch.ends, begin, side="right"))
        while begin < end:
            stop = min(end, int(epoch.ends[document]))
            # A document that starts at s and ends at row position e puts row position p at s + p - (e - length).
            shift = int(epoch.starts[document]) - (int(epoch.ends[document - 1]) if document else 0)
            parts.append(self.stream.read(begin + shift, stop + shift))
            begin, document = stop, document + 1
        return np.concatenate(parts)


def split_bounds(size: int, weights: Sequence[float]) -> list[tuple[int, int]]:
    """Cut a row of tokens into consecutive parts.

    Args:
        size: number of tokens.
        weights: relative size of each part; not all 0.

    Returns:
        Each part's first position and the position past its last.
    """
    total = sum(weights)
    edges = [0, *(round(size * sum(weights[: i + 1]) / total) for i in range(len(weights)))]
    return list(pairwise(edges))
