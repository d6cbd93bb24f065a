"""The order of each pipeline rank's passes, as the schedules of torch.distributed.pipelining have it; a test compares them.

Source:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/pipelining/schedules.py (Schedule1F1B,
    ScheduleGPipe, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]
"""Forward, backward; and in a zero-bubble schedule the backward pass in two: gradients of inputs, and of weights."""


class Action(NamedTuple):
    """A pass of a micro-batch through a chunk of layers."""

    kind: Kind
    stage: int
    """Virtual stage of the model: chunk v of pipeline rank p is v * pp + p."""
    microbatch: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What decides the order."""

    pp: int
    vpp: int
    schedule: str
    num_microbatches: int
    together: int = 1
    """Micro-batches that are computed at a time, without stages."""

    def actions(self, rank: int) -> Iterator[Action]:
        """List the passes of a pipeline rank in their order."""
        if self.schedule == "zero-bubble" and self.pp > 1:
            return self._rounds(rank, zero_bubble=True)
        if self.vpp > 1:
            return self._rounds(rank, zero_bubble=False)
        if self.together > 1:
            return self._side_by_side(rank)
        warmup = min(self.num_microbatches, self.pp - rank)
        # With fewer micro-batches than stages the trainer takes GPipe's order: it is the same work.
        if self.pp > 1 and (self.schedule == "gpipe" or self.num_microbatches < self.pp):
            warmup = self.num_microbatches
        return self._one_by_one(rank, warmup)

    def beginning(self, rank: int) -> Iterator[Action]:
        """List a rank's passes until it holds as many micro-batches as it ever will."""
        left = 4 * (self.pp + self.vpp)  # passes after the first backward pass: from then on it is always the same
        for action in self.actions(rank):
            yield action
            if action.kind != "F" or left < 4 * (self.pp + self.vpp):
                left -= 1
                if not left:
                    return

    def _side_by_side(self, rank: int) -> Iterator[Action]:
        for first in range(0, self.num_microbatches, self.together):
            numbers = range(first, min(first + self.together, self.num_microbatches))
            for kind in ("F", "B"):
                yield from (Action(kind, rank, number) for number in numbers)

    def _one_by_one(self, rank: int, warmup: int) -> Iterator[Action]:
        for number in range(warmup):
            yield Action("F", rank, number)
        for number in range(self.num_microbatches):
            yield Action("B", rank, number)
            if warmup + number < self.num_microbatches:
                yield Action("F", rank, warmup + number)

    def _rounds(self, rank: int, *, zero_bubble: bool) -> Iterator[Action]:
        """Chunks take turns: each gets as many micro-batches as there are stages before the next one does."""
        total = self.vpp * self.num_microbatches
        turn = self.num_microbatches // max(1, self.num_microbatches // self.pp)
        hops = (1 if zero_bubble else 2) * (self.pp - 1 - rank)
        warmup = min((self.vpp - 1) * turn + hops, total)
        forward, backward, weights = ([0] * self.vpp for _ in range(3))
        pending: list[int] = []

        def take(counts: list[int], chunk: int, kind: Kind) -> Action:
            counts[chunk] += 1
            return Action(kind, chunk * self.pp + rank, counts[chunk] - 1)

        for step in range(total + warmup):
            if step < total:
                yield take(forward, step // turn % self.vpp, "F")
            if step < warmup:
                continue
            chunk = self.vpp - 1 - (step - warmup) // turn % self.vpp
            yield take(backward, chunk, "I" if zero_bubble else "B")
            if zero_bubble:
                pending.append(chunk)
                if step - warmup >= rank:
                    yield take(weights, pending.pop(0), "W")
        for chunk in pending:
            yield take(weights, chunk, "W")
