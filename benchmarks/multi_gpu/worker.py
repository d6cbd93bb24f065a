"""One rank of a launch: runs the tasks of a plan in order; the first rank notes each result as soon as it is there."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from benchmarks.multi_gpu.job import Job, Task
from benchmarks.multi_gpu.parity import parity
from benchmarks.multi_gpu.saving import resume, save
from benchmarks.multi_gpu.sizes import SIZES
from benchmarks.multi_gpu.traffic import traffic
from benchmarks.multi_gpu.training import training
from runtime.job.processes import Process, connect, end_groups, start

TASKS: dict[str, Callable[[Task, Job], Any]] = {
    "parity": parity, "training": training, "scaling": training, "traffic": traffic, "save": save, "resume": resume,
}  # fmt: skip
TIMEOUT = 300.0
"""Seconds after which a collective counts as hung."""
PATIENCE = 15.0
"""Seconds that a rank with an error gives the others to come to the same one."""


def main() -> int:
    """Run the plan that the command line names; errors go beside it."""
    path = Path(sys.argv[1])
    plan = json.loads(path.read_text())
    process = Process.from_environment()
    device = start(process, connect(process, "groups"), TIMEOUT)
    control = dist.new_group(backend="gloo")
    store = connect(process, "outcomes")
    for task in (Task(**fields) for fields in plan["tasks"]):
        members = range(task.world)
        assert task.world in (1, process.world_size), "a launch has tasks of all its ranks, and of one"
        job = Job(
            device=device, sizes=SIZES[plan["sizes"]], scratch=Path(plan["scratch"]), fill=plan["fill"],
            control=None if task.world == 1 else control, balanced=plan["balanced"],
        )  # fmt: skip
        begin = time.perf_counter()
        result, error = _run(task, job) if process.rank in members else (None, "")
        if error:
            path.with_name(f"error-{task.number}-{process.rank}.txt").write_text(f"rank {process.rank}: {error}")
        failure = _agree(store, task, process.rank, error)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if process.rank == 0:
            _note(plan, task, result, failure, time.perf_counter() - begin)
    end_groups()
    return 0


def _run(task: Task, job: Job) -> tuple[Any, str]:
    """Run a task; give its result, or what went wrong."""
    try:
        return TASKS[task.kind](task, job), ""
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"


def _agree(store: Store, task: Task, rank: int, error: str) -> str:
    """Find out how a task went on its ranks, and end this process where they can't go on together.

    Returns:
        The error that every rank has met, or nothing.
    """
    keys = [f"{task.number}-{member}" for member in range(task.world)]
    if rank < task.world:
        store.set(keys[rank], error)
    try:
        store.wait(keys, timedelta(seconds=PATIENCE if error else 3600))
    except dist.DistStoreError:
        os._exit(1)  # the others wait for this rank in a collective: torchrun ends them
    errors = {store.get(key).decode() for key in keys}
    if len(errors) > 1:
        os._exit(1)  # they may have left off at different places
    return str(errors.pop())


def _note(plan: dict[str, Any], task: Task, result: Any, failure: str, seconds: float) -> None:
    line: dict[str, Any] = {"task": task.to_json(), "result": result, "seconds": seconds}
    if failure:
        line["failed"] = failure
    with Path(plan["results"]).open("a") as file:
        file.write(json.dumps(line) + "\n")
    how = f"FAILED: {failure}" if failure else f"{seconds:.1f} s"
    print(f"  {task.kind} {task.label}, {task.world} ranks: {how}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
