"""Tensor parallelism's gathers and sums by pieces, which travel while products of the other pieces are computed.

A piece is what one rank of the group has, or keeps, of the first dim. Every piece goes straight from the rank that has
it to the rank that needs it, a step at a time: in step k rank r sends to r + k and receives from r - k, so that each
rank sends and receives one piece in each. Nothing depends on when a piece arrives: sums are taken in a fixed order.

Legend: T rows of a piece, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch.distributed as dist
from torch import Tensor

from runtime.parallel.collectives import all_gather_single, reduce_scatter_single

MakePiece = Callable[[slice, Tensor], None]
"""Writes this rank's summand of some rows of the whole to a tensor."""


def _steps(group: dist.ProcessGroup) -> Iterator[tuple[int, int]]:
    """For each step the rank to send to, and the one to receive from."""
    size, rank = group.size(), group.rank()
    return (((rank + step) % size, (rank - step) % size) for step in range(1, size))


def _exchange(leaving: Tensor, to: int, arriving: Tensor, source: int, group: dist.ProcessGroup) -> dist.Work:
    """Send one piece and receive another, in one launch; ranks of the group."""
    # As an exchange that is empty but for them: the host takes less time over it than over a batch of two operations.
    sent, received = [0] * group.size(), [0] * group.size()
    sent[to], received[source] = leaving.shape[0], arriving.shape[0]
    work = dist.all_to_all_single(arriving, leaving, received, sent, group=group, async_op=True)
    return cast(dist.Work, work)


class Gathering:
    """The pieces of all ranks on their way into one tensor."""

    def __init__(self, own: Tensor, group: dist.ProcessGroup, *, keeps: bool) -> None:
        """Send off this rank's piece, and expect the others'. Collective; `pieces` must be run through.

        Args:
            own: [S / ranks, ...] this rank's piece.
            group: the ranks.
            keeps: whether the whole is needed once all pieces have come.
        """
        size, self._rank = group.size(), group.rank()
        self._own, self._keeps = own.contiguous(), keeps
        self.whole = own.new_empty((own.shape[0] * size, *own.shape[1:]))
        """[S, ...]; holds this rank's own piece only if it is to be kept."""
        self._parts, self._works = self.whole.chunk(size), dict[int, dist.Work]()
        if size == 2:  # there is one piece to wait for, and a collective puts the own one in its place, too
            self._works[1 - self._rank] = all_gather_single(self.whole, self._own, group=group, async_op=True)
            return
        for to, source in _steps(group):
            self._works[source] = _exchange(self._own, to, self._parts[source], source, group)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The pieces, this rank's own first, the others as they come.

        Yields:
            The rows that a piece is of the flattened whole, and the piece: [T, W].
        """
        width = self.whole.shape[-1]
        own_TW = self._own.view(-1, width)
        num = own_TW.shape[0]
        yield slice(self._rank * num, (self._rank + 1) * num), own_TW
        if self._keeps and len(self._parts) > 2:
            self._parts[self._rank].copy_(self._own)
        for source, work in self._works.items():
            work.wait()
            yield slice(source * num, (source + 1) * num), self._parts[source].view(-1, width)


def sum_pieces(make: MakePiece, shape: tuple[int, int], like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum what the ranks make, each piece for the rank that keeps it: the others' first, which travel meanwhile.

    Args:
        make: writes this rank's summand.
        shape: T and W, of a piece.
        like: has the dtype and the device.
        group: the ranks.

    Returns:
        [T, W] this rank's piece of the sum, summed in the order of the steps.
    """
    size, rank, num = group.size(), group.rank(), shape[0]
    summands = like.new_empty((size, *shape))
    leaving, works = [], []
    for step, (to, source) in enumerate(_steps(group), start=1):
        leaving.append(like.new_empty(shape))  # kept until it has been sent
        make(slice(to * num, (to + 1) * num), leaving[-1])
        works.append(_exchange(leaving[-1], to, summands[step], source, group))
    make(slice(rank * num, (rank + 1) * num), summands[0])
    for work in works:
        work.wait()
    return summands[0] + summands[1] if size == 2 else summands.sum(0)


class ScatteredSum:
    """A sum over the ranks of which each keeps a piece, on its way."""

    def __init__(self, summand: Tensor, group: dist.ProcessGroup) -> None:
        """Send off this rank's summand [S, ...]. Collective; `wait` must follow."""
        self._summand = summand
        self._out = summand.new_empty((summand.shape[0] // group.size(), *summand.shape[1:]))
        self._work = reduce_scatter_single(self._out, summand, group=group, async_op=True)

    def wait(self) -> Tensor:
        """This rank's piece of the sum: [S / ranks, ...]."""
        self._work.wait()
        return self._out
