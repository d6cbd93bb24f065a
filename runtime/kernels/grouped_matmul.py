"""Grouped matrix products for Hopper: warp-specialised, persistent, fed by the tensor memory accelerator.

Legend: R rows in expert order, each expert's rows padded with zero rows to a multiple of ROW_ALIGNMENT; E experts;
N and K the sizes of an expert's matrix; BM, BN, BK the tile.

One warp loads tiles of both operands into a ring of shared-memory stages; two warpgroups each hold 64 x BN of the
128 x BN tile in registers. They wait for stages on their own, so one stores its result while the other multiplies.
Because padding rows are zero and aligned, no tile holds two experts, no row needs a mask, and a reduction over an
expert's rows may run over its padding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROW_ALIGNMENT = 128
GROUP_TILES = 8
MAX_REGISTERS = 168  # of 384 threads: two warpgroups of 240 and one of 24


@gluon.jit
def _row_tile(tile, num_m, num_n, GROUP: gl.constexpr):
    """Tiles in groups of GROUP along the rows: what runs at one time shares operands in the L2 cache."""
    per_group = GROUP * num_n
    group = tile // per_group
    first = group * GROUP
    size = gl.minimum(num_m - first, GROUP)
    inner = tile - group * per_group
    return first + inner % size, inner // size


@gluon.jit
def _tile_rows(tile, expert_of_tile, ends, shape, num_m, GROUP: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr):
    """Expert, row coordinate of the output, column tile, start of the reduction and its number of steps."""
    num_n, depth, rows_per_expert = shape
    if KIND == "tn":
        per_expert = (rows_per_expert // 128) * num_n
        expert = tile // per_expert
        inner = tile - expert * per_expert
        end = gl.load(ends + expert)
        start = gl.load(ends + expert - 1, mask=expert > 0, other=0)
        num_m_tiles = rows_per_expert // 128
        m, n = inner % num_m_tiles, inner // num_m_tiles
        return expert, m * 128, n, start, (end - start) // 64
    m, n = _row_tile(tile, num_m, num_n, GROUP)
    expert = gl.load(expert_of_tile + m)
    return expert, m * 128, n, 0, gl.cdiv(depth, 64)


@gluon.jit
def _load_tiles(descs, bufs, bars, plan, shape, num_tiles, num_m, config):
    a_desc, b_desc = descs
    a_lo, a_hi, b_bufs = bufs
    ready, empty = bars
    expert_of_tile, ends = plan
    BN: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[1]
    GROUP: gl.constexpr = config[2]
    KIND: gl.constexpr = config[3]
    GATED: gl.constexpr = config[4]
    rows_per_expert = shape[2]
    bytes_per_stage: gl.constexpr = (128 + BN) * 64 * 2
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, m, n, start, steps = _tile_rows(tile, expert_of_tile, ends, shape, num_m, GROUP, BN, KIND)
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, bytes_per_stage)
            k = i * 64
            if KIND == "tn":
                tma.async_copy_global_to_shared(a_desc, [start + k, m], bar, a_lo.index(stage))
                tma.async_copy_global_to_shared(a_desc, [start + k, m + 64], bar, a_hi.index(stage))
                tma.async_copy_global_to_shared(b_desc, [start + k, n * BN], bar, b_bufs.index(stage))
            else:
                tma.async_copy_global_to_shared(a_desc, [m, k], bar, a_lo.index(stage))
                tma.async_copy_global_to_shared(a_desc, [m + 64, k], bar, a_hi.index(stage))
                if KIND == "nt":
                    if GATED:
                        half: gl.constexpr = BN // 2
                        row = expert * rows_per_expert + n * half
                        b = b_bufs.index(stage)
                        tma.async_copy_global_to_shared(b_desc, [row, k], bar, b.slice(0, half, dim=0))
                        up = row + rows_per_expert // 2
                        tma.async_copy_global_to_shared(b_desc, [up, k], bar, b.slice(half, half, dim=0))
                    else:
                        row = expert * rows_per_expert + n * BN
                        tma.async_copy_global_to_shared(b_desc, [row, k], bar, b_bufs.index(stage))
                else:
                    row = expert * rows_per_expert + k
                    tma.async_copy_global_to_shared(b_desc, [row, n * BN], bar, b_bufs.index(stage))
            step += 1


@gluon.jit
def _halves(acc):
    """[64, BN] as its left and right half, without moving a register between threads."""
    return acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()


@gluon.jit
def _store(value, desc, row, column, buffer):
    """Round to bf16 and write [64, BN / 2] out; the write before it must have left the buffer."""
    tma.store_wait(0)
    buffer.store(value.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [row, column], buffer)


@gluon.jit
def _multiply(c_descs, bufs, bars, c_buf, row_weights, plan, shape, num_tiles, num_m, half, config):
    c_desc, act_desc = c_descs
    weights_ptr, slots_ptr = row_weights
    a_bufs, b_bufs = bufs
    ready, empty = bars
    expert_of_tile, ends = plan
    BN: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[1]
    GROUP: gl.constexpr = config[2]
    KIND: gl.constexpr = config[3]
    GATED: gl.constexpr = config[4]
    rows_per_expert = shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, m, n, _, steps = _tile_rows(tile, expert_of_tile, ends, shape, num_m, GROUP, BN, KIND)
        acc = gl.zeros((64, BN), dtype=gl.float32, layout=layout)
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            a = a_bufs.index(stage)
            b = b_bufs.index(stage)
            if KIND == "nt":
                b = b.permute((1, 0))
            if KIND == "tn":
                a = a.permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            # the product before this one is done: its stage is free
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=steps > 0)
        row = m + half * 64
        left, right = _halves(acc)
        H: gl.constexpr = BN // 2
        if GATED:
            _store(left, c_desc, row, n * H, c_buf)
            _store(right, c_desc, row, n * H + rows_per_expert // 2, c_buf)
            offsets = row + gl.arange(0, 64, layout=gl.SliceLayout(1, left.type.layout))
            slot = gl.load(slots_ptr + offsets)
            weight = gl.load(weights_ptr + slot, mask=slot >= 0, other=0.0)
            act = left * right / (1.0 + gl.exp(-left)) * gl.expand_dims(weight, 1)
            _store(act, act_desc, row, n * H, c_buf)
        else:
            if KIND == "tn":
                row += expert * rows_per_expert
            _store(left, c_desc, row, n * BN, c_buf)
            _store(right, c_desc, row, n * BN + H, c_buf)
    tma.store_wait(0)


@gluon.jit
def grouped_matmul_kernel(
    a_desc,
    b_desc,
    c_desc,
    act_desc,
    weights_ptr,
    slots_ptr,
    expert_of_tile,
    ends,
    num_n,
    depth,
    rows_per_expert,
    num_experts,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    KIND: gl.constexpr,
    GATED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """See `launch`. KIND nt: rows times transposed matrices, nn: rows times matrices, tn: rows transposed times rows."""
    H: gl.constexpr = BN // 2
    a_lo = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], a_desc.layout)
    a_hi = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], a_desc.layout)
    if KIND == "nt":
        b_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, 64], b_desc.layout)
    else:
        b_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BN], b_desc.layout)
    c_lo = gl.allocate_shared_memory(gl.bfloat16, [64, H], c_desc.layout)
    c_hi = gl.allocate_shared_memory(gl.bfloat16, [64, H], c_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)

    num_m = gl.load(ends + num_experts - 1) // 128
    num_tiles = num_m * num_n
    if KIND == "tn":
        num_tiles = num_experts * (rows_per_expert // 128) * num_n
    config: gl.constexpr = (BN, STAGES, GROUP, KIND, GATED)
    shape = (num_n, depth, rows_per_expert)
    plan = (expert_of_tile, ends)
    bars = (ready, empty)
    c_descs = (c_desc, act_desc)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    c_descs,
                    (a_lo, b_bufs),
                    bars,
                    c_lo,
                    (weights_ptr, slots_ptr),
                    plan,
                    shape,
                    num_tiles,
                    num_m,
                    0,
                    config,
                ),
            ),
            (
                _multiply,
                (
                    c_descs,
                    (a_hi, b_bufs),
                    bars,
                    c_hi,
                    (weights_ptr, slots_ptr),
                    plan,
                    shape,
                    num_tiles,
                    num_m,
                    1,
                    config,
                ),
            ),
            (_load_tiles, ((a_desc, b_desc), (a_lo, a_hi, b_bufs), bars, plan, shape, num_tiles, num_m, config)),
        ],
        [4, 1],
        [240, 24],
    )


def _descriptor(tensor: Tensor, block: list[int]) -> Any:
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


@functools.cache
def _num_processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def launch(
    kind: str,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    offsets_E: Tensor,
    expert_of_tile: Tensor,
    sizes: tuple[int, int, int],
    gate: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Run the kernel.

    Args:
        kind: nt, nn or tn.
        left: [R, depth] (tn: [R, rows]) rows.
        right: [E * rows, depth] for nt, [E * depth, columns] for nn, [R, columns] for tn.
        out: [R, columns] (tn: [E * rows, columns]).
        offsets_E: [E] int32 ends of the experts' rows.
        expert_of_tile: [R / 128] int32.
        sizes: columns of the result, depth of the product, rows of an expert's matrix.
        gate: with nt, (act [R, columns / 2], weights, slots): also store silu(gate) * up * weight.
    """
    columns, depth, rows_per_expert = sizes
    block_n = 256 if columns % 256 == 0 else 128
    half = block_n // 2
    a_desc = _descriptor(left, [64, 64])
    b_rows = half if gate is not None else block_n
    b_desc = _descriptor(right, [b_rows, 64] if kind == "nt" else [64, block_n])
    c_desc = _descriptor(out, [64, half])
    act, weights, slots = gate if gate is not None else (out, offsets_E, offsets_E)
    act_desc = _descriptor(act, [64, half]) if gate is not None else c_desc
    grid = (_num_processors(left.device.index),)
    grouped_matmul_kernel[grid](
        a_desc,
        b_desc,
        c_desc,
        act_desc,
        weights,
        slots,
        expert_of_tile,
        offsets_E,
        columns // block_n,
        depth,
        rows_per_expert,
        offsets_E.shape[0],
        block_n,
        4 if block_n == 256 else 6,
        GROUP_TILES,
        kind,
        gate is not None,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )
