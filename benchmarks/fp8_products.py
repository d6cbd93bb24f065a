"""The products and passes of a layer in FP8 beside bf16's, on one GPU: `python -m benchmarks.fp8_products [T,D,F,E,K]`.

Legend: T tokens, D hidden size, F width of an expert, E experts, K choices per token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from triton.testing import do_bench

from runtime.fp8.blocks import empty_matrices, quantise_matrices
from runtime.kernels import fp8, fp8_blocks, fp8_blocks_swiglu
from runtime.kernels.grouped_matmul import Bounds, Gate, launch
from runtime.kernels.permute import gather_rows, sum_rows
from runtime.kernels.swiglu import swiglu_backward
from runtime.moe.permutation import RowPlan, plan_rows

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


def _ms(run: Callable[[], object]) -> float:
    return float(do_bench(run, warmup=20, rep=60, return_mode="median"))


def _product_ms(
    kind: str,
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    ends: torch.Tensor,
    gate: Gate | None,
    bounds: Bounds | None = None,
) -> float:
    return _ms(lambda: launch(kind, left, right, out, ends, gate, add=out.dtype == torch.float32, bounds=bounds))


def _row(name: str, flops: float, *times: float | None) -> None:
    cells = ("" if ms is None else f"{ms:.2f} ({flops / ms / 1e9:.0f})" for ms in times)
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _pass(name: str, gigabytes: float, ms: float) -> None:
    print(f"| {name} | {gigabytes / 3.0:.2f} | {ms:.2f} | {gigabytes / 3.0 / ms:.2f} |", flush=True)


def _bits(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda", dtype=BF16) * 30).to(dtype)


def _blocks(left: torch.Tensor, right: torch.Tensor, num_experts: int, form: str) -> Bounds:
    """Scales of both operands' blocks."""
    rows, depth = left.shape
    scales = torch.rand(depth // 128, rows, device="cuda")
    if form == "tn":
        return Bounds(scales, torch.rand(depth // 128, right.shape[0], device="cuda"), True)
    return Bounds(
        scales, torch.rand(num_experts, right.shape[0] // num_experts // 128, depth // 128, device="cuda"), True
    )


def products(
    num_rows: int, sizes: tuple[int, int, int, int, int], plan_ends: torch.Tensor, slots: torch.Tensor
) -> None:
    """Print the times of an expert layer's six products: bf16; FP8 summed by the tensor cores; FP8 summed in fp32; in blocks."""
    num_tokens, hidden, width, num_experts, topk = sizes
    flops = 2.0 * num_tokens * topk * hidden * width
    one, each = torch.ones(1, device="cuda"), torch.ones(num_experts, device="cuda")
    weights = torch.rand(num_tokens, topk, device="cuda")

    def compare(name: str, kind: str, columns: int, depth: int, factor: int, *, gated: bool = False) -> None:
        left, right = torch.randn(num_rows, depth, device="cuda", dtype=BF16), None
        if kind == "tn":
            right = torch.randn(num_rows, columns, device="cuda", dtype=BF16)
            out = torch.zeros(num_experts * depth, columns, device="cuda")
        else:
            shape = (columns, depth) if kind == "nt" else (depth, columns)
            right = torch.randn(num_experts * shape[0], shape[1], device="cuda", dtype=BF16)
            out = torch.empty(num_rows, columns, device="cuda", dtype=BF16)
        act = torch.empty(num_rows, columns // 2, device="cuda", dtype=BF16) if gated else None
        gate = Gate(act, weights, slots) if gated else None
        times: list[float | None] = [_product_ms(kind, left, right, out, plan_ends, gate)]
        del left, right, act, gate
        if kind == "tn":
            left8, right8 = _bits(depth, num_rows, dtype=E5M2), _bits(columns, num_rows)
        else:
            left8, right8 = (
                _bits(num_rows, depth, dtype=E4M3 if kind == "nt" else E5M2),
                _bits(num_experts * columns, depth),
            )
        gate8 = None
        if gated:
            act8 = torch.empty(num_rows, columns // 2, device="cuda", dtype=E4M3)
            gate8 = Gate(act8, weights, slots, one * 1e6, one.clone())
        form = "tn" if kind == "tn" else "nt"
        for split in (False,) if gated else (False, True):
            bounds = Bounds(one * 1e-2, one if kind == "tn" else each, split)
            times.append(_product_ms(form, left8, right8, out, plan_ends, gate8, bounds))
        if gated:
            times.append(None)  # the tensor cores sum it
        times.append(_product_ms(form, left8, right8, out, plan_ends, None, _blocks(left8, right8, num_experts, form)))
        _row(name, factor * flops, *times)

    print("| product | bf16, ms (TFLOP/s) | FP8 | FP8, summed in fp32 | FP8 in blocks |\n|" + " --- |" * 5)
    compare("first product + SwiGLU", "nt", 2 * width, hidden, 2, gated=True)
    compare("second product", "nt", hidden, width, 1)
    compare("gradient of the activation", "nn", width, hidden, 1)
    compare("gradient of the second weight, added", "tn", width, hidden, 1)
    compare("gradient of the first weight, added", "tn", hidden, 2 * width, 2)
    compare("gradient of the rows", "nn", hidden, 2 * width, 2)


def passes(num_rows: int, sizes: tuple[int, int, int, int, int]) -> None:
    """Print the times of the passes beside their floors at 3.0 TB/s."""
    num_tokens, hidden, width, num_experts, topk = sizes
    experts = torch.rand(num_tokens, num_experts, device="cuda").topk(topk, -1).indices
    plan = plan_rows(experts, num_experts, experts.numel(), alignment=128, fused=True)
    slots, ends, kept = plan.slot_of_row_R, plan.offsets_E, num_tokens * topk
    weights, one = torch.rand(num_tokens, topk, device="cuda"), torch.ones(1, device="cuda")
    print("| pass | floor, ms | measured | of it |\n| --- | --- | --- | --- |")
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=BF16)
    rows = torch.empty(1, num_tokens, hidden, device="cuda", dtype=E4M3)
    columns = torch.empty(1, hidden, num_tokens, device="cuda", dtype=E4M3)
    giga = num_tokens * hidden / 1e9
    _pass("largest absolute value of the tokens", 2 * giga, _ms(lambda: fp8.amax(x.unsqueeze(0), one)))
    _pass("tokens to 8 bits", 3 * giga, _ms(lambda: fp8.quantise(x.unsqueeze(0), one, rows, None, one)))
    _pass(
        "tokens to 8 bits, both layouts", 4 * giga, _ms(lambda: fp8.quantise(x.unsqueeze(0), one, rows, columns, one))
    )
    bytes_ = rows[0].view(torch.uint8)
    _pass("gather to rows", giga * (1 + topk), _ms(lambda: gather_rows(bytes_, plan.row_of_slot_TK, slots, ends, 128)))
    _pass("gather to columns", giga * (1 + topk), _ms(lambda: fp8.gather_columns(rows[0], slots, ends, topk)))
    out = torch.randn(num_rows, hidden, device="cuda", dtype=BF16)
    _pass("sum of a token's rows", 2 * giga * (1 + topk), _ms(lambda: sum_rows(out, plan.row_of_slot_TK)))
    hidden_ = torch.randn(num_rows, 2 * width, device="cuda", dtype=BF16)
    grad = torch.randn(num_rows, width, device="cuda", dtype=BF16)
    giga = kept * width / 1e9
    _pass("SwiGLU to 8 bits", 5 * giga, _ms(lambda: fp8.swiglu(hidden_, weights, slots, ends, one)))
    inputs = (hidden_, weights, grad, slots, ends)
    _pass("SwiGLU backward, amax alone", 6 * giga, _ms(lambda: fp8.swiglu_backward(*inputs, None, E5M2, one)))
    _pass(
        "SwiGLU backward to 8 bits, both layouts",
        11 * giga,
        _ms(lambda: fp8.swiglu_backward(*inputs, (one, one), E5M2, one)),
    )
    _pass("SwiGLU backward in bf16", 12 * giga, _ms(lambda: swiglu_backward(*inputs)))
    _block_passes(x, hidden_, grad, weights, plan)


def _block_passes(
    x: torch.Tensor, hidden: torch.Tensor, grad: torch.Tensor, weights: torch.Tensor, plan: RowPlan
) -> None:
    """The passes that scale block by block."""
    slots, ends, topk = plan.slot_of_row_R, plan.offsets_E, plan.topk
    (num_tokens, width), kept = x.shape, weights.numel()
    rows, columns = (
        fp8_blocks.empty_rows(*shape, E4M3, x.device) for shape in ((num_tokens, width), (width, num_tokens))
    )
    giga = num_tokens * width / 1e9
    _pass("tokens to blocks", 3 * giga, _ms(lambda: fp8_blocks.quantise(x, rows, None)))
    _pass("tokens to blocks, both layouts", 4 * giga, _ms(lambda: fp8_blocks.quantise(x, rows, columns)))
    _pass(
        "gather scales", 4 / 128 * giga * (1 + topk), _ms(lambda: fp8_blocks.gather_scales(rows[1], slots, ends, topk))
    )
    _pass(
        "gather to columns of blocks",
        giga * (2 + topk),
        _ms(lambda: fp8_blocks.gather_columns(x, E4M3, slots, ends, topk)),
    )
    giga = kept * grad.shape[1] / 1e9
    _pass("SwiGLU to blocks", 5 * giga, _ms(lambda: fp8_blocks_swiglu.swiglu(hidden, weights, slots, ends)))
    inputs = (hidden, weights, grad, slots, ends, E4M3)
    _pass("SwiGLU backward to blocks", 11 * giga, _ms(lambda: fp8_blocks_swiglu.swiglu_backward(*inputs)))


def weights_passes(sizes: tuple[int, int, int, int, int]) -> None:
    """Print the times of what is done with a layer's first weights once a step."""
    _, hidden, width, num_experts, _ = sizes
    w = torch.randn(num_experts, 2 * width, hidden, device="cuda", dtype=BF16)
    w_rows, w_columns = torch.empty_like(w, dtype=E4M3), torch.empty_like(w, dtype=E4M3).view(num_experts, hidden, -1)
    each, giga = torch.ones(num_experts, device="cuda"), w.numel() / 1e9
    _pass("largest absolute values of the first weights", 2 * giga, _ms(lambda: fp8.amax(w, each)))
    _pass("first weights to 8 bits, both layouts", 4 * giga, _ms(lambda: fp8.quantise(w, each, w_rows, w_columns)))
    made = empty_matrices(*w.shape, w.device)
    _pass("first weights to blocks, both layouts", 4 * giga, _ms(lambda: quantise_matrices([w], made)))


def main() -> None:
    """Measure one shape."""
    sizes = tuple(int(x) for x in (sys.argv[1] if len(sys.argv) > 1 else "8192,4096,14336,8,2").split(","))
    num_tokens, _, _, num_experts, topk = sizes
    experts = torch.rand(num_tokens, num_experts, device="cuda").topk(topk, -1).indices
    plan = plan_rows(experts, num_experts, experts.numel(), alignment=128, fused=True)
    products(plan.num_rows, sizes, plan.offsets_E, plan.slot_of_row_R)  # type: ignore[arg-type]
    passes(plan.num_rows, sizes)  # type: ignore[arg-type]
    weights_passes(sizes)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
