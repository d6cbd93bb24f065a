"""A rank's parameters by role: shape, rectangle and tag follow from the family's rules and the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moeconv.families.base import GlobalTensor, Model
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.placement import rank_rects
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.packing import ROW_MULTIPLE
from runtime.parallel.tensor_settings import TensorSettings
from runtime.parallel.topology import Piece, Topology, tag


@dataclass(frozen=True, slots=True)
class StoredBuffer:
    """A buffer of a module that checkpoints hold as a tensor; every rank of its stage has it whole."""

    module: nn.Module
    attribute: str
    name: str
    """The tensor's name on the hub."""
    shape: tuple[int, ...]
    """Its shape there, of as many elements as the buffer."""


class Parameters:
    """Makes the parameters of this rank, without memory: the buckets that hold weights together provide it later."""

    def __init__(
        self,
        model: Model,
        degrees: Degrees,
        mesh: ParallelMesh,
        dtype: torch.dtype,
        groups: Mapping[str, TensorSettings],
    ) -> None:
        """Prepare.

        Args:
            model: says which tensors there are.
            degrees: the layout's degrees.
            mesh: this rank's coordinates; its groups are not used.
            dtype: of the parameters.
            groups: how each tensor is trained, by its name on the hub.
        """
        self.model, self.dtype = model, dtype
        self.buffers: list[StoredBuffer] = []
        self._degrees, self._mesh, self._groups = degrees, mesh, groups

    def has(self, role: str, layer: int | None = None) -> bool:
        """Say whether the model has a tensor of this role, in this layer, that holds an element."""
        tensor = self.model.find(role, layer)
        return tensor is not None and tensor.size > 0

    def take(self, *roles: str, layer: int | None = None, partial: bool = False) -> nn.Parameter:
        """Make a parameter of this rank's rectangles of some tensors, one below the other.

        Args:
            roles: what the tensors do; all are split alike.
            layer: their layer; None outside the layers.
            partial: whether, of tensors that every rank of tp holds whole, the ranks' gradients are summands: they see different
                tokens or heads.

        Returns:
            The parameter: a matrix of as many rows as the rectangles have together, or a vector.
        """
        pieces = self._pieces([self.model.tensor(role, layer) for role in roles])
        last = pieces[-1]
        parameter = self._empty(last.row + last.rect.shape[0], *last.rect.shape[1:])
        split = self.model.rule(roles[0]).split
        if split is None:
            self._tag(parameter, pieces, replicated=("tp",), partial=("tp",) if partial else ())
            return parameter
        # With more ranks than heads, neighbours hold the same head, each for its own query heads.
        shared = split.units is not None and self.model.sizes[split.units] < self._degrees.tp
        axes = ("kv",) if shared else ()
        self._tag(parameter, pieces, sharded=("tp",), replicated=axes, partial=axes)
        return parameter

    def take_optional(self, *roles: str, layer: int | None = None, partial: bool = False) -> nn.Parameter | None:
        """As `take`; None where the model, or this layer, has no such tensors."""
        return self.take(*roles, layer=layer, partial=partial) if self.has(roles[0], layer) else None

    def take_vocabulary(self, role: str) -> nn.Parameter:
        """Make this rank's rows of an embedding or head, padded in memory only.

        Args:
            role: `embedding`, `head` or `head.bias`; a tied head is the embedding.

        Returns:
            [V padded, D], equally many rows on every rank of tp; a vector for the bias.
        """
        tied = self.model.tied and role in ("embedding", "head")
        tensor = self.model.tensor("embedding" if tied else role)
        rows = [rect.shape[0] for rect in rank_rects(tensor, self._degrees)]
        weight = self._empty(-(-max(rows) // ROW_MULTIPLE) * ROW_MULTIPLE, *tensor.shape[1:])
        pieces = self._pieces([tensor]) if rows[self._mesh.rank("tp")] else ()
        # First and last stage each hold tied embeddings, and each have a part of their gradient.
        ends = ("ends",) if tied and self._mesh.size("pp") > 1 else ()
        # A rank without rows does as the others: they take part in the same collectives.
        frozen = self._groups[tensor.name].frozen
        self._tag(weight, pieces, sharded=("tp",), replicated=ends, partial=ends, frozen=frozen)
        return weight

    def vocabulary_range(self) -> tuple[int, int]:
        """Give the rows of the vocabulary that this rank holds; the last ranks may hold fewer or none."""
        rect = self._rect(self.model.tensor("embedding"))
        return rect.offsets[0], rect.ends[0]

    def local_experts(self) -> range:
        """Give the experts of this rank."""
        count = self.model.sizes["experts"] // self._degrees.ep
        first = self._mesh.rank("ep") * count
        return range(first, first + count)

    def local_width(self, role: str, layer: int) -> int:
        """Give how much this rank holds of the dimension of an expert's tensor that is split."""
        tensor = self.model.tensor(role, layer, 0)
        split = tensor.rule.split
        assert split is not None
        return self._rect(tensor).shape[split.dim]

    def has_expert(self, role: str, layer: int) -> bool:
        """Say whether the experts of a layer have a tensor of this role."""
        return self.model.find(role, layer, 0) is not None

    def local_shape(self, role: str, layer: int) -> tuple[int, ...]:
        """Give the shape of what this rank holds of one expert's tensor."""
        return self._rect(self.model.tensor(role, layer, 0)).shape

    def tag_experts(self, parameter: nn.Parameter, *roles: str, layer: int) -> None:
        """Tag the stacked tensors of this rank's experts.

        Args:
            parameter: [E_local, rows of all roles, columns]: for each expert its rectangles, one below the other; vectors of all
                experts in one vector.
            roles: what the tensors do.
            layer: their layer.
        """
        tensors = [self.model.tensor(role, layer, expert) for expert in self.local_experts() for role in roles]
        pieces = self._pieces(tensors)
        if self.model.rule(roles[0]).split is None:  # of the last bias each rank of etp adds its share
            self._tag(parameter, pieces, sharded=("ep",), replicated=("etp",), partial=("etp",), data_axis="edp")
        else:
            self._tag(parameter, pieces, sharded=("ep", "etp"), data_axis="edp")

    def tag_whole(self, parameter: nn.Parameter, role: str, *, layer: int, partial: bool) -> None:
        """Tag a parameter that somebody else has made and every rank of tp holds whole; `partial` as for `take`."""
        pieces = self._pieces([self.model.tensor(role, layer)])
        self._tag(parameter, pieces, replicated=("tp",), partial=("tp",) if partial else ())

    def keep_buffer(self, module: nn.Module, attribute: str, role: str, *, layer: int) -> None:
        """Have a module's buffer loaded and saved as the tensor of a role."""
        tensor = self.model.tensor(role, layer)
        self.buffers.append(StoredBuffer(module, attribute, tensor.name, tensor.shape))

    def _empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"))

    def _rect(self, tensor: GlobalTensor) -> Rect:
        rects = rank_rects(tensor, self._degrees)
        return rects[0] if len(rects) == 1 else rects[self._mesh.rank("tp" if tensor.expert is None else "etp")]

    def _pieces(self, tensors: Sequence[GlobalTensor]) -> tuple[Piece, ...]:
        pieces, row = [], 0
        for tensor in tensors:
            rect = self._rect(tensor)
            pieces.append(Piece(tensor.name, tensor.shape, rect, row, self._groups[tensor.name]))
            row += rect.shape[0]
        return tuple(pieces)

    @staticmethod
    def _tag(
        parameter: nn.Parameter,
        pieces: tuple[Piece, ...],
        *,
        sharded: tuple[str, ...] = (),
        replicated: tuple[str, ...] = (),
        partial: tuple[str, ...] = (),
        data_axis: str = "dp_cp",
        frozen: bool | None = None,
    ) -> None:
        topology = Topology(
            pieces=pieces,
            sharded=sharded,
            replicated=replicated,
            partial=partial,
            data_axis=data_axis,
            frozen=all(piece.settings.frozen for piece in pieces) if frozen is None else frozen,
        )
        tag(parameter, topology)
