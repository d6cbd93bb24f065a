"""Updated weights on their way to the ranks that share their updates, beside the next forward pass.

Each bucket is gathered by itself, in the order in which a forward pass needs them, and a stage waits for a part's weights when
that part begins: the device does, the host goes on. Whoever reads weights in another way waits for all of them first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

FIRST, LAST = -1, 1 << 30
"""What a stage computes before its first layer and after its last; between them are the layers' places."""


class Gathered(Protocol):
    """A bucket, as far as its weights travel."""

    parameters: list[nn.Parameter]

    def publish(self) -> None:
        """Begin to bring the weights of each data-parallel rank's shard to all."""

    def arrive(self) -> None:
        """Wait, on the device, for what has begun, if anything has."""


@runtime_checkable
class InParts(Protocol):
    """A stage whose parts say when they begin."""

    layers: nn.ModuleList
    needs: Callable[[int], None]
    """Called with the place of the part that begins."""

    def last_modules(self) -> Iterable[nn.Module]:
        """What comes after the last layer."""


def _parts_of(stage: Any) -> Iterator[tuple[int, nn.Parameter]]:
    """A stage's parameters with the place of the part that needs them first."""
    if not isinstance(stage, InParts):
        yield from ((FIRST, parameter) for parameter in stage.parameters())
        return
    found: dict[nn.Parameter, int] = {}
    for module in stage.last_modules():
        found |= dict.fromkeys(module.parameters(), LAST)
    for place, layer in reversed(list(enumerate(stage.layers))):
        found |= dict.fromkeys(layer.parameters(), place)
    for name, parameter in stage.named_parameters():  # type: ignore[attr-defined]
        # A head that is tied to the embedding is needed by that first.
        if parameter not in found or name.startswith("embedding."):
            found[parameter] = FIRST
    for parameter, place in found.items():
        yield place, parameter


def _part_begins(needed: Mapping[int, Sequence[Gathered]], place: int) -> None:
    _arrive(needed.get(place, ()))


def _arrive(buckets: Iterable[Gathered]) -> None:
    for bucket in buckets:
        bucket.arrive()


class Arrival:
    """The weights of a rank's stages on their way."""

    def __init__(self, stages: Sequence[nn.Module], buckets: Sequence[Gathered]) -> None:
        """Have the stages wait for their weights.

        Args:
            stages: this rank's, with the parameters that the buckets hold.
            buckets: whose weights travel.
        """
        holder = {parameter: bucket for bucket in buckets for parameter in bucket.parameters}
        first: dict[int, tuple[int, int]] = {}
        for number, stage in enumerate(stages):
            needed: dict[int, list[Gathered]] = {}
            for place, parameter in sorted(_parts_of(stage), key=lambda item: item[0]):
                bucket = holder.get(parameter)
                if bucket is not None and bucket not in (mine := needed.setdefault(place, [])):
                    mine.append(bucket)
                    first.setdefault(id(bucket), (number, place))
            if isinstance(stage, InParts):
                stage.needs = functools.partial(_part_begins, needed)
        self._at_once = not all(isinstance(stage, InParts) for stage in stages)
        self._order = sorted((b for b in buckets if id(b) in first), key=lambda bucket: first[id(bucket)])
        self.deferred = False
        """Whether `begin` leaves it to `send`: to a CUDA graph, whose beginning that is."""
        self.due = False
        """Whether something has been left."""

    def begin(self) -> None:
        """Send the weights off; to stages that don't say when their parts begin, all arrive at once."""
        self.finish()
        self.due = True
        if not self.deferred:
            self.send()

    def send(self, *, again: bool = False) -> None:
        """Send off what has been left, and with `again` also where nothing has."""
        if self.due or again:
            self.due = False
            for bucket in self._order:
                bucket.publish()
            if self._at_once:
                _arrive(self._order)

    def finish(self) -> None:
        """Wait for all of them."""
        self.send()
        _arrive(self._order)
