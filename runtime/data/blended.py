"""Samples of several sources, dealt out by weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from runtime.data.dealing import BlendOrder, deal_exhaustively
from runtime.data.errors import DataError
from runtime.data.packing import Samples
from runtime.data.stream import Ids


class BlendedSamples:
    """A weighted blend: each source repeats on its own when its samples are used up."""

    def __init__(self, parts: Sequence[Samples], shares: Sequence[float]) -> None:
        """Blend samples.

        Args:
            parts: samples of each source.
            shares: of each source; they sum to 1.
        """
        self.parts = tuple(parts)
        self._shares = tuple(shares)
        self._order = BlendOrder(shares)
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.num_documents = sum(part.num_documents for part in parts)
        # One pass: until the first source is used up.
        self.num_samples = max(1, int(min(part.num_samples / share for part, share in zip(parts, shares, strict=True))))

    def counts(self, size: int) -> list[int]:
        """Give how many of the first `size` samples come from each source."""
        return self._order.counts(size)

    def epochs(self, count: int) -> float:
        """Give the most passes that `count` samples are over any source."""
        return max(part.epochs(n) for part, n in zip(self.parts, self.counts(count), strict=True))

    def sample(self, index: int) -> Ids:
        """Give the token ids [seq_length + 1] of a sample."""
        source, number = self._order[index]
        return self.parts[source].sample(number)

    def sample_with_begins(self, index: int) -> tuple[Ids, Sequence[int]]:
        """Give a sample, and the places in it where documents begin."""
        source, number = self._order[index]
        return self.parts[source].sample_with_begins(number)

    def digest(self) -> str:
        """Name the samples: equal for the same tokens in the same order."""
        return _digest(self.parts, repr(self._shares))


class ExhaustiveSamples:
    """Sources without weights in Megatron's order: each sample of each source once, in proportion to their numbers."""

    def __init__(self, parts: Sequence[Samples], count: int | None) -> None:
        """Blend samples.

        Args:
            parts: one epoch of each source.
            count: samples that are needed; None: all that there are.

        Raises:
            DataError: more are needed than there are: Megatron ends there.
        """
        self.parts = tuple(parts)
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.num_documents = sum(part.num_documents for part in parts)
        sizes = [part.num_samples for part in parts]
        total = sum(sizes)
        self.num_samples = total if count is None else min(count, total)
        if count is not None and count > total:
            raise DataError(
                f"{count} samples are needed, the sources have {total} in one pass, where --data-order megatron ends with "
                "sources without weights; give weights, or take --data-order epochs"
            )
        if count is None:
            self._sources, self._numbers = deal_exhaustively(sizes)
        else:
            order = BlendOrder([size / total for size in sizes])
            places = [order[index] for index in range(self.num_samples)]
            self._sources = np.array([source for source, _ in places], np.int32)
            self._numbers = np.array([number for _, number in places], np.int64)

    def epochs(self, count: int) -> float:
        """Give how many passes over the data `count` samples are."""
        return count / sum(part.num_samples for part in self.parts)

    def sample(self, index: int) -> Ids:
        """Give the token ids [seq_length + 1] of a sample."""
        return self.parts[int(self._sources[index])].sample(int(self._numbers[index]))

    def sample_with_begins(self, index: int) -> tuple[Ids, Sequence[int]]:
        """Give a sample, and the places in it where documents begin."""
        return self.parts[int(self._sources[index])].sample_with_begins(int(self._numbers[index]))

    def digest(self) -> str:
        """Name the samples: equal for the same tokens in the same order."""
        return _digest(self.parts, "exhaustive")


def _digest(parts: Sequence[Samples], settings: str) -> str:
    return str(xxhash.xxh3_128(" ".join([settings, *(part.digest() for part in parts)]).encode()).hexdigest())
