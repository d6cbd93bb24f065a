"""How many layers each stage of a pipeline gets, so that stages with an end of the model take no longer than the others.

The head is worth several layers where layers are small and the vocabulary large; a stage that has it beside as many layers as
the others makes all of them wait. The trainer, a plan and a search level it by the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from runtime.estimate.step import Estimate
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.degrees import FLAGS

LEAST_GAIN = 0.03
"""Of a step's time: with less, constants that are a little off could make it a loss."""
FULL = 0.95
"""Of a GPU's memory: a split with a higher peak than the one in hand stays below."""


@dataclass(frozen=True, slots=True)
class Leveled:
    """A split that shortens a step."""

    estimate: Estimate
    """With the split."""
    before: Estimate

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of each stage, in the order of the model."""
        counts = self.estimate.setup.parallel.pp_layers
        assert counts is not None
        return counts

    @property
    def gain(self) -> float:
        """Share of a step's time that it saves."""
        return 1 - self.estimate.seconds / self.before.seconds

    @property
    def head(self) -> float:
        """Time of final norm, head and loss, in last layers."""
        costs, last = self.estimate.costs, self.estimate.setup.model.sizes["layers"] - 1
        layer, head = costs.layer(last), costs.ends()[1]
        return (head.forward + head.backward) / (layer.forward + layer.backward)


def level(estimate: Estimate) -> Leveled | None:
    """Find the split of the layers that levels the stages.

    Args:
        estimate: of a layout, with the split in hand.

    Returns:
        The split; None where none shortens a step by `LEAST_GAIN` or more and leaves memory enough.
    """
    if estimate.setup.parallel.pp == 1:
        return None
    costs = estimate.costs
    given = tuple(len(part) for part in estimate.setup.parameters.chunks)

    @cache
    def picoseconds(start: int, stop: int) -> int:  # whole numbers compare exactly
        cost = costs.stage(range(start, stop))
        return round((cost.forward + cost.backward) * 1e12)

    counts = balance(given, picoseconds, estimate.setup.parallel.pp)
    if counts == given:
        return None
    found = Leveled(estimate.split(counts), estimate)
    roomy = found.estimate.peak <= max(FULL * estimate.machine.memory, estimate.peak)
    roomy = roomy and (found.estimate.fits_host or not estimate.fits_host)
    return found if roomy and found.gain >= LEAST_GAIN else None


def settle(estimate: Estimate, *, stated: bool) -> tuple[Estimate, str | None]:
    """Level the stages of a layout, or say that they could be.

    Args:
        estimate: of the layout.
        stated: whether somebody has said how many layers each stage has: then they stay.

    Returns:
        The estimate to go by, and a line for people; None where there is nothing to say.
    """
    found = level(estimate)
    if found is None:
        return estimate, None
    flag = f"{FLAGS['pp_layers']} {_words(found.estimate)}"
    why = f"final norm, head and loss take the time of {found.head:.1f} layers"
    if stated:
        return estimate, f"{flag} would take about {found.gain:.0%} less time a step than {_words(estimate)}: {why}"
    return found.estimate, f"{flag} is taken, about {found.gain:.0%} less time a step than {_words(estimate)}: {why}"


def _words(estimate: Estimate) -> str:
    """The layers of each stage, as the flag takes them."""
    return ",".join(str(len(part)) for part in estimate.setup.parameters.chunks)


def states_layers(parallel: ParallelConfig) -> bool:
    """Whether settings say how many layers each stage has."""
    return parallel.pp_layers is not None or parallel.layers_per_virtual_stage is not None


def balance(given: tuple[int, ...], seconds: Callable[[int, int], int], pp: int) -> tuple[int, ...]:
    """Move layers one by one to another stage, as long as that levels the ranks.

    Args:
        given: layers of each stage to begin with, virtual ones too, in the order of the model.
        seconds: from the first layer of a stage and the one behind its last to its time, in any unit.
        pp: pipeline ranks; stage s is of rank s modulo pp.

    Returns:
        Layers of each stage. Of equally level splits the one whose later stages have more: these hold fewer micro-batches.
    """

    def key(counts: Sequence[int]) -> tuple[int, int, int]:
        stops = [0, *accumulate(counts)]
        stages = [seconds(start, stop) for start, stop in pairwise(stops)]
        ranks = [sum(stages[rank::pp]) for rank in range(pp)]
        return max(ranks), sum(rank**2 for rank in ranks), sum(stage**2 for stage in stages)

    best, least = given, key(given)
    while True:
        keys = {counts: key(counts) for counts in _moves(best)}
        found = min(keys, key=keys.__getitem__, default=best)
        if found == best or keys[found] >= least:
            return best
        best, least = found, keys[found]


def _moves(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Give all splits with one layer on another stage, those that end up on later stages first."""
    for to in reversed(range(len(counts))):
        for source, count in enumerate(counts):
            if source != to and count > 1:
                moved = list(counts)
                moved[source] -= 1
                moved[to] += 1
                yield tuple(moved)
