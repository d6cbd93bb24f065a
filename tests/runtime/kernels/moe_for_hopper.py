"""Compile kernels of routers and of rows for a Hopper GPU, which needs none: `python -m tests.runtime.kernels.moe_for_hopper`."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.kernels import counting_sort, routing, sent_tokens

SHAPE: dict[str, Any] = {
    "E": 128, "K": 8, "P": 4, "RANKS": 4, "COLUMNS": 16, "CHUNKS": 2, "CHUNK": sent_tokens.CHUNK, "BLOCK": sent_tokens.BLOCK,
    "TOKENS": 32, "EXPERTS": 128, "CHOICES": 8,
    "NUM_EXPERTS": 128, "ALIGNMENT": 128,
}  # fmt: skip
INT64, INT32 = ("experts", "ranks", "counts", "blocks"), ("slots", "numbers_out", "numbers", "rows")


def compile_for_hopper(kernel: Any, switches: dict[str, int] | None = None, **types: str) -> None:
    """Compile a kernel; what isn't told is an integer or a constant."""
    known = dict.fromkeys(INT64, "*i64") | dict.fromkeys(INT32, "*i32") | types
    fixed, names = SHAPE | (switches or {}), kernel.arg_names
    constants = {(place,): fixed[name] for place, name in enumerate(names) if name in fixed}
    signature = {name: "constexpr" if name in fixed else known.get(name, "i32") for name in names}
    triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, *types.values(), switches or "")


def main() -> None:
    """Print a line for each kernel that compiles, with the types of the weights."""
    compile_for_hopper(sent_tokens._homes_kernel)
    compile_for_hopper(sent_tokens._arrivals_kernel, out="*i64")
    sorted_slots = dict.fromkeys(("before", "totals", "slot_of_row", "row_of_slot", "ends", "needed"), "*i32")
    for room, notes in ((0, False), (0, True), (4096, True)):
        compile_for_hopper(counting_sort._place_kernel, {"ROOM": room, "NOTES": notes}, **sorted_slots)
    for dtype in ("*fp32", "*fp64", "*bf16"):
        compile_for_hopper(sent_tokens._tails_kernel, weights=dtype, weights_out=dtype)
        compile_for_hopper(sent_tokens._found_kernel, tails=dtype, out=dtype)
        compile_for_hopper(sent_tokens._read_kernel, tails=dtype, weights=dtype)
    floats = dict.fromkeys(
        ("logits", "weights", "sums", "grad_weights", "grad_sums", "grad_logits"), "*fp32"
    ) | {"scale": "fp32"}  # fmt: skip
    for before in (False, True):
        for given in (False, True):
            compile_for_hopper(routing._forward_kernel, {"PRE_SOFTMAX": before, "GIVEN": given}, **floats)
        compile_for_hopper(routing._backward_kernel, {"PRE_SOFTMAX": before}, **floats)


if __name__ == "__main__":
    main()
