"""Counts, splits and orders against megatron-core's BlendedMegatronDatasetBuilder, sample by sample."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.data.blended import BlendedSamples
from runtime.data.config import DataConfig
from runtime.data.dealing import BlendOrder, deal_exhaustively
from runtime.data.errors import DataError
from runtime.data.loader import DataSource, Loader
from runtime.data.packing import Samples, split_bounds
from runtime.errors import ConfigError
from tests.runtime.data.files import write_tokens

SEQ, SEED, EOD, VOCAB = 16, 1234, 1, 4000
SPLITS = ("train", "valid", "test")


class Tokens:
    """What GPTDatasetConfig asks of a tokenizer."""

    eod = EOD
    pad = -7
    vocab_size = VOCAB
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012
    special_tokens_dict: dict[str, int] = {}  # noqa: RUF012


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset, helpers
    return blended_megatron_dataset_builder, gpt_dataset, helpers


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three prefixes of different sizes; every document ends with EOD, and no token says two things."""
    folder = tmp_path_factory.mktemp("corpora")
    random = np.random.default_rng(0)
    for name, count in (("a", 120), ("b", 41), ("c", 300)):
        documents = [[*random.integers(2, VOCAB, random.integers(1, 70)).tolist(), EOD] for _ in range(count)]
        write_tokens(folder / f"{name}.bin", documents, np.dtype(np.uint16))
    return {name: str(folder / name) for name in "abc"}


def build(megatron: Any, sizes: list[int | None], **settings: Any) -> list[Any]:
    """Build Megatron's datasets of train, valid and test."""
    builder, gpt, _ = megatron
    masks = {
        name: settings.pop(name, False) for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    }
    config = gpt.GPTDatasetConfig(
        random_seed=SEED, sequence_length=SEQ, tokenizer=Tokens(), path_to_cache=None,
        **masks, **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, sizes, lambda: True, config).build()


def source(sizes: list[int | None], **settings: Any) -> DataSource:
    config = DataConfig(seq_length=SEQ, seed=SEED, vocab_size=VOCAB, data_order="megatron", **settings)
    return DataSource(config, Path(), sizes)


def check_equal(ours: Samples, theirs: Any, count: int) -> None:
    for index in range(count):
        found = theirs[index]
        expected = [*found["tokens"].tolist(), int(found["labels"][-1])]
        assert ours.sample(index).tolist() == expected, index


@pytest.mark.parametrize("split", ["969,30,1", "99990,8,2", "80,10,10", "1,1,1"])
@pytest.mark.parametrize("count", [5, 230, 700, 900])  # an epoch of a has about 240 samples
def test_one_prefix(megatron: Any, corpora: dict[str, str], split: str, count: int) -> None:
    weights = tuple(float(part) for part in split.split(","))
    sizes: list[int | None] = [count, 40, 7]
    empty = [low == high for low, high in split_bounds(120, weights)]
    if any(empty):  # Megatron would count epochs of nothing without end
        with pytest.raises(DataError, match=r"gives the (valid|test) part none of its 120 documents"):
            source(sizes, data_path=(corpora["a"],), split=weights).samples(SPLITS[empty.index(True)])
        return
    theirs = build(megatron, sizes, blend=([corpora["a"]], None), split=split)
    ours = source(sizes, data_path=(corpora["a"],), split=weights)
    for name, dataset, size in zip(SPLITS, theirs, sizes, strict=True):
        assert size is not None
        samples = ours.samples(name)
        assert samples.num_samples == len(dataset) >= size
        check_equal(samples, dataset, size)
    with pytest.raises(DataError, match="the length of the run makes the order"):
        samples.sample(samples.num_samples)


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 3.0), (2.0, 1.0, 0.1)])
@pytest.mark.parametrize("count", [100, 1500])
def test_weighted_blend(megatron: Any, corpora: dict[str, str], weights: tuple[float, ...], count: int) -> None:
    paths = [corpora[name] for name in "abc"[: len(weights)]]
    sizes: list[int | None] = [count, 30, 10]
    theirs = build(megatron, sizes, blend=(paths, list(weights)), split="80,10,10")
    words = tuple(word for weight, path in zip(weights, paths, strict=True) for word in (str(weight), path))
    ours = source(sizes, data_path=words, split=(80.0, 10.0, 10.0))
    for name, dataset, size in zip(SPLITS, theirs, sizes, strict=True):
        assert size is not None
        samples = ours.samples(name)
        assert isinstance(samples, BlendedSamples)
        check_equal(samples, dataset, size)
        chosen = Counter(dataset[i]["dataset_id"] for i in range(size))
        assert samples.counts(size) == [chosen[i] for i in range(len(weights))]


@pytest.mark.parametrize("sizes", [[None, None, None], [60, 20, 5]])
def test_prefixes_without_weights(megatron: Any, corpora: dict[str, str], sizes: list[int | None]) -> None:
    paths = [corpora[name] for name in "abc"]
    theirs = build(megatron, sizes, blend=(paths, None), split="80,10,10")
    ours = source(sizes, data_path=tuple(paths), split=(80.0, 10.0, 10.0))
    for name, dataset in zip(SPLITS, theirs, strict=True):
        samples = ours.samples(name)
        assert samples.num_samples == len(dataset)
        check_equal(samples, dataset, len(dataset))


def test_blends_of_each_split(megatron: Any, corpora: dict[str, str]) -> None:
    sizes: list[int | None] = [300, 50, 20]
    per_split = [([corpora["a"], corpora["b"]], [0.5, 0.5]), ([corpora["c"]], None), ([corpora["b"]], [1.0])]
    theirs = build(megatron, sizes, blend_per_split=per_split)
    ours = source(
        sizes,
        train_data_path=("0.5", corpora["a"], "0.5", corpora["b"]),
        valid_data_path=(corpora["c"],),
        test_data_path=("1.0", corpora["b"]),
    )
    for name, dataset, size in zip(SPLITS, theirs, sizes, strict=True):
        assert size is not None
        check_equal(ours.samples(name), dataset, size)


def test_our_own_order_has_megatrons_counts(megatron: Any, corpora: dict[str, str]) -> None:
    """The samples of a number of epochs, the documents of a split and the shares of a blend are Megatron's."""
    theirs = build(megatron, [None, None, None], blend=([corpora["c"]], None), split="80,10,10")
    config = DataConfig(seq_length=SEQ, vocab_size=VOCAB, data_path=(corpora["c"],), split=(80, 10, 10))
    for name, dataset in zip(SPLITS, theirs, strict=True):
        samples = DataSource(config, Path()).samples(name)
        assert samples.num_samples == len(dataset)
        assert samples.num_documents == len(dataset.indices)
        assert samples.num_tokens == int(dataset.dataset.sequence_lengths[dataset.indices].sum())
        for epochs in (1, 2, 5):  # samples that lie within so many epochs
            assert (epochs * samples.num_tokens - 1) // SEQ == len(
                build_epochs(megatron, dataset, samples.num_tokens, epochs)
            )


def build_epochs(megatron: Any, dataset: Any, tokens: int, epochs: int) -> range:
    _, _, helpers = megatron
    documents = np.tile(dataset.indices, epochs).astype(np.int32)
    lengths = np.array(dataset.dataset.sequence_lengths)
    return range(len(helpers.build_sample_idx(lengths, documents, SEQ, epochs, tokens)) - 1)


@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], [1 / 3] * 3, [0.1] * 10, [0.5, 0.25, 0.2, 0.05]])
def test_dealing_is_megatrons(megatron: Any, weights: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, helpers = megatron
    monkeypatch.setattr("runtime.data.dealing._BLOCK", 64)
    size, total = 1000, sum(weights)
    shares = [float(w) for w in np.array(weights) / total]
    sources, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(sources, samples, shares, len(weights), size, False)
    order = BlendOrder(shares)
    assert [order[i] for i in range(size)] == list(zip(sources.tolist(), samples.tolist(), strict=True))
    assert [BlendOrder(shares)[i] for i in (999, 3, 500)] == [order[i] for i in (999, 3, 500)]
    for count in (0, 1, 64, 999):
        assert order.counts(count) == np.bincount(sources[:count], minlength=len(weights)).tolist()


def test_dealing_exhaustively_is_megatrons(megatron: Any) -> None:
    _, _, helpers = megatron
    sizes = [7, 100, 1, 33]
    sources, samples = np.zeros(141, np.int16), np.zeros(141, np.int64)
    helpers.build_exhaustive_blending_indices(sources, samples, np.array(sizes), len(sizes))
    ours = deal_exhaustively(sizes)
    assert ours[0].tolist() == sources.tolist()
    assert ours[1].tolist() == samples.tolist()


@pytest.mark.parametrize("flags", ["p", "a", "l", "pal", "pl"])
def test_positions_documents_and_loss_are_megatrons(megatron: Any, corpora: dict[str, str], flags: str) -> None:
    settings = {"reset_position_ids": "p" in flags, "reset_attention_mask": "a" in flags, "eod_mask_loss": "l" in flags}
    [theirs, _, _] = build(megatron, [40, 10, 10], blend=([corpora["a"]], None), split="80,10,10", **settings)
    ours = source([40, 10, 10], data_path=(corpora["a"],), split=(80.0, 10.0, 10.0), eod_token_id=EOD, **settings)
    loader = Loader(samples=ours.samples("train"), micro_batch_size=4, dp_rank=0, dp_size=1, eod=ours.eod(), **settings)
    for number, batch in enumerate(loader.global_batch(0, 40)):
        for row in range(4):
            found = theirs[4 * number + row]
            assert batch.tokens[row].tolist() == found["tokens"].tolist()
            counted = batch.labels[row] != -100
            assert counted.tolist() == (found["loss_mask"] == 1).tolist()
            assert torch.equal(batch.labels[row][counted], found["labels"][counted])
            if batch.position_ids is not None:
                assert batch.position_ids[row].tolist() == found["position_ids"].tolist()
            if batch.document_ids is not None:
                same = batch.document_ids[row][:, None] == batch.document_ids[row][None, :]
                allowed = same & torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
                assert torch.equal(~allowed, found["attention_mask"][0])
    assert (batch.position_ids is not None, batch.document_ids is not None) == ("p" in flags, "a" in flags)


def test_what_megatrons_order_needs(corpora: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="needs the length of the run"):
        source([None, None, None], data_path=("1", corpora["a"], "3", corpora["b"]), split=(80, 10, 10)).samples(
            "train"
        )
    with pytest.raises(DataError, match="give weights, or take --data-order epochs"):
        source([9999, None, None], data_path=(corpora["a"], corpora["b"]), split=(80, 10, 10)).samples("train")
