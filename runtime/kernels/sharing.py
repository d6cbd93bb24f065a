"""Products beside transfers between GPUs, whose kernels have some of the multiprocessors for themselves for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LOOSE_WAVES = 3
"""Jobs for each pair of multiprocessors that are dealt out late. In Mixtral's layer a job takes 50 to 180 us, and an
exchange of 4096 tokens' rows 160 to 300 us on NVLink: what a pair misses of its share, the others do."""

_waves = 0


@contextmanager
def shared_device(waves: int = LOOSE_WAVES) -> Iterator[None]:
    """Say that transfers run beside the products within, in this process's every thread.

    Args:
        waves: jobs for each pair of multiprocessors that go to whichever is free; 0 for none.
    """
    global _waves
    _waves, before = waves, _waves
    try:
        yield
    finally:
        _waves = before


def loose_waves() -> int:
    """Jobs for each pair of multiprocessors that go to whichever is free."""
    return _waves
