"""Choices of experts to rows in expert order: a stable counting sort, without a sort of the whole or a host wait.

Legend: T tokens, K choices per token, S = T * K slots, E experts, B blocks of slots.

Three launches: counts per block, sums over blocks and experts, places. Floor: slots read twice and written once; in
practice the launches themselves (a few microseconds each).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
EXPERT_CHUNK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SortedSlots:
    """What `counting_sort` returns."""

    slot_of_row_R: Tensor
    """[R] int32 slot of each row, -1 for padding."""
    row_of_slot_TK: Tensor
    """[T, K] int32 row of each slot, -1 where dropped."""
    offsets_E: Tensor
    """[E] int32 ends of the experts' rows, padding included."""


@triton.jit
def _count_kernel(experts, counts, num_slots, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(experts + slots, mask=slots < num_slots, other=NUM_EXPERTS).to(tl.int32)
    for start in range(0, NUM_EXPERTS, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        hits = (chosen[:, None] == ids[None, :]) & (ids[None, :] < NUM_EXPERTS)
        # [E, B]: a later program reads one expert's counts in a row
        tl.store(counts + ids * tl.num_programs(0) + block, tl.sum(hits.to(tl.int32), 0), mask=ids < NUM_EXPERTS)


@triton.jit
def _scan_kernel(counts, totals, num_blocks, NUM_CHUNKS: tl.constexpr, BLOCKS: tl.constexpr):
    """Turn an expert's counts per block into exclusive sums, and keep the total."""
    expert = tl.program_id(0)
    carry = 0
    for chunk in range(NUM_CHUNKS):
        index = chunk * BLOCKS + tl.arange(0, BLOCKS)
        values = tl.load(counts + expert * num_blocks + index, mask=index < num_blocks, other=0)
        tl.store(counts + expert * num_blocks + index, tl.cumsum(values, 0) - values + carry, mask=index < num_blocks)
        carry += tl.sum(values, 0)
    tl.store(totals + expert, carry)


@triton.jit
def _place_kernel(
    experts,
    before,
    totals,
    slot_of_row,
    row_of_slot,
    ends,
    needed,
    num_slots,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROOM: tl.constexpr,
    NOTES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Give each slot its row. With ROOM every expert has as many rows, and the slots past them none; with NOTES, how much is
    needed is kept: of the fullest expert with ROOM, of all without."""
    block = tl.program_id(0)
    all_ids = tl.arange(0, EXPERTS)
    sizes = tl.load(totals + all_ids, mask=all_ids < NUM_EXPERTS, other=0)
    padded = tl.full((EXPERTS,), ROOM, tl.int32)
    if ROOM == 0:
        padded = (sizes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    if block == 0:
        tl.store(ends + all_ids, tl.minimum(tl.cumsum(padded, 0), num_rows), mask=all_ids < NUM_EXPERTS)
        if NOTES:
            if ROOM == 0:
                tl.atomic_max(needed, tl.sum(sizes, 0))
            else:
                tl.atomic_max(needed, tl.max(sizes, 0))
    slots = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(experts + slots, mask=slots < num_slots, other=NUM_EXPERTS).to(tl.int32)
    row = tl.full((BLOCK,), -1, tl.int32)
    for start in range(0, NUM_EXPERTS, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        known = ids < NUM_EXPERTS
        hits = (chosen[:, None] == ids[None, :]) & known[None, :]
        rank = tl.cumsum(hits.to(tl.int32), 0) - 1
        earlier = tl.load(before + ids * tl.num_programs(0) + block, mask=known, other=0)
        first = tl.sum(tl.where(all_ids[:, None] < ids[None, :], padded[:, None], 0), 0)
        if ROOM > 0:
            hits = hits & (rank + earlier[None, :] < ROOM)
        place = tl.sum(tl.where(hits, rank + (earlier + first)[None, :], 0), 1)
        row = tl.where((tl.sum(hits.to(tl.int32), 1) > 0) & (place < num_rows), place, row)
    tl.store(row_of_slot + slots, row, mask=slots < num_slots)
    tl.store(slot_of_row + row, slots, mask=(slots < num_slots) & (row >= 0))


def counting_sort(
    experts_TK: Tensor,
    num_experts: int,
    max_rows: int,
    alignment: int = 1,
    *,
    room: int | None = None,
    needed: Tensor | None = None,
) -> SortedSlots:
    """Sort slots by expert, stably; each expert's rows start at a multiple of `alignment`.

    Args:
        experts_TK: [T, K] integer; num_experts and above: dropped.
        num_experts: E.
        max_rows: R, for all kept slots and padding; slots that it doesn't suffice for have no row.
        alignment: rows of an expert are padded to a multiple of it.
        room: rows of each expert, whatever their number, with R of E times as many; None: as many as it takes.
        needed: 0-dim int32 that becomes at least the slots of all experts, or with `room` of the fullest; None: nowhere.

    Returns:
        The order.
    """
    device, num_slots = experts_TK.device, experts_TK.numel()
    num_blocks = max(1, triton.cdiv(num_slots, BLOCK))
    counts = torch.empty(num_experts, num_blocks, dtype=torch.int32, device=device)
    totals = torch.empty(num_experts, dtype=torch.int32, device=device)
    slot_of_row = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
    row_of_slot = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    ends = torch.empty_like(totals)
    experts = experts_TK.contiguous()
    _count_kernel[(num_blocks,)](experts, counts, num_slots, num_experts, BLOCK, EXPERT_CHUNK)
    chunk = min(1024, triton.next_power_of_2(num_blocks))
    _scan_kernel[(num_experts,)](counts, totals, num_blocks, triton.cdiv(num_blocks, chunk), chunk)
    _place_kernel[(num_blocks,)](
        experts,
        counts,
        totals,
        slot_of_row,
        row_of_slot,
        ends,
        totals if needed is None else needed,
        num_slots,
        max_rows,
        num_experts,
        alignment,
        room or 0,
        needed is not None,
        triton.next_power_of_2(num_experts),
        BLOCK,
        EXPERT_CHUNK,
    )
    return SortedSlots(slot_of_row_R=slot_of_row, row_of_slot_TK=row_of_slot, offsets_E=ends)
