"""From settings to a run: open the checkpoint, judge the settings, let the ranks meet, load, train or evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch.distributed.distributed_c10d import Store

from moeconv.checkpoint import Checkpoint
from moeconv.errors import MoeconvError
from moeconv.families.adapted import AdaptedModel
from moeconv.io.carried import CHAT_TEMPLATE
from moeconv.io.manifest import MANIFEST
from runtime.checkpoint import folder as folders
from runtime.checkpoint.adapters import check_adapters
from runtime.checkpoint.config import CheckpointConfig
from runtime.data.chat import read_template
from runtime.data.job import prepare_data
from runtime.data.loader import DataSource
from runtime.data.show import print_sample
from runtime.data.summary import describe_data, document_lengths
from runtime.errors import require
from runtime.estimate.forecast import Forecast, Gpu, Measured
from runtime.estimate.stages import level_stages, same_stages
from runtime.host_memory import available_memory
from runtime.job.failure import USER_ERROR, end_with
from runtime.job.meeting import do_together
from runtime.job.processes import Process, one_first
from runtime.job.signals import StopRequest
from runtime.job.watchdog import Progress
from runtime.loading import adapter_saves, make_engine, with_adapters
from runtime.log.config import LOG_NAME
from runtime.log.flops import device_peak, training_flops
from runtime.log.metrics import MetricLog
from runtime.log.records import Speed
from runtime.model.context import TORCH_DTYPES
from runtime.model.targets import describe_adapters
from runtime.model.tensor_maps import describe_overlap
from runtime.optim.config import EMA
from runtime.optim.groups import check_states, describe_frozen, resolve_groups
from runtime.settings.assemble import make_run
from runtime.settings.capture import describe_capture
from runtime.settings.check import check_run, data_parallel_size
from runtime.settings.flags import Given
from runtime.settings.generation import for_generation
from runtime.settings.kernels import describe_kernels
from runtime.settings.origin import Origin, find_origin
from runtime.settings.override import override_router
from runtime.settings.quantised import check_stored_blocks, with_plain_numbers
from runtime.settings.resolved import RUN_FILE, run_file, summary
from runtime.settings.rounding import describe_rounding
from runtime.settings.run import RunConfig
from runtime.sizes import num_parameters, saved_bytes
from runtime.trainer import Trainer


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
    given, generates = for_generation(given)
    places = CheckpointConfig(**given.of("checkpoint"))
    # A restart goes on from what the attempts before have saved.
    origin = with_plain_numbers(find_origin(given, places, places.ckpt_step if process.attempt == 0 else None), given)
    if places.override_router:
        model = override_router(given.stated, origin.checkpoint.model, origin.path)
        note = f"--override-router: {model.compute.router}"
        checkpoint = origin.checkpoint.with_model(model)
        origin = dataclasses.replace(origin, checkpoint=checkpoint, notes=(*origin.notes, note))
    run = make_run(given, origin.checkpoint.model, origin.path, drawn=origin.drawn, generates=generates)
    run = with_adapters(run, origin, given)
    check_run(run, process.world_size)
    run = level_stages(run, process.world_size, gpu_of(run, process), origin.state.degrees if origin.own else None)
    check_stored_blocks(run, origin)
    if run.data.chat_template is not None:
        # Whoever talks to the trained model needs the template that it was trained with.
        carried = {**origin.checkpoint.rewritten, CHAT_TEMPLATE: read_template(run.data.chat_template).encode()}
        checkpoint = dataclasses.replace(origin.checkpoint, rewritten=carried)
        origin = dataclasses.replace(origin, checkpoint=checkpoint)
    tokenizer = run.data.tokenizer_model
    require(tokenizer is None or tokenizer.exists(), f"--tokenizer-model {tokenizer}: no such file or folder")
    stated = [] if generates else summary(run)
    notes = [*origin.notes, *run.notes, *stated, *_groups(run, origin)]
    device = torch.device("cuda", process.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if not run.train.skip_train:
        notes += describe_capture(run, process.world_size, device)
    notes += describe_kernels(run, device)
    forecast = expect(run, process)
    if forecast is not None:
        forecast.check()
        notes.append(forecast.line())
    if places.save is None and not run.train.skip_train:
        notes.append("WARNING: without --save, nothing of this run is kept")
    if origin.own and not (run.checkpoint.load_optim and run.checkpoint.load_rng):
        notes.append(
            "--no-load-optim, --no-load-rng and --finetune are for --load: a run goes on from --save with all of it"
        )
    return dataclasses.replace(run, notes=tuple(notes)), origin


def expect(run: RunConfig, process: Process) -> Forecast | None:
    """Give the run's own plan; None where it trains on no GPU."""
    return None if (gpu := gpu_of(run, process)) is None else Forecast(run, process.world_size, gpu)


def gpu_of(run: RunConfig, process: Process) -> Gpu | None:
    """Say what this process trains on; None where that is no GPU."""
    if run.train.skip_train or not torch.cuda.is_available() or process.local_rank >= torch.cuda.device_count():
        return None
    found, count = torch.cuda.get_device_properties(process.local_rank), torch.cuda.device_count()
    return Gpu(found.name, found.total_memory, min(process.world_size, count), available_memory())


def _groups(run: RunConfig, origin: Origin) -> list[str]:
    """Judge the groups of tensors against the optimizer's state that the run goes on with, and say what is frozen."""
    groups, model = resolve_groups(run.optim, run.model, trains=not run.train.skip_train), run.model
    adapted = model if isinstance(model, AdaptedModel) else None
    check_adapters(adapted, run.lora, origin.adapters, own=origin.own, where=origin.path)
    tensors, wanted = origin.state.tensors, run.optim.ema_decay is not None
    has_mean = any(name.startswith(f"optimizer.{EMA}.") for name in tensors)
    notes = describe_adapters(model, run.lora)
    if run.train.skip_train:
        require(has_mean or not run.train.eval_ema, f"--eval-ema: {origin.path} holds no mean of the weights")
        return notes
    notes += describe_frozen(groups, model) if not notes or run.optim.freeze else []
    fresh = adapted is not None and origin.adapters is None  # what the model has of a run behind it is not this one's
    if not fresh and (origin.own or run.checkpoint.load_optim):
        check_states(groups, tensors, origin.path)
        if has_mean and not wanted:
            notes.append(f"the mean of the weights in {origin.path} is not kept on: --ema-decay is not given")
        if wanted and not has_mean and any(name.startswith("optimizer.") for name in tensors):
            notes.append(f"--ema-decay: {origin.path} holds no mean of the weights; it begins as the weights are now")
    return notes


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
    if run.data.show_sample:
        return show_sample(run, origin, process)
    if run.generate is not None:
        from runtime.generation import generate_job

        job: Callable[..., None] = generate_job
    else:
        job = run_job
    return do_together(process, 60.0 * run.train.distributed_timeout_minutes, partial(job, run, origin, process))


def show_sample(run: RunConfig, origin: Origin, process: Process) -> int:
    """Print the first training sample instead of a run; the first process does.

    Args:
        run: the settings.
        origin: has the tokenizer.
        process: this process's place in the job.

    Returns:
        The exit status, as `start_run`.
    """
    if process.rank != 0:
        return 0
    try:
        print_sample(DataSource(run.data, origin.path, run.train.num_samples(1)))
    except MoeconvError as error:
        end_with(error)
        return USER_ERROR
    return 0


def run_job(
    run: RunConfig,
    origin: Origin,
    process: Process,
    device: torch.device,
    store: Store,
    progress: Progress,
    stop: StopRequest | None = None,
) -> None:
    """Do what needs all processes, which have met: load, train or evaluate, save.

    Args:
        run: the settings.
        origin: where to start.
        process: this process's place in the job.
        device: what to compute on.
        store: of this job, for what is no collective.
        progress: told what happens next, for the watchdog.
        stop: whether this process was asked to stop; None: nobody asks.

    Raises:
        MoeconvError: data or checkpoint can't be used, a loss is not finite, or the last save failed.
    """
    run = same_stages(run, process, store)
    progress("trying the --save folder", limited=False)
    claims: list[folders.Claim] = []
    one_first(process.rank == 0, lambda: _claim(run, origin, process, claims))
    one_first(process.rank == 0, lambda: _try_save(run, origin, process))
    log = _open_log(run, origin, process, device)
    if log is not None:
        rounded = describe_rounding(run, process.world_size)
        log.note("\n".join([*run.notes, *rounded, *_remains(run), describe(run, origin, process)]))
    data = _open_data(run, origin, process, store, progress, log)
    saves_as: list[Checkpoint] = []
    if isinstance(run.model, AdaptedModel):
        progress("finding out which model it is", limited=False)
        one_first(process.rank == 0, lambda: saves_as.append(adapter_saves(run, origin, process)))
    engine, state = make_engine(run, origin, process, device, progress)
    if log is not None and run.parallel.tp_comm_overlap:
        log.note(describe_overlap(engine.module, num_stages=run.parallel.pp))
    trainer = Trainer(run, engine, engine.mesh, (saves_as or [origin.checkpoint])[0], data, log, progress)
    if state is not None:
        trainer.resume(state, own=origin.own)
    stopped = False if run.train.skip_train else trainer.train(stop)
    if run.train.eval_iters and not stopped:
        trainer.evaluate_at_end()
    if log is not None:
        forecast = expect(run, process)
        if forecast is not None and (outcome := forecast.outcome(Measured(log.seconds, log.memory, log.rank_loads))):
            log.note(outcome)
        log.close()
    for claim in claims:
        claim.release()


def _open_data(
    run: RunConfig, origin: Origin, process: Process, store: Store, progress: Progress, log: MetricLog | None
) -> DataSource:
    """Tokenize what isn't yet, open the data, and say what there is; arguments as of `run_job`."""
    dp = data_parallel_size(run.parallel, process.world_size)
    data = DataSource(run.data, origin.path, run.train.num_samples(dp))
    progress("preparing the data", limited=False)
    prepare_data(data, store, process.world_size, log.note if log is not None else None)
    progress("opening the data", limited=False)
    one_first(process.local_rank == 0, lambda: check_splits(run, data))
    if log is not None:
        log.note(describe_run_data(run, data, dp))
        if run.data.separates_documents and not run.train.skip_train:
            lengths = document_lengths(data)
            log.count_flops(training_flops(run.model, run.train.seq_length, lengths))
            mean = sum(length**2 for length in lengths) / sum(lengths)
            log.note(f"attention stays in documents: a token's has {mean:.0f} tokens on average; TFLOP/s count that")
    return data


def check_splits(run: RunConfig, data: DataSource) -> None:
    """Open every split that the run will need, so that what is missing is noticed before the first step.

    Args:
        run: the settings.
        data: the samples.

    Raises:
        DataError: data can't be read or are too few.
        ConfigError: a split that is needed has no data.
    """
    if not run.train.skip_train:
        data.samples("train")
    if run.train.eval_iters:
        data.sets("valid")
        if data.has("test"):
            data.sets("test")
    require(
        not run.train.skip_train or run.train.eval_iters != 0,
        "--skip-train evaluates only: say on how many global batches with --eval-iters (-1: the whole split)",
    )


def _claim(run: RunConfig, origin: Origin, process: Process, claims: list[folders.Claim]) -> None:
    """Keep other runs from the --save folder, and go back in it where that is asked for; one rank does it for all."""
    if process.rank == 0 and run.checkpoint.save is not None and not run.train.skip_train:
        claims.append(folders.Claim(run.checkpoint.save))
        if origin.own and run.checkpoint.ckpt_step is not None and process.attempt == 0:
            folders.point_latest(origin.path)


def _remains(run: RunConfig) -> list[str]:
    """Name folders that look like checkpoints and are none; nothing removes what another program may have written."""
    found = folders.incomplete(run.checkpoint.save) if run.checkpoint.save is not None else []
    return [
        f"{path}: no complete checkpoint (no {MANIFEST}): never read; remove it if it is a save's" for path in found
    ]


def _try_save(run: RunConfig, origin: Origin, process: Process) -> None:
    """Find out before training whether a checkpoint can be written; the settings are the first file that is."""
    save = run.checkpoint.save
    if save is None or run.train.skip_train:
        return
    folders.try_writing(save, saved_bytes(run, origin.checkpoint, process.world_size))
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
    size = num_parameters(origin.checkpoint)
    dp = data_parallel_size(parallel, process.world_size)
    degrees = {"dp": dp} | {axis: getattr(parallel, axis) for axis in ("tp", "pp", "cp", "ep", "etp")}
    first, *_, last = 2 * [*train.batch_sizes(dp).all()]
    shares = " ".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1)
    return (
        f"{origin.title}: {run.model.family.name}, {size / 1e6:.1f} M parameters, {run.dtype} | "
        f"{f'{process.world_size} ranks: {shares}' if shares else '1 rank'} | "
        f"{last if first == last else f'{first} to {last}'} sequences of {train.seq_length} tokens a step"
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
    sizes = train.batch_sizes(dp)
    steps, consumed = train.length(dp)
    return describe_data(data, splits, train_samples=consumed, train_steps=steps, batch_sizes=[*sizes.all()])


def _open_log(run: RunConfig, origin: Origin, process: Process, device: torch.device) -> MetricLog | None:
    import yaml

    if process.rank != 0:
        return None
    log, save = run.log, run.checkpoint.save
    if log.file is None and save is not None and not run.train.skip_train:
        log = dataclasses.replace(log, file=save / LOG_NAME)
    speed = Speed(
        flops_per_token=training_flops(run.model, run.train.seq_length),
        num_gpus=process.world_size,
        peak_flops=device_peak(device, TORCH_DTYPES[run.dtype]),
    )
    job = {
        "model": origin.checkpoint.model.family.name,
        "parameters": num_parameters(origin.checkpoint),
        "experts": origin.checkpoint.model.sizes.get("experts", 0),
        "world_size": process.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "start": origin.title,
    }
    settings = {"job": job} | yaml.safe_load(run_file(run))
    return MetricLog(log, train_iters=run.train.num_steps, interval=log.interval, settings=settings, speed=speed)
