"""What every module of a model is built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from moeconv.families.base import Model
from runtime.fp8.linear import Fp8Linears
from runtime.fp8.operands import fits
from runtime.fp8.scaling import Scaling
from runtime.model.lora import LoraConfig
from runtime.model.parameters import Parameters
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.ops.linear import Linears, linears
from runtime.parallel.collectives import all_gather, copy_to, reduce_from, reduce_scatter
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.tensor_settings import TensorSettings
from runtime.parallel.topology import topology_of

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class ModelContext:
    """The configuration and the ranks that a model's modules share."""

    model: Model
    dtype: torch.dtype
    """Of weights and activations."""
    parallel: ParallelConfig
    moe: MoEConfig | None
    recompute: RecomputeConfig
    mesh: ParallelMesh
    device: torch.device
    groups: Mapping[str, TensorSettings]
    """How each tensor is trained."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Of the adapters, if the model has some."""
    fp8: Scaling | None = None
    """The bounds of what is computed in FP8."""

    @cached_property
    def parameters(self) -> Parameters:
        """Makes this rank's parameters."""
        return Parameters(self.model, self.parallel.layout, self.mesh, self.dtype, self.groups)

    @cached_property
    def first_trained(self) -> int:
        """The first layer that is trained, on whatever rank: -1 if the embedding is, the number of layers if none is."""
        trained = [self.model.tensors[name] for name, settings in self.groups.items() if not settings.frozen]
        if any(tensor.rule.role == "embedding" for tensor in trained):
            return -1
        return min((t.layer for t in trained if t.layer is not None), default=self.model.sizes["layers"])

    @property
    def draws(self) -> bool:
        """Whether a layer draws random numbers in training."""
        return self.lora.dropout > 0 or (self.moe is not None and self.moe.input_jitter_eps > 0)

    @property
    def sp(self) -> bool:
        """Whether activations between tensor-parallel regions are split over tp along the sequence."""
        return self.parallel.sp and self.parallel.tp > 1

    @property
    def tp_comm_overlap(self) -> bool:
        """Whether communication at the edges of tensor-parallel regions is overlapped with the products there."""
        return self.sp and self.parallel.tp_comm_overlap

    def recomputes(self, module: str) -> bool:
        """Say whether a part of a layer is computed again in the backward pass."""
        return self.recompute.granularity == "selective" and module in self.recompute.modules

    def maps(self, *weights_ND: Tensor) -> Linears:
        """Give the linear maps of one input: in FP8 where that is asked for and the sizes fit."""
        ours = self.device.type != "cuda" or torch.cuda.get_device_capability(self.device)[0] == 9
        if self.fp8 is None or not ours:
            return linears
        sizes = [size for weight in weights_ND for size in weight.shape]
        if not fits(self.device, *sizes, blocks=self.fp8.blockwise):
            return linears
        return Fp8Linears(self.fp8, topology_of(weights_ND[0]).pieces[0].name)

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
