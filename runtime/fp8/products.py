"""Products of 8-bit operands: on Hopper's tensor cores, elsewhere of what the numbers stand for, in fp32.

Legend: R rows in expert order (or tokens, of one "expert"), E experts, N and K the sizes of an expert's matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.fp8.operands import Operand
from runtime.parallel.gradient_sink import GradientSink, deliver_to


def _ranges(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def rows_times_transposed(
    rows_RK: Operand,
    matrices_ENK: Operand,
    ends_E: Tensor,
    dtype: torch.dtype,
    *,
    exact: bool,
) -> Tensor:
    """Each expert's rows times the transpose of its matrix.

    Args:
        rows_RK: [R, K], contiguous.
        matrices_ENK: [E, N, K], contiguous; scaled by blocks if the rows are.
        ends_E: [E] int32 ends of the experts' rows.
        dtype: of the result: bf16 on a GPU.
        exact: sum in fp32, instead of the tensor cores' 14 bits; blocks always are.

    Returns:
        [R, N]; rows past the last expert may be uninitialised.
    """
    bits, (num_experts, num_n, depth) = rows_RK.bits, matrices_ENK.bits.shape
    if bits.is_cuda:
        from runtime.kernels.grouped_matmul import Bounds, launch

        out = torch.empty(bits.shape[0], num_n, dtype=dtype, device=bits.device)
        bounds = Bounds(rows_RK.scale, matrices_ENK.scale, exact)
        launch("nt", bits, matrices_ENK.bits.view(num_experts * num_n, depth), out, ends_E, bounds=bounds)
        return out
    rows, matrices = rows_RK.in_fp32(), matrices_ENK.in_fp32()
    out = torch.zeros(rows.shape[0], num_n, dtype=dtype)
    for expert, (start, end) in enumerate(_ranges(ends_E)):
        out[start:end] = (rows[start:end] @ matrices[expert].t()).to(dtype)
    return out


def weight_gradients(
    left_NR: Operand,
    right_KR: Operand,
    ends_E: Tensor,
    out_ENK: Tensor,
    *,
    add: bool,
) -> None:
    """Each expert's columns of one matrix times the transpose of its columns of another.

    Args:
        left_NR: [N, R], contiguous.
        right_KR: [K, R], contiguous; scaled by blocks if the left one is, and experts' columns are whole blocks then.
        ends_E: [E] int32 ends of the experts' columns.
        out_ENK: [E, N, K] contiguous: fp32, or on a GPU bf16; becomes the product.
        add: add the product to it instead; in fp32.
    """
    num_experts, num_n, num_k = out_ENK.shape
    if left_NR.bits.is_cuda:
        from runtime.kernels.grouped_matmul import Bounds, launch

        bounds, flat = Bounds(left_NR.scale, right_KR.scale, True), out_ENK.view(num_experts * num_n, num_k)
        launch("tn", left_NR.bits, right_KR.bits, flat, ends_E, add=add, bounds=bounds)
        return
    left, right = left_NR.in_fp32(), right_KR.in_fp32()
    for expert, (start, end) in enumerate(_ranges(ends_E)):
        product = left[:, start:end] @ right[:, start:end].t()
        if add:
            out_ENK[expert] += product
        else:
            out_ENK[expert] = product


def weight_gradient(
    left_NR: Operand, right_KR: Operand, ends_E: Tensor, weight: Tensor, sink: GradientSink | None
) -> Tensor | None:
    """Give autograd the gradient of a weight, or None after adding it to the sum that the weight's sink keeps.

    Args:
        left_NR: as of `weight_gradients`, like the next two.
        right_KR: the other operand.
        ends_E: ends of the experts' columns.
        weight: [E, N, K], or [N, K] of one.
        sink: the weight's, if its gradient is added inside the product.
    """
    opened = None if sink is None else sink.open()
    shape = (-1, *weight.shape[-2:])
    if sink is not None and opened is not None and opened.total.dtype == torch.float32:
        weight_gradients(left_NR, right_KR, ends_E, opened.total.view(shape), add=not opened.fresh)
        sink.close()
        return None
    product = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    weight_gradients(left_NR, right_KR, ends_E, product.view(shape), add=False)
    return deliver_to(sink, opened, product, weight)  # sums in bf16 take a product of their own, in fp32
