"""Activations in the host's memory: what autograd keeps goes there on a stream of its own, and comes back ahead of its use.

A part of a layer costs nothing as long as its bytes take less time over the link than the layer takes to compute: 50 GB/s are
1 MB in 20 us. Of Mixtral's layers (1.35 us a token, forward, on an H100), a recomputed layer's input is 8 kB a token, 0.16 us;
what attention keeps 21 kB, 0.4 us; what experts keep 122 kB, 2.4 us, so that the layer waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from runtime.host_memory import host_zeros
from runtime.model.recompute import OffloadModule

LEAST = 1 << 20
"""Bytes: smaller tensors stay on the device."""


class ActivationOffload:
    """The way of a stage's activations to the host and back."""

    def __init__(self, modules: Iterable[OffloadModule], device: torch.device) -> None:
        """Make one; host memory is allocated as it is needed, and used again.

        Args:
            modules: whose activations go.
            device: where they are computed; on a CPU they are copied all the same.
        """
        self.modules, self.device = frozenset(modules), device
        self.host_bytes = 0
        """Of the host's memory that has been allocated."""
        self.streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._free: dict[int, list[tuple[Tensor, torch.cuda.Event | None]]] = {}
        self._last: _Region | None = None

    def begin(self) -> None:
        """Start a forward pass: what it keeps comes back from its end to here."""
        self._last = None
        if self.streams is None and self.device.type == "cuda" and self.modules:
            self.streams = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def region(self, module: OffloadModule, owner: nn.Module | None, stays: Iterable[Tensor] = ()) -> Iterator[None]:
        """Send what is kept within to the host, if this part of a layer is among those that go.

        Args:
            module: the part.
            owner: whose parameters stay on the device.
            stays: further tensors that do, since others need them too.
        """
        if module not in self.modules or not torch.is_grad_enabled():
            yield
            return
        region = _Region(self, owner, stays, self._last)
        self._last = region
        with saved_tensors_hooks(region.pack, _unpack):
            yield
        region.close()

    def take(self, num_bytes: int) -> Tensor:
        """Give host memory, [num_bytes] uint8."""
        free = self._free.get(num_bytes)
        if not free:
            self.host_bytes += num_bytes
            return host_zeros(num_bytes, torch.uint8, self.device)
        memory, read = free.pop()
        if read is not None and self.streams is not None:
            self.streams[1].wait_event(read)
        return memory

    def give_back(self, memory: Tensor, read: torch.cuda.Event | None) -> None:
        """Take host memory back; `read`: when its last copy to the device is over."""
        self._free.setdefault(memory.numel(), []).append((memory, read))


class _Region:
    """What a part of a layer keeps in one forward pass."""

    def __init__(
        self, offload: ActivationOffload, owner: nn.Module | None, stays: Iterable[Tensor], previous: _Region | None
    ) -> None:
        self.offload, self.previous = offload, previous
        self._stays = {x.untyped_storage().data_ptr() for x in stays}
        if owner is not None:
            self._stays |= {p.untyped_storage().data_ptr() for p in owner.parameters()}
        self._seen: dict[object, tuple[Tensor, _Kept]] = {}
        self._kept: list[weakref.ref[_Kept]] = []

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        """Send a tensor away, unless it is small, a parameter, or on another device; one that is kept twice goes once."""
        if tensor.nbytes < LEAST or tensor.device.type != self.offload.device.type:
            return tensor
        if tensor.untyped_storage().data_ptr() in self._stays:
            return tensor
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key not in self._seen:
            kept = _Kept(tensor, self)
            self._seen[key] = tensor, kept  # held until the part's end: its address can't be another tensor's till then
            self._kept.append(weakref.ref(kept))
        return self._seen[key][1]

    def close(self) -> None:
        """Let the device's memory go."""
        self._seen.clear()

    def fetch(self) -> None:
        """Begin to bring everything back, the last first."""
        for reference in reversed(self._kept):
            kept = reference()
            if kept is not None:
                kept.fetch()


class _Kept:
    """A tensor in the host's memory."""

    def __init__(self, tensor: Tensor, region: _Region) -> None:
        offload = self._offload = region.offload
        # Dims as they lie in memory: only what is contiguous on both sides is copied while others compute.
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        self._back = [order.index(dim) for dim in range(tensor.dim())]
        tensor = tensor.permute(order)
        self._region, self._dtype, self._shape = region, tensor.dtype, tensor.shape
        self._memory = offload.take(tensor.numel() * tensor.element_size())
        self._stored: torch.cuda.Event | None = None
        self._read: torch.cuda.Event | None = None
        self._ahead: Tensor | None = None
        self._given: weakref.ref[Tensor] | None = None
        if offload.streams is None:
            self._host.copy_(tensor)
            return
        outward = offload.streams[1]
        outward.wait_stream(torch.cuda.current_stream(offload.device))
        with torch.cuda.stream(outward):
            self._host.copy_(tensor, non_blocking=True)
            self._stored = outward.record_event()
        tensor.record_stream(outward)  # its memory isn't used again before the copy is over

    @property
    def _host(self) -> Tensor:
        return self._memory.view(self._dtype).view(self._shape)

    def fetch(self) -> None:
        """Begin to bring it back, unless that has begun or it is there."""
        if self._ahead is not None or (self._given is not None and self._given() is not None):
            return
        offload = self._offload
        if offload.streams is None:
            self._ahead = self._new().copy_(self._host)
            return
        assert self._stored is not None
        inward = offload.streams[0]
        inward.wait_event(self._stored)
        with torch.cuda.stream(inward):
            self._ahead = self._new().copy_(self._host, non_blocking=True)
            self._read = inward.record_event()

    def give(self) -> Tensor:
        """The tensor on the device; what was kept before it is then on its way, too."""
        given = self._given() if self._given is not None else None
        if given is not None:
            return given
        self._region.fetch()
        if self._region.previous is not None:
            self._region.previous.fetch()
        if self._ahead is None:
            self.fetch()
        assert self._ahead is not None
        out = self._ahead.permute(self._back)
        if self._read is not None:
            current = torch.cuda.current_stream(self._offload.device)
            current.wait_event(self._read)
            out.record_stream(current)
        self._ahead, self._given = None, weakref.ref(out)
        return out

    def _new(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._offload.device)

    def __del__(self) -> None:
        memory = getattr(self, "_memory", None)
        if memory is not None:
            self._offload.give_back(memory, self._read)


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.give() if isinstance(kept, _Kept) else kept
