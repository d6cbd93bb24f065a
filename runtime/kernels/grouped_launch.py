"""The host's side of the grouped products: tiles, tensor descriptors, and launches of compiled kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from runtime.kernels.grouped_matmul import grouped_matmul_kernel

# Tiles that run at one time should be about as high as wide, so that they share what they read.
GROUP_TILES = {"nt": 8, "nn": 16, "tn": 16}
LARGE_MATRIX = 2**25  # elements of an expert's matrix from which nn, too, is faster in groups of 8
MAX_REGISTERS = 168  # of 384 threads: two warpgroups of 240 and one of 24


def _descriptor(tensor: Tensor, block: list[int]) -> Any:
    dtype = gl.float32 if tensor.dtype == torch.float32 else gl.bfloat16
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


@functools.cache
def _num_processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@dataclass(slots=True)
class _Matrix:
    """What the launcher reads of a tensor descriptor, without the checks of building one."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"


_compiled: dict[tuple[object, ...], Any] = {}


def _block_n(columns: int) -> int:
    return 256 if columns % 256 == 0 else 128


def _group_tiles(kind: str, columns: int, depth: int) -> int:
    return 8 if kind == "nn" and columns * depth >= LARGE_MATRIX else GROUP_TILES[kind]


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
        out: [R, columns] (tn: [E * rows, columns]); with tn in fp32, the product is added to what it holds.
        offsets_E: [E] int32 ends of the experts' rows.
        expert_of_tile: [R / 128] int32.
        sizes: columns of the product, its depth, rows of an expert's matrix.
        gate: with nt, (act [R, columns / 2], fp32 weights [T, K], slots [R]): also store silu(gate) * up * weight.
    """
    columns, depth, rows_per_expert = sizes
    adds = out.dtype == torch.float32
    name = "swiglu" if gate is not None else "add" if adds else "plain"
    block_n = _block_n(columns)
    b_rows = block_n // 2 if name == "swiglu" else block_n
    act, weights, slots = (out, out, offsets_E) if gate is None else gate
    written = [64, block_n // (8 if adds else 4)]
    matrices = (
        (left, [64, 64]),
        (right, [b_rows, 64] if kind == "nt" else [64, block_n]),
        (out, written),
        (act, written),
    )
    numbers = (columns // block_n, depth, rows_per_expert, offsets_E.shape[0])
    stages = 4 if block_n == 256 else 6
    constants = (block_n, stages, _group_tiles(kind, columns, depth), kind, name, 4)
    grid = (_num_processors(left.device.index), 1, 1)
    key = (left.device.index, constants)
    kernel = _compiled.get(key)
    if kernel is not None:
        # Binding arguments costs more than a small product: what is compiled is launched directly.
        descriptors = [_Matrix(tensor, tensor.shape, tensor.stride()) for tensor, _ in matrices]
        kernel[grid](*descriptors, weights, slots, expert_of_tile, offsets_E, *numbers, *constants)
        return
    full = [_descriptor(tensor, block) for tensor, block in matrices]
    _compiled[key] = grouped_matmul_kernel[grid](
        *full, weights, slots, expert_of_tile, offsets_E, *numbers, *constants[:-1], num_warps=4, maxnreg=MAX_REGISTERS
    )
