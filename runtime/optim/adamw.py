"""AdamW over the flat shards of this rank, the global gradient norm, and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from runtime.optim.config import OptimConfig
from runtime.parallel.shards import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """torch's fused AdamW on master weights; gradients are clipped inside the same kernel."""

    def __init__(self, config: OptimConfig, shards: Sequence[Shard]) -> None:
        """Set up the moments.

        Args:
            config: rates and decay.
            shards: what to update.
        """
        self.shards = shards
        self.num_steps = 0
        """Updates so far, those that were skipped not counted."""
        groups = [
            {
                "params": [shard.master for shard in shards if shard.topology.decay is decay],
                "weight_decay": config.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
        ]
        self._torch = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        for shard in shards:
            self._torch.state[shard.master] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.master.device),
                **{name: torch.zeros_like(shard.master) for name in MOMENTS},
            }

    def moment(self, shard: Shard, name: str) -> Tensor:
        """A moment of a shard, [N] as its master; `name` is exp_avg or exp_avg_sq."""
        moment: Tensor = self._torch.state[shard.master][name]
        return moment

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._torch.param_groups:
            group["lr"] = lr

    def set_num_steps(self, num_steps: int) -> None:
        """Say how many updates the moments have seen, for their bias correction."""
        self.num_steps = num_steps
        for shard in self.shards:
            self._torch.state[shard.master]["step"].fill_(num_steps)

    def step(self, grad_divisor: Tensor, skip: Tensor) -> None:
        """Update the masters.

        Args:
            grad_divisor: 0-dim; gradients are divided by it first (loss scale over clip coefficient).
            skip: 0-dim bool; true leaves weights, moments and step counts as they are.
        """
        for shard in self.shards:
            shard.master.grad = shard.grad_shard
        # The attributes through which torch.amp.GradScaler talks to the fused kernel: nothing is read back by the host.
        self._torch.grad_scale = grad_divisor.float()  # type: ignore[attr-defined]
        self._torch.found_inf = skip.float()  # type: ignore[attr-defined]
        self._torch.step()
        for shard in self.shards:
            shard.master.grad = None


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
    norms: list[Tensor] = torch._foreach_norm(grads)  # type: ignore[assignment]
    return torch.stack(list(norms)).double().square().sum()
