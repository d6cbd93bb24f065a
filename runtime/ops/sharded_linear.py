"""Linear maps between activations that ranks hold in pieces of the sequence, and such that they hold in columns.

Gather and product, product and sum are overlapped, forward and backward (`runtime.parallel.overlap`):

==================  ===================================  =====================================================
function            forward                              backward
==================  ===================================  =====================================================
`gather_linears`    a piece is multiplied while the      the sum of the input's gradient travels behind the
                    next one travels                     weights' gradients; where all weights are frozen, by
                                                         pieces behind the products that make it
`linear_scatter`    a piece of the output travels while  a piece of the output's gradient is multiplied while
                    the next one is multiplied           the next one travels; then the weight's gradient
==================  ===================================  =====================================================

What is kept for the backward pass is what the maps of `runtime.ops.linear` between gather and sum keep: the gathered
input where a weight wants its gradient.

Legend: S positions (s of a rank), B sequences, T tokens of all ranks, D input width, N output width of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.ops.linear import parameter_gradients, weight_gradient
from runtime.ops.norm import Kept, restore
from runtime.parallel.gradient_sink import sink_of
from runtime.parallel.overlap import Gathering, ScatteredSum, sum_pieces


def _multiply(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, out_TN: Tensor) -> None:
    if bias_N is None:
        torch.mm(x_TD, weight_ND.t(), out=out_TN)
    else:
        torch.addmm(bias_N, x_TD, weight_ND.t(), out=out_TN)


def _add_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], more: Tensor | None, out: Tensor) -> None:
    """Write the sum of several products, and of what comes from elsewhere."""
    for place, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        if place > 0:
            out.addmm_(left, right)
        elif more is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(more, left, right, out=out)


class _GatherLinears(torch.autograd.Function):
    """Keeps the gathered input where a weight wants its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, count: int, sinks: bool, gives: bool, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = cast("tuple[Tensor, ...]", parameters[:count]), parameters[count:]
        trains = any(ctx.needs_input_grad[5 : 5 + count])
        gathering = Gathering(x, group, keeps=trains or gives)
        whole = gathering.whole
        outs = [x.new_empty((*whole.shape[:-1], weight.shape[0])) for weight in weights]
        for rows, piece_TD in gathering.pieces():
            for out, weight, bias in zip(outs, weights, biases, strict=True):
                _multiply(piece_TD, weight, bias, out.view(-1, weight.shape[0])[rows])
        ctx.save_for_backward(*weights, *([whole] if trains else []))
        ctx.group, ctx.count, ctx.gives, ctx.biases, ctx.shape = group, count, gives, biases, x.shape
        ctx.sinks = [sink_of(parameter) if sinks else None for parameter in parameters]
        return (*outs, whole) if gives else tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, width = ctx.saved_tensors, ctx.shape[-1]
        weights, kept = tensors[: ctx.count], tensors[ctx.count :]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads[: ctx.count]]
        more = grads[ctx.count].reshape(-1, width) if ctx.gives else None
        grad_x: Tensor | None = None
        scattered: ScatteredSum | None = None
        wanted = ctx.needs_input_grad[5:]
        if ctx.needs_input_grad[0] and any(wanted[: ctx.count]):
            summand = flat[0].new_empty((flat[0].shape[0], width))
            _add_products(flat, weights, more, summand)
            scattered = ScatteredSum(summand, ctx.group)
        elif ctx.needs_input_grad[0]:

            def make(rows: slice, out_TD: Tensor) -> None:
                _add_products([grad[rows] for grad in flat], weights, None if more is None else more[rows], out_TD)

            grad_x = sum_pieces(make, (flat[0].shape[0] // ctx.group.size(), width), flat[0], ctx.group)
        left = parameter_gradients(flat, lambda: kept[0].reshape(-1, width), ctx.biases, ctx.sinks, wanted)
        if scattered is not None:
            grad_x = scattered.wait()
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, *left


class _LinearScatter(torch.autograd.Function):
    """Keeps each input whose weight is trained, or what it was made of."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, count: int, *tensors: Tensor) -> Tensor:
        xs, weights = tensors[:count], tensors[count:]
        flat = [x.reshape(-1, x.shape[-1]) for x in xs]
        piece = (flat[0].shape[0] // group.size(), weights[0].shape[0])

        def make(rows: slice, out_TN: Tensor) -> None:
            _add_products([x_TD[rows] for x_TD in flat], [weight.t() for weight in weights], None, out_TN)

        out = sum_pieces(make, piece, xs[0], group)
        trained = ctx.needs_input_grad[2 + count :]
        kept = [Kept.of(x) if trains else Kept.nothing() for x, trains in zip(xs, trained, strict=True)]
        ctx.save_for_backward(*weights, *(tensor for one in kept for tensor in one.tensors))
        ctx.kept = [(one.count, one.source) for one in kept]
        ctx.group, ctx.shapes, ctx.sinks = group, [x.shape for x in xs], [sink_of(weight) for weight in weights]
        return out.view(xs[0].shape[0] // group.size(), *xs[0].shape[1:-1], weights[0].shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, count = ctx.saved_tensors, len(ctx.shapes)
        weights, saved = tensors[:count], list(tensors[count:])
        wanted, trained = ctx.needs_input_grad[2 : 2 + count], ctx.needs_input_grad[2 + count :]
        gathering = Gathering(grad, ctx.group, keeps=any(trained))
        grads_x = [grad.new_empty(shape) if want else None for shape, want in zip(ctx.shapes, wanted, strict=True)]
        for rows, piece_TN in gathering.pieces():
            for grad_x, weight in zip(grads_x, weights, strict=True):
                if grad_x is not None:
                    torch.mm(piece_TN, weight, out=grad_x.view(-1, weight.shape[1])[rows])
        left: list[Tensor | None] = []
        for weight, (num, source), sink, trains in zip(weights, ctx.kept, ctx.sinks, trained, strict=True):
            mine, saved = saved[:num], saved[num:]
            rows_TD = restore(mine, source).reshape(-1, weight.shape[1]) if trains else None
            whole_TN = gathering.whole.view(-1, grad.shape[-1])
            left.append(None if rows_TD is None else weight_gradient(whole_TN, rows_TD, sink))
        return None, None, *grads_x, *left


def gather_linears(
    x_sBD: Tensor,
    weights_ND: Sequence[Tensor],
    biases_N: Sequence[Tensor | None] | None,
    group: dist.ProcessGroup,
    *,
    sinks: bool = True,
    gives: bool = False,
) -> tuple[Tensor, ...]:
    """Apply several linear maps to an input that the ranks hold in pieces; each rank has maps of its own. Collective.

    Args:
        x_sBD: [S / ranks, B, D] this rank's piece.
        weights_ND: [N, D] each; N may differ.
        biases_N: [N] or None each; None for no biases.
        group: the ranks.
        sinks: as of `runtime.ops.linear.linears`.
        gives: return the gathered input, too; what is computed from it adds to the input's gradient.

    Returns:
        [S, B, N] each; then [S, B, D], if it is to be given.
    """
    biases = biases_N if biases_N is not None else [None] * len(weights_ND)
    out = _GatherLinears.apply(x_sBD, group, len(weights_ND), sinks, gives, *weights_ND, *biases)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, ...]", out)


def linear_scatter(xs_SBD: Sequence[Tensor], weights_ND: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Add up linear maps of which each rank has some columns, and keep a piece of the sum over the ranks. Collective.

    Args:
        xs_SBD: [S, B, D] this rank's columns of each map's input; D may differ.
        weights_ND: [N, D] this rank's columns of each weight.
        group: the ranks.

    Returns:
        [S / ranks, B, N].
    """
    return cast(Tensor, _LinearScatter.apply(group, len(xs_SBD), *xs_SBD, *weights_ND))  # type: ignore[no-untyped-call]
