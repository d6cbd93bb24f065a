"""Grouped matrix products for Hopper: the host's side of `cuda/grouped_matmul.cu`.

Legend: R rows in expert order, each expert's rows padded with zero rows to a multiple of ROW_ALIGNMENT; E experts.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cuda.bindings import driver
from torch import Tensor

from runtime.kernels.cuda_module import SOURCES, Kernel, checked, compile_cubin
from runtime.kernels.sharing import loose_waves

ROW_ALIGNMENT = 128
MAX_ROWS = 65535 * ROW_ALIGNMENT  # the kernel counts tiles in 16 bits
MAX_EXPERTS = 736  # whose ends fit into shared memory beside the stages

KINDS = ("nt", "nn", "tn")
EPILOGUES = ("store", "add", "swiglu", "store_fp32", "add_bf16")
STAGES = {256: 4, 192: 4, 128: 6}  # by columns of a tile
# What a column costs by the columns of a tile, those included that a last tile computes for nothing. Tiles of 192 are slower
# where the right operand lies across the reduction.
COSTS = {256: 1.0, 192: 1.03, 128: 1.22}
GROUP_PAIRS = 8  # what runs at one time is about as high as wide
BLOCK_SIZE = 384  # two warpgroups that multiply, one that loads


def source(
    block_n: int,
    kind: str,
    epilogue: str,
    edges: bool = False,
    types: tuple[str, str] = ("bf16", "bf16"),
    split: bool = False,
    thin: bool = False,
    blocks: bool = False,
) -> str:
    """The kernel's text.

    Args:
        block_n: columns of a tile, 256 or 128; 192 for nt in bf16 without swiglu.
        kind: nt, nn or tn; 8-bit operands have no nn.
        epilogue: store, add, swiglu, store_fp32 or add_bf16.
        edges: sizes are multiples of 64, not of the tiles.
        types: of the left and the right operand: bf16, or e4m3 or e5m2 each.
        split: add up what the tensor cores sum over 128 elements in fp32; for 8-bit operands, not with swiglu.
        thin: add another product of small depth; for nt and nn in bf16.
        blocks: 8-bit operands have a scale for each 128 elements; with split.

    Returns:
        CUDA C++: constants, the operand lists of a product, and the kernel.
    """
    width = min(block_n, 128) if split else block_n
    bits, count = 16 if types == ("bf16", "bf16") else 8, width // 2
    constants = {
        "BN": block_n,
        "STAGES": STAGES[block_n],
        "GROUP": GROUP_PAIRS,
        "EPILOGUE": EPILOGUES.index(epilogue),
        "EDGES": int(edges),
        "THIN": int(thin),
        "WIDTH": width,
    }
    names = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(acc[{i}])' for i in range(count))
    lines = [
        f"#define BITS {bits}",
        f"#define SPLIT {int(split)}",
        f"#define BLOCKS {int(blocks)}",
        f"#define KIND {KINDS.index(kind)}",
        *(f"constexpr int {name} = {value};" for name, value in constants.items()),
    ]
    lines += [f'#define WGMMA_SHAPE "m64n{width}k{256 // bits}"', f'#define WGMMA_TYPES "{".".join(types)}"']
    lines += [f'#define ACC_NAMES "{names}"']
    lines += [f"#define ACC_OPERANDS {operands}", "#define ACC_NEXT(i) ACC_NEXT_##i"]
    lines += [f'#define ACC_NEXT_{i} "{count + i}"' for i in range(5)]
    return "\n".join([*lines, "#line 1", (SOURCES / "grouped_matmul.cu").read_text()])


def shared_bytes(block_n: int) -> int:
    """Shared memory of a block: stages with their two barriers, two slices for each of 8 warps, the experts' ends."""
    return STAGES[block_n] * ((ROW_ALIGNMENT + block_n) * 128 + 16) + 8 * 2 * 2048 + 4 * MAX_EXPERTS


@functools.cache
def _kernel(
    device_index: int,
    block_n: int,
    kind: str,
    epilogue: str,
    edges: bool,
    types: tuple[str, str],
    split: bool,
    thin: bool,
    blocks: bool,
) -> Kernel:
    cubin = compile_cubin(source(block_n, kind, epilogue, edges, types, split, thin, blocks), "sm_90a")
    return Kernel(cubin, "grouped_matmul", shared_bytes(block_n))


@functools.cache
def _num_blocks(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count // 2 * 2


@functools.lru_cache(maxsize=4096)
def _tensor_map(pointer: int, rows: int, columns: int, box_rows: int, item_bytes: int) -> bytes:
    """How to load boxes 128 bytes wide, swizzled: it depends on nothing but these numbers, so it can be kept."""
    types = driver.CUtensorMapDataType
    made = driver.cuTensorMapEncodeTiled(
        types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if item_bytes == 2 else types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        pointer,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(columns * item_bytes)],
        [driver.cuuint32_t(128 // item_bytes), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(checked(made).getPtr(), 128)


@dataclass(frozen=True, slots=True)
class Gate:
    """What the product of pre-activations takes and gives beside itself."""

    act: Tensor | None
    """[R, F] in the operands' type (e4m3 with 8 bits), contiguous: becomes silu(gate) * up * weight. None, with 8-bit
    operands: only `act_amax` is wanted."""
    weights_TK: Tensor
    """[T, K] fp32 routing weights, contiguous."""
    slot_of_row_R: Tensor
    """[R] int32 which weight a row takes, -1 for padding."""
    act_bound: Tensor | None = None
    """[1] fp32, with 8 bits: what the largest number of e4m3 stands for in `act`; positive."""
    act_amax: Tensor | None = None
    """[1] fp32, with 8 bits: becomes at least the largest absolute value of the activations."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the largest number of their format stands for in 8-bit operands, on the device; or, block by block, what one does."""

    left: Tensor
    """[1] fp32; or of blocks of 128 of the reduction [depth / 128, R], for tn [R / 128, N], the last dim contiguous."""
    right: Tensor
    """[1] fp32, or [E] with one for each expert; or of blocks of 128 x 128 [E, N / 128, depth / 128], contiguous, and for tn of
    blocks of 128 of the reduction [R / 128, columns], the last dim contiguous."""
    split: bool
    """Sum in fp32, instead of the tensor cores' 14 bits; blocks always are."""

    @property
    def blocks(self) -> bool:
        """Whether the scales are of blocks."""
        return self.left.dim() == 2


@dataclass(frozen=True, slots=True)
class ThinProduct:
    """Another product that is added, whose depth P is small."""

    rows: Tensor
    """[R, P] bf16, contiguous, P a multiple of 8."""
    matrices: Tensor
    """[E * N, P] for nt, [E * P, columns] for nn, likewise."""


_TYPES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def tile_columns(kind: str, columns: int, gate: Gate | None, *, in_bytes: bool) -> int:
    """Give the columns of a tile with which a product is fastest.

    Args:
        kind: nt, nn or tn.
        columns: of the result.
        gate: what a product of pre-activations takes beside itself; its tiles hold as much of gate as of up.
        in_bytes: whether operands have 8 bits.
    """
    if gate is not None:
        return 256 if columns % 256 == 0 else 128
    sizes = COSTS if kind == "nt" and not in_bytes else (256, 128)
    return min(sizes, key=lambda size: -(-columns // size) * size * COSTS[size])


def launch(
    kind: str,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    offsets_E: Tensor,
    gate: Gate | None = None,
    *,
    add: bool = False,
    bounds: Bounds | None = None,
    thin: ThinProduct | None = None,
) -> None:
    """Multiply each expert's rows.

    Args:
        kind: nt (rows times transposed matrices), nn (rows times matrices; not with 8 bits) or tn (transposed rows times
            rows).
        left: [R, depth] (tn: [R, N], with 8 bits [N, R]) rows in bf16 or an 8-bit format, contiguous, like the others.
        right: [E * N, depth] for nt, [E * depth, columns] for nn, [R, columns] for tn, with 8 bits [columns, R].
        out: [R, columns] (tn: [E * N, columns]) bf16; with tn also fp32.
        offsets_E: [E] int32 ends of the experts' rows, multiples of ROW_ALIGNMENT; sizes are multiples of 64, with a gate of 128.
        gate: with nt, where the product is pre-activations, gate then up: write their SwiGLU too.
        add: with tn, add the product to what `out` holds, one in bf16 rounded first; otherwise overwrite it.
        bounds: of 8-bit operands.
        thin: with nt and nn in bf16, a product to add before anything is rounded.
    """
    columns, num_experts = out.shape[1], offsets_E.shape[0]
    rows_per_expert = (out if kind == "tn" else right).shape[0] // num_experts  # of an expert's matrix
    block_n = tile_columns(kind, columns, gate, in_bytes=bounds is not None)
    edges = columns % block_n != 0 or (kind == "tn" and rows_per_expert % ROW_ALIGNMENT != 0)
    scaling, types = _scaling(left, right, bounds, gate), (_TYPES[left.dtype], _TYPES[right.dtype])
    boxed = kind == "nt" or bounds is not None  # whether columns of the result are rows of the right operand
    device_index = left.device.index
    num_blocks = _num_blocks(device_index)
    arguments = struct.pack(
        "512s9P6if4i12x",  # `Arguments` in grouped_jobs.cuh, aligned to 64 bytes
        _tensor_maps(left, right, thin, block_n // 2 if boxed else 64),
        out.data_ptr(),
        *_beside(gate),
        offsets_E.data_ptr(),
        *scaling.pointers,
        -(-columns // block_n),
        left.shape[1],  # the depth; tn has each expert's number of rows instead
        rows_per_expert,
        num_experts,
        columns,
        scaling.per_expert,
        scaling.factor,
        num_blocks // 2,
        0 if thin is None else thin.rows.shape[1],
        *scaling.pitches,
    )
    kinds = (edges, types, scaling.split, thin is not None, scaling.blocks)
    kernel = _kernel(device_index, block_n, kind, _epilogue(out, gate, add), *kinds)
    stacked = -(-rows_per_expert // 256) * num_experts if kind == "tn" else left.shape[0] // 256
    kernel.launch(num_blocks * (1 + _late_waves(stacked * -(-columns // block_n), num_blocks)), BLOCK_SIZE, arguments)


def _epilogue(out: Tensor, gate: Gate | None, add: bool) -> str:
    if out.dtype == torch.float32:
        return "add" if add else "store_fp32"
    return "add_bf16" if add else "store" if gate is None else "swiglu"


def _tensor_maps(left: Tensor, right: Tensor, thin: ThinProduct | None, right_rows: int) -> bytes:
    """How to load the operands, and those of the thin product, whose boxes are as large and reach beyond its depth."""
    operands = [left, right] if thin is None else [left, right, thin.rows, thin.matrices]
    boxes = (64, right_rows)
    return b"".join(
        _tensor_map(x.data_ptr(), *x.shape, boxes[place % 2], x.element_size()) for place, x in enumerate(operands)
    )


def _late_waves(num_jobs: int, num_blocks: int) -> int:
    """Jobs that are dealt out late, for each pair of blocks, of about so many in all."""
    # Each has a beginning and an end that nothing hides: not more than a quarter of them.
    return min(loose_waves(), num_jobs // (2 * num_blocks))


def _beside(gate: Gate | None) -> tuple[int, int, int]:
    """What a product of pre-activations takes and gives, as pointers."""
    if gate is None:
        return 0, 0, 0
    return _pointer(gate.act), gate.weights_TK.data_ptr(), gate.slot_of_row_R.data_ptr()


class _Scaling(NamedTuple):
    """What a kernel has of 8-bit operands' scales."""

    pointers: tuple[int, int, int, int] = (0, 0, 0, 0)
    """The operands' two, and the activations' bound and what they are found to be."""
    per_expert: int = 0
    factor: float = 1.0
    """Of bounds: what the largest numbers of both formats are divided by."""
    pitches: tuple[int, int] = (0, 0)
    split: bool = False
    blocks: bool = False


def _scaling(left: Tensor, right: Tensor, bounds: Bounds | None, gate: Gate | None) -> _Scaling:
    if bounds is None:
        return _Scaling()
    act, amax = (None, None) if gate is None else (gate.act_bound, gate.act_amax)
    pointers = (bounds.left.data_ptr(), bounds.right.data_ptr(), _pointer(act), _pointer(amax))
    if bounds.blocks:
        pitches = (bounds.left.stride(0), bounds.right.stride(-2))
        return _Scaling(pointers, pitches=pitches, split=True, blocks=True)
    factor = 1.0 / (torch.finfo(left.dtype).max * torch.finfo(right.dtype).max)
    return _Scaling(pointers, int(bounds.right.shape[0] > 1), factor, split=bounds.split and gate is None)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
