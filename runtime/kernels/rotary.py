"""Rotary positions of queries and keys in one launch.

Legend: S positions, B sequences, H query heads, G key heads, K head dim, R rotated dims. Floor, at memory bandwidth:
each element of queries and keys read and written once; the tables stay in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # pairs of a tile


@triton.jit
def load_pairs(base, pair, mask, ROTATED: tl.constexpr, NEIGHBOURS: tl.constexpr, ACC: tl.constexpr):
    """The low and the high element of each pair of the R dims at `base`: neighbours, or half of the dims apart."""
    low = 2 * pair if NEIGHBOURS else pair
    high = low + 1 if NEIGHBOURS else low + ROTATED // 2
    return tl.load(base + low, mask=mask, other=0.0).to(ACC), tl.load(base + high, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_pairs(base, pair, low, high, mask, ROTATED: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Put pairs where `load_pairs` finds them."""
    at = 2 * pair if NEIGHBOURS else pair
    tl.store(base + at, low.to(base.dtype.element_ty), mask=mask)
    tl.store(base + (at + 1 if NEIGHBOURS else at + ROTATED // 2), high.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_angles(cos, sin, token, pair, sharing, ROTATED: tl.constexpr, ACC: tl.constexpr):
    """The cosines and sines of a token's pairs; a row of the tables serves `sharing` tokens in turn."""
    at = token // sharing * ROTATED + pair
    inside = pair < ROTATED // 2
    return tl.load(cos + at, mask=inside, other=0.0).to(ACC), tl.load(sin + at, mask=inside, other=0.0).to(ACC)


@triton.jit
def turn(low, high, cos, sin):
    """Turn pairs by their angles."""
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _rotate_heads(
    x, out, token, cos, sin, token_stride, head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTATED: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    BLOCK_H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, HALF)[None, :]
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[:, None]
        inside = (head < HEADS) & (pair < ROTATED // 2)
        source = x + token * token_stride + head * head_stride
        target = out + (token * HEADS + head) * DIM
        low, high = load_pairs(source, pair, inside, ROTATED, FROM, ACC)
        low, high = turn(low, high, cos[None, :], sin[None, :])
        store_pairs(target, pair, low, high, inside, ROTATED, TO)
        if ROTATED < DIM:
            rest = ROTATED + tl.arange(0, REST)[None, :]
            copied = (head < HEADS) & (rest < DIM)
            tl.store(target + rest, tl.load(source + rest, mask=copied), mask=copied)


@triton.jit
def _rotary_kernel(
    q, k, out_q, out_k, cos, sin, sharing,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, ROTATED: tl.constexpr, BACKWARD: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c, s = load_angles(cos, sin, token, tl.arange(0, HALF), sharing, ROTATED, ACC)
    if BACKWARD:
        s = -s
    FROM: tl.constexpr = NEIGHBOURS and not BACKWARD
    TO: tl.constexpr = NEIGHBOURS and BACKWARD
    _rotate_heads(
        q, out_q, token, c, s, q_token_stride, q_head_stride,
        Q_HEADS, DIM, ROTATED, FROM, TO, BLOCK_Q, HALF, REST, ACC,
    )  # fmt: skip
    _rotate_heads(
        k, out_k, token, c, s, k_token_stride, k_head_stride,
        K_HEADS, DIM, ROTATED, FROM, TO, BLOCK_K, HALF, REST, ACC,
    )  # fmt: skip


def rotate(
    q_SBHK: Tensor, k_SBGK: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, backward: bool, neighbours: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn pairs (i, i + R / 2) of the first R dims of each head by the position's angles, in fp32 (fp64 for fp64).

    Args:
        q_SBHK: [S, B, H, K], heads contiguous, tokens equally far apart.
        k_SBGK: [S, B, G, K], likewise.
        cos_SR: [S, R], or [S, B, R] where each sequence has positions of its own; both halves of a row equal; contiguous.
        sin_SR: likewise.
        backward: turn back: the gradient.
        neighbours: pairs are (2i, 2i + 1) before they are turned, and (i, i + R / 2) afterwards.

    Returns:
        Queries and keys, contiguous.
    """
    positions, sequences, _, dim = q_SBHK.shape
    out_q = torch.empty(q_SBHK.shape, dtype=q_SBHK.dtype, device=q_SBHK.device)
    out_k = torch.empty(k_SBGK.shape, dtype=k_SBGK.dtype, device=k_SBGK.device)
    if positions * sequences == 0:
        return out_q, out_k
    rotated = cos_SR.shape[-1]
    half = int(triton.next_power_of_2(max(1, rotated // 2)))
    rest = int(triton.next_power_of_2(max(1, dim - rotated)))
    blocks = [min(max(1, TILE // half), int(triton.next_power_of_2(x.shape[2]))) for x in (q_SBHK, k_SBGK)]
    q, k = q_SBHK.view(-1, *q_SBHK.shape[2:]), k_SBGK.view(-1, *k_SBGK.shape[2:])
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    sharing = 1 if cos_SR.dim() == 3 else sequences  # tokens in turn that a row of the tables serves
    accumulator = tl.float64 if q.dtype == torch.float64 else tl.float32
    _rotary_kernel[(positions * sequences,)](
        q, k, out_q, out_k, cos_SR, sin_SR, sharing, *strides,
        q.shape[1], k.shape[1], dim, rotated, backward, neighbours, *blocks, half, rest, accumulator, num_warps=4,
    )  # fmt: skip
    return out_q, out_k
