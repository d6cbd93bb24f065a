"""The gradient of an embedding, added to its sum: rows of equal tokens in order, without atomics.

Legend: T tokens, V rows, D hidden size. Floor: each token's gradient read once, each distinct row of the sum read and
written once, at memory bandwidth; in practice the sort of the tokens.

Tokens are sorted, and cut into chunks. A run of equal tokens within a chunk is added to its row at once; the parts of a
run that crosses chunks are kept, and a second launch sums them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
MAX_BLOCK = 1024


@triton.jit
def _runs_kernel(
    grad, tokens, order, total, parts, num_tokens, num_rows, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    begin = chunk * CHUNK
    run = tl.load(tokens + begin)
    # Whether the run that is being summed began in an earlier chunk.
    crosses = tl.load(tokens + begin - 1, mask=begin > 0, other=-1) == run
    sums = tl.zeros((BLOCK,), dtype=ACC)
    for offset in range(CHUNK):
        place = begin + offset
        here = place < num_tokens
        row = tl.load(order + place, mask=here, other=0).to(tl.int64)
        sums += tl.load(grad + row * width + column, mask=inside & here, other=0.0).to(ACC)
        following = tl.load(tokens + place + 1, mask=place + 1 < num_tokens, other=-1)
        ends = following != run
        if here & (ends | (offset == CHUNK - 1)):
            own = ends & (crosses == 0)
            target = total + run.to(tl.int64) * width + column
            known = run < num_rows
            before = tl.load(target, mask=inside & own & known, other=0.0)
            tl.store(target, (before.to(ACC) + sums).to(total.dtype.element_ty), mask=inside & own & known)
            # A chunk's part of a run from before it, or of one that goes on after it.
            which = tl.where(crosses, 0, 1)
            part = parts + (chunk.to(tl.int64) * 2 + which) * width + column
            tl.store(part, sums, mask=inside & (own == 0))
            sums = tl.zeros((BLOCK,), dtype=ACC)
            crosses = tl.full((), 0, tl.int1)
        run = following


@triton.jit
def _crossing_kernel(
    tokens, total, parts, num_tokens, num_rows, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    begin = chunk * CHUNK
    after = begin + CHUNK
    run = tl.load(tokens + tl.minimum(after, num_tokens) - 1)
    following = tl.load(tokens + after, mask=after < num_tokens, other=-1)
    begins = (tl.load(tokens + begin) != run) | (tl.load(tokens + begin - 1, mask=begin > 0, other=-1) != run)
    if (following == run) & begins & (run < num_rows):
        sums = tl.load(parts + (chunk.to(tl.int64) * 2 + 1) * width + column, mask=inside, other=0.0)
        while following == run:
            chunk += 1
            sums += tl.load(parts + chunk.to(tl.int64) * 2 * width + column, mask=inside, other=0.0)
            after += CHUNK
            following = tl.load(tokens + after, mask=after < num_tokens, other=-1)
        target = total + run.to(tl.int64) * width + column
        # Always so, but the compiler (triton 3.6) fails on a loop whose last value nobody uses.
        written = inside & (following != run)
        before = tl.load(target, mask=written, other=0.0)
        tl.store(target, (before.to(ACC) + sums).to(total.dtype.element_ty), mask=written)


def add_embedding_gradient(grad_TD: Tensor, tokens_T: Tensor, total_VD: Tensor) -> None:
    """Add each token's gradient to its row.

    Args:
        grad_TD: [T, D] contiguous.
        tokens_T: [T] integer rows; V and above: nobody's.
        total_VD: [V, D] contiguous sum, fp32 (fp64 for fp64), or bf16: rounded once for all tokens.
    """
    num_tokens, width = grad_TD.shape
    if grad_TD.numel() == 0:
        return
    tokens, order = torch.sort(tokens_T.int(), stable=True)
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    wide = torch.float64 if total_VD.dtype == torch.float64 else torch.float32
    accumulator = tl.float64 if wide == torch.float64 else tl.float32
    parts = torch.empty(num_chunks, 2, width, dtype=wide, device=grad_TD.device)
    block = min(MAX_BLOCK, int(triton.next_power_of_2(width)))
    grid = (num_chunks, triton.cdiv(width, block))
    sizes = (num_tokens, total_VD.shape[0], width, CHUNK, block, accumulator)
    _runs_kernel[grid](grad_TD, tokens, order, total_VD, parts, *sizes)
    _crossing_kernel[grid](tokens, total_VD, parts, *sizes)
