"""An estimate as JSON and as lines for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from moeconv.families.adapted import AdaptedModel
from runtime.estimate.flags import trainer_flags
from runtime.estimate.setup import Setup
from runtime.estimate.step import Estimate

GB = 1e9


def layout_name(setup: Setup) -> str:
    """Name a layout in short, as `tp2 sp pp4 ep8`; `one rank` where nothing is divided."""
    p = setup.parallel
    words = [f"{axis}{degree}" for axis, degree in (("dp", setup.dp), ("tp", p.tp)) if degree > 1]
    words += ["sp"] if setup.sp else []
    words += [f"{axis}{degree}" for axis, degree in (("pp", p.pp), ("vpp", p.vpp), ("cp", p.cp)) if degree > 1]
    words += [f"ep{p.ep}"] if p.ep > 1 else []
    words += [f"etp{p.etp}"] if p.etp != p.tp else []
    words += [p.pp_schedule] if p.pp > 1 and p.pp_schedule in ("gpipe", "zero-bubble") else []
    words += ["fully sharded"] if p.fully_shard else []
    return " ".join(words) or "one rank"


def recompute_name(setup: Setup) -> str:
    """Name what is computed again."""
    recompute = setup.recompute
    if recompute.granularity == "full":
        return "full" if recompute.method == "uniform" or not recompute.num_layers else f"{recompute.num_layers} layers"
    parts = ["attention"] if recompute.granularity == "selective" and "core_attn" in recompute.modules else []
    parts += ["experts"] if setup.moe is not None and setup.moe.recompute_layer else []
    return ", ".join(parts) or "none"


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Give all numbers of an estimate as JSON values, in bytes and seconds."""
    setup = estimate.setup
    size, saving = estimate.checkpoint
    stages = [
        memory.by_kind() | {"activations_by_part": dict(memory.activations), "peak": memory.peak, "host": memory.host}
        for memory in estimate.memory
    ]
    return {
        "gpu": estimate.machine.gpu,
        "gpus": setup.world_size,
        "layout": layout_name(setup),
        "recompute": recompute_name(setup),
        "sequences": setup.global_batch_size,
        "micro_batch_size": setup.micro_batch_size,
        "micro_batches": setup.num_microbatches,
        "seq_length": setup.seq_length,
        "memory": {
            "stages": stages,
            "fullest_stage": estimate.fullest,
            "peak": estimate.peak,
            "usable": estimate.machine.memory,
            "host": estimate.host,
            "host_usable": estimate.machine.host_memory_gb * GB or None,
            "fits_host": estimate.fits_host,
            "fits": estimate.fits,
        },
        "step": {
            "seconds": estimate.seconds,
            "tokens_per_second": estimate.tokens_per_second,
            "flops": estimate.flops,
            "tflops_per_gpu": estimate.tflops,
            "utilization": estimate.utilization,
            "bubble": estimate.bubble,
            "exposed_communication": estimate.exposed,
            "bytes_sent": [
                {"axis": axis, "link": link, "bytes": count} for (axis, link), count in estimate.traffic.items()
            ],
        },
        "checkpoint": {"bytes": size, "seconds": saving},
        "flags": trainer_flags(setup),
        "notes": notes(estimate),
    }


def notes(estimate: Estimate) -> list[str]:
    """Say what the numbers rest on where they rest on less than usual."""
    setup, machine, out = estimate.setup, estimate.machine, []
    if not machine.measured:
        out.append(f"{machine.gpu}: not measured; {machine.source}")
    if setup.world_size > machine.gpus_per_node:
        out.append("several nodes have not been measured: the network's rates are assumed")
    if setup.dtype not in ("bfloat16", "float16"):
        out.append(f"{setup.dtype}: times are by the data sheet, not measured; --bf16 is usual on GPUs")
    if setup.fp8.format is not None:
        out.append(
            "FP8 has been measured on one and two GPUs with our kernels, --fp8-recipe tensorwise and blockwise; its copies of weights are in the buffers"
        )
    if setup.parallel.cp > 1:
        out.append("context parallelism has been measured in its kernels alone")
    if setup.parallel.fully_shard:
        out.append(
            "full sharding has been measured on two GPUs, with 1.06 times the planned time, and an earlier form on four with 1.2 times"
        )
    if setup.parallel.pp > 1 and setup.parallel.pp_schedule == "zero-bubble":
        out.append("zero-bubble has not been measured: what torch computes twice in it is left out")
    if setup.uses_host:
        out.append(
            "whole models with state in the host's memory have been measured to take up to 1.2 times the planned time"
        )
    if isinstance(setup.model, AdaptedModel):
        out.append(
            "steps with adapters have been measured to take 0.8 to 1.3 times the planned time, by host and graphs; their memory is as planned"
        )
    return out


def lines(estimate: Estimate) -> Iterator[str]:
    """Give an estimate as lines for a person."""
    setup, machine = estimate.setup, estimate.machine
    count = sum(t.parameters for t in setup.model.tensors.values() if not setup.model.optional(t))
    yield (
        f"{setup.model.family.name}, {count / 1e9:.2f} G parameters, {setup.dtype} | {setup.world_size} x {machine.gpu}: "
        f"{layout_name(setup)} | {setup.global_batch_size} sequences of {setup.seq_length} tokens a step, "
        f"micro-batches of {setup.micro_batch_size} | recomputed: {recompute_name(setup)}"
    )
    yield ""
    yield from _memory(estimate)
    yield ""
    yield from _step(estimate)
    size, saving = estimate.checkpoint
    disks = -(-setup.world_size // machine.gpus_per_node)
    where = "the machine's own disk" if disks == 1 else f"{disks} machines' own disks"
    yield f"a training checkpoint: {size / GB:.1f} GB, {saving:.0f} s to {where}, {_meanwhile(setup, size / disks)}"
    yield from (f"note: {note}" for note in notes(estimate))
    yield ""
    yield f"flags: {shlex.join(trainer_flags(setup))}"


def _meanwhile(setup: Setup, copy: float) -> str:
    """Say what a save takes of a machine's memory; `copy`: bytes of the copy that lets training go on."""
    if setup.optim.on_host:  # what is read where it lies can't be changed meanwhile
        return "for which training waits; the save takes no more of the machine's memory"
    return (
        f"beside training, with {copy / GB:.1f} GB more of a machine's memory; where that is short, or with "
        "--no-async-save, training waits and the save takes none"
    )


def _memory(estimate: Estimate) -> Iterator[str]:
    kinds = list(estimate.memory[0].by_kind())
    yield "memory, GB".ljust(14) + "".join(kind.rjust(13) for kind in (*kinds, "peak"))
    memories = estimate.memory
    shown = range(len(memories)) if len(memories) <= 8 else (0, 1, len(memories) - 1)
    for rank in shown:
        values = (*memories[rank].by_kind().values(), memories[rank].peak)
        name = f"stage {rank}" if len(memories) > 1 else "each rank"
        yield name.ljust(14) + "".join(f"{value / GB:.2f}".rjust(13) for value in values)
    if len(memories) > len(shown):
        yield f"({len(memories)} stages in all)"
    fullest = memories[estimate.fullest]
    parts = ", ".join(f"{part} {size / GB:.2f}" for part, size in fullest.activations.items() if size >= 5e6)
    yield f"activations of the fullest rank by part: {parts or 'none'}"
    usable = estimate.machine.memory
    share = f"{estimate.peak / GB:.1f} GB of {usable / GB:.1f} GB that a run can use"
    hint = "DOES NOT FIT; leave the degrees out, or some of them with --search, and a plan looks for what does"
    yield f"peak: {share}: {'fits' if estimate.peak <= usable else hint}"
    if estimate.host:
        limit, ranks = estimate.machine.host_memory_gb, min(estimate.setup.world_size, estimate.machine.gpus_per_node)
        known = f" of {limit:,.0f} GB: {'fits' if estimate.fits_host else 'DOES NOT FIT'}" if limit else ""
        optim, recompute = estimate.setup.optim, estimate.setup.recompute
        what = ["masters and moments"] if optim.on_host else []
        named = " and ".join([*what, *(["activations"] if recompute.offload else [])])
        yield (
            f"in the memory of a machine with {ranks} of the ranks: {estimate.host / GB:.1f} GB of {named}{known}"
            + ("" if limit else "; --host-memory GB says what it has")
        )


def _step(estimate: Estimate) -> Iterator[str]:
    used = estimate.utilization
    share = f", {used:.1%} of its peak" if used is not None else ""
    yield (
        f"a step: {estimate.seconds * 1e3:,.0f} ms, {estimate.tokens_per_second:,.0f} tokens/s "
        f"({estimate.tokens_per_second / estimate.setup.world_size:,.0f} a GPU), {estimate.tflops:.0f} TFLOP/s a GPU{share}"
    )
    bubble = f"; ranks wait for other stages {estimate.bubble:.1%} of the passes" if len(estimate.memory) > 1 else ""
    yield f"communication that nothing hides: {estimate.exposed * 1e3:,.0f} ms{bubble}"
    sent = ", ".join(f"{axis} {count / GB:.2f} GB over {link}" for (axis, link), count in estimate.traffic.items())
    yield f"a rank sends in a step: {sent or 'nothing'}"
