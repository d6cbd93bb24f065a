"""How a layout scales: the same on ever more GPUs, with as many sequences on each or as many on all together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from runtime.estimate.machine import Machine
from runtime.estimate.setup import Setup
from runtime.estimate.step import Estimate

FACTORS = (1, 2, 4, 8, 16, 32, 64)
MAX_RANKS = 16384


@dataclass(frozen=True, slots=True)
class Point:
    """A number of GPUs."""

    gpus: int
    sequences: int
    """Of a step."""
    seconds: float
    tokens_per_second: float
    share: float
    """Of ideal scaling from the first point on."""


def scaling(setup: Setup, machine: Machine, imbalance: float | None = None) -> dict[str, list[Point]]:
    """Work out both curves, data parallelism growing.

    Args:
        setup: the layout to begin with.
        machine: the constants.
        imbalance: rows of the fullest expert-parallel rank, of the mean; None takes the machine's.

    Returns:
        `weak` (the sequences of a GPU stay) and `strong` (the sequences of a step stay, as far as they divide).
    """
    return {
        "weak": list(_points(setup, machine, imbalance, strong=False)),
        "strong": list(_points(setup, machine, imbalance, strong=True)),
    }


def scaling_lines(curves: dict[str, list[Point]]) -> Iterator[str]:
    """Give both curves as a table for people."""
    yield "scaling (data parallelism grows): ms, tokens/s, share of ideal"
    yield "GPUs".rjust(7) + "sequences of a GPU stay".rjust(36) + "sequences of a step stay".rjust(36)
    for number, weak in enumerate(curves["weak"]):
        strong = curves["strong"][number] if number < len(curves["strong"]) else None
        cells = [
            f"{p.seconds * 1e3:,.0f}  {p.tokens_per_second:,.0f}  {p.share:.0%}" if p else "" for p in (weak, strong)
        ]
        yield f"{weak.gpus:7}" + "".join(cell.rjust(36) for cell in cells)


def scaling_json(setup: Setup, machine: Machine, imbalance: float | None = None) -> dict[str, Any]:
    """Give both curves as JSON values."""
    return {name: [asdict(p) for p in points] for name, points in scaling(setup, machine, imbalance).items()}


def _points(setup: Setup, machine: Machine, imbalance: float | None, *, strong: bool) -> Iterator[Point]:
    first: Point | None = None
    for factor in FACTORS:
        count, left = divmod(setup.num_microbatches, factor if strong else 1)
        rounds = setup.parallel.vpp == 1 or count % setup.parallel.pp == 0
        if left or not count or not rounds or setup.world_size * factor > MAX_RANKS:
            return
        larger = replace(setup, world_size=setup.world_size * factor, num_microbatches=count)
        estimate = Estimate(larger, machine, imbalance)
        speed = estimate.tokens_per_second
        share = 1.0 if first is None else speed / factor / first.tokens_per_second
        point = Point(larger.world_size, larger.global_batch_size, estimate.seconds, speed, share)
        first = first or point
        yield point
