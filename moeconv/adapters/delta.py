"""What an adapter does to weights: adds a product of two small matrices, in fp32, or replaces them; as steps of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeconv.dtypes import Bytes, numpy_dtype
from moeconv.errors import MappingError
from moeconv.plan import RowOp

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Delta:
    """scale * B A, for a weight [out, in], or its transpose for one that is stored as [in, out]."""

    key: str
    """What it is called in the adapter's file."""
    a: Callable[[], Array]
    """Reads A, [rank, in]."""
    b: Callable[[], Array]
    """Reads B, [out, rank]."""
    scale: float
    transposed: bool

    def rows(self, first: int, last: int, dtype: Any) -> Array:
        """Compute rows of what is added.

        Args:
            first: the first row of the weight as it is stored.
            last: past the last.
            dtype: to compute in.

        Returns:
            [last - first, columns of the weight].
        """
        a, b = self.a().astype(dtype, copy=False), self.b().astype(dtype, copy=False)
        product = a[:, first:last].T @ b.T if self.transposed else b[first:last] @ a
        product *= dtype(self.scale)
        return np.asarray(product)


def wide(dtype: str) -> Any:
    """Give the numpy type that a stored type is added in: fp32, fp64 for F64."""
    return np.float64 if dtype == "F64" else np.float32


@dataclass(frozen=True, slots=True, eq=False)
class AddDelta:
    """Adds to rows on their way, with one rounding."""

    name: str
    dtype: str
    delta: Delta

    def __call__(self, rows: Bytes, first: int) -> Bytes:
        """Work on the rows from number `first` on.

        Raises:
            MappingError: a sum is not finite.
        """
        kind = numpy_dtype(self.dtype)
        values = rows.view(kind).astype(wide(self.dtype))
        values += self.delta.rows(first, first + len(rows), values.dtype.type)
        out = values.astype(kind)
        if not np.isfinite(out.astype(np.float32)).all():
            raise MappingError(
                f"{self.name}: with {self.delta.key} added it holds NaN or infinity as {self.dtype}; the adapter is broken"
            )
        return np.ascontiguousarray(out).view(np.uint8).reshape(rows.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Replace:
    """Takes rows from the adapter, which has the weight whole."""

    dtype: str
    values: Callable[[], Array]

    def __call__(self, rows: Bytes, first: int) -> Bytes:
        """Give the rows from number `first` on."""
        values = self.values()
        values = values.reshape(values.shape[0] if values.ndim else 1, -1)[first : first + len(rows)]
        return np.ascontiguousarray(values.astype(numpy_dtype(self.dtype))).view(np.uint8).reshape(rows.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Then:
    """One step after another, such as a sum after the cast of a quantised weight."""

    first: RowOp
    second: RowOp

    def __call__(self, rows: Bytes, first: int) -> Bytes:
        """Work on the rows from number `first` on."""
        return self.second(self.first(rows, first), first)
