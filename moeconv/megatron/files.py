"""Pieces of a Megatron checkpoint's files: archives, tensors fused of several, vocabulary padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from moeconv.dtypes import dtype
from moeconv.errors import LayoutError
from moeconv.io.torch_archive import ArchiveLayout, row_major
from moeconv.layout.rect import Rect
from moeconv.megatron.tensors import Part, place_parts
from moeconv.pieces import Piece
from moeconv.plan import TargetFile


def add_archive(file: TargetFile, layout: ArchiveLayout) -> None:
    """Add an archive that was laid out to begin at the file's present end."""
    file.literals += layout.literals
    file.records += [record for record in layout.records if record.size]
    file.size += layout.size


def parts_dtype(name: str, parts: Sequence[Part], dtypes: Mapping[str, str]) -> str:
    """Give the dtype of a fused tensor: that of all its parts.

    Raises:
        LayoutError: the parts have different dtypes, so one tensor can't hold them.
    """
    kinds = {dtypes[part.tensor] for part in parts}
    if len(kinds) != 1:
        raise LayoutError(f"{name} would hold tensors of {', '.join(sorted(kinds))}; Megatron stores them as one dtype")
    return kinds.pop()


def padded_pieces(
    name: str, shape: tuple[int, ...], parts: Sequence[Part], last: Part | None, kind: str, file: str, begin: int
) -> list[Piece]:
    """Give the pieces of a row-major tensor; its vocabulary padding repeats the last row, as Megatron's saver does it.

    Args:
        name: the stored tensor's name, for the assertion.
        shape: its shape, padding included.
        parts: what it holds, padding excluded.
        last: the last row of the whole vocabulary, if there is padding to fill.
        kind: its safetensors dtype.
        file: the file.
        begin: where its data begin, in bytes.

    Returns:
        Pieces that cover the stored tensor exactly.
    """
    strides = row_major(shape)
    pieces = list(place_parts(parts, kind, file, begin, strides))
    if last is not None:
        filled = sum(part.rect.shape[0] for part in parts)
        step = strides[0] * dtype(kind).itemsize
        pieces += [Piece(last.tensor, kind, last.rect, file, begin + row * step) for row in range(filled, shape[0])]
    covered = sum(piece.rect.size for piece in pieces)
    assert covered == prod(shape), f"{name}: {covered} of {prod(shape)} elements have a source"
    return pieces


def last_row(parts: Sequence[Part], shape: tuple[int, ...]) -> Part:
    """Give the last row of a vocabulary tensor."""
    rect = Rect.slab(shape, 0, shape[0] - 1, shape[0])
    return Part(parts[0].tensor, rect, (0,) * len(shape))
