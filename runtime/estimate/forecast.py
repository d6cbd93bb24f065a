"""A run's own plan: what it will take, said before anything is allocated, and beside it at the end what it took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.errors import ConfigError, require
from runtime.estimate.describe import GB, layout_name
from runtime.estimate.flags import trainer_flags
from runtime.estimate.machine import Machine, find_machine, known_machines
from runtime.estimate.remedies import remedies
from runtime.estimate.search import Free, Search
from runtime.estimate.setup import Setup
from runtime.estimate.spare import all_on_host, keep_what_fits
from runtime.estimate.step import Estimate
from runtime.settings.run import RunConfig

_WARM = 2
"""Steps that aren't counted: kernels are chosen and compiled in them."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU of a run's ranks."""

    name: str
    memory: int
    """Bytes."""
    per_node: int
    """Ranks of a machine."""
    host: int | None = None
    """Bytes of the machine's memory that are free; None: unknown."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run took."""

    seconds: Sequence[float]
    """Of each step."""
    memory: int
    """Bytes at the highest peak of a step."""
    rank_loads: Sequence[float] = ()
    """Rows of the fullest expert-parallel rank, of the mean, in each step; none without expert parallelism."""


class Forecast:
    """What a run is expected to take on its GPUs."""

    def __init__(self, run: RunConfig, world_size: int, gpu: Gpu) -> None:
        """Work it out.

        Args:
            run: the settings, which fit the world size.
            world_size: number of ranks.
            gpu: what each of them has.
        """
        self._gpu = gpu
        self._machine, self._known = machine_of(gpu)
        self._estimate = Estimate(Setup.of_run(run, world_size), self._machine)

    def check(self) -> None:
        """Refuse a run whose state alone doesn't fit.

        Raises:
            ConfigError: says how much is needed and there, and a layout of the same GPUs that fits.
        """
        estimate = self._estimate
        self._check_host()
        state = max(memory.state.total for memory in estimate.memory)
        if state <= self._gpu.memory:
            return
        setup = estimate.setup
        kinds = estimate.memory[estimate.fullest].state
        needs = (
            f"weights {kinds.weights / GB:.1f}, gradients {kinds.gradients / GB:.1f}, masters {kinds.masters / GB:.1f}, "
            f"moments {kinds.moments / GB:.1f} GB"
        )
        require(
            False,
            f"{layout_name(setup)} needs {state / GB:.1f} GB of each GPU for {needs} alone; {self._gpu.name} has "
            f"{self._gpu.memory / GB:.1f} GB. {self._remedy()}",
        )

    def _check_host(self) -> None:
        """Refuse a run whose optimizer state is more than the host has."""
        estimate, free = self._estimate, self._gpu.host
        if free is None or estimate.host <= free:
            return
        ranks = min(estimate.setup.world_size, self._gpu.per_node)
        optim, recompute = estimate.setup.optim, estimate.setup.recompute
        flags = ["--optimizer-cpu-offload"] if optim.on_host else []
        flags += [f"--offload-activations {' '.join(recompute.offload)}"] if recompute.offload else []
        smaller = ["--moments-dtype bfloat16 makes it less"] if optim.on_host and estimate.setup.moment > 2 else []
        kept = keep_what_fits(all_on_host(estimate)) if optim.on_host else estimate
        if kept.fits_gpus and kept.host <= free:
            share = kept.setup.optim.optimizer_offload_fraction
            smaller.insert(0, f"--optimizer-offload-fraction {share} keeps the rest on the GPUs, where it fits")
        raise ConfigError(
            f"{' and '.join(flags)} keeps {estimate.host / GB:.1f} GB of {ranks} ranks in this machine's memory, of which "
            f"{free / GB:.1f} GB are free: {'; '.join([*smaller, 'otherwise send less, or take more machines'])}"
        )

    def _remedy(self) -> str:
        setup = self._estimate.setup
        smaller = [replace(setup, optim=optim) for _, optim in remedies(setup.optim, setup.dtype)]
        for tried in (setup, *smaller):
            found = Search(tried, setup.global_batch_size, self._machine, Free()).run(1)
            if found.best:
                return f"This fits: {' '.join(trainer_flags(found.best[0].setup))}"
        return (
            f"No layout of {setup.world_size} such GPUs fits: take more (`moeconv plan MODEL --gpus N` says how many)"
        )

    def line(self) -> str:
        """Say what is expected."""
        estimate = self._estimate
        time = f", {estimate.seconds * 1e3:,.0f} ms a step" if self._known else ""
        tight = "" if estimate.peak <= self._machine.memory else ": MORE THAN FITS"
        parts = ", ".join(f"{kind} {size / GB:.1f}" for kind, size in self._kinds().items())
        host = f" and {estimate.host / GB:.1f} GB of the machine's memory" if estimate.host else ""
        return (
            f"plan: {estimate.peak / GB:.1f} GB at the peak of {self._gpu.memory / GB:.1f} GB ({parts}){host}{tight}{time}; "
            "docs/planning.md tells how well that is known"
        )

    def _kinds(self) -> dict[str, float]:
        kinds = self._estimate.memory[self._estimate.fullest].by_kind()
        state = sum(kinds.pop(name) for name in ("weights", "gradients", "masters", "moments"))
        return {"state": state} | {kind: size for kind, size in kinds.items() if size > 0}

    def outcome(self, measured: Measured) -> str:
        """Say what was measured, beside what was expected; empty where nothing was."""
        seconds = measured.seconds[_WARM:]
        if not seconds:
            return ""
        estimate, took = self._estimate, statistics.median(seconds)
        time = f", {took * 1e3:,.0f} ms a step (median)"
        if self._known:
            time += f" where {estimate.seconds * 1e3:,.0f} were expected ({_off(estimate.seconds, took)})"
        rows = ""
        if measured.rank_loads:
            local = estimate.costs.local
            expected = local.rows / (local.rows_sent * estimate.setup.parallel.etp)
            load = statistics.mean(measured.rank_loads)
            rows = f"; the fullest rank of experts had {load:.2f} of the mean's rows where {expected:.2f} were expected"
        return (
            f"measured: {measured.memory / GB:.1f} GB at the peak where {estimate.peak / GB:.1f} were expected "
            f"({_off(estimate.peak, measured.memory)}){time}{rows}"
        )


def _off(expected: float, measured: float) -> str:
    return f"{expected / measured - 1:+.1%}" if measured else "-"


def machine_of(gpu: Gpu) -> tuple[Machine, bool]:
    """Give the constants for a GPU with its own memory, and whether they are of this kind of GPU."""
    words = gpu.name.replace("-", " ").lower().split()
    found = next((name for name in known_machines() if name in words), None)
    machine = find_machine(found or "h100", gpus_per_node=max(1, gpu.per_node))
    host = 0.0 if gpu.host is None else gpu.host / GB
    return replace(machine, memory_gib=gpu.memory / 2**30, host_memory_gb=host), found is not None
