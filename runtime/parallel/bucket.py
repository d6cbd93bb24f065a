"""Weights and gradients that are treated alike, in flat tensors, reduced by one collective.

They are reduced over the same ranks, replicated over the same axes, trained with the same settings. A frozen bucket has weights
only. Gradients accumulate over the micro-batches, in fp32 unless bf16 is wanted. When the last one has come, the bucket's
reduction starts while the backward pass goes on.

With a distributed optimizer each data-parallel rank owns an equal range of the flat bucket: gradients are
reduce-scattered, the owner updates, and the new weights are all-gathered. Such a range may begin within a row; in a
checkpoint it is a few rectangles (`topology.blocks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.host_memory import host_zeros
from runtime.parallel.collectives import group_rank, group_size
from runtime.parallel.gradient_sink import OpenSum
from runtime.parallel.masters import has_remainders
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.packing import lay_out
from runtime.parallel.shards import ShardPart, Slot, StoredRange, wide_dtype, zero_frozen
from runtime.parallel.topology import matrix_cols, topology_of


@dataclass(slots=True)
class Pending:
    """Gradients that a bucket still waits for, and the reduction under way."""

    count: int | None = None
    """Backward passes of parameters that are still to come; None where that isn't known."""
    untouched: set[int] = field(default_factory=set)
    """Starts of the slots whose gradients are still those of the step before."""
    work: Any = None
    launched: bool = False


class Bucket:
    """Parameters that are reduced and updated together."""

    def __init__(
        self,
        members: list[tuple[str, nn.Parameter]],
        mesh: ParallelMesh,
        device: torch.device,
        *,
        distributed: bool,
        offloaded: bool = False,
        remainders: bool = False,
        bf16_grads: bool = False,
    ) -> None:
        """Allocate the flat tensors and move the parameters into them.

        Args:
            members: names and parameters, alike in all that `alike` lists; they may be on the meta device.
            mesh: the ranks.
            device: where the bucket lives.
            distributed: whether gradients and optimizer state are sharded over the data-parallel axis.
            offloaded: whether masters and optimizer state are in the host's memory.
            remainders: whether masters of bf16 weights are kept as what these lack of them.
            bf16_grads: whether gradients of bf16 weights are summed and reduced in bf16.
        """
        first = members[0][1]
        self.device, self.offloaded = device, offloaded
        self.topology = topology_of(first)
        self.group = mesh.group(self.topology.data_axis)
        self.partial_groups = [mesh.group(axis) for axis in self.topology.partial if mesh.size(axis) > 1]
        parts = _parts(first, mesh, distributed=distributed)
        self.distributed = parts > 1
        starts, self.size = lay_out([parameter.numel() for _, parameter in members], parts)
        self.slots = [
            Slot(name, topology_of(parameter), parameter.shape, matrix_cols(parameter), start)
            for (name, parameter), start in zip(members, starts, strict=True)
        ]
        wide = first.dtype if self.topology.frozen else wide_dtype(first.dtype)
        self.weights = torch.zeros(self.size, dtype=first.dtype, device=device)
        summed = first.dtype if bf16_grads and first.dtype == torch.bfloat16 else wide
        self.grads = torch.zeros(0 if self.topology.frozen else self.size, dtype=summed, device=device)
        piece = self.size // parts
        self._begin = piece * (group_rank(self.group) if self.distributed else 0)
        own = slice(self._begin, self._begin + piece)
        self.weight_shard, self.grad_shard = self.weights[own], self.grads[own]
        # In fp32 the weights are their own masters, and frozen ones need none.
        self.separate_master = first.dtype != wide
        kept = torch.int16 if remainders and first.dtype == torch.bfloat16 else wide
        self.master = self._new_master(kept) if self.separate_master else self.weight_shard
        self.primary = self.topology.is_primary(mesh)
        self.parameters: list[nn.Parameter] = []
        self.pending = Pending()
        self.gathering: Any = None

    def _new_master(self, dtype: torch.dtype) -> Tensor:
        size = self.weight_shard.numel()
        if self.offloaded:
            return host_zeros(size, dtype, self.device)
        return torch.zeros(size, dtype=dtype, device=self.device)

    @property
    def counted(self) -> bool:
        """Whether this rank's shard takes part in the gradient norm: of equal copies, one does."""
        return self.primary and (self.distributed or group_rank(self.group) == 0)

    def view(self, slot: Slot) -> Tensor:
        """A parameter's weights in the bucket."""
        return self.weights[slot.start : slot.start + slot.size].view(slot.shape)

    def grad_view(self, slot: Slot) -> Tensor:
        """A parameter's accumulated gradient."""
        return self.grads[slot.start : slot.start + slot.size].view(slot.shape)

    def parts(self) -> Iterator[ShardPart]:
        """The parts of parameters in this rank's shard, in order."""
        last = self._begin + self.master.numel()
        for slot in self.slots:
            begin, end = max(slot.start, self._begin), min(slot.start + slot.size, last)
            if begin < end:
                yield ShardPart(slot, begin - slot.start, end - slot.start, begin - self._begin)

    def _touch(self, slot: Slot) -> bool:
        """Say whether a parameter's gradient is the first of a step; the next ones are not."""
        first = slot.start in self.pending.untouched
        self.pending.untouched.discard(slot.start)
        return first

    @property
    def by_autograd(self) -> bool:
        """Whether autograd must have every gradient of this backward pass: how many there are is not known."""
        return self.pending.count is None

    def open_sum(self, slot: Slot) -> OpenSum:
        """A parameter's accumulated gradient, and whether the first summand of a step is to overwrite it."""
        return OpenSum(self.grad_view(slot), self._touch(slot))

    def accumulate(self, slot: Slot, parameter: Tensor) -> None:
        """Add the gradient that autograd has left at a parameter; the first of a step replaces what was there."""
        if parameter.grad is None:
            return
        total = self.grad_view(slot)
        if self._touch(slot):
            total.copy_(parameter.grad)
        else:
            total.add_(parameter.grad)
        parameter.grad = None

    def arrived(self, count: int = 1) -> None:
        """Count backward passes of parameters, and start the reduction with the last."""
        if self.pending.count is not None and count:
            self.pending.count -= count
            if self.pending.count == 0:
                self.reduce(wait=False)

    def held(self) -> Iterator[StoredRange]:
        """The weights that this rank must load: all."""
        for slot in self.slots:
            yield StoredRange(slot, 0, self.view(slot).view(-1))

    def masters_from_weights(self) -> None:
        """Take the weights as the masters: they were loaded from a checkpoint that is no more precise."""
        if has_remainders(self):
            self.master.zero_()
        elif self.separate_master:
            self.master.copy_(self.weight_shard)

    def written(self) -> Iterator[StoredRange]:
        """The weights that this rank saves: data-parallel copies take turns, parameter by parameter."""
        for place, slot in enumerate(self.slots):
            if place % group_size(self.group) == group_rank(self.group):
                yield StoredRange(slot, 0, self.view(slot).view(-1))

    def reduce(self, *, wait: bool) -> None:
        """Start the sum over the data-parallel ranks, and with `wait` finish all sums."""
        if not self.pending.launched:
            self.pending.launched = True
            if self.distributed:
                self.pending.work = _reduce_scatter(self.grad_shard, self.grads, self.group)
            elif group_size(self.group) > 1:
                self.pending.work = dist.all_reduce(self.grads, group=self.group, async_op=True)
        if wait:
            self.join()
            for group in self.partial_groups:
                dist.all_reduce(self.grad_shard, group=group)
            zero_frozen(self)

    def join(self) -> None:
        """Wait, on the device, for the sum over the data-parallel ranks, if it has begun."""
        if self.pending.work is not None:
            self.pending.work.wait()
            self.pending.work = None

    @property
    def rounded(self) -> Tensor | None:
        """The weights of this rank's shard, where they are not the masters."""
        return self.weight_shard if self.separate_master else None

    def round_masters(self) -> None:
        """Bring the masters into this rank's shard of the weights; what has remainders is always there."""
        if self.separate_master and not has_remainders(self):
            self.weight_shard.copy_(self.master)

    def publish(self) -> None:
        """Begin to bring the weights of each data-parallel rank's shard to all."""
        if self.distributed:
            self.gathering = _all_gather(self.weights, self.weight_shard, self.group)

    def arrive(self) -> None:
        """Wait, on the device, for weights that are on their way."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None


def _parts(parameter: nn.Parameter, mesh: ParallelMesh, *, distributed: bool) -> int:
    """Ranks that share the updates of a parameter's bucket."""
    topology = topology_of(parameter)
    return group_size(mesh.group(topology.data_axis)) if distributed and not topology.frozen else 1


def _reduce_scatter(out: Tensor, source: Tensor, group: dist.ProcessGroup | None) -> Any:
    if hasattr(dist, "reduce_scatter_single"):
        return dist.reduce_scatter_single(out, source, group=group, async_op=True)
    return dist.reduce_scatter_tensor(out, source, group=group, async_op=True)


def _all_gather(out: Tensor, piece: Tensor, group: dist.ProcessGroup | None) -> Any:
    if hasattr(dist, "all_gather_single"):
        return dist.all_gather_single(out, piece, group=group, async_op=True)
    return dist.all_gather_into_tensor(out, piece, group=group, async_op=True)


def owned_elements(members: list[tuple[str, nn.Parameter]], mesh: ParallelMesh, *, distributed: bool) -> int:
    """Elements of a bucket that this rank will update."""
    first = members[0][1]
    if topology_of(first).frozen:
        return 0
    parts = _parts(first, mesh, distributed=distributed)
    return lay_out([parameter.numel() for _, parameter in members], parts)[1] // parts
