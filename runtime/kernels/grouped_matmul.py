"""Grouped matrix products for Hopper: warp-specialised, persistent, fed by the tensor memory accelerator.

Legend: R rows in expert order, each expert's rows padded with zero rows to a multiple of ROW_ALIGNMENT; E experts;
N and K the sizes of an expert's matrix; BM, BN, BK the tile.

One warp loads tiles of both operands into a ring of shared-memory stages; two warpgroups each hold 64 x BN of the
128 x BN tile in registers. They wait for stages on their own, so one stores its result while the other multiplies.
Because padding rows are zero and aligned, no tile holds two experts, no row needs a mask, and a reduction over an
expert's rows may run over its padding.
"""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROW_ALIGNMENT = 128

# One compiled kernel serves all sizes and addresses.
_NUMBERS = ("num_n", "depth", "rows_per_expert", "num_experts")
_POINTERS = ("weights_ptr", "slots_ptr", "expert_of_tile", "ends")


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
        m, n = _row_tile(inner, rows_per_expert // 128, num_n, GROUP)
        return expert, m * 128, n, start, (end - start) // 64
    m, n = _row_tile(tile, num_m, num_n, GROUP)
    expert = gl.load(expert_of_tile + m)
    return expert, m * 128, n, 0, gl.cdiv(depth, 64)


@gluon.jit
def _load_tiles(descs, bufs, bars, common, config):
    a_desc, b_desc = descs
    _, plan, shape, num_tiles, num_m = common
    a_lo, a_hi, b_bufs = bufs
    ready, empty = bars
    expert_of_tile, ends = plan
    BN: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[1]
    GROUP: gl.constexpr = config[2]
    KIND: gl.constexpr = config[3]
    EPILOGUE: gl.constexpr = config[4]
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
                    if EPILOGUE == "swiglu":
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


@builtin
def _add_shared_to_global(tensor_desc, coord, src, _semantic=None):
    """Add a buffer to a tensor where it lies, in the L2 cache: triton 3.6 has the operation, but no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@gluon.jit
def _halves(acc):
    """[64, N] as its left and right half, without moving a register between threads."""
    return acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()


@gluon.jit
def _store(value, desc, row, column, buffers, INDEX: gl.constexpr):
    """Round to bf16 and write [64, BN / 4] out through one of two buffers, taken in turn."""
    tma.store_wait(1)
    buffer = buffers.index(INDEX)
    buffer.store(value.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [row, column], buffer)


@gluon.jit
def _add(value, desc, row, column, buffers):
    """Add [64, BN / 4] to what lies in memory, through both buffers of half its width."""
    left, right = _halves(value)
    tma.store_wait(1)
    buffers.index(0).store(left)
    fence_async_shared()
    _add_shared_to_global(desc, [row, column], buffers.index(0))
    tma.store_wait(1)
    buffers.index(1).store(right)
    fence_async_shared()
    _add_shared_to_global(desc, [row, column + left.shape[1]], buffers.index(1))


@gluon.jit
def _row_weights(row_data, row, layout: gl.constexpr):
    """[64, 1] routing weights of the rows from `row` on, 0 for padding."""
    weights_ptr, slots_ptr = row_data
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    slot = gl.load(slots_ptr + row + gl.arange(0, 64, layout=row_layout))
    return gl.expand_dims(gl.load(weights_ptr + slot, mask=slot >= 0, other=0.0), 1)


@gluon.jit
def _write(acc, c_descs, row_data, expert, row, n, rows_per_expert, buffers, config):
    """Bring [64, BN] to memory, with what the epilogue makes of it."""
    c_desc, act_desc = c_descs
    BN: gl.constexpr = config[0]
    KIND: gl.constexpr = config[3]
    EPILOGUE: gl.constexpr = config[4]
    Q: gl.constexpr = BN // 4
    left, right = _halves(acc)
    q0, q1 = _halves(left)
    q2, q3 = _halves(right)
    column = n * BN
    if KIND == "tn":
        row += expert * rows_per_expert
    if EPILOGUE == "swiglu":
        layout_q: gl.constexpr = q0.type.layout
        weight = _row_weights(row_data, row, layout_q)
        column = n * (2 * Q)
        up_column = column + rows_per_expert // 2
        _store(q0, c_desc, row, column, buffers, 0)
        _store(q2, c_desc, row, up_column, buffers, 1)
        _store(q0 * q2 / (1.0 + gl.exp(-q0)) * weight, act_desc, row, column, buffers, 0)
        _store(q1, c_desc, row, column + Q, buffers, 1)
        _store(q3, c_desc, row, up_column + Q, buffers, 0)
        _store(q1 * q3 / (1.0 + gl.exp(-q1)) * weight, act_desc, row, column + Q, buffers, 1)
    elif EPILOGUE == "add":
        _add(q0, c_desc, row, column, buffers)
        _add(q1, c_desc, row, column + Q, buffers)
        _add(q2, c_desc, row, column + 2 * Q, buffers)
        _add(q3, c_desc, row, column + 3 * Q, buffers)
    else:
        _store(q0, c_desc, row, column, buffers, 0)
        _store(q1, c_desc, row, column + Q, buffers, 1)
        _store(q2, c_desc, row, column + 2 * Q, buffers, 0)
        _store(q3, c_desc, row, column + 3 * Q, buffers, 1)


@gluon.jit
def _multiply(c_descs, bufs, bars, buffers, common, half, config):
    row_data, plan, shape, num_tiles, num_m = common
    a_bufs, b_bufs = bufs
    ready, empty = bars
    expert_of_tile, ends = plan
    BN: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[1]
    GROUP: gl.constexpr = config[2]
    KIND: gl.constexpr = config[3]
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
        _write(acc, c_descs, row_data, expert, m + half * 64, n, rows_per_expert, buffers, config)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
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
    EPILOGUE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """See `grouped_launch.launch`. KIND nt: rows times transposed matrices, nn: rows times matrices, tn: rows transposed times rows."""
    a_lo = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], a_desc.layout)
    a_hi = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], a_desc.layout)
    if KIND == "nt":
        b_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, 64], b_desc.layout)
    else:
        b_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BN], b_desc.layout)
    # Two buffers of 64 rows for each warpgroup: a quarter of its tile in bf16, an eighth in fp32.
    width: gl.constexpr = BN // 8 if EPILOGUE == "add" else BN // 4
    c_lo = gl.allocate_shared_memory(c_desc.dtype, [2, 64, width], c_desc.layout)
    c_hi = gl.allocate_shared_memory(c_desc.dtype, [2, 64, width], c_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)

    num_m = gl.load(ends + num_experts - 1) // 128
    num_tiles = num_m * num_n
    if KIND == "tn":
        num_tiles = num_experts * (rows_per_expert // 128) * num_n
    config: gl.constexpr = (BN, STAGES, GROUP, KIND, EPILOGUE)
    shape = (num_n, depth, rows_per_expert)
    plan = (expert_of_tile, ends)
    bars = (ready, empty)
    c_descs = (c_desc, act_desc)
    row_data = (weights_ptr, slots_ptr)
    common = (row_data, plan, shape, num_tiles, num_m)
    gl.warp_specialize(
        [
            (_multiply, (c_descs, (a_lo, b_bufs), bars, c_lo, common, 0, config)),
            (_multiply, (c_descs, (a_hi, b_bufs), bars, c_hi, common, 1, config)),
            (_load_tiles, ((a_desc, b_desc), (a_lo, a_hi, b_bufs), bars, common, config)),
        ],
        [4, 1],
        [240, 24],
    )
