"""Rotary positions of queries and keys.

Legend: S positions, B sequences, H query heads, G key heads, K head dim, R rotated dims. A table [S, R] serves all
sequences; one of [S, B, R] has the positions of each.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def rotate(x_SBHK: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Turn pairs (i, i + R / 2) of the first R dims of each head by the position's angles, in plain torch.

    Args:
        x_SBHK: [S, B, H, K].
        cos_SR: [S, R] or [S, B, R], both halves of a row equal.
        sin_SR: likewise.

    Returns:
        [S, B, H, K].
    """
    rotated = cos_SR.shape[-1]
    turned, rest = x_SBHK[..., :rotated], x_SBHK[..., rotated:]
    cos, sin = (x.unsqueeze(-2) if x.dim() == 3 else x[:, None, None] for x in (cos_SR, sin_SR))
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def split_pairs(x_SBHK: Tensor, rotated: int) -> Tensor:
    """Put pairs of neighbours (2i, 2i + 1) among the first dims of each head where `rotate` looks for them, (i, i + R / 2).

    Queries and keys put in the same order have the same products.

    Args:
        x_SBHK: [S, B, H, K].
        rotated: R.

    Returns:
        [S, B, H, K].
    """
    turned = x_SBHK[..., :rotated]
    pairs = turned.reshape(*turned.shape[:-1], rotated // 2, 2).transpose(-1, -2).flatten(-2)
    return pairs if rotated == x_SBHK.shape[-1] else torch.cat((pairs, x_SBHK[..., rotated:]), dim=-1)


def even(x: Tensor) -> Tensor:
    """As it is where a kernel can read it: heads contiguous, tokens equally far apart."""
    regular = x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if regular else x.contiguous()


class _Rotary(torch.autograd.Function):
    """Keeps the tables alone: the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> tuple[Tensor, Tensor]:
        from runtime.kernels.rotary import rotate as kernel

        ctx.save_for_backward(cos, sin)
        ctx.neighbours = neighbours
        return kernel(even(q), even(k), cos, sin, backward=False, neighbours=neighbours)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        from runtime.kernels.rotary import rotate as kernel

        cos, sin = ctx.saved_tensors
        grads = kernel(even(grad_q), even(grad_k), cos, sin, backward=True, neighbours=ctx.neighbours)
        return (*grads, None, None, None)


def rotary(
    q_SBHK: Tensor,
    k_SBGK: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    *,
    neighbours: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions.

    Args:
        q_SBHK: [S, B, H, K].
        k_SBGK: [S, B, G, K].
        cos_SR: [S, R] or [S, B, R] table, R at most K and even; both halves of a row equal; no gradient.
        sin_SR: table, likewise.
        neighbours: pairs are (2i, 2i + 1); they are put where `rotate` has them, in queries and keys alike.
        fused: use the kernel, which computes in fp32 and rounds once; None: on a GPU.

    Returns:
        Queries and keys; the last K - R dims of each head are as they were.
    """
    if fused is None:
        fused = q_SBHK.is_cuda
    if not fused:
        if neighbours:
            q_SBHK, k_SBGK = (split_pairs(x, cos_SR.shape[-1]) for x in (q_SBHK, k_SBGK))
        return rotate(q_SBHK, cos_SR, sin_SR), rotate(k_SBGK, cos_SR, sin_SR)
    out = _Rotary.apply(q_SBHK, k_SBGK, cos_SR, sin_SR, neighbours)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", out)
