"""Where the device's time of a step goes, by kernel and by kind of kernel, and how many launches that took."""

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
class Runs:
    """All runs of a kernel in a step; or of an operator or a function of the host."""

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


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """A step of this rank as its device saw it."""

    kernels: Sequence[Runs]
    """Kernels, copies and fills, those that take longest first; empty without a GPU. Communication includes the wait for other
    ranks."""
    launches: int
    """Calls by which the host had them run; one of a CUDA graph runs many. 0: the profiler doesn't record them."""


def device_of(step: Step) -> DeviceTime:
    """Record a step; every rank of a launch takes part.

    Args:
        step: what does one; a first one, in which recording starts and ranks wait for each other, isn't counted.

    Returns:
        Kernels and launches.
    """
    if not torch.cuda.is_available():
        return DeviceTime([], 0)
    # Of the device alone: what ranges of the host's code (FSDP's, collectives', compiled graphs') span there is no kernel.
    activities = [torch.profiler.ProfilerActivity.CUDA]
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as prof:
        step()
        synchronize()
        prof.step()
        step()
        torch.cuda.synchronize()
    found = prof.key_averages()
    events = [e for e in found if e.device_type.name == "CUDA" and not _is_range(e)]
    kernels = [Runs(e.key, e.count, e.self_device_time_total / 1e3) for e in events]
    launches = sum(e.count for e in found if e.device_type.name == "CPU" and is_launch(e.key))
    return DeviceTime(sorted(kernels, key=lambda kernel: -kernel.ms), launches)


def is_launch(name: str) -> bool:
    """Whether a call of CUDA's runtime or driver, by its name, has the device run something."""
    return re.match(r"cu(da)?(Launch(?!HostFunc)|GraphLaunch|Memcpy|Memset)", name) is not None


def _is_range(event: Any) -> bool:
    """Whether an event is a named range and no kernel; not every version of torch marks them."""
    marked = bool(getattr(event, "is_user_annotation", False))
    return marked or event.key.startswith(("Optimizer.", "ProfilerStep", "nccl:", "FSDP::", "## ", "Torch-Compiled"))


def kind_of(name: str) -> str:
    """Sort a kernel by its name; dense and grouped products are one kind, since libraries' names don't tell them apart."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "other")


def by_kind(kernels: Sequence[Runs]) -> dict[str, float]:
    """Add up the milliseconds of each kind."""
    out = dict.fromkeys([*KINDS, "other"], 0.0)
    for kernel in kernels:
        out[kind_of(kernel.name)] += kernel.ms
    return out


def rows_of(found: Sequence[Runs], most: int) -> list[str]:
    """List the first `most` with their shares of all."""
    total = sum(item.ms for item in found) or 1.0
    return [f"{item.ms:8.2f} ms {item.ms / total:6.1%} {item.runs:5} x {item.name[:110]}" for item in found[:most]]


def lines_of(device: DeviceTime, title: str, most: int = 60, parts: int | None = None) -> list[str]:
    """List what takes the device longest.

    Args:
        device: a step.
        title: of what the step is.
        most: how many kernels to list.
        parts: layers times micro-batches of the step, to say how many launches are of each.

    Returns:
        Lines of text.
    """
    if not device.kernels:
        return [f"{title}: no GPU, so no kernels and launches"]
    each = f", {device.launches / parts:.1f} for each of {parts} layers and micro-batches" if parts else ""
    launches = f"{device.launches} launches of the host{each}" if device.launches else "launches that weren't recorded"
    runs = sum(kernel.runs for kernel in device.kernels)
    lines = [
        f"{title}: {sum(kernel.ms for kernel in device.kernels):.1f} ms of kernels",
        f"{runs} runs of kernels, copies and fills by {launches}",
    ]
    return lines + rows_of(device.kernels, most)


def write_lines(lines: Sequence[str], path: Path) -> None:
    """Write a profile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
