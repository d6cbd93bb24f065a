"""Training goes on under other layouts; a checkpoint moves between layouts bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from moeconv.checkpoint import open_checkpoint
from runtime.parity.ranks import RankPool
from tests.runtime.checkpoint.resume import PAIRS, Table
from tests.runtime.jobs import run_jobs


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, pool: RankPool) -> None:
    for row in Table(tmp_path).rows(PAIRS, pool):
        assert row.worst < 1e-5, row
        assert row.saved != row.resumed or row.resharded or row.worst == 0, row


def test_bf16_weights_masters_and_moments_move_bit_for_bit(tmp_path: Path, pool: RankPool) -> None:
    """One step under one layout; other layouts load it, do no step, and save: the same numbers, other rectangles."""
    table = Table(tmp_path)
    first = table.job("first", "ep2 dp2 distributed optimizer", table.checkpoint, 1)
    jobs = [first]
    others = ("dp2 fully sharded", "tp2 sp ep2 etp1", "pp2 interleaved", "1 rank")
    for number, layout in enumerate(others):
        before = tmp_path / (f"moved-{number - 1}" if number else "first")
        jobs.append(table.job(f"moved-{number}", layout, before, 1))
    jobs = [replace(job, arguments=tuple("--bf16" if a == "--fp32" else a for a in job.arguments)) for job in jobs]
    run_jobs(jobs, pool)
    want = open_checkpoint(tmp_path / "first" / "latest")
    kinds = {name.split(".")[1] for name in want.tensors if name.startswith("optimizer.")}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}
    for number in range(len(others)):
        got = open_checkpoint(tmp_path / f"moved-{number}" / "latest")
        assert got.tensors == want.tensors
        for name in want.tensors:
            np.testing.assert_array_equal(got.read(name).view(np.uint8), want.read(name).view(np.uint8), name)
