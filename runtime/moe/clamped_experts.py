"""Experts with biases, whose gate is clamped: gate * sigmoid(alpha * gate) * (up + 1); in plain steps where adapters join in.

Their matrices are kept as checkpoints of the family hold them, [in, out], with gate and up columns in turns.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from moeconv.errors import MoeconvError
from moeconv.families.compute import Gate
from runtime.moe.clamped_mlp import clamped_gate, clamped_mlp, experts_of_rows
from runtime.moe.config import MoEConfig
from runtime.moe.grouped_gemm import GroupedGemm, computed_in, make_gemm, resolve_backend
from runtime.moe.low_rank import Adapters, Form, add_to_rows, unfilled
from runtime.moe.passes import permute, unpermute
from runtime.moe.permutation import RowPlan, plan_rows
from runtime.quantised.weight import Weight, dense, held, numbers


class _RowsTimes(torch.autograd.Function):
    """Each expert's rows times its matrix, plus its bias."""

    @staticmethod
    def forward(
        ctx: Any, rows_RK: Tensor, weight_EKN: Weight, bias_EN: Tensor, plan: RowPlan, gemm: GroupedGemm
    ) -> Tensor:
        weight, ctx.quantised = held(weight_EKN)
        ctx.save_for_backward(rows_RK if ctx.needs_input_grad[1] else None, weight)
        ctx.plan, ctx.gemm = plan, gemm
        out = gemm.rows_times(rows_RK, numbers(weight_EKN), plan) + bias_EN[experts_of_rows(plan)]
        return out.masked_fill_(unfilled(plan), 0)  # rows past the last expert's may hold anything

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
        rows_RK, weight = ctx.saved_tensors
        plan, gemm = ctx.plan, ctx.gemm
        empty_R1 = unfilled(plan)
        grad_RN = grad_RN.contiguous().masked_fill(empty_R1, 0)
        grad_rows = gemm.rows_times_transposed(grad_RN, dense(weight, ctx.quantised), plan).masked_fill(empty_R1, 0)
        grad_weight = gemm.transposed_times_rows(rows_RK, grad_RN, plan) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            # Sums over each expert's rows in a fixed order: a product with ones, 8 wide since kernels want whole eights.
            ones_R8 = grad_RN.new_ones(grad_RN.shape[0], 8)
            grad_bias = gemm.transposed_times_rows(ones_R8, grad_RN, plan)[:, 0]
        return grad_rows, grad_weight, grad_bias, None, None


class ClampedExperts(nn.Module):
    """The experts of this rank: gate_up [E, D, 2F] and down [E, F, D], and their biases, each as one vector."""

    def __init__(
        self,
        config: MoEConfig,
        gate: Gate,
        *,
        num_local_experts: int,
        hidden_size: int,
        ffn_local_size: int,
        shares: int,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        """Build.

        Args:
            config: what the layer computes.
            gate: the activation's parameters.
            num_local_experts: E.
            hidden_size: D.
            ffn_local_size: F.
            shares: ranks that share an expert, whose results are summed: each adds its share of the last bias.
            dtype: of parameters and tokens.
            device: where the parameters live.

        Raises:
            MoeconvError: the backend computes other experts alone.
        """
        super().__init__()
        if config.gemm_backend == "te":
            raise MoeconvError("experts with biases and a clamped gate run on other grouped GEMMs than te; take auto")
        experts, width = num_local_experts, ffn_local_size

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

        self.gate_up, self.down = empty(experts, hidden_size, 2 * width), empty(experts, width, hidden_size)
        self.gate_up_bias, self.down_bias = empty(experts * 2 * width), empty(experts * hidden_size)
        self.gate_up_a: nn.Parameter | None = None
        self.gate_up_b: nn.Parameter | None = None
        self.down_a: nn.Parameter | None = None
        self.down_b: nn.Parameter | None = None
        self._forms: dict[str, Form] = {}
        self.fused = config.permute_fusion
        self._config, self._gate, self._shares, self._dtype = config, gate, shares, dtype
        self._gemm: tuple[torch.device, torch.dtype, GroupedGemm] | None = None

    @property
    def draws(self) -> bool:
        """Whether dropout of adapters draws random numbers."""
        return any(form.scaling.dropout > 0 for form in self._forms.values())

    def adapt(self, which: str, a: nn.Parameter, b: nn.Parameter, form: Form) -> None:
        """Add low-rank adapters.

        Args:
            which: beside `gate_up` or `down`.
            a: [E, rank, D] or [E, rank, F].
            b: [E, 2F, rank] or [E, D, rank].
            form: what they are beside their matrices.
        """
        setattr(self, f"{which}_a", a)
        setattr(self, f"{which}_b", b)
        self._forms[which] = form

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank."""
        return self.gate_up.shape[0]

    def gemm(self) -> GroupedGemm:
        """The backend for the device and dtype that the weights are in now."""
        key = (self.gate_up.device, computed_in(self.gate_up, self._dtype))
        if self._gemm is None or self._gemm[:2] != key:
            self._gemm = (*key, make_gemm(resolve_backend(self._config, *key)))
        return self._gemm[2]

    def plan(self, experts_TK: Tensor, max_rows: int, needed: Tensor | None = None) -> RowPlan:
        """Order choices of this rank's experts as the backend needs them; arguments as of `plan_rows`."""
        alignment = self.gemm().row_alignment
        args = (experts_TK, self.num_local_experts, max_rows)
        return plan_rows(*args, alignment=alignment, fused=self.fused, needed=needed)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            x_TD: [T, D] tokens.
            weights_TK: [T, K] routing weights.
            plan: which choice is which row.

        Returns:
            [T, D] in the dtype of x: this rank's summand, where several share an expert.
        """
        gemm, experts = self.gemm(), self.num_local_experts
        down_bias = self.down_bias.view(experts, -1)
        biases = (self.gate_up_bias.view(experts, -1), down_bias if self._shares == 1 else down_bias / self._shares)
        if not self._forms:
            matrices = (self.gate_up, self.down)
            return clamped_mlp(x_TD, weights_TK, matrices, biases, plan, self._gate, gemm, fused=self.fused)
        rows_RD, weights_R = permute(x_TD, weights_TK, plan, fused=self.fused)
        hidden = _apply(rows_RD, self.gate_up, biases[0], plan, gemm)
        hidden = self._adapted("gate_up", hidden, rows_RD, plan, gemm)
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        act = clamped_gate(wide, self._gate).to(hidden.dtype)
        out_RD = self._adapted("down", _apply(act, self.down, biases[1], plan, gemm), act, plan, gemm)
        return unpermute((out_RD * weights_R.unsqueeze(1)).to(out_RD.dtype), plan, fused=self.fused)

    def _adapted(self, which: str, out: Tensor, rows: Tensor, plan: RowPlan, gemm: GroupedGemm) -> Tensor:
        if which not in self._forms:
            return out
        adapters = Adapters(getattr(self, f"{which}_a"), getattr(self, f"{which}_b"), self._forms[which])
        return add_to_rows(out, rows, adapters, plan, gemm, training=self.training)


def _apply(rows: Tensor, weight: Weight, bias: Tensor, plan: RowPlan, gemm: GroupedGemm) -> Tensor:
    return cast(Tensor, _RowsTimes.apply(rows, weight, bias, plan, gemm))  # type: ignore[no-untyped-call]
