"""A run that writes text: load the model over all ranks, and go on with what the first one is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from moeconv.families.adapted import AdaptedModel
from runtime.generate.generator import Generator
from runtime.generate.prompts import Prompts, end_ids
from runtime.generate.sources import Source, open_source
from runtime.job.processes import Process, one_first
from runtime.job.signals import StopRequest
from runtime.job.watchdog import Progress
from runtime.loading import adapter_saves, make_engine
from runtime.parallel.collectives import Group
from runtime.settings.origin import Origin
from runtime.settings.run import RunConfig

_PATIENCE = timedelta(days=30)
"""For whoever types."""


def generate_job(
    run: RunConfig,
    origin: Origin,
    process: Process,
    device: torch.device,
    store: Store,
    progress: Progress,
    stop: StopRequest | None = None,
) -> None:
    """Do what needs all processes, which have met: load the model, and write.

    Args:
        run: the settings.
        origin: the model.
        process: this process's place in the job.
        device: what to compute on.
        store: of this job.
        progress: told what happens next, for the watchdog.
        stop: ends the process when somebody asks.

    Raises:
        MoeconvError: model, tokenizer or text can't be used.
    """
    config = run.generate
    assert config is not None
    opened: list[tuple[Source, list[int]]] = []
    progress("reading what to go on with", limited=False)
    one_first(process.rank == 0, lambda: opened.append(_open(run, origin)) if process.rank == 0 else None)
    if isinstance(run.model, AdaptedModel):
        progress("finding out which model it is", limited=False)
        one_first(process.rank == 0, lambda: _check_base(run, origin, process))
    engine, state = make_engine(run, origin, process, device, progress)
    if state is not None:
        engine.load_scalars(state.optimizer)
    control = dist.new_group(backend="gloo", timeout=_PATIENCE) if process.world_size > 1 else None
    source = opened[0][0] if opened else None
    ends: list[int] = _told(opened[0][1] if opened else None, control)
    generator = Generator(engine, config, ends, run.train.seed)
    for number, ids in enumerate(_texts(source, control, progress)):
        for token in generator.tokens(ids, number):
            progress("writing")
            if source is not None:
                source.token(token)
        if source is not None:
            source.done(generator.stopped)


def _open(run: RunConfig, origin: Origin) -> tuple[Source, list[int]]:
    """Open what the run goes on with, and find the ids that end what it writes."""
    config, model = run.generate, run.model
    assert config is not None
    if notes := [*run.notes]:
        print("\n".join(notes), file=sys.stderr, flush=True)
    prompts = Prompts(run.data.tokenizer_model or origin.path, config.chat_template, model.sizes["vocab"])
    about = {"command": "generate", "checkpoint": str(origin.path), "seed": run.train.seed}
    source = open_source(config, prompts, model.compute.max_positions, about)
    folders = (origin.path, origin.checkpoint.root)
    return source, end_ids(folders, model.config, prompts.tokenizer, chat=not config.prompt)


def _check_base(run: RunConfig, origin: Origin, process: Process) -> None:
    """Make sure that adapters belong to the model."""
    adapter_saves(run, origin, process)


def _texts(source: Source | None, control: Group, progress: Progress) -> Iterator[list[int]]:
    """The texts that the first rank has, on every rank."""
    texts = None if source is None else source.texts()
    while True:
        progress("waiting for a text", limited=False)
        ids: list[int] | None = _told(None if texts is None else next(texts, None), control)
        if ids is None:
            return
        yield ids


def _told(value: Any, control: Group) -> Any:
    """What the first rank says, on every rank."""
    if control is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control)
    return box[0]
