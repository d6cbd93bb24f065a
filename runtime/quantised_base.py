"""The quantised weights of this rank: they take the places of a model's frozen matrices, and are quantised as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from moeconv.families.adapted import AdaptedModel
from moeconv.layout.rect import Rect
from runtime.checkpoint.rectangles import Read, read_ahead, to_tensor
from runtime.errors import ConfigError
from runtime.model.context import ModelContext
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.topology import Block, Topology, blocks, topology_of
from runtime.quantised.sizes import quantises
from runtime.quantised.weight import Format, QuantisedWeight, Workspace, make_format

Array = npt.NDArray[Any]
ReadBlocks = Callable[[str, Rect], tuple[Array, ...] | None]


@dataclass(frozen=True, slots=True)
class Member:
    """A quantised weight, and what it is of the model."""

    name: str
    topology: Topology
    weight: QuantisedWeight

    def matrices(self) -> list[Block]:
        """The rectangles of global tensors that its matrices are, in order."""
        shape = self.weight.shape
        return list(blocks(self.topology, shape[-1], 0, shape.numel()))


class QuantisedBase:
    """All quantised weights of this rank, with the memory that their numbers are made in."""

    @classmethod
    def of(cls, module: nn.Module, context: ModelContext) -> QuantisedBase | None:
        """Put quantised weights in the places of a model's frozen matrices, where that is asked for; arguments as of the class."""
        lora, model = context.lora, context.model
        if lora.quantize_base is None:
            return None
        assert isinstance(model, AdaptedModel), "without adapters no base is frozen: LoraConfig and `adapt` go together"
        form = make_format(lora.quantize_base, double=lora.double_quant)
        return cls(module, model, form, Workspace(context.dtype, context.device), context.mesh)

    def __init__(
        self, module: nn.Module, model: AdaptedModel, form: Format, workspace: Workspace, mesh: ParallelMesh
    ) -> None:
        """Put quantised weights in the places of a model's frozen matrices.

        Args:
            module: this rank's stages, with tagged parameters on the meta device.
            model: the base with adapters.
            form: how matrices are held.
            workspace: where their numbers are made.
            mesh: the ranks.
        """
        self._workspace, self._mesh = workspace, mesh
        self.members: list[Member] = []
        for path, owner in module.named_modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is None or not _chosen(parameter, model):
                    continue
                topology = topology_of(parameter)
                weight = QuantisedWeight(parameter.shape, len(topology.pieces), form, self._workspace)
                self.members.append(Member(f"{path}.{name}", topology, weight))
                del owner._parameters[name]
                setattr(owner, name, weight)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(member.weight.nbytes for member in self.members)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the memory that numbers are made in: those of the largest weight."""
        return self._workspace.nbytes

    def load(self, read: Read, blocks: ReadBlocks | None = None) -> None:
        """Quantise this rank's rectangles, one after the other as they come.

        Args:
            read: gives a rectangle of a tensor by its hub name; called by several threads.
            blocks: gives a rectangle as it is held, where it is stored so; None where nothing is.

        Raises:
            ConfigError: a weight holds what no scale describes; names it.
        """

        def stored(name: str, rect: Rect) -> Array | tuple[Array, ...]:
            return (blocks(name, rect) if blocks is not None else None) or read(name, rect)

        for (member, place), found in read_ahead(stored, self._places()):
            if isinstance(found, tuple):
                member.weight.put(place, tuple(map(to_tensor, found)))
            else:
                member.weight.take(place, to_tensor(found))
        self._check()

    def _counts(self, topology: Topology) -> bool:
        return topology.is_primary(self._mesh) and self._mesh.rank(topology.data_axis) == 0

    def _places(self) -> Iterator[tuple[Block, tuple[Member, int]]]:
        for member in self.members:
            for place, block in enumerate(member.matrices()):
                yield block, (member, place)

    def _check(self) -> None:
        """Refuse NaN and infinity, which a block's scale then is, or turns into."""
        for member in self.members:
            if not all(bool(torch.isfinite(part.float()).all()) for part in member.weight.parts[1:]):
                raise ConfigError(
                    f"--quantize-base: {member.topology.pieces[0].name} or one beside it holds numbers that are not finite, which "
                    "can't be quantised; train on a model without them"
                )

    def squares(self) -> Iterator[Tensor]:
        """The sums of squares of all numbers, 0-dim fp64 each; of equal copies on several ranks, one gives them."""
        for member in self.members:
            if not self._counts(member.topology):
                continue
            yield torch.linalg.vector_norm(member.weight.dense(), dtype=torch.float64).square()


def _chosen(parameter: nn.Parameter, model: AdaptedModel) -> bool:
    topology = topology_of(parameter)
    pieces = topology.pieces
    return topology.frozen and bool(pieces) and all(quantises(model, piece.name) for piece in pieces)
