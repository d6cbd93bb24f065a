"""Running a plan: each tensor is swept once, so that every byte is read and written once, and files complete one after another."""

from __future__ import annotations

import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from moeconv.errors import MoeconvError, SourceError, WriteError
from moeconv.io.checksum import Crc32, checksum, combined_crc32, new
from moeconv.io.decode import Digest, typed
from moeconv.io.manifest import FileRecord, TensorRecord
from moeconv.io.paths import open_regular
from moeconv.io.staging import Staging, check_space
from moeconv.io.writeback import start_writeback
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece
from moeconv.plan import Job, Plan, TargetFile
from moeconv.reading import check_sum
from moeconv.sweep import OpenFiles, Sweep, piece_digest, stored_digest

Progress = Callable[[int], None]


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
        self.archives = _archives(self.plan)
        self.empty = (Crc32() if self.archives else new()).hexdigest()

    def job(self, job: Job, read: OpenFiles, written: OpenFiles) -> None:
        """Move one tensor, or several that are the same bytes, between files of the source and files of the target."""
        targets = [piece for piece in job.targets if piece.file in self.left]
        sweep = Sweep(job.info, job.sources, targets)
        sources, outs = read.strips(job.sources, sweep.shape), written.strips(targets, sweep.shape)
        hashers: dict[Rect, Any] = {}
        for out in outs:
            # Copies of a rectangle are hashed once; a record's bytes that are no rows of it, when they are written.
            if out.piece.rect not in hashers and not (self.archives and out.strides):
                out.hasher = hashers[out.piece.rect] = Crc32() if self.archives else new()
        for source in sources:
            # A rectangle that goes over unchanged is hashed once, on its way out.
            known = source.piece.rect in hashers and not self.archives and job.op is None
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
        for out in outs if self.staging.sync else ():
            start_writeback(out.fd, out.piece.begin, out.piece.nbytes)
        for source in sources:
            hasher = source.hasher or (hashers.get(source.piece.rect) if job.op is None else None)
            check_sum(self.root, source.piece, self.checksums, hasher and hasher.hexdigest())
        for piece in targets:
            if not piece.rect.size:
                self.digests[piece.file, piece.tensor, piece.rect] = self.empty
        for out in outs:
            of_rows = hashers.get(out.piece.rect) if not (self.archives and out.strides) else None
            digest = of_rows.hexdigest() if of_rows else stored_digest(out.fd, out.piece, Crc32())
            self.digests[out.piece.file, out.piece.tensor, out.piece.rect] = digest
        self._count(targets)

    def _count(self, moved: Sequence[Piece]) -> None:
        """Count down what is left of the files of a tensor that was moved, and have those finished that are whole."""
        with self.lock:
            done = []
            for file, _ in {(piece.file, piece.tensor) for piece in moved}:
                self.left[file] -= 1
                if self.left[file] == 0:
                    done.append(file)
        for file in done:
            self.finish(next(f for f in self.plan.files if f.name == file))

    def finish(self, file: TargetFile) -> None:
        """Have a file completed whose pieces are all written."""
        digests = [self.digests[file.name, piece.tensor, piece.rect] for piece in file.pieces]
        record = {"header": _header_digest(file), "digests": digests}
        self.finishing.append(self.finisher.submit(self._complete, file, record))

    def _complete(self, file: TargetFile, record: dict[str, Any]) -> None:
        if file.records:
            _write_crcs(self.staging.open(file.name, os.O_RDWR), file, record["digests"])
        self.staging.finish(file.name, record)


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
            _create(staging.open(file.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), file)
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
    shapes = {piece.tensor: job.info.shape for job in plan.jobs for piece in job.targets}
    return {file.name: _record(file, staging.done[file.name], shapes) for file in plan.files}


class _Queue:
    """Deals jobs to workers so that each writes into files of its own: the kernel lets only one write into a file at a time."""

    def __init__(self, jobs: list[Job]) -> None:
        groups: dict[str, deque[Job]] = {}
        for job in jobs:
            groups.setdefault(job.targets[0].file, deque()).append(job)
        self._fresh = deque(groups.values())
        self._begun: list[deque[Job]] = []
        self._lock = threading.Lock()

    def take(self, group: deque[Job] | None) -> tuple[deque[Job], Job] | None:
        """Give the next job of a worker's own group, else of one that nobody has begun, else of the longest; None at the end."""
        with self._lock:
            if not group:
                if self._fresh:
                    self._begun.append(self._fresh.popleft())
                    group = self._begun[-1]
                else:
                    group = max(self._begun, key=len, default=None)
            return (group, group.popleft()) if group else None


def _work(run: _Run, queue: _Queue) -> None:
    item = queue.take(None)
    to_write = partial(run.staging.open, flags=os.O_RDWR)
    with OpenFiles(run.root) as read, OpenFiles(run.staging.folder, to_write) as written:
        while item is not None and not run.stop.is_set():
            group, job = item
            run.job(job, read, written)
            item = queue.take(group)


def _run_all(run: _Run, jobs: list[Job], workers: int | None) -> None:
    workers, queue = workers or min(os.cpu_count() or 1, 8), _Queue(jobs)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_work, run, queue) for _ in range(workers)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            run.stop.set()  # reached early only by an error or an interrupt
        failed = [error for future in done if (error := future.exception())]
    if failed:
        raise failed[0]


def _create(fd: int, file: TargetFile) -> None:
    with open(fd, "wb") as out:
        out.truncate(file.size)
        for position, data in file.literals:
            out.seek(position)
            out.write(data)


def _write_crcs(fd: int, file: TargetFile, digests: list[str]) -> None:
    """Store each record's CRC-32, made of those of its pieces."""
    with open(fd, "r+b") as out:
        for where, crc in _crcs(file, digests):
            out.seek(where)
            out.write(crc)


def _crcs(file: TargetFile, digests: list[str]) -> Iterator[tuple[int, bytes]]:
    """Give the CRC-32s that a file stores, with their positions, from those of its pieces."""
    parts = sorted(
        (piece.begin, piece.nbytes, int(digest, 16)) for piece, digest in zip(file.pieces, digests, strict=True)
    )
    index = 0
    for record in sorted(file.records, key=lambda r: r.begin):
        position, held = record.begin, []
        while position < record.begin + record.size:
            begin, nbytes, crc = parts[index]
            assert begin == position, f"{file.name}: a gap before byte {begin}"
            held.append((crc, nbytes))
            position, index = position + nbytes, index + 1
        for where in record.crc_at:
            yield where, struct.pack("<I", combined_crc32(held))


def _archives(plan: Plan) -> bool:
    """Say whether the files store CRC-32s of their own, by which they are then checked."""
    return any(file.records for file in plan.files)


def check_done(
    plan: Plan, staging: Staging, *, workers: int | None = None, progress: Callable[[int], Progress] | None = None
) -> list[str]:
    """Check the files that a killed run finished, every byte against the journal; those that differ are written again.

    A kill leaves finished files whole. A power failure under --no-sync, a bad disk or a copied folder may not.

    Args:
        plan: what was being written.
        staging: the folder; files that are damaged no longer count as done.
        workers: threads; by default one a core, at most 8.
        progress: takes the bytes to be checked, and gives the function that is told of bytes checked.

    Returns:
        The names of the files that are written again.
    """
    done = [file for file in plan.files if file.name in staging.done]
    if not done:
        return []
    told = progress(sum(file.size for file in done)) if progress else lambda _: None
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        kind: Callable[[], Any] = Crc32 if _archives(plan) else new
        right = list(pool.map(lambda file: _is_whole(file, staging, kind, told), done))
    damaged = [file.name for file, whole in zip(done, right, strict=True) if not whole]
    for name in damaged:
        del staging.done[name]
    return damaged


def _is_whole(file: TargetFile, staging: Staging, kind: Callable[[], Any], told: Progress) -> bool:
    """Say whether a finished file has the bytes that the journal recorded."""
    path = staging.folder / file.name
    try:
        record = typed(staging.done[file.name], _Done, file.name)
        if len(record.digests) != len(file.pieces) or os.stat(path).st_size != file.size:
            return False
        for piece, digest in zip(file.pieces, record.digests, strict=True):
            if _digest(staging, piece, kind(), told) != digest:
                return False
        with open_regular(path) as stored:
            for position, data in _literals(file, record.digests):
                stored.seek(position)
                if stored.read(len(data)) != data:
                    return False
    except (SourceError, OSError):
        return False
    return record.header == _header_digest(file)


def _digest(staging: Staging, piece: Piece, hasher: Any, told: Progress) -> str:
    """Give the checksum that a run records of a piece: a file's own CRC-32s are of the bytes as they lie."""
    if not (isinstance(hasher, Crc32) and piece.strides):
        return piece_digest(staging.folder, piece, hasher, told)
    with open_regular(staging.folder / piece.file) as file:
        return stored_digest(file.fileno(), piece, hasher, told)


class _Done(msgspec.Struct, forbid_unknown_fields=True):
    """What the journal records of a finished file."""

    header: Digest
    digests: list[Annotated[str, Meta(pattern="^([0-9a-f]{8}|[0-9a-f]{32})$")]]


def _literals(file: TargetFile, digests: list[str]) -> Iterator[tuple[int, bytes]]:
    """Give the bytes of a finished file that are not its pieces', with their positions."""
    crcs = sorted(_crcs(file, digests))
    for position, data in file.literals:
        patched = bytearray(data)
        for where, crc in crcs:
            if position <= where < position + len(data):
                patched[where - position : where - position + len(crc)] = crc
        yield position, bytes(patched)


def _header_digest(file: TargetFile) -> str:
    return checksum(b"".join(data for _, data in file.literals))


def _record(file: TargetFile, done: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> FileRecord:
    tensors = tuple(
        TensorRecord(p.tensor, p.dtype, shapes[p.tensor], p.rect.offsets, p.rect.shape, digest)
        for p, digest in zip(file.pieces, done["digests"], strict=True)
    )
    return FileRecord(file.name, file.size, done["header"], tensors)
