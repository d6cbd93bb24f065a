"""What ranks agree on when they save: all write without copies, or none; what one can't write, all report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moeconv.io.manifest import MANIFEST, FileRecord
from moeconv.io.shards import ShardEntry
from moeconv.layout.rect import Rect
from runtime.checkpoint.room import Need, shortage
from runtime.checkpoint.writer import Saver
from runtime.parity.ranks import RankPool
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.tiny import make_checkpoint

ELEMENTS = 1 << 16


@dataclass
class Torn:
    """A tensor whose second piece can't be read."""

    nbytes: int = 4 * ELEMENTS

    def pieces(self) -> Iterator[Any]:
        yield torch.zeros(100, dtype=torch.uint8).numpy()
        raise RuntimeError("the device is lost")


def commit(folder: Path, records: list[FileRecord]) -> None:
    (folder / MANIFEST).write_text("{}")


def save_often(root: str) -> tuple[list[bool], list[str | None], list[str]]:
    """Save in every way; what this rank found."""
    rank, free, notes = dist.get_rank(), [10**12], list[str]()
    saver = Saver(Path(root), dist.new_group(backend="gloo"), keep_last=1, note=notes.append, available=lambda: free[0])
    ways, errors = [], []

    def save(iteration: int, *, waits: bool = False, torn: bool = False) -> None:
        tensor = torch.full((ELEMENTS,), float(10 * iteration + rank))
        (data,) = saver.stage([tensor], waits=waits)
        ways.append(saver.synchronous)
        entry = ShardEntry("w", "F32", (2 * ELEMENTS,), Rect((rank * ELEMENTS,), (ELEMENTS,)), Torn() if torn else data)
        saver.save(iteration, {f"w-{rank}.safetensors": [entry]}, commit)
        if saver.synchronous:
            assert saver.finished()
            tensor.zero_()
        outcome = saver.wait()
        assert outcome is not None
        errors.append(outcome.error)

    free[0] = 10**12 if rank else int(1.1 * 4 * ELEMENTS)  # enough for one of the two
    save(1)
    save(2, torn=rank == 1)
    free[0] = 10**12
    save(3, waits=rank == 1)
    save(4)
    free[0] = 0
    save(5)  # the copy's memory is there already
    return ways, errors, notes


def test_ranks_agree_and_later_saves_may_have_copies_again(pool: RankPool, tmp_path: Path) -> None:
    found = pool.run(2, save_often, str(tmp_path))
    for ways, errors, _ in found:
        assert ways == [True, True, True, False, False]
        assert errors == [None, "rank 1: RuntimeError: the device is lost", None, None, None]
    notes = [notes for _, _, notes in found]
    assert notes[1] == []
    assert len(notes[0]) == 2
    assert "copies of 2 ranks would take 0.00 GB more of a machine's memory" in notes[0][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", "latest"]
    for rank in (0, 1):
        stored = load_file(tmp_path / "latest" / f"w-{rank}.safetensors")["w"]
        assert torch.equal(stored, torch.full((ELEMENTS,), 50.0 + rank))


def test_ranks_of_a_machine_share_its_memory() -> None:
    roomy = [Need("a", 40, 100), Need("a", 49, 99), Need("b", 90, 100), Need("c", 10**9, None)]
    assert shortage(roomy) is None
    assert "of 2 ranks" in str(shortage([Need("a", 40, 100), Need("a", 51, 100), Need("b", 0, 0)]))
    assert shortage([Need("a", 0, 0)]) is None


def test_ranks_of_a_run_write_the_same_files_with_and_without_copies(pool: RankPool, tmp_path: Path) -> None:
    words = (
        f"--load {make_checkpoint(tmp_path / 'tiny')} --train-iters 2 --save-interval 1 --seq-length 16 --mock-data --bf16 "
        "--num-workers 0 --micro-batch-size 1 --lr 3e-3 --master-weights remainder --expert-model-parallel-size 2 "
        "--use-distributed-optimizer"
    ).split()
    ways = {"with": (), "without": ("--no-async-save",), "host": ("--optimizer-cpu-offload",)}
    run_jobs([Job(2, (*words, "--save", str(tmp_path / name), *more)) for name, more in ways.items()], pool)
    for iteration in ("iter_0000001", "iter_0000002"):
        found = [
            {file.name: file.read_bytes() for file in (tmp_path / name / iteration).glob("*.safetensors")}
            for name in ways
        ]
        assert found[0] == found[1] == found[2]
        assert len(found[0]) >= 4
        records = [json.loads((tmp_path / name / iteration / MANIFEST).read_text())["files"] for name in ways]
        assert records[0] == records[1] == records[2]
