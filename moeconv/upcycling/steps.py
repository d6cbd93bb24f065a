"""What is done to a tensor's rows on their way: steps on fp32 bands, each a function of the values and the number of the first row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.dtypes import Bytes
from moeconv.upcycling.draws import Floats, Integers, floats, normal, stored
from moeconv.upcycling.neurons import read_rows, take

Step = Callable[[Floats, int], Floats]


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps one after another between two roundings, as a plan takes them: bytes [rows, bytes a row] in, bytes out."""

    dtype: str
    steps: tuple[Step, ...]

    def __call__(self, rows: Bytes, first: int) -> Bytes:
        """Work on the rows from number `first` on."""
        values = floats(rows, self.dtype)
        for step in self.steps:
            values = step(values, first)
        return stored(values, self.dtype).reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply by a factor."""

    factor: float

    def __call__(self, values: Floats, first: int) -> Floats:
        """Work on the rows from number `first` on."""
        return values * np.float32(self.factor)


@dataclass(frozen=True, slots=True, eq=False)
class AddNoise:
    """Add normal numbers of a standard deviation."""

    seed: int
    name: str
    std: float

    def __call__(self, values: Floats, first: int) -> Floats:
        """Work on the rows from number `first` on."""
        return values + np.float32(self.std) * normal(self.seed, self.name, first, *values.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Redraw:
    """Draw some neurons (rows, or columns with `dim` 1) anew, with the mean and standard deviation of what they replace."""

    seed: int
    name: str
    dim: int
    index: Integers
    moments: Callable[[], tuple[float, float]]

    def __call__(self, values: Floats, first: int) -> Floats:
        """Work on the rows from number `first` on."""
        count, columns = values.shape
        values = values.copy()
        mean, std = (np.float32(v) for v in self.moments()) if len(self.index) else (0, 0)
        if self.dim == 1:
            values[:, self.index] = mean + std * normal(self.seed, self.name, first, count, len(self.index))
            return values
        begin, end = np.searchsorted(self.index, (first, first + count))
        rows = self.index[begin:end] - first
        values[rows] = mean + std * normal(self.seed, self.name, int(begin), int(end - begin), columns)
        return values


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """Take chosen neurons (rows, or columns with `dim` 1) of a stored matrix instead of what was read."""

    source: Checkpoint
    tensor: str
    dim: int
    index: Callable[[], Integers]

    def __call__(self, values: Floats, first: int) -> Floats:
        """Work on the rows from number `first` on."""
        rows = slice(first, first + len(values))
        if self.dim == 0:
            return take(self.source, self.tensor, 0, self.index()[rows])
        return take(self.source, self.tensor, 1, self.index(), rows)


@dataclass(frozen=True, slots=True, eq=False)
class Average:
    """Take the mean with the same tensor of other checkpoints."""

    others: tuple[Checkpoint, ...]
    tensor: str

    def __call__(self, values: Floats, first: int) -> Floats:
        """Work on the rows from number `first` on."""
        total = values.astype(np.float64)
        for other in self.others:
            if len(other.tensors[self.tensor].shape) == 1:
                total += other.read(self.tensor).astype(np.float64)[first : first + len(values), None]
            else:
                total += read_rows(other, self.tensor, first, first + len(values))
        return (total / (1 + len(self.others))).astype(values.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Take rows that are computed as a whole: a router, or zeros."""

    values: Callable[[], Floats]

    def __call__(self, values: Floats, first: int) -> Floats:
        """Work on the rows from number `first` on."""
        return self.values()[first : first + len(values)].reshape(values.shape)
