"""Operands of a step, scaled as the recipe says.

Legend: T rows, P rows with padding, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.fp8 import blocks
from runtime.fp8.config import ROW_ALIGNMENT
from runtime.fp8.operands import Operand, Quantised, quantise_into, raise_amax, spans
from runtime.fp8.scaling import Scaling


def row_alignment(device: torch.device, scaling: Scaling) -> int:
    """Give what the products want the number of rows to be a multiple of."""
    return ROW_ALIGNMENT if device.type == "cuda" or scaling.blockwise else 1


def quantise(
    scaling: Scaling,
    slot: int,
    parts_TD: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    alignment: int = 1,
    rows: bool = True,
    columns: bool = True,
) -> Quantised:
    """Bring matrices, side by side, to 8 bits: with one bound, or block by block.

    Args:
        scaling: the bounds of this rank.
        slot: the place of the whole in them.
        parts_TD: [T, D] each, contiguous.
        dtype: the format.
        alignment: P is T rounded up to a multiple of it.
        rows: whether the rows are wanted.
        columns: whether the transpose is wanted.

    Returns:
        Rows [P, D of all] and columns [D of all, P]; rows from T to P are zero.
    """
    if scaling.blockwise:
        return blocks.quantise(parts_TD, dtype, alignment=alignment, rows=rows, columns=columns)

    def find(out: Tensor) -> None:
        for part in parts_TD:
            raise_amax(part.unsqueeze(0), out)

    bound, amax = scaling.bound(slot, find)
    num_rows, total = parts_TD[0].shape[0], sum(part.shape[1] for part in parts_TD)
    padded, device = -(-num_rows // alignment) * alignment, parts_TD[0].device
    made = [
        torch.empty(shape, dtype=dtype, device=device) if wanted else None
        for shape, wanted in (((padded, total), rows), ((total, padded), columns))
    ]
    for part, (first, last) in zip(parts_TD, spans(part.shape[1] for part in parts_TD), strict=True):
        into = (None if made[0] is None else made[0][None, :, first:last],
                None if made[1] is None else made[1][None, first:last])  # fmt: skip
        quantise_into(part.unsqueeze(0), bound, *into, amax)
    return Quantised(*(None if bits is None else Operand(bits, bound) for bits in made))
