"""Gradients summed and reduced in bf16: what that rounds, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.parity.case import Case, assemble, copies, global_batch, make_engine, own_share, relative
from runtime.parity.ranks import RankPool
from tests.runtime.settings.lines import SHORT, make

BF16 = {"main_grads_dtype": "bf16"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "distributed optimizer": {"ep": 2, "use_distributed_optimizer": True},
    "fully sharded, experts in buckets": {"ep": 2, "fully_shard": True},
}


def test_one_micro_batch_is_rounded_once() -> None:
    case = Case(name="one", num_ranks=1, dtype="bfloat16", num_microbatches=1)
    found, norms = [], []
    for more in ({}, BF16):
        engine, _ = make_engine(case, **more)
        norms.append(engine.train_step(global_batch(case, 0)).grad_norm)
        parts = [(shard, part) for shard in engine.trained for part in shard.parts()]
        found.append({part.slot.name: shard.grad_shard[part.range] for shard, part in parts})
    wide, low = found
    assert {grad.dtype for grad in wide.values()} == {torch.float32}
    assert [name for name, grad in wide.items() if not torch.equal(low[name], grad.bfloat16())] == []
    squares = torch.stack([grad.double().square().sum() for grad in low.values()]).sum()
    assert norms[1] == pytest.approx(float(squares.sqrt()), rel=1e-6), "and the norm is not rounded"
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def steps(case: Case) -> Any:
    engine, mesh = make_engine(case)
    results, gradients = [], []
    for step in range(3):
        results.append(engine.train_step(own_share(global_batch(case, 0), mesh)))
        if step == 0:
            gradients = copies(engine.gradients())
    kept = {shard.grad_shard.dtype for shard in engine.trained if hasattr(shard, "grads")}
    return [(r.lm_loss, r.grad_norm) for r in results], gradients, kept


@pytest.mark.parametrize("name", LAYOUTS)
def test_more_of_them_over_ranks_are_near_sums_in_fp32(name: str, pool: RankPool) -> None:
    found = []
    for more in ({}, BF16):
        case = Case(name=name, num_ranks=2, parallel=LAYOUTS[name], dtype="bfloat16", optim={"lr": 1e-2, **more})
        ranks = pool.run(2, steps, case)
        assert ranks[0][2] == {torch.bfloat16 if more else torch.float32}
        found.append((ranks[0][0], assemble(part for rank in ranks for part in rank[1])))
    (wide, exact), (low, rounded) = found
    assert low[0][0] == wide[0][0], "the first step's loss knows of no gradient"
    assert low != wide
    assert low[-1][0] < low[0][0] - 0.2, "the loss falls by much more than the tolerance"
    for (loss, norm), (want, wanted) in zip(low, wide, strict=True):
        assert loss == pytest.approx(want, rel=5e-3)
        assert norm == pytest.approx(wanted, rel=2e-2)
    errors = [relative(rounded[key], exact[key]) for key in exact]
    assert 0 < max(errors) < 2e-2, "of the first step: four micro-batches, of two ranks"


@pytest.mark.parametrize(
    ("flags", "world", "said"),
    [
        ("--bf16 --main-grads-dtype bf16 --global-batch-size 1", 1, None),
        ("--bf16 --grad-reduce-in-bf16 --global-batch-size 8", 1, "gradients of 8 micro-batches are added up in bf16"),
        ("--bf16 --main-grads-dtype bf16 --global-batch-size 8", 4, "of 2 micro-batches and 4 ranks are added up"),
        ("--bf16 --main-grads-dtype bf16 --global-batch-size 8 --fully-shard", 4, "gradients of 4 ranks are added up"),
        ("--bf16 --accumulate-allreduce-grads-in-fp32 --global-batch-size 8", 1, None),
    ],
)  # fmt: skip
def test_a_run_says_what_it_rounds(flags: str, world: int, said: str | None) -> None:
    from runtime.settings.rounding import describe_rounding

    lines = describe_rounding(make(f"{SHORT} --micro-batch-size 1 {flags}"), world)
    assert (not lines) if said is None else said in lines[0]
