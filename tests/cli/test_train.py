"""`moeconv train`: the trainer's flags, checked before any process starts, and its processes without torchrun's report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from cli.train import _nodes
from tests.runtime.tiny import make_checkpoint, make_text

ROOT = Path(__file__).parents[2]


def moeconv(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", "cli", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    make_checkpoint(folder / "tiny")
    make_text(folder / "text.txt")
    return folder


def test_an_example_is_written_and_runs_on_two_processes_and_again_from_its_own_file(place: Path) -> None:
    example = CliRunner().invoke(main, ["train", "--example", str(place / "tiny")])
    assert example.exit_code == 0
    (place / "run.yaml").write_text(example.output)
    words = ["train", "--nproc-per-node", 2, "--config", place / "run.yaml", "--data", place / "text.txt"]
    words += ["--save", place / "run", "--log-file", place / "log.jsonl", "--data-cache-path", place / "cache"]
    words += ["--train-iters", 4, "--seq-length", 32, "--lr-warmup-iters", 1, "--eval-interval", 0, "--eval-iters", 1]
    first = moeconv(*words, "--exit-interval", 2)
    assert first.returncode == 0, first.stderr
    assert "--exit-interval 2 divides the iteration: saving after iteration 2 and leaving" in first.stdout
    again = moeconv("train", "--nproc-per-node", 2, "--config", place / "run" / "run.yaml", "--exit-interval", 5)
    assert again.returncode == 0, again.stderr
    assert "going on after iteration 2" in again.stdout
    assert (place / "run" / "latest").resolve().name == "iter_0000004"


def test_an_error_is_one_line_and_the_last(place: Path) -> None:
    words = ["train", "--nproc-per-node", 2, "--load", place / "tiny", "--data", place / "none.txt", "--train-iters", 1]
    wrong = moeconv(*words, "--expert-model-parallel-size", 3)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: --expert-model-parallel-size 3")
    assert "Traceback" not in wrong.stderr


def test_flags_are_checked_before_any_process_starts() -> None:
    result = CliRunner().invoke(main, ["train", "--trian-iters", "3"])
    assert result.exit_code == 2
    assert result.output == "error: unknown flag --trian-iters; nearest: --train-iters (all flags: --help)\n"
    shown = CliRunner().invoke(main, ["train", "--help"])
    assert shown.exit_code == 0
    assert "moeconv train --example MODEL" in shown.output
    assert "--expert-model-parallel-size N" in shown.output


def test_several_machines_meet_by_the_usual_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NNODES", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    assert _nodes() == []
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_NODEID", "1")
    result = CliRunner().invoke(main, ["train", "--load", "c", "--data", "t", "--train-iters", "1"])
    assert result.exit_code == 2
    assert "NNODES is 2: MASTER_ADDR must be set on each machine, too" in result.output
    monkeypatch.setenv("MASTER_ADDR", "host")
    assert _nodes() == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "host", "--master-port", "29500"]
