"""A run's numbers in each of their forms: the same keys and values on the screen, in JSON Lines and in TensorBoard."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import ConfigError
from runtime.log.config import LogConfig
from runtime.log.metrics import MetricLog
from runtime.log.records import EvalRecord, Speed
from runtime.log.sinks import Guarded, JsonLines
from tests.runtime.log.support import routing, step

SPEED = Speed(flops_per_token=1e12, num_gpus=4, peak_flops=400e12)


def open_log(out: io.StringIO | None = None, **options: Any) -> MetricLog:
    names = ("file", "tensorboard_dir", "per_layer_logging", "dead_expert_steps", "wandb_project")
    config = LogConfig(**{name: options.pop(name) for name in names if name in options})
    settings: dict[str, Any] = {"train_iters": 5, "interval": 2, "settings": {"lr": 1e-3}, "speed": SPEED} | options
    return MetricLog(config, out=out or io.StringIO(), **settings)


def read(path: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_an_interval_has_the_same_numbers_everywhere(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = io.StringIO()
    log = open_log(out, file=tmp_path / "log.jsonl", tensorboard_dir=tmp_path / "tb", per_layer_logging=True)
    for iteration in range(1, 6):
        log.step(step(iteration))
    log.evaluation(EvalRecord(iteration=5, split="valid", lm_loss=1.5, tokens=64, seconds=1.0))
    log.evaluation(EvalRecord(iteration=5, split="code", lm_loss=0.5, tokens=32, seconds=1.0))
    log.close()
    records = {record["iteration"]: record for record in read(tmp_path / "log.jsonl", "train")}
    assert list(records) == [2, 4, 5]
    curves = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    curves.Reload()
    tags = set(curves.Tags()["scalars"])
    skip = {"kind", "time", "iteration", "num_steps", "layers", "expert_load", "dead"}
    scalars = {f"train/{name}" for name, value in records[4].items() if name not in skip and value is not None}
    layers = {f"train/layer_00{number}/{name}" for number in (0, 1) for name in records[4]["layers"]}
    evals = {
        f"{split}/eval_{name}" for split in ("valid", "code") for name in ("lm_loss", "perplexity", "tokens", "seconds")
    }
    assert tags == scalars | layers | evals
    for tag in scalars - {"train/eta_seconds"}:
        for event in curves.Scalars(tag):
            assert event.value == pytest.approx(records[event.step][tag.removeprefix("train/")], rel=1e-6), tag
    assert [event.step for event in curves.Scalars("train/lm_loss")] == [2, 4, 5]
    assert [event.value for event in curves.Scalars("train/layer_000/load_max_over_mean")] == [1.5] * 3
    [valid] = curves.Scalars("valid/eval_perplexity")
    assert valid.value == pytest.approx(math.exp(1.5))
    want = {
        "lm_loss": 5.5, "loss": 5.75, "aux_loss": 1.25, "z_loss": 3.0, "grad_norm": 0.5, "learning_rate": 1e-3,
        "consumed_train_samples": 16, "consumed_train_tokens": 800, "tokens_per_second": 400, "tflops_per_gpu": 100.0,
        "mfu": 0.25, "step_seconds": 0.5, "data_wait": 0.1, "memory_gb": 3.0, "load_max_over_mean": 1.5,
        "dropped_share": 0.0, "router_entropy": 0.5, "nonfinite_logits": 0, "dead_experts": 0, "repeated_steps": 0, "skipped_steps": 0,
    }  # fmt: skip
    assert {name: records[4][name] for name in want} == pytest.approx(want)
    assert records[4]["expert_load"] == [[20, 60], [40, 40]]
    assert records[5]["expert_load"] == [[10, 30], [20, 20]]
    lines = out.getvalue().splitlines()
    assert lines[3].startswith("iteration 4/5 | loss 5.750000 | lm loss 5.500000 | aux loss 1.2500 | z loss 3.0000 | ")
    assert (
        "lr 1.000e-03 | 400 tokens/s | 100 TFLOP/s/GPU | MFU 25.0% | 0.5 s/step | data wait 10.0% | memory 3.00 GB | "
        in lines[3]
    )
    assert "expert load max/mean 1.50 | dropped 0.00% | router entropy 0.500 | ETA 0:00:0" in lines[3]
    assert lines[4].startswith("  layer 0 | aux loss 1.2500 | z loss 3.0000 | load max over mean 1.5000 | ")
    assert any(
        line.startswith("code at iteration 5 | lm loss 0.500000 | perplexity 1.6487 | 32 tokens") for line in lines
    )
    assert [record["split"] for record in read(tmp_path / "log.jsonl", "eval")] == ["valid", "code"]


def test_a_loss_that_the_run_does_not_have_is_null(tmp_path: Path) -> None:
    out = io.StringIO()
    log = open_log(out, file=tmp_path / "log.jsonl", train_iters=1)
    none = torch.zeros(2, dtype=torch.float64)
    log.step(step(1, routing=routing([[10, 30], [20, 20]], aux_loss_L=none, z_loss_L=none, added_L=none)))
    log.close()
    [record] = read(tmp_path / "log.jsonl", "train")
    assert (record["aux_loss"], record["z_loss"], record["loss"]) == (None, None, record["lm_loss"])
    assert "aux loss" not in out.getvalue()


def test_what_is_unknown_is_left_out_and_null(tmp_path: Path) -> None:
    out = io.StringIO()
    log = open_log(out, file=tmp_path / "log.jsonl", train_iters=2, speed=Speed(flops_per_token=1e9, num_gpus=1))
    log.step(step(1, routing=None))
    log.step(step(2, routing=None))
    log.close()
    [record] = read(tmp_path / "log.jsonl", "train")
    assert record["mfu"] is None
    assert record["tflops_per_gpu"] == pytest.approx(0.4)
    assert "aux_loss" not in record
    line = out.getvalue()
    assert "MFU" not in line
    assert "expert" not in line
    assert "iteration 2/2 | lm loss 3.500000 | grad norm" in line


def test_ranks_of_experts_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    """Layers of two ranks with 30 and 70 of 100 choices, and as many each."""
    log = open_log(file=tmp_path / "log.jsonl", train_iters=1)
    log.step(step(1, routing=routing([[10, 20, 30, 40], [1, 49, 25, 25]], num_ranks=2)))
    log.close()
    [record] = read(tmp_path / "log.jsonl", "train")
    assert record["rank_load"] == pytest.approx((70 / 50 + 1) / 2)
    assert log.rank_loads == [record["rank_load"]]


def test_a_skipped_step_is_counted_and_left_out_of_means(tmp_path: Path) -> None:
    out = io.StringIO()
    log = open_log(out, file=tmp_path / "log.jsonl", train_iters=4)
    bad = routing([[10, 30], [20, 20]], nonfinite_L=torch.tensor([3, 0]), entropy_L=torch.tensor([math.nan, 0.5]))
    log.step(step(1, lm_loss=math.nan, grad_norm=math.inf, skipped=True, routing=bad))
    log.step(step(2))
    log.step(step(3, lm_loss=math.nan, skipped=True))
    log.step(step(4, lm_loss=math.nan, skipped=True))
    log.close()
    first, second = read(tmp_path / "log.jsonl", "train")
    assert "lm loss 4.000000" in out.getvalue()
    assert "NON-FINITE ROUTER LOGITS 3 | skipped 1" in out.getvalue()
    assert (first["lm_loss"], first["skipped_steps"], first["nonfinite_logits"]) == (4.0, 1, 3)
    assert first["router_entropy"] is None
    assert (second["lm_loss"], second["skipped_steps"]) == (None, 2)


def test_dropped_share_and_load_are_those_of_the_whole_interval(tmp_path: Path) -> None:
    log = open_log(file=tmp_path / "log.jsonl", train_iters=2)
    log.step(step(1, routing=routing([[30, 10], [0, 0]], dropped_L=torch.tensor([4, 0]))))
    log.step(step(2, routing=routing([[20, 20], [0, 0]], dropped_L=torch.tensor([8, 0]))))
    log.close()
    [record] = read(tmp_path / "log.jsonl", "train")
    assert record["dropped_share"] == 12 / 80
    assert record["load_max_over_mean"] == 50 * 2 / 80
    assert record["layers"]["dropped_share"] == [12 / 80, None], "a layer without experts has no share"


def test_dead_experts_are_named_once_and_again_when_they_come_back(tmp_path: Path) -> None:
    out = io.StringIO()
    log = open_log(out, file=tmp_path / "log.jsonl", train_iters=8, interval=1, dead_expert_steps=3)
    for iteration in range(1, 9):
        log.step(step(iteration, routing=routing([[40, 0], [20, 20]] if iteration < 6 else [[39, 1], [20, 20]])))
    log.close()
    records = read(tmp_path / "log.jsonl", "train")
    assert [record["dead_experts"] for record in records] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert records[3]["dead"] == [[0, 1]]
    notes = [record["text"] for record in read(tmp_path / "log.jsonl", "note")]
    assert notes == ["experts without a token for 3 steps: layer 0: 1", "experts that have tokens again: layer 0: 1"]
    assert "dead experts 1" in out.getvalue()


def test_settings_stand_first_in_the_file(tmp_path: Path) -> None:
    open_log(file=tmp_path / "new" / "log.jsonl", settings={"optim": {"lr": 0.1}, "path": tmp_path}).close()
    [record] = read(tmp_path / "new" / "log.jsonl", "run")
    assert record["settings"] == {"optim": {"lr": 0.1}, "path": str(tmp_path)}


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--log-file"):
        open_log(file=tmp_path / "file" / "log")
    with pytest.raises(ConfigError, match="--moe-dead-expert-steps is 0"):
        open_log(dead_expert_steps=0)


def test_a_lost_service_is_said_once_and_training_goes_on() -> None:
    class Service:
        def add(self, scalars: Mapping[str, float], iteration: int) -> None:
            if iteration > 1:
                raise ConnectionError("no route to host\nsecond line")
            self.taken = dict(scalars)

        def close(self) -> None:
            raise AssertionError("it is lost")

    notes: list[str] = []
    service = Service()
    sink = Guarded("wandb", lambda: service, notes.append)
    for iteration in (1, 2, 3):
        sink.add({"a": 1.0}, iteration)
    sink.close()
    assert service.taken == {"a": 1.0}
    assert notes == ["wandb is lost (ConnectionError: no route to host): training goes on without it"]


def test_a_service_that_cannot_be_reached_at_the_start_is_lost_too() -> None:
    def make() -> Any:
        raise TimeoutError("timed out")

    notes: list[str] = []
    Guarded("wandb", make, notes.append).add({}, 1)
    assert notes == ["wandb is lost (TimeoutError: timed out): training goes on without it"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_log_on_a_full_disk_is_said_once() -> None:
    notes: list[str] = []
    lines = JsonLines(Path("/dev/full"), notes.append)
    for _ in range(3):
        lines.write({"a": 1})
    lines.close()
    assert notes[0] == "the log /dev/full can't be written (No space left on device): training goes on without it"
    assert len([note for note in notes if "can't be written" in note]) == 1


def test_a_terminal_shows_a_bar_and_a_file_does_not() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        log = MetricLog(LogConfig(), train_iters=4, interval=2, settings={}, out=terminal)
        for iteration in range(1, 5):
            log.step(step(iteration))
        log._screen._bar.refresh()
        log.close()
    written = b""
    with contextlib.suppress(OSError):  # what was written comes in pieces, and then the other end is closed
        while piece := os.read(master, 1 << 16):
            written += piece
    os.close(master)
    shown = written.decode()
    assert "4/4" in shown
    assert "400 tokens/s" in shown
    assert "iteration 2/4 | loss" in shown
    out = io.StringIO()
    log = open_log(out)
    log.step(step(2))
    log.close()
    assert "\x1b" not in out.getvalue()
    assert len(out.getvalue().splitlines()) == 1


def test_a_screen_that_is_gone_ends_nothing() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    out = os.fdopen(write_end, "w")
    log = MetricLog(LogConfig(), train_iters=4, interval=1, settings={}, out=out)
    log.step(step(1))
    log.note("still there")
    log.close()
    with pytest.raises(BrokenPipeError):
        out.close()
