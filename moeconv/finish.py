"""Making a checkpoint of a folder that the ranks of a run have written their files into."""

from __future__ import annotations

import json
from pathlib import Path

from moeconv.checkpoint import TRAINER, Checkpoint, make_manifest, open_checkpoint
from moeconv.errors import SourceError, WriteError
from moeconv.io.checksum import checksum
from moeconv.io.hf_folder import CONFIG
from moeconv.io.manifest import MANIFEST, FileRecord
from moeconv.io.staging import write_beneath
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect, check_cover
from moeconv.pieces import check_complete
from moeconv.placement import Placement, split_optimizer_name
from moeconv.reading import VerifiedReader
from moeconv.unread import write_carried


def finish_checkpoint(folder: Path, source: Checkpoint, degrees: Degrees, records: list[FileRecord]) -> None:
    """Make a folder of shard files that ranks have written a checkpoint: config, tokenizer and manifest, the manifest last.

    Args:
        folder: the folder; every file of `records` is in it.
        source: the checkpoint that the run began with; its carried files and shard map go along (read `source.carried_bytes` early where its folder may go).
        degrees: the layout's degrees.
        records: the files' records.

    Raises:
        IntegrityError: the files don't cover every tensor exactly once.
        WriteError: a file can't be written.
        SourceError: the tensors that the source carries are gone.
    """
    if source.model.carried:
        records = [*records, *_carry_tensors(folder, source, degrees)]
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[tuple[Rect, str]]] = {}
    for record in records:
        for t in record.tensors:
            shapes[t.name] = t.shape
            parts.setdefault(t.name, []).append((Rect(t.offsets, t.extent), record.name))
    for name, found in parts.items():
        check_cover(name, shapes[name], found)
    check_complete(source.model, parts, str(folder))
    trainer = folder / TRAINER
    carried = {name: data for name, data in source.carried_bytes.items() if name != TRAINER}
    carried[CONFIG] = _with_dtype(carried[CONFIG], source, records)
    try:
        for name, data in carried.items():
            write_beneath(folder, name, data)
        if trainer.exists():
            carried[TRAINER] = trainer.read_bytes()
        manifest = make_manifest(
            source, degrees, records, {name: (len(data), checksum(data)) for name, data in carried.items()}
        )
        write_beneath(folder, MANIFEST, manifest.encode())
    except OSError as error:
        raise WriteError(f"{folder}: can't be written: {error.strerror or error}") from None


def _carry_tensors(folder: Path, source: Checkpoint, degrees: Degrees) -> list[FileRecord]:
    """Write the tensors that a run doesn't read, from its source, or where that is gone from a checkpoint that the run saved before."""
    tensors = [source.tensors[name] for name in source.model.carried]
    files = {piece.file for info in tensors for piece in source.pieces[info.name]}
    holder = source
    if not all((source.root / file).exists() for file in files):
        saved = sorted(folder.parent.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
        others = (open_checkpoint(path.parent) for path in saved if path.parent != folder)
        found = next((other for other in others if other.model.carried == source.model.carried), None)
        if found is None:
            raise SourceError(
                f"{source.root}: is gone, and with it {len(tensors)} tensors that go along unread; no checkpoint beside {folder} has them either"
            )
        holder = found
    try:
        return write_carried(folder, tensors, Placement(source.model, degrees), VerifiedReader(holder).read)
    except OSError as error:
        raise WriteError(f"{folder}: can't be written: {error.strerror or error}") from None


def _with_dtype(config: bytes, source: Checkpoint, records: list[FileRecord]) -> bytes:
    """Give config.json's bytes; where training changed the weights' dtype, it says the new one, else a reader would cast them back.

    Buffers don't count: a run keeps a router's stored bias in fp32, whatever the weights are.
    """
    before = {name: info.dtype for name, info in source.tensors.items()}
    if source.adapter is not None:
        return config  # the model's, whose weights are elsewhere
    changed = {
        t.dtype
        for r in records
        for t in r.tensors
        if split_optimizer_name(t.name)[0] is None
        and t.dtype != before[t.name]
        and not source.model.tensors[t.name].rule.buffer
    }
    table = json.loads(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in table]
    if len(changed) != 1 or not keys:
        return config
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    return (json.dumps(table | dict.fromkeys(keys, names[changed.pop()]), indent=2) + "\n").encode()
