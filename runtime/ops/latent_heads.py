"""Queries, keys and values of latent attention from its projections.

Legend: S positions, B sequences, H heads, P plain and R turned dims of a query or key, V dims of a value.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from runtime.ops.rotary import even, rotary

Heads = tuple[Tensor, Tensor, Tensor]


class _Heads(torch.autograd.Function):
    """Keeps the tables alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Heads:
        from runtime.kernels.latent_heads import heads

        ctx.save_for_backward(cos, sin)
        ctx.neighbours = neighbours
        plain = q.shape[-1] - turned.shape[-1]
        q, kv, turned = q.contiguous(), kv.contiguous(), even(turned)
        queries, keys = heads(q, kv, turned, cos, sin, value=kv.shape[-1] - plain, neighbours=neighbours)
        return queries, keys, kv[..., plain:]

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        from runtime.kernels.latent_heads import gradients

        cos, sin = ctx.saved_tensors
        grads = gradients(even(grad_q), even(grad_k), even(grad_v), cos, sin, neighbours=ctx.neighbours)
        return (*grads, None, None, None)


def latent_heads(
    q_SBHK: Tensor,
    kv_SBHK: Tensor,
    turned_SBR: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    *,
    neighbours: bool,
    fused: bool | None = None,
) -> Heads:
    """Turn queries and the part of the keys that all heads share by their positions, and give each head its key.

    Args:
        q_SBHK: [S, B, H, P + R].
        kv_SBHK: [S, B, H, P + V]: plain dims of keys, and values.
        turned_SBR: [S, B, R] that all heads' keys share.
        cos_SR: [S, R] or [S, B, R] table; both halves of a row equal; no gradient.
        sin_SR: table, likewise.
        neighbours: as of `rotary`.
        fused: use the kernel, which computes in fp32 and rounds once; None: on a GPU.

    Returns:
        Queries and keys, [S, B, H, P + R] each, plain dims first, and values, [S, B, H, V].
    """
    if q_SBHK.is_cuda if fused is None else fused:
        out = _Heads.apply(q_SBHK, kv_SBHK, turned_SBR, cos_SR, sin_SR, neighbours)  # type: ignore[no-untyped-call]
        return cast("Heads", out)
    plain = q_SBHK.shape[-1] - turned_SBR.shape[-1]
    q_turned, k_turned = rotary(
        q_SBHK[..., plain:], turned_SBR.unsqueeze(2), cos_SR, sin_SR, neighbours=neighbours, fused=False
    )
    keys = torch.cat([kv_SBHK[..., :plain], k_turned.expand(*kv_SBHK.shape[:3], -1)], dim=-1)
    return torch.cat([q_SBHK[..., :plain], q_turned], dim=-1), keys, kv_SBHK[..., plain:]
