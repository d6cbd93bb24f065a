"""Where the host's time of a step goes: operators and autograd functions, threads, Python functions."""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_profile import Runs, rows_of, synchronize
from benchmarks.step_work import Step

OUTSIDE = "outside of operators: Python of the main thread, and its wait for autograd's"
EVERY_THREAD = sys.version_info >= (3, 12)
"""Whether the interpreter's profiler sees threads that it wasn't started in."""


@dataclass(frozen=True, slots=True)
class Thread:
    """What a thread of the host did in a step."""

    operators: int
    operators_ms: float
    """In operators and autograd functions, whatever they called counted once."""
    span_ms: float
    """From the first one's begin to the last one's end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTime:
    """Steps of one kind: one as it is, one in which operators are recorded, one in which Python functions are."""

    ms: float
    """Of the step as it is, to when the device is done."""
    recorded_ms: float
    traced_ms: float
    operators: Sequence[Runs]
    """Operators and autograd functions by their own time, without what they call, those that take longest first."""
    threads: Sequence[Thread]
    """Busiest first."""
    functions: Sequence[Runs]
    """Python functions by their own time, likewise."""


def host_of(step: Step) -> HostTime:
    """Profile the host's side of a step; every rank of a launch takes part.

    Args:
        step: what does one; it is done four times.

    Returns:
        The times on this rank. Recording slows the host: the step as it is says what it takes, the rest where it goes.
    """
    ms = _timed(step)
    operators, threads, recorded = _operators(step)
    functions, traced = _functions(step)
    return HostTime(
        ms=ms, recorded_ms=recorded, traced_ms=traced, operators=operators, threads=threads, functions=functions
    )


def _timed(step: Step) -> float:
    """Milliseconds of a step that all ranks begin at once, to when this rank's device is done."""
    synchronize()
    begin = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def _operators(step: Step) -> tuple[list[Runs], list[Thread], float]:
    def marked() -> None:
        with torch.profiler.record_function(OUTSIDE):
            step()

    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], schedule=schedule, acc_events=True
    ) as prof:
        step()  # recording starts in it
        synchronize()
        prof.step()
        ms = _timed(marked)
    runs = [
        Runs(event.key, event.count, event.self_cpu_time_total / 1e3)
        for event in prof.key_averages()
        if not event.key.startswith("ProfilerStep")
    ]
    return sorted(runs, key=lambda found: -found.ms), _threads(prof), ms


def _threads(prof: torch.profiler.profile) -> list[Thread]:
    by_thread: dict[int, list[Any]] = {}
    for event in prof.events() or []:  # type: ignore[no-untyped-call]
        if event.name != OUTSIDE and not event.name.startswith("ProfilerStep"):
            by_thread.setdefault(event.thread, []).append(event)
    threads = []
    for events in by_thread.values():
        span = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
        threads.append(Thread(len(events), sum(event.self_cpu_time_total for event in events) / 1e3, span / 1e3))
    return sorted(threads, key=lambda thread: -thread.operators_ms)


def _functions(step: Step) -> tuple[list[Runs], float]:
    profile = cProfile.Profile()

    def traced() -> None:
        profile.enable()
        try:
            step()
        finally:
            profile.disable()

    ms = _timed(traced)
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]  # as documented since Python 2, and not in the stubs
    runs = [Runs(_name(*key), calls, own * 1e3) for key, (_, calls, own, _, _) in found.items()]
    return sorted(runs, key=lambda item: -item.ms), ms


def _name(file: str, line: int, function: str) -> str:
    """A function as it is found: folder, file and line; what is built in has its name alone."""
    return function if line == 0 else f"{'/'.join(Path(file).parts[-3:])}:{line} {function}"


def host_lines(host: HostTime, most: int = 60) -> list[str]:
    """List what takes the host longest, `most` operators and as many functions, with what the numbers are of."""
    lines = [
        f"the host: a step takes {host.ms:.1f} ms; {host.recorded_ms:.1f} ms with operators recorded, "
        f"{host.traced_ms:.1f} ms with Python functions traced: profiling slows the host, each call by some more, so read "
        "shares and counts rather than times"
    ]
    lines += [
        f"a thread: {thread.operators} operators, {thread.operators_ms:.1f} ms in them of {thread.span_ms:.1f} ms from the "
        "first to the last"
        for thread in host.threads
    ]
    own = sum(found.ms for found in host.operators)
    lines.append(f"operators and autograd functions of all threads by own time: {own:.1f} ms")
    lines += rows_of(host.operators, most)
    which = (
        "of all threads" if EVERY_THREAD else
        f"of the main thread alone (Python {sys.version_info[0]}.{sys.version_info[1]} traces no other, 3.12 does): backward "
        "passes of CUDA tensors run in autograd's own thread, so their functions are missing and the wait for them is there"
    )  # fmt: skip
    lines.append(f"Python functions by own time, {which}: {sum(found.ms for found in host.functions):.1f} ms")
    return lines + rows_of(host.functions, most)
