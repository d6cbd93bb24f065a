"""Token files: Megatron's indexed pairs (.bin with .idx), read and written, and bare arrays of token ids (.bin).

Source:
    https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/indexed_dataset.py
    (_IndexWriter, DType): magic, version, dtype code, counts, sequence lengths int32, byte offsets int64, and the index
    of each document's first sequence and of the end, int64.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.data.config import BARE_DTYPES
from runtime.data.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEAD = struct.Struct("<QBQQ")
_DTYPE_OF_CODE: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in _DTYPE_OF_CODE.items()}
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenFile:
    """The tokens of one file, and where its sequences and documents end."""

    path: Path
    tokens: npt.NDArray[np.generic]
    """[N] integers, mapped from the file."""
    document_ends: npt.NDArray[np.int64]
    """[D] rising; document d is tokens[ends[d - 1] : ends[d]]; the last is N."""
    sequence_ends: npt.NDArray[np.int64] | None = None
    """[Q] not falling: Megatron's sequences, which it shuffles and splits by; None: they are the documents."""


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Choose the type of ids as Megatron's preprocessing does.

    Args:
        vocab_size: size of the vocabulary.

    Returns:
        uint16 below 65500, else int32.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/indexed_dataset.py (optimal_dtype)
    """
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def open_tokens(path: Path, bare_dtype: str | None = None) -> TokenFile:
    """Map a file of tokens into memory.

    Args:
        path: a .bin file; with an .idx file of the same name beside it, it is Megatron's indexed format, otherwise it
            holds nothing but ids and is one document.
        bare_dtype: type of bare ids, such as uint16.

    Returns:
        The tokens and the documents' ends.

    Raises:
        DataError: a file is missing, empty, truncated, or not in this format, or the type of bare ids isn't stated.
    """
    index = path.with_suffix(".idx")
    size = path.stat().st_size if path.is_file() else 0
    if size == 0:
        raise DataError(f"{path}: {'empty' if path.is_file() else 'no such file'}; expected a file of token ids")
    if index.is_file():
        return _open_indexed(path, index, size)
    if bare_dtype is None:
        raise DataError(
            f"{path}: bare token ids (there is no {index.name} beside it); say their type with --bare-dtype "
            f"({', '.join(BARE_DTYPES)}), or put the .idx file beside it"
        )
    dtype = np.dtype(bare_dtype)
    if size % dtype.itemsize:
        raise DataError(f"{path}: {size} bytes are no whole number of {dtype.name} ids; is --bare-dtype right?")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    return TokenFile(path, tokens, np.array([len(tokens)], np.int64))


def _open_indexed(path: Path, index: Path, size: int) -> TokenFile:
    raw = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.zeros(0, np.uint8)
    head = len(_MAGIC) + _HEAD.size
    if len(raw) < head or not bytes(raw[: len(_MAGIC)]) == _MAGIC:
        raise DataError(f"{index}: not an index of Megatron's indexed format (MMIDIDX)")
    version, code, num_sequences, num_documents = _HEAD.unpack(bytes(raw[len(_MAGIC) : head]))
    if version != _VERSION or code not in _DTYPE_OF_CODE:
        raise DataError(f"{index}: version {version}, dtype code {code}; expected version 1 and an integer type")
    if len(raw) < head + 12 * num_sequences + 8 * num_documents:
        raise DataError(f"{index}: {len(raw)} bytes are too few for {num_sequences} sequences; the file is truncated")
    dtype = np.dtype(_DTYPE_OF_CODE[code])
    lengths = np.frombuffer(raw, np.int32, num_sequences, head)
    pointers = np.frombuffer(raw, np.int64, num_sequences, head + 4 * num_sequences)
    documents = np.frombuffer(raw, np.int64, num_documents, head + 12 * num_sequences)
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if num_sequences else 0
    if total == 0 or total * dtype.itemsize != size or lengths.min() < 0:
        raise DataError(f"{path}: {size} bytes; {index.name} describes {total} tokens of {dtype.itemsize} bytes each")
    if not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
        raise DataError(f"{index}: its byte offsets are not those of sequences laid end to end; write the pair anew")
    if num_documents < 1 or documents.min() < 0 or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise DataError(f"{index}: its document indices don't rise to the number of sequences ({num_sequences})")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if lengths.min() > 0 and np.array_equal(documents, np.arange(num_sequences + 1)):
        return TokenFile(path, tokens, ends)
    document_ends = ends[documents[documents > 0] - 1]
    keep = np.diff(document_ends, prepend=0) > 0  # an empty document ends where the one before does
    return TokenFile(path, tokens, document_ends[keep], ends)


def write_index(path: Path, lengths: npt.NDArray[np.integer], dtype: np.dtype[np.generic]) -> None:
    """Write the .idx file of documents of one sequence each, in memory that doesn't grow with their number.

    Args:
        path: the file.
        lengths: [D] tokens of each document, below 2^31.
        dtype: type of the ids in the .bin file.
    """
    count = len(lengths)
    chunks = range(0, count, _CHUNK)
    with open(path, "wb") as index:
        index.write(_MAGIC + _HEAD.pack(_VERSION, _CODE_OF_DTYPE[dtype], count, count + 1))
        for begin in chunks:
            index.write(np.asarray(lengths[begin : begin + _CHUNK], np.int32).tobytes())
        offset = 0
        for begin in chunks:
            sizes = np.asarray(lengths[begin : begin + _CHUNK], np.int64) * dtype.itemsize
            ends = np.cumsum(sizes) + offset
            index.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        for begin in range(0, count + 1, _CHUNK):
            index.write(np.arange(begin, min(begin + _CHUNK, count + 1), dtype=np.int64).tobytes())


def narrow(ids: npt.NDArray[np.integer], dtype: np.dtype[np.generic], where: Path) -> npt.NDArray[np.generic]:
    """Give ids their type on disk.

    Args:
        ids: [N] integers.
        dtype: the type.
        where: the file, for the message.

    Returns:
        [N] the same numbers.

    Raises:
        DataError: an id doesn't fit.
    """
    limits = np.iinfo(dtype)  # type: ignore[type-var]
    if ids.size and not limits.min <= ids.min() <= ids.max() <= limits.max:
        raise DataError(f"{where}: token id {ids.max()} doesn't fit {dtype.name}")
    return ids.astype(dtype)


def publish(data: Path, index: Path, path: Path) -> None:
    """Give a finished pair its name: without its index a .bin file would pass for bare ids, so the index goes first.

    Args:
        data: the ids.
        index: the index.
        path: the .bin file that they become; .idx beside it.
    """
    os.replace(index, path.with_suffix(".idx"))
    os.replace(data, path)
