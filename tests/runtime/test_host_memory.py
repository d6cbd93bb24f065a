"""Memory of the host: there, zero, page-locked beside a GPU, and no more than there is."""

from __future__ import annotations

from pathlib import Path

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


def tree(root: Path, files: dict[str, str]) -> Path:
    """What Linux shows in /proc and /sys of a machine with 900 MB available."""
    for name, text in ({"proc/meminfo": "MemTotal: 2000000 kB\nMemAvailable: 900000 kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_limits_above_a_process_count_and_clean_page_cache_does_not(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "nothing") is None
    assert available_memory(tree(tmp_path / "none", {})) == 900_000 * 1024
    two = {
        "proc/self/cgroup": "0::/job/step",
        "sys/fs/cgroup/job/step/memory.max": "max",
        "sys/fs/cgroup/job/step/memory.current": "1000",
        "sys/fs/cgroup/job/memory.max": "50000",
        "sys/fs/cgroup/job/memory.current": "48000",
        "sys/fs/cgroup/job/memory.stat": "anon 30000\ninactive_file 9000\nactive_file 4000\nfile_dirty 700\nfile_writeback 300",
    }
    assert available_memory(tree(tmp_path / "two", two)) == 2000 + 12000
    one = {
        "proc/self/cgroup": "5:cpu,cpuacct:/elsewhere\n4:memory:/job\n0::/",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "70000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "60000",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 5000\ntotal_active_file 0\ntotal_dirty 6000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "60000",
    }
    assert available_memory(tree(tmp_path / "one", one)) == 10000
    inside = {  # a container that sees its own group as the root, under the host's name of it
        "proc/self/cgroup": "0::/kubepods/pod7",
        "sys/fs/cgroup/memory.max": "8000",
        "sys/fs/cgroup/memory.current": "9000",
    }
    assert available_memory(tree(tmp_path / "inside", inside)) == 0


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
