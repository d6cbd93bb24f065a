"""Where the device's time of a step goes, by kernel and by kind of kernel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_work import Step

KINDS = {
    "communication": r"nccl",
    "attention": r"flash|fmha|sdpa|attention",
    "products": r"gemm|nvjet|cutlass|cublas|grouped|matmul|wgrad|dgrad",
    "optimizer": r"adam|multi_tensor|square_sum",
}
"""Kind of kernel -> what the names of its kernels contain, in the order in which they are tried; `other` is the rest."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """All runs of a kernel in a step."""

    name: str
    runs: int
    ms: float


def synchronize() -> None:
    """Wait for the device, and for all ranks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def kernels_of(step: Step) -> list[Kernel]:
    """Record a step; every rank of a launch takes part.

    Args:
        step: what does one; a first one, in which recording starts and ranks wait for each other, isn't counted.

    Returns:
        The kernels of this rank, those that take longest first. Communication includes the wait for other ranks.
    """
    # Of the device alone: what ranges of the host's code (FSDP's, collectives', compiled graphs') span there is no kernel.
    activities = [torch.profiler.ProfilerActivity.CUDA]
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as prof:
        step()
        synchronize()
        prof.step()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = [e for e in prof.key_averages() if e.device_type.name == "CUDA" and not _is_range(e)]
    kernels = [Kernel(e.key, e.count, e.self_device_time_total / 1e3) for e in events]
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def _is_range(event: Any) -> bool:
    """Whether an event is a named range and no kernel; not every version of torch marks them."""
    marked = bool(getattr(event, "is_user_annotation", False))
    return marked or event.key.startswith(("Optimizer.", "ProfilerStep", "nccl:", "FSDP::", "## ", "Torch-Compiled"))


def kind_of(name: str) -> str:
    """Sort a kernel by its name; dense and grouped products are one kind, since libraries' names don't tell them apart."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "other")


def by_kind(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Add up the milliseconds of each kind."""
    out = dict.fromkeys([*KINDS, "other"], 0.0)
    for kernel in kernels:
        out[kind_of(kernel.name)] += kernel.ms
    return out


def lines_of(kernels: Sequence[Kernel], title: str, most: int = 60) -> list[str]:
    """List those that take longest, `most` of them."""
    total = sum(kernel.ms for kernel in kernels)
    lines = [f"{title}: {total:.1f} ms of kernels"]
    return lines + [f"{k.ms:8.2f} ms {k.ms / total:6.1%} {k.runs:5} x {k.name[:110]}" for k in kernels[:most]]


def write_kernels(kernels: Sequence[Kernel], path: Path, title: str) -> None:
    """Write those that take longest."""
    lines = lines_of(kernels, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
