"""Each collective and its gradient against the same computation on one rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.parallel import collectives, exchange
from runtime.parity.ranks import RankPool

SIZES = (3, 1, 4)
SPLITS = ((1, 2, 0), (0, 3, 1), (2, 0, 5))
"""SPLITS[i][j]: rows that rank i sends to rank j."""


def rank_input(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def weight(rank: int, like: Tensor) -> Tensor:
    """What each rank multiplies its output with: its gradient differs from the others'."""
    return torch.randn(like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(50 + rank))


def shapes(kind: str, dim: int, uneven: bool) -> list[tuple[int, ...]]:
    """Each rank's input."""
    if kind in ("copy_to", "reduce_from"):
        return [(4, 5)] * 3
    if kind == "all_to_all":
        return [(sum(row), 2) for row in SPLITS]
    sizes = SIZES if uneven else (2, 2, 2)
    if kind in ("all_gather", "gather_from"):
        return [tuple(size if d == dim else 3 for d in range(2)) for size in sizes]
    return [tuple(sum(sizes) if d == dim else 3 for d in range(2))] * 3


def run_collective(kind: str, dim: int, uneven: bool) -> tuple[Tensor, Tensor]:
    rank, group = dist.get_rank(), dist.group.WORLD
    x = rank_input(rank if kind != "split_to" else 0, shapes(kind, dim, uneven)[rank])
    function = getattr(exchange if kind == "all_to_all" else collectives, kind)
    if kind in ("copy_to", "reduce_from"):
        out = function(x, group)
    elif kind == "all_to_all":
        out = function(x, [row[rank] for row in SPLITS], SPLITS[rank], group)
    else:
        out = function(x, dim, group, SIZES if uneven else None)
    # After a function whose backward takes equal gradients for granted, every rank weighs alike.
    alike = kind in ("reduce_from", "gather_from")
    (out * weight(0 if alike else rank, out)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def expected(kind: str, dim: int, uneven: bool) -> list[tuple[Tensor, Tensor]]:
    """The same on one rank, with all inputs at hand."""
    xs = [rank_input(r if kind != "split_to" else 0, shape) for r, shape in enumerate(shapes(kind, dim, uneven))]
    sizes = list(SIZES if uneven else (2, 2, 2))
    make: dict[str, Callable[[], list[Tensor]]] = {
        "copy_to": lambda: list(xs),
        "reduce_from": lambda: [xs[0] + xs[1] + xs[2]] * 3,
        "all_gather": lambda: [torch.cat(xs, dim)] * 3,
        "gather_from": lambda: [torch.cat(xs, dim)] * 3,
        "reduce_scatter": lambda: list((xs[0] + xs[1] + xs[2]).split(sizes, dim)),
        "split_to": lambda: list(xs[0].split(sizes, dim)),
        "all_to_all": lambda: [
            torch.cat([x.split(list(row))[r] for x, row in zip(xs, SPLITS, strict=True)]) for r in range(3)
        ],
    }
    outs = make[kind]()
    if kind == "copy_to":
        # Copies of one tensor: its gradient is the sum over ranks.
        total = sum(weight(r, xs[0]) for r in range(3))
        return [(x.detach(), torch.as_tensor(total)) for x in xs]
    alike = kind in ("reduce_from", "gather_from")
    used = outs[:1] if alike else outs
    sum((out * weight(r, out)).sum() for r, out in enumerate(used)).backward()  # type: ignore[union-attr]
    grads = [xs[0].grad if kind == "split_to" else x.grad for x in xs]
    return [(out.detach(), torch.as_tensor(grad)) for out, grad in zip(outs, grads, strict=True)]


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["all_gather", "gather_from", "reduce_scatter", "split_to"])
def test_pieces(kind: str, dim: int, uneven: bool, pool: RankPool) -> None:
    check(kind, dim, uneven, pool)


@pytest.mark.parametrize("kind", ["copy_to", "reduce_from", "all_to_all"])
def test_whole_tensors_and_rows(kind: str, pool: RankPool) -> None:
    check(kind, 0, False, pool)


def check(kind: str, dim: int, uneven: bool, pool: RankPool) -> None:
    got = pool.run(3, run_collective, kind, dim, uneven)
    for (out, grad), (want_out, want_grad) in zip(got, expected(kind, dim, uneven), strict=True):
        assert torch.allclose(out, want_out, rtol=1e-12)
        assert torch.allclose(grad, want_grad, rtol=1e-12)
