"""Packing, shuffling, splits and the position in the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.data.batch import IGNORED_LABEL
from runtime.data.indexed import DataError, TokenFile, write_tokens
from runtime.data.loader import DataConfig, DataSource, Loader
from runtime.data.packing import PackedSamples, TokenStream, permutation, split_bounds
from runtime.errors import ConfigError

# Tokens are their own position in the stream, so that a sample shows where it comes from.
LENGTHS = [5, 1, 30, 7, 57]


def stream(num_files: int = 1) -> TokenStream:
    ends = np.cumsum(LENGTHS)
    tokens = np.arange(ends[-1], dtype=np.uint16)
    if num_files == 1:
        return TokenStream([TokenFile(Path("a.bin"), tokens, ends)], 1000)
    files = [TokenFile(Path("b.bin"), part, np.array([len(part)])) for part in np.split(tokens, ends[:-1])]
    return TokenStream(files, 1000)


def packed(shuffle: bool = True, num_files: int = 1, seed: int = 3, begin: int = 0, end: int = 100) -> PackedSamples:
    return PackedSamples(stream(num_files), begin, end, seq_length=8, seed=seed, shuffle=shuffle, name="train")


def test_permutation() -> None:
    for size in (0, 1, 2, 1000):
        assert sorted(permutation(size, 1, 2)) == list(range(size))
    assert permutation(100, 1, 2).tolist() == permutation(100, 1, 2).tolist() != permutation(100, 1, 3).tolist()
    # Far from the identity, with no preferred place: the mean displacement of a random permutation is about n / 3.
    assert 250 < np.abs(permutation(1000, 7) - np.arange(1000)).mean() < 420


def test_files_make_one_row() -> None:
    rows = stream(num_files=5)
    assert rows.document_ends.tolist() == np.cumsum(LENGTHS).tolist()
    for begin in range(100):
        for end in (begin + 1, min(begin + 40, 100)):
            assert rows.read(begin, end).tolist() == list(range(begin, end))


def test_unshuffled_samples_are_consecutive_windows() -> None:
    samples = packed(shuffle=False)
    assert samples.num_samples == 12
    for index in range(12):
        assert samples.sample(index).tolist() == list(range(8 * index, 8 * index + 9))


@pytest.mark.parametrize("num_files", [1, 5])
def test_shuffled_epoch_predicts_each_token_at_most_once_and_keeps_documents_whole(num_files: int) -> None:
    samples = packed(num_files=num_files)
    for epoch in range(3):
        rows = [samples.sample(epoch * 12 + i) for i in range(12)]
        labels = np.concatenate([row[1:] for row in rows])
        assert len(set(labels.tolist())) == 96  # of 99 that a row of 100 tokens predicts
        follow = sum(int((np.diff(row) == 1).sum()) for row in rows)
        assert follow >= 96 - len(LENGTHS)  # all but where a document ends


def test_epochs_differ_and_seeds_differ() -> None:
    samples = packed()
    epochs = [np.concatenate([samples.sample(e * 12 + i) for i in range(12)]).tolist() for e in range(2)]
    assert epochs[0] != epochs[1]
    assert np.concatenate([packed(seed=4).sample(i) for i in range(12)]).tolist() != epochs[0]
    assert np.concatenate([packed().sample(12 + i) for i in range(12)]).tolist() == epochs[1]


def test_range_of_the_stream() -> None:
    samples = packed(begin=20, end=80)
    seen = np.concatenate([samples.sample(i) for i in range(samples.num_samples)])
    assert seen.min() >= 20
    assert seen.max() < 80


def test_too_few_tokens_and_foreign_ids() -> None:
    with pytest.raises(DataError, match="the train split has 8 of 100 tokens; one sample takes 9"):
        packed(end=8)
    with pytest.raises(DataError, match=r"a\.bin: token id 59 at positions"):
        PackedSamples(
            TokenStream(stream().files, 50), 0, 100, seq_length=59, seed=0, shuffle=False, name="train"
        ).sample(0)


def test_split_bounds() -> None:
    assert split_bounds(1000, (99, 1, 0)) == [(0, 990), (990, 1000), (1000, 1000)]
    assert split_bounds(100_000, (99990, 8, 2)) == [(0, 99990), (99990, 99998), (99998, 100_000)]
    assert split_bounds(10, (1, 1, 1)) == [(0, 3), (3, 7), (7, 10)]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_share_a_global_batch_whatever_their_number(dp_size: int) -> None:
    expected = sorted(packed().sample(i).tolist() for i in range(8, 16))
    rows = []
    for rank in range(dp_size):
        batches = Loader(samples=packed(), micro_batch_size=2, dp_rank=rank, dp_size=dp_size).global_batch(8, 8)
        assert len(batches) == 4 // dp_size
        for batch in batches:
            assert batch.tokens.dtype == torch.int64
            assert batch.tokens.shape == batch.labels.shape == (2, 8)
            assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
            rows += torch.cat([batch.tokens, batch.labels[:, -1:]], 1).tolist()
    assert sorted(rows) == expected


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_evaluation_counts_each_sample_once(dp_size: int) -> None:
    counts = []
    labels = []
    for rank in range(dp_size):
        loader = Loader(samples=packed(shuffle=False), micro_batch_size=5, dp_rank=rank, dp_size=dp_size)
        batches = loader.global_batch(0, 20, limit=12)
        counts.append(len(batches))
        labels += [b.labels[b.labels != IGNORED_LABEL] for b in batches]
    assert len(set(counts)) == 1
    assert sorted(torch.cat(labels).tolist()) == list(range(1, 97))


def test_source_splits_paths_or_takes_one_for_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tokens(tmp_path / f"{name}.bin", [list(range(100))], np.dtype(np.uint16))
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    source = DataSource(DataConfig(paths=(a, b), split=(3, 1), seq_length=8, vocab_size=100), tmp_path)
    assert (source.samples("train").num_tokens, source.samples("valid").num_tokens) == (150, 50)
    with pytest.raises(DataError, match="the test split has 0 of 200 tokens"):
        source.samples("test")
    source = DataSource(DataConfig(train_paths=(a,), valid_paths=(b,), seq_length=8, vocab_size=100), tmp_path)
    assert source.samples("valid").num_tokens == 100
    with pytest.raises(ConfigError, match="--test-data-path"):
        source.samples("test")
    with pytest.raises(ConfigError, match="excludes"):
        DataConfig(paths=(a,), train_paths=(a,), seq_length=8, vocab_size=100)


def test_fingerprint_follows_what_training_sees(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [list(range(100))], np.dtype(np.uint16))
    write_tokens(tmp_path / "b.bin", [list(range(99, -1, -1))], np.dtype(np.uint16))

    def fingerprint(name: str, seed: int = 1, seq_length: int = 8) -> str:
        path = tmp_path / name
        config = DataConfig(paths=(path,), split=(1,), seq_length=seq_length, vocab_size=100, seed=seed)
        return DataSource(config, tmp_path).fingerprint()

    assert fingerprint("a.bin") == fingerprint("a.bin")
    others = {fingerprint("b.bin"), fingerprint("a.bin", seed=2), fingerprint("a.bin", seq_length=9)}
    assert len({fingerprint("a.bin"), *others}) == 4
