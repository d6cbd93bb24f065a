"""Exchanges of rows replayed in CUDA graphs, on one GPU that exchanges rows with itself over NCCL."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.exchanges import alone_together, exchange
from runtime.data.batch import Batch
from runtime.engine import Engine
from runtime.moe.row_budget import RowRoom
from tests.runtime.model.wide import batch, make_engine, packed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def _exchanging() -> Iterator[None]:
    with alone_together():
        yield


def exchanging_engine(*, captures: bool, **options: Any) -> Engine:
    engine = make_engine("bfloat16", "cuda", captures=captures, lr=0.0, **options)
    exchange(engine, room=captures)
    return engine


def graphs(engine: Engine) -> int:
    return sum(kind.graph is not None for kind in engine._runner._kinds.values())  # type: ignore[attr-defined]


CASES: list[dict[str, Any]] = [
    {},
    {"family": "qwen3_moe", "granularity": "full"},
    {"recompute_layer": True},
    {"family": "gpt_oss"},
    {"family": "deepseek_v3"},
]


@pytest.mark.usefixtures("_exchanging")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_replayed_steps_are_those_that_read_numbers_of_rows(options: dict[str, Any]) -> None:
    plain, replayed = (exchanging_engine(captures=captures, **options) for captures in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(8):
            make = packed if step % 2 else batch
            batches: list[Batch] = [make(4 * step + place) for place in range(4)]
            want, got = plain.train_step(batches), replayed.train_step(batches)
            assert got.lm_loss == want.lm_loss
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-3)
            assert got.routing is not None
            assert want.routing is not None
            assert torch.equal(got.routing.load_LE, want.routing.load_LE)
            for ours, theirs in zip(replayed.gradients(), plain.gradients(), strict=True):
                torch.testing.assert_close(ours.tensor, theirs.tensor, rtol=0.02, atol=1e-2 * float(want.grad_norm))
        assert graphs(replayed) >= 1
        assert replayed.evaluate([batch(1)]) == plain.evaluate([batch(1)])


@pytest.mark.usefixtures("_exchanging")
def test_graphs_whose_room_is_outgrown_are_made_anew() -> None:
    plain, replayed = (exchanging_engine(captures=captures) for captures in (False, True))
    batches = [batch(place) for place in range(4)]
    want = plain.train_step(batches)
    for step in range(10):
        if step == 5:
            assert graphs(replayed) == 2
            assert replayed._budget is not None
            replayed._budget.set(RowRoom(64, 100))
        assert replayed.train_step(batches).lm_loss == want.lm_loss
    assert replayed._budget is not None
    assert replayed._budget.room is not None
    assert replayed._budget.room.held >= 4 * 128 * 2
    assert graphs(replayed) == 2
