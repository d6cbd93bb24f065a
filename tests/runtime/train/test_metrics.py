"""A run's numbers in each of their forms."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.log.config import LogConfig
from runtime.log.metrics import EvalRecord, MetricLog, StepRecord


def record(iteration: int, **change: Any) -> StepRecord:
    fields: dict[str, Any] = {
        "iteration": iteration, "consumed_train_samples": 4 * iteration, "lm_loss": 2.0 + iteration, "aux_loss": 1.25,
        "z_loss": 3.0, "grad_norm": 0.5, "learning_rate": 1e-3, "skipped": False, "seconds": 0.5,
        "tokens_per_second": 100.0, "expert_load": [[10, 30], [20, 20]],
    }  # fmt: skip
    return StepRecord(**fields | change)


def test_lines_are_means_and_jsonl_has_each_step(tmp_path: Path) -> None:
    out = io.StringIO()
    log = MetricLog(LogConfig(file=tmp_path / "log.jsonl"), train_iters=5, interval=2, settings={}, out=out)
    for iteration in range(1, 6):
        log.step(record(iteration))
    log.evaluation(EvalRecord(iteration=5, split="valid", lm_loss=1.5, tokens=64, seconds=1.0))
    log.close()
    lines = out.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines[:3]] == [f"iteration {i}/5" for i in (2, 4, 5)]
    assert (
        "lm loss 3.500000 | aux loss 1.2500 | grad norm 0.5000 | lr 1.000e-03 | 100 tokens/s | 500 ms/step" in lines[0]
    )
    assert "expert load max/mean 1.50" in lines[0]
    assert "valid at iteration 5 | lm loss 1.500000" in lines[3]
    objects = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [o["iteration"] for o in objects] == [1, 2, 3, 4, 5, 5]
    assert objects[1]["lm_loss"] == 4.0
    assert objects[1]["expert_load"] == [[10, 30], [20, 20]]
    assert {"aux_loss", "grad_norm", "learning_rate", "tokens_per_second"} <= objects[0].keys()
    assert objects[5]["eval_lm_loss"] == 1.5


def test_a_skipped_step_is_counted_and_left_out_of_means(tmp_path: Path) -> None:
    out = io.StringIO()
    log = MetricLog(LogConfig(file=tmp_path / "log.jsonl"), train_iters=2, interval=2, settings={}, out=out)
    log.step(record(1, lm_loss=math.nan, grad_norm=math.inf, skipped=True))
    log.step(record(2))
    log.close()
    assert "lm loss 4.000000" in out.getvalue()
    assert "skipped 1" in out.getvalue()
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["lm_loss"] is None
    assert first["skipped"] is True


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--log-file"):
        MetricLog(LogConfig(file=tmp_path / "file" / "log"), train_iters=1, interval=1, settings={})
