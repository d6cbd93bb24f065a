"""The layer with biases and a clamped gate (gpt-oss): ours, and its peers on the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_layer.implementations import Run, in_expert_order
from benchmarks.moe_layer.problem import Problem, route
from moeconv.families.compute import Gate, Router
from runtime.moe.clamped_mlp import clamped_gate
from runtime.moe.config import MoEConfig
from runtime.moe.layer import MoELayer


def experts_plain(
    x: Tensor, experts: Tensor, weights: Tensor, matrices: tuple[Tensor, Tensor], biases: tuple[Tensor, ...], gate: Gate
) -> Tensor:
    """`F.grouped_mm` with torch operations around it."""
    topk = experts.shape[1]
    order, offsets = in_expert_order(experts, matrices[0].shape[0])
    of_row = experts.flatten()[order]
    hidden = F.grouped_mm(x[order // topk], matrices[0], offs=offsets) + biases[0][of_row]
    out = F.grouped_mm(clamped_gate(hidden, gate), matrices[1], offs=offsets) + biases[1][of_row]
    out = out * weights.flatten()[order].unsqueeze(1).to(out.dtype)
    return torch.zeros_like(x).index_add(0, order // topk, out)


def plain(*, compiled: bool) -> Run:
    """Route, and run the experts with plain operations."""
    if compiled:
        torch._dynamo.reset()
    function = torch.compile(experts_plain, dynamic=False) if compiled else experts_plain

    def run(problem: Problem) -> Tensor:
        assert problem.gate is not None
        experts, weights = route(problem)
        return function(problem.x, experts, weights, (problem.w13, problem.w2), problem.expert_biases, problem.gate)

    return run


def transformers_experts(problem: Problem) -> Run:
    """transformers' gpt-oss experts with its grouped_mm implementation, on the same weights."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=problem.x.shape[1],
        intermediate_size=problem.w2.shape[1],
        num_local_experts=problem.w13.shape[0],
        num_experts_per_tok=problem.topk,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = GptOssExperts(config)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")

    def run(problem: Problem) -> Tensor:
        experts, weights = route(problem)
        for name, tensor in zip(names, (problem.w13, problem.w2, *problem.expert_biases), strict=True):
            module._parameters.pop(name, None)
            setattr(module, name, tensor)
        return module(problem.x, experts, weights.to(problem.x.dtype))

    return run


def our_layer(problem: Problem, backend: str) -> Run:
    """Give the layer of the runtime on the same weights, with a backend."""
    num_experts, hidden, double = problem.w13.shape
    router = Router(experts=num_experts, top_k=problem.topk, score="softmax", normalise=True)
    config = MoEConfig(router=router, load_balancing=("none",), gemm_backend=backend)
    with torch.device("meta"):
        layer = MoELayer(
            config, hidden_size=hidden, ffn_hidden_size=double // 2, dtype=torch.bfloat16, gate=problem.gate
        )
    layer.router.weight = torch.nn.Parameter(problem.router.detach())
    layer.reset_stats()
    flat = [bias.detach().flatten() for bias in problem.expert_biases]
    for name, tensor in zip(
        ("gate_up", "down", "gate_up_bias", "down_bias"), (problem.w13, problem.w2, *flat), strict=True
    ):
        layer.experts._parameters[name] = torch.nn.Parameter(tensor.detach())

    def run(problem: Problem) -> Tensor:
        layer.router._parameters["weight"] = problem.router
        parts = (problem.w13, problem.w2, *(bias.flatten() for bias in problem.expert_biases))
        for name, tensor in zip(("gate_up", "down", "gate_up_bias", "down_bias"), parts, strict=True):
            layer.experts._parameters[name] = tensor
        return layer(problem.x)

    return run


MAKERS: dict[str, Callable[[Problem], Run]] = {
    "ours (hopper)": lambda problem: our_layer(problem, "hopper"),
    "ours (torch)": lambda problem: our_layer(problem, "torch"),
    "transformers grouped_mm": transformers_experts,
    "F.grouped_mm": lambda _: plain(compiled=False),
    "F.grouped_mm + compile": lambda _: plain(compiled=True),
}
