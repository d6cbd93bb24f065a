"""The optimizer's state on its way between host and device: every element once, in order, whatever the pieces."""

from __future__ import annotations

import pytest
import torch

from runtime.optim.adamw import random_bits
from runtime.optim.staging import Staging
from runtime.parallel.packing import on_host

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [0, 1, 64, 1000])
def test_each_element_goes_there_and_back_once(device: str, size: int) -> None:
    def host(dtype: torch.dtype) -> torch.Tensor:
        return torch.arange(size, dtype=dtype).pin_memory() if device == "cuda" else torch.arange(size, dtype=dtype)

    first, second, read = host(torch.bfloat16), host(torch.float32), host(torch.float64)
    before, seen = [x.clone() for x in (first, second, read)], torch.zeros(size, device=device)
    staging = Staging(torch.device(device), piece=64, buffers=3)

    def work(part: slice, staged: list[torch.Tensor]) -> None:
        assert [x.device.type for x in staged] == [device] * 3
        seen[part] += 1
        staged[0].add_(1)
        staged[1].add_(staged[2])
        staged[2].fill_(-1)  # goes nowhere

    for _ in range(2):
        staging.begin()
        staging.update([first, second, read], work, written=2)
    staging.settle()
    assert torch.equal(first, before[0] + 1 + 1)
    assert torch.equal(second, before[1] + 2 * before[2].float())
    assert torch.equal(read, before[2])
    assert torch.equal(seen.cpu(), torch.full((size,), 2.0))


def test_roundings_do_not_depend_on_the_pieces() -> None:
    device = torch.device("cpu")
    whole = random_bits(0, 1000, 7, device)
    assert torch.equal(torch.cat([random_bits(i, 100, 7, device) for i in range(0, 1000, 100)]), whole)
    assert not torch.equal(whole, random_bits(0, 1000, 8, device))


@pytest.mark.parametrize(
    ("fraction", "chosen"),
    [(0.0, [False] * 4), (0.1, [True, False, False, False]), (0.5, [True, True, False, False]), (1.0, [True] * 4)],
)
def test_a_share_of_the_elements_goes_to_the_host(fraction: float, chosen: list[bool]) -> None:
    assert on_host([30, 30, 30, 10], fraction) == chosen
