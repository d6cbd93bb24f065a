"""SwiGLU of a gated layer that every token passes.

Legend: F width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone: in plain torch silu(gate) is kept too, and the gradients of both halves are put together."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        from runtime.kernels.swiglu import swiglu_alone_forward

        hidden = hidden.contiguous()
        ctx.save_for_backward(hidden)
        out = swiglu_alone_forward(hidden.view(-1, hidden.shape[-1]))
        return out.view(*hidden.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from runtime.kernels.swiglu import swiglu_alone_backward

        (hidden,) = ctx.saved_tensors
        rows = hidden.view(-1, hidden.shape[-1])
        return swiglu_alone_backward(rows, grad.reshape(rows.shape[0], rows.shape[1] // 2)).view_as(hidden)


def swiglu(hidden: Tensor, *, fused: bool | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        hidden: [..., 2F], gate then up.
        fused: use the kernels, which round once; None: on a GPU.

    Returns:
        [..., F].
    """
    if hidden.is_cuda if fused is None else fused:
        return cast(Tensor, _SwiGLU.apply(hidden))  # type: ignore[no-untyped-call]
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up
