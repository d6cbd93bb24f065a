"""Sinkhorn's iteration, which balances choices of experts: in plain torch, or one kernel on a GPU.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-4
MAX_ITERATIONS = 128


def sinkhorn(logits_TE: Tensor, max_iterations: int = MAX_ITERATIONS, *, fused: bool = True) -> Tensor:
    """Scale exp(logits) so that tokens sum to 1/T and experts to 1/E.

    The row maximum is taken off first: it cancels in the result, and keeps exp from overflowing. Iterations are
    bounded, and on a GPU the device alone decides when to stop: nothing waits for it.

    Args:
        logits_TE: [T, E] float; computed in fp32 at least.
        max_iterations: bound of the loop, which ends earlier at a mean change of 1e-4.
        fused: use the kernel on a GPU.

    Returns:
        [T, E] float, the transport plan.

    Source: https://arxiv.org/abs/2103.16716 (BASE layers), stopping rule of
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/transformer/moe/moe_utils.py
    """
    num_tokens, num_experts = logits_TE.shape
    if fused and logits_TE.is_cuda and logits_TE.dtype != torch.float64:
        from runtime.kernels.sinkhorn import MAX_EXPERTS, sinkhorn_plan

        if num_experts <= MAX_EXPERTS:
            return sinkhorn_plan(logits_TE, max_iterations, TOLERANCE)
    logits = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    if num_tokens == 0:
        return logits
    cost = torch.exp(logits - logits.amax(1, keepdim=True))
    scale_E = cost.new_ones(num_experts)
    rows_T = cost.new_ones(num_tokens)
    error = cost.new_full((), float("inf"))
    for _ in range(max_iterations):
        open_ = error > TOLERANCE
        # On a GPU the state freezes instead: to read the error back would make the host wait.
        if not cost.is_cuda and not bool(open_):
            break
        new_rows = 1 / (num_tokens * (cost @ scale_E + 1e-8))
        new_scale = 1 / (num_experts * (new_rows @ cost + 1e-8))
        error = torch.where(open_, (scale_E - new_scale).abs().mean(), error)
        rows_T, scale_E = torch.where(open_, new_rows, rows_T), torch.where(open_, new_scale, scale_E)
    return scale_E * cost * rows_T.unsqueeze(1)
