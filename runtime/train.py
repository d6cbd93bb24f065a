"""`torchrun [...] -m runtime.train`: continue the training of a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.io.manifest import MANIFEST
from runtime.checkpoint import folder as folders
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.data.loader import DataSource
from runtime.engine import Engine
from runtime.job.processes import Process, connect, one_first, start
from runtime.job.signals import StopRequest
from runtime.job.watchdog import FAILURE_STATUS, Progress, Watchdog
from runtime.log.config import LOG_NAME
from runtime.log.flops import device_peak, training_flops
from runtime.log.metrics import MetricLog
from runtime.log.records import Speed
from runtime.model.context import TORCH_DTYPES
from runtime.moe.grouped_gemm import describe_backend
from runtime.parallel.mesh import ParallelMesh
from runtime.settings.check import check_run, data_parallel_size
from runtime.settings.flags import parse_flags, without_effect
from runtime.settings.run import RunConfig, make_run
from runtime.trainer import Trainer, check_splits

USER_ERROR = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a run starts."""

    path: Path
    checkpoint: Checkpoint
    own: bool
    """The run itself wrote it earlier: everything is taken from it, whatever the flags leave out of --load."""


def find_origin(load: Path, save: Path | None, step: int | None = None) -> Origin:
    """Find the checkpoint that a run starts from: its own latest one if it has saved already, else what it is told.

    Args:
        load: what --load says.
        save: what --save says.
        step: what --ckpt-step says: the iteration, instead of the latest.

    Returns:
        The checkpoint, opened; no tensor has been read.

    Raises:
        MoeconvError: there is none, or it can't be read.
    """
    mine = folders.latest(save) if save is not None else None
    if step is not None:
        path = folders.at_step(save if save is not None and mine is not None else load, step).resolve()
    else:
        path = mine or folders.resolve(load)
    try:
        checkpoint = _open(path)
    except MoeconvError as error:
        raise type(error)(f"{error}{folders.way_back(path, _open)}") from None
    return Origin(path=path, checkpoint=checkpoint, own=mine is not None)


def _open(path: Path) -> Checkpoint:
    """Open a checkpoint, and make sure that its position in a run, if it has one, can be read."""
    checkpoint = open_checkpoint(path)
    if (path / TRAINER_FILE).is_file():
        TrainerState.from_json((path / TRAINER_FILE).read_text(), path / TRAINER_FILE)
    return checkpoint


def prepare(arguments: Sequence[str], process: Process) -> tuple[RunConfig, Origin, list[str]]:
    """Do everything that needs no other process: parse, open, check.

    Args:
        arguments: the command line.
        process: this process's place in the job.

    Returns:
        The settings, where to start, and notes for the log.

    Raises:
        MoeconvError: the run can't work; nothing has been allocated or written.
    """
    flags = parse_flags(arguments)
    origin = find_origin(flags.load, flags.save, flags.ckpt_step if process.attempt == 0 else None)
    run = make_run(flags, origin.checkpoint.config, origin.path)
    check_run(run, process.world_size)
    return run, origin, without_effect(flags)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit status: 0 when the run came to its end or was asked to stop, 2 for an error of the user's.
    """
    process = Process.from_environment()
    watchdog: Watchdog | None = None
    try:
        run, origin, notes = prepare(sys.argv[1:] if arguments is None else arguments, process)
        # A connection of its own: nothing that the process groups wait for can block it.
        store = connect(process, "health")
        watchdog = Watchdog(store, process.rank, process.world_size, stall_seconds=run.hang_timeout)
        watchdog.start()
        stop = StopRequest(speaks=process.rank == 0)
        watchdog.progress("joining the job", limited=False)
        # The watchdog comes first: it knows which rank stands still and where.
        device = start(process, connect(process, "groups"), 2 * run.hang_timeout + 60)
        run_job(run, origin, notes, process, device, watchdog.progress, stop)
    except MoeconvError as error:
        # What is wrong before the ranks meet is wrong on each of them: one says it.
        if watchdog.fail(error) if watchdog is not None else process.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except BaseException as error:
        if watchdog is None:
            raise
        if not watchdog.fail(error):
            return FAILURE_STATUS
        sys.excepthook = lambda *_: None  # the traceback stands above already, before those of the others
        raise
    watchdog.stop()
    dist.destroy_process_group()
    return 0


def run_job(
    run: RunConfig,
    origin: Origin,
    notes: list[str],
    process: Process,
    device: torch.device,
    progress: Progress,
    stop: StopRequest | None = None,
) -> None:
    """Do what needs all processes, which have met: load, train or evaluate, save.

    Args:
        run: the settings.
        origin: where to start.
        notes: lines for the log.
        process: this process's place in the job.
        device: what to compute on.
        progress: told what happens next, for the watchdog.
        stop: whether this process was asked to stop; None: nobody asks.

    Raises:
        MoeconvError: data or checkpoint can't be used, a loss is not finite, or the last save failed.
    """
    lines = [*notes, describe(run, origin, process)]
    if run.moe is not None:
        lines.append(describe_backend(run.moe, device, TORCH_DTYPES[run.model.dtype]))
    log = _open_log(run, origin, process, device)
    if log is not None:
        log.note("\n".join(lines))
    claims: list[folders.Claim] = []
    one_first(process.rank == 0, lambda: _claim(run, origin, process, claims))
    if log is not None and run.checkpoint.save is not None:
        for path in folders.incomplete(run.checkpoint.save):
            log.note(
                f"{path}: no complete checkpoint (it has no {MANIFEST}) and never read; remove it if it is a save's remains"
            )
    data = DataSource(run.data, origin.path)
    progress("opening the data", limited=False)
    one_first(process.local_rank == 0, lambda: check_splits(run, data))
    progress("loading the checkpoint", limited=False)
    mesh = ParallelMesh(run.parallel, process.world_size)
    engine = Engine(run.model, run.parallel, run.moe, run.optim, run.recompute, mesh, device)
    try:
        state = load(engine, run, origin)
    except MoeconvError as error:
        raise type(error)(f"{error}{folders.way_back(origin.path, _open)}") from None
    trainer = Trainer(run, engine, mesh, origin.checkpoint, data, log, progress)
    if state is not None:
        trainer.resume(state, own=origin.own)
    stopped = False if run.skip_train else trainer.train(stop)
    if run.train.eval_iters and not stopped:
        for split in ("valid", "test") if data.has("test") else ("valid",):
            trainer.evaluate(split)
    if log is not None:
        log.close()
    for claim in claims:
        claim.release()


def _claim(run: RunConfig, origin: Origin, process: Process, claims: list[folders.Claim]) -> None:
    """Keep other runs from the --save folder, and go back in it where that is asked for; one rank does it for all."""
    if process.rank == 0 and run.checkpoint.save is not None and not run.skip_train:
        claims.append(folders.Claim(run.checkpoint.save))
        if origin.own and run.checkpoint.ckpt_step is not None:
            folders.point_latest(origin.path)


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
    size = num_parameters(origin.checkpoint)
    dp = data_parallel_size(parallel, process.world_size)
    degrees = {"dp": dp} | {axis: getattr(parallel, axis) for axis in ("tp", "pp", "cp", "ep", "etp")}
    batch = train.num_microbatches(dp) * train.micro_batch_size * dp
    return (
        f"{origin.path}: {run.model.model_type}, {size / 1e6:.1f} M parameters, {run.model.dtype} | "
        f"{process.world_size} ranks: {' '.join(f'{axis}{degree}' for axis, degree in degrees.items() if degree > 1)} | "
        f"{batch} sequences of {train.seq_length} tokens a step"
    )


def num_parameters(checkpoint: Checkpoint) -> int:
    """Count the weights of a checkpoint, without the optimizer's state."""
    return sum(math.prod(t.shape) for t in checkpoint.tensors.values() if not t.name.startswith("optimizer."))


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
    engine.load_state(checkpoint.read, with_optimizer=with_optimizer)
    path = origin.path / TRAINER_FILE
    if not path.is_file() or (options.finetune and not origin.own):
        return None
    state = TrainerState.from_json(path.read_text(), path)
    if not (origin.own or options.load_rng):
        state = dataclasses.replace(state, seed=run.train.seed)
    return state if with_optimizer else dataclasses.replace(state, optimizer={})


def _open_log(run: RunConfig, origin: Origin, process: Process, device: torch.device) -> MetricLog | None:
    if process.rank != 0:
        return None
    train, log, save = run.train, run.log, run.checkpoint.save
    if log.file is None and save is not None:
        log = dataclasses.replace(log, file=save / LOG_NAME)
    speed = Speed(
        flops_per_token=training_flops(origin.checkpoint.model, train.seq_length),
        num_gpus=process.world_size,
        peak_flops=device_peak(device, TORCH_DTYPES[run.model.dtype]),
    )
    job = {
        "parameters": num_parameters(origin.checkpoint),
        "world_size": process.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "start": str(origin.path),
    }
    settings = {"job": job} | dataclasses.asdict(run)
    return MetricLog(log, train_iters=train.train_iters, interval=train.log_interval, settings=settings, speed=speed)


if __name__ == "__main__":
    sys.exit(record(main)())
