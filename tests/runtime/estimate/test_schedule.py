"""The order of passes is that of torch's own schedules, and the simulation runs them as they depend on each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from runtime.estimate.schedule import Action, Pipeline
from runtime.estimate.simulate import bubble, chrome_trace, simulate

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torchs_order(kind: Any, pp: int, vpp: int, count: int) -> dict[int, list[Action]]:
    """Ask a schedule of torch for its order; its stages are never run."""
    stages = []
    for chunk in range(vpp):
        stage = Mock(spec=_PipelineStageBase, group_size=pp, group_rank=0, num_stages=pp * vpp, device="cpu")
        stage.configure_mock(stage_index=chunk * pp, group=Mock(), is_first=chunk == 0, is_last=False, submod=Mock())
        stage.stage_index_to_group_rank = {n: n % pp for n in range(pp * vpp)}
        stages.append(stage)
    made = kind(stages, count, loss_fn=Mock())
    return {
        rank: [
            Action(KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)  # type: ignore[arg-type]
            for action in made.pipeline_order[rank]
            if action is not None
        ]
        for rank in range(pp)
    }


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 2, 4), (4, 2, 8), (4, 3, 4), (8, 2, 32)])
def test_interleaved_order_is_torchs(pp: int, vpp: int, count: int) -> None:
    expected = torchs_order(schedules.ScheduleInterleaved1F1B, pp, vpp, count)
    ours = Pipeline(pp, vpp, "interleaved", count)
    assert {rank: list(ours.actions(rank)) for rank in range(pp)} == expected


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 1, 4), (4, 1, 8), (2, 2, 4), (4, 2, 8)])
def test_zero_bubble_order_is_torchs(pp: int, vpp: int, count: int) -> None:
    expected = torchs_order(schedules.ScheduleInterleavedZeroBubble, pp, vpp, count)
    ours = Pipeline(pp, vpp, "zero-bubble", count)
    assert {rank: list(ours.actions(rank)) for rank in range(pp)} == expected


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_bubble_of_even_stages_is_the_known_one(schedule: str) -> None:
    """(p - 1) / (m + p - 1) of the time, whatever the passes take."""
    pp, count = 4, 12
    seconds = {(kind, stage): took for kind, took in (("F", 1.0), ("B", 2.0)) for stage in range(pp)}
    events = simulate(Pipeline(pp, 1, schedule, count), seconds, lambda a, b: 0.0)
    end = max(found[-1].end for found in events)
    assert end == pytest.approx(3.0 * (count + pp - 1))
    assert bubble(events, end) == pytest.approx((pp - 1) / (count + pp - 1))


def test_interleaving_divides_the_bubble_by_the_virtual_stages() -> None:
    pp, vpp, count = 4, 2, 16
    seconds = {(kind, stage): took for kind, took in (("F", 0.5), ("B", 1.0)) for stage in range(pp * vpp)}
    events = simulate(Pipeline(pp, vpp, "interleaved", count), seconds, lambda a, b: 0.0)
    assert max(found[-1].end for found in events) == pytest.approx(3.0 * (count + (pp - 1) / vpp))


def test_passes_wait_for_what_they_need() -> None:
    pp, vpp, count = 4, 2, 8
    seconds = {(kind, stage): 1.0 + stage / 7 for kind in "FBIW" for stage in range(pp * vpp)}
    for schedule in ("interleaved", "zero-bubble"):
        events = simulate(Pipeline(pp, vpp, schedule, count), seconds, lambda a, b: 0.25)
        ends = {(e.kind, e.stage, e.microbatch): e for found in events for e in found}
        for event in ends.values():
            assert event.stage is not None
            if event.kind == "F" and event.stage > 0:
                assert event.begin >= ends["F", event.stage - 1, event.microbatch].end + 0.25
            if event.kind in "BI" and event.stage < pp * vpp - 1:
                assert event.begin >= ends[event.kind, event.stage + 1, event.microbatch].end + 0.25
        for found in events:
            assert all(a.end <= b.begin for a, b in pairwise(found)), "a rank does one thing at a time"


def test_most_micro_batches_in_flight_come_at_the_beginning() -> None:
    """What memory looks at is the beginning; nothing later holds more."""

    def most(actions: Any) -> int:
        now = peak = 0
        for action in actions:
            now += {"F": 1, "B": -1, "W": -1, "I": 0}[action.kind]
            peak = max(peak, now)
        return peak

    for schedule, vpp in (("1f1b", 1), ("gpipe", 1), ("interleaved", 3), ("zero-bubble", 2)):
        pipeline = Pipeline(4, vpp, schedule, 24)
        for rank in range(4):
            if schedule != "gpipe":
                assert most(pipeline.beginning(rank)) == most(pipeline.actions(rank)), (schedule, rank)
    assert most(Pipeline(4, 1, "gpipe", 24).beginning(0)) == 24


def test_trace_is_what_viewers_read() -> None:
    import json

    events = simulate(Pipeline(2, 1, "1f1b", 2), {(k, s): 1.0 for k in "FB" for s in (0, 1)}, lambda a, b: 0.0)
    trace = json.loads(chrome_trace(events, {0: (0, 0), 1: (1, 8)}))["traceEvents"]
    spans = [event for event in trace if event["ph"] == "X"]
    assert len(spans) == 8
    assert {(span["pid"], span["tid"]) for span in spans} == {(0, 0), (1, 8)}
    assert max(span["ts"] + span["dur"] for span in spans) == pytest.approx(6e6)
