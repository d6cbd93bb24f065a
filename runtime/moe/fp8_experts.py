"""The experts' SwiGLU networks in FP8.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from runtime.fp8.config import ROW_ALIGNMENT
from runtime.fp8.operands import E4M3, Quantised, eight_bits, quantise, raise_amax
from runtime.fp8.products import rows_times_transposed, weight_gradients
from runtime.fp8.scaling import Scaling
from runtime.fp8.weights import QuantisedWeights
from runtime.moe import passes
from runtime.moe.permutation import RowPlan
from runtime.parallel.gradient_sink import GradientSink, deliver_to, sink_of


def _gather(tokens: Quantised, plan: RowPlan) -> Tensor:
    """[R, D] the tokens' rows."""
    assert tokens.rows is not None
    bits = tokens.rows[0]
    return passes.gather_rows(bits.view(torch.uint8), plan, fused=bits.is_cuda).view(bits.dtype)


def _gather_columns(tokens: Quantised, plan: RowPlan) -> Tensor:
    """[D, R] the tokens' rows, transposed."""
    assert tokens.rows is not None
    bits = tokens.rows[0]
    if bits.is_cuda:
        from runtime.kernels.fp8 import gather_columns

        return gather_columns(bits, plan.slot_of_row_R, plan.offsets_E, plan.topk)
    return _gather(tokens, plan).view(torch.uint8).t().contiguous().view(bits.dtype)


class _Fp8Experts(torch.autograd.Function):
    """Keeps x in 8 bits and the pre-activations in bf16, nothing else of size."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, plan: RowPlan, state: Fp8Experts
    ) -> Tensor:
        bound, amax = state.scaling.bound(state.x_slot, lambda out: raise_amax(x_TD.unsqueeze(0), out))
        x = quantise(x_TD, bound, amax, E4M3, columns=False)
        w13, w2 = state.w13.of([w13_EGD]), state.w2.of([w2_EDF])
        hidden, act, act_bound = state.hidden_and_act(_gather(x, plan), bound, w13, weights_TK, plan, x_TD.dtype)
        assert w2.rows is not None
        out = rows_times_transposed(act, act_bound, w2.rows, w2.bound_G, plan.offsets_E, x_TD.dtype, exact=False)
        ctx.save_for_backward(hidden, weights_TK, w13_EGD, w2_EDF, x.rows, bound, act_bound)
        ctx.plan, ctx.state, ctx.made = plan, state, (w13, w2)
        ctx.sinks, ctx.pitch = (sink_of(w13_EGD), sink_of(w2_EDF)), x_TD.stride(0)
        return passes.sum_rows(out, plan, fused=x_TD.is_cuda)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights_TK, w13_EGD, w2_EDF, x_rows, x_bound, act_bound = ctx.saved_tensors
        plan, state, (w13, w2) = ctx.plan, ctx.state, ctx.made
        grad_TD, ends, dtype = grad_TD.contiguous(), plan.offsets_E, grad_TD.dtype
        bound, amax = state.scaling.bound(state.grad_slot, lambda out: raise_amax(grad_TD.unsqueeze(0), out))
        grad = quantise(grad_TD, bound, amax, state.scaling.config.gradient_dtype, columns=False)
        rows = _gather(grad, plan)
        grad_act = rows_times_transposed(rows, bound, w2.columns, w2.bound_G, ends, dtype, exact=True)
        del rows
        made = state.swiglu_backward(hidden, weights_TK, grad_act, plan, act_bound)
        del hidden, grad_act
        grad_w2 = grad_w13 = grad_x = None
        if ctx.needs_input_grad[3]:
            left = _gather_columns(grad, plan)
            grad_w2 = _weight_gradient(left, bound, made.act_columns, act_bound, plan, w2_EDF, ctx.sinks[1])
            del left
        if ctx.needs_input_grad[2]:
            right = _gather_columns(Quantised(x_rows, None, x_bound), plan)
            grad_w13 = _weight_gradient(made.columns, made.bound, right, x_bound, plan, w13_EGD, ctx.sinks[0])
            del right
        if ctx.needs_input_grad[0]:
            product = rows_times_transposed(made.rows, made.bound, w13.columns, w13.bound_G, ends, dtype, exact=True)
            grad_x = passes.sum_rows(product, plan, fused=product.is_cuda, pitch=ctx.pitch)
        return grad_x, made.weights_TK, grad_w13, grad_w2, None, None


def _weight_gradient(
    left_NR: Tensor,
    left_bound: Tensor,
    right_KR: Tensor,
    right_bound: Tensor,
    plan: RowPlan,
    weight_ENK: Tensor,
    sink: GradientSink | None,
) -> Tensor | None:
    """The gradient of a weight, or None after adding it to the sum that the weight's sink keeps."""
    operands = (left_NR, left_bound, right_KR, right_bound, plan.offsets_E)
    opened = None if sink is None else sink.open()
    if sink is not None and opened is not None and opened.total.dtype == torch.float32:
        weight_gradients(*operands, opened.total, add=not opened.fresh)
        sink.close()
        return None
    product = torch.empty(weight_ENK.shape, dtype=torch.float32, device=weight_ENK.device)
    weight_gradients(*operands, product, add=False)
    return deliver_to(sink, opened, product, weight_ENK)  # sums in bf16 take a product of their own, in fp32


class _Gradients:
    """What SwiGLU's backward pass gives."""

    def __init__(self, rows: Tensor, columns: Tensor, act_columns: Tensor, bound: Tensor, weights_TK: Tensor) -> None:
        self.rows, self.columns, self.act_columns = rows, columns, act_columns
        self.bound, self.weights_TK = bound, weights_TK


class Fp8Experts:
    """The 8-bit weights of a layer's experts, and the places of their rows in the scaling."""

    def __init__(self, scaling: Scaling, device: torch.device, name: str = "experts") -> None:
        """Take places.

        Args:
            scaling: the bounds of this rank.
            device: where to compute; `on` says another.
            name: of the experts, in the model.
        """
        self.scaling = scaling
        self.w13, self.w2 = QuantisedWeights(scaling), QuantisedWeights(scaling)
        self.x_slot, self.act_slot, self.grad_slot, self._hidden_slot = (
            scaling.take_slot(f"{name}:{what}") for what in ("input", "activation", "gradient", "hidden gradient")
        )
        self.on(device)

    def on(self, device: torch.device) -> Fp8Experts:
        """Say where to compute."""
        self.row_alignment = ROW_ALIGNMENT if device.type == "cuda" else 1
        """Rows of an expert are padded to a multiple of it."""
        return self

    def __call__(self, x_TD: Tensor, weights_TK: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, plan: RowPlan) -> Tensor:
        """Each token's weighted sum over its experts; arguments as of `runtime.moe.grouped_mlp.grouped_mlp`."""
        x_TD = x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()
        args = (x_TD, weights_TK, w13_EGD, w2_EDF, plan, self)
        return cast(Tensor, _Fp8Experts.apply(*args))  # type: ignore[no-untyped-call]

    def hidden_and_act(
        self, rows_RD: Tensor, bound: Tensor, w13: Quantised, weights_TK: Tensor, plan: RowPlan, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations [R, 2F] in the given type, and their weighted SwiGLU [R, F] in 8 bits with its bound."""
        assert w13.rows is not None
        if rows_RD.is_cuda:
            return self._hidden_and_act(rows_RD, bound, w13, weights_TK, plan)
        hidden = rows_times_transposed(rows_RD, bound, w13.rows, w13.bound_G, plan.offsets_E, dtype, exact=False)
        act = passes.swiglu(hidden.float(), weights_TK, plan, fused=False)
        act_bound, amax = self.scaling.bound(self.act_slot, lambda out: raise_amax(act.unsqueeze(0), out))
        if amax is not None:
            raise_amax(act.unsqueeze(0), amax)
        return hidden, eight_bits(act, act_bound, E4M3), act_bound

    def _hidden_and_act(
        self, rows_RD: Tensor, bound: Tensor, w13: Quantised, weights_TK: Tensor, plan: RowPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On a GPU: the product writes the activation, where its bound is known, or finds the bound."""
        from runtime.kernels.fp8 import swiglu
        from runtime.kernels.grouped_matmul import Bounds, Gate, launch

        assert w13.rows is not None
        num_experts, num_n, depth = w13.rows.shape
        hidden = torch.empty(plan.num_rows, num_n, dtype=torch.bfloat16, device=rows_RD.device)
        weights = weights_TK.float().contiguous()

        def multiply(act: Tensor | None, act_bound: Tensor | None, amax: Tensor | None) -> None:
            gate = Gate(act, weights, plan.slot_of_row_R, act_bound, amax)
            matrices = w13.rows.view(num_experts * num_n, depth) if w13.rows is not None else rows_RD
            launch("nt", rows_RD, matrices, hidden, plan.offsets_E, gate, bounds=Bounds(bound, w13.bound_G, False))

        act_bound, amax = self.scaling.bound(self.act_slot, lambda out: multiply(None, None, out))
        if amax is None:
            act = swiglu(hidden, weights, plan.slot_of_row_R, plan.offsets_E, act_bound)
        else:
            act = torch.empty(plan.num_rows, num_n // 2, dtype=E4M3, device=rows_RD.device)
            multiply(act, act_bound, amax)
        return hidden, act, act_bound

    def swiglu_backward(
        self, hidden_R2F: Tensor, weights_TK: Tensor, grad_RF: Tensor, plan: RowPlan, act_bound: Tensor
    ) -> _Gradients:
        """The gradients of SwiGLU in 8 bits, and its output again, transposed."""
        dtype, slot = self.scaling.config.gradient_dtype, self._hidden_slot
        if hidden_R2F.is_cuda:
            from runtime.kernels.fp8 import swiglu_backward

            args = (hidden_R2F, weights_TK, grad_RF, plan.slot_of_row_R, plan.offsets_E)
            bound, amax = self.scaling.bound(slot, lambda out: swiglu_backward(*args, None, dtype, out))
            found = torch.zeros_like(bound) if amax is None else amax
            made = swiglu_backward(*args, (bound, act_bound), dtype, found)
            assert made is not None
            rows, columns, act, dots = made
            return _Gradients(rows, columns, act, bound, passes.rows_to_slots(dots.to(weights_TK.dtype), plan))
        wide = (hidden_R2F.float(), weights_TK, grad_RF.float(), plan)
        grad_hidden, grad_weights, out = passes.swiglu_backward(*wide, fused=False)
        bound, amax = self.scaling.bound(slot, lambda out: raise_amax(grad_hidden.unsqueeze(0), out))
        if amax is not None:
            raise_amax(grad_hidden.unsqueeze(0), amax)
        rows, act = eight_bits(grad_hidden, bound, dtype), eight_bits(out, act_bound, E4M3)
        columns, act_columns = (bits.view(torch.uint8).t().contiguous().view(bits.dtype) for bits in (rows, act))
        return _Gradients(rows, columns, act_columns, bound, grad_weights)
