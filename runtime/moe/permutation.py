"""From choices of experts to rows in expert order.

Legend: T tokens, K choices per token, E experts, R rows (at most the kept choices). A slot is a choice: t * K + k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.moe.losses import count_choices


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """Where each choice finds its row among the experts' rows.

    Rows are ordered by expert, and within an expert by slot. Rows from offsets_E[-1] on belong to no expert: their
    slots are valid indices, and nothing may use their values.
    """

    slot_of_row_R: Tensor
    """[R] int32, the slot that fills each row."""
    row_of_slot_TK: Tensor
    """[T, K] int32, the row of each slot, -1 where dropped."""
    offsets_E: Tensor
    """[E] int32, where each expert's rows end."""

    @property
    def num_rows(self) -> int:
        """Rows that are allocated, R."""
        return self.slot_of_row_R.shape[0]

    @property
    def topk(self) -> int:
        """Choices per token, K."""
        return self.row_of_slot_TK.shape[1]


def plan_rows(experts_TK: Tensor, num_experts: int, max_rows: int, *, fused: bool = True) -> RowPlan:
    """Sort choices by expert, stably.

    Args:
        experts_TK: [T, K] int64; num_experts where dropped.
        num_experts: E.
        max_rows: rows to allocate, at least the kept choices.
        fused: use the counting-sort kernel on a GPU.

    Returns:
        The plan.
    """
    if fused and experts_TK.is_cuda:
        from runtime.kernels.counting_sort import counting_sort

        slots, rows, offsets = counting_sort(experts_TK, num_experts, max_rows)
        return RowPlan(slot_of_row_R=slots, row_of_slot_TK=rows, offsets_E=offsets)
    flat = experts_TK.reshape(-1)
    order = flat.argsort(stable=True)
    places = torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device)
    rows = torch.empty_like(places).scatter_(0, order, places)
    rows = rows.masked_fill(flat >= num_experts, -1)
    return RowPlan(
        slot_of_row_R=order[:max_rows].int(),
        row_of_slot_TK=rows.view(experts_TK.shape),
        offsets_E=count_choices(experts_TK, num_experts).cumsum(0, dtype=torch.int32),
    )
