"""The neurons of a dense feed-forward part (rows of gate and up, columns of down): read from the file, counted, chosen, dealt out."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.dtypes import dtype
from moeconv.errors import SourceError
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece
from moeconv.upcycling.draws import Floats, Integers, floats, generator

T = TypeVar("T")
_BAND_ROWS = 256
_PROJECTED = 64
_ROUNDS = 10


class Once(Generic[T]):
    """A value that the first thread to ask for it computes, and all others wait for."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._value: T | None = None

    def __call__(self) -> T:
        """Give the value."""
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value


def part(source: Checkpoint, name: str, rect: Rect, target: str) -> Piece:
    """Describe a rectangle of a stored tensor as the whole of another tensor, without touching its bytes.

    Args:
        source: a Hugging Face folder.
        name: the stored tensor.
        rect: the rectangle.
        target: the tensor that is to be made of it.

    Returns:
        The piece; its file is an absolute path.
    """
    (piece,) = source.pieces[name]
    strides = piece.strides or _row_major(piece.rect.shape)
    begin = piece.begin + dtype(piece.dtype).itemsize * sum(o * s for o, s in zip(rect.offsets, strides, strict=True))
    contiguous = piece.strides is None and rect.shape[1:] == piece.rect.shape[1:]
    file = str((source.root / piece.file).absolute())
    return Piece(target, piece.dtype, Rect.whole(rect.shape), file, begin, None if contiguous else strides)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


@contextmanager
def view(source: Checkpoint, name: str) -> Iterator[np.ndarray[Any, Any]]:
    """Look at a stored tensor in its file.

    Args:
        source: a Hugging Face folder.
        name: the tensor.

    Yields:
        The tensor as unsigned integers of its element size; it must not be kept.

    Raises:
        SourceError: the file ends inside it, or can't be read.
    """
    piece = part(source, name, Rect.whole(source.tensors[name].shape), name)
    size, strides = dtype(piece.dtype).itemsize, piece.strides or _row_major(piece.rect.shape)
    length = size * (1 + sum((n - 1) * s for n, s in zip(piece.rect.shape, strides, strict=True)))
    skip = piece.begin % mmap.ALLOCATIONGRANULARITY
    try:
        with (
            open(piece.file, "rb") as file,
            mmap.mmap(file.fileno(), length + skip, access=mmap.ACCESS_READ, offset=piece.begin - skip) as mapped,
        ):
            array = np.ndarray(piece.rect.shape, np.dtype(f"u{size}"), mapped, skip, [s * size for s in strides])
            holder = [array]
            del array
            yield holder.pop()
    except (OSError, ValueError) as error:
        raise SourceError(f"{Path(piece.file)}: can't be read: {error}") from None


def read_rows(source: Checkpoint, name: str, first: int, last: int) -> Floats:
    """Read rows of a stored matrix as fp32 [rows, columns]."""
    return take(source, name, 0, np.arange(first, last))


def take(source: Checkpoint, name: str, dim: int, index: Integers, rows: slice = slice(None)) -> Floats:
    """Read chosen rows, or chosen columns of some rows, of a stored matrix.

    Args:
        source: a Hugging Face folder.
        name: the matrix.
        dim: 0 to choose rows, 1 to choose columns.
        index: their numbers.
        rows: with `dim` 1, the rows to read.

    Returns:
        The elements as fp32.
    """
    with view(source, name) as stored:
        chosen = stored[index] if dim == 0 else stored[rows][:, index]
        values = np.ascontiguousarray(chosen)
        del stored, chosen
    return floats(values.view(np.uint8), source.tensors[name].dtype)


def neuron_sums(source: Checkpoint, name: str, dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sum each neuron's elements and their squares.

    Args:
        source: a Hugging Face folder.
        name: a matrix of the feed-forward part.
        dim: the dimension that counts neurons.

    Returns:
        [2, neurons]: the sums and the sums of squares, in fp64.
    """
    rows, columns = source.tensors[name].shape
    out = np.zeros((2, (rows, columns)[dim]))
    for first in range(0, rows, _BAND_ROWS):
        band = read_rows(source, name, first, min(first + _BAND_ROWS, rows)).astype(np.float64)
        at = slice(first, first + len(band)) if dim == 0 else slice(None)
        out[0, at] += band.sum(1 - dim)
        out[1, at] += np.square(band).sum(1 - dim)
    return out


def mean_row(source: Checkpoint, name: str, index: Integers) -> Floats:
    """Give the mean of chosen rows of a stored matrix, zeros for none, as fp32 [columns]."""
    total = np.zeros(source.tensors[name].shape[1])
    for begin in range(0, len(index), _BAND_ROWS):
        total += take(source, name, 0, index[begin : begin + _BAND_ROWS]).sum(0, dtype=np.float64)
    mean: Floats = (total / max(len(index), 1)).astype(np.float32)
    return mean


def chosen_neurons(seed: int, name: str, count: int, ratio: float) -> Integers:
    """Choose floor(ratio * count) of `count` neurons at random; `name` says for what. Returns their numbers, ascending."""
    order = generator(seed, name).permutation(count)
    return np.sort(order[: int(ratio * count + 1e-9)])


def deal_randomly(seed: int, name: str, count: int, experts: int) -> Integers:
    """Deal neurons out to experts at random. Returns [experts, count / experts], each row ascending."""
    return np.sort(generator(seed, name).permutation(count).reshape(experts, -1), axis=1)


def deal_by_clusters(source: Checkpoint, name: str, experts: int, seed: int) -> Integers:
    """Deal neurons out to experts by the directions of their gate rows: k-means with clusters of equal size.

    Rows are normalised and projected on 64 random directions first, so that a layer fits in little memory.

    Args:
        source: a Hugging Face folder.
        name: the layer's gate matrix [neurons, hidden].
        experts: the number of experts; it divides the neurons.
        seed: of projection and starting centres.

    Returns:
        [experts, neurons / experts], each row ascending.
    """
    count, hidden = source.tensors[name].shape
    size = count // experts
    draw = generator(seed, name + " clusters")
    directions = draw.standard_normal((hidden, min(_PROJECTED, hidden)))
    points = np.empty((count, directions.shape[1]))
    for first in range(0, count, _BAND_ROWS):
        band = read_rows(source, name, first, min(first + _BAND_ROWS, count)).astype(np.float64)
        band /= np.maximum(np.linalg.norm(band, axis=1, keepdims=True), 1e-30)
        points[first : first + len(band)] = band @ directions
    centres = points[draw.permutation(count)[:experts]]
    owner = np.zeros(count, np.int64)
    for _ in range(_ROUNDS):
        distances = np.square(points).sum(1)[:, None] - 2 * points @ centres.T + np.square(centres).sum(1)
        owner = _assign(distances, size)
        centres = np.stack([points[owner == expert].mean(0) for expert in range(experts)])
    return np.stack([np.flatnonzero(owner == expert) for expert in range(experts)])


def _assign(distances: np.ndarray[Any, Any], size: int) -> Integers:
    """Give each neuron its nearest expert that has room, those first whose choice matters most."""
    order = np.argsort(distances, axis=1, kind="stable")
    nearest = np.take_along_axis(distances, order, 1)
    regret = nearest[:, -1] - nearest[:, 0]
    room = np.full(distances.shape[1], size)
    owner = np.empty(len(distances), np.int64)
    for neuron in np.argsort(-regret, kind="stable"):
        expert = next(e for e in order[neuron] if room[e])
        owner[neuron] = expert
        room[expert] -= 1
    return owner
