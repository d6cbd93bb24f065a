"""AdamW over flat ranges, and the squared norm of gradients.

Floor, at memory bandwidth: gradient 4 (2 in bf16), master 8, moments 16 (8 in bf16) and bf16 weight 2 bytes a parameter, with
masters as remainders 4 and the weight 4; so 30 in fp32, 28 with remainders, and 20 with moments in bf16, too. The norm 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.rounding import rounding_seed

BLOCK = 2048
NORM_BLOCK, NORM_TILES = 4096, 16


@triton.jit
def _random_bits(index, seed):
    """Sixteen bits for each of two roundings: an integer hash of the place and the step (a bijection of 32 bits)."""
    bits = index.to(tl.uint32) ^ seed.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _round(values, bits, TO: tl.constexpr):
    """To TO; to bf16 stochastically: up with the probability of what is cut off."""
    if TO == tl.bfloat16:  # noqa: SIM300
        raw = values.to(tl.uint32, bitcast=True)
        # Infinity and NaN keep their bits: a carry would turn one into the other.
        finite = (raw & 0x7F800000) != 0x7F800000
        raw = tl.where(finite, raw + (bits & 0xFFFF), raw) & 0xFFFF0000
        return raw.to(tl.float32, bitcast=True).to(TO)
    return values.to(TO)


@triton.jit
def _off_ties(p):
    """`runtime.parallel.masters.off_ties`."""
    bits = p.to(tl.int32, bitcast=True)
    return (bits - ((bits & 0x1FFFF) == 0x8000).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _load_master(master, weight, index, inside):
    """The master itself, or `runtime.parallel.masters.join`."""
    if master.dtype.element_ty == tl.int16:
        high = tl.load(weight + index, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(master + index, mask=inside, other=0).to(tl.int32)
        value = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        value = tl.load(master + index, mask=inside, other=0.0)
    return value


@triton.jit
def _store_master(master, weight, index, inside, p, HAS_WEIGHT: tl.constexpr):
    """The master and the weight rounded from it, or `runtime.parallel.masters.split`."""
    if master.dtype.element_ty == tl.int16:
        bits = tl.where(p == p, p.to(tl.int32, bitcast=True), 0x7FC00000)
        high = ((bits + 0x8000) >> 16).to(tl.int16)
        tl.store(weight + index, high.to(weight.dtype.element_ty, bitcast=True), mask=inside)
        tl.store(master + index, bits.to(tl.int16), mask=inside)
    else:
        tl.store(master + index, p, mask=inside)
        if HAS_WEIGHT:
            tl.store(weight + index, p.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _adamw_kernel(
    grad, master, exp_avg, exp_avg_sq, weight, divisor, skip, size, first, seed,
    step_size, keep, beta1, rest1, beta2, rest2, root_correction, eps,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(skip) != 0:
        return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32) / tl.load(divisor)
    m = tl.load(exp_avg + index, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + index, mask=inside, other=0.0).to(tl.float32)
    p = _load_master(master, weight, index, inside)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = p * keep - step_size * m / (tl.sqrt(v) / root_correction + eps)
    if weight.dtype.element_ty == tl.bfloat16:
        p = _off_ties(p)
    _store_master(master, weight, index, inside, p, HAS_WEIGHT)
    bits = _random_bits(index + first, seed)
    tl.store(exp_avg + index, _round(m, bits, exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + index, _round(v, bits >> 16, exp_avg_sq.dtype.element_ty), mask=inside)


@triton.jit
def _square_sum_kernel(values, sums, size, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Tiles in fp32, their sums in fp64: the error doesn't grow with the number of elements."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((1,), dtype=tl.float64)
    for tile in range(TILES):
        index = (program * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(values + index, mask=index < size, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 0).to(tl.float64)
    tl.store(sums + program + tl.arange(0, 1), total)


def adamw_step(
    grad: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    divisor: Tensor,
    skip: Tensor,
    *,
    num_steps: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    first: int = 0,
) -> None:
    """One step of AdamW, in place.

    Args:
        grad: [N] fp32 or bf16.
        master: [N] fp32; or int16, what bf16 weights lack of their masters (`runtime.parallel.masters`), which are read, too.
        exp_avg: [N] fp32, or bf16: rounded stochastically.
        exp_avg_sq: [N] as exp_avg.
        weight: [N] lower precision copy of the master to write; None where there is none.
        divisor: 0-dim fp32; the gradient is divided by it.
        skip: 0-dim bool; true leaves everything as it is.
        num_steps: steps including this one, for the bias correction.
        lr: learning rate.
        beta1: decay of exp_avg.
        beta2: decay of exp_avg_sq.
        eps: added to the root.
        weight_decay: decoupled.
        first: place of the first element in its range, which the roundings depend on.

    Source: https://arxiv.org/abs/1711.05101, algorithm 2, without a schedule multiplier.
    """
    if master.numel() == 0:
        return
    scalars = (
        lr / (1 - beta1**num_steps), 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
        (1 - beta2**num_steps) ** 0.5, eps,
    )  # fmt: skip
    tensors = (grad, master, exp_avg, exp_avg_sq, master if weight is None else weight, divisor, skip)
    grid = (triton.cdiv(master.numel(), BLOCK),)
    _adamw_kernel[grid](
        *tensors, master.numel(), first, rounding_seed(num_steps), *scalars, weight is not None, BLOCK, num_warps=8
    )


def square_sum(values: Tensor) -> Tensor:
    """Sum of squares.

    Args:
        values: [N] fp32 or lower, contiguous.

    Returns:
        0-dim fp64.
    """
    programs = triton.cdiv(values.numel(), NORM_BLOCK * NORM_TILES)
    if programs == 0:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    sums = torch.empty(programs, dtype=torch.float64, device=values.device)
    _square_sum_kernel[(programs,)](values, sums, values.numel(), NORM_BLOCK, NORM_TILES, num_warps=8)
    return sums.sum()
