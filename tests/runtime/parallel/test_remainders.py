"""Masters kept as what their bf16 weights lack: every bit is that of a run with fp32 masters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moeconv.layout.rect import Rect
from runtime.model.diagnosis import NonFiniteError
from runtime.parallel import masters
from runtime.parallel.masters import join, off_ties, split
from runtime.parity.case import Array, Case, copies, global_batch, make_engine, own_share
from runtime.parity.ranks import RankPool
from tests.runtime.parallel.test_offload import HOST, engine_on_a_gpu, equal, run, updated_on_a_gpu

REMAINDER = {"master_weights": "remainder"}
START = Case(name="one rank", num_ranks=1, dtype="bfloat16", optim={"ema_decay": 0.7})
CASES: dict[str, dict[str, Any]] = {
    "one rank, frozen parts": {"num_ranks": 1, "optim": {"freeze": ("*experts.1.*",)}},
    "distributed optimizer, bf16 moments and gradients": {
        "num_ranks": 2, "parallel": {"ep": 2, "use_distributed_optimizer": True},
        "optim": {"moments_dtype": "bfloat16", "main_grads_dtype": "bf16"},
    },
    "fully sharded, experts in buckets, mean of the weights": {
        "num_ranks": 2, "parallel": {"ep": 2, "fully_shard": True}, "optim": {"ema_decay": 0.7},
    },
    "on the host, pp, mean of the weights": {
        "num_ranks": 2, "parallel": {"pp": 2}, "optim": {**HOST, "ema_decay": 0.7},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(pool: RankPool) -> Any:
    """A state after a step."""
    state, ranks = run(pool, START, {}, (0,))
    return state, ranks[0][1]


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_a_run_with_fp32_masters(name: str, pool: RankPool, saved: Any) -> None:
    case = Case(name=name, dtype="bfloat16", **CASES[name])
    want, with_fp32 = run(pool, case, {}, (1, 2), saved)
    got, with_remainders = run(pool, case, REMAINDER, (1, 2), saved)
    assert equal(got, want)
    assert [rank[2] for rank in with_remainders] == [rank[2] for rank in with_fp32]
    if case.optim.get("optimizer_cpu_offload"):
        assert all(a[3] < b[3] for a, b in zip(with_remainders, with_fp32, strict=True)), "less of the host's memory"


@pytest.mark.parametrize("first", [True, False], ids=["from remainders", "to remainders"])
def test_a_run_goes_on_with_and_without_under_another_layout(first: bool, pool: RankPool, saved: Any) -> None:
    here = Case(name="ep", num_ranks=2, parallel={"ep": 2}, dtype="bfloat16", optim={"ema_decay": 0.7})
    there = Case(
        name="dp", num_ranks=2, parallel={"use_distributed_optimizer": True}, dtype="bfloat16", optim=here.optim
    )
    left, ranks = run(pool, here, REMAINDER if first else {}, (1,), saved)
    again, _ = run(pool, there, {} if first else REMAINDER | HOST, (), (left, ranks[0][1]))
    assert equal(again, left)


def in_pieces(case: Case, state: Any) -> Any:
    """A step, the mean in the weights' place and back, and a loss with each; masters are put together in many pieces."""
    masters.PIECE = 1000
    engine, mesh = make_engine(case)
    tensors, scalars = state

    def read(name: str, rect: Rect) -> Array:
        return np.ascontiguousarray(tensors[name][rect.slices()])

    engine.load_state(read, tensors)
    engine.load_scalars(scalars)
    batch = own_share(global_batch(case, 1), mesh)
    engine.train_step(batch)
    before = copies(engine.state(with_optimizer=True))
    with engine.mean_of_weights():
        losses = [engine.evaluate(batch)]
    losses.append(engine.evaluate(batch))
    after = copies(engine.state(with_optimizer=True))
    return losses, [part[3] for part in before], [part[3] for part in after]


def test_the_mean_takes_the_weights_place_and_gives_it_back(pool: RankPool, saved: Any) -> None:
    found = []
    for more in ({}, REMAINDER):
        case = Case(name="mean", num_ranks=1, dtype="bfloat16", optim={"ema_decay": 0.7, **more})
        ((losses, before, after),) = pool.run(1, in_pieces, case, saved)
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        found.append((losses, before))
    assert found[0][0] == found[1][0]
    assert all(np.array_equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_weight_that_is_not_finite_is_named(pool: RankPool) -> None:
    engine, _ = make_engine(Case(name="nan", num_ranks=1, dtype="bfloat16"), **REMAINDER)
    name = "model.layers.2.self_attn.o_proj.weight"
    for item in engine.state(with_optimizer=False):
        if item.name == name:
            item.tensor.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=f"first bad: weight {name}"):
        engine.train_step(global_batch(START, 0))


def every_kind() -> torch.Tensor:
    """Each pattern of the 17 bits that decide about a rounding, at either end of the exponents and between, both signs."""
    low = torch.arange(1 << 17, dtype=torch.int32)
    upper = [0, 1 << 17, 0x3F800000, 0x3FFE0000, 0x41230000 & -(1 << 17), 0x7F7E0000]
    bits = torch.cat([low | high for high in upper])
    return torch.cat([bits, bits | -(1 << 31)]).view(torch.float32)


def test_halves_lose_nothing() -> None:
    numbers = torch.cat([every_kind(), torch.tensor([float("inf"), -float("inf")])])
    weight, remainder = split(numbers)
    assert torch.equal(join(weight, remainder).view(torch.int32), numbers.view(torch.int32))
    ties = (numbers.view(torch.int32) & 0x1FFFF) == 0x8000
    assert torch.equal(weight[~ties], numbers[~ties].bfloat16()), "the nearest, ties to even"
    assert torch.equal(weight[ties].abs() > numbers[ties].abs(), torch.ones(int(ties.sum()), dtype=torch.bool))
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert split(odd)[0].isnan().all()
    assert join(*split(odd)).isnan().all()


def test_updates_leave_no_number_that_halves_round_otherwise() -> None:
    numbers = every_kind()
    moved = off_ties(numbers)
    assert torch.equal(split(moved)[0], moved.bfloat16())
    assert torch.equal(moved.bfloat16(), numbers.bfloat16()), "and round no number to another weight"
    changed = moved != numbers
    assert int(changed.sum()) * (1 << 17) == numbers.numel()
    assert ((numbers.view(torch.int32) - moved.view(torch.int32))[changed] == 1).all(), "one last place"


def state_and_bytes(case: Case, **more: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The state after three updates, and the GPU's bytes that the engine takes."""
    engine, num_bytes = engine_on_a_gpu(case, ema_decay=0.7, **more)
    if "master_weights" not in more:
        for item in engine.state(with_optimizer=True):
            if item.name.startswith(("optimizer.master.", "optimizer.ema.")):
                item.tensor.copy_(off_ties(item.tensor))  # remainders leave ties where they are loaded
    state = updated_on_a_gpu(engine)
    assert engine.train_step(global_batch(case, 0)).lm_loss > 0
    return state, num_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_on_a_gpu_bits_are_those_of_fp32_masters_in_less_memory(moments: str) -> None:
    case = Case(name="gpu", num_ranks=1, dtype="bfloat16", device="cuda", model={"vocab_size": 1 << 14})
    runs = [state_and_bytes(case, moments_dtype=moments, **more) for more in ({}, REMAINDER, REMAINDER | HOST)]
    states, bytes_of_state = zip(*runs, strict=True)
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for other in states[1:]:
        assert [name for name, want in states[0].items() if not torch.equal(other[name], want)] == []
    assert bytes_of_state[2] < bytes_of_state[1] < bytes_of_state[0]
