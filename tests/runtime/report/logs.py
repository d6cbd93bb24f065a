"""Logs of runs, written by the trainer's own log from numbers that a test can know."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from runtime.log.config import LogConfig
from runtime.log.metrics import MetricLog
from runtime.log.records import EvalRecord, Speed
from tests.runtime.log.support import routing, step

NUM_LAYERS, NUM_EXPERTS = 3, 4


def load(iteration: int) -> list[list[int]]:
    """[3][4] choices: layer 0 balanced, layer 1 skewed more and more, layer 2 without expert 1 from step 10 on."""
    dead = 0 if iteration >= 10 else 100
    return [[100] * 4, [100 + iteration, 100, 100, 100 - iteration % 100], [100, dead, 100, 100]]


def write_log(
    path: Path, iterations: int, *, lr: float = 1e-3, first: int = 1, experts: bool = True, **extra: Any
) -> Path:
    """Write the log of a run.

    Args:
        path: the file; an existing one is gone on with.
        iterations: the last step.
        lr: a setting, and the learning rate's peak.
        first: the first step.
        experts: whether the model has any.
        **extra: further settings.

    Returns:
        The file.
    """
    settings = {
        "optim": {"lr": lr},
        "job": {
            "model": "Mixtral",
            "experts": NUM_EXPERTS if experts else 0,
            "world_size": 2,
            "device": "CPU",
            "parameters": 1000,
        },
    } | extra
    config = LogConfig(file=path, dead_expert_steps=5)
    speed = Speed(flops_per_token=1e9, num_gpus=2, peak_flops=1e12)
    log = MetricLog(config, train_iters=iterations, interval=1, settings=settings, speed=speed, out=io.StringIO())
    for i in range(first, iterations + 1):
        report = routing(load(i)) if experts else None
        log.step(step(i, lm_loss=2 + math.exp(-i / 10), learning_rate=lr, routing=report))
        if i % 10 == 0:
            for split in ("valid", "code"):
                log.evaluation(
                    EvalRecord(
                        iteration=i,
                        split=split,
                        consumed_tokens=200 * i,
                        lm_loss=2.5 - i / 1000,
                        tokens=64,
                        seconds=1.0,
                    )
                )
    log.note(f"saved iteration {iterations} to <b>somewhere</b></script> in 1.0 s")
    log.close()
    return path
