"""What is checked before a run allocates anything: degrees, sizes and batch against each other and the world size."""

from __future__ import annotations

import torch

from moeconv.errors import LayoutError
from moeconv.families.base import Model
from moeconv.layout.degrees import Degrees, chunk_layers
from moeconv.layout.shard import divisors
from runtime.errors import require
from runtime.moe.config import MoEConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.run import RunConfig
from runtime.settings.steps import TrainConfig

TP = "--tensor-model-parallel-size"
PP = "--pipeline-model-parallel-size"
VPP = "--num-virtual-stages-per-pipeline-rank"
CP = "--context-parallel-size"
EP = "--expert-model-parallel-size"
ETP = "--expert-tensor-parallel-size"


def check_run(run: RunConfig, world_size: int) -> None:
    """Refuse a run that can't work, before anything is allocated.

    Args:
        run: the settings.
        world_size: number of processes.

    Raises:
        ConfigError: names the flag, its value and what would fit.
        LayoutError: the layers don't divide over the stages.
    """
    check_degrees(run.model, run.parallel, run.moe, world_size)
    check_sequence(run.parallel, run.train)
    check_pipeline(run.model, run.parallel, run.train, world_size)
    check_precision(run)
    run.train.num_microbatches(data_parallel_size(run.parallel, world_size))


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Give the data-parallel degree: what tp, pp and cp leave of the world size."""
    return world_size // (parallel.tp * parallel.pp * parallel.cp)


def check_degrees(model: Model, parallel: ParallelConfig, moe: MoEConfig | None, world_size: int) -> None:
    """Check that the degrees fit the world size, the heads, the experts and each other.

    Args:
        model: the architecture.
        parallel: the degrees.
        moe: the MoE layer's options; None for a dense model.
        world_size: number of processes.

    Raises:
        ConfigError: names the flag, its value and what would fit.
    """
    _check_world(parallel, world_size)
    tp, heads, kv_heads = parallel.tp, model.sizes["heads"], model.sizes["kv_heads"]
    fit = ", ".join(str(d) for d in divisors(heads) if _kv_fit(kv_heads, d))
    require(
        heads % tp == 0 and _kv_fit(kv_heads, tp),
        f"{TP} is {tp}; {heads} attention heads and {kv_heads} key/value heads allow {fit}",
    )
    for role in ("mlp.gate", "shared.gate"):
        if model.has(role):
            _divides(TP, tp, model.shape(model.rule(role))[0], f"{role.split('.')[0]} width")
    if moe is None:
        require(parallel.ep == 1, f"{EP} is {parallel.ep}; the checkpoint is a dense model without experts: give 1")
        return
    _divides(EP, parallel.ep, model.sizes["experts"], "experts")
    _divides(ETP, parallel.etp, model.sizes["ffn"], "expert width")
    require(
        parallel.sp or tp == 1 or parallel.ep == 1,
        f"{EP} is {parallel.ep} and {TP} is {tp}: expert and tensor parallelism together need --sequence-parallel",
    )


def _check_world(parallel: ParallelConfig, world_size: int) -> None:
    dense = parallel.tp * parallel.pp * parallel.cp
    require(
        world_size % dense == 0,
        f"{TP} {parallel.tp} x {PP} {parallel.pp} x {CP} {parallel.cp} = {dense} doesn't divide the world size "
        f"{world_size}; products that fit: {', '.join(map(str, divisors(world_size)))}",
    )
    experts = parallel.ep * parallel.etp * parallel.pp
    fit = divisors(world_size // parallel.pp)
    require(
        world_size % experts == 0,
        f"{EP} {parallel.ep} x {ETP} {parallel.etp} x {PP} {parallel.pp} = {experts} doesn't divide the world size "
        f"{world_size}; {EP} x {ETP} can be {', '.join(map(str, fit))}",
    )


def _kv_fit(num_kv_heads: int, tp: int) -> bool:
    """Each rank holds whole key/value heads, or several ranks share one."""
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


def _divides(flag: str, degree: int, size: int, what: str) -> None:
    fit = ", ".join(map(str, divisors(size)))
    require(size % degree == 0, f"{flag} is {degree}; the model has {what} {size}: degrees that fit are {fit}")


def check_sequence(parallel: ParallelConfig, train: TrainConfig) -> None:
    """Check that the sequence divides over the ranks that share it.

    Raises:
        ConfigError: names the flag, its value and what would fit.
    """
    parts = parallel.cp * (
        2 if parallel.cp > 1 else 1
    )  # causal load balancing gives each rank an early and a late part
    parts *= parallel.tp if parallel.sp else 1
    require(
        train.seq_length % parts == 0,
        f"--seq-length is {train.seq_length}; with {CP} {parallel.cp} and {TP} {parallel.tp} it must be a multiple of "
        f"{parts}: {train.seq_length // parts * parts or parts} fits",
    )


def check_pipeline(model: Model, parallel: ParallelConfig, train: TrainConfig, world_size: int) -> None:
    """Check that layers and micro-batches fit the pipeline.

    Raises:
        ConfigError: the schedule doesn't fit; names the flag, its value and what would fit.
        LayoutError: the layers don't divide over the stages.
    """
    pp, vpp, schedule = parallel.pp, parallel.vpp, parallel.pp_schedule
    require(vpp == 1 or pp > 1, f"{VPP} is {vpp} with {PP} 1: virtual stages need a pipeline")
    count = len(parallel.pp_layers or ())
    require(
        count in (0, pp * vpp),
        f"--pp-layers has {count} numbers; {PP} {pp} x {VPP} {vpp} needs {pp * vpp}",
    )
    try:
        chunk_layers(model.sizes["layers"], Degrees(pp=pp, vpp=vpp, pp_layers=parallel.pp_layers))
    except LayoutError as error:
        raise LayoutError(f"{PP} is {pp}, {VPP} is {vpp}: {error}") from None
    if pp == 1:
        return
    single = schedule in ("gpipe", "1f1b")
    require(
        single == (vpp == 1) or schedule == "zero-bubble",
        f"--pipeline-schedule {schedule} with {VPP} {vpp}: "
        + ("give interleaved or zero-bubble" if single else "interleaving needs at least 2"),
    )
    num = train.num_microbatches(data_parallel_size(parallel, world_size))
    require(
        schedule != "interleaved" or num % pp == 0,
        f"{num} micro-batches a step with --pipeline-schedule interleaved; they must be a multiple of {PP} {pp}: "
        "change --global-batch-size or --micro-batch-size",
    )


def check_precision(run: RunConfig) -> None:
    """Check that this machine can compute in the types that are asked for.

    Raises:
        ConfigError: FP8 or fp16 without a GPU.
    """
    cuda = torch.cuda.is_available()
    fp8 = run.moe.fp8_format if run.moe else None
    require(fp8 is None or cuda, f"--fp8-format is {fp8}; FP8 needs a GPU of compute capability 8.9 or more")
    if fp8 is not None:
        capability = torch.cuda.get_device_capability()
        require(
            capability >= (8, 9),
            f"--fp8-format is {fp8}; FP8 needs compute capability 8.9 or more, this GPU has {capability}",
        )
