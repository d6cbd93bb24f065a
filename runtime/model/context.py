"""What every module of a model is built with, and the tags of the common kinds of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeconv.layout.rect import Rect
from runtime.model.config import ModelConfig
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.ops.norm import add_rms_norm, rms_norm
from runtime.parallel.collectives import all_gather, copy_to, reduce_from, reduce_scatter
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.topology import Piece, Topology, tag

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class ModelContext:
    """The configuration and the ranks that a model's modules share."""

    model: ModelConfig
    parallel: ParallelConfig
    moe: MoEConfig | None
    recompute: RecomputeConfig
    mesh: ParallelMesh
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return TORCH_DTYPES[self.model.dtype]

    @property
    def sp(self) -> bool:
        """Whether activations between tensor-parallel regions are split over tp along the sequence."""
        return self.parallel.sp and self.parallel.tp > 1

    def parameter(self, *shape: int) -> nn.Parameter:
        """Make a parameter without memory: the buckets that hold weights together provide it later."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"))

    def enter(self, x_SBD: Tensor) -> Tensor:
        """Come into a tensor-parallel region: every rank of tp needs all tokens.

        Args:
            x_SBD: [S, B, D], with sequence parallelism [S / tp, B, D].

        Returns:
            [S, B, D].
        """
        tp = self.mesh.group("tp")
        return all_gather(x_SBD, 0, tp) if self.sp else copy_to(x_SBD, tp)

    def leave(self, partial_SBD: Tensor) -> Tensor:
        """Come out of a tensor-parallel region: partial sums become sums.

        Args:
            partial_SBD: [S, B, D] this rank's summand.

        Returns:
            [S, B, D], with sequence parallelism [S / tp, B, D].
        """
        tp = self.mesh.group("tp")
        return reduce_scatter(partial_SBD, 0, tp) if self.sp else reduce_from(partial_SBD, tp)


def rows(name: str, shape: tuple[int, ...], begin: int, end: int, row: int = 0) -> Piece:
    """Rows begin to end of a global tensor, which are the parameter's rows from `row` on."""
    return Piece(name, shape, Rect.slab(shape, 0, begin, end), row)


def columns(name: str, shape: tuple[int, int], begin: int, end: int, row: int = 0) -> Piece:
    """Columns begin to end of a global matrix, as rows `row` to `row + shape[0]` of the parameter."""
    return Piece(name, shape, Rect.slab(shape, 1, begin, end), row)


def tag_replicated(parameter: nn.Parameter, name: str, *, partial: bool, decay: bool) -> None:
    """Tag a parameter that every rank of tp holds whole.

    Args:
        parameter: the parameter.
        name: its name on the hub.
        partial: whether the ranks of tp see different tokens, so that their gradients are summands.
        decay: whether weight decay applies.
    """
    shape = tuple(parameter.shape)
    pieces = (Piece(name, shape, Rect.whole(shape)),)
    tag(parameter, Topology(pieces=pieces, replicated=("tp",), partial=("tp",) if partial else (), decay=decay))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the hidden dim."""

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.weight = context.parameter(context.model.hidden_size)
        self.eps = context.model.rms_norm_eps
        tag_replicated(self.weight, name, partial=context.sp, decay=False)

    def forward(self, x_SBD: Tensor, delta_SBD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise the residual after adding what a branch gave.

        Args:
            x_SBD: [S, B, D] residual.
            delta_SBD: [S, B, D]; None for nothing to add.

        Returns:
            The norm and the sum, each as x_SBD.
        """
        if delta_SBD is None:
            return rms_norm(x_SBD, self.weight, self.eps), x_SBD
        return add_rms_norm(x_SBD, delta_SBD, self.weight, self.eps)
