"""Plans: what goes from which source bytes to which target bytes. A plan is total, or it is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeconv.dtypes import Bytes
from moeconv.errors import MappingError
from moeconv.io.safetensors import Header
from moeconv.io.shards import shard_header
from moeconv.io.torch_archive import DataRecord
from moeconv.pieces import Piece, TensorInfo, check_pieces
from moeconv.placement import Placement

# Takes rows as bytes [rows, bytes a row], uint8, whole rows of the tensor, and the number of the first one; gives rows of the same size.
# It may work in place. Where a tensor has no sources, the rows come with any content. Equal ops give equal rows.
RowOp = Callable[[Bytes, int], Bytes]


@dataclass(slots=True)
class TargetFile:
    """A file to write: `size` bytes, of which `literals` are known by position and `pieces` are copied from the source.

    A CRC-32 is stored for each of `records`, which pieces fill without a gap; safetensors files have none.
    """

    name: str
    size: int = 0
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    records: list[DataRecord] = field(default_factory=list)


def safetensors_target(name: str, header: Header, pieces: Iterable[Piece]) -> TargetFile:
    """Make a safetensors file a target.

    Args:
        name: the file's name.
        header: its header.
        pieces: what its tensors hold, in their order; together they are all of its data.

    Returns:
        The file to write.
    """
    return TargetFile(name, header.file_size, [(0, header.raw)], list(pieces))


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor: where its bytes are, and where they go. `op`, where set, makes of each band of rows what is written.

    Tensors that are the same bytes of the source share a job: then the targets name several.
    """

    info: TensorInfo
    sources: tuple[Piece, ...]
    targets: tuple[Piece, ...]
    op: RowOp | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The files to write, and the jobs in an order that completes files one after another."""

    files: tuple[TargetFile, ...]
    jobs: tuple[Job, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def make_plan(
    tensors: Mapping[str, TensorInfo],
    sources: Mapping[str, Sequence[Piece]],
    files: Sequence[TargetFile],
    *,
    copies: bool = False,
    ops: Mapping[str, RowOp] | None = None,
) -> Plan:
    """Match targets with sources, and check that every byte of both is used exactly once.

    Args:
        tensors: every tensor to move.
        sources: for each its pieces in the source.
        files: the files to write.
        copies: files may hold bytes several times, as ranks' own files do; each byte must be in one at least.
        ops: what is done to a tensor's rows on the way; with an op a tensor need not have sources.

    Returns:
        The plan.

    Raises:
        MappingError: a tensor has no target, or a target no source.
        IntegrityError: pieces leave a gap or overlap.
    """
    targets: dict[str, list[Piece]] = {name: [] for name in tensors}
    rank: dict[str, int] = {}
    for index, file in enumerate(files):
        for piece in file.pieces:
            if piece.tensor not in targets:
                raise MappingError(f"{file.name} needs {piece.tensor}, which the source does not hold")
            if piece.dtype != tensors[piece.tensor].dtype:
                raise MappingError(
                    f"{file.name} needs {piece.tensor} as {piece.dtype}, the source holds {tensors[piece.tensor].dtype}"
                )
            targets[piece.tensor].append(piece)
            rank.setdefault(piece.tensor, index)
    jobs: dict[Any, Job] = {}
    for name, info in tensors.items():
        op = (ops or {}).get(name)
        if sources[name] or op is None:
            check_pieces(name, info.shape, sources[name])
        if not targets[name]:
            raise MappingError(f"{name} would be lost: no file of the target holds it")
        distinct = _distinct(targets[name]) if copies else targets[name]
        check_pieces(name, info.shape, distinct)
        same = (info.dtype, info.shape, *((p.file, p.begin, p.strides, p.rect) for p in sources[name]), op)
        before = jobs.get(same)
        found = (*before.targets, *targets[name]) if before else tuple(targets[name])
        jobs[same] = Job(before.info if before else info, tuple(sources[name]), found, op)
    ordered = sorted(jobs.values(), key=lambda job: min(rank[piece.tensor] for piece in job.targets))
    return Plan(tuple(files), tuple(ordered))


def _distinct(pieces: Iterable[Piece]) -> list[Piece]:
    """Leave out pieces whose rectangle another one holds."""
    kept: list[Piece] = []
    for piece in sorted({piece.rect: piece for piece in pieces}.values(), key=lambda p: -p.rect.size):
        if not any(piece.rect.intersect(other.rect) == piece.rect for other in kept):
            kept.append(piece)
    return kept


def sharded_files(tensors: Iterable[TensorInfo], placement: Placement) -> list[TargetFile]:
    """Lay out the files of a sharded checkpoint.

    Args:
        tensors: every tensor, in the order of the model.
        placement: the model under its layout.

    Returns:
        The files, those of a stage together and in the order of their ranks.
    """
    contents: dict[str, list[tuple[TensorInfo, Piece]]] = {}
    for info in tensors:
        for stored in placement.stored(info.name):
            contents.setdefault(stored.file, []).append(
                (info, Piece(info.name, info.dtype, stored.rect, stored.file, 0))
            )
    return [_shard_file(name, pieces) for name, pieces in contents.items()]


def _shard_file(name: str, contents: list[tuple[TensorInfo, Piece]]) -> TargetFile:
    header = shard_header([(info.name, info.dtype, piece.rect) for info, piece in contents])
    rects = {info.name: piece.rect for info, piece in contents}
    pieces = (Piece(e.name, e.dtype, rects[e.name], name, e.begin) for e in header.entries)
    return safetensors_target(name, header, pieces)
