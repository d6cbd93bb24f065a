"""Opening, importing and exporting Megatron checkpoints: what the command line calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeconv.checking import check_tied
from moeconv.checkpoint import TRAINER, Checkpoint, model_of, open_checkpoint
from moeconv.convert import Options, plan_sharded, write_plan, write_sharded
from moeconv.errors import MappingError
from moeconv.families.base import CARRIED, Model
from moeconv.io.carried import Content, read_content, size_of
from moeconv.io.decode import parse_json
from moeconv.io.hf_folder import CONFIG
from moeconv.io.paths import check_inside, read_whole
from moeconv.io.staging import check_free
from moeconv.io.trainer_file import parse_trainer
from moeconv.layout.degrees import Degrees, DegreesError
from moeconv.megatron import dist, legacy
from moeconv.megatron.args import RunArgs
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.described import config_from_args
from moeconv.megatron.dist_metadata import METADATA
from moeconv.megatron.export import Target, torch_files
from moeconv.megatron.export_dist import torch_dist_files
from moeconv.megatron.model_args import builder_note, check_args, flags
from moeconv.megatron.names import Experts, Spec
from moeconv.megatron.run_args import TORCH_NAMES
from moeconv.megatron.source import TRACKER, MegatronSource, find_iteration
from moeconv.megatron.tensors import biased
from moeconv.placement import check_degrees, split_optimizer_name
from moeconv.plan import make_plan
from moeconv.quant import require_plain

Format = Literal["torch", "torch_dist"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion wrote or, in a dry run, would write."""

    files: int
    nbytes: int
    dropped: tuple[str, ...]
    degrees: str
    notes: tuple[str, ...] = ()
    "What Megatron needs to be told besides."


def open_megatron(
    path: Path,
    *,
    iteration: int | None = None,
    hf_config: Path | None = None,
    ignore_args: bool = False,
    optimizer: bool = False,
) -> MegatronSource:
    """Open a Megatron checkpoint and find the Hugging Face model's rectangles in it; no weights are read.

    Args:
        path: the checkpoint's root or the folder of one iteration.
        iteration: the iteration wanted; by default the one that the tracker names.
        hf_config: the model's config.json, or a folder with it; by default one in the root, else made from `args`.
        ignore_args: trust `hf_config` against the checkpoint's `args`.
        optimizer: also find the optimizer's state (`torch_dist` only).

    Returns:
        The opened checkpoint.

    Raises:
        SourceError: a file is missing or damaged.
        MappingError: its tensors, `args` and config don't fit each other or the model's family.
        IntegrityError: a tensor is stored in part, or twice.
    """
    root, name = find_iteration(path, iteration)
    folder = root / name
    kind = dist.DistReader if os.path.lexists(folder / METADATA) else legacy.LegacyReader
    reader = kind(folder)
    config = _config(root, reader.args, reader.dtype, hf_config)
    model = model_of(config, f"{root}: its config")
    if reader.args and not ignore_args:
        check_args(reader.args, model)
    if isinstance(reader, dist.DistReader):
        return dist.locate(reader, root, name, model, config, optimizer=optimizer)
    return legacy.locate(reader, root, name, model, config)


def _config(root: Path, args: RunArgs, dtype: Callable[[], str], given: Path | None) -> dict[str, Any]:
    if given is None and os.path.lexists(root / CONFIG):
        given = check_inside(root, CONFIG)
    if given is None:
        if not args:
            raise MappingError(f"{root}: the checkpoint has no args; give the model's config.json with --hf-config")
        return config_from_args(args, TORCH_NAMES[dtype()])
    given = given / CONFIG if given.is_dir() else given
    return parse_json(read_whole(given), str(given))


def export_megatron(
    src: Path,
    out: Path,
    *,
    fmt: Format,
    degrees: Degrees,
    spec: Spec,
    experts: Experts,
    options: Options,
    optimizer: bool = True,
    dry_run: bool = False,
) -> Summary:
    """Write a model as a Megatron checkpoint, ready for `--load`, with the model's config and tokenizer beside it.

    Args:
        src: the model's folder.
        out: the folder to make: Megatron's `--load`.
        fmt: Megatron's checkpoint format.
        degrees: how many ranks share the model along each axis.
        spec: the layer spec of the model that will load it.
        experts: the expert implementation of that model.
        options: how to run.
        optimizer: take the optimizer's state along where there is one.
        dry_run: plan everything and write nothing.

    Returns:
        What was written.

    Raises:
        MoeconvError: as the source, layout or output demands; nothing is left under `out`.
    """
    found = open_checkpoint(src)
    _check_takes(found, src, degrees)
    trainer = _trainer(found, fmt) if optimizer else None
    places = (None, *dist.OPTIMIZER_STATES.values()) if trainer is not None else (None,)  # no mean of the weights
    kept = [name for name in found.tensors if split_optimizer_name(name)[0] in places]
    unread = [name for name in kept if split_optimizer_name(name)[0] is None and _is_carried(found, name)]
    # Megatron has no shared experts of width 0.
    names = [name for name in kept if name not in unread and found.tensors[name].nbytes]
    target = Target(
        model=found.model,
        dtypes={name: found.tensors[name].dtype for name in names},
        degrees=degrees,
        spec=spec,
        experts=experts,
        trainer=trainer,
    )
    files, small = (torch_files(target), dict[str, Content]()) if fmt == "torch" else torch_dist_files(target)
    beside = small | {name: content for name, content in found.carried_files.items() if name != TRAINER}
    tensors = {name: found.tensors[name] for name in names}
    plan = make_plan(tensors, {name: found.pieces[name] for name in names}, files, copies=True)
    if dry_run:
        check_free(out.absolute())
    else:
        write_plan(found, out, plan, beside, options, lambda s, *_: s.write(TRACKER, target.iteration.encode()))
    dropped = _dropped(found, len(found.tensors) - len(kept), unread)
    nbytes = plan.nbytes + sum(map(size_of, beside.values()))
    return Summary(len(files) + len(beside) + 1, nbytes, tuple(dropped), str(degrees), tuple(_notes(found.model)))


def _check_takes(found: Checkpoint, src: Path, degrees: Degrees) -> None:
    """Refuse what Megatron-Core doesn't take."""
    require_plain(found.model, src, "Megatron's format")
    check_tied(found, "Megatron")
    check_degrees(found.model, degrees)
    if degrees.etp > 1 and found.model.compute.router is not None and biased(found.model):
        raise DegreesError(
            f"<etp> {degrees.etp}: the experts of {found.family.name} have biases, which Megatron-Core takes with <etp> 1 alone"
        )


def _dropped(found: Checkpoint, left: int, unread: list[str]) -> list[str]:
    """Say what is not converted: states of the optimizer, files beside the weights, carried tensors."""
    dropped = [f"{left} tensors of optimizer state (--no-optimizer)"] if left else []
    dropped += found.dropped
    return dropped + (
        [f"{len(unread)} tensors that the model does not compute with, such as {unread[0]}"] if unread else []
    )


def _is_carried(found: Checkpoint, name: str) -> bool:
    return found.model.tensors[name].rule.role == CARRIED


def _notes(model: Model) -> Iterator[str]:
    """Say which flags Megatron needs besides those that name the checkpoint, and what its builder leaves out."""
    if needed := flags(model):
        yield f"Megatron does not read these back from a checkpoint; run it with {' '.join(needed)}"
    if left_out := builder_note(model):
        yield left_out


def _trainer(found: Checkpoint, fmt: Format) -> dict[str, Any] | None:
    """Give the content of trainer.json, None where there is no optimizer state.

    Raises:
        MappingError: the state has no place in Megatron's checkpoint.
    """
    states = {split_optimizer_name(name)[0] for name in found.tensors} - {None}
    if not states:
        return None
    remedy = "; export the weights alone with --no-optimizer"
    if fmt == "torch":
        raise MappingError(
            f"{found.root}: the torch format keeps optimizer state by data-parallel rank; use --format torch_dist{remedy}"
        )
    if TRAINER not in found.carried:
        raise MappingError(f"{found.root}: holds optimizer state but no {TRAINER} with its step count{remedy}")
    kinds = {info.dtype for name, info in found.tensors.items() if split_optimizer_name(name)[0] is None}
    if "master" not in states and kinds != {"F32"}:
        raise MappingError(f"{found.root}: holds moments but no fp32 weights (optimizer.master.*){remedy}")
    frozen = [
        name
        for name, info in found.tensors.items()
        if (tensor := found.model.tensors.get(name)) is not None
        and info.nbytes
        and not (tensor.rule.buffer or _is_carried(found, name) or f"optimizer.exp_avg.{name}" in found.tensors)
    ]
    if frozen:
        raise MappingError(
            f"{found.root}: {len(frozen)} tensors have no moments, such as {frozen[0]}: they were frozen, or trained "
            f"by Muon; Megatron's optimizer has them for all{remedy}"
        )
    trainer = parse_trainer(read_content(found.carried_files[TRAINER]), str(found.root / TRAINER))
    if "num_steps" not in trainer["optimizer"]:
        raise MappingError(f"{found.root / TRAINER}: lacks the optimizer's step count{remedy}")
    if "expert_bias" in trainer["optimizer"]:
        raise MappingError(
            f"{found.root / TRAINER}: the router was trained with expert biases, which {found.family.name} has no tensor for{remedy}"
        )
    return trainer


def import_megatron(
    source: MegatronSource, out: Path, degrees: Degrees, options: Options, *, dry_run: bool = False
) -> Summary:
    """Write a Megatron checkpoint as a sharded one, after checking that replicated tensors agree.

    Args:
        source: the opened checkpoint.
        out: the folder to make.
        degrees: the new layout's degrees.
        options: how to run.
        dry_run: plan everything and write nothing.

    Returns:
        What was written.

    Raises:
        MoeconvError: as the source, layout or output demands; `out` does not exist then.
    """
    checkpoint = as_checkpoint(source)
    check_free(out.absolute())
    if dry_run:
        plan = plan_sharded(checkpoint, degrees)
    else:
        checkpoint.check_replicas()
        plan = write_sharded(checkpoint, out, degrees, options)
    return Summary(len(plan.files), plan.nbytes, tuple(source.dropped), str(source.degrees))
