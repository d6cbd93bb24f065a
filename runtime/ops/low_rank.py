"""What low-rank adapters add to the outputs of linear maps.

Legend: D input width, N output width, P rank of all adapters of an input together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from runtime.ops.linear import add_product, weight_gradient
from runtime.ops.norm import Kept, restore
from runtime.parallel.gradient_sink import GradientSink, sink_of


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter among several that share an input: its columns of the output, of P, and its rows of B."""

    out: slice
    ranks: slice
    rows: slice

    @staticmethod
    def of(columns: Sequence[tuple[int, int]], rank: int) -> tuple[Part, ...]:
        """Lay adapters of one rank out behind each other.

        Args:
            columns: for each the first of its columns of the output, and how many.
            rank: of each.
        """
        parts, row = [], 0
        for place, (first, count) in enumerate(columns):
            ranks = slice(place * rank, (place + 1) * rank)
            parts.append(Part(slice(first, first + count), ranks, slice(row, row + count)))
            row += count
        return tuple(parts)


@dataclass(frozen=True, slots=True)
class Scaling:
    """What happens to an adapter's input and output: the factor on its output, and the probability of a missing input element."""

    scale: float
    dropout: float = 0.0


def draw_seed(dropout: float) -> int:
    """Draw the seed of one dropout, the same where a checkpointed function runs again; 0 without dropout."""
    return int(torch.randint(2**62, ())) if dropout else 0


def drop(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Leave out elements at random and scale the others up.

    Args:
        x: any shape.
        dropout: the probability of an element to be left out; 0 gives x itself.
        seed: of the choice: equal seeds choose alike, so that a gradient's mask needs no memory.

    Returns:
        As x.
    """
    if not dropout:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= dropout
    return torch.where(kept, x / (1 - dropout), 0)


class _AddLowRank(torch.autograd.Function):
    """Adds to the output in place; keeps the input, or what it was made of, and the product with A."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, a_PD: Tensor, b: Tensor, parts: tuple[Part, ...], scaling: Scaling, seed: int
    ) -> Tensor:
        rows, flat = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        reduced_TP = (drop(rows, scaling.dropout, seed) @ a_PD.t()).mul_(scaling.scale)
        for part in parts:
            flat[:, part.out].addmm_(reduced_TP[:, part.ranks], b[part.rows].t())
        kept = Kept.of(x) if ctx.needs_input_grad[2] else Kept.nothing()
        ctx.save_for_backward(reduced_TP, a_PD, b, *kept.tensors)
        ctx.source, ctx.shape = kept.source, x.shape
        ctx.parts, ctx.scaling, ctx.seed = parts, scaling, seed
        ctx.sinks = sink_of(a_PD), sink_of(b)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        reduced_TP, a_PD, b, *saved = ctx.saved_tensors
        dropout, seed = ctx.scaling.dropout, ctx.seed
        flat = grad_out.reshape(-1, grad_out.shape[-1])
        grad_TP = torch.empty_like(reduced_TP)
        for part in ctx.parts:
            torch.mm(flat[:, part.out], b[part.rows], out=grad_TP[:, part.ranks])
        grad_TP.mul_(ctx.scaling.scale)
        grad_b = _grad_b(flat, reduced_TP, b, ctx.parts, ctx.sinks[1]) if ctx.needs_input_grad[3] else None
        grad_a = None
        if ctx.needs_input_grad[2]:
            rows = restore(saved, ctx.source).reshape(-1, ctx.shape[-1])
            grad_a = weight_gradient(grad_TP, drop(rows, dropout, seed), ctx.sinks[0])
        grad_x = drop(grad_TP @ a_PD, dropout, seed).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad_out, grad_x, grad_a, grad_b, None, None, None


def _grad_b(
    flat: Tensor, reduced_TP: Tensor, b: Tensor, parts: tuple[Part, ...], sink: GradientSink | None
) -> Tensor | None:
    opened = None if sink is None else sink.open()
    if sink is None or opened is None:
        return torch.cat([flat[:, part.out].t() @ reduced_TP[:, part.ranks] for part in parts])
    for part in parts:
        add_product(
            opened.total[part.rows], flat[:, part.out], reduced_TP[:, part.ranks].contiguous(), fresh=opened.fresh
        )
    sink.close()
    return None


def add_low_rank(
    out: Tensor, x: Tensor, a_PD: Tensor, b: Tensor, parts: tuple[Part, ...], scaling: Scaling, *, training: bool
) -> Tensor:
    """Add what adapters give to the output of the linear maps that they belong to.

    Args:
        out: [..., N] the maps' output, which is overwritten.
        x: [..., D] their input.
        a_PD: [P, D], the adapters' A below each other.
        b: [rows of all parts, rank], their B below each other.
        parts: which columns each adapter adds to.
        scaling: factor and dropout.
        training: whether dropout applies.

    Returns:
        [..., N], out + scale * B (A x).
    """
    scaling = scaling if training else Scaling(scaling.scale)
    seed = draw_seed(scaling.dropout)
    return cast(Tensor, _AddLowRank.apply(out, x, a_PD, b, parts, scaling, seed))  # type: ignore[no-untyped-call]
