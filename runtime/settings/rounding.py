"""What a run loses where it sums its gradients in bf16, said once at the start."""

from __future__ import annotations

from runtime.settings.check import data_parallel_size
from runtime.settings.run import RunConfig


def describe_rounding(run: RunConfig, world_size: int) -> list[str]:
    """Say how often a gradient's sum is rounded in a step.

    Args:
        run: the settings.
        world_size: number of processes.

    Returns:
        A line; none where sums are in fp32, where nothing is added up, or where nothing is trained.
    """
    if run.optim.main_grads_dtype != "bf16" or run.train.skip_train:
        return []
    dp = data_parallel_size(run.parallel, world_size)
    num = run.train.batch_sizes(dp).full // (run.train.micro_batch_size * dp)
    ranks = dp * run.parallel.cp
    sharded = run.parallel.fully_shard and ranks > 1
    summed = [f"{num} micro-batches"] if num > 1 and not sharded else []
    summed += [f"{ranks} ranks"] if ranks > 1 else []
    if not summed:
        return []
    return [
        f"gradients of {' and '.join(summed)} are added up in bf16, each sum rounded to 8 bits (2^-9 of it at most); "
        "--main-grads-dtype fp32 loses nothing, for 2 bytes a parameter more"
    ]
