"""Which tensors are trained how: from globs on their Hugging Face names to the settings of each, written once.

Whatever depends on a tensor's group (gradients, buckets, the optimizer's rate and decay, what a checkpoint keeps) reads
its `TensorSettings`; nothing else looks at a glob.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moeconv.families.adapted import AdaptedModel
from moeconv.families.base import CARRIED, GlobalTensor, Model
from moeconv.placement import split_optimizer_name
from runtime.errors import ConfigError, require
from runtime.optim.config import EMA, OptimConfig
from runtime.parallel.tensor_settings import TensorSettings

DERIVED_STATES = ("master", EMA)
"""States that begin as the weights, and need not be there to go on."""
_ENDS = ("embedding", "head", "head.bias")
_FLAGS = {"freeze": "--freeze", "no_weight_decay": "--no-weight-decay", "lr_scale": "--lr-scale"}


def resolve_groups(config: OptimConfig, model: Model, *, trains: bool = True) -> dict[str, TensorSettings]:
    """Give each tensor that the optimizer could train its settings.

    Args:
        config: has the globs.
        model: the architecture.
        trains: whether there will be steps; else everything is frozen.

    Returns:
        Hugging Face name -> settings, for every trained tensor; router biases that follow the load are none.

    Raises:
        ConfigError: a glob matches nothing, has no factor, or everything is frozen; names the flag and what is near.
    """
    tensors = {name: tensor for name, tensor in model.tensors.items() if _trained(tensor)}
    out = {name: _plain_settings(tensor, config) for name, tensor in tensors.items()}
    if not trains:
        _change(out, list(out), frozen=True)
        return out
    if isinstance(model, AdaptedModel):
        _change(out, [name for name in out if name not in model.own], frozen=True)
    for pattern in config.no_weight_decay:
        _change(out, _matches("no_weight_decay", pattern, out), decay=False)
    for text in config.lr_scale:
        pattern, factor = _factor(text)
        _change(out, _matches("lr_scale", pattern, out), lr_scale=factor)
    for pattern in config.freeze:
        _change(out, _matches("freeze", pattern, out), frozen=True)
    require(
        not all(settings.frozen for settings in out.values()),
        f"--freeze {' '.join(config.freeze)}: leaves nothing to train; to evaluate only, give --skip-train instead",
    )
    return out


def describe_groups(config: OptimConfig) -> dict[str, Any]:
    """Give what a checkpoint keeps of the groups, to notice a change on a resume; empty where there are none."""
    found: dict[str, Any] = {name: list(getattr(config, name)) for name in _FLAGS}
    return {name: value for name, value in found.items() if value}


def changed_groups(before: Mapping[str, Any], config: OptimConfig) -> list[str]:
    """Say which groups are others than those that a checkpoint was trained with.

    Args:
        before: what `describe_groups` gave then.
        config: the run's now.

    Returns:
        A line for each flag that differs.
    """
    now = describe_groups(config)
    return [
        f"{flag}: {' '.join(map(str, before.get(name, []))) or 'none'} -> {' '.join(now.get(name, [])) or 'none'}"
        for name, flag in _FLAGS.items()
        if before.get(name, []) != now.get(name, [])
    ]


def describe_frozen(groups: Mapping[str, TensorSettings], model: Model) -> list[str]:
    """Say how much of a model is frozen; no line where nothing is."""
    frozen = [name for name, settings in groups.items() if settings.frozen]
    count = sum(model.tensors[name].size for name in frozen)
    total = sum(model.tensors[name].size for name in groups)
    if not frozen:
        return []
    return [f"frozen: {len(frozen)} of {len(groups)} tensors, {count / 1e6:.1f} M of {total / 1e6:.1f} M parameters"]


def check_states(groups: Mapping[str, TensorSettings], stored: Iterable[str], where: object) -> None:
    """Refuse to go on with the optimizer of a run that had frozen what is trained now, or had another optimizer.

    Args:
        groups: what `resolve_groups` gave.
        stored: the names in the checkpoint.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: it holds moments, but not of every tensor that is trained now.
    """
    have = {(state, base) for state, base in map(split_optimizer_name, stored) if state not in (None, *DERIVED_STATES)}
    missing = [
        name
        for name, settings in groups.items()
        if not settings.frozen and ("momentum_buffer" if settings.matrix else "exp_avg", name) not in have
    ]
    require(
        not have or not missing,
        f"{where} holds no moments of {len(missing)} tensors that are trained now, such as {next(iter(missing), '')}: "
        "they were frozen, or another --optimizer trained them. Do as that run did, or start with new moments for all: "
        "--load it with --no-load-optim, and give another --save",
    )


def _trained(tensor: GlobalTensor) -> bool:
    return tensor.size > 0 and not tensor.rule.buffer and tensor.rule.role != CARRIED


def _plain_settings(tensor: GlobalTensor, config: OptimConfig) -> TensorSettings:
    decoupled = config.decoupled_lr is not None and tensor.rule.role in _ENDS
    matrix = config.optimizer == "muon" and len(tensor.shape) == 2 and tensor.rule.role not in _ENDS
    return TensorSettings(decay=len(tensor.shape) > 1, decoupled=decoupled, matrix=matrix)


def _change(out: dict[str, TensorSettings], names: Sequence[str], **values: Any) -> None:
    for name in names:
        out[name] = replace(out[name], **values)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Give the names that fit a glob."""
    matches = re.compile(fnmatch.translate(pattern)).match
    return [name for name in names if matches(name)]


def _matches(field: str, pattern: str, names: Iterable[str]) -> list[str]:
    found = matching(pattern, names)
    if not found:
        raise ConfigError(
            f"{_FLAGS[field]} {pattern}: no trained tensor of the model has such a name; nearest: {nearest(pattern, names)}"
        )
    return found


def nearest(pattern: str, names: Iterable[str]) -> str:
    """Name the kinds of tensors, their numbers as `*`, that look most like a glob."""
    kinds = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    plain = re.sub(r"\b\d+\b", "*", pattern)
    near = difflib.get_close_matches(plain, kinds, n=3, cutoff=0.0)
    return ", ".join(near)


def _factor(text: str) -> tuple[str, float]:
    """Split GLOB=FACTOR."""
    pattern, equals, number = text.rpartition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = -1.0
    if not (equals and pattern and 0 <= factor < float("inf")):
        raise ConfigError(f"--lr-scale is {text!r}; expected GLOB=FACTOR, such as '*.gate.weight=0.1'")
    return pattern, factor
