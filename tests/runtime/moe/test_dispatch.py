"""Dispatchers on several gloo ranks give the one-rank result: outputs, losses, every gradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.moe import sent_once
from runtime.moe.groups import MoEGroups
from runtime.moe.layer import MoELayer
from runtime.moe.row_budget import RowBudget, RowRoom
from runtime.parity.ranks import RankPool
from tests.runtime.moe.oracle import relative
from tests.support.moe import moe_config

HIDDEN, WIDTH = 12, 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """Ranks are ep x etp, etp innermost; all of them share one sequence group for the losses."""

    ep: int = 1
    etp: int = 1
    tokens: tuple[int, ...] = ()
    sequence_parallel: bool = True
    equal_tokens: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    room: RowRoom | None = None
    """What is set aside for rows; None: their numbers are read."""


CASES = {
    "ep2": Case(ep=2, tokens=(9, 9)),
    "ep4 uneven tokens, one rank without": Case(ep=4, tokens=(5, 0, 11, 1)),
    "etp2": Case(etp=2, tokens=(7, 7)),
    "ep2 known to be equal": Case(ep=2, tokens=(9, 9), equal_tokens=True),
    "ep2 etp2 known to be equal": Case(ep=2, etp=2, tokens=(6, 6, 6, 6), equal_tokens=True),
    "etp2 known to be equal": Case(etp=2, tokens=(7, 7), equal_tokens=True),
    "etp2 dealt out unevenly": Case(etp=2, tokens=(7,), sequence_parallel=False, equal_tokens=True),
    "ep2 etp2": Case(ep=2, etp=2, tokens=(6, 6, 6, 6)),
    "ep2 etp2 uneven": Case(ep=2, etp=2, tokens=(3, 8, 0, 5)),
    "tokens not sequence-parallel": Case(ep=2, etp=2, tokens=(10,), sequence_parallel=False),
    "every token to two experts of one rank": Case(ep=4, tokens=(4, 4, 4, 4), options={"groups": 4, "group_top_k": 1}),
    "losses of the batch and of the window": Case(
        ep=2, tokens=(9, 7), options={"load_balancing": ("aux_loss", "global_aux_loss")}
    ),
    "the same, equal tokens": Case(
        ep=2, tokens=(8, 8), equal_tokens=True, options={"load_balancing": ("aux_loss", "global_aux_loss")}
    ),
    "sequence loss": Case(ep=2, tokens=(8, 8), options={"load_balancing": ("seq_aux_loss",)}),
    "each token once to each rank": Case(ep=2, tokens=(9, 9), options={"topk": 5}),
    "each token once to each rank, uneven, one rank without": Case(ep=4, tokens=(5, 0, 11, 1), options={"topk": 5}),
    "each token once to each rank, ep2 etp2, recompute": Case(
        ep=2, etp=2, tokens=(3, 8, 0, 5), options={"topk": 4, "recompute_layer": True}
    ),
    "room for all rows": Case(ep=2, tokens=(9, 9), equal_tokens=True, room=RowRoom(64, 64)),
    "room for just so many": Case(ep=4, tokens=(7,) * 4, equal_tokens=True, options={"topk": 5}, room=RowRoom(7, 52)),
    "room, ep2 etp2, recompute": Case(
        ep=2, etp=2, tokens=(6,) * 4, equal_tokens=True, options={"recompute_layer": True}, room=RowRoom(6, 40)
    ),
    "recompute": Case(ep=2, etp=2, tokens=(6, 6, 6, 6), options={"recompute_layer": True}),
}


def build(options: dict[str, Any], groups: MoEGroups | None) -> MoELayer:
    config = moe_config(
        num_experts=8,
        gemm_backend="loop",
        router_dtype="fp64",
        aux_loss_coeff=(0.3,),
        z_loss_coeff=0.1,
        **({"topk": 2} | options),
    )
    return MoELayer(config, groups, hidden_size=HIDDEN, ffn_hidden_size=WIDTH, dtype=torch.float64)


def fill(layer: MoELayer, ep_rank: int = 0, etp_rank: int = 0) -> None:
    """Each rank takes its part of the same global weights."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    num_local, width = layer.experts.num_local_experts, layer.experts.w2.shape[2]
    router, w13, w2 = draw(8, HIDDEN), draw(8, 2, WIDTH, HIDDEN), draw(8, HIDDEN, WIDTH)
    own = slice(ep_rank * num_local, (ep_rank + 1) * num_local)
    columns = slice(etp_rank * width, (etp_rank + 1) * width)
    layer.router.weight.data.copy_(router)
    layer.experts.w13.data.copy_(w13[own, :, columns].flatten(1, 2))
    layer.experts.w2.data.copy_(w2[own, :, columns])


def tokens_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    total = sum(case.tokens)
    x = torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64)
    grad = torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64)
    return x, grad, torch.arange(total) % 2


def collect(layer: MoELayer, out: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    result = {name: parameter.grad for name, parameter in layer.named_parameters()}
    result |= {f"loss {name}": value for name, value in layer.stats.losses.items()}
    result |= {"load": layer.stats.load_E, "dropped": layer.stats.dropped}
    return {key: value.detach() for key, value in (result | {"out": out, "x": x.grad}).items()}


def run_rank(case: Case, dispatcher: str) -> dict[str, torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    ep_rank, etp_rank = divmod(rank, case.etp)

    def group(members: list[list[int]]) -> dist.ProcessGroup | None:
        made = [dist.new_group(ranks) for ranks in members]
        return next(g for g, ranks in zip(made, members, strict=True) if rank in ranks)

    everyone = list(range(size))
    groups = MoEGroups(
        ep=group([[e * case.etp + t for e in range(case.ep)] for t in range(case.etp)]),
        etp=group([[e * case.etp + t for t in range(case.etp)] for e in range(case.ep)]),
        tp=group([everyone]),
        tp_cp=group([everyone]),
        tp_dp_cp=group([everyone]),
        sequence_parallel=case.sequence_parallel,
        equal_tokens=case.equal_tokens,
    )
    layer = build(case.options | {"dispatcher": dispatcher}, groups)
    fill(layer, ep_rank, etp_rank)
    budget = RowBudget(torch.device("cpu"))
    if case.room is not None and dispatcher == "alltoall":
        budget.set(case.room)
        layer.row_budget = budget
    x, grad, sequence = tokens_of(case)
    if case.sequence_parallel:
        start = sum(case.tokens[:rank])
        own = slice(start, start + case.tokens[rank])
        x, grad, sequence = x[own].clone(), grad[own], sequence[own]
    x.requires_grad_()
    out = layer(x, sequence, 2)
    out.backward(grad)
    assert not budget.outgrown()
    return collect(layer, out, x)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_rank(pool: RankPool, name: str, dispatcher: str) -> None:
    case = CASES[name]
    results = pool.run(case.ep * case.etp, run_rank, case, dispatcher)
    layer = build(case.options, None)
    fill(layer)
    x, grad, sequence = tokens_of(case)
    x.requires_grad_()
    out = layer(x, sequence, 2)
    out.backward(grad)
    expected = collect(layer, out, x)

    def joined(key: str) -> torch.Tensor:
        return torch.cat([result[key] for result in results]) if case.sequence_parallel else results[0][key]

    def expert_weight(key: str) -> torch.Tensor:
        rows = [results[e * case.etp : (e + 1) * case.etp] for e in range(case.ep)]
        if key == "experts.w2":
            return torch.cat([torch.cat([r[key] for r in row], dim=2) for row in rows])
        return torch.cat([torch.cat([r[key].unflatten(1, (2, -1)) for r in row], dim=2) for row in rows]).flatten(1, 2)

    for key, value in expected.items():
        if key in ("out", "x"):
            actual = joined(key)
        elif key.startswith("experts."):
            actual = expert_weight(key)
        else:  # summands: losses, load, and gradients of what sees other tokens on each rank
            actual = torch.stack([result[key] for result in results]).sum(0)
        assert relative(actual, value) < 1e-12, key


@pytest.mark.parametrize(
    "case",
    [
        Case(ep=2, tokens=(9, 6)),
        Case(ep=2, tokens=(8, 8), equal_tokens=True),
        Case(etp=2, tokens=(7, 7), equal_tokens=True),
        Case(ep=2, tokens=(9, 9), equal_tokens=True, room=RowRoom(9, 30)),
    ],
)
def test_dispatchers_agree_on_dropped_choices(pool: RankPool, case: Case) -> None:
    # A rank's capacity comes from its own tokens, so one rank with all tokens would drop others.
    case = replace(case, options={"capacity_factor": 0.5})
    by_dispatcher = [pool.run(2, run_rank, case, dispatcher) for dispatcher in ("alltoall", "allgather")]
    for exchanged, gathered in zip(*by_dispatcher, strict=True):
        assert exchanged["dropped"] > 0
        for key, value in gathered.items():
            assert relative(exchanged[key], value) < 1e-12, key


def run_both(case: Case) -> list[dict[str, torch.Tensor]]:
    """The same with tokens that go to a rank once, and with a row for each choice."""
    least, found = sent_once.LEAST_SAVED, []
    for sent_once.LEAST_SAVED in (0.0, 1.0):
        found.append(run_rank(case, "alltoall"))
    sent_once.LEAST_SAVED = least
    return found


def test_tokens_with_dropped_choices_go_once(pool: RankPool) -> None:
    """Capacities are of a rank's tokens, so that one rank drops others: both ways are held against each other."""
    case = Case(ep=4, tokens=(8, 1, 0, 8), options={"topk": 4, "capacity_factor": 0.5})
    results = pool.run(4, run_both, case)
    assert sum(int(once["dropped"]) for once, _ in results) > 0
    for once, each in results:
        for key, value in each.items():
            assert relative(once[key], value) < 1e-12 or (not value.any() and not once[key].any()), key


def test_what_is_saved_by_sending_tokens_once() -> None:
    assert sent_once.share_saved(8, 2, 8) == pytest.approx(0)
    assert sent_once.share_saved(8, 2, 4) == pytest.approx(1 / 14)  # the other choice is the same rank's with 1 in 7
    assert sent_once.share_saved(128, 8, 4) > 0.5 > sent_once.share_saved(128, 8, 8) > sent_once.LEAST_SAVED
    assert sent_once.share_saved(8, 8, 4) == pytest.approx(0.5)
