"""Which files a rank writes, and what makes them a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moeconv.checkpoint import Checkpoint
from moeconv.families.base import Model
from moeconv.finish import finish_checkpoint
from moeconv.io.manifest import FileRecord
from moeconv.io.shards import ShardEntry
from moeconv.placement import split_optimizer_name
from runtime.checkpoint.bounce import Bounce, Staged
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.checkpoint.rectangles import StateTensor
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Stage(Protocol):
    """Makes tensors ready to be written, as the saver that will write them does it."""

    def __call__(self, tensors: Sequence[Tensor], *, waits: bool = False) -> list[Staged]:
        """`waits`: training waits for this save in any case."""


def collect_files(
    items: Sequence[StateTensor],
    mesh: ParallelMesh,
    model: Model,
    stage: Stage,
    *,
    waits: bool = False,
) -> dict[str, list[ShardEntry]]:
    """Sort what this rank owns into files, staged where it isn't read in place. Collective where the saver has a group.

    Args:
        items: the rectangles that this rank writes; of each global byte, one rank has it.
        mesh: this rank's coordinates.
        model: says which tensors are experts'.
        stage: of the saver that will write them.
        waits: training waits for the save anyway, as it does where anything is `in_place`.

    Returns:
        File name -> its tensors; valid until `stage` is called again. Of what is `in_place`, and of everything where the
        saver is synchronous, live memory, valid until the next step. Masters with remainders are put together when they
        are written, piece by piece.
    """
    names = file_names(mesh)
    files: dict[str, list[ShardEntry]] = {}
    rectangles: Counter[str] = Counter()
    tensors = [tensor for item in items for tensor in _staged(item)]
    staged = iter(stage(tensors, waits=waits or any(item.in_place for item in items)))
    for item in items:
        here = [next(staged) for _ in _staged(item)]
        parts = [part for copy in here for part in copy.tensors]
        if item.in_place:
            parts.append(item.live if item.remainder is None else item.remainder)
        data = Staged(tuple(parts), here[0].bounce if here else Bounce())
        state, base = split_optimizer_name(item.name)
        name = ("optimizer-" if state else "") + names[model.tensors[base].expert is not None]
        # A flat shard that ends within a row is up to three rectangles; a file names a tensor once.
        part = rectangles[item.name]
        rectangles[item.name] += 1
        file = f"{name}-part{part}.safetensors" if part else f"{name}.safetensors"
        entry = ShardEntry(item.name, DTYPES[item.dtype], item.global_shape, item.rect, data)
        files.setdefault(file, []).append(entry)
    return files


def _staged(item: StateTensor) -> list[Tensor]:
    """What of an item isn't read in place."""
    if item.remainder is None:
        return [] if item.in_place else [item.live]
    return [item.live] if item.in_place else [item.live, item.remainder]


def file_names(mesh: ParallelMesh) -> dict[bool, str]:
    """Name the files of this rank; ranks that hold copies of the same weights get a number each.

    Args:
        mesh: this rank's coordinates.

    Returns:
        Whether it is the experts' file -> its name, without suffix.
    """
    pp = mesh.rank("pp")
    replica = mesh.rank("dp_cp")
    dense = f"dense-tp{mesh.rank('tp')}-pp{pp}" + (f"-dp{replica}" if replica else "")
    edp = mesh.rank("edp")
    experts = f"experts-ep{mesh.rank('ep')}-etp{mesh.rank('etp')}-pp{pp}" + (f"-dp{edp}" if edp else "")
    return {False: dense, True: experts}


def commit_checkpoint(
    folder: Path,
    records: list[FileRecord],
    source: Checkpoint,
    parallel: ParallelConfig,
    state: TrainerState,
    settings: Mapping[str, str] | None = None,
) -> None:
    """Make a checkpoint of a folder that has all ranks' files in it.

    Args:
        folder: where they are.
        records: what was written.
        source: the checkpoint that the run started from; config, tokenizer and shard map come from it.
        parallel: the layout of the run.
        state: the run's position.
        settings: name -> text of the file that starts the run again; one that the source carries under this name stays.
    """
    for name, text in (settings or {}).items():
        if name not in source.carried:
            (folder / name).write_text(text, encoding="utf8")
    (folder / TRAINER_FILE).write_text(state.to_json())
    finish_checkpoint(folder, source, parallel.layout, records)
