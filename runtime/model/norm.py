"""Root-mean-square norms: of the residual, of each head, and of all heads together, which ranks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.moe.tape import active_tape
from runtime.ops.norm import add_rms_norm, rms_norm
from runtime.parallel.collectives import Group, copy_to, group_size, reduce_from


class RMSNorm(nn.Module):
    """Normalises the last dim, of the weight's length, on this rank alone."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class ResidualNorm(nn.Module):
    """Adds what a branch gave to the residual, and normalises the sum, in one pass."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x_SBD: Tensor, delta_SBD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add and normalise.

        Args:
            x_SBD: [S, B, D] residual.
            delta_SBD: [S, B, D]; None for nothing to add.

        Returns:
            The norm and the sum, each as x_SBD.
        """
        # A tape runs where a layer is checkpointed.
        return add_rms_norm(x_SBD, delta_SBD, self.weight, self.eps, remade=active_tape() is None)


class ResidualLayerNorm(nn.Module):
    """As `ResidualNorm`, a layer norm with a bias."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x_SBD: Tensor, delta_SBD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add and normalise; see `ResidualNorm`."""
        total = x_SBD if delta_SBD is None else x_SBD + delta_SBD
        return F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps), total


class SharedRMSNorm(nn.Module):
    """Normalises over all heads together, which the ranks of a group share.

    Where several ranks hold the same head, each counts it in part.
    """

    def __init__(self, weight: nn.Parameter, eps: float, group: Group, full_size: int) -> None:
        """Build.

        Args:
            weight: [N] this rank's elements.
            eps: added to the mean square.
            group: the ranks that share the heads.
            full_size: elements of all heads, each counted once.
        """
        super().__init__()
        self.weight, self.eps = weight, eps
        self._group, self._full_size = group, full_size
        self._copies = weight.shape[0] * group_size(group) / full_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., N]; same shape and dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        # Forward the ranks' sums are added up, and so are their gradients: each rank's output depends on all.
        total = reduce_from(wide.square().sum(-1, keepdim=True), self._group)
        mean = copy_to(total, self._group) / (self._full_size * self._copies)
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight
