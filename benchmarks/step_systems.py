"""The systems that `benchmarks.train_step --peers` sets beside each other, with the same work on the same GPUs.

The work: a slice of a model with random weights, AdamW, gradients clipped, a balancing loss; several micro-batches of
sequences of 4096. `python -m benchmarks.step_systems SYSTEM MODEL NUM...` measures one system in this process, for one
or several numbers of micro-batches, and prints a line of JSON for each; under torchrun, ranks in a layout do it together.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.megatron_step import megatron
from benchmarks.step_work import MODELS, POSITIONS, Layout, MakeStep, Slice, Step, join_ranks


def runtime(
    model: Slice,
    layout: Layout,
    fp8: str | None = None,
    *,
    captures: bool = True,
    overlap: bool = False,
    tp_comm_overlap: bool = False,
    **options: Any,
) -> MakeStep:
    """This project's engine: bf16, fp32 masters, moments and gradient sums; CUDA graphs where the trainer takes them, and
    with `overlap` exchanges of rows hidden, with `tp_comm_overlap` gathers and sums of tensor parallelism."""
    from benchmarks.train_step import llama, make_engine, mixtral, text_batch
    from runtime.fp8.config import Fp8Config
    from runtime.parallel.degrees import ParallelConfig

    several = layout.world > 1
    if several:
        join_ranks()
    parallel = ParallelConfig(
        tp=layout.tp, sp=layout.tp > 1, ep=layout.ep, etp=1, use_distributed_optimizer=several,
        overlap_exchange=overlap,
        tp_comm_overlap=tp_comm_overlap,
    )  # fmt: skip

    sizes = asdict(model)
    experts, topk = sizes.pop("experts"), sizes.pop("topk")
    ours = mixtral(**sizes, experts=experts, topk=topk) if experts else llama(**sizes)
    if fp8 is not None:
        options["fp8"] = Fp8Config(format="hybrid", recipe=fp8)  # type: ignore[arg-type]
    engine = make_engine(
        ours,
        torch.bfloat16,
        torch.device("cuda", torch.cuda.current_device()),
        lr=1e-5,
        parallel=parallel,
        on_device=True,
        captures=captures and not several and fp8 is None,
        **options,
    )

    def make(num: int) -> Step:
        seeds = range(layout.data_rank, num * layout.data_ranks, layout.data_ranks)
        batches = [text_batch(model.vocab, layout.sequences, POSITIONS, seed) for seed in seeds]
        return lambda: engine.train_step(batches)

    return make


def transformers(model: Slice, layout: Layout, *, compiled: bool) -> MakeStep:
    """transformers on one GPU, in pure bf16: no masters, moments and gradients in bf16; fused AdamW, grouped_mm experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=model.layers, hidden_size=model.hidden, intermediate_size=model.ffn,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
        num_local_experts=model.experts, num_experts_per_tok=model.topk, vocab_size=model.vocab,
        max_position_embeddings=POSITIONS, output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        net = MixtralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    forward: Any = torch.compile(net) if compiled else net

    def make(num: int) -> Step:
        shape = (layout.sequences, POSITIONS)
        batches = [torch.randint(0, model.vocab, shape, device="cuda") for _ in range(num)]

        def step() -> float:
            for batch in batches:
                loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
                (loss / num).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss)

        return step

    return make


SYSTEMS: dict[str, Callable[[Slice, Layout], MakeStep]] = {
    "runtime": runtime,
    "runtime, no CUDA graphs": lambda *work: runtime(*work, captures=False),
    "runtime, overlap": lambda *work: runtime(*work, overlap=True),
    "runtime, tp-comm-overlap": lambda *work: runtime(*work, tp_comm_overlap=True),
    "runtime, bf16 moments": lambda *work: runtime(*work, moments_dtype="bfloat16"),
    "runtime, FP8 tensorwise": lambda *work: runtime(*work, "tensorwise"),
    "runtime, FP8 delayed": lambda *work: runtime(*work, "delayed"),
    "Megatron-Core": megatron,
    "Megatron-Core, overlap": lambda *work: megatron(*work, overlap=True),
    "Megatron-Core, FP8 tensorwise": lambda *work: megatron(*work, "tensorwise"),
    "Megatron-Core, FP8 delayed": lambda *work: megatron(*work, "delayed"),
    "Megatron-Core, FP8 blockwise": lambda *work: megatron(*work, "blockwise"),
    "transformers, compiled, pure bf16": lambda *work: transformers(*work, compiled=True),
    "transformers, pure bf16": lambda *work: transformers(*work, compiled=False),
}
PACKAGES = {"Megatron-Core": ("megatron-core", "transformer-engine"), "transformers": ("transformers",)}


def packages_of(system: str) -> list[str]:
    """What a system needs besides torch."""
    return [name for key, names in PACKAGES.items() if system.startswith(key) for name in names]


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _synchronize() -> None:
    """Wait for the device, and for all ranks."""
    torch.cuda.synchronize()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.cuda.synchronize()


def seconds_of(step: Step, repeats: int) -> float:
    """Mean time of a step in a row of them, as training runs them, after three that aren't counted."""
    for _ in range(3):
        step()
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def write_profile(step: Step, path: Path, title: str) -> None:
    """Write where the device's time of a step goes, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as prof:
        step()
        _synchronize()
    events = [e for e in prof.key_averages() if e.device_type.name == "CUDA" and not e.key.startswith("Optimizer.")]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    lines = [f"{title}: {total / 1e3:.1f} ms of kernels"]
    for e in events[:60]:
        time_us = e.self_device_time_total
        lines.append(f"{time_us / 1e3:8.2f} ms {time_us / total:6.1%} {e.count:5} x {e.key[:110]}")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure one system."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("numbers", type=int, nargs="+", help="micro-batches of a step")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write the kernels of a step there")
    for name, default in {"tp": 1, "ep": 1, "sequences": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, help="default: the model's slice")
    args = parser.parse_args()
    model, layout = MODELS[args.model], Layout(args.tp, args.ep, args.sequences)
    model = replace(model, layers=args.layers or model.layers)
    make = SYSTEMS[args.system](model, layout)
    state = torch.cuda.memory_allocated()
    for num in args.numbers:
        step = make(num)
        torch.cuda.reset_peak_memory_stats()
        tokens = num * layout.sequences * layout.data_ranks * POSITIONS
        seconds = seconds_of(step, 20 if num == 1 else 5)
        peak = torch.cuda.max_memory_allocated()
        line = {
            "system": args.system, "microbatches": num, "ms": seconds * 1e3, "tokens_per_second": tokens / seconds,
            "tflops": model.flops(tokens) / seconds / 1e12 / layout.world, "peak_gib": peak / 2**30,
            "above_start_gib": (peak - state) / 2**30,
        }  # fmt: skip
        if int(os.environ.get("RANK", "0")):
            continue  # all ranks take as long, and the first one tells
        print(json.dumps(line), flush=True)
        if args.profile is not None and layout.world == 1:
            name = "".join(c if c.isalnum() else "_" for c in args.system)
            write_profile(step, args.profile / f"{name}_{args.model}_{num}.txt", f"{args.system}, {num} micro-batches")


if __name__ == "__main__":
    main()
