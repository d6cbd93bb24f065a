"""The MoE layer on one GPU beside the other ways to run it: speed, memory and error, in one table.

    python -m benchmarks.moe_layer [--shapes mixtral,olmoe,...] [--cases balanced,zipf,empty] [--rounds 3] [--pause 0]

Each implementation runs router (softmax, top-k, renormalise), dispatch, SwiGLU experts and weighted sum on the same
weights and tokens, bf16; gpt-oss' with biases and its clamped gate. Counted are the experts' FLOPs alone: 6 T K d n forward, 18 T K d n with backward.

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

from benchmarks.moe_layer import clamped
from benchmarks.moe_layer.implementations import MAKERS, Run
from benchmarks.moe_layer.problem import CASES, SHAPES, Problem, make_problem, route
from runtime.moe.clamped_mlp import clamped_mlp
from runtime.moe.grouped_gemm import LoopGemm
from runtime.moe.grouped_mlp import grouped_mlp
from runtime.moe.permutation import plan_rows

WARMUP, REPEAT = 200, 300  # ms


@dataclass
class Row:
    """What was measured of one implementation."""

    run: Run
    forward_ms: list[float] = field(default_factory=list)
    both_ms: list[float] = field(default_factory=list)
    peak_gib: float = float("nan")
    error: float = float("nan")


def reference_error(problem: Problem, run: Run, *, exact_router: bool) -> float:
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
            gate=problem.gate,
            expert_biases=problem.expert_biases,
        )
    out = run(small)
    (grad_x,) = torch.autograd.grad(out, small.x, small.grad)
    leaf = small.x.detach().double().requires_grad_()
    logits = leaf @ small.router.detach().double().t() + small.bias.double()
    experts = logits.topk(small.topk, dim=-1).indices if exact_router else route(small)[0]
    weights = torch.softmax(logits.gather(1, experts), dim=-1)
    plan = plan_rows(experts, small.w13.shape[0], experts.numel(), fused=False)
    matrices = (small.w13.detach().double(), small.w2.detach().double())
    if small.gate is None:
        exact = grouped_mlp(leaf, weights, *matrices, plan, LoopGemm(), fused=False)
    else:
        first, last = (bias.detach().double() for bias in small.expert_biases)
        exact = clamped_mlp(leaf, weights, matrices, (first, last), plan, small.gate, LoopGemm(), fused=False)
    (exact_x,) = torch.autograd.grad(exact, leaf, small.grad.double())
    pairs = ((out.double(), exact), (grad_x.double(), exact_x))
    return max(float((mine - other).norm() / other.norm()) for mine, other in pairs)


def backward(problem: Problem, run: Run) -> None:
    """Run forward and backward, with gradients anew."""
    for leaf in problem.leaves:
        leaf.grad = None
    run(problem).backward(problem.grad)


def peak_memory(problem: Problem, run: Run) -> float:
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
    rows = {}
    for name, make in (MAKERS if problem.gate is None else clamped.MAKERS).items():
        try:
            run = make(problem)
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
    problem = make_problem(name, case)
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

    def forward(run: Run) -> None:
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
    shapes, cases = args.shapes.split(","), args.cases.split(",")
    for given, known in ((shapes, SHAPES), (cases, CASES)):
        if unknown := set(given).difference(known):
            parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA GPU\n")
    warnings.simplefilter("ignore")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name in shapes:
        for case in cases:
            measure(name, case, args.rounds, args.pause)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
