"""What two micro-batches launch, and in which order, where one is computed while the other's rows travel."""

from __future__ import annotations

import pytest
import torch

from runtime.moe.grouped_gemm import LoopGemm
from runtime.moe.grouped_mlp import grouped_mlp
from runtime.moe.packed import pack, unpack
from runtime.moe.permutation import plan_rows
from runtime.moe.tail import TAIL
from runtime.parallel.buckets import BucketStore
from runtime.parity.case import Case, global_batch, make_engine, own_share
from runtime.parity.ranks import RankPool

OPERATORS = {
    "_Linears": "linear",
    "_Experts": "experts",
    "_Depart": "depart",
    "_Arrive": "arrive",
    "c10d::alltoall_base_": "start",
}
# Two linear maps are an attention, one is the head; the micro-batches take turns, a wide space is from one to the other.
FORWARD = """
    linear linear depart     linear linear depart
    start arrive experts depart    start start    arrive experts depart    start
    arrive linear linear depart    arrive linear linear depart
    start arrive experts depart    start start    arrive experts depart    start
    arrive linear    arrive linear
"""
BACKWARD = """
    linear arrive start    linear arrive start
    depart experts arrive start    depart experts arrive start
    depart linear linear arrive start    depart linear linear arrive start
    depart experts arrive start    depart experts arrive start
    depart linear linear    depart linear linear
"""


def launches(case: Case) -> tuple[list[str], list[str]]:
    """What a rank did in the forward and the backward pass of a step of two micro-batches, as the profiler saw it."""
    engine, mesh = make_engine(case)
    batches = own_share(global_batch(case, 0), mesh)
    assert len(batches) == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        engine.accumulate(batches)
    forward: list[str] = []
    backward: list[str] = []
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        name = event.name.removesuffix("Backward")
        if name in OPERATORS:
            passed = event.name != name or backward
            (backward if passed else forward).append(OPERATORS[name])
    return forward, backward


def reductions_before_the_end(case: Case) -> list[bool]:
    """Of each bucket, whether its reduction began within the backward pass of a step's last micro-batches."""
    engine, mesh = make_engine(case)
    assert isinstance(engine.store, BucketStore)
    begun: list[bool] = []
    finish = engine.store.finish

    def note() -> None:
        begun.extend(bucket.pending.launched for bucket in store._buckets)
        finish()

    store = engine.store
    store.finish = note  # type: ignore[method-assign]
    engine.train_step(own_share(global_batch(case, 0), mesh))
    return begun


def test_reductions_begin_with_the_last_gradient_of_a_pair(pool: RankPool) -> None:
    """Also of routers' weights, for which autograd leaves one sum of both micro-batches' gradients."""
    parallel = {"ep": 2, "overlap_exchange": True, "use_distributed_optimizer": True}
    for num_microbatches in (4, 6):  # a pair; a pair and one alone
        case = Case(name="in pairs", num_ranks=2, parallel=parallel, num_microbatches=num_microbatches)
        for begun in pool.run(2, reductions_before_the_end, case):
            assert begun
            assert all(begun)


@pytest.mark.filterwarnings("ignore")  # of the profiler
def test_each_exchange_has_a_computation_of_the_other_micro_batch_beside_it(pool: RankPool) -> None:
    case = Case(
        name="overlapped",
        num_ranks=2,
        parallel={"ep": 2, "overlap_exchange": True},
        model={"num_hidden_layers": 2},
    )
    for forward, backward in pool.run(2, launches, case):
        assert forward == FORWARD.split()
        assert backward == BACKWARD.split()


def test_the_gradient_of_rows_goes_into_the_room_that_their_sums_leave() -> None:
    """No pass over the rows but those that fill and sum them: the tensor that travels is the one that was summed into."""
    plan = plan_rows(torch.tensor([[0, 2], [1, 0], [3, 2]]), 4, 6)
    x, weights = torch.randn(3, 8, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    grad, grad_weights = torch.randn(6, 8 + TAIL)[:, :8], torch.arange(6.0)
    travelled: list[int] = []

    def gradients(grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed = pack(x, weights, plan, fused=False)
        packed.register_hook(lambda grad: travelled.append(grad.data_ptr()))
        found = unpack(packed, torch.float32)
        assert found[0].data_ptr() == packed.data_ptr()
        return torch.autograd.grad(found, (x, weights), (grad, grad_weights))

    roomy, tight = gradients(grad), gradients(grad.clone(memory_format=torch.contiguous_format))
    assert travelled[0] == grad.data_ptr()
    assert travelled[1] != travelled[0]
    assert all(torch.equal(*pair) for pair in zip(roomy, tight, strict=True))
    assert torch.equal(roomy[1], plan.row_of_slot_TK.float())


def test_experts_leave_the_room() -> None:
    plan = plan_rows(torch.tensor([[0], [1], [0]]), 2, 3)
    strides: list[tuple[int, ...]] = []
    rows = torch.randn(3, 8 + TAIL)[:, :8].requires_grad_()
    rows.register_hook(lambda grad: strides.append(grad.stride()))
    out = grouped_mlp(rows, torch.ones(3, 1), torch.randn(2, 12, 8), torch.randn(2, 8, 6), plan, LoopGemm())
    out.sum().backward()
    assert strides == [(8 + TAIL, 1)]
