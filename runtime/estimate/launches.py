"""How many kernels the host launches for a micro-batch, memory settings included.

The counts are of the code, not of a machine: each is read off the profile of a step (docs/planning.md names them), divided by
layers and micro-batches. A launch takes the host `launch_us`, Python's share included; what is replayed as a CUDA graph takes
it next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from runtime.estimate.local import Local
from runtime.estimate.parameters import Parameter
from runtime.estimate.setup import Setup
from runtime.estimate.traffic import Transfer


class Launches(NamedTuple):
    """Of a forward and a backward pass."""

    forward: float
    backward: float

    def plus(self, other: Launches, times: float = 1) -> Launches:
        """Add others, so many times."""
        return Launches(self.forward + times * other.forward, self.backward + times * other.backward)


NONE = Launches(0, 0)
DENSE = Launches(16, 29)
"""Norms, attention with its projections, and a gated network or what a MoE layer has besides."""
MOE = Launches(26, 42)
"""Router, its statistics and sorting, and experts."""
FP8 = Launches(9, 11)
"""What makes operands in 8 bits."""
ADAPTER = Launches(2, 5)
EXPERTS_ADAPTER = Launches(5, 9)
ENDS = Launches(10, 13)
"""Embedding, head and loss together."""
_TO_PRODUCT, _TO_PRODUCT_ONCE = 4, 8
"""From where the host knows how many rows come: exchange, unpacking, gather, product; where a token comes once, sorting besides."""


def launches_behind_wait(setup: Setup, local: Local) -> int:
    """Count what the host launches, while the device has nothing to do, after it has waited for the numbers of rows in a MoE layer.

    Args:
        setup: what is planned.
        local: one rank's sizes.

    Returns:
        Launches of the forward pass up to the first product; none where rows aren't exchanged, where room for them is set aside,
        and where another micro-batch is computed meanwhile.
    """
    if not local.exchanged or setup.captured or setup.parallel.overlap_exchange:
        return 0
    return _TO_PRODUCT_ONCE if local.once else _TO_PRODUCT


def layer_launches(setup: Setup, parameters: Iterable[Parameter], transfers: Iterable[Transfer]) -> Launches:
    """Count those of a layer, without recomputation of whole layers.

    Args:
        setup: what is planned.
        parameters: the layer's, of one rank.
        transfers: its collectives.

    Returns:
        Kernels of both passes.
    """
    found = list(parameters)
    moe = any(p.part == "experts" for p in found)
    out = DENSE.plus(MOE) if moe else DENSE
    if setup.fp8.format is not None:
        out = out.plus(FP8)
    adapters = [p for p in found if p.part == "adapters"][::2]  # A and B in turns
    for adapter in adapters:
        out = out.plus(EXPERTS_ADAPTER if adapter.expert else ADAPTER)
    for transfer in transfers:
        out = out.plus(Launches(transfer.forward, transfer.backward))
    if moe and setup.moe is not None and setup.moe.recompute_layer:
        out = out.plus(Launches(0, MOE.forward))
    return out
