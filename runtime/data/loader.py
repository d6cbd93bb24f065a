"""From data files to the micro-batches of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from runtime.data.batch import IGNORED_LABEL, Batch
from runtime.data.config import DataConfig
from runtime.data.mock import MOCK, mock_tokens
from runtime.data.packing import SPLITS, PackedSamples, TokenStream, split_bounds
from runtime.data.text import default_cache, open_sources
from runtime.errors import require


class DataSource:
    """The samples of each split; a split is opened when it is first asked for."""

    def __init__(self, config: DataConfig, checkpoint: Path) -> None:
        self.config = config
        self._paths = (MOCK,) if config.mock else config.paths
        self._checkpoint = checkpoint
        self._streams: dict[tuple[Path, ...], TokenStream] = {}

    def _stream(self, paths: tuple[Path, ...]) -> TokenStream:
        if paths not in self._streams:
            vocab_size = self.config.vocab_size
            cache = self.config.cache or default_cache()
            source = self.config.tokenizer or self._checkpoint
            mock = paths == (MOCK,)
            files = [mock_tokens(vocab_size)] if mock else open_sources(paths, source, vocab_size, cache)
            self._streams[paths] = TokenStream(files, vocab_size)
        return self._streams[paths]

    def has(self, split: str) -> bool:
        """Say whether a split has data enough for one sample.

        Args:
            split: train, valid or test.
        """
        index = SPLITS.index(split)
        own = self.config.split_paths[index]
        if not own and not self._paths:
            return False
        begin, end = self._range(index)
        return end - begin > self.config.seq_length

    def _range(self, index: int) -> tuple[int, int]:
        """Give the part of its stream that a split takes."""
        own = self.config.split_paths[index]
        size = len(self._stream(own or self._paths))
        return (0, size) if own else split_bounds(size, (*self.config.split, 0.0, 0.0)[:3])[index]

    def samples(self, split: str) -> PackedSamples:
        """Open the samples of a split; text is tokenized unless the cache has it.

        Args:
            split: train (shuffled), valid or test (in the order of the files).

        Returns:
            The samples.

        Raises:
            DataError: data can't be read, or are too few.
            ConfigError: the split has no data.
        """
        index = SPLITS.index(split)
        own = self.config.split_paths[index]
        require(bool(own or self._paths), f"the {split} split has no data: name some with --{split}-data-path")
        stream = self._stream(own or self._paths)
        begin, end = self._range(index)
        config, shuffle = self.config, split == "train"
        return PackedSamples(
            stream, begin, end, seq_length=config.seq_length, seed=config.seed, shuffle=shuffle, name=split
        )

    def fingerprint(self) -> str:
        """Name the training samples: equal for runs that see the same tokens in the same order."""
        samples = self.samples("train")
        digest = xxhash.xxh3_128(repr((samples.num_tokens, self.config.seq_length, self.config.seed)).encode())
        digest.update(samples.stream.document_ends.tobytes())
        for index in np.linspace(0, samples.num_samples - 1, 16).astype(int):
            digest.update(samples.sample(int(index)).tobytes())
        return str(digest.hexdigest())


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """Deals samples out to the data-parallel ranks; only `first` says where in the data a batch is."""

    samples: PackedSamples
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    def global_batch(self, first: int, size: int, limit: int | None = None) -> list[Batch]:
        """Give this rank's micro-batches of one global batch.

        Args:
            first: index of the batch's first sample.
            size: samples of the global batch, a multiple of micro_batch_size * dp_size.
            limit: samples from here on don't count: their labels are ignored. None counts all.

        Returns:
            Micro-batches of micro_batch_size samples, as many on every rank; together the ranks have each sample once.
        """
        one_pass = self.micro_batch_size * self.dp_size
        assert size % one_pass == 0
        begins = range(first + self.dp_rank * self.micro_batch_size, first + size, one_pass)
        return [self._batch(range(begin, begin + self.micro_batch_size), limit) for begin in begins]

    def _batch(self, indices: Sequence[int], limit: int | None) -> Batch:
        rows_BS1 = torch.from_numpy(np.stack([self.samples.sample(i if limit is None else i % limit) for i in indices]))
        labels_BS = rows_BS1[:, 1:].clone()
        if limit is not None:
            labels_BS[[row for row, index in enumerate(indices) if index >= limit]] = IGNORED_LABEL
        return Batch(tokens=rows_BS1[:, :-1].contiguous(), labels=labels_BS)
