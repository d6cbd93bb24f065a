"""Linear maps of one input in FP8, whose weight gradients are added to their fp32 sums inside the product.

Legend: T tokens, P tokens with padding, D input width, N output width of all maps together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from runtime.fp8.operands import E4M3, Operand, Quantised, spans
from runtime.fp8.products import rows_times_transposed, weight_gradient
from runtime.fp8.quantise import quantise, row_alignment
from runtime.fp8.scaling import Scaling
from runtime.fp8.weights import QuantisedWeights
from runtime.parallel.gradient_sink import deliver, sink_of


@functools.lru_cache(maxsize=64)
def _end(num_rows: int, device: torch.device) -> Tensor:
    return torch.tensor([num_rows], dtype=torch.int32, device=device)


class _Fp8Linears(torch.autograd.Function):
    """Keeps the input transposed, in 8 bits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, maps: Fp8Linears, count: int, sinks: bool, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = cast("tuple[Tensor, ...]", parameters[:count]), parameters[count:]
        x_TD = x.reshape(-1, x.shape[-1]).contiguous()
        wanted = ctx.needs_input_grad[4 : 4 + count]
        quantised = maps.quantised(maps.x_slot, [x_TD], E4M3, columns=any(wanted))
        made = maps.weights.of(weights)
        rows, columns = quantised.rows, quantised.columns
        assert rows is not None
        assert made.rows is not None
        end, outs = _end(rows.bits.shape[0], x.device), []
        for weight, bias, place in zip(weights, biases, spans(w.shape[0] for w in weights), strict=True):
            out = rows_times_transposed(rows, made.rows.part(*place), end, x.dtype, exact=False)
            # Never a view: what adds to it does so in place.
            out = out if out.shape[0] == x_TD.shape[0] else out[: x_TD.shape[0]].clone()
            outs.append((out if bias is None else out.add_(bias)).view(*x.shape[:-1], weight.shape[0]))
        ctx.maps, ctx.made, ctx.end, ctx.shape = maps, made, end, x.shape
        ctx.save_for_backward(*(None, None) if columns is None else (columns.bits, columns.scale), *weights)
        ctx.biases = biases
        ctx.sinks = [sink_of(p) if sinks and p is not None else None for p in parameters]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_bits, x_scale, *weights), maps, count = ctx.saved_tensors, ctx.maps, len(grads)
        flat = [grad.reshape(-1, grad.shape[-1]).contiguous() for grad in grads]
        wanted = ctx.needs_input_grad[4 : 4 + count]
        dtype = maps.scaling.config.gradient_dtype
        bits = maps.quantised(maps.grad_slot, flat, dtype, rows=ctx.needs_input_grad[0], columns=any(wanted))
        grad_x = None
        if ctx.needs_input_grad[0]:
            assert bits.rows is not None
            product = rows_times_transposed(bits.rows, ctx.made.columns, ctx.end, grads[0].dtype, exact=True)
            grad_x = product[: flat[0].shape[0]].view(ctx.shape)
        left: list[Tensor | None] = []
        side_by_side = spans(grad.shape[1] for grad in flat)
        for weight, sink, want, span in zip(weights, ctx.sinks[:count], wanted, side_by_side, strict=True):
            gradient = None
            if want and bits.columns is not None:
                operands = (bits.columns.part(*span), Operand(x_bits, x_scale), ctx.end, weight, sink)
                gradient = weight_gradient(*operands)
            left.append(gradient)
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
        self.x_slot, self.grad_slot = (scaling.take_slot(f"{name}:{what}") for what in ("input", "gradient"))

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

    def quantised(
        self, slot: int, parts_TD: Sequence[Tensor], dtype: torch.dtype, *, rows: bool = True, columns: bool
    ) -> Quantised:
        """Bring the input, or the gradients of all maps, to 8 bits, with as many rows as products want.

        Args and Returns are as of `runtime.fp8.quantise.quantise`.
        """
        alignment = row_alignment(parts_TD[0].device, self.scaling)
        return quantise(self.scaling, slot, parts_TD, dtype, alignment=alignment, rows=rows, columns=columns)
