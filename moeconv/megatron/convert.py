"""Opening, importing and exporting Megatron checkpoints: what the command line calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeconv.checkpoint import TRAINER, open_checkpoint
from moeconv.convert import Options, plan_sharded, write_sharded
from moeconv.errors import MappingError, SourceError
from moeconv.families import family_of
from moeconv.families.base import Model
from moeconv.io.hf_folder import CONFIG, parse_json
from moeconv.layout.degrees import Degrees
from moeconv.megatron import dist, legacy
from moeconv.megatron.args import RunArgs, check_config, check_expressible, config_from_args
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.copying import FileWriter, Source, check_replicas
from moeconv.megatron.export import ITERATION, Target, torch_files
from moeconv.megatron.export_dist import torch_dist_files
from moeconv.megatron.files import MegatronFile
from moeconv.megatron.names import Experts, Spec
from moeconv.megatron.source import TRACKER, MegatronSource, find_iteration
from moeconv.megatron.staging import Staging, fingerprint
from moeconv.placement import check_degrees, split_optimizer_name

Format = Literal["torch", "torch_dist"]
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How a conversion runs: threads, whether an unfinished run goes on, whether anything is written."""

    workers: int = 2
    resume: bool = False
    dry_run: bool = False
    progress: Progress = lambda _: None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion wrote or, in a dry run, would write."""

    files: int
    nbytes: int
    dropped: tuple[str, ...]
    degrees: str


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
    reader = dist.DistReader(folder) if (folder / dist.METADATA).is_file() else legacy.LegacyReader(folder)
    config = _config(root, reader.args, reader.dtype, hf_config, ignore_args)
    model = Model.from_config(family_of(config), config)
    if reader.args and not ignore_args:
        check_config(reader.args, model, config)
    if isinstance(reader, dist.DistReader):
        return dist.locate(reader, root, name, model, config, optimizer=optimizer)
    return legacy.locate(reader, root, name, model, config)


def _config(
    root: Path, args: RunArgs, dtype: Callable[[], str], given: Path | None, ignore_args: bool
) -> dict[str, Any]:
    if given is None and (root / CONFIG).is_file():
        given = root / CONFIG
    if given is None:
        if not args:
            raise MappingError(f"{root}: the checkpoint has no args; give the model's config.json with --hf-config")
        return config_from_args(args, dtype())
    if not ignore_args:
        check_expressible(args)
    given = given / CONFIG if given.is_dir() else given
    if not given.is_file():
        raise SourceError(f"{given}: no such file")
    return parse_json(given.read_bytes(), str(given))


def export_megatron(
    src: Path, out: Path, *, fmt: Format, degrees: Degrees, spec: Spec, experts: Experts, options: RunOptions
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

    Returns:
        What was written.

    Raises:
        MoeconvError: as the source, layout or output demands; nothing is left under `out`.
    """
    found = open_checkpoint(src)
    check_degrees(found.model, degrees)
    tensors = {name: pieces for name, pieces in found.pieces.items() if split_optimizer_name(name)[0] is None}
    source = Source(found.root, (p for pieces in tensors.values() for p in pieces), found.checksums)
    target = Target(
        model=found.model,
        config=found.config,
        dtypes=source.dtypes(),
        degrees=degrees,
        spec=spec,
        experts=experts,
    )
    files = torch_files(target) if fmt == "torch" else torch_dist_files(target)
    small = {name: raw for name, raw in found.carried_bytes.items() if name != TRAINER}
    files += [MegatronFile(name, len(raw), [(0, raw)]) for name, raw in small.items()]
    files.append(MegatronFile(TRACKER, len(ITERATION), [(0, ITERATION.encode())]))
    return _write(source, files, out, options, (), str(degrees))


def import_megatron(source: MegatronSource, out: Path, degrees: Degrees, options: RunOptions) -> Summary:
    """Write a Megatron checkpoint as a sharded one, after checking that replicated tensors agree.

    Args:
        source: the opened checkpoint.
        out: the folder to make.
        degrees: the new layout's degrees.
        options: how to run.

    Returns:
        What was written.

    Raises:
        MoeconvError: as the source, layout or output demands; `out` does not exist then.
    """
    checkpoint = as_checkpoint(source)
    if options.dry_run:
        plan = plan_sharded(checkpoint, degrees)
    else:
        check_replicas(Source(source.root, source.pieces), source.replicas)
        run = Options(workers=options.workers, resume=options.resume, progress=lambda _: options.progress)
        plan = write_sharded(checkpoint, out, degrees, run)
    return Summary(len(plan.files), plan.nbytes, tuple(source.dropped), str(source.degrees))


def _write(
    source: Source, files: list[MegatronFile], out: Path, options: RunOptions, dropped: tuple[str, ...], degrees: str
) -> Summary:
    summary = Summary(len(files), sum(file.size for file in files), dropped, degrees)
    if options.dry_run:
        return summary
    staging = Staging(out, fingerprint(source.root, source.files(), files), resume=options.resume)
    try:
        with FileWriter(staging.folder, source, options.workers, options.progress) as writer:
            for file in files:
                if file.name in staging.done:
                    options.progress(sum(piece.nbytes for piece in file.pieces))
                else:
                    writer.write(file, staging.finished)
    except BaseException:
        staging.abandon()
        raise
    staging.commit()
    return summary
