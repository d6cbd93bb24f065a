"""The samples that Megatron-Core takes, in its order: for runs that go on from one of Megatron's, or are compared with it.

Source:
    https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/gpt_dataset.py
    (_build_document_sample_shuffle_indices, _build_document_index, _build_shuffle_index)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.data.errors import DataError
from runtime.data.packing import Documents, digest_samples, with_begins
from runtime.data.stream import Ids, Row, Span, TokenStream

_SEPARATE_BELOW = 0.80
"""A last epoch of which less is needed is shuffled by itself."""


class MegatronSamples:
    """Samples of seq_length + 1 tokens of all epochs at once: their order depends on how many are asked for."""

    def __init__(
        self, stream: TokenStream, documents: Documents, count: int | None, *, seq_length: int, seed: int
    ) -> None:
        """Make samples.

        Args:
            stream: has the tokens.
            documents: Megatron's sequences, empty ones too.
            count: samples that are needed; None is one epoch.
            seq_length: tokens of a sample.
            seed: as Megatron's --seed.
        """
        self._stream, self._seq_length, self._seed = stream, seq_length, seed
        self.num_documents = len(documents.starts)
        self.num_tokens = int(documents.lengths.sum())
        needed = 0 if count is None else count * seq_length + 1
        epochs = max(1, -(-needed // self.num_tokens))
        before_last = ((epochs - 1) * self.num_tokens - 1) // seq_length
        in_epoch = (self.num_tokens - 1) // seq_length
        separate = epochs > 1 and (count or 0) - before_last < int(_SEPARATE_BELOW * in_epoch)
        random = np.random.RandomState(seed)
        order = _document_order(self.num_documents, epochs, random, separate)
        self.num_samples = (epochs * self.num_tokens - 1) // seq_length
        self._shuffle = _sample_order(before_last if separate else self.num_samples, self.num_samples, random)
        self._row = Row(documents.starts[order], np.cumsum(documents.lengths[order]))

    def epochs(self, count: int) -> float:
        """Give how many passes over the data `count` samples are."""
        return count * self._seq_length / self.num_tokens

    def _spans(self, index: int) -> list[Span]:
        if index >= self.num_samples:
            raise DataError(
                f"sample {index} of {self.num_samples}: with --data-order megatron the length of the run makes the order; "
                "start with the --train-iters that you want, or take --data-order epochs"
            )
        begin = int(self._shuffle[index]) * self._seq_length
        return self._row.spans(begin, begin + self._seq_length + 1)

    def sample(self, index: int) -> Ids:
        """Give the token ids [seq_length + 1] of a sample."""
        return self._stream.gather(self._spans(index))

    def sample_with_begins(self, index: int) -> tuple[Ids, Sequence[int]]:
        """Give a sample, and the places in it where documents begin."""
        return with_begins(self._stream, self._spans(index))

    def digest(self) -> str:
        """Name the samples: equal for the same tokens in the same order."""
        return digest_samples(self, repr(("megatron", self.num_tokens, self._seq_length, self._seed)))


def _document_order(size: int, epochs: int, random: np.random.RandomState, separate: bool) -> npt.NDArray[np.int32]:
    if separate:
        first = _document_order(size, epochs - 1, random, False)
        return np.concatenate([first, _document_order(size, 1, random, False)])
    order = np.tile(np.arange(size, dtype=np.int32), epochs)
    random.shuffle(order)
    return order


def _sample_order(first: int, total: int, random: np.random.RandomState) -> npt.NDArray[np.int64]:
    parts = [np.arange(0, first, dtype=np.int64)]
    if first != total:
        parts.append(np.arange(first, total, dtype=np.int64))
    for part in parts:
        random.shuffle(part)
    return np.concatenate(parts)
