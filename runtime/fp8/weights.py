"""Weights in 8 bits, made once a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.fp8.operands import E4M3, Quantised, quantise_into, raise_amax
from runtime.fp8.scaling import Scaling


class QuantisedWeights:
    """The 8-bit copies of one or several weights, one below the other, with one bound for each expert."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling
        self._step = -1
        self._made: Quantised | None = None

    @torch.no_grad()
    def of(self, weights: Sequence[Tensor]) -> Quantised:
        """Give the copies, made of the weights when they are first wanted in a step.

        Args:
            weights: [N, K] each, or one [E, N, K].

        Returns:
            Rows [E, N of all, K] and columns [E, K, N of all].
        """
        if self._made is not None and self._step == self._scaling.step:
            return self._made
        parts = [w if w.dim() == 3 else w.unsqueeze(0) for w in weights]
        num_experts, _, depth = parts[0].shape
        total, device = sum(part.shape[1] for part in parts), parts[0].device
        if self._made is None:
            self._made = Quantised(
                torch.empty(num_experts, total, depth, dtype=E4M3, device=device),
                torch.empty(num_experts, depth, total, dtype=E4M3, device=device),
                torch.empty(num_experts, dtype=torch.float32, device=device),
            )
        made, row = self._made, 0
        assert made.rows is not None
        assert made.columns is not None
        made.bound_G.zero_()
        for part in parts:
            raise_amax(part, made.bound_G)
        for part in parts:
            end = row + part.shape[1]
            quantise_into(part, made.bound_G, made.rows[:, row:end], made.columns[:, :, row:end])
            row = end
        self._step = self._scaling.step
        return made
