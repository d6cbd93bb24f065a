"""Independent fp64 computations that the MoE layer is held against: a token at a time, an expert at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A routing as [T, E] weights and [T, E] bool, as Megatron states it."""
    num_tokens = experts_TK.shape[0]
    weights = weights_TK.new_zeros(num_tokens, num_experts + 1).scatter(1, experts_TK, weights_TK)
    chosen = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool).scatter(1, experts_TK, True)
    return weights[:, :num_experts], chosen[:, :num_experts]


def moe_output(x_TD: Tensor, weights_TE: Tensor, w13_EGD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Every expert on every token, weighted: no permutation, no grouping."""
    out = torch.zeros_like(x_TD)
    for expert in range(weights_TE.shape[1]):
        gate, up = (x_TD @ w13_EGD[expert].t()).chunk(2, dim=1)
        out = out + weights_TE[:, expert : expert + 1] * ((F.silu(gate) * up) @ w2_EDF[expert].t())
    return out


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; NaN stays NaN and fails every bound."""
    actual, expected = actual.detach(), expected.detach().double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))
