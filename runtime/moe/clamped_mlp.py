"""Experts with biases and a clamped gate as one node of the graph: products, activation, sums and biases.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert. Matrices are [in, out], gate and up columns in turns.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from moeconv.families.compute import Gate
from runtime.moe import passes
from runtime.moe.grouped_gemm import GroupedGemm, weight_gradient
from runtime.moe.permutation import RowPlan
from runtime.ops.norm import Kept, restore
from runtime.parallel.gradient_sink import sink_of
from runtime.quantised.weight import Weight, dense, held, numbers

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
        return kernel(hidden_R2F, bias, experts, weights_TK, *beside)
    biased, weights = _wide(hidden_R2F, weights_TK, args)
    return (clamped_gate(biased, gate) * weights).to(hidden_R2F.dtype)


def _wide(hidden_R2F: Tensor, weights_TK: Tensor, args: Activation) -> tuple[Tensor, Tensor]:
    """Gate and up with their biases, and the weight of each row, in the dtype that is computed in."""
    dtype = torch.float64 if hidden_R2F.dtype == torch.float64 else torch.float32
    biased = hidden_R2F.to(dtype) + args.bias_E2F.to(dtype)[args.expert_R]
    return biased, passes.slots_to_rows(weights_TK, args.plan).to(dtype).unsqueeze(1)


def activate_backward(
    hidden_R2F: Tensor, weights_TK: Tensor, grad_RF: Tensor, args: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `activate`, with its output computed again; on a GPU in the place of what it is given.

    Args:
        hidden_R2F: [R, 2F] input of the activation.
        weights_TK: [T, K] routing weights.
        grad_RF: [R, F] gradient of the output.
        args: the rest.

    Returns:
        Gradient of hidden [R, 2F], of the weights [T, K] (in their dtype), and the output [R, F].
    """
    bias, experts, plan, gate, fused = args
    if fused and hidden_R2F.is_cuda:
        from runtime.kernels.clamped_gate import clamped_gate_backward as kernel

        beside = (plan.slot_of_row_R, plan.offsets_E, gate.alpha, gate.limit)
        return kernel(hidden_R2F, bias, experts, weights_TK, grad_RF, *beside)
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
    return grad_hidden, grad_weights, (act * weights).to(hidden_R2F.dtype)


class _ClampedMLP(torch.autograd.Function):
    """As the plain experts' node: keeps x and the pre-activations, nothing else of size."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        gate_up: Weight,
        bias_E2F: Tensor,
        down: Weight,
        plan: RowPlan,
        gate: Gate,
        gemm: GroupedGemm,
        fused: bool,
    ) -> Tensor:
        rows = passes.gather_rows(x_TD, plan, fused=fused)
        hidden = gemm.rows_times(rows, numbers(gate_up), plan)
        del rows
        args = Activation(bias_E2F, experts_of_rows(plan), plan, gate, fused)
        out = gemm.rows_times(activate(hidden, weights_TK, args), numbers(down), plan)
        kept = Kept.of(x_TD) if ctx.needs_input_grad[2] else Kept.nothing()
        (first, ctx.gate_up), (last, ctx.down) = held(gate_up), held(down)
        ctx.save_for_backward(hidden, weights_TK, first, last, bias_E2F, args.expert_R, *kept.tensors)
        ctx.plan, ctx.gate, ctx.gemm, ctx.fused, ctx.source = plan, gate, gemm, fused, kept.source
        ctx.pitch = x_TD.stride(0)
        ctx.sinks = sink_of(first), sink_of(last)
        return passes.sum_rows(out, plan, fused=fused)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights_TK, first, last, bias_E2F, expert_R, *saved = ctx.saved_tensors
        plan, gemm, fused, need = ctx.plan, ctx.gemm, ctx.fused, ctx.needs_input_grad
        grad_rows = passes.gather_rows(grad_TD.contiguous(), plan, fused=fused)
        grad_act = gemm.rows_times_transposed(grad_rows, dense(last, ctx.down), plan)
        if fused and hidden.is_cuda and torch._C._autograd._get_current_graph_task_keep_graph():
            hidden = hidden.clone()  # written over below, and this node will run again: zero-bubble does so
        args = Activation(bias_E2F, expert_R, plan, ctx.gate, fused)
        grad_hidden, grad_weights, act = activate_backward(hidden, weights_TK, grad_act, args)
        del hidden, grad_act
        grad_down = weight_gradient(gemm, act, grad_rows, plan, ctx.sinks[1]) if need[4] else None
        del grad_rows, act
        grad_bias = None
        if need[3]:
            # Sums over each expert's rows in a fixed order: a product with ones.
            ones = grad_hidden.new_ones(grad_hidden.shape[0], _ONES)
            grad_bias = gemm.transposed_times_rows(ones, grad_hidden, plan)[:, 0]
        grad_gate_up = None
        if need[2]:
            rows = passes.gather_rows(restore(saved, ctx.source), plan, fused=fused)
            grad_gate_up = weight_gradient(gemm, rows, grad_hidden, plan, ctx.sinks[0])
            del rows
        grad_x = None
        if need[0]:
            matrix = dense(first, ctx.gate_up)
            grad_rows = gemm.rows_times_transposed(grad_hidden, matrix, plan)
            grad_x = passes.sum_rows(grad_rows, plan, fused=fused, pitch=ctx.pitch)
        return grad_x, grad_weights, grad_gate_up, grad_bias, grad_down, None, None, None, None


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
    fused: bool,
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
        fused: use the fused kernels on a GPU.

    Returns:
        [T, D] in the dtype of x.
    """
    args = (x_TD, weights_TK, matrices[0], biases[0], matrices[1], plan, gate, gemm, fused)
    out = cast(Tensor, _ClampedMLP.apply(*args))  # type: ignore[no-untyped-call]
    return out + sum_of_biases(weights_TK, biases[1], plan)
