"""Attention put together from kernels that each see some of the keys, and from sinks, which no kernel sees.

Legend: Sq queries, Sk keys, B sequences, H query heads, G key/value heads, K head dim, V dim of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from runtime.ops.attention_kernels import Gradients, Kernel

Parts = Sequence[tuple[Kernel, int]]
"""Kernels, each with the number of keys that are its own, in their order."""


def attend_in_parts(q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor, sinks_H: Tensor | None, parts: Parts) -> Tensor:
    """Attend to the keys of all parts, and to sinks.

    Args:
        q_SBHK: [Sq, B, H, K].
        k_SBGK: [Sk, B, G, K].
        v_SBGV: [Sk, B, G, V].
        sinks_H: [H] a logit of each head beside those of the keys, whose value is 0; None for none.
        parts: which kernel takes which keys.

    Returns:
        [Sq, B, H, V].
    """
    out = _Joined.apply(q_SBHK, k_SBGK, v_SBGV, sinks_H, parts)  # type: ignore[no-untyped-call]
    return cast("Tensor", out)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, parts: Parts) -> Tensor:
        sizes = [size for _, size in parts]
        keys, values = torch.split(k, sizes), torch.split(v, sizes)
        found = [kernel.forward(q, *own) for (kernel, _), *own in zip(parts, keys, values, strict=True)]
        out, log_sum = _join([part[:2] for part in found], sinks_H)
        ctx.save_for_backward(q, k, v, sinks_H, out, log_sum)
        ctx.parts, ctx.kept = parts, [part[2] for part in found]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, out, log_sum = ctx.saved_tensors
        sizes = [size for _, size in ctx.parts]
        grads: list[Gradients] = [
            kernel.backward(grad, q, *own, out, log_sum, kept)
            for (kernel, _), kept, *own in zip(
                ctx.parts, ctx.kept, torch.split(k, sizes), torch.split(v, sizes), strict=True
            )
        ]
        dq, dk, dv = grads[0]
        if len(grads) > 1:
            dq = torch.stack([part[0] for part in grads]).sum(0)
            dk, dv = (torch.cat([part[place] for part in grads]) for place in (1, 2))
        d_sinks = None
        if ctx.needs_input_grad[3]:
            share_SBH = torch.exp(sinks_H.float() - log_sum)
            d_sinks = -(share_SBH * (grad * out).sum(-1, dtype=torch.float32)).sum((0, 1)).to(sinks_H.dtype)
        return dq, dk, dv, d_sinks, None


def _join(parts: Sequence[tuple[Tensor, Tensor]], sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weigh each part's attention by its share of the exponentials, overwriting it.

    Returns:
        [Sq, B, H, V], and [Sq, B, H] the logarithm of the sum of all.
    """
    out, total_SBH = parts[0]
    for _, log_sum_SBH in parts[1:]:
        total_SBH = torch.logaddexp(total_SBH, log_sum_SBH)
    if sinks_H is not None:
        total_SBH = torch.logaddexp(total_SBH, sinks_H.float())
    if len(parts) > 1 or sinks_H is not None:
        outs = [part.mul_(torch.exp(log_sum - total_SBH).unsqueeze(-1)) for part, log_sum in parts]
        out = outs[0]
        for other in outs[1:]:
            out += other
    return out, total_SBH
