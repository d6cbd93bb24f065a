"""Linear maps of one input in FP8, whose weight gradients are added to their fp32 sums inside the product.

Legend: T tokens, P tokens with padding, D input width, N output width of all maps together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from runtime.fp8.config import ROW_ALIGNMENT
from runtime.fp8.operands import E4M3, Quantised, quantise, quantise_into, raise_amax
from runtime.fp8.products import rows_times_transposed, weight_gradients
from runtime.fp8.scaling import Scaling
from runtime.fp8.weights import QuantisedWeights
from runtime.parallel.gradient_sink import GradientSink, deliver, deliver_to, sink_of


@functools.lru_cache(maxsize=64)
def _end(num_rows: int, device: torch.device) -> Tensor:
    return torch.tensor([num_rows], dtype=torch.int32, device=device)


def _weight_gradient(
    grads_NP: Tensor, grads_bound: Tensor, x: Quantised, end: Tensor, weight_ND: Tensor, sink: GradientSink | None
) -> Tensor | None:
    """What a backward function gives autograd: None where the gradient has been added to its sum."""
    assert x.columns is not None
    operands = (grads_NP, grads_bound, x.columns[0], x.bound_G, end)
    opened = None if sink is None else sink.open()
    if sink is not None and opened is not None and opened.total.dtype == torch.float32:
        weight_gradients(*operands, opened.total.unsqueeze(0), add=not opened.fresh)
        sink.close()
        return None
    product = torch.empty(1, *weight_ND.shape, dtype=torch.float32, device=weight_ND.device)
    weight_gradients(*operands, product, add=False)
    return deliver_to(sink, opened, product[0], weight_ND)  # sums in bf16 take a product of their own, in fp32


class _Fp8Linears(torch.autograd.Function):
    """Keeps the input transposed, in 8 bits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, maps: Fp8Linears, count: int, sinks: bool, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = cast("tuple[Tensor, ...]", parameters[:count]), parameters[count:]
        x_TD = x.reshape(-1, x.shape[-1]).contiguous()
        wanted = ctx.needs_input_grad[4 : 4 + count]
        bound, amax = maps.scaling.bound(maps.x_slot, lambda out: raise_amax(x_TD.unsqueeze(0), out))
        bits = quantise(x_TD, bound, amax, E4M3, alignment=maps.alignment(x), columns=any(wanted))
        made = maps.weights.of(weights)
        assert bits.rows is not None
        assert made.rows is not None
        end, outs, first = _end(bits.rows.shape[1], x.device), [], 0
        for weight, bias in zip(weights, biases, strict=True):
            last = first + weight.shape[0]
            matrix = made.rows[:, first:last]
            out = rows_times_transposed(bits.rows[0], bound, matrix, made.bound_G, end, x.dtype, exact=False)
            # Never a view: what adds to it does so in place.
            out = out if out.shape[0] == x_TD.shape[0] else out[: x_TD.shape[0]].clone()
            outs.append((out if bias is None else out.add_(bias)).view(*x.shape[:-1], weight.shape[0]))
            first = last
        ctx.maps, ctx.made, ctx.end, ctx.shape = maps, made, end, x.shape
        ctx.save_for_backward(bits.columns, bound, *weights)
        ctx.biases = biases
        ctx.sinks = [sink_of(p) if sinks and p is not None else None for p in parameters]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_columns, x_bound, *weights), maps, count = ctx.saved_tensors, ctx.maps, len(grads)
        x = Quantised(None, x_columns, x_bound)
        flat = [grad.reshape(-1, grad.shape[-1]).contiguous() for grad in grads]
        wanted = ctx.needs_input_grad[4 : 4 + count]
        bits = maps.quantised_gradients(flat, rows=ctx.needs_input_grad[0], columns=any(wanted))
        grad_x = None
        if ctx.needs_input_grad[0]:
            args = (bits.rows[0], bits.bound_G, ctx.made.columns, ctx.made.bound_G, ctx.end, grads[0].dtype)
            grad_x = rows_times_transposed(*args, exact=True)[: flat[0].shape[0]].view(ctx.shape)
        left: list[Tensor | None] = []
        first = 0
        for grad, weight, sink, want in zip(flat, weights, ctx.sinks[:count], wanted, strict=True):
            last = first + grad.shape[1]
            operands = (bits.columns[0, first:last], bits.bound_G, x, ctx.end, weight, sink) if want else None
            left.append(None if operands is None else _weight_gradient(*operands))
            first = last
        for place, (grad, bias) in enumerate(zip(flat, ctx.biases, strict=True)):
            if bias is None or not ctx.needs_input_grad[4 + count + place]:
                left.append(None)
                continue
            left.append(deliver(ctx.sinks[count + place], grad.sum(0, dtype=torch.float32), bias))
        return grad_x, None, None, None, *left


class Fp8Linears:
    """The maps of one input of a layer: their 8-bit weights, and the places of input and gradients in the scaling."""

    def __init__(self, scaling: Scaling, name: str = "linear") -> None:
        """Take places.

        Args:
            scaling: the bounds of this rank.
            name: of the first weight, in the model.
        """
        self.scaling = scaling
        self.weights = QuantisedWeights(scaling)
        self.x_slot, self._grad_slot = (scaling.take_slot(f"{name}:{what}") for what in ("input", "gradient"))

    def __call__(
        self,
        x: Tensor,
        weights_ND: Sequence[Tensor],
        biases_N: Sequence[Tensor | None] | None = None,
        *,
        sinks: bool = True,
    ) -> tuple[Tensor, ...]:
        """Apply the maps; arguments and result as of `runtime.ops.linear.linears`."""
        biases = biases_N if biases_N is not None else [None] * len(weights_ND)
        out = _Fp8Linears.apply(x, self, len(weights_ND), sinks, *weights_ND, *biases)  # type: ignore[no-untyped-call]
        return cast("tuple[Tensor, ...]", out)

    @staticmethod
    def alignment(x: Tensor) -> int:
        """What the products want the number of tokens to be a multiple of."""
        return ROW_ALIGNMENT if x.is_cuda else 1

    def quantised_gradients(self, grads_TN: Sequence[Tensor], *, rows: bool, columns: bool) -> Quantised:
        """Bring the gradients of all maps to 8 bits, side by side and with one bound."""

        def find(out: Tensor) -> None:
            for grad in grads_TN:
                raise_amax(grad.unsqueeze(0), out)

        bound, amax = self.scaling.bound(self._grad_slot, find)
        num_tokens, device = grads_TN[0].shape[0], grads_TN[0].device
        padded = -(-num_tokens // self.alignment(grads_TN[0])) * self.alignment(grads_TN[0])
        total, dtype = sum(grad.shape[1] for grad in grads_TN), self.scaling.config.gradient_dtype
        made = Quantised(
            torch.empty(1, padded, total, dtype=dtype, device=device) if rows else None,
            torch.empty(1, total, padded, dtype=dtype, device=device) if columns else None,
            bound,
        )
        first = 0
        for grad in grads_TN:
            last = first + grad.shape[1]
            part = (None if made.rows is None else made.rows[..., first:last],
                    None if made.columns is None else made.columns[:, first:last])  # fmt: skip
            quantise_into(grad.unsqueeze(0), bound, *part, amax)
            first = last
        return made
