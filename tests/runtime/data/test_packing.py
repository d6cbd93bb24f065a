"""Packing, shuffling, epochs and the position in the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.data.batch import IGNORED_LABEL
from runtime.data.errors import DataError
from runtime.data.indexed import TokenFile
from runtime.data.loader import Loader
from runtime.data.packing import Documents, PackedSamples, permutation, split_bounds
from runtime.data.stream import TokenStream

# Tokens are their own position in the stream, so that a sample shows where it comes from.
LENGTHS = [5, 1, 30, 7, 57]
TOTAL = sum(LENGTHS)


def stream(num_files: int = 1, vocab_size: int = 1000) -> TokenStream:
    ends = np.cumsum(LENGTHS)
    tokens = np.arange(ends[-1], dtype=np.uint16)
    if num_files == 1:
        return TokenStream([TokenFile(Path("a.bin"), tokens, ends)], vocab_size)
    files = [TokenFile(Path("b.bin"), part, np.array([len(part)])) for part in np.split(tokens, ends[:-1])]
    return TokenStream(files, vocab_size)


def packed(
    shuffle: bool = True, num_files: int = 1, seed: int = 3, documents: slice = slice(None), seq_length: int = 8,
    cache: Path | None = None,
) -> PackedSamples:  # fmt: skip
    row = stream(num_files)
    ends = row.document_ends(0, num_files)
    lengths = np.diff(ends, prepend=0)
    chosen = Documents((ends - lengths)[documents], lengths[documents])
    return PackedSamples(row, chosen, seq_length=seq_length, seed=seed, shuffle=shuffle, cache=cache)


def test_permutation() -> None:
    for size in (0, 1, 2, 1000):
        assert sorted(permutation(size, 1, 2)) == list(range(size))
    assert permutation(100, 1, 2).tolist() == permutation(100, 1, 2).tolist() != permutation(100, 1, 3).tolist()
    # Far from the identity, with no preferred place: the mean displacement of a random permutation is about n / 3.
    assert 250 < np.abs(permutation(1000, 7) - np.arange(1000)).mean() < 420


def test_permutation_is_pinned() -> None:
    """A later version must deal out the same order, or runs would not go on as they began."""
    # By hand from https://prng.di.unimi.it/splitmix64.c, in integers without numpy.
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    state = mix(mix(0 ^ 1234) ^ 5)
    hashes = [mix((i * 0x9E3779B97F4A7C15 + state) & mask) for i in range(50)]
    assert permutation(50, 1234, 5).tolist() == sorted(range(50), key=hashes.__getitem__)


def test_files_make_one_row() -> None:
    rows = stream(num_files=5)
    assert rows.document_ends(0, 5).tolist() == np.cumsum(LENGTHS).tolist()
    assert rows.document_ends(2, 4).tolist() == [36, 43]
    for begin in range(100):
        for end in (begin + 1, min(begin + 40, 100)):
            assert rows.gather([(begin, end, True)]).tolist() == list(range(begin, end))


def test_unshuffled_samples_are_consecutive_windows_and_go_on() -> None:
    samples = packed(shuffle=False)
    assert samples.num_samples == 12
    for index in range(30):
        expected = [position % TOTAL for position in range(8 * index, 8 * index + 9)]
        assert samples.sample(index).tolist() == expected


@pytest.mark.parametrize("num_files", [1, 5])
def test_each_epoch_takes_each_token_once_and_keeps_documents_whole(num_files: int) -> None:
    samples = packed(num_files=num_files)
    # 25 samples of 8 are two epochs of 100 tokens: nothing is left out between them.
    inputs = np.concatenate([samples.sample(i)[:-1] for i in range(25)])
    assert np.bincount(inputs, minlength=TOTAL).tolist() == [2] * TOTAL
    follow = sum(int((np.diff(samples.sample(i)) == 1).sum()) for i in range(25))
    assert follow >= 2 * (TOTAL - len(LENGTHS)) - 2  # all but where a document ends


def test_epochs_differ_and_seeds_differ() -> None:
    def epoch(samples: PackedSamples, number: int) -> list[int]:
        return np.concatenate([samples.sample(25 * number + i) for i in range(25)]).tolist()

    assert epoch(packed(), 0) != epoch(packed(), 1)
    assert epoch(packed(), 0) != epoch(packed(seed=4), 0)
    samples = packed()
    assert [epoch(samples, n) for n in (3, 0, 1)] == [epoch(packed(), n) for n in (3, 0, 1)]


def test_a_part_smaller_than_a_sample_repeats() -> None:
    samples = packed(documents=slice(0, 2))  # 6 tokens
    assert samples.num_samples == 1
    assert all(len(samples.sample(index)) == 9 for index in range(10))
    inputs = np.concatenate([samples.sample(index)[:-1] for index in range(3)])  # 24 tokens: four epochs
    assert np.bincount(inputs).tolist() == [4] * 6
    assert samples.epochs(3) == pytest.approx(4.0)


def test_part_of_the_documents() -> None:
    samples = packed(documents=slice(2, 4))
    assert (samples.num_documents, samples.num_tokens) == (2, 37)
    seen = np.concatenate([samples.sample(i) for i in range(samples.num_samples)])
    assert seen.min() >= 6
    assert seen.max() < 43


def test_where_documents_begin() -> None:
    starts = {0, 5, 6, 36, 43}
    for index in range(30):
        ids, places = packed().sample_with_begins(index)
        assert list(places) == [place for place, token in enumerate(ids.tolist()) if token in starts]


def test_the_order_of_many_documents_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [packed().sample(i).tolist() for i in range(30)]
    monkeypatch.setattr("runtime.data.packing._CACHED_DOCUMENTS", 3)
    for _ in range(2):
        assert [packed(cache=tmp_path / "new").sample(i).tolist() for i in range(30)] == expected
    assert len(list((tmp_path / "new").glob("order-*.npy"))) == 4  # the last sample reaches into a fourth epoch
    assert not list((tmp_path / "new").glob("*.partial"))
    (tmp_path / "file").write_text("")
    assert [packed(cache=tmp_path / "file").sample(i).tolist() for i in range(30)] == expected


def test_foreign_ids() -> None:
    samples = PackedSamples(
        stream(vocab_size=50), Documents(np.array([0]), np.array([100])), seq_length=59, seed=0, shuffle=False
    )
    with pytest.raises(DataError, match=r"a\.bin: token id 50 at position 50; the model's vocabulary is 50"):
        samples.sample(0)


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
            assert batch.position_ids is None
            assert batch.document_ids is None
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
