"""The command `plan`: will it fit, and how fast will it be."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import show
from runtime.errors import require

if TYPE_CHECKING:
    from runtime.estimate.machine import Machine
    from runtime.estimate.setup import Setup
    from runtime.estimate.source import Source
    from runtime.estimate.step import Estimate
    from runtime.settings.flags import Given

# The converter's names of the degrees, beside the trainer's.
_SHORT = {
    "--tp": "--tensor-model-parallel-size",
    "--pp": "--pipeline-model-parallel-size",
    "--vpp": "--num-virtual-stages-per-pipeline-rank",
    "--ep": "--expert-model-parallel-size",
    "--etp": "--expert-tensor-parallel-size",
    "--cp": "--context-parallel-size",
    "--sp": "--sequence-parallel",
}
_DEGREES = {"tp", "pp", "vpp", "ep", "etp", "cp", "pp_layers", "layers_per_virtual_stage", "fully_shard"}
"""Fields of the trainer's settings that are a layout's."""
_SEARCH_BATCH = 256
"""Sequences of a step where layouts are compared and none is given: as many as a small run takes."""


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SRC [FLAGS]...")
@click.option("--gpus", type=click.IntRange(1, 1_000_000), help="GPUs in all.")
@click.option("--gpu", default="h100", show_default=True, help="h100, h200, a100, b200, or a calibration file.")
@click.option("--nodes", type=click.IntRange(1, 1_000_000), help="Machines; with --gpus-per-node instead of --gpus.")
@click.option("--gpus-per-node", type=click.IntRange(1, 1024), help="GPUs that NVLink connects; by default the GPU's.")
@click.option(
    "--link", type=click.FloatRange(0, min_open=True), metavar="GB/s", help="What a GPU sends to other nodes."
)
@click.option(
    "--host-memory",
    type=click.FloatRange(0, min_open=True),
    metavar="GB",
    help="Memory of a machine that a run can use, for --optimizer-cpu-offload; by default any.",
)
@click.option("--imbalance", type=click.FloatRange(1), help="Rows of the fullest expert rank, of the mean.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option(
    "--search", is_flag=True, help="Look for the best of the degrees that aren't given; the default without any."
)
@click.option(
    "--top", type=click.IntRange(1, 100), default=10, show_default=True, help="How many layouts a search gives."
)
@click.option("--scaling", is_flag=True, help="Tell how the layout scales to more GPUs, too.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write the step's timeline, for ui.perfetto.dev.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page: memory of each stage, timeline, scaling.")
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure this machine, and write what --gpu takes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def plan(words: tuple[str, ...], as_json: bool, calibrate: Path | None, **options: Any) -> None:
    """Say what training SRC (a folder, a config.json or a hub id) takes: memory by kind, time of a step, traffic.

    FLAGS are the trainer's (`moeconv train --help`), with --tp, --pp, --vpp, --ep, --etp, --cp and --sp for the degrees.
    Without degrees, the best layouts of --gpus are searched. No GPU is needed, and no weights.

    Example: moeconv plan mistralai/Mixtral-8x7B-v0.1 --gpus 8 --tp 2 --ep 4 --etp 1 --seq-length 4096
    """
    if calibrate is not None:
        _calibrate(calibrate, words, as_json)
        return
    source, given = _read(words, options["revision"])
    machine = _machine(options)
    notes = [f"note: {note}" for note in (*source.notes, *given.notes)]
    world = world_size(given, options, machine)
    if options["search"] or (world > 1 and not _DEGREES & given.of("parallel").keys()):
        value, lines = _search(source, given, world, machine, options)
    else:
        value, lines = _single(source, given, world, machine, options)
    show(value | {"source": str(source.path)}, as_json, [*notes, *lines])


def _calibrate(path: Path, words: Sequence[str], as_json: bool) -> None:
    """Measure this machine; under torchrun every process comes here."""
    if words:
        raise click.UsageError(f"--calibrate measures a machine, not a model: leave {words[0]} out")
    from runtime.estimate.calibrate import calibrate

    line = calibrate(path)
    if line:
        show({"file": str(path)}, as_json, [line])


def _single(
    source: Source, given: Given, world: int, machine: Machine, options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Plan one layout."""
    from runtime.estimate.describe import as_json, lines
    from runtime.estimate.split import settle, states_layers
    from runtime.estimate.step import Estimate

    estimate = Estimate(make_setup(source, given, world), machine, options["imbalance"])
    estimate, note = settle(estimate, stated=states_layers(estimate.setup.parallel))
    noted = [f"note: {note}"] if note is not None else []
    return _with_more(as_json(estimate), [*noted, *lines(estimate)], estimate, options)


def _with_more(
    value: dict[str, Any], lines: list[str], estimate: Estimate | None, options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Add the scaling curve and the files that are asked for; None has neither."""
    if estimate is None:
        return value | {"files": []}, lines
    if options["scaling"]:
        from runtime.estimate.scaling import scaling, scaling_json, scaling_lines

        args = (estimate.setup, estimate.machine, options["imbalance"])
        value, lines = value | {"scaling": scaling_json(*args)}, [*lines, "", *scaling_lines(scaling(*args))]
    written = _files(estimate, options)
    return value | {"files": written}, [*lines, *(f"{path}: written" for path in written)]


def _files(estimate: Estimate, options: dict[str, Any]) -> list[str]:
    """Write the timeline and the page where they are asked for."""
    written = []
    if options["trace"] is not None:
        from runtime.estimate.simulate import write_trace

        write_trace(options["trace"], estimate.events, estimate.places)
        written.append(str(options["trace"]))
    if options["html"] is not None:
        from runtime.estimate.page import plan_page, write_plan

        write_plan(options["html"], plan_page(estimate, options["imbalance"]))
        written.append(str(options["html"]))
    return written


def _search(
    source: Source, given: Given, world: int, machine: Machine, options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Search the degrees that aren't given."""
    from runtime.estimate.found import found_json, found_lines
    from runtime.estimate.remedies import remedies
    from runtime.estimate.search import Free, Search
    from runtime.flag import flag_name
    from runtime.optim.config import OptimConfig

    start = time.perf_counter()
    setup, batch = searched_setup(source, given, world)
    size = given.values.get(("train", "micro_batch_size"))
    again = not given.of("recompute") and ("moe", "recompute_layer") not in given.values
    share = ("optim", "optimizer_offload_fraction") not in given.values
    free = Free(fixed=given.of("parallel"), micro_batch_size=size, recompute=again, offload=share)
    found = Search(setup, batch, machine, free, options["imbalance"]).run(options["top"])
    lines = list(found_lines(found, time.perf_counter() - start))
    changed: dict[str, Any] = {}
    for fields, optim in remedies(setup.optim, setup.dtype) if not found.best else ():
        other = Search(dataclasses.replace(setup, optim=optim), batch, machine, free, options["imbalance"])
        smaller = other.run(options["top"])
        if "optimizer_cpu_offload" in fields or smaller.best:
            words = " ".join(
                f"{flag_name(OptimConfig, name)} {'' if v is True else v}".strip() for name, v in fields.items()
            )
            lines += ["", f"with {words}:", *found_lines(smaller, time.perf_counter() - start)]
        if smaller.best:
            found, changed = smaller, {"changed": fields}
            break
    return _with_more(found_json(found) | changed, lines, found.best[0] if found.best else None, options)


def searched_setup(source: Source, given: Given, world: int) -> tuple[Setup, int]:
    """Put together what a search begins with.

    Args:
        source: the model.
        given: the flags; without --global-batch-size, layouts are compared with that of a small run.
        world: number of ranks.

    Returns:
        The setup without degrees, and the sequences of a step.
    """
    from runtime.estimate.setup import Setup
    from runtime.settings.assemble import make_run

    batch = given.of("train").get("global_batch_size") or -(-_SEARCH_BATCH // world) * world
    values = {key: value for key, value in given.values.items() if key[0] != "parallel"}
    values |= {("train", "global_batch_size"): batch, ("train", "micro_batch_size"): 1}
    run = make_run(dataclasses.replace(given, values=values), source.model, source.path)
    setup = Setup(
        model=run.model,
        world_size=world,
        parallel=run.parallel,
        moe=run.moe,
        optim=run.optim,
        recompute=run.recompute,
        fp8=run.fp8,
        dtype=run.dtype,
        seq_length=run.train.seq_length,
        micro_batch_size=1,
        num_microbatches=1,
        graphs=run.train.cuda_graph_impl,
    )
    return setup, batch


def _read(words: Sequence[str], revision: str | None) -> tuple[Source, Given]:
    """Read SRC and the trainer's flags."""
    from runtime.estimate.source import read_source
    from runtime.settings.flags import parse_flags

    named = words[0] if words and not words[0].startswith("-") else None
    flags = [_long(word) for word in words[1 if named is not None else 0 :]]
    given = parse_flags(flags, "moeconv plan")
    load = given.of("checkpoint").get("load")
    if named is None and load is None:
        raise click.UsageError("SRC is missing: name a checkpoint's folder, a config.json or a hub id before the flags")
    source = read_source(named if named is not None else str(load), revision)
    return source, _filled(given, source)


def _filled(given: Given, source: Source) -> Given:
    """Fill in what the trainer must be told and a plan needn't: how long the run is, and its data."""
    values = given.values | {("checkpoint", "load"): source.path.parent}
    if not {("train", "train_iters"), ("train", "train_samples")} & values.keys():
        values["train", "train_iters"] = 1
    if not given.of("data"):
        values["data", "mock_data"] = True
    return dataclasses.replace(given, values=values)


def _long(word: str) -> str:
    """Give a flag by the trainer's name."""
    name, equals, value = word.partition("=")
    return _SHORT.get(name, name) + equals + value


def _machine(options: dict[str, Any]) -> Machine:
    from runtime.estimate.machine import find_machine

    return find_machine(
        options["gpu"],
        gpus_per_node=options["gpus_per_node"],
        link_gb_s=options["link"],
        host_memory_gb=options["host_memory"],
    )


def world_size(given: Given, options: dict[str, Any], machine: Machine) -> int:
    """Find out how many GPUs are planned for.

    Args:
        given: the flags; where nothing is said, so many GPUs as their degrees need.
        options: the command's own.
        machine: says how many a node has.

    Returns:
        The number of ranks.

    Raises:
        ConfigError: --gpus and --nodes disagree.
    """
    from math import lcm

    gpus, nodes = options["gpus"], options["nodes"]
    if nodes is not None:
        require(
            gpus is None or gpus == nodes * machine.gpus_per_node,
            f"--gpus is {gpus}, and --nodes {nodes} with {machine.gpus_per_node} each are {nodes * machine.gpus_per_node}: "
            "give one of the two, or --gpus-per-node",
        )
        return int(nodes * machine.gpus_per_node)
    if gpus is not None:
        return int(gpus)
    degrees = given.of("parallel")
    tp, pp, ep = (degrees.get(axis, 1) for axis in ("tp", "pp", "ep"))
    return lcm(tp * pp * degrees.get("cp", 1), ep * pp * (degrees.get("etp") or tp))


def make_setup(source: Source, given: Given, world: int) -> Setup:
    """Put a setup together as the trainer does, with all its checks.

    Args:
        source: the model.
        given: the flags.
        world: number of ranks.

    Returns:
        The setup.

    Raises:
        ConfigError: the trainer would refuse it; in its words.
    """
    from runtime.estimate.setup import Setup
    from runtime.settings.assemble import make_run
    from runtime.settings.check import check_layout

    run = make_run(given, source.model, source.path)
    check_layout(run, world)
    return Setup.of_run(run, world)
