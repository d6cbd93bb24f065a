"""Experts with biases and a clamped gate, against their definition written token by token."""

import pytest
import torch
from torch import Tensor

from moeconv.families.compute import Gate
from runtime.moe.clamped_mlp import clamped_mlp
from runtime.moe.grouped_gemm import LoopGemm
from runtime.moe.permutation import plan_rows

TOKENS, HIDDEN, WIDTH, EXPERTS, TOPK = 23, 6, 5, 4, 2
GATE = Gate(alpha=1.702, limit=0.8)


def by_token(x: Tensor, weights: Tensor, experts: Tensor, matrices: list[Tensor], biases: list[Tensor]) -> Tensor:
    """The definition, by autograd."""
    out = []
    for token in range(TOKENS):
        total = torch.zeros_like(x[token])
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            if expert == EXPERTS:
                continue  # dropped
            hidden = x[token] @ matrices[0][expert] + biases[0][expert]
            gate, up = hidden[::2].clamp(max=GATE.limit), hidden[1::2].clamp(-GATE.limit, GATE.limit)
            act = (up + 1) * gate * torch.sigmoid(GATE.alpha * gate)
            total = total + weight * (act @ matrices[1][expert] + biases[1][expert])
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("dropped", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alignment", [1, 16])
def test_clamped_experts(dropped: float, alignment: int) -> None:
    """The output and the gradients of tokens, weights, matrices and biases, in fp64."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    experts = torch.rand(TOKENS, EXPERTS - 1).topk(TOPK, -1).indices  # the last expert has none
    experts = experts.masked_fill(torch.rand(TOKENS, TOPK) < dropped, EXPERTS)
    x, weights = draw(TOKENS, HIDDEN), draw(TOKENS, TOPK)
    matrices = [draw(EXPERTS, HIDDEN, 2 * WIDTH), draw(EXPERTS, WIDTH, HIDDEN)]
    biases = [draw(EXPERTS, 2 * WIDTH), draw(EXPERTS, HIDDEN)]
    leaves = [x, weights, *matrices, *biases]
    grad = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    plan = plan_rows(experts, EXPERTS, experts.numel(), alignment=alignment, fused=False)
    out = clamped_mlp(
        x, weights, (matrices[0], matrices[1]), (biases[0], biases[1]), plan, GATE, LoopGemm(), fused=False
    )
    mine = torch.autograd.grad(out, leaves, grad)
    exact = by_token(x, weights, experts, matrices, biases) + 0 * sum(leaf.sum() for leaf in leaves)
    other = torch.autograd.grad(exact, leaves, grad)
    torch.testing.assert_close(out, exact)
    for left, right in zip(mine, other, strict=True):
        torch.testing.assert_close(left, right)
