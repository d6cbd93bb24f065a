"""One tag per parameter: what it is of the model's global tensors, and which ranks share it.

Everything that depends on how a parameter is laid out is derived from its tag: the groups over which its gradient is
summed, which rank counts it in the gradient norm, and the rectangles of it in a checkpoint.

A parameter is looked at as a matrix: [rows, cols] with the last dim as columns; a vector is a matrix of one column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from moeconv.layout.rect import Rect
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.tensor_settings import DEFAULT, TensorSettings, common


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a local parameter that are a rectangle of a global tensor."""

    name: str
    """The tensor's name on the hub."""
    global_shape: tuple[int, ...]
    rect: Rect
    """In the global tensor; its first dim runs over the rows, and it is as wide as the parameter."""
    row: int = 0
    """First row in the local parameter."""
    settings: TensorSettings = DEFAULT
    """How the tensor is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """How a parameter is spread over the ranks."""

    pieces: tuple[Piece, ...]
    sharded: tuple[str, ...] = ()
    """Axes along which ranks hold different parts."""
    replicated: tuple[str, ...] = ()
    """Axes along which ranks hold copies, beside the data-parallel axis."""
    partial: tuple[str, ...] = ()
    """Those of `replicated` along which each rank's gradient is a summand; along the others gradients are equal."""
    data_axis: str = "dp_cp"
    """The axis of the replicas that see different data: "dp_cp", or "edp" for experts."""
    frozen: bool = False
    """All of its tensors are, those of other ranks included: it has no gradient."""

    @property
    def settings(self) -> TensorSettings | None:
        """How all of its tensors are trained; None where they are trained differently."""
        return common(piece.settings for piece in self.pieces)

    def is_primary(self, mesh: ParallelMesh) -> bool:
        """Say whether, among the copies that don't come from data parallelism, this rank's is the first."""
        return all(mesh.rank(axis) == 0 for axis in self.replicated)


def tag(parameter: nn.Parameter, topology: Topology) -> None:
    """Attach a topology to a parameter of the shape that it describes."""
    cols = parameter.shape[-1] if parameter.dim() > 1 else 1
    for piece in topology.pieces:
        width = piece.rect.shape[1] if len(piece.rect.shape) > 1 else 1
        assert width == cols, f"{piece.name}: {piece.rect} is {width} wide, the parameter {tuple(parameter.shape)}"
        assert (piece.row + piece.rect.shape[0]) * cols <= parameter.numel(), f"{piece.name}: {piece.rect} is too long"
    attach(parameter, topology)


def attach(parameter: Tensor, topology: Topology) -> None:
    """Attach a topology without a look at the parameter, which may be sharded further."""
    parameter.topology = topology  # type: ignore[attr-defined]


def topology_of(parameter: Tensor) -> Topology:
    """The topology that was attached to a parameter."""
    return cast(Topology, parameter.topology)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of a global tensor, and where its elements lie in a flat local range, row-major."""

    name: str
    global_shape: tuple[int, ...]
    rect: Rect
    start: int
    """First element in the flat local parameter."""
    settings: TensorSettings = DEFAULT
    """How the tensor is trained."""

    def of(self, flat: Tensor, origin: int = 0) -> Tensor:
        """The block's elements in a flat tensor, as a view in the rectangle's shape.

        Args:
            flat: [N] elements of the local parameter from `origin` on.
            origin: place of flat[0] in the parameter.

        Returns:
            A view in the shape of the rectangle.
        """
        begin = self.start - origin
        return flat[begin : begin + self.rect.size].view(self.rect.shape)


def blocks(topology: Topology, cols: int, begin: int, end: int) -> Iterator[Block]:
    """Cut a flat range of a parameter into rectangles of global tensors.

    A range that starts or ends within a row gives up to three rectangles a piece: a part of a row, whole rows, a part.

    Args:
        topology: the parameter's tag.
        cols: columns of the parameter as a matrix.
        begin: first element of the range, in the row-major parameter.
        end: past its last.

    Yields:
        The rectangles in order; padding belongs to none.
    """
    for piece in topology.pieces:
        low = max(begin, piece.row * cols)
        high = min(end, (piece.row + piece.rect.shape[0]) * cols)
        while low < high:
            row, col = divmod(low, cols)
            if col or high - low < cols:
                size = min(cols - col, high - low)
                rows, width = 1, size
            else:
                rows, width = (high - low) // cols, cols
            yield Block(
                piece.name, piece.global_shape, _sub(piece, row - piece.row, col, rows, width), low, piece.settings
            )
            low += rows * width


def _sub(piece: Piece, row: int, col: int, rows: int, width: int) -> Rect:
    first = piece.rect.offsets[0] + row
    if len(piece.rect.shape) == 1:
        return Rect((first,), (rows,))
    return Rect((first, piece.rect.offsets[1] + col), (rows, width))


def matrix_cols(parameter: Tensor) -> int:
    """Columns of a parameter as a matrix."""
    return parameter.shape[-1] if parameter.dim() > 1 else 1
