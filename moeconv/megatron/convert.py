"""Opening, importing and exporting Megatron checkpoints: what the command line calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeconv.errors import MappingError, SourceError
from moeconv.families import family_of
from moeconv.families.base import Model
from moeconv.io.hf_folder import CONFIG, INDEX, parse_json, read_hf_folder, read_inside
from moeconv.io.safetensors import encode_header, read_header
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.megatron import dist, legacy
from moeconv.megatron.args import RunArgs, check_config, check_expressible, config_from_args
from moeconv.megatron.copying import FileWriter, Source, check_replicas
from moeconv.megatron.export import ITERATION, Target, torch_files
from moeconv.megatron.export_dist import torch_dist_files
from moeconv.megatron.files import MegatronFile
from moeconv.megatron.names import Experts, Spec
from moeconv.megatron.source import TRACKER, Collector, MegatronSource, find_iteration
from moeconv.megatron.staging import Staging, fingerprint
from moeconv.pieces import NameMap, Piece, TensorInfo
from moeconv.placement import check_degrees

Format = Literal["torch", "torch_dist"]
Progress = Callable[[int], None]
SHARD_BYTES = 5_000_000_000
_SHARDING = "DCP_SHARDING_INFO"
_MANIFEST = "moeconv.json"


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


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model to be exported: its folder, config, carried files, and where its tensors are."""

    root: Path
    config: dict[str, Any]
    carried: tuple[str, ...]
    model: Model
    pieces: list[Piece]


def open_model(root: Path) -> OpenModel:
    """Open a Hugging Face folder, or a sharded one whose files say which rectangles they hold.

    Raises:
        SourceError: a file is missing, damaged or unsafe.
        MappingError: tensors and config don't fit.
        IntegrityError: a tensor is stored in part, or twice.
    """
    if (root / _MANIFEST).is_file():
        config = parse_json(read_inside(root, CONFIG), str(root / CONFIG))
        headers = {p.name: read_header(p) for p in sorted(root.glob("*.safetensors"))}
        carried = tuple(name for name in _beside(root) if name != _MANIFEST)
    else:
        folder = read_hf_folder(root)
        config, headers, carried = folder.config, folder.headers, folder.carried
    model = Model.from_config(family_of(config), config)
    names, collector = NameMap(model), Collector()
    for file, header in headers.items():
        sharding = parse_json(header.metadata[_SHARDING].encode(), file) if _SHARDING in header.metadata else {}
        for entry in header.entries:
            if entry.name in sharding:
                rect = Rect(tuple(sharding[entry.name]["saved_offsets"]), entry.shape)
                collector.add(Piece(entry.name, entry.dtype, rect, file, entry.begin))
                continue
            for piece in names.pieces(entry.name, entry.dtype, entry.shape, file, entry.begin):
                collector.add(piece)
    return OpenModel(root, config, carried, model, collector.finish(model, str(root)))


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
    found = open_model(src)
    check_degrees(found.model, degrees)
    source = Source(found.root, found.pieces)
    target = Target(
        model=found.model,
        config=found.config,
        dtypes=source.dtypes(),
        degrees=degrees,
        spec=spec,
        experts=experts,
    )
    files = torch_files(target) if fmt == "torch" else torch_dist_files(target)
    files += [_carry(found.root, name) for name in found.carried]
    files.append(MegatronFile(TRACKER, len(ITERATION), [(0, ITERATION.encode())]))
    return _write(source, files, out, options, (), str(degrees))


def import_megatron(source: MegatronSource, out: Path, options: RunOptions) -> Summary:
    """Write a Megatron checkpoint as a Hugging Face folder, after checking that replicated tensors agree.

    Args:
        source: the opened checkpoint.
        out: the folder to make.
        options: how to run.

    Returns:
        What was written.

    Raises:
        MoeconvError: as the source or output demands; nothing is left under `out`.
    """
    reader = Source(source.root, source.pieces)
    if not options.dry_run:
        check_replicas(reader, source.replicas)
    files = _safetensors(source.model, reader.dtypes())
    root_config = source.root / CONFIG
    raw = root_config.read_bytes() if root_config.is_file() else b""
    if not raw or json.loads(raw) != source.config:
        raw = (json.dumps(source.config, indent=2) + "\n").encode()
    files.append(MegatronFile(CONFIG, len(raw), [(0, raw)]))
    files += [_carry(source.root, name) for name in _beside(source.root) if name != CONFIG]
    return _write(reader, files, out, options, tuple(source.dropped), str(source.degrees))


def _beside(root: Path) -> list[str]:
    """List the small files that an export put beside the checkpoint: the tokenizer and configs."""
    skip = (".pt", ".bin", ".safetensors", ".distcp", ".txt.part")
    names = [p.name for p in sorted(root.iterdir()) if p.is_file() and not p.name.startswith(".")]
    return [n for n in names if n != TRACKER and not n.endswith(skip) and (root / n).stat().st_size < 1 << 28]


def _carry(root: Path, name: str) -> MegatronFile:
    raw = read_inside(root, name)
    return MegatronFile(name, len(raw), [(0, raw)])


def _safetensors(model: Model, dtypes: Mapping[str, str]) -> list[MegatronFile]:
    """Lay out a Hugging Face folder's weights, in shards as the hub has them."""
    infos = [TensorInfo(t.name, dtypes[t.name], t.shape) for t in model.tensors.values() if t.name in dtypes]
    shards: list[list[TensorInfo]] = [[]]
    for info in infos:
        if shards[-1] and sum(i.nbytes for i in shards[-1]) + info.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(info)
    files: list[MegatronFile] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = encode_header([(i.name, i.dtype, i.shape) for i in shard], {"format": "pt"})
        file = MegatronFile(name, header.file_size, [(0, header.raw)])
        file.pieces = [Piece(e.name, e.dtype, Rect.whole(e.shape), name, e.begin) for e in header.entries]
        files.append(file)
        weight_map |= {i.name: name for i in shard}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(i.nbytes for i in infos)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        raw = (json.dumps(index, indent=2) + "\n").encode()
        files.append(MegatronFile(INDEX, len(raw), [(0, raw)]))
    return files


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
