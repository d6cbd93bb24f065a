"""A loss that is not finite: the run stops with a report of where it came from, or leaves the step out."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moeconv.checkpoint import open_checkpoint
from runtime.parity.ranks import RankError
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.launch import steps
from tests.runtime.tiny import make_checkpoint, make_text
from tests.support.ranks import make_pool

BAD = "model.layers.2.block_sparse_moe.gate.weight"


def test_it_stops_with_a_report_or_leaves_the_step_out(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[BAD][1, 2] = np.inf
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    common = ["--load", checkpoint, "--data", make_text(tmp_path / "a.txt"), "--data-cache-path", tmp_path / "cache"]
    common += ["--save", tmp_path / "out", "--log-file", tmp_path / "log", "--seq-length", 32, "--train-iters", 2]
    arguments = tuple(map(str, common))
    with contextlib.closing(make_pool(1)) as pool:
        run_jobs([Job(1, (*arguments, "--on-nonfinite", "skip"))], pool)
        with pytest.raises(RankError, match=rf"NonFiniteError: .*first bad: weight {BAD}, on rank 0"):
            run_jobs([Job(1, (*arguments, "--train-iters", "3"))], pool)
    records = steps(tmp_path / "log")
    assert [records[step]["skipped_steps"] for step in (1, 2)] == [1, 1]
    assert 3 not in records
    saved = open_checkpoint(tmp_path / "out" / "latest")
    for name in tensors:
        np.testing.assert_array_equal(saved.read(name), tensors[name])
        assert not saved.read(f"optimizer.exp_avg.{name}").any()
