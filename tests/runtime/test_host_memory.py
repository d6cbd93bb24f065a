"""Memory of the host: there, zero, page-locked beside a GPU, and no more than there is."""

from __future__ import annotations

import pytest
import torch

from runtime.host_memory import HostMemoryError, available_memory, cpus_near, host_zeros, parse_cpus

CPU = torch.device("cpu")


def test_memory_is_zero_and_its_own() -> None:
    first, second = host_zeros(10_001, torch.bfloat16, CPU), host_zeros(10_001, torch.bfloat16, CPU)
    assert (first.shape, first.dtype, bool(first.any())) == ((10_001,), torch.bfloat16, False)
    first.fill_(1)
    assert not second.any()
    assert host_zeros(0, torch.float32, CPU).shape == (0,)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(HostMemoryError, match=r"1125899\.9 GB of host memory are needed"):
        host_zeros(2**50, torch.uint8, CPU)


def test_what_is_free_is_known() -> None:
    free = available_memory()
    assert free is not None
    assert 0 < free < 2**50


def test_processors_are_read_as_linux_lists_them() -> None:
    assert parse_cpus("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert cpus_near(CPU) == set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpus_memory_is_page_locked_while_it_is_used() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = host_zeros(1 << 20, torch.float32, device)
    assert memory.is_pinned()
    there = torch.arange(1 << 20, device=device, dtype=torch.float32)
    memory.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(memory, there.cpu())
    view = memory[5:]
    del memory
    assert view.is_pinned()
