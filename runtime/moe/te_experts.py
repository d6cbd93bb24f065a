"""Experts through Transformer Engine: bf16, or FP8 with delayed, current or block scaling.

Legend: T tokens, K choices per token, E experts of this rank, D hidden size, F width of this rank's piece of an expert.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from runtime.fp8.config import Fp8Config
from runtime.kernels.transformer_engine import import_transformer_engine
from runtime.moe.passes import permute_tokens, swiglu_rows, unpermute
from runtime.moe.permutation import RowPlan


class TransformerEngineExperts:
    """Runs stacked weights through two `GroupedLinear`; the host waits once for the sizes of the groups.

    The modules hold FP8 state (scales, amax histories) only: their weights are views of ours, set before each run.
    """

    def __init__(self, config: Fp8Config | None, w13_EGD: Tensor, w2_EDF: Tensor) -> None:
        te = import_transformer_engine()
        self._fp8 = config is not None and config.format is not None
        self._recipe = _recipe(config) if config is not None and self._fp8 else None
        # FP8 products want rows in whole blocks of scales.
        self.row_alignment = 128 if self._fp8 else 1
        self._te = te
        self._linears = [self._empty_linear(weight) for weight in (w13_EGD, w2_EDF)]

    def _empty_linear(self, weight: Tensor) -> Any:
        num_experts, out_features, in_features = weight.shape
        linear = self._te.GroupedLinear(
            num_experts, in_features, out_features, bias=False, params_dtype=weight.dtype, device=weight.device
        )
        for expert in range(num_experts):
            del linear._parameters[f"weight{expert}"]
        return linear

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self._fp8:
            return contextlib.nullcontext()
        context: AbstractContextManager[Any] = self._te.autocast(enabled=True, recipe=self._recipe)
        return context

    def __call__(
        self, x_TD: Tensor, weights_TK: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, plan: RowPlan, *, fused: bool
    ) -> Tensor:
        """Each token's weighted sum over its experts; arguments as of `grouped_mlp`."""
        ends = plan.offsets_E.tolist()
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for linear, weight in zip(self._linears, (w13_EGD, w2_EDF), strict=True):
            for expert, view in enumerate(weight.unbind(0)):
                setattr(linear, f"weight{expert}", view)
        plan = replace(plan, slot_of_row_R=plan.slot_of_row_R[: ends[-1]])  # it takes no rows past the last expert
        rows = permute_tokens(x_TD, plan, fused=fused)
        with self._autocast():
            hidden = self._linears[0](rows, sizes)
        act = swiglu_rows(hidden, weights_TK, plan, fused=fused)
        with self._autocast():
            out = self._linears[1](act, sizes)
        return unpermute(out, plan, fused=fused)


def _recipe(config: Fp8Config) -> Any:
    from transformer_engine.common import recipe

    fp8_format = recipe.Format.HYBRID if config.format == "hybrid" else recipe.Format.E4M3
    recipes = {
        "delayed": recipe.DelayedScaling,
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
    }
    return recipes[config.recipe](fp8_format=fp8_format)
