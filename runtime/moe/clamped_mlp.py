"""Experts with biases and a clamped gate: the activation, and what biases add.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert. Matrices are [in, out], gate and up columns in turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from moeconv.families.compute import Gate
from runtime.moe import passes
from runtime.moe.expert_node import Gradients, run_experts
from runtime.moe.grouped_gemm import GroupedGemm
from runtime.moe.low_rank import Adapters, product
from runtime.moe.permutation import RowPlan
from runtime.moe.thin import Thin
from runtime.quantised.weight import Weight

_ONES = 8  # columns of the ones that sum a bias's gradient: kernels want whole eights


class Activation(NamedTuple):
    """What the activation takes beside its rows."""

    bias_E2F: Tensor
    expert_R: Tensor
    plan: RowPlan
    gate: Gate
    fused: bool


def experts_of_rows(plan: RowPlan) -> Tensor:
    """[R] int32, the expert of each row; rows past the last expert's count as that one's."""
    places = torch.arange(plan.num_rows, device=plan.offsets_E.device, dtype=plan.offsets_E.dtype)
    found = torch.searchsorted(plan.offsets_E, places, right=True, out_int32=True)
    return found.clamp(max=plan.offsets_E.shape[0] - 1)


def clamped_gate(biased_R2F: Tensor, gate: Gate) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), gate and up clamped.

    Args:
        biased_R2F: [R, 2F], gate and up in turns.
        gate: steepness and bound.

    Returns:
        [R, F].

    Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/gpt_oss/modeling_gpt_oss.py
    """
    left, right = biased_R2F[:, ::2].clamp(max=gate.limit), biased_R2F[:, 1::2].clamp(-gate.limit, gate.limit)
    return (right + 1) * left * torch.sigmoid(gate.alpha * left)


def activate(hidden_R2F: Tensor, weights_TK: Tensor, args: Activation) -> Tensor:
    """`clamped_gate` of what is biased, times the routing weight.

    Args:
        hidden_R2F: [R, 2F], without biases.
        weights_TK: [T, K] routing weights.
        args: the rest.

    Returns:
        [R, F] in the dtype of hidden, computed in fp32 (fp64 for fp64).
    """
    bias, experts, plan, gate, fused = args
    if fused and hidden_R2F.is_cuda:
        from runtime.kernels.clamped_gate import clamped_gate_forward as kernel

        beside = (plan.slot_of_row_R, plan.offsets_E, gate.alpha, gate.limit)
        return kernel(hidden_R2F, bias, experts, weights_TK, *beside, alignment=plan.alignment)
    biased, weights = _wide(hidden_R2F, weights_TK, args)
    return (clamped_gate(biased, gate) * weights).to(hidden_R2F.dtype)


def _wide(hidden_R2F: Tensor, weights_TK: Tensor, args: Activation) -> tuple[Tensor, Tensor]:
    """Gate and up with their biases, and the weight of each row, in the dtype that is computed in."""
    dtype = torch.float64 if hidden_R2F.dtype == torch.float64 else torch.float32
    biased = hidden_R2F.to(dtype) + args.bias_E2F.to(dtype)[args.expert_R]
    return biased, passes.slots_to_rows(weights_TK, args.plan).to(dtype).unsqueeze(1)


def activate_backward(
    hidden_R2F: Tensor, weights_TK: Tensor, grad_RF: Tensor, args: Activation, *, sum_bias: bool = False
) -> Gradients:
    """The gradients of `activate`, with its output computed again; on a GPU in the place of what it is given.

    Args:
        hidden_R2F: [R, 2F] input of the activation.
        weights_TK: [T, K] routing weights.
        grad_RF: [R, F] gradient of the output.
        args: the rest.
        sum_bias: sum the biases' gradient where that costs no pass of its own.

    Returns:
        The gradients, that of the weights in their dtype, and the output.
    """
    bias, experts, plan, gate, fused = args
    if fused and hidden_R2F.is_cuda:
        from runtime.kernels.clamped_gate import clamped_gate_backward as kernel

        beside = (plan.slot_of_row_R, plan.offsets_E, gate.alpha, gate.limit)
        given = (hidden_R2F, bias, experts, weights_TK, grad_RF)
        return Gradients(*kernel(*given, *beside, alignment=plan.alignment, sum_bias=sum_bias))
    biased, weights = _wide(hidden_R2F, weights_TK, args)
    left, right = biased[:, ::2], biased[:, 1::2]
    bounded, linear = left.clamp(max=gate.limit), right.clamp(-gate.limit, gate.limit) + 1
    sigmoid = torch.sigmoid(gate.alpha * bounded)
    act = linear * bounded * sigmoid
    grad = grad_RF.to(biased.dtype)
    grad_left = grad * weights * linear * sigmoid * (1 + gate.alpha * bounded * (1 - sigmoid)) * (left <= gate.limit)
    grad_right = grad * weights * bounded * sigmoid * (right.abs() <= gate.limit)
    grad_hidden = torch.stack([grad_left, grad_right], dim=2).flatten(1).to(hidden_R2F.dtype)
    grad_weights = passes.rows_to_slots((grad * act).sum(1).to(weights_TK.dtype), plan)
    return Gradients(grad_hidden, grad_weights, (act * weights).to(hidden_R2F.dtype))


@dataclass(frozen=True, slots=True)
class _Clamped:
    """The clamped gate between products with [in, out] matrices."""

    transposed: ClassVar[bool] = False
    expert_R: Tensor
    plan: RowPlan
    gate: Gate
    gemm: GroupedGemm
    fused: bool

    def _activation(self, bias: Tensor | None) -> Activation:
        assert bias is not None
        return Activation(bias, self.expert_R, self.plan, self.gate, self.fused)

    def forward(
        self, rows_RD: Tensor, weight: Tensor, bias: Tensor | None, weights_TK: Tensor, thin: Thin | None
    ) -> tuple[Tensor, Tensor]:
        hidden = product(self.gemm, rows_RD, weight, self.plan, thin, transposed=False)
        return hidden, activate(hidden, weights_TK, self._activation(bias))

    def backward(
        self, hidden_R2F: Tensor, bias: Tensor | None, weights_TK: Tensor, grad_RF: Tensor, *, sum_bias: bool
    ) -> Gradients:
        found = activate_backward(hidden_R2F, weights_TK, grad_RF, self._activation(bias), sum_bias=sum_bias)
        if not sum_bias or found.bias_E2F is not None:
            return found
        # Sums over each expert's rows in a fixed order: a product with ones.
        ones = found.hidden_R2F.new_ones(found.hidden_R2F.shape[0], _ONES)
        return found._replace(bias_E2F=self.gemm.transposed_times_rows(ones, found.hidden_R2F, self.plan)[:, 0])


def sum_of_biases(weights_TK: Tensor, bias_ED: Tensor, plan: RowPlan) -> Tensor:
    """The last biases of each token's experts, weighted: [T, D] in the biases' dtype, differentiable in both.

    A row's bias needs no row of its own: what a token gets is the product of its weights, one for each expert, with them.

    Args:
        weights_TK: [T, K] routing weights.
        bias_ED: [E, D].
        plan: which choice is which row.
    """
    num_experts = bias_ED.shape[0]
    kept_TK = plan.row_of_slot_TK >= 0
    expert_TK = torch.searchsorted(plan.offsets_E, plan.row_of_slot_TK.contiguous(), right=True).clamp(
        max=num_experts - 1
    )
    weights_TE = weights_TK.new_zeros(weights_TK.shape[0], num_experts)
    weights_TE = weights_TE.scatter_add(1, expert_TK, weights_TK * kept_TK)
    return weights_TE.to(bias_ED.dtype) @ bias_ED


def clamped_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    matrices: tuple[Weight, Weight],
    biases: tuple[Tensor, Tensor],
    plan: RowPlan,
    gate: Gate,
    gemm: GroupedGemm,
    *,
    adapters: tuple[Adapters | None, Adapters | None] = (None, None),
    fused: bool,
    training: bool = True,
) -> Tensor:
    """Each token's weighted sum over its experts.

    Args:
        x_TD: [T, D] tokens.
        weights_TK: [T, K] routing weights.
        matrices: gate_up [E, D, 2F] and down [E, F, D].
        biases: theirs, [E, 2F] and [E, D].
        plan: which choice is which row.
        gate: steepness and bound of the activation.
        gemm: the grouped products.
        adapters: beside gate_up and beside down.
        fused: use the fused kernels on a GPU.
        training: whether dropout of adapters applies.

    Returns:
        [T, D] in the dtype of x.
    """
    kind = _Clamped(experts_of_rows(plan), plan, gate, gemm, fused)
    out = run_experts(x_TD, weights_TK, matrices, biases[0], adapters, kind, training=training)
    return out + sum_of_biases(weights_TK, biases[1], plan)
