"""An exponential mean of the weights beside whatever optimizer trains them, in full precision and sharded as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runtime.optim.config import EMA
from runtime.optim.protocol import Optimizer
from runtime.optim.staging import Staging
from runtime.parallel.masters import has_remainders, join, pieces, read_masters, write_masters
from runtime.parallel.shards import Shard, new_state


class WithMean:
    """An optimizer that keeps the mean of the masters too; for engine and checkpoints it is one state more."""

    def __init__(self, inner: Optimizer, shards: Sequence[Shard], decay: float, staging: Staging | None = None) -> None:
        """Make room for the mean; loading starts it.

        Args:
            inner: updates the masters.
            shards: what it updates.
            decay: share of the old mean that each step keeps.
            staging: the way to what is in the host's memory; None where nothing is.
        """
        self._staging = staging
        self._inner, self._shards, self._decay = inner, shards, decay
        self._means = {id(shard): new_state(shard) for shard in shards}

    @property
    def num_steps(self) -> int:
        """Updates so far, those that were skipped not counted."""
        return self._inner.num_steps

    @num_steps.setter
    def num_steps(self, count: int) -> None:
        self._inner.num_steps = count

    @property
    def divisor(self) -> Tensor | None:
        """What gradients were divided by in the last step."""
        return self._inner.divisor

    def states(self, shard: Shard) -> Sequence[str]:
        """Those of the optimizer, and the mean."""
        return (*self._inner.states(shard), EMA)

    def state(self, shard: Shard, name: str) -> Tensor:
        """A state of a shard, [N] as its master; live memory."""
        return self._means[id(shard)] if name == EMA else self._inner.state(shard, name)

    def set_lr(self, lr: float, decoupled_lr: float | None = None) -> None:
        """Set the learning rate of the next step, and that of embedding and head where it is another."""
        self._inner.set_lr(lr, decoupled_lr)

    @torch.no_grad()
    def step(self, grad_divisor: Tensor, skip: Tensor) -> None:
        """Update the masters, then the mean; arguments as of `Optimizer.step`."""
        self._inner.step(grad_divisor, skip)
        if self._staging is not None:
            self._staging.begin()
        for shard in self._shards:
            # A step that is left out has no weight: the mean stays as it is, and no branch waits for the device.
            self._follow(shard, torch.where(skip, 0.0, 1.0 - self._decay).to(self._means[id(shard)].dtype))

    def _follow(self, shard: Shard, share: Tensor) -> None:
        """Move the mean of a shard towards its master."""
        mean, master = self._means[id(shard)], shard.master
        if not shard.offloaded:
            for part in pieces(shard):
                mean[part].lerp_(read_masters(shard, part), share)
            return
        assert self._staging is not None

        def work(piece: slice, staged: list[Tensor]) -> None:
            found = staged[1] if shard.separate_master else master[piece]
            if has_remainders(shard):
                assert shard.rounded is not None
                found = join(shard.rounded[piece], found)
            staged[0].lerp_(found, share)

        self._staging.update([mean, master] if shard.separate_master else [mean], work, written=1)

    def settle(self) -> None:
        """Wait until what lies in the host's memory is that of the last step."""
        self._inner.settle()

    def scalars(self) -> dict[str, Any]:
        """Give what a checkpoint must keep besides tensors, the decay among it."""
        return self._inner.scalars() | {"ema_decay": self._decay}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave; the run's own decay holds."""
        self._inner.load_scalars(scalars)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Have the masters hold the mean, and the mean the masters, for a while; without memory for a second copy."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self.settle()
        for shard in self._shards:
            mean = self._means[id(shard)]
            for part in pieces(shard):
                kept = read_masters(shard, part).clone()
                write_masters(shard, part, mean[part])
                mean[part] = kept
