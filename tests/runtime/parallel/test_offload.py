"""Masters and moments in the host's memory: every bit is that of a run which keeps them on the device."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from moeconv.layout.rect import Rect
from runtime.engine import Engine
from runtime.measures import host_bytes, params_norm
from runtime.optim import staging
from runtime.parity.case import Array, Case, assemble, copies, global_batch, make_engine, own_share
from runtime.parity.ranks import RankPool

HOST = {"optimizer_cpu_offload": True}
PIECE = 1000
"""Elements; so few that every bucket of the tiny model travels in several pieces."""
BF16 = {"dtype": "bfloat16", "optim": {"moments_dtype": "bfloat16"}}
CASES: dict[str, dict[str, Any]] = {
    "one rank, bf16 moments, frozen parts": {
        "num_ranks": 1, "dtype": "bfloat16", "optim": {"moments_dtype": "bfloat16", "freeze": ("*experts.1.*",)},
    },
    "one rank, fp32, mean of the weights": {"num_ranks": 1, "optim": {"ema_decay": 0.7}},
    "distributed optimizer": {"num_ranks": 4, "parallel": {"ep": 2, "use_distributed_optimizer": True}, **BF16},
    "fully sharded, mean of the weights": {
        "num_ranks": 4, "parallel": {"ep": 2, "fully_shard": True}, "dtype": "bfloat16", "optim": {"ema_decay": 0.7},
    },
    "half of it, tp and pp": {
        "num_ranks": 4, "parallel": {"tp": 2, "pp": 2}, "dtype": "bfloat16",
        "optim": {"optimizer_offload_fraction": 0.5, "clip_grad": 0.0},
    },
}  # fmt: skip


def steps(case: Case, optim: dict[str, Any], numbers: tuple[int, ...], saved: Any = None) -> Any:
    """Some steps on this rank; the state after them, its numbers, and how much of it was on the host."""
    staging.PIECE = PIECE
    engine, mesh = make_engine(case, **optim)
    if saved is not None:
        tensors, scalars = saved

        def read(name: str, rect: Rect) -> Array:
            return np.ascontiguousarray(tensors[name][rect.slices()])

        engine.load_state(read, tensors)
        engine.load_scalars(scalars)
    losses = [engine.train_step(own_share(global_batch(case, step), mesh)).lm_loss for step in numbers]
    norm = params_norm(engine)
    kept = {s.offloaded: s.master.numel() for s in engine.trained}
    return copies(engine.state(with_optimizer=True)), engine.scalars(), (losses, norm), host_bytes(engine), kept


def run(pool: RankPool, case: Case, optim: dict[str, Any], numbers: tuple[int, ...], saved: Any = None) -> Any:
    ranks = pool.run(case.num_ranks, steps, case, optim, numbers, saved)
    return assemble(part for rank in ranks for part in rank[0]), ranks


def equal(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_a_run_without(name: str, pool: RankPool) -> None:
    case = Case(name=name, **CASES[name])
    want, without = run(pool, case, {}, (0, 1))
    got, with_host = run(pool, case, HOST, (0, 1))
    assert equal(got, want)
    assert [rank[2] for rank in with_host] == [rank[2] for rank in without]
    assert all(rank[3] == 0 for rank in without)
    assert all(rank[3] > 0 for rank in with_host)
    share = case.optim.get("optimizer_offload_fraction", 1.0)
    assert all(set(rank[4]) == ({True, False} if share < 1 else {True}) for rank in with_host)


@pytest.mark.parametrize("first", [True, False], ids=["from the host", "to the host"])
def test_a_state_is_taken_up_with_and_without(first: bool, pool: RankPool) -> None:
    here = Case(name="ep", num_ranks=2, parallel={"ep": 2}, dtype="bfloat16")
    there = Case(name="dp", num_ranks=2, parallel={"use_distributed_optimizer": True}, dtype="bfloat16")
    optim = {"moments_dtype": "bfloat16", "ema_decay": 0.5}
    saved, ranks = run(pool, here, optim | (HOST if first else {}), (0, 1))
    again, _ = run(pool, there, optim | ({} if first else HOST), (), (saved, ranks[0][1]))
    assert equal(again, saved)


def engine_on_a_gpu(case: Case, **more: Any) -> tuple[Engine, int]:
    """An engine, and the GPU's bytes that it takes beside what is alive already."""
    gc.collect()  # engines of tests before, which would go meanwhile
    start = torch.cuda.memory_allocated()
    engine, _ = make_engine(case, **more)
    return engine, torch.cuda.memory_allocated() - start


def updated_on_a_gpu(engine: Engine) -> dict[str, torch.Tensor]:
    """The state after three updates by random gradients, not a step's: attention's backward pass adds in any order."""
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(3):
        for shard in engine.trained:
            shard.grad_shard.normal_(generator=generator)
        engine.optimizer.step(torch.full((), 2.0, device="cuda"), torch.tensor(False, device="cuda"))
        engine.optimizer.num_steps += 1
    return {item.name: item.tensor.cpu().clone() for item in engine.state(with_optimizer=True)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_on_a_gpu_bits_are_those_of_a_run_without_and_its_memory_is_less(moments: str) -> None:
    case = Case(name="gpu", num_ranks=1, dtype="bfloat16", device="cuda", model={"vocab_size": 1 << 14})
    optim = {"moments_dtype": moments, "ema_decay": 0.7}
    states, sizes = [], []
    before, staging.PIECE = staging.PIECE, 1 << 12
    try:
        for host in ({}, HOST):
            engine, num_bytes = engine_on_a_gpu(case, **optim, **host)
            sizes.append(num_bytes)
            states.append(updated_on_a_gpu(engine))
            if host:
                assert all(s.master.is_pinned() for s in engine.trained)
                assert host_bytes(engine) > 0
            assert engine.train_step(global_batch(case, 0)).lm_loss > 0
            del engine
    finally:
        staging.PIECE = before
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert sizes[1] < 0.6 * sizes[0]
