"""What a virtual stage takes: its layers' and ends' times, traffic and activations put together, for one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.estimate.activations import Kept, ends_activations, layer_activations, layer_input
from runtime.estimate.compute import ends_work, layer_work
from runtime.estimate.launches import ENDS, NONE, Launches, launches_behind_wait, layer_launches
from runtime.estimate.local import Local, local_sizes
from runtime.estimate.machine import Machine
from runtime.estimate.setup import Setup
from runtime.estimate.traffic import Transfer, ends_traffic, layer_traffic

_PARTS: Mapping[str, tuple[str, ...]] = {
    "layer_inputs": ("inputs",),
    "attention": ("attention",),
    "mlp": ("experts", "router", "shared", "mlp"),
}
"""What --offload-activations names -> parts of the activations."""


@dataclass(slots=True)
class Cost:
    """Of one micro-batch on one rank."""

    forward: float = 0.0
    """Seconds, communication included."""
    backward: float = 0.0
    weights: float = 0.0
    """Of the backward pass: gradients of weights alone."""
    exposed: float = 0.0
    """Of both passes: communication, which nothing hides."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of both passes by part of the model."""
    kept: dict[str, float] = field(default_factory=dict)
    """Bytes from forward to backward pass by part."""
    away: dict[str, float] = field(default_factory=dict)
    """Bytes that wait in the host's memory for the backward pass, by part."""
    working: float = 0.0
    """Bytes that the layer which needs most does in its backward pass, beside what is kept."""
    head_working: float = 0.0
    """Bytes that head and loss do; after them the logits are gone."""
    launches: Launches = NONE
    """Kernels that the host launches."""
    transfers: list[tuple[Transfer, int]] = field(default_factory=list)
    """Collectives of a micro-batch, each with the number of layers that have it."""

    def add(self, other: Cost, times: int = 1) -> None:
        """Put so many layers of a kind into a stage."""
        self.forward += other.forward * times
        self.backward += other.backward * times
        self.weights += other.weights * times
        self.exposed += other.exposed * times
        self.launches = self.launches.plus(other.launches, times)
        merge(self.parts, other.parts, times)
        merge(self.kept, other.kept, times)
        merge(self.away, other.away, times)
        self.working = max(self.working, other.working)
        self.head_working = max(self.head_working, other.head_working)
        self.transfers += [(transfer, count * times) for transfer, count in other.transfers]

    @property
    def kept_bytes(self) -> float:
        """All that is kept."""
        return sum(self.kept.values())

    @property
    def most_working(self) -> float:
        """Bytes beside all that is kept at the moment that needs most."""
        return max(self.head_working, self.working - self.kept.get("head", 0.0))


class Costs:
    """The costs of the layers and stages of a setup; layers of one kind are worked out once."""

    def __init__(
        self,
        setup: Setup,
        machine: Machine,
        imbalance: float | None = None,
        layers: dict[object, Cost] | None = None,
    ) -> None:
        """Prepare.

        Args:
            setup: what is planned.
            machine: the constants.
            imbalance: rows of the fullest expert-parallel rank, of the mean; None takes the machine's.
            layers: costs of layers that have been worked out for setups which differ in pipeline, data parallelism and
                optimizer alone, and are replayed as CUDA graphs or are not, all of them; None for none.
        """
        self.setup, self.machine = setup, machine.replayed() if setup.captured else machine
        self.local: Local = local_sizes(setup, machine, imbalance)
        self._layers: dict[object, Cost] = {} if layers is None else layers

    def stage(self, layers: range) -> Cost:
        """Put a virtual stage together."""
        setup, out = self.setup, Cost()
        counts: dict[object, tuple[int, bool, int]] = {}
        for place, layer in enumerate(layers):
            again = self._recomputed(place)
            key = self._key(layer, again)
            counts[key] = (layer, again, counts[key][2] + 1 if key in counts else 1)
        for layer, again, times in counts.values():
            out.add(self.layer(layer, recomputed=again), times)
        ends = (layers.start == 0, layers.stop == setup.model.sizes["layers"])
        self._add_ends(out, ends)
        self._wait_for_host(out)
        return out

    def _add_ends(self, out: Cost, ends: tuple[bool, bool]) -> None:
        """Put embedding, and final norm, head and loss into a stage that has them."""
        for here, cost in zip(ends, self.ends(), strict=True):
            if here:
                out.add(cost)

    def ends(self) -> tuple[Cost, Cost]:
        """Give the costs of the embedding, and of final norm, head and loss."""
        setup, costs = self.setup, []
        works = ends_work(setup, self.local, self.machine)
        kept, traffic = ends_activations(setup, self.local), ends_traffic(setup, self.local)
        for work, activations, transfers in zip(works, kept, traffic, strict=True):
            cost = Cost()
            for part in work:
                _count(cost, part.part, part.forward, part.backward, part.weights)
            self._communicate(cost, transfers)
            merge(cost.kept, activations.parts)
            cost.head_working = activations.working
            cost.launches = Launches(ENDS.forward / 2, ENDS.backward / 2)
            costs.append(cost)
        return costs[0], costs[1]

    def layer(self, layer: int, *, recomputed: bool = False) -> Cost:
        """Give the cost of a layer.

        Args:
            layer: its number.
            recomputed: whether it keeps its input alone and is computed again.
        """
        key = self._key(layer, recomputed)
        if key not in self._layers:
            self._layers[key] = self._layer(layer, recomputed)
        return self._layers[key]

    def _key(self, layer: int, recomputed: bool) -> object:
        """What decides the cost of a layer."""
        return self.setup.parameters.kind(layer), self.setup.model.compute.windows[layer], recomputed

    def _layer(self, layer: int, recomputed: bool) -> Cost:
        setup, machine, cost = self.setup, self.machine, Cost()
        for work in layer_work(setup, self.local, machine, layer, setup.parameters.layer(layer)):
            _count(cost, work.part, work.forward, work.backward, work.weights)
        gap = machine.layer_gap_us * 1e-6
        if gap:
            _count(cost, "host", gap / 3, 2 * gap / 3, 0.0)
        if layer in setup.model.moe_layers and (waiting := launches_behind_wait(setup, self.local)):
            _count(cost, "host", waiting * machine.launch_us * 1e-6, 0.0, 0.0)
        transfers = layer_traffic(setup, self.local, layer)
        self._communicate(cost, transfers)
        cost.launches = layer_launches(setup, setup.parameters.layer(layer), transfers)
        kept = layer_activations(setup, self.local, layer)
        if recomputed:
            cost.parts["made again"] = cost.forward
            cost.backward += cost.forward
            cost.launches = cost.launches.plus(Launches(0, cost.launches.forward))
            kept = Kept({"inputs": layer_input(setup)}, kept.working + kept.total)
        names = {part for module in setup.recompute.offload for part in _PARTS[module]}
        cost.away = {part: size for part, size in kept.parts.items() if part in names}
        merge(cost.kept, {part: size for part, size in kept.parts.items() if part not in names})
        # Those of the layer before are on their way back while a layer's are used.
        cost.working = kept.working + 2 * sum(cost.away.values())
        self._wait_for_link(cost)
        return cost

    def _wait_for_link(self, cost: Cost) -> None:
        """A layer takes at least as long as what it sends to the host, in each pass."""
        sent = sum(cost.away.values())
        if sent:
            ranks = min(self.setup.world_size, self.machine.gpus_per_node)
            seconds = self.machine.over_the_link(sent, ranks, ways=1)
            _count(cost, "link", max(0.0, seconds - cost.forward), max(0.0, seconds - cost.backward), 0.0)

    def _recomputed(self, place: int) -> bool:
        recompute = self.setup.recompute
        return recompute.granularity == "full" and (recompute.num_layers == 0 or place < recompute.num_layers)

    def _wait_for_host(self, cost: Cost) -> None:
        """A micro-batch takes at least as long as the host needs to launch its kernels, but for a graph's."""
        if self.setup.captured:
            return
        launches = cost.launches
        idle = sum(launches) * self.machine.launch_us * 1e-6 - cost.forward - cost.backward
        if idle > 0:
            forward = idle * launches.forward / sum(launches)
            _count(cost, "host", forward, idle - forward, 0.0)

    def _communicate(self, cost: Cost, transfers: list[Transfer]) -> None:
        again = 1.0 if self.setup.moe is not None and self.setup.moe.recompute_layer else 0.0
        for transfer in transfers:
            seconds = transfer.exposed(self.machine)
            more = again * transfer.forward if transfer.axis.name in ("ep", "etp") else 0.0
            forward, backward = transfer.forward * seconds, (transfer.backward + more) * seconds
            cost.forward += forward
            cost.backward += backward
            cost.exposed += forward + backward
        cost.transfers += [(transfer, 1) for transfer in transfers]


def _count(cost: Cost, part: str, forward: float, backward: float, weights: float) -> None:
    cost.forward += forward
    cost.backward += backward
    cost.weights += weights
    merge(cost.parts, {part: forward + backward})


def merge(into: dict[str, float], more: Mapping[str, float], times: float = 1) -> None:
    """Add numbers by name, so many times."""
    for name, value in more.items():
        into[name] = into.get(name, 0.0) + value * times
