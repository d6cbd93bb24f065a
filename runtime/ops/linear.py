"""Linear maps whose weight gradients are added to their sums inside the product.

Legend: T tokens, D input width, N output width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.ops.norm import Kept, restore
from runtime.parallel.gradient_sink import GradientSink, deliver, sink_of
from runtime.quantised.weight import Weight, dense, held, numbers


@functools.cache
def adds_to_fp32(device: torch.device) -> bool:
    """Whether this torch multiplies bf16 matrices into an fp32 sum (cuBLAS does; torch's wrapper has to let it)."""
    if device.type != "cuda":
        return False
    left, total = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def add_product(total_ND: Tensor, left_TN: Tensor, right_TD: Tensor, *, fresh: bool) -> None:
    """Add a weight's gradient to its sum.

    Args:
        total_ND: [N, D] sum, contiguous: fp32, or of the rows' type, to which it is rounded once.
        left_TN: [T, N] gradient of the output.
        right_TD: [T, D] input.
        fresh: the sum holds nothing yet: overwrite it.
    """
    if left_TN.dtype == total_ND.dtype:
        torch.addmm(total_ND, left_TN.t(), right_TD, beta=0 if fresh else 1, out=total_ND)
    elif adds_to_fp32(left_TN.device):
        beta = 0 if fresh else 1
        torch.addmm(total_ND, left_TN.t(), right_TD, out_dtype=torch.float32, beta=beta, out=total_ND)
    elif fresh:
        total_ND.copy_(left_TN.t() @ right_TD)
    else:
        total_ND += left_TN.t() @ right_TD


def weight_gradient(left_TN: Tensor, right_TD: Tensor, sink: GradientSink | None) -> Tensor | None:
    """Bring a weight's gradient to the sum that the weight's sink keeps, if it has one.

    Args:
        left_TN: [T, N] gradient of the output.
        right_TD: [T, D] input.
        sink: the weight's; None where it has none.

    Returns:
        What a backward function gives autograd: [N, D], None where the gradient has been added.
    """
    opened = None if sink is None else sink.open()
    if sink is None or opened is None:
        return left_TN.t() @ right_TD
    add_product(opened.total, left_TN, right_TD, fresh=opened.fresh)
    sink.close()
    return None


def parameter_gradients(
    grads_TN: Sequence[Tensor],
    rows: Callable[[], Tensor],
    biases_N: Sequence[Tensor | None],
    sinks: Sequence[GradientSink | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Bring the gradients of the weights and biases of several maps of one input to their sums.

    Args:
        grads_TN: [T, N] gradient of each map's output.
        rows: gives the input [T, D]; asked only if a weight wants its gradient.
        biases_N: each map's bias, or None.
        sinks: of the weights, then of the biases.
        wanted: whether autograd wants a gradient of it; likewise.

    Returns:
        What a backward function gives autograd for the weights, then for the biases.
    """
    count = len(grads_TN)
    left: list[Tensor | None] = [None] * count
    if any(wanted[:count]):
        rows_TD = rows()
        left = [
            weight_gradient(grad, rows_TD, sink) if want else None
            for grad, sink, want in zip(grads_TN, sinks, wanted, strict=False)
        ]
    for grad, bias, sink, want in zip(grads_TN, biases_N, sinks[count:], wanted[count:], strict=True):
        if bias is None or not want:
            left.append(None)
            continue
        wide = grad.dtype if grad.dtype == torch.float64 else torch.float32
        left.append(deliver(sink, grad.sum(0, dtype=wide), bias))
    return left


def _linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """The map's output, never as a view: what adds to it does so in place."""
    if bias_N is None:
        return F.linear(x, weight_ND)
    out = x.new_empty(*x.shape[:-1], weight_ND.shape[0])
    torch.addmm(bias_N, x.reshape(-1, x.shape[-1]), weight_ND.t(), out=out.view(-1, weight_ND.shape[0]))
    return out


class _Linears(torch.autograd.Function):
    """One input, several maps: keeps the input, or what it was made of, and sums its gradients inside the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, sinks: bool, *parameters: Weight | None) -> tuple[Tensor, ...]:
        weights = cast("tuple[Weight, ...]", parameters[:count])
        biases = cast("tuple[Tensor | None, ...]", parameters[count:])
        tensors, ctx.quantised = zip(*map(held, weights), strict=True)
        kept = Kept.of(x) if any(ctx.needs_input_grad[3 : 3 + count]) else Kept.nothing()  # frozen weights need none
        ctx.save_for_backward(*tensors, *kept.tensors)
        ctx.count, ctx.source, ctx.shape = count, kept.source, x.shape
        ctx.biases = biases
        ctx.sinks = [sink_of(p) if sinks and isinstance(p, Tensor) else None for p in parameters]
        return tuple(_linear(x, numbers(w), b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: a checkpointed function's can't be taken twice
        weights, saved = tensors[: ctx.count], tensors[ctx.count :]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for grad, kept, quantised in zip(flat, weights, ctx.quantised, strict=True):
                weight = dense(kept, quantised)
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
            assert grad_x is not None
            grad_x = grad_x.view(ctx.shape)
        left = parameter_gradients(
            flat,
            lambda: restore(saved, ctx.source).reshape(-1, ctx.shape[-1]),
            ctx.biases,
            ctx.sinks,
            ctx.needs_input_grad[3:],
        )
        return grad_x, None, None, *left


class Linears(Protocol):
    """Applies several linear maps to one input, as `linears` does."""

    def __call__(
        self,
        x: Tensor,
        weights_ND: Sequence[Tensor],
        biases_N: Sequence[Tensor | None] | None = None,
        *,
        sinks: bool = True,
    ) -> tuple[Tensor, ...]:
        """See `linears`."""


def linears(
    x: Tensor,
    weights_ND: Sequence[Weight],
    biases_N: Sequence[Tensor | None] | None = None,
    *,
    sinks: bool = True,
) -> tuple[Tensor, ...]:
    """Apply several linear maps to one input.

    Args:
        x: [..., D].
        weights_ND: [N, D] each; N may differ. Quantised ones are made anew for each product, forward and backward.
        biases_N: [N] or None each; None for no biases.
        sinks: let gradients of parameters go straight to their sums where they have one. Off for a parameter that a
            backward pass meets more than once.

    Returns:
        [..., N] each.
    """
    biases = biases_N if biases_N is not None else [None] * len(weights_ND)
    out = _Linears.apply(x, len(weights_ND), sinks, *weights_ND, *biases)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, ...]", out)


def linear(x: Tensor, weight_ND: Weight, bias_N: Tensor | None = None, *, sinks: bool = True) -> Tensor:
    """Apply one linear map; arguments as of `linears`."""
    return linears(x, [weight_ND], [bias_N], sinks=sinks)[0]
