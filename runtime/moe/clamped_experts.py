"""Experts with biases, whose gate is clamped: gate * sigmoid(alpha * gate) * (up + 1).

Their matrices are kept as checkpoints of the family hold them, [in, out], with gate and up columns in turns.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeconv.errors import MoeconvError
from moeconv.families.compute import Gate
from runtime.moe.clamped_mlp import clamped_mlp
from runtime.moe.config import MoEConfig
from runtime.moe.grouped_gemm import GroupedGemm, computed_in, make_gemm, resolve_backend
from runtime.moe.low_rank import Adapters, Form
from runtime.moe.permutation import RowPlan, plan_rows


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
        return clamped_mlp(
            x_TD,
            weights_TK,
            (self.gate_up, self.down),
            biases,
            plan,
            self._gate,
            gemm,
            adapters=(self._adapters("gate_up"), self._adapters("down")),
            fused=self.fused,
            training=self.training,
        )

    def _adapters(self, which: str) -> Adapters | None:
        if which not in self._forms:
            return None
        return Adapters(getattr(self, f"{which}_a"), getattr(self, f"{which}_b"), self._forms[which])
