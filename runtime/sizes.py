"""How large a run's checkpoints are."""

from __future__ import annotations

import math

from moeconv.checkpoint import Checkpoint
from moeconv.families.adapted import AdaptedModel
from runtime.estimate.setup import Setup
from runtime.estimate.state import checkpoint_bytes
from runtime.model.context import TORCH_DTYPES
from runtime.settings.run import RunConfig


def num_parameters(checkpoint: Checkpoint) -> int:
    """Count the weights of a checkpoint, without the optimizer's state."""
    return sum(math.prod(t.shape) for t in checkpoint.tensors.values() if not t.name.startswith("optimizer."))


def saved_bytes(run: RunConfig, checkpoint: Checkpoint, world_size: int) -> int:
    """Count the bytes of tensors that a checkpoint of a run has.

    Args:
        run: the settings.
        checkpoint: where it starts; what of it isn't trained is saved, too.
        world_size: number of ranks.

    Returns:
        Bytes of weights, and of the optimizer's state where it is saved; of adapters those alone.
    """
    setup, model = Setup.of_run(run, world_size), run.model
    alone = checkpoint_bytes(setup, with_optimizer=False)
    states = checkpoint_bytes(setup) - alone if run.checkpoint.save_optim else 0
    if isinstance(model, AdaptedModel):
        return alone + states
    return num_parameters(checkpoint) * TORCH_DTYPES[run.dtype].itemsize + states
