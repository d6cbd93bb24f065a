"""Print the PTX of SwiGLU's backward pass for a Hopper GPU, which needs none: `python -m tests.runtime.kernels.fp8_for_hopper`."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.kernels import fp8

TYPES = {
    **dict.fromkeys(("hidden", "grad"), "*bf16"),
    **dict.fromkeys(("grad_rows", "grad_columns", "act_columns"), "*fp8e4nv"),
    **dict.fromkeys(("weights", "dots", "grad_bound", "act_bound", "grad_amax"), "*fp32"),
    **dict.fromkeys(("slots", "ends"), "*i32"),
    **dict.fromkeys(("width", "num_rows"), "i32"),
}
CONSTANTS = {"GRAD_LIMIT": 448.0, "ACT_LIMIT": 448.0, "LAST": 7, "WRITE": True} | {
    "TILE_R": fp8.GATE_ROWS,
    "TILE_C": fp8.GATE_COLUMNS,
}


def main() -> None:
    """Compile with what the launch would find: pointers and sizes that are multiples of 16."""
    kernel = fp8._swiglu_backward_kernel
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: TYPES.get(name, "constexpr") for name in names},
        constexprs={(i,): CONSTANTS[name] for i, name in enumerate(names) if name in CONSTANTS},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in TYPES},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fp8.GATE_WARPS})
    print(made.asm["ptx"])


if __name__ == "__main__":
    main()
