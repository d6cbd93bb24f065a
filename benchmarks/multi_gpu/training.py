"""A training step of one layout: speed, memory by kind, and what its communication costs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.multi_gpu.job import Job, Task, draw_weights
from benchmarks.multi_gpu.sizes import common_layers, global_batch, layers_that_fit, num_parameters
from benchmarks.multi_gpu.traffic import all_to_all_floor, profile
from benchmarks.train_step import PEAK_TFLOPS, flops_per_token, memory_by_kind
from runtime.data.batch import Batch
from runtime.engine import Engine, StepResult
from runtime.estimate.local import local_sizes
from runtime.estimate.machine import find_machine
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parity.case import own_share

QUICK_LAYERS = 2


def choose_layers(task: Task, job: Job) -> int:
    """The depth that a task asks for: one that every layout of `options["fits"]` GPUs holds, or all that this one holds."""
    if not job.memory:
        return QUICK_LAYERS
    if task.options["layers"] == "own":
        return layers_that_fit(job.sizes, ParallelConfig(**task.parallel), task.world, job.memory)
    return common_layers(job.sizes, task.options["fits"], job.memory)


def training(task: Task, job: Job) -> dict[str, Any] | None:
    """Train a few steps, all ranks together.

    Args:
        task: the layout; options: `layers` and `fits` as `choose_layers` takes them, `sequences` of a step, and
            whether to `profile` one step.
        job: where.

    Returns:
        The row of the table; None if this layout would hold no more layers than were measured already.
    """
    layers = choose_layers(task, job)
    if task.options["layers"] == "own" and layers <= common_layers(job.sizes, task.world, job.memory):
        return None
    engine, mesh = job.engine(task, layers)
    draw_weights(engine)
    sequences = task.options["sequences"]
    batches = own_share(global_batch(job.sizes, sequences, 0), mesh)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, result = _time_steps(engine, batches, job)
    tokens = sequences * job.sizes.positions
    flops = flops_per_token(job.sizes.model(layers), job.sizes.positions)
    tflops = flops * tokens / seconds / 1e12 / task.world
    peak = _peak(job)
    kinds = memory_by_kind(engine)
    out: dict[str, Any] = {
        "layers": layers,
        "parameters": num_parameters(job.sizes, layers),
        "tokens": tokens,
        "ms": seconds * 1e3,
        "tokens_per_second": tokens / seconds,
        "tflops_per_gpu": tflops,
        "utilization": tflops / peak if peak else None,
        "fullest": None if result.expert_load is None else _fullest(result.expert_load, task),
        "memory_gb": {name: max(job.everyone(size)) / 1e9 for name, size in kinds.items()},
        "loss": result.lm_loss,
    }
    if task.options.get("profile"):
        out["overlap"] = profile(lambda: engine.train_step(batches), job)
        rows = local_sizes(job.setup(task, layers), find_machine("h100"), 1.0).departing
        out["exchange"] = _exchange(out["overlap"], mesh, len(batches) * layers, int(rows), job)
    return out


def _time_steps(engine: Engine, batches: list[Batch], job: Job) -> tuple[float, StepResult]:
    """The median of a few steps after the first ones, the slowest rank's; and what the last step reported."""
    times = []
    for step in range(job.sizes.warmup + job.sizes.steps):
        job.synchronize()
        start = time.perf_counter()
        result = engine.train_step(batches)
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        if step >= job.sizes.warmup:
            times.append(time.perf_counter() - start)
    return max(job.everyone(statistics.median(times))), result


def _peak(job: Job) -> float | None:
    if job.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(job.device)
    return next((value for key, value in PEAK_TFLOPS.items() if key in name), None)


def _fullest(load_LE: Tensor, task: Task) -> float:
    """Choices that the fullest rank of a layer gets, of the mean; mean over layers."""
    ep = task.parallel.get("ep", 1)
    ranks = load_LE.view(load_LE.shape[0], ep, -1).sum(2).double()
    return float((ranks.max(1).values / ranks.mean(1)).mean())


def _exchange(
    overlap: dict[str, Any] | None, mesh: ParallelMesh, num_passes: int, num_rows: int, job: Job
) -> dict[str, float | None] | None:
    """A layer's four exchanges of rows (there and back, forward and backward) beside four with nothing else to do.

    The step's are all of NCCL's sends and receives: waits for slower ranks count as well. With stages they would count
    what passes between these, too, so the step's are left out.
    """
    group = mesh.group("ep")
    if group is None:
        return None
    dtype = getattr(torch, job.sizes.dtype)
    floor = all_to_all_floor(num_rows, job.sizes.hidden, dtype, group, job)
    kinds = overlap["kinds"] if overlap is not None and mesh.size("pp") == 1 else {}
    in_step = kinds["SendRecv"]["ms"] / num_passes if "SendRecv" in kinds else None
    return {"mb": floor["mb"], "gb_s": floor["gb_s"], "floor_ms": 4 * floor["ms"], "in_step_ms": in_step}
