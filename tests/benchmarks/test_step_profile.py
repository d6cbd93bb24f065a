"""The profile of a step: the host's times must be those of the step, and launches be counted by what they are."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from benchmarks.host_profile import EVERY_THREAD, OUTSIDE, HostTime, host_lines, host_of
from benchmarks.step_profile import DeviceTime, Runs, is_launch, lines_of

SLEEP = 0.02


class Slow(torch.autograd.Function):
    """Takes its time in Python, and one operator within."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(SLEEP)
        return grad * 2


def think() -> None:
    time.sleep(2 * SLEEP)


def other() -> None:
    time.sleep(SLEEP)


@pytest.fixture(scope="module")
def host() -> HostTime:
    leaf = torch.ones(8, requires_grad=True)

    def step() -> None:
        Slow.apply(Slow.apply(leaf)).sum().backward()
        think()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    return host_of(step)


def test_operators_and_autograd_functions_have_their_own_time(host: HostTime) -> None:
    found = {item.name: item for item in host.operators}
    assert host.operators[0].name == OUTSIDE
    assert found[OUTSIDE].ms > 1e3 * 3 * SLEEP
    assert (found["Slow"].runs, found["SlowBackward"].runs) == (2, 2)
    assert found["SlowBackward"].ms > 1e3 * 2 * SLEEP > found["aten::mul"].ms
    assert min(host.ms, host.recorded_ms, host.traced_ms) > 1e3 * 5 * SLEEP
    (thread,) = host.threads
    assert found["SlowBackward"].ms < thread.operators_ms < thread.span_ms
    assert thread.operators == sum(item.runs for item in host.operators) - 1


def test_python_functions_are_of_the_threads_that_are_named(host: HostTime) -> None:
    sleep = next(item for item in host.functions if "time.sleep" in item.name)
    assert sleep.ms > 1e3 * 4 * SLEEP
    assert any(
        item.name.endswith(" think") and "benchmarks/test_step_profile.py:" in item.name for item in host.functions
    )
    assert any(item.name.endswith(" other") for item in host.functions) == EVERY_THREAD
    (line,) = [line for line in host_lines(host) if line.startswith("Python functions")]
    assert ("all threads" in line) == EVERY_THREAD
    assert len(host_lines(host, most=1)) == 6


def test_launches_are_told_from_other_calls() -> None:
    names = {
        "cudaLaunchKernel": True, "cudaLaunchKernelExC": True, "cuLaunchKernelEx": True, "cudaLaunchCooperativeKernel": True,
        "cudaGraphLaunch": True, "cudaMemcpyAsync": True, "cudaMemsetAsync": True, "cudaLaunchHostFunc": False,
        "cudaStreamSynchronize": False, "cudaEventRecord": False, "cudaFuncGetAttributes": False, "aten::mm": False,
    }  # fmt: skip
    assert {name: is_launch(name) for name in names} == names
    device = DeviceTime([Runs("gemm", 30, 9.0), Runs("Memset (Device)", 10, 1.0)], 20)
    lines = lines_of(device, "a step", parts=8)
    assert lines[0] == "a step: 10.0 ms of kernels"
    assert lines[1] == (
        "40 runs of kernels, copies and fills by 20 launches of the host, 2.5 for each of 8 layers and micro-batches"
    )
    assert lines_of(DeviceTime([], 0), "a step") == ["a step: no GPU, so no kernels and launches"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpus_launches_are_counted() -> None:
    from benchmarks.step_profile import device_of

    x = torch.ones(64, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            x.mul_(1.0)

    def step() -> None:
        for _ in range(3):
            x.add_(1.0)
        graph.replay()

    found = device_of(step)
    assert sum(kernel.runs for kernel in found.kernels) == 8
    assert found.launches == 4
