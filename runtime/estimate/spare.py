"""How much of an optimizer's state stays on the GPUs, where a part of it goes to the host's memory."""

from __future__ import annotations

import math
from dataclasses import replace

from runtime.estimate.split import FULL
from runtime.estimate.step import Estimate

_LEAST = 5
"""Hundredths on the host: who sends state there wants room on the GPUs."""


def all_on_host(estimate: Estimate) -> Estimate:
    """Send all of the state that may go to the host there."""
    return estimate.with_optim(replace(estimate.setup.optim, optimizer_offload_fraction=1.0))


def keep_what_fits(estimate: Estimate) -> Estimate:
    """Leave on the GPUs what has room there: each update has so much less to bring and to take back.

    Args:
        estimate: of a setup with all of it on the host, which fits.

    Returns:
        The estimate with the smallest share on the host, in hundredths, that fills no GPU by more than `FULL`.
    """
    limit = FULL * estimate.machine.memory
    shares = [1 - (limit - memory.peak) / memory.state.host for memory in estimate.memory if memory.state.host]
    least = max(_LEAST, math.ceil(100 * max(shares, default=1.0)))
    for hundredths in range(least, 100):  # whole buckets go, so the first may be too few
        optim = replace(estimate.setup.optim, optimizer_offload_fraction=hundredths / 100)
        found = estimate.with_optim(optim)
        if found.peak <= limit:
            return found
    return estimate
