"""A run that changes what a checkpoint's router computes, on purpose: only into what a config.json of its family can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeconv.families import FAMILIES
from moeconv.families.base import Model
from moeconv.families.compute import Router
from moeconv.families.keys import router_keys
from runtime.errors import ConfigError, require

_FIELDS: Mapping[str, str] = {
    "--moe-router-topk": "top_k",
    "--moe-router-score-function": "score",
    "--moe-router-topk-scaling-factor": "scale",
    "--moe-router-num-groups": "groups",
    "--moe-router-group-topk": "group_top_k",
}
_LEFT = "--moe-router-pre-softmax"  # weights are left as the softmax over all experts gives them


def override_router(stated: Mapping[str, Any], model: Model, where: Path) -> Model:
    """Give the model with the router that the flags describe.

    Args:
        stated: flag -> its value, for the flags that were given.
        model: the checkpoint's.
        where: the checkpoint, for messages.

    Returns:
        The model of a changed config, which every checkpoint of the run will carry.

    Raises:
        ConfigError: the model has no router, or its family's config can't say this one; names the families that can.
    """
    router = model.compute.router
    require(router is not None, f"--override-router: the checkpoint {where} is a dense model without routers")
    assert router is not None
    changes = {field: stated[flag] for flag, field in _FIELDS.items() if flag in stated}
    wanted = replace(router, **changes, normalise=router.normalise and _LEFT not in stated)
    config = _say(model, wanted)
    if config is None:
        able = [family.name for family in FAMILIES.values() if _problems(family.model_type, wanted) == []]
        who = f"families whose config can: {', '.join(able)}" if able else "no family's config can"
        raise ConfigError(
            f"--override-router: no config.json of {model.family.name} says that its router computes "
            f"{', '.join(_problems(model.family.model_type, wanted))}, so its checkpoints would lie; {who}"
        )
    return Model.from_config(model.family, config)


def _problems(model_type: str, wanted: Router) -> list[str]:
    rule = FAMILIES[model_type].compute.router
    return ["a router at all"] if rule is None else router_keys(rule, wanted)[1]


def _say(model: Model, wanted: Router) -> dict[str, Any] | None:
    rule = model.family.compute.router
    assert rule is not None
    keys, problems = router_keys(rule, wanted)
    if problems:
        return None
    names = model.family.sizes["top_k"]
    return {**model.config, **keys, (names if isinstance(names, str) else names[0]): wanted.top_k}
