"""Steps of a run as the trainer reports them."""

from __future__ import annotations

from typing import Any

import torch

from runtime.log.records import StepRecord
from runtime.model.routing_report import RoutingReport


def routing(load: list[list[int]], **change: Any) -> RoutingReport:
    """A report with a given load, topk 2."""
    load_LE = torch.tensor(load)
    num_layers = len(load)
    fields: dict[str, Any] = {
        "aux_loss_L": torch.full((num_layers,), 1.25, dtype=torch.float64),
        "z_loss_L": torch.full((num_layers,), 3.0, dtype=torch.float64),
        "added_L": torch.full((num_layers,), 0.125, dtype=torch.float64),
        "entropy_L": torch.full((num_layers,), 0.5, dtype=torch.float64),
        "dropped_L": torch.zeros(num_layers, dtype=torch.int64),
        "nonfinite_L": torch.zeros(num_layers, dtype=torch.int64),
        "tokens_L": load_LE.sum(1) // 2,
        "load_LE": load_LE,
    }
    return RoutingReport(**(fields | change))


def step(iteration: int, **change: Any) -> StepRecord:
    """A step of 4 sequences of 50 tokens in half a second."""
    fields: dict[str, Any] = {
        "iteration": iteration, "consumed_samples": 4 * iteration, "consumed_tokens": 200 * iteration, "num_tokens": 200,
        "lm_loss": 2.0 + iteration, "grad_norm": 0.5, "learning_rate": 1e-3, "skipped": False, "seconds": 0.5,
        "data_seconds": 0.05, "memory_bytes": 3 * 10**9, "routing": routing([[10, 30], [20, 20]]),
    }  # fmt: skip
    return StepRecord(**(fields | change))
