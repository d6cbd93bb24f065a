"""The optimizer of a run, by its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from runtime.optim.adamw import AdamW
from runtime.optim.config import OptimConfig
from runtime.optim.ema import WithMean
from runtime.optim.muon import Muon
from runtime.optim.protocol import Optimizer
from runtime.optim.staging import Staging
from runtime.parallel.shards import Shard

# By the name that --optimizer takes.
OPTIMIZERS: Mapping[str, Callable[[OptimConfig, Sequence[Shard], Staging | None], Optimizer]] = {
    "adam": AdamW,
    "muon": Muon,
}


def make_optimizer(config: OptimConfig, shards: Sequence[Shard]) -> Optimizer:
    """Make the optimizer of a run, with the mean of the weights where it is wanted.

    Args:
        config: the settings.
        shards: what to update.

    Returns:
        The optimizer, its states at zero.
    """
    staging = Staging.for_shards(shards)
    optimizer = OPTIMIZERS[config.optimizer](config, shards, staging)
    return optimizer if config.ema_decay is None else WithMean(optimizer, shards, config.ema_decay, staging)
