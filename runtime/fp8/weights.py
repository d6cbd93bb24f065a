"""Weights in 8 bits, made once a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.fp8 import blocks
from runtime.fp8.operands import E4M3, Operand, Quantised, quantise_into, raise_amax, spans
from runtime.fp8.scaling import Scaling


class QuantisedWeights:
    """The 8-bit copies of one or several weights, one below the other, with one bound for each expert or scales of blocks."""

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
        if self._made is not None and (self._step == self._scaling.step or self._scaling.replayed):
            return self._made
        parts = [w if w.dim() == 3 else w.unsqueeze(0) for w in weights]
        blockwise = self._scaling.blockwise
        if self._made is None:
            num_experts, _, depth = parts[0].shape
            sizes = (num_experts, sum(part.shape[1] for part in parts), depth, parts[0].device)
            self._made = (blocks.empty_matrices if blockwise else _empty_matrices)(*sizes)
        (blocks.quantise_matrices if blockwise else _quantise_matrices)(parts, self._made)
        self._step = self._scaling.step
        return self._made


def _empty_matrices(num_experts: int, rows: int, depth: int, device: torch.device) -> Quantised:
    bound = torch.empty(num_experts, dtype=torch.float32, device=device)
    bits = [torch.empty(num_experts, *shape, dtype=E4M3, device=device) for shape in ((rows, depth), (depth, rows))]
    return Quantised(Operand(bits[0], bound), Operand(bits[1], bound))


def _quantise_matrices(parts_ENK: Sequence[Tensor], made: Quantised) -> None:
    rows, columns = made.rows, made.columns
    assert rows is not None
    assert columns is not None
    bound = rows.scale.zero_()
    for part in parts_ENK:
        raise_amax(part, bound)
    for part, (first, last) in zip(parts_ENK, spans(part.shape[1] for part in parts_ENK), strict=True):
        quantise_into(part, bound, rows.bits[:, first:last], columns.bits[:, :, first:last])
