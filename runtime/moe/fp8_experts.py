"""The experts' SwiGLU networks in FP8.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from runtime.fp8.operands import E4M3, Operand, eight_bits, raise_amax
from runtime.fp8.products import rows_times_transposed, weight_gradient
from runtime.fp8.quantise import quantise, row_alignment
from runtime.fp8.scaling import Scaling
from runtime.fp8.weights import QuantisedWeights
from runtime.moe import passes
from runtime.moe.permutation import RowPlan
from runtime.parallel.gradient_sink import sink_of


class _Fp8Experts(torch.autograd.Function):
    """Keeps what tokens' columns are made of and the pre-activations in bf16, nothing else of size."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, plan: RowPlan, state: Fp8Experts
    ) -> Tensor:
        tokens = quantise(state.scaling, state.x_slot, [x_TD], E4M3, columns=False).rows
        w13, w2 = state.w13.of([w13_EGD]), state.w2.of([w2_EDF])
        assert tokens is not None
        assert w13.rows is not None
        assert w2.rows is not None
        hidden, act = state.hidden_and_act(state.gather(tokens, plan), w13.rows, weights_TK, plan, x_TD.dtype)
        out = rows_times_transposed(act, w2.rows, plan.offsets_E, x_TD.dtype, exact=False)
        ctx.save_for_backward(hidden, weights_TK, w13_EGD, w2_EDF, act.scale, *state.kept(x_TD, tokens))
        ctx.plan, ctx.state, ctx.made = plan, state, (w13, w2)
        ctx.sinks, ctx.pitch = (sink_of(w13_EGD), sink_of(w2_EDF)), x_TD.stride(0)
        return passes.sum_rows(out, plan, fused=x_TD.is_cuda)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights_TK, w13_EGD, w2_EDF, act_scale, *kept = ctx.saved_tensors
        plan, state, (w13, w2) = ctx.plan, ctx.state, ctx.made
        grad_TD, ends, gradient = grad_TD.contiguous(), plan.offsets_E, state.scaling.config.gradient_dtype
        grad = quantise(state.scaling, state.grad_slot, [grad_TD], gradient, columns=False).rows
        assert grad is not None
        grad_act = rows_times_transposed(state.gather(grad, plan), w2.columns, ends, grad_TD.dtype, exact=True)
        made = state.swiglu_backward(hidden, weights_TK, grad_act, plan, act_scale)
        del hidden, grad_act
        grad_w2 = grad_w13 = grad_x = None
        if ctx.needs_input_grad[3]:
            left = state.columns(state.kept(grad_TD, grad), gradient, plan)
            grad_w2 = weight_gradient(left, made.act_columns, ends, w2_EDF, ctx.sinks[1])
            del left
        if ctx.needs_input_grad[2]:
            right = state.columns(tuple(kept), E4M3, plan)
            grad_w13 = weight_gradient(made.columns, right, ends, w13_EGD, ctx.sinks[0])
            del right
        if ctx.needs_input_grad[0]:
            product = rows_times_transposed(made.rows, w13.columns, ends, grad_TD.dtype, exact=True)
            grad_x = passes.sum_rows(product, plan, fused=product.is_cuda, pitch=ctx.pitch)
        return grad_x, made.weights_TK, grad_w13, grad_w2, None, None


class Gradients(NamedTuple):
    """What SwiGLU's backward pass gives."""

    rows: Operand
    """[R, 2F] of the pre-activations."""
    columns: Operand
    """[2F, R] the same."""
    act_columns: Operand
    """[F, R] the activations."""
    weights_TK: Tensor


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
        self.row_alignment = row_alignment(device, self.scaling)
        """Rows of an expert are padded to a multiple of it."""
        return self

    def __call__(self, x_TD: Tensor, weights_TK: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, plan: RowPlan) -> Tensor:
        """Each token's weighted sum over its experts; arguments as of `runtime.moe.grouped_mlp.grouped_mlp`."""
        x_TD = x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()
        args = (x_TD, weights_TK, w13_EGD, w2_EDF, plan, self)
        return cast(Tensor, _Fp8Experts.apply(*args))  # type: ignore[no-untyped-call]

    def kept(self, x_TD: Tensor, tokens: Operand) -> tuple[Tensor, ...]:
        """What `columns` needs of tokens: their 8 bits."""
        return tokens.bits, tokens.scale

    def columns(self, kept: tuple[Tensor, ...], dtype: torch.dtype, plan: RowPlan) -> Operand:
        """[D, R] the tokens' rows, transposed, in 8 bits of a format."""
        bits, bound = kept
        if bits.is_cuda:
            from runtime.kernels.fp8 import gather_columns

            return Operand(gather_columns(bits, plan.slot_of_row_R, plan.offsets_E, plan.topk), bound)
        rows = self.gather(Operand(bits, bound), plan).bits
        return Operand(rows.view(torch.uint8).t().contiguous().view(dtype), bound)

    def gather(self, tokens: Operand, plan: RowPlan) -> Operand:
        """[R, D] the tokens' rows."""
        bits = tokens.bits
        rows = passes.gather_rows(bits.view(torch.uint8), plan, fused=bits.is_cuda)
        return Operand(rows.view(bits.dtype), tokens.scale)

    def hidden_and_act(
        self, rows_RD: Operand, w13: Operand, weights_TK: Tensor, plan: RowPlan, dtype: torch.dtype
    ) -> tuple[Tensor, Operand]:
        """Pre-activations [R, 2F] in the given type, and their weighted SwiGLU [R, F] in 8 bits."""
        if rows_RD.bits.is_cuda:
            return self._hidden_and_act(rows_RD, w13, weights_TK, plan)
        hidden = rows_times_transposed(rows_RD, w13, plan.offsets_E, dtype, exact=False)
        act = passes.swiglu(hidden.float(), weights_TK, plan, fused=False)
        act_bound, amax = self.scaling.bound(self.act_slot, lambda out: raise_amax(act.unsqueeze(0), out))
        if amax is not None:
            raise_amax(act.unsqueeze(0), amax)
        return hidden, Operand(eight_bits(act, act_bound, E4M3), act_bound)

    def _hidden_and_act(
        self, rows_RD: Operand, w13: Operand, weights_TK: Tensor, plan: RowPlan
    ) -> tuple[Tensor, Operand]:
        """On a GPU: the product writes the activation, where its bound is known, or finds the bound."""
        from runtime.kernels.fp8 import swiglu
        from runtime.kernels.grouped_matmul import Bounds, Gate, launch

        num_experts, num_n, depth = w13.bits.shape
        hidden = torch.empty(plan.num_rows, num_n, dtype=torch.bfloat16, device=w13.bits.device)
        weights, matrices = weights_TK.float().contiguous(), w13.bits.view(num_experts * num_n, depth)
        bounds = Bounds(rows_RD.scale, w13.scale, False)

        def multiply(act: Tensor | None, act_bound: Tensor | None, amax: Tensor | None) -> None:
            gate = Gate(act, weights, plan.slot_of_row_R, act_bound, amax)
            launch("nt", rows_RD.bits, matrices, hidden, plan.offsets_E, gate, bounds=bounds)

        act_bound, amax = self.scaling.bound(self.act_slot, lambda out: multiply(None, None, out))
        if amax is None:
            act = swiglu(hidden, weights, plan.slot_of_row_R, plan.offsets_E, act_bound)
        else:
            act = torch.empty(plan.num_rows, num_n // 2, dtype=E4M3, device=hidden.device)
            multiply(act, act_bound, amax)
        return hidden, Operand(act, act_bound)

    def swiglu_backward(
        self, hidden_R2F: Tensor, weights_TK: Tensor, grad_RF: Tensor, plan: RowPlan, act_scale: Tensor
    ) -> Gradients:
        """The gradients of SwiGLU in 8 bits, and its output again, transposed and scaled as it was."""
        dtype, slot = self.scaling.config.gradient_dtype, self._hidden_slot
        if hidden_R2F.is_cuda:
            from runtime.kernels.fp8 import swiglu_backward

            args = (hidden_R2F, weights_TK, grad_RF, plan.slot_of_row_R, plan.offsets_E)
            bound, amax = self.scaling.bound(slot, lambda out: swiglu_backward(*args, None, dtype, out))
            found = torch.zeros_like(bound) if amax is None else amax
            made = swiglu_backward(*args, (bound, act_scale), dtype, found)
            assert made is not None
            rows, columns, act, dots = made
            grad_weights = passes.rows_to_slots(dots.to(weights_TK.dtype), plan)
            return Gradients(Operand(rows, bound), Operand(columns, bound), Operand(act, act_scale), grad_weights)
        wide = (hidden_R2F.float(), weights_TK, grad_RF.float(), plan)
        grad_hidden, grad_weights, out = passes.swiglu_backward(*wide, fused=False)
        bound, amax = self.scaling.bound(slot, lambda out: raise_amax(grad_hidden.unsqueeze(0), out))
        if amax is not None:
            raise_amax(grad_hidden.unsqueeze(0), amax)
        rows, act = eight_bits(grad_hidden, bound, dtype), eight_bits(out, act_scale, E4M3)
        columns, act_columns = (bits.view(torch.uint8).t().contiguous().view(bits.dtype) for bits in (rows, act))
        return Gradients(Operand(rows, bound), Operand(columns, bound), Operand(act_columns, act_scale), grad_weights)
