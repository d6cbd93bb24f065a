"""Plans: what goes from which source bytes to which target bytes. A plan is total, or it is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moeconv.errors import MappingError
from moeconv.io.safetensors import Header
from moeconv.io.shards import shard_header
from moeconv.layout.rect import check_cover
from moeconv.pieces import Piece, TensorInfo
from moeconv.placement import Placement


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A safetensors file to write: its header, and a piece for each part of a tensor in it. `stored` gives the names in the header."""

    name: str
    header: Header
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self.header.file_size


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor: where its bytes are, and where they go."""

    info: TensorInfo
    sources: tuple[Piece, ...]
    targets: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The files to write, and one job a tensor in an order that completes files one after another."""

    files: tuple[TargetFile, ...]
    jobs: tuple[Job, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def make_plan(
    tensors: Mapping[str, TensorInfo], sources: Mapping[str, Sequence[Piece]], files: Sequence[TargetFile]
) -> Plan:
    """Match targets with sources, and check that every byte of both is used exactly once.

    Args:
        tensors: every tensor to move.
        sources: for each its pieces in the source.
        files: the files to write.

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
    jobs = []
    for name, info in tensors.items():
        check_cover(name, info.shape, [(p.rect, p.file) for p in sources[name]])
        if not targets[name]:
            raise MappingError(f"{name} would be lost: no file of the target holds it")
        check_cover(name, info.shape, [(p.rect, p.file) for p in targets[name]])
        jobs.append(Job(info, tuple(sources[name]), tuple(targets[name])))
    jobs.sort(key=lambda job: rank[job.info.name])
    return Plan(tuple(files), tuple(jobs))


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
    return TargetFile(name, header, tuple(Piece(e.name, e.dtype, rects[e.name], name, e.begin) for e in header.entries))
