"""What a layer reports of its routing, kept on the device: reading it is the only synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.moe.losses import LinearLoss
from runtime.moe.scoring import Scored


@dataclass(slots=True)
class RouterStats:
    """Sums over the micro-batches since the last reset, of this rank's tokens.

    Sum each over the ranks with different tokens (tp x dp x cp), then divide: load_E by its mean for max over mean,
    dropped by choices for the dropped share, entropy and nonfinite by tokens, losses by the number of micro-batches
    (their values are summands over a tp x cp group, so divide their sum over all ranks by dp). Everything is kept in the
    same tensors from step to step, so that a captured micro-batch adds to what is read.
    """

    sums: Tensor
    """[2E + 3] fp64, as in `Scored`: one addition a micro-batch keeps all of them."""
    dropped: Tensor
    """0-dim int64 choices without a row: above an expert's capacity, or of a token that the expert did not choose."""
    summands: dict[str, Tensor] = field(default_factory=dict)
    """Name of a loss -> fp64, 0-dim or [n]: what its value is the sum of. One that has been added stays, at 0 after a reset."""

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device) -> RouterStats:
        """No micro-batch yet."""
        sums = torch.zeros(2 * num_experts + 3, dtype=torch.float64, device=device)
        return cls(sums=sums, dropped=torch.zeros((), dtype=torch.int64, device=device))

    @property
    def load_E(self) -> Tensor:
        """[E] int64 choices of each expert before any drop."""
        return self.sums[(self.sums.shape[0] - 3) // 2 : -3].long()

    @property
    def entropy(self) -> Tensor:
        """0-dim sum over tokens of the entropy of the router's distribution, in nats."""
        return self.sums[-2]

    @property
    def nonfinite(self) -> Tensor:
        """0-dim int64 tokens with a NaN or infinite logit."""
        return self.sums[-1].long()

    @property
    def losses(self) -> dict[str, Tensor]:
        """Each loss without its coefficient, 0-dim fp64: 1 is balanced for the auxiliary losses."""
        return {name: summands.sum() for name, summands in self.summands.items()}

    def add(self, scored: Scored, *, drops: bool) -> None:
        """Count a micro-batch.

        Args:
            scored: the routing and its sums.
            drops: whether choices can be without a row.
        """
        routing = scored.routing
        self.sums += scored.sums.detach()
        if drops:
            num_experts = (self.sums.shape[0] - 3) // 2
            # With a column for each expert, rows that only fill up to the capacity are no choices.
            wide = routing.experts_TK.shape != routing.chosen_TK.shape
            experts = routing.experts_TK.gather(1, routing.chosen_TK) if wide else routing.experts_TK
            self.dropped += (experts == num_experts).sum()

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add a loss of a micro-batch, 0-dim without its coefficient."""
        self._summands(name, value).add_(value.detach())

    def add_linear(self, parts: Sequence[LinearLoss], sums: Tensor) -> None:
        """Add losses of a micro-batch that are linear in its sums, each in one launch."""
        for part in parts:
            part.add_to(self._summands(part.name, sums[part.place]), sums.detach())

    def _summands(self, name: str, like: Tensor) -> Tensor:
        if name not in self.summands:
            self.summands[name] = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        return self.summands[name]

    def tensors(self) -> list[Tensor]:
        """What is 0 at the beginning of a step."""
        return [self.sums, self.dropped, *self.summands.values()]
