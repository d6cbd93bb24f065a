"""The grouped products of the hopper backend: our kernels where a shape fits them, `grouped_mm` elsewhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.grouped_matmul import MAX_EXPERTS, MAX_ROWS, ROW_ALIGNMENT, Gate, ThinProduct, launch
from runtime.kernels.swiglu import swiglu_forward
from runtime.moe.permutation import RowPlan
from runtime.moe.thin import Thin


def _fits(plan: RowPlan, *sizes: int) -> bool:
    aligned = plan.alignment % ROW_ALIGNMENT == 0 and all(size % 64 == 0 for size in sizes)
    return aligned and plan.offsets_E.shape[0] <= MAX_EXPERTS and plan.num_rows <= MAX_ROWS


def _given(thin: Thin | None) -> ThinProduct | None:
    return None if thin is None else ThinProduct(thin.rows_RP, thin.matrices.flatten(0, 1))


class HopperGemm:
    """Bf16 on Hopper: rows are padded to tiles of 128, and widths that are no multiple of 64 go to `grouped_mm`."""

    name = "hopper"
    row_alignment = ROW_ALIGNMENT

    def rows_times_transposed(
        self, rows_RK: Tensor, weight_ENK: Tensor, plan: RowPlan, thin: Thin | None = None
    ) -> Tensor:
        """[R, N]: each expert's rows times the transpose of its matrix."""
        num_n, depth = weight_ENK.shape[1:]
        if not _fits(plan, num_n, depth):
            out = F.grouped_mm(rows_RK, weight_ENK.transpose(1, 2), offs=plan.offsets_E)
            return out if thin is None else out.add_(self.rows_times_transposed(*thin, plan))
        out = rows_RK.new_empty(plan.num_rows, num_n)
        launch("nt", rows_RK, weight_ENK.flatten(0, 1), out, plan.offsets_E, thin=_given(thin))
        return out

    def rows_times_transposed_and(self, rows_RK: Tensor, weight_ENK: Tensor, thin: Thin, plan: RowPlan) -> Tensor:
        """[R, N]: both products, added before they are rounded."""
        return self.rows_times_transposed(rows_RK, weight_ENK, plan, thin)

    def hidden_and_swiglu(
        self, rows_RD: Tensor, w13_EGD: Tensor, weights_TK: Tensor, plan: RowPlan, thin: Thin | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pre-activations [R, 2F], gate then up, and silu(gate) * up * weight [R, F]."""
        num_n, depth = w13_EGD.shape[1:]
        if not _fits(plan, num_n // 2, depth) or num_n % 256:
            hidden = self.rows_times_transposed(rows_RD, w13_EGD, plan, thin)
            return hidden, swiglu_forward(hidden, weights_TK, plan.slot_of_row_R, plan.offsets_E)
        hidden = rows_RD.new_empty(plan.num_rows, num_n)
        act = rows_RD.new_empty(plan.num_rows, num_n // 2)
        gate = Gate(act, weights_TK.float().contiguous(), plan.slot_of_row_R)
        launch("nt", rows_RD, w13_EGD.flatten(0, 1), hidden, plan.offsets_E, gate, thin=_given(thin))
        return hidden, act

    def rows_times(self, rows_RN: Tensor, weight_ENK: Tensor, plan: RowPlan, thin: Thin | None = None) -> Tensor:
        """[R, K]: each expert's rows times its matrix."""
        depth, num_k = weight_ENK.shape[1:]
        if not _fits(plan, num_k, depth):
            out = F.grouped_mm(rows_RN, weight_ENK, offs=plan.offsets_E)
            return out if thin is None else out.add_(self.rows_times(*thin, plan))
        out = rows_RN.new_empty(plan.num_rows, num_k)
        launch("nn", rows_RN, weight_ENK.flatten(0, 1), out, plan.offsets_E, thin=_given(thin))
        return out

    def rows_times_and(self, rows_RN: Tensor, weight_ENK: Tensor, thin: Thin, plan: RowPlan) -> Tensor:
        """[R, K]: both products, added before they are rounded."""
        return self.rows_times(rows_RN, weight_ENK, plan, thin)

    def transposed_times_rows(self, left_RN: Tensor, right_RK: Tensor, plan: RowPlan) -> Tensor:
        """[E, N, K]: the transpose of each expert's rows times its rows; zero for an expert without rows."""
        num_experts, num_n, num_k = plan.offsets_E.shape[0], left_RN.shape[1], right_RK.shape[1]
        if not _fits(plan, num_n, num_k):
            return F.grouped_mm(left_RN.t(), right_RK, offs=plan.offsets_E)
        out = left_RN.new_empty(num_experts, num_n, num_k)
        flat = out.view(num_experts * num_n, num_k)
        launch("tn", left_RN, right_RK, flat, plan.offsets_E)
        return out

    def add_transposed_times_rows(
        self, left_RN: Tensor, right_RK: Tensor, plan: RowPlan, total_ENK: Tensor, *, fresh: bool
    ) -> None:
        """Add `transposed_times_rows` to a sum, or overwrite it where it is fresh, inside the product.

        To a sum in fp32 it is added unrounded; to one in bf16 rounded, and the sum is rounded again.
        """
        num_experts, num_n, num_k = total_ENK.shape
        if not _fits(plan, num_n, num_k):
            product = self.transposed_times_rows(left_RN, right_RK, plan)
            if fresh:
                total_ENK.copy_(product)
            else:
                total_ENK += product
            return
        flat = total_ENK.view(num_experts * num_n, num_k)
        launch("tn", left_RN, right_RK, flat, plan.offsets_E, add=not fresh)
