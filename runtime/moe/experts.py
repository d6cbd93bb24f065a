"""The experts of a rank: their weights, and what computes with them.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeconv.errors import MoeconvError
from runtime.fp8.scaling import Scaling
from runtime.moe.config import MoEConfig
from runtime.moe.fp8_block_experts import BlockExperts
from runtime.moe.fp8_experts import Fp8Experts
from runtime.moe.grouped_gemm import GroupedGemm, computed_in, make_gemm, resolve_backend
from runtime.moe.grouped_mlp import grouped_mlp
from runtime.moe.low_rank import Adapters, Form
from runtime.moe.permutation import RowPlan, plan_rows
from runtime.moe.te_experts import TransformerEngineExperts

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
        kind = BlockExperts if fp8 is not None and fp8.blockwise else Fp8Experts
        self._fp8 = None if fp8 is None else kind(fp8, self.w13.device, name)
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
        adapters = (self._adapters("13"), self._adapters("2"))
        args = (x_TD, weights_TK, self.w13, self.w2, plan, gemm)
        return grouped_mlp(*args, adapters=adapters, fused=self.fused, training=self.training)
