"""One rank of a launch: runs the tasks of a plan in order; the first rank notes each result as soon as it is there."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multi_gpu.job import Job, Task
from benchmarks.multi_gpu.parity import parity
from benchmarks.multi_gpu.saving import resume, save
from benchmarks.multi_gpu.sizes import FULL, QUICK
from benchmarks.multi_gpu.traffic import traffic
from benchmarks.multi_gpu.training import training
from runtime.distributed import Process, connect, start

TASKS: dict[str, Callable[[Task, Job], Any]] = {
    "parity": parity, "training": training, "scaling": training, "traffic": traffic, "save": save, "resume": resume,
}  # fmt: skip
TIMEOUT = 300.0
"""Seconds after which a collective counts as hung."""


def main() -> int:
    """Run the plan that the command line names; errors go beside it."""
    # NVLink multicast can leave GPUs that others share unusable, so it takes the user's word to turn it on.
    for name, value in {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}.items():
        os.environ.setdefault(name, value)
    path = Path(sys.argv[1])
    plan = json.loads(path.read_text())
    process = Process.from_environment()
    device = start(process, connect(process, "groups"), TIMEOUT)
    control = dist.new_group(backend="gloo")
    sizes = QUICK if plan["quick"] else FULL
    for task in (Task(**fields) for fields in plan["tasks"]):
        alone = task.world < process.world_size
        job = Job(
            device=device, sizes=sizes, scratch=Path(plan["scratch"]), fill=plan["fill"],
            control=None if task.world == 1 else control,
        )  # fmt: skip
        assert not alone or task.world == 1, "a launch has tasks of all its ranks, and of one"
        begin = time.perf_counter()
        try:
            result = TASKS[task.kind](task, job) if process.rank == 0 or not alone else None
        except Exception as error:
            note = path.with_name(f"error-{task.number}-{process.rank}.txt")
            note.write_text(f"rank {process.rank}: {type(error).__name__}: {error}")
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the others may wait for this rank in a collective: torchrun ends them
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if process.rank == 0:
            seconds = time.perf_counter() - begin
            line = json.dumps({"task": task.to_json(), "result": result, "seconds": seconds})
            with Path(plan["results"]).open("a") as file:
                file.write(line + "\n")
            print(f"  {task.kind} {task.label}, {task.world} ranks: {seconds:.1f} s", flush=True)
        dist.all_reduce(torch.zeros(1), group=control)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
