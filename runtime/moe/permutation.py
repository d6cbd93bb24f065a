"""From choices of experts to rows in expert order.

Legend: T tokens, K choices per token, E experts, R rows (at most the kept choices). A slot is a choice: t * K + k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.moe.losses import count_choices


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """Where each choice finds its row among the experts' rows.

    Rows are ordered by expert, and within an expert by slot; after an expert's rows come its padding rows, whose slot
    is -1 and whose values are 0. Rows from offsets_E[-1] on belong to no expert: nothing may use their values.
    """

    slot_of_row_R: Tensor
    """[R] int32, the slot that fills each row, -1 for padding."""
    row_of_slot_TK: Tensor
    """[T, K] int32, the row of each slot, -1 where dropped."""
    offsets_E: Tensor
    """[E] int32, where each expert's rows end, padding included."""
    alignment: int = 1
    """Each expert's rows start at a multiple of it."""

    @property
    def num_rows(self) -> int:
        """Rows that are allocated, R."""
        return self.slot_of_row_R.shape[0]

    @property
    def topk(self) -> int:
        """Choices per token, K."""
        return self.row_of_slot_TK.shape[1]

    def first(self, num_tokens: int, max_rows: int) -> RowPlan:
        """The plan of the first tokens alone, where all choices of the others are dropped.

        Args:
            num_tokens: how many.
            max_rows: upper bound of their kept choices.

        Returns:
            Views, with rows enough for max_rows choices and all padding.
        """
        num_rows = _num_rows(max_rows, self.offsets_E.shape[0], self.alignment)
        return replace(
            self,
            slot_of_row_R=self.slot_of_row_R[:num_rows],
            row_of_slot_TK=self.row_of_slot_TK[:num_tokens],
        )


def _num_rows(max_rows: int, num_experts: int, alignment: int) -> int:
    """Rows for so many choices and the padding of each expert."""
    return -(-(max_rows + num_experts * (alignment - 1)) // alignment) * alignment


def plan_rows(
    experts_TK: Tensor,
    num_experts: int,
    max_rows: int,
    *,
    alignment: int = 1,
    fused: bool = True,
    needed: Tensor | None = None,
) -> RowPlan:
    """Sort choices by expert, stably.

    Args:
        experts_TK: [T, K] int64; num_experts where dropped.
        num_experts: E.
        max_rows: upper bound of the kept choices; with `needed` those past it are dropped.
        alignment: pad each expert's rows to a multiple of it.
        fused: use the counting-sort kernels on a GPU.
        needed: 0-dim int32 that becomes at least the number of kept choices; None where max_rows is known to suffice.

    Returns:
        The plan, with rows enough for max_rows choices and all padding.
    """
    num_rows = _num_rows(max_rows, num_experts, alignment)
    return _sort(experts_TK, num_experts, num_rows, alignment, fused=fused, needed=needed)


def plan_blocks(ids_TK: Tensor, num_blocks: int, room: int, needed: Tensor, *, fused: bool = True) -> RowPlan:
    """Sort choices into blocks of equal size, stably; those that a block has no room for are dropped.

    Args:
        ids_TK: [T, K] int64 blocks; num_blocks where dropped.
        num_blocks: how many.
        room: rows of each.
        needed: 0-dim int32 that becomes at least the choices of the fullest block.
        fused: use the counting-sort kernels on a GPU.

    Returns:
        The plan of num_blocks * room rows, where a row that is not filled has slot -1, and any value.
    """
    return _sort(ids_TK, num_blocks, num_blocks * room, 1, fused=fused, needed=needed, room=room)


def _sort(
    experts_TK: Tensor,
    num_experts: int,
    num_rows: int,
    alignment: int,
    *,
    fused: bool,
    needed: Tensor | None,
    room: int | None = None,
) -> RowPlan:
    if fused and experts_TK.is_cuda:
        from runtime.kernels.counting_sort import counting_sort

        order = counting_sort(experts_TK, num_experts, num_rows, alignment, room=room, needed=needed)
        return RowPlan(
            slot_of_row_R=order.slot_of_row_R,
            row_of_slot_TK=order.row_of_slot_TK,
            offsets_E=order.offsets_E,
            alignment=alignment,
        )
    flat = experts_TK.reshape(-1)
    counts = count_choices(experts_TK, num_experts)
    if needed is not None:
        most = counts.sum() if room is None else counts.max()
        needed.copy_(torch.maximum(needed, most.to(needed.dtype)))
    padded = (counts + alignment - 1) // alignment * alignment if room is None else torch.full_like(counts, room)
    # The place among all sorted choices, moved on by the padding of the experts before.
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    sorted_slots = flat.argsort(stable=True)
    places = torch.empty_like(flat).scatter_(0, sorted_slots, torch.arange(flat.shape[0], device=flat.device))
    expert = flat.clamp(max=num_experts - 1)
    rows = places + shift[expert]
    end = padded.cumsum(0).clamp(max=num_rows)
    kept = (flat < num_experts) & (rows < end[expert])
    rows = torch.where(kept, rows, -1).int()
    slots = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=flat.device)
    slots.scatter_(0, torch.where(kept, rows.long(), num_rows), torch.arange(flat.shape[0], device=flat.device).int())
    return RowPlan(
        slot_of_row_R=slots[:num_rows],
        row_of_slot_TK=rows.view(experts_TK.shape),
        offsets_E=end.int(),
        alignment=alignment,
    )
