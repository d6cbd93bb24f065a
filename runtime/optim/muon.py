"""Muon, torch's own, for matrices; AdamW for everything else. Both are one optimizer for engine and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runtime.optim.adamw import AdamW
from runtime.optim.config import OptimConfig
from runtime.optim.staging import Staging
from runtime.parallel.shards import Shard
from runtime.parallel.tensor_settings import TensorSettings
from runtime.parallel.topology import blocks

MOMENTUM = "momentum_buffer"
"""The state's name: on disk `optimizer.momentum_buffer.<tensor>`."""


class Muon:
    """Orthogonalises the momentum of each matrix by itself: of each expert, of query, key and value.

    It needs whole matrices, so what cuts them is refused in `runtime.settings.check`. Every data-parallel rank computes
    the same update.

    Source:
        https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/_muon.py, which computes it; its matched scale of the
        update is that of https://arxiv.org/abs/2502.16982, section 2.2.
    """

    def __init__(self, config: OptimConfig, shards: Sequence[Shard], staging: Staging | None = None) -> None:
        """Set up the states.

        Args:
            config: rates, decay and Muon's own settings.
            shards: what to update.
            staging: None: whole matrices stay on the device.
        """
        assert staging is None, "runtime.settings.check refuses it"
        assert config.master_weights == "fp32", "runtime.settings.check refuses it: torch's Muon updates whole numbers"
        self._config = config
        self._matrices = [shard for shard in shards if is_of_matrices(shard)]
        self._rest = AdamW(config, [shard for shard in shards if not is_of_matrices(shard)])
        self._momentum = {id(shard): torch.zeros_like(shard.master) for shard in self._matrices}
        self._members = [member for shard in self._matrices for member in self._views(shard)]
        groups: dict[TensorSettings, list[nn.Parameter]] = {}
        for parameter, _, settings in self._members:
            groups.setdefault(settings, []).append(parameter)
        self._settings = list(groups)
        self._muon = torch.optim.Muon(
            [
                {"params": members, "weight_decay": config.weight_decay if settings.decay else 0.0}
                for settings, members in groups.items()
            ],
            lr=config.lr,
            momentum=config.muon_momentum,
            ns_steps=config.muon_num_ns_steps,
            adjust_lr_fn=config.muon_adjust_lr,
        )
        for parameter, momentum, _ in self._members:
            self._muon.state[parameter][MOMENTUM] = momentum
        self.set_lr(config.lr)

    def _views(self, shard: Shard) -> Iterator[tuple[nn.Parameter, Tensor, TensorSettings]]:
        """The matrices of a shard with their momentum, as views of the flat tensors."""
        for part in shard.parts():
            for block in blocks(part.slot.topology, part.slot.cols, part.begin, part.end):
                assert block.rect.shape == block.global_shape, f"{block.name}: Muon needs the whole matrix"
                if not block.settings.frozen:
                    flat = (shard.master, self._momentum[id(shard)])
                    master, momentum = (block.of(x[part.range], part.begin) for x in flat)
                    yield nn.Parameter(master, requires_grad=False), momentum, block.settings

    @property
    def num_steps(self) -> int:
        """Updates so far, those that were skipped not counted."""
        return self._rest.num_steps

    @num_steps.setter
    def num_steps(self, count: int) -> None:
        self._rest.num_steps = count

    @property
    def divisor(self) -> Tensor | None:
        """What gradients were divided by in the last step."""
        return self._rest.divisor

    def states(self, shard: Shard) -> Sequence[str]:
        """The momentum of matrices, the two moments of everything else."""
        return (MOMENTUM,) if id(shard) in self._momentum else self._rest.states(shard)

    def state(self, shard: Shard, name: str) -> Tensor:
        """A state of a shard, [N] as its master; live memory."""
        return self._momentum[id(shard)] if name == MOMENTUM else self._rest.state(shard, name)

    def set_lr(self, lr: float, decoupled_lr: float | None = None) -> None:
        """Set the learning rate of the next step, and that of embedding and head where it is another."""
        self._rest.set_lr(lr, decoupled_lr)
        for group, settings in zip(self._muon.param_groups, self._settings, strict=True):
            group["lr"] = lr * settings.lr_scale

    @torch.no_grad()
    def step(self, grad_divisor: Tensor, skip: Tensor) -> None:
        """Update the masters; arguments as of `Optimizer.step`."""
        self._rest.step(grad_divisor, skip)
        if not self._matrices or bool(skip):  # torch's step can't be left out on the device: the host waits here
            return
        gradients = (view for shard in self._matrices for view in _gradients(shard))
        for (parameter, _, _), gradient in zip(self._members, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype) / grad_divisor.to(parameter.dtype)
        self._muon.step()  # type: ignore[no-untyped-call]
        self._muon.zero_grad(set_to_none=True)
        for shard in self._matrices:
            if shard.rounded is not None:
                shard.rounded.copy_(shard.master)

    def settle(self) -> None:
        """Nothing is under way."""

    def scalars(self) -> dict[str, Any]:
        """Give what a checkpoint must keep besides tensors."""
        return self._rest.scalars()

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave."""
        self._rest.load_scalars(scalars)


def is_of_matrices(shard: Shard) -> bool:
    """Say whether Muon updates a shard; a parameter's tensors are all matrices of the layers, or none is."""
    return any(piece.settings.matrix for part in shard.parts() for piece in part.slot.topology.pieces)


def _gradients(shard: Shard) -> Iterator[Tensor]:
    """The gradients of the matrices of a shard, in the order of its views."""
    for part in shard.parts():
        for block in blocks(part.slot.topology, part.slot.cols, part.begin, part.end):
            if not block.settings.frozen:
                yield block.of(shard.grad_shard[part.range], part.begin)
