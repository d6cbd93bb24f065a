"""The resume table: save after one step under one layout, go on under another, compare with uninterrupted training.

`python -m tests.runtime.checkpoint.resume` prints it. Real runs of the trainer, over gloo on the CPU, in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from runtime.parity.ranks import RankPool
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.tiny import make_checkpoint, make_text

TP, PP, EP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size"
VPP, ETP, CP = "--num-virtual-stages-per-pipeline-rank", "--expert-tensor-parallel-size", "--context-parallel-size"
SP, ZERO, FULL = "--sequence-parallel", "--use-distributed-optimizer", "--fully-shard"

# Name -> ranks, flags.
LAYOUTS: dict[str, tuple[int, str]] = {
    "1 rank": (1, ""),
    "dp2": (2, ""),
    "dp2 distributed optimizer": (2, ZERO),
    "dp2 fully sharded": (2, FULL),
    "ep2": (2, f"{EP} 2"),
    "ep2 dp2 distributed optimizer": (4, f"{EP} 2 {ZERO}"),
    "tp2 sp": (2, f"{TP} 2 {SP}"),
    "tp4 sp": (4, f"{TP} 4 {SP}"),
    "tp2 sp ep2 etp1": (2, f"{TP} 2 {SP} {EP} 2 {ETP} 1"),
    "pp2 uneven": (2, f"{PP} 2 --pp-layers 3,1"),
    "pp2 interleaved": (2, f"{PP} 2 {VPP} 2"),
    "cp2": (2, f"{CP} 2"),
    "pp2 tp2 sp ep2 etp1": (4, f"{PP} 2 {TP} 2 {SP} {EP} 2 {ETP} 1"),
}

# Layouts that `moeconv reshard` makes.
RESHARDED = {"tp2 ep2": Degrees(tp=2, ep=2), "pp2 uneven": Degrees(pp=2, pp_layers=(3, 1)), "1 rank": Degrees()}

# Saved under, resumed under, resharded to in between.
PAIRS: tuple[tuple[str, str, str | None], ...] = (
    ("1 rank", "1 rank", None),
    ("1 rank", "ep2", None),
    ("dp2", "dp2 distributed optimizer", None),
    ("dp2 distributed optimizer", "1 rank", None),
    ("dp2 distributed optimizer", "dp2 fully sharded", None),
    ("dp2 fully sharded", "tp2 sp", None),
    ("ep2", "dp2", None),
    ("ep2", "pp2 uneven", None),
    ("ep2 dp2 distributed optimizer", "tp2 sp ep2 etp1", None),
    ("tp2 sp", "cp2", None),
    ("tp4 sp", "ep2 dp2 distributed optimizer", None),
    ("tp2 sp ep2 etp1", "pp2 interleaved", None),
    ("pp2 uneven", "tp4 sp", None),
    ("pp2 interleaved", "ep2", None),
    ("cp2", "pp2 uneven", None),
    ("pp2 tp2 sp ep2 etp1", "dp2 distributed optimizer", None),
    ("ep2 dp2 distributed optimizer", "1 rank", "pp2 uneven"),
    ("tp2 sp", "ep2", "tp2 ep2"),
    ("pp2 uneven", "tp2 sp ep2 etp1", "1 rank"),
)
KINDS = ("weights", "optimizer.exp_avg", "optimizer.exp_avg_sq")


@dataclass(frozen=True)
class Row:
    """One pair of the table."""

    saved: str
    resumed: str
    resharded: str | None
    loss: float
    """Largest relative difference of a step's loss."""
    errors: Mapping[str, float]
    """Kind of tensor -> largest difference relative to the tensor's largest element."""

    @property
    def worst(self) -> float:
        return max(self.loss, *self.errors.values())


class Table:
    """Runs every layout once up to step 1, then every pair to step 3."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = make_checkpoint(folder / "tiny")
        self.text = make_text(folder / "text.txt")

    def job(self, name: str, layout: str, load: Path, iterations: int) -> Job:
        ranks, flags = LAYOUTS[layout]
        common = f"--seq-length 32 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --lr-decay-iters 3 {flags}"
        common += " --lr-decay-style cosine --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 --adam-eps 1e-4 --fp32"
        paths = ["--load", load, "--data", self.text, "--data-cache-path", self.folder / "cache"]
        paths += ["--save", self.folder / name, "--log-file", self.folder / f"{name}.jsonl"]
        arguments = (*map(str, paths), "--train-iters", str(iterations), *common.split())
        return Job(ranks, arguments)

    def rows(self, pairs: Sequence[tuple[str, str, str | None]], pool: RankPool) -> list[Row]:
        saved = {name: f"saved-{number}" for number, name in enumerate(dict.fromkeys(first for first, _, _ in pairs))}
        jobs = [self.job("reference", "1 rank", self.checkpoint, 3)]
        jobs += [self.job(folder, name, self.checkpoint, 1) for name, folder in saved.items()]
        run_jobs(jobs, pool)
        jobs = []
        for number, (first, second, between) in enumerate(pairs):
            load = self.folder / saved[first]
            if between is not None:
                source, load = open_checkpoint(load / "latest"), self.folder / f"resharded-{number}"
                write_sharded(source, load, RESHARDED[between], Options())
            jobs.append(self.job(f"resumed-{number}", second, load, 3))
        run_jobs(jobs, pool)
        return [self._row(number, *pair) for number, pair in enumerate(pairs)]

    def _row(self, number: int, saved: str, resumed: str, resharded: str | None) -> Row:
        got = losses(self.folder / f"resumed-{number}.jsonl")
        want = losses(self.folder / "reference.jsonl")
        assert sorted(got) == [2, 3]
        loss = max(abs(got[step] - want[step]) / want[step] for step in got)
        errors = compare(self.folder / f"resumed-{number}" / "latest", self.folder / "reference" / "latest")
        return Row(saved, resumed, resharded, loss, errors)


def losses(log: Path) -> dict[int, float]:
    """Read the losses of a log file."""
    records = map(json.loads, log.read_text().splitlines())
    return {record["iteration"]: record["lm_loss"] for record in records if "lm_loss" in record}


def compare(path: Path, reference: Path) -> dict[str, float]:
    """Give the largest relative difference of each kind of tensor."""
    got, want = open_checkpoint(path), open_checkpoint(reference)
    assert got.tensors.keys() == want.tensors.keys()
    errors = dict.fromkeys(KINDS, 0.0)
    for name in want.tensors:
        kind = next((kind for kind in KINDS if name.startswith(f"{kind}.")), "weights")
        a, b = got.read(name).astype(np.float64), want.read(name).astype(np.float64)
        errors[kind] = max(errors[kind], float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    most = max(ranks for ranks, _ in LAYOUTS.values())
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(RankPool(most)) as pool:
        rows = Table(Path(folder)).rows(PAIRS, pool)
    print("| saved under | resharded to | resumed under | loss | weights | exp_avg | exp_avg_sq |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [
            row.saved,
            row.resharded or "",
            row.resumed,
            *(f"{value:.1e}" for value in (row.loss, *row.errors.values())),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
