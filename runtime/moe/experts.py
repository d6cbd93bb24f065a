"""The experts: SwiGLU networks over rows in expert order.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from moeconv.errors import MoeconvError
from runtime.fp8.scaling import Scaling
from runtime.moe import passes
from runtime.moe.config import MoEConfig
from runtime.moe.fp8_experts import Fp8Experts
from runtime.moe.grouped_gemm import GatedGemm, GroupedGemm, computed_in, make_gemm, resolve_backend, weight_gradient
from runtime.moe.low_rank import Adapters, Form, adapted_mlp
from runtime.moe.permutation import RowPlan, plan_rows
from runtime.moe.te_experts import TransformerEngineExperts
from runtime.ops.norm import Kept, restore
from runtime.parallel.gradient_sink import sink_of
from runtime.quantised.weight import Weight, dense, held, numbers


class _GroupedMLP(torch.autograd.Function):
    """Gather, both products, activation and sum as one node: keeps x and the pre-activations, nothing else of size.

    With y = sum over choices of s * W2 a and a = swiglu(h), the backward needs neither the rows of x nor the experts'
    outputs: the gradient of s is <W2' dy, a>, and those of the weights take rows gathered again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        w13_EGD: Weight,
        w2_EDF: Weight,
        plan: RowPlan,
        gemm: GroupedGemm,
        fused: bool,
    ) -> Tensor:
        (w13, ctx.w13), (w2, ctx.w2) = held(w13_EGD), held(w2_EDF)
        rows = passes.gather_rows(x_TD, plan, fused=fused)
        if isinstance(gemm, GatedGemm) and fused:
            hidden, act = gemm.hidden_and_swiglu(rows, numbers(w13_EGD), weights_TK, plan)
        else:
            hidden = gemm.rows_times_transposed(rows, numbers(w13_EGD), plan)
            act = passes.swiglu(hidden, weights_TK, plan, fused=fused)
        del rows
        out = gemm.rows_times_transposed(act, numbers(w2_EDF), plan)
        del act
        kept = Kept.of(x_TD) if ctx.needs_input_grad[2] else Kept.nothing()
        ctx.save_for_backward(hidden, weights_TK, w13, w2, *kept.tensors)
        ctx.plan, ctx.gemm, ctx.fused, ctx.source = plan, gemm, fused, kept.source
        ctx.pitch = x_TD.stride(0)
        ctx.sinks = [None if weight is None else sink_of(weight) for weight in (w13, w2)]
        return passes.sum_rows(out, plan, fused=fused)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights_TK, w13, w2, *saved = ctx.saved_tensors
        plan, gemm, fused = ctx.plan, ctx.gemm, ctx.fused
        w13_sink, w2_sink = ctx.sinks
        grad_rows = passes.gather_rows(grad_TD.contiguous(), plan, fused=fused)
        grad_act = gemm.rows_times(grad_rows, dense(w2, ctx.w2), plan)
        if fused and hidden.is_cuda and torch._C._autograd._get_current_graph_task_keep_graph():
            hidden = hidden.clone()  # written over below, and this node will run again: zero-bubble does so
        grad_hidden, grad_weights, act = passes.swiglu_backward(hidden, weights_TK, grad_act, plan, fused=fused)
        del hidden, grad_act
        grad_w2 = weight_gradient(gemm, grad_rows, act, plan, w2_sink) if ctx.needs_input_grad[3] else None
        del grad_rows, act
        grad_w13 = None
        if ctx.needs_input_grad[2]:
            rows = passes.gather_rows(restore(saved, ctx.source), plan, fused=fused)
            grad_w13 = weight_gradient(gemm, grad_hidden, rows, plan, w13_sink)
            del rows
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_rows = gemm.rows_times(grad_hidden, dense(w13, ctx.w13), plan)
            grad_x = passes.sum_rows(grad_rows, plan, fused=fused, pitch=ctx.pitch)
        return grad_x, grad_weights, grad_w13, grad_w2, None, None, None


def grouped_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    w13_EGD: Weight,
    w2_EDF: Weight,
    plan: RowPlan,
    gemm: GroupedGemm,
    *,
    fused: bool = True,
) -> Tensor:
    """Each token's weighted sum over its experts' SwiGLU networks.

    Args:
        x_TD: [T, D] tokens.
        weights_TK: [T, K] routing weights.
        w13_EGD: [E, 2F, D], rows of w1 (gate) first, then of w3 (up).
        w2_EDF: [E, D, F].
        plan: which choice is which row.
        gemm: the grouped products.
        fused: use the fused kernels on a GPU.

    Returns:
        [T, D] in the dtype of x.
    """
    args = (x_TD, weights_TK, w13_EGD, w2_EDF, plan, gemm, fused)
    return cast(Tensor, _GroupedMLP.apply(*args))  # type: ignore[no-untyped-call]


AnyGemm = GroupedGemm | TransformerEngineExperts | Fp8Experts


class Experts(nn.Module):
    """The experts of this rank as two stacked parameters, w13 [E, 2F, D] and w2 [E, D, F]."""

    def __init__(
        self,
        config: MoEConfig,
        *,
        num_local_experts: int,
        hidden_size: int,
        ffn_local_size: int,
        dtype: torch.dtype,
        device: torch.device | None,
        fp8: Scaling | None = None,
        name: str = "experts",
    ) -> None:
        super().__init__()
        self.w13 = nn.Parameter(
            torch.empty(num_local_experts, 2 * ffn_local_size, hidden_size, dtype=dtype, device=device)
        )
        self.w2 = nn.Parameter(torch.empty(num_local_experts, hidden_size, ffn_local_size, dtype=dtype, device=device))
        self.a13: nn.Parameter | None = None
        self.b13: nn.Parameter | None = None
        self.a2: nn.Parameter | None = None
        self.b2: nn.Parameter | None = None
        self._forms: dict[str, Form] = {}
        self.fused = config.permute_fusion
        self._config, self._dtype = config, dtype
        self._fp8 = None if fp8 is None else Fp8Experts(fp8, self.w13.device, name)
        self._gemm: tuple[torch.device, torch.dtype, AnyGemm] | None = None
        self.reset_parameters()

    def adapt(self, which: str, a: nn.Parameter, b: nn.Parameter, form: Form) -> None:
        """Add low-rank adapters.

        Args:
            which: beside w13, `13`, or beside w2, `2`.
            a: [E, P, D] or [E, P, F].
            b: [E, rows of all parts, rank].
            form: what they are beside their matrices.
        """
        setattr(self, f"a{which}", a)
        setattr(self, f"b{which}", b)
        self._forms[which] = form

    @property
    def draws(self) -> bool:
        """Whether dropout of adapters draws random numbers."""
        return any(form.scaling.dropout > 0 for form in self._forms.values())

    def _adapters(self, which: str) -> Adapters | None:
        if which not in self._forms:
            return None
        return Adapters(getattr(self, f"a{which}"), getattr(self, f"b{which}"), self._forms[which])

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution."""
        if not self.w13.is_meta:
            nn.init.normal_(self.w13, std=std)
            nn.init.normal_(self.w2, std=std)

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank."""
        return self.w13.shape[0]

    def gemm(self) -> AnyGemm:
        """The backend for the device and dtype that the weights are in now."""
        key = (self.w13.device, computed_in(self.w13, self._dtype))
        if self._gemm is None or self._gemm[:2] != key:
            self._gemm = (*key, self._make_gemm(*key))
        return self._gemm[2]

    def _make_gemm(self, device: torch.device, dtype: torch.dtype) -> AnyGemm:
        fp8 = None if self._fp8 is None else self._fp8.scaling.config
        name = resolve_backend(self._config, device, dtype, fp8, tuple(self.w2.shape[1:]))
        if name == "te":
            return TransformerEngineExperts(fp8, self.w13, self.w2)
        return make_gemm(name) if self._fp8 is None else self._fp8.on(device)

    def plan(self, experts_TK: Tensor, max_rows: int, needed: Tensor | None = None) -> RowPlan:
        """Order choices of this rank's experts as the backend needs them; arguments as of `plan_rows`."""
        alignment = self.gemm().row_alignment
        args = (experts_TK, self.num_local_experts, max_rows)
        return plan_rows(*args, alignment=alignment, fused=self.fused, needed=needed)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan) -> Tensor:
        """Weighted sum of each token's experts; see `grouped_mlp`.

        Raises:
            MoeconvError: the input's dtype is not that of the weights.
        """
        if x_TD.dtype != self.w13.dtype:
            raise MoeconvError(f"experts hold {self.w13.dtype} weights but got {x_TD.dtype} tokens; cast one of them")
        gemm = self.gemm()
        if isinstance(gemm, Fp8Experts):
            assert not self._forms, "adapters and FP8: `runtime.settings.check` refuses them"
            return gemm(x_TD, weights_TK, self.w13, self.w2, plan)
        if isinstance(gemm, TransformerEngineExperts):
            assert not self._forms, "adapters and te: `runtime.settings.check` refuses them"
            return gemm(x_TD, weights_TK, self.w13, self.w2, plan, fused=self.fused)
        if self._forms:
            first, second = self._adapters("13"), self._adapters("2")
            args = (x_TD, weights_TK, self.w13, self.w2, first, second, plan, gemm)
            return adapted_mlp(*args, fused=self.fused, training=self.training)
        return grouped_mlp(x_TD, weights_TK, self.w13, self.w2, plan, gemm, fused=self.fused)
