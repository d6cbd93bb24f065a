"""The way of an optimizer's state between the host's memory and the device: in pieces, there and back at the same time.

The update of a piece runs on the device while the next ones come and the one before goes back, so that a step takes what the
link takes: with masters in fp32 and moments in bf16, 8 bytes an element each way, at once in both directions. Over PCIe 5 x16
(50 GB/s each way, measured) that is 0.16 s for each G elements of a rank, and 0.24 s with moments in fp32. The host's memory
moves as many bytes: 16 an element. Computed on the host instead, gradients would go over the link and weights come back (4
and 2 bytes, half the time), but every element would pass through the host's memory several times: gradient written and read,
master and moments read and written, weight written and read, 28 bytes. With four ranks on a host whose memory moves 600 GB/s
that is 0.19 s for each G elements of a rank, where 16 bytes take 0.11 s; and it would take every core, and other roundings.

An update needs the norm of the whole gradient, for clipping and to leave a step out that is not finite. So it begins when
the backward pass is over; the last pieces go back while the next forward pass runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.optim.config import BUFFERS, PIECE
from runtime.parallel.shards import Shard

Work = Callable[[slice, list[Tensor]], None]
"""Updates a piece: its range, and its tensors on the device."""


@dataclass(slots=True)
class _Buffer:
    """Memory of the device for one piece."""

    memory: Tensor
    """[N] uint8."""
    empty: torch.cuda.Event | None = None
    """Its last piece has gone back."""


class Staging:
    """Brings ranges of host tensors to a device, has them updated there, and takes them back."""

    def __init__(self, device: torch.device, *, piece: int | None = None, buffers: int = BUFFERS) -> None:
        """Make a staging; its memory is allocated with the first piece.

        Args:
            device: where updates are computed; on a CPU pieces are copied all the same, one after another.
            piece: elements that travel together; None: `PIECE`.
            buffers: how many pieces are under way.
        """
        self.device, self._piece = device, PIECE if piece is None else piece
        self._buffers = [_Buffer(torch.empty(0, dtype=torch.uint8, device=device)) for _ in range(buffers)]
        self._next = 0
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @classmethod
    def for_shards(cls, shards: Iterable[Shard]) -> Staging | None:
        """Make what the updates of some shards need; None where all their state is on the device."""
        found = [shard for shard in shards if shard.offloaded]
        if not found:
            return None
        largest = max(shard.master.numel() for shard in found)
        return cls(found[0].device, piece=min(PIECE, largest))

    def begin(self) -> None:
        """Start a pass over host tensors: it sees what the passes before it have written."""
        if self._streams is not None:
            inward, outward = self._streams
            inward.wait_stream(outward)

    def update(self, tensors: Sequence[Tensor], work: Work, *, written: int | None = None) -> None:
        """Update a range of host tensors; returns before it is done.

        Args:
            tensors: [N] each, of the host.
            work: is called for each piece, in order, on the current stream.
            written: how many of the tensors, the first ones, are changed; None: all.
        """
        written = len(tensors) if written is None else written
        for begin in range(0, tensors[0].numel(), self._piece):
            part = slice(begin, min(begin + self._piece, tensors[0].numel()))
            sources = [tensor[part] for tensor in tensors]
            buffer = self._take(sum(tensor.element_size() for tensor in tensors))
            staged = list(_views(buffer.memory, sources))
            if self._streams is None:
                _copy(sources, staged)
                work(part, staged)
                _copy(staged[:written], sources)
            else:
                self._send(buffer, part, sources, staged, work, written)

    def settle(self) -> None:
        """Wait until the host's memory holds what the passes before have written."""
        if self._streams is not None:
            self._streams[1].synchronize()

    def _take(self, itemsize: int) -> _Buffer:
        """Give the buffer whose turn it is, large enough for a piece."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffer.memory.numel() < self._piece * itemsize:
            if buffer.empty is not None:
                buffer.empty.synchronize()
            buffer.memory = torch.empty(self._piece * itemsize, dtype=torch.uint8, device=self.device)
            if self._streams is not None:  # what had this memory before may still be at work on the current stream
                self._streams[0].wait_stream(torch.cuda.current_stream(self.device))
        return buffer

    def _send(
        self, buffer: _Buffer, part: slice, sources: list[Tensor], staged: list[Tensor], work: Work, written: int
    ) -> None:
        assert self._streams is not None
        inward, outward = self._streams
        current = torch.cuda.current_stream(self.device)
        if buffer.empty is not None:
            inward.wait_event(buffer.empty)
        with torch.cuda.stream(inward):
            _copy(sources, staged)
        current.wait_stream(inward)
        work(part, staged)
        outward.wait_stream(current)
        with torch.cuda.stream(outward):
            _copy(staged[:written], sources)
            buffer.empty = outward.record_event()


def _views(memory: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Cut a buffer into tensors of the same types and sizes as others, the widest first so that each is aligned."""
    places, end = {}, 0
    for index in sorted(range(len(like)), key=lambda i: -like[i].element_size()):
        places[index] = slice(end, end + like[index].nbytes)
        end += like[index].nbytes
    for index, tensor in enumerate(like):
        yield memory[places[index]].view(tensor.dtype)


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=False):
        target.copy_(source, non_blocking=True)
