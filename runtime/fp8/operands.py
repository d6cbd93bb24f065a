"""Operands in 8 bits: made by our kernels on a GPU, by plain torch elsewhere.

Legend: G matrices of one shape (experts, or one), T rows, P rows with padding, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.fp8.config import ROW_ALIGNMENT

E4M3 = torch.float8_e4m3fn


def fits(device: torch.device, *sizes: int) -> bool:
    """Say whether the products take matrices of such sizes; elsewhere than on a GPU they take all."""
    return device.type != "cuda" or all(size % ROW_ALIGNMENT == 0 for size in sizes)


@dataclass(frozen=True, slots=True)
class Quantised:
    """Matrices in 8 bits, and transposed: the tensor cores want each operand with the reduction along its rows."""

    rows: Tensor | None
    """[G, P, D]."""
    columns: Tensor | None
    """[G, D, P]."""
    bound_G: Tensor
    """[G] or [1] fp32: what the format's largest number stands for."""


def raise_amax(x_GTD: Tensor, amax_G: Tensor) -> None:
    """Raise numbers to the largest absolute value of a matrix each.

    Args:
        x_GTD: [G, T, D].
        amax_G: [G] fp32.
    """
    if x_GTD.is_cuda:
        from runtime.kernels.fp8 import amax

        amax(x_GTD, amax_G)
    elif x_GTD.numel():
        torch.maximum(amax_G, x_GTD.abs().flatten(1).amax(1).float(), out=amax_G)


def eight_bits(x: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to an 8-bit format in plain torch; larger numbers than the bound saturate, and what is not finite becomes NaN."""
    limit = torch.finfo(dtype).max
    # A number over a tensor would be its reciprocal times the number, which can differ in the last bit.
    scale = torch.where(bound > 0, torch.full_like(bound, limit) / bound, 1.0)
    scaled = (x.float() * scale).clamp(-limit, limit)
    return torch.where(torch.isfinite(x), scaled, torch.nan).to(dtype)


def in_fp32(x: Tensor, bound: Tensor) -> Tensor:
    """What 8-bit numbers stand for."""
    return x.float() * (bound / torch.finfo(x.dtype).max)


def quantise_into(
    x_GTD: Tensor, bound_G: Tensor, rows: Tensor | None, columns: Tensor | None, amax_G: Tensor | None = None
) -> None:
    """Bring matrices to 8 bits.

    Args:
        x_GTD: [G, T, D], the last dim contiguous.
        bound_G: [G] fp32.
        rows: [G, P, D] in an 8-bit format, the last dim contiguous; rows from T to P become zero. None: not wanted.
        columns: [G, D, P] likewise.
        amax_G: [G] fp32, raised to the largest absolute values; None: not wanted.
    """
    if x_GTD.is_cuda:
        from runtime.kernels.fp8 import quantise

        quantise(x_GTD, bound_G, rows, columns, amax_G)
        return
    if amax_G is not None:
        raise_amax(x_GTD, amax_G)
    num_rows = x_GTD.shape[1]
    for turned in (rows, None if columns is None else columns.transpose(1, 2)):
        if turned is not None:
            turned[:, :num_rows] = eight_bits(x_GTD, bound_G.view(-1, 1, 1), turned.dtype)
            turned[:, num_rows:] = torch.zeros((), dtype=turned.dtype)


def quantise(
    x_TD: Tensor,
    bound: Tensor,
    amax: Tensor | None,
    dtype: torch.dtype,
    *,
    alignment: int = 1,
    rows: bool = True,
    columns: bool = True,
) -> Quantised:
    """Bring a matrix to 8 bits.

    Args:
        x_TD: [T, D]; rows may lie apart.
        bound: [1] fp32.
        amax: [1] fp32, raised to the largest absolute value; None: not wanted.
        dtype: the format.
        alignment: P is T rounded up to a multiple of it.
        rows: whether the rows are wanted.
        columns: whether the transpose is wanted.

    Returns:
        One matrix.
    """
    num_rows, num_columns = x_TD.shape
    padded = -(-num_rows // alignment) * alignment
    made = Quantised(
        torch.empty(1, padded, num_columns, dtype=dtype, device=x_TD.device) if rows else None,
        torch.empty(1, num_columns, padded, dtype=dtype, device=x_TD.device) if columns else None,
        bound,
    )
    quantise_into(x_TD.unsqueeze(0), bound, made.rows, made.columns, amax)
    return made
