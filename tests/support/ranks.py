"""New ranks without imports: they are forked from one server for each of pytest's workers."""

from __future__ import annotations

import shutil

import torch.multiprocessing as mp

from runtime.parity.ranks import RankPool

# What ranks and torchrun import, which takes seconds of each process. The server does it once, for Megatron's ranks as
# well: there is one server in a process. None of it may use a GPU, start threads, or change how something else computes.
PRELOADED = (
    "runtime.start",
    "runtime.parity.case",
    "runtime.parallel.pipeline",
    "torch.distributed.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.mixtral.modeling_mixtral",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.safe_globals",
    "tests.support.frozen",
)


def preload() -> None:
    """Say what the server is to import, if it doesn't run yet."""
    mp.set_forkserver_preload(list(PRELOADED))


def make_pool(size: int) -> RankPool:
    """Make a pool whose ranks begin within milliseconds.

    Args:
        size: the most ranks of a case.

    Returns:
        The pool; close it.
    """
    if shutil.which("nvidia-smi") is not None:  # a server that asked for GPUs would leave its ranks without
        return RankPool(size)
    preload()
    return RankPool(size, "forkserver")
