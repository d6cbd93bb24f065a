"""Root-mean-square norm, alone or after the residual's sum.

Legend: D width of a row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from runtime.parallel.gradient_sink import deliver, sink_of

MAX_FUSED_WIDTH = 16384


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _plain_forward(x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x if delta is None else x + delta
    wide = _wide(total)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight_D.to(wide.dtype)).to(x.dtype), total, rstd


def _plain_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    normed, incoming = _wide(x) * rstd, _wide(grad)
    weighted = incoming * weight_D.to(incoming.dtype)
    grad_x = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * rstd
    if grad_total is not None:
        grad_x = grad_x + grad_total
    return grad_x.to(x.dtype), (incoming * normed).flatten(0, -2).sum(0)


class _RMSNorm(torch.autograd.Function):
    """Keeps what was normalised and one number a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float, fused: bool
    ) -> tuple[Tensor, Tensor]:
        if fused:
            from runtime.kernels.rms_norm import rms_norm_forward

            out, total, rstd = rms_norm_forward(x, None if delta is None else delta.contiguous(), weight_D, eps)
        else:
            out, total, rstd = _plain_forward(x, delta, weight_D, eps)
        ctx.save_for_backward(total, weight_D, rstd)
        ctx.fused, ctx.adds, ctx.sink = fused, delta is not None, sink_of(weight_D)
        ctx.set_materialize_grads(False)
        return out, total.view_as(total) if delta is None else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight_D, rstd = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total if ctx.adds else None, None, None, None
        if ctx.fused:
            from runtime.kernels.rms_norm import rms_norm_backward

            rest = None if grad_total is None else grad_total.contiguous()
            grad_x, grad_weight = rms_norm_backward(grad.contiguous(), rest, x, weight_D, rstd)
        else:
            grad_x, grad_weight = _plain_backward(grad, grad_total, x, weight_D, rstd)
        left = deliver(ctx.sink, grad_weight, weight_D) if ctx.needs_input_grad[2] else None
        return grad_x, grad_x if ctx.adds else None, left, None, None


def _apply(x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float, fused: bool | None) -> tuple[Tensor, Tensor]:
    if fused is None:
        fused = x.is_cuda
    fused = fused and x.shape[-1] <= MAX_FUSED_WIDTH
    if x.stride(-1) != 1 or (x.dim() > 3 and not x.is_contiguous() and not x.flatten(0, -3)._is_view()):
        x = x.contiguous()
    out = _RMSNorm.apply(x, delta, weight_D, eps, fused)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", out)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, fused: bool | None = None) -> Tensor:
    """Root-mean-square norm over the last dim: the hidden size, or the dim of a head.

    Args:
        x: [..., D].
        weight_D: [D] factor.
        eps: added to the mean square.
        fused: use the kernel; None: on a GPU.

    Returns:
        As x; computed in fp32 (fp64 for fp64) and rounded once. The weight's gradient is summed in fp32.
    """
    return _apply(x, None, weight_D, eps, fused)[0]


def add_rms_norm(
    x: Tensor, delta: Tensor, weight_D: Tensor, eps: float, *, fused: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual, and normalise the sum, in one pass.

    Args:
        x: [..., D] residual.
        delta: [..., D] what a branch of the layer gave.
        weight_D: [D] factor of the norm.
        eps: added to the mean square.
        fused: use the kernel; None: on a GPU.

    Returns:
        The norm and the sum, each as x.
    """
    return _apply(x, delta, weight_D, eps, fused)
