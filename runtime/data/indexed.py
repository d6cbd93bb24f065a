"""Token files: Megatron's indexed pairs (.bin with .idx) and bare arrays of token ids (.bin)."""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeconv.errors import MoeconvError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/indexed_dataset.py (DType).
_DTYPE_OF_CODE: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in _DTYPE_OF_CODE.items()}


class DataError(MoeconvError):
    """Training data that can't be read, are malformed, or are too few."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """The tokens of one source and where its documents end."""

    path: Path
    tokens: npt.NDArray[np.generic]
    """[N] integers, mapped from the file."""
    document_ends: npt.NDArray[np.int64]
    """[D] rising; document d is tokens[ends[d - 1] : ends[d]]; the last is N."""


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Choose the smallest integer of Megatron's table that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def open_tokens(path: Path, vocab_size: int) -> TokenFile:
    """Map a file of tokens into memory.

    Args:
        path: a .bin file; with an .idx file of the same name beside it, it is Megatron's indexed format, otherwise it
            holds nothing but ids: uint16 for a vocabulary up to 65536, else uint32, and is one document.
        vocab_size: size of the vocabulary.

    Returns:
        The tokens and the documents' ends.

    Raises:
        DataError: a file is missing, empty, truncated, or not in this format.
    """
    index = path.with_suffix(".idx")
    size = path.stat().st_size if path.is_file() else 0
    if size == 0:
        raise DataError(f"{path}: {'empty' if path.is_file() else 'no such file'}; expected a file of token ids")
    if index.is_file():
        return _open_indexed(path, index, size)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: {size} bytes are no whole number of {dtype.name} ids (the vocabulary has {vocab_size} tokens); "
            "write the ids in that type, or put the .idx file beside it"
        )
    tokens = np.memmap(path, dtype=dtype, mode="r")
    return TokenFile(path, tokens, np.array([len(tokens)], np.int64))


def _open_indexed(path: Path, index: Path, size: int) -> TokenFile:
    raw = index.read_bytes()
    head = len(_MAGIC) + 8 + 1 + 8 + 8
    if len(raw) < head or not raw.startswith(_MAGIC):
        raise DataError(f"{index}: not an index of Megatron's indexed format (MMIDIDX)")
    version, code, num_sequences, num_documents = struct.unpack_from("<QBQQ", raw, len(_MAGIC))
    if version != _VERSION or code not in _DTYPE_OF_CODE:
        raise DataError(f"{index}: version {version}, dtype code {code}; expected version 1 and an integer type")
    if len(raw) < head + 12 * num_sequences + 8 * num_documents:
        raise DataError(f"{index}: {len(raw)} bytes are too few for {num_sequences} sequences; the file is truncated")
    dtype = np.dtype(_DTYPE_OF_CODE[code])
    lengths = np.frombuffer(raw, np.int32, num_sequences, head).astype(np.int64)
    documents = np.frombuffer(raw, np.int64, num_documents, head + 12 * num_sequences)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if num_sequences else 0
    if total == 0 or total * dtype.itemsize != size:
        raise DataError(f"{path}: {size} bytes; {index.name} describes {total} tokens of {dtype.itemsize} bytes each")
    if num_documents < 1 or documents.min() < 0 or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise DataError(f"{index}: its document indices don't rise to the number of sequences ({num_sequences})")
    document_ends = ends[documents[documents > 0] - 1]
    return TokenFile(path, np.memmap(path, dtype=dtype, mode="r"), np.unique(document_ends))


def write_tokens(path: Path, documents: Iterable[Sequence[int]], dtype: np.dtype[np.generic]) -> int:
    """Write documents as Megatron's indexed pair; a reader sees the whole pair or nothing.

    Args:
        path: the .bin file; the .idx file goes beside it.
        documents: each document's token ids; empty ones are left out.
        dtype: an integer type of Megatron's table.

    Returns:
        The number of tokens.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/indexed_dataset.py
        (_IndexWriter): magic, version, dtype code, counts, lengths int32, byte offsets int64, document indices int64.
    """
    # Several machines may write to one shared folder at a time: each its own files, the last rename wins.
    partial = [path.with_suffix(f".{secrets.token_hex(8)}.partial") for _ in ("bin", "idx")]
    lengths: list[int] = []
    with open(partial[0], "wb") as data:
        for document in documents:
            if len(document):
                data.write(np.asarray(document).astype(dtype).tobytes())
                lengths.append(len(document))
    with open(partial[1], "wb") as index:
        count = len(lengths)
        index.write(_MAGIC + struct.pack("<QBQQ", _VERSION, _CODE_OF_DTYPE[dtype], count, count + 1))
        sizes = np.array(lengths, np.int64)
        index.write(sizes.astype(np.int32).tobytes())
        index.write(((np.cumsum(sizes) - sizes) * dtype.itemsize).tobytes())
        index.write(np.arange(count + 1, dtype=np.int64).tobytes())
    # Without its index a .bin file would pass for one bare document, so the index must be there first.
    os.replace(partial[1], path.with_suffix(".idx"))
    os.replace(partial[0], path)
    return sum(lengths)
