"""What a plan has of rows that are exchanged is what ranks do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from runtime.estimate.activations import layer_activations
from runtime.estimate.local import Local, local_sizes
from runtime.estimate.machine import find_machine
from runtime.estimate.setup import Setup
from runtime.model.recompute import RecomputeConfig
from runtime.moe import dispatch
from runtime.moe.config import MoEConfig
from runtime.moe.layer import moe_layers
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parity.case import Case, make_engine, model_of
from runtime.parity.ranks import RankPool
from tests.support.saved import saved_tensors

TOKENS = 96
MOE: dict[str, Any] = {"force_load_balancing": True, "gemm_backend": "loop"}


def rows_and_bytes(case: Case) -> tuple[int, int]:
    """Run a MoE layer forward; say how many rows arrived, and how many bytes of size autograd holds for the backward pass."""
    engine, _ = make_engine(case)
    layer = moe_layers(engine.module)[0]
    arrived: list[int] = []
    apply = dispatch.Dispatch._apply, dispatch.TokenDispatch._apply

    def noting(which: int) -> Any:
        def wrapped(self: Any, packed: torch.Tensor) -> torch.Tensor:
            arrived.append(packed.shape[0])
            return apply[which](self, packed)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.Dispatch, "_apply", noting(0))
        patch.setattr(dispatch.TokenDispatch, "_apply", noting(1))
        x = torch.randn(TOKENS, model_of(case).sizes["hidden"], requires_grad=True)
        wide = saved_tensors(layer, x, TOKENS * model_of(case).sizes["experts"])
    return sum(arrived), sum(t.nbytes for t in wide)  # without the few numbers behind each row


def planned(case: Case) -> tuple[Local, float]:
    """The same by the plan."""
    model = model_of(case)
    router = model.compute.router
    assert router is not None
    setup = Setup(
        model=model, world_size=2, parallel=ParallelConfig(**case.parallel), moe=MoEConfig(router=router, **MOE),
        optim=OptimConfig(), recompute=RecomputeConfig(), dtype="float32", seq_length=TOKENS, micro_batch_size=1,
        num_microbatches=1, graphs="none",
    )  # fmt: skip
    local = local_sizes(setup, dataclasses.replace(find_machine("h100"), row_alignment=1))
    return local, layer_activations(setup, local, 0).parts["experts"]


@pytest.mark.parametrize("topk", [2, 4])
def test_rows_that_arrive_and_what_experts_keep(topk: int, pool: RankPool) -> None:
    """Of eight experts on two ranks four choices send a token once, two choices each by itself."""
    case = Case(name="exchanged", num_ranks=2, parallel={"ep": 2}, model={"num_experts_per_tok": topk}, moe=MOE)
    found = pool.run(2, rows_and_bytes, case)
    local, kept = planned(case)
    assert sum(rows for rows, _ in found) / 2 == pytest.approx(local.arriving, rel=0.02)
    assert sum(size for _, size in found) / 2 == pytest.approx(kept, rel=0.02)
