"""A calibration of this machine's CPUs, on two ranks, is a file that plans take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from cli.main import main
from runtime.estimate.machine import COLLECTIVES, find_machine
from tests.support.configs import tiny_config


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "mine.yaml"
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli.main"]
    done = subprocess.run(
        [sys.executable, *program, "plan", "--calibrate", str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CPU, 2 ranks" in done.stdout
    return path


def test_it_holds_what_was_measured(calibrated: Path) -> None:
    found = yaml.safe_load(calibrated.read_text())
    assert found["gpu"] == "CPU"
    assert found["links"]["nvlink"]["gb_s"].keys() == set(COLLECTIVES)
    rates = (
        "hbm_tb_s",
        "dense_tflops",
        "grouped_tflops",
        "grouped_sum_tb_s",
        "attention_tflops",
        "attention_window_tflops",
    )
    for name in rates:
        assert 0 < found[name] < 20, name  # a CPU, in TFLOP/s and TB/s
    assert found["dense_tflops"] != find_machine("h100").dense_tflops
    assert 1 < found["launch_us"] < 1e5
    assert "pcie_gb_s" not in found, "a CPU has no way to its own memory"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_has_a_way_to_the_hosts_memory(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "cli.main", "plan", "--calibrate", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(path.read_text())
    assert 5 < found["pcie_gb_s"] < 500
    assert 2 < found["launch_us"] < 500
    assert 100 < found["dense_tflops"] < 5000
    assert "host_gb_s" not in found, "one GPU alone doesn't say what the host gives several"


def test_plans_take_it(calibrated: Path, tmp_path: Path) -> None:
    machine = find_machine(str(calibrated))
    assert machine.gpus_per_node == 2
    assert machine.links["nvlink"].rate("all_to_all", 2) < 1e11
    assert machine.links["network"].rate("all_to_all", 2) == find_machine("h100").links["network"].rate("all_to_all", 2)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    words = [
        "plan",
        str(tmp_path),
        "--gpus",
        "2",
        "--ep",
        "2",
        "--seq-length",
        "64",
        "--json",
        "--gpu",
        str(calibrated),
    ]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["step"]["seconds"] > 0


def test_it_measures_no_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plan", "model", "--calibrate", str(tmp_path / "x.yaml")])
    assert result.exit_code == 2
    assert "not a model: leave model out" in result.output
