"""AdamW over the flat shards of this rank, the global gradient norm, and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.rounding import rounding_seed
from runtime.optim.config import OptimConfig
from runtime.optim.staging import Staging
from runtime.parallel.masters import join, off_ties, split
from runtime.parallel.shards import Shard, new_state, segments
from runtime.parallel.tensor_settings import TensorSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """One pass over each shard: clipping, moments, masters, and the weights rounded from them."""

    def __init__(self, config: OptimConfig, shards: Sequence[Shard], staging: Staging | None = None) -> None:
        """Set up the moments.

        Args:
            config: rates, decay, and the moments' type.
            shards: what to update.
            staging: the way to what is in the host's memory; None where nothing is.
        """
        self.shards, self._staging = shards, staging
        self.num_steps = 0
        """Updates so far, those that were skipped not counted."""
        self.divisor: Tensor | None = None
        """What gradients were divided by in the last step."""
        self._config = config
        self._rates = (config.lr, config.lr)  # of everything, and of what is decoupled
        dtype = torch.bfloat16 if config.moments_dtype == "bfloat16" else None  # None: as the masters
        self._moments = [{name: new_state(shard, dtype) for name in MOMENTS} for shard in shards]
        self._places = {id(shard): place for place, shard in enumerate(shards)}
        self._segments = [[s for s in segments(shard) if not s.settings.frozen] for shard in shards]

    def states(self, shard: Shard) -> Sequence[str]:
        """The two moments."""
        return MOMENTS

    def state(self, shard: Shard, name: str) -> Tensor:
        """A moment of a shard, [N] as its master; `name` is exp_avg or exp_avg_sq."""
        return self._moments[self._places[id(shard)]][name]

    def set_lr(self, lr: float, decoupled_lr: float | None = None) -> None:
        """Set the learning rate of the next step, and that of embedding and head where it is another."""
        self._rates = (lr, lr if decoupled_lr is None else decoupled_lr)

    def scalars(self) -> dict[str, Any]:
        """Give the number of updates, on which the bias correction depends, and the settings.

        In the trainer a run's flags decide; a program that the run is exported to needs them from the checkpoint.
        """
        config = self._config
        betas = [config.adam_beta1, config.adam_beta2]
        return {
            "num_steps": self.num_steps,
            "betas": betas,
            "eps": config.adam_eps,
            "weight_decay": config.weight_decay,
        }

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take the number of updates that the moments have seen."""
        self.num_steps = int(scalars.get("num_steps", 0))

    def step(self, grad_divisor: Tensor, skip: Tensor) -> None:
        """Update the masters, and the weights that are rounded from them.

        Args:
            grad_divisor: 0-dim; gradients are divided by it first (loss scale over clip coefficient). They stay as they
                are.
            skip: 0-dim bool; true leaves weights and moments as they are.
        """
        self.divisor = grad_divisor
        if self._staging is not None:
            self._staging.begin()
        for shard, moments, found in zip(self.shards, self._moments, self._segments, strict=True):
            grad, rounded = shard.grad_shard, shard.rounded
            state = [shard.master, *(moments[name] for name in MOMENTS)]
            for part, settings in ((segment.range, segment.settings) for segment in found):
                weight = None if rounded is None else rounded[part]
                self._update_range(shard, grad[part], [x[part] for x in state], weight, settings, grad_divisor, skip)

    def settle(self) -> None:
        """Wait until masters and moments in the host's memory are those of the last step."""
        if self._staging is not None:
            self._staging.settle()

    def _update_range(
        self,
        shard: Shard,
        grad: Tensor,
        state: list[Tensor],
        weight: Tensor | None,
        settings: TensorSettings,
        divisor: Tensor,
        skip: Tensor,
    ) -> None:
        """Update a range of a shard; its master and moments may be in the host's memory."""
        if not shard.offloaded:
            self._update(grad, state, weight, settings, divisor, skip)
            return
        assert self._staging is not None
        here = 0 if shard.separate_master else 1  # the master, where it is the weight

        def work(piece: slice, staged: list[Tensor]) -> None:
            own = [*(x[piece] for x in state[:here]), *staged]
            rounded = None if weight is None else weight[piece]
            self._update(grad[piece], own, rounded, settings, divisor, skip, piece.start)

        self._staging.update(state[here:], work)

    @torch.no_grad()
    def _update(
        self,
        grad: Tensor,
        state: Sequence[Tensor],
        weight: Tensor | None,
        settings: TensorSettings,
        divisor: Tensor,
        skip: Tensor,
        first: int = 0,
    ) -> None:
        """Update elements that are trained alike.

        Args:
            grad: [N] their gradient.
            state: [N] each: master, or what the weight lacks of it; first and second moment.
            weight: [N] their copy in the compute dtype, to be written; None where there is none.
            settings: how they are trained.
            divisor: 0-dim; the gradient is divided by it.
            skip: 0-dim bool; true leaves everything as it is.
            first: place of the first in its range.
        """
        kept, exp_avg, exp_avg_sq = state
        config = self._config
        decay = config.weight_decay if settings.decay else 0.0
        rate = self._rates[settings.decoupled] * settings.lr_scale
        beta1, beta2, step = config.adam_beta1, config.adam_beta2, self.num_steps + 1
        if kept.is_cuda and kept.dtype != torch.float64:
            from runtime.kernels.adamw import adamw_step

            adamw_step(
                grad, kept, exp_avg, exp_avg_sq, weight, divisor.float(), skip,
                num_steps=step, lr=rate, beta1=beta1, beta2=beta2, eps=config.adam_eps, weight_decay=decay, first=first,
            )  # fmt: skip
            return
        halves = [kept] if weight is None or kept.dtype != torch.int16 else [weight, kept]
        master = kept if len(halves) == 1 else join(*halves)
        grad = grad.to(master.dtype) / divisor.to(master.dtype)
        mean = exp_avg.to(master.dtype).lerp(grad, 1 - beta1)
        second = exp_avg_sq.to(master.dtype).mul(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(config.adam_eps)
        updated = master * (1 - rate * decay)
        updated.addcdiv_(mean, denominator, value=-rate / (1 - beta1**step))
        if weight is not None and weight.dtype == torch.bfloat16:
            updated = off_ties(updated)
        if exp_avg.dtype == torch.bfloat16:
            bits = random_bits(first, mean.numel(), step, mean.device)
            mean, second = round_stochastically(mean, bits & 0xFFFF), round_stochastically(second, bits >> 16)
        changed = [updated] if len(halves) == 1 else split(updated)
        for old, new in ((exp_avg, mean), (exp_avg_sq, second), *zip(halves, changed, strict=True)):
            old.copy_(torch.where(skip, old.to(new.dtype), new))
        if weight is not None and len(halves) == 1:
            weight.copy_(master)


def random_bits(first: int, count: int, step: int, device: torch.device) -> Tensor:
    """Give the random bits of elements in a step, those of the kernel: an integer hash of the place and the step.

    Args:
        first: place of the first element in its range.
        count: elements.
        step: number of the update.
        device: where.

    Returns:
        [count] int64, 32 bits of each.
    """
    bits = torch.arange(first, first + count, device=device) ^ rounding_seed(step)
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Round to what bf16 can hold: up with the probability of what is cut off.

    Args:
        values: any shape; computed in fp32.
        bits: integers of the same shape, 16 random bits for each.

    Returns:
        In the dtype of values.
    """
    raw = values.float().view(torch.int32)
    rounded = ((raw + bits.to(torch.int32)) & -(2**16)).view(torch.float32)
    # Infinity and NaN keep their bits: a carry would turn one into the other.
    return torch.where(torch.isfinite(values), rounded, values).to(values.dtype)


def squared_norm(shards: Iterable[Shard], device: torch.device) -> Tensor:
    """This rank's summand of the squared norm of the whole gradient.

    Every element of the model's gradient is counted on exactly one rank, experts and tensor-parallel pieces included.

    Args:
        shards: this rank's shards.
        device: of the result.

    Returns:
        0-dim fp64; the sum over all ranks is the squared norm.
    """
    grads = [shard.grad_shard for shard in shards if shard.counted and shard.grad_shard.numel()]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cuda" and all(grad.dtype != torch.float64 for grad in grads):
        from runtime.kernels.adamw import square_sum

        return torch.stack([square_sum(grad) for grad in grads]).sum()
    # In fp64, since an fp32 sum of squares loses more the more elements there are.
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    return torch.stack(norms).square().sum()
