"""The passes of a step as events on the pipeline's ranks: when each begins, and who waits for whom.

Ranks that differ in data, tensor or expert parallelism alone do the same at the same time; so one rank of each stage
stands for all of them, and thousands of GPUs are simulated as fast as the pipeline is deep.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.errors import WriteError
from runtime.estimate.schedule import Action, Pipeline

NAMES = {"F": "forward", "B": "backward", "I": "input gradients", "W": "weight gradients"}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a rank does."""

    name: str
    kind: str
    """F, B, I, W; or reduce, update, gather."""
    rank: int
    """Pipeline rank."""
    begin: float
    """Seconds from the begin of the step."""
    seconds: float
    stage: int | None = None
    microbatch: int | None = None

    @property
    def end(self) -> float:
        """When it is over."""
        return self.begin + self.seconds


def simulate(
    pipeline: Pipeline,
    seconds: Mapping[tuple[str, int], float],
    send: Callable[[int, int], float],
) -> list[list[Event]]:
    """Run the passes of a step.

    Args:
        pipeline: says in which order each rank does them.
        seconds: kind and virtual stage -> how long the pass takes.
        send: from and to pipeline rank -> how long activations travel.

    Returns:
        The events of each rank, in order.
    """
    pp, last = pipeline.pp, pipeline.pp * pipeline.vpp - 1
    orders = [list(pipeline.actions(rank)) for rank in range(pp)]
    done: dict[Action, float] = {}
    events: list[list[Event]] = [[] for _ in range(pp)]
    ready = list(range(pp))
    waiting: dict[Action, int] = {}
    while ready:
        rank = ready.pop()
        free = events[rank][-1].end if events[rank] else 0.0
        while len(events[rank]) < len(orders[rank]):
            action = orders[rank][len(events[rank])]
            source = _source(action, last)
            if source is not None and source not in done:
                waiting[source] = rank
                break
            begin = free if source is None else max(free, done[source] + send(source.stage % pp, rank))
            took = seconds[action.kind, action.stage]
            name = f"{NAMES[action.kind]} {action.microbatch}"
            event = Event(name, action.kind, rank, begin, took, action.stage, action.microbatch)
            events[rank].append(event)
            done[action], free = event.end, event.end
            if action in waiting:
                ready.append(waiting.pop(action))
    assert all(len(found) == len(order) for found, order in zip(events, orders, strict=True)), "ranks wait in a circle"
    return events


def _source(action: Action, last: int) -> Action | None:
    """The pass on another rank, or none, whose result a pass needs."""
    kind, stage, number = action
    if kind == "F":
        return Action("F", stage - 1, number) if stage > 0 else None
    if kind in "BI" and stage < last:
        return Action(kind, stage + 1, number)
    return None


def bubble(events: Sequence[Sequence[Event]], end: float) -> float:
    """Give the share of the passes' time in which ranks do nothing."""
    busy = sum(event.seconds for found in events for event in found)
    return 1 - busy / (end * len(events)) if end else 0.0


def write_trace(path: Path, events: Sequence[Sequence[Event]], ranks: Mapping[int, tuple[int, int]]) -> None:
    """Write `chrome_trace` to a file.

    Raises:
        WriteError: it can't be written.
    """
    try:
        path.write_text(chrome_trace(events, ranks), encoding="utf8")
    except OSError as error:
        raise WriteError(f"{path}: can't be written: {error.strerror}") from None


def chrome_trace(events: Sequence[Sequence[Event]], ranks: Mapping[int, tuple[int, int]]) -> str:
    """Write a timeline for chrome://tracing or https://ui.perfetto.dev.

    Args:
        events: of each pipeline rank.
        ranks: pipeline rank -> its first node and its first global rank.

    Returns:
        JSON in the format of trace events; times in microseconds.

    Source:
        https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format)
    """
    out: list[dict[str, Any]] = []
    for pipeline_rank, found in enumerate(events):
        node, rank = ranks[pipeline_rank]
        out.append({"ph": "M", "name": "process_name", "pid": node, "args": {"name": f"node {node}"}})
        title = f"rank {rank} (stage {pipeline_rank})"
        out.append({"ph": "M", "name": "thread_name", "pid": node, "tid": rank, "args": {"name": title}})
        for event in found:
            args = {} if event.stage is None else {"stage": event.stage, "micro-batch": event.microbatch}
            out.append(
                {
                    "ph": "X",
                    "name": event.name,
                    "cat": NAMES.get(event.kind, event.kind),
                    "pid": node,
                    "tid": rank,
                    "ts": round(event.begin * 1e6, 3),
                    "dur": round(event.seconds * 1e6, 3),
                    "args": args,
                }
            )
    return json.dumps({"traceEvents": out, "displayTimeUnit": "ms"})
