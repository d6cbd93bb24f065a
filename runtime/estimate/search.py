"""The best layouts of so many GPUs: all degrees, recomputation and micro-batches that fit, by the time of a step.

Degrees that the model or the ranks can't have are left out first, then layouts whose state alone is too large, then those
whose activations are; what remains is ranked by a formula, and the best are worked out with all their passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from moeconv.layout.degrees import Degrees
from moeconv.layout.shard import divisors
from moeconv.placement import misfits
from runtime.errors import ConfigError, require
from runtime.estimate.machine import Machine
from runtime.estimate.memory import rank_activations
from runtime.estimate.parameters import RankParameters
from runtime.estimate.setup import ITEMSIZE, Setup
from runtime.estimate.spare import all_on_host, keep_what_fits
from runtime.estimate.split import settle
from runtime.estimate.stage import Cost
from runtime.estimate.step import Estimate
from runtime.model.recompute import RecomputeConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.check import check_combinations
from runtime.settings.degrees import FLAGS

MICRO_BATCHES = (1, 2, 4, 8)
VIRTUAL_STAGES = (1, 2, 3, 4)
MAX_CP = 16
LEAST_POSITIONS = 4096
"""Of a sequence on a rank: with fewer, sharing sequences out isn't tried."""
_SIMULATED = 24
"""Of the best by formula, how many are worked out with all their passes for each ten that are asked for."""


@dataclass(slots=True)
class Found:
    """What a search found."""

    best: list[Estimate]
    """By time, the shortest first."""
    tried: int = 0
    """Layouts, with micro-batches and recomputation."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why others are not among them -> how many."""
    smallest: Estimate | None = None
    """Where nothing fits: what needs least."""
    host: float | None = None
    """Bytes of a machine's memory that the least of those needs which fit the GPUs and not that; None: there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Free:
    """What a search may choose, and what is given."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ParallelConfig that are given; all others may be chosen."""
    micro_batch_size: int | None = None
    """None: may be chosen."""
    recompute: bool = True
    """Whether recomputation may be chosen."""
    offload: bool = True
    """Whether it may be chosen how much of the optimizer's state is on the host, where some is."""


class Search:
    """Looks for the best layouts of a setup's model, ranks and global batch."""

    def __init__(self, setup: Setup, batch: int, machine: Machine, free: Free, imbalance: float | None = None) -> None:
        """Prepare.

        Args:
            setup: the model, ranks, types and options; of its degrees those that are `free.fixed` count.
            batch: sequences of a step.
            machine: the constants.
            free: what may be chosen.
            imbalance: rows of the fullest expert-parallel rank, of the mean; None takes the machine's.
        """
        self._setup, self._machine, self._free, self._imbalance = setup, machine, free, imbalance
        self._batch = batch
        self._layers: dict[object, dict[object, Cost]] = {}
        self._shapes: dict[object, RankParameters] = {}
        self._fit: dict[Degrees, bool] = {}
        self._recompute = [(setup.recompute, setup.moe)]
        if free.recompute:
            whole, moe = RecomputeConfig(granularity="full"), setup.moe
            again = [(RecomputeConfig(), replace(moe, recompute_layer=True))] if moe is not None else []
            self._recompute = [(RecomputeConfig(), moe), *again, (whole, moe)]
        self.found = Found([])

    def run(self, count: int = 10) -> Found:
        """Search.

        Args:
            count: how many layouts to give.

        Returns:
            The best, and why the others are not among them.

        Raises:
            ConfigError: degrees that are given don't divide the model or the GPUs.
        """
        self._check_given()
        ranked: list[tuple[float, int, Estimate]] = []
        for parallel in self._degrees():
            for estimate in self._fitting(parallel):
                ranked.append((_formula(estimate), len(ranked), estimate))
        ranked.sort(key=lambda item: item[:2])
        chosen = [estimate for _, _, estimate in ranked[: _SIMULATED * -(-count // 10)]]
        chosen = [self._leveled(estimate) for estimate in chosen if estimate.fits]
        chosen.sort(key=lambda estimate: estimate.seconds)
        self.found.best = chosen[:count]
        self._reason("slower", len(ranked) - len(self.found.best))
        given = " ".join(f"{FLAGS.get(name, name)} {value}" for name, value in self._free.fixed.items())
        require(
            bool(self.found.tried or self.found.reasons),
            f"{given}: no layout of {self._setup.world_size} GPUs has these: products of degrees must divide the GPUs",
        )
        return self.found

    def _check_given(self) -> None:
        """Refuse degrees that don't divide the model."""
        given = {axis: self._free.fixed[axis] for axis in ("tp", "ep", "etp") if axis in self._free.fixed}
        for misfit in misfits(self._setup.model, Degrees(**{"etp": 1} | given)):
            raise ConfigError(misfit.error().say(FLAGS))

    def _degrees(self) -> Iterator[ParallelConfig]:
        """All degrees that model and ranks allow."""
        world, model = self._setup.world_size, self._setup.model
        fixed, layers = dict(self._free.fixed), model.sizes["layers"]
        node = min(self._machine.gpus_per_node, world)
        tps = self._choices("tp", (d for d in divisors(world) if d <= node and self._fits(tp=d)))
        eps = self._choices("ep", (d for d in divisors(world) if self._fits(ep=d)) if self._setup.moe else (1,))
        most_cp = min(MAX_CP, max(1, self._setup.seq_length // LEAST_POSITIONS))
        cps = self._choices("cp", (2**n for n in range(most_cp.bit_length())))
        pps = self._choices("pp", (d for d in divisors(world) if d <= layers))
        for tp in tps:
            etps = self._choices("etp", sorted({tp, 1}) if self._setup.moe else (tp,))
            for etp, cp, pp, ep in product(etps, cps, pps, eps):
                if world % (tp * cp * pp) == 0 and world % (ep * etp * pp) == 0 and self._fits(etp=etp):
                    degrees = {"tp": tp, "etp": etp, "cp": cp, "pp": pp, "ep": ep, "sp": tp > 1}
                    yield from self._pipelines(degrees | fixed)

    def _choices(self, axis: str, values: Any) -> tuple[int, ...]:
        return (self._free.fixed[axis],) if axis in self._free.fixed else tuple(values)

    def _fits(self, *, tp: int = 1, ep: int = 1, etp: int = 1) -> bool:
        """Whether the model can be divided so."""
        degrees = Degrees(tp=tp, ep=ep, etp=etp)
        if degrees not in self._fit:
            self._fit[degrees] = not any(misfits(self._setup.model, degrees))
        return self._fit[degrees]

    def _pipelines(self, degrees: dict[str, Any]) -> Iterator[ParallelConfig]:
        """With virtual stages, and layers dealt out where they don't divide."""
        layers, pp = self._setup.model.sizes["layers"], degrees["pp"]
        degrees.setdefault("use_distributed_optimizer", not degrees.get("fully_shard"))
        for vpp in self._choices("vpp", VIRTUAL_STAGES if pp > 1 else (1,)):
            if pp * vpp > layers:
                continue
            uneven = degrees.get("pp_layers") or (None if layers % (pp * vpp) == 0 else deal_layers(layers, pp * vpp))
            if uneven is not None and len(uneven) != pp * vpp:
                continue
            each = degrees.get("layers_per_virtual_stage")
            if each is not None and each * pp * vpp != layers:
                continue
            parallel = ParallelConfig(**degrees | {"vpp": vpp, "pp_layers": uneven})
            if self._combines(parallel):
                yield parallel

    def _combines(self, parallel: ParallelConfig) -> bool:
        """Whether the trainer computes such a combination."""
        try:
            check_combinations(parallel, self._setup.moe)
        except ConfigError as error:
            self._reason(f"the trainer refuses: {error}", 1)
            return False
        return True

    def _fitting(self, parallel: ParallelConfig) -> Iterator[Estimate]:
        """What fits of one layout, with the least recomputation that does for each size of micro-batch."""
        state = self._state(parallel)
        if state > self._machine.memory and not parallel.fully_shard and "fully_shard" not in self._free.fixed:
            self._reason("weights, gradients, masters and moments alone don't fit", 1)
            if self._setup.world_size == parallel.tp * parallel.pp * parallel.cp:
                self._remember(parallel)
                return
            parallel = replace(parallel, fully_shard=True, use_distributed_optimizer=False)
            if self._state(parallel) > self._machine.memory:
                self._remember(parallel)
                return
        elif state > self._machine.memory:
            self._reason("weights, gradients, masters and moments alone don't fit", 1)
            self._remember(parallel)
            return
        states = self._states(parallel)
        sizes = MICRO_BATCHES if self._free.micro_batch_size is None else (self._free.micro_batch_size,)
        for size in sizes:
            for setup in self._setups(parallel, size):
                estimate = self._estimate(setup)
                self.found.tried += 1
                if self._peak(estimate, states) <= self._machine.memory:
                    if not estimate.fits_host:
                        estimate = self._kept(estimate)
                    if estimate.fits_host:
                        yield estimate
                    else:
                        self._reason("what goes to the host doesn't fit the machines' memory", 1)
                        self.found.host = min(estimate.host, self.found.host or estimate.host)
                    break
                self._reason("activations don't fit", 1)

    def _setups(self, parallel: ParallelConfig, size: int) -> Iterator[Setup]:
        base = self._setup
        dp = base.world_size // (parallel.tp * parallel.pp * parallel.cp)
        if self._batch % (size * dp):
            self._reason("the global batch doesn't divide", 1)
            return
        count = self._batch // (size * dp)
        if parallel.vpp > 1 and count % parallel.pp:
            self._reason("micro-batches don't make whole rounds of the virtual stages", 1)
            return
        shares = parallel.cp * (2 if parallel.cp > 1 else 1) * (parallel.tp if parallel.sp else 1)
        if base.seq_length % shares:
            self._reason("the sequence doesn't divide", 1)
            return
        setup = replace(base, parallel=parallel, micro_batch_size=size, num_microbatches=count)
        for recompute, moe in self._recompute:
            yield replace(setup, recompute=recompute, moe=moe)

    def _estimate(self, setup: Setup) -> Estimate:
        p, moe = setup.parallel, setup.moe
        again = setup.recompute.granularity, moe is not None and moe.recompute_layer
        key = (p.tp, p.sp, p.cp, p.ep, p.etp, setup.micro_batch_size, again, setup.captured)
        layers = self._layers.setdefault(key, {})
        return Estimate(setup.sharing(self._parameters(p)), self._machine, self._imbalance, layers)

    def _parameters(self, parallel: ParallelConfig) -> RankParameters:
        key = (parallel.tp, parallel.sp, parallel.ep, parallel.etp, parallel.pp, parallel.vpp, parallel.pp_layers)
        if key not in self._shapes:
            self._shapes[key] = RankParameters(self._setup.model, parallel.layout, parallel.sp, self._setup.groups)
        return self._shapes[key]

    def _state(self, parallel: ParallelConfig) -> float:
        """Bytes of the fullest rank's state, but for the padding of buckets."""
        return max(self._states(parallel).values())

    def _states(self, parallel: ParallelConfig) -> dict[int, float]:
        """The same of the pipeline ranks that differ: the first two, the last."""
        setup = replace(self._setup, parallel=parallel).sharing(self._parameters(parallel))
        item, wide, stays = ITEMSIZE[setup.dtype], setup.wide, 1 - setup.optim.on_host
        out = {}
        for rank in {0, min(1, parallel.pp - 1), parallel.pp - 1}:
            out[rank] = 0.0
            for expert, count in setup.parameters.sums(rank).by_expert.items():
                parts = setup.replicas(expert=expert)
                whole = 0 if parallel.fully_shard and parts > 1 else item + setup.gradient
                own = stays * setup.host_bytes(expert=expert) + (2 * wide if whole == 0 else 0)
                shared = parts if parallel.use_distributed_optimizer or parallel.fully_shard else 1
                out[rank] += count * (whole + own / shared)
                still = setup.parameters.sums(rank).frozen[expert] * item
                out[rank] += still / (parts if parallel.fully_shard else 1)
        return out

    def _peak(self, estimate: Estimate, states: Mapping[int, float]) -> float:
        """The peak, but for the padding of buckets."""
        setup = estimate.setup
        needed = {rank: rank_activations(setup, estimate.pipeline, rank, estimate.costs_of(rank)) for rank in states}
        return max(
            states[rank] + sum(kept.values()) + working + buffers for rank, (kept, working, buffers) in needed.items()
        )

    def _leveled(self, estimate: Estimate) -> Estimate:
        """Level the stages as a run would, unless it is given how many layers they have."""
        stated = bool({"pp_layers", "layers_per_virtual_stage"} & self._free.fixed.keys())
        if not self._chooses_offload:
            return settle(estimate, stated=stated)[0]
        leveled = self._kept(settle(all_on_host(estimate), stated=stated)[0])
        return leveled if leveled.fits else estimate

    @property
    def _chooses_offload(self) -> bool:
        return self._free.offload and bool(self._setup.optim.on_host)

    def _kept(self, estimate: Estimate) -> Estimate:
        """Have no more on the host than must be, where that may be chosen."""
        return keep_what_fits(estimate) if self._chooses_offload and estimate.fits_gpus else estimate

    def _reason(self, text: str, count: int) -> None:
        if count:
            self.found.reasons[text] = self.found.reasons.get(text, 0) + count

    def _remember(self, parallel: ParallelConfig) -> None:
        """Keep what needs least, for the message where nothing fits."""
        least = self.found.smallest
        if least is None or self._state(parallel) < self._state(least.setup.parallel):
            setup = replace(self._setup, parallel=parallel)
            self.found.smallest = Estimate(setup, self._machine, self._imbalance)


def deal_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Deal layers out that don't divide: stages in the middle get one more, the last, which has the head, the fewest.

    Args:
        layers: of the model.
        stages: virtual stages.

    Returns:
        Layers of each stage, in the order of the model.
    """
    low, more = divmod(layers, stages)
    # The last is the last to get one more, before it the first, which has the embedding.
    order = [*range(1, stages - 1), 0, stages - 1]
    counts = [low] * stages
    for stage in order[:more]:
        counts[stage] += 1
    return tuple(counts)


def _formula(estimate: Estimate) -> float:
    """The time of a step without its single passes: that of the slowest stage, and the pipeline's filling."""
    setup, pp = estimate.setup, estimate.setup.parallel.pp
    sums = [sum(c.forward + c.backward for c in estimate.costs_of(rank).values()) for rank in range(pp)]
    filling = (sum(sums) - max(sums)) / setup.parallel.vpp
    after = max(a.reduce + a.update + a.gather for a in map(estimate.after_of, {0, pp - 1}))
    return setup.num_microbatches * max(sums) + filling + after
