"""Micro-batches as CUDA graphs: the host launches one thing instead of thousands of kernels.

A small expert's kernels are done sooner than Python launches the next. So the forward and backward pass of a micro-batch is
captured once and replayed from then on: same kernels, same order, same bits. Everything that a replay reads or adds to
lies where it lay at capture: weights, sums of gradients, statistics, and a micro-batch's own tensors, into which each one
is copied. What Python keeps besides, the books of the gradients' buckets, is kept after each replay as at capture.

The first micro-batch of a step overwrites sums of gradients that the others add to; so there are two graphs, in one pool of
memory, since they never run at once. Documents need more where their numbers differ. Each kind of micro-batch runs as
usual once before it is captured: kernels compile and libraries choose then.

Ranks that exchange rows capture the exchanges, too, with the room that a `RowBudget` has. What they sum over each other at the
end of a step follows the last replay.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from runtime.job.graphs import remember
from runtime.moe.row_budget import RowBudget
from runtime.parallel.buckets import Arrivals, BucketStore
from runtime.parallel.runner import Microbatch, WholeModel
from runtime.parallel.shards import Store

MOST_GRAPHS = 16
"""Captures that are kept, each of which takes memory of the driver's; other kinds of micro-batches run as usual."""

Key = tuple[bool, tuple[Any, ...]]
"""Whether they are the first of a step, and what is needed for each, as of `_needs`."""


@dataclass(slots=True)
class _Kind:
    """Micro-batches that one graph serves: one, or those whose passes are mixed."""

    taken: list[Microbatch]
    """What a replay reads."""
    graph: torch.cuda.CUDAGraph | None = None
    """None: nothing has been captured yet."""
    arrivals: list[Arrivals] = field(default_factory=list)
    """What a replay does to the buckets' books."""


class CapturedModel:
    """Micro-batches one after another through a whole model, replayed where some like them have been captured."""

    def __init__(self, whole: WholeModel, store: Store, device: torch.device, budget: RowBudget | None = None) -> None:
        """Capture nothing yet.

        Args:
            whole: runs micro-batches.
            store: has the sums of their gradients.
            device: a GPU.
            budget: room for the rows that travel; None where none do.
        """
        assert isinstance(store, BucketStore), "captures are of ranks that each have the whole model"
        self._whole, self._store, self._device = whole, store, device
        self._budget, self._room = budget, None if budget is None else budget.room
        self._kinds: dict[Key, _Kind] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._stopped = False

    def backwards(self, num_microbatches: int) -> int | None:
        """As of `Runner.backwards`: one more than there are, since a replay can begin no reduction; all begin at the end."""
        return num_microbatches + 1

    def run(self, microbatches: Sequence[Microbatch], *, backward: bool) -> None:
        """Run the micro-batches of a step; arguments as of `Runner.run`."""
        reads = backward and self._reads_numbers()
        self._store.settle()  # what a replay computes with is there when it begins
        for place in range(0, len(microbatches), self._whole.at_once):
            batches = microbatches[place : place + self._whole.at_once]
            if not backward:
                self._evaluate(batches)
            elif self._stopped or reads:
                self._whole.run(batches, backward=True)
            else:
                self._run(batches, first=place == 0)

    def _reads_numbers(self) -> bool:
        """Whether the host reads numbers of rows in this step; graphs of another room are of no more use."""
        room = None if self._budget is None else self._budget.room
        if room != self._room:
            self._room = room
            self._forget()
        return self._budget is not None and room is None

    def _evaluate(self, batches: Sequence[Microbatch]) -> None:
        try:
            self._whole.run(batches, backward=False)
            return
        except torch.OutOfMemoryError:
            if not self._kinds:
                raise
        # Graphs keep the memory of a whole pass; they are captured again when training goes on. Not while the error is
        # handled, which keeps what the pass had by then.
        self._forget()
        torch.cuda.empty_cache()
        self._whole.run(batches, backward=False)

    def _run(self, batches: Sequence[Microbatch], *, first: bool) -> None:
        key = (first, tuple(_needs(batch) for batch in batches))
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) < MOST_GRAPHS:
                batches = [_clone(batch) for batch in batches]
                self._kinds[key] = _Kind(batches)
            self._whole.run(batches, backward=True)
            return
        for batch, taken in zip(batches, kind.taken, strict=True):
            _copy(batch, taken)
        if kind.graph is not None:
            self._store.book(kind.arrivals)
        else:
            kind.graph = self._capture(kind)
        if kind.graph is not None:
            kind.graph.replay()
        else:
            self._whole.run(kind.taken, backward=True)

    def _capture(self, kind: _Kind) -> torch.cuda.CUDAGraph | None:
        """Capture a micro-batch, whose kernels don't run by that; None where it can't be done."""
        before = self._store.books()
        graph = torch.cuda.CUDAGraph()
        try:
            stream, pool = self._prepared()
            # Other threads may do what a capture forbids: page-lock memory for the next batch, say.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._whole.run(kind.taken, backward=True)
        except RuntimeError as error:
            self._store.reopen(before)
            self._give_up(str(error))
            return None
        kind.arrivals = self._store.arrivals_since(before)
        remember(graph)
        return graph

    def _prepared(self) -> tuple[torch.cuda.Stream, Any]:
        """The stream to capture on, with the libraries' workspaces for it; and the graphs' memory."""
        # What the passes before have left in the allocator's cache is of no use to a graph, which has memory of its own.
        gc.collect()
        torch.cuda.empty_cache()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                small = torch.zeros(16, 16, device=self._device, dtype=torch.bfloat16)
                torch.mm(small, small)
            self._stream.synchronize()
        return self._stream, self._pool

    def _forget(self) -> None:
        """Let go of all graphs, and of their memory: a pool that has lost its last graph takes no other."""
        self._kinds.clear()
        self._pool = None

    def _give_up(self, why: str) -> None:
        self._stopped = True
        self._forget()
        torch.cuda.synchronize(self._device)
        first = why.strip().splitlines()[0] if why.strip() else "no reason is given"
        warnings.warn(
            f"a micro-batch can't be captured as a CUDA graph ({first}): micro-batches run one kernel after another from here on; "
            "--cuda-graph-impl none doesn't try",
            stacklevel=2,
        )


def _tensors(batch: Microbatch) -> list[Tensor]:
    """A micro-batch's own tensors."""
    positions = batch.more[0]
    return [batch.tokens, batch.labels, *([] if positions is None else [positions])]


def _needs(batch: Microbatch) -> tuple[Any, ...]:
    """The shape, whether it has positions of its own, and the room that its documents need: alike for what one graph serves."""
    positions, documents = batch.more
    return batch.tokens.shape, positions is not None, None if documents is None else documents.room()


def _clone(batch: Microbatch) -> Microbatch:
    positions, documents = batch.more
    kept = None if documents is None else documents.with_room(documents.room())
    more = (None if positions is None else positions.clone(), kept)
    return replace(batch, tokens=batch.tokens.clone(), labels=batch.labels.clone(), more=more)


def _copy(batch: Microbatch, taken: Microbatch) -> None:
    for source, target in zip(_tensors(batch), _tensors(taken), strict=True):
        target.copy_(source)
    if taken.more[1] is not None:
        taken.more[1].take(batch.more[1])
