"""Whether the hosts of a run have the memory for copies of what a save writes; all ranks come to the same answer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LEFT = 0.1
"""Share of a host's available memory that is left alone: page cache of what is being written, other processes."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a rank would take for its copies, and what it finds."""

    host: str
    """The same for all ranks of a machine, containers or not."""
    num_bytes: int
    """That it hasn't yet."""
    available: int | None
    """Bytes that its host has; None where nothing tells."""
    waits: bool = False
    """Whether training waits for this save anyway: then there is no use in copies."""


def host_name() -> str:
    """Name the machine whose memory this process uses; containers on one have one name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def shortage(needs: Sequence[Need]) -> str | None:
    """Find a host that has no room for the copies of all its ranks at once.

    Args:
        needs: of every rank.

    Returns:
        What the one that lacks most needs and has; None if every host has room, or nothing tells.
    """
    found = []
    for host in {need.host for need in needs}:
        here = [need for need in needs if need.host == host]
        wanted = sum(need.num_bytes for need in here)
        known = [need.available for need in here if need.available is not None]
        if known and wanted > (1 - LEFT) * min(known):
            found.append((wanted - min(known), wanted, min(known), len(here)))
    if not found:
        return None
    _, wanted, available, ranks = max(found)
    of = f" of {ranks} ranks" if ranks > 1 else ""
    return (
        f"copies{of} would take {wanted / 1e9:.2f} GB more of a machine's memory, which has {available / 1e9:.2f} GB "
        f"available, {LEFT:.0%} of it to be left"
    )
