"""A router that a run changes on purpose: said in config.json, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.settings.flags import parse_flags
from runtime.settings.override import override_router
from tests.support.configs import tiny_model

WHERE = Path("ckpt")


def overridden(line: str, family: str, **options: Any) -> Any:
    return override_router(parse_flags(line.split()).stated, tiny_model(family, **options), WHERE)


def test_what_the_family_can_say_is_said() -> None:
    changed = overridden("--moe-router-pre-softmax --moe-router-topk 4", "qwen3_moe")
    assert (changed.config["norm_topk_prob"], changed.config["num_experts_per_tok"]) == (False, 4)
    assert (changed.compute.router.normalise, changed.compute.router.top_k) == (False, 4)
    scaled = overridden(
        "--moe-router-topk-scaling-factor 2.5 --moe-router-num-groups 4 --moe-router-group-topk 2", "dots1"
    )
    assert (scaled.compute.router.scale, scaled.compute.router.groups) == (2.5, 4)
    assert scaled.config["routed_scaling_factor"] == 2.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--moe-router-pre-softmax", "not renormalised.*Qwen3-MoE"),
        ("--moe-router-topk-scaling-factor 3", "times 3"),
        ("--moe-router-score-function sigmoid", "scores by sigmoid.*dots"),
    ],
)
def test_what_it_can_not_say_is_refused_with_the_families_that_can(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(line, "mixtral")


def test_a_dense_model_has_no_router() -> None:
    with pytest.raises(ConfigError, match="dense model"):
        overridden("--moe-router-topk 4", "llama")
