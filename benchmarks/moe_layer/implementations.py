"""The ways to run the layer that the benchmark sets side by side: ours, and its peers on the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_layer.problem import Problem, route
from moeconv.families.compute import Router
from runtime.moe.config import MoEConfig
from runtime.moe.dispatch import run_local
from runtime.moe.layer import MoELayer
from runtime.moe.router_linear import router_linear
from runtime.moe.scoring import score_fused

Run = Callable[[Problem], Tensor]


def in_expert_order(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices in the order of their experts, and where each expert's end."""
    flat = experts.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=experts.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return flat.argsort(), counts.cumsum(0, dtype=torch.int32)


def experts_plain(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`F.grouped_mm` with torch operations around it."""
    topk = experts.shape[1]
    order, offsets = in_expert_order(experts, w13.shape[0])
    rows = x[order // topk]
    gate, up = F.grouped_mm(rows, w13.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets)
    out = out * weights.flatten()[order].unsqueeze(1).to(out.dtype)
    return torch.zeros_like(x).index_add(0, order // topk, out)


def plain(problem: Problem) -> Tensor:
    """Route, and run the experts with plain operations."""
    experts, weights = route(problem)
    return experts_plain(problem.x, experts, weights, problem.w13, problem.w2)


def compiled() -> Run:
    """Give `plain` with its experts under torch.compile, for the shape that comes first."""
    torch._dynamo.reset()  # else a second shape is compiled for any size, which is slower
    function = torch.compile(experts_plain, dynamic=False)

    def run(problem: Problem) -> Tensor:
        experts, weights = route(problem)
        return function(problem.x, experts, weights, problem.w13, problem.w2)

    return run


def transformers_experts(problem: Problem) -> Run:
    """transformers' Mixtral experts with its grouped_mm implementation, on the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=problem.x.shape[1],
        intermediate_size=problem.w2.shape[2],
        num_local_experts=problem.w13.shape[0],
        num_experts_per_tok=problem.topk,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = torch.nn.Parameter(problem.w13.detach())
    module.down_proj = torch.nn.Parameter(problem.w2.detach())

    def run(problem: Problem) -> Tensor:
        experts, weights = route(problem)
        for name, tensor in (("gate_up_proj", problem.w13), ("down_proj", problem.w2)):
            module._parameters.pop(name, None)
            setattr(module, name, tensor)
        return module(problem.x, experts, weights.to(problem.x.dtype))

    return run


def grouped_gemm(problem: Problem) -> Tensor:
    """The grouped_gemm package with torch operations around it; it wants the sizes on the host."""
    import grouped_gemm.ops as ops

    experts, weights = route(problem)
    order = experts.flatten().argsort()
    sizes = experts.flatten().bincount(minlength=problem.w13.shape[0]).cpu()
    rows = problem.x[order // problem.topk]
    gate, up = ops.gmm(rows, problem.w13, sizes, trans_b=True).chunk(2, dim=-1)
    out = ops.gmm(F.silu(gate) * up, problem.w2, sizes, trans_b=True)
    out = out * weights.flatten()[order].unsqueeze(1).to(out.dtype)
    return torch.zeros_like(problem.x).index_add(0, order // problem.topk, out)


def transformer_engine(problem: Problem) -> Run:
    """GroupedLinear between moe_permute and moe_unpermute."""
    import transformer_engine.pytorch as te

    num_experts, double, hidden = problem.w13.shape
    options = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
    first = te.GroupedLinear(num_experts, hidden, double, **options)
    second = te.GroupedLinear(num_experts, double // 2, hidden, **options)
    for module in (first, second):
        for expert in range(num_experts):
            del module._parameters[f"weight{expert}"]

    def run(problem: Problem) -> Tensor:
        experts, weights = route(problem)
        for module, stack in ((first, problem.w13), (second, problem.w2)):
            for expert, view in enumerate(stack.unbind(0)):
                setattr(module, f"weight{expert}", view)
        sizes = experts.flatten().bincount(minlength=num_experts).tolist()
        rows, row_map = te.moe_permute(problem.x, experts.int(), num_out_tokens=experts.numel(), map_type="index")
        gate, up = first(rows, sizes).chunk(2, dim=-1)
        out = second(F.silu(gate) * up, sizes)
        return te.moe_unpermute(out, row_map, weights, map_type="index")

    return run


def our_layer(problem: Problem, backend: str) -> Run:
    """Give the layer of the runtime on the same weights, with a backend."""
    num_experts, double, hidden = problem.w13.shape
    router = Router(experts=num_experts, top_k=problem.topk, score="softmax", normalise=True)
    config = MoEConfig(router=router, load_balancing=("none",), gemm_backend=backend)
    with torch.device("meta"):
        layer = MoELayer(config, hidden_size=hidden, ffn_hidden_size=double // 2, dtype=torch.bfloat16)
    layer.router.weight = torch.nn.Parameter(problem.router.detach())
    layer.experts.w13 = torch.nn.Parameter(problem.w13.detach())
    layer.experts.w2 = torch.nn.Parameter(problem.w2.detach())
    layer.reset_stats()
    names = ((layer.router, "weight", "router"), (layer.experts, "w13", "w13"), (layer.experts, "w2", "w2"))

    def run(problem: Problem) -> Tensor:
        for module, name, source in names:
            module._parameters[name] = getattr(problem, source)
        return biased(problem) if problem.biased else layer(problem.x)

    def biased(problem: Problem) -> Tensor:
        # The case's bias stands for a router that learnt it: it goes through the same kernels after the projection.
        logits = router_linear(problem.x, problem.router, torch.float32) + problem.bias
        return run_local(problem.x, score_fused(logits, config).routing, layer.experts)

    return run


MAKERS: dict[str, Callable[[Problem], Run]] = {
    "ours (hopper)": lambda problem: our_layer(problem, "hopper"),
    "ours (torch)": lambda problem: our_layer(problem, "torch"),
    "transformers grouped_mm": transformers_experts,
    "F.grouped_mm": lambda _: plain,
    "F.grouped_mm + compile": lambda _: compiled(),
    "grouped_gemm": lambda _: grouped_gemm,
    "Transformer Engine": transformer_engine,
}
