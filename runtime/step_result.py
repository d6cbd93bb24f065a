"""What one optimizer step reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from runtime.model.routing_report import RoutingReport


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step reports; the same on every rank."""

    lm_loss: float
    """Mean cross entropy over the global batch, nats a token."""
    grad_norm: float
    """Norm of the whole gradient, before clipping."""
    skipped: bool
    """Whether the update was left out because a number was not finite."""
    repeated: bool = False
    """Whether the step was done twice: the first time, rows that travel between ranks had outgrown their room."""
    routing: RoutingReport | None
    """What the routers did; None for a dense model."""

    @property
    def aux_loss(self) -> float:
        """Balancing loss without its coefficient, mean over layers; 1 is balanced. 0 without MoE layers."""
        return self.routing.aux_loss if self.routing is not None else 0.0

    @property
    def z_loss(self) -> float:
        """Router z-loss without its coefficient, mean over layers."""
        return self.routing.z_loss if self.routing is not None else 0.0

    @property
    def expert_load(self) -> Tensor | None:
        """[L, E] int64 on the CPU: choices of each expert; None for a dense model."""
        return self.routing.load_LE if self.routing is not None else None
