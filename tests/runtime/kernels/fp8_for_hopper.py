"""Print the PTX of kernels that write 8 bits for a Hopper GPU, which needs none: `python -m tests.runtime.kernels.fp8_for_hopper`."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.kernels import fp8, fp8_blocks, fp8_blocks_swiglu

BITS = ("rows_out", "columns_out", "grad_rows", "grad_columns", "act_columns")
TYPES = {
    **dict.fromkeys(("x", "hidden", "grad"), "*bf16"),
    **dict.fromkeys((*BITS, "out"), "*fp8e4nv"),
    **dict.fromkeys((f"{name}_scales" for name in BITS), "*fp32"),
    **dict.fromkeys(("rows_scales", "columns_scales", "scales"), "*fp32"),
    **dict.fromkeys(("weights", "dots", "bounds", "grad_bound", "act_bound", "amax", "grad_amax"), "*fp32"),
    **dict.fromkeys(("slots", "ends"), "*i32"),
}
LIMITS = dict.fromkeys(("LIMIT", "GRAD_LIMIT", "ACT_LIMIT"), 448.0)
CONSTANTS: dict[str, Any] = LIMITS | {"LAST": 7, "TOPK": 2, "WRITE": True, "ROWS": True, "COLUMNS": True, "AMAX": True}
GATE = {"TILE_R": fp8.GATE_ROWS, "TILE_C": fp8.GATE_COLUMNS}
BLOCK_GATE = {"TILE_R": fp8_blocks_swiglu.TILE_ROWS, "TILE_C": fp8_blocks_swiglu.TILE_COLUMNS}
KERNELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "swiglu_backward": (fp8._swiglu_backward_kernel, GATE, fp8.GATE_WARPS),
    "quantise": (fp8._quantise_kernel, {"TILE_R": fp8.TILE_ROWS, "TILE_C": fp8.TILE_COLUMNS}, 8),
    "blocks quantise": (fp8_blocks._quantise_kernel, {"TILE_C": fp8_blocks.PIECE}, 16),
    "blocks matrices": (fp8_blocks._matrices_kernel, {"TILE_C": fp8_blocks.PIECE}, 16),
    "blocks gather_columns": (fp8_blocks._gather_columns_kernel, {"TILE_C": fp8_blocks.PIECE}, 8),
    "blocks swiglu": (fp8_blocks_swiglu._swiglu_kernel, {"TILE_R": fp8_blocks_swiglu.TILE_ROWS}, 8),
    "blocks swiglu_backward": (fp8_blocks_swiglu._swiglu_backward_kernel, BLOCK_GATE, 8),
}


def main() -> None:
    """Compile with what launches would find: pointers and sizes that are multiples of 16."""
    for name, (kernel, tile, num_warps) in KERNELS.items():
        constants = CONSTANTS | tile
        kinds = {arg: "constexpr" if arg in constants else TYPES.get(arg, "i32") for arg in kernel.arg_names}
        source = ASTSource(
            fn=kernel,
            signature=kinds,
            constexprs={(i,): constants[arg] for i, arg in enumerate(kinds) if arg in constants},
            attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kinds) if arg not in constants},
        )
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        print(f"// kernel: {name}\n{made.asm['ptx']}")


if __name__ == "__main__":
    main()
