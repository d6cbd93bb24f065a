"""What the layer's benchmark computes: shapes, cases, weights and tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeconv.families.compute import Gate

SHAPES = {  # T, d, n, E, K
    "mixtral": (16384, 4096, 14336, 8, 2),
    "olmoe": (32768, 2048, 1024, 64, 8),
    "qwen3": (32768, 2048, 768, 128, 8),
    "wide": (32768, 4096, 1024, 128, 8),
    "small": (24576, 1536, 512, 64, 4),
    "64 of 1280": (16384, 2560, 1280, 64, 4),
    "256 of 512": (16384, 2048, 512, 256, 8),
    "512 of 512": (16384, 2048, 512, 512, 10),
    "gpt-oss": (16384, 2880, 2880, 32, 4),
}
GATES = {"gpt-oss": Gate(alpha=1.702, limit=7.0)}
"""Shapes whose experts have biases and a clamped gate."""
CASES = ("balanced", "zipf", "empty")


@dataclass
class Problem:
    """One shape's weights and tokens; the router's weight makes the case's load."""

    x: Tensor
    grad: Tensor
    router: Tensor
    w13: Tensor
    w2: Tensor
    topk: int
    bias: Tensor
    """[E] added to the logits: zero, Zipf's law, or a large negative number for every fourth expert."""
    biased: bool = False
    gate: Gate | None = None
    """With it the matrices are [in, out], gate and up columns in turns."""
    expert_biases: tuple[Tensor, ...] = ()
    """With a gate, [E, 2F] and [E, D]."""

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [self.x, self.router, self.w13, self.w2, *self.expert_biases]


def make_problem(name: str, case: str) -> Problem:
    """Draw a shape's weights and tokens, the same in every run."""
    num_tokens, hidden, width, num_experts, topk = SHAPES[name]
    gate = GATES.get(name)
    torch.manual_seed(0)

    def draw(*size: int, std: float) -> Tensor:
        return (torch.randn(*size, device="cuda", dtype=torch.bfloat16) * std).requires_grad_()

    bias = torch.zeros(num_experts, device="cuda")
    if case == "zipf":
        bias = -torch.log(torch.arange(1, num_experts + 1, device="cuda").float())
    elif case == "empty":
        bias[::4] = -1e4
    grad = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    return Problem(
        x=draw(num_tokens, hidden, std=0.2),
        grad=grad,
        router=draw(num_experts, hidden, std=5 / hidden**0.5),
        w13=draw(num_experts, *((hidden, 2 * width) if gate else (2 * width, hidden)), std=0.02),
        w2=draw(num_experts, *((width, hidden) if gate else (hidden, width)), std=0.02),
        topk=topk,
        bias=bias,
        biased=case != "balanced",
        gate=gate,
        expert_biases=tuple(draw(num_experts, size, std=0.1) for size in (2 * width, hidden)) if gate else (),
    )


def route(problem: Problem) -> tuple[Tensor, Tensor]:
    """The peers' router: softmax over the chosen experts in fp32."""
    logits = F.linear(problem.x, problem.router).float() + problem.bias
    values, experts = logits.topk(problem.topk, dim=-1)
    return experts, torch.softmax(values, dim=-1)
