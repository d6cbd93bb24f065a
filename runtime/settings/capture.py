"""Whether micro-batches are captured as CUDA graphs, and what speaks against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from moeconv.families.base import Model
from runtime.errors import require
from runtime.flag import flag_name
from runtime.fp8.config import Fp8Config
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.degrees import FLAGS
from runtime.settings.run import RunConfig
from runtime.settings.steps import CudaGraphs, TrainConfig

if TYPE_CHECKING:
    import torch

FLAG = flag_name(TrainConfig, "cuda_graph_impl")


class Planned(Protocol):
    """What of a run decides whether it can be captured."""

    @property
    def model(self) -> Model: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def moe(self) -> MoEConfig | None: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def recompute(self) -> RecomputeConfig: ...
    @property
    def lora(self) -> LoraConfig: ...
    @property
    def fp8(self) -> Fp8Config: ...
    @property
    def dtype(self) -> str: ...


def obstacle(run: Planned, world_size: int) -> str | None:
    """Say why micro-batches of a run can't be replayed: the host decides or draws something in each one.

    Args:
        run: the settings.
        world_size: number of processes.

    Returns:
        The first reason, as part of a sentence; None where there is none.
    """
    return next(_obstacles(run, world_size), None)


def _obstacles(run: Planned, world_size: int) -> Iterator[str]:
    if world_size > 1:
        yield from _obstacles_of_several(run)
    if run.optim.on_host:
        yield "--optimizer-cpu-offload moves what the host meanwhile computes with"
    if run.recompute.offload:
        yield f"--offload-activations {' '.join(run.recompute.offload)} waits for copies to the host"
    if run.lora.dropout:
        yield f"--lora-dropout {run.lora.dropout} draws its seeds on the host"
    if run.moe is not None:
        yield from _obstacles_of_experts(run.moe, run.dtype)


def _obstacles_of_several(run: Planned) -> Iterator[str]:
    parallel = run.parallel
    split = [FLAGS[axis] for axis in ("pp", "cp") if getattr(parallel, axis) > 1]
    split += [FLAGS["fully_shard"]] if parallel.fully_shard else []
    if split:
        yield f"with {split[0]} GPUs wait for each other within a micro-batch in ways that aren't captured"
    if run.moe is not None and "global_aux_loss" in run.moe.load_balancing:
        yield f"{flag_name(MoEConfig, 'load_balancing')} global_aux_loss counts over GPUs in each layer"
    if run.moe is not None and parallel.ep > 1:
        yield from _obstacles_of_exchanges(run.moe)


def _obstacles_of_exchanges(moe: MoEConfig) -> Iterator[str]:
    if moe.dispatcher != "alltoall":
        yield f"{flag_name(MoEConfig, 'dispatcher')} {moe.dispatcher}: the host reads how many rows each expert has"
    if moe.pad_to_capacity or moe.load_balancing[0] == "expert_choice":
        named = "expert_choice" if moe.load_balancing[0] == "expert_choice" else flag_name(MoEConfig, "pad_to_capacity")
        yield f"{named}: the host reads how many rows go to each GPU"


def _obstacles_of_experts(moe: MoEConfig, dtype: str) -> Iterator[str]:
    backend = moe.gemm_backend
    if backend in ("te", "grouped_gemm", "loop") or dtype != "bfloat16":
        named = f"{flag_name(MoEConfig, 'gemm_backend')} {backend}" if backend != "auto" else f"--dtype {dtype}"
        yield f"{named}: the host reads how many rows each expert has"
    if moe.input_jitter_eps:
        yield f"{flag_name(MoEConfig, 'input_jitter_eps')} {moe.input_jitter_eps} draws random numbers"


def check_capture(run: RunConfig, world_size: int) -> None:
    """Refuse graphs that are asked for by name and can't be.

    Raises:
        ConfigError: names the flag, and what speaks against it.
    """
    why = obstacle(run, world_size)
    require(
        run.train.cuda_graph_impl != "local" or why is None,
        f"{FLAG} local: {why}; leave that out, or take {FLAG} auto",
    )


def replays(run: Planned, world_size: int, impl: CudaGraphs) -> bool:
    """Say whether a run replays its micro-batches on GPUs; `impl` is the flag's value."""
    return impl != "none" and obstacle(run, world_size) is None


def captures(run: RunConfig, world_size: int, device: torch.device) -> bool:
    """Say whether a run replays its micro-batches on a device."""
    return device.type == "cuda" and replays(run, world_size, run.train.cuda_graph_impl)


def describe_capture(run: RunConfig, world_size: int, device: torch.device) -> list[str]:
    """Give a line for the log; none without a GPU, or where there are to be no graphs."""
    if device.type != "cuda" or run.train.cuda_graph_impl == "none":
        return []
    why = obstacle(run, world_size)
    return ["micro-batches are replayed as CUDA graphs" if why is None else f"no CUDA graphs: {why}"]
