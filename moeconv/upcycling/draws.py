"""Random numbers that depend on a seed, a name and a row, never on the order of work: Philox, keyed by name and counted by rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from moeconv.dtypes import Bytes, numpy_dtype

Floats = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.int64]]
# Rows that share a counter. Part of what a seed means: another number gives other values.
_BLOCK_ROWS = 32


def generator(seed: int, name: str, block: int = 0) -> np.random.Generator:
    """Make the generator of one thing that is drawn.

    Args:
        seed: the run's seed.
        name: what is drawn; a tensor's name, with a word more where a tensor needs several.
        block: the number of the block of rows.

    Returns:
        A generator that shares no number with those of other names or blocks.
    """
    digest = xxhash.xxh3_128_intdigest(f"{seed}\0{name}".encode())
    key = [digest >> 64, digest & (2**64 - 1)]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, 0, block]))


def normal(seed: int, name: str, first: int, count: int, columns: int) -> Floats:
    """Draw rows of a matrix of standard normal numbers.

    Args:
        seed: the run's seed.
        name: what is drawn, as for `generator`.
        first: the first row.
        count: the number of rows.
        columns: the matrix's columns; the same for all its rows.

    Returns:
        The rows [count, columns], the same whatever other rows are drawn with them.
    """
    out = np.empty((count, columns), np.float32)
    row = first
    while row < first + count:
        block, skip = divmod(row, _BLOCK_ROWS)
        end = min((block + 1) * _BLOCK_ROWS, first + count)
        drawn = generator(seed, name, block).standard_normal((skip + end - row, columns), np.float32)
        out[row - first : end - first] = drawn[skip:]
        row = end
    return out


def floats(rows: Bytes, dtype: str) -> Floats:
    """Read stored elements as fp32 (a copy, except of F32).

    Args:
        rows: bytes [rows, bytes a row].
        dtype: their safetensors dtype.

    Returns:
        The elements [rows, columns].
    """
    return rows.view(numpy_dtype(dtype)).astype(np.float32, copy=False)


def stored(values: Floats, dtype: str) -> Bytes:
    """Round fp32 elements to a stored type: to nearest, ties to even.

    Args:
        values: [rows, columns].
        dtype: a safetensors dtype.

    Returns:
        Their bytes [rows, bytes a row].
    """
    return np.ascontiguousarray(values.astype(numpy_dtype(dtype), copy=False)).view(np.uint8)
