"""From data files to the micro-batches of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from runtime.data.batch import IGNORED_LABEL, Batch
from runtime.data.packing import SPLITS, PackedSamples, TokenStream, split_bounds
from runtime.data.text import default_cache, open_sources
from runtime.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where a run's tokens come from."""

    paths: tuple[Path, ...] = ()
    """Files or folders that `split` divides."""
    split: tuple[float, ...] = (969.0, 30.0, 1.0)
    """Relative sizes of the train, valid and test parts, in tokens, in this order."""
    split_paths: tuple[tuple[Path, ...], ...] = ((), (), ())
    """Files or folders of each part, instead of paths and split."""
    tokenizer: Path | None = None
    """Folder or tokenizer.json; None takes the checkpoint's own."""
    cache: Path | None = None
    """Folder for tokenized text; None is under ~/.cache."""
    seq_length: int
    seed: int = 1234
    vocab_size: int

    def __post_init__(self) -> None:
        require(
            1 <= len(self.split) <= 3 and min(self.split) >= 0 and sum(self.split) > 0,
            f"--split is {','.join(map(str, self.split))}; expected up to three numbers (train,valid,test), not all 0",
        )
        require(
            not (self.paths and any(self.split_paths)),
            "--data excludes --train-data-path, --valid-data-path and --test-data-path: give one or the other",
        )
        require(bool(self.paths or any(self.split_paths)), "no data: name files or folders with --data")


class DataSource:
    """The samples of each split; a split is opened when it is first asked for."""

    def __init__(self, config: DataConfig, checkpoint: Path) -> None:
        self.config = config
        self._checkpoint = checkpoint
        self._streams: dict[tuple[Path, ...], TokenStream] = {}

    def _stream(self, paths: tuple[Path, ...]) -> TokenStream:
        if paths not in self._streams:
            vocab_size = self.config.vocab_size
            cache = self.config.cache or default_cache()
            source = self.config.tokenizer or self._checkpoint
            files = open_sources(paths, source, vocab_size, cache)
            self._streams[paths] = TokenStream(files, vocab_size)
        return self._streams[paths]

    def has(self, split: str) -> bool:
        """Say whether a split has data enough for one sample.

        Args:
            split: train, valid or test.
        """
        index = SPLITS.index(split)
        own = self.config.split_paths[index]
        if not own and not self.config.paths:
            return False
        begin, end = self._range(index)
        return end - begin > self.config.seq_length

    def _range(self, index: int) -> tuple[int, int]:
        """Give the part of its stream that a split takes."""
        own = self.config.split_paths[index]
        size = len(self._stream(own or self.config.paths))
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
        require(bool(own or self.config.paths), f"the {split} split has no data: name some with --{split}-data-path")
        stream = self._stream(own or self.config.paths)
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
