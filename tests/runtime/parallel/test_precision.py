"""bf16 and fp16 with fp32 masters, and steps with numbers that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.engine import NonFiniteError
from runtime.parity.case import Case, assemble, copies, global_batch, make_engine, own_share, run_rank
from runtime.parity.ranks import RankPool

ZERO_BUBBLE: dict[str, Any] = {"pp": 2, "ep": 2, "pp_schedule": "zero-bubble"}
LAYOUT: dict[str, Any] = {"tp": 2, "ep": 2, "sp": True, "use_distributed_optimizer": True}
SHARDED: dict[str, Any] = {"ep": 2, "fully_shard": True}


def steps(case: Case, num: int, optim: dict[str, Any]) -> list[Any]:
    """Some steps on this rank; then results and the state with masters."""
    engine, mesh = make_engine(case, **optim)
    results = [engine.train_step(own_share(global_batch(case, 0), mesh)) for _ in range(num)]
    return [results, copies(engine.state(with_optimizer=True)), engine.scalars()]


MODEL = {"num_hidden_layers": 2}
LAYOUTS = {"distributed-optimizer": LAYOUT, "fully-sharded": SHARDED, "zero-bubble": ZERO_BUBBLE}


@pytest.fixture(scope="module")
def plain(pool: RankPool) -> list[Any]:
    """Steps in fp32 on one rank, which those under each layout equal (test_parity)."""
    results: list[Any] = pool.run(1, steps, Case(name="fp32", num_ranks=1, model=MODEL), 5, {"lr": 1e-2})[0][0]
    return results


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_bf16_follows_fp32_and_keeps_fp32_masters(parallel: dict[str, Any], pool: RankPool, plain: list[Any]) -> None:
    case = Case(name="bf16", num_ranks=4, parallel=parallel, model=MODEL, dtype="bfloat16")
    ranks = pool.run(4, steps, case, 5, {"lr": 1e-2})
    losses, want = ([r.lm_loss for r in results] for results in (ranks[0][0], plain))
    assert np.allclose(losses, want, rtol=0.02), (losses, want)
    assert want[-1] < want[0] - 0.3, "the loss falls by much more than the tolerance"
    tensors = assemble(part for rank in ranks for part in rank[1])
    names = [name for name in tensors if not name.startswith("optimizer.")]
    assert {f"optimizer.master.{name}" for name in names} <= tensors.keys()
    for name in names:
        master = tensors[f"optimizer.master.{name}"]
        error = np.abs(tensors[name] - master)
        assert (error <= np.abs(master) * 2**-8).all(), "a weight is its master rounded to bf16"
        assert error.any(), "and the master is more precise"


def test_fp16_lowers_its_loss_scale_until_gradients_fit(pool: RankPool, plain: list[Any]) -> None:
    case = Case(name="fp16", num_ranks=4, parallel=LAYOUT, model=MODEL, dtype="float16")
    optim = {"lr": 1e-2, "initial_loss_scale": 2.0**20, "loss_scale_window": 3}
    ranks = pool.run(4, steps, case, 10, optim)
    results, _, scalars = ranks[0]
    skipped = [r.skipped for r in results]
    assert skipped[0], "the initial scale overflows"
    first = skipped.index(False)
    assert 1 < first < 9
    assert all(s == ranks[0][2] for _, _, s in ranks)
    assert results[-1].lm_loss < results[0].lm_loss - 0.3
    assert results[0].lm_loss == results[first].lm_loss, "a skipped step changes nothing"
    assert scalars["num_steps"] == skipped.count(False)
    assert scalars["loss_scale"] < 2.0**20
    assert skipped[-1], "the scale grows again until it is too large"
    assert results[first].grad_norm == pytest.approx(plain[0].grad_norm, rel=0.02)


def spoiled(case: Case, rank: int, name: str, optim: dict[str, Any]) -> tuple[str, bool, Any]:
    """A step after one rank's copy of a weight has become NaN; says what it raised and whether weights moved."""
    engine, mesh = make_engine(case, **optim)
    for item in engine.state(with_optimizer=False):
        if mesh.global_rank == rank and item.name == name:
            item.tensor.view(-1)[0] = float("nan")
    before = copies(engine.state(with_optimizer=True))
    try:
        skipped: Any = engine.train_step(own_share(global_batch(case, 0), mesh)).skipped
        message = ""
    except NonFiniteError as error:
        message, skipped = str(error), None
    after = copies(engine.state(with_optimizer=True))
    same = all(np.array_equal(a[3], b[3], equal_nan=True) for a, b in zip(before, after, strict=True))
    return message, same, skipped


def test_nan_is_traced_to_its_weight_and_rank(pool: RankPool) -> None:
    case = Case(name="nan", num_ranks=4, parallel={"tp": 2, "pp": 2})
    name = "model.layers.2.self_attn.o_proj.weight"
    for message, same, _ in pool.run(4, spoiled, case, 3, name, {}):
        assert f"first bad: weight {name}" in message
        assert "on rank 3" in message
        assert same


def test_nan_steps_can_be_skipped(pool: RankPool) -> None:
    case = Case(name="nan", num_ranks=2, parallel={"ep": 2})
    name = "model.layers.1.block_sparse_moe.experts.7.w2.weight"
    for message, same, skipped in pool.run(2, spoiled, case, 1, name, {"on_nonfinite": "skip"}):
        assert (message, same, skipped) == ("", True, True)


def overflowing(case: Case) -> str:
    """A step whose activations overflow though all weights are finite."""
    engine, mesh = make_engine(case)
    for item in engine.state(with_optimizer=False):
        if item.name == "model.layers.1.post_attention_layernorm.weight":
            item.tensor.fill_(3e38)
    with pytest.raises(NonFiniteError) as caught:
        engine.train_step(own_share(global_batch(case, 0), mesh))
    return str(caught.value)


def test_overflow_is_traced_to_the_module(pool: RankPool) -> None:
    message = pool.run(1, overflowing, Case(name="overflow", num_ranks=1))[0]
    assert "first bad: output of model.layers.1.mlp_norm, on rank 0" in message


def test_numbers_agree_between_ranks_and_stages(pool: RankPool) -> None:
    case = Case(
        name="numbers",
        num_ranks=4,
        parallel={"pp": 2, "ep": 2},
        model={"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]},
    )
    first, *others = pool.run(4, run_rank, case)
    assert all(other["numbers"] == first["numbers"] for other in others)
    assert first["numbers"]["aux_loss"][0] > 0
