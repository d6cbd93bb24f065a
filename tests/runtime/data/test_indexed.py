"""Token files against Megatron-Core's own reader and writer, byte for byte, and malformed ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.data.errors import DataError
from runtime.data.indexed import open_tokens, token_dtype
from tests.runtime.data.files import write_tokens

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_the_bytes_are_those_of_megatrons_builder(tmp_path: Path, megatron: Any, dtype: type) -> None:
    assert write_tokens(tmp_path / "ours.bin", DOCUMENTS, np.dtype(dtype)) == 8
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [list(dataset[i]) for i in range(len(dataset))] == DOCUMENTS
    assert list(dataset.document_indices) == [0, 1, 2, 3]


def test_an_index_in_many_chunks_has_the_same_bytes(tmp_path: Path, megatron: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("runtime.data.indexed._CHUNK", 2)
    documents = [[n] * (1 + n % 3) for n in range(9)]
    write_tokens(tmp_path / "ours.bin", documents, np.dtype(np.uint16))
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_the_type_of_ids_is_megatrons(megatron: Any) -> None:
    for size in (100, 65499, 65500, 65536, 128_256):
        assert token_dtype(size) == np.dtype(megatron.DType.optimal_dtype(size))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_what_megatron_writes(tmp_path: Path, megatron: Any, dtype: type) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for sentences in ([[1, 2], [3]], [], [[4, 5, 6]]):
        for sentence in sentences:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    file = open_tokens(tmp_path / "a.bin")
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert file.document_ends.tolist() == [3, 6]
    assert file.sequence_ends is not None
    assert file.sequence_ends.tolist() == [2, 3, 6]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_bare_ids_have_the_type_that_is_stated(tmp_path: Path, dtype: str) -> None:
    np.arange(7, dtype=dtype).tofile(tmp_path / "a.bin")
    file = open_tokens(tmp_path / "a.bin", dtype)
    assert file.tokens.tolist() == list(range(7))
    assert file.document_ends.tolist() == [7]
    with pytest.raises(DataError, match="say their type with --bare-dtype"):
        open_tokens(tmp_path / "a.bin")


def _offsets(folder: Path) -> None:
    raw = bytearray((folder / "a.idx").read_bytes())
    raw[34 + 3 * 4 + 8] ^= 1  # the second sequence's byte offset
    (folder / "a.idx").write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").write_bytes(b""), "empty"),
        (lambda folder: (folder / "a.bin").write_bytes(b"xy"), "describes 8 tokens"),
        (lambda folder: (folder / "a.idx").write_bytes(b""), "not an index"),
        (lambda folder: (folder / "a.idx").write_bytes(b"MMIDIDX\0\0"), "not an index"),
        (lambda folder: (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes()[:-9]), "truncated"),
        (lambda folder: (folder / "a.bin").unlink(), "no such file"),
        (_offsets, "byte offsets"),
    ],
)
def test_malformed(tmp_path: Path, damage: Any, message: str) -> None:
    write_tokens(tmp_path / "a.bin", DOCUMENTS, np.dtype(np.uint16))
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_tokens(tmp_path / "a.bin")


def test_what_doesnt_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"xyz")
    with pytest.raises(DataError, match="no whole number of uint16 ids"):
        open_tokens(tmp_path / "a.bin", "uint16")
    with pytest.raises(DataError, match="token id 65536 doesn't fit uint16"):
        write_tokens(tmp_path / "b.bin", [[65536]], np.dtype(np.uint16))
