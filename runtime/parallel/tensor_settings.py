"""How a tensor is trained; without torch, so that settings are judged and memory is counted quickly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSettings:
    """How one tensor of the model is trained."""

    frozen: bool = False
    """It stays as it is: no gradient, no master, no state of the optimizer."""
    decay: bool = True
    """Whether weight decay applies."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    decoupled: bool = False
    """Its rate is --decoupled-lr's instead of --lr's."""
    matrix: bool = False
    """Muon updates it, as a whole."""


DEFAULT = TensorSettings()


def common(settings: Iterable[TensorSettings]) -> TensorSettings | None:
    """Give the settings that tensors of one parameter share; None where they are trained differently."""
    found = set(settings)
    return next(iter(found), DEFAULT) if len(found) < 2 else None
