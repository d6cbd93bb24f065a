"""One table of element types: their safetensors name, size and numpy type."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from moeconv.errors import SourceError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
"""Elements as they are stored."""


@dataclass(frozen=True, slots=True)
class DType:
    """An element type: its safetensors name, its size in bytes, and the name of its numpy type."""

    name: str
    itemsize: int
    numpy_name: str


# Source: https://github.com/huggingface/safetensors/blob/24b0b28/safetensors/src/tensor.rs (enum Dtype). Types of less than
# a byte (F4, F6) are left out: no supported family stores them.
_TABLE = {
    d.name: d
    for d in (
        DType("BOOL", 1, "bool"),
        DType("U8", 1, "uint8"),
        DType("I8", 1, "int8"),
        DType("F8_E4M3", 1, "float8_e4m3fn"),
        DType("F8_E5M2", 1, "float8_e5m2"),
        DType("F8_E8M0", 1, "float8_e8m0fnu"),
        DType("U16", 2, "uint16"),
        DType("I16", 2, "int16"),
        DType("F16", 2, "float16"),
        DType("BF16", 2, "bfloat16"),
        DType("U32", 4, "uint32"),
        DType("I32", 4, "int32"),
        DType("F32", 4, "float32"),
        DType("U64", 8, "uint64"),
        DType("I64", 8, "int64"),
        DType("F64", 8, "float64"),
    )
}


def dtype(name: str) -> DType:
    """Look up an element type.

    Args:
        name: the safetensors name, such as `BF16`.

    Returns:
        Its row of the table.

    Raises:
        SourceError: no such type is known.
    """
    try:
        return _TABLE[name]
    except KeyError:
        raise SourceError(f"unknown dtype {name[:40]!r}; known are {', '.join(_TABLE)}") from None


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Give the numpy type of a safetensors dtype, from ml_dtypes where numpy has none.

    Args:
        name: the safetensors name, such as `BF16`.

    Returns:
        A numpy dtype of the same size in bytes.

    Raises:
        SourceError: no such type is known.
    """
    numpy_name = dtype(name).numpy_name
    if numpy_name == "bfloat16" or numpy_name.startswith("float8"):
        import ml_dtypes  # here, since most commands move bytes and never need it

        numpy_type: np.dtype[Any] = np.dtype(getattr(ml_dtypes, numpy_name))
        return numpy_type
    return np.dtype(numpy_name)
