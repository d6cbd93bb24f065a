"""`trainer.json`: the position of a run, beside its tensors; every number of the type and in the range that it can have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from moeconv.io.decode import Size, parse_json, typed

TRAINER_VERSION = 1
_Rate = Annotated[float, Meta(ge=0, le=1e9)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class _Optimizer(msgspec.Struct):
    """The optimizer's numbers that are not tensors; others may stand beside them."""

    num_steps: Size | UnsetType = UNSET
    betas: tuple[_Share, _Share] | UnsetType = UNSET
    eps: _Rate | UnsetType = UNSET
    weight_decay: _Rate | UnsetType = UNSET
    loss_scale: Annotated[float, Meta(gt=0, le=2.0**127)] | UnsetType = UNSET
    good_steps: Size | UnsetType = UNSET
    expert_bias: list[list[float]] | UnsetType = UNSET
    ema_decay: _Share | UnsetType = UNSET
    groups: dict[str, list[str]] | UnsetType = UNSET


class _Schedule(msgspec.Struct):
    """The learning rate's settings, as far as another program could know them."""

    max_lr: _Rate | UnsetType = UNSET
    min_lr: _Rate | UnsetType = UNSET
    warmup_init: _Rate | UnsetType = UNSET
    warmup_iters: Size | UnsetType = UNSET
    decay_iters: Size | UnsetType = UNSET
    decoupled_max_lr: _Rate | UnsetType | None = UNSET
    decoupled_min_lr: _Rate | UnsetType = UNSET
    rewarmup: Size | UnsetType = UNSET
    rewarmup_start: Size | UnsetType | None = UNSET
    wsd_iters: Size | UnsetType = UNSET
    style: str | UnsetType = UNSET
    wsd_style: str | UnsetType = UNSET


class _Validation(msgspec.Struct, forbid_unknown_fields=True):
    """What a run's evaluations have found so far."""

    iteration: Size = 0
    best_iteration: Size = 0
    best_loss: float | None = None
    reference_loss: float | None = None
    waited: Size = 0


class _Trainer(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal[1]
    iteration: Size = 0
    consumed_train_samples: Size = 0
    seed: _Seed = 0
    data_fingerprint: str = ""
    schedule: _Schedule = msgspec.field(default_factory=_Schedule)
    optimizer: _Optimizer = msgspec.field(default_factory=_Optimizer)
    validation: _Validation = msgspec.field(default_factory=_Validation)


def parse_trainer(raw: bytes, where: str) -> dict[str, Any]:
    """Read the content of trainer.json.

    Args:
        raw: the file's bytes.
        where: the file's name, for messages.

    Returns:
        Its fields, those that are absent with their defaults.

    Raises:
        SourceError: it is no JSON, of another version, or a field is unknown or of another type or range.
    """
    value = parse_json(raw, where, finite=True)
    typed(value, _Trainer, where)
    absent = {"iteration": 0, "consumed_train_samples": 0, "seed": 0, "data_fingerprint": ""}
    return absent | {"schedule": {}, "optimizer": {}, "validation": {}} | value
