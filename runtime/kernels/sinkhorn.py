"""Sinkhorn's iteration over a router's logits in one launch, all iterations included.

Legend: T tokens, E experts, B programs. Floor: the logits read once per iteration, from the L2 cache; in practice the
barrier that the programs meet at once per iteration (a few microseconds).

Each program holds a share of the tokens and writes the sums of its share per expert. After the barrier every program
adds up all shares in the same order, so that all of them see the same scales, stop at the same iteration, and give the
same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_EXPERTS = 1024
MAX_ELEMENTS = 4096  # of a block of logits
MAX_PROGRAMS = 128
EPSILON = tl.constexpr(1e-8)


@triton.jit
def _cost(logits, tokens, ids, num_tokens, E: tl.constexpr):
    """exp(logit - largest logit of the token), 0 outside."""
    valid = tokens < num_tokens
    inside = valid[:, None] & (ids < E)[None, :]
    cells = tokens[:, None].to(tl.int64) * E + ids[None, :]
    values = tl.load(logits + cells, mask=inside, other=float("-inf")).to(tl.float32)
    values = tl.where(valid[:, None], values, 0.0)
    return tl.where(inside, tl.exp(values - tl.max(values, 1)[:, None]), 0.0), cells, inside


@triton.jit
def _row_scales(cost, scale, num_tokens):
    return 1.0 / (num_tokens * (tl.sum(cost * scale[None, :], 1) + EPSILON))


@triton.jit
def _meet(arrived, target):
    """Wait until all programs are here, and what they wrote before is seen."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acq_rel", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _sinkhorn_kernel(
    logits,
    out,
    sums,
    arrived,
    num_tokens,
    max_iterations,
    tolerance,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    scale = tl.where(ids < E, 1.0, 0.0)
    # not `scale` here: the compiler would take both names for one value, and the loop would not carry this one
    before = tl.zeros((EXPERTS,), tl.float32)
    error = tl.full((), float("inf"), tl.float32)
    iteration = tl.full((), 0, tl.int32)
    while (error > tolerance) & (iteration < max_iterations):
        mine = tl.zeros((EXPERTS,), tl.float32)
        start = program * TOKENS
        while start < num_tokens:
            cost, _, _ = _cost(logits, start + tl.arange(0, TOKENS), ids, num_tokens, E)
            mine += tl.sum(cost * _row_scales(cost, scale, num_tokens)[:, None], 0)
            start += PROGRAMS * TOKENS
        # Two buffers in turn: whoever writes one again has met all that read it, at the barrier in between.
        buffer = sums + (iteration % 2) * PROGRAMS * EXPERTS
        tl.store(buffer + program * EXPERTS + ids, mine)
        iteration += 1
        _meet(arrived, iteration * PROGRAMS)
        total = tl.zeros((EXPERTS,), tl.float32)
        for first in range(0, PROGRAMS, CHUNK):
            rows = first + tl.arange(0, CHUNK)
            cells = buffer + rows[:, None] * EXPERTS + ids[None, :]
            # past the L1 cache, which may hold what the buffer held two iterations ago
            total += tl.sum(tl.load(cells, mask=(rows < PROGRAMS)[:, None], other=0.0, cache_modifier=".cg"), 0)
        before = scale
        scale = tl.where(ids < E, 1.0 / (E * (total + EPSILON)), 0.0)
        error = tl.sum(tl.abs(before - scale), 0) / E
    start = program * TOKENS
    while start < num_tokens:
        cost, cells, inside = _cost(logits, start + tl.arange(0, TOKENS), ids, num_tokens, E)
        rows_scale = _row_scales(cost, before, num_tokens)
        tl.store(out + cells, scale[None, :] * cost * rows_scale[:, None], mask=inside)
        start += PROGRAMS * TOKENS


def sinkhorn_plan(logits_TE: Tensor, max_iterations: int, tolerance: float, max_programs: int = MAX_PROGRAMS) -> Tensor:
    """Scale exp(logits) so that tokens sum to 1/T and experts to 1/E, without a wait of the host.

    Args:
        logits_TE: [T, E] float, at most MAX_EXPERTS experts; computed in fp32.
        max_iterations: bound of the loop, at least 1.
        tolerance: the loop ends at this mean change of the experts' scales.
        max_programs: bound of the grid, all of which must be on the device at one time.

    Returns:
        [T, E] fp32, the transport plan.
    """
    num_tokens, num_experts = logits_TE.shape
    out = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=logits_TE.device)
    if num_tokens == 0:
        return out
    experts = triton.next_power_of_2(num_experts)
    tokens = min(MAX_ELEMENTS // experts, triton.next_power_of_2(num_tokens))
    programs = min(max_programs, triton.cdiv(num_tokens, tokens))
    sums = torch.empty(2, programs, experts, dtype=torch.float32, device=out.device)
    arrived = torch.zeros(1, dtype=torch.int32, device=out.device)
    args = (logits_TE.contiguous(), out, sums, arrived, num_tokens, max_iterations, tolerance)
    shape = (num_experts, tokens, experts, programs, min(triton.next_power_of_2(programs), MAX_ELEMENTS // experts))
    _sinkhorn_kernel[(programs,)](*args, *shape, num_warps=8, launch_cooperative_grid=True)
    return out
