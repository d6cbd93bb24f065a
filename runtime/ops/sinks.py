"""Sinks of attention: a logit of each head beside those of the keys, whose value is 0.

Legend: S positions, B sequences, H heads, V dim of values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(
    out_SBHV: Tensor, log_sum_SBH: Tensor, sinks_H: Tensor, *, fused: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Give the sinks their share of an attention, overwriting it.

    Args:
        out_SBHV: [S, B, H, V].
        log_sum_SBH: [S, B, H] logarithm of the sum of each query's exponentials.
        sinks_H: [H].
        fused: use the kernel; None: on a GPU.

    Returns:
        Attention and logarithm, sinks included.
    """
    if out_SBHV.is_cuda if fused is None else fused:
        from runtime.kernels.sinks import add_sinks as kernel

        kernel(out_SBHV, log_sum_SBH, sinks_H.contiguous())
        return out_SBHV, log_sum_SBH
    total_SBH = torch.logaddexp(log_sum_SBH, sinks_H.to(log_sum_SBH.dtype))
    return out_SBHV.mul_(torch.exp(log_sum_SBH - total_SBH).unsqueeze(-1)), total_SBH


def sinks_gradient(
    grad_SBHV: Tensor, out_SBHV: Tensor, log_sum_SBH: Tensor, sinks_H: Tensor, *, fused: bool | None = None
) -> Tensor:
    """Give the gradient of the sinks: a sink takes from all values what its share is.

    Args:
        grad_SBHV: [S, B, H, V].
        out_SBHV: [S, B, H, V] as `add_sinks` gives it.
        log_sum_SBH: [S, B, H] likewise.
        sinks_H: [H].
        fused: use the kernel; None: on a GPU.

    Returns:
        [H], of the sinks' type.
    """
    if out_SBHV.is_cuda if fused is None else fused:
        from runtime.kernels.sinks import sinks_gradient as kernel

        grad_SBHV = grad_SBHV if grad_SBHV.stride(-1) == 1 else grad_SBHV.contiguous()
        return kernel(grad_SBHV, out_SBHV, log_sum_SBH, sinks_H.contiguous()).to(sinks_H.dtype)
    share_SBH = torch.exp(sinks_H.to(log_sum_SBH.dtype) - log_sum_SBH)
    return -(share_SBH * (grad_SBHV * out_SBHV).sum(-1)).sum((0, 1)).to(sinks_H.dtype)
