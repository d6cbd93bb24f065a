"""Which files a rank writes, and what makes them a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeconv.checkpoint import Checkpoint
from moeconv.families.base import Model
from moeconv.finish import finish_checkpoint
from moeconv.io.manifest import FileRecord
from moeconv.io.shards import MadeBytes, ShardEntry
from moeconv.placement import split_optimizer_name
from moeconv.sweep import Bytes
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.checkpoint.rectangles import StateTensor
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.masters import join
from runtime.parallel.mesh import ParallelMesh

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def collect_files(
    items: Sequence[StateTensor],
    mesh: ParallelMesh,
    model: Model,
    stage: Callable[[Sequence[Tensor]], list[Bytes]],
) -> dict[str, list[ShardEntry]]:
    """Copy what this rank owns to the host, where it isn't read in place, sorted into files.

    Args:
        items: the rectangles that this rank writes; of each global byte, one rank has it.
        mesh: this rank's coordinates.
        model: says which tensors are experts'.
        stage: copies tensors to the host, as the saver that will write them does it.

    Returns:
        File name -> its tensors, copied, so that training can go on; valid until `stage` is called again. Of those that
        are `in_place` the memory itself, valid until the next step. Masters with remainders are put together when they are
        written, one after another.
    """
    names = file_names(mesh)
    files: dict[str, list[ShardEntry]] = {}
    rectangles: Counter[str] = Counter()
    copies = iter(stage([tensor for item in items for tensor in _copied(item)]))
    for item in items:
        data: Bytes | MadeBytes
        if item.remainder is None:
            data = item.live.view(-1).view(torch.uint8).numpy() if item.in_place else next(copies)
        else:
            weight = next(copies)
            remainder = item.remainder.view(-1).view(torch.uint8).numpy() if item.in_place else next(copies)
            data = _Master(weight, remainder)
        state, base = split_optimizer_name(item.name)
        name = ("optimizer-" if state else "") + names[model.tensors[base].expert is not None]
        # A flat shard that ends within a row is up to three rectangles; a file names a tensor once.
        part = rectangles[item.name]
        rectangles[item.name] += 1
        file = f"{name}-part{part}.safetensors" if part else f"{name}.safetensors"
        entry = ShardEntry(item.name, DTYPES[item.dtype], item.global_shape, item.rect, data)
        files.setdefault(file, []).append(entry)
    return files


def _copied(item: StateTensor) -> list[Tensor]:
    """What of an item is copied before it is written."""
    if item.remainder is None:
        return [] if item.in_place else [item.live]
    return [item.live] if item.in_place else [item.live, item.remainder]


@dataclass(frozen=True, slots=True)
class _Master:
    """fp32 masters in two halves, which become numbers where they are looked at."""

    weight: Bytes
    remainder: Bytes

    @property
    def nbytes(self) -> int:
        """Of the numbers."""
        return self.weight.nbytes + self.remainder.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Bytes:
        """[nbytes] uint8, made anew."""
        weight, remainder = (torch.from_numpy(half) for half in (self.weight, self.remainder))
        out: Bytes = join(weight.view(torch.bfloat16), remainder.view(torch.int16)).view(torch.uint8).numpy()
        return out


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
