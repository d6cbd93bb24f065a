"""What exchanges of rows cost the host, on one GPU that exchanges rows with itself over NCCL: `python -m benchmarks.exchanges`.

Layers of Qwen3-30B-A3B's sizes (no head norms), all weights, 8 micro-batches of 4096 tokens: experts without exchanges, with
exchanges whose numbers of rows the host reads, with room set aside for them, and these replayed as CUDA graphs. Nothing crosses a link, so
the difference is the launches, the waits, and the padding. `--model tiny` runs anywhere, and no figure of it says anything.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.step_profile import synchronize
from benchmarks.step_systems import seconds_of
from benchmarks.step_work import MODELS, device_of_rank
from benchmarks.train_step import make_engine, mixtral, text_batch
from runtime.engine import Engine
from runtime.job.processes import end_groups
from runtime.model.captured import CapturedModel
from runtime.moe.dispatch import run_all_to_all
from runtime.moe.layer import MoELayer, moe_layers, set_row_budget
from runtime.moe.row_budget import RowBudget


@contextmanager
def alone_together() -> Iterator[None]:
    """A job of this process alone, whose MoE layers send their rows off as those of several do."""
    device = device_of_rank()
    cuda = device.type == "cuda"

    def run(self: MoELayer, x_TD: Tensor, routing: Any, _: bool) -> Tensor:
        return run_all_to_all(self._dispatch(x_TD, routing, overlapped=False))

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(MoELayer, "_run_experts", run):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
            device_id=device if cuda else None,
        )
        try:
            yield
        finally:
            end_groups()


def exchange(engine: Engine, *, room: bool) -> None:
    """Have an engine's layers exchange rows over that job: with room set aside for them, or numbers read."""
    budget = RowBudget(engine.device) if room else None
    for layer in moe_layers(engine.module):
        layer.groups = replace(layer.groups, ep=dist.group.WORLD)
    set_row_budget(engine.module, budget)
    engine._budget = budget
    if isinstance(engine._runner, CapturedModel):
        engine._runner._budget = budget


@dataclass(frozen=True)
class Way:
    """One of the ways that are compared."""

    name: str
    exchanges: bool = True
    room: bool = False
    graphs: bool = False


WAYS = (
    Way("no exchanges", exchanges=False),
    Way("no exchanges, graphs", exchanges=False, graphs=True),
    Way("numbers of rows read"),
    Way("room set aside", room=True),
    Way("room set aside, graphs", room=True, graphs=True),
)


def measure(way: Way, name: str, num_microbatches: int, steps: int) -> tuple[float, float, float]:
    """Run steps.

    Returns:
        Milliseconds of a step, those that the host needs to launch its passes, and the peak in GB.
    """
    sizes, device = asdict(MODELS[name]), device_of_rank()
    del sizes["hub"]
    positions = sizes.pop("positions")
    captures = way.graphs and device.type == "cuda"
    engine = make_engine(mixtral(**sizes), torch.bfloat16, device, lr=1e-5, on_device=True, captures=captures)
    if way.exchanges:
        exchange(engine, room=way.room)
    batches = [text_batch(sizes["vocab"], 1, positions, seed) for seed in range(num_microbatches)]
    ms = seconds_of(lambda: engine.train_step(batches), steps) * 1e3
    begin = time.perf_counter()
    engine.accumulate(batches)
    host = (time.perf_counter() - begin) * 1e3
    synchronize()
    return ms, host, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(prog="benchmarks.exchanges", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", choices=("qwen3", "mixtral", "tiny"), default="qwen3")
    parser.add_argument("--numbers", type=int, default=8, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    device = device_of_rank()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: no figure says anything"
    print(f"{card}, torch {torch.__version__}\n\n| rows | ms a step | host, ms | peak GB |\n| --- | --- | --- | --- |")
    for way in WAYS:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if way.exchanges:
            with alone_together():
                found = measure(way, args.model, args.numbers, args.steps)
        else:
            found = measure(way, args.model, args.numbers, args.steps)
        print(f"| {way.name} | {found[0]:.1f} | {found[1]:.1f} | {found[2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
