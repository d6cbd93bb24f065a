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


def split_bf16(values: Tensor, num_parts: int) -> list[Tensor]:
    """Bf16 tensors that sum to an fp32 tensor: each takes the next 8 bits of its significand.

    Args:
        values: any shape, fp32 or bf16.
        num_parts: 3 for all 24 bits.

    Returns:
        The parts, largest first; one part where the values are bf16.
    """
    if values.dtype == torch.bfloat16:
        return [values]
    parts = []
    rest = values.float()
    for _ in range(num_parts):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return parts


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        kept = Kept.of(x_TD)
        ctx.save_for_backward(weight_ED, *kept.tensors)
        ctx.source = kept.source
        parts = split_bf16(weight_ED, 3)
        out = torch.mm(x_TD, torch.cat(parts).t(), out_dtype=torch.float32)
        return out if len(parts) == 1 else out.view(-1, len(parts), weight_ED.shape[0]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight_ED, *saved = ctx.saved_tensors
        grads = split_bf16(grad_TE, 3)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # The result is rounded to 8 bits, so products below 2^-16 of the largest are left out.
            weights = split_bf16(weight_ED, 2)
            left = [grads[0], grads[1]] + ([grads[0]] if len(weights) > 1 else [])
            right = [weights[0], weights[0], *weights[1:]]
            grad_x = torch.mm(torch.cat(left, dim=1), torch.cat(right))
        if ctx.needs_input_grad[1]:
            stacked = torch.cat(grads, dim=1)
            grad_weight = torch.mm(stacked.t(), restore(saved, ctx.source), out_dtype=torch.float32)
            grad_weight = grad_weight.view(3, *weight_ED.shape).sum(0).to(weight_ED.dtype)
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
