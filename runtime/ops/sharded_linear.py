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


def _input_gradient(
    grads_TN: Sequence[Tensor], weights_ND: Sequence[Tensor], more_TD: Tensor | None, out_TD: Tensor
) -> None:
    """Write the sum of the maps' products with the gradients of their outputs, and of what comes from elsewhere."""
    first = True
    for grad, weight in zip(grads_TN, weights_ND, strict=True):
        if not first:
            out_TD.addmm_(grad, weight)
        elif more_TD is None:
            torch.mm(grad, weight, out=out_TD)
        else:
            torch.addmm(more_TD, grad, weight, out=out_TD)
        first = False


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
            _input_gradient(flat, weights, more, summand)
            scattered = ScatteredSum(summand, ctx.group)
        elif ctx.needs_input_grad[0]:

            def make(rows: slice, out_TD: Tensor) -> None:
                _input_gradient([grad[rows] for grad in flat], weights, None if more is None else more[rows], out_TD)

            grad_x = sum_pieces(make, (flat[0].shape[0] // ctx.group.size(), width), flat[0], ctx.group)
        left = parameter_gradients(flat, lambda: kept[0].reshape(-1, width), ctx.biases, ctx.sinks, wanted)
        if scattered is not None:
            grad_x = scattered.wait()
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, *left


class _LinearScatter(torch.autograd.Function):
    """Keeps the input, or what it was made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ND: Tensor, group: dist.ProcessGroup) -> Tensor:
        rows_TD = x.reshape(-1, x.shape[-1])
        piece = (rows_TD.shape[0] // group.size(), weight_ND.shape[0])
        out = sum_pieces(lambda rows, out: _multiply(rows_TD[rows], weight_ND, None, out), piece, x, group)
        kept = Kept.of(x) if ctx.needs_input_grad[1] else Kept.nothing()
        ctx.save_for_backward(weight_ND, *kept.tensors)
        ctx.source, ctx.shape, ctx.group, ctx.sink = kept.source, x.shape, group, sink_of(weight_ND)
        return out.view(x.shape[0] // group.size(), *x.shape[1:-1], weight_ND.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        gathering = Gathering(grad, ctx.group, keeps=ctx.needs_input_grad[1])
        grad_x = grad.new_empty(ctx.shape) if ctx.needs_input_grad[0] else None
        for rows, piece_TN in gathering.pieces():
            if grad_x is not None:
                torch.mm(piece_TN, weight, out=grad_x.view(-1, ctx.shape[-1])[rows])
        left = None
        if ctx.needs_input_grad[1]:
            rows_TD = restore(saved, ctx.source).reshape(-1, ctx.shape[-1])
            left = weight_gradient(gathering.whole.view(-1, grad.shape[-1]), rows_TD, ctx.sink)
        return grad_x, left, None


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


def linear_scatter(x_SBD: Tensor, weight_ND: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Apply a linear map of which each rank has some columns, and keep a piece of the sum over the ranks. Collective.

    Args:
        x_SBD: [S, B, D] this rank's columns of the input.
        weight_ND: [N, D] this rank's columns of the weight.
        group: the ranks.

    Returns:
        [S / ranks, B, N].
    """
    return cast(Tensor, _LinearScatter.apply(x_SBD, weight_ND, group))  # type: ignore[no-untyped-call]
