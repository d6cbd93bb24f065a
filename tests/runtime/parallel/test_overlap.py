"""Products beside their communication: against gather, product and sum one after the other, and which maps do so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.model.tensor_maps import describe_overlap
from runtime.ops.linear import linears
from runtime.ops.sharded_linear import gather_linears, linear_scatter
from runtime.parallel.collectives import all_gather, reduce_scatter
from runtime.parity.case import make_engine
from runtime.parity.cases import ALL, GATHERS, LATENT, QWEN2, WIDE, case
from runtime.parity.ranks import RankPool


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_region(overlapped: bool, frozen: bool) -> list[Tensor]:
    """Two maps, something that sees the gathered input too, and a map back: outputs, then gradients that aren't None."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    x = draw(rank, 2, 3, 5).requires_grad_()
    weights = [draw(10 + rank, 4, 5), draw(20 + rank, 7, 5)]
    bias, back, other = draw(30 + rank, 4), draw(40 + rank, 6, 11), draw(50 + rank, 5, 5).requires_grad_()
    down = draw(70 + rank, 2, 11).requires_grad_()
    parameters = [*weights, bias, back]
    for parameter in parameters:
        parameter.requires_grad_(not frozen)
    if overlapped:
        a, b, whole = gather_linears(x, weights, [bias, None], group, gives=True)
    else:
        whole = all_gather(x, 0, group)
        a, b = linears(whole, weights, [bias, None])
    joined = torch.cat([a, b], dim=-1).tanh()
    # Something that is as small as an adapter's product, and is trained beside frozen weights.
    small, wide = linears(joined, [down])[0], draw(80 + rank, 6, 2).requires_grad_()
    if overlapped:
        out = linear_scatter([joined, small], [back, wide], group)
    else:
        out = reduce_scatter(linears(joined, [back])[0] + linears(small, [wide])[0], 0, group)
    ((out * draw(60 + rank, *out.shape)).sum() + ((whole @ other) ** 2).sum()).backward()
    return [out.detach(), *(p.grad for p in (x, other, down, wide, *parameters) if p.grad is not None)]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_equal_to_one_after_the_other(num_ranks: int, frozen: bool, pool: RankPool) -> None:
    got, want = (pool.run(num_ranks, run_region, overlapped, frozen) for overlapped in (True, False))
    assert len(got[0]) == len(want[0]) == (5 if frozen else 9)
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(mine, theirs, strict=True))
    again = pool.run(num_ranks, run_region, True, frozen)
    assert all(torch.equal(a, b) for a, b in zip(again[0], got[0], strict=True)), "the order of sums is fixed"


def described(options: dict[str, Any]) -> tuple[str, bool]:
    engine, _ = make_engine(case("described", 2, {"tp": 2} | GATHERS, **options))
    logits = engine.module[0](torch.zeros(1, 4, dtype=torch.int64))
    return describe_overlap(engine.module, num_stages=1), type(logits.grad_fn).__name__ == "_GatherLinearsBackward"


@pytest.mark.parametrize(
    ("options", "done", "rest"),
    [
        ({"model": QWEN2}, ("queries", "attention's output", "dense layers' gate and up", "dense layers' down"), ()),
        (
            {"model": LATENT, "lora": ALL["lora"]},
            ("latent projections", "attention's output", "shared experts' gate and up", "shared experts' down"),
            (),
        ),
        (
            {"model": WIDE, "lora": {"rank": 2, "quantize_base": "nf4"}},
            ("head",),
            ("queries, keys and values (a quantised base)", "attention's output (a quantised base)"),
        ),
    ],
    ids=["dense", "adapters", "quantised"],
)
def test_the_log_says_which_maps(
    options: dict[str, Any], done: tuple[str, ...], rest: tuple[str, ...], pool: RankPool
) -> None:
    line, overlapped = pool.run(2, described, options)[0]
    overlapped_maps, _, others = line.partition("as without it: ")
    assert all(name in overlapped_maps for name in (*done, "head")), line
    assert all(name in others for name in rest), line
    assert bool(others) == bool(rest)
    assert overlapped, "the head's product is one with the gather"
