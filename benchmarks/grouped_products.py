"""An expert layer's six products in bf16, alone on one Hopper GPU, beside what a plan has: `python -m benchmarks.grouped_products`.

    python -m benchmarks.grouped_products [E,D,F ...] [--rows 128 256 512 1024 2048] [--gpu h200]

E experts of hidden size D and width F, as many rows each. The sums of weights' gradients are fp32, read and written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from triton.testing import do_bench

from runtime.estimate.machine import Machine, find_machine
from runtime.kernels.grouped_matmul import ROW_ALIGNMENT, Gate, launch

SIZES = ((128, 2048, 768), (128, 4096, 1536))
"""Experts, hidden size and width: Qwen3-30B-A3B's and Qwen3-235B-A22B's."""


def measured(num_experts: int, hidden: int, width: int, rows: int) -> list[float]:
    """Time the products in turn: first with SwiGLU, second; gradients of activation and rows; gradients of both weights.

    Returns:
        Milliseconds, medians.
    """
    num_rows = -(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT * num_experts
    ends = torch.arange(1, num_experts + 1, device="cuda", dtype=torch.int32) * (num_rows // num_experts)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, hidden_x2, act = draw(num_rows, hidden), draw(num_rows, 2 * width), draw(num_rows, width)
    w13, w2 = draw(num_experts * 2 * width, hidden), draw(num_experts * hidden, width)
    sums = torch.zeros(num_experts * 2 * width, hidden, device="cuda")
    sums_2 = sums.view(-1)[: w2.numel()].view_as(w2)
    out = [torch.empty_like(rows) for rows in (x, hidden_x2, act)]
    weights, slots = torch.rand(num_rows, 1, device="cuda"), torch.arange(num_rows, device="cuda", dtype=torch.int32)

    def time(product: Callable[[], None]) -> float:
        return float(do_bench(product, warmup=30, rep=60, return_mode="median"))

    return [
        time(lambda: launch("nt", x, w13, out[1], ends, Gate(out[2], weights, slots))),
        time(lambda: launch("nt", act, w2, out[0], ends)),
        time(lambda: launch("nn", x, w2, out[2], ends)),
        time(lambda: launch("nn", hidden_x2, w13, out[0], ends)),
        time(lambda: launch("tn", hidden_x2, x, sums, ends, add=True)),
        time(lambda: launch("tn", x, act, sums_2, ends, add=True)),
    ]


def planned(machine: Machine, num_experts: int, hidden: int, width: int, rows: int) -> list[float]:
    """Give the milliseconds that a plan has for the same."""
    per_expert = -(-rows // machine.row_alignment) * machine.row_alignment
    computing = 2.0 * per_expert * num_experts * hidden * width / (machine.grouped_tflops * 1e12)
    weight = 2.0 * num_experts * hidden * width  # bytes of the second
    first = machine.of_matrix(2 * computing, (2 * width, hidden), per_expert, streamed=2 * weight, summed=8 * weight)
    second = machine.of_matrix(computing, (hidden, width), per_expert, streamed=weight, summed=4 * weight)
    order = (first[0], second[0], second[1], first[1], first[2], second[2])
    return [1e3 * value for value in order]


def _cells(times: list[float]) -> str:
    pairs = (f"{one:.2f} {other:.2f}" for one, other in zip(times[::2], times[1::2], strict=True))
    return f"{', '.join(pairs)}: {sum(times):.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", metavar="E,D,F")
    parser.add_argument("--rows", nargs="+", type=int, default=[128, 256, 512, 1024, 2048], help="of each expert")
    parser.add_argument("--gpu", default="h200", help="as of moeconv plan")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.exit(1, "this benchmark needs a Hopper GPU\n")
    machine = find_machine(args.gpu)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print("| experts of | rows | measured | plan |\n| --- | --- | --- | --- |")
    for sizes in [tuple(map(int, given.split(","))) for given in args.sizes] or SIZES:
        num_experts, hidden, width = sizes
        for rows in args.rows:
            found, plan = measured(num_experts, hidden, width, rows), planned(machine, num_experts, hidden, width, rows)
            error = sum(plan) / sum(found) - 1
            print(f"| {hidden} x {width} | {rows} | {_cells(found)} | {_cells(plan)} ({error:+.0%}) |", flush=True)


if __name__ == "__main__":
    main()
