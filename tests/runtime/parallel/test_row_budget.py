"""Rows that travel with room set aside: a step that outgrows it is done again, and its first attempt leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.model.captured import CapturedModel, _Needs
from runtime.moe.row_budget import RowBudget, RowRoom
from runtime.moe.row_margin import MARGIN
from runtime.ops.documents import Room
from runtime.parallel.runner import WholeModel
from runtime.parity.case import Case, copies, global_batch, make_engine, own_share
from runtime.parity.ranks import RankPool

CASE = Case(name="ep2", num_ranks=2, parallel={"ep": 2, "use_distributed_optimizer": True}, captures=True)


def steps(case: Case, small: RowRoom | None) -> dict[str, Any]:
    """Three steps on this rank, the second with the room given; None: with what the first has needed."""
    engine, mesh = make_engine(case)
    budget = engine._budget
    assert budget is not None
    results, rooms = [], []
    for step in range(3):
        if step == 1 and small is not None:
            budget.set(small)
        results.append(engine.train_step(own_share(global_batch(case, step), mesh)))
        rooms.append(budget.room)
    assert [r.repeated for r in results] == [False, small is not None, False]
    numbers = [(r.lm_loss, r.grad_norm, r.aux_loss, r.skipped) for r in results]
    loads = [r.expert_load.tolist() for r in results if r.expert_load is not None]
    return {"numbers": numbers, "loads": loads, "rooms": rooms, "state": copies(engine.state(with_optimizer=True))}


@pytest.mark.parametrize("small", [RowRoom(5, 1000), RowRoom(1000, 5), RowRoom(1, 1)], ids=["sent", "held", "both"])
def test_a_step_that_outgrows_its_room_is_done_again(pool: RankPool, small: RowRoom) -> None:
    """Bit for bit: what is done again is what would have been done with numbers read, and the room grows."""
    found, want = (pool.run(2, steps, CASE, room) for room in (small, None))
    for mine, other in zip(found, want, strict=True):
        assert mine["numbers"] == other["numbers"]
        assert mine["loads"] == other["loads"]
        for ours, theirs in zip(mine["state"], other["state"], strict=True):
            assert ours[0] == theirs[0]
            assert (ours[-1] == theirs[-1]).all(), ours[0]
        assert None not in mine["rooms"]
        assert mine["rooms"][1].sent > small.sent or mine["rooms"][1].held > small.held
        assert mine["rooms"][1].held >= 1.5 * small.held
        assert mine["rooms"] == found[0]["rooms"], "every rank has the same room"


def test_room_is_what_was_needed_and_some_more(pool: RankPool) -> None:
    """As the host would count it: of tokens for a rank at most all, of choices at most all ranks'."""
    tokens, topk = 2 * CASE.positions, 2
    for result in pool.run(2, steps, CASE, None):
        for room in result["rooms"]:
            assert room.sent <= -(-int(tokens * MARGIN) // 64) * 64
            assert tokens * topk <= room.held <= -(-int(2 * tokens * topk * MARGIN) // 64) * 64


def agreed(case: Case) -> list[Any]:
    """What this rank makes of needs that are its own."""
    engine, mesh = make_engine(case)
    model = CapturedModel(
        WholeModel(engine.module[0], engine._loss), engine.store, engine.device, RowBudget(engine.device)
    )
    rank = mesh.global_rank
    mine = [_Needs(torch.Size([2, 16]), True, Room(*pair)) for pair in ((64, 128 >> rank), (64 << rank, 16))]
    none = [_Needs(torch.Size([2, 16]), False, None)]
    return [[need.room for need in model._agreed(needs)] for needs in (mine, none)] + model._highest([rank == 1])


def test_ranks_agree_on_the_graphs_that_they_replay(pool: RankPool) -> None:
    """Documents differ between ranks; where one rank can't capture, none does."""
    for found in pool.run(2, agreed, CASE):
        assert found == [[Room(64, 128), Room(128, 16)], [None], True]


def test_room_is_settled_once_it_has_been_enough_for_some_steps() -> None:
    budget = RowBudget(torch.device("cpu"))
    for room in (RowRoom(1, 1), RowRoom(2, 2)):
        budget.set(room)
        found = []
        for _ in range(4):
            budget.begin()
            found.append(budget.settled)
        assert found == [False, False, True, True]
        budget.read_again()
        assert not budget.settled
