"""Beginning with the adapters of a PEFT folder: their rank, scale and weights, in the form that the trainer trains.

peft lets rank and alpha differ from weight to weight; here all adapters of a model share them. A smaller one is filled up
with components that add nothing yet, and what is left of its scale goes into B: the model computes the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeconv.adapters.delta import Delta
from moeconv.adapters.initial import initial_adapters
from moeconv.adapters.peft_config import PeftConfig, read_config
from moeconv.adapters.source import Adapter, open_adapter
from moeconv.families.adapted import ADAPTABLE, LORA_A, AdaptedModel, adapter_names
from moeconv.families.base import Model
from moeconv.layout.rect import Rect
from runtime.errors import ConfigError, require
from runtime.model.lora import LoraConfig
from runtime.model.targets import adapt, check_experts

Array = npt.NDArray[Any]


def begin_with(path: Path, base: Model, config: LoraConfig, given: set[str]) -> tuple[AdaptedModel, LoraConfig]:
    """Take over what a PEFT folder adapts, and of what rank and scale.

    Args:
        path: the folder.
        base: the model that it belongs to.
        config: the run's own settings, which may say nothing else.
        given: which of them were given.

    Returns:
        The model with its adapters, and their settings.

    Raises:
        ConfigError: it holds adapters that the trainer can't train, or others than the flags say.
        MoeconvError: it is no plain LoRA, or is of another model.
    """
    adapter = _open(path, base)
    strange = sorted(name for name in adapter.deltas if base.plain[name].rule.role not in ADAPTABLE)
    require(
        not strange,
        f"--adapter {path}: adapts {strange[0] if strange else ''}, which can't have an adapter here: matrices of attention, "
        "dense layers and experts can. Add it to the model with `moeconv merge`, and begin new ones",
    )
    stated = read_config(path)
    rank, alpha = _shared(adapter, stated)
    theirs: dict[str, Any] = {"rank": rank, "alpha": alpha, "rslora": stated.rslora}
    for name, value in theirs.items():
        mine = getattr(config, name)
        require(
            name not in given or mine == value,
            f"--lora-{name} is {mine}; the adapters in --adapter {path} have {value}: leave it out",
        )
    check_experts(base, set(adapter.deltas), f"--adapter {path}")
    settled = dataclasses.replace(config, **theirs)
    named = adapt(base, settled)
    assert isinstance(named, AdaptedModel)
    if "targets" in given and (other := sorted(named.adapted ^ adapter.deltas.keys())):
        which = "the flag fits it" if other[0] in named.adapted else "the folder has it"
        raise ConfigError(
            f"--lora-targets: names other weights than --adapter {path}, such as {other[0]} ({which} alone): leave the flag out"
        )
    more = named.whole if "also_train" in given else frozenset[str]()
    return AdaptedModel.of(base, rank, adapter.deltas, {*adapter.whole, *more}), settled


def peft_values(
    path: Path, base: Model, model: AdaptedModel, config: LoraConfig, seed: int
) -> tuple[Callable[[str, Rect], Array], frozenset[str]]:
    """Give a reader of what a PEFT folder holds.

    Args:
        path: the folder.
        base: the model that it belongs to.
        model: with its adapters, as `begin_with` gives it.
        config: likewise.
        seed: of what components begin with that smaller adapters lack.

    Returns:
        A function of a matrix's name, or of that of a weight that the folder holds whole, and a rectangle of it; and these
        names.
    """
    adapter, first = _open(path, base), initial_adapters(model, seed)

    @lru_cache(8)
    def matrices(weight: str) -> tuple[Array, Array]:
        a, b = _trimmed(adapter.deltas[weight], model.rank)
        b = b * np.float32(adapter.deltas[weight].scale / config.scale)
        name_a, name_b = adapter_names(weight)
        full_a, full_b = (np.array(first(name, Rect.whole(model.tensors[name].shape))) for name in (name_a, name_b))
        full_a[: len(a)], full_b[:, : b.shape[1]] = a, b
        return full_a, full_b

    def read(name: str, rect: Rect) -> Array:
        weight = model.weight_of.get(name)
        if weight is None:
            return np.ascontiguousarray(adapter.whole[name]()[rect.slices()])
        which = 0 if model.tensors[name].rule.role.endswith(LORA_A) else 1
        return np.ascontiguousarray(matrices(weight)[which][rect.slices()])

    return read, frozenset((*model.weight_of, *adapter.whole))


def _open(path: Path, base: Model) -> Adapter:
    adapter = open_adapter(path, base)
    require(adapter.save is None, f"--adapter {path}: is a run's: give it with --load, which finds its model too")
    return adapter


def _shared(adapter: Adapter, stated: PeftConfig) -> tuple[int, float]:
    """The rank that holds every adapter, and the alpha that gives most of them their own scale."""
    rank = max((len(_trimmed(delta, stated.rank)[0]) for delta in adapter.deltas.values()), default=stated.rank)
    scale = stated.alpha / (math.sqrt(stated.rank) if stated.rslora else stated.rank)
    return rank, stated.alpha if rank == stated.rank else scale * (math.sqrt(rank) if stated.rslora else rank)


def _trimmed(delta: Delta, rank: int) -> tuple[Array, Array]:
    """A and B without components that add nothing, as far as they are more than the rank: one stack's halves have such."""
    a, b = (np.asarray(matrix, np.float32) for matrix in (delta.a(), delta.b()))
    if len(a) <= rank:
        return a, b
    adds = np.abs(b).max(0) > 0
    kept = np.flatnonzero(adds)
    if len(kept) < rank:  # of those that add nothing, the first
        kept = np.sort(np.concatenate([kept, np.flatnonzero(~adds)[: rank - len(kept)]]))
    return a[kept], b[:, kept]
