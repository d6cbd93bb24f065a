"""Attention put together from kernels that each see some of the keys, and from sinks, which no kernel sees.

Legend: Sq queries, Sk keys, B sequences, H query heads, G key/value heads, K head dim, V dim of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from runtime.ops.attention_kernels import Attended, Gradients, Kernel
from runtime.ops.sinks import add_sinks, sinks_gradient

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
        out, log_sum = _join([part[:2] for part in found])
        if sinks_H is not None:
            out, log_sum = add_sinks(out, log_sum, sinks_H)
        ctx.save_for_backward(q, k, v, sinks_H, out, log_sum)
        ctx.parts, ctx.kept = parts, [part[2] for part in found]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, out, log_sum = ctx.saved_tensors
        sizes = [size for _, size in ctx.parts]
        grads: list[Gradients] = [
            kernel.backward(grad, Attended(q, keys, values, out, log_sum), kept)
            for (kernel, _), kept, keys, values in zip(
                ctx.parts, ctx.kept, torch.split(k, sizes), torch.split(v, sizes), strict=True
            )
        ]
        dq, dk, dv = grads[0]
        if len(grads) > 1:
            dq = sum((part[0] for part in grads[1:]), start=dq)
            dk, dv = (torch.cat([part[place] for part in grads]) for place in (1, 2))
        d_sinks = sinks_gradient(grad, out, log_sum, sinks_H) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, d_sinks, None


def _join(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weigh each part's attention by its share of the exponentials, overwriting it.

    Returns:
        [Sq, B, H, V], and [Sq, B, H] the logarithm of the sum of all.
    """
    if len(parts) == 1:
        return parts[0]
    total_SBH = torch.stack([log_sum for _, log_sum in parts]).logsumexp(0)
    first, *others = (part.mul_(torch.exp(log_sum - total_SBH).unsqueeze(-1)) for part, log_sum in parts)
    for other in others:
        first += other
    return first, total_SBH
