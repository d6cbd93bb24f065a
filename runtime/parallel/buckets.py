"""Weights and gradients in flat buckets, each reduced by one collective, and sharded for the distributed optimizer.

A bucket holds the parameters that are treated alike: reduced over the same ranks, replicated over the same axes, trained
with the same settings. A frozen one has weights only. Its gradients accumulate over the micro-batches, in fp32 unless bf16 is wanted. When the last
gradient of a bucket has come, its reduction starts while the backward pass goes on.

With a distributed optimizer each data-parallel rank owns an equal range of the flat bucket: gradients are
reduce-scattered, the owner updates, and the new weights are all-gathered. Such a range may begin within a row; in a
checkpoint it is a few rectangles (`topology.blocks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.host_memory import host_zeros
from runtime.parallel.arrival import Arrival
from runtime.parallel.collectives import group_rank, group_size
from runtime.parallel.gradient_sink import GradientSink, OpenSum, attach_sink, sink_of
from runtime.parallel.masters import has_remainders
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.packing import BUCKET_SIZE, lay_out, on_host, pack
from runtime.parallel.shards import Shard, ShardPart, Slot, StoredRange, wide_dtype, zero_frozen
from runtime.parallel.topology import matrix_cols, tag, topology_of


@dataclass(slots=True)
class _Pending:
    """Gradients that a bucket still waits for, and the reduction under way."""

    count: int | None = None
    """Backward passes of parameters that are still to come; None where that isn't known."""
    untouched: set[int] = field(default_factory=set)
    """Starts of the slots whose gradients are still those of the step before."""
    work: Any = None
    launched: bool = False


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What a micro-batch has done to the books of a bucket."""

    count: int
    """Backward passes of parameters."""
    touched: frozenset[int]
    """Starts of the slots whose gradients it was the first to add to."""
    reduced: bool
    """Whether it has begun the reduction over data-parallel ranks."""


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
        self.pending = _Pending()
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


def _owned(members: list[tuple[str, nn.Parameter]], mesh: ParallelMesh, *, distributed: bool) -> int:
    """Elements of a bucket that this rank will update."""
    first = members[0][1]
    if topology_of(first).frozen:
        return 0
    parts = _parts(first, mesh, distributed=distributed)
    return lay_out([parameter.numel() for _, parameter in members], parts)[1] // parts


def alike(parameter: nn.Parameter) -> tuple[object, ...]:
    """What parameters of one bucket have in common."""
    topology = topology_of(parameter)
    return (
        topology.data_axis,
        topology.replicated,
        topology.partial,
        topology.frozen,
        topology.settings,
        parameter.dtype,
    )


class BucketStore:
    """All parameters of this rank in buckets: replicated, or with optimizer state sharded over data parallel."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        parameters: Iterable[tuple[str, nn.Parameter]],
        mesh: ParallelMesh,
        device: torch.device,
        *,
        distributed: bool,
        host_share: float = 0.0,
        remainders: bool = False,
        bf16_grads: bool = False,
        bucket_size: int = BUCKET_SIZE,
    ) -> None:
        """Move a model's parameters into buckets, and collect gradients there from now on.

        Args:
            stages: the modules that own the parameters.
            parameters: names and tagged parameters in the order of the model; the meta device is fine.
            mesh: the ranks.
            device: where the weights go.
            distributed: whether gradients and optimizer state are sharded.
            host_share: of the elements that this rank updates, whose masters and optimizer state are in the host's memory.
            remainders: whether masters of bf16 weights are kept as what these lack of them.
            bf16_grads: whether gradients of bf16 weights are summed and reduced in bf16.
            bucket_size: elements after which a new bucket begins.
        """
        groups = list(pack(list(parameters), lambda item: alike(item[1]), lambda item: item[1].numel(), bucket_size))
        owned = [_owned(members, mesh, distributed=distributed) for members in groups]
        chosen = on_host(owned, host_share)
        storage: Any = {"distributed": distributed, "remainders": remainders, "bf16_grads": bf16_grads}
        buckets = [
            Bucket(members, mesh, device, offloaded=offloaded and size > 0, **storage)
            for members, offloaded, size in zip(groups, chosen, owned, strict=True)
        ]
        self.shards: list[Shard] = list(buckets)
        self._buckets = [bucket for bucket in buckets if not bucket.topology.frozen]
        replaced: dict[int, nn.Parameter] = {}
        for bucket, members in zip(buckets, groups, strict=True):
            for slot, (_, old) in zip(bucket.slots, members, strict=True):
                trained = not slot.topology.frozen
                new = nn.Parameter(bucket.view(slot), requires_grad=trained)
                tag(new, slot.topology)
                replaced[id(old)] = new
                bucket.parameters.append(new)
                if not trained:
                    continue
                sink = GradientSink(bucket, slot)
                attach_sink(new, sink)
                new.register_post_accumulate_grad_hook(sink.collect)  # type: ignore[no-untyped-call]
        for owner in (module for stage in stages for module in stage.modules()):
            for name, parameter in list(owner._parameters.items()):
                if id(parameter) in replaced:
                    owner._parameters[name] = replaced[id(parameter)]
        self._arrival = Arrival(stages, self._buckets)

    def begin(self, num_backwards: int | None) -> None:
        """Start the gradients of a step.

        Args:
            num_backwards: backward passes that each parameter will see, so that a bucket's reduction can start with
                the last; None where that isn't known: reductions then start at the end.
        """
        for bucket in self._buckets:
            count = num_backwards * len(bucket.slots) if num_backwards is not None else None
            bucket.pending = _Pending(count=count, untouched={slot.start for slot in bucket.slots})

    def collect(self) -> None:
        """Take gradients that autograd has left at the parameters without running their hooks."""
        for bucket in self._buckets:
            for slot, parameter in zip(bucket.slots, bucket.parameters, strict=True):
                bucket.accumulate(slot, parameter)

    def books(self) -> list[_Pending]:
        """What each bucket still waits for."""
        return [replace(bucket.pending, untouched=set(bucket.pending.untouched)) for bucket in self._buckets]

    def arrivals_since(self, before: Sequence[_Pending]) -> list[Arrivals]:
        """What has come since `books` gave these; the passes of each parameter are counted."""
        out = []
        for bucket, then in zip(self._buckets, before, strict=True):
            assert bucket.pending.count is not None
            assert then.count is not None
            touched = frozenset(then.untouched - bucket.pending.untouched)
            out.append(Arrivals(then.count - bucket.pending.count, touched, bucket.pending.work is not None))
        return out

    def join(self) -> None:
        """Wait, on the device, for the reductions that have begun."""
        for bucket in self._buckets:
            bucket.join()

    def book(self, arrivals: Sequence[Arrivals]) -> None:
        """Count what a replayed micro-batch has added to the sums, and what it has reduced, as its capture was counted."""
        for bucket, item in zip(self._buckets, arrivals, strict=True):
            bucket.pending.untouched -= item.touched
            bucket.pending.launched |= item.reduced
            bucket.arrived(item.count)

    def reopen(self, before: Sequence[_Pending]) -> None:
        """Go back to the books as they were before a micro-batch that has come to nothing."""
        for bucket, then in zip(self._buckets, before, strict=True):
            bucket.pending, bucket.gathering = then, None
            for parameter in bucket.parameters:
                parameter.grad = None
                if (sink := sink_of(parameter)) is not None:
                    sink.reset()

    def finish(self) -> None:
        """Finish all reductions: after this `grad_shard` holds the gradients of the global batch."""
        for bucket in self._buckets:
            for slot in bucket.slots:
                if slot.start in bucket.pending.untouched:
                    bucket.grad_view(slot).zero_()
        for bucket in self._buckets:
            bucket.reduce(wait=False)
        for bucket in self._buckets:
            bucket.reduce(wait=True)

    def weights_from_masters(self) -> None:
        """Bring the masters into the weights of all data-parallel ranks."""
        self.settle()
        for bucket in self._buckets:
            bucket.round_masters()
        self.share_weights()

    @property
    def sums_over_ranks(self) -> bool:
        """Whether gradients are reduced over data-parallel ranks."""
        return any(group_size(bucket.group) > 1 for bucket in self._buckets)

    def share_weights(self) -> None:
        """Begin to bring the weights that this rank's optimizer has written to all data-parallel ranks."""
        self._arrival.begin()

    def defer_sharing(self) -> None:
        """From now on `share_weights` leaves it to `send_weights` to begin."""
        self._arrival.deferred = True

    def send_weights(self, *, again: bool = False) -> None:
        """Begin what `share_weights` has left, and with `again` also where it has left nothing."""
        self._arrival.send(again=again)

    def weights_sent(self) -> None:
        """Take note that what `share_weights` has left was done by a replay."""
        self._arrival.due = False

    def settle(self) -> None:
        """Wait, on the device, for weights that are on their way; a forward pass does so part by part."""
        self._arrival.finish()
