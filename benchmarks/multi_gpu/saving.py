"""Checkpoints with the optimizer's state: saved at once and while training goes on, and taken up under other layouts."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.multi_gpu.job import Job, Task, draw_weights
from benchmarks.multi_gpu.sizes import Sizes, global_batch, num_parameters
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.errors import WriteError
from moeconv.families import family_of
from moeconv.families.base import Model
from moeconv.io.safetensors import encode_header
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.checkpoint.rank_files import DTYPES, collect_files, commit_checkpoint
from runtime.checkpoint.rectangles import StateTensor
from runtime.checkpoint.writer import Saver, check
from runtime.engine import Engine
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.masters import join
from runtime.parallel.mesh import ParallelMesh
from runtime.parity.case import own_share

STEPS_BEFORE = 2
MOST_STEPS = 200
_CHUNK = 2**24


def save(task: Task, job: Job) -> dict[str, Any]:
    """Train, save, save again while training goes on, and leave behind what a resumed run must find.

    Args:
        task: the layout; options: `sequences` of a step.
        job: where.

    Returns:
        The row of the table: seconds and bytes.
    """
    layers = job.sizes.checkpoint_layers
    num_bytes = _checkpoint_bytes(job.sizes, layers)
    _check_space(job.scratch, num_bytes)
    source = source_folder(job.scratch / "source", job.sizes.hub_config(layers), getattr(torch, job.sizes.dtype), job)
    engine, mesh = job.engine(task, layers)
    draw_weights(engine)
    steps = _Steps(engine, mesh, task.options["sequences"], job)
    for number in range(STEPS_BEFORE):
        steps.run(number)
    saver = Saver(
        job.scratch / "saved", dist.new_group(backend="gloo") if job.control is not None else None, keep_last=1
    )
    out: dict[str, Any] = {"gb": num_bytes / 1e9, "disk_gb_s": _disk_speed(job)}
    expected = {"digest": digest(engine, job), "num_steps": STEPS_BEFORE, "sequences": task.options["sequences"]}

    copied = _start(engine, mesh, source, saver, task, job)
    written = _finish(saver, job)
    out |= {"copy_s": copied, "write_s": written, "sync_s": copied + written}

    stall = _start(engine, mesh, source, saver, task, job)
    expected["next_loss"] = steps.run(STEPS_BEFORE)
    while job.any(not saver.finished()) and len(steps.seconds) < MOST_STEPS:
        steps.run(len(steps.seconds))
    meanwhile = steps.seconds[STEPS_BEFORE:]
    out |= {"stall_s": stall, "async_s": stall + _finish(saver, job)}
    alone = [steps.run(number) and steps.seconds[-1] for number in range(3)]
    out |= {"step_ms": statistics.median(alone) * 1e3, "step_meanwhile_ms": statistics.median(meanwhile) * 1e3}
    job.synchronize()
    (job.scratch / "expected.json").write_text(json.dumps(expected))
    return out


def resume(task: Task, job: Job) -> dict[str, Any]:
    """Load what `save` left under this layout, compare it bit for bit, and do the step that came next there.

    Args:
        task: the layout.
        job: where.

    Returns:
        The row of the table: seconds, bytes read by all ranks, whether the state is `equal`, and how far the next loss is.
    """
    expected = json.loads((job.scratch / "expected.json").read_text())
    engine, mesh = job.engine(task, job.sizes.checkpoint_layers)
    path = job.scratch / "saved" / "latest"
    job.synchronize()
    start = time.perf_counter()
    checkpoint = open_checkpoint(path)
    engine.load_state(checkpoint.read, checkpoint.tensors)
    job.synchronize()
    seconds = _slowest(time.perf_counter() - start, job)
    engine.load_scalars(TrainerState.from_json((path / TRAINER_FILE).read_text(), path).optimizer)
    gb = _checkpoint_bytes(job.sizes, job.sizes.checkpoint_layers) / 1e9
    equal = digest(engine, job) == expected["digest"] and engine.scalars()["num_steps"] == expected["num_steps"]
    loss = _Steps(engine, mesh, expected["sequences"], job).run(expected["num_steps"])
    return {
        "gb": gb,
        "load_s": seconds,
        "equal": equal,
        "loss_error": abs(loss - expected["next_loss"]) / expected["next_loss"],
    }


class _Steps:
    """Steps of a run on the global batches that their numbers determine."""

    def __init__(self, engine: Engine, mesh: ParallelMesh, num_sequences: int, job: Job) -> None:
        self._engine, self._mesh, self._num, self._job = engine, mesh, num_sequences, job
        self.seconds: list[float] = []

    def run(self, number: int) -> float:
        batches = own_share(global_batch(self._job.sizes, self._num, number), self._mesh)
        start = time.perf_counter()
        loss = self._engine.train_step(batches).lm_loss
        self.seconds.append(time.perf_counter() - start)
        return loss


def _start(engine: Engine, mesh: ParallelMesh, source: Checkpoint, saver: Saver, task: Task, job: Job) -> float:
    """Copy the state to the host and start writing it.

    Returns:
        Seconds that training waits for it, the slowest rank's.
    """
    job.synchronize()
    begin = time.perf_counter()
    files = collect_files(engine.state(with_optimizer=True), mesh, source.model, saver.stage)
    state = TrainerState(iteration=STEPS_BEFORE, optimizer=engine.scalars())
    parallel = ParallelConfig(**task.parallel)
    saver.save(STEPS_BEFORE, files, lambda path, records: commit_checkpoint(path, records, source, parallel, state))
    return _slowest(time.perf_counter() - begin, job)


def _finish(saver: Saver, job: Job) -> float:
    """Wait for a save, and refuse a failed one.

    Returns:
        Seconds from its start until the checkpoint had its name, the slowest rank's.
    """
    outcome = saver.wait()
    assert outcome is not None
    check(outcome)
    return _slowest(outcome.seconds, job)


def digest(engine: Engine, job: Job, *, with_optimizer: bool = True) -> int:
    """Sum up weights, masters and moments: equal for equal bits of the global tensors, whatever rank holds what.

    Args:
        engine: gives its rectangles; of each global element, one rank has it.
        job: the ranks.
        with_optimizer: masters and moments, too.

    Returns:
        64 bits, the same on every rank.
    """
    total = torch.zeros((), dtype=torch.int64, device=job.device)
    for item in engine.state(with_optimizer=with_optimizer):
        total += _digest(item, job.device)
    return sum(job.everyone(int(total))) % 2**64


def _digest(item: StateTensor, device: torch.device) -> Tensor:
    """Mix each element's bits with its place in the global tensor, modulo 2^64."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[item.dtype.itemsize]
    width = item.global_shape[1] if len(item.global_shape) > 1 else 1
    halves = [item.live] if item.remainder is None else [item.live, item.remainder]
    rows = [half.detach().reshape(item.rect.shape[0], -1) for half in halves]
    first_row, first_column = item.rect.offsets[0], item.rect.offsets[1] if len(item.rect.offsets) > 1 else 0
    columns = torch.arange(first_column, first_column + rows[0].shape[1], device=device)
    salt = zlib.crc32(item.name.encode())
    total = torch.zeros((), dtype=torch.int64, device=device)
    step = max(1, _CHUNK // max(1, rows[0].shape[1]))
    for begin in range(0, rows[0].shape[0], step):
        parts = [half[begin : begin + step].to(device).contiguous() for half in rows]
        chunk = (parts[0] if len(parts) == 1 else join(*parts)).view(bits).long()
        numbers = torch.arange(first_row + begin, first_row + begin + chunk.shape[0], device=device)
        place = numbers.unsqueeze(1) * width + columns
        mixed = (chunk * 0x2545F4914F6CDD1D) ^ ((place + 1) * 0x1B873593CC9E2D51 + salt)
        mixed = (mixed ^ (mixed >> 31)) * 0x369DEA0F31A53F85
        total += (mixed ^ (mixed >> 29)).sum()
    return total


def source_folder(folder: Path, config: dict[str, Any], dtype: torch.dtype, job: Job) -> Checkpoint:
    """A Hugging Face folder of a model whose weights are a hole in a file: only its config and names are used. Collective.

    Args:
        folder: made by the first rank, unless it is there.
        config: config.json of the hub.
        dtype: of the weights.
        job: the ranks.
    """
    if (job.control is None or dist.get_rank() == 0) and not folder.exists():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = Model.from_config(family_of(config), config).tensors
        header = encode_header([(name, DTYPES[dtype], tensor.shape) for name, tensor in tensors.items()], {})
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header.raw)
            file.truncate(header.file_size)
    job.synchronize()
    checkpoint = open_checkpoint(folder)
    _ = checkpoint.carried_bytes
    return checkpoint


def _checkpoint_bytes(sizes: Sizes, num_layers: int) -> int:
    """Weights, masters where they are kept apart, two moments."""
    itemsize: int = getattr(torch, sizes.dtype).itemsize
    return num_parameters(sizes, num_layers) * (itemsize + (12 if itemsize < 4 else 8))


def _check_space(scratch: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(scratch).free
    needed = 2.2 * num_bytes  # a save and the one before it
    if free < needed:
        raise WriteError(f"{scratch}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} needed; name a larger --scratch")


def _disk_speed(job: Job) -> float:
    """GB/s at which all ranks together bring plain files to the disk."""
    path = job.scratch / f"raw-{os.getpid()}"
    data = os.urandom(2**20) * (job.sizes.raw_bytes * 4 // 2**20)
    job.synchronize()
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = _slowest(time.perf_counter() - start, job)
    path.unlink()
    return len(job.everyone(0)) * len(data) / seconds / 1e9


def _slowest(seconds: float, job: Job) -> float:
    return max(job.everyone(seconds))
