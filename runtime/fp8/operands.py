"""Operands in 8 bits: made by our kernels on a GPU, by plain torch elsewhere.

Legend: G matrices of one shape (experts, or one), T rows, P rows with padding, D columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.fp8.config import ROW_ALIGNMENT

E4M3 = torch.float8_e4m3fn
BLOCK = 128
"""Elements of a block's side, where each block has a scale."""


def fits(device: torch.device, *sizes: int, blocks: bool = False) -> bool:
    """Say whether the products take matrices of such sizes; elsewhere than on a GPU they take all but parts of blocks."""
    return (device.type != "cuda" and not blocks) or all(size % ROW_ALIGNMENT == 0 for size in sizes)


@dataclass(frozen=True, slots=True)
class Operand:
    """Matrices in 8 bits that lie with the reduction along their rows, as the tensor cores want them."""

    bits: Tensor
    """[R, K] rows, or [G, N, K] matrices."""
    scale: Tensor
    """fp32. [1] or [G], a bound: what the format's largest number stands for. Or block by block what one stands for: of rows
    [K / 128, R], each 128 elements of a row a block; of matrices [G, N / 128, K / 128]."""

    @property
    def blocks(self) -> bool:
        """Whether each block has a scale."""
        return self.scale.dim() > 1

    def part(self, first: int, last: int) -> Operand:
        """Some of the rows, or of each matrix' rows; where blocks of matrices have scales, whole blocks."""
        if self.bits.dim() == 2:
            return Operand(self.bits[first:last], self.scale[:, first:last] if self.blocks else self.scale)
        scale = self.scale[:, first // BLOCK : last // BLOCK] if self.blocks else self.scale
        return Operand(self.bits[:, first:last], scale)

    def in_fp32(self) -> Tensor:
        """What the numbers stand for."""
        if not self.blocks:
            return in_fp32(self.bits, self.scale.view(-1, *[1] * (self.bits.dim() - 1)))
        if self.bits.dim() == 2:
            return self.bits.float() * self.scale.repeat_interleave(BLOCK, 0).t()
        return self.bits.float() * spread(self.scale)


def spans(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Give where parts of such sizes, one behind another, begin and end."""
    first = 0
    for size in sizes:
        yield first, first + size
        first += size


def spread(blocks: Tensor) -> Tensor:
    """Give each element of matrices its block's number: [..., N / 128, K / 128] to [..., N, K]."""
    return blocks.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix, or several of one shape, in 8 bits, and transposed."""

    rows: Operand | None
    """[P, D] or [G, P, D]."""
    columns: Operand | None
    """[D, P] or [G, D, P]."""


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
