"""Sweeping a tensor in bands of rows: its pieces, in whatever layout, are read and written front to back.

A band is small enough to stay in a core's cache while it is read, hashed and written, so memory stays bounded. Rows go up, so
each piece is touched in the order of its bytes, and its checksum can be computed on the way.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.dtypes import Bytes, dtype
from moeconv.errors import SourceError
from moeconv.io.paths import open_to_read
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece, TensorInfo, common_shape, seen_as

BAND_BYTES = 1 << 20
_KEPT = 16  # files that a thread keeps open


@dataclass(slots=True)
class Strip:
    """A piece as rows of bytes: rows `first` to `last` of the tensor, bytes `left` to `right` of each row, at `begin` in the file.

    Elements that are no range of a row are those at the indices `inner` of the row's elements, in the shape `row`.
    """

    piece: Piece
    fd: int
    first: int
    last: int
    left: int
    right: int
    strides: tuple[int, ...] | None
    shape: tuple[int, ...]
    row: tuple[int, ...] = ()
    inner: tuple[slice, ...] = ()
    hasher: Any = None

    @classmethod
    def of(cls, piece: Piece, shape: tuple[int, ...], fd: int) -> Strip:
        """Describe a piece of a tensor of this shape, in the file that `fd` has open."""
        itemsize = dtype(piece.dtype).itemsize
        if not shape:
            return cls(piece, fd, 0, 1, 0, itemsize, piece.strides, ())
        seen = seen_as(piece, shape)
        rect, strides = seen.rect, seen.strides
        first, last, held = rect.offsets[0], rect.ends[0], rect.shape[1:]
        if len(shape) == 1:
            return cls(piece, fd, first, last, 0, itemsize, strides, held)
        if rect.shape[2:] != shape[2:]:
            return cls(piece, fd, first, last, 0, itemsize * prod(held), strides, held, shape[1:], rect.slices()[1:])
        unit = itemsize * prod(shape[2:])
        return cls(piece, fd, first, last, rect.offsets[1] * unit, rect.ends[1] * unit, strides, held)

    @property
    def width(self) -> int:
        """Bytes of a row of the piece."""
        return self.right - self.left

    def position(self, row: int) -> int:
        """Where a row of the tensor begins in the file, in bytes."""
        return self.piece.begin + (row - self.first) * self.width

    def of_rows(self, rows: Bytes) -> Any:
        """Give the strip's part of rows of the whole tensor, as something to read and to assign."""
        if not self.inner:
            return rows[:, self.left : self.right]
        return rows.view(self._element).reshape(len(rows), *self.row)[(slice(None), *self.inner)]

    def as_part(self, data: Bytes) -> Any:
        """Give the strip's own rows in the form of `of_rows`."""
        return data.view(self._element).reshape(len(data), *self.shape) if self.inner else data

    @property
    def _element(self) -> np.dtype[Any]:
        return np.dtype(f"u{dtype(self.piece.dtype).itemsize}")


class Sweep:
    """Reads a tensor band by band from its pieces, whatever their layout; rows are those of its `shape`, which suits all of the pieces."""

    def __init__(self, info: TensorInfo, *pieces: Iterable[Piece]) -> None:
        itemsize = dtype(info.dtype).itemsize
        self.info = info
        self.shape = common_shape(info.shape, chain(*pieces))
        self.rows = self.shape[0] if self.shape else 1
        self.row_bytes = itemsize * prod(self.shape[1:])
        self.band = max(1, BAND_BYTES // max(self.row_bytes, 1))

    def bands(self) -> Iterator[tuple[int, int]]:
        """Give the row ranges, ascending."""
        for first in range(0, self.rows, self.band):
            yield first, min(first + self.band, self.rows)

    def buffer(self, slot: str) -> Bytes:
        """Give this thread's reusable buffer of a band's size, in bytes."""
        size = self.band * self.row_bytes
        held: Bytes | None = getattr(_local, slot, None)
        if held is None or held.size < size:
            held = np.empty(size, np.uint8)
            setattr(_local, slot, held)
        return held[:size]

    def read(self, strips: list[Strip], first: int, last: int, slot: str = "band") -> Bytes:
        """Read the rows `first` to `last`; hash what strips with a hasher hold.

        Returns:
            An array [rows, row bytes] that the next call with this slot overwrites.
        """
        out = self.buffer(slot)[: (last - first) * self.row_bytes].reshape(last - first, self.row_bytes)
        for strip in strips:
            begin, end = max(first, strip.first), min(last, strip.last)
            if begin >= end:
                continue
            whole = strip.width == self.row_bytes
            rows = out[begin - first : end - first]
            data = (
                rows if whole else self.buffer("strip")[: (end - begin) * strip.width].reshape(end - begin, strip.width)
            )
            if strip.strides:
                _gather(strip, strip.strides, begin, end, data)
            else:
                _pread(strip, data, strip.position(begin))
            if strip.hasher is not None:
                strip.hasher.update(data.data)
            if not whole:
                strip.of_rows(rows)[...] = strip.as_part(data)
        return out

    def write(self, strips: list[Strip], first: int, rows: Bytes) -> None:
        """Write a band's rows, which begin at row `first`, to the strips that hold them, and hash them."""
        last = first + len(rows)
        for strip in strips:
            begin, end = max(first, strip.first), min(last, strip.last)
            if begin >= end:
                continue
            data = rows[begin - first : end - first]
            if strip.width != self.row_bytes:
                packed = self.buffer("strip")[: (end - begin) * strip.width].reshape(end - begin, strip.width)
                np.copyto(strip.as_part(packed), strip.of_rows(data))
                data = packed
            if strip.hasher is not None:
                strip.hasher.update(data.data)
            if strip.strides:
                _scatter(strip, strip.strides, begin, end, data)
            else:
                _pwrite(strip, data, strip.position(begin))


_local = threading.local()


def _pread(strip: Strip, data: Bytes, position: int) -> None:
    view = data.reshape(-1).data
    while view:
        count = os.preadv(strip.fd, [view], position)
        if count == 0:
            raise SourceError(
                f"{strip.piece.file}: ends at byte {position} inside {strip.piece.tensor}; the file was truncated"
            )
        view, position = view[count:], position + count


def _gather(strip: Strip, strides: tuple[int, ...], begin: int, end: int, out: Bytes) -> None:
    """Read rows of a piece that is not stored row by row (columns of a matrix, a transposed one) into `out`, [rows, bytes a row]."""
    _map(strip, strides, begin, end, mmap.ACCESS_READ, lambda v: np.copyto(out.view(v.dtype).reshape(v.shape), v))


def _scatter(strip: Strip, strides: tuple[int, ...], begin: int, end: int, data: Bytes) -> None:
    """Write rows, [rows, bytes a row], to a piece that is not stored row by row."""
    _map(strip, strides, begin, end, mmap.ACCESS_WRITE, lambda v: np.copyto(v, data.view(v.dtype).reshape(v.shape)))


def _map(
    strip: Strip,
    strides: tuple[int, ...],
    begin: int,
    end: int,
    access: int,
    copy: Callable[[np.ndarray[Any, np.dtype[Any]]], None],
) -> None:
    """Map the rows of a piece, and only those and only while they are copied."""
    piece, size = strip.piece, dtype(strip.piece.dtype).itemsize
    shape = (end - begin, *strip.shape)
    first = piece.begin + size * (begin - strip.first) * strides[0]
    last = first + size * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    if last > os.fstat(strip.fd).st_size:
        raise SourceError(f"{piece.file}: ends inside {piece.tensor}; the file was truncated")
    skip = first % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(strip.fd, last - first + skip, access=access, offset=first - skip) as mapped:
        view = np.ndarray(shape, np.dtype(f"u{size}"), mapped, skip, [s * size for s in strides])
        copy(view)
        del view  # the mapping closes only once nothing looks into it


def _pwrite(strip: Strip, data: Bytes, position: int) -> None:
    view = data.reshape(-1).data
    while view:
        count = os.pwrite(strip.fd, view, position)
        view, position = view[count:], position + count


class OpenFiles:
    """A thread's open files of a folder; the last few stay open from tensor to tensor, of which a checkpoint has tens of thousands."""

    def __init__(self, root: Path, open_file: Callable[[str], int] | None = None) -> None:
        """Begin with none open.

        Args:
            root: the folder that the files are in.
            open_file: gives a file descriptor for a name; by default files are opened for reading.
        """
        self._root, self._open = root, open_file
        self._fds: dict[str, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._keep(0)

    def strips(self, pieces: Iterable[Piece], shape: tuple[int, ...]) -> list[Strip]:
        """Open the files of pieces; they stay open at least until the next call.

        Args:
            pieces: the pieces of one tensor.
            shape: the tensor's shape, in which each piece is a rectangle (`Sweep.shape`).

        Returns:
            A strip for each piece that holds an element.

        Raises:
            SourceError: a file can't be opened.
        """
        self._keep(_KEPT)
        opened = [(piece, self._fd(piece.file)) for piece in pieces]
        return [Strip.of(piece, shape, fd) for piece, fd in opened if piece.rect.size]

    def _fd(self, name: str) -> int:
        fd = self._fds.pop(name, None)
        if fd is None:
            try:
                fd = self._open(name) if self._open is not None else open_to_read(self._root / name)
            except OSError as error:
                raise SourceError(f"{self._root / name}: can't be opened: {error.strerror}") from None
        self._fds[name] = fd  # the last one used is the last to be closed
        return fd

    def _keep(self, count: int) -> None:
        for name in list(self._fds)[: max(0, len(self._fds) - count)]:
            os.close(self._fds.pop(name))


@contextmanager
def open_strips(root: Path, pieces: Iterable[Piece], shape: tuple[int, ...]) -> Iterator[list[Strip]]:
    """Open the files of one tensor's pieces for reading; see `OpenFiles.strips`."""
    with OpenFiles(root) as files:
        yield files.strips(pieces, shape)


def stored_digest(fd: int, piece: Piece, hasher: Any, told: Callable[[int], object] = lambda _: None) -> str:
    """Compute the checksum of a piece's bytes in the order of the file, which they fill without a gap.

    Args:
        fd: the open file.
        piece: the piece.
        hasher: a new running checksum.
        told: called with the number of bytes as they are read.

    Returns:
        The checksum.

    Raises:
        SourceError: the file ends early.
    """
    strip, data = Strip(piece, fd, 0, 1, 0, 1, None, ()), np.empty(BAND_BYTES, np.uint8)
    for begin in range(0, piece.nbytes, BAND_BYTES):
        part = data[: min(BAND_BYTES, piece.nbytes - begin)]
        _pread(strip, part, piece.begin + begin)
        hasher.update(part.data)
        told(len(part))
    return str(hasher.hexdigest())


def piece_digest(root: Path, piece: Piece, hasher: Any, told: Callable[[int], object] = lambda _: None) -> str:
    """Compute the checksum of a piece's bytes, in the order of its elements.

    Args:
        root: the folder that its file is in.
        piece: the piece.
        hasher: a new running checksum.
        told: called with the number of bytes as they are read.

    Returns:
        The checksum.

    Raises:
        SourceError: the file can't be read, or ends early.
    """
    # A piece by itself is a tensor: its rows are read front to back.
    alone = Piece(piece.tensor, piece.dtype, Rect.whole(piece.rect.shape), piece.file, piece.begin, piece.strides)
    sweep = Sweep(TensorInfo(piece.tensor, piece.dtype, piece.rect.shape))
    with open_strips(root, [alone], piece.rect.shape) as strips:
        for strip in strips:
            strip.hasher = hasher
        for first, last in sweep.bands() if piece.rect.size else ():
            told(sweep.read(strips, first, last).nbytes)
    return str(hasher.hexdigest())
