"""The learning rate of each step against Megatron-Core's scheduler."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from runtime.errors import ConfigError
from runtime.optim.schedule import DECAY_STYLES, WSD_STYLES, Schedule

CASES = [(style, "exponential") for style in DECAY_STYLES] + [("WSD", wsd) for wsd in WSD_STYLES]


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    return OptimizerParamScheduler


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("style", "wsd_style"), CASES)
def test_every_step_equals_megatron(megatron: Any, style: Any, wsd_style: Any, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = megatron(
        optimizer, init_lr=1e-5, max_lr=1e-3, min_lr=1e-4, lr_warmup_steps=warmup, lr_decay_steps=40,
        lr_decay_style=style, start_wd=0.1, end_wd=0.1, wd_incr_steps=100, wd_incr_style="constant",
        wsd_decay_steps=15, lr_wsd_decay_style=wsd_style,
    )  # fmt: skip
    ours = Schedule(
        max_lr=1e-3, min_lr=1e-4, warmup_init=1e-5, warmup_iters=warmup, decay_iters=40, style=style,
        wsd_style=wsd_style, wsd_iters=15,
    )  # fmt: skip
    for step in range(50):
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        theirs.step(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 2.0}, "--min-lr is 2.0"),
        ({"warmup_iters": 10, "decay_iters": 10}, "--lr-warmup-iters is 10"),
        ({"style": "WSD", "decay_iters": 10}, "--lr-wsd-decay-iters is 0"),
        ({"style": "cosines"}, "--lr-decay-style"),
    ],
)
def test_refusals(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(max_lr=1.0, **options)
