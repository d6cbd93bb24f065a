"""What one rank of `benchmarks.finetune` does: builds the engine of a trainer's command line, draws weights, times steps.

`python -m benchmarks.finetune_rank SPEC`, under torchrun where there are several; SPEC is JSON as `Spec` has it. The first
rank prints one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.host_profile import host_lines, host_of
from benchmarks.multi_gpu.job import Job, draw_weights
from benchmarks.multi_gpu.saving import digest, source_folder
from benchmarks.multi_gpu.sizes import FULL
from benchmarks.step_profile import device_of, lines_of, write_lines
from moeconv.checkpoint import open_checkpoint
from moeconv.families import family_of
from moeconv.families.base import Model
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.checkpoint.rank_files import collect_files, commit_checkpoint
from runtime.checkpoint.writer import Saver, check
from runtime.data.batch import Batch
from runtime.engine import Engine
from runtime.estimate.stages import level_stages, same_stages
from runtime.job.processes import Process, connect, end_groups, start
from runtime.loading import build_engine
from runtime.log.flops import device_peak, training_flops
from runtime.measures import host_bytes
from runtime.model.context import TORCH_DTYPES
from runtime.parallel.mesh import ParallelMesh
from runtime.settings.assemble import make_run
from runtime.settings.check import check_run
from runtime.settings.flags import parse_flags
from runtime.settings.run import RunConfig
from runtime.start import gpu_of

TIMEOUT = 600.0
"""Seconds that a collective may take: the others wait while a rank page-locks its memory or writes."""
WARM = 4
"""Steps that aren't counted: in the fourth the last CUDA graph is captured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One launch."""

    config: dict[str, Any]
    """The model's config.json."""
    flags: list[str]
    """The trainer's."""
    steps: int
    folder: str
    """For checkpoints; the same for all ranks and launches."""
    save: bool = False
    """Leave a checkpoint and its digest in the folder."""
    resume: bool = False
    """Take up what is there instead of drawing weights."""
    passes: bool = True
    """Time forward and backward passes without the update, too."""
    profile_to: str | None = None
    """Folder for the first rank's kernels of a step, and for where its host's time goes."""


def read_run(spec: Spec, process: Process) -> RunConfig:
    """Put the settings together as the trainer does, with its checks and levelled stages; data are random tokens."""
    given = parse_flags([*spec.flags, "--mock-data", "--train-iters", str(spec.steps), "--save", spec.folder + "/none"])
    model = Model.from_config(family_of(spec.config), spec.config)
    run = make_run(given, model, Path(spec.folder))
    check_run(run, process.world_size)
    return level_stages(run, process.world_size, gpu_of(run, process), None)


def random_batches(run: RunConfig, mesh: ParallelMesh) -> list[Batch]:
    """This data-parallel rank's micro-batches of a step: random tokens."""
    size, dp = run.train.micro_batch_size, mesh.size("dp")
    count = run.train.batch_sizes(dp).full // (size * dp)
    generator = torch.Generator().manual_seed(1 + mesh.rank("dp"))
    shape = (count, size, run.train.seq_length + 1)
    tokens = torch.randint(run.model.sizes["vocab"], shape, generator=generator)
    return [Batch(tokens=t[:, :-1].contiguous(), labels=t[:, 1:].contiguous()) for t in tokens]


def timed(work: Callable[[], object], job: Job, count: int) -> list[float]:
    """Seconds of each of some repetitions, from when all ranks begin to when this rank's device is done."""
    out = []
    for _ in range(count):
        job.synchronize()
        begin = time.perf_counter()
        work()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        out.append(time.perf_counter() - begin)
    return out


def speed(run: RunConfig, seconds: float, device: torch.device, world: int) -> dict[str, float | None]:
    """Tokens a second and utilisation of a step."""
    dp = world // (run.parallel.tp * run.parallel.pp * run.parallel.cp)
    tokens = run.train.batch_sizes(dp).full * run.train.seq_length
    flops = training_flops(run.model, run.train.seq_length) * tokens / seconds / world
    peak = device_peak(device, TORCH_DTYPES[run.dtype])
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_a_gpu": tokens / seconds / world,
        "tflops_a_gpu": flops / 1e12,
        "mfu": flops / peak if peak else None,
    }


def measure(run: RunConfig, engine: Engine, mesh: ParallelMesh, job: Job, spec: Spec) -> dict[str, Any]:
    """Time steps as training runs them, one after another, then their passes alone."""
    world = mesh.world_size
    batches = random_batches(run, mesh)
    losses = [engine.train_step(batches).lm_loss for _ in range(WARM)]
    job.synchronize()
    begin = time.perf_counter()
    results = [engine.train_step(batches) for _ in range(spec.steps)]
    job.synchronize()
    seconds = (time.perf_counter() - begin) / max(1, spec.steps)
    losses += [result.lm_loss for result in results]
    out: dict[str, Any] = {"ms": seconds * 1e3, "loss": [losses[0], losses[-1]]}
    out["repeated"] = sum(result.repeated for result in results)
    out["rank_load"] = None if (routing := results[-1].routing) is None else routing.rank_load
    out |= speed(run, seconds, job.device, world)
    if spec.passes:
        alone = statistics.median(timed(lambda: engine.accumulate(batches), job, 3))
        out |= {"passes_ms": alone * 1e3, "update_share": max(0.0, 1 - alone / seconds)}
    out |= memory(engine, job)
    if spec.profile_to is not None:
        parts = run.model.sizes["layers"] // run.parallel.pp * len(batches)
        _profile(lambda: engine.train_step(batches), Path(spec.profile_to), mesh.global_rank, seconds, parts)
    return out


def _profile(step: Callable[[], object], folder: Path, rank: int, seconds: float, parts: int) -> None:
    """Let every rank do the steps of a profile, and write the first one's."""
    title = f"{shlex.join(sys.argv[1:])}: a step of {seconds * 1e3:.1f} ms"
    lines = [*lines_of(device_of(step), title, parts=parts), "", *host_lines(host_of(step))]
    if rank == 0:
        write_lines(lines, folder / f"finetune_{len(list(folder.glob('finetune_*.txt')))}.txt")


def memory(engine: Engine, job: Job) -> dict[str, Any]:
    """Peaks of the fullest rank, GB: what tensors took, what the allocator held, and page-locked memory of the host."""
    own = [0.0, 0.0]
    if job.device.type == "cuda":
        own = [torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9]
    allocated, reserved = (max(values) for values in zip(*job.everyone(own), strict=True))
    pinned = job.everyone(host_bytes(engine) / 1e9)
    return {
        "peak_gb": allocated,
        "reserved_gb": reserved,
        "pinned_gb_a_rank": max(pinned),
        "pinned_gb": sum(pinned),
    }


def save(run: RunConfig, engine: Engine, mesh: ParallelMesh, job: Job, spec: Spec) -> dict[str, Any]:
    """Save as the trainer does, and leave a digest of what was saved beside it."""
    folder, rank = Path(spec.folder), mesh.global_rank
    source = source_folder(folder / "source", spec.config, TORCH_DTYPES[run.dtype], job)
    saver = Saver(folder / "saved", job.control, keep_last=1, asynchronous=run.checkpoint.async_save)
    with_optimizer = run.checkpoint.save_optim
    job.synchronize()
    begin = time.perf_counter()
    items = engine.state(with_optimizer=with_optimizer)
    files = collect_files(items, mesh, source.model, saver.stage)
    num_bytes = sum(job.everyone(sum(item.live.numel() * item.dtype.itemsize for item in items)))
    state = TrainerState(iteration=1, optimizer=engine.scalars())
    saver.save(1, files, lambda path, records: commit_checkpoint(path, records, source, run.parallel, state))
    stall = time.perf_counter() - begin
    outcome = saver.wait()
    assert outcome is not None
    check(outcome)
    seconds = max(job.everyone(time.perf_counter() - begin))
    left = {"digest": digest(engine, job, with_optimizer=with_optimizer), "optimizer": with_optimizer}
    if rank == 0:
        (folder / "expected.json").write_text(json.dumps(left))
    out = {"saved_gb": num_bytes / 1e9, "save_s": seconds, "save_stall_s": max(job.everyone(stall))}
    return out | {"synchronous": saver.synchronous}


def resume(engine: Engine, job: Job, spec: Spec) -> dict[str, Any]:
    """Take up what `save` left, and compare it bit for bit."""
    folder = Path(spec.folder)
    expected = json.loads((folder / "expected.json").read_text())
    path = folder / "saved" / "latest"
    job.synchronize()
    begin = time.perf_counter()
    checkpoint = open_checkpoint(path)
    engine.load_state(checkpoint.read, checkpoint.tensors if expected["optimizer"] else None)
    job.synchronize()
    seconds = time.perf_counter() - begin
    engine.load_scalars(TrainerState.from_json((path / TRAINER_FILE).read_text(), path).optimizer)
    equal = digest(engine, job, with_optimizer=expected["optimizer"]) == expected["digest"]
    return {"load_s": max(job.everyone(seconds)), "equal": equal}


def work(spec: Spec, process: Process, device: torch.device, store: dist.Store) -> dict[str, Any]:
    """Do a launch on this rank."""
    run = same_stages(read_run(spec, process), process, store)
    control = dist.new_group(backend="gloo")
    job = Job(device=device, sizes=FULL, scratch=Path(spec.folder), fill=1.0, control=control)
    mesh = ParallelMesh(run.parallel, process.world_size)
    begin = time.perf_counter()
    engine = build_engine(run, mesh, device)
    engine.set_lr(run.optim.lr)
    out: dict[str, Any] = {"pp_layers": run.parallel.pp_layers}
    if spec.resume:
        out |= resume(engine, job, spec)
    else:
        draw_weights(engine)
    job.synchronize()
    out["build_s"] = time.perf_counter() - begin
    if spec.steps:
        out |= measure(run, engine, mesh, job, spec)
    if spec.save:
        out |= save(run, engine, mesh, job, spec)
    return out


def main() -> None:
    """Do a launch and print what the first rank found."""
    spec = Spec(**json.loads(sys.argv[1]))
    process = Process.from_environment()
    store = connect(process, "benchmark")
    device = start(process, store, TIMEOUT)
    out = work(spec, process, device, store)
    if process.rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(
            json.dumps({"device": name, "torch": torch.__version__, "spec": dataclasses.asdict(spec)} | out), flush=True
        )
    dist.barrier()
    end_groups()


if __name__ == "__main__":
    main()
