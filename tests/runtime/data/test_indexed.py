"""Token files against Megatron-Core's own reader and writer, and malformed ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.data.indexed import DataError, open_tokens, write_tokens

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write(tmp_path: Path, megatron: Any, dtype: type) -> None:
    assert write_tokens(tmp_path / "a.bin", DOCUMENTS, np.dtype(dtype)) == 8
    dataset = megatron.IndexedDataset(str(tmp_path / "a"))
    assert [list(dataset[i]) for i in range(len(dataset))] == DOCUMENTS
    assert list(dataset.document_indices) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_what_megatron_writes(tmp_path: Path, megatron: Any, dtype: type) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for sentences in ([[1, 2], [3]], [[4, 5, 6]]):
        for sentence in sentences:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    file = open_tokens(tmp_path / "a.bin", 100)
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert file.document_ends.tolist() == [3, 6]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_bare_ids(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    np.arange(7, dtype=dtype).tofile(tmp_path / "a.bin")
    file = open_tokens(tmp_path / "a.bin", vocab_size)
    assert file.tokens.tolist() == list(range(7))
    assert file.document_ends.tolist() == [7]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").write_bytes(b""), "empty"),
        (lambda folder: (folder / "a.bin").write_bytes(b"xy"), "describes 8 tokens"),
        (lambda folder: (folder / "a.idx").write_bytes(b"MMIDIDX\0\0"), "not an index"),
        (lambda folder: (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes()[:-9]), "truncated"),
        (lambda folder: (folder / "a.bin").unlink(), "no such file"),
    ],
)
def test_malformed(tmp_path: Path, damage: Any, message: str) -> None:
    write_tokens(tmp_path / "a.bin", DOCUMENTS, np.dtype(np.uint16))
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_tokens(tmp_path / "a.bin", 100)


def test_odd_number_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"xyz")
    with pytest.raises(DataError, match="no whole number of uint16 ids"):
        open_tokens(tmp_path / "a.bin", 100)
