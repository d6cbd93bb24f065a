"""Blockwise scaling: every block of 128 elements, or of a weight of 128 x 128, has a scale of its own.

A block lies along the reduction of the product that its operand is for, so that a matrix and its transpose are rounded each
in its own blocks; weights have blocks of 128 x 128, and their transpose is the same numbers. Scales are powers of two, so
that scaling itself rounds nothing, and the largest number of a block comes to more than half of the format's largest. Nothing
is kept from step to step.

Source: https://github.com/NVIDIA/TransformerEngine/blob/v2.20/transformer_engine/common/recipe/__init__.py (Float8BlockScaling)

Legend: G matrices of one shape (experts, or one), T rows, P rows with padding, D columns; all but T are multiples of 128.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from runtime.fp8.operands import BLOCK, E4M3, Operand, Quantised, spans, spread

MOST = 2.0**100
"""Of a factor: a block of the smallest numbers is not brought to the format's largest."""
_EXPONENT = 0x7F800000


def factors(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the powers of two that blocks are multiplied with.

    Args:
        amax: fp32, the largest absolute value of each block: the factor of 0 is 1, and that of what isn't finite NaN.
        dtype: the 8-bit format.
    """
    limit = torch.full_like(amax, torch.finfo(dtype).max)
    ratio = (limit / amax).clamp(max=MOST)
    power = (ratio.view(torch.int32) & _EXPONENT).view(torch.float32)
    return torch.where(torch.isfinite(amax), torch.where(amax > 0, power, 1.0), torch.nan)


def rows_of(x_RK: Tensor, dtype: torch.dtype) -> Operand:
    """Bring a matrix to 8 bits, each 128 elements of a row by themselves; in plain torch."""
    blocks = x_RK.float().view(x_RK.shape[0], -1, BLOCK)
    factor = factors(blocks.abs().amax(2), dtype)
    bits = (x_RK.float() * factor.repeat_interleave(BLOCK, 1)).to(dtype)
    return Operand(bits, (1 / factor).t().contiguous())


def columns_of(x_RK: Tensor, dtype: torch.dtype) -> Operand:
    """Bring the transpose of a matrix to 8 bits, each 128 elements of a column by themselves; in plain torch."""
    return rows_of(x_RK.t().contiguous(), dtype)


def quantise(
    parts_TD: Sequence[Tensor], dtype: torch.dtype, *, alignment: int, rows: bool = True, columns: bool = True
) -> Quantised:
    """Bring matrices, side by side, to 8 bits.

    Args:
        parts_TD: [T, D] each, the last dim contiguous.
        dtype: the format.
        alignment: P is T rounded up to a multiple of it.
        rows: whether the rows are wanted.
        columns: whether the transpose is wanted.

    Returns:
        Rows [P, D of all] and columns [D of all, P].
    """
    num_rows, total = parts_TD[0].shape[0], sum(part.shape[1] for part in parts_TD)
    padded, device = -(-num_rows // alignment) * alignment, parts_TD[0].device
    if device.type != "cuda":
        whole = pad(torch.cat(list(parts_TD), 1), (0, 0, 0, padded - num_rows))
        return Quantised(rows_of(whole, dtype) if rows else None, columns_of(whole, dtype) if columns else None)
    from runtime.kernels.fp8_blocks import empty_rows
    from runtime.kernels.fp8_blocks import quantise as kernel

    made = Quantised(
        Operand(*empty_rows(padded, total, dtype, device)) if rows else None,
        Operand(*empty_rows(total, padded, dtype, device)) if columns else None,
    )
    for part, (first, last) in zip(parts_TD, spans(part.shape[1] for part in parts_TD), strict=True):
        into = (
            None if made.rows is None else _columns(made.rows, first, last),
            None if made.columns is None else _rows(made.columns, first, last),
        )
        kernel(part, *into)
    return made


def _rows(operand: Operand, first: int, last: int) -> tuple[Tensor, Tensor]:
    part = operand.part(first, last)
    return part.bits, part.scale


def _columns(operand: Operand, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Some columns of rows, or of each matrix, in whole blocks."""
    place = slice(first // BLOCK, last // BLOCK)
    scale = operand.scale[place] if operand.bits.dim() == 2 else operand.scale[:, :, place]
    return operand.bits[..., first:last], scale


def empty_matrices(num_matrices: int, rows: int, depth: int, device: torch.device) -> Quantised:
    """Make room for weights in 8 bits and for their transposes."""

    def empty(*shape: int) -> Operand:
        bits = torch.empty(num_matrices, *shape, dtype=E4M3, device=device)
        blocks = (num_matrices, *(size // BLOCK for size in shape))
        return Operand(bits, torch.empty(blocks, dtype=torch.float32, device=device))

    return Quantised(empty(rows, depth), empty(depth, rows))


def quantise_matrices(parts_GNK: Sequence[Tensor], made: Quantised) -> None:
    """Bring weights, one below the other, to 8 bits, each 128 x 128 elements by themselves.

    Args:
        parts_GNK: [G, N, K] each, contiguous.
        made: as `empty_matrices` gives; becomes the weights and their transposes.
    """
    rows, columns = made.rows, made.columns
    assert rows is not None
    assert columns is not None
    if rows.bits.is_cuda:
        from runtime.kernels.fp8_blocks import quantise_matrices as kernel

        for part, place in zip(parts_GNK, spans(part.shape[1] for part in parts_GNK), strict=True):
            kernel(part, _rows(rows, *place), _columns(columns, *place))
        return
    whole = torch.cat(list(parts_GNK), 1).float()
    num, height, depth = whole.shape
    blocks = whole.view(num, height // BLOCK, BLOCK, depth // BLOCK, BLOCK)
    factor = factors(blocks.abs().amax((2, 4)), E4M3)
    bits = (whole * spread(factor)).to(E4M3)
    rows.bits.copy_(bits)
    rows.scale.copy_(1 / factor)
    columns.bits.copy_(bits.view(torch.uint8).transpose(1, 2).contiguous().view(E4M3))
    columns.scale.copy_(rows.scale.transpose(1, 2))
