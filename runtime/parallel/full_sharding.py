"""Full sharding by FSDP2: weights are sharded over data parallel too, and gathered layer by layer.

Dense parameters shard over dp x cp, experts over the expert-data-parallel axis. The shards are kept in fp32 and are the
master weights; gathered copies have the compute dtype, gradients are reduced in fp32 unless bf16 is wanted, and added up over
micro-batches in fp32. What has no data-parallel replica
to shard over stays in buckets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from runtime.parallel.buckets import BucketStore
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.packing import on_host
from runtime.parallel.shards import Shard, ShardPart, Slot, StoredRange, wide_dtype, zero_frozen
from runtime.parallel.topology import Topology, attach, matrix_cols, topology_of


class ShardedParameter:
    """This rank's rows of one parameter."""

    distributed = True

    offloaded = False

    def __init__(self, name: str, parameter: nn.Parameter, dtype: torch.dtype, mesh: ParallelMesh) -> None:
        """Wrap a parameter that FSDP has sharded.

        Args:
            name: its name in the model.
            parameter: the DTensor.
            dtype: what the model computes in.
            mesh: the ranks.
        """
        self.topology: Topology = topology_of(parameter)
        self.group = mesh.group(self.topology.data_axis)
        self.primary = self.topology.is_primary(mesh)
        self._parameter, self._dtype = parameter, dtype
        local = self._local(parameter)
        self.master, self.device = local.view(-1), local.device
        rows_before, cols = self._first_row(mesh), matrix_cols(parameter)
        row_size = parameter.shape.numel() // parameter.shape[0]
        self._begin = rows_before * row_size
        self.slot = Slot(name, self.topology, parameter.shape, cols, 0)
        self.partial_groups = [mesh.group(axis) for axis in self.topology.partial if mesh.size(axis) > 1]
        self.separate_master = dtype != self.master.dtype

    @staticmethod
    def _local(parameter: Tensor) -> Tensor:
        return cast(DTensor, parameter.detach()).to_local()

    def _first_row(self, mesh: ParallelMesh) -> int:
        """FSDP deals rows out as torch.chunk does: ceil(rows / ranks) each, fewer or none at the end."""
        axis = self.topology.data_axis
        rows = self._parameter.shape[0]
        per_rank = -(-rows // mesh.size(axis))
        return min(mesh.rank(axis) * per_rank, rows)

    @property
    def counted(self) -> bool:
        """Whether this shard takes part in the gradient norm."""
        return self.primary

    @property
    def grad_shard(self) -> Tensor:
        """[N] the gradient of the global batch."""
        grad = self._parameter.grad
        return torch.zeros_like(self.master) if grad is None else self._local(grad).view(-1)

    @property
    def rounded(self) -> Tensor | None:
        """Nothing: FSDP rounds the shards when it gathers them."""
        return None

    def parts(self) -> Iterator[ShardPart]:
        """The one range that this rank has, if any."""
        if self.master.numel():
            yield ShardPart(self.slot, self._begin, self._begin + self.master.numel(), 0)

    def held(self) -> Iterator[StoredRange]:
        """The weights that this rank must load."""
        yield StoredRange(self.slot, self._begin, self.master)

    def masters_from_weights(self) -> None:
        """Nothing to do: the shard is both."""

    def written(self) -> Iterator[StoredRange]:
        """The weights that this rank saves, in the compute dtype."""
        yield StoredRange(self.slot, self._begin, self.master.to(self._dtype))

    def reduce_partial(self) -> None:
        """Finish the sum over the axes beside data parallelism."""
        if self.topology.frozen:
            return
        for group in self.partial_groups:
            dist.all_reduce(self.grad_shard, group=group)
        zero_frozen(self)


class FullyShardedStore:
    """All parameters of this rank: sharded by FSDP where there are replicas, in buckets otherwise."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        mesh: ParallelMesh,
        device: torch.device,
        *,
        host_share: float = 0.0,
        remainders: bool = False,
        bf16_grads: bool = False,
    ) -> None:
        """Shard the stages in place.

        Args:
            stages: this rank's stages with tagged parameters on the meta device.
            mesh: the ranks.
            device: where they go.
            host_share: of the elements that this rank updates, whose optimizer state is in the host's memory. The masters
                of what is sharded are not: FSDP gathers weights from them.
            remainders: whether masters of bf16 weights in buckets are kept as what these lack of them. What is sharded has
                one fp32 shard for both, as many bytes as a bf16 weight and its remainder.
            bf16_grads: whether gradients of bf16 weights are reduced in bf16, and in buckets summed in it. FSDP adds what it has
                reduced to a gradient of its shard's type, fp32.
        """
        named = [(f"{i}.{name}", p) for i, stage in enumerate(stages) for name, p in stage.named_parameters()]
        sharded = [(name, p) for name, p in named if mesh.size(topology_of(p).data_axis) > 1]
        chosen = {id(p) for _, p in sharded}
        left = [(name, p) for name, p in named if id(p) not in chosen]
        tags = {name: (topology_of(p), p.dtype) for name, p in sharded}
        self._plain = BucketStore(
            stages,
            left,
            mesh,
            device,
            distributed=False,
            host_share=host_share,
            remainders=remainders,
            bf16_grads=bf16_grads,
        )
        for stage in stages:
            _shard(stage, mesh, device, chosen, bf16_grads=bf16_grads)
        now = {f"{i}.{name}": p for i, stage in enumerate(stages) for name, p in stage.named_parameters()}
        self._sharded: list[ShardedParameter] = []
        for name, (topology, dtype) in tags.items():
            attach(now[name], topology)
            self._sharded.append(ShardedParameter(name, now[name], dtype, mesh))
        trained = [shard for shard in self._sharded if not shard.topology.frozen]
        for shard, offloaded in zip(trained, on_host([x.master.numel() for x in trained], host_share), strict=True):
            shard.offloaded = offloaded
        self.shards: list[Shard] = [*self._plain.shards, *self._sharded]

    def begin(self, num_backwards: int | None) -> None:
        """Set gradients to zero before a step."""
        self._plain.begin(num_backwards)
        for shard in self._sharded:
            shard._parameter.grad = None

    def collect(self) -> None:
        """Take gradients of what is not sharded; the rest stays with FSDP."""
        self._plain.collect()

    def finish(self) -> None:
        """Finish all reductions."""
        self._plain.finish()
        for shard in self._sharded:
            shard.reduce_partial()

    def weights_from_masters(self) -> None:
        """Bring the masters into the weights; FSDP's shards are both."""
        self._plain.weights_from_masters()

    def share_weights(self) -> None:
        """Bring updated weights to all ranks; FSDP gathers its own when they are needed."""
        self._plain.share_weights()

    def settle(self) -> None:
        """Wait for updated weights of what isn't sharded."""
        self._plain.settle()


def _shard(stage: nn.Module, mesh: ParallelMesh, device: torch.device, chosen: set[int], *, bf16_grads: bool) -> None:
    """Apply FSDP to the layers of a stage, their experts, and the rest of the stage."""
    # Layers give the next one summands, which nothing adds to in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    of_layers: list[list[nn.Module]] = []  # experts first, as the backward pass needs them
    axes: dict[nn.Module, str] = {}
    for layer in cast(nn.ModuleList, stage.get_submodule("layers")):
        experts = [module for module in layer.modules() if _holds_experts(module)]
        axes |= dict.fromkeys(experts, "edp") | {layer: "dp_cp"}
        of_layers.append([module for module in (*experts, layer) if mesh.group(axes[module]) is not None])
    axes[stage] = "dp_cp"
    ignored = {p for p in stage.parameters() if id(p) not in chosen}
    dtype = next(p.dtype for p in stage.parameters())
    wide = wide_dtype(dtype)
    low = dtype if dtype != wide else None
    reduced = dtype if bf16_grads and dtype == torch.bfloat16 else wide
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=reduced, cast_forward_inputs=False)
    ids = {id(p) for p in ignored}
    replaced: dict[int, nn.Parameter] = {}
    for module in stage.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in ids:
                frozen = topology_of(parameter).frozen  # then the shards needn't be masters
                values = torch.zeros(parameter.shape, dtype=dtype if frozen else wide, device=device)
                fresh = nn.Parameter(values, requires_grad=not frozen)
                module._parameters[name] = replaced.setdefault(id(parameter), fresh)
    for module, axis in axes.items():
        group = mesh.group(axis)
        if group is None:
            continue
        device_mesh = DeviceMesh.from_group(group, device.type)
        fully_shard(module, mesh=device_mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=ignored)
        unit = cast(FSDPModule, module)
        unit.set_gradient_divide_factor(1.0)  # all gradients are summands of the global mean
        unit.set_force_sum_reduction_for_comms(True)
    _gather_ahead(of_layers)


def _gather_ahead(of_layers: Sequence[Sequence[nn.Module]]) -> None:
    """Let a layer's weights travel while the one before it is computed, in either pass.

    By itself FSDP is one module ahead. That is a layer's experts behind its attention, which is over before they have come.
    """
    for before, after in pairwise(of_layers):
        for here, ahead, backward in ((before, after, False), (after, before, True)):
            if not here or not ahead:
                continue
            first, units = cast(FSDPModule, here[-1]), [cast(FSDPModule, module) for module in ahead]
            if backward:
                first.set_modules_to_backward_prefetch(units)
            else:
                first.set_modules_to_forward_prefetch(units[::-1])


def _holds_experts(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(topology_of(p).data_axis == "edp" for p in own)
