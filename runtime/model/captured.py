"""Micro-batches as CUDA graphs: the host launches one thing instead of thousands of kernels.

A small expert's kernels are done sooner than Python launches the next. So the forward and backward pass of a micro-batch is
captured once and replayed from then on: same kernels, same order, same bits. Everything that a replay reads or adds to
lies where it lay at capture: weights, sums of gradients, statistics, and a micro-batch's own tensors, into which each one
is copied. What Python keeps besides, the books of the gradients' buckets, is kept after each replay as at capture.

The first micro-batch of a step overwrites sums of gradients that the others add to; so there are two graphs, in one pool of
memory, since they never run at once. Documents need more where their numbers differ. Each kind of micro-batch runs as
usual once before it is captured: kernels compile and libraries choose then.

What ranks do together is captured with the rest: exchanges of rows, with the room that a `RowBudget` has; updated weights on
their way, with which a step's first graph begins; and the sums of gradients, beside the backward pass of its last one, which
therefore is a graph of its own. Ranks agree on what they capture.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.fp8.scaling import Scaling
from runtime.moe.row_budget import RowBudget
from runtime.ops.documents import Room
from runtime.parallel.buckets import Arrivals, BucketStore
from runtime.parallel.graphs import remember
from runtime.parallel.runner import Microbatch, WholeModel
from runtime.parallel.shards import Store

MOST_GRAPHS = 16
"""Captures that are kept, each of which takes memory of the driver's; other kinds of micro-batches run as usual."""


@dataclass(frozen=True, slots=True)
class _Needs:
    """What is alike for the micro-batches that a graph serves."""

    shape: torch.Size
    positions: bool
    """Whether it has positions of its own."""
    room: Room | None
    """For its documents."""

    @classmethod
    def of(cls, batch: Microbatch) -> _Needs:
        positions, documents = batch.more
        return cls(batch.tokens.shape, positions is not None, None if documents is None else documents.room())


@dataclass(frozen=True, slots=True)
class _Key:
    """What sets the micro-batches of a graph apart."""

    first: bool
    """Whether they are the first of a step, which overwrite sums."""
    last: bool
    """Whether they are those with which gradients are summed over ranks."""
    needs: tuple[_Needs, ...]
    """Of each."""


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

    def __init__(
        self,
        whole: WholeModel,
        store: Store,
        device: torch.device,
        budget: RowBudget | None = None,
        fp8: Scaling | None = None,
    ) -> None:
        """Capture nothing yet.

        Args:
            whole: runs micro-batches.
            store: has the sums of their gradients.
            device: a GPU.
            budget: room for the rows that travel; None where none do.
            fp8: what keeps the books of tensors in 8 bits; None where there are none.
        """
        assert isinstance(store, BucketStore), "captures are of ranks that each have the whole model"
        self._whole, self._store, self._device = whole, store, device
        self._budget, self._room, self._fp8 = budget, None if budget is None else budget.room, fp8
        self._sums = store.sums_over_ranks
        self._together = dist.is_initialized() and dist.get_world_size() > 1
        store.defer_sharing()
        self._kinds: dict[_Key, _Kind] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._stopped = False

    def backwards(self, num_microbatches: int) -> int | None:
        """As of `Runner.backwards`."""
        return self._whole.backwards(num_microbatches)

    @property
    def num_graphs(self) -> int:
        """Graphs that there are."""
        return sum(kind.graph is not None for kind in self._kinds.values())

    def run(self, microbatches: Sequence[Microbatch], *, backward: bool) -> None:
        """Run the micro-batches of a step; arguments as of `Runner.run`."""
        if not backward:
            self._store.settle()
            self._evaluate(microbatches)
            return
        if self._stopped or self._reads_numbers():
            self._pass(microbatches)
            return
        needs = self._agreed([_Needs.of(batch) for batch in microbatches])
        for place in range(0, len(microbatches), self._whole.at_once):
            end = place + self._whole.at_once
            last = self._sums and end >= len(microbatches)
            self._run(microbatches[place:end], _Key(place == 0, last, tuple(needs[place:end])))

    def _pass(self, microbatches: Sequence[Microbatch]) -> None:
        """Run micro-batches one kernel after another."""
        self._store.send_weights()
        self._whole.run(microbatches, backward=True)

    def _reads_numbers(self) -> bool:
        """Whether the host reads numbers of rows in this step; graphs of another room are of no more use."""
        room = None if self._budget is None else self._budget.room
        if room != self._room:
            self._room = room
            self._forget()
        return self._budget is not None and room is None

    def _highest(self, values: list[int]) -> list[int]:
        """The highest of each number over all ranks, which replay the same graphs: NCCL asks that of captured transfers.

        Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/cudagraph.html
        """
        if not self._together:
            return values
        highest = torch.tensor(values)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return highest.tolist()

    def _agreed(self, needs: list[_Needs]) -> list[_Needs]:
        """What micro-batches need on the rank that needs most."""
        rooms = [need.room for need in needs if need.room is not None]
        if not rooms:
            return needs
        found = iter(self._highest([number for room in rooms for number in (room.documents, room.longest)]))
        return [need if need.room is None else replace(need, room=Room(next(found), next(found))) for need in needs]

    def _evaluate(self, microbatches: Sequence[Microbatch]) -> None:
        if self._together and self._kinds:
            # A rank that lacks memory can't begin again by itself in the middle of what ranks do together.
            self._release()
        for place, batch in enumerate(microbatches):
            try:
                self._whole.run([batch], backward=False)
                continue
            except torch.OutOfMemoryError:
                if not self._kinds:
                    raise
            # Not while the error is handled, which keeps what the pass had by then.
            self._release()
            self._whole.run(microbatches[place : place + 1], backward=False)

    def _release(self) -> None:
        """Give back the graphs' memory, which is that of a whole pass; they are captured again when training goes on."""
        self._forget()
        torch.cuda.empty_cache()

    def _run(self, batches: Sequence[Microbatch], key: _Key) -> None:
        kind = self._kinds.get(key)
        if kind is None:
            if not self._stopped and len(self._kinds) < MOST_GRAPHS:
                batches = [_clone(batch, need.room) for batch, need in zip(batches, key.needs, strict=True)]
                self._kinds[key] = _Kind(batches)
            self._pass(batches)
            return
        if kind.graph is None and not self._settled:
            self._pass(batches)
            return
        for batch, taken in zip(batches, kind.taken, strict=True):
            _copy(batch, taken)
        captured = kind.graph is None
        if captured:
            kind.graph = self._capture(kind, key)
        if kind.graph is None:
            self._pass(kind.taken)
            return
        kind.graph.replay()
        if key.first:
            self._store.weights_sent()
            if self._fp8 is not None:
                self._fp8.note_replay()
        if not captured:  # a capture books by itself
            self._store.book(kind.arrivals)

    @property
    def _settled(self) -> bool:
        """Whether micro-batches are done as they will be in all steps to come."""
        return (self._budget is None or self._budget.settled) and (self._fp8 is None or self._fp8.settled)

    def _capture(self, kind: _Kind, key: _Key) -> torch.cuda.CUDAGraph | None:
        """Capture a micro-batch, whose kernels don't run by that; None where it can't be done, on whichever rank."""
        # What is under way can't be waited for in a capture.
        self._store.settle()
        before = self._store.books()
        graph = torch.cuda.CUDAGraph()
        failure = ""
        try:
            stream, pool = self._prepared()
            # Other threads may do what a capture forbids: page-lock memory for the next batch, say.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                if key.first:
                    self._store.send_weights(again=True)
                self._whole.run(kind.taken, backward=True)
                kind.arrivals = self._store.arrivals_since(before)
                self._store.join()
        except RuntimeError as error:
            failure = str(error).strip() or "no reason is given"
        if self._highest([bool(failure)])[0]:
            self._store.reopen(before)
            if self._fp8 is not None:
                self._fp8.forget_capture()
            self._give_up(failure or "on another rank, which says why")
            return None
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
        warnings.warn(
            f"a micro-batch can't be captured as a CUDA graph ({why.splitlines()[0]}): micro-batches run one kernel after another from here on; "
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
