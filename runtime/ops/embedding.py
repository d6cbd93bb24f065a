"""Token embedding whose gradient goes straight to its sum.

Legend: V rows, D hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.parallel.gradient_sink import sink_of


def add_gradient(grad_TD: Tensor, tokens_T: Tensor, total_VD: Tensor, *, fused: bool | None = None) -> None:
    """Add each token's gradient to its row of a sum.

    Args:
        grad_TD: [T, D].
        tokens_T: [T] int64; V and above: nobody's.
        total_VD: [V, D] fp32 (fp64 for fp64), or bf16: rounded once for all tokens.
        fused: use the kernel; None: on a GPU.
    """
    if total_VD.is_cuda if fused is None else fused:
        from runtime.kernels.embedding import add_embedding_gradient

        add_embedding_gradient(grad_TD.contiguous(), tokens_T, total_VD)
        return
    known = tokens_T < total_VD.shape[0]
    low = total_VD.dtype == torch.bfloat16
    sums_VD = torch.zeros_like(total_VD, dtype=torch.float32) if low else total_VD
    sums_VD.index_add_(0, tokens_T[known], grad_TD[known].to(sums_VD.dtype))
    if low:
        total_VD += sums_VD


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor, sinks: bool, partial: bool) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.dtype = weight_VD.shape, weight_VD.dtype
        ctx.sink = sink_of(weight_VD) if sinks else None
        if not partial:
            return F.embedding(tokens, weight_VD)
        known = tokens < weight_VD.shape[0]
        out = F.embedding(torch.where(known, tokens, 0), weight_VD)
        return out.masked_fill_(~known.unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        (tokens,) = ctx.saved_tensors
        opened = None if ctx.sink is None else ctx.sink.open()
        wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device) if opened is None else opened.zeroed()
        add_gradient(grad.reshape(-1, grad.shape[-1]), tokens.reshape(-1), total)
        if opened is None:
            return None, total.to(ctx.dtype), None, None
        ctx.sink.close()
        return None, None, None, None


def embedding(tokens: Tensor, weight_VD: Tensor, *, sinks: bool = True, partial: bool = False) -> Tensor:
    """Look up rows.

    Args:
        tokens: integer, any shape.
        weight_VD: [V, D].
        sinks: let the gradient go straight to its sum where the weight has one. Off for a weight that a backward pass
            meets more than once.
        partial: some tokens are not of these rows: V and above give 0.

    Returns:
        [*tokens, D].
    """
    return cast(Tensor, _Embedding.apply(tokens, weight_VD, sinks, partial))  # type: ignore[no-untyped-call]
