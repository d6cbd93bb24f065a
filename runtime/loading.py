"""Loading a run: the model, adapters over it, the optimizer's state, and how far it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container

import torch

from moeconv.adapters.identity import check_base, fingerprint
from moeconv.adapters.initial import initial_adapters
from moeconv.checking import check_tied
from moeconv.checkpoint import Checkpoint
from moeconv.errors import MoeconvError
from moeconv.families.adapted import AdaptedModel
from moeconv.quant.view import Fp8Blocks, PlainView, holds_fp8_blocks
from runtime.checkpoint import folder as folders
from runtime.checkpoint.adapters import as_saved, over, source_of_saves
from runtime.checkpoint.peft_start import begin_with, peft_values
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.checkpoint.rectangles import Read
from runtime.checkpoint.verified import load_verified
from runtime.engine import Engine
from runtime.errors import require
from runtime.job.processes import Process, one_first
from runtime.job.watchdog import Progress
from runtime.model.context import TORCH_DTYPES
from runtime.optim.config import EMA
from runtime.parallel.mesh import ParallelMesh
from runtime.quantised_base import ReadBlocks
from runtime.settings.capture import captures
from runtime.settings.flags import Given
from runtime.settings.origin import Origin, open_at
from runtime.settings.run import RunConfig


def with_adapters(run: RunConfig, origin: Origin, given: Given) -> RunConfig:
    """Take over the adapters that a run evaluates, or begins with, from where they are.

    Args:
        run: the settings, as the flags have them.
        origin: where the run starts.
        given: what was given.

    Returns:
        The settings; the same where nothing is taken over.

    Raises:
        MoeconvError: the adapters can't be trained here, or are others than the flags say.
    """
    base, path, saved = origin.checkpoint.model, run.lora.adapter, origin.adapters
    if saved is not None and (origin.own if path is not None else run.train.skip_train and not run.lora.rank):
        model, lora = as_saved(saved, base)
        return dataclasses.replace(run, model=model, lora=dataclasses.replace(lora, adapter=path))
    if path is None:
        return run
    require(saved is None, f"--adapter {path}: {origin.path} holds adapters, too: give one of them")
    names = {name for group, name in given.values if group == "lora"}
    model, lora = begin_with(path, base, run.lora, names)
    note = f"beginning with the adapters of {path}"
    return dataclasses.replace(run, model=model, lora=lora, notes=(*run.notes, note))


def build_engine(run: RunConfig, mesh: ParallelMesh, device: torch.device) -> Engine:
    """Build a run's model over all ranks, as its settings say; its weights are not drawn yet. Collective.

    Args:
        run: the settings.
        mesh: the ranks.
        device: what to compute on.

    Returns:
        The engine.
    """
    trains = not run.train.skip_train
    return Engine(
        run.model,
        TORCH_DTYPES[run.dtype],
        run.parallel,
        run.moe,
        run.optim,
        run.recompute,
        mesh,
        device,
        trains=trains,
        lora=run.lora,
        fp8=run.fp8,
        captures=trains and captures(run, mesh.world_size, device),
    )


def make_engine(
    run: RunConfig, origin: Origin, process: Process, device: torch.device, progress: Progress
) -> tuple[Engine, TrainerState | None]:
    """Build a run's model over all ranks, and load it. Collective.

    Args:
        run: the settings.
        origin: the checkpoint.
        process: this process's place in the job.
        device: what to compute on.
        progress: told what happens next, for the watchdog.

    Returns:
        The engine, and the position that the run goes on from; None starts anew.

    Raises:
        MoeconvError: the checkpoint can't be used; with what else there is to go on from.
    """
    progress("loading the checkpoint", limited=False)
    one_first(process.rank == 0, lambda: check_tied(origin.checkpoint, "training") if process.rank == 0 else None)
    engine = build_engine(run, ParallelMesh(run.parallel, process.world_size), device)
    try:
        return engine, load(engine, run, origin)
    except MoeconvError as error:
        raise error.advise(folders.way_back(origin.path, open_at)) from None


def load(engine: Engine, run: RunConfig, origin: Origin) -> TrainerState | None:
    """Load this rank's rectangles, and the optimizer's where they are wanted and there.

    Args:
        engine: takes them.
        run: the settings.
        origin: the checkpoint.

    Returns:
        The position that the run goes on from; None starts anew.
    """
    state, options = origin.state, run.checkpoint
    has_state = any(name.startswith("optimizer.") for name in state.tensors)
    # The model may have a run behind it, adapters that begin have none.
    fresh = isinstance(run.model, AdaptedModel) and origin.adapters is None
    wanted = not fresh and not run.train.skip_train and (origin.own or options.load_optim)
    with_optimizer = has_state and wanted
    stored = state.tensors if with_optimizer else None
    mean = f"optimizer.{EMA}." if run.train.skip_train and run.train.eval_ema else ""

    def named(read: Read) -> Read:
        return lambda name, rect: read(mean + name if mean and mean + name in state.tensors else name, rect)

    _load_tensors(engine, run, origin, stored, named)
    path = origin.path / TRAINER_FILE
    if fresh or origin.drawn or not path.is_file() or (options.finetune and not origin.own):
        return None
    position = TrainerState.from_json(path.read_text(), path)
    if not (origin.own or options.load_rng):
        position = dataclasses.replace(position, seed=run.train.seed)
    # An evaluation takes what else belongs to the model, such as the biases of its experts.
    return position if with_optimizer or run.train.skip_train else dataclasses.replace(position, optimizer={})


def _load_tensors(
    engine: Engine, run: RunConfig, origin: Origin, stored: Container[str] | None, named: Callable[[Read], Read]
) -> None:
    """Load this rank's rectangles: of the model, and of the adapters over it, if the run trains some."""
    base, saved, model, device = origin.checkpoint, origin.adapters, run.model, engine.device
    if not isinstance(model, AdaptedModel):
        load_verified(base, lambda read: engine.load_state(named(read), stored), device)
    elif saved is None:
        first: Read = initial_adapters(model, run.train.seed)
        held: Container[str] = model.weight_of
        if run.lora.adapter is not None:
            first, held = peft_values(run.lora.adapter, base.model, model, run.lora, run.train.seed)
        _load_base(run, base, lambda read, blocks: engine.load_state(over(read, first, held), None, blocks), device)
    else:

        def both(read: Read, blocks: ReadBlocks | None) -> None:
            def load_own(own: Read) -> None:
                engine.load_state(over(read, named(own), saved.tensors), stored, blocks)

            load_verified(saved, load_own, device)

        _load_base(run, base, both, device)


def _load_base(
    run: RunConfig, base: Checkpoint, load_: Callable[[Read, ReadBlocks | None], None], device: torch.device
) -> None:
    """Load with a reader of the model, and one of its FP8 blocks where they are taken as they are."""
    if not isinstance(base, PlainView):
        load_verified(base, lambda read: load_(read, None), device)
        return
    model = base.stored.model
    direct = run.lora.quantize_base == "fp8" and holds_fp8_blocks(model)
    load_verified(
        base.stored, lambda read: load_(base.through(read), Fp8Blocks(model, read) if direct else None), device
    )


def adapter_saves(run: RunConfig, origin: Origin, process: Process) -> Checkpoint:
    """Make sure that adapters to go on with belong to the model, and say what the run's saves come from; one rank looks.

    Args:
        run: the settings of a run that trains adapters.
        origin: where it starts.
        process: this process's place in the job.

    Returns:
        What `Trainer` saves as; the first rank's knows the model's fingerprint.

    Raises:
        IntegrityError: the adapters belong to another model.
    """
    base, model = origin.checkpoint, run.model
    assert isinstance(model, AdaptedModel)
    found = ""
    if process.rank == 0:
        found = fingerprint(base)
        if origin.adapters is not None:
            check_base(base.root, found, origin.adapters)
    return source_of_saves(base, model, run.lora, found, base.root)
