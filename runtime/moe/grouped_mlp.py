"""The experts' SwiGLU networks over rows in expert order.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from runtime.moe import passes
from runtime.moe.expert_node import Gradients, run_experts
from runtime.moe.grouped_gemm import GatedGemm, GroupedGemm
from runtime.moe.low_rank import Adapters, product
from runtime.moe.permutation import RowPlan
from runtime.moe.thin import Thin
from runtime.quantised.weight import Weight


@dataclass(frozen=True, slots=True)
class _SwiGLU:
    """Gate, up and their product; a kernel that knows the first half of an expert does it in one step."""

    transposed: ClassVar[bool] = True
    plan: RowPlan
    gemm: GroupedGemm
    fused: bool

    def forward(
        self, rows_RD: Tensor, weight: Tensor, bias: Tensor | None, weights_TK: Tensor, thin: Thin | None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(self.gemm, GatedGemm) and self.fused:
            return self.gemm.hidden_and_swiglu(rows_RD, weight, weights_TK, self.plan, thin)
        hidden = product(self.gemm, rows_RD, weight, self.plan, thin, transposed=True)
        return hidden, passes.swiglu(hidden, weights_TK, self.plan, fused=self.fused)

    def backward(
        self, hidden_R2F: Tensor, bias: Tensor | None, weights_TK: Tensor, grad_RF: Tensor, *, sum_bias: bool
    ) -> Gradients:
        return Gradients(*passes.swiglu_backward(hidden_R2F, weights_TK, grad_RF, self.plan, fused=self.fused))


def grouped_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    w13_EGD: Weight,
    w2_EDF: Weight,
    plan: RowPlan,
    gemm: GroupedGemm,
    *,
    adapters: tuple[Adapters | None, Adapters | None] = (None, None),
    fused: bool = True,
    training: bool = True,
) -> Tensor:
    """Each token's weighted sum over its experts' SwiGLU networks.

    Args:
        x_TD: [T, D] tokens.
        weights_TK: [T, K] routing weights.
        w13_EGD: [E, 2F, D], rows of w1 (gate) first, then of w3 (up).
        w2_EDF: [E, D, F].
        plan: which choice is which row.
        gemm: the grouped products.
        adapters: beside w13 and beside w2.
        fused: use the fused kernels on a GPU.
        training: whether dropout of adapters applies.

    Returns:
        [T, D] in the dtype of x.
    """
    kind = _SwiGLU(plan, gemm, fused)
    return run_experts(x_TD, weights_TK, (w13_EGD, w2_EDF), None, adapters, kind, training=training)
