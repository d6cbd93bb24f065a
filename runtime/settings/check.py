"""The judge of a run: everything that its settings must fulfil together, before anything is allocated or ranks meet."""

from __future__ import annotations

import math

from moeconv.families.adapted import AdaptedModel
from moeconv.families.base import Model
from moeconv.layout.degrees import DegreesError
from moeconv.layout.shard import divisors
from moeconv.placement import check_degrees as check_model_degrees
from runtime.errors import ConfigError, require
from runtime.flag import flag_name
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.optim.groups import resolve_groups
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.capture import check_capture
from runtime.settings.degrees import FLAGS
from runtime.settings.run import RunConfig
from runtime.settings.steps import TrainConfig

TP, PP, VPP, CP, EP, ETP = (FLAGS[axis] for axis in ("tp", "pp", "vpp", "cp", "ep", "etp"))


def check_run(run: RunConfig, world_size: int) -> None:
    """Refuse a run that can't work, before anything is allocated.

    Args:
        run: the settings.
        world_size: number of processes.

    Raises:
        ConfigError: names the flag, its value and what would fit.
    """
    resolve_groups(run.optim, run.model, trains=not run.train.skip_train)
    check_layout(run, world_size)
    check_precision(run)
    check_adapters(run)
    check_capture(run, world_size)


def check_layout(run: RunConfig, world_size: int) -> None:
    """Refuse degrees and sizes of a step that can't work; arguments and errors as of `check_run`."""
    check_world(run.parallel, world_size)
    check_degrees(run.parallel, run.model)
    check_combinations(run.parallel, run.moe)
    if run.generate is None:
        check_sequence(run.parallel, run.train)
        check_microbatches(run.parallel, run.train, world_size)
        check_overlap(run, world_size)
    check_optimizer(run.optim, run.parallel)
    check_types(run.optim, run.dtype)
    check_offload(run.recompute, run.parallel)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Give the data-parallel degree: what tp, pp and cp leave of the world size."""
    return world_size // (parallel.tp * parallel.pp * parallel.cp)


def check_world(parallel: ParallelConfig, world_size: int) -> None:
    """Check that the degrees divide the number of processes.

    Args:
        parallel: the degrees.
        world_size: number of processes.

    Raises:
        ConfigError: names the flags, their values and what would fit.
    """
    fits = ", ".join(map(str, divisors(world_size)))
    for axes in (("tp", "pp", "cp"), ("ep", "etp", "pp")):
        product = math.prod(getattr(parallel, axis) for axis in axes)
        named = " x ".join(f"{FLAGS[axis]} {getattr(parallel, axis)}" for axis in axes)
        require(
            world_size % product == 0,
            f"{named} = {product} doesn't divide the world size {world_size}; products that fit: {fits}",
        )


def check_degrees(parallel: ParallelConfig, model: Model) -> None:
    """Check that the degrees divide what they split of the model; the converter's own check says it in our flags.

    Raises:
        ConfigError: names the flag, its value and what would fit.
    """
    try:
        check_model_degrees(model, parallel.layout)
    except DegreesError as error:
        raise ConfigError(error.say(FLAGS)) from None


def check_combinations(parallel: ParallelConfig, moe: MoEConfig | None) -> None:
    """Refuse combinations that the engine doesn't compute.

    Args:
        parallel: the degrees.
        moe: the MoE layer's options; None for a dense model.

    Raises:
        ConfigError: names the flags and what would fit.
    """
    pp, vpp, schedule = parallel.pp, parallel.vpp, parallel.pp_schedule
    tp, sp = f"{TP} {parallel.tp}", FLAGS["sp"]
    require(
        parallel.sp or parallel.tp == 1 or parallel.ep == 1,
        f"{EP} {parallel.ep} and {TP} {parallel.tp}: expert and tensor parallelism together need {FLAGS['sp']}",
    )
    require(
        not parallel.tp_comm_overlap or (parallel.tp > 1 and parallel.sp),
        f"{FLAGS['tp_comm_overlap']} with {tp} and {'' if parallel.sp else 'without '}{sp}: it overlaps the gathers and sums of "
        f"sequence parallelism with products; give {TP} 2 or more and {sp}, or leave it out",
    )
    require(
        not parallel.fully_shard or pp == 1 or schedule != "zero-bubble",
        f"{FLAGS['fully_shard']} with {FLAGS['pp_schedule']} zero-bubble: its weight gradients come outside of the hooks "
        "that reduce them; take 1f1b or interleaved",
    )
    if pp > 1:
        single = schedule in ("gpipe", "1f1b")
        require(
            single == (vpp == 1) or schedule == "zero-bubble",
            f"{FLAGS['pp_schedule']} {schedule} with {VPP} {vpp}: "
            + ("give interleaved or zero-bubble" if single else "interleaving needs at least 2"),
        )
    if moe is not None and moe.aux_loss_mode == "hf" and moe.aux_losses:
        whole = parallel.pp * parallel.tp * parallel.cp == 1
        flag = flag_name(MoEConfig, "aux_loss_mode")
        require(
            whole,
            f"{flag} hf pools the layers of whole sequences: it needs {PP}, {TP} and {CP} 1, here they are {pp}, "
            f"{parallel.tp} and {parallel.cp}; {flag} megatron has no such limit",
        )


def check_sequence(parallel: ParallelConfig, train: TrainConfig) -> None:
    """Check that the sequence divides over the ranks that share it.

    Raises:
        ConfigError: names the flag, its value and what would fit.
    """
    # Causal load balancing gives each rank of a sequence an early and a late part.
    parts = parallel.cp * (2 if parallel.cp > 1 else 1)
    parts *= parallel.tp if parallel.sp else 1
    require(
        train.seq_length % parts == 0,
        f"--seq-length is {train.seq_length}; with {CP} {parallel.cp} and {TP} {parallel.tp} it must be a multiple of "
        f"{parts}: {train.seq_length // parts * parts or parts} fits",
    )


def check_microbatches(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> None:
    """Check that the global batch divides over the ranks, and its micro-batches over the pipeline's rounds.

    Raises:
        ConfigError: names the flags, their values and what would fit.
    """
    dp = data_parallel_size(parallel, world_size)
    pp, one_pass = parallel.pp, train.micro_batch_size * dp
    for total in train.batch_sizes(dp).all():
        num = total // one_pass
        require(
            pp == 1 or parallel.pp_schedule != "interleaved" or num % pp == 0,
            f"--global-batch-size {total} makes {num} micro-batches a step, with {FLAGS['pp_schedule']} interleaved "
            f"they must be a multiple of {PP} {pp}: give a multiple of {one_pass * pp}"
            + (", --rampup-batch-size included" if train.rampup_batch_size else ""),
        )


def check_overlap(run: RunConfig, world_size: int) -> None:
    """Refuse to overlap exchanges of rows where micro-batches can't be computed in pairs; arguments and errors as of `check_run`."""
    parallel, moe, recompute = run.parallel, run.moe, run.recompute
    if not parallel.overlap_exchange or moe is None:
        return
    flag = flag_name(ParallelConfig, "overlap_exchange")
    names = {name: flag_name(MoEConfig, name) for name in ("dispatcher", "recompute_layer", "aux_loss_mode")}
    require(
        parallel.pp == 1,
        f"{flag} with {PP} {parallel.pp}: a pipeline's schedule has an order of its own; leave one of the two out",
    )
    require(
        not parallel.fully_shard,
        f"{flag} with {FLAGS['fully_shard']}: weights are gathered for one micro-batch at a time; take --use-distributed-optimizer",
    )
    require(
        moe.dispatcher == "alltoall",
        f"{flag} overlaps exchanges of rows, and {names['dispatcher']} {moe.dispatcher} has none; take alltoall",
    )
    require(
        not moe.recompute_layer,
        f"{flag} with {names['recompute_layer']} (or --recompute-modules moe): exchanges are then within what is computed again; take "
        "--recompute-granularity full, whose layers are recomputed for both micro-batches at a time",
    )
    require(
        not recompute.offload,
        f"{flag} with --offload-activations {' '.join(recompute.offload)}: activations go to the host a layer at a time, and here two "
        "are under way; leave one of the two out",
    )
    require(
        moe.aux_loss_mode != "hf" or not moe.aux_losses,
        f"{flag} with {names['aux_loss_mode']} hf, which pools the layers of one micro-batch; take {names['aux_loss_mode']} megatron",
    )
    dp = data_parallel_size(parallel, world_size)
    one_pass = run.train.micro_batch_size * dp
    most = max(run.train.batch_sizes(dp).all())
    require(
        most >= 2 * one_pass,
        f"{flag}: --global-batch-size {most} makes one micro-batch a step, and one is computed while the other's rows travel: give a "
        f"multiple of {2 * one_pass}" + (", or a smaller --micro-batch-size" if run.train.micro_batch_size > 1 else ""),
    )


def check_optimizer(optim: OptimConfig, parallel: ParallelConfig) -> None:
    """Refuse layouts whose ranks hold parts of the matrices that Muon needs whole.

    Raises:
        ConfigError: names the flags.
    """
    cuts = [f"{FLAGS[axis]} {getattr(parallel, axis)}" for axis in ("tp", "etp") if getattr(parallel, axis) > 1]
    cuts += [
        flag_name(ParallelConfig, field)
        for field in ("use_distributed_optimizer", "fully_shard")
        if getattr(parallel, field)
    ]
    require(
        optim.optimizer != "muon" or not cuts,
        f"--optimizer muon orthogonalises whole matrices, of which {', '.join(cuts)} leaves a rank only a part: leave that "
        "out and spread the model by expert, pipeline and context parallelism, or take --optimizer adam",
    )
    require(
        optim.optimizer != "muon" or not optim.optimizer_cpu_offload,
        "--optimizer muon with --optimizer-cpu-offload: Muon needs whole matrices on the GPU, and the optimizer's state comes "
        "there in pieces; take --optimizer adam, or leave --optimizer-cpu-offload out",
    )
    require(
        optim.optimizer != "muon" or optim.master_weights == "fp32",
        f"--optimizer muon with --master-weights {optim.master_weights}: Muon updates matrices of fp32 masters in place; take "
        "--optimizer adam, or leave --master-weights out",
    )


def check_types(optim: OptimConfig, dtype: str) -> None:
    """Refuse types of the optimizer's state that don't go with the weights'.

    Args:
        optim: the optimizer's settings.
        dtype: of the weights.

    Raises:
        ConfigError: names the flags and what would fit.
    """
    remedy = {
        "float16": "fp16 has another exponent: train with --bf16, or leave --master-weights out",
        "float32": "these weights are their own masters: train with --bf16, or leave --master-weights out",
    }
    require(
        optim.master_weights == "fp32" or dtype == "bfloat16",
        f"--master-weights {optim.master_weights} keeps the 16 bits that a bf16 weight lacks of its fp32 master, and the weights are "
        f"{dtype}; {remedy.get(dtype, remedy['float32'])}",
    )
    require(
        optim.main_grads_dtype == "fp32" or dtype == "bfloat16",
        f"--main-grads-dtype {optim.main_grads_dtype} is of bf16 weights, and these are {dtype}: train with --bf16, or leave it out",
    )


def check_offload(recompute: RecomputeConfig, parallel: ParallelConfig) -> None:
    """Refuse to send away what full sharding gathers.

    Raises:
        ConfigError: names the flags.
    """
    parts = [part for part in recompute.offload if part != "layer_inputs"]
    require(
        not (parts and parallel.fully_shard),
        f"--offload-activations {' '.join(parts)} with {FLAGS['fully_shard']}: gathered weights are among what a layer keeps; take "
        "--recompute-granularity full with --offload-activations layer_inputs",
    )


def check_adapters(run: RunConfig) -> None:
    """Refuse what can't be trained beside adapters.

    Raises:
        ConfigError: names the flags and what would fit.
    """
    model, moe = run.model, run.moe
    if not isinstance(model, AdaptedModel):
        return
    require(
        not run.drawn or run.checkpoint.save is None,
        f"--lora-rank {run.lora.rank} with drawn weights: no save of adapters would find its model again. Save the model first "
        "(--train-iters 0), --load it, or leave --save out",
    )
    require(
        run.lora.quantize_base is None or not run.parallel.fully_shard,
        f"--quantize-base holds the frozen model on each data-parallel rank, quantised, which {FLAGS['fully_shard']} doesn't shard: take "
        f"one of the two, or spread the model by {EP}, {TP} or {PP}",
    )
    require(
        run.fp8.format is None,
        f"--fp8-format makes 8-bit weights anew in each step, and beside adapters (--lora-rank {run.lora.rank}) they don't change: leave "
        "it out",
    )
    if moe is None:
        return
    flags = {name: flag_name(MoEConfig, name) for name in ("gemm_backend", "enable_expert_bias")}
    require(
        not moe.enable_expert_bias,
        f"{flags['enable_expert_bias']} changes the frozen model beside adapters, which no save of them would hold; leave it out",
    )
    experts = any(model.tensors[name].expert is not None for name in model.adapted)
    te = moe.gemm_backend == "te"
    require(
        not (experts and te),
        f"--lora-targets gives routed experts adapters, which {flags['gemm_backend']} te doesn't compute; take another backend",
    )
    require(
        run.lora.quantize_base is None or not te,
        f"--quantize-base makes experts' numbers for grouped products of bf16; {flags['gemm_backend']} te takes "
        "weights of its own: take another backend, or leave --quantize-base out",
    )


def check_precision(run: RunConfig) -> None:
    """Check that this machine can compute in the types that are asked for.

    Raises:
        ConfigError: FP8 without a GPU that has it, in another type than bf16, or of experts that have no products in it.
    """
    fp8, backend = run.fp8.format, run.moe.gemm_backend if run.moe else "auto"
    if fp8 is None:
        return
    import torch  # here only: everything else is judged without it

    cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    has = f"this GPU has {capability[0]}.{capability[1]}" if cuda else "there is no GPU here"
    require(
        capability >= (8, 9),
        f"--fp8-format is {fp8}; FP8 needs a GPU of compute capability 8.9 or more, {has}",
    )
    require(
        capability[0] == 9 or run.moe is not None,
        f"--fp8-format is {fp8}; the products of a dense model are in FP8 on Hopper (9.0) alone, {has}: leave it out",
    )
    require(
        run.dtype == "bfloat16",
        f"--fp8-format is {fp8}; what is not in FP8 is bf16 then, and not {run.dtype}: give --bf16",
    )
    flag = flag_name(MoEConfig, "gemm_backend")
    require(backend in ("auto", "hopper", "te"), f"--fp8-format needs {flag} hopper or te, got {backend}; take auto")
    require(
        run.model.compute.gate is None,
        "--fp8-format: experts with biases and a clamped gate have no products in FP8; leave it out",
    )
