"""The mixture-of-experts layer: router, dispatch, experts.

Legend: T tokens of this rank, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeconv.errors import LayoutError, MoeconvError
from moeconv.families.compute import Gate
from runtime.fp8.scaling import Scaling
from runtime.moe.budgeted_dispatch import make_dispatch
from runtime.moe.clamped_experts import ClampedExperts
from runtime.moe.config import MoEConfig
from runtime.moe.dispatch import Dispatch, run_all_gather, run_all_to_all, run_local
from runtime.moe.experts import Experts
from runtime.moe.groups import MoEGroups
from runtime.moe.router import Router
from runtime.moe.routing import Routing
from runtime.moe.row_budget import RowBudget
from runtime.moe.statistics import RouterStats
from runtime.parallel.collectives import gather_from, group_size, split_to

__all__ = ["MoEGroups", "MoELayer", "moe_layers", "reset_stats", "set_loss_scale", "set_row_budget"]


class ExpertSizes(NamedTuple):
    """What experts of either kind are built with."""

    num_local_experts: int
    hidden_size: int
    ffn_local_size: int


class MoELayer(nn.Module):
    """A sparse SwiGLU layer.

    Parameters of a rank, with E_local = E / ep and F_local = F / etp: router.weight [E, D], experts.w13
    [E_local, 2 F_local, D] (rows of w1, then of w3), experts.w2 [E_local, D, F_local].
    """

    def __init__(
        self,
        config: MoEConfig,
        groups: MoEGroups | None = None,
        *,
        hidden_size: int,
        ffn_hidden_size: int,
        num_local_experts: int | None = None,
        ffn_local_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        router_param_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        gate: Gate | None = None,
        fp8: Scaling | None = None,
        name: str = "experts",
    ) -> None:
        """Build the layer for this rank.

        Args:
            config: what the layer computes.
            groups: the process groups; None: one rank.
            hidden_size: D.
            ffn_hidden_size: F, the width of a whole expert.
            num_local_experts: E_local, experts of this rank; None: an equal share over `groups.ep`.
            ffn_local_size: F_local, the width of this rank's piece of an expert; None: an equal share over `groups.etp`.
            dtype: of the parameters and the tokens.
            router_param_dtype: of the router's weight where it differs.
            device: where the parameters live.
            gate: of experts with biases and a clamped gate; None for plain SwiGLU.
            fp8: the bounds of what is computed in FP8; None for nothing.
            name: of the experts, in the model.

        Raises:
            LayoutError: experts or widths don't divide over the groups.
        """
        super().__init__()
        groups = groups or MoEGroups()
        ep, etp = group_size(groups.ep), group_size(groups.etp)
        if num_local_experts is None:
            _divides("experts", config.num_experts, ep)
            num_local_experts = config.num_experts // ep
        if ffn_local_size is None:
            _divides("an expert's width", ffn_hidden_size, etp)
            ffn_local_size = ffn_hidden_size // etp
        self.config, self.groups = config, groups
        self.row_budget: RowBudget | None = None  # with room for rows where the host is not to wait for their numbers
        self.router = Router(config, groups, hidden_size=hidden_size, dtype=router_param_dtype or dtype, device=device)
        sizes = ExpertSizes(num_local_experts, hidden_size, ffn_local_size)
        self.experts: Experts | ClampedExperts
        assert gate is None or fp8 is None, "clamped experts and FP8: `runtime.settings.check` refuses them"
        if gate is None:
            self.experts = Experts(config, **sizes._asdict(), dtype=dtype, device=device, fp8=fp8, name=name)
        else:
            self.experts = ClampedExperts(config, gate, **sizes._asdict(), shares=etp, dtype=dtype, device=device)

    @property
    def stats(self) -> RouterStats:
        """Routing statistics since `reset_stats`."""
        return self.router.stats

    @property
    def loss_scale(self) -> Tensor | float:
        """Factor of the attached losses' gradients."""
        return self.router.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: Tensor | float) -> None:
        self.router.loss_scale = scale

    def take_router_logits(self) -> Tensor | None:
        """Give up the last micro-batch's [T, E] logits, with aux_loss_mode hf in training: kept, they would keep its graph."""
        logits, self.router.logits = self.router.logits, None
        return logits

    def reset_stats(self) -> None:
        """Begin a new global batch."""
        reset_stats([self])

    def finish_step(self) -> None:
        """End a global batch: move the expert bias. Every rank calls it."""
        self.router.finish_step()

    def forward(self, x_TD: Tensor, sequence_T: Tensor | None = None, num_sequences: int = 1) -> Tensor:
        """Apply the layer.

        Args:
            x_TD: [T, D] tokens: this rank's own with sequence parallelism, the same on all tp ranks without.
            sequence_T: [T] int64 sequence of each token; only seq_aux_loss needs it.
            num_sequences: sequences of the micro-batch.

        Returns:
            [T, D].

        Raises:
            MoeconvError: x is not [T, D].
        """
        if x_TD.dim() != 2 or x_TD.shape[1] != self.router.weight.shape[1]:
            raise MoeconvError(
                f"the MoE layer takes tokens [T, {self.router.weight.shape[1]}], got {tuple(x_TD.shape)}"
            )
        tp = None if self.groups.sequence_parallel else self.groups.tp
        sizes = None
        if group_size(tp) > 1:
            parts = group_size(tp)
            sizes = [x_TD.shape[0] // parts + (rank < x_TD.shape[0] % parts) for rank in range(parts)]
            x_TD = split_to(x_TD, 0, tp, sizes)
            sequence_T = None if sequence_T is None else split_to(sequence_T, 0, tp, sizes)
        equal = self.groups.equal_tokens and (sizes is None or len(set(sizes)) == 1)
        routing = self.router(x_TD, sequence_T, num_sequences, equal_tokens=equal)
        if self.config.recompute_layer and torch.is_grad_enabled():
            run, random = self._run_experts, self.experts.draws
            again = checkpoint(run, x_TD, routing, equal, use_reentrant=False, preserve_rng_state=random)
            out = cast(Tensor, again)
        else:
            out = self._run_experts(x_TD, routing, equal)
        return gather_from(out, 0, tp, sizes)

    def begin(self, x_TD: Tensor, sequence_T: Tensor | None = None, num_sequences: int = 1) -> Dispatch:
        """Route tokens and make their rows ready to travel, for whoever does the steps of `Dispatch`.

        Args:
            x_TD: [T, D] this rank's own tokens.
            sequence_T: as of `forward`.
            num_sequences: likewise.

        Returns:
            What is under way; its result is that of `forward`.
        """
        routing = self.router(x_TD, sequence_T, num_sequences, equal_tokens=self.groups.equal_tokens)
        return self._dispatch(x_TD, routing, overlapped=True)

    def _dispatch(self, x_TD: Tensor, routing: Routing, *, overlapped: bool) -> Dispatch:
        args = (x_TD, routing, self.experts, self.groups)
        return make_dispatch(*args, overlapped=overlapped, budget=self.row_budget, training=self.training)

    def _run_experts(self, x_TD: Tensor, routing: Routing, equal_tokens: bool) -> Tensor:
        if group_size(self.groups.ep) == 1 and group_size(self.groups.etp) == 1:
            return run_local(x_TD, routing, self.experts)
        # Where every expert is here in part, gathering tokens moves a K-th of what gathering their rows does.
        if self.config.dispatcher == "alltoall" and group_size(self.groups.ep) > 1:
            return run_all_to_all(self._dispatch(x_TD, routing, overlapped=False))
        return run_all_gather(x_TD, routing, self.experts, self.groups, equal_tokens=equal_tokens)


def _divides(what: str, size: int, parts: int) -> None:
    if size % parts:
        raise LayoutError(f"{what} ({size}) can't be shared evenly by {parts} ranks")


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def reset_stats(layers: Sequence[MoELayer]) -> None:
    """Begin a new global batch in layers of one device: everything that is summed up over one starts at 0, in one launch."""
    sums = [tensor for layer in layers for tensor in layer.router.batch_sums()]
    for dtype in {tensor.dtype for tensor in sums}:
        torch._foreach_zero_([tensor for tensor in sums if tensor.dtype == dtype])


def set_row_budget(model: nn.Module, budget: RowBudget | None) -> None:
    """Have all layers take their room for rows from a budget; None: the host reads how many there are."""
    for layer in moe_layers(model):
        layer.row_budget = budget


def set_loss_scale(model: nn.Module, scale: Tensor | float) -> None:
    """Set the factor of the attached losses' gradients in all layers.

    Args:
        model: any module.
        scale: 1 / (micro-batches * dp) where the model's loss is a mean over the global batch whose gradients are
            summed over ranks; times the loss scale of fp16.
    """
    for layer in moe_layers(model):
        layer.loss_scale = scale
