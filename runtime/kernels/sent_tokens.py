"""Kernels for tokens that go to a rank once: where they go, and what travels behind them.

Legend: T tokens, K choices per token, E experts, P ranks, R rows (a token for a rank), N blocks of rows. All of it is integers
and copies of a few bytes a token, of no weight on the device: what counts is that each step is one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
CHUNK = 64
"""Blocks of rows with which a row's place is compared at once."""
MAX_RANKS = 64
"""Of a group, whose ranks a block of tokens is compared with at once."""


@triton.jit
def _homes_kernel(
    experts,
    ranks,
    counts,
    num_tokens,
    num_local,
    E: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mark each token's ranks, and count choices and tokens: sums of integers, the same in any order."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    ids = tl.arange(0, RANKS)
    goes = tl.zeros((BLOCK, RANKS), tl.int32)
    for k in range(K):
        expert = tl.load(experts + tokens.to(tl.int64) * K + k, mask=inside, other=E).to(tl.int32)
        kept = expert < E
        tl.atomic_add(counts + expert, 1, mask=kept)
        home = tl.where(kept, expert // num_local, RANKS)
        goes = goes | (home[:, None] == ids[None, :]).to(tl.int32)
    values = tl.where(goes > 0, ids[None, :], P).to(tl.int64)
    cells = tokens[:, None].to(tl.int64) * P + ids[None, :]
    tl.store(ranks + cells, values, mask=inside[:, None] & (ids < P)[None, :])
    tl.atomic_add(counts + E + ids, tl.sum(goes, 0), mask=ids < P)


@triton.jit
def _tails_kernel(
    experts,
    weights,
    slots,
    numbers_out,
    weights_out,
    num_rows,
    num_local,
    numbers_pitch,
    weights_pitch,
    num_numbers,
    num_weights,
    K: tl.constexpr,
    P: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the numbers and weights of a row's choices of its rank, and zeros up to the end of both rooms."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-1)
    filled = slot >= 0
    slot = tl.where(filled, slot, 0)
    token, rank = (slot // P).to(tl.int64), slot % P
    columns = tl.arange(0, COLUMNS)
    chosen = filled[:, None] & (columns < K)[None, :]
    cells = token[:, None] * K + columns[None, :]
    expert = tl.load(experts + cells, mask=chosen, other=0).to(tl.int32)
    here = chosen & (expert // num_local == rank[:, None])
    number = tl.where(here, expert % num_local, num_local)
    number = tl.where((columns < K)[None, :], number, 0)
    weight = tl.load(weights + cells, mask=here, other=0.0)
    inside = (rows < num_rows)[:, None]
    at = rows[:, None].to(tl.int64)
    tl.store(
        numbers_out + at * numbers_pitch + columns[None, :], number, mask=inside & (columns < num_numbers)[None, :]
    )
    tl.store(
        weights_out + at * weights_pitch + columns[None, :], weight, mask=inside & (columns < num_weights)[None, :]
    )


@triton.jit
def _found_kernel(
    experts,
    rows,
    tails,
    out,
    num_choices,
    num_local,
    pitch,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring each choice what lies for it behind the row that its token went with."""
    choices = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = choices < num_choices
    home = tl.load(experts + choices, mask=inside, other=0).to(tl.int32) // num_local
    sent = inside & (home < P)
    token = (choices // K).to(tl.int64)
    row = tl.load(rows + token * P + home, mask=sent, other=-1)
    found = tl.load(tails + row.to(tl.int64) * pitch + choices % K, mask=sent & (row >= 0), other=0.0)
    tl.store(out + choices, found, mask=inside)


@triton.jit
def _arrivals_kernel(
    blocks, out, num_rows, num_blocks, num_local, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Say of which expert each row is, of rows that lie in blocks whose experts take turns."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    block = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((CHUNK,), tl.int32)
    for chunk in range(CHUNKS):
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        known = ids < num_blocks
        sizes = tl.load(blocks + ids, mask=known, other=0).to(tl.int32)
        ends = before + tl.cumsum(sizes, 0)
        block += tl.sum(((ends[None, :] <= rows[:, None]) & known[None, :]).to(tl.int32), 1)
        before += tl.sum(sizes, 0)
    expert = tl.where(block < num_blocks, block % num_local, num_local)
    tl.store(out + rows, expert.to(tl.int64), mask=rows < num_rows)


@triton.jit
def _read_kernel(
    numbers,
    tails,
    experts,
    weights,
    num_rows,
    numbers_pitch,
    tails_pitch,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring the numbers and weights behind rows side by side."""
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < K)[None, :]
    cells = rows[:, None] * K + columns[None, :]
    number = tl.load(numbers + rows[:, None] * numbers_pitch + columns[None, :], mask=inside, other=0)
    tl.store(experts + cells, number.to(tl.int64), mask=inside)
    weight = tl.load(tails + rows[:, None] * tails_pitch + columns[None, :], mask=inside, other=0.0)
    tl.store(weights + cells, weight, mask=inside)


def homes(experts_TK: Tensor, num_local: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Say which ranks each token goes to, and count.

    Args:
        experts_TK: [T, K] int64 choices, contiguous; the number of all experts where dropped.
        num_local: experts of a rank.
        num_ranks: P, at most `MAX_RANKS`.

    Returns:
        [T, P] int64, a rank's own number where the token goes there, else P; [E + P] int64 choices of each expert and tokens
        for each rank.
    """
    num_tokens, topk = experts_TK.shape
    num_experts = num_local * num_ranks
    ranks = experts_TK.new_empty(num_tokens, num_ranks)
    counts = torch.zeros(num_experts + num_ranks, dtype=torch.int64, device=experts_TK.device)
    if num_tokens:
        _homes_kernel[(triton.cdiv(num_tokens, BLOCK),)](
            experts_TK,
            ranks,
            counts,
            num_tokens,
            num_local,
            num_experts,
            topk,
            num_ranks,
            triton.next_power_of_2(num_ranks),
            BLOCK,
        )
    return ranks, counts


def write_tails(
    experts_TK: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    num_local: int,
    num_ranks: int,
    numbers_RM: Tensor,
    weights_RM: Tensor,
) -> None:
    """Write what travels behind each row.

    Args:
        experts_TK: [T, K] int64, contiguous.
        weights_TK: [T, K] of the choices, contiguous.
        slot_of_row_R: [R] int32 token * P + rank, -1 for a row without a token, which gets no expert's number.
        num_local: experts of a rank.
        num_ranks: P.
        numbers_RM: [R, K or more] int32 view of the room for the experts' numbers: a choice of another rank's expert gets
            `num_local`.
        weights_RM: [R, K or more] view of the room behind it, in the weights' dtype. What both have beyond K becomes 0.
    """
    num_rows, topk = slot_of_row_R.shape[0], experts_TK.shape[1]
    if not num_rows:
        return
    _tails_kernel[(triton.cdiv(num_rows, BLOCK),)](
        experts_TK,
        weights_TK,
        slot_of_row_R,
        numbers_RM,
        weights_RM,
        num_rows,
        num_local,
        numbers_RM.stride(0),
        weights_RM.stride(0),
        numbers_RM.shape[1],
        weights_RM.shape[1],
        topk,
        num_ranks,
        triton.next_power_of_2(max(numbers_RM.shape[1], weights_RM.shape[1])),
        BLOCK,
    )


def find_choices(experts_TK: Tensor, row_of_slot_TP: Tensor, num_local: int, tails_RM: Tensor) -> Tensor:
    """Bring each choice its number behind the row that its token went with.

    Args:
        experts_TK: [T, K] int64, contiguous.
        row_of_slot_TP: [T, P] int32 row of a token for a rank, -1 where it isn't sent.
        num_local: experts of a rank.
        tails_RM: [R, K or more] view of the room behind the rows.

    Returns:
        [T, K] in the dtype of the tails, 0 where dropped.
    """
    out = tails_RM.new_empty(experts_TK.shape)
    if out.numel():
        _found_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            experts_TK,
            row_of_slot_TP,
            tails_RM,
            out,
            out.numel(),
            num_local,
            tails_RM.stride(0),
            experts_TK.shape[1],
            row_of_slot_TP.shape[1],
            BLOCK,
        )
    return out


def read_tails(numbers_RK: Tensor, weights_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Read what `write_tails` wrote.

    Args:
        numbers_RK: [R, K] int32 view of the experts' numbers behind the rows.
        weights_RK: [R, K] view of the weights behind them.

    Returns:
        [R, K] int64 experts and [R, K] weights, contiguous.
    """
    num_rows, topk = numbers_RK.shape
    experts = numbers_RK.new_empty(num_rows, topk, dtype=torch.int64)
    weights = weights_RK.new_empty(num_rows, topk)
    if num_rows:
        args = (numbers_RK, weights_RK, experts, weights, num_rows, numbers_RK.stride(0), weights_RK.stride(0))
        _read_kernel[(triton.cdiv(num_rows, BLOCK),)](*args, topk, triton.next_power_of_2(topk), BLOCK)
    return experts, weights


def experts_of_arrivals(blocks_N: Tensor, num_local: int, num_rows: int) -> Tensor:
    """Say which expert each of the rows is for that have come in blocks.

    Args:
        blocks_N: [N] int64 rows of each block, contiguous; the experts of the blocks take turns.
        num_local: experts of this rank.
        num_rows: R.

    Returns:
        [R] int64, `num_local` behind the last block.
    """
    out = torch.empty(num_rows, dtype=torch.int64, device=blocks_N.device)
    if num_rows:
        num_blocks = blocks_N.shape[0]
        chunks = triton.cdiv(num_blocks, CHUNK)
        args = (blocks_N, out, num_rows, num_blocks, num_local, chunks, CHUNK, BLOCK)
        _arrivals_kernel[(triton.cdiv(num_rows, BLOCK),)](*args)
    return out
