"""All parameters of a rank in buckets, and the books of what these wait for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from runtime.parallel.arrival import Arrival
from runtime.parallel.bucket import Bucket, Pending, owned_elements
from runtime.parallel.collectives import group_size
from runtime.parallel.gradient_sink import GradientSink, attach_sink, sink_of
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.packing import BUCKET_SIZE, on_host, pack
from runtime.parallel.shards import Shard
from runtime.parallel.topology import tag, topology_of


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What a micro-batch has done to the books of a bucket."""

    count: int
    """Backward passes of parameters."""
    touched: frozenset[int]
    """Starts of the slots whose gradients it was the first to add to."""
    reduced: bool
    """Whether it has begun the reduction over data-parallel ranks."""


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
        owned = [owned_elements(members, mesh, distributed=distributed) for members in groups]
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
            bucket.pending = Pending(count=count, untouched={slot.start for slot in bucket.slots})

    def collect(self) -> None:
        """Take gradients that autograd has left at the parameters without running their hooks."""
        for bucket in self._buckets:
            for slot, parameter in zip(bucket.slots, bucket.parameters, strict=True):
                bucket.accumulate(slot, parameter)

    def books(self) -> list[Pending]:
        """What each bucket still waits for."""
        return [replace(bucket.pending, untouched=set(bucket.pending.untouched)) for bucket in self._buckets]

    def arrivals_since(self, before: Sequence[Pending]) -> list[Arrivals]:
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

    def reopen(self, before: Sequence[Pending]) -> None:
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
