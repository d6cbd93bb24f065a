"""Products of 8-bit operands: on Hopper's tensor cores, elsewhere of what the numbers stand for, in fp32.

Legend: R rows in expert order (or tokens, of one "expert"), E experts, N and K the sizes of an expert's matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.fp8.operands import in_fp32


def _ranges(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def rows_times_transposed(
    rows_RK: Tensor,
    rows_bound: Tensor,
    matrices_ENK: Tensor,
    matrices_bound: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
    *,
    exact: bool,
) -> Tensor:
    """Each expert's rows times the transpose of its matrix.

    Args:
        rows_RK: [R, K] 8 bits, contiguous.
        rows_bound: [1] fp32.
        matrices_ENK: [E, N, K] 8 bits, contiguous.
        matrices_bound: [1] or [E] fp32.
        ends_E: [E] int32 ends of the experts' rows.
        dtype: of the result: bf16 on a GPU.
        exact: sum in fp32, instead of the tensor cores' 14 bits.

    Returns:
        [R, N]; rows past the last expert may be uninitialised.
    """
    num_experts, num_n, depth = matrices_ENK.shape
    if rows_RK.is_cuda:
        from runtime.kernels.grouped_matmul import Bounds, launch

        out = torch.empty(rows_RK.shape[0], num_n, dtype=dtype, device=rows_RK.device)
        bounds = Bounds(rows_bound, matrices_bound, exact)
        launch("nt", rows_RK, matrices_ENK.view(num_experts * num_n, depth), out, ends_E, bounds=bounds)
        return out
    rows, matrices = in_fp32(rows_RK, rows_bound), in_fp32(matrices_ENK, matrices_bound.view(-1, 1, 1))
    out = torch.zeros(rows.shape[0], num_n, dtype=dtype)
    for expert, (start, end) in enumerate(_ranges(ends_E)):
        out[start:end] = (rows[start:end] @ matrices[expert].t()).to(dtype)
    return out


def weight_gradients(
    left_NR: Tensor,
    left_bound: Tensor,
    right_KR: Tensor,
    right_bound: Tensor,
    ends_E: Tensor,
    out_ENK: Tensor,
    *,
    add: bool,
) -> None:
    """Each expert's columns of one matrix times the transpose of its columns of another.

    Args:
        left_NR: [N, R] 8 bits, contiguous.
        left_bound: [1] fp32.
        right_KR: [K, R] 8 bits, contiguous.
        right_bound: [1] fp32.
        ends_E: [E] int32 ends of the experts' columns.
        out_ENK: [E, N, K] contiguous: fp32, or on a GPU bf16; becomes the product.
        add: add the product to it instead; in fp32.
    """
    num_experts, num_n, num_k = out_ENK.shape
    if left_NR.is_cuda:
        from runtime.kernels.grouped_matmul import Bounds, launch

        bounds, flat = Bounds(left_bound, right_bound, True), out_ENK.view(num_experts * num_n, num_k)
        launch("tn", left_NR, right_KR, flat, ends_E, add=add, bounds=bounds)
        return
    left, right = in_fp32(left_NR, left_bound), in_fp32(right_KR, right_bound)
    for expert, (start, end) in enumerate(_ranges(ends_E)):
        product = left[:, start:end] @ right[:, start:end].t()
        if add:
            out_ENK[expert] += product
        else:
            out_ENK[expert] = product
