"""A model with low-rank adapters: two small matrices beside each adapted weight, as further tensors under PEFT's names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from moeconv.families.base import GlobalTensor, Model, Split, TensorRule

LORA_A, LORA_B = ".lora_A", ".lora_B"  # what follows a weight's role, and its name without `.weight`
_RANK = "lora_rank"  # the size of theirs that they share
_SUFFIX = ".weight"
ADAPTABLE = frozenset(
    (
        *(f"attention.{name}" for name in ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b")),
        *(f"{part}.{name}" for part in ("mlp", "shared", "expert") for name in ("gate", "up", "down")),
        "expert.gate_up",
    )
)


def adapter_names(weight: str) -> tuple[str, str]:
    """Give the names of the two matrices beside a weight: A [rank, in] and B [out, rank]."""
    stem = weight.removesuffix(_SUFFIX)
    return stem + LORA_A + _SUFFIX, stem + LORA_B + _SUFFIX


def scale_of(rank: int, alpha: float, *, rslora: bool) -> float:
    """Give the factor on what an adapter adds: alpha over the rank, or over its root where it is rank-stabilised."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def adapted_weights(model: Model, names: Iterable[str]) -> set[str]:
    """Give the weights of a model that have both matrices among some names."""
    found = set(names)
    return {name for name in model.plain if found.issuperset(adapter_names(name))}


@dataclass(frozen=True)
class AdaptedModel(Model):
    """A model whose `adapted` weights have adapters; `whole` weights are trained themselves, all others are frozen.

    With `alone` the tensors are those that training changes: what a save of adapters holds.
    """

    rank: int = 0
    adapted: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    alone: bool = False

    @classmethod
    def of(cls, model: Model, rank: int, adapted: Iterable[str], whole: Iterable[str] = ()) -> AdaptedModel:
        """Put adapters beside weights of a model.

        Args:
            model: the base, without adapters.
            rank: of every adapter.
            adapted: names of the adapted weights; their roles are among ADAPTABLE.
            whole: names of weights that are trained whole.

        Returns:
            The model with its base's tensors and the adapters'.
        """
        values: dict[str, Any] = {f.name: getattr(model, f.name) for f in fields(Model)}
        values["sizes"] = model.sizes | {_RANK: rank}
        return cls(**values, rank=rank, adapted=frozenset(adapted), whole=frozenset(whole))

    def by_itself(self) -> AdaptedModel:
        """Give the adapters and what is trained whole, without the rest of the base."""
        return replace(self, alone=True, quantised=frozenset(), carried={})

    @cached_property
    def rules(self) -> tuple[TensorRule, ...]:
        """The rules of the base's tensors, and of the adapters beside them."""
        base = super().rules
        return (*base, *(rule for weight in base if weight.role in ADAPTABLE for rule in _adapter_rules(weight)))

    @cached_property
    def weight_of(self) -> dict[str, str]:
        """The adapted weight of each adapter's matrix, by names."""
        return {name: weight for weight in self.adapted for name in adapter_names(weight)}

    @cached_property
    def own(self) -> frozenset[str]:
        """The names of what training changes: the adapters, and what is trained whole."""
        return frozenset((*self.weight_of, *self.whole))

    def _expand(self) -> Iterator[GlobalTensor]:
        for tensor in super()._expand():
            adapter = tensor.rule.role.endswith((LORA_A, LORA_B))
            if tensor.name in (self.weight_of if adapter else self.whole) or not (adapter or self.alone):
                yield tensor


def _adapter_rules(weight: TensorRule) -> Iterator[TensorRule]:
    """Give the rules of the two matrices: of a weight that is split along its inputs A is, along its outputs B."""
    ins, outs = weight.shape if weight.transposed else weight.shape[::-1]
    name_a, name_b = adapter_names(weight.name)
    split, outward = weight.split, weight.split is not None and weight.split.dim == (1 if weight.transposed else 0)
    plain = replace(weight, split=None, transposed=False, absent_if=None)
    split_a = Split(split.axis, 1, split.units) if split is not None and not outward else None
    split_b = Split(split.axis, 0, split.units) if split is not None and outward else None
    yield replace(plain, role=weight.role + LORA_A, name=name_a, shape=(_RANK, ins), split=split_a)
    yield replace(plain, role=weight.role + LORA_B, name=name_b, shape=(outs, _RANK), split=split_b)
