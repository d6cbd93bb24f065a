"""Every layout of the tests against one rank, on the devices of the job and in two precisions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.multi_gpu.job import Job, Task
from runtime.parity.case import Case, Outcome, errors, outcome, run_rank
from runtime.parity.cases import CASES

FP32_LIMIT = 1e-5
QUICK_CASES = ("dp2 distributed optimizer", "ep2", "tp2 sp ep2 etp1 dp2", "pp2 tp2 sp ep2")
NUMBERS = ("lm_loss", "aux_loss", "grad_norm", "gradients", "weights", "load")

_references: dict[tuple[str, str], Outcome] = {}


def cases(world: int, *, quick: bool) -> list[str]:
    """Name the cases of so many ranks."""
    return [c.name for c in CASES if c.num_ranks == world and (not quick or c.name in QUICK_CASES)]


def _reference(case: Case) -> Outcome:
    """The same training on this rank alone, done once."""
    key = (case.key, case.device)
    if key not in _references:
        _references[key] = outcome([run_rank(case.reference)])
    return _references[key]


def parity(task: Task, job: Job) -> dict[str, Any] | None:
    """Train a tiny model for two steps, and compare.

    Args:
        task: label is the case's name; option `dtype`.
        job: where.

    Returns:
        On the first rank: for each number the largest relative error against one rank, with bf16 also `rounding`, how
        far one rank in bf16 is from one in fp32, and whether the layout is `within` the limit: 1e-5 in fp32; in bf16
        as near to fp32 as twice the distance that one rank has.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact = replace(next(c for c in CASES if c.name == task.label), device=job.device.type)
    dtype = task.options["dtype"]
    case = exact if dtype == "float32" else replace(exact, dtype=dtype)  # some need fp64 to stay within the limit
    results = job.everyone(run_rank(case))
    if torch.distributed.get_rank() != 0:
        return None
    got, want = outcome(results), _reference(case)
    out: dict[str, Any] = {"errors": errors(got, want)}
    if dtype == "float32":
        out["within"] = max(out["errors"].values()) < FP32_LIMIT
        return out
    out["rounding"] = errors(want, _reference(exact))
    distance = errors(got, _reference(exact))
    # A number of one rank may be right by chance: one rounding is always allowed.
    out["within"] = all(distance[name] <= 2 * max(out["rounding"][name], 2**-8) for name in NUMBERS if name != "load")
    return out
