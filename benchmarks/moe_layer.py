"""The MoE layer on one GPU beside the other ways to run it: speed, memory and error, in one table.

    python -m benchmarks.moe_layer [--shapes mixtral,olmoe,...] [--cases balanced,zipf,empty] [--rounds 3] [--pause 0]

Each implementation runs router (softmax, top-k, renormalise), dispatch, SwiGLU experts and weighted sum on the same
weights and tokens, bf16. Counted are the experts' FLOPs alone: 6 T K d n forward, 18 T K d n with backward.

A card at its power limit is as fast as it is cool, so each measurement is a median of `triton.testing.do_bench` after
WARMUP of the same work, implementations and a dense product are measured in rounds, each in another order, and the table
has the medians over the rounds; --pause lets the card rest before each measurement. A package that is not installed
leaves its row out and is named.
"""

from __future__ import annotations

import argparse
import functools
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.moe.config import MoEConfig
from runtime.moe.dispatch import run_local
from runtime.moe.experts import grouped_mlp
from runtime.moe.grouped_gemm import LoopGemm
from runtime.moe.layer import MoELayer
from runtime.moe.permutation import plan_rows
from runtime.moe.router_linear import router_linear
from runtime.moe.scoring import score_fused

SHAPES = {  # T, d, n, E, K
    "mixtral": (16384, 4096, 14336, 8, 2),
    "olmoe": (32768, 2048, 1024, 64, 8),
    "qwen3": (32768, 2048, 768, 128, 8),
    "wide": (32768, 4096, 1024, 128, 8),
    "small": (24576, 1536, 512, 64, 4),
}
CASES = ("balanced", "zipf", "empty")
WARMUP, REPEAT = 200, 300  # ms


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

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [self.x, self.router, self.w13, self.w2]


@dataclass
class Row:
    """What was measured of one implementation."""

    run: Callable[[Problem], Tensor]
    forward_ms: list[float] = field(default_factory=list)
    both_ms: list[float] = field(default_factory=list)
    peak_gib: float = float("nan")
    error: float = float("nan")


def make_problem(shape: tuple[int, int, int, int, int], case: str) -> Problem:
    """Draw a shape's weights and tokens, the same in every run."""
    num_tokens, hidden, width, num_experts, topk = shape
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
        w13=draw(num_experts, 2 * width, hidden, std=0.02),
        w2=draw(num_experts, hidden, width, std=0.02),
        topk=topk,
        bias=bias,
        biased=case != "balanced",
    )


def route(problem: Problem) -> tuple[Tensor, Tensor]:
    """The peers' router: softmax over the chosen experts in fp32."""
    logits = F.linear(problem.x, problem.router).float() + problem.bias
    values, experts = logits.topk(problem.topk, dim=-1)
    return experts, torch.softmax(values, dim=-1)


def experts_plain(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`F.grouped_mm` with torch operations around it."""
    topk = experts.shape[1]
    flat = experts.flatten()
    order = flat.argsort()
    counts = torch.zeros(w13.shape[0], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    offsets = counts.cumsum(0, dtype=torch.int32)
    rows = x[order // topk]
    gate, up = F.grouped_mm(rows, w13.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets)
    out = out * weights.flatten()[order].unsqueeze(1).to(out.dtype)
    return torch.zeros_like(x).index_add(0, order // topk, out)


def plain(problem: Problem) -> Tensor:
    """Route, and run the experts with plain operations."""
    experts, weights = route(problem)
    return experts_plain(problem.x, experts, weights, problem.w13, problem.w2)


def compiled() -> Callable[[Problem], Tensor]:
    """Give `plain` with its experts under torch.compile, for the shape that comes first."""
    torch._dynamo.reset()  # else a second shape is compiled for any size, which is slower
    function = torch.compile(experts_plain, dynamic=False)

    def run(problem: Problem) -> Tensor:
        experts, weights = route(problem)
        return function(problem.x, experts, weights, problem.w13, problem.w2)

    return run


def transformers_experts(problem: Problem) -> Callable[[Problem], Tensor]:
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


def transformer_engine(problem: Problem) -> Callable[[Problem], Tensor]:
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


def our_layer(problem: Problem, backend: str) -> Callable[[Problem], Tensor]:
    """Give the layer of the runtime on the same weights, with a backend."""
    num_experts, double, hidden = problem.w13.shape
    config = MoEConfig(num_experts=num_experts, topk=problem.topk, load_balancing=("none",), gemm_backend=backend)
    with torch.device("meta"):
        layer = MoELayer(config, hidden_size=hidden, ffn_hidden_size=double // 2, dtype=torch.bfloat16)
    layer.router.weight = torch.nn.Parameter(problem.router.detach())
    layer.experts.w13 = torch.nn.Parameter(problem.w13.detach())
    layer.experts.w2 = torch.nn.Parameter(problem.w2.detach())
    layer.router.reset_stats()
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


def reference_error(problem: Problem, run: Callable[[Problem], Tensor], *, exact_router: bool) -> float:
    """Relative error to fp64 of the output and the tokens' gradient (the larger), on the first 512 tokens.

    A choice of experts that a bf16 router makes otherwise is no error of the experts: the reference takes it over.
    """
    num_tokens = 512
    with torch.no_grad():
        small = Problem(
            x=problem.x[:num_tokens].detach().clone().requires_grad_(),
            grad=problem.grad[:num_tokens],
            router=problem.router,
            w13=problem.w13,
            w2=problem.w2,
            topk=problem.topk,
            bias=problem.bias,
            biased=problem.biased,
        )
    out = run(small)
    (grad_x,) = torch.autograd.grad(out, small.x, small.grad)
    leaf = small.x.detach().double().requires_grad_()
    logits = leaf @ small.router.detach().double().t() + small.bias.double()
    experts = logits.topk(small.topk, dim=-1).indices if exact_router else route(small)[0]
    weights = torch.softmax(logits.gather(1, experts), dim=-1)
    plan = plan_rows(experts, small.w13.shape[0], experts.numel(), fused=False)
    exact = grouped_mlp(
        leaf, weights, small.w13.detach().double(), small.w2.detach().double(), plan, LoopGemm(), fused=False
    )
    (exact_x,) = torch.autograd.grad(exact, leaf, small.grad.double())
    pairs = ((out.double(), exact), (grad_x.double(), exact_x))
    return max(float((mine - other).norm() / other.norm()) for mine, other in pairs)


def backward(problem: Problem, run: Callable[[Problem], Tensor]) -> None:
    """Run forward and backward, with gradients anew."""
    for leaf in problem.leaves:
        leaf.grad = None
    run(problem).backward(problem.grad)


def peak_memory(problem: Problem, run: Callable[[Problem], Tensor]) -> float:
    """Peak above weights and tokens in GiB, gradients included."""
    for leaf in problem.leaves:
        leaf.grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    backward(problem, run)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - base) / 2**30


def implementations(problem: Problem) -> dict[str, Row]:
    """Give what can run here, each warmed up; say what can't and why."""
    makers: dict[str, Callable[[], Callable[[Problem], Tensor]]] = {
        "ours (hopper)": lambda: our_layer(problem, "hopper"),
        "ours (torch)": lambda: our_layer(problem, "torch"),
        "transformers grouped_mm": lambda: transformers_experts(problem),
        "F.grouped_mm": lambda: plain,
        "F.grouped_mm + compile": compiled,
        "grouped_gemm": lambda: grouped_gemm,
        "Transformer Engine": lambda: transformer_engine(problem),
    }
    rows = {}
    for name, make in makers.items():
        try:
            run = make()
            backward(problem, run)
            backward(problem, run)
            rows[name] = Row(run=run)
        except Exception as error:  # a peer that is not installed or can't run the case
            print(f"  {name}: left out ({type(error).__name__}: {str(error)[:120]})")
    return rows


def measure(name: str, case: str, rounds: int, pause: float) -> None:
    """Measure one shape and case, implementations in turns, and print its table."""
    from triton.testing import do_bench

    shape = SHAPES[name]
    problem = make_problem(shape, case)
    flops = 6 * shape[0] * shape[4] * shape[1] * shape[2]
    rows = implementations(problem)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for label, row in rows.items():
        row.peak_gib = peak_memory(problem, row.run)
        row.error = reference_error(problem, row.run, exact_router=label.startswith("ours"))
    dense: list[float] = []

    def bench(function: Callable[[], object]) -> float:
        time.sleep(pause)
        return float(do_bench(function, warmup=WARMUP, rep=REPEAT, return_mode="median"))

    def forward(run: Callable[[Problem], Tensor]) -> None:
        with torch.no_grad():
            run(problem)

    def measure_row(row: Row) -> None:
        row.forward_ms.append(bench(lambda: forward(row.run)))
        row.both_ms.append(bench(lambda: backward(problem, row.run)))

    turns = [functools.partial(measure_row, row) for row in rows.values()]
    turns.append(lambda: dense.append(2 * 8192**3 / bench(lambda: left @ right) / 1e9))
    for index in range(rounds):
        for turn in random.Random(index).sample(turns, len(turns)):
            turn()
    print_table(name, case, flops, rows, statistics.median(dense))


def print_table(name: str, case: str, flops: int, rows: dict[str, Row], dense: float) -> None:
    """Print medians over the rounds, and ratios to the best peer and to a dense product."""
    peers = [statistics.median(row.both_ms) for label, row in rows.items() if not label.startswith("ours")]
    best = min(peers) if peers else float("nan")
    print(f"\n{name} {SHAPES[name]}, {case}; dense 8192^3 product {dense:.0f} TFLOP/s")
    print(f"  {'':24} {'fwd':>6} {'fwd+bwd':>8}  {'x best peer':>11} {'of dense':>8} {'GiB':>6} {'error':>8}")
    for label, row in rows.items():
        both = statistics.median(row.both_ms)
        rate = 3 * flops / both / 1e9
        print(
            f"  {label:24} {flops / statistics.median(row.forward_ms) / 1e9:6.0f} {rate:8.0f}  "
            f"{best / both:11.2f} {rate / dense:8.2f} {row.peak_gib:6.2f} {row.error:8.1e}"
        )


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--cases", default="balanced")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0, help="seconds of rest before each measurement")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA GPU\n")
    warnings.simplefilter("ignore")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name in args.shapes.split(","):
        for case in args.cases.split(","):
            measure(name, case, args.rounds, args.pause)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
