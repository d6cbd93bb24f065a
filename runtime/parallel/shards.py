"""What optimizer and checkpoints see of a rank's parameters: flat ranges of weights with gradients and masters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.host_memory import host_zeros
from runtime.parallel.collectives import Group
from runtime.parallel.tensor_settings import TensorSettings
from runtime.parallel.topology import Topology, blocks


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter lies in its bucket."""

    name: str
    topology: Topology
    shape: torch.Size
    cols: int
    start: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.shape.numel()


@dataclass(frozen=True, slots=True)
class ShardPart:
    """The part of a parameter that this rank's optimizer owns, as ranges of flat tensors."""

    slot: Slot
    begin: int
    """First element, in the flat parameter."""
    end: int
    offset: int
    """Of the first element, in the shard."""

    @property
    def range(self) -> slice:
        """The part in the shard."""
        return slice(self.offset, self.offset + self.end - self.begin)


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of a shard whose elements are trained alike."""

    range: slice
    settings: TensorSettings


@dataclass(frozen=True, slots=True)
class StoredRange:
    """A flat range of a parameter with its weights."""

    slot: Slot
    begin: int
    """First element, in the flat parameter."""
    flat: Tensor
    """[N] the weights from `begin` on."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of master weights, and unless settings say otherwise of moments and gradient sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Shard(Protocol):
    """A flat range of one or several parameters that this rank's optimizer updates."""

    topology: Topology
    """What its parameters have in common besides their pieces."""
    group: Group
    """The data-parallel replicas."""
    distributed: bool
    """Whether the replicas hold different ranges."""
    primary: bool
    """Whether, among copies that don't come from data parallelism, this rank's is the first."""
    device: torch.device
    """Where weights and gradients are."""
    offloaded: bool
    """Whether the optimizer's states, and masters that are kept apart, are in the host's memory."""
    master: Tensor
    """[N] weights in fp32 (fp64 for fp64); or int16, what `rounded` lacks of them: `runtime.parallel.masters` gives numbers."""
    separate_master: bool
    """Whether the masters are more precise than the weights."""

    @property
    def grad_shard(self) -> Tensor:
        """[N] the gradient of the global batch, in fp32 (fp64 for fp64) or bf16."""

    @property
    def counted(self) -> bool:
        """Whether it takes part in the gradient norm; of equal copies on several ranks, one does."""

    @property
    def rounded(self) -> Tensor | None:
        """[N] the weights in the compute dtype that the optimizer writes with the masters; None where it needn't."""

    def parts(self) -> Iterator[ShardPart]:
        """The parts of parameters in the shard, in order."""

    def held(self) -> Iterator[StoredRange]:
        """The weights that this rank must load."""

    def masters_from_weights(self) -> None:
        """Take the weights as the masters."""

    def written(self) -> Iterator[StoredRange]:
        """The weights that this rank saves; data-parallel replicas save different ones."""


def new_state(shard: Shard, dtype: torch.dtype | None = None) -> Tensor:
    """Make room for what an optimizer keeps for each element of a shard, where the shard wants it.

    Args:
        shard: a rank's.
        dtype: of the state; None: that of the master's numbers.

    Returns:
        [N] zeros.

    Raises:
        HostMemoryError: the host has no room for it.
    """
    dtype = dtype or (torch.float64 if shard.master.dtype == torch.float64 else torch.float32)
    if shard.offloaded:
        return host_zeros(shard.master.numel(), dtype, shard.device)
    return torch.zeros_like(shard.master, dtype=dtype)


class Store(Protocol):
    """All parameters of this rank."""

    shards: list[Shard]

    def begin(self, num_backwards: int | None) -> None:
        """Set gradients to zero before a step of so many backward passes; None where that isn't known."""

    def collect(self) -> None:
        """Take gradients that autograd has left at the parameters without running their hooks."""

    def finish(self) -> None:
        """Finish all gradient reductions."""

    def weights_from_masters(self) -> None:
        """Bring the masters into the weights of all data-parallel ranks."""

    def share_weights(self) -> None:
        """Begin to bring the weights that this rank's optimizer has written to all data-parallel ranks."""

    def settle(self) -> None:
        """Wait, on the device, for weights that are on their way; a forward pass does so by itself."""


def segments(shard: Shard) -> list[Segment]:
    """Cut a shard into the fewest ranges that are trained alike; what lies between tensors goes with the one before.

    Args:
        shard: a rank's.

    Returns:
        The ranges, in order, that together are the shard; none where it holds no tensor.
    """
    found: list[tuple[int, TensorSettings]] = []
    for part in shard.parts():
        for block in blocks(part.slot.topology, part.slot.cols, part.begin, part.end):
            if not found or found[-1][1] != block.settings:
                found.append((block.start - part.begin + part.offset, block.settings))
    begins = [0, *(begin for begin, _ in found[1:]), shard.master.numel()]
    return [Segment(slice(*begins[i : i + 2]), settings) for i, (_, settings) in enumerate(found)]


def zero_frozen(shard: Shard) -> None:
    """Take what is frozen of a shard that is trained in part out of its gradient."""
    if shard.topology.settings is None:
        for segment in segments(shard):
            if segment.settings.frozen:
                shard.grad_shard[segment.range].zero_()
