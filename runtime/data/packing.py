"""Samples: documents shuffled, laid end to end, cut to the sequence length, and shuffled again, all from a seed.

The position in the data is one number, how many samples were taken. It says nothing of ranks or of the length of the run,
so that a run goes on exactly under any data-parallel degree, and with more iterations than it was begun with.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from runtime.data.errors import DataError
from runtime.data.stream import Ids, Row, Span, TokenStream

_KEPT_EPOCHS = 3
_CACHED_DOCUMENTS = 1 << 20


class Samples(Protocol):
    """Samples of seq_length + 1 tokens, as many as are asked for."""

    num_samples: int
    """Samples of one pass over the data; at least 1, for which a small part is repeated."""
    num_tokens: int
    num_documents: int

    def sample(self, index: int) -> Ids:
        """Give the token ids [seq_length + 1] of a sample: inputs are all but the last, labels all but the first."""

    def sample_with_begins(self, index: int) -> tuple[Ids, Sequence[int]]:
        """Give a sample, and the places in it where documents begin."""

    def epochs(self, count: int) -> float:
        """Give how many passes over the data `count` samples are."""

    def digest(self) -> str:
        """Name the samples: equal for the same tokens in the same order."""


def permutation(size: int, *key: int) -> Ids:
    """Permute range(size) as the key says: the same on every machine and with every version of numpy.

    Args:
        size: number of elements.
        key: integers that select the permutation.

    Returns:
        [size] the permutation.

    Source:
        Elements are sorted by their SplitMix64 hash, https://prng.di.unimi.it/splitmix64.c. It maps one to one, so no two
        are equal.
    """
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for word in key:
            state = _splitmix64(state ^ np.uint64(word % (1 << 64)))
        hashes = _splitmix64(np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state)
    return np.argsort(hashes)


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Documents:
    """Some documents of a stream."""

    starts: Ids
    """[D] where each begins in the stream."""
    lengths: Ids
    """[D] tokens of each."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    row: Row
    order: Ids | None
    """Which of its samples is dealt out at each place; None: as they come."""


class PackedSamples:
    """An endless row, epoch after epoch, of a part's documents; samples are dealt out in a random order within an epoch.

    Neighbouring samples share one token, so each token is predicted once in an epoch.
    """

    def __init__(
        self,
        stream: TokenStream,
        documents: Documents,
        *,
        seq_length: int,
        seed: int,
        shuffle: bool,
        cache: Path | None = None,
    ) -> None:
        """Make samples.

        Args:
            stream: has the tokens.
            documents: which of its documents; at least one token.
            seq_length: tokens of a sample.
            seed: selects the order.
            shuffle: whether documents and samples are shuffled, or stay in the order of the files.
            cache: folder where the order of very many documents is kept and shared between processes.
        """
        self._stream, self._documents, self._cache = stream, documents, cache
        self._seq_length, self._seed, self._shuffle = seq_length, seed, shuffle
        self.num_documents = len(documents.starts)
        self.num_tokens = int(documents.lengths.sum())
        self.num_samples = max(1, (self.num_tokens - 1) // seq_length)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()
        self._name: str | None = None

    def epochs(self, count: int) -> float:
        """Give how many passes over the data `count` samples are."""
        return count * self._seq_length / self.num_tokens

    def _window(self, epoch: int) -> tuple[int, int]:
        """The samples that begin in an epoch: dealt out among themselves."""
        first, behind = (-(-number * self.num_tokens // self._seq_length) for number in (epoch, epoch + 1))
        return first, behind

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) >= _KEPT_EPOCHS:
                    del self._epochs[min(self._epochs, key=lambda kept: -abs(kept - number))]
                self._epochs[number] = self._make(number)
            return self._epochs[number]

    def _make(self, number: int) -> _Epoch:
        starts, lengths = self._documents.starts, self._documents.lengths
        if not self._shuffle:
            return _Epoch(Row(starts, np.cumsum(lengths)), None)
        first, behind = self._window(number)
        samples = permutation(behind - first, self._seed, number, 1)
        if len(starts) < _CACHED_DOCUMENTS or self._cache is None:
            return _Epoch(Row(*self._shuffled(number)), samples)
        return _Epoch(Row(*self._cached(number, self._cache)), samples)

    def _shuffled(self, number: int) -> tuple[Ids, Ids]:
        order = permutation(self.num_documents, self._seed, number, 0)
        return self._documents.starts[order], np.cumsum(self._documents.lengths[order])

    def _cached(self, number: int, folder: Path) -> tuple[Ids, Ids]:
        """An order of very many documents is made once and mapped by all processes of a machine."""
        path = folder / f"order-{self._documents_name()}-{self._seed}-{number}.npy"
        if not path.is_file():
            made = np.stack(self._shuffled(number))
            partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with open(partial, "wb") as file:
                    np.save(file, made)
                os.replace(partial, path)
            except OSError:
                with suppress(OSError):
                    partial.unlink()
                return made[0], made[1]  # a cache that can't be written only costs memory
        starts, ends = np.load(path, mmap_mode="r")
        return starts, ends

    def _documents_name(self) -> str:
        if self._name is None:
            digest = xxhash.xxh3_128(np.ascontiguousarray(self._documents.starts).data)
            digest.update(np.ascontiguousarray(self._documents.lengths).data)
            self._name = str(digest.hexdigest())
        return self._name

    def _spans(self, index: int) -> list[Span]:
        size, length = self.num_tokens, self._seq_length
        number = index * length // size
        first, _ = self._window(number)
        order = self._epoch(number).order
        place = index if order is None else first + int(order[index - first])
        begin = place * length
        end = begin + length + 1
        spans: list[Span] = []
        while begin < end:
            number, inner = divmod(begin, size)
            stop = min(size, inner + end - begin)
            spans += self._epoch(number).row.spans(inner, stop)
            begin += stop - inner
        return spans

    def sample(self, index: int) -> Ids:
        """Give a sample.

        Args:
            index: counts on through the epochs.

        Returns:
            [seq_length + 1] token ids: inputs are all but the last, labels all but the first.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        return self._stream.gather(self._spans(index))

    def sample_with_begins(self, index: int) -> tuple[Ids, Sequence[int]]:
        """Give a sample, and the places in it where documents begin.

        Args:
            index: as for `sample`.

        Returns:
            The sample, and rising places.
        """
        return with_begins(self._stream, self._spans(index))

    def digest(self) -> str:
        """Name the samples: equal for the same tokens in the same order."""
        settings = (self.num_tokens, self._seq_length, self._seed, self._shuffle)
        return digest_samples(self, repr(settings) + self._documents_name())


def with_begins(stream: TokenStream, spans: Sequence[Span]) -> tuple[Ids, Sequence[int]]:
    """Read stretches, and say at which places of the result documents begin."""
    places, place = [], 0
    for begin, end, begins in spans:
        if begins:
            places.append(place)
        place += end - begin
    return stream.gather(spans), places


def digest_samples(samples: Samples, settings: str) -> str:
    """Name samples by their settings and some of their tokens.

    Args:
        samples: the samples.
        settings: what else makes them what they are.

    Returns:
        A hexadecimal digest.
    """
    digest = xxhash.xxh3_128(settings.encode())
    for index in np.linspace(0, samples.num_samples - 1, 16).astype(int):
        digest.update(samples.sample(int(index)).tobytes())
    return str(digest.hexdigest())


def split_bounds(size: int, weights: Sequence[float]) -> list[tuple[int, int]]:
    """Cut documents into consecutive parts, as Megatron does.

    Args:
        size: number of documents.
        weights: relative size of each part; not all 0.

    Returns:
        Each part's first document and the document behind its last.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/blended_megatron_dataset_config.py
        (convert_split_vector_to_split_matrix) and blended_megatron_dataset_builder.py (_build_megatron_dataset_splits).
    """
    shares = np.array(weights, np.float64)
    shares = shares / np.sum(shares)
    edges = [0.0]
    for share in shares.tolist():
        edges.append(edges[-1] + share)
    places = [round(edge * float(size)) for edge in edges]
    return list(pairwise(places))


def no_documents(
    where: str, split: str, total: int, weights: Sequence[float], *, conversations: bool = False
) -> DataError:
    """Make the error of a part that gets none of the documents."""
    shares = ",".join(f"{weight:g}" for weight in weights)
    own = "--finetune-valid-data" if conversations else f"--{split}-data-path"
    what = "conversations" if conversations else "documents"
    remedy = f", more data, or data of its own ({own})" if split == "valid" or not conversations else " or more data"
    return DataError(
        f"{where}: --split {shares} gives the {split} part none of its {total} {what}; give it a larger share{remedy}"
    )
