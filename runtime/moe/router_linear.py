"""The router's projection at fp32 accuracy, on tensor cores where the tokens are bf16.

Legend: T tokens, D hidden size, E experts.

A bf16 number times a bf16 number is exact in fp32, and an fp32 number is the sum of three bf16 numbers. So a product of
bf16 tokens with fp32 weights is three bf16 products with fp32 sums: as accurate as an fp32 product, at several times
its speed, and without an fp32 copy of the tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.ops.norm import Kept, restore
from runtime.parallel.gradient_sink import deliver_parts, sink_of


def split_bf16(values: Tensor, num_parts: int, dim: int) -> Tensor:
    """Bf16 matrices that sum to an fp32 one, side by side: each takes the next 8 bits of its significand.

    Args:
        values: [N, M] fp32 or bf16.
        num_parts: P, 3 for all 24 bits.
        dim: along which they lie.

    Returns:
        The parts, largest first, [P * N, M] or [N, P * M]; `values` where they are bf16, which is one part.
    """
    if values.dtype == torch.bfloat16:
        return values
    shape = [size * (num_parts if place == dim else 1) for place, size in enumerate(values.shape)]
    stacked = values.new_empty(shape, dtype=torch.bfloat16)
    rest = values
    for place, part in enumerate(stacked.chunk(num_parts, dim)):
        part.copy_(rest)
        if place + 1 < num_parts:
            rest = rest - part  # in fp32, where it is exact
    return stacked


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        kept = Kept.of(x_TD)
        ctx.save_for_backward(weight_ED, *kept.tensors)
        ctx.source, ctx.sink = kept.source, sink_of(weight_ED)
        parts = split_bf16(weight_ED, 3, dim=0)
        out = torch.mm(x_TD, parts.t(), out_dtype=torch.float32)
        return out if parts is weight_ED else out.view(-1, 3, weight_ED.shape[0]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight_ED, *saved = ctx.saved_tensors
        num_experts = weight_ED.shape[0]
        grads = split_bf16(grad_TE, 3, dim=1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # The result is rounded to 8 bits, so products below 2^-16 of the largest are left out.
            weights = split_bf16(weight_ED, 2, dim=0)
            left, right = grads[:, : 2 * num_experts], torch.cat([weights[:num_experts], weights])
            if weights is not weight_ED:
                left = torch.cat([left, grads[:, :num_experts]], dim=1)
            grad_x = torch.mm(left, right)
        if ctx.needs_input_grad[1]:
            product = torch.mm(grads.t(), restore(saved, ctx.source), out_dtype=torch.float32)
            grad_weight = deliver_parts(ctx.sink, product.view(3, *weight_ED.shape), weight_ED)
        return grad_x, grad_weight


def router_linear(x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of the router.

    Args:
        x_TD: [T, D] tokens.
        weight_ED: [E, D] fp32 or bf16.
        dtype: of the computation and the logits.

    Returns:
        [T, E] in `dtype`.
    """
    if x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and dtype == torch.float32 and weight_ED.shape[0] % 8 == 0:
        return cast(Tensor, _SplitLinear.apply(x_TD, weight_ED))  # type: ignore[no-untyped-call]
    return F.linear(x_TD.to(dtype), weight_ED.to(dtype))
