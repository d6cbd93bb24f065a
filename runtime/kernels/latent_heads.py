"""Heads of latent attention from its projections, in one launch each way.

Legend: S positions, B sequences, H heads, P plain and R turned dims of a query or key, V dims of a value. Floor, at memory
bandwidth: queries and keys read and written once, H (4 P + 3 R) elements a token forward; keys' gradients and values' read and
written, H (4 P + 3 R + 2 V) backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.rotary import load_angles, load_pairs, store_pairs, turn

TILE = 2048  # elements of a tile


@triton.jit
def _copy_dims(source, target, inside_heads, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    dim = tl.arange(0, BLOCK)[None, :]
    inside = inside_heads & (dim < DIMS)
    tl.store(target + dim, tl.load(source + dim, mask=inside), mask=inside)


@triton.jit
def _forward_kernel(
    q, kv, turned, out_q, out_k, cos, sin, sharing, q_stride, kv_stride, turned_stride,
    HEADS: tl.constexpr, PLAIN: tl.constexpr, ROTATED: tl.constexpr, VALUE: tl.constexpr, NEIGHBOURS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    c, s = load_angles(cos, sin, token, pair, sharing, ROTATED, ACC)
    key_low, key_high = load_pairs(turned + token * turned_stride, pair, pair < ROTATED // 2, ROTATED, NEIGHBOURS, ACC)
    key_low, key_high = turn(key_low, key_high, c, s)
    pair = pair[None, :]
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[:, None]
        inside = (head < HEADS) & (pair < ROTATED // 2)
        target = (token * HEADS + head) * (PLAIN + ROTATED)
        query = q + token * q_stride + head * (PLAIN + ROTATED)
        _copy_dims(query, out_q + target, head < HEADS, PLAIN, BLOCK_P)
        low, high = load_pairs(query + PLAIN, pair, inside, ROTATED, NEIGHBOURS, ACC)
        low, high = turn(low, high, c[None, :], s[None, :])
        store_pairs(out_q + target + PLAIN, pair, low, high, inside, ROTATED, False)
        _copy_dims(kv + token * kv_stride + head * (PLAIN + VALUE), out_k + target, head < HEADS, PLAIN, BLOCK_P)
        shared = tl.zeros((BLOCK_H, HALF), dtype=ACC)
        store_pairs(
            out_k + target + PLAIN, pair, shared + key_low[None, :], shared + key_high[None, :], inside, ROTATED, False
        )


@triton.jit
def _backward_kernel(
    grad_q, grad_k, grad_v, out_q, out_kv, out_turned, cos, sin, sharing,
    q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, PLAIN: tl.constexpr, ROTATED: tl.constexpr, VALUE: tl.constexpr, NEIGHBOURS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    c, s = load_angles(cos, sin, token, pair, sharing, ROTATED, ACC)
    sum_low, sum_high = tl.zeros((HALF,), dtype=ACC), tl.zeros((HALF,), dtype=ACC)
    row = pair[None, :]
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[:, None]
        inside = (head < HEADS) & (row < ROTATED // 2)
        query = grad_q + token * q_token + head * q_head
        to_q = out_q + (token * HEADS + head) * (PLAIN + ROTATED)
        _copy_dims(query, to_q, head < HEADS, PLAIN, BLOCK_P)
        low, high = load_pairs(query + PLAIN, row, inside, ROTATED, False, ACC)
        low, high = turn(low, high, c[None, :], -s[None, :])
        store_pairs(to_q + PLAIN, row, low, high, inside, ROTATED, NEIGHBOURS)
        key = grad_k + token * k_token + head * k_head
        to_kv = out_kv + (token * HEADS + head) * (PLAIN + VALUE)
        _copy_dims(key, to_kv, head < HEADS, PLAIN, BLOCK_P)
        _copy_dims(grad_v + token * v_token + head * v_head, to_kv + PLAIN, head < HEADS, VALUE, BLOCK_V)
        low, high = load_pairs(key + PLAIN, row, inside, ROTATED, False, ACC)
        sum_low += tl.sum(low, 0)
        sum_high += tl.sum(high, 0)
    sum_low, sum_high = turn(sum_low, sum_high, c, -s)
    store_pairs(out_turned + token * ROTATED, pair, sum_low, sum_high, pair < ROTATED // 2, ROTATED, NEIGHBOURS)


def _power(size: int) -> int:
    return int(triton.next_power_of_2(max(1, size)))


def _blocks(heads: int, widest: int) -> int:
    return min(max(1, TILE // widest), _power(heads))


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def heads(
    q_SBHK: Tensor, kv_SBHK: Tensor, turned_SBR: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, value: int, neighbours: bool
) -> tuple[Tensor, Tensor]:
    """Turn the last R dims of queries, and give each head's key its plain dims and the turned ones that all share.

    Args:
        q_SBHK: [S, B, H, P + R], a token's elements contiguous, tokens equally far apart.
        kv_SBHK: [S, B, H, P + V], likewise.
        turned_SBR: [S, B, R], likewise.
        cos_SR: [S, R], or [S, B, R] where each sequence has positions of its own; both halves of a row equal; contiguous.
        sin_SR: likewise.
        value: V.
        neighbours: pairs are (2i, 2i + 1) before they are turned, and (i, i + R / 2) afterwards.

    Returns:
        Queries and keys, [S, B, H, P + R], contiguous.
    """
    positions, sequences, num_heads, dim = q_SBHK.shape
    out_q, out_k = (torch.empty(q_SBHK.shape, dtype=q_SBHK.dtype, device=q_SBHK.device) for _ in range(2))
    if positions * sequences == 0:
        return out_q, out_k
    rotated = turned_SBR.shape[-1]
    plain, half = dim - rotated, _power(rotated // 2)
    sharing = 1 if cos_SR.dim() == 3 else sequences  # tokens in turn that a row of the tables serves
    strides = (q_SBHK.stride(1), kv_SBHK.stride(1), turned_SBR.stride(1))
    _forward_kernel[(positions * sequences,)](
        q_SBHK, kv_SBHK, turned_SBR, out_q, out_k, cos_SR, sin_SR, sharing, *strides,
        num_heads, plain, rotated, value, neighbours, _blocks(num_heads, _power(plain)), _power(plain), half,
        _accumulator(q_SBHK), num_warps=4,
    )  # fmt: skip
    return out_q, out_k


def gradients(
    grad_q_SBHK: Tensor, grad_k_SBHK: Tensor, grad_v_SBHV: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, neighbours: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give what `heads` gives the gradients of.

    Args:
        grad_q_SBHK: [S, B, H, P + R], heads contiguous, tokens equally far apart.
        grad_k_SBHK: likewise.
        grad_v_SBHV: [S, B, H, V], likewise.
        cos_SR: as of `heads`.
        sin_SR: likewise.
        neighbours: likewise.

    Returns:
        [S, B, H, P + R] of queries, [S, B, H, P + V] of keys' plain dims and values, [S, B, R] of the dims that all heads share.
    """
    positions, sequences, num_heads, dim = grad_q_SBHK.shape
    rotated, value = cos_SR.shape[-1], grad_v_SBHV.shape[-1]
    plain = dim - rotated
    shapes = ((num_heads, dim), (num_heads, plain + value), (rotated,))
    out_q, out_kv, out_turned = (grad_q_SBHK.new_empty(positions, sequences, *shape) for shape in shapes)
    if positions * sequences == 0:
        return out_q, out_kv, out_turned
    sharing = 1 if cos_SR.dim() == 3 else sequences
    strides = [x.stride(place) for x in (grad_q_SBHK, grad_k_SBHK, grad_v_SBHV) for place in (1, 2)]
    widest = max(_power(plain), _power(value))
    _backward_kernel[(positions * sequences,)](
        grad_q_SBHK, grad_k_SBHK, grad_v_SBHV, out_q, out_kv, out_turned, cos_SR, sin_SR, sharing, *strides,
        num_heads, plain, rotated, value, neighbours, _blocks(num_heads, widest), _power(plain), _power(value),
        _power(rotated // 2), _accumulator(grad_q_SBHK), num_warps=4,
    )  # fmt: skip
    return out_q, out_kv, out_turned
