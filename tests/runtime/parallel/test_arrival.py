"""Updated weights travel beside the next forward pass: nobody reads them before they have been waited for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from runtime.engine import Engine
from runtime.model.captured import CapturedModel
from runtime.parallel import bucket, buckets
from runtime.parallel.mesh import ParallelMesh
from runtime.parity import case as parity
from runtime.parity.case import Case, errors, global_batch, make_engine, outcome, own_share, run_rank
from runtime.parity.cases import CASES
from runtime.parity.ranks import RankPool
from runtime.parity.table import TOLERANCE

NAMES = (
    "dp2 distributed optimizer",
    "dp2 distributed optimizer, groups",
    "ep2 replayed in pairs",
    "tp2 sp ep2 etp1 dp2 distributed optimizer, adapters",
    "pp2 tp2 dp2 tied, groups",
)


class _Late:
    """Weights that come when they are waited for, and are nothing until then."""

    def __init__(self, out: torch.Tensor, piece: torch.Tensor, group: Any) -> None:
        kept = piece.clone()
        out.fill_(float("nan"))
        piece.copy_(kept)
        self._args = out, piece, group

    def wait(self) -> None:
        out, piece, group = self._args
        dist.all_gather_into_tensor(out, piece, group=group)


@contextmanager
def late() -> Iterator[None]:
    with mock.patch.object(bucket, "_all_gather", _Late):
        yield


def run_late(case: Case) -> dict[str, Any]:
    with late():
        return run_rank(case)


def run_later(case: Case) -> dict[str, Any]:
    """Weights set out when a step begins, as they do where that is a CUDA graph's beginning; none is captured."""

    def deferring(case: Case) -> tuple[Engine, ParallelMesh]:
        engine, mesh = make_engine(case)
        engine._runner = CapturedModel(engine._runner, engine.store, engine.device, engine._budget)  # type: ignore[arg-type]
        engine._runner._stopped = True
        return engine, mesh

    with mock.patch.object(parity, "make_engine", deferring):
        return run_late(case)


@pytest.mark.parametrize(
    ("name", "run"),
    [*((name, run_late) for name in NAMES), *((name, run_later) for name in NAMES[1:3])],
)
def test_nobody_reads_weights_that_have_not_come(
    name: str, run: Callable[[Case], dict[str, Any]], pool: RankPool
) -> None:
    """Steps, evaluations, means of weights and checkpoints, as on one rank."""
    (case,) = (case for case in CASES if case.name == name)
    if case.captures:  # of which a CPU knows the room for rows alone
        case = dataclasses.replace(case, warm_up=0, num_microbatches=4)
    want = outcome(pool.run(1, run_rank, case.reference))
    found = errors(outcome(pool.run(case.num_ranks, run, case)), want)
    assert max(found.values()) < TOLERANCE, found


def arrivals(case: Case) -> list[tuple[str, int]]:
    """What happens in a second step: a part begins, or weights have come."""
    defaults = buckets.BucketStore.__init__.__kwdefaults__ or {}
    with mock.patch.object(buckets.BucketStore.__init__, "__kwdefaults__", defaults | {"bucket_size": 1}):
        engine, mesh = make_engine(case)
    batches = own_share(global_batch(case, 0), mesh)
    engine.train_step(batches)
    (stage,) = engine.module
    happened: list[tuple[str, int]] = []
    for place, layer in enumerate(stage.layers):  # type: ignore[arg-type,union-attr]
        layer.register_forward_pre_hook(lambda *_, place=place: happened.append(("begins", place)))
    for each in engine.store._buckets:  # type: ignore[attr-defined]
        work, names = each.gathering, {slot.name.split(".")[2] for slot in each.slots if ".layers." in slot.name}
        if work is not None:
            (layer,) = names or {"-1"}
            each.gathering = mock.Mock(wait=lambda w=work, n=int(layer): (happened.append(("comes", n)), w.wait()))
    engine.train_step(batches[:1])
    return happened


def test_a_layer_waits_for_its_own_weights_alone(pool: RankPool) -> None:
    """With a bucket for each tensor, so that it can be told."""
    case = Case(name="dp2", num_ranks=2, parallel={"use_distributed_optimizer": True})
    for happened in pool.run(2, arrivals, case):
        begun = [happened.index(("begins", layer)) for layer in range(4)]
        for layer in range(4):
            came = [place for place, what in enumerate(happened) if what == ("comes", layer)]
            assert came, "a layer's weights travel"
            assert max(came) < begun[layer]
            assert layer == 0 or min(came) > begun[layer - 1], "not before the layer ahead of it has begun"
