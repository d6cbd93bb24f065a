"""The systems that `benchmarks.train_step --peers` sets beside each other, with the same work on the same GPUs.

The work: a slice of a model with random weights, AdamW, gradients clipped, a balancing loss; several micro-batches of
sequences of 4096 random tokens, other ones on each data-parallel rank. `python -m benchmarks.step_systems SYSTEM MODEL NUM...` measures one
system in this process, for one or several numbers of micro-batches, and prints a line of JSON for each; under torchrun, ranks
in a layout do it together.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.host_profile import host_lines, host_of
from benchmarks.megatron_step import megatron
from benchmarks.step_profile import by_kind, device_of, lines_of, synchronize, write_lines
from benchmarks.step_work import MODELS, Layout, MakeStep, Slice, Step, Work, device_of_rank, join_ranks, model_of
from benchmarks.transformers_step import transformers
from runtime.job.processes import end_groups


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
    from benchmarks.train_step import llama, make_engine, mixtral, random_batch
    from runtime.fp8.config import Fp8Config
    from runtime.parallel.degrees import ParallelConfig

    several, device = layout.world > 1, device_of_rank()
    if several:
        join_ranks()
    parallel = ParallelConfig(
        tp=layout.tp, sp=layout.tp > 1, ep=layout.ep, etp=1, use_distributed_optimizer=several,
        overlap_exchange=overlap,
        tp_comm_overlap=tp_comm_overlap,
    )  # fmt: skip

    sizes = asdict(model)
    positions, experts, topk, hub = (sizes.pop(name) for name in ("positions", "experts", "topk", "hub"))
    if hub is not None:
        ours = model_of(hub, model.layers)
    else:
        ours = mixtral(**sizes, experts=experts, topk=topk) if experts else llama(**sizes)
    if fp8 is not None:
        kind = "e4m3" if fp8 == "blockwise" else "hybrid"  # as Megatron-Core's
        options["fp8"] = Fp8Config(format=kind, recipe=fp8)  # type: ignore[arg-type]
    engine = make_engine(
        ours,
        torch.bfloat16,
        device,
        lr=1e-5,
        parallel=parallel,
        on_device=True,
        captures=captures and device.type == "cuda",
        balanced=layout.balanced,
        **options,
    )

    def make(num: int) -> Step:
        seeds = range(layout.data_rank, num * layout.data_ranks, layout.data_ranks)
        batches = [random_batch(model.vocab, layout.sequences, positions, seed) for seed in seeds]
        return lambda: engine.train_step(batches)

    return make


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One of the systems."""

    make: Callable[[Slice, Layout], MakeStep]
    packages: tuple[str, ...] = ()
    """What it needs besides torch."""
    unfit: Callable[[Work], str | None] = lambda _: None
    """Why it has no place in a comparison, if it has none."""


def _exchanges(work: Work) -> str | None:
    if work.ep == 1:
        return "without expert parallelism there are no exchanges to overlap"
    return "one micro-batch has none beside it to overlap with" if max(work.numbers) == 1 else None


def _tensor(work: Work) -> str | None:
    return "without tensor parallelism there is nothing to overlap" if work.tp == 1 else None


def _alone(work: Work) -> str | None:
    if not work.slice.experts:
        return "set up for a mixture"
    if work.balanced and work.slice.hub is not None:
        return "balanced by Mixtral's router alone"
    return "on several GPUs its systems are those with EP in their name" if work.ranks > 1 else None


def _spread(work: Work) -> str | None:
    if not work.slice.experts or work.slice.hub is not None:
        return "set up for Mixtral's layers"
    return "expert parallelism needs ep of 2 or more" if work.ep == 1 else None


_MEGATRON, _TRANSFORMERS = ("megatron-core", "transformer-engine"), ("transformers",)


def _megatron(*options: str, unfit: Callable[[Work], str | None] = lambda _: None, **more: Any) -> System:
    def unlike(work: Work) -> str | None:
        return unfit(work) if work.slice.hub is None else "set up for Mixtral's and Llama's layers"

    return System(make=lambda *work: megatron(*work, *options, **more), packages=_MEGATRON, unfit=unlike)


def _transformers(unfit: Callable[[Work], str | None], **options: Any) -> System:
    return System(make=lambda *work: transformers(*work, **options), packages=_TRANSFORMERS, unfit=unfit)


SYSTEMS: dict[str, System] = {
    "runtime": System(make=runtime),
    "runtime, no CUDA graphs": System(make=lambda *work: runtime(*work, captures=False)),
    "runtime, overlap": System(make=lambda *work: runtime(*work, overlap=True), unfit=_exchanges),
    "runtime, tp-comm-overlap": System(make=lambda *work: runtime(*work, tp_comm_overlap=True), unfit=_tensor),
    "runtime, bf16 moments": System(make=lambda *work: runtime(*work, moments_dtype="bfloat16")),
    "runtime, FP8 tensorwise": System(make=lambda *work: runtime(*work, "tensorwise")),
    "runtime, FP8 delayed": System(make=lambda *work: runtime(*work, "delayed")),
    "runtime, FP8 blockwise": System(make=lambda *work: runtime(*work, "blockwise")),
    "Megatron-Core": _megatron(),
    "Megatron-Core, overlap": _megatron(overlap=True, unfit=_exchanges),
    "Megatron-Core, FP8 tensorwise": _megatron("tensorwise"),
    "Megatron-Core, FP8 delayed": _megatron("delayed"),
    "Megatron-Core, FP8 blockwise": _megatron("blockwise"),
    "transformers, compiled, pure bf16": _transformers(_alone, compiled=True),
    "transformers, pure bf16": _transformers(_alone, compiled=False),
    "transformers, EP and FSDP, compiled, pure bf16": _transformers(_spread, compiled=True, spread=True),
    "transformers, EP and FSDP, pure bf16": _transformers(_spread, compiled=False, spread=True),
}


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def seconds_of(step: Step, repeats: int) -> float:
    """Mean time of a step in a row of them, as training runs them, after four that aren't counted: in the fourth the last CUDA graph is captured."""
    for _ in range(4):
        step()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Measure one system, and take the ranks' groups apart."""
    measure()
    if torch.distributed.is_initialized():
        end_groups()


def measure() -> None:
    """Measure the system that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("numbers", type=int, nargs="+", help="micro-batches of a step")
    parser.add_argument("--kinds", action="store_true", help="tell where the device's time of a step goes, too")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="write the kernels of a step, and where the host's time goes, there, too",
    )
    for name, default in {"tp": 1, "ep": 1, "sequences": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, help="default: the model's slice")
    parser.add_argument("--balanced", action="store_true", help="each expert gets as many tokens")
    args = parser.parse_args()
    model, layout = MODELS[args.model], Layout(args.tp, args.ep, args.sequences, args.balanced)
    model = replace(model, layers=args.layers or model.layers)
    cuda = torch.cuda.is_available()
    make = SYSTEMS[args.system].make(model, layout)
    state = torch.cuda.memory_allocated() if cuda else 0
    for num in args.numbers:
        step = make(num)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        tokens = num * layout.sequences * layout.data_ranks * model.positions
        seconds = seconds_of(step, 20 if num == 1 else 5)
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        line: dict[str, Any] = {
            "system": args.system, "microbatches": num, "ms": seconds * 1e3, "tokens_per_second": tokens / seconds,
            "tflops": model.flops(tokens) / seconds / 1e12 / layout.world, "peak_gib": peak / 2**30,
            "above_start_gib": (peak - state) / 2**30,
        }  # fmt: skip
        tell(line)  # before the profile, which may fail
        if args.profile is not None or (cuda and args.kinds):
            device = device_of(step)
            if cuda:
                tell({"system": args.system, "microbatches": num, "kinds": by_kind(device.kernels)})
        if args.profile is not None:
            lines = lines_of(device, f"{args.system}, {num} micro-batches", parts=model.layers * num)
            lines += ["", *host_lines(host_of(step))]
            name = "".join(c if c.isalnum() else "_" for c in args.system)
            if layout.rank == 0:
                write_lines(lines, args.profile / f"{name}_{args.model}_{layout.world}_{num}.txt")


def tell(line: dict[str, Any]) -> None:
    """Print a line of JSON; all ranks take as long, and the first one tells."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
