"""Copying pieces into files: destination by destination, in bands of bounded size, several at a time.

Every destination piece is a contiguous block, so a record of a file is filled front to back and its CRC-32 is computed
on the way. Sources are mapped, and their pages given back after use: memory does not grow with the checkpoint.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.dtypes import dtype
from moeconv.errors import IntegrityError, SourceError, WriteError
from moeconv.execute import check_sum
from moeconv.io.checksum import new
from moeconv.io.torch_archive import row_major
from moeconv.layout.rect import Rect
from moeconv.megatron.files import MegatronFile
from moeconv.pieces import Piece

Array = np.ndarray[Any, Any]
BAND_BYTES = 1 << 20  # a band stays in a core's cache while it is read, summed and written
_KEEP_BYTES = 64 << 20


class Source:
    """Reads rectangles of a checkpoint's tensors from the files that hold them."""

    def __init__(
        self, root: Path, pieces: Iterable[Piece], checksums: Mapping[tuple[str, str], str] | None = None
    ) -> None:
        """Index the pieces; files are opened when they are first read.

        Args:
            root: the folder that the pieces' files are in.
            pieces: where each tensor is, each element once.
            checksums: recorded checksums by file and tensor, compared before a tensor is first used.
        """
        self._checksums = checksums or {}
        self._checked: dict[str, threading.Lock | None] = {}
        self.root = root
        self.pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self.pieces.setdefault(piece.tensor, []).append(piece)
        self._maps: dict[str, mmap.mmap] = {}
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()
        self._touched = 0

    def dtypes(self) -> dict[str, str]:
        """Give the safetensors dtype of each tensor."""
        return {name: pieces[0].dtype for name, pieces in self.pieces.items()}

    def files(self) -> list[str]:
        """List the files that hold the pieces."""
        return sorted({piece.file for pieces in self.pieces.values() for piece in pieces})

    def read(self, name: str, rect: Rect, out: Array) -> None:
        """Copy a rectangle of a tensor.

        Args:
            name: the tensor.
            rect: the rectangle.
            out: where to put it: unsigned integers of the tensor's element size, of the rectangle's shape.

        Raises:
            SourceError: a file can't be read, or is shorter than it was.
        """
        filled = 0
        self._check(name)
        for piece in self.pieces[name]:
            part = piece.rect.intersect(rect)
            if part is not None:
                self._copy(piece, part.within(piece.rect), out[part.within(rect).slices()])
                filled += part.size
        assert filled == rect.size, f"{name} {rect}: {filled} of {rect.size} elements have a source"

    def _copy(self, piece: Piece, part: Rect, out: Array) -> None:
        """Copy a part of a piece: by a plain read where both sides are one run of bytes, else through the mapping."""
        if piece.strides is not None or part.shape[1:] != piece.rect.shape[1:] or not out.flags.c_contiguous:
            np.copyto(out, self.view(piece)[part.slices()])
            self.release(out.nbytes)
            return
        row = piece.nbytes // piece.rect.shape[0] if piece.rect.shape else 0
        position = piece.begin + (part.offsets[0] * row if part.offsets else 0)
        data = memoryview(out.reshape(-1).view(np.uint8).data)
        while data:
            got = os.preadv(self._open(piece.file), [data], position)
            if got == 0:
                raise SourceError(f"{self.root / piece.file}: ends inside {piece.tensor}; the file was truncated")
            data, position = data[got:], position + got

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(self.root / file, os.O_RDONLY)
                except OSError as error:
                    raise SourceError(f"{self.root / file}: can't be read: {error.strerror}") from None
            return self._fds[file]

    def __del__(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def _check(self, name: str) -> None:
        """Compare a tensor's pieces with their checksums, once; other threads that want it wait.

        Raises:
            IntegrityError: the bytes were changed.
        """
        with self._lock:
            lock = self._checked.setdefault(name, threading.Lock())
        if lock is None:
            return
        with lock:
            if self._checked[name] is None:
                return
            for piece in self.pieces[name]:
                if (piece.file, piece.tensor) not in self._checksums:
                    continue
                hasher, rows = new(), self.view(piece).reshape(-1).view(np.uint8)
                for begin in range(0, rows.size, BAND_BYTES):
                    hasher.update(rows[begin : begin + BAND_BYTES])
                check_sum(self.root, piece, self._checksums, hasher)
                self.release(piece.nbytes)
            self._checked[name] = None

    def view(self, piece: Piece) -> Array:
        """Map a piece as an array of unsigned integers of its element size; nothing is read until it is used."""
        strides = piece.strides or row_major(piece.rect.shape)
        size = dtype(piece.dtype).itemsize
        last = sum((n - 1) * s for n, s in zip(piece.rect.shape, strides, strict=True))
        mapped = self._map(piece.file)
        if piece.begin + (last + 1) * size > len(mapped):
            raise SourceError(f"{self.root / piece.file}: is shorter than its header says; it was truncated")
        shape, steps = piece.rect.shape, [s * size for s in strides]
        return np.ndarray(shape, np.dtype(f"u{size}"), buffer=mapped, offset=piece.begin, strides=steps)

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                try:
                    with open(self.root / file, "rb") as raw:
                        self._maps[file] = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise SourceError(f"{self.root / file}: can't be read: {error}") from None
            return self._maps[file]

    def release(self, nbytes: int) -> None:
        """Give mapped pages back to the kernel's cache now and then, which keeps them."""
        with self._lock:
            self._touched += nbytes
            if self._touched < _KEEP_BYTES:
                return
            self._touched = 0
            maps = list(self._maps.values())
        for mapped in maps:
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(slots=True)
class Job:
    """A contiguous run of destination pieces of one file, filled front to back: a record of an archive, or a tensor."""

    pieces: list[Piece]
    crc_at: tuple[int, ...] = ()
    nbytes: int = field(default=0)


def jobs_of(file: MegatronFile) -> list[Job]:
    """Group a file's pieces by the records that hold them.

    Args:
        file: the file, with pieces that cover each record exactly.

    Returns:
        One job a record; pieces outside records (safetensors) are jobs of their own.
    """
    records = sorted(file.records, key=lambda r: r.begin)
    pieces = sorted(file.pieces, key=lambda p: p.begin)
    jobs, index = [], 0
    for record in records:
        job, position = Job([], record.crc_at), record.begin
        while position < record.begin + record.size:
            piece = pieces[index]
            assert (piece.begin, piece.strides) == (position, None), f"{file.name}: a gap before {piece.tensor}"
            job.pieces.append(piece)
            position, index = position + piece.nbytes, index + 1
        jobs.append(job)
    jobs += [Job([piece]) for piece in pieces[index:]]
    for job in jobs:
        job.nbytes = sum(piece.nbytes for piece in job.pieces)
    return jobs


def bands(rect: Rect, itemsize: int, limit: int = BAND_BYTES) -> Iterator[Rect]:
    """Cut a rectangle into blocks that are contiguous in its own row-major order and of bounded size.

    Args:
        rect: the rectangle.
        itemsize: bytes of an element.
        limit: bytes of a block, at most, unless a single element is larger.

    Yields:
        The blocks in order.
    """
    if rect.size * itemsize <= limit or not rect.shape:
        yield rect
        return
    dim = next(d for d, n in enumerate(rect.shape) if n > 1)
    inner = rect.size // rect.shape[dim] * itemsize
    step = max(1, limit // inner)
    for begin in range(0, rect.shape[dim], step):
        offsets, shape = list(rect.offsets), list(rect.shape)
        offsets[dim] += begin
        shape[dim] = min(step, rect.shape[dim] - begin)
        yield from bands(Rect(tuple(offsets), tuple(shape)), itemsize, limit)


class Buffers(threading.local):
    """A buffer for each thread, used again and again."""

    def __init__(self) -> None:
        self.bytes = np.empty(BAND_BYTES, np.uint8)


def run_job(job: Job, source: Source, fd: int, buffers: Buffers, done: Callable[[int], None]) -> None:
    """Fill a job's part of a file.

    Args:
        job: the job.
        source: where the tensors come from.
        fd: the file, open for writing.
        buffers: the threads' buffers.
        done: called with the number of bytes after each band.

    Raises:
        SourceError: a source can't be read.
        OSError: the file can't be written.
    """
    crc = 0
    for piece in job.pieces:
        size, position = dtype(piece.dtype).itemsize, piece.begin
        for rect in bands(piece.rect, size):
            nbytes = rect.size * size
            raw = buffers.bytes[:nbytes]
            source.read(piece.tensor, rect, raw.view(f"u{size}").reshape(rect.shape))
            if job.crc_at:
                crc = zlib.crc32(raw.data, crc)
            write_all(fd, raw, position)
            position += nbytes
            done(nbytes)
    for where in job.crc_at:
        os.pwrite(fd, struct.pack("<I", crc), where)


def write_all(fd: int, data: Any, position: int) -> None:
    """Write a buffer at a position, however many calls it takes."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, position)
        view, position = view[written:], position + written


class FileWriter:
    """Writes files into a folder, each complete, synced and renamed before it counts as done."""

    def __init__(self, folder: Path, source: Source, workers: int, done: Callable[[int], None]) -> None:
        """Prepare to write.

        Args:
            folder: where the files go, by their names.
            source: where the tensors come from.
            workers: threads that copy.
            done: called with the number of bytes copied, from any of them.
        """
        self.folder, self._source, self._done = folder, source, done
        self._buffers = Buffers()
        self._pool = ThreadPoolExecutor(workers)
        self._finisher = ThreadPoolExecutor(1)
        self._finishing: list[Future[None]] = []

    def write(self, file: MegatronFile, finished: Callable[[str], None]) -> None:
        """Write one file; `finished` is called with its name once it is safe on disk.

        Raises:
            SourceError: a source can't be read.
            WriteError: the disk is full or the folder can't be written.
        """
        path = self.folder / file.name
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise WriteError(f"{part}: can't be written: {error.strerror or error}") from None
        try:
            os.ftruncate(fd, file.size)
            for position, data in file.literals:
                write_all(fd, data, position)
            running = [
                self._pool.submit(run_job, job, self._source, fd, self._buffers, self._done) for job in jobs_of(file)
            ]
            self._join(running)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise WriteError(f"{part}: can't be written: {error.strerror or error}") from None
            raise
        self._finishing.append(self._finisher.submit(_finish, fd, part, path, lambda: finished(file.name)))

    def _join(self, running: list[Future[None]]) -> None:
        wait(running, return_when=FIRST_EXCEPTION)
        for future in running:
            future.cancel()
        wait(running)
        for future in running:
            if not future.cancelled():
                future.result()

    def close(self) -> None:
        """Wait until every file is safe on disk.

        Raises:
            WriteError: one could not be synced.
        """
        self._pool.shutdown()
        self._finisher.shutdown()
        for future in self._finishing:
            try:
                future.result()
            except OSError as error:
                raise WriteError(f"{self.folder}: can't be written: {error.strerror or error}") from None

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._pool.shutdown(cancel_futures=True)
            self._finisher.shutdown(cancel_futures=True)


def _finish(fd: int, part: Path, path: Path, finished: Callable[[], None]) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(part, path)
    finished()


def check_replicas(source: Source, replicas: Iterable[tuple[Piece, Piece]]) -> None:
    """Check that copies of a rectangle in other ranks' files hold the same bytes.

    Args:
        source: reads the files.
        replicas: pairs of pieces of the same rectangle.

    Raises:
        IntegrityError: names the tensor and the two files that disagree.
    """
    for first, other in replicas:
        for rect in bands(first.rect, dtype(first.dtype).itemsize):
            where = rect.within(first.rect).slices()
            if not np.array_equal(source.view(first)[where], source.view(other)[where]):
                raise IntegrityError(
                    f"{first.tensor} {first.rect}: {first.file} and {other.file} hold different values; ranks that "
                    "should be alike have diverged, so neither can be taken for the model"
                )
        source.release(first.nbytes)
