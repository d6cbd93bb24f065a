"""Tensors on their way to a file: piece by piece through a little page-locked memory, so that no copy of them is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.dtypes import Bytes
from runtime.checkpoint.host_buffer import ALIGNMENT, HostBuffer
from runtime.parallel.masters import join

PIECE = 1 << 22
"""Bytes of a piece at most, small enough for a processor's cache between copying, hashing and writing it. A rank has room for
two; masters that are put together take two more while that is done."""

Pieces = tuple[list[Tensor], list[torch.cuda.Event]]


class Bounce:
    """Page-locked memory for two pieces: one is looked at while the next one comes."""

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        """Make one without memory, which tensors of the host that are contiguous don't need.

        Args:
            note: told once if the memory can't be page-locked; None warns.
        """
        self._buffer = HostBuffer(note)

    @property
    def nbytes(self) -> int:
        """Of the memory."""
        return self._buffer.memory.nbytes

    def read(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Bring tensors of one shape to the host, the same elements of each at a time, in row-major order.

        Args:
            tensors: one or two of any dtypes, strides and devices; nothing may be about to write to them on another stream.

        Yields:
            [N] of each, at most `PIECE` bytes together, of the host; valid until the next one.

        Raises:
            HostMemoryError: there is no memory for two pieces.
        """
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        for device in devices:  # who broke off before may have left copies to this memory under way
            torch.cuda.current_stream(device).synchronize()
        waiting: Pieces | None = None
        count = PIECE // sum(tensor.element_size() for tensor in tensors)
        for number, parts in enumerate(cut(tensors, count)):
            coming = self._fetch(parts, number % 2)
            if waiting is not None:
                yield _arrived(waiting)
            waiting = coming
        if waiting is not None:
            yield _arrived(waiting)

    def _fetch(self, parts: Sequence[Tensor], half: int) -> Pieces:
        """Begin to copy a piece; what is contiguous on the host stays where it is."""
        size = PIECE + 2 * ALIGNMENT  # never more than two tensors; another size would be other memory
        out, end, devices = [], half * size, set[torch.device]()
        for part in parts:
            if part.is_cuda or not part.is_contiguous():
                self._buffer.reserve(2 * size, page_locked=part.is_cuda)
                memory = self._buffer.memory[end : end + part.nbytes].view(part.dtype)
                memory.view(part.shape).copy_(part, non_blocking=True)
                end += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
                devices |= {part.device} if part.is_cuda else set()
                out.append(memory)
            else:
                # No view: that leaves odd strides where there is one element.
                out.append(part.as_strided((part.numel(),), (1,)))
        events = []
        for device in devices:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return out, events


def _arrived(piece: Pieces) -> list[Tensor]:
    parts, events = piece
    for event in events:
        event.synchronize()
    return parts


def cut(tensors: Sequence[Tensor], count: int) -> Iterator[Sequence[Tensor]]:
    """Cut tensors of one shape into the same pieces, in row-major order.

    Args:
        tensors: any strides.
        count: elements of a piece at most, at least 1.

    Yields:
        A view of each.
    """
    first = tensors[0]
    if first.numel() <= count:
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(torch.split(tensor.view(-1), count) for tensor in tensors), strict=True)
    else:
        row = first[0].numel()
        rows = max(1, count // row)
        for begin in range(0, first.shape[0], rows):
            parts = [tensor[begin : begin + rows] for tensor in tensors]
            yield from cut(parts if row <= count else [part[0] for part in parts], count)


@dataclass(frozen=True, slots=True)
class Staged:
    """What a save writes of a tensor: bytes of its copy on the host, or of itself while training waits."""

    tensors: tuple[Tensor, ...]
    """One; or a master's bf16 weight and its remainder, which are put together as they are written."""
    bounce: Bounce

    @property
    def nbytes(self) -> int:
        """Of what is written."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def pieces(self) -> Iterator[Bytes]:
        """Give the bytes in order; each piece is valid until the next one."""
        for parts in self.bounce.read([tensor.detach() for tensor in self.tensors]):
            numbers = parts[0] if len(parts) == 1 else join(*parts)
            out: Bytes = numbers.view(torch.uint8).numpy()
            yield out
