"""A whole step: memory of each stage, the passes as they run, what follows them, and the numbers that people compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from runtime.errors import require
from runtime.estimate.activations import layer_input
from runtime.estimate.compute import update_seconds
from runtime.estimate.fp8 import copying_seconds
from runtime.estimate.machine import Machine
from runtime.estimate.memory import Memory, rank_memory
from runtime.estimate.schedule import Pipeline
from runtime.estimate.setup import Setup
from runtime.estimate.simulate import Event, bubble, simulate
from runtime.estimate.stage import Cost, Costs
from runtime.estimate.state import checkpoint_bytes
from runtime.estimate.traffic import Transfer, axes, gradient_traffic, partial_traffic, sharding_passes
from runtime.log.flops import training_flops
from runtime.optim.config import OptimConfig


@dataclass(frozen=True, slots=True)
class After:
    """What a rank does after its passes, in seconds."""

    reduce: float
    """Sums of gradients, as far as the passes don't hide them."""
    update: float
    gather: float
    """Updated weights to all replicas."""
    transfers: tuple[Transfer, ...]
    """Collectives of a step."""


def _not_hidden(seconds: float, share: float, beside: float) -> float:
    """What is exposed of traffic of which a share hides behind a pass, as far as that is long enough."""
    return max(seconds * (1 - share), seconds - beside)


class Estimate:
    """What a step of a setup takes on a machine; each number is worked out when it is asked for."""

    def __init__(
        self,
        setup: Setup,
        machine: Machine,
        imbalance: float | None = None,
        layers: dict[object, Cost] | None = None,
    ) -> None:
        """Prepare.

        Args:
            setup: what is planned; `runtime.settings.check` has nothing against it.
            machine: the constants.
            imbalance: rows of the fullest expert-parallel rank, of the mean; None takes the machine's.
            layers: as `Costs` takes them.

        Raises:
            ConfigError: the machine has no FP8, which is asked for.
        """
        require(
            setup.fp8.format is None or machine.fp8_tflops > 0,
            f"--fp8-format {setup.fp8.format}: {machine.gpu} computes nothing in 8 bits; leave it out, or name another --gpu",
        )
        self.setup, self.machine, self._imbalance = setup, machine, imbalance
        self._layers: dict[object, Cost] = {} if layers is None else layers
        parallel = setup.parallel
        together = 2 if parallel.overlap_exchange else 1
        self.pipeline = Pipeline(parallel.pp, parallel.vpp, parallel.pp_schedule, setup.num_microbatches, together)
        self.costs = Costs(setup, machine, imbalance, self._layers)

    def split(self, counts: tuple[int, ...] | None) -> Estimate:
        """Give the estimate of the same setup with other numbers of layers on the (virtual) stages; None: equally many."""
        return self._of(replace(self.setup, parallel=replace(self.setup.parallel, pp_layers=counts)))

    def with_optim(self, optim: OptimConfig) -> Estimate:
        """Give the estimate of the same setup with other settings of the optimizer, and the same groups of tensors."""
        return self._of(replace(self.setup, optim=optim).sharing(self.setup.parameters))

    def _of(self, setup: Setup) -> Estimate:
        return Estimate(setup, self.machine, self._imbalance, self._layers)

    @cached_property
    def stages(self) -> dict[int, Cost]:
        """The cost of each virtual stage with one micro-batch, by its number in the model."""
        seen: dict[object, Cost] = {}
        out = {}
        for number, layers in enumerate(self.setup.parameters.chunks):
            key: object = number
            if self.setup.model.sizes["layers"] > 1 and 0 < number < len(self.setup.parameters.chunks) - 1:
                key = tuple((self.setup.parameters.kind(n), self.setup.model.compute.windows[n]) for n in layers)
            if key not in seen:
                seen[key] = self.costs.stage(layers)
            out[number] = seen[key]
        return out

    def costs_of(self, rank: int) -> dict[int, Cost]:
        """The virtual stages of a pipeline rank."""
        numbers = range(rank, self.pipeline.pp * self.pipeline.vpp, self.pipeline.pp)
        return {number: self.stages[number] for number in numbers}

    @cached_property
    def memory(self) -> list[Memory]:
        """Of each pipeline rank."""
        return [
            rank_memory(self.setup, self.pipeline, rank, self.costs_of(rank)) for rank in range(self.setup.parallel.pp)
        ]

    @property
    def fullest(self) -> int:
        """The pipeline rank whose peak is the highest."""
        peaks = [memory.peak for memory in self.memory]
        return peaks.index(max(peaks))

    @property
    def peak(self) -> float:
        """Bytes of the fullest rank at the peak."""
        return max(memory.peak for memory in self.memory)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's peak fits its GPU, and the fullest machine's state its memory."""
        return self.fits_gpus and self.fits_host

    @property
    def fits_gpus(self) -> bool:
        """Whether the fullest rank's peak fits its GPU."""
        return self.peak <= self.machine.memory

    @property
    def fits_host(self) -> bool:
        """Whether what goes to the host fits there, as far as its memory is known."""
        limit = self.machine.host_memory_gb
        return not limit or not self.setup.uses_host or self.host <= limit * 1e9

    @cached_property
    def host(self) -> float:
        """Bytes of the memory of the machine that holds most: optimizer state and activations."""
        if not self.setup.uses_host:
            return 0.0
        stride, world = axes(self.setup)["pp"].stride, self.setup.world_size
        mine = [memory.host for memory in self.memory]
        per = min(world, self.machine.gpus_per_node)
        # Ranks of a stage follow each other, so a machine has whole runs of them.
        return max(
            sum(mine[rank // stride] for rank in range(begin, min(begin + per, world)))
            for begin in range(0, world, per)
        )

    @cached_property
    def passes(self) -> list[list[Event]]:
        """The forward and backward passes of each pipeline rank."""
        seconds: dict[tuple[str, int], float] = {}
        for number, cost in self.stages.items():
            seconds["F", number] = cost.forward
            seconds["B", number] = cost.backward
            seconds["I", number], seconds["W", number] = cost.backward - cost.weights, cost.weights
        return simulate(self.pipeline, seconds, self._send)

    def _send(self, source: int, target: int) -> float:
        """Seconds of a stage's output on its way to the next stage, or of a gradient on its way back."""
        stride = axes(self.setup)["pp"].stride
        nodes = [rank * stride // self.machine.gpus_per_node for rank in (source, target)]
        link = self.machine.links["nvlink" if nodes[0] == nodes[1] else "network"]
        return link.seconds("send", layer_input(self.setup), 2) + self.machine.collective_gap_us * 1e-6

    @cached_property
    def after(self) -> list[After]:
        """What each pipeline rank does after its passes."""
        return [self.after_of(rank) for rank in range(self.setup.parallel.pp)]

    def after_of(self, rank: int) -> After:
        """Work out what a pipeline rank does after its passes."""
        setup, machine = self.setup, self.machine
        sums = setup.parameters.sums(rank)
        reduce, gather = gradient_traffic(setup, sums)
        reducing = sum(t.seconds(machine) * t.backward for t in reduce)
        backward = sum(cost.backward for cost in self.costs_of(rank).values())
        gathering = sum(t.seconds(machine) * t.forward for t in gather)
        # Hidden behind the next step's first forward pass.
        forward = sum(cost.forward for cost in self.costs_of(rank).values())
        gathering = _not_hidden(gathering, machine.gather_hidden, forward)
        if setup.parallel.fully_shard:
            exposed, gathering = self._fully_sharded(rank, reduce, gather), 0.0
        elif setup.parallel.pp > 1 and setup.parallel.pp_schedule == "zero-bubble":
            exposed = reducing
        else:  # hidden behind the last micro-batch's backward pass
            exposed = _not_hidden(reducing, machine.reduce_hidden, backward)
        partial = partial_traffic(setup, sums)
        exposed += sum(t.exposed(machine) for t in partial)
        updating = update_seconds(setup, machine, setup.owned(rank)) + copying_seconds(setup, machine, rank)
        return After(exposed, updating, gathering, (*reduce, *gather, *partial))

    def _fully_sharded(self, rank: int, reduce: list[Transfer], gather: list[Transfer]) -> float:
        """Seconds of full sharding's traffic in a step that computing doesn't hide.

        Each layer's weights travel while another one is computed, in both passes, and its gradients in the backward pass;
        as much of it is taken to be hidden as of the gradients' reduction without sharding. What torch's full sharding casts
        and copies for it takes the memory that computing is bound by, too: nothing of that is hidden.
        """
        machine, layers = self.machine, sum(len(r) for r in self.setup.parameters.chunks[rank :: self.pipeline.pp])
        travelling = 0.0
        for transfer in (*reduce, *gather):
            times = transfer.forward + transfer.backward
            travelling += times * (transfer.seconds(machine) + (layers - 1) * transfer.latency(machine))
        computing = sum(cost.forward + cost.backward for cost in self.costs_of(rank).values())
        hidden = machine.reduce_hidden
        exposed = max(travelling * (1 - hidden), travelling - hidden * computing)
        return self.setup.num_microbatches * (exposed + machine.moving(sharding_passes(self.setup, rank), "plain"))

    @cached_property
    def events(self) -> list[list[Event]]:
        """All that each pipeline rank does in a step; the update waits for everyone's gradient norm."""
        ends = [found[-1].end for found in self.passes]
        summed = max(end + after.reduce for end, after in zip(ends, self.after, strict=True))
        out = []
        for rank, (found, after) in enumerate(zip(self.passes, self.after, strict=True)):
            end, updated = found[-1].end, summed + after.update
            more = [Event("sum gradients", "reduce", rank, end, after.reduce)] if after.reduce else []
            more.append(Event("update", "update", rank, summed, after.update))
            more += [Event("gather weights", "gather", rank, updated, after.gather)] if after.gather else []
            out.append([*found, *more])
        return out

    @property
    def places(self) -> dict[int, tuple[int, int]]:
        """Pipeline rank -> the node and the global rank of the first that stands for its stage."""
        stride = axes(self.setup)["pp"].stride
        return {rank: (rank * stride // self.machine.gpus_per_node, rank * stride) for rank in range(self.pipeline.pp)}

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(found[-1].end for found in self.events)

    @property
    def bubble(self) -> float:
        """Share of the passes' time in which ranks wait for each other."""
        return bubble(self.passes, max(found[-1].end for found in self.passes))

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing hides, on the rank that has most, waits for other stages left out."""
        count = self.setup.num_microbatches
        return max(
            count * sum(cost.exposed for cost in self.costs_of(rank).values()) + after.reduce + after.gather
            for rank, after in enumerate(self.after)
        )

    @property
    def flops(self) -> float:
        """Operations of the model in a step, without recomputation."""
        return training_flops(self.setup.model, self.setup.seq_length) * self.setup.tokens

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.setup.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """TFLOP/s of each GPU."""
        return self.flops / self.seconds / self.setup.world_size / 1e12

    @property
    def utilization(self) -> float | None:
        """Share of the GPU's peak; None for a GPU whose peak isn't known."""
        peak = self.machine.peak
        return self.tflops * 1e12 / peak if peak and self.setup.dtype in ("bfloat16", "float16") else None

    @cached_property
    def traffic(self) -> dict[tuple[str, str], float]:
        """Axis and link -> bytes that the rank with most sends in a step."""
        out: dict[tuple[str, str], float] = {}
        for rank in range(self.setup.parallel.pp):
            mine: dict[tuple[str, str], float] = {}
            count = self.setup.num_microbatches
            again = count if self.setup.parallel.fully_shard else 1
            listed = [(t, n * count) for cost in self.costs_of(rank).values() for t, n in cost.transfers]
            listed += [(t, again) for t in self.after[rank].transfers]
            for transfer, times in listed:
                key = (transfer.axis.name, transfer.axis.link(self.machine))
                sent = transfer.num_bytes * (transfer.forward + transfer.backward) * times
                mine[key] = mine.get(key, 0.0) + sent
            if self.setup.parallel.pp > 1:
                last = self.setup.parallel.pp * self.setup.parallel.vpp - 1
                passes = sum((number < last) + (number > 0) for number in self.costs_of(rank))
                mine["pp", axes(self.setup)["pp"].link(self.machine)] = passes * count * layer_input(self.setup)
            for key, sent in mine.items():
                out[key] = max(out.get(key, 0.0), sent)
        return out

    @property
    def checkpoint(self) -> tuple[int, float]:
        """Bytes of a training checkpoint, and the seconds until it is on the machines' own disks."""
        nodes = -(-self.setup.world_size // self.machine.gpus_per_node)
        size = checkpoint_bytes(self.setup)
        return size, size / (self.machine.disk_gb_s * 1e9 * nodes)
