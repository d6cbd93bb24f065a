"""From settings to a run: open the checkpoint, judge the settings, let the ranks meet, load, train or evaluate."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.families.base import Model
from runtime.checkpoint import folder as folders
from runtime.checkpoint.config import CheckpointConfig
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.data.job import prepare_data
from runtime.data.loader import DataSource
from runtime.data.summary import describe_data
from runtime.engine import Engine
from runtime.errors import require
from runtime.job.failure import USER_ERROR, end_with, tell_launcher
from runtime.job.processes import Process, connect, one_first, start
from runtime.job.watchdog import Progress, StopRequest, Watchdog
from runtime.log.metrics import MetricLog
from runtime.model.context import TORCH_DTYPES
from runtime.moe.grouped_gemm import describe_backend
from runtime.parallel.mesh import ParallelMesh
from runtime.settings.assemble import make_run
from runtime.settings.check import check_run, data_parallel_size
from runtime.settings.flags import Given
from runtime.settings.override import override_router
from runtime.settings.resolved import RUN_FILE, run_file, summary
from runtime.settings.run import RunConfig
from runtime.trainer import Trainer, check_splits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a run starts."""

    path: Path
    checkpoint: Checkpoint
    own: bool
    """The run itself wrote it earlier: everything is taken from it, whatever the flags leave out of --load."""
    notes: tuple[str, ...] = ()
    """Lines for the log: how it came to be this one."""


def find_origin(load: Path, save: Path | None) -> Origin:
    """Find the checkpoint that a run starts from: its own latest one if it has saved already, else what it is told.

    Args:
        load: what --load says.
        save: what --save says.

    Returns:
        The checkpoint, opened; no tensor has been read.

    Raises:
        MoeconvError: there is none, it can't be read, or --save holds a run of another model than --load.
    """
    mine = folders.latest(save) if save is not None else None
    path = mine or folders.resolve(load)
    origin = Origin(path=path, checkpoint=open_checkpoint(path), own=mine is not None)
    if mine is None or path == folders.resolve(load).resolve():
        return origin
    return dataclasses.replace(origin, notes=_compare_with_load(origin, load, save or mine))


def _compare_with_load(origin: Origin, load: Path, save: Path) -> tuple[str, ...]:
    """Notice that a run which goes on from --save was begun from something else than --load names now."""
    note = f"going on from {origin.path}, which this run saved; --load {load} is not read"
    try:
        named = open_checkpoint(folders.resolve(load)).model
    except MoeconvError as error:
        return (f"{note} (it can't be: {error})",)
    model = origin.checkpoint.model
    same = (named.family.model_type, named.sizes, named.flags) == (model.family.model_type, model.sizes, model.flags)
    require(
        same,
        f"--save {save} holds a run of another model ({_model_words(model)}) than --load {load} ({_model_words(named)}): "
        "give another --save folder to train the latter, or --load the former",
    )
    before = _loaded_by(origin.path)
    if before is not None and before != load.absolute():
        return (f"WARNING: {note}; the run in {save} began from {before}. To train {load}, give another --save",)
    return (note,)


def _loaded_by(path: Path) -> Path | None:
    """Give the --load of the run that saved a checkpoint; None where it isn't known."""
    import yaml

    try:
        return Path(yaml.safe_load((path / RUN_FILE).read_text(encoding="utf8"))["checkpoint"]["load"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _model_words(model: Model) -> str:
    sizes = model.sizes
    words = [
        model.family.name,
        f"{sizes['layers']} layers",
        f"hidden {sizes['hidden']}",
        f"vocabulary {sizes['vocab']}",
    ]
    return ", ".join(words + ([f"{sizes['experts']} experts"] if "experts" in sizes else []))


def prepare(given: Given, process: Process) -> tuple[RunConfig, Origin]:
    """Do everything that needs no other process: open, put together, judge.

    Args:
        given: what the command line says.
        process: this process's place in the job.

    Returns:
        The settings, and where to start.

    Raises:
        MoeconvError: the run can't work; nothing has been allocated or written.
    """
    where = given.of("checkpoint")
    require("load" in where, "--load is missing: name the checkpoint to start from (an example: --help)")
    places = CheckpointConfig(**where)
    origin = find_origin(places.load, places.save)
    if places.override_router:
        model = override_router(given.stated, origin.checkpoint.model, origin.path)
        note = f"--override-router: {model.compute.router}"
        checkpoint = origin.checkpoint.with_model(model)
        origin = dataclasses.replace(origin, checkpoint=checkpoint, notes=(*origin.notes, note))
    run = make_run(given, origin.checkpoint.model, origin.path)
    check_run(run, process.world_size)
    tokenizer = run.data.tokenizer_model
    require(tokenizer is None or tokenizer.exists(), f"--tokenizer-model {tokenizer}: no such file or folder")
    notes = [*run.notes, *origin.notes, *summary(run)]
    if run.moe is not None:
        device = torch.device("cuda", process.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        notes.append(describe_backend(run.moe, device, TORCH_DTYPES[run.dtype]))
    if places.save is None and not run.train.skip_train:
        notes.append("WARNING: without --save, nothing of this run is kept")
    if origin.own and not (run.checkpoint.load_optim and run.checkpoint.load_rng):
        notes.append(
            "--no-load-optim, --no-load-rng and --finetune are for --load: a run goes on from --save with all of it"
        )
    return dataclasses.replace(run, notes=tuple(notes)), origin


def start_run(given: Given) -> int:
    """Do a run to its end.

    Args:
        given: what the command line says.

    Returns:
        The exit status: 0 when the run came to its end or was asked to stop, 2 for an error of the user's.
    """
    process = Process.from_environment()
    try:
        run, origin = prepare(given, process)
    except MoeconvError as error:  # wrong on each rank alike
        end_with(error)
        return USER_ERROR
    watchdog: Watchdog | None = None
    hang_timeout = 60.0 * run.train.distributed_timeout_minutes
    try:
        # A connection of its own: nothing that the process groups wait for can block it.
        store = connect(process, "health")
        watchdog = Watchdog(store, process.rank, process.world_size, stall_seconds=hang_timeout)
        watchdog.start()
        stop = StopRequest()
        watchdog.progress("joining the job", limited=False)
        # The watchdog comes first: it knows which rank stands still and where.
        device = start(process, connect(process, "groups"), 2 * hang_timeout + 60)
        run_job(run, origin, process, device, connect(process, "data"), watchdog.progress, lambda: stop.received)
    except MoeconvError as error:
        if watchdog is None or watchdog.fail(error):
            tell_launcher(error)
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except BaseException as error:
        if watchdog is not None:
            watchdog.fail(error)
        raise
    watchdog.stop()
    dist.destroy_process_group()
    return 0


def run_job(
    run: RunConfig,
    origin: Origin,
    process: Process,
    device: torch.device,
    store: Store,
    progress: Progress,
    stop_requested: Callable[[], bool],
) -> None:
    """Do what needs all processes, which have met: load, train or evaluate, save.

    Args:
        run: the settings.
        origin: where to start.
        process: this process's place in the job.
        device: what to compute on.
        store: of this job, for what is no collective.
        progress: told what happens next, for the watchdog.
        stop_requested: whether this process was asked to stop.

    Raises:
        MoeconvError: data or checkpoint can't be used, a loss is not finite, or the last save failed.
    """
    log = _open_log(run, process)
    if log is not None:
        log.note("\n".join([*run.notes, describe(run, origin, process)]))
    progress("trying the --save folder", limited=False)
    one_first(process.rank == 0, lambda: _try_save(run, origin, process))
    dp = data_parallel_size(run.parallel, process.world_size)
    data = DataSource(run.data, origin.path, run.train.num_samples(dp))
    progress("preparing the data", limited=False)
    prepare_data(data, store, process.world_size, log.note if log is not None else None)
    progress("opening the data", limited=False)
    one_first(process.local_rank == 0, lambda: check_splits(run, data))
    if log is not None:
        log.note(describe_run_data(run, data, dp))
    progress("loading the checkpoint", limited=False)
    mesh = ParallelMesh(run.parallel, process.world_size)
    dtype = TORCH_DTYPES[run.dtype]
    engine = Engine(run.model, dtype, run.parallel, run.moe, run.optim, run.recompute, mesh, device)
    state = load(engine, run, origin)
    trainer = Trainer(run, engine, mesh, origin.checkpoint, data, log, progress)
    if state is not None:
        trainer.resume(state, own=origin.own)
    stopped = False if run.train.skip_train else trainer.train(stop_requested)
    if run.train.eval_iters and not stopped:
        for split in ("valid", "test") if data.has("test") else ("valid",):
            trainer.evaluate(split)
    if log is not None:
        log.close()


def _try_save(run: RunConfig, origin: Origin, process: Process) -> None:
    """Find out before training whether a checkpoint can be written; the settings are the first file that is."""
    save = run.checkpoint.save
    if save is None or run.train.skip_train:
        return
    tensors = [t for t in origin.checkpoint.tensors.values() if not t.name.startswith("optimizer.")]
    count = sum(math.prod(t.shape) for t in tensors)
    # Master weights and two moments, each in fp32, or fp64 where the weights are.
    weight, state = TORCH_DTYPES[run.dtype].itemsize, 8 if run.dtype == "float64" else 4
    folders.try_writing(save, count * (weight + (3 * state if run.checkpoint.save_optim else 0)))
    if process.rank == 0:
        (save / RUN_FILE).write_text(run_file(run), encoding="utf8")


def describe(run: RunConfig, origin: Origin, process: Process) -> str:
    """Say in one line what is trained, on how many ranks, and in what steps.

    Args:
        run: the settings.
        origin: where it starts.
        process: this process's place in the job.

    Returns:
        The line.
    """
    parallel, train = run.parallel, run.train
    size = sum(math.prod(t.shape) for t in origin.checkpoint.tensors.values() if not t.name.startswith("optimizer."))
    dp = data_parallel_size(parallel, process.world_size)
    degrees = {"dp": dp} | {axis: getattr(parallel, axis) for axis in ("tp", "pp", "cp", "ep", "etp")}
    batch = train.num_microbatches(dp) * train.micro_batch_size * dp
    return (
        f"{origin.path}: {run.model.family.name}, {size / 1e6:.1f} M parameters, {run.dtype} | "
        f"{process.world_size} ranks: {' '.join(f'{axis}{degree}' for axis, degree in degrees.items() if degree > 1)} | "
        f"{batch} sequences of {train.seq_length} tokens a step"
    )


def describe_run_data(run: RunConfig, data: DataSource, dp: int) -> str:
    """Say what data a run has: documents, tokens, samples, epochs, tokens a step, and what was left out.

    Args:
        run: the settings.
        data: the opened data.
        dp: data-parallel degree.

    Returns:
        A line for each part.
    """
    train = run.train
    splits = [] if train.skip_train else ["train"]
    if train.eval_iters:
        splits += [split for split in ("valid", "test") if split == "valid" or data.has(split)]
    batch = train.num_microbatches(dp) * train.micro_batch_size * dp
    return describe_data(data, splits, train_samples=train.num_steps * batch, global_batch_size=batch)


def load(engine: Engine, run: RunConfig, origin: Origin) -> TrainerState | None:
    """Load this rank's rectangles, and the optimizer's where they are wanted and there.

    Args:
        engine: takes them.
        run: the settings.
        origin: the checkpoint.

    Returns:
        The position that the run goes on from; None starts anew.
    """
    checkpoint, options = origin.checkpoint, run.checkpoint
    has_state = any(name.startswith("optimizer.") for name in checkpoint.tensors)
    with_optimizer = has_state and (origin.own or options.load_optim)
    engine.load_state(checkpoint.read, checkpoint.tensors if with_optimizer else None)
    path = origin.path / TRAINER_FILE
    if not path.is_file() or (options.finetune and not origin.own):
        return None
    state = TrainerState.from_json(path.read_text(), path)
    if not (origin.own or options.load_rng):
        state = dataclasses.replace(state, seed=run.train.seed)
    return state if with_optimizer else dataclasses.replace(state, optimizer={})


def _open_log(run: RunConfig, process: Process) -> MetricLog | None:
    if process.rank != 0:
        return None
    settings = dataclasses.asdict(run)
    return MetricLog(run.log, train_iters=run.train.num_steps, interval=run.log.interval, settings=settings)
