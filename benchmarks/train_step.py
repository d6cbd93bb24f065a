"""Train a small Mixtral on one device and say where time and memory go: `python -m benchmarks.train_step [options]`.

Prints tokens a second, model FLOPs utilisation, memory by kind, and the top of a profile; and, with --compare, the loss
curves in bf16 and FP8 on the device beside fp32 on the CPU, of a smaller model on the same data.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.host_profile import host_lines, host_of
from benchmarks.multi_gpu.job import draw_weights
from benchmarks.step_profile import device_of, lines_of
from benchmarks.step_systems import SYSTEMS
from benchmarks.step_work import MODELS
from moeconv.families import FAMILIES
from moeconv.families.base import Model
from moeconv.layout.rect import Rect
from runtime.data.batch import Batch
from runtime.engine import Engine
from runtime.fp8.config import Fp8Config, Fp8Recipe
from runtime.model.context import TORCH_DTYPES
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh

FP8_RECIPES: tuple[Fp8Recipe, ...] = ("tensorwise", "delayed", "blockwise")
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def mixtral(
    *,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    experts: int = 8,
    topk: int = 2,
) -> Model:
    """A Mixtral with these sizes."""
    config = {
        "model_type": "mixtral", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": ffn, "vocab_size": vocab,
        "num_local_experts": experts, "num_experts_per_tok": topk,
    }  # fmt: skip
    return Model.from_config(FAMILIES["mixtral"], config)


def llama(*, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int) -> Model:
    """A dense Llama with these sizes."""
    config = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": ffn, "vocab_size": vocab,
    }  # fmt: skip
    return Model.from_config(FAMILIES["llama"], config)


def make_engine(
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    lr: float,
    granularity: Any = "none",
    *,
    parallel: ParallelConfig | None = None,
    on_device: bool = False,
    fp8: Fp8Config | None = None,
    captures: bool = False,
    balanced: bool = False,
    **optim_options: Any,
) -> Engine:
    """Build an engine with random weights: such that depend on names alone, or quickly on the device."""
    parallel = parallel or ParallelConfig()
    router = model.compute.router
    routed = {"aux_loss_coeff": (0.01,), "force_load_balancing": balanced}
    moe = MoEConfig(router=router, **routed) if router is not None else None
    optim, recompute = OptimConfig(lr=lr, **optim_options), RecomputeConfig(granularity=granularity)
    mesh = ParallelMesh(parallel)
    engine = Engine(model, dtype, parallel, moe, optim, recompute, mesh, device, fp8=fp8, captures=captures)
    if not on_device:
        engine.load_state(random_weights())
        return engine
    draw_weights(engine)
    return engine


def random_weights() -> Callable[[str, Rect], np.ndarray[Any, Any]]:
    """Read rectangles of weights that are made when asked for; norms are 1."""
    pool = np.random.default_rng(0).standard_normal(1_000_003, np.float32) * np.float32(0.02)

    def read(name: str, rect: Rect) -> np.ndarray[Any, Any]:
        if "norm" in name:
            return np.ones(rect.shape, np.float32)
        shift = int.from_bytes(name.encode(), "little") % len(pool)
        return np.resize(np.roll(pool, shift), rect.shape)

    return read


def flops_per_token(model: Model, positions: int) -> float:
    """Forward and backward, without recomputation: 6 for each active weight, and causal attention."""
    sizes = model.sizes
    hidden, attention = sizes["hidden"], sizes["heads"] * sizes["head_dim"]
    layer = hidden * (2 * attention + 2 * sizes["kv_heads"] * sizes["head_dim"])
    layer += 3 * sizes["top_k"] * hidden * sizes["ffn"] + hidden * sizes["experts"]
    weights = sizes["layers"] * layer + hidden * sizes["vocab"]
    return 6.0 * weights + 6.0 * sizes["layers"] * positions * attention


def text_batch(vocab: int, batch: int, positions: int, step: int) -> Batch:
    """Sequences with structure to learn: each token follows from the two before it, with some noise."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(vocab, size=(batch, positions + 1))
    for place in range(2, positions + 1):
        rule = (tokens[:, place - 1] * 3 + tokens[:, place - 2]) % min(vocab, 97)
        tokens[:, place] = np.where(rng.random(batch) < 0.9, rule, tokens[:, place])
    data = torch.from_numpy(tokens)
    return Batch(tokens=data[:, :-1].contiguous(), labels=data[:, 1:].contiguous())


def random_batch(vocab: int, batch: int, positions: int, seed: int) -> Batch:
    """Sequences without structure, which routers send wherever their weights happen to."""
    tokens = torch.randint(vocab, (batch, positions + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())


def compare(device: torch.device, num_steps: int) -> None:
    """Print the loss curve of fp32 on the CPU beside bf16 on the device: plain, with moments in bf16, and with FP8."""
    model = mixtral(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=512)

    def curve(dtype: torch.dtype, where: torch.device, **options: Any) -> list[float]:
        engine = make_engine(model, dtype, where, lr=1e-3, **options)
        return [engine.train_step([text_batch(512, 8, 128, s)]).lm_loss for s in range(num_steps)]

    exact = curve(torch.float32, torch.device("cpu"))
    kinds: dict[str, dict[str, Any]] = {"bf16": {}, "bf16 moments": {"moments_dtype": "bfloat16"}}
    kinds |= {
        f"FP8 {recipe}, {kind}": {"fp8": Fp8Config(format=kind, recipe=recipe)}
        for recipe in FP8_RECIPES
        for kind in ("hybrid", "e4m3")
    }
    curves = {name: curve(torch.bfloat16, device, **options) for name, options in kinds.items()}
    print(f"| step | fp32, CPU | {' | '.join(curves)} |\n| --- |{' --- |' * (len(curves) + 1)}")
    for step in range(0, num_steps, max(1, num_steps // 10)):
        print(f"| {step} | {exact[step]:.4f} | " + " | ".join(f"{found[step]:.4f}" for found in curves.values()) + " |")
    worst = [max(abs(b - a) / a for a, b in zip(exact, found, strict=True)) for found in curves.values()]
    print("| largest relative difference | | " + " | ".join(f"{value:.4f}" for value in worst) + " |\n")


def measure(model: Model, args: argparse.Namespace, device: torch.device) -> None:
    """Print speed, memory and profile of one model."""
    cuda = device.type == "cuda"
    fp8 = Fp8Config(format="hybrid", recipe=args.fp8) if args.fp8 else None
    engine = make_engine(model, TORCH_DTYPES[args.dtype], device, lr=1e-4, granularity=args.recompute, fp8=fp8)
    batches = [text_batch(model.sizes["vocab"], args.batch, args.positions, s) for s in range(args.microbatches)]
    times = []
    for step in range(args.steps + 2):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = engine.train_step(batches)  # ends with a read of the device
        if cuda:
            torch.cuda.synchronize()
        if step >= 2:
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    tokens = args.batch * args.positions * args.microbatches
    tflops = flops_per_token(model, args.positions) * tokens / seconds / 1e12
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    share = f" ({tflops / peak:.1%} of {peak:.0f} dense bf16)" if peak else ""
    print(f"{name}: {model.sizes['layers']} layers, {args.dtype}, {tokens} tokens a step, loss {result.lm_loss:.3f}")
    print(f"{seconds * 1e3:.1f} ms a step (spread {min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}), "
          f"{tokens / seconds:,.0f} tokens/s, {tflops:.0f} model TFLOP/s{share}")  # fmt: skip
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory_by_kind(engine).items())
    print(f"memory, GB: {sizes}")
    if args.profile:
        profile(engine, batches)


def memory_by_kind(engine: Engine) -> dict[str, int]:
    """Count this rank's bytes; what is at the peak beside the rest is known on a GPU only."""
    shards = engine.store.shards
    weights = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    masters = sum(s.master.numel() * s.master.element_size() for s in shards if s.separate_master)
    # A bucket keeps its gradients whole, also where it updates a shard only.
    held = [getattr(s, "grads", s.grad_shard) for s in shards]
    grads = sum(grad.numel() * grad.element_size() for grad in held)
    optimizer = engine.optimizer
    moments = sum(optimizer.state(s, name).nbytes for s in engine.trained for name in optimizer.states(s))
    kinds = {"weights": weights, "gradients": grads, "masters": masters, "moments": moments}
    if engine.device.type == "cuda":
        kinds["activations and buffers at the peak"] = torch.cuda.max_memory_allocated() - sum(kinds.values())
    return kinds


def profile(engine: Engine, batches: list[Batch]) -> None:
    """Print what takes the device and the host the most time."""
    parts = engine.context.model.sizes["layers"] * len(batches)

    def step() -> object:
        return engine.train_step(batches)

    print("\n".join([*lines_of(device_of(step), "a step", 30, parts), "", *host_lines(host_of(step), 30)]))


def compare_systems(args: argparse.Namespace) -> None:
    """Set systems beside each other, in one layout after another."""
    from benchmarks.peers import compare
    from benchmarks.step_work import Work

    for layout in args.layout:
        shares = (args.ranks, layout, args.sequences, args.numbers)
        work = Work.of(args.model, args.layers, *shares, balanced=args.balanced)
        systems = args.peers or None
        if args.fp8:
            both = [f"{name}, FP8 {args.fp8}" for name in ("runtime", "Megatron-Core")]
            systems = [*(args.peers or ["runtime"]), *both]
        text, _ = compare(work, systems, args.rounds, args.profile_to)
        print(text, flush=True)


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="default: 6; with --peers, the model's slice")
    sizes = {"hidden": 2048, "ffn": 7168, "batch": 2, "positions": 4096, "microbatches": 1, "steps": 8}
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--fp8", choices=FP8_RECIPES, help="in FP8; with --peers, runtime's and Megatron-Core's besides"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--compare", type=int, default=0, metavar="STEPS")
    parser.add_argument("--peers", nargs="*", choices=SYSTEMS, help="set systems beside each other; none named: all")
    parser.add_argument("--model", default="mixtral", choices=MODELS, help="with --peers: layers of which model")
    parser.add_argument("--rounds", type=int, default=3, help="with --peers")
    parser.add_argument("--numbers", type=int, nargs="+", default=[8, 1], help="with --peers: micro-batches of a step")
    parser.add_argument(
        "--profile-to",
        type=Path,
        metavar="FOLDER",
        help="with --peers: write the kernels of a step, and where the host's time goes, there",
    )
    parser.add_argument("--ranks", type=int, default=1, help="with --peers: GPUs")
    parser.add_argument("--layout", nargs="+", default=[""], help="with --ranks: such as 'ep4' 'tp2 ep2' 'dp4'")
    parser.add_argument("--sequences", type=int, default=2, help="with --peers: of a micro-batch")
    parser.add_argument("--balanced", action="store_true", help="with --peers: each expert gets as many tokens")
    args = parser.parse_args()
    if args.peers is not None:
        compare_systems(args)
        return
    args.layers = args.layers or 6
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.compare:
        compare(device, args.compare)
    heads, kv_heads = args.hidden // 128 or 1, max(1, args.hidden // 512)
    model = mixtral(
        hidden=args.hidden, layers=args.layers, heads=heads, kv_heads=kv_heads, head_dim=128, ffn=args.ffn, vocab=32000
    )
    if args.steps:
        measure(model, args, device)


if __name__ == "__main__":
    main()
