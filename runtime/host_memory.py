"""Memory of the host that a device copies to and from: allocated once, its pages there, and page-locked beside a GPU."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeconv.errors import MoeconvError

_THREADS = 4
_CGROUPS = (
    ("sys/fs/cgroup", "", ("memory.max", "memory.current"), "", ("file_dirty", "file_writeback")),
    (
        "sys/fs/cgroup/memory",
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_",
        ("total_dirty", "total_writeback"),
    ),
)
"""Of versions 2 and 1: where they are mounted, the controller's name in /proc/self/cgroup, limit and use, how numbers of all
groups below begin in memory.stat, and what of the page cache is not on the disk yet."""


class HostMemoryError(MoeconvError):
    """The host has not the memory that is asked for."""


def allocate(num_bytes: int) -> Tensor:
    """Give memory whose pages are there already.

    Large pages and several threads make that several times faster than the first copy would be: fresh memory costs a page
    fault a page.

    Args:
        num_bytes: at least 1.

    Returns:
        [num_bytes] uint8, zero.

    Raises:
        HostMemoryError: there is not enough.
    """
    return _tensor_of(_map(num_bytes), set())


def host_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give a tensor of the host that goes to and from a device at the speed of the link.

    Args:
        size: elements.
        dtype: theirs.
        device: for a GPU, the memory is page-locked, and on the GPU's side of a host with several sockets; where the system
            doesn't let it be page-locked, a warning says so, and copies are slower.

    Returns:
        [size] zeros; the memory is unlocked when nothing refers to it any more.

    Raises:
        HostMemoryError: there is not enough.
    """
    if size == 0:
        return torch.zeros(0, dtype=dtype)
    block = _map(size * dtype.itemsize)
    memory = _tensor_of(block, cpus_near(device))
    if device.type == "cuda":
        failure = page_lock(memory)
        if failure is None:
            # The map goes away with its last reference, which is after this is called.
            unlock = weakref.finalize(block, _wait_and_unlock, memory.data_ptr())
            unlock.atexit = False  # the end of the process does it anyway, and can't hang or fail
        else:
            warnings.warn(
                f"host memory can't be page-locked ({failure}): the optimizer's state travels slower than it could; "
                "raise the limit of locked memory (ulimit -l unlimited)",
                stacklevel=2,
            )
    return memory.view(dtype)


def page_lock(memory: Tensor) -> str | None:
    """Page-lock memory, so that GPUs copy to it at the speed of the link.

    Not torch's pinned memory: that comes in powers of two.

    Args:
        memory: contiguous, on the host.

    Returns:
        Why it failed; None if it didn't.
    """
    try:
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    except Exception as error:  # everything works without; whatever it is, the caller says so
        return f"{type(error).__name__}: {error}"
    if status == 0:
        return None
    # CUDA keeps the error for whoever asks next, and that is the next kernel's launch: let it be this one's.
    with contextlib.suppress(Exception):
        torch.ones((), device="cuda")
    return f"cudaHostRegister: error {status}"


def page_unlock(address: int) -> None:
    """Undo `page_lock`."""
    with contextlib.suppress(Exception):
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def available_memory(root: Path = Path("/")) -> int | None:
    """Give the bytes that this process and its neighbours may still take on this host.

    Page cache counts as available once it is on the disk, since Linux gives it up; page-locked memory never does.

    Args:
        root: where /proc and /sys are.

    Returns:
        The least that the host and each control group above this process leave; None where nothing tells.

    Source:
        https://github.com/torvalds/linux/blob/v6.12/Documentation/admin-guide/cgroup-v2.rst (memory.stat), and
        https://github.com/torvalds/linux/blob/v6.12/Documentation/admin-guide/cgroup-v1/memory.rst.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for mount, controller, (limit, used), prefix, unwritten in _CGROUPS:
        for group in _groups(root, root / mount, controller):
            with contextlib.suppress(OSError, ValueError):
                left = int((group / limit).read_text()) - int((group / used).read_text())
                found.append(left + _reclaimable(group / "memory.stat", prefix, unwritten))
    return max(0, min(found)) if found else None


def _groups(root: Path, mount: Path, controller: str) -> list[Path]:
    """List the control group of this process and those above it; a container may see its own as the root."""
    own = ""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(","):
                own = path.strip("/")
    group = mount / own
    return [group, *(above for above in group.parents if above.is_relative_to(mount))]


def _reclaimable(stat: Path, prefix: str, unwritten: tuple[str, str]) -> int:
    """Give the bytes of a group's page cache that are on the disk."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        values = {name: int(value) for name, value in (line.split() for line in stat.read_text().splitlines())}
        cached = values[f"{prefix}inactive_file"] + values[f"{prefix}active_file"]
        return max(0, cached - sum(values.get(name, 0) for name in unwritten))
    return 0


def cpus_near(device: torch.device) -> set[int]:
    """Give the processors that share a socket with a GPU, of those that this process may use; none where nothing tells."""
    if device.type != "cuda":
        return set()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found: Any = torch.cuda.get_device_properties(device)
        name = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        text = Path("/sys/bus/pci/devices", name, "local_cpulist").read_text()
        return parse_cpus(text) & os.sched_getaffinity(0)
    return set()


def parse_cpus(text: str) -> set[int]:
    """Read a list of processors as Linux writes it, such as 0-31,64-95."""
    out: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        out |= set(range(int(first), int(last or first) + 1))
    return out


def _wait_and_unlock(address: int) -> None:
    with contextlib.suppress(Exception):
        torch.cuda.synchronize()  # copies may still be under way
    page_unlock(address)


def _map(num_bytes: int) -> mmap.mmap:
    try:
        block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise HostMemoryError(
            f"{num_bytes / 1e9:.1f} GB of host memory are needed here: {os.strerror(error.errno or 0)}"
        ) from None
    with contextlib.suppress(AttributeError, OSError):  # not every system has large pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _tensor_of(block: mmap.mmap, cpus: set[int]) -> Tensor:
    memory = torch.frombuffer(block, dtype=torch.uint8)
    pages = memory[:: mmap.PAGESIZE].chunk(_THREADS)

    def settle() -> None:
        if cpus:  # Linux takes memory from the socket of whoever touches it first
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, cpus)

    with ThreadPoolExecutor(_THREADS, initializer=settle) as pool:
        list(pool.map(Tensor.zero_, pages))
    return memory
