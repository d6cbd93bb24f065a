"""The experts' SwiGLU networks in FP8, block by block.

Legend: T tokens, R rows in expert order, D hidden size, F width of this rank's piece of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.fp8.blocks import columns_of, rows_of
from runtime.fp8.operands import E4M3, Operand
from runtime.fp8.products import rows_times_transposed
from runtime.moe import passes
from runtime.moe.fp8_experts import Fp8Experts, Gradients
from runtime.moe.permutation import RowPlan


class BlockExperts(Fp8Experts):
    """Keeps x as it is: rows are rounded in blocks along their products' reduction, which runs over experts' rows backward."""

    def kept(self, x_TD: Tensor, tokens: Operand) -> tuple[Tensor, ...]:
        """The tokens themselves."""
        return (x_TD,)

    def columns(self, kept: tuple[Tensor, ...], dtype: torch.dtype, plan: RowPlan) -> Operand:
        """[D, R] the tokens' rows, transposed and rounded in blocks of rows."""
        x_TD = kept[0]
        if x_TD.is_cuda:
            from runtime.kernels.fp8_blocks import gather_columns

            return Operand(*gather_columns(x_TD, dtype, plan.slot_of_row_R, plan.offsets_E, plan.topk))
        return columns_of(passes.gather_rows(x_TD, plan, fused=False), dtype)

    def gather(self, tokens: Operand, plan: RowPlan) -> Operand:
        """[R, D] the tokens' rows, with the scales of their blocks."""
        bits = super().gather(tokens, plan).bits
        if bits.is_cuda:
            from runtime.kernels.fp8_blocks import gather_scales

            return Operand(bits, gather_scales(tokens.scale, plan.slot_of_row_R, plan.offsets_E, plan.topk))
        return Operand(bits, passes.gather_rows(tokens.scale.t().contiguous(), plan, fused=False).t())

    def hidden_and_act(
        self, rows_RD: Operand, w13: Operand, weights_TK: Tensor, plan: RowPlan, dtype: torch.dtype
    ) -> tuple[Tensor, Operand]:
        """Pre-activations [R, 2F] in the given type, and their weighted SwiGLU [R, F] in 8 bits."""
        hidden = rows_times_transposed(rows_RD, w13, plan.offsets_E, dtype, exact=True)
        if hidden.is_cuda:
            from runtime.kernels.fp8_blocks_swiglu import swiglu

            weights = weights_TK.float().contiguous()
            return hidden, Operand(*swiglu(hidden, weights, plan.slot_of_row_R, plan.offsets_E))
        return hidden, rows_of(passes.swiglu(hidden.float(), weights_TK, plan, fused=False), E4M3)

    def swiglu_backward(
        self, hidden_R2F: Tensor, weights_TK: Tensor, grad_RF: Tensor, plan: RowPlan, act_scale: Tensor
    ) -> Gradients:
        """The gradients of SwiGLU in 8 bits, and its output again, transposed."""
        dtype = self.scaling.config.gradient_dtype
        if hidden_R2F.is_cuda:
            from runtime.kernels.fp8_blocks_swiglu import swiglu_backward

            args = (hidden_R2F, weights_TK, grad_RF, plan.slot_of_row_R, plan.offsets_E, dtype)
            *made, dots = swiglu_backward(*args)
            rows, columns, act = (Operand(*pair) for pair in made)
            return Gradients(rows, columns, act, passes.rows_to_slots(dots.to(weights_TK.dtype), plan))
        wide = (hidden_R2F.float(), weights_TK, grad_RF.float(), plan)
        grad_hidden, grad_weights, out = passes.swiglu_backward(*wide, fused=False)
        own = (rows_of(grad_hidden, dtype), columns_of(grad_hidden, dtype), columns_of(out, E4M3))
        return Gradients(*own, grad_weights)
