"""The conversions: a Hugging Face folder to shards, shards to other shards, shards to a Hugging Face folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.checkpoint import TRAINER, Checkpoint, make_manifest, natural
from moeconv.dtypes import dtype
from moeconv.errors import LayoutError, SourceError, WriteError
from moeconv.execute import Progress, check_done, execute
from moeconv.forms import Names, written
from moeconv.io.carried import CarriedFile, Content, size_of
from moeconv.io.checksum import checksum, new
from moeconv.io.hf_folder import INDEX
from moeconv.io.manifest import MANIFEST, FileRecord
from moeconv.io.safetensors import encode_header, parse_header
from moeconv.io.staging import Staging, check_free, check_space
from moeconv.layout.degrees import Degrees
from moeconv.pieces import NameMap, TensorInfo
from moeconv.placement import Placement, split_optimizer_name
from moeconv.plan import Plan, TargetFile, make_plan, safetensors_target, sharded_files

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a conversion runs."""

    workers: int | None = None
    "Threads; by default one a core, at most 8."
    resume: bool = False
    "Whether to go on with a run that was killed."
    sync: bool = True
    "Whether to wait until the bytes are on the disk."
    progress: Callable[[int], Progress] | None = None
    "Called with the number of bytes to come; gives the function to call with each number of bytes done, from any thread."


def plan_sharded(source: Checkpoint, degrees: Degrees) -> Plan:
    """Plan a checkpoint's tensors as shards.

    Args:
        source: a Hugging Face folder or a sharded checkpoint.
        degrees: the new layout's degrees.

    Returns:
        The plan.

    Raises:
        LayoutError: the model can't be split so.
    """
    placement = Placement(source.model, degrees)
    files = sharded_files(source.tensors.values(), placement)
    return make_plan(source.tensors, source.pieces, files, ops=source.ops)


def write_sharded(source: Checkpoint, out: Path, degrees: Degrees, options: Options) -> Plan:
    """Write a checkpoint as shards; its optimizer state, if any, goes along.

    Args:
        source: a Hugging Face folder or a sharded checkpoint.
        out: the folder to make.
        degrees: the new layout's degrees.
        options: how to run.

    Returns:
        The plan that was carried out.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.
    """
    if source.kind != "sharded" and TRAINER in source.carried:
        raise SourceError(f"{source.root / TRAINER}: training checkpoints keep their own file of this name; rename it")
    plan = plan_sharded(source, degrees)

    def close(staging: Staging, records: dict[str, FileRecord], carried: dict[str, tuple[int, str]]) -> None:
        staging.write(MANIFEST, make_manifest(source, degrees, list(records.values()), carried).encode())

    write_plan(source, out, plan, source.carried_files, options, close)
    return plan


def plan_hf(source: Checkpoint, max_shard_size: int | None, names: Names | None = None) -> tuple[Plan, bytes | None]:
    """Plan a checkpoint as a Hugging Face folder: with the source's own shard map, or cut anew under hub names.

    Args:
        source: a sharded checkpoint.
        max_shard_size: bytes of tensors a file at most; None for the source's own files.
        names: the names to write experts under; None for the source's own, or where its files are cut anew, those in which checkpoints are published.

    Returns:
        The plan, and the index file's bytes (None where there is no index).

    Raises:
        SourceError: the source is a Hugging Face folder itself.
        LayoutError: a tensor is larger than `max_shard_size` allows for at least one element.
    """
    if source.folder is not None:
        raise SourceError(f"{source.root}: is a Hugging Face folder already")
    tensors = {name: info for name, info in source.tensors.items() if split_optimizer_name(name)[0] is None}
    pieces = {name: source.pieces[name] for name in tensors}
    if max_shard_size is None and names is None and source.manifest is not None and source.manifest.source:
        files, index = _own_files(source)
    else:
        files, index = _cut_files(
            source, list(tensors), DEFAULT_SHARD_BYTES if max_shard_size is None else max_shard_size, names or "hub"
        )
    return make_plan(tensors, pieces, files, ops=source.ops), index


def write_hf(
    source: Checkpoint, out: Path, max_shard_size: int | None, options: Options, names: Names | None = None
) -> Plan:
    """Write a sharded checkpoint as a Hugging Face folder.

    Args:
        source: a sharded checkpoint.
        out: the folder to make.
        max_shard_size: bytes of tensors a file at most; None gives the source's own files, byte for byte.
        options: how to run.
        names: as for `plan_hf`.

    Returns:
        The plan that was carried out.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.
    """
    plan, index = plan_hf(source, max_shard_size, names)
    beside = {name: content for name, content in source.carried_files.items() if name != TRAINER}
    if index is not None:
        beside[INDEX] = index
    write_plan(source, out, plan, beside, options, lambda *_: None)
    return plan


def _own_files(source: Checkpoint) -> tuple[list[TargetFile], bytes | None]:
    assert source.manifest is not None
    names = NameMap(source.model)
    files, total, changed, gone = [], 0, False, set[str]()
    for name in sorted(source.manifest.source, key=natural):
        recorded = source.manifest.source[name]
        header = parse_header(recorded.header, recorded.size, name)
        holds = {e.name: names.pieces(e.name, e.dtype, e.shape, name, e.begin)[0].tensor for e in header.entries}
        # A run keeps no copy of a tied output head; readers tie it again.
        gone |= (left := {entry for entry, tensor in holds.items() if tensor not in source.tensors})
        kept = [e for e in header.entries if e.name not in left]
        kinds = {e.name: source.tensors[holds[e.name]].dtype for e in kept}
        if left or any(kinds[e.name] != e.dtype for e in kept):  # trained, perhaps in another precision
            changed = True
            header = encode_header([(e.name, kinds[e.name], e.shape) for e in kept], header.metadata)
        if not kept:
            continue
        pieces = [p for e in header.entries for p in names.pieces(e.name, e.dtype, e.shape, name, e.begin)]
        files.append(safetensors_target(name, header, pieces))
        total += header.file_size - len(header.raw)
    index = source.manifest.index
    if index is not None and changed:
        table = json.loads(index)
        table.setdefault("metadata", {})["total_size"] = total
        table["weight_map"] = {name: file for name, file in table["weight_map"].items() if name not in gone}
        index = (json.dumps(table, indent=2) + "\n").encode()
    return files, index


def _cut_files(
    source: Checkpoint, order: list[str], max_bytes: int, names: Names
) -> tuple[list[TargetFile], bytes | None]:
    if max_bytes < 1:
        raise LayoutError(f"--max-shard-size {max_bytes}: expected at least 1 byte")
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for form in written(source.model, source.tensors, order, names):
        size = form.info.nbytes
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(form.info)
        filled += size
    files, weight_map, name_map = [], {}, NameMap(source.model)
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        infos = sorted(group, key=lambda info: -dtype(info.dtype).itemsize)
        header = encode_header([(i.name, i.dtype, i.shape) for i in infos], {"format": "pt"})
        pieces = (p for e in header.entries for p in name_map.pieces(e.name, e.dtype, e.shape, file, e.begin))
        files.append(safetensors_target(file, header, pieces))
        weight_map.update({info.name: file for info in group})
    if len(groups) == 1:
        return files, None
    total = sum(source.tensors[name].nbytes for name in order)
    table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return files, (json.dumps(table, indent=2) + "\n").encode()


Close = Callable[[Staging, dict[str, FileRecord], dict[str, tuple[int, str]]], object]


def write_plan(
    source: Checkpoint, out: Path, plan: Plan, beside: Mapping[str, Content], options: Options, close: Close
) -> None:
    """Carry out a plan, all or nothing.

    Args:
        source: where the bytes are.
        out: the folder to make.
        plan: its files.
        beside: further files by name, written after those, in this order.
        options: how to run.
        close: writes what comes last, into the staging that it is given, with the records of the plan's files, and the
            size in bytes and checksum of those beside them.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.
    """
    out = Path(os.path.abspath(out))
    check_free(out)
    if out.is_relative_to(os.path.abspath(source.root)):
        raise WriteError(
            f"{out}: lies inside the source {source.root}, which is never changed; choose a folder elsewhere"
        )
    before = _stats(source, beside)
    staging = Staging(out, _identity(source, before, plan, beside), resume=options.resume, sync=options.sync)
    try:
        check_done(plan, staging, workers=options.workers, progress=options.progress)
        check_space(staging.folder, sum(map(size_of, beside.values())))
        progress = (
            options.progress(
                sum(j.info.nbytes for j in plan.jobs if any(t.file not in staging.done for t in j.targets))
            )
            if options.progress
            else None
        )
        records = execute(plan, source.root, staging, source.checksums, workers=options.workers, progress=progress)
        written = {name: staging.write(name, content) for name, content in beside.items()}
        changed = [name for name, stat in _stats(source, beside).items() if stat != before[name]]
        if changed:
            raise SourceError(
                f"{source.root}: {', '.join(changed)} changed while being read; nothing was finished, start again"
            )
        close(staging, records, written)
        staging.commit()
    except OSError as error:
        raise WriteError(
            f"{staging.folder}: can't be written: {error.strerror or error}; free the cause and go on with --resume"
        ) from None
    except KeyboardInterrupt as stopped:
        stopped.add_note(f"{staging.folder} keeps what was finished; go on with --resume")
        raise
    finally:
        staging.close()


def _stats(source: Checkpoint, beside: Mapping[str, Content]) -> dict[str, list[int]]:
    """Give size and times of every file that is read, to notice a change while it is, or before a run goes on."""
    paths = {name: source.root / name for name in source.files}
    paths |= {f"{name} (carried)": c.path for name, c in beside.items() if isinstance(c, CarriedFile)}
    out = {}
    for name, path in paths.items():
        try:
            stat = os.stat(path)
        except OSError as error:
            raise SourceError(f"{path}: can't be read: {error.strerror or error}") from None
        out[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return out


def _identity(
    source: Checkpoint, stats: dict[str, list[int]], plan: Plan, beside: Mapping[str, Content]
) -> dict[str, Any]:
    targets = b"".join(
        part
        for f in plan.files
        for part in (f"{f.name}\0{f.size}\0{len(f.literals)}\0".encode(), *(data for _, data in f.literals))
    )
    made = new()
    for name, content in sorted(beside.items()):
        made.update(f"{name}\0{size_of(content)}\0".encode() + (content if isinstance(content, bytes) else b""))
    return {
        "source files": stats,
        "options": checksum(targets),
        "small files": made.hexdigest(),
        "source folder": str(source.root.resolve()),
    }
