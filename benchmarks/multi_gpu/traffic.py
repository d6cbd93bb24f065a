"""Communication: how much of it is hidden behind computation, and how fast it is beside what the links give."""

from __future__ import annotations

import json
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multi_gpu.job import Job, Task
from runtime.parallel.collectives import Group, gather_tensor, group_size, reduce_scatter_tensor
from runtime.parallel.exchange import all_to_all

KINDS = ("SendRecv", "AllReduce", "AllGather", "ReduceScatter", "Broadcast")
"""Parts of the names of NCCL's kernels; all-to-alls and the exchanges between stages are sends and receives."""
NUM_LARGEST = 12


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's run on the device, in microseconds."""

    name: str
    begin: float
    end: float


def read_kernels(trace: Path) -> list[Kernel]:
    """Read the kernels of a trace in Chrome's format; copies, annotations and the host's events are left out.

    Args:
        trace: what `torch.profiler.profile.export_chrome_trace` wrote.

    Returns:
        The kernels in no particular order.
    """
    events = json.loads(trace.read_text())["traceEvents"]
    return [Kernel(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"]


def merge(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans that touch; the result rises and its spans are apart."""
    out: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((begin, end))
    return out


def covered(begin: float, end: float, spans: Sequence[tuple[float, float]]) -> float:
    """The length of a span that lies in any of merged spans."""
    first = bisect_right(spans, begin, key=lambda s: s[1])
    last = bisect_left(spans, end, key=lambda s: s[0])
    return sum(min(end, b) - max(begin, a) for a, b in spans[first:last])


def summarize(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Say how much communication runs while something is computed.

    Args:
        kernels: of one step on one GPU.

    Returns:
        For each kind of NCCL's kernels: calls, milliseconds, share of them during which other kernels run; milliseconds
        of communication, together and of those with nothing computed meanwhile (exposed); of computation; of neither
        between the first kernel and the last (idle); and the `largest` other kernels as name, calls and milliseconds.
    """
    own = [k for k in kernels if k.name.startswith("nccl")]
    others = [k for k in kernels if not k.name.startswith("nccl")]
    computing = merge((k.begin, k.end) for k in others)
    kinds: dict[str, dict[str, float]] = {}
    for kernel in own:
        kind = next((kind for kind in KINDS if kind in kernel.name), "other")
        row = kinds.setdefault(kind, {"calls": 0, "ms": 0.0, "hidden_ms": 0.0})
        row["calls"] += 1
        row["ms"] += (kernel.end - kernel.begin) / 1e3
        row["hidden_ms"] += covered(kernel.begin, kernel.end, computing) / 1e3
    talking = merge((k.begin, k.end) for k in own)
    total = sum(end - begin for begin, end in talking)
    hidden = sum(covered(begin, end, computing) for begin, end in talking)
    computed = sum(end - begin for begin, end in computing)
    span = max(k.end for k in kernels) - min(k.begin for k in kernels) if kernels else 0.0
    return {
        "kinds": kinds,
        "communication_ms": total / 1e3,
        "exposed_ms": (total - hidden) / 1e3,
        "computing_ms": computed / 1e3,
        "idle_ms": (span - computed - (total - hidden)) / 1e3,
        "largest": _largest(others),
    }


def _largest(kernels: Sequence[Kernel]) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of the kernels with the most time."""
    found: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        calls, ms = found.get(kernel.name, (0, 0.0))
        found[kernel.name] = (calls + 1, ms + (kernel.end - kernel.begin) / 1e3)
    order = sorted(found.items(), key=lambda item: -item[1][1])
    return [(name, calls, ms) for name, (calls, ms) in order[:NUM_LARGEST]]


def profile(step: Callable[[], object], job: Job) -> dict[str, Any] | None:
    """Profile one step of this rank.

    Args:
        step: what to run; every rank runs it.
        job: a CPU has no kernels to look at.

    Returns:
        As `summarize`; None on a CPU.
    """
    if job.device.type != "cuda":
        step()
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as prof:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(trace))
        return summarize(read_kernels(trace))


def time_call(call: Callable[[], object], job: Job, group: Group, repeats: int = 10) -> float:
    """Time a collective, again and again without waiting between the calls.

    Args:
        call: does it once.
        job: where.
        group: the ranks that take part; their slowest counts.
        repeats: calls of the measurement, after 2 that don't count.

    Returns:
        Seconds a call.
    """

    def run(count: int) -> None:
        for _ in range(count):
            call()
        if job.device.type == "cuda":
            torch.cuda.synchronize()

    run(2)
    job.synchronize()
    start = time.perf_counter()
    run(repeats)
    seconds = torch.tensor((time.perf_counter() - start) / repeats, dtype=torch.float64, device=job.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return float(seconds)


def all_to_all_floor(num_rows: int, width: int, dtype: torch.dtype, group: Group, job: Job) -> dict[str, float]:
    """Time an exchange of equal blocks with nothing else on the device: what a layer's exchange can't be faster than.

    Args:
        num_rows: rows of each rank.
        width: elements of a row.
        dtype: of the rows.
        group: the ranks that exchange.
        job: where.

    Returns:
        Milliseconds, MB that a rank holds, and GB/s that leave it.
    """
    size = group_size(group)
    x = torch.zeros(num_rows // size * size, width, dtype=dtype, device=job.device)
    out = torch.empty_like(x)
    seconds = time_call(lambda: dist.all_to_all_single(out, x, group=group), job, group)
    num_bytes = x.numel() * x.element_size()
    return {"ms": seconds * 1e3, "mb": num_bytes / 1e6, "gb_s": num_bytes * (size - 1) / size / seconds / 1e9}


def traffic(task: Task, job: Job) -> list[dict[str, Any]]:
    """Time the collectives over all ranks, with one large message and with a layer's.

    Args:
        task: all ranks of it take part.
        job: where.

    Returns:
        A row for each: name, MB, milliseconds, and GB/s through each rank's link in one direction.
    """
    size, group = task.world, dist.group.WORLD
    dtype = torch.bfloat16
    width = job.sizes.hidden
    rows = job.sizes.raw_bytes // dtype.itemsize // width // size * size
    x = torch.zeros(rows, width, dtype=dtype, device=job.device)
    piece = x[: rows // size].clone()
    # Ring algorithms move this share of the whole tensor over each link.
    share = (size - 1) / size
    calls: list[tuple[str, Callable[[], object], float]] = [
        ("all-reduce", lambda: dist.all_reduce(x, group=group), 2 * share),
        ("all-gather", lambda: gather_tensor(piece, 0, group), share),
        ("reduce-scatter", lambda: reduce_scatter_tensor(x, 0, group), share),
    ]
    num_bytes = x.numel() * x.element_size()
    out: list[dict[str, Any]] = []
    for name, call, moved in calls:
        seconds = time_call(call, job, group)
        out.append(
            {"name": name, "mb": num_bytes / 1e6, "ms": seconds * 1e3, "gb_s": num_bytes * moved / seconds / 1e9}
        )
    out.append({"name": "all-to-all, equal blocks", **all_to_all_floor(rows, width, dtype, group, job)})
    choices = job.sizes.positions * job.sizes.topk
    floor = all_to_all_floor(choices, width, dtype, group, job)
    out.append({"name": "all-to-all, a layer's rows in equal blocks", **floor})
    out.append({"name": "all-to-all, a layer's rows as routed", **_routed(choices, width, dtype, group, job)})
    return out


def _routed(num_rows: int, width: int, dtype: torch.dtype, group: Group, job: Job) -> dict[str, float]:
    """Time the runtime's own exchange, with the uneven blocks of tokens that choose experts at random."""
    size, rank = group_size(group), dist.get_rank(group)
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(size, (size, num_rows), generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=size) for row in choices]).tolist()
    sent, received = counts[rank], [row[rank] for row in counts]
    x = torch.zeros(num_rows, width, dtype=dtype, device=job.device)
    seconds = time_call(lambda: all_to_all(x, received, sent, group), job, group)
    num_bytes = x.numel() * x.element_size()
    return {"ms": seconds * 1e3, "mb": num_bytes / 1e6, "gb_s": num_bytes * (size - 1) / size / seconds / 1e9}
