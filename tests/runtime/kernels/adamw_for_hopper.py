"""Compile AdamW's kernel for a Hopper GPU, which needs none, in every pairing of types: `python -m tests.runtime.kernels.adamw_for_hopper`."""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.kernels import adamw

SCALARS = {
    **dict.fromkeys(("size", "first"), "i64"), "seed": "i32", "divisor": "*fp32", "skip": "*i1",
    **dict.fromkeys(("step_size", "keep", "beta1", "rest1", "beta2", "rest2", "root_correction", "eps"), "fp32"),
}  # fmt: skip


def main() -> None:
    """Print a line for each pairing that compiles."""
    kernel = adamw._adamw_kernel
    names = kernel.arg_names
    masters = (("*fp32", "*bf16"), ("*fp32", "*fp16"), ("*i16", "*bf16"), ("*fp32", "*fp32"))
    for (master, weight), (moment, grad) in itertools.product(masters, (("*fp32", "*bf16"), ("*bf16", "*fp32"))):
        types = SCALARS | {"grad": grad, "master": master, "weight": weight, "exp_avg": moment, "exp_avg_sq": moment}
        constants = {"HAS_WEIGHT": weight != "*fp32", "BLOCK": 1024}
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
        )
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(grad, master, weight, moment)


if __name__ == "__main__":
    main()
