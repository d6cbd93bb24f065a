"""Running a plan: each tensor is swept once in bands of rows, so that memory stays bounded and every byte is read and written once.

A band is small enough to stay in a core's cache while it is read, checked, hashed and written. Rows go up, so each source
and each target piece is touched front to back, and its checksum is computed on the way.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.dtypes import dtype
from moeconv.errors import IntegrityError, MoeconvError, SourceError, WriteError
from moeconv.io.checksum import Crc32, checksum, combined_crc32, new
from moeconv.io.manifest import FileRecord, TensorRecord
from moeconv.io.staging import Staging, check_space
from moeconv.io.writeback import start_writeback
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece, TensorInfo
from moeconv.plan import Job, Plan, TargetFile

BAND_BYTES = 1 << 20
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Progress = Callable[[int], None]


@dataclass(slots=True)
class _Strip:
    """A piece as rows of bytes: rows `first` to `last` of the tensor, bytes `left` to `right` of each row, at `begin` in the file."""

    piece: Piece
    fd: int
    first: int
    last: int
    left: int
    right: int
    hasher: Any = None

    @classmethod
    def of(cls, piece: Piece, shape: tuple[int, ...], fd: int) -> _Strip:
        itemsize = dtype(piece.dtype).itemsize
        if not shape:
            return cls(piece, fd, 0, 1, 0, itemsize)
        assert piece.rect.shape[2:] == shape[2:], "pieces split dims 0 and 1 only"
        if len(shape) == 1:
            return cls(piece, fd, piece.rect.offsets[0], piece.rect.ends[0], 0, itemsize)
        unit = itemsize * prod(shape[2:])
        return cls(
            piece,
            fd,
            piece.rect.offsets[0],
            piece.rect.ends[0],
            piece.rect.offsets[1] * unit,
            piece.rect.ends[1] * unit,
        )

    @property
    def width(self) -> int:
        return self.right - self.left

    def position(self, row: int) -> int:
        return self.piece.begin + (row - self.first) * self.width


class Sweep:
    """Reads a tensor band by band from its pieces, whatever their layout."""

    def __init__(self, info: TensorInfo) -> None:
        itemsize = dtype(info.dtype).itemsize
        self.info = info
        self.rows = info.shape[0] if info.shape else 1
        self.row_bytes = itemsize * prod(info.shape[1:])
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

    def read(self, strips: list[_Strip], first: int, last: int, slot: str = "band") -> Bytes:
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
            if piece_strides := strip.piece.strides:
                _gather(strip, piece_strides, begin, end, data)
            else:
                _pread(strip, data, strip.position(begin))
            if strip.hasher is not None:
                strip.hasher.update(data.data)
            if not whole:
                rows[:, strip.left : strip.right] = data
        return out

    def write(self, strips: list[_Strip], first: int, rows: Bytes) -> None:
        """Write a band's rows, which begin at row `first`, to the strips that hold them, and hash them."""
        last = first + len(rows)
        for strip in strips:
            begin, end = max(first, strip.first), min(last, strip.last)
            if begin >= end:
                continue
            data = rows[begin - first : end - first]
            if strip.width != self.row_bytes:
                packed = self.buffer("strip")[: (end - begin) * strip.width].reshape(end - begin, strip.width)
                np.copyto(packed, data[:, strip.left : strip.right])
                data = packed
            if strip.hasher is not None:
                strip.hasher.update(data.data)
            _pwrite(strip, data, strip.position(begin))


_local = threading.local()


def _pread(strip: _Strip, data: Bytes, position: int) -> None:
    view = data.reshape(-1).data
    while view:
        count = os.preadv(strip.fd, [view], position)
        if count == 0:
            raise SourceError(
                f"{strip.piece.file}: ends at byte {position} inside {strip.piece.tensor}; the file was truncated"
            )
        view, position = view[count:], position + count


def _gather(strip: _Strip, strides: tuple[int, ...], begin: int, end: int, out: Bytes) -> None:
    """Read rows of a piece that is not stored row by row (columns of a matrix, a transposed one) into `out`, [rows, bytes a row]."""
    piece, size = strip.piece, dtype(strip.piece.dtype).itemsize
    shape = (end - begin, *piece.rect.shape[1:])
    first = piece.begin + size * (begin - strip.first) * strides[0]
    last = first + size * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    if last > os.fstat(strip.fd).st_size:
        raise SourceError(f"{piece.file}: ends inside {piece.tensor}; the file was truncated")
    skip = first % mmap.ALLOCATIONGRANULARITY  # only these rows are mapped, and only while they are copied
    with mmap.mmap(strip.fd, last - first + skip, access=mmap.ACCESS_READ, offset=first - skip) as mapped:
        view = np.ndarray(shape, np.dtype(f"u{size}"), mapped, skip, [s * size for s in strides])
        np.copyto(out.view(view.dtype).reshape(shape), view)
        del view  # the mapping closes only once nothing looks into it


def _pwrite(strip: _Strip, data: Bytes, position: int) -> None:
    view = data.reshape(-1).data
    while view:
        count = os.pwrite(strip.fd, view, position)
        view, position = view[count:], position + count


@contextmanager
def open_strips(
    root: Path, pieces: Any, shape: tuple[int, ...], flags: int = os.O_RDONLY, suffix: str = ""
) -> Iterator[list[_Strip]]:
    """Open the files of pieces.

    Args:
        root: the folder that they are in.
        pieces: the pieces of one tensor.
        shape: the tensor's shape.
        flags: how to open them, as os.open takes it.
        suffix: what the names carry while files are being written.

    Yields:
        A strip for each piece that holds an element.

    Raises:
        SourceError: a file can't be opened.
    """
    with ExitStack() as stack:
        strips, fds = [], {}
        for piece in pieces:
            if piece.file not in fds:
                try:
                    fds[piece.file] = os.open(root / (piece.file + suffix), flags)
                except OSError as error:
                    raise SourceError(f"{root / piece.file}: can't be opened: {error.strerror}") from None
                stack.callback(os.close, fds[piece.file])
            if piece.rect.size:
                strips.append(_Strip.of(piece, shape, fds[piece.file]))
        yield strips


@dataclass
class _Run:
    """A plan under way: what is left of each file, and the checksums so far.

    Files go to the disk on a thread of their own, so that copying never waits for it.
    """

    plan: Plan
    root: Path
    staging: Staging
    checksums: Mapping[tuple[str, str], str]
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    finisher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    finishing: list[Future[None]] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    digests: dict[tuple[str, str, Rect], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Files that store CRC-32s of their own are checked by those.
        self.archives = any(file.records for file in self.plan.files)
        self.empty = (Crc32() if self.archives else new()).hexdigest()

    def job(self, job: Job) -> None:
        """Move one tensor."""
        targets = [piece for piece in job.targets if piece.file in self.left]
        sweep = Sweep(job.info)
        with (
            open_strips(self.root, job.sources, job.info.shape) as sources,
            open_strips(self.staging.folder, targets, job.info.shape, os.O_WRONLY, ".writing") as outs,
        ):
            hashers: dict[Rect, Any] = {}
            for out in outs:  # copies of a rectangle are hashed once
                if out.piece.rect not in hashers:
                    out.hasher = hashers[out.piece.rect] = Crc32() if self.archives else new()
            for source in sources:
                # A rectangle that goes over unchanged is hashed once, on its way out.
                known = source.piece.rect in hashers and not self.archives
                if (source.piece.file, job.info.name) in self.checksums and not known:
                    source.hasher = new()
            for first, last in sweep.bands():
                if self.stop.is_set():
                    return
                rows = sweep.read(sources, first, last)
                if job.op is not None:
                    rows = job.op(rows, first)
                sweep.write(outs, first, rows)
                self.progress(rows.nbytes)
            for out in outs:
                start_writeback(out.fd, out.piece.begin, out.piece.nbytes)
            for source in sources:
                hasher = source.hasher or hashers.get(source.piece.rect)
                check_sum(self.root, source.piece, self.checksums, hasher)
            for piece in targets:
                digest = hashers[piece.rect].hexdigest() if piece.rect.size else self.empty
                self.digests[piece.file, job.info.name, piece.rect] = digest
        with self.lock:
            done = []
            for file in {piece.file for piece in targets}:
                self.left[file] -= 1
                if self.left[file] == 0:
                    done.append(file)
        for file in done:
            self.finish(next(f for f in self.plan.files if f.name == file))

    def finish(self, file: TargetFile) -> None:
        """Have a file completed whose pieces are all written."""
        digests = [self.digests[file.name, piece.tensor, piece.rect] for piece in file.pieces]
        record = {"header": checksum(b"".join(data for _, data in file.literals)), "digests": digests}
        self.finishing.append(self.finisher.submit(self._complete, file, record))

    def _complete(self, file: TargetFile, record: dict[str, Any]) -> None:
        if file.records:
            _write_crcs(self.staging.temporary(file.name), file, record["digests"])
        self.staging.finish(file.name, record)


def check_sum(root: Path, piece: Piece, checksums: Mapping[tuple[str, str], str], hasher: Any) -> None:
    """Compare what was read of a piece with its recorded checksum.

    Raises:
        IntegrityError: they differ.
    """
    expected = checksums.get((piece.file, piece.tensor))
    if expected is not None and hasher is not None and hasher.hexdigest() != expected:
        raise IntegrityError(
            f"{root / piece.file}: {piece.tensor} {piece.rect} has checksum {hasher.hexdigest()}, the manifest says {expected}: "
            "the file was changed or damaged; restore it"
        )


def execute(
    plan: Plan,
    root: Path,
    staging: Staging,
    checksums: Mapping[tuple[str, str], str],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, FileRecord]:
    """Write a plan's files.

    Args:
        plan: what to write.
        root: the folder of the source's files.
        staging: where to write; files that it has already are not written again.
        checksums: recorded checksums of source pieces by file and tensor, compared on the way; may be empty.
        workers: threads; by default one a core, at most 8.
        progress: called with the number of bytes moved, from any thread.

    Returns:
        The record of each file.

    Raises:
        IntegrityError: a source piece differs from its checksum.
        SourceError: a source file can't be read.
        WriteError: the disk is full or the folder can't be written.
    """
    todo = [file for file in plan.files if file.name not in staging.done]
    check_space(staging.folder, sum(file.size for file in todo))
    run = _Run(plan, root, staging, checksums, progress or (lambda _: None))
    run.left = {file.name: len({piece.tensor for piece in file.pieces}) for file in todo}
    try:
        for file in todo:
            _create(staging.temporary(file.name), file)
            if not file.pieces:
                run.finish(file)
        with run.finisher:
            _run_all(run, [job for job in plan.jobs if any(p.file in run.left for p in job.targets)], workers)
        for future in run.finishing:
            future.result()
    except MoeconvError:
        raise
    except OSError as error:
        raise WriteError(
            f"{staging.folder}: can't be written: {error.strerror or error}; free the cause and go on with --resume"
        ) from None
    return {file.name: _record(file, staging.done[file.name], plan) for file in plan.files}


def _run_all(run: _Run, jobs: list[Job], workers: int | None) -> None:
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        futures = [pool.submit(run.job, job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            run.stop.set()  # reached early only by an error or an interrupt
            for future in futures:
                future.cancel()
        failed = [error for future in done if not future.cancelled() and (error := future.exception())]
    if failed:
        raise failed[0]


def _create(path: Path, file: TargetFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        out.truncate(file.size)
        for position, data in file.literals:
            out.seek(position)
            out.write(data)


def _write_crcs(path: Path, file: TargetFile, digests: list[str]) -> None:
    """Store each record's CRC-32, made of those of its pieces."""
    parts = sorted(
        (piece.begin, piece.nbytes, int(digest, 16)) for piece, digest in zip(file.pieces, digests, strict=True)
    )
    index = 0
    with open(path, "r+b") as out:
        for record in sorted(file.records, key=lambda r: r.begin):
            position, held = record.begin, []
            while position < record.begin + record.size:
                begin, nbytes, crc = parts[index]
                assert begin == position, f"{file.name}: a gap before byte {begin}"
                held.append((crc, nbytes))
                position, index = position + nbytes, index + 1
            for where in record.crc_at:
                out.seek(where)
                out.write(struct.pack("<I", combined_crc32(held)))


def _record(file: TargetFile, done: Mapping[str, Any], plan: Plan) -> FileRecord:
    shapes = {job.info.name: job.info for job in plan.jobs}
    tensors = tuple(
        TensorRecord(p.tensor, p.dtype, shapes[p.tensor].shape, p.rect.offsets, p.rect.shape, digest)
        for p, digest in zip(file.pieces, done["digests"], strict=True)
    )
    return FileRecord(file.name, file.size, done["header"], tensors)
