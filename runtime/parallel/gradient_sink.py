"""How a parameter's gradient gets to its sum: left by autograd and added, or added by the kernel that computes it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.parallel.shards import Slot


@dataclass(frozen=True, slots=True)
class OpenSum:
    """A gradient's sum that a backward function adds to."""

    total: Tensor
    """In the parameter's shape."""
    fresh: bool
    """Nothing has been added in this step: the sum holds what the step before left, and is to be overwritten."""

    def add(self, grad: Tensor) -> None:
        """Add a summand in any precision; the sum is rounded to its own once."""
        if self.fresh:
            self.total.copy_(grad)
        else:
            self.total.add_(grad)

    def zeroed(self) -> Tensor:
        """The sum, zero where nothing has been added: for a summand that doesn't touch every element."""
        return self.total.zero_() if self.fresh else self.total


class Sums(Protocol):
    """Where the sums of several parameters' gradients lie."""

    @property
    def by_autograd(self) -> bool:
        """Whether autograd must have every gradient of this backward pass."""

    def open_sum(self, slot: Slot) -> OpenSum:
        """A parameter's accumulated gradient."""

    def accumulate(self, slot: Slot, parameter: Tensor) -> None:
        """Add the gradient that autograd has left at a parameter."""

    def arrived(self, count: int = 1) -> None:
        """Count gradients that have been added."""


_passes = 1


@contextmanager
def together(count: int) -> Iterator[None]:
    """Say that the backward pass within is that of so many micro-batches, of which autograd leaves a parameter one sum."""
    global _passes
    _passes, before = count, _passes
    try:
        yield
    finally:
        _passes = before


class GradientSink:
    """Takes the gradients of one parameter, in each backward pass in one of two ways.

    Autograd leaves a gradient at the parameter, and `collect`, its hook, adds it: 12 bytes of traffic an element in
    bf16 besides the product. A backward function that knows of the sink adds its product to `open`'s tensor itself (8
    bytes, and no rounding to bf16), says `close` and gives autograd nothing.
    """

    def __init__(self, bucket: Sums, slot: Slot) -> None:
        """Take the gradients of a bucket's slot."""
        # A tensor's hooks are invisible to the garbage collector: one that held its bucket would keep both for good.
        self._bucket, self._slot, self._closed = weakref.ref(bucket), slot, False

    @property
    def bucket(self) -> Sums:
        """Where the sum lies."""
        bucket = self._bucket()
        assert bucket is not None, "a store outlives the backward passes of its parameters"
        return bucket

    def open(self) -> OpenSum | None:
        """The sum so far, to be added to or overwritten; None where autograd must have the gradient."""
        bucket = self.bucket
        return None if bucket.by_autograd else bucket.open_sum(self._slot)

    def close(self) -> None:
        """Say that the gradient of this backward pass has been added to the sum."""
        self._closed = True
        self.bucket.arrived()

    def reset(self) -> None:
        """Forget a backward pass that was broken off."""
        self._closed = False

    def collect(self, parameter: Tensor) -> None:
        """Add the gradient that autograd has left at the parameter."""
        if self._closed and parameter.grad is None:
            self._closed = False  # autograd calls its hooks for a gradient that it didn't get, too
            return
        self.bucket.accumulate(self._slot, parameter)
        self.bucket.arrived(_passes)


def attach_sink(parameter: Tensor, sink: GradientSink) -> None:
    """Tell backward functions of a parameter where its gradient may go."""
    parameter.gradient_sink = sink  # type: ignore[attr-defined]


def sink_of(parameter: Tensor | None) -> GradientSink | None:
    """The sink of a parameter, if it has one; a quantised weight is none."""
    return getattr(parameter, "gradient_sink", None)


def deliver(sink: GradientSink | None, grad: Tensor, parameter: Tensor) -> Tensor | None:
    """Bring a finished gradient to its sum, or round it for autograd.

    Args:
        sink: the parameter's; None where it has none.
        grad: the gradient, in any precision.
        parameter: what it is the gradient of.

    Returns:
        What a backward function gives autograd: None where the gradient has been added.
    """
    return deliver_to(sink, None if sink is None else sink.open(), grad, parameter)


def deliver_to(sink: GradientSink | None, opened: OpenSum | None, grad: Tensor, parameter: Tensor) -> Tensor | None:
    """Do as `deliver` where the sink has been opened, as it is once in each backward pass; `opened` is what that gave."""
    if sink is None or opened is None:
        return grad.to(parameter.dtype)
    opened.add(grad)
    sink.close()
    return None


def deliver_parts(sink: GradientSink | None, parts: Tensor, parameter: Tensor) -> Tensor | None:
    """Do as `deliver` with a gradient that is the sum of parts along dim 0: the first of a step is summed up where it belongs.

    Args:
        sink: as of `deliver`.
        parts: [P, ...] in the parameter's shape each.
        parameter: as of `deliver`.

    Returns:
        As `deliver`.
    """
    opened = None if sink is None else sink.open()
    if sink is None or opened is None or not opened.fresh or opened.total.dtype != parts.dtype:
        return deliver_to(sink, opened, parts.sum(0), parameter)
    torch.sum(parts, 0, out=opened.total)
    sink.close()
    return None
