"""The layers of a run's pipeline stages, where its flags don't say them: chosen at start, kept, and the same on all ranks."""

from __future__ import annotations

import json
from dataclasses import replace

from torch.distributed.distributed_c10d import Store

from moeconv.layout.degrees import Degrees
from runtime.estimate.forecast import Gpu, machine_of
from runtime.estimate.setup import Setup
from runtime.estimate.split import settle, states_layers
from runtime.estimate.step import Estimate
from runtime.job.processes import Process
from runtime.settings.run import RunConfig


def level_stages(run: RunConfig, world_size: int, gpu: Gpu | None, saved: Degrees | None) -> RunConfig:
    """Choose how many layers each stage of a run gets, where its settings don't say it.

    Args:
        run: the settings, which fit the world size.
        world_size: number of ranks.
        gpu: of the ranks; None, or one whose constants aren't known: all stages get as many.
        saved: how the checkpoint is divided that the run itself has saved; None where it begins. A run keeps its split.

    Returns:
        The settings, with a note where there is something to say.
    """
    parallel = run.parallel
    if parallel.pp == 1 or run.train.skip_train:
        return run
    stated = states_layers(parallel)
    if not stated and saved is not None and (saved.pp, saved.vpp) == (parallel.pp, parallel.vpp):
        stated, run = True, replace(run, parallel=replace(parallel, pp_layers=saved.pp_layers))
    if gpu is None or not machine_of(gpu)[1]:
        return run
    estimate, note = settle(Estimate(Setup.of_run(run, world_size), machine_of(gpu)[0]), stated=stated)
    notes = run.notes if note is None else (*run.notes, note)
    return replace(run, parallel=estimate.setup.parallel, notes=notes)


def same_stages(run: RunConfig, process: Process, store: Store) -> RunConfig:
    """Take the first rank's layers of each stage, which it may have chosen by its own GPU. Collective.

    Args:
        run: the settings, as this rank has them.
        process: this process's place in the job.
        store: of this attempt of the job.

    Returns:
        The settings, the same on every rank.
    """
    if run.parallel.pp == 1:
        return run
    if process.rank == 0:
        store.set("pp_layers", json.dumps(run.parallel.pp_layers))
    counts = json.loads(store.get("pp_layers"))
    return replace(run, parallel=replace(run.parallel, pp_layers=None if counts is None else tuple(counts)))
