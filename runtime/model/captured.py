"""Micro-batches as CUDA graphs: the host launches one thing instead of thousands of kernels.

A small expert's kernels are done sooner than Python launches the next. So the forward and backward pass of a micro-batch is
captured once and replayed from then on: same kernels, same order, same bits. Everything that a replay reads or adds to
lies where it lay at capture: weights, sums of gradients, statistics, and a micro-batch's own tensors, into which each one
is copied. What Python keeps besides, the books of the gradients' buckets, is kept after each replay as at capture.

The first micro-batch of a step overwrites sums of gradients that the others add to; so there are two graphs, in one pool of
memory, since they never run at once. Documents need more where their numbers differ. Each kind of micro-batch runs as
usual once before it is captured: kernels compile and libraries choose then.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from runtime.ops.documents import Room
from runtime.parallel.buckets import Arrivals, BucketStore
from runtime.parallel.runner import Microbatch, WholeModel
from runtime.parallel.shards import Store

MOST_GRAPHS = 16
"""Captures that are kept, each of which takes memory of the driver's; other kinds of micro-batches run as usual."""

Key = tuple[bool, torch.Size, bool, Room | None]
"""Whether it is the first of a step, its shape, whether it has positions of its own, and the room that its documents need."""


@dataclass(slots=True)
class _Kind:
    """Micro-batches that one graph serves."""

    taken: Microbatch
    """What a replay reads."""
    graph: torch.cuda.CUDAGraph | None = None
    """None: nothing has been captured yet."""
    arrivals: list[Arrivals] = field(default_factory=list)
    """What a replay does to the buckets' books."""


class CapturedModel:
    """Micro-batches one after another through a whole model, replayed where one like them has been captured."""

    def __init__(self, whole: WholeModel, store: Store, device: torch.device) -> None:
        """Capture nothing yet.

        Args:
            whole: runs a micro-batch.
            store: has the sums of its gradients.
            device: a GPU.
        """
        assert isinstance(store, BucketStore), "captures are of ranks that each have the whole model"
        self._whole, self._store, self._device = whole, store, device
        self._kinds: dict[Key, _Kind] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._stopped = False

    def backwards(self, num_microbatches: int) -> int | None:
        """As of `Runner.backwards`: one more than there are, since a replay can begin no reduction; all begin at the end."""
        return num_microbatches + 1

    def run(self, microbatches: Sequence[Microbatch], *, backward: bool) -> None:
        """Run the micro-batches of a step; arguments as of `Runner.run`."""
        for place, batch in enumerate(microbatches):
            if not backward:
                self._evaluate(batch)
            elif self._stopped:
                self._whole.run([batch], backward=True)
            else:
                self._run(batch, first=place == 0)

    def _evaluate(self, batch: Microbatch) -> None:
        try:
            self._whole.run([batch], backward=False)
            return
        except torch.OutOfMemoryError:
            if not self._kinds:
                raise
        # Graphs keep the memory of a whole pass; they are captured again when training goes on. Not while the error is
        # handled, which keeps what the pass had by then.
        self._kinds.clear()
        torch.cuda.empty_cache()
        self._whole.run([batch], backward=False)

    def _run(self, batch: Microbatch, *, first: bool) -> None:
        positions, documents = batch.more
        key = (first, batch.tokens.shape, positions is not None, None if documents is None else documents.room())
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) < MOST_GRAPHS:
                batch = _clone(batch, key[-1])
                self._kinds[key] = _Kind(batch)
            self._whole.run([batch], backward=True)
            return
        _copy(batch, kind.taken)
        if kind.graph is not None:
            self._store.book(kind.arrivals)
        else:
            kind.graph = self._capture(kind)
        if kind.graph is not None:
            kind.graph.replay()
        else:
            self._whole.run([kind.taken], backward=True)

    def _capture(self, kind: _Kind) -> torch.cuda.CUDAGraph | None:
        """Capture a micro-batch, whose kernels don't run by that; None where it can't be done."""
        before = self._store.books()
        graph = torch.cuda.CUDAGraph()
        try:
            stream, pool = self._prepared()
            # Other threads may do what a capture forbids: page-lock memory for the next batch, say.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._whole.run([kind.taken], backward=True)
        except RuntimeError as error:
            self._store.reopen(before)
            self._give_up(str(error))
            return None
        kind.arrivals = self._store.arrivals_since(before)
        return graph

    def _prepared(self) -> tuple[torch.cuda.Stream, Any]:
        """The stream to capture on, with the libraries' workspaces for it; and the graphs' memory."""
        # What the passes before have left in the allocator's cache is of no use to a graph, which has memory of its own.
        gc.collect()
        torch.cuda.empty_cache()
        if self._stream is None or self._pool is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.stream(self._stream):
                small = torch.zeros(16, 16, device=self._device, dtype=torch.bfloat16)
                torch.mm(small, small)
            self._stream.synchronize()
        return self._stream, self._pool

    def _give_up(self, why: str) -> None:
        self._stopped = True
        self._kinds.clear()
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


def _clone(batch: Microbatch, room: Room | None) -> Microbatch:
    positions, documents = batch.more
    more = (None if positions is None else positions.clone(), None if room is None else documents.with_room(room))
    return replace(batch, tokens=batch.tokens.clone(), labels=batch.labels.clone(), more=more)


def _copy(batch: Microbatch, taken: Microbatch) -> None:
    for source, target in zip(_tensors(batch), _tensors(taken), strict=True):
        target.copy_(source)
    if taken.more[1] is not None:
        taken.more[1].take(batch.more[1])
