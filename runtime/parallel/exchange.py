"""Rows that travel between the ranks of a group, beside what the device computes meanwhile.

Legend: N rows to send, M rows to receive.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.parallel.collectives import Group, group_size


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Exchange:
    """One all-to-all of rows in three steps: `depart`, `start`, `arrive`; its gradient travels back in the same way.

    `depart` and `arrive` are nodes of autograd, which runs the node that was made last first. So what the forward pass
    computes between the two, and needs neither, lies between them in the backward pass too: `arrive`'s node starts the
    gradient's way back, that is computed, and `depart`'s node waits for it.
    """

    def __init__(self, group: Group, *, overlapped: bool) -> None:
        """Make one; it is for one use.

        Args:
            group: the ranks that take part, more than one.
            overlapped: let the device go on meanwhile. Without it `start` is a step of the stream like any other.
        """
        self._group, self._overlapped = group, overlapped
        self._rows: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        self._splits: tuple[list[int], list[int]] = ([], [])
        self._num_rows = 0
        self._there = _Transfer()
        self._back = _Transfer()

    def depart(self, rows: Tensor) -> None:
        """Give the rows, before the host knows how many go where.

        Args:
            rows: [N or more, D] contiguous, in the order of the ranks that they go to.
        """
        self._num_rows = rows.shape[0]
        if self._overlapped and rows.is_cuda:
            self._ready = torch.cuda.current_stream(rows.device).record_event()
        self._token = cast(Tensor, _Depart.apply(rows, self))  # type: ignore[no-untyped-call]

    def start(self, output_splits: Sequence[int], input_splits: Sequence[int]) -> None:
        """Launch the transfer; it begins when the rows are there, whatever the device has been given since.

        Args:
            output_splits: rows to receive from each rank.
            input_splits: rows to send to each rank; rows behind their sum stay.
        """
        assert self._rows is not None, "rows depart first"
        rows, self._rows = self._rows[: sum(input_splits)], None
        self._splits = list(output_splits), list(input_splits)
        if self._ready is None:
            out = rows.new_empty(sum(output_splits), *rows.shape[1:])
            self._there.start(out, rows, *self._splits, self._group, self._overlapped)
            return
        # In the memory of a stream of its own: what is free on this one may be in use until after the rows are there.
        side = _side_stream(rows.device)
        with torch.cuda.stream(side):
            side.wait_event(self._ready)
            out = rows.new_empty(sum(output_splits), *rows.shape[1:])
            self._there.start(out, rows, *self._splits, self._group, self._overlapped)
        self._ready = None

    def arrive(self) -> Tensor:
        """Wait for the rows, on the device.

        Returns:
            [M, D] in the order of their source ranks.
        """
        token = self._token
        del self._token
        return cast(Tensor, _Arrive.apply(token, self))  # type: ignore[no-untyped-call]

    def take(self, rows: Tensor) -> None:
        """Keep the rows until `start`."""
        self._rows = rows

    def finish(self) -> Tensor:
        """What has come, for the forward pass."""
        out = self._there.finish()
        if out.is_cuda and self._overlapped:
            out.record_stream(torch.cuda.current_stream(out.device))
        return out

    def start_back(self, grad: Tensor) -> None:
        """Launch the way back of the gradient of what has come."""
        output_splits, input_splits = self._splits
        whole = grad.new_empty(self._num_rows, *grad.shape[1:])
        out = whole[: sum(input_splits)]
        self._back.start(out, grad.contiguous(), input_splits, output_splits, self._group, self._overlapped, whole)

    def finish_back(self) -> Tensor:
        """The gradient of what was sent."""
        return self._back.finish()


class _Transfer:
    """An all-to-all under way, with the tensors that it reads and writes."""

    def __init__(self) -> None:
        self._held: tuple[Any, Tensor, Tensor] | None = None

    def start(
        self,
        out: Tensor,
        rows: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        group: Group,
        overlapped: bool,
        whole: Tensor | None = None,
    ) -> None:
        work = dist.all_to_all_single(out, rows, output_splits, input_splits, group=group, async_op=overlapped)
        self._held = work, rows, out if whole is None else whole

    def finish(self) -> Tensor:
        assert self._held is not None, "what isn't under way can't arrive"
        work, _, out = self._held
        if work is not None:
            work.wait()
        self._held = None
        return out


class _Depart(torch.autograd.Function):
    """Gives a token of no elements, by which autograd knows that `arrive` depends on the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.take(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish_back(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start_back(grad)
        return grad.new_empty(0), None


def all_to_all(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: Group) -> Tensor:
    """Send blocks of rows to the ranks of a group and receive theirs; the gradient travels back the same way.

    Args:
        x: [N, ...] rows in the order of their destination ranks.
        output_splits: rows to receive from each rank.
        input_splits: rows to send to each rank.
        group: the ranks that take part; None or one rank: identity.

    Returns:
        [sum(output_splits), ...] rows in the order of their source ranks.
    """
    if group_size(group) == 1:
        return x
    exchange = Exchange(group, overlapped=False)
    exchange.depart(x.contiguous())
    exchange.start(output_splits, input_splits)
    return exchange.arrive()
