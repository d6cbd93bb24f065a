"""Replayed steps are those of one rank, on CPUs: a graph's kernels are done again as they were captured, and Python's books are left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from runtime.engine import Engine
from runtime.fp8.scaling import Scaling
from runtime.model.captured import CapturedModel
from runtime.parallel.bucket import Pending
from runtime.parallel.buckets import BucketStore
from runtime.parallel.mesh import ParallelMesh
from runtime.parity import case as parity
from runtime.parity.case import Case, errors, make_engine, outcome, run_rank
from runtime.parity.cases import CASES
from runtime.parity.ranks import RankPool
from runtime.parity.table import TOLERANCE


class Again:
    """A graph for a CPU. What a capture does is done at once, which is its first replay; later ones do it again."""

    def __init__(self, store: BucketStore, fp8: Scaling | None) -> None:
        self._store, self._fp8, self._replays = store, fp8, 0
        self._calls: list[Callable[[], object]] = []
        self._before: list[Pending] = []
        self._known: set[int] = set()

    @contextmanager
    def capture(self, *places: tuple[Any, str]) -> Iterator[None]:
        """Note the calls of some methods while they are done."""
        self._before = self._store.books()
        self._known = set() if self._fp8 is None else set(self._fp8._known)
        with ExitStack() as patches:
            for owner, name in places:
                patches.enter_context(mock.patch.object(owner, name, self._noted(getattr(owner, name))))
            yield

    def _noted(self, method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **options: Any) -> object:
            self._calls.append(lambda: method(*args, **options))
            return method(*args, **options)

        return call

    def replay(self) -> None:
        self._replays += 1
        if self._replays == 1:
            return
        arrival, own = self._store._arrival, self._store.books()
        due = arrival.due
        self._set([dataclasses.replace(books, untouched=set(books.untouched)) for books in self._before])
        with ExitStack() as patches:
            if self._fp8 is not None:  # tensors that had no bound at the capture are scaled by themselves for ever
                patches.enter_context(mock.patch.object(self._fp8, "_known", self._known))
                patches.enter_context(mock.patch.object(self._fp8, "_used", set()))
            for call in self._calls:
                call()
        self._set(own)
        arrival.due = due

    def _set(self, books: list[Pending]) -> None:
        for bucket, pending in zip(self._store._buckets, books, strict=True):
            bucket.pending = pending

    def reset(self) -> None:
        self._calls.clear()


def run_replayed(case: Case) -> dict[str, Any]:
    """What a rank does on a GPU, with graphs for a CPU."""
    graphs: list[Again] = []

    def make(case: Case) -> tuple[Engine, ParallelMesh]:
        engine, mesh = make_engine(case)
        whole, store = engine._runner, engine.store
        assert isinstance(store, BucketStore)

        def new() -> Again:
            graphs.append(Again(store, engine._fp8))
            return graphs[-1]

        def capture(graph: Again, **_: object) -> Any:
            return graph.capture((store, "send_weights"), (whole, "run"), (store, "join"))

        patch(torch.cuda, "CUDAGraph", new)
        patch(torch.cuda, "graph", capture)
        engine._runner = CapturedModel(whole, store, engine.device, engine._budget, engine._fp8)  # type: ignore[arg-type]
        return engine, mesh

    with ExitStack() as patches:

        def patch(owner: Any, name: str, new: object) -> None:
            patches.enter_context(mock.patch.object(owner, name, new))

        patch(CapturedModel, "_prepared", lambda _: (None, None))
        patch(parity, "make_engine", make)
        found = run_rank(case)
    assert len(graphs) > 1
    assert any(graph._replays > 1 for graph in graphs)
    return found | {"replays": [graph._replays for graph in graphs]}


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_replayed_steps_in_fp8_are_those_of_passes(recipe: str) -> None:
    """Of bounds that follow the steps, too, which no capture may take for those of a tensor's first step."""
    model = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    fp8 = {"format": "hybrid", "recipe": recipe}
    case = Case(name="one rank", num_ranks=1, model=model, fp8=fp8, num_microbatches=3, warm_up=1, captures=True)
    found = errors(outcome([run_replayed(case)]), outcome([run_rank(case.reference)]))
    assert max(found.values()) == 0, found


NAMES = ("dp2 replayed", "tp2 replayed", "ep2 replayed", "ep2 replayed in pairs")


@pytest.mark.parametrize(("name", "documents"), [*((name, False) for name in NAMES), ("ep2 replayed", True)])
def test_replayed_steps_are_those_of_one_rank(name: str, documents: bool, pool: RankPool) -> None:
    """And all ranks replay the same graphs, also where their documents need more and less room."""
    (case,) = (case for case in CASES if case.name == name)
    warm_up = 3 if "ep" in case.parallel else 1  # with rows that travel, graphs come when their room has been enough
    case = dataclasses.replace(case, num_microbatches=8, documents=documents, warm_up=warm_up)
    want = outcome(pool.run(1, run_rank, case.reference))
    ranks = pool.run(case.num_ranks, run_replayed, case)
    found = errors(outcome(ranks), want)
    assert max(found.values()) < TOLERANCE, found
    assert ranks[0]["replays"] == ranks[1]["replays"]
